"""Makes random locations: what answers a request, and what else happens to the request."""

from dataclasses import dataclass
from random import Random

BLOCKS = 8
SUBREQUEST_LOCATIONS = 3
"""How many locations for subrequests of each kind."""
FILES = ("hello.txt", "page.html", "large.bin", "nothing")
INSTEAD = ("@static", "@proxied", "@text", "/error.html", "/error.proxied")
PARAMETERS = {
    "QUERY_STRING": "$query_string",
    "REQUEST_METHOD": "$request_method",
    "CONTENT_LENGTH": "$content_length",
    "REQUEST_URI": "$request_uri",
    "PATH_INFO": "$uri",
    "SERVER_NAME": "$server_name",
    "SERVER_PORT": "$server_port",
    "SERVER_PROTOCOL": "$server_protocol",
}

# Directives for any location, each with the feature that the judge must know, if any.
ANYWHERE = [
    ("limit_rate 800k;", "limit_rate"),
    ("limit_rate 900k; limit_rate_after 20k;", "limit_rate"),
    ("limit_req zone=slow burst=20;", ""),
    ("limit_req zone=slow burst=2 nodelay;", ""),
    ("limit_conn few 4;", ""),
    ("gzip on; gzip_types *; gzip_min_length 1;", "filter"),
    ("sub_filter xx yy; sub_filter_once off; sub_filter_types *;", "filter"),
    ("add_before_body /sub/part0; addition_types *;", "parts"),
    ("add_after_body /sub/part1; addition_types *;", "parts"),
    ("client_max_body_size 2k;", ""),
    ("client_body_buffer_size 1k;", ""),
    ("client_body_in_file_only clean;", ""),
    ("client_body_in_single_buffer on;", ""),
    ("client_body_timeout 70ms;", ""),
    ("send_timeout 80ms;", ""),
    ("reset_timedout_connection on;", ""),
    ("chunked_transfer_encoding off;", ""),
    ("keepalive_timeout 0;", ""),
    ("lingering_close always;", ""),
    ("lingering_close off;", ""),
    ("lingering_time 200ms; lingering_timeout 50ms;", ""),
    ("output_buffers 1 2k;", ""),
    ("postpone_output 0;", ""),
    ("sendfile on;", ""),
    ("sendfile on; tcp_nopush on; sendfile_max_chunk 64k;", ""),
    ("aio threads;", ""),
    ("directio 512;", ""),
    ("tcp_nodelay off;", ""),
    ("max_ranges 1;", ""),
    ("expires 1h;", ""),
    ("if_modified_since off;", ""),
    ("satisfy any; deny all;", ""),
    ("deny all;", ""),
    ("early_hints $http2;", "hints"),
    ("http2_push /l0/hello.txt;", ""),
    ("post_action /after;", "post_action"),
]
RELEASES = {"early_hints": ((1, 29), (9,)), "http2_push": ((1, 13, 9), (1, 25, 1))}
"""Directives that only some releases have: from the first release until before the second."""

PROXY = [
    "proxy_request_buffering off;",
    "proxy_read_timeout 90ms;",
    "proxy_send_timeout 90ms;",
    "proxy_next_upstream off;",
    "proxy_next_upstream error timeout http_500 http_502 http_503 http_504 http_404 non_idempotent;",
    "proxy_next_upstream error timeout invalid_header; proxy_next_upstream_tries 2;",
    "proxy_next_upstream error timeout; proxy_next_upstream_timeout 100ms;",
    "proxy_buffers 4 4k; proxy_buffer_size 4k; proxy_busy_buffers_size 8k;",
    "proxy_buffers 2 4k; proxy_buffer_size 4k; proxy_busy_buffers_size 4k; proxy_max_temp_file_size 0;",
    "proxy_limit_rate 800000;",
    "proxy_ignore_client_abort on;",
    "proxy_pass_request_body off; proxy_set_header Content-Length '';",
    "proxy_method POST;",
    "proxy_force_ranges on;",
    "proxy_socket_keepalive on;",
    "proxy_bind 127.0.0.1;",
    "proxy_redirect off;",
    "proxy_pass_header Server;",
    "proxy_store on; root @PREFIX@/temp;",
]


@dataclass(frozen=True)
class Location:
    prefix: str
    handler: str
    features: frozenset[str]


def location(chance: Random, number: int, version: tuple[int, ...]) -> tuple[Location, str]:
    prefix = f"/l{number}/"
    handler = HANDLERS[number % len(HANDLERS)]
    features, lines = handler(chance, prefix)
    chosen = chance.sample(ANYWHERE, chance.choice([0, 0, 1, 1, 2, 3]))
    for text, feature in chosen:
        name = text.partition(" ")[0]
        since, until = RELEASES.get(name, ((0,), (9,)))
        if name in " ".join(lines) or not since <= version < until:
            continue  # a location may have a directive once, and only if the release knows it
        lines.append(text)
        features |= {feature} - {""}
    if chance.random() < 0.15:
        lines.append(f"auth_request /sub/auth{chance.randrange(SUBREQUEST_LOCATIONS)};")
        features.add("auth")
    if chance.random() < 0.15:
        lines.append(f"mirror /sub/mirror{chance.randrange(SUBREQUEST_LOCATIONS)};")
        lines.append(chance.choice(["", "mirror_request_body off;"]))
        features.add("mirror")
    if chance.random() < 0.25:
        equal = chance.choice(["", " =", " =200"])
        lines.append(f"error_page 403 404 413 500 502 503 504{equal} {chance.choice(INSTEAD)};")
        features.add("redirect")
    body = "\n        ".join(line for line in lines if line)
    return Location(
        prefix, handler.__name__.strip("_"), frozenset(features)
    ), f"    location {prefix} {{\n        {body}\n    }}"


Made = tuple[set[str], list[str]]


def _static(chance: Random, prefix: str) -> Made:
    return {"static"}, ["alias @HTML@/;"]


def _text(chance: Random, prefix: str) -> Made:
    answer = chance.choice(["200 text", "204", "301 /l0/", "404", "503 sorry", "444", "200 ''"])
    return {"text"}, [f"return {answer};"]


def _included(chance: Random, prefix: str) -> Made:
    return {"parts", "static"}, ["alias @HTML@/;", "ssi on;", chance.choice(["", "ssi_silent_errors on;"])]


def _proxied(chance: Random, prefix: str) -> Made:
    features, block = {"proxy"}, f"block{chance.randrange(BLOCKS)}"
    target = chance.choice(
        [f"http://{block}"] * 5 + ["http://@UP@", "https://@UP_TLS@", "http://$up", "http://@UP_UNIX@:"]
    )
    lines = [f"proxy_pass {target};"]
    if "$up" in target:
        lines.insert(0, "set $up @OTHER@;")
    if "UP_TLS" in target:
        features.add("tls_upstream")
        lines.append(chance.choice(["", "proxy_ssl_session_reuse off;"]))
    if "UNIX" in target:
        lines[0] = "proxy_pass http://@UP_UNIX@:;"
    if chance.random() < 0.6:
        lines.append("proxy_http_version 1.1; proxy_set_header Connection '';")
    if chance.random() < 0.3:
        lines.append("proxy_buffering off;")
        features.add("unbuffered")
    for option in chance.sample(PROXY, chance.choice([0, 1, 1, 2, 3])):
        name = option.partition(" ")[0]
        if name not in " ".join(lines) and ("bind" not in option or target == "http://@UP@"):
            lines.append(option)
            features |= {"limit_rate"} if "limit_rate" in option else set()
    if chance.random() < 0.2 and "proxy_store" not in " ".join(lines):
        lines.append("proxy_cache cache; proxy_cache_key $uri$arg_key; proxy_cache_valid any 1s;")
        lines.append(chance.choice(["", "proxy_cache_lock on; proxy_cache_lock_timeout 100ms;"]))
        lines.append(
            "proxy_cache_use_stale error timeout updating http_500; proxy_cache_background_update on;"
            if chance.random() < 0.4
            else ""
        )
        features.add("cache")
    if chance.random() < 0.3:
        lines.append("proxy_intercept_errors on;")
        features.add("intercept")
    if chance.random() < 0.1:
        lines.append("ssi on; ssi_types *;")
    return features, lines


def _gateway(chance: Random, prefix: str) -> Made:
    protocol = chance.choice(["uwsgi", "fastcgi", "scgi"])
    lines = [f"{protocol}_pass @{protocol.upper()}@;"]
    lines += [f"{protocol}_param {name} {value};" for name, value in PARAMETERS.items()]
    options = ["buffering off;", "request_buffering off;", "read_timeout 90ms;", "ignore_client_abort on;"]
    lines += [f"{protocol}_{option}" for option in chance.sample(options, chance.choice([0, 1, 2]))]
    return {"gateway"} | ({"unbuffered"} if any("buffering" in line for line in lines) else set()), lines


def _script(chance: Random, prefix: str) -> Made:
    lines = ["fastcgi_pass @FCGIWRAP@;", "fastcgi_param SCRIPT_FILENAME @SCRIPT@;"]
    lines += [f"fastcgi_param {name} {value};" for name, value in PARAMETERS.items()]
    return {"gateway"}, lines


def _cached(chance: Random, prefix: str) -> Made:
    return {"gateway", "memcached"}, ["set $memcached_key $arg_key; memcached_pass @MEMCACHED@;"]


def _grpc(chance: Random, prefix: str) -> Made:
    scheme, peer = chance.choice([("grpc", "@GRPC@"), ("grpcs", "@GRPCS@")])
    wait = chance.choice(["", "grpc_read_timeout 90ms;"])
    features = {"gateway", "grpc", "unbuffered"} | ({"tls_upstream"} if scheme == "grpcs" else set())
    return features, [f"rewrite ^{prefix}(.*)$ /$1? break;", f"grpc_pass {scheme}://{peer};", wait]


def _sliced(chance: Random, prefix: str) -> Made:
    lines = ["slice 4k; proxy_set_header Range $slice_range; proxy_http_version 1.1;"]
    lines += ["proxy_cache cache; proxy_cache_key $uri$slice_range$arg_key; proxy_cache_valid 200 206 1h;"]
    return {"parts", "slice", "cache"}, [*lines, "proxy_pass http://@LISTEN@/l0/;"]


def _elsewhere(chance: Random, prefix: str) -> Made:
    """Make a location that another location answers for, after an internal redirect."""
    instead = chance.choice(INSTEAD)
    moved = f"rewrite ^ /l{chance.choice([0, 1, 3])}/hello.txt last;"
    return {"redirect"}, [moved if chance.random() < 0.5 else f"root @HTML@/none; try_files /none {instead};"]


HANDLERS = [_static, _text, _included, _proxied, _proxied, _proxied, _gateway, _proxied, _elsewhere, _proxied]
HANDLERS += [_static, _script, _cached, _proxied, _proxied, _grpc, _sliced, _proxied, _proxied, _text]
