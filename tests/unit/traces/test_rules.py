"""What rules change in the records of a capture file, and in spans."""

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource

from otel_nginx_ebpf.export.otlp.encoding import Encoder, encode_for_resource
from otel_nginx_ebpf.export.otlp.records import RecordEncoder
from otel_nginx_ebpf.export.resource import Resources
from otel_nginx_ebpf.settings.model import Settings
from otel_nginx_ebpf.settings.rules import Rule
from otel_nginx_ebpf.traces.choices import SpanChoices
from otel_nginx_ebpf.traces.record import RecordError, decode
from otel_nginx_ebpf.traces.rules import CapturedRules, ServiceNames
from otel_nginx_ebpf.traces.spans import RandomIds, build_trace
from tests.unit.sample_traces import MONO_NS, record

HALF = 2**63
OFF = Rule("", path=("/",), sampler="always_off")


def request(**fields: int) -> bytes:
    return record(
        {"STRING_METHOD": b"GET", "STRING_URI": b"/?a=b", "STRING_LOCATION": b"/"},
        [],
        **{"created_ns": MONO_NS, "ended_ns": MONO_NS + 10**9, "trace_id_low": 1, "out_status": 200, **fields},
    )


@pytest.mark.parametrize(
    ("rule", "fields", "left_out", "kept"),
    [
        (Rule("", path=("/x",), drop=True), {}, None, None),
        (Rule("", path=("/",), drop=True), {}, "not_traced_by_rule", None),
        (Rule("", path=("/",), status=("4xx",), drop=True), {}, None, None),
        (OFF, {}, "not_sampled", None),
        (OFF, {"out_status": 503}, None, "error"),
        (Rule("", sampler="always_off", keep_slower_than=10**9), {}, None, "slow"),
        (Rule("", sampler="always_off", keep_slower_than=10**9 + 1), {}, "not_sampled", None),
        (Rule("", sampler="always_on"), {}, None, None),
        (Rule("", sampler="traceidratio", sampler_arg=0.5), {"trace_id_low": HALF - 1}, None, None),
        (
            Rule("", sampler="traceidratio", sampler_arg=0.5),
            {"trace_id_low": HALF, "parent_span_id": 7},
            "not_sampled",
            None,
        ),
        (Rule("", sampler="parentbased_traceidratio", sampler_arg=0.5), {"trace_id_low": HALF}, "not_sampled", None),
        (
            Rule("", sampler="parentbased_traceidratio", sampler_arg=0.5),
            {"trace_id_low": HALF, "parent_span_id": 7},
            None,
            None,
        ),
    ],
)
def test_a_capture_s_records(rule: Rule, fields: dict[str, int], left_out: str | None, kept: str | None) -> None:
    rules = CapturedRules(Settings(keep_errors=True, rules=(rule,)))
    raw, found = rules.apply(request(**fields))
    assert (found, decode(raw).kept) == (left_out, kept)
    assert decode(raw).rule == (rule.path != ("/x",) and rule.status == ())


def test_the_first_rule_that_matches_counts() -> None:
    rules = CapturedRules(Settings(rules=(Rule("", method=("PUT",)), Rule("", path=("/",)), Rule("", drop=True))))
    assert [decode(rules.apply(request())[0]).rule, rules.apply(request())[1]] == [2, None]


def test_rules_of_the_recording_do_not_count() -> None:
    raw = request(rule=3)
    assert decode(CapturedRules(Settings()).apply(raw)[0]).rule == 0
    assert CapturedRules(Settings()).apply(request()) == (request(), None)


def test_a_damaged_record() -> None:
    raw = request()[:40]
    assert CapturedRules(Settings()).apply(raw) == (raw, None)
    with pytest.raises(RecordError):
        CapturedRules(Settings(rules=(OFF,))).apply(raw)


CHOICES = SpanChoices(
    rules=(
        Rule("", span_name="{method} all {id}", attributes=(("team", "shop"), ("slo", 0.5))),
        Rule("", service_name="shop"),
    )
)


@pytest.mark.parametrize(
    ("number", "name", "constants"),
    [
        (0, "GET /", {}),
        (1, "GET all {id}", {"team": "shop", "slo": 0.5}),
        (2, "GET /", {}),
        (3, "GET /", {}),  # recorded with other rules
    ],
)
def test_names_and_constants_of_spans(number: int, name: str, constants: dict[str, object]) -> None:
    """In the readable model and in OTLP, also for the second record of a shape."""
    encoder = RecordEncoder(Encoder(RandomIds().generate_span_id, CHOICES))
    for other in (0, 1, 2, 1, number, number):  # the shapes of records with other rules are known
        raw = request(rule=other)
        encoded = encoder.encode([(raw, 0, {})])[0][1]
        assert not isinstance(encoded, RecordError)
    message = ExportTraceServiceRequest.FromString(encode_for_resource(Resource({}), [encoded[0]]))
    (span,) = message.resource_spans[0].scope_spans[0].spans
    told = {each.key: each.value for each in span.attributes}
    server = build_trace(decode(request(rule=number)), 0, RandomIds(), choices=CHOICES).spans[0]
    assert span.name == server.name == name
    assert {key: value for key, value in server.attributes.items() if key in ("team", "slo")} == constants
    assert {"team", "slo"} & told.keys() == constants.keys()
    if constants:
        assert (told["team"].string_value, told["slo"].double_value) == ("shop", 0.5)


def test_the_service_of_a_rule() -> None:
    """Overrides the user's. Requests of one service and one nginx share the resource."""
    nginx, other = {"service.instance.id": "1"}, {"service.instance.id": "2"}
    names, resources = ServiceNames(CHOICES.rules), Resources(Resource({"service.name": "edge", "tier": "front"}))
    assert names.resource(1, nginx) is nginx
    assert names.resource(0, nginx) is nginx
    assert names.resource(2, nginx) is names.resource(2, nginx)
    found = [resources.of(each).attributes for each in (nginx, names.resource(2, nginx), names.resource(2, other))]
    assert [dict(each) for each in found] == [
        {"service.name": name, "service.instance.id": instance, "tier": "front"}
        for name, instance in (("edge", "1"), ("shop", "1"), ("shop", "2"))
    ]
    assert names.resource_of_record(request(rule=2), nginx) is names.resource(2, nginx)
