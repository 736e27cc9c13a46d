import io
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from otel_nginx_ebpf.export.console import _bar, duration, make_renderer, waterfall
from otel_nginx_ebpf.traces.model import Event, Trace
from unit.sample_traces import retried_trace, static_trace


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)


def lines(text: str) -> list[str]:
    """Without trailing blanks and without the local time."""
    return [re.sub(r"^\d\d:\d\d:\d\d\.\d{3}", "TIME", line.rstrip()) for line in text.split("\n")]


def test_a_retried_request_in_80_columns() -> None:
    assert lines(waterfall(retried_trace(), 80).plain) == [
        "TIME GET /api/users?id=1  200  12.1 ms",
        "             [::1]:51234 → 127.0.0.1:9, [::1]:8080",
        "GET /api/                            ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━   12.1 ms",
        "├─ downstream read                   ╸                                  140 µs",
        "├─ upstream connect 127.0.0.1:9      ╺                                 90.0 µs",
        "│  ✗ connection refused",
        "├─ upstream connect [::1]:8080       ╺                                  150 µs",
        "├─ upstream exchange [::1]:8080       ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╸   11.5 ms",
        "└─ downstream write                                         ━━━━━━━━   3.05 ms",
    ]


def logged_trace(message: str) -> Trace:
    trace = retried_trace()
    event = Event("nginx.error_log", 0, {"log.severity": "error", "nginx.error.message": message})
    spans = [replace(span, events=(event,)) if index in (0, 2, 5) else span for index, span in enumerate(trace.spans)]
    return replace(trace, spans=tuple(spans))


def test_lines_of_the_error_log_are_below_their_span() -> None:
    assert lines(waterfall(logged_trace("refused\x1b[2J"), 80).plain)[2:] == [
        "GET /api/                            ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━   12.1 ms",
        "[error] refused\\x1b[2J",
        "├─ downstream read                   ╸                                  140 µs",
        "├─ upstream connect 127.0.0.1:9      ╺                                 90.0 µs",
        "│  ✗ connection refused",
        "│  [error] refused\\x1b[2J",
        "├─ upstream connect [::1]:8080       ╺                                  150 µs",
        "├─ upstream exchange [::1]:8080       ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╸   11.5 ms",
        "└─ downstream write                                         ━━━━━━━━   3.05 ms",
        "   [error] refused\\x1b[2J",
    ]
    assert all(cell_len(line) <= 40 for line in waterfall(logged_trace("x" * 100), 40).plain.split("\n"))


def test_a_wide_terminal_has_everything_on_one_line() -> None:
    shown = lines(waterfall(retried_trace(), 160).plain)
    assert len(shown) == 7
    assert shown[0] == "TIME GET /api/users?id=1  200  12.1 ms  [::1]:51234 → 127.0.0.1:9, [::1]:8080"
    assert shown[3].endswith("90.0 µs  connection refused")
    assert shown[5].endswith("11.5 ms  200")


def test_a_response_that_was_given_up_says_so_beside_its_status() -> None:
    trace = static_trace()
    attributes = {**trace.spans[0].attributes, "nginx.termination": "upstream_timeout"}
    server = replace(trace.spans[0], attributes=attributes, error="upstream_timeout")
    shown = lines(waterfall(replace(trace, spans=(server, *trace.spans[1:])), 160).plain)
    assert shown[0].startswith("TIME GET /index.html  200 upstream_timeout  ")


def test_a_continued_trace_looks_like_one_that_begins_here() -> None:
    trace = retried_trace()
    continued = replace(trace, spans=(replace(trace.spans[0], parent_span_id=77), *trace.spans[1:]))
    assert waterfall(continued, 160).plain == waterfall(trace, 160).plain


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160, 250])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    trace = retried_trace()
    long = trace.spans[4].attributes | {"nginx.upstream.peer": "unix:/" + "very-long/" * 30}
    spans = (*trace.spans[:4], replace(trace.spans[4], attributes=long, error="x" * 300), trace.spans[5])
    server = replace(trace.spans[0], attributes={**trace.spans[0].attributes, "url.path": "/" + "漢" * 200})
    shown = waterfall(replace(trace, spans=(server, *spans[1:])), width).plain
    assert max(map(cell_len, shown.split("\n"))) <= width
    assert "漢" in shown


def test_grandchildren_hang_below_their_parent() -> None:
    trace = retried_trace()
    spans = (*trace.spans[:5], replace(trace.spans[5], parent_span_id=5))
    assert [line[:26].rstrip() for line in waterfall(replace(trace, spans=spans), 120).plain.split("\n")][-2:] == [
        "└─ upstream exchange [::1]",
        "   └─ downstream write",
    ]


def test_a_span_whose_parent_is_unknown_is_still_shown() -> None:
    trace = static_trace()
    remote = (replace(trace.spans[0], parent_span_id=99), replace(trace.spans[1], parent_span_id=98))
    assert "downstream write" in waterfall(replace(trace, spans=remote), 80).plain


@given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40))
def test_hostile_text_prints_nothing_but_text(path: str, error: str) -> None:
    trace = static_trace(url__path=path, client__address=path, http__request__method=path)
    trace = replace(trace, spans=(trace.spans[0], replace(trace.spans[1], name=path, error=error)))
    assert all(line.isprintable() for line in waterfall(trace, 80).plain.split("\n"))


def test_markup_is_not_interpreted() -> None:
    trace = static_trace(url__path="/[bold]:smile:[/]\x1b[2J")
    assert "/[bold]:smile:[/]\\x1b[2J" in make_renderer(io.StringIO(), "never")(trace)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 200))
@settings(max_examples=300)
def test_a_bar_fills_its_columns_exactly(one: float, other: float, cells: int) -> None:
    start, end = sorted((one, other))
    before, bar, after = _bar(start, end, cells)
    assert len(before) + len(bar) + len(after) == cells
    assert bar
    assert abs(len(before) - start * cells) <= 1
    assert abs(len(after) - (1 - end) * cells) <= 1.5


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0.00 µs"),
        (640, "0.64 µs"),
        (9_994, "9.99 µs"),
        (9_996, "10.0 µs"),
        (99_960, "100 µs"),
        (999_400, "999 µs"),
        (999_600, "1.00 ms"),
        (12_060_000, "12.1 ms"),
        (482_000_000, "482 ms"),
        (12_400_000_000, "12.4 s"),
        (3_600_000_000_000, "3600 s"),
    ],
)
def test_duration(nanoseconds: int, text: str) -> None:
    assert duration(nanoseconds) == text


@pytest.mark.parametrize(
    ("color", "no_color", "terminal", "coloured"),
    [
        ("auto", False, True, True),
        ("auto", True, True, False),
        ("auto", False, False, False),
        ("never", False, True, False),
        ("always", False, False, True),
        ("always", True, False, True),
    ],
)
def test_colour_only_where_it_is_wanted(
    color: str, no_color: bool, terminal: bool, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")

    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    text = make_renderer(Stream(), color)(retried_trace())  # type: ignore[arg-type]
    assert ("\x1b[" in text) == coloured
    assert "upstream exchange" in text
    assert text.endswith("\n\n")
