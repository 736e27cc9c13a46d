import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from opentelemetry.sdk.resources import Resource

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.export.json_lines import to_json
from otel_nginx_ebpf.export.text import TextExporter, open_output
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.traces.model import Event
from unit.sample_traces import retried_trace, static_trace

RESOURCE = Resource({"service.name": "nginx", "list": ["a", "b"]})


def test_one_trace_literally() -> None:
    assert json.loads(to_json(static_trace(), RESOURCE)) == {
        "trace_id": "00000000000000000000000000000abc",
        "trace_flags": 0,
        "trace_state": "",
        "resource": {"service.name": "nginx", "list": ["a", "b"]},
        "spans": [
            {
                "name": "GET /",
                "kind": "SERVER",
                "span_id": "0000000000000001",
                "parent_span_id": None,
                "start_unix_ns": 1700000005000040000,
                "end_unix_ns": 1700000005000130000,
                "status": "UNSET",
                "error": None,
                "attributes": {
                    "http.request.method": "GET",
                    "url.path": "/index.html",
                    "http.response.status_code": 200,
                    "client.address": "192.0.2.7",
                },
                "events": [],
            },
            {
                "name": "downstream write",
                "kind": "INTERNAL",
                "span_id": "0000000000000002",
                "parent_span_id": "0000000000000001",
                "start_unix_ns": 1700000005000090000,
                "end_unix_ns": 1700000005000130000,
                "status": "UNSET",
                "error": None,
                "attributes": {},
                "events": [],
            },
        ],
    }


def test_a_line_of_the_error_log() -> None:
    trace = static_trace()
    event = Event("nginx.error_log", 1700000005000050000, {"log.severity": "warn", "nginx.error.message": "é"})
    trace = replace(trace, spans=(replace(trace.spans[0], events=(event,)), *trace.spans[1:]))
    server, write = json.loads(to_json(trace, RESOURCE))["spans"]
    assert server["events"] == [
        {
            "name": "nginx.error_log",
            "time_unix_ns": 1700000005000050000,
            "attributes": {"log.severity": "warn", "nginx.error.message": "é"},
        }
    ]
    assert write["events"] == []


def test_an_error_has_status_and_description() -> None:
    refused = json.loads(to_json(retried_trace(), RESOURCE))["spans"][2]
    assert (refused["status"], refused["error"]) == ("ERROR", "connection refused")


def test_a_trace_is_one_ascii_line_whatever_it_holds() -> None:
    stream, stats = io.StringIO(), Stats()
    exporter = TextExporter(stream, stats, lambda trace: to_json(trace, RESOURCE))
    path = '/"\n\r\x1b[31m\u2028é'
    exporter.export(static_trace(url__path=path))
    (line,) = stream.getvalue().splitlines()
    assert line.isascii()
    assert json.loads(line)["spans"][0]["attributes"]["url.path"] == path
    assert stats.exported == 1


def test_an_output_that_fails_is_the_users_to_put_right_and_its_trace_counted_as_lost() -> None:
    stats = Stats()
    exporter = TextExporter(
        open_output(os.open("/dev/full", os.O_WRONLY), Path("/dev/full")), stats, lambda trace: "text\n"
    )
    with pytest.raises(UserError, match="cannot write to /dev/full: No space left"):
        exporter.export(static_trace())
    exporter.shutdown(0)
    assert (stats.exported, stats.lost) == (0, {"lost_output_failed": 1})
