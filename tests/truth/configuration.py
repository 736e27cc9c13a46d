"""Makes random nginx configurations from seeds. scenario.py replaces the words between @ when nginx starts."""

import json
from dataclasses import dataclass
from random import Random

from truth.locations import BLOCKS, SUBREQUEST_LOCATIONS, Location, location

LOCATIONS = 40
SUBREQUESTS = ("auth", "mirror", "part")

LISTEN = """
    listen @LISTEN@; listen @LISTEN6@; listen @LISTEN_UNIX@; listen @LISTEN_TLS@ ssl;
    listen @LISTEN_CLEAR2@ http2; listen @LISTEN_TLS2@ ssl http2;
    ssl_certificate @CERTIFICATE@; ssl_certificate_key @KEY@;
"""
KINDS = ("ipv4", "ipv6", "unix", "tls", "clear2", "tls2")
"""The addresses that `listen` makes. Addresses whose names end with 2 speak HTTP/2."""

PEERS = [
    ("@UP@",),
    ("@UP@", "@OTHER@"),
    ("@UP_UNIX@", "@UP6@"),
    ("@DEAD1@", "@UP@"),
    ("@DEAD1@", "@DEAD2@", "@OTHER@"),
    ("@DEAF@", "@UP@"),
    ("@DEAD1@", "@DEAD2@"),
    ("@DEAF@",),
]
# Variables that nginx does not cache, so that a subrequest logs its own values.
SUBREQUEST_VARIABLES = """
    connection connection_requests pid uri status request_time upstream_addr upstream_status upstream_connect_time
    upstream_header_time upstream_response_time upstream_bytes_sent upstream_bytes_received
"""


@dataclass(frozen=True)
class Configuration:
    seed: int
    http: str
    server: str
    locations: tuple[Location, ...]
    pages: dict[str, str]
    workers: int


# Parameters of the client's request, also for its subrequests.
ASKED = "".join(
    f"map $request_uri $asked_{name} {{ '~[?&]{name}=(?<{name}_value>[^&]+)' ${name}_value; }}\n    "
    for name in ("id", "auth", "sub_ms", "sub_end")
)


def listen(version: tuple[int, ...]) -> str:
    """Return `listen` for all addresses. Since 1.25.1 HTTP/2 is an option of the server."""
    return LISTEN if version < (1, 25, 1) else LISTEN.replace(" http2;", ";") + "    http2 on;\n"


def generate(seed: int, version: tuple[int, ...] = (1, 22)) -> Configuration:
    """Return a configuration. Equal seeds and nginx releases have equal texts."""
    chance = Random(f"configuration {seed}")
    blocks = [_block(chance, number) for number in range(BLOCKS)]
    zones = f"""
    log_format subrequest escape=json '{json.dumps({name: f"${name}" for name in SUBREQUEST_VARIABLES.split()})}';
    limit_req_zone $server_port zone=slow:1m rate={chance.choice([20, 100, 500])}r/s;
    limit_conn_zone $server_port zone=few:1m;
    {ASKED}
    proxy_cache_path @PREFIX@/temp/cache keys_zone=cache:1m;
    """
    made = [location(chance, number, version) for number in range(LOCATIONS)]
    pages = {f"page{number}.html": _page(chance) for number in range(SUBREQUEST_LOCATIONS)}
    inner = [_inner(chance, kind, number) for kind in SUBREQUESTS for number in range(SUBREQUEST_LOCATIONS)]
    texts = [_server_options(chance), *(text for _, text in made), *inner, NAMED]
    locations = tuple(location for location, _ in made)
    http = "\n".join([zones, *blocks])
    return Configuration(seed, http, "\n".join(texts), locations, pages, chance.choice([1, 2]))


def _block(chance: Random, number: int) -> str:
    """Return an upstream block. The first block always has a live peer."""
    peers = PEERS[number % 3] if number < 2 else chance.choice(PEERS)
    fails = chance.choice([" max_fails=0", " max_fails=0", ""])
    method = chance.choice(["", "", "least_conn;", "ip_hash;", "hash $request_uri consistent;", "random two;"])
    lines = [f"server {peer}{fails};" for peer in peers]
    if len(peers) > 1 and method in ("", "least_conn;") and chance.random() < 0.3:
        lines[-1] = lines[-1].replace(";", " backup;")
    zone = f"zone block{number} 64k;" if chance.random() < 0.4 else ""
    keep = chance.choice(["", "keepalive 1;", "keepalive 8;", "keepalive 8; keepalive_requests 3;"])
    if keep and chance.random() < 0.3:
        keep += " keepalive_timeout 100ms;"
    return f"upstream block{number} {{ {zone} {method} {' '.join(lines)} {keep} }}"


NAMED = """
    location @static { root @HTML@; rewrite ^ /hello.txt break; }
    location @proxied { proxy_pass http://block0$request_uri; }
    location @text { return 200 'instead'; }
    location = /after {
        internal; proxy_pass http://block0/sub?id=$asked_id&sub=after;
        proxy_pass_request_body off; proxy_set_header Content-Length '';
    }
    location = /error.html { internal; return 200 'an error page'; }
    location = /error.proxied { internal; proxy_pass http://block1/sub?id=$asked_id; }
"""


def _server_options(chance: Random) -> str:
    options = [
        f"keepalive_requests {chance.choice([2, 1000, 1000, 1000])};",
        "client_header_timeout 300ms;",
        "client_body_timeout 300ms;",
        "lingering_timeout 200ms;",
        "send_timeout 500ms;",
        "proxy_read_timeout 600ms; fastcgi_read_timeout 600ms; uwsgi_read_timeout 600ms; scgi_read_timeout 600ms;",
        "memcached_read_timeout 600ms; grpc_read_timeout 600ms;",
        "proxy_connect_timeout 80ms; fastcgi_connect_timeout 80ms; grpc_connect_timeout 80ms;",
        "large_client_header_buffers 4 2k;",
        f"http2_max_concurrent_streams {chance.choice([4, 128])};",
        f"http2_chunk_size {chance.choice(['1k', '8k'])};",
        chance.choice(["", "http2_body_preread_size 0;", "http2_body_preread_size 128k;"]),
        chance.choice(["", "ssl_buffer_size 4k;"]),
        chance.choice(["", "recursive_error_pages on;"]),
        chance.choice(["", "ssl_protocols TLSv1.2;"]),
        chance.choice(["", "merge_slashes off;"]),
    ]
    return "\n    ".join(option for option in options if option)


def _inner(chance: Random, kind: str, number: int) -> str:
    """Return a location for subrequests. nginx logs subrequests to a separate file."""
    fixed = {"auth": "status=$asked_auth", "mirror": "bytes=20000", "part": "bytes=300"}[kind]
    query = f"id=$asked_id&sub={kind}{number}&delay_ms=$asked_sub_ms&end=$asked_sub_end&{fixed}"
    proxied = f"proxy_pass http://block{chance.randrange(BLOCKS)}/sub?{query};"
    handler = chance.choice([proxied, proxied, proxied, "return 204;" if kind == "auth" else "return 200 part;"])
    body = "proxy_pass_request_body off; proxy_set_header Content-Length '';" if kind == "auth" else ""
    keep = chance.choice(["", "proxy_http_version 1.1; proxy_set_header Connection '';"])
    wait = chance.choice(["", "proxy_read_timeout 60ms;"])
    buffer = chance.choice(["", "proxy_buffering off;"]) if kind == "mirror" else ""
    log = "log_subrequest on; access_log logs/subrequests.log subrequest;"
    return f"    location /sub/{kind}{number} {{ internal; {log} {handler} {body} {keep} {wait} {buffer} }}"


def _page(chance: Random) -> str:
    """Return a page that includes others: one after another, at once, and inside each other."""
    text = "<p>page</p>\n"
    for _ in range(chance.randrange(1, 5)):
        wait = chance.choice(["", ' wait="yes"'])
        target = chance.choice([f"/sub/part{chance.randrange(SUBREQUEST_LOCATIONS)}", "/sub/mirror1"])
        text += f'<!--#include virtual="{target}?id=$asked_id&sub_ms=$asked_sub_ms"{wait} -->' + "x" * 500 + "\n"
    return text
