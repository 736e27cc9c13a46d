"""`make bench`: see README, "Overhead"."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import latency, machine, tables, worker
from bench.site import SCENARIOS, Site
from bench.variants import Variant

app = typer.Typer(no_args_is_help=True, add_completion=False, help="What tracing costs, measured.")
console = Console(width=None if sys.stdout.isatty() else 120)

Rounds = Annotated[int, typer.Option(min=1, help="How often each is measured, off and on in turn.")]
Output = Annotated[Path, typer.Option("--json", help="Where the figures go.")]
OUTPUT = Path("bench.json")
Scenarios = Annotated[
    list[str] | None, typer.Option("--scenario", help=f"One of {', '.join(SCENARIOS)}, {worker.BYSTANDER}; repeatable.")
]
Variants = Annotated[
    list[str] | None,
    typer.Option("--variant", help="What to hold against an untraced nginx; repeatable.", metavar="NAME=[PROGRAM] …"),
]


@contextmanager
def _progress(steps: int) -> Iterator[Any]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=steps)

        def advance(what: str) -> None:
            progress.update(task, description=what)
            progress.advance(task)

        yield advance


@contextmanager
def _site() -> Iterator[Site]:
    machine.pin_all_but_nginx()
    with tempfile.TemporaryDirectory(prefix="otel-bench-") as name:
        os.chmod(name, 0o755)
        with Site(Path(name)) as site:
            yield site


def _write(path: Path, part: str, figures: dict[str, Any], load_before: tuple[float, ...]) -> None:
    """Adds a part to the file; those of other runs stay, each with the machine and the load it was measured under."""
    found = json.loads(path.read_text()) if path.exists() else {}
    found[part] = {
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine.describe(),
        "load_before": load_before,
        "load_after": os.getloadavg(),
        **figures,
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"{part}: {path}, load {load_before[0]:.1f} before, {os.getloadavg()[0]:.1f} after")


@app.command("worker")
def worker_command(
    scenario: Scenarios = None,
    variant: Variants = None,
    rounds: Rounds = 10,
    json_file: Output = OUTPUT,
) -> None:
    """Processor time in the worker, and what a process beside it pays."""
    names = scenario or [*SCENARIOS, worker.BYSTANDER]
    variants = [Variant.parse(text) for text in variant or ["on"]]
    load = os.getloadavg()
    requests = [name for name in names if name != worker.BYSTANDER]
    steps = rounds * len(names) * (len(variants) + 1) + len(requests) * len(variants)
    with _site() as site, _progress(steps) as advance:
        cpu_us, rate = worker.interleave(site, names, variants, rounds, advance)
        programs: dict[str, Any] = {}
        for each in variants:
            for name in requests:
                advance(f"{each.name}: programs of {name}")
                programs.setdefault(name, {})[each.name] = worker.probe_accounts(site, name, each)
    figures = {
        "cpu_us": {name: worker.compare(series) for name, series in cpu_us.items()},
        "requests_a_second": {name: worker.compare(series) for name, series in rate.items() if series},
        "programs": programs,
    }
    console.print(tables.cpu(figures["cpu_us"]))
    console.print(tables.programs(programs))
    _write(json_file, "worker", figures, load)


@app.command("latency")
def latency_command(
    scenario: Scenarios = None,
    variant: Variants = None,
    rounds: Rounds = 5,
    rate: Annotated[int, typer.Option(min=1, help="Requests a second.")] = 3000,
    json_file: Output = OUTPUT,
) -> None:
    """Latency at a fixed rate below saturation."""
    names = scenario or ["static", "proxied", "static-tls", "proxied-h2"]
    variants = [Variant.parse(text) for text in variant or ["on"]]
    load = os.getloadavg()
    with _site() as site, _progress(rounds * len(names) * (len(variants) + 1)) as advance:
        figures = latency.measure(site, names, variants, rounds, rate, advance)
    console.print(tables.latency(figures, rate))
    _write(json_file, "latency", {"requests_a_second": rate, "latency_us": figures}, load)


if __name__ == "__main__":
    app()
