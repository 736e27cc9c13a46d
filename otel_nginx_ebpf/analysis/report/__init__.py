"""`report`: shows a capture file as one HTML page, which needs no other file and no network.

The page contains text that clients sent. The template escapes all text. The page's content security policy allows only
the page's own script and style, and no requests.
"""

import base64
import hashlib
import heapq
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, TextIO

from jinja2 import Environment, PackageLoader, StrictUndefined

from otel_nginx_ebpf import __version__
from otel_nginx_ebpf.analysis.report.charts import HEIGHT, WIDTH, kind_of, latency_chart, rate_chart, time_chart
from otel_nginx_ebpf.analysis.report.timeline import Timeline
from otel_nginx_ebpf.analysis.tables import PERCENTILES, View, rows_of, share
from otel_nginx_ebpf.analysis.tally import CONNECT, PHASES, READ, TRANSFER, WAIT, WRITE, Row, Tally
from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.export.console import duration
from otel_nginx_ebpf.export.interface import Completed
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.printable import printable
from otel_nginx_ebpf.traces.attributes import NGINX_UPSTREAM_PEER, NGINX_UPSTREAM_TTFB
from otel_nginx_ebpf.traces.choices import SpanChoices
from otel_nginx_ebpf.traces.events import text_of
from otel_nginx_ebpf.traces.model import Span, Trace
from otel_nginx_ebpf.traces.phases import DOWNSTREAM_READ, DOWNSTREAM_WRITE, UPSTREAM_CONNECT, UPSTREAM_EXCHANGE
from otel_nginx_ebpf.traces.record import Request
from otel_nginx_ebpf.traces.spans import RandomIds, build_trace

SLOWEST = 20
"""The number of requests that are shown as waterfalls."""

_OF_PEERS = (CONNECT, WAIT, TRANSFER)

_TUNNEL = 101
"""The status of a tunnel. Its client chooses its length, so it is in the tables but not among the slowest."""


class Report:
    """An exporter to a page. Adds up the requests in bounded memory."""

    at_once = 1024

    def __init__(self, stats: Stats, choices: SpanChoices) -> None:
        self._stats = stats
        self._choices = choices
        self._tally = Tally()
        self._timeline = Timeline()
        self._slowest: list[tuple[int, int, Request, int]] = []
        """A heap of length in nanoseconds, a unique number, the request and its offset to Unix time in nanoseconds."""
        self._start_unix_ns, self._end_unix_ns = 2**63, 0

    def take(self, completed: Sequence[Completed]) -> None:
        for request, unix_offset_ns, _ in completed:
            end_unix_ns = request.ended_mono_ns + unix_offset_ns
            length_ns = self._tally.add(request, self._timeline.at(end_unix_ns))
            self._end_unix_ns = max(self._end_unix_ns, end_unix_ns)
            self._start_unix_ns = min(self._start_unix_ns, end_unix_ns - length_ns)
            self._stats.exported += 1
            if request.status != _TUNNEL:
                slow = (length_ns, -self._stats.exported, request, unix_offset_ns)
                (heapq.heappush if len(self._slowest) < SLOWEST else heapq.heappushpop)(self._slowest, slow)

    def shutdown(self, timeout_s: float) -> None:
        pass

    def page(self, title: str, notes: Sequence[str]) -> str:
        """Returns the whole document. `notes` are remarks about the capture file."""
        total = self._tally.total()
        locations, peers = rows_of(self._tally, View(peers=True))
        seconds = max(self._end_unix_ns - self._start_unix_ns, 0) / 1e9
        slowest = [
            build_trace(request, unix_offset_ns, RandomIds(), choices=self._choices)
            for _, _, request, unix_offset_ns in sorted(self._slowest, reverse=True)
        ]
        style, script = _text("page.css"), _text("page.js")
        return (
            _environment()
            .get_template("page.html")
            .render(
                title=printable(title),
                notes=[printable(note) for note in notes],
                version=__version__,
                policy=f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
                "base-uri 'none'; form-action 'none'",
                style=style,
                script=script,
                start=_time(self._start_unix_ns) if total.count else None,
                end=_time(self._end_unix_ns) if total.count else None,
                seconds=seconds,
                total=total,
                percentiles=PERCENTILES,
                phases=[(kind_of(phase), PHASES[phase]) for phase in range(len(PHASES))],
                whole=_cells("(all)", total),
                locations=[_cells(name, row) for name, row in locations],
                location_columns=["total", *PHASES],
                peers=[_cells(name, row, _OF_PEERS) for name, row in peers],
                peer_columns=["total", *(PHASES[phase] for phase in _OF_PEERS)],
                latency=[(value, latency_chart(self._timeline, index)) for index, value in enumerate(PERCENTILES)],
                times=time_chart(self._timeline),
                rates=rate_chart(self._timeline),
                slot=duration(self._timeline.width_ns),
                width=WIDTH,
                height=HEIGHT,
                slowest=[_waterfall(trace) for trace in slowest],
            )
        )


def open_page(path: Path, capture: Path) -> TextIO:
    """Opens the file for a page and empties it. Only the owner can read a new file, because it holds what clients sent.

    Raises:
        UserError: The file cannot be written, or is the capture file itself.
    """
    try:
        if path.exists() and path.samefile(capture):
            raise UserError(f"{path} is the capture file itself: give the page another name")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return open(descriptor, "w", encoding="utf-8", errors="backslashreplace")


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader(__name__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _text(name: str) -> str:
    return (files(__name__) / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Returns the name of a script or style in a content security policy (CSP 3, 2.3.1)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _time(unix_ns: int) -> str:
    return f"{datetime.fromtimestamp(unix_ns / 1e9, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _cells(name: str, row: Row, phases: Sequence[int] = range(len(PHASES))) -> dict[str, Any]:
    """Returns the cells of a row: numbers to sort by, and their texts."""
    durations = []
    for histogram in (row.length, *(row.phases[phase] for phase in phases)):
        found = histogram.percentiles([percentile / 100 for percentile in PERCENTILES])
        durations.append([(value, duration(value)) for value in found] if found else [(-1, "")] * len(PERCENTILES))
    whole = sum(row.time_ns)
    parts = []
    reached = 0
    for phase, time_ns in enumerate(row.time_ns):
        if time_ns:
            part = {"kind": kind_of(phase), "name": PHASES[phase], "share": share(time_ns, whole)}
            parts.append(part | {"x": round(100 * reached / whole, 2), "width": round(100 * time_ns / whole, 2)})
        reached += time_ns
    return {
        "name": name,
        "count": row.count,
        "refused": (row.refused / max(row.count, 1), share(row.refused, row.count)),
        "failed": (row.failed / max(row.count, 1), share(row.failed, row.count)),
        "durations": durations,
        "parts": parts,
    }


def _waterfall(trace: Trace) -> dict[str, Any]:
    server = trace.spans[0]
    begin = min(span.start_unix_ns for span in trace.spans)
    whole = max(max(span.end_unix_ns for span in trace.spans) - begin, 1)

    def part(kind: str, start_unix_ns: int, end_unix_ns: int) -> dict[str, Any]:
        width = max(1000 * (end_unix_ns - start_unix_ns) / whole, 2)
        x = min(1000 * (start_unix_ns - begin) / whole, 1000 - width)
        return {"kind": kind, "x": round(x, 1), "width": round(width, 1)}

    def line(span: Span) -> dict[str, Any]:
        kind = "error" if span.error else _KINDS.get(span.name, "whole")
        parts = [part(kind, span.start_unix_ns, span.end_unix_ns)]
        first_byte_ns = span.attributes.get(NGINX_UPSTREAM_TTFB)
        if isinstance(first_byte_ns, int) and not span.error:
            parts.append(part("upstream-transfer", span.start_unix_ns + first_byte_ns, span.end_unix_ns))
        return {
            "name": printable(span.name),
            "peer": printable(str(span.attributes.get(NGINX_UPSTREAM_PEER, ""))),
            "parts": parts,
            "duration": duration(span.end_unix_ns - span.start_unix_ns),
            "error": printable(span.error or ""),
            "attributes": [(name, printable(str(value))) for name, value in sorted(span.attributes.items())]
            + [(event.name, printable(text_of(event))) for event in span.events],
        }

    attributes = server.attributes
    query = attributes.get("url.query")
    uri = f"{attributes.get('url.path', '-')}" + (f"?{query}" if query else "")
    return {
        "time": _time(server.start_unix_ns),
        "method": printable(str(attributes.get("http.request.method", "-"))),
        "uri": printable(uri),
        "status": attributes.get("http.response.status_code"),
        "duration": duration(server.end_unix_ns - server.start_unix_ns),
        "trace_id": f"{trace.trace_id:032x}",
        "spans": [line(span) for span in trace.spans],
    }


_KINDS = {
    DOWNSTREAM_READ: kind_of(READ),
    UPSTREAM_CONNECT: kind_of(CONNECT),
    UPSTREAM_EXCHANGE: kind_of(WAIT),
    DOWNSTREAM_WRITE: kind_of(WRITE),
}
