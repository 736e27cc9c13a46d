"""The checker finds what is wrong with spans, metrics and resources, and nothing in those that are right."""

import re
from typing import Any

import pytest
from registry.checker import check_metric, check_resource, check_span, check_value

SERVER = {
    "http.request.method": "GET",
    "url.scheme": "https",
    "url.path": "/",
    "url.query": "a=b",
    "http.response.status_code": 200,
    "client.address": "192.0.2.1",
    "network.peer.address": "192.0.2.1",
    "network.peer.port": 50000,
    "network.protocol.version": "1.1",
    "server.address": "example.com",
    "server.port": 443,
    "nginx.connection.id": 1,
    "nginx.connection.requests": 1,
    "nginx.worker.pid": 2,
    "nginx.truncated_attributes": ["url.path"],
}
CONNECT = {
    "nginx.upstream.attempt": 1,
    "nginx.upstream.peer": "10.0.0.7:80",
    "network.peer.address": "10.0.0.7",
    "network.peer.port": 80,
}
ASKED = CONNECT | {
    "http.request.method": "GET",
    "url.full": "http://app/",
    "server.address": "app",
    "server.port": 80,
    "network.protocol.version": "1.1",
}
EXCHANGE = ASKED | {"http.response.status_code": 200, "nginx.upstream.connection.reused": False}
REFUSED = ASKED | {"error.type": "ECONNREFUSED"}

Attributes = dict[str, Any]


def without(attributes: Attributes, *names: str) -> Attributes:
    return {name: value for name, value in attributes.items() if name not in names}


UNPARSED = without(SERVER | {"http.request.method": "_OTHER"}, "url.path", "url.query", "network.protocol.version")
ODD = SERVER | {"http.request.method": "_OTHER", "http.request.method_original": "BREW"}
FASTCGI = without(EXCHANGE | {"network.protocol.name": "fastcgi"}, "url.full", "network.protocol.version")


@pytest.mark.parametrize(
    ("kind", "name", "status", "attributes"),
    [
        ("SERVER", "GET /", "UNSET", SERVER),
        ("SERVER", "HTTP", "UNSET", UNPARSED),
        ("SERVER", "GET", "UNSET", without(SERVER | {"http.response.status_code": 400}, "url.path")),
        ("SERVER", "HTTP /", "UNSET", ODD),
        ("SERVER", "GET /", "ERROR", SERVER | {"error.type": "500"}),
        ("INTERNAL", "downstream read", "UNSET", {}),
        ("INTERNAL", "downstream write", "UNSET", {}),
        ("INTERNAL", "upstream connect", "UNSET", CONNECT),
        ("CLIENT", "upstream connect", "ERROR", REFUSED),
        ("CLIENT", "upstream exchange", "UNSET", EXCHANGE),
        ("CLIENT", "GET", "UNSET", EXCHANGE),
        ("CLIENT", "upstream exchange", "UNSET", FASTCGI),
        (
            "CLIENT",
            "upstream exchange",
            "UNSET",
            without(EXCHANGE, "server.port", "network.peer.port") | {"nginx.upstream.peer": "unix:/run/app.sock"},
        ),
    ],
)
def test_spans_that_are_right(kind: str, name: str, status: str, attributes: Attributes) -> None:
    assert check_span(kind, name, status, attributes) == []


@pytest.mark.parametrize(
    ("kind", "name", "status", "attributes", "finding"),
    [
        ("SERVER", "GET /", "UNSET", SERVER | {"nginx.colour": "red"}, "nginx.colour: neither .* know it"),
        ("SERVER", "GET /", "UNSET", SERVER | {"url.full": "http://app/"}, "url.full: span.nginx.server does not"),
        ("SERVER", "GET /", "UNSET", SERVER | {"server.port": "443"}, "server.port: '443' is no int"),
        ("SERVER", "GET /", "UNSET", SERVER | {"server.port": True}, "server.port: True is no int"),
        ("SERVER", "GET /", "UNSET", SERVER | {"nginx.truncated_attributes": [1]}, r"\[1\] is no string\[\]"),
        ("SERVER", "GET /", "UNSET", SERVER | {"nginx.termination": "tired"}, "nginx.termination: 'tired' is none of"),
        ("SERVER", "GET /", "UNSET", without(SERVER, "url.path"), "url.path: missing"),
        ("SERVER", "GET /", "UNSET", without(SERVER, "http.request.method"), "http.request.method: missing"),
        ("SERVER", "GET /", "UNSET", without(SERVER, "url.scheme"), "url.scheme: missing"),
        ("SERVER", "GET /", "UNSET", without(SERVER, "nginx.worker.pid"), "nginx.worker.pid: missing"),
        ("SERVER", "GET /", "ERROR", SERVER, "error.type: missing"),
        ("SERVER", "GET /", "UNSET", SERVER | {"error.type": "500"}, "error.type: there, without"),
        ("SERVER", "HTTP /", "UNSET", without(ODD, "http.request.method_original"), "method_original: missing"),
        ("SERVER", "GET /", "UNSET", SERVER | {"http.request.method_original": "GET"}, "method_original: there"),
        ("INTERNAL", "downstream nap", "UNSET", {}, "our registry has no INTERNAL span 'downstream nap'"),
        ("INTERNAL", "downstream read", "UNSET", {"url.path": "/"}, "url.path: span.nginx.downstream_read does not"),
        ("INTERNAL", "upstream connect", "UNSET", CONNECT | {"url.full": "http://a/"}, "url.full: .*connect does not"),
        ("CLIENT", "upstream connect", "ERROR", ASKED, "error.type: missing"),
        ("CLIENT", "upstream exchange", "UNSET", without(EXCHANGE, "url.full"), "url.full: missing"),
        ("CLIENT", "upstream exchange", "UNSET", without(EXCHANGE, "server.address"), "server.address: missing"),
        ("CLIENT", "upstream exchange", "UNSET", without(EXCHANGE, "server.port"), "server.port: missing"),
        ("CLIENT", "upstream exchange", "UNSET", without(FASTCGI, "http.request.method"), "method: missing"),
    ],
)
def test_what_is_wrong_with_spans(kind: str, name: str, status: str, attributes: Attributes, finding: str) -> None:
    (found,) = check_span(kind, name, status, attributes)
    assert re.search(finding, found)


RESOURCE = {
    "service.name": "nginx",
    "service.version": "1.26.2",
    "service.instance.id": "a",
    "process.pid": 1,
    "process.creation.time": "2026-11-30T16:00:00.000Z",
    "process.executable.name": "nginx",
    "process.executable.build_id.htlhash": "00" * 16,
    "telemetry.sdk.name": "opentelemetry",
    "telemetry.sdk.language": "python",
    "telemetry.sdk.version": "1.45.1",
}


def test_resources() -> None:
    assert check_resource(RESOURCE) == []
    assert check_resource(RESOURCE | {"tier": "edge"}, ["tier"]) == []
    (found,) = check_resource(RESOURCE | {"tier": "edge"})
    assert re.search("tier: neither", found)
    (found,) = check_resource(RESOURCE | {"host.arch": "amd64"})
    assert re.search("host.arch: entity.nginx does not have it", found)
    (found,) = check_resource(RESOURCE | {"process.pid": "1"})
    assert re.search("process.pid: '1' is no int", found)
    for name in ("service.name", "process.creation.time", "telemetry.sdk.version"):
        (found,) = check_resource(without(RESOURCE, name))
        assert re.search(f"{name}: missing, though entity", found)


DURATION = {"http.request.method": "GET", "url.scheme": "http"}


def test_metrics() -> None:
    name = "http.server.request.duration"
    assert check_metric(name, "histogram", "s", [DURATION, {"otel.metric.overflow": True}]) == []
    (found,) = check_metric("http.server.moods", "histogram", "s", [])
    assert re.search("our registry has no such metric", found)
    (found,) = check_metric(name, "histogram", "ms", [])
    assert re.search("unit 'ms', not 's'", found)
    (found,) = check_metric(name, "gauge", "s", [])
    assert re.search("instrument 'gauge', not 'histogram'", found)
    (found,) = check_metric(name, "histogram", "s", [without(DURATION, "url.scheme")])
    assert re.search("url.scheme: missing", found)
    (found,) = check_metric(name, "histogram", "s", [DURATION | {"client.address": "192.0.2.1"}])
    assert re.search("client.address: metric.* does not have it", found)


def test_templates_of_the_conventions() -> None:
    assert check_value("k8s.pod.label.app", "web") == []
    assert check_value("k8s.pod.label.app", 1) == ["k8s.pod.label.app: 1 is no string"]
