"""Traces random configurations and clients for some minutes, and judges each trace (`make truth`).

A round is a random nginx.conf with its clients, made from a seed. Each request is judged by nginx's own log, by what
its client knows, and by what the upstream saw. Findings are grouped by kind. A directory keeps the configuration, the
clients' script and the first requests of each kind. Exits with 1 if there are findings.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from e2e.gateways import Fcgiwrap, Memcached, UwsgiServer
from e2e.grpc_server import GrpcServer
from e2e.scenario import peers_that_fail
from e2e.upstreams import UpstreamProcess, make_certificate

from truth import witness
from truth.judge import kind_of
from truth.round import Round, play

ACTIONS = 250
EXAMPLES = 4
"""How many examples of a kind of finding to keep."""
RESULTS = Path(__file__).parents[2] / ".cache" / "truth"


@dataclass
class Report:
    """The findings of all rounds."""

    rounds: int = 0
    requests: int = 0
    kinds: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, done: Round, directory: Path) -> None:
        self.rounds += 1
        self.requests += done.requests
        fresh = []
        for kind, example in done.findings:
            self.kinds[kind] += 1
            if len(self.examples[kind]) < EXAMPLES:
                self.examples[kind].append(example)
                fresh.append(f"{kind}\n{example}\n")
        if fresh:
            kept = directory / f"seed-{done.seed}"
            kept.mkdir(parents=True, exist_ok=True)
            (kept / "nginx.conf").write_text(done.nginx_conf)
            (kept / "clients.jsonl").write_text("\n".join(done.script) + "\n")
            (kept / "findings.txt").write_text("\n".join(fresh))

    def text(self) -> str:
        lines = [
            f"{self.rounds} rounds, {self.requests} requests,"
            f" {sum(self.kinds.values())} findings of {len(self.kinds)} kinds"
        ]
        lines += [f"{count:6} {kind}" for kind, count in sorted(self.kinds.items(), key=lambda pair: -pair[1])]
        return "\n".join(lines)


@contextmanager
def upstreams(directory: Path) -> Iterator[dict[str, str]]:
    """Start all upstreams that configurations name; yield their addresses by word."""
    make_certificate(directory)
    servers = [
        UpstreamProcess(directory, witness.__file__),
        UwsgiServer(directory),
        Fcgiwrap(directory),
        Memcached(directory),
        GrpcServer(directory),
    ]
    known, uwsgi, fcgiwrap, memcached, grpc = servers
    for number in range(3):
        memcached.store(str(number), b"x" * 10 ** (number + 1))
    sockets: list = []
    try:
        yield {
            **known.addresses,
            **uwsgi.addresses,
            **grpc.addresses,
            **peers_that_fail(sockets),
            "fcgiwrap": fcgiwrap.address,
            "script": str(fcgiwrap.script),
            "memcached": memcached.address,
        }
    finally:
        for each in sockets:
            each.close()
        for server in servers:
            server.stop()


def run(
    seeds: Iterator[int], until_s: float, results: Path, count: int = ACTIONS, only: frozenset[int] = frozenset()
) -> Report:
    """Play rounds until `until_s` by the monotonic clock, or until the seeds end."""
    report = Report()
    sys.setswitchinterval(0.0005)  # clients are threads, and record when things happen
    with tempfile.TemporaryDirectory(prefix="otel-nginx-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        with upstreams(directory) as addresses:
            for seed in seeds:
                try:
                    done = play(seed, directory, addresses, count, only)
                except (TimeoutError, RuntimeError) as error:
                    done = Round(seed, findings=[(f"a round that did not start: {kind_of(str(error))}", str(error))])
                report.add(done, results)
                print(
                    f"seed {seed}: {done.requests} requests in {done.seconds:.1f} s, {len(done.findings)} findings",
                    flush=True,
                )
                if time.monotonic() > until_s:
                    break
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="make truth", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument(
        "--seed", type=int, help="seed of the first round; each further round has the next one (default: the time)"
    )
    parser.add_argument("--rounds", type=int, default=1 << 30, help="maximum number of rounds")
    parser.add_argument("--actions", type=int, default=ACTIONS, help="connections in a round (default: %(default)s)")
    parser.add_argument(
        "--only", type=int, nargs="*", default=[], help="only these connections of each round, by number"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory for findings (default: %(default)s)")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int(time.time())
    print(f"seed {seed}; to repeat: make truth SEED={seed}", flush=True)
    seeds = iter(range(seed, seed + options.rounds))
    report = run(
        seeds, time.monotonic() + options.minutes * 60, options.results, options.actions, frozenset(options.only)
    )
    print(report.text())
    for kind, examples in report.examples.items():
        print(f"\n--- {kind}\n{examples[0]}")
    if report.examples:
        print(f"\nfindings are in {options.results}")
    return 1 if report.kinds else 0


if __name__ == "__main__":
    sys.exit(main())
