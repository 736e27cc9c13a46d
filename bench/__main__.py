"""Runs `make bench`; docs/overhead.md explains the figures."""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from collector.process import CollectorProcess, official
from e2e.nginx_server import free_ports
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import counts, emitter, latency, machine, memory, paths, recording, tables, worker
from bench.site import NAMED_SCENARIOS, SCENARIOS, Module, ModuleError, Site
from bench.variants import FEATURES, SETTINGS, Variant

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Measure what tracing costs.")
console = Console(width=None if sys.stdout.isatty() else 140)

Rounds = Annotated[int, typer.Option(min=1, help="How many rounds; each has tracing off and on in turn.")]
Output = Annotated[Path, typer.Option("--json", help="The file for the figures.")]
OUTPUT = Path("bench.json")
Scenarios = Annotated[
    list[str] | None,
    typer.Option("--scenario", help=f"One of {', '.join(NAMED_SCENARIOS)}, {worker.BYSTANDER}; repeatable."),
]
Variants = Annotated[
    list[str] | None,
    typer.Option("--variant", help="What to compare with an untraced nginx; repeatable.", metavar="NAME=[PROGRAM] …"),
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


DIRECTIVES = "otel_exporter { endpoint 127.0.0.1:{collector}; } otel_trace on;"
"""What nginx's own module needs to trace all requests."""


@contextmanager
def _site_with_module(path: Path, directives: str) -> Iterator[tuple[Site, CollectorProcess]]:
    """Start an nginx with a module that traces, and a collector for what the module sends."""
    with tempfile.TemporaryDirectory(prefix="otel-bench-") as name:
        os.chmod(name, 0o755)
        (port,) = free_ports(1)
        module = Module(path, directives.replace("{collector}", str(port)))
        try:
            site = Site(Path(name), module)
        except ModuleError as error:
            raise typer.BadParameter(f"nginx cannot use {path}: {error}", param_hint="--module") from error
        with site:
            collector = official(emitter.COUNTING_COLLECTOR.format(port=port), [port], Path(name))
            try:
                yield site, collector
            finally:
                collector.stop()


def _write(path: Path, part: str, figures: dict[str, Any], load_before: tuple[float, ...]) -> None:
    """Add a part to the file, with the machine and its load. Parts of other runs stay."""
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
    rounds: Rounds = 6,
    module: Annotated[
        Path | None, typer.Option(help="A module of nginx that traces, to compare with: its shared object.")
    ] = None,
    module_directives: Annotated[
        str, typer.Option(help="The module's directives in nginx.conf; {collector} is a collector's port (OTLP, gRPC).")
    ] = DIRECTIVES,
    beside: Annotated[
        bool, typer.Option("--beside", help="Let the program read its records meanwhile, on the load's processors.")
    ] = False,
    json_file: Output = OUTPUT,
) -> None:
    """Measure processor time in the worker, and what another process pays."""
    names = scenario or [*SCENARIOS, worker.BYSTANDER]
    _measure_worker("worker", names, variant or SETTINGS, rounds, json_file, module, module_directives, beside)


@app.command("features")
def features_command(rounds: Rounds = 6, json_file: Output = OUTPUT) -> None:
    """Measure in the worker what the error log, captured headers and rules cost. `all` leaves it out."""
    _measure_worker("features", ["static", "proxied", "broken"], FEATURES, rounds, json_file)


def _measure_worker(
    part: str,
    names: Sequence[str],
    settings: Sequence[str],
    rounds: int,
    json_file: Path,
    module: Path | None = None,
    module_directives: str = DIRECTIVES,
    beside: bool = False,
) -> None:
    variants = [Variant.parse(text) for text in settings]
    load = os.getloadavg()
    requests = [name for name in names if name != worker.BYSTANDER]
    steps = rounds * (len(names) * (len(variants) + 1) + len(requests) * bool(module)) + len(requests) * len(variants)
    with ExitStack() as stack:
        site = stack.enter_context(_site())
        with_module, collector = (
            stack.enter_context(_site_with_module(module, module_directives)) if module else (None, None)
        )
        advance = stack.enter_context(_progress(steps))
        cpu_us, rate = worker.interleave(site, names, variants, rounds, advance, with_module, beside=beside)
        programs: dict[str, Any] = {}
        for each in variants:
            for name in requests:
                advance(f"{each.name}: programs of {name}")
                programs.setdefault(name, {})[each.name] = worker.probe_accounts(site, name, each)
        if with_module and collector:
            served, spans = with_module.counts().requests, emitter.spans_received(collector.log())
            console.print(f"module: of {served} requests the collector has {spans} spans")
    figures = {
        "cpu_us": {name: worker.compare(series) for name, series in cpu_us.items()},
        "requests_a_second": {name: worker.compare(series) for name, series in rate.items() if series},
        "programs": programs,
    }
    console.print(tables.cpu(figures["cpu_us"], figures["requests_a_second"]))
    console.print(tables.programs(programs))
    _write(json_file, part, figures, load)


@app.command("latency")
def latency_command(
    scenario: Scenarios = None,
    variant: Variants = None,
    rounds: Rounds = 5,
    rate: Annotated[int, typer.Option(min=1, help="Requests a second.")] = 3000,
    json_file: Output = OUTPUT,
) -> None:
    """Measure latency at a fixed rate below saturation."""
    names = scenario or ["static", "proxied", "static-tls", "proxied-h2"]
    variants = [Variant.parse(text) for text in variant or ["on"]]
    load = os.getloadavg()
    with _site() as site, _progress(rounds * len(names) * (len(variants) + 1)) as advance:
        figures = latency.measure(site, names, variants, rounds, rate, advance)
    console.print(tables.latency(figures, rate))
    _write(json_file, "latency", {"requests_a_second": rate, "latency_us": figures}, load)


@app.command("emitter")
def emitter_command(
    records: Annotated[
        int, typer.Option(min=emitter.START_RECORDS * 2, help="How many records to record and replay.")
    ] = 200_000,
    rounds: Rounds = 3,
    capture: Annotated[Path | None, typer.Option(help="A capture to replay instead of recording one.")] = None,
    base: Annotated[Path | None, typer.Option(help="The program of another checkout, to compare with.")] = None,
    json_file: Output = OUTPUT,
) -> None:
    """Measure the way from real records to a real collector: requests/s, and the cost of each stage."""
    load = os.getloadavg()
    steps = records // recording.ROUND + rounds * (8 + (base is not None)) + 1
    with tempfile.TemporaryDirectory(prefix="otel-bench-") as name, _progress(steps) as advance:
        path = Path(name, "capture")
        if capture is not None:
            shutil.copy(capture, path)
        else:
            with _site() as site:
                recording.record(site, path, records, advance)
        figures = {
            "stages": emitter.each_stage(path, rounds, advance),
            "to_collector": emitter.to_collector(path, records, rounds, base, advance),
        }
    console.print(tables.stages(figures["stages"]))
    console.print(tables.to_collector(figures["to_collector"]))
    _write(json_file, "emitter", figures, load)


@app.command("memory")
def memory_command(json_file: Output = OUTPUT) -> None:
    """Measure resident memory of the emitter, and what its libraries add."""
    load = os.getloadavg()
    with _site() as site, tempfile.TemporaryDirectory(prefix="otel-bench-") as name, _progress(4) as advance:
        figures = {"over_time": memory.over_time(site, Path(name), advance), "imports_mb": memory.of_imports()}
    console.print(tables.memory(figures["over_time"]))
    console.print(tables.imports(figures["imports_mb"]))
    _write(json_file, "memory", figures, load)


@app.command("counts")
def counts_command(json_file: Output = OUTPUT) -> None:
    """Count instructions: figures that do not depend on the machine's load."""
    load = os.getloadavg()
    with _site() as site:
        figures = {
            "programs": paths.measure(site),
            "emitter_instructions": counts.instructions_a_request(site),
            "emitter_instructions_with_access": counts.instructions_a_request(site, "access"),
        }
    console.print(tables.counts(figures))
    _write(json_file, "counts", figures, load)


@app.command("all")
def all_command(json_file: Output = OUTPUT) -> None:
    """Measure every part with its defaults; about twenty minutes."""
    for part in (worker_command, latency_command, emitter_command, memory_command, counts_command):
        part(json_file=json_file)


if __name__ == "__main__":
    app()
