"""The settings as constants of the kernel program, compared with the SDK's samplers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

from otel_nginx_ebpf.planner.sampling import constants
from otel_nginx_ebpf.settings.sources import load

SAMPLE = ("SAMPLE_BY_PARENT", "SAMPLE_ALWAYS", "SAMPLE_RATIO_BOUND")


@pytest.mark.parametrize(
    ("sampler", "ratio", "expected"),
    [
        ("always_on", "0.25", (0, 1, 0)),
        ("always_off", "0.25", (0, 0, 0)),
        ("traceidratio", "0.25", (0, 0, 2**62)),
        ("parentbased_always_on", "0.25", (1, 1, 0)),
        ("parentbased_always_off", "0.25", (1, 0, 0)),
        ("parentbased_traceidratio", "0.5", (1, 0, 2**63)),
        ("traceidratio", "1", (0, 1, 0)),
        ("traceidratio", "0", (0, 0, 0)),
        ("Traceidratio", None, (0, 1, 0)),
        (None, None, (1, 1, 0)),
    ],
)
def test_samplers(sampler: str | None, ratio: str | None, expected: tuple[int, ...]) -> None:
    values = constants(load({"sampler": sampler, "sampler_arg": ratio}))
    assert tuple(values[name] for name in SAMPLE) == expected


@given(st.floats(0, 1))
def test_the_ratio_s_bound_is_the_sdk_s(ratio: float) -> None:
    values = constants(load({"sampler": "traceidratio", "sampler_arg": ratio}))
    assert values["SAMPLE_ALWAYS"] << 64 | values["SAMPLE_RATIO_BOUND"] == TraceIdRatioBased(ratio).bound
    assert values["SAMPLE_RATIO_BOUND"] < 2**64


def test_without_settings_only_w3c_is_read_and_nothing_else_is_on() -> None:
    values = constants(load({}))
    assert {name for name, value in values.items() if value} == {
        "SAMPLE_BY_PARENT",
        "SAMPLE_ALWAYS",
        "PROPAGATOR_TRACECONTEXT",
    }


@pytest.mark.parametrize(
    ("flag", "text", "name", "value"),
    [
        ("keep_errors", "true", "KEEP_ERRORS", 1),
        ("keep_slower_than", "500ms", "KEEP_SLOWER_THAN_NS", 500_000_000),
        ("keep_slower_than", "1.5s", "KEEP_SLOWER_THAN_NS", 1_500_000_000),
        ("keep_slower_than", "800us", "KEEP_SLOWER_THAN_NS", 800_000),
        ("adopt_upstream_context", "true", "ADOPT_UPSTREAM_CONTEXT", 1),
        ("propagate", "true", "PROPAGATE", 1),
        ("propagate", "true", "PROPAGATE_SOCKET", 1),
        ("propagate", "memory", "PROPAGATE_SOCKET", 0),
        ("propagate", "socket", "PROPAGATE", 0),
        ("propagate", "off", "PROPAGATE_SOCKET", 0),
    ],
)
def test_what_is_on(flag: str, text: str, name: str, value: int) -> None:
    assert constants(load({flag: text}))[name] == value


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["b3", "xrequestid", "b3"], {"PROPAGATOR_B3", "PROPAGATOR_XREQUESTID"}),
        (["tracecontext", "baggage"], {"PROPAGATOR_TRACECONTEXT"}),
        (["B3Multi"], {"PROPAGATOR_B3MULTI"}),
        (["baggage"], set()),
        (["none"], set()),
        (["none", "tracecontext"], set()),  # as the SDK has it
    ],
)
def test_propagators(names: list[str], read: set[str]) -> None:
    values = constants(load({"propagators": names}))
    assert {name for name, value in values.items() if value and name.startswith("PROPAGATOR_")} == read
