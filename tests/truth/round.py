"""Plays a round: nginx with a random configuration, the program attached, all clients' actions. Judges each request."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from e2e.nginx_server import AccessLog, LogLine, nginx_version, wait_until
from e2e.scenario import Scenario
from e2e.stage import Site, key_of_log, key_of_trace

from truth import witness
from truth.actions import Action, actions
from truth.clients import perform
from truth.configuration import generate, listen
from truth.description import describe
from truth.judge import Case, judge, kind_of
from truth.knowledge import Known
from truth.pauses import Pauses

CLIENTS = 8
OWN_PROBLEMS = ("[crit]", "http finalize non-active request")
"""What nginx logs because of rude clients, and of slices inside other subrequests."""
IDLE = "location / { stub_status; }"


@dataclass
class Round:
    seed: int
    requests: int = 0
    seconds: float = 0.0
    findings: list[tuple[str, str]] = field(default_factory=list)
    """Kind and example of each finding."""
    nginx_conf: str = ""
    script: list[str] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    pauses: Pauses = field(default_factory=lambda: Pauses([]))


def scenarios(seed: int) -> list[Scenario]:
    """Return the random server, and a server that shows whether nginx is idle."""
    made = generate(seed, nginx_version())
    return [
        Scenario("truth", made.server, made.http, listen(nginx_version()), ""),
        Scenario("idle", IDLE, "", "listen @LISTEN@;", ""),
    ]


def play(
    seed: int, directory: Path, upstreams: dict[str, str], count: int, only: frozenset[int] = frozenset()
) -> Round:
    """Play the round of this seed, or only some of its connections."""
    began_s = time.monotonic()
    made = generate(seed, nginx_version())
    chosen = [action for action in actions(made, count) if not only or action.number in only]
    done = Round(seed, script=[action.text() for action in chosen])
    prefix = directory / f"round{seed}"
    site = Site(prefix, scenarios(seed), upstreams, workers=made.workers)
    for name, page in made.pages.items():
        (prefix / "html" / name).write_text(page)
    done.nginx_conf = (prefix / "nginx.conf").read_text()
    (prefix / "temp").chmod(0o777)
    with site:
        with Pauses([*site.nginx.worker_pids(), witness.pid(directory)]) as pauses:
            known = _clients(site, chosen)
            _settle(site, directory)
        done.pauses = pauses
        for text in _end(site):
            done.findings.append((f"at the end: {kind_of(text)}", text))
        features = {location.prefix: location.features for location in made.locations}
        _judge_all(done, site, features, known, witness.read(directory))
    done.seconds = time.monotonic() - began_s
    return done


def _clients(site: Site, chosen: list[Action]) -> list[Known]:
    addresses = site.stage("truth").addresses
    with ThreadPoolExecutor(CLIENTS) as pool:
        groups = pool.map(lambda action: perform(action, addresses[action.kind]), chosen)
        return [known for group in groups for known in group]


def _settle(site: Site, directory: Path) -> None:
    """Wait until nginx has no client except the one that asks, and the upstreams are done."""
    asking = site.stage("idle")

    def idle() -> bool:
        return asking.get("/").body.startswith(b"Active connections: 1 ")

    with suppress(TimeoutError):  # with post_action, nginx 1.22 keeps some connections for ever
        wait_until(idle, "nginx to be idle", 2)
        wait_until(lambda: all(seen.over_ns for seen in witness.read(directory)), "the upstreams to be idle", 2)


def _end(site: Site) -> Iterator[str]:
    """Yield problems at the end: traces without a log line, losses, faults in nginx itself."""
    try:
        site.stop_agent()
    except AssertionError as error:  # the program ended by itself: judge the traces until then
        site.agent.poll()
        yield str(error)
        return
    logged = Counter(key_of_log(line) for log in site.logs.values() for line in log.poll())
    traced = Counter(key_of_trace(trace) for trace in site.agent.traces)
    for key in traced - logged:
        yield f"a trace without a log line: {key}"
    last = site.agent.stderr().splitlines()[-1]
    counts = re.search(r"received (\d+), exported (\d+), lost (\d+)", last)
    if counts is None or [int(number) for number in counts.groups()] != [traced.total(), traced.total(), 0]:
        yield f"{traced.total()} traces, {logged.total()} log lines, but: {last}"
    yield from (line for line in site.nginx.problems() if not any(text in line for text in OWN_PROBLEMS))


def _judge_all(
    done: Round, site: Site, features: dict[str, frozenset[str]], known: list[Known], seen: list[witness.Seen]
) -> None:
    traces = {key_of_trace(trace): trace for trace in site.agent.traces}
    clients = {(each.port, each.ask.id): each for each in known}
    subrequests: dict[tuple[int, int, str], list[LogLine]] = {}
    for line in AccessLog(site.prefix / "logs" / "subrequests.log").poll():
        subrequests.setdefault(key_of_log(line), []).append(line)
    for line in site.logs["truth"].poll():
        done.requests += 1
        trace = traces.get(key_of_log(line))
        if trace is None:
            done.findings.append(("a log line without a trace", str(line)))
            continue
        id_ = parse_qs(urlsplit(line["request_uri"]).query).get("id", [""])[0]
        asked = clients.get((line["remote_port"], id_))
        own = [each for each in seen if each.id == id_] if asked and "slice" not in asked.ask.features else []
        of_it = frozenset(asked.ask.features if asked else ())
        for uri in (line["request_uri"], line["uri"]):
            of_it |= features.get("/".join([*uri.split("/")[:2], ""]), frozenset())
        case = Case(line, trace, asked, own, subrequests.get(key_of_log(line), []), of_it)
        done.cases.append(case)
        case.violations = judge(case, done.pauses)
        for text in case.violations:
            done.findings.append((kind_of(text), describe(case, text)))
