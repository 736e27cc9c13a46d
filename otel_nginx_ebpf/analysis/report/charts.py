"""Draws charts over time as paths of an SVG picture."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from otel_nginx_ebpf.analysis.report.timeline import Timeline
from otel_nginx_ebpf.analysis.tables import PERCENTILES
from otel_nginx_ebpf.analysis.tally import PHASES, Row
from otel_nginx_ebpf.export.console import duration

WIDTH, HEIGHT = 960, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 8, 12, 28


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """A line or an area of a chart. `kind` is the CSS class that gives its colour."""

    kind: str
    name: str
    path: str
    area: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    lines: Sequence[Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    columns: Sequence[tuple[float, Sequence[str]]]
    """The text lines to show when the pointer is at a position, with the position."""
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def kind_of(phase: int | None) -> str:
    """Returns the CSS class of a phase; None stands for the whole request."""
    return "whole" if phase is None else PHASES[phase].replace(" ", "-")


class _Axes:
    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self.slots = max(timeline.rows, default=0) + 1

    def x(self, slot: float) -> float:
        return round(_LEFT + slot / self.slots * (WIDTH - _LEFT - _RIGHT), 1)

    def time(self, slot: int) -> str:
        then = datetime.fromtimestamp((self._timeline.start_unix_ns + slot * self._timeline.width_ns) / 1e9, UTC)
        return f"{then:%H:%M:%S}" + (f".{then.microsecond // 100_000}" if self._timeline.width_ns < 1e9 else "")

    def x_ticks(self) -> list[Tick]:
        step = max(math.ceil(self.slots / 6), 1)
        return [Tick(self.x(slot), self.time(slot)) for slot in range(0, self.slots, step)]


def _y(part: float) -> float:
    return round(HEIGHT - _BOTTOM - part * (HEIGHT - _TOP - _BOTTOM), 1)


def _runs(slots: Sequence[int]) -> Iterator[list[int]]:
    """Yields lists of consecutive slots."""
    run: list[int] = []
    for slot in slots:
        if run and slot != run[-1] + 1:
            yield run
            run = []
        run.append(slot)
    if run:
        yield run


def _steps(axes: _Axes, values: dict[int, float]) -> str:
    """Returns the path of a line through the middle of each slot. A slot without neighbours becomes a dash."""
    parts = []
    for run in _runs(sorted(values)):
        points = [(axes.x(slot + 0.5), _y(values[slot])) for slot in run]
        if len(points) == 1:
            points = [(axes.x(run[0]), points[0][1]), (axes.x(run[0] + 1), points[0][1])]
        parts.append("M" + "L".join(f"{x} {y}" for x, y in points))
    return "".join(parts)


def _band(axes: _Axes, low: dict[int, float], high: dict[int, float]) -> str:
    """Returns the path of the area between two heights of each slot, as steps."""
    parts = []
    for run in _runs(sorted(slot for slot in high if high[slot] > low[slot])):
        upper = [f"{axes.x(slot + side)} {_y(high[slot])}" for slot in run for side in (0, 1)]
        lower = [f"{axes.x(slot + side)} {_y(low[slot])}" for slot in reversed(run) for side in (1, 0)]
        parts.append("M" + "L".join(upper + lower) + "Z")
    return "".join(parts)


def _round_steps(top: float) -> list[float]:
    """Returns four or five round numbers from 0 to at least `top`."""
    if top <= 0:
        return [0.0, 1.0]
    step = 10 ** math.floor(math.log10(top / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * 4 >= top)
    return [step * number for number in range(math.ceil(top / step - 1e-9) + 1)]


def _linear(top: float, text: Callable[[float], str]) -> tuple[float, list[Tick]]:
    steps = _round_steps(top)
    return steps[-1], [Tick(_y(step / steps[-1]), text(step)) for step in steps]


def latency_chart(timeline: Timeline, percentile: int) -> Chart:
    """Draws a percentile of each phase and of the whole request on a logarithmic scale.

    `percentile` is an index of `PERCENTILES`.
    """
    axes = _Axes(timeline)
    values: dict[int | None, dict[int, int]] = {phase: {} for phase in (None, *range(len(PHASES)))}
    for slot, row in timeline.rows.items():
        for phase, of_phase in values.items():
            histogram = row.length if phase is None else row.phases[phase]
            if found := histogram.percentiles([PERCENTILES[percentile] / 100]):
                of_phase[slot] = found[0]
    every = [max(value, 1) for of_phase in values.values() for value in of_phase.values()] or [1]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)) + 1e-9)
    high = max(high, low + 1)

    def height(value: int) -> float:
        return (math.log10(max(value, 1)) - low) / (high - low)

    names: dict[int | None, str] = {None: "whole request", **dict(enumerate(PHASES))}
    columns = []
    for slot in sorted(timeline.rows):
        texts = [f"{names[phase]}: {duration(values[phase][slot])}" for phase in values if slot in values[phase]]
        columns.append((axes.x(slot + 0.5), [axes.time(slot), *texts]))
    return Chart(
        [
            Line(kind_of(phase), names[phase], _steps(axes, {slot: height(value) for slot, value in found.items()}))
            for phase, found in sorted(values.items(), key=lambda item: item[0] is None)
            if found
        ],
        axes.x_ticks(),
        [Tick(_y((power - low) / (high - low)), duration_tick(10**power)) for power in range(low, high + 1)],
        columns,
    )


def duration_tick(nanoseconds: float) -> str:
    if not nanoseconds:
        return "0"
    value, unit = nanoseconds, "ns"
    for larger in ("µs", "ms", "s"):
        if value >= 1000:
            value, unit = value / 1000, larger
    return f"{value:g} {unit}"


def time_chart(timeline: Timeline) -> Chart:
    """Draws the mean time of a request, with the phases stacked."""
    axes = _Axes(timeline)
    means = {slot: [time_ns / row.count for time_ns in row.time_ns] for slot, row in timeline.rows.items()}
    top, y_ticks = _linear(max(map(sum, means.values()), default=0), duration_tick)
    lines = []
    low = dict.fromkeys(means, 0.0)
    for phase, name in enumerate(PHASES):
        high = {slot: low[slot] + mean[phase] / top for slot, mean in means.items()}
        lines.append(Line(kind_of(phase), name, _band(axes, low, high), area=True))
        low = high
    columns = [
        (
            axes.x(slot + 0.5),
            [axes.time(slot), f"mean: {duration(round(sum(means[slot])))}"]
            + [f"{name}: {duration(round(mean))}" for name, mean in zip(PHASES, means[slot], strict=True) if mean],
        )
        for slot in sorted(means)
    ]
    return Chart(lines, axes.x_ticks(), y_ticks, columns)


def rate_chart(timeline: Timeline) -> Chart:
    """Draws requests per second, and how many of them had a status of 4xx and 5xx."""
    axes = _Axes(timeline)
    seconds = timeline.width_ns / 1e9

    def rates(of: Callable[[Row], int]) -> dict[int, float]:
        return {slot: of(row) / seconds for slot, row in timeline.rows.items()}

    found = {
        "5xx": rates(lambda row: row.failed),
        "4xx": rates(lambda row: row.failed + row.refused),
        "other": rates(lambda row: row.count),
    }
    top, y_ticks = _linear(max(found["other"].values(), default=0), lambda rate: f"{rate:g}/s")
    lines = []
    low = dict.fromkeys(timeline.rows, 0.0)
    for kind, rate in found.items():
        high = {slot: value / top for slot, value in rate.items()}
        lines.append(Line(f"status-{kind}", kind, _band(axes, low, high), area=True))
        low = high
    columns = [
        (
            axes.x(slot + 0.5),
            [
                axes.time(slot),
                f"requests: {row.count} ({row.count / seconds:.1f}/s)",
                f"4xx: {row.refused}",
                f"5xx: {row.failed}",
            ],
        )
        for slot, row in sorted(timeline.rows.items())
    ]
    return Chart(lines, axes.x_ticks(), y_ticks, columns)
