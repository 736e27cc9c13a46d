"""Faults of collectors: the exporter retries or gives up as the OTLP specification says, and accounts for every trace.

Each fault is the fault of a real server, and the test sees that it happened.
"""

import logging
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from email.utils import formatdate
from pathlib import Path

import grpc
import pytest
from opentelemetry.sdk.resources import Resource

from otel_nginx_ebpf.export.otlp.exporter import OtlpExporter
from otel_nginx_ebpf.export.otlp.sender import make_sender
from otel_nginx_ebpf.metrics.stats import Stats
from unit.otlp_receiver import GrpcReceiver, HttpReceiver, Later
from unit.sample_traces import renumbered, static_trace

Code = grpc.StatusCode
PROTOCOLS = [("grpc", GrpcReceiver), ("http/protobuf", HttpReceiver)]
SPANS = len(static_trace().spans)


class Subject:
    """An exporter, and what was offered to it: each trace is a message of its own."""

    def __init__(
        self,
        protocol: str,
        port: int,
        *,
        scheme: str = "http",
        host: str = "127.0.0.1",
        queue: int = 1000,
        batch: int = SPANS,
        timeout_s: int = 1,
    ) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"{scheme}://{host}:{port}")
        self.patch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", str(timeout_s))
        self.stats = Stats()
        self.offered = 0
        self.exporter = OtlpExporter(
            make_sender(protocol),
            Resource({}),
            self.stats,
            queue_spans=queue,
            queue_bytes=1 << 20,
            batch_spans=batch,
            delay_s=0,
        )

    def offer(self, count: int) -> None:
        for _ in range(count):
            self.offered += 1
            self.exporter.export(renumbered(static_trace(), self.offered))

    def end(self, timeout_s: float) -> dict[str, int]:
        """Returns the losses; they and what was exported are all that was offered."""
        self.exporter.shutdown(timeout_s)
        lost = self.stats.lost
        assert self.offered == self.stats.exported + sum(
            count for cause, count in lost.items() if cause.startswith("lost_")
        )
        return lost


@contextmanager
def subject(protocol: str, port: int, **options: object) -> Iterator[Subject]:
    made = Subject(protocol, port, **options)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.exporter.shutdown(0)
        made.patch.undo()


def wait_until(condition: Callable[[], object], deadline_s: float = 30) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


RETRIED = [
    *((GrpcReceiver, code) for code in (Code.CANCELLED, Code.DEADLINE_EXCEEDED, Code.ABORTED)),
    *((GrpcReceiver, code) for code in (Code.OUT_OF_RANGE, Code.UNAVAILABLE, Code.DATA_LOSS)),
    (GrpcReceiver, Later(Code.UNAVAILABLE, 1.5)),
    (GrpcReceiver, Later(Code.UNAVAILABLE, 0.2)),
    (GrpcReceiver, Later(Code.RESOURCE_EXHAUSTED, 1.5)),
    *((HttpReceiver, status) for status in (429, 502, 503, 504)),
    (HttpReceiver, Later(429, 2)),
    (HttpReceiver, Later(503, 2)),
    (HttpReceiver, Later(503, "soon")),
]


@pytest.mark.parametrize(("kind", "refusal"), RETRIED)
def test_retried(kind: type[GrpcReceiver | HttpReceiver], refusal: Code | int | Later) -> None:
    with kind() as receiver:
        receiver.refusals = [refusal]
        with subject("grpc" if kind is GrpcReceiver else "http/protobuf", receiver.port) as sender:
            sender.offer(3)
            assert sender.end(20) == {}
        assert receiver.trace_ids == [1, 2, 3]
        assert len(receiver.refused_s) == 1
        if isinstance(refusal, Later) and isinstance(refusal.after, float | int):
            assert receiver.taken_s[0] - receiver.refused_s[0] >= refusal.after


def test_retried_at_the_time_that_was_named() -> None:
    with HttpReceiver() as receiver:
        named_s = int(time.time()) + 3
        receiver.refusals = [Later(503, formatdate(named_s, usegmt=True))]
        with subject("http/protobuf", receiver.port) as sender:
            sender.offer(1)
            assert sender.end(20) == {}
        assert time.time() >= named_s
        assert (len(receiver.refused_s), receiver.trace_ids) == (1, [1])


REFUSED = [
    *((GrpcReceiver, code) for code in (Code.INVALID_ARGUMENT, Code.UNAUTHENTICATED, Code.PERMISSION_DENIED)),
    *((GrpcReceiver, code) for code in (Code.UNIMPLEMENTED, Code.INTERNAL, Code.NOT_FOUND, Code.RESOURCE_EXHAUSTED)),
    *((HttpReceiver, status) for status in (301, 400, 401, 403, 404, 413, 500, 501)),
    (HttpReceiver, Later(400, 20)),
]


@pytest.mark.parametrize(("kind", "refusal"), REFUSED)
def test_refused_for_good(
    kind: type[GrpcReceiver | HttpReceiver], refusal: Code | int | Later, caplog: pytest.LogCaptureFixture
) -> None:
    with kind() as receiver:
        receiver.refusals = [refusal]
        with subject("grpc" if kind is GrpcReceiver else "http/protobuf", receiver.port) as sender:
            sender.offer(3)
            assert sender.end(10) == {"lost_export_refused": 1}
        assert receiver.trace_ids == [2, 3]
        assert len(receiver.refused_s) == 1, "it was not asked again"
    (said,) = [record.getMessage() for record in caplog.records if "delivering again" not in record.getMessage()]
    assert said.startswith("collector: ")
    assert said.endswith(" for /v1/traces" if kind is HttpReceiver else ": as the test wants")


@pytest.mark.parametrize(("protocol", "kind"), PROTOCOLS)
def test_a_partial_success_is_not_repeated(protocol: str, kind: type[GrpcReceiver | HttpReceiver]) -> None:
    with kind() as receiver:
        receiver.rejected_spans = 1
        with subject(protocol, receiver.port) as sender:
            sender.offer(2)
            assert sender.end(10) == {"partial_export_rejected": 2}
        assert receiver.trace_ids == [1, 2]


def test_who_says_200_has_taken_it_whatever_else_he_says() -> None:
    with HttpReceiver() as receiver:
        receiver.body = b"<html>\xff\xff"
        with subject("http/protobuf", receiver.port) as sender:
            sender.offer(1)
            assert sender.end(10) == {}
        assert receiver.trace_ids == [1]


class RawServer:
    """Takes connections and says `answer` on each; with None it takes none, and they are half open."""

    def __init__(self, answer: bytes | None) -> None:
        self.connections = 0
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._ended = False
        self._thread = threading.Thread(target=self._serve)
        if answer is not None:
            self._socket.settimeout(0.05)
            self._thread.start()

    def _serve(self) -> None:
        while not self._ended:
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            with connection:
                self.connections += 1
                connection.settimeout(5)
                connection.recv(1 << 16)
                connection.sendall(self._answer or b"")

    def close(self) -> None:
        self._ended = True
        if self._answer is not None:
            self._thread.join()
        self._socket.close()


@pytest.mark.parametrize(("protocol", "kind"), PROTOCOLS)
@pytest.mark.parametrize(
    "answer",
    [b"\x15\x03\x01 this is no HTTP\r\n\r\n", b"", None, b"HTTP/1.1 400 Bad Request\r\nContent-Length: 9\r\n\r\nno"],
    ids=["garbage", "hung up", "half open", "broken off"],
)
def test_a_server_that_is_no_collector_until_one_takes_its_place(
    protocol: str, kind: type[GrpcReceiver | HttpReceiver], answer: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = RawServer(answer)
    try:
        with subject(protocol, wrong.port) as sender:
            sender.offer(2)
            wait_until(lambda: any("collector: " in record.getMessage() for record in caplog.records))
            assert answer is None or wrong.connections > 0
            wrong.close()
            with kind(wrong.port) as receiver:
                wait_until(lambda: set(receiver.trace_ids) == {1, 2})  # on a busy machine an answer may come too late
                assert sender.end(10) == {}
    finally:
        wrong.close()


class SilencedProxy:
    """Passes connections on to a collector; `silence` ends that for those that are open and the next one, but closes
    none."""

    def __init__(self, port: int) -> None:
        self.bytes_ignored = 0
        self._next_is_silent = False
        self._target = port
        self._sockets: list[socket.socket] = []
        self._open = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                silent = self._open = threading.Event()
                if self._next_is_silent:
                    self._next_is_silent = False
                    silent.set()
                self._sockets += (client, server)
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(*pair, silent), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, silent: threading.Event) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if silent.is_set():
                    self.bytes_ignored += len(data)
                else:
                    target.sendall(data)

    def silence(self) -> None:
        self._next_is_silent = True
        self._open.set()

    def close(self) -> None:
        for each in (self._listener, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.mark.parametrize(("protocol", "kind"), PROTOCOLS)
def test_a_connection_whose_other_end_falls_silent(
    protocol: str, kind: type[GrpcReceiver | HttpReceiver], caplog: pytest.LogCaptureFixture
) -> None:
    """As where the collector's machine has lost its power: no FIN, no RST. Another connection is made."""
    with kind() as receiver:
        proxy = SilencedProxy(receiver.port)
        try:
            with subject(protocol, proxy.port) as sender:
                sender.offer(1)
                wait_until(lambda: receiver.trace_ids == [1])
                proxy.silence()
                sender.offer(2)
                wait_until(lambda: len(receiver.trace_ids) >= 3)
                assert proxy.bytes_ignored > 0
                assert "collector: " in caplog.text
                assert sender.end(10) == {}
        finally:
            proxy.close()
    assert sorted(set(receiver.trace_ids)) == [1, 2, 3]


@pytest.mark.parametrize(("protocol", "kind"), PROTOCOLS)
def test_a_collector_that_comes_back_at_the_end(protocol: str, kind: type[GrpcReceiver | HttpReceiver]) -> None:
    """After an outage of some seconds the pauses between two tries are long; at the end they are not."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subject(protocol, port, timeout_s=30) as sender:
        sender.offer(2)
        time.sleep(3.5)  # in the middle of a pause of 4 s
        with ThreadPoolExecutor(1) as ending:
            began_s = time.monotonic()
            ended = ending.submit(sender.end, 10)
            with kind(port) as receiver:
                assert ended.result() == {}
                assert time.monotonic() - began_s < 2
                assert receiver.trace_ids == [1, 2]


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_certificate_that_is_not_trusted(
    protocol: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept and tried again: it may be mended. Nothing is ever sent to the stranger."""
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(variable, raising=False)
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    how = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    whom = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", key, "-out", certificate]
    subprocess.run(["openssl", "req", *how, *whom, *files], check=True, capture_output=True)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    with GrpcReceiver(credentials=credentials) as receiver, subject(protocol, receiver.port, scheme="https") as sender:
        sender.offer(2)
        wait_until(lambda: "ertificate" in caplog.text.lower() or "CERTIFICATE_VERIFY_FAILED" in caplog.text)
        assert sender.end(0) == {"lost_export_failed": 2}
        assert receiver.requests == []


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_name_that_does_not_resolve(protocol: str, caplog: pytest.LogCaptureFixture) -> None:
    with subject(protocol, 4317, host="collector.invalid") as sender:
        sender.offer(1)
        wait_until(lambda: "collector: " in caplog.text)
        assert "resol" in caplog.text.lower()
        assert sender.end(0) == {"lost_export_failed": 1}


@pytest.mark.parametrize(("protocol", "kind"), PROTOCOLS)
def test_a_slow_collector_costs_what_does_not_fit_the_queue(
    protocol: str, kind: type[GrpcReceiver | HttpReceiver]
) -> None:
    with kind() as receiver:
        receiver.delay_s = 0.2
        with subject(protocol, receiver.port, queue=10 * SPANS) as sender:
            sender.offer(100)
            lost = sender.end(20)
        assert lost == {"lost_queue_full": 100 - len(receiver.trace_ids)}
        assert 10 <= len(receiver.trace_ids) < 100


@pytest.mark.parametrize(("protocol", "kind"), PROTOCOLS)
def test_a_collector_that_goes_away_under_load_and_comes_back(
    protocol: str, kind: type[GrpcReceiver | HttpReceiver], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with kind() as first, subject(protocol, first.port, queue=20_000, batch=10 * SPANS) as sender:
        port = first.port
        sender.offer(500)
        wait_until(lambda: first.trace_ids)
        first.__exit__()
        sender.offer(500)
        wait_until(lambda: "collector: " in caplog.text)
        sender.offer(500)
        with kind(port) as second:
            assert sender.end(30) == {}
        # What was under way when it went may have been taken, and is sent again.
        assert sorted(set(first.trace_ids + second.trace_ids)) == list(range(1, 1501))
        assert second.trace_ids == sorted(second.trace_ids)
