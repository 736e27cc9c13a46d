"""What an exporter is."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from otel_nginx_ebpf.traces.model import AttributeValue, Trace
from otel_nginx_ebpf.traces.record import Request

Completed = tuple[Request, int, Mapping[str, AttributeValue]]
"""A request, Unix time minus monotonic time for it, and the resource attributes of its nginx."""


class Exporter(Protocol):
    """Takes completed requests. Called from one thread."""

    at_once: int
    """How many requests it likes to be given at once."""

    def take(self, completed: Sequence[Completed]) -> None:
        """Returns at once, but for the time that writing lines to stdout takes.

        It is also called with nothing: while probes are live, at each look for what came.

        Raises:
            BrokenPipeError: The reader of the output is gone, or has seen enough.
            UserError: The output cannot be written.
        """

    def shutdown(self, timeout_s: float) -> None:
        """Delivers what it holds, for `timeout_s` seconds at most, and counts the rest as lost."""


class TraceExporter(Protocol):
    """Takes traces that were built to be read; the rest is as `Exporter` says."""

    def export(self, trace: Trace) -> None: ...

    def shutdown(self, timeout_s: float) -> None: ...
