"""What the user chose about the metrics of all requests."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from otel_nginx_ebpf.settings.model import MetricsAttribute, Settings
from otel_nginx_ebpf.traces.choices import choices_of
from otel_nginx_ebpf.traces.methods import KNOWN_METHODS


@dataclass(frozen=True, slots=True)
class MetricChoices:
    known_methods: frozenset[str] = KNOWN_METHODS
    """The methods that series name."""
    attributes: frozenset[str] = frozenset(get_args(MetricsAttribute))
    """The attributes that series may have. Series that differ in no other attribute are one."""
    exponential: bool = False
    """Whether the kernel counts in exponential buckets, too."""


DEFAULT_CHOICES = MetricChoices()


def metric_choices_of(settings: Settings) -> MetricChoices:
    attributes = frozenset[str](settings.metrics_attributes) or DEFAULT_CHOICES.attributes
    return MetricChoices(choices_of(settings).known_methods, attributes, settings.counts_exponentially)


_ADDRESSES = {"server.address", "server.port", "network.peer.address", "network.peer.port"}
_NEEDED_BY: Mapping[str, set[str]] = {
    "METHOD": {"http.request.method"},
    "LOCATION": {"http.route"},
    "SERVER_NAME": {"nginx.server_name"},
    "VERSION": {"network.protocol.version"},
    "CACHE_STATUS": {"nginx.cache.status"},
    "SCHEME": {"url.scheme"},
    "STATUS": {"http.response.status_code", "error.type"},
    "ERROR": {"error.type"},
    "UPSTREAM": {"server.address", "nginx.upstream.name"},
    "PEER": _ADDRESSES,
}
"""What the kernel knows of a series, and the attributes that follow from it."""


def constants(settings: Settings) -> dict[str, int]:
    """Returns constants of the kernel program's text: for each row of the table, whether series differ by it."""
    chosen = metric_choices_of(settings).attributes
    return {f"SERIES_BY_{what}": int(not chosen.isdisjoint(needed)) for what, needed in _NEEDED_BY.items()}
