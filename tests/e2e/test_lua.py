"""Lua modules that choose peers, make subrequests and end responses, as in OpenResty, Kong and Kubernetes' ingress."""

from pathlib import Path

import pytest

from e2e.http1_client import ConnectionEnded
from e2e.nginx_server import BUILD
from e2e.stage import Exchange, Stage
from e2e.timing import Slack

MODULES = Path("/usr/lib/nginx/modules")
NAMES = ("ndk_http", "ngx_http_lua", "ngx_http_echo", "ngx_http_upstream_fair", "ngx_stream")
SITE_MAIN = "\n".join(f"load_module {MODULES}/{name}_module.so;" for name in NAMES)

pytestmark = pytest.mark.skipif(
    BUILD is not None, reason="Debian's module packages fit Debian's nginx: run `make test`"
)

NEW = ["downstream read", "upstream connect", "upstream exchange", "downstream write"]
KEPT = ["downstream read", "upstream exchange", "downstream write"]


BALANCER = """
    upstream @NAME@ {
        server 0.0.0.1;
        balancer_by_lua_block {
            local balancer = require "ngx.balancer"
            local peers = {}
            for host, port in ([[@PEERS@]]):gmatch("([%d.]+):(%d+)") do
                table.insert(peers, {host, tonumber(port)})
            end
            ngx.ctx.tries = (ngx.ctx.tries or 0) + 1
            if ngx.ctx.tries == 1 then balancer.set_more_tries(#peers - 1) end
            assert(balancer.set_current_peer(unpack(peers[ngx.ctx.tries])))
        }
        keepalive 4;
    }
"""
PROXY = "location / { proxy_pass http://@NAME@; proxy_http_version 1.1; proxy_set_header Connection ''; }"


def lost(each: Exchange) -> dict[str, int]:
    names = ("nginx.upstream.attempts_lost", "nginx.upstream.no_live_peers")
    return {name: each.trace.server.attributes[name] for name in names if name in each.trace.server.attributes}


@pytest.mark.nginx(http=BALANCER.replace("@PEERS@", "@UP@"), server=PROXY)
def test_a_peer_that_lua_chose(stage: Stage) -> None:
    with stage.connect() as connection:
        for index in range(3):
            assert connection.request(f"/{index}?delay_ms=20").status == 200
    new, *kept = stage.exchanges(3)
    assert new.trace.outline() == NEW
    assert [each.trace.outline() for each in kept] == [KEPT, KEPT]
    assert [lost(each) for each in (new, *kept)] == [{}] * 3


@pytest.mark.nginx(http=BALANCER.replace("@PEERS@", "@DEAD1@ @UP@"), server=PROXY)
def test_a_peer_that_lua_chose_after_a_dead_one(stage: Stage) -> None:
    assert stage.get("/").status == 200
    each = stage.exchange()
    assert each.log["upstream_status"] == "502, 200"
    assert each.trace.outline() == ["downstream read", "upstream connect", *NEW[1:]]
    assert each.trace.named("upstream connect")[0].error == "ECONNREFUSED"
    assert lost(each) == {}


@pytest.mark.nginx(http="upstream @NAME@ { fair; server @DEAD1@; server @UP@; server @OTHER@; }", server=PROXY)
def test_upstream_fair(stage: Stage) -> None:
    with stage.connect() as connection:
        for index in range(6):
            assert connection.request(f"/{index}").status == 200
    exchanges = stage.exchanges(6)
    assert any(each.log["upstream_status"] == "502, 200" for each in exchanges)
    assert [lost(each) for each in exchanges] == [{}] * 6


@pytest.mark.nginx(
    server="""
        location /captured { content_by_lua_block {
            local one, two = ngx.location.capture_multi{{"/a"}, {"/b"}}
            ngx.say(one.status, two.status)
        } }
        location /echoed { echo_location /a; echo_location /b; }
        location /a { proxy_pass http://@UP@/?delay_ms=30; }
        location /b { proxy_pass http://@OTHER@/?delay_ms=60; }
    """
)
@pytest.mark.parametrize("target", ["/captured", "/echoed"])
def test_subrequests_that_modules_make(stage: Stage, target: str) -> None:
    assert stage.get(target).status == 200
    each = stage.exchange(Slack(write_early=True))
    exchanges = each.trace.named("upstream exchange")
    assert sorted(span.attributes["nginx.subrequest.uri"] for span in exchanges) == ["/a", "/b"]
    assert len(each.trace.named("upstream connect")) == 2
    assert all(span.seconds > 0.029 for span in exchanges)


@pytest.mark.nginx(
    server="location / { content_by_lua_block { ngx.say('all'); ngx.eof(); ngx.sleep(0.3) } }"
    "location /failed { content_by_lua_block {"
    "  ngx.say('half'); ngx.flush(true); ngx.sleep(0.3); ngx.exit(ngx.ERROR)"
    "} }"
)
def test_responses_that_lua_ends(stage: Stage) -> None:
    assert stage.get("/").body == b"all\n"
    with stage.connect() as connection, pytest.raises(ConnectionEnded):
        connection.request("/failed")
    whole, half = stage.exchanges(2)
    for each in (whole, half):
        assert float(each.log["request_time"]) > 0.29
        assert each.trace.server.seconds > 0.29
    assert "nginx.termination" not in whole.trace.server.attributes
    assert whole.trace.server.status == "UNSET"
    assert (half.trace.server.attributes["nginx.termination"], half.trace.server.error) == ("aborted", "aborted")


@pytest.mark.nginx(
    server="""location / { content_by_lua_block {
        local socket = ngx.socket.tcp()
        local host, port = ("@UP@"):match("(.*):(.*)")
        assert(socket:connect(host, tonumber(port)))
        socket:send("GET / HTTP/1.0\\r\\nConnection: close\\r\\n\\r\\n")
        ngx.say(#socket:receive("*a"))
        socket:close()
    } }"""
)
def test_a_cosocket_is_no_upstream(stage: Stage) -> None:
    assert stage.get("/").status == 200
    each = stage.exchange()
    assert each.trace.outline() == ["downstream read", "downstream write"]
    assert lost(each) == {}


@pytest.mark.nginx(
    server="""location / {
        proxy_pass http://@UP@; proxy_http_version 1.1;
        body_filter_by_lua_block {
            local ends = os.clock() + 0.3
            while os.clock() < ends do end
        }
    }"""
)
def test_an_end_of_file_that_is_seen_late_is_not_the_answer_s(stage: Stage) -> None:
    assert stage.get("/?keep_alive=0").status == 200
    each = stage.exchange(Slack(late_max_ms=1000, median_max_ms=1000, response_early=True))
    assert each.trace.server.seconds > 0.29
    assert each.trace.named("upstream exchange")[0].seconds < 0.2


@pytest.mark.nginx(
    main="stream { server { listen @LISTEN_STREAM@; proxy_pass unix:/nonexistent/peer; } }",
    server="location / { proxy_bind 192.0.2.1; proxy_pass http://@UP@; }",
)
def test_another_module_s_failed_connect_is_no_one_else_s(stage: Stage) -> None:
    with stage.connect("stream") as connection:
        assert connection.read_until_closed() == b""
    stage.site.expected_problems += ["connect() to unix:/nonexistent/peer failed", "bind(192.0.2.1) failed"]
    assert stage.get("/").status == 500
    each = stage.exchange()
    assert each.trace.outline() == ["downstream read", "downstream write"]
    assert "nginx.upstream.no_live_peers" not in each.trace.server.attributes
