"""Draws waterfalls in the terminal: each trace as a tree of spans, with bars on a common time axis."""

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Literal, TextIO

from opentelemetry.semconv.attributes.client_attributes import CLIENT_ADDRESS
from opentelemetry.semconv.attributes.http_attributes import HTTP_REQUEST_METHOD, HTTP_RESPONSE_STATUS_CODE
from opentelemetry.semconv.attributes.url_attributes import URL_PATH, URL_QUERY
from opentelemetry.trace import SpanKind
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from otel_nginx_ebpf.printable import printable
from otel_nginx_ebpf.traces.attributes import NGINX_TERMINATION, NGINX_UPSTREAM_PEER, NGINX_UPSTREAM_REUSED
from otel_nginx_ebpf.traces.events import text_of
from otel_nginx_ebpf.traces.model import AttributeValue, Span, Trace
from otel_nginx_ebpf.traces.sockaddr import Address, parse

_KIND_STYLES = {"SERVER": "bold cyan", "CLIENT": "magenta", "INTERNAL": "blue"}
_ERROR_STYLE = "bold red"
_TRACK_STYLE = "bright_black"
_DURATION_CELLS = 9
_LABEL_CELLS = 36
_BAR_CELLS_MIN = 16
_DETAIL_CELLS = 30
"""The width of the column behind the durations. Only a wide terminal has this column."""


def duration(nanoseconds: int) -> str:
    """Formats a duration with three digits and a unit: `9.80 µs`, `640 µs`, `1.24 ms`, `12.4 s`."""
    value, unit = nanoseconds / 1e3, "µs"
    for larger in ("ms", "s"):
        if value >= 999.5:
            value, unit = value / 1e3, larger
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f} {unit}"


def _status_style(status: AttributeValue | None) -> str:
    if not isinstance(status, int) or status >= 500:
        return _ERROR_STYLE
    return "bold yellow" if status >= 400 else "bold green"


def _text(attributes: Mapping[str, AttributeValue], name: str, absent: str = "") -> str:
    value = attributes.get(name)
    return absent if value is None else printable(str(value))


def clip(text: str, cells: int) -> str:
    """Cuts `text` to at most `cells` columns. An ellipsis stands for the rest."""
    return text if cell_len(text) <= cells else set_cell_size(text, cells - 1) + "…"


def _tree(trace: Trace) -> Iterator[tuple[str, Span]]:
    """Yields every span, parents before children, with the line drawing that shows its place in the tree."""
    root = trace.spans[0]
    yield "", root
    known = {span.span_id for span in trace.spans}
    children: dict[int, list[Span]] = {}
    for span in trace.spans[1:]:
        parent = span.parent_span_id if span.parent_span_id in known else root.span_id
        children.setdefault(parent or root.span_id, []).append(span)

    def below(parent: Span, indent: str) -> Iterator[tuple[str, Span]]:
        siblings = children.pop(parent.span_id, [])
        for child in siblings:
            last = child is siblings[-1]
            yield indent + ("└─ " if last else "├─ "), child
            yield from below(child, indent + ("   " if last else "│  "))

    yield from below(root, "")


def _bar(start: float, end: float, cells: int) -> tuple[str, str, str]:
    """Returns the texts before, of and after a bar from `start` to `end` (0 to 1) in `cells` columns.

    The bar is precise to half a column, and at least half a column long.
    """
    halves = 2 * cells
    first = min(round(start * halves), halves - 1)
    last = min(max(round(end * halves), first + 1), halves)
    left, right = first % 2, last % 2
    full = (last - right) // 2 - (first + left) // 2
    bar = "╺" * left + "━" * full + "╸" * right
    return " " * (first // 2), bar, " " * (cells - first // 2 - len(bar))


def _client(trace: Trace) -> str:
    # By default the span has no port (semantic conventions, client.port).
    address = parse(trace.request.client_sockaddr) if trace.request.client_sockaddr else None
    host = _text(trace.spans[0].attributes, CLIENT_ADDRESS, absent="?")
    return str(Address(host, (address and address.port) or None))


def _peers(trace: Trace) -> str:
    peers = (_text(span.attributes, NGINX_UPSTREAM_PEER) for span in trace.spans)
    return ", ".join(dict.fromkeys(peer for peer in peers if peer))


def _header(trace: Trace, width: int) -> Text:
    root = trace.spans[0]
    attributes = root.attributes
    local = datetime.fromtimestamp(root.start_unix_ns / 1e9)
    query = _text(attributes, URL_QUERY)
    uri = _text(attributes, URL_PATH, absent="-") + (f"?{query}" if query else "")
    status = attributes.get(HTTP_RESPONSE_STATUS_CODE)
    method = _text(attributes, HTTP_REQUEST_METHOD, absent="-")
    way = " → ".join(filter(None, (_client(trace), _peers(trace))))

    head = Text.assemble(
        (f"{local:%H:%M:%S}.{local.microsecond // 1000:03d} ", "dim"),
        (clip(method, 10), "bold"),
        " ",
    )
    tail = Text.assemble("  ", (str(status or "-"), _status_style(status)))
    if termination := _text(attributes, NGINX_TERMINATION):
        tail.append(f" {termination}", style="" if root.error is None else _ERROR_STYLE)
    tail.append("  ").append(duration(_length(root)), style="bold")
    room = width - head.cell_len - tail.cell_len
    line = head + Text(clip(uri, room), style="bold" if root.error is None else _ERROR_STYLE) + tail
    if line.cell_len + 2 + cell_len(way) <= width:
        return line + Text("  " + way, style="dim")
    return line + Text("\n" + " " * 13 + clip(way, width - 13), style="dim")


def _length(span: Span) -> int:
    return span.end_unix_ns - span.start_unix_ns


def _detail(span: Span) -> str:
    """Returns the remarks on a span: its upstream's status, whether the connection was reused, and its error."""
    parts = []
    if span.kind is not SpanKind.SERVER and HTTP_RESPONSE_STATUS_CODE in span.attributes:
        parts.append(_text(span.attributes, HTTP_RESPONSE_STATUS_CODE))
    if span.attributes.get(NGINX_UPSTREAM_REUSED):
        parts.append("reused connection")
    if span.error is not None:
        parts.append(printable(span.error))
    return " ".join(dict.fromkeys(parts))


def waterfall(trace: Trace, width: int) -> Text:
    """Draws a trace in lines of at most `width` columns, or 40 if `width` is less. The last line has no line end."""
    width = max(width, 40)
    root = trace.spans[0]
    begin = min(span.start_unix_ns for span in trace.spans)
    whole = max(max(span.end_unix_ns for span in trace.spans) - begin, 1)
    detail_cells = _DETAIL_CELLS if width >= 120 else 0
    rest = width - _DURATION_CELLS - detail_cells - 4
    label_cells = max(min(_LABEL_CELLS, rest - _BAR_CELLS_MIN), width // 4)
    bar_cells = rest - label_cells
    lines = [_header(trace, width)]
    for indent, span in _tree(trace):
        style = _KIND_STYLES.get(span.kind.name, "") if span.error is None else _ERROR_STYLE
        name, peer = printable(span.name), _text(span.attributes, NGINX_UPSTREAM_PEER)
        label = Text.assemble((indent, _TRACK_STYLE), (name, style), (f" {peer}" if peer else "", "dim"))
        label.truncate(label_cells, overflow="ellipsis", pad=True)
        before, bar, after = _bar((span.start_unix_ns - begin) / whole, (span.end_unix_ns - begin) / whole, bar_cells)
        line = Text.assemble(
            label,
            " ",
            before,
            (bar, style),
            after,
            " ",
            (f"{duration(_length(span)):>{_DURATION_CELLS}}", ""),
        )
        detail = _detail(span)
        rail = indent.replace("├─ ", "│  ").replace("└─ ", "   ")
        if detail and detail_cells:
            line.append("  " + clip(detail, detail_cells), style="red" if span.error else "dim")
        elif detail and span.error and span is not root:
            line.append(f"\n{rail}", style=_TRACK_STYLE).append(clip(f"✗ {detail}", width - len(rail)), style="red")
        for event in span.events:
            text = clip(printable(text_of(event)), width - len(rail))
            line.append(f"\n{rail}", style=_TRACK_STYLE).append(text, style="red" if span.error else "yellow")
        lines.append(line)
    return Text("\n").join(lines)


def make_console(stream: TextIO, color: Literal["auto", "always", "never"]) -> Console:
    """Returns a console as wide as the terminal of `stream`, with colours as the setting says, or plain text."""
    console = Console(
        file=stream,
        force_terminal={"auto": None, "always": True, "never": False}[color],
        no_color=False if color == "always" else None,
        highlight=False,
    )
    if color == "never" or console.no_color or not console.is_terminal:
        # With NO_COLOR rich still writes bold and dim. Users who want no colours want no escape sequences at all.
        console = Console(file=stream, color_system=None, force_terminal=False, highlight=False)
    return console


def make_renderer(stream: TextIO, color: Literal["auto", "always", "never"]) -> Callable[[Trace], str]:
    """Returns a function that turns a trace into a waterfall and an empty line.

    The waterfall is as wide as the terminal of `stream` at that time.
    """
    console = make_console(stream, color)

    def render(trace: Trace) -> str:
        # Render first, write later: on a broken pipe rich itself would end the program.
        with console.capture() as capture:
            console.print(waterfall(trace, console.width), end="\n\n", overflow="ignore", no_wrap=True, crop=False)
        return capture.get()

    return render
