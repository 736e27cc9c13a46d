"""The figures as tables on a terminal."""

from typing import Any

from rich.table import Table

from bench.variants import OFF


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def cpu(figures: dict[str, Any]) -> Table:
    """What tracing adds: “least” holds the best round of each against the other, where load shows least."""
    table = _table(
        "Processor time in the worker, µs a request (bystander: µs a system call)",
        "scenario",
        "",
        "median",
        "least",
        "added, median",
        "quartiles",
        "added, least",
    )
    for name, series in figures.items():
        for label, figure in series.items():
            added = figure.get("above_off")
            digits = 3 if name == "bystander" else 2
            cells = [f"{figure['median']:.{digits}f}", f"{figure['least']:.{digits}f}"]
            if added:
                cells += [
                    f"{added['median']:+.{digits}f}",
                    f"{added['lower_quartile']:+.{digits}f} … {added['upper_quartile']:+.{digits}f}",
                    f"{figure['least'] - series[OFF]['least']:+.{digits}f}",
                ]
            table.add_row(name, label, *cells)
    return table


def programs(figures: dict[str, Any]) -> Table:
    """Hits and program time, as the kernel counts them; those that did not run are left out."""
    table = _table(
        "BPF programs, by the kernel's own count; the tracepoints' of all processes on the machine",
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
            table.add_row(name, label, "in all", "", "", "", f"{total:.2f}", end_section=True)
    return table


def latency(figures: dict[str, Any], requests_a_second: int) -> Table:
    """Medians over the rounds; the spread is that of the rounds."""
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
    return table
