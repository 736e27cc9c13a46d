"""Many requests of all kinds at once, through four workers: no request is lost, and no trace is wrong."""

import threading
from collections import Counter

import pytest

from e2e.http1_client import Http1Connection
from e2e.stage import FILES, Stage
from e2e.timing import Slack

WORKERS = 4
CLIENTS = 24
REQUESTS = 24_000
REQUESTS_PER_CONNECTION = 100

# The clients, the upstream, four workers and the agent share two cores, all of them busy: a worker that is
# off the processor in the middle of a turn waits for several others' time slices. The median is still short.
LATE_MAX_MS = 100.0

KINDS: list[tuple[str, str, bytes, int]] = [
    # method, target, body, status
    ("GET", "/hello.txt", b"", 200),
    ("GET", "/kept?bytes=3000", b"", 200),
    ("GET", "/nothing", b"", 404),
    ("GET", "/kept?bytes=60000&chunked=1", b"", 200),
    ("POST", "/kept", b"p" * 500, 200),
    ("HEAD", "/page.html", b"", 200),
    ("GET", "/page.html", b"", 200),
    ("GET", "/new", b"", 200),
    ("POST", "/kept?status=503", b"p" * 20_000, 503),
    ("GET", "/kept?delay_ms=3", b"", 200),
    ("GET", "/retried", b"", 200),
    ("GET", "/text", b"", 200),
]
OUTLINES = {
    "/kept": ["upstream exchange", "downstream write"],
    "/new": ["upstream exchange", "downstream write"],
    "/retried": ["upstream exchange", "downstream write"],
}


@pytest.mark.nginx(
    listen="listen @LISTEN@ reuseport;",
    http="""
    upstream @NAME@ { server @UP@; server @OTHER@; keepalive 32; }
    upstream @NAME@_retried { server @DEAD1@ max_fails=0; server @UP@ max_fails=0; keepalive 32; }
    """,
    server="""
    keepalive_requests 1000;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    location / { root @HTML@; }
    location /text { return 200 text; }
    location /kept { proxy_pass http://@NAME@; }
    location /retried { proxy_pass http://@NAME@_retried; }
    location /new { proxy_pass http://@UP@; proxy_set_header Connection close; }
    """,
)
def test_mixed_load(stage: Stage) -> None:
    failures: list[str] = []

    def client(number: int) -> None:
        try:
            for connection_number in range(REQUESTS // CLIENTS // REQUESTS_PER_CONNECTION):
                with Http1Connection(stage.addresses["ipv4"]) as connection:
                    for index in range(REQUESTS_PER_CONNECTION):
                        method, target, body, status = KINDS[(number + connection_number + index) % len(KINDS)]
                        response = connection.request(target, method, body=body)
                        assert response.status == status, f"{response.status} for {method} {target}"
        except Exception as error:
            failures.append(f"client {number}: {error!r}")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures

    exchanges = stage.exchanges(REQUESTS, Slack(late_max_ms=LATE_MAX_MS), seconds=60)
    paths = Counter(each.trace.server.attributes["url.path"] for each in exchanges)
    per_kind = REQUESTS // len(KINDS)
    assert paths == Counter({
        "/hello.txt": per_kind, "/kept": 5 * per_kind, "/nothing": per_kind, "/page.html": 2 * per_kind,
        "/new": per_kind, "/retried": per_kind, "/text": per_kind,
    })  # fmt: skip
    for each in exchanges:
        path = each.trace.server.attributes["url.path"]
        answered = [name for name in each.trace.outline() if name not in ("downstream read", "upstream connect")]
        assert answered == OUTLINES.get(path, ["downstream write"])
        assert (
            all(span.status == "UNSET" for span in each.trace.named("upstream exchange")) or "503" in each.log["status"]
        )
    assert len({each.trace.trace_id for each in exchanges}) == REQUESTS
    assert sum(int(each.log["bytes_sent"]) for each in exchanges) > per_kind * (2 * len(FILES["page.html"]) - 1)
