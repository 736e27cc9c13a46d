"""Lines of nginx's error log: their text, and the request that each of them is for."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_nginx_ebpf.emitter.pipeline import Decoding
from otel_nginx_ebpf.export.interface import Completed
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.traces.abi import LIMITS
from otel_nginx_ebpf.traces.error_log import LEVELS, LogLine, LogLines, is_log_line
from otel_nginx_ebpf.traces.url import redact_text
from unit.sample_traces import MONO_NS, RETRIED, STATIC, log_end, log_line

HEAD = "2026/11/30 19:43:51 [error] 8578#8578: *7 "
REFUSED = "connect() failed (111: Connection refused) while connecting to upstream"
ADDED = (
    ', client: 127.0.0.1, server: a.example, request: "GET /x?sig=1 HTTP/1.1", upstream: "http://[::1]:1/x", host: "h"'
)
KEY = 4711, 7, 3


def line(text: str | bytes, **fields: int) -> bytes:
    return log_line(text, **{"connection": 7, "connection_requests": 3, "level": 4, **fields})


def joined(*raws: bytes) -> tuple[tuple[LogLine, ...], int]:
    """The lines of the request `KEY`, and how many are lost."""
    lines = LogLines()
    for raw in (*raws, log_end(len(raws), connection=7, connection_requests=3)):
        assert is_log_line(raw)
        lines.add(raw)
    return lines.take(*KEY), lines.take_lost()


def message(text: str | bytes, **fields: int) -> str | None:
    found, lost = joined(line(text, **fields))
    assert len(found) + lost == 1
    return found[0].message if found else None


def test_a_line() -> None:
    raw = line(f"{HEAD}{REFUSED}{ADDED}\n", attempt=1, error_number=111)
    assert joined(raw) == ((LogLine(MONO_NS, "error", 111, 2, REFUSED),), 0)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"{HEAD}{REFUSED}{ADDED}\n", REFUSED),
        (f"<187>Nov 30 19:43:51 host nginx: {HEAD}{REFUSED}{ADDED}", REFUSED),
        (f"<187>Nov 30 19:43:51  nginx: {HEAD}short", "short"),
        (f'{HEAD}a b, client: unix:, server: , request: "GET / HTTP/1.0"\n', "a b"),
        (f"{HEAD}a b, client: 2001:db8::1, ser\n", "a b"),
        (f"{HEAD}a b, client: 10.0.0.1\n", "a b"),
        (f"{HEAD}PHP: 1, client: yours, 2{ADDED}\n", "PHP: 1, client: yours, 2"),
        (f"{HEAD}two\nlines{ADDED}\n", "two\nlines"),
        (f"{HEAD}\n", ""),
        (f"{HEAD}é".encode() + b"\xff\n", "é\\xff"),
    ],
)
def test_the_message(text: str | bytes, shown: str) -> None:
    assert message(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "HTTP/1.1 200 OK\r\n\r\nsecret",
        f"{HEAD}x".replace("error", "warn"),
        f"{HEAD}x".replace("*7 ", "*8 "),
        f"{HEAD}x".replace("*7 ", ""),
        f"x {HEAD}x",
    ],
)
def test_what_the_probe_did_not_see_is_no_line(text: str) -> None:
    assert message(text) is None


@pytest.mark.parametrize("level", range(1, len(LEVELS) + 1))
def test_each_level_of_nginx(level: int) -> None:
    (found,), _ = joined(line(HEAD.replace("error", LEVELS[level - 1]) + "x", level=level))
    assert found.level == LEVELS[level - 1]


@pytest.mark.parametrize(
    ("text", "attempt"),
    [
        (REFUSED, 1),
        ("upstream timed out (110: …) while reading response header from upstream", 1),
        ("upstream prematurely closed connection while reading upstream", 1),
        ("peer closed connection in SSL handshake while SSL handshaking to upstream", 1),
        ('open() "/x" failed (2: …)', None),
        ("client timed out while sending to client", None),
        ('open() "/ while reading upstream/x" failed', None),
    ],
)
def test_a_line_is_about_an_attempt_if_nginx_worked_on_it(text: str, attempt: int | None) -> None:
    (found,), _ = joined(line(f"{HEAD}{text}{ADDED}\n", attempt=0))
    assert found.attempt == attempt
    (found,), _ = joined(line(f"{HEAD}{text}{ADDED}\n"))
    assert found.attempt is None


def test_lines_that_did_not_arrive_are_counted_for_requests_with_a_record() -> None:
    lines = LogLines()
    lines.add(line(HEAD + "second"))
    lines.add(log_end(3, connection=7, connection_requests=3))
    assert [each.message for each in lines.take(*KEY)] == ["second"]
    assert lines.take_lost() == 2
    lines.add(log_end(2, connection=7, connection_requests=4))  # no record: the sampler left it out
    assert lines.take(4711, 7, 5) == ()
    assert lines.take_lost() == 0


def test_a_request_gets_its_own_lines_only() -> None:
    """By worker, connection and number: two streams, two workers, and a request that the sampler left out."""
    lines = LogLines()
    keys = [(1, 7, 3), (1, 7, 4), (2, 7, 3), (1, 8, 3)]
    for pid, connection, requests in keys:
        text = f"{HEAD}{pid} {connection} {requests}".replace("*7", f"*{connection}")
        lines.add(line(text, worker_pid=pid, connection=connection, connection_requests=requests))
    for pid, connection, requests in reversed(keys):
        lines.add(log_end(1, worker_pid=pid, connection=connection, connection_requests=requests))
        if requests == 4:
            assert lines.take(pid, 9, 9) == ()
            assert lines.take(pid, connection, requests) == ()
        else:
            (found,) = lines.take(pid, connection, requests)
            assert found.message == f"{pid} {connection} {requests}"
    assert lines.take_lost() == 0


def test_a_record_whose_end_of_lines_was_lost_has_its_lines() -> None:
    lines = LogLines()
    lines.add(line(HEAD + "x"))
    assert lines.take(4711, 7, 2) == ()
    assert [each.message for each in lines.take(*KEY)] == ["x"]
    assert (lines.take(*KEY), lines.take_lost(), lines._count) == ((), 0, 0)


def test_lines_of_requests_that_never_end_are_bounded() -> None:
    lines = LogLines()
    for number in range(10_000):
        lines.add(line(HEAD.replace("*7", f"*{number}") + "x", connection=number))
    assert len(lines._waiting) == 4096
    lines.add(log_end(1, connection=0, connection_requests=3))
    assert (lines.take(4711, 0, 3), lines.take_lost()) == ((), 1)


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1))
def test_any_bytes(text: bytes, count: int) -> None:
    lines = LogLines()
    for raw in (line(text), line(text)[:40], line(text)[:8], log_end(count, connection=7, connection_requests=3)):
        lines.add(raw)
    lines.take(*KEY)


class Taken:
    at_once = 8

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def take(self, completed: list[Completed]) -> None:
        self.requests += [request for request, _, _ in completed]

    def shutdown(self, timeout_s: float) -> None: ...


def test_in_the_pipeline() -> None:
    """STATIC is request 1 of connection 1, RETRIED of connection 2."""
    exporter, stats = Taken(), Stats()
    first = line(HEAD.replace("*7", "*1") + "of the first", connection=1, connection_requests=1)
    lost = log_end(2, connection=2, connection_requests=1)
    take = Decoding(exporter, stats).take
    for raws in ([first], [log_end(1, connection=1, connection_requests=1), STATIC, lost], [RETRIED]):
        take([(raw, 0, {}) for raw in raws])
    assert [[each.message for each in request.log_lines] for request in exporter.requests] == [["of the first"], []]
    assert stats.lost == {"partial_log_lines_missing": 2}


def test_a_line_for_no_request() -> None:
    """Of the master, of an idle connection, and one that is not as the probe saw it."""
    master = HEAD.replace("*7 ", "") + "worker process 1 exited on signal 9\n"
    raws = [
        log_line(master, level=4, lines=0, error_number=0),
        log_line(HEAD + "client closed keepalive connection", connection=7, level=4, lines=0),
        log_line(HEAD + "x", connection=8, level=4, lines=0),
    ]
    lines = LogLines(keeps_untraced=True)
    for raw in raws:
        lines.add(raw, 5, {"a": "b"})
    found = lines.take_untraced(0)
    assert [each.message for each in found] == [
        "worker process 1 exited on signal 9",
        "client closed keepalive connection",
    ]
    assert {(each.unix_offset_ns, *each.resource.items()) for each in found} == {(5, ("a", "b"))}
    assert (lines.take_damaged(), lines.take_untraced(9), lines.take_rest(), lines._count) == (1, [], [], 0)
    forgetful = LogLines()
    for raw in raws:
        forgetful.add(raw)
    assert forgetful.take_rest() == []


def test_a_record_is_no_line() -> None:
    assert not is_log_line(STATIC)
    assert not is_log_line(RETRIED)
    assert len(LEVELS) == 8
    assert LIMITS["NO_ATTEMPT"] > LIMITS["ATTEMPTS_MAX"]


@pytest.mark.parametrize(
    ("text", "redacted", "without"),
    [
        ('"^/" does not match "/a?b=c&sig=x"', '"^/" does not match "/a?b=c&sig=REDACTED"', '"^/" does not match "/a"'),
        ('rewritten data: "/a", args: "sig=x&b=c"', 'rewritten data: "/a", args: "sig=REDACTED&b=c"',
         'rewritten data: "/a", args: ""'),
        ('open() "/a?sig=x"y&b=\'c" failed', 'open() "/a?sig=REDACTED&b=\'c" failed', 'open() "/a" failed'),
        ('open() "/a?b&sig=x"y\'z" failed', 'open() "/a?b&sig=REDACTED" failed', 'open() "/a" failed'),
        ("design=1 assigned=2", "design=1 assigned=2", "design=1 assigned=2"),
        ("no live upstreams", "no live upstreams", "no live upstreams"),
    ],
)  # fmt: skip
def test_secrets_in_a_message(text: str, redacted: str, without: str) -> None:
    assert redact_text(text, query=True) == redacted
    assert redact_text(text, query=False) == without
