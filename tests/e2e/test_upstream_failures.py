"""Peers that refuse, ignore, hang up or take too long."""

import pytest

from e2e.http1_client import ConnectionEnded
from e2e.stage import Exchange, Stage
from e2e.timing import Slack

FAILED_CONNECT = ["downstream read", "upstream connect", "downstream write"]
NO_ANSWER = ["downstream read", "upstream connect", "upstream exchange", "downstream write"]


def errors(each: Exchange, name: str) -> list[str | None]:
    return [span.attributes.get("error.type") for span in each.trace.named(name) if span.status == "ERROR"]


@pytest.mark.nginx(
    http="upstream @NAME@ { server @DEAD1@; server @DEAD2@; server @UP@; }",
    server="location / { proxy_pass http://@NAME@; }",
)
def test_two_dead_peers_then_a_live_one(stage: Stage) -> None:
    assert stage.get("/").status == 200
    each = stage.exchange()
    assert each.log["upstream_status"] == "502, 502, 200"
    assert each.trace.outline() == [
        "downstream read", "upstream connect", "upstream connect", "upstream connect", "upstream exchange",
        "downstream write",
    ]  # fmt: skip
    connects = each.trace.named("upstream connect")
    assert [span.status for span in connects] == ["ERROR", "ERROR", "UNSET"]
    assert [span.attributes["nginx.upstream.attempt"] for span in connects] == [1, 2, 3]
    assert each.trace.server.attributes["nginx.upstream.attempts"] == 3


@pytest.mark.nginx(
    http="upstream @NAME@ { server @DEAD1@; server @DEAD2@; }",
    server="location / { proxy_pass http://@NAME@; }",
)
def test_all_peers_dead_then_none_live(stage: Stage) -> None:
    """The first request tries both peers; the second finds none worth a try, and has no upstream span."""
    with stage.connect() as connection:
        assert [connection.request("/").status for _ in range(2)] == [502, 502]
    tried, untried = stage.exchanges(2)
    assert tried.log["upstream_status"] == "502, 502"
    assert untried.log["upstream_addr"] == "test_all_peers_dead_then_none_live"
    assert tried.trace.outline() == [
        "downstream read",
        "upstream connect",
        "upstream connect",
        "downstream write",
    ]
    assert untried.trace.outline() == ["downstream read", "downstream write"]
    assert "nginx.upstream.attempts" not in untried.trace.server.attributes


@pytest.mark.nginx(server="location / { proxy_pass http://@DEAD1@; }")
def test_single_dead_peer(stage: Stage) -> None:
    assert stage.get("/").status == 502
    each = stage.exchange()
    assert each.trace.outline() == FAILED_CONNECT
    assert errors(each, "upstream connect")


@pytest.mark.nginx(server="location / { proxy_pass http://@DEAF@; proxy_connect_timeout 200ms; }")
def test_connect_timeout(stage: Stage) -> None:
    assert stage.get("/").status == 504
    each = stage.exchange()
    assert each.trace.outline() == FAILED_CONNECT
    connect = each.trace.named("upstream connect")[0]
    assert connect.status == "ERROR"
    assert 0.19 < connect.seconds < 0.3


@pytest.mark.nginx(
    http="upstream @NAME@ { server @DEAF@; server @UP@; }",
    server="location / { proxy_pass http://@NAME@; proxy_connect_timeout 200ms; }",
)
def test_connect_timeout_then_a_live_peer(stage: Stage) -> None:
    assert stage.get("/").status == 200
    each = stage.exchange()
    assert each.log["upstream_status"] == "504, 200"
    assert [span.status for span in each.trace.named("upstream connect")] == ["ERROR", "UNSET"]


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; proxy_read_timeout 200ms; }")
def test_read_timeout(stage: Stage) -> None:
    assert stage.get("/?delay_ms=600").status == 504
    each = stage.exchange()
    assert each.trace.outline() == NO_ANSWER
    exchange = each.trace.named("upstream exchange")[0]
    assert exchange.status == "ERROR"
    assert "nginx.upstream.time_to_first_byte_ns" not in exchange.attributes
    # It lasts until nginx gave up waiting.
    assert 0.19 < exchange.seconds < 0.3


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; proxy_read_timeout 200ms; }")
def test_read_timeout_inside_the_body(stage: Stage) -> None:
    with pytest.raises(ConnectionEnded):
        stage.get("/?bytes=1000&stall_ms=600")
    each = stage.exchange(Slack(response_early=True, end_early=True))
    assert each.log["status"] == "200"
    assert each.trace.outline() == NO_ANSWER


@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; }")
def test_hangs_up_without_answer(stage: Stage, end: str) -> None:
    assert stage.get(f"/?end={end}&delay_ms=50").status == 502
    each = stage.exchange()
    assert each.trace.outline() == NO_ANSWER
    exchange = each.trace.named("upstream exchange")[0]
    assert exchange.status == "ERROR"
    assert "http.response.status_code" not in exchange.attributes
    assert exchange.seconds > 0.049


@pytest.mark.nginx(server="location / { proxy_pass http://@UP@; }")
def test_hangs_up_inside_the_body(stage: Stage) -> None:
    with pytest.raises(ConnectionEnded):
        stage.get("/?end=truncate&bytes=1000")
    each = stage.exchange()
    assert each.log["status"] == "200"
    assert each.trace.outline() == NO_ANSWER


@pytest.mark.nginx(
    http="upstream @NAME@ { server @UP@ max_fails=0; server @OTHER@ max_fails=0; }",
    server="location / { proxy_pass http://@NAME@; proxy_next_upstream error http_503; }",
)
def test_next_upstream_after_an_answer(stage: Stage) -> None:
    """Both peers answer 503: the first answer is thrown away, the second goes to the client."""
    assert stage.get("/?status=503").status == 503
    each = stage.exchange()
    assert each.log["upstream_status"] == "503, 503"
    exchanges = each.trace.named("upstream exchange")
    assert [span.attributes["http.response.status_code"] for span in exchanges] == [503, 503]
    assert errors(each, "upstream exchange") == ["503", "503"]


@pytest.mark.nginx(
    http="upstream @NAME@ { server @UP@; keepalive 2; }",
    server="location / { proxy_pass http://@NAME@; proxy_http_version 1.1; proxy_set_header Connection '';"
    " proxy_next_upstream error timeout http_503 non_idempotent; }",
)
def test_one_peer_is_not_tried_twice(stage: Stage) -> None:
    assert stage.get("/?status=503").status == 503
    assert len(stage.exchange().trace.named("upstream exchange")) == 1


@pytest.mark.nginx(
    server="location / { proxy_pass http://@UP@; } error_page 502 504 = @sorry; location @sorry { return 200 sorry; }"
)
def test_error_page_hides_the_failure(stage: Stage) -> None:
    assert stage.get("/?end=close").body == b"sorry"
    each = stage.exchange()
    assert each.trace.server.status == "UNSET"
    assert each.trace.named("upstream exchange")[0].status == "ERROR"


@pytest.mark.nginx(
    http="upstream @NAME@ { server unix:@PREFIX@/none1; server unix:@PREFIX@/none2; server @UP_UNIX@; }",
    server="location / { proxy_pass http://@NAME@; }",
)
def test_connects_that_fail_at_once(stage: Stage) -> None:
    """connect() itself says no: nginx never waits, and the failed connects have a length all the same."""
    assert stage.get("/").status == 200
    each = stage.exchange()
    assert each.trace.outline() == [
        "downstream read",
        *["upstream connect"] * 3,
        "upstream exchange",
        "downstream write",
    ]
    assert errors(each, "upstream connect") == ["ENOENT", "ENOENT"]
    stage.site.expected_problems += ["/none1 failed (2: No such file", "/none2 failed (2: No such file"]


@pytest.mark.nginx(
    http="upstream @NAME@ { server @UP@; keepalive 2; }",
    server="location / { proxy_pass http://@NAME@; proxy_http_version 1.1; proxy_set_header Connection ''; }",
)
def test_kept_alive_connection_is_reset(stage: Stage) -> None:
    """nginx blames the old connection and tries the peer again on a new one, in vain."""
    with stage.connect() as connection:
        assert connection.request("/").status == 200
        assert connection.request("/?end=reset").status == 502
    failed = stage.exchanges(2)[1]
    assert failed.log["upstream_status"] == "502, 502"
    assert failed.trace.outline() == [
        "downstream read",
        "upstream exchange",
        "upstream connect",
        "upstream exchange",
        "downstream write",
    ]
    assert [span.status for span in failed.trace.named("upstream exchange")] == ["ERROR", "ERROR"]


@pytest.mark.nginx(
    http="upstream @NAME@ { " + "server @DEAD1@ max_fails=0; " * 40 + "}",
    server="location / { proxy_pass http://@NAME@; }",
)
def test_more_attempts_than_a_trace_holds(stage: Stage) -> None:
    """The first 32 have their spans, the rest is counted."""
    assert stage.get("/").status == 502
    each = stage.exchange()
    assert len(each.trace.named("upstream connect")) == 32
    assert each.trace.server.attributes["nginx.upstream.attempts_lost"] == 8
