"""The resource every span belongs to: the traced nginx."""

from collections.abc import Mapping

from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.semconv._incubating.attributes.telemetry_attributes import (
    TELEMETRY_DISTRO_NAME,
    TELEMETRY_DISTRO_VERSION,
)

from otel_nginx_ebpf import __version__


def make_resource(extra: Mapping[str, str] | None = None) -> Resource:
    """The SDK's resource: $OTEL_SERVICE_NAME (else `nginx`), $OTEL_RESOURCE_ATTRIBUTES and what the detectors
    of $OTEL_EXPERIMENTAL_RESOURCE_DETECTORS find, all of which win over `extra`."""
    detected = Resource.create()
    if str(detected.attributes[SERVICE_NAME]).startswith("unknown_service"):
        # Nobody named the service; the SDK's placeholder would name this program's interpreter.
        detected = detected.merge(Resource({SERVICE_NAME: "nginx"}))
    ours = {TELEMETRY_DISTRO_NAME: "otel-nginx-ebpf", TELEMETRY_DISTRO_VERSION: __version__}
    return Resource({**ours, **(extra or {})}).merge(detected)
