"""What the program can tell is declared by the conventions or by docs/registry.yaml, which declares nothing else."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from opentelemetry.metrics import MeterProvider
from opentelemetry.sdk.metrics import MeterProvider as SdkMeterProvider
from opentelemetry.sdk.metrics.export import (
    Gauge,
    Histogram,
    InMemoryMetricReader,
    Metric,
    Sum,
)
from registry.checker import check_metric, check_value
from registry.reader import (
    CONDITIONALLY,
    OPT_IN,
    OWN,
    RECOMMENDED,
    REQUIRED,
    ROOT,
    Group,
    conventions,
    declaration,
    own,
)

from otel_nginx_ebpf.export.metrics import own as own_metrics
from otel_nginx_ebpf.export.metrics import requests as request_metrics
from otel_nginx_ebpf.metrics.connections import CONNECTIONS, Total
from otel_nginx_ebpf.metrics.series import METRICS, NGINX_WORKER_LOOP
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.traces.abi import c_enum
from otel_nginx_ebpf.traces.attributes import NGINX_CACHE_STATUS
from otel_nginx_ebpf.traces.error_log import LEVELS
from otel_nginx_ebpf.traces.events import ERROR_LOG, LOG_SEVERITY, NGINX_ERROR_ERRNO, NGINX_ERROR_MESSAGE
from otel_nginx_ebpf.traces.logs import ACCESS_LOG
from otel_nginx_ebpf.traces.record import CACHE_STATUSES, decode
from otel_nginx_ebpf.traces.spans import RandomIds, build_trace
from unit.sample_traces import RETRIED, STATIC, UNIX_OFFSET_NS

SOURCES = sorted((ROOT / "otel_nginx_ebpf").rglob("*.py"))
_NAMESPACES = ("opentelemetry.semconv.attributes", "opentelemetry.semconv._incubating.attributes")
_CONSTANTS = (*_NAMESPACES, "opentelemetry.sdk.resources")
# Names of files, metrics and events, which look like attributes.
_NO_ATTRIBUTES = {
    "nginx.conf",
    "nginx.pid",
    *METRICS,
    *CONNECTIONS,
    *(str(group.name) for group in own().of_type("event")),
}


def _constants(path: Path) -> Iterator[str]:
    """Yields the values of the conventions' constants that a module uses, and our own names in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(_CONSTANTS):
            for each in node.names:
                if node.module in _NAMESPACES:
                    modules[each.asname or each.name] = f"{node.module}.{each.name}"
                elif each.name.isupper():
                    yield getattr(importlib.import_module(node.module), each.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            value = getattr(importlib.import_module(modules[node.value.id]), node.attr)
            if isinstance(value, str):  # not an enumeration of values
                yield value
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in _NO_ATTRIBUTES:
            name = node.value
            if name.startswith("nginx.") and all(part.isidentifier() for part in name.split(".")):
                yield name


EMITTED = sorted({name for path in SOURCES for name in _constants(path)})
REFERENCES = sorted({name for group in own().groups.values() for name in group.attributes})


def _groups_with_conventions() -> list[Group]:
    return [group for group in own().groups.values() if "conventions" in group.annotations]


def test_the_names_in_the_code_were_found() -> None:
    assert {"url.path", "nginx.upstream.peer", "service.name", "telemetry.distro.name"} <= set(EMITTED)
    assert len(EMITTED) >= 50


@pytest.mark.parametrize("name", EMITTED)
def test_a_name_in_the_code_is_declared_and_in_a_group(name: str) -> None:
    assert declaration(name), f"{name}: neither the conventions nor docs/registry.yaml know it"
    assert name in REFERENCES, f"{name}: no span, metric or resource of docs/registry.yaml has it"


def test_every_status_of_the_cache_is_declared() -> None:
    declared = {member["value"] for member in own().attributes[NGINX_CACHE_STATUS].members}
    assert declared == set(CACHE_STATUSES.values())


def test_our_own_events_are_in_the_code() -> None:
    assert {group.name for group in own().of_type("event")} == {ERROR_LOG, ACCESS_LOG}
    assert {LOG_SEVERITY, NGINX_ERROR_ERRNO, NGINX_ERROR_MESSAGE} == own().groups[
        "event.nginx.error_log"
    ].attributes.keys()
    assert [member["value"] for member in own().attributes[LOG_SEVERITY].members] == list(LEVELS[:-1])


@pytest.mark.parametrize("name", sorted(name for name in own().attributes if name.startswith("nginx.")))
def test_our_own_attributes_are_in_the_code(name: str) -> None:
    assert name in EMITTED


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_has_type_stability_and_level(name: str) -> None:
    found = declaration(name)
    assert found
    attribute, _ = found
    assert re.fullmatch(r"(string|int|double|boolean)(\[\])?|template\[string\[\]\]", attribute.type)
    assert attribute.stability in ("development", "release_candidate", "stable")
    levels = {group.level(name) for group in own().groups.values() if name in group.attributes}
    assert levels <= {REQUIRED, CONDITIONALLY, RECOMMENDED, OPT_IN}


def test_no_attribute_is_declared_by_both() -> None:
    assert own().attributes.keys() & conventions().attributes.keys() == set()


@pytest.mark.parametrize("name", sorted(own().attributes))
def test_the_examples_have_the_declared_type(name: str) -> None:
    content = yaml.load(OWN.read_text(encoding="utf-8"), yaml.CSafeLoader)
    (fields,) = (each for group in content["groups"] for each in group.get("attributes", ()) if each.get("id") == name)
    assert [finding for example in fields.get("examples", ()) for finding in check_value(name, example)] == []


@pytest.mark.parametrize("group", _groups_with_conventions(), ids=lambda group: group.id)
def test_a_group_has_what_the_conventions_require(group: Group) -> None:
    theirs = conventions().groups[group.annotations["conventions"]]
    if group.type != "attribute_group":  # a part of a span
        demanded = {name for name in theirs.attributes if theirs.level(name) in (REQUIRED, CONDITIONALLY)}
        assert demanded - group.attributes.keys() == group.annotations.get("without", {}).keys()


@pytest.mark.parametrize("group", _groups_with_conventions(), ids=lambda group: group.id)
def test_no_level_is_below_that_of_the_conventions(group: Group) -> None:
    theirs = conventions().groups[group.annotations["conventions"]]
    order = (OPT_IN, RECOMMENDED, CONDITIONALLY, REQUIRED)
    for name in group.attributes.keys() & theirs.attributes.keys():
        assert order.index(group.level(name)) >= order.index(theirs.level(name)), name


@pytest.mark.parametrize("group", _groups_with_conventions(), ids=lambda group: group.id)
def test_a_metric_is_as_in_the_conventions(group: Group) -> None:
    theirs = conventions().groups[group.annotations["conventions"]]
    if group.type == "metric":
        assert (group.name, group.instrument, group.unit, group.stability) == (
            theirs.name,
            theirs.instrument,
            theirs.unit,
            theirs.stability,
        )


def test_what_is_required_and_may_be_missing_says_when() -> None:
    """In words for the documentation, and in conditions that the checker evaluates."""
    for group in own().groups.values():
        for each in group.own:
            if each.missing:
                assert each.absent, f"{group.id} {each.name}"


def _instrument(metric: Metric) -> str:
    match metric.data:
        case Sum(is_monotonic=True):
            return "counter"
        case Sum():
            return "updowncounter"
        case Gauge():
            return "gauge"
        case Histogram():
            return "histogram"
    raise AssertionError(metric.data)


def test_the_program_s_own_metrics() -> None:
    reader = InMemoryMetricReader()
    provider: MeterProvider = SdkMeterProvider([reader])
    stats = Stats(logs=True)
    assert stats.logs
    stats.logs.lose("lost_queue_full")
    for cause in ("lost_queue_full", "not_sampled", "partial_beginning"):
        stats.lose(cause)
    stats.probe_hits, stats.cost_s = {"sys_exit": 1.0}, 1e-6
    own_metrics._measure(provider, stats)
    stats.sent(0.1)
    data = reader.get_metrics_data()
    assert data
    told = [metric for each in data.resource_metrics for scope in each.scope_metrics for metric in scope.metrics]
    for metric in told:
        points = [dict(point.attributes or {}) for point in metric.data.data_points]
        assert points
        assert check_metric(metric.name, _instrument(metric), metric.unit or "", points) == []
    for name in METRICS.keys() - {NGINX_WORKER_LOOP}:
        assert conventions().groups[f"metric.{name}"].brief == METRICS[name].description
        assert conventions().groups[f"metric.{name}"].unit == METRICS[name].unit
    declared = {group.name for group in own().of_type("metric")}
    assert {metric.name for metric in told} == declared - METRICS.keys() - CONNECTIONS.keys()
    assert declared >= METRICS.keys() | CONNECTIONS.keys()


def test_the_metrics_of_connections() -> None:
    for metric in request_metrics._counts(Total(1, 2, 3), 1, 2):
        assert check_metric(metric.name, _instrument(metric), metric.unit or "", [{}]) == []
        assert own().groups[f"metric.{metric.name}"].brief == metric.description


@pytest.mark.parametrize("raw", [STATIC, RETRIED])
def test_the_values_of_spans_have_the_declared_types(raw: bytes) -> None:
    trace = build_trace(decode(raw), UNIX_OFFSET_NS, RandomIds())
    told = [pair for span in trace.spans for pair in span.attributes.items()]
    assert told
    assert [finding for pair in told for finding in check_value(*pair)] == []


@pytest.mark.parametrize(
    ("name", "enumeration", "prefix"),
    [("nginx.termination", "ending", "ENDED_"), ("nginx.sampling.kept_for", "kept", "KEPT_")],
)
def test_the_members_are_those_of_the_kernel_program(name: str, enumeration: str, prefix: str) -> None:
    told = [each.removeprefix(prefix).lower() for each, value in c_enum(enumeration).items() if value]
    assert sorted(member["value"] for member in own().attributes[name].members) == sorted(told)
