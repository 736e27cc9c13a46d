"""Shows the figures as tables on a terminal."""

import re
from typing import Any

from rich.table import Table

from bench import paths
from bench.variants import OFF

# nginx on loopback answers much faster. A slower answer means that the machine was busy.
_STARVED_US = 5_000


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


RATES = 1_000, 10_000, 50_000
"""Requests a second, for the share of the worker's time that tracing takes."""


def cpu(figures: dict[str, Any], rates: dict[str, Any]) -> Table:
    """Show what tracing adds. “least” compares the best rounds, which have the least load."""
    table = _table(
        "Processor time in the worker, µs a request (bystander: µs a system call)",
        "scenario",
        "",
        "to untraced",
        "quartiles",
        "least",
        "median µs",
        "added µs",
        "least",
        *(f"at {rate:,}/s" for rate in RATES),
        "requests/s",
    )
    table.caption = (
        "the last columns: the share of a processor that tracing takes at this rate; the worker's highest rate"
    )
    for name, series in figures.items():
        digits = 3 if name == "bystander" else 2
        for label, figure in series.items():
            cells = [""] * (6 + len(RATES))
            cells[3] = f"{figure['median']:.{digits}f}"
            if added := figure.get("above_off"):
                ratio, least = figure["to_off"], series[OFF]["least"]
                cells[:3] = [
                    f"{ratio['median']:.2f}",
                    f"{ratio['lower_quartile']:.2f} … {ratio['upper_quartile']:.2f}",
                    f"{figure['least'] / least:.2f}",
                ]
                cells[4:6] = f"{added['median']:+.{digits}f}", f"{figure['least'] - least:+.{digits}f}"
                if name in rates:
                    cells[6:] = [f"{share(added['median'], rate):.1%}" for rate in RATES]
            if rate := rates.get(name, {}).get(label):
                cells.append(f"{rate['median']:.0f}")
            table.add_row(name, label, *cells, end_section=label == list(series)[-1])
    return table


def share(added_us: float, requests_a_second: int) -> float:
    """Return the share of a processor that this much time for each request takes."""
    return added_us * requests_a_second / 1e6


def programs(figures: dict[str, Any]) -> Table:
    """Show hits and program time, as the kernel counts them, without programs that did not run."""
    table = _table(
        "BPF programs, by the kernel's count; tracepoints run for all processes on the machine",
        "scenario",
        "",
        "program",
        "instructions",
        "runs a request",
        "ns a run",
        "µs a request",
    )
    for name, by_variant in figures.items():
        for label, programs in by_variant.items():
            for each in programs:
                if each["runs_a_request"] >= 0.005:
                    table.add_row(
                        name,
                        label,
                        each["program"],
                        str(each["instructions"]),
                        f"{each['runs_a_request']:.2f}",
                        f"{each['ns_a_run']:.0f}",
                        f"{each['us_a_request']:.2f}",
                    )
            total = sum(each["us_a_request"] for each in programs)
            table.add_row(name, label, "total", "", "", "", f"{total:.2f}", end_section=True)
    return table


def latency(figures: dict[str, Any], requests_a_second: int) -> Table:
    """Show medians and quartiles of the rounds."""
    columns = [each for series in figures.values() for each in series[OFF]]
    columns = list(dict.fromkeys(columns))
    title = f"Latency at {requests_a_second} requests a second, µs: median over the rounds, and quartiles"
    table = _table(title, "scenario", "", *columns)
    for name, series in figures.items():
        for label, percentiles in series.items():
            cells = [
                f"{each['median']:.0f} ({each['lower_quartile']:.0f} … {each['upper_quartile']:.0f})"
                for each in (percentiles[column] for column in columns)
            ]
            table.add_row(name, label, *cells)
    if any(series[OFF]["p50"]["median"] > _STARVED_US for series in figures.values()):
        table.caption = "the load generator had to wait for a processor: this is not nginx's latency"
    return table


def stages(figures: dict[str, Any]) -> Table:
    """Show the cost of each stage, on one processor."""
    title = f"Stages, for {figures['records']} requests with {figures['spans_a_request']:.2f} spans each"
    table = _table(title, "stage", "µs a request", "least", "allocations a request")
    for name, cost in figures["cpu_us_a_request"].items():
        allocations = figures["allocations_a_request"][name]
        table.add_row(name, f"{cost['median']:.1f}", f"{cost['least']:.1f}", f"{allocations:.0f}")
    sizes = figures["otlp_bytes_a_request"]
    table.caption = (
        f"bytes a request: record {figures['record_bytes_a_request']:.0f}, "
        f"OTLP {sizes['program']:.0f}, OTLP by the SDK {sizes['sdk']:.0f}"
    )
    return table


def to_collector(figures: dict[str, Any]) -> Table:
    """Show the cost of all stages and of sending, with gRPC's threads, on one processor. The collector has another."""
    table = _table(
        "Capture → collector over gRPC, everything on one processor",
        "",
        "requests",
        "CPU µs a request",
        "requests a CPU second",
        "requests/s, limited by the collector",
    )
    for way, figure in figures.items():
        table.add_row(
            way,
            str(figure["records"]),
            f"{figure['cpu_us_a_request']['median']:.1f}",
            f"{figure['requests_a_cpu_second']['median']:.0f}",
            f"{figure['requests_a_second']['median']:.0f}",
        )
    return table


def memory(figures: dict[str, Any]) -> Table:
    """Show resident memory by the files that are mapped."""
    moments = figures["moments"]
    groups = list(next(iter(moments.values()))["by_group"])
    table = _table("Resident memory of the emitter, MB", "", "requests", "Rss", "Pss", *groups)
    for moment, figure in moments.items():
        cells = [f"{figure['by_group'][group]:.1f}" for group in groups]
        table.add_row(moment, str(figure["requests"]), f"{figure['Rss']:.1f}", f"{figure['Pss']:.1f}", *cells)
    mapped = {name for figure in moments.values() for name in figure["bcc_or_llvm_mapped"]}
    table.caption = f"files of BCC or LLVM mapped: {', '.join(mapped) or 'none'}; {figures['last_line']}"
    return table


def imports(figures: dict[str, float]) -> Table:
    """Show resident memory after each import. “more” is the difference from the line above."""
    table = _table("Resident memory of a Python process that has imported …", "", "MB", "more")
    before = 0.0
    for name, megabytes in figures.items():
        table.add_row(name, f"{megabytes:.1f}", f"{megabytes - before:+.1f}")
        before = megabytes
    return table


def counts(figures: dict[str, Any]) -> Table:
    """Show what CI prints."""
    sizes, requests = figures["programs"]["sizes"], figures["programs"]["requests"]
    ways = {f"{name}, {path}": counts for name, by_path in requests.items() for path, counts in by_path.items()}
    table = _table(
        "Instructions of the kernel's programs: their size, and for a request, in how many runs", "", "size", *ways
    )
    for program, size in sizes.items():
        cells = []
        for each in ways.values():
            found = each.get(program, {"runs": 0, "instructions": 0})
            cells.append(f"{found['instructions']} in {found['runs']}" if found["runs"] else "")
        table.add_row(re.sub("^enter_ngx_(http_)?", "", program), str(size), *cells)
    table.add_section()
    table.add_row("all", "", *(str(paths.total(each)) for each in ways.values()))
    for helper, what in (("probe_read_user", "reads of nginx"), ("map_lookup", "look-ups in maps"), ("clock", "clock")):
        table.add_row(what, "", *(str(sum(found[helper] for found in each.values())) for each in ways.values()))
    table.caption = (
        f"record → OTLP bytes: {figures['emitter_instructions']:,.0f} processor instructions a request; "
        f"with its log record (--logs access) {figures['emitter_instructions_with_access']:,.0f}"
    )
    return table
