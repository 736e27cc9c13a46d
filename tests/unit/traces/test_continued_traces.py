"""Trace context from the kernel's record to the exported trace: ids, flags, trace state, and why a request was kept."""

import json
from dataclasses import replace

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource

from otel_nginx_ebpf.export.json_lines import to_json
from otel_nginx_ebpf.export.otlp.encoding import Encoder, encode_for_resource
from otel_nginx_ebpf.traces.model import Trace
from otel_nginx_ebpf.traces.record import Request, decode
from otel_nginx_ebpf.traces.spans import RandomIds, build_trace
from unit.sample_traces import MONO_NS, UNIX_OFFSET_NS, record, string

TRACE_ID, PARENT, TOLD = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7, 0xFFFF_0000_1111_2222
EXCHANGE = {"first_write_ns": MONO_NS + 4, "last_read_ns": MONO_NS + 6, "ended_ns": MONO_NS + 7}
LATER = {"first_write_ns": MONO_NS + 5, "last_read_ns": MONO_NS + 8, "ended_ns": MONO_NS + 8}
REFUSED = {
    "connect_start_ns": MONO_NS + 2,
    "connect_failed_ns": MONO_NS + 3,
    "ended_ns": MONO_NS + 3,
    "connect_msec": 2**64 - 1,
}


def request(*attempts: dict[str, int], tracestate: tuple[str, ...] = (), **fields: int) -> Request:
    given = {"trace_id_high": TRACE_ID >> 64, "trace_id_low": TRACE_ID % 2**64, "trace_flags": 1} | fields
    peers = [("127.0.0.1:80", attempt) for attempt in attempts]
    return decode(record({}, peers, tracestate, created_ns=MONO_NS, ended_ns=MONO_NS + 9, **given))


def build(request: Request) -> Trace:
    return build_trace(request, UNIX_OFFSET_NS, RandomIds())


def exported(request: Request) -> ExportTraceServiceRequest:
    spans, _ = Encoder(RandomIds().generate_span_id).encode(request, UNIX_OFFSET_NS)
    return ExportTraceServiceRequest.FromString(encode_for_resource(Resource({}), [spans]))


def exchange_ids(request: Request) -> list[int]:
    return [span.span_id for span in build(request).spans if span.name == "upstream exchange"]


def test_a_continued_trace() -> None:
    continued = request(EXCHANGE, tracestate=("congo=1", "rojo=2, lupo=3"), parent_span_id=PARENT, trace_flags=3)
    assert (continued.trace_id, continued.parent_span_id, continued.trace_flags) == (TRACE_ID, PARENT, 3)
    assert continued.trace_state == "congo=1,rojo=2, lupo=3"
    trace = build(continued)
    assert (trace.trace_id, trace.trace_flags, trace.trace_state) == (TRACE_ID, 3, "congo=1,rojo=2,lupo=3")
    server, *children = trace.spans
    assert server.parent_span_id == PARENT
    assert children
    assert {span.parent_span_id for span in children} == {server.span_id}


def test_lines_of_tracestate_are_joined_in_their_order_not_in_the_record_s() -> None:
    lines = [f"k{number}={number}" for number in range(12)]
    strings = [string("STRING_TRACESTATE", line, number) for number, line in enumerate(lines)]
    raw = record({}, [], created_ns=MONO_NS) + b"".join(reversed(strings))
    assert decode(raw).trace_state == ",".join(lines)


def test_a_trace_that_begins_here() -> None:
    root = request(EXCHANGE)
    assert (root.parent_span_id, root.trace_state, root.kept) == (None, None, None)
    trace = build(root)
    assert (trace.spans[0].parent_span_id, trace.trace_state) == (None, "")
    assert "nginx.sampling.kept_for" not in trace.spans[0].attributes


@pytest.mark.parametrize("state", ["Foo=1", "foo", ",", "foo=1,bar"])
def test_a_malformed_trace_state_leaves_the_trace_continued(state: str) -> None:
    continued = request(EXCHANGE, tracestate=(state,), parent_span_id=PARENT)
    assert (build(continued).spans[0].parent_span_id, build(continued).trace_state) == (PARENT, "")
    assert {span.trace_state for span in exported(continued).resource_spans[0].scope_spans[0].spans} == {""}


@pytest.mark.parametrize(("kept", "reason"), [(1, "error"), (2, "slow")])
def test_why_an_unsampled_request_was_kept(kept: int, reason: str) -> None:
    trace = build(request(EXCHANGE, kept=kept, trace_flags=0))
    assert (trace.spans[0].attributes["nginx.sampling.kept_for"], trace.trace_flags) == (reason, 0)
    assert not any("nginx.sampling.kept_for" in span.attributes for span in trace.spans[1:])


def test_the_exchange_that_was_told_an_id_has_it() -> None:
    told = EXCHANGE | {"span_id": TOLD}
    (own,) = exchange_ids(request(told))
    assert own == TOLD
    (fresh,) = exchange_ids(request(EXCHANGE))
    assert fresh not in (0, TOLD)


def test_of_several_attempts_with_one_id_the_last_that_sent_it_has_it() -> None:
    told, told_later = EXCHANGE | {"span_id": TOLD}, LATER | {"span_id": TOLD}
    first, second = exchange_ids(request(told, told_later))
    assert first not in (0, TOLD)
    assert second == TOLD
    # A peer that could not be reached was told nothing.
    assert exchange_ids(request(told, REFUSED | {"span_id": TOLD})) == [TOLD]


def test_the_main_request_s_exchange_goes_before_a_subrequest_s() -> None:
    told, told_later = EXCHANGE | {"span_id": TOLD}, LATER | {"span_id": TOLD}
    own, other = exchange_ids(request(told, told_later | {"subrequest": 1}))
    assert own == TOLD
    assert other not in (0, TOLD)
    assert exchange_ids(request(told | {"subrequest": 1})) == [TOLD]


def test_attempts_that_were_told_different_ids_keep_them() -> None:
    assert exchange_ids(request(EXCHANGE | {"span_id": 8}, LATER | {"span_id": 7})) == [8, 7]


def test_otlp_says_that_the_parent_is_remote() -> None:
    continued = request(EXCHANGE | {"span_id": TOLD}, tracestate=("0congo=1",), parent_span_id=PARENT)
    (spans,) = [scope.spans for scope in exported(continued).resource_spans[0].scope_spans]
    assert spans[0].parent_span_id == PARENT.to_bytes(8, "big")
    assert [span.flags for span in spans] == [0x300] + [0x100] * (len(spans) - 1)
    assert {(span.trace_id, span.trace_state) for span in spans} == {(TRACE_ID.to_bytes(16, "big"), "0congo=1")}
    assert TOLD.to_bytes(8, "big") in {span.span_id for span in spans}
    root = replace(continued, parent_span_id=None)
    assert [span.flags for span in exported(root).resource_spans[0].scope_spans[0].spans] == [0x100] * len(spans)


def test_json_lines_have_flags_and_trace_state() -> None:
    continued = request(EXCHANGE, tracestate=("congo=1",), parent_span_id=PARENT, trace_flags=3)
    line = json.loads(to_json(build(continued), Resource({})))
    assert (line["trace_id"], line["trace_flags"], line["trace_state"]) == (f"{TRACE_ID:032x}", 3, "congo=1")
    assert line["spans"][0]["parent_span_id"] == f"{PARENT:016x}"
