"""Fuzzes every target for some seconds, from the kept inputs on, and prints a table (`make fuzz`).

Findings go to `.cache/fuzz/TARGET/found`. --keep replaces the kept inputs by the fewest that reach the same code.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fuzz.targets import PLANTED, TARGETS

CACHE = Path(__file__).parents[2] / ".cache" / "fuzz"
KEPT = Path(__file__).parent / "corpus"
KEPT_BYTES_MAX = 64 << 10
"""The limit for the kept inputs of a target, in git."""


@dataclass(frozen=True)
class Fuzzed:
    """What libFuzzer reports at the end of a run."""

    executions: int
    reached: int
    """Places and comparisons that the run reached, as libFuzzer counts them."""
    cpu_seconds: float
    found: list[Path]
    log: str


def kept(name: str) -> list[bytes]:
    """Return a target's inputs in git."""
    path = KEPT / f"{name}.zip"
    if not path.exists():
        return []
    with zipfile.ZipFile(path) as archive:
        return [archive.read(entry) for entry in archive.namelist()]


def keep(name: str, inputs: list[bytes]) -> None:
    """Store inputs up to the limit, the smallest first. Equal inputs give an equal file."""
    KEPT.mkdir(exist_ok=True)
    with zipfile.ZipFile(KEPT / f"{name}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        size = 0
        for number, data in enumerate(sorted(inputs, key=lambda data: (len(data), data))):
            entry = zipfile.ZipInfo(f"{number:04}")
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
            size += entry.compress_size + 2 * (len(entry.filename) + 60)
            if size > KEPT_BYTES_MAX:
                break


def _run(name: str, *options: str | Path) -> tuple[int, str, float]:
    before = os.times()
    done = subprocess.run(
        # Through a shell: a process starts with the peak memory of the process that forked it. Here that is pytest
        # after a thousand tests, and libFuzzer would count that memory against its limit.
        ["sh", "-c", '"$@"; exit $?', "sh", "nice", "-n", "19", sys.executable, "-m", "fuzz.one", name, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    after = os.times()
    cpu_seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return done.returncode, done.stdout, cpu_seconds


def fuzz(name: str, seconds: int, directory: Path) -> Fuzzed:
    """Fuzz a target. Its new inputs and its findings stay in `directory`."""
    corpus, found = directory / "corpus", directory / "found"
    for folder in (corpus, found):
        folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate([*(TARGETS | PLANTED)[name].seeds(), *kept(name)]):
        (corpus / f"kept-{number:04}").write_bytes(data)
    before = set(found.iterdir())
    code, log, cpu_seconds = _run(
        name, f"-max_total_time={seconds}", "-print_final_stats=1", f"-artifact_prefix={found}/", corpus
    )
    executions = re.search(r"stat::number_of_executed_units: (\d+)", log)
    reached = re.findall(r" ft: (\d+)", log)
    new = sorted(set(found.iterdir()) - before)
    if code == 0 and executions is None:
        code = 1
    if code and not new:
        raise RuntimeError(f"fuzzing {name} ended with {code}:\n{log[-4000:]}")
    return Fuzzed(int(executions[1]) if executions else 0, int(reached[-1]) if reached else 0, cpu_seconds, new, log)


def minimize(name: str, directory: Path) -> None:
    """Keep the fewest inputs that reach everything that the inputs in `directory` reach."""
    with tempfile.TemporaryDirectory() as fewest:
        _run(name, "-merge=1", fewest, directory / "corpus")
        keep(name, [path.read_bytes() for path in Path(fewest).iterdir()])


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="seconds for each target; default: 60")
    parser.add_argument("--keep", action="store_true", help="replace the inputs in git")
    arguments = parser.parse_args()
    problems = 0
    print(
        "| target | inputs tried | reached | processor time | found |\n| --- | ---: | ---: | ---: | ---: |", flush=True
    )
    for name in arguments.targets:
        result = fuzz(name, arguments.seconds, CACHE / name)
        problems += len(result.found)
        numbers = f"{result.executions:,} | {result.reached:,} | {result.cpu_seconds:.0f} s | {len(result.found)}"
        print(f"| {name} | {numbers} |", flush=True)
        if result.found:
            print(result.log[-4000:], *result.found, sep="\n")
        elif arguments.keep:
            minimize(name, CACHE / name)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
