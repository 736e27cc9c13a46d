"""The resource every span belongs to: the traced nginx."""

from collections.abc import Mapping

from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, OTELResourceDetector
from opentelemetry.sdk.resources import Resource as Resource
from opentelemetry.semconv._incubating.attributes.telemetry_attributes import (
    TELEMETRY_DISTRO_NAME,
    TELEMETRY_DISTRO_VERSION,
)

from otel_nginx_ebpf import __version__
from otel_nginx_ebpf.traces.model import AttributeValue


def make_resource() -> Resource:
    """The SDK's resource: $OTEL_SERVICE_NAME (else `nginx`), $OTEL_RESOURCE_ATTRIBUTES and what the detectors of
    $OTEL_EXPERIMENTAL_RESOURCE_DETECTORS find; without what the SDK makes up about the program it runs in."""
    said = OTELResourceDetector().detect().attributes
    found = {
        name: value
        for name, value in Resource.create().attributes.items()
        if name in said or name not in (SERVICE_INSTANCE_ID, SERVICE_NAME) or _named(name, value)
    }
    ours = {TELEMETRY_DISTRO_NAME: "otel-nginx-ebpf", TELEMETRY_DISTRO_VERSION: __version__, SERVICE_NAME: "nginx"}
    return Resource({**ours, **found})


def _named(name: str, value: object) -> bool:
    """Whether somebody named the service; the SDK's placeholder would name this program's interpreter."""
    return name == SERVICE_NAME and not str(value).startswith("unknown_service")


class Resources:
    """The resource of each nginx's traces: what is known of it, below what the user said of the service."""

    _KEPT = 1024

    def __init__(self, base: Resource) -> None:
        self._base = base
        self._merged: dict[int, tuple[Mapping[str, AttributeValue], Resource]] = {}

    def of(self, attributes: Mapping[str, AttributeValue]) -> Resource:
        """One object for all traces of an instance, so that an exporter sends it once a batch."""
        if not attributes:
            return self._base
        found = self._merged.get(id(attributes))
        if found is None or found[0] is not attributes:
            if len(self._merged) >= self._KEPT:
                self._merged.clear()
            found = attributes, Resource(attributes).merge(self._base)
            self._merged[id(attributes)] = found
        return found[1]
