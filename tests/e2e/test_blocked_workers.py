"""A worker that does not come back to its event loop: the requests in it say for how long."""

import threading
import time

import pytest

from e2e.nginx_server import BUILD
from e2e.stage import Stage
from e2e.timing import LONG_TURN_MS, Slack

SITE_MAIN = "\n".join(f"load_module /usr/lib/nginx/modules/{name}_module.so;" for name in ("ndk_http", "ngx_http_lua"))
pytestmark = pytest.mark.skipif(
    BUILD is not None, reason="Debian's module packages fit Debian's nginx: run `make test`"
)

WORKERS = 1
TURN = "nginx.worker.longest_turn_ns"
BLOCKED_S = 0.1
BLOCKED = Slack(late_max_ms=BLOCKED_S * 1000 + LONG_TURN_MS)
"""nginx does not read the clock while it computes."""
SERVER = """
    location / { proxy_pass http://@UP@; }
    location /computes {
        content_by_lua_block {
            local began = os.clock()
            while os.clock() < began + %s do end
            ngx.say("done")
        }
    }
""".replace("%s", str(BLOCKED_S))


@pytest.mark.nginx(server=SERVER)
def test_a_blocked_worker(stage: Stage) -> None:
    """The request that computes says so, and one that waits for its peer meanwhile; others do not."""
    assert stage.get("/before?delay_ms=30").status == 200
    waiting = threading.Thread(target=lambda: stage.get("/meanwhile?delay_ms=50"))
    waiting.start()
    time.sleep(0.02)
    assert stage.get("/computes").status == 200
    waiting.join()
    assert stage.get("/after?delay_ms=30").status == 200
    turns = {
        each.trace.server.attributes["url.path"]: each.trace.server.attributes.get(TURN)
        for each in stage.exchanges(4, BLOCKED)
    }
    assert turns["/before"] is None
    assert turns["/after"] is None
    computed_ns, meanwhile_ns = turns["/computes"], turns["/meanwhile"]
    assert computed_ns is not None
    assert meanwhile_ns is not None
    assert computed_ns > BLOCKED_S * 0.95e9
    assert meanwhile_ns > BLOCKED_S * 0.95e9
