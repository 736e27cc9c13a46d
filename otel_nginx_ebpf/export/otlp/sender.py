"""The interface to a collector over gRPC or HTTP: send a finished message, get an answer."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.process.handover import otlp_file_variables

Signal = Literal["traces", "logs", "metrics"]


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of sending a message. If neither `delivered` nor `retry` is set, the collector refuses the message."""

    delivered: bool = False
    retry: bool = False
    wait_s: float = 0
    """The delay before the next try that the collector asked for; 0 if it did not ask."""
    rejected: int = 0
    """The spans, log records or points of a delivered message that the collector rejected (partial success)."""


class Sender(Protocol):
    """Sends finished messages with an official exporter, which does TLS, headers, compression, timeouts and retries."""

    report: Callable[[str], None]
    """Called at once with a description of each failure. The user of the sender sets it."""

    def send(self, message: bytes) -> Answer:
        """Sends a signal's serialized export request, such as an ExportTraceServiceRequest.

        $OTEL_EXPORTER_OTLP_TIMEOUT limits the time, including retries.
        """

    def hasten(self) -> None:
        """Limits each `send` to a single try from now on. Ends the pause of a `send` in another thread."""

    def shutdown(self) -> None:
        """Closes the sender. Also ends a `send` in another thread."""


def ignore(problem: str) -> None:
    """Ignores a report."""


def make_sender(protocol: str, signal: Signal = "traces") -> Sender:
    """Returns the sender for `grpc` or `http/protobuf`, configured by the $OTEL_EXPORTER_OTLP_* variables.

    Raises:
        UserError: A variable has a value that the exporter refuses, or names a file that cannot be read.
    """
    # gRPC's exporter would log a traceback and go on without the file, HTTP's would fail at every export.
    for variable in otlp_file_variables(signal.upper()):
        path = os.environ.get(variable)
        if path and not os.access(path, os.R_OK):
            raise UserError(f"{variable}: cannot read the file {path}")
    # gRPC's C library writes each lost connection to stderr. This program reports it in one line.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        # Import only the chosen sender: gRPC takes 10 MB.
        if protocol == "grpc":
            from otel_nginx_ebpf.export.otlp.grpc import make

            return make(signal)
        from otel_nginx_ebpf.export.otlp.http import make

        return make(signal)
    except Exception as error:  # The SDK raises arbitrary exceptions; a variable of the user is always the cause.
        raise UserError(f"OTEL_EXPORTER_OTLP_* for {protocol}: {error}") from error
