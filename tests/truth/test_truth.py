"""`make truth`, in short: rounds of known seeds. Each configuration must be valid, and each lie must be found."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from e2e.agent_process import Span, Trace
from e2e.nginx_server import NGINX
from e2e.stage import Site
from e2e.upstreams import make_certificate

from truth.actions import actions
from truth.configuration import generate, listen
from truth.judge import Case, judge
from truth.pauses import Pauses
from truth.round import Round, play, scenarios
from truth.run import upstreams

SEEDS = (12, 13, 14)
CONNECTIONS = 120
MS = 1_000_000


def test_same_seed_same_round() -> None:
    assert generate(7) == generate(7)
    assert actions(generate(7), 50) == actions(generate(7), 50)
    assert generate(7).server != generate(8).server
    assert actions(generate(7), 50) != actions(generate(8), 50)


def test_a_release_has_its_own_directives() -> None:
    assert any("early_hints" in generate(seed, (1, 31)).server for seed in range(30))
    assert not any("early_hints" in generate(seed, (1, 22)).server for seed in range(30))
    assert ("http2 on;" in listen((1, 26)), " http2;" in listen((1, 26))) == (True, False)


def test_every_configuration_is_good(public_directory: Path) -> None:
    """What nginx says of each: fine, and not a warning."""
    names = "ipv4 other ipv6 tls dead1 dead2 deaf uwsgi fastcgi scgi grpc grpcs"
    addresses = dict.fromkeys(names.split(), "127.0.0.1:1")
    addresses |= dict.fromkeys(("unix", "fcgiwrap", "memcached"), "unix:/none") | {"script": "/none"}
    make_certificate(public_directory)
    for seed in range(40):
        site = Site(public_directory / f"seed{seed}", scenarios(seed), addresses)
        command = [NGINX, "-t", "-p", site.prefix, "-c", "nginx.conf"]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        assert told.returncode == 0, f"seed {seed}: {told.stderr}"
        assert "[warn]" not in told.stderr


@pytest.fixture(scope="module")
def rounds(public_directory: Path) -> Iterator[list[Round]]:
    if not all(map(shutil.which, ("uwsgi", "fcgiwrap", "memcached"))):
        pytest.skip("needs uwsgi, fcgiwrap and memcached; `make setup-test` installs them")
    directory = public_directory / "truth"
    directory.mkdir()
    with upstreams(directory) as addresses:
        yield [play(seed, directory, addresses, CONNECTIONS) for seed in SEEDS]


def _changed(name: str, change: Callable[[Span], Span | None]) -> Callable[[Trace], Trace]:
    """The trace with the first span of this name changed, or left out."""

    def lie(trace: Trace) -> Trace:
        first = trace.named(name)[0]
        spans = [change(span) if span is first else span for span in trace.spans]
        return replace(trace, spans=tuple(span for span in spans if span))

    return lie


def _ends(later_ms: int) -> Callable[[Span], Span]:
    return lambda span: replace(span, end_unix_ns=span.end_unix_ns + later_ms * MS)


def _server(change: Callable[[Span], Span]) -> Callable[[Trace], Trace]:
    return lambda trace: replace(trace, spans=(change(trace.server), *trace.spans[1:]))


def _attributes(**more: object) -> Callable[[Span], Span]:
    names = {name.replace("__", "."): value for name, value in more.items()}
    return lambda span: replace(span, attributes={**span.attributes, **names})


LIES: dict[str, tuple[Callable[[Trace], Trace], str]] = {
    "a write that goes on": (_changed("downstream write", _ends(2000)), "downstream write ends, by the client"),
    "a read that goes on": (_changed("downstream read", _ends(2000)), "downstream read ends, by the client"),
    "no write": (_changed("downstream write", lambda span: None), "no downstream write"),
    "no exchange": (_changed("upstream exchange", lambda span: None), "upstreams saw 1 requests"),
    "bytes": (_changed("upstream exchange", _attributes(http__request__size=1)), "sent upstream"),
    "reuse": (_changed("upstream exchange", _attributes(nginx__upstream__connection__reused=7)), "reused is 7"),
    "an exchange too early": (
        _changed("upstream exchange", lambda span: replace(span, start_unix_ns=span.start_unix_ns - 2000 * MS)),
        "before its upstream saw it",
    ),
    "another method": (_server(_attributes(http__request__method="BREW")), "method"),
    "a termination": (_server(_attributes(nginx__termination="timeout")), "complete, but nginx.termination"),
    "an early start": (
        _server(lambda span: replace(span, start_unix_ns=span.start_unix_ns - 2000 * MS)),
        "too early",
    ),
}


def _plain(case: Case) -> bool:
    """A true trace of a whole request of its own that an upstream answered, all of whose phases happened."""
    names = ["downstream read", "upstream connect", "upstream exchange", "downstream write"]
    known = case.known
    return bool(
        not case.violations and case.trace.outline() == names and known and known.whole and not known.shared
        and case.log["connection_requests"] == "1" and len(case.seen) == 1 and not known.ask.body
    )  # fmt: skip


def _first(rounds: list[Round], status: str = "") -> tuple[Case, Pauses]:
    return next(
        (case, done.pauses)
        for done in rounds
        for case in done.cases
        if _plain(case) and case.log["status"].startswith(status)
    )


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_found(rounds: list[Round], name: str) -> None:
    case, pauses = _first(rounds)
    assert judge(case, pauses) == []
    lie, finding = LIES[name]
    found = judge(replace(case, trace=lie(case.trace)), pauses)
    assert any(finding in text for text in found), found


def test_an_incomplete_response_that_looks_well_is_found(rounds: list[Round]) -> None:
    """The client must not know that it got all: its knowledge counts more than nginx's word."""
    case, pauses = _first(rounds, "200")
    assert case.known is not None
    unsure = replace(case.known, by_the_end=True)
    found = judge(replace(case, known=unsure, log={**case.log, "request_completion": ""}), pauses)
    assert any("incomplete response" in text for text in found), found


def test_nothing_is_found(rounds: list[Round]) -> None:
    """Times are for `make truth`: here a busy machine would be a failure."""
    found = [(done.seed, kind, example) for done in rounds for kind, example in done.findings]
    assert [each for each in found if " ms" not in each[1]] == []
    assert sum(done.requests for done in rounds) > len(SEEDS) * CONNECTIONS
