"""Runs the end-to-end scenarios against every nginx build, and writes a table to `.cache/matrix.md` (`make matrix`).

A scenario skips if it needs what a build lacks. Exits with 1 if a scenario fails, if no scenario of a build could run,
or if the program accepts a build that it must refuse.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from e2e.agent_process import PROGRAM
from e2e.nginx_server import NginxServer, free_ports, nginx_version

from matrix.builds import BUILDS, Build, BuildError, StrippedBuild, obtain

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / ".cache" / "matrix"
TABLE = REPOSITORY / ".cache" / "matrix.md"

# The tests of faults, load and the kernel say nothing about a build. All other tests with their own configuration run.
BESIDE = (
    "agent_faults", "collector_outage", "idle_clients", "left_out_programs", "mixed", "program_stacks", "watchdog",
    "worker_faults",
)  # fmt: skip
SCENARIOS = ["-m", "nginx", *(f"--ignore=tests/e2e/test_{module}.py" for module in BESIDE)]
REASON_CHARACTERS = 200


@dataclass(frozen=True)
class Result:
    """The result of a scenario on a build."""

    module: str
    scenario: str
    outcome: str
    """`passed`, `failed` or `skipped`."""
    reason: str = ""


@dataclass(frozen=True)
class Column:
    """The results of a build. `problem` says why no scenario ran."""

    build: Build
    version: str
    results: tuple[Result, ...] = ()
    refusal: str = ""
    problem: str = ""

    def of(self, module: str) -> str:
        counts = Counter(each.outcome for each in self.results if each.module == module)
        passed = counts["passed"]
        if counts["failed"]:
            return f"**{passed} of {counts.total()}**"
        if counts["skipped"]:
            return f"{passed} of {counts.total()}" if passed else "none"
        return str(passed)

    @property
    def exceptions(self) -> list[Result]:
        return [each for each in self.results if each.outcome != "passed"]

    @property
    def good(self) -> bool:
        return not self.problem and all(each.outcome != "failed" for each in self.results)


def run_scenarios(build: Build, directory: Path, selection: Sequence[str]) -> tuple[Result, ...]:
    """Run the scenarios of all modules. If a module has a failure, run it again; its second results count.

    Two thousand scenarios measure time on a machine that others use, too. A failure that repeats is real.
    """
    first = run_pytest(build.name, directory, ["tests/e2e", *selection])
    failed = {each.module for each in first if each.outcome == "failed"}
    if not failed:
        return first
    again = run_pytest(
        f"{build.name}-again", directory, [*(f"tests/e2e/{module}.py" for module in sorted(failed)), *selection]
    )
    return (*(each for each in first if each.module not in failed), *again)


def run_pytest(name: str, directory: Path, selection: Sequence[str]) -> tuple[Result, ...]:
    """Run pytest once. Its output stays beside its report."""
    report = RESULTS / f"{name}.xml"
    report.unlink(missing_ok=True)
    # In CI a skip is a failure. Here it is a result: the build lacks what the scenario needs.
    environment = {**os.environ, "OTEL_NGINX_EBPF_TEST_NGINX": str(directory), "CI": ""}
    with report.with_suffix(".log").open("wb") as log:
        subprocess.run(
            [sys.executable, "-m", "pytest", *SCENARIOS, f"--junitxml={report}", "-p", "no:cacheprovider", *selection],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if not report.exists():
        raise BuildError(f"pytest made no report; see {log.name}")
    results = tuple(result_of(case) for case in ElementTree.parse(report).iter("testcase"))
    if all(each.outcome == "skipped" for each in results):
        raise BuildError(f"no scenario ran: {results[0].reason if results else 'none was selected'}")
    for each in results:
        if each.outcome == "failed":
            print(f"matrix: {name}: {each.module}, {each.scenario}: {each.reason}", file=sys.stderr)
    return results


def result_of(case: ElementTree.Element) -> Result:
    # A skipped module has no classname.
    module = (case.attrib["classname"] or case.attrib["name"]).rpartition(".")[2]
    scenario = case.attrib["name"].removeprefix("test_") if case.attrib["classname"] else "all"
    for outcome, tags in (("failed", ("failure", "error")), ("skipped", ("skipped",))):
        for tag in tags:
            if (found := case.find(tag)) is not None:
                whole_module = re.search(r"Skipped: (.*)['\"]\)", found.text or "")
                reason = whole_module[1] if whole_module else found.get("message", "")
                return Result(module, scenario, outcome, first_line(reason))
    return Result(module, scenario, "passed")


def first_line(text: str) -> str:
    line = re.sub(r"\s+", " ", text).strip()
    return line if len(line) <= REASON_CHARACTERS else f"{line[:REASON_CHARACTERS]}…"


def check_refusal(directory: Path, expected: str) -> str:
    """Return what the program says when it refuses the build.

    Raises:
        BuildError: The program does not refuse the build, or does not say the `expected` words.
    """
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        port = free_ports(1)[0]
        nginx = NginxServer(Path(name), f"server {{ listen 127.0.0.1:{port}; }}", command=[directory / "start"])
        nginx.start([("127.0.0.1", port)])
        try:
            arguments = [str(PROGRAM), "run", "--pid", str(nginx.pid), "--exporter", "json"]
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            raise BuildError("the program does not refuse it") from None
        finally:
            nginx.stop()
    said = str(done.stderr).strip().replace(f"{REPOSITORY}/", "")
    if done.returncode == 0 or expected not in said:
        raise BuildError(f"exit code {done.returncode}, and no word of `{expected}`: {said}")
    return said


def run(build: Build, selection: Sequence[str]) -> Column:
    started = time.monotonic()
    number = ""
    try:
        directory = obtain(build)
        number = ".".join(map(str, nginx_version(directory / "start")))
        if isinstance(build, StrippedBuild) and build.refusal:
            column = Column(build, number, refusal=check_refusal(directory, build.refusal))
        else:
            column = Column(build, number, results=run_scenarios(build, directory, selection))
    except (BuildError, OSError, RuntimeError, subprocess.SubprocessError, TimeoutError) as error:
        column = Column(build, number, problem=first_line(str(error)))
    counts = Counter(each.outcome for each in column.results)
    told = column.problem or column.refusal or ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    print(f"matrix: {build.name} {number}: {told}, {time.monotonic() - started:.0f} s", file=sys.stderr)
    return column


def table(columns: Sequence[Column]) -> str:
    """Return Markdown: scenarios that passed, by module and build; what each build is; exceptions and reasons."""
    ran = [column for column in columns if column.results]
    modules = sorted({result.module for column in ran for result in column.results})
    rows = [["scenarios", *(column.build.name for column in ran)], ["---", *("---:" for _ in ran)]]
    rows += [[readable(module), *(column.of(module) for column in ran)] for module in modules]
    lines = [f"| {' | '.join(row)} |" for row in rows] if ran else []
    lines.append("")
    for column in columns:
        name = column.build.name
        lines.append(f"- {name}: nginx {column.version}, {column.build.description}")
        if column.refusal:
            lines.append(f"  - refused: {column.refusal}")
        if column.problem:
            lines.append(f"  - **did not run**: {column.problem}")
        for each in column.exceptions:
            word = "not possible" if each.outcome == "skipped" else "**failed**"
            lines.append(f"  - {readable(each.module)}, {each.scenario}: {word}: {each.reason}")
    return "\n".join(lines).strip() + "\n"


def readable(module: str) -> str:
    return module.removeprefix("test_").replace("_", " ")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make matrix", description=__doc__)
    parser.add_argument("builds", nargs="*", metavar="BUILD", help=f"of {', '.join(each.name for each in BUILDS)}")
    parser.add_argument("-k", metavar="EXPRESSION", help="run only scenarios whose names match, as pytest's -k does")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="how many builds to test at a time (default: 2)")
    arguments = parser.parse_args()
    if unknown := set(arguments.builds) - {each.name for each in BUILDS}:
        parser.error(f"no build is called {', '.join(sorted(unknown))}")
    chosen = [each for each in BUILDS if not arguments.builds or each.name in arguments.builds]
    RESULTS.mkdir(parents=True, exist_ok=True)
    # Scenarios mostly wait, but compilers do not. So make all builds first.
    for build in chosen:
        with suppress(BuildError):  # the loop below reports it
            obtain(build)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        columns = list(pool.map(lambda build: run(build, ["-k", arguments.k] if arguments.k else []), chosen))
    text = table(columns)
    TABLE.write_text(text)
    print(text)
    return 0 if all(column.good for column in columns) else 1


if __name__ == "__main__":
    sys.exit(main())
