"""Stream and mail traffic in the same worker: it has no trace, and the traces of http requests beside it are right."""

import poplib
import re
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from e2e.dns_server import DnsServer
from e2e.http1_client import Address, Http1Connection, trusting_tls
from e2e.nginx_server import BUILD, nginx_build
from e2e.pop3_server import Pop3Server
from e2e.stage import Stage
from e2e.timing import CROWDED

PROXIED = ["downstream read", "upstream connect", "upstream exchange", "downstream write"]
READ_WRITE = ["downstream read", "downstream write"]

NAME = "found.test"


def _loading(module: str) -> str | None:
    """The directive that loads a module; empty where it is built in, None where this nginx has none."""
    options = nginx_build()
    if re.search(rf"--with-{module}(\s|$)", options):
        return ""
    directory = re.search(r"--modules-path=/(\S+)", options)
    if directory is None:
        return None
    file = f"{directory[1]}/ngx_{module}_module.so"
    return f"load_module /{file};" if (Path(BUILD, "tree") if BUILD else Path("/")).joinpath(file).exists() else None


LOADING = {module: _loading(module) for module in ("stream", "mail")}

pytestmark = pytest.mark.skipif(
    None in LOADING.values(),
    reason=f"needs nginx's stream and mail, this one has {LOADING}; `make setup-test` installs both for Debian's own",
)


@pytest.fixture(scope="module")
def upstream_addresses(upstream_addresses: dict[str, str]) -> Iterator[dict[str, str]]:
    with DnsServer({NAME: ["127.0.0.1"]}) as dns, Pop3Server() as pop3:
        yield {**upstream_addresses, "dns": dns.address, "pop3_port": str(pop3.port)}


CERTIFICATE = "ssl_certificate @CERTIFICATE@; ssl_certificate_key @KEY@;"
MAIN = f"""
    {LOADING["stream"]} {LOADING["mail"]}
    stream {{
        upstream http {{ server @DEAD1@; server @UP@; }}
        server {{ listen @LISTEN_TCP@; proxy_pass http; }}
        server {{ listen @LISTEN_TCP@ udp; proxy_pass @DNS@; proxy_responses 1; }}
        server {{ listen @LISTEN_TLS@ ssl; {CERTIFICATE} proxy_pass @UP@; }}
        server {{ listen @LISTEN_FRONT@; proxy_pass @LISTEN@; }}
        server {{ listen @LISTEN_ABSENT@; proxy_pass unix:@PREFIX@/absent; }}
    }}
    mail {{
        auth_http @LISTEN@/auth;
        server {{ listen @LISTEN_MAIL@; protocol pop3; }}
        server {{ listen @LISTEN_MAIL_TLS@ ssl; {CERTIFICATE} protocol pop3; }}
    }}
"""


def ask_through_stream(addresses: dict[str, Address]) -> None:
    with Http1Connection(addresses["tcp"]) as connection:
        assert [connection.request("/stream").status for _ in range(2)] == [200, 200]


def ask_through_encrypted_stream(addresses: dict[str, Address]) -> None:
    with Http1Connection(addresses["tls"], trusting_tls()) as connection:
        assert connection.request("/stream?bytes=100000").body_bytes == 100_000


def ask_for_a_name(addresses: dict[str, Address]) -> None:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in NAME.split("."))
    query = struct.pack("!6H", 1, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.connect(addresses["tcp"])
        client.send(query)
        assert client.recv(512).endswith(socket.inet_aton("127.0.0.1"))


def ask_nobody(addresses: dict[str, Address]) -> None:
    """connect() fails at once."""
    with Http1Connection(addresses["absent"]) as connection:
        assert connection.read_until_closed() == b""


def read_mail(addresses: dict[str, Address]) -> None:
    host, port = addresses["mail"]
    _read_mail(poplib.POP3(str(host), int(port), timeout=10))


def read_encrypted_mail(addresses: dict[str, Address]) -> None:
    host, port = addresses["mail_tls"]
    _read_mail(poplib.POP3_SSL(str(host), int(port), timeout=10, context=trusting_tls()))


def _read_mail(mailbox: poplib.POP3) -> None:
    mailbox.user("someone")
    mailbox.pass_("secret")
    assert mailbox.stat() == (0, 0)
    mailbox.quit()


def ask_http_through_stream(addresses: dict[str, Address]) -> None:
    """nginx's client is nginx: both ends of the connection are in one process."""
    with Http1Connection(addresses["front"]) as connection:
        assert [connection.request("/app/front").status for _ in range(2)] == [200, 200]


def ask_http(addresses: dict[str, Address]) -> None:
    with Http1Connection(addresses["ipv4"]) as connection:
        for target in ("/app/?delay_ms=10", "/dead/", "/short", "/app/?bytes=200000"):
            assert connection.request(target).status == (502 if target == "/dead/" else 200)


FOREIGN = [
    ask_through_stream, ask_through_encrypted_stream, ask_for_a_name, ask_nobody, read_mail, read_encrypted_mail,
]  # fmt: skip
ROUNDS = 15


@pytest.mark.nginx(
    main=MAIN,
    server="""
    location /app/ { proxy_pass http://@UP@; }
    location /dead/ { proxy_pass http://@DEAD2@; }
    location /short { return 200 'short text'; }
    location /auth {
        add_header Auth-Status OK;
        add_header Auth-Server 127.0.0.1;
        add_header Auth-Port @POP3_PORT@;
        return 200;
    }
    """,
)
def test_stream_and_mail_beside_http(stage: Stage) -> None:
    """Everything at once in one worker, file descriptors changing hands between http and the rest."""

    def run(visit: Callable[[dict[str, Address]], None]) -> None:
        visit(stage.addresses)

    with ThreadPoolExecutor(8) as clients:
        for done in [clients.submit(run, visit) for visit in [*FOREIGN, ask_http_through_stream, ask_http] * ROUNDS]:
            done.result()
    stage.site.expected_problems.append("/absent failed (2: No such file")

    # mail's two questions a round to its authority are http requests too.
    expected = {"/app/": 4, "/dead/": 1, "/short": 1, "/auth": 2}
    exchanges = stage.exchanges(ROUNDS * sum(expected.values()), CROWDED)
    routes = Counter(each.trace.server.attributes["http.route"] for each in exchanges)
    assert routes == {route: count * ROUNDS for route, count in expected.items()}
    for each in exchanges:
        route = each.trace.server.attributes["http.route"]
        if route == "/app/":
            assert each.trace.outline() == PROXIED
        elif route == "/dead/":
            assert each.trace.outline() == ["downstream read", "upstream connect", "downstream write"]
        else:
            assert each.trace.outline() == READ_WRITE
