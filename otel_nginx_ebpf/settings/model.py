"""What the user chose, as plain values: how they are read, checked and explained is `config`'s."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ExporterName = Literal["otlp", "console", "line", "json"]
Color = Literal["auto", "always", "never"]
Sampler = Literal[
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
]
Propagator = Literal["tracecontext", "baggage", "b3", "b3multi", "xrequestid", "none"]
Detail = Literal["phases", "request"]
OtlpProtocol = Literal["grpc", "http/protobuf"]

Sort = Literal["rate", "errors", "total", "read", "connect", "wait", "transfer", "write", "nginx"]
"""By which of its columns `top` sorts; from the third on these are durations."""


@dataclass(frozen=True, slots=True)
class Top:
    """How `top` shows what comes."""

    sort: Sort
    interval_s: float
    """The time that the tables are of; where they are not in a terminal, one is printed so often."""
    once: bool
    """The first one is printed, and that is all."""
    of_file: bool = False
    """They are of all that comes, by its own times."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One value each, valid; `config.load` makes them. `config.Source` tells what they mean."""

    pid: tuple[int, ...]
    binary: tuple[Path, ...]
    wait: bool
    exporter: tuple[ExporterName, ...]
    output: Path | None
    query: bool
    color: Color
    sampler: Sampler
    sampler_arg: float
    keep_errors: bool
    keep_slower_than: int | None
    """Nanoseconds."""
    propagators: tuple[Propagator, ...]
    adopt_upstream_context: bool
    propagate: bool
    detail: Detail
    ring_buffer_mib: int
    max_active_requests: int
    max_cost_per_request: int | None
    """Nanoseconds."""
    max_loss: float | None
    reattach_seconds: float
    queue_size: int
    queue_mib: int
    queue_dir: Path | None
    queue_dir_mib: int
    batch_size: int
    batch_delay_ms: int
    otlp_protocol: OtlpProtocol
    grace_seconds: float
    metrics: bool
    metrics_listen: str | None
    user: str | None
    request_metrics: bool
    sdk_disabled: bool
    top: Top | None = None
    """Requests are shown, and go to no exporter."""

    @property
    def measures_requests(self) -> bool:
        """Whether anybody gets the durations of all requests."""
        return self.request_metrics and (self.metrics or self.metrics_listen is not None)
