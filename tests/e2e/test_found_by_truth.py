"""What `make truth` found, made small: requests whose traces told what did not happen."""

import time
from pathlib import Path

import pytest

from e2e.agent_process import Trace
from e2e.http1_client import request_bytes
from e2e.stage import Stage
from e2e.timing import Slack

WAITING = "location = /waiting { internal; proxy_pass http://@OTHER@/?delay_ms=600; }"


def _leave(stage: Stage, target: str) -> Trace:
    """The trace of a request whose client leaves while all its upstreams are asked."""
    with stage.connect() as connection:
        connection.send(request_bytes("GET", target))
        time.sleep(0.2)
        connection.abort()
    each = stage.exchange(Slack(response_early=True))
    assert each.log["status"] == "499"
    return each.trace


def _owners(trace: Trace) -> list[str | None]:
    """The subrequests that made the exchanges, None for the request itself."""
    return [span.attributes.get("nginx.subrequest.uri") for span in trace.named("upstream exchange")]


@pytest.mark.nginx(server="location / { mirror /waiting; proxy_pass http://@UP@; }" + WAITING)
def test_client_leaves_a_mirrored_request(stage: Stage) -> None:
    """nginx ends both at once: each exchange stays whose it is."""
    assert sorted(map(str, _owners(_leave(stage, "/?delay_ms=600")))) == ["/waiting", "None"]


@pytest.mark.nginx(server="location / { ssi on; root @HTML@; }" + WAITING)
def test_client_leaves_a_page_of_several_parts(stage: Stage) -> None:
    html: Path = stage.site.prefix / "html"
    (html / "parts.html").write_text('<!--#include virtual="/waiting?1" --><!--#include virtual="/waiting?2" -->')
    assert _owners(_leave(stage, "/parts.html")) == ["/waiting", "/waiting"]
