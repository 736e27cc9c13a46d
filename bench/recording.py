"""Records a capture of different requests from many clients."""

from collections.abc import Callable
from pathlib import Path

from e2e.agent_process import AgentProcess

from bench.load import at_most_speed
from bench.site import BROKEN, SCENARIOS, Scenario, Site

# How many of every twenty requests. The last three have problems: 404, 502 with no live peer, a retry that succeeds.
_MIX: tuple[tuple[Scenario, int], ...] = (
    (SCENARIOS["static"], 5),
    (SCENARIOS["proxied"], 7),
    (SCENARIOS["static-h2"], 2),
    (SCENARIOS["proxied-h2"], 3),
    (Scenario("/missing/page", False, False, 0, "4xx"), 1),
    (BROKEN, 1),
    (Scenario("/retried/page", False, False, 0), 1),
)
_PARTS = sum(share for _, share in _MIX)

_USER_AGENTS = (
    "curl/7.88.1",
    "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/138.0.0.0 Safari/537.36",
    "Prometheus/3.4.1",
)
_QUERIES = 500
ROUND = 2_000


def record(site: Site, path: Path, records: int, advance: Callable[[str], None]) -> None:
    """Record about `records` requests into a capture file: every kind in each round, with another client each round."""
    agent = AgentProcess(site.nginx.pid, path.parent, ["record", "--pid", str(site.nginx.pid), "-o", path])
    rounds = -(-records // ROUND)
    try:
        for number in range(rounds):
            advance(f"recording: round {number + 1} of {rounds}")
            for scenario, share in _MIX:
                urls = [f"{site.url(scenario)}?page={page}&sort=name" for page in range(_QUERIES)]
                requests = min(records, ROUND) * share // _PARTS
                at_most_speed(urls, scenario, requests, _USER_AGENTS[number % len(_USER_AGENTS)])
    except BaseException:
        agent.kill()
        raise
    agent.stop()
