"""A request has its own times, not the times of its connection, of another stream, or of an earlier attempt."""

import socket
import time
from collections.abc import Iterator

import h2.config
import h2.connection
import h2.events
import pytest

from e2e.http1_client import request_bytes
from e2e.http2_client import Http2Connection, Http2Request
from e2e.nginx_server import nginx_version
from e2e.raw_upstream import RawUpstream, read_head
from e2e.stage import Stage
from e2e.timing import Slack

HTTP2 = "listen @LISTEN@ http2;"

GOAWAY = b"\0\0\x08\x07\0\0\0\0\0"
"""The frame's header (RFC 9113, 6.8)."""


def headerless(connection: socket.socket) -> None:
    """HTTP/0.9: a body and nothing else, in two parts."""
    read_head(connection)
    connection.sendall(b"first")
    time.sleep(0.3)
    connection.sendall(b"second")


def early_frames(connection: socket.socket) -> None:
    """gRPC whose connection and stream say something ahead of the answer."""
    peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    peer.initiate_connection()
    connection.sendall(peer.data_to_send())
    while True:
        events = peer.receive_data(connection.recv(65536))
        connection.sendall(peer.data_to_send())
        for event in events:
            if isinstance(event, h2.events.StreamEnded):
                time.sleep(0.05)
                peer.increment_flow_control_window(1 << 16)
                peer.increment_flow_control_window(1 << 16, event.stream_id)
                connection.sendall(peer.data_to_send())
                connection.sendall(GOAWAY + event.stream_id.to_bytes(4, "big") + bytes(4))
                time.sleep(0.1)
                peer.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/grpc")])
                peer.send_data(event.stream_id, b"\0\0\0\0\0")
                peer.send_headers(event.stream_id, [("grpc-status", "0")], end_stream=True)
                connection.sendall(peer.data_to_send())


@pytest.fixture(scope="module")
def upstream_addresses(upstream_addresses: dict[str, str]) -> Iterator[dict[str, str]]:
    peers = {"headerless": RawUpstream(headerless), "early_frames": RawUpstream(early_frames)}
    yield upstream_addresses | {name: peer.address for name, peer in peers.items()}
    for peer in peers.values():
        peer.stop()


@pytest.mark.nginx(
    listen=HTTP2,
    server="""
        location /a { proxy_pass http://@UP@/?delay_ms=100; mirror /mirror; }
        location /mirror { internal; proxy_pass http://@OTHER@/?delay_ms=900; }
        location /b { proxy_pass http://@UP@/?delay_ms=500; }
    """,
)
def test_a_stream_s_last_byte_is_its_own(stage: Stage) -> None:
    """Another stream writes while the mirror of the first one keeps it from ending."""
    connection = Http2Connection(stage.addresses["ipv4"], tls=False)
    connection.exchange([Http2Request("/a"), Http2Request("/b")])
    first = next(each for each in stage.exchanges(2, Slack(end_early=True)) if each.log["request_uri"] == "/a")
    (write,) = first.trace.named("downstream write")
    assert 0.09 < (write.end_unix_ns - first.trace.server.start_unix_ns) / 1e9 < 0.4
    assert first.trace.server.seconds > 0.89
    connection.close()


@pytest.mark.nginx(
    listen=HTTP2,
    server="""
        location / { auth_request /auth; proxy_pass http://@UP@; }
        location /auth {
            internal; proxy_pass http://@OTHER@/?delay_ms=500;
            proxy_pass_request_body off; proxy_set_header Content-Length "";
        }
        location /other { return 200; }
    """,
)
@pytest.mark.parametrize("held", [False, True], ids=["with-its-head", "later"])
def test_a_body_that_nginx_kept_was_not_read_when_it_is_used(stage: Stage, held: bool) -> None:
    connection = Http2Connection(stage.addresses["ipv4"], tls=False)
    connection.start([Http2Request("/", "POST", body=b"b" * 1000)], hold_bodies=held)
    if held:
        time.sleep(0.1)
        connection.release_bodies()
    time.sleep(0.2)
    connection.start([Http2Request("/other")])
    assert [each.status for each in connection.finish()] == [200, 200]
    posted = next(each for each in stage.exchanges(2) if each.log["request_method"] == "POST")
    assert posted.trace.named("downstream read") == []  # nothing tells when the body's frames came
    assert posted.trace.server.seconds > 0.49
    connection.close()


@pytest.mark.skipif(
    nginx_version() >= (1, 25, 1), reason="nginx 1.25.1 and later push nothing: run with an earlier one"
)
@pytest.mark.nginx(
    listen=HTTP2,
    server="http2_push_preload on;"
    "location / { proxy_pass 'http://@UP@/?delay_ms=300&header=Link:%3C/pushed%3E%3Brel=preload'; }"
    "location /pushed { return 200 pushed; }",
)
def test_a_pushed_request_begins_when_it_is_pushed(stage: Stage) -> None:
    connection = Http2Connection(stage.addresses["ipv4"], tls=False)
    connection.exchange([Http2Request("/")])
    pushed = next(each for each in stage.exchanges(2) if each.log["request_uri"] == "/pushed")
    assert pushed.trace.server.seconds < 0.1
    assert pushed.trace.outline() == ["downstream write"]
    connection.close()


@pytest.mark.nginx(server="location / { proxy_pass http://@HEADERLESS@; proxy_buffering off; }")
def test_a_response_without_a_header_is_written_from_its_first_byte_on(stage: Stage) -> None:
    with stage.connect() as connection:
        connection.send(request_bytes("GET", "/", {"Connection": "close"}))
        assert connection.read_until_closed() == b"firstsecond"
    each = stage.exchange(Slack(header_early=True))
    (write,) = each.trace.named("downstream write")
    assert write.seconds > 0.29
    assert each.trace.server.attributes["network.protocol.version"] == "1.1"


@pytest.mark.nginx(listen=HTTP2, server="location / { grpc_pass grpc://@EARLY_FRAMES@; }")
def test_frames_ahead_of_the_answer_are_no_answer(stage: Stage) -> None:
    connection = Http2Connection(stage.addresses["ipv4"], tls=False)
    connection.exchange([Http2Request("/", "POST", (("te", "trailers"),), b"\0\0\0\0\0")])
    (exchange,) = stage.exchange().trace.named("upstream exchange")
    assert exchange.attributes["nginx.upstream.time_to_first_byte_ns"] > 149_000_000
    connection.close()


@pytest.mark.nginx(
    server="location / { return 200 answered; post_action /action; }"
    "location = /action { internal; proxy_pass http://@UP@/?delay_ms=300; }"
)
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_post_action_changes_neither_version_nor_route(stage: Stage, version: str) -> None:
    with stage.connect() as connection:
        connection.send(f"GET / HTTP/{version}\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert connection.read_until_closed().endswith(b"answered")
    each = stage.exchange(Slack(end_early=True, write_early=True))
    attributes = each.trace.server.attributes
    assert attributes["network.protocol.version"] == version
    assert attributes.get("http.route") in (None, "/")
    assert each.trace.server.seconds > 0.29
