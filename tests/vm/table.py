"""Tries the program under other kernels: whether it attaches, scenarios, --propagate. Prints a table (`make vm`).

Exits with 1 if a scenario fails or a kernel does not finish.
"""

import argparse
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from matrix.builds import BuildError
from matrix.run import Result, result_of

from vm.architectures import ARCHITECTURES, NATIVE, Architecture
from vm.images import CACHE, KERNELS, kernel, kernels_of, named
from vm.machine import RESULTS, MachineError, run

# An emulated machine takes a minute to trace another nginx. So only these run: upstreams, HTTP/2, subrequests, TLS.
SCENARIOS = ["test_proxied", "test_http2", "test_subrequests", "test_tls"]
PROPAGATION = ("tests/vm/test_propagation.py", "tests/e2e/test_socket_propagation.py")
PATIENCE = 20
GUEST_S = 3600.0

# Each line is another program to the verifier; it takes half a minute, on arm64 two minutes. --propagate shows if the
# kernel allows writes.
_METRICS = "--metrics-listen 127.0.0.1:9464"
_HEADERS = "--capture-request-headers x-a --capture-response-headers content-type,content-length,last-modified"
OPTIONS = [
    "",
    _METRICS,
    "--propagate --keep-errors",
    f"--adopt-upstream-context {_METRICS}",
    f"--propagate --adopt-upstream-context --keep-errors {_METRICS}",
    f"--propagate --adopt-upstream-context --keep-errors {_HEADERS} {_METRICS}",
    f"--detail request {_HEADERS}",
    "--detail request",
    f"--detail request --keep-errors {_METRICS}",
]
LARGEST = OPTIONS[5]

GUEST = """\
mkdir -p {results}/prefix && cd {results}/prefix && echo 'pid nginx.pid; events {{}}' >nginx.conf
nginx -p . -c nginx.conf -e error.log && cd - >/dev/null
for options in {options}; do
    echo "== $options"
    .venv/bin/otel-nginx-ebpf run $options --dry-run 2>&1
done | tee {results}/dry-runs
nginx -p {results}/prefix -c nginx.conf -e error.log -s quit
export OTEL_NGINX_EBPF_TEST_PATIENCE={patience} SOCKET_REQUESTS=5000
.venv/bin/python -m pytest -v -p no:cacheprovider --color=no --junitxml={results}/report.xml {selection}
true
"""


@dataclass(frozen=True)
class Row:
    """The results of a kernel. `problem` says why something did not run."""

    release: str
    options: tuple[str, ...]
    dry_runs: str = ""
    results: tuple[Result, ...] = ()
    problem: str = ""

    @property
    def good(self) -> bool:
        return not self.problem and not self.refused and all(each.outcome != "failed" for each in self.results)

    @property
    def refused(self) -> list[str]:
        """The options with which the program did not attach."""
        _, *parts = re.split(r"^== (.*)\n", self.dry_runs, flags=re.MULTILINE)
        ready = {
            options
            for options, said in zip(parts[::2], parts[1::2], strict=True)
            if re.search(r"^ready", said, re.MULTILINE)
        }
        return [options for options in self.options if options not in ready]

    @property
    def cells(self) -> tuple[str, ...]:
        counts = Counter(each.outcome for each in self.results)
        attached = len(self.options) - len(self.refused)
        used = "".join(re.findall(r"propagates ([^,]*)", self.dry_runs))
        ways = ", ".join(way for way in ("on the socket", "in nginx's memory") if way in used)
        notes = [self.problem] if self.problem else [f"with “{options}” not attached" for options in self.refused]
        notes += [
            f"{each.scenario}: {each.outcome}, {each.reason}" for each in self.results if each.outcome != "passed"
        ]
        return (
            self.release,
            f"{attached} of {len(self.options)}",
            f"{counts['passed']} of {counts.total()}",
            ways if attached else "",
            "; ".join(notes),
        )


def try_kernel(name: str, options: tuple[str, ...], selection: Sequence[str], architecture: Architecture) -> Row:
    directory = CACHE / named(f"results-{name}", architecture)
    (directory / "report.xml").unlink(missing_ok=True)
    script = GUEST.format(
        results=RESULTS, options=shlex.join(options), patience=PATIENCE, selection=shlex.join(selection)
    )
    release = name
    try:
        release = kernel(name, architecture).release
        run(name, ["bash", "-c", script], directory, GUEST_S, architecture=architecture)
        results = tuple(result_of(case) for case in ElementTree.parse(directory / "report.xml").iter("testcase"))
    except (BuildError, MachineError, OSError) as error:
        return Row(release, options, problem=str(error))
    return Row(release, options, (directory / "dry-runs").read_text(), results)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make vm", description=__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"any of {', '.join(KERNELS)}; default: all")
    parser.add_argument("--tests", nargs="+", metavar="PATH", type=Path, help="tests to run instead of the default")
    brief = "only the largest program, and no load with --propagate, for arm64: it takes hours otherwise"
    parser.add_argument("--brief", action="store_true", help=brief)
    parser.add_argument("--arch", choices=ARCHITECTURES, default=NATIVE, help=f"the machine (default: {NATIVE})")
    arguments = parser.parse_args()
    known = kernels_of(ARCHITECTURES[arguments.arch])
    names = arguments.kernels or known
    if unknown := set(names) - set(known):
        parser.error(f"no kernel is called {', '.join(sorted(unknown))}")
    selection = [str(path) for path in arguments.tests or []]
    selection = selection or [
        *(f"tests/e2e/{module}.py" for module in SCENARIOS),
        *(() if arguments.brief else PROPAGATION),
    ]
    options = (LARGEST,) if arguments.brief else tuple(OPTIONS)
    rows = [try_kernel(name, options, selection, ARCHITECTURES[arguments.arch]) for name in names]
    print("\n| kernel | attached | scenarios passed | `--propagate` | notes |\n| --- | --- | ---: | --- | --- |")
    for row in rows:
        print(f"| {' | '.join(row.cells)} |")
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
