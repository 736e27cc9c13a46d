import os

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.semconv.schemas import Schemas

from otel_nginx_ebpf import __version__
from otel_nginx_ebpf.export.resource import SCHEMA_URL, Resources, make_resource


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


def test_the_service_is_nginx_unless_named() -> None:
    attributes = make_resource().attributes
    assert attributes["service.name"] == "nginx"
    assert attributes["telemetry.distro.name"] == "otel-nginx-ebpf"
    assert attributes["telemetry.distro.version"] == __version__


def test_the_standard_variables_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "edge")
    monkeypatch.setenv(
        "OTEL_RESOURCE_ATTRIBUTES", "service.name=other,service.version=9,deployment.environment.name=t%20t"
    )
    attributes = make_resource().attributes
    assert attributes["service.name"] == "edge"
    assert attributes["service.version"] == "9"
    assert attributes["deployment.environment.name"] == "t t"
    assert "service.instance.id" not in attributes  # the SDK's is this program's, not nginx's


def test_the_service_may_be_named_in_the_resource_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=edge")
    assert make_resource().attributes["service.name"] == "edge"


def test_resource_detectors_of_the_sdk_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "os.type" not in make_resource().attributes
    monkeypatch.setenv("OTEL_EXPERIMENTAL_RESOURCE_DETECTORS", "os")
    assert make_resource().attributes["os.type"] == "linux"


def test_the_resource_names_the_conventions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest that the installed package of the conventions knows."""
    assert make_resource().schema_url == list(Schemas)[-1].value == SCHEMA_URL
    monkeypatch.setenv("OTEL_EXPERIMENTAL_RESOURCE_DETECTORS", "os,process")
    base = make_resource()
    assert base.schema_url == SCHEMA_URL
    assert Resources(base).of({"process.pid": 1}).schema_url == SCHEMA_URL


def test_each_nginx_has_its_own_resource_below_what_the_user_said() -> None:
    base = Resource({"service.name": "edge", "service.version": "mine"})
    resources = Resources(base)
    one, other = {"service.version": "1.22.1", "process.pid": 1}, {"process.pid": 2}
    assert resources.of(one).attributes == {"service.name": "edge", "service.version": "mine", "process.pid": 1}
    assert resources.of(other).attributes["process.pid"] == 2
    assert resources.of(one) is resources.of(one)
    assert resources.of({}) is base
