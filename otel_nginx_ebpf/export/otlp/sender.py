"""What both ways to a collector have in common: a finished message goes out, an answer comes back."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.process.handover import otlp_file_variables


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a message. One that is neither delivered nor to be retried is refused for good."""

    delivered: bool = False
    retry: bool = False
    wait_s: float = 0
    """Before the next try, as the collector asked; 0: it did not say."""
    rejected_spans: int = 0
    """Of a message that was delivered (partial success)."""


class Sender(Protocol):
    """An official exporter, given finished messages: TLS, headers, compression, timeouts and retries stay its own."""

    report: Callable[[str], None]
    """Called with what went wrong, at once and each time; whoever uses the sender sets it."""

    def send(self, message: bytes) -> Answer:
        """Sends an ExportTraceServiceRequest, for as long as $OTEL_EXPORTER_OTLP_TIMEOUT says, retries included."""

    def hasten(self) -> None:
        """From now on a `send` is one try; ends the pause of one in another thread."""

    def shutdown(self) -> None:
        """Ends a `send` in another thread, too."""


def ignore(problem: str) -> None:
    """Reports to nobody."""


def make_sender(protocol: str) -> Sender:
    """The official exporter for `grpc` or `http/protobuf`, configured by the $OTEL_EXPORTER_OTLP_* variables.

    Raises:
        UserError: One of them has a value that the exporter refuses, or names a file that cannot be read.
    """
    # gRPC's exporter would log a traceback and go on without the file, HTTP's would fail at every export.
    for variable in otlp_file_variables("TRACES"):
        path = os.environ.get(variable)
        if path and not os.access(path, os.R_OK):
            raise UserError(f"{variable}: cannot read the file {path}")
    # gRPC's C library reports each lost connection on stderr by itself; we say it in one line.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        # Only what is chosen: gRPC takes 10 MB.
        if protocol == "grpc":
            from otel_nginx_ebpf.export.otlp.grpc import GrpcSender

            return GrpcSender()
        from otel_nginx_ebpf.export.otlp.http import HttpSender

        return HttpSender()
    except Exception as error:  # Whatever the SDK raises here, a variable of the user's is the cause.
        raise UserError(f"OTEL_EXPORTER_OTLP_* for {protocol}: {error}") from error
