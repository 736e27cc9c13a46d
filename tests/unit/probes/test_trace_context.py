"""How the kernel program reads trace context: cases from W3C and B3, with the SDK's propagators as oracles.

If the SDK deviates from the specification, the specification wins, and the test says so.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.propagators.b3 import B3MultiFormat
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.sdk.trace.sampling import DEFAULT_OFF, DEFAULT_ON, ParentBasedTraceIdRatio, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from otel_nginx_ebpf.planner.sampling import constants
from otel_nginx_ebpf.settings.sources import load
from tests.unit.context_library import VALUE_BYTES, Context, is_sampled, read, traceparent

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = f"00-{TRACE_ID}-{SPAN_ID}-01"
NOTHING = Context(None, None, 0, "none")

TRACE = int(TRACE_ID, 16)
SHORT_TRACE = int(TRACE_ID[:16], 16)
SPAN = int(SPAN_ID, 16)


def read_one(reader: str, value: str, stale: int = 0) -> Context:
    return read((reader, value.encode()), stale=stale)


@pytest.mark.parametrize(
    ("value", "flags"),
    [
        (VALID, 1),
        (f"00-{TRACE_ID}-{SPAN_ID}-00", 0),
        (f"00-{TRACE_ID}-{SPAN_ID}-02", 2),
        (f"00-{TRACE_ID}-{SPAN_ID}-03", 3),
        (f"00-{TRACE_ID}-{SPAN_ID}-09", 1),  # other flags are to be set to zero
        (f"00-{TRACE_ID}-{SPAN_ID}-ff", 3),
        (f"01-{TRACE_ID}-{SPAN_ID}-01", 1),  # "Versioning of traceparent": a higher version is tried
        (f"cc-{TRACE_ID}-{SPAN_ID}-01-what-the-future-will-be-like", 1),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01-", 1),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01-{'x' * 5000}", 1),
        (f"fe-{TRACE_ID}-{SPAN_ID}-00", 0),
    ],
)
def test_traceparent_that_continues_the_trace(value: str, flags: int) -> None:
    assert read_one("traceparent", value) == Context(TRACE, SPAN, flags, "yes" if flags & 1 else "no")


@pytest.mark.parametrize(
    "value",
    [
        "",
        "00",
        "-" * 55,
        VALID[:-1],
        VALID[:-3],
        VALID + ".",
        VALID + "-",
        VALID + "-what-the-future-will-be-like",  # version 00 has 55 characters
        f"ff-{TRACE_ID}-{SPAN_ID}-01",
        f"0-{TRACE_ID}-{SPAN_ID}-01",
        f"000-{TRACE_ID}-{SPAN_ID}-01",
        f".0-{TRACE_ID}-{SPAN_ID}-01",
        f"0.-{TRACE_ID}-{SPAN_ID}-01",
        f"0g-{TRACE_ID}-{SPAN_ID}-01",
        f"0`-{TRACE_ID}-{SPAN_ID}-01",
        f"cc-{TRACE_ID}-{SPAN_ID}-01.what-the-future-will-not-be-like",
        f"cc-{TRACE_ID}-{SPAN_ID}-1",
        f"00-{'0' * 32}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"00-{TRACE_ID.upper()}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{SPAN_ID.upper()}-01",
        f"0A-{TRACE_ID}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{SPAN_ID}-0A",
        f"00-.{TRACE_ID[1:]}-{SPAN_ID}-01",
        f"00-{TRACE_ID[:-1]}-{SPAN_ID}-01-",
        f"00-{TRACE_ID}1-{SPAN_ID}-1",
        f"00-{TRACE_ID}-{SPAN_ID[:-1]}.-01",
        f"00-{TRACE_ID}-{SPAN_ID}-.0",
        f"00-{TRACE_ID}-{SPAN_ID}-0.",
        f"00_{TRACE_ID}-{SPAN_ID}-01",
        f"00-{TRACE_ID}_{SPAN_ID}-01",
        f"00-{TRACE_ID}-{SPAN_ID}_01",
        f" {VALID}",  # nginx trims values; what it leaves is the client's fault
        f"{VALID},{VALID}",
        VALID.replace("b", "\x12"),  # becomes "2" where only the case bit is looked at
        VALID.replace("4", "\xb4"),
    ],
)
def test_traceparent_that_restarts_the_trace(value: str) -> None:
    assert read_one("traceparent", value) == NOTHING
    assert read(("traceparent", value.encode("latin-1"))) == NOTHING


HEX = "0123456789abcdef"
BYTE = st.integers(0, 255)


def hex_text(digits: int) -> st.SearchStrategy[str]:
    """Now and then all zero, or with many zeros."""
    return st.text(HEX, min_size=digits, max_size=digits) | st.just("0" * digits)


@st.composite
def near(draw: st.DrawFn, valid: st.SearchStrategy[str]) -> str:
    """A valid text, or one a few edits away from it. No white space: nginx trims it, and refuses line ends."""
    text = draw(valid)
    printable = st.sampled_from("0159afgAFG-._~") | st.characters(
        min_codepoint=0x21, max_codepoint=0x17F, exclude_characters="\x7f\x85\xa0"
    )
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.just("") | printable) + text[at + draw(st.integers(0, 1)) :]
    return text


def sdk_reads(propagator: TextMapPropagator, headers: dict[str, str]) -> trace.SpanContext:
    return trace.get_current_span(propagator.extract(headers)).get_span_context()


def ids(context: Context) -> tuple[int, int]:
    """As the API has them: 0 for none."""
    return context.trace_id or 0, context.parent_span_id or 0


VERSIONS = st.sampled_from(["00", "00", "01", "cc", "ff"])
FUTURE = st.just("") | st.text("0-xyz", max_size=40).map("-".__add__)
TRACEPARENTS = st.builds(
    lambda version, trace_id, span_id, flags, future: f"{version}-{trace_id}-{span_id}-{flags}{future}",
    *(VERSIONS, hex_text(32), hex_text(16), hex_text(2), FUTURE),
)


@given(near(TRACEPARENTS), BYTE)
def test_traceparent_is_read_as_the_sdk_reads_it(value: str, stale: int) -> None:
    context = read_one("traceparent", value, stale)
    sdk = sdk_reads(TraceContextTextMapPropagator(), {"traceparent": value})
    assert ids(context) == (sdk.trace_id, sdk.span_id)
    # The SDK keeps flags that the specification wants set to zero.
    assert context.flags == sdk.trace_flags & 3
    assert context.decision == (("yes" if sdk.trace_flags.sampled else "no") if sdk.is_valid else "none")


@given(st.binary(max_size=VALUE_BYTES + 8), st.sampled_from(["traceparent", "b3", "request_id"]), BYTE)
def test_whatever_bytes_come_ids_are_whole_or_absent(value: bytes, reader: str, stale: int) -> None:
    context = read((reader, value), stale=stale)
    assert (context.parent_span_id is not None) <= (context.trace_id is not None)
    assert context.trace_id != 0


B3 = f"{TRACE_ID}-{SPAN_ID}"
B3_SHORT = f"{TRACE_ID[:16]}-{SPAN_ID}"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (B3, Context(TRACE, SPAN, 0, "none")),
        (f"{B3}-1", Context(TRACE, SPAN, 1, "yes")),
        (f"{B3}-0", Context(TRACE, SPAN, 0, "no")),
        (f"{B3}-d", Context(TRACE, SPAN, 1, "yes")),
        (f"{B3}-1-{SPAN_ID}", Context(TRACE, SPAN, 1, "yes")),
        (B3_SHORT, Context(SHORT_TRACE, SPAN, 0, "none")),
        (f"{B3_SHORT}-0", Context(SHORT_TRACE, SPAN, 0, "no")),
        (f"{B3_SHORT}-d-{SPAN_ID}", Context(SHORT_TRACE, SPAN, 1, "yes")),
        ("0", Context(None, None, 0, "no")),
        ("1", Context(None, None, 1, "yes")),
        ("d", Context(None, None, 1, "yes")),
    ],
)
def test_b3(value: str, expected: Context) -> None:
    assert read_one("b3", value) == expected


@pytest.mark.parametrize(
    "value",
    [
        *("", "2", "00", TRACE_ID, f"{TRACE_ID}-", B3[:-1], B3.upper(), B3.replace("-", "_")),
        *(f"{B3}-", f"{B3}-2", f"{B3}-11", f"{B3}1", f"{B3}_1", f"{B3}-1-", f"{B3}-{SPAN_ID}"),
        *(f"{B3}-1-{SPAN_ID[:-1]}", f"{B3}-1-{SPAN_ID}0", f"{B3}-1-{SPAN_ID[:-1]}x", f"{B3}-1_{SPAN_ID}"),
        *(f"{'0' * 32}-{SPAN_ID}-1", f"{TRACE_ID}-{'0' * 16}-1", f"{TRACE_ID[:24]}-{SPAN_ID}-1"),
        *(f"{TRACE_ID[:15]}-{SPAN_ID}", f"{B3_SHORT}-", f"{B3_SHORT}-1-0"),
    ],
)
def test_b3_that_is_malformed(value: str) -> None:
    assert read_one("b3", value) == NOTHING


B3S = st.builds(
    lambda trace_id, span_id, rest: f"{trace_id}-{span_id}{rest}",
    hex_text(32) | hex_text(16),
    hex_text(16),
    st.just("") | st.sampled_from(["-0", "-1", "-d"]) | hex_text(16).map("-1-".__add__),
)


@given(B3S, BYTE)
def test_b3_is_read_as_the_sdk_reads_it(value: str, stale: int) -> None:
    context = read_one("b3", value, stale)
    sdk = sdk_reads(B3MultiFormat(), {"b3": value})
    assert ids(context) == ((sdk.trace_id, sdk.span_id) if sdk.is_valid else (0, 0))
    # The SDK takes a deferred decision for yes.
    if context.decision != "none":
        assert (context.decision == "yes") == sdk.trace_flags.sampled
    assert context.flags == (context.decision == "yes")


@given(near(B3S), BYTE)
def test_b3_is_never_read_more_leniently_than_by_the_sdk(value: str, stale: int) -> None:
    """It lets upper-case digits pass, any decision, and any parent."""
    sdk = sdk_reads(B3MultiFormat(), {"b3": value})
    assert ids(read_one("b3", value, stale)) in ((0, 0), (sdk.trace_id, sdk.span_id))


TRACE_LINE, SPAN_LINE = ("b3_trace_id", TRACE_ID.encode()), ("b3_span_id", SPAN_ID.encode())


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([TRACE_LINE, SPAN_LINE], Context(TRACE, SPAN, 0, "none")),
        ([SPAN_LINE, TRACE_LINE, ("b3_sampled", b"1")], Context(TRACE, SPAN, 1, "yes")),
        ([TRACE_LINE, SPAN_LINE, ("b3_sampled", b"0")], Context(TRACE, SPAN, 0, "no")),
        ([TRACE_LINE, SPAN_LINE, ("b3_sampled", b"true")], Context(TRACE, SPAN, 1, "yes")),
        ([TRACE_LINE, SPAN_LINE, ("b3_sampled", b"false")], Context(TRACE, SPAN, 0, "no")),
        ([TRACE_LINE, SPAN_LINE, ("b3_sampled", b"falsy")], Context(TRACE, SPAN, 0, "none")),
        ([TRACE_LINE, SPAN_LINE, ("b3_flags", b"1")], Context(TRACE, SPAN, 1, "yes")),
        ([TRACE_LINE, SPAN_LINE, ("b3_flags", b"0")], Context(TRACE, SPAN, 0, "none")),
        ([("b3_sampled", b"0"), TRACE_LINE, SPAN_LINE, ("b3_flags", b"1")], Context(TRACE, SPAN, 1, "yes")),
        ([("b3_flags", b"1"), TRACE_LINE, SPAN_LINE, ("b3_sampled", b"0")], Context(TRACE, SPAN, 1, "yes")),
        ([("b3_trace_id", TRACE_ID[:16].encode()), SPAN_LINE], Context(SHORT_TRACE, SPAN, 0, "none")),
        ([("b3_sampled", b"0")], Context(None, None, 0, "no")),
        ([("b3_flags", b"1")], Context(None, None, 1, "yes")),
        ([TRACE_LINE], NOTHING),
        ([SPAN_LINE], NOTHING),
        ([TRACE_LINE, ("b3_span_id", b"0" * 16)], NOTHING),
        ([TRACE_LINE, ("b3_span_id", SPAN_ID[1:].encode())], NOTHING),
        ([("b3_trace_id", b"0" * 32), SPAN_LINE], NOTHING),
        ([("b3_trace_id", TRACE_ID[:24].encode()), SPAN_LINE, ("b3_sampled", b"1")], Context(None, None, 1, "yes")),
        ([("b3_trace_id", TRACE_ID.upper().encode()), SPAN_LINE], NOTHING),
    ],
)
def test_b3_in_several_headers(lines: list[tuple[str, bytes]], expected: Context) -> None:
    assert read(*lines) == expected
    assert read(*lines, stale=ord("1")) == expected


@given(
    hex_text(32) | hex_text(16),
    hex_text(16),
    st.sampled_from(["0", "1", "true", "false", None]),
    st.sampled_from(["1", None]),
)
def test_b3_in_several_headers_is_read_as_the_sdk_reads_it(
    trace_id: str, span_id: str, sampled: str | None, flags: str | None
) -> None:
    values = {"trace_id": trace_id, "span_id": span_id, "sampled": sampled, "flags": flags}
    lines = {name: value for name, value in values.items() if value is not None}
    context = read(*((f"b3_{name}", value.encode()) for name, value in lines.items()))
    sdk = sdk_reads(B3MultiFormat(), {f"x-b3-{name.replace('_', '')}": value for name, value in lines.items()})
    assert ids(context) == ((sdk.trace_id, sdk.span_id) if sdk.is_valid else (0, 0))
    # The SDK takes a decision that is left out for no.
    if sdk.is_valid:
        assert (context.decision == "yes") == sdk.trace_flags.sampled
    assert (context.decision == "none") == (sampled is None and flags is None)


UUID = "4bf92f35-77b3-4da6-a3ce-929d0e0e4736"


@pytest.mark.parametrize(
    "value", [TRACE_ID, TRACE_ID.upper(), UUID, UUID.upper(), TRACE_ID[:16] + TRACE_ID[16:].upper()]
)
def test_a_request_id_that_is_a_trace_id(value: str) -> None:
    assert read_one("request_id", value) == Context(TRACE, None, 0, "none")


@pytest.mark.parametrize(
    "value",
    [
        *("", "7", TRACE_ID[:31], TRACE_ID + "0", UUID[:-1], UUID + "0", "0" * 32, f"{{{TRACE_ID}}}", f"{{{UUID}}}"),
        *(UUID.replace("-", "_"), UUID.replace("-", "0"), TRACE_ID.replace("b", "g"), UUID.replace("b", "\x12")),
        *(TRACE_ID[:4] + "-" + TRACE_ID[4:35] + "---", TRACE_ID.replace("4", "\x14"), UUID.replace("4", "@")),
    ],
)
def test_a_request_id_that_is_none(value: str) -> None:
    assert read_one("request_id", value) == NOTHING


@given(st.uuids(), st.booleans())
def test_every_uuid_is_a_trace_id(uuid: object, upper: bool) -> None:
    text = str(uuid).upper() if upper else str(uuid)
    assert read_one("request_id", text).trace_id == int(text.replace("-", ""), 16) or not int(text.replace("-", ""), 16)


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 3))
def test_what_is_written_is_read(trace_id: int, span_id: int, flags: int) -> None:
    text = traceparent(trace_id, span_id, flags)
    assert text.decode() == f"00-{trace_id:032x}-{span_id:016x}-{flags:02x}"
    assert read(("traceparent", text)) == Context(trace_id, span_id, flags, "yes" if flags & 1 else "no")


SAMPLERS = st.sampled_from(
    ["parentbased_always_on", "parentbased_always_off", "traceidratio", "parentbased_traceidratio"]
)
RATIOS = st.sampled_from([0.0, 2**-64, 0.1, 0.5, 1 - 2**-53, 1.0]) | st.floats(0, 1)


@given(SAMPLERS, RATIOS, st.sampled_from(["yes", "no", "none"]), st.integers(1, 2**128 - 1), st.booleans())
def test_the_decision_is_the_sdk_s(sampler: str, ratio: float, parent: str, trace_id: int, at_the_bound: bool) -> None:
    values = constants(load({"sampler": sampler, "sampler_arg": ratio}))
    if at_the_bound:
        trace_id = trace_id >> 64 << 64 | max(values["SAMPLE_RATIO_BOUND"] - trace_id % 2, 0)
    context = None
    if parent != "none":
        flags = trace.TraceFlags(parent == "yes")
        span = trace.NonRecordingSpan(trace.SpanContext(trace_id or 1, 1, is_remote=True, trace_flags=flags))
        context = trace.set_span_in_context(span)
    sdk = {
        "parentbased_always_on": DEFAULT_ON,
        "parentbased_always_off": DEFAULT_OFF,
        "traceidratio": TraceIdRatioBased(ratio),
        "parentbased_traceidratio": ParentBasedTraceIdRatio(ratio),
    }[sampler]
    assert is_sampled(values, parent, trace_id) == sdk.should_sample(context, trace_id, "").decision.is_sampled()
