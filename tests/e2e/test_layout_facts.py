"""The facts that confirm each member of a layout, on requests of a real worker.

All facts hold with the right layout. Each member that is moved contradicts a fact.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from e2e.http1_client import Address, Http1Connection, request_bytes, trusting_tls
from e2e.http2_client import Http2Connection, Http2Request
from e2e.layout_facts import Structs, Worker
from e2e.nginx_server import NginxServer, free_ports, nginx_version, wait_until
from otel_nginx_ebpf.nginx import catalogue

DECISION = Path(__file__).parents[2] / "docs" / "decisions" / "0014-doubt-of-a-layout.md"

# Of each struct's members: what speaks for it, and what is moved to show that: the member, or it and all behind it.
ROWS = {
    (struct, member): (moved, fact)
    for struct, member, moved, fact in re.findall(
        r"^\| `(\w+)` \| `([\w:]+)` \| (alone|with those behind it|not) \| ([\w ,]*)",
        DECISION.read_text(),
        re.MULTILINE,
    )
}
RELEASE = ".".join(map(str, nginx_version()))
HELD = catalogue.shipped().layouts.get(RELEASE, {})
"""What the catalogue has of this nginx; nothing where it does not know its release."""
MOVED = [
    (struct, member)
    for (struct, member), (moved, _) in ROWS.items()
    if moved != "not" and (not HELD or member in HELD.get(struct, {}))
]

HTTP = """
    large_client_header_buffers 4 16k;
    upstream two { server @DEAD1@ max_fails=0; server @UP@; }
    server {
        listen 127.0.0.1:@PORT@;
        listen [::1]:@PORT@;
        listen unix:@PREFIX@/http.sock;
        server_name first.example other.example;
        location / { proxy_pass http://@UP@; }
        location /ended { return 204; }
        location /unbuffered { proxy_pass http://@UP@; proxy_buffering off; }
        location /two { proxy_pass http://two; proxy_next_upstream_tries 3; }
        location /variable { set $to @UP@; proxy_pass http://$to; }
        location ~ ^/regex/(.*)$ { proxy_pass http://@UP@; }
        location /limited { root @PREFIX@; limit_rate 1; }
        location /if { if ($request_method) { set $a 1; limit_rate 1; } root @PREFIX@; }
        location /except { limit_except GET { deny all; } root @PREFIX@; limit_rate 1; }
        location /rewritten { rewrite ^ /limited/large.bin break; root @PREFIX@; limit_rate 1; }
        location /named { error_page 418 = @there; return 418; }
        location @there { proxy_pass http://@UP@; }
        location /redirected { error_page 418 =200 /limited/large.bin; return 418; }
        location /ssi/ { ssi on; root @PREFIX@; }
        location /mirrored { mirror /copy; proxy_pass http://@UP@; }
        location = /copy { internal; proxy_pass http://@UP@/?delay_ms=600000; }
        location /auth { auth_request /copy; root @PREFIX@; }
    }
    server {
        listen 127.0.0.1:@TLS@ ssl http2 sndbuf=16k;
        ssl_certificate @CERTIFICATES@/certificate.pem;
        ssl_certificate_key @CERTIFICATES@/key.pem;
        location / { proxy_pass http://@UP@; }
        location /limited { root @PREFIX@; limit_rate 1; }
        location /huge.bin { root @PREFIX@; }
    }
    server {
        listen 127.0.0.1:@PROXY@ proxy_protocol;
        set_real_ip_from 127.0.0.1;
        real_ip_header proxy_protocol;
        location / { proxy_pass http://@UP@; }
    }
"""

WAITING, ANSWERING = "delay_ms=600000", "bytes=3000&parts=3&part_ms=600000"
TARGETS = [
    *(
        f"{path}?{query}"
        for path in ("/", "/unbuffered", "/two", "/variable", "/regex/x")
        for query in (WAITING, ANSWERING)
    ),
    f"http://absolute.example/path?{WAITING}",
    f"/a/../b%20c//d?{WAITING}",
    "/limited/large.bin",
    "/if/large.bin",
    "/except/large.bin",
    "/rewritten",
    f"/named?{WAITING}",
    "/redirected",
    "/ssi/page.html",
    f"/mirrored?{WAITING}",
    f"/auth?{WAITING}",
]


@pytest.fixture(scope="module")
def worker(public_directory: Path, upstream_addresses: dict[str, str]) -> Iterator[Worker]:
    """One whose requests do not end."""
    prefix = public_directory / "layout-facts"
    prefix.mkdir()
    for folder in ("limited", "if", "except"):
        (prefix / folder).mkdir()
        (prefix / folder / "large.bin").write_bytes(bytes(100_000))
    with (prefix / "huge.bin").open("wb") as huge:
        huge.truncate(1 << 24)
    (prefix / "ssi").mkdir()
    (prefix / "ssi" / "page.html").write_text(f'<!--# include virtual="/regex/inside?{WAITING}" -->')
    port, tls, proxy = free_ports(3)
    words = {
        "PORT": str(port),
        "TLS": str(tls),
        "PROXY": str(proxy),
        "PREFIX": str(prefix),
        "CERTIFICATES": str(public_directory),
        "UP": upstream_addresses["ipv4"],
        "DEAD1": upstream_addresses["dead1"],
    }
    nginx = NginxServer(prefix, re.sub(r"@(\w+)@", lambda word: words[word[1]], HTTP))
    addresses: list[Address] = [("127.0.0.1", port), ("::1", port), f"{prefix}/http.sock"]
    nginx.start([*addresses, ("127.0.0.1", tls), ("127.0.0.1", proxy)])
    (pid,) = nginx.worker_pids()
    found = Worker(pid)
    with ExitStack() as stack:
        stack.callback(nginx.stop)
        stack.callback(found.close)

        def send(address: Address, raw: bytes, secure: bool = False) -> None:
            connection = stack.enter_context(Http1Connection(address, trusting_tls() if secure else None))
            connection.send(raw)

        fields = {"User-Agent": "facts", "Connection": "keep-alive", "Referer": "x"}
        for number, target in enumerate(TARGETS):
            send(addresses[number % 3], request_bytes("GET", target, fields))
        for version, method in (("0.9", "GET"), ("1.0", "GET"), ("1.7", "PURGE"), ("1.1", "POST")):
            ending = f" HTTP/{version}\r\nHost: x\r\n\r\n" if version != "0.9" else "\r\n"
            send(addresses[0], f"{method} /?{WAITING}{ending}".encode())
        many = {f"X-{number}": "x" for number in range(45)}
        send(addresses[0], request_bytes("POST", f"/?{WAITING}", many, b"body" * 10_000))
        send(addresses[0], b"GET /half")
        send(addresses[0], b"GET /half HTTP/1.1\r\nHost: x\r\nUser-A")
        kept = stack.enter_context(Http1Connection(addresses[0]))
        assert kept.request("/ended").status == 204
        kept.send(request_bytes("GET", f"/?{WAITING}"))
        send(("127.0.0.1", tls), request_bytes("GET", f"/?{ANSWERING}"), secure=True)
        send(("127.0.0.1", proxy), b"PROXY TCP4 192.0.2.7 192.0.2.8 1234 80\r\n" + request_bytes("GET", f"/?{WAITING}"))
        http2 = Http2Connection(("127.0.0.1", tls), tls=True)
        stack.callback(http2.close)
        http2.start([Http2Request(f"/?{WAITING}"), Http2Request(f"/?{ANSWERING}"), Http2Request("/limited/large.bin")])
        unread = Http2Connection(("127.0.0.1", tls), tls=True)
        stack.callback(unread.close)
        unread.start([Http2Request("/huge.bin")] * 4)
        wait_until(lambda: len(found.main_requests()) >= len(TARGETS) + 17, "all requests to be under way")
        yield found
        assert nginx.problems() == []


def test_a_right_layout_is_contradicted_by_no_request(worker: Worker) -> None:
    found = {request: worker.contradicted(request) for request in worker.main_requests()}
    assert len(found) >= len(TARGETS) + 17
    assert not any(found.values()), found


def test_something_speaks_for_every_member_of_the_catalogue() -> None:
    used = {(struct, member) for struct, members in catalogue.shipped().members().items() for member in members}
    assert ROWS.keys() == used


def moved(structs: Structs, place: tuple[str, str], how: str, by: int) -> Structs:
    struct, member = place
    at = structs[struct][member]
    return {
        **structs,
        struct: {
            each: offset + by if each == member or (how != "alone" and offset > at) else offset
            for each, offset in structs[struct].items()
        },
    }


@pytest.mark.parametrize("by", [8, 16])
@pytest.mark.parametrize("place", MOVED, ids=".".join)
def test_a_member_that_is_elsewhere_is_noticed(worker: Worker, place: tuple[str, str], by: int) -> None:
    how, facts = ROWS[place]
    wrong = moved(worker.structs, place, how, by)
    contradicted: set[str] = set()
    for request in worker.main_requests():
        contradicted |= worker.contradicted(request, wrong)
    assert contradicted, facts
