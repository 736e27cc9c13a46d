"""The OpenTelemetry resource of the traced nginx, to which every span belongs."""

from collections.abc import Mapping

from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, OTELResourceDetector
from opentelemetry.sdk.resources import Resource as Resource
from opentelemetry.semconv._incubating.attributes.telemetry_attributes import (
    TELEMETRY_DISTRO_NAME,
    TELEMETRY_DISTRO_VERSION,
)
from opentelemetry.semconv.schemas import Schemas

from otel_nginx_ebpf import __version__
from otel_nginx_ebpf.traces.model import AttributeValue

SCHEMA_URL = Schemas.V1_44_0.value
"""The release of the semantic conventions whose names spans, metrics and resources have (docs/registry.yaml)."""


def make_resource() -> Resource:
    """Returns the SDK's resource, without the names that the SDK invents for the program in which it runs.

    It has $OTEL_SERVICE_NAME (else `nginx`), $OTEL_RESOURCE_ATTRIBUTES, and what the detectors of
    $OTEL_EXPERIMENTAL_RESOURCE_DETECTORS find.
    """
    said = OTELResourceDetector().detect().attributes
    found = {
        name: value
        for name, value in Resource.create().attributes.items()
        if name in said or name not in (SERVICE_INSTANCE_ID, SERVICE_NAME) or _named(name, value)
    }
    ours = {TELEMETRY_DISTRO_NAME: "otel-nginx-ebpf", TELEMETRY_DISTRO_VERSION: __version__, SERVICE_NAME: "nginx"}
    return Resource({**ours, **found}, SCHEMA_URL)


def _named(name: str, value: object) -> bool:
    """Tells whether a value is a name of the service that somebody set. The SDK's placeholder names the interpreter."""
    return name == SERVICE_NAME and not str(value).startswith("unknown_service")


class Resources:
    """Builds the resource of each nginx. The user's attributes override the detected attributes.

    The name of a service, which only a rule gives, overrides the user's for all services.
    """

    _KEPT = 1024

    def __init__(self, base: Resource) -> None:
        self._base = base
        self._merged: dict[int, tuple[Mapping[str, AttributeValue], Resource]] = {}

    def of(self, attributes: Mapping[str, AttributeValue]) -> Resource:
        """Returns the resource for an nginx's attributes. All its traces share the object, so a batch holds it once."""
        if not attributes:
            return self._base
        found = self._merged.get(id(attributes))
        if found is None or found[0] is not attributes:
            if len(self._merged) >= self._KEPT:
                self._merged.clear()
            found = attributes, Resource(attributes).merge(self._base).merge(_service_of_rule(attributes))
            self._merged[id(attributes)] = found
        return found[1]


def _service_of_rule(attributes: Mapping[str, AttributeValue]) -> Resource:
    return Resource({name: attributes[name] for name in (SERVICE_NAME,) if name in attributes})
