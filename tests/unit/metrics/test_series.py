"""What the kernel's keys mean, and that exemplars find the series of their phases."""

from dataclasses import replace

from opentelemetry.semconv.metrics.http_metrics import HTTP_SERVER_REQUEST_DURATION

from otel_nginx_ebpf.metrics.series import SERVER_KEY, of_phase, of_server_key
from otel_nginx_ebpf.traces.methods import KNOWN_METHODS
from otel_nginx_ebpf.traces.phases import phases_of
from otel_nginx_ebpf.traces.record import decode
from unit.sample_traces import STATIC

NAMES = {1: "/api/", 2: "example.com", 3: "backend"}


def name_of(pid: int, configuration: int) -> str | None:
    return NAMES.get(configuration)


def server_key(**values: int) -> bytes:
    return SERVER_KEY.struct.pack(*(values.get(name, 0) for _, name in SERVER_KEY.fields))


def test_a_request_whose_line_was_not_parsed_is_other() -> None:
    series = of_server_key(server_key(status=400, http_version=9), name_of, KNOWN_METHODS)
    assert series.metric == HTTP_SERVER_REQUEST_DURATION
    assert dict(series.attributes) == {
        "http.request.method": "_OTHER",
        "http.response.status_code": 400,
        "url.scheme": "http",
    }
    request = replace(decode(STATIC), method=None, status=400, http_version=9)
    assert of_phase(request, phases_of(request)[0], KNOWN_METHODS) == series


def test_a_method_of_webdav_that_the_user_knows() -> None:
    known = frozenset({"PROPFIND", "BREW"})
    values = {"location": 1, "server": 2, "status": 207, "http_version": 1001, "tls": 1}
    request = replace(decode(STATIC), location="/api/", server_name="example.com", status=207, tls=True)
    for bit, method, expected in ((0x400, "PROPFIND", "PROPFIND"), (1, "BREW", "_OTHER"), (2, "GET", "_OTHER")):
        series = of_server_key(server_key(method=bit, **values), name_of, known)
        assert dict(series.attributes)["http.request.method"] == expected
        own = replace(request, method=method, method_bit=bit)
        assert of_phase(own, phases_of(own)[0], known) == series
