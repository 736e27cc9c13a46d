"""Lists trace contexts from clients, and what they mean: https://www.w3.org/TR/trace-context-2/."""

from dataclasses import dataclass

from e2e.agent_process import Trace
from e2e.stage import Exchange

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
Headers = list[tuple[str, str]]


@dataclass(frozen=True)
class Context:
    """What our spans continue. `flags` are those of our spans if the sampler ignores the parent and samples."""

    flags: int = 1
    state: str = ""
    trace_id: str = TRACE_ID
    parent_id: str = PARENT_ID


def _parent(value: str) -> Headers:
    return [("traceparent", value)]


VALID = f"00-{TRACE_ID}-{PARENT_ID}-01"
_STATE = [("tracestate", "one=1,two@other=2")]

CASES: dict[str, tuple[Headers, Context | None]] = {
    "nothing": ([], None),
    "sampled": (_parent(VALID), Context()),
    "not sampled": (_parent(VALID[:-2] + "00"), Context()),
    "sampled and random": (_parent(VALID[:-2] + "03"), Context(flags=3)),
    "flags that version 00 does not know": (_parent(VALID[:-2] + "fd"), Context(flags=1)),
    "only flags that version 00 does not know": (_parent(VALID[:-2] + "fc"), Context(flags=1)),
    "another version": (_parent("cc" + VALID[2:]), Context()),
    "another version, with more": (_parent("cc" + VALID[2:] + "-what-the-future-brings"), Context()),
    "another version, with a dash": (_parent("cc" + VALID[2:] + "-"), Context()),
    "another version, with more but no dash": (_parent("cc" + VALID[2:] + ".more"), None),
    "another version, too short": (_parent("cc" + VALID[2:-1]), None),
    "forbidden version": (_parent("ff" + VALID[2:]), None),
    "version in upper case": (_parent("CC" + VALID[2:]), None),
    "version that is no number": (_parent("0x" + VALID[2:]), None),
    "version 00 with more": (_parent(VALID + "-more"), None),
    "version 00 with a dash": (_parent(VALID + "-"), None),
    "trace id of zeros": (_parent(f"00-{'0' * 32}-{PARENT_ID}-01"), None),
    "trace id in upper case": (_parent(f"00-{TRACE_ID.upper()}-{PARENT_ID}-01"), None),
    "trace id that is no number": (_parent(f"00-{TRACE_ID[:-1]}g-{PARENT_ID}-01"), None),
    "trace id too short": (_parent(f"00-{TRACE_ID[1:]}-{PARENT_ID}-01"), None),
    "trace id too long": (_parent(f"00-{TRACE_ID}0-{PARENT_ID}-01"), None),
    "parent id of zeros": (_parent(f"00-{TRACE_ID}-{'0' * 16}-01"), None),
    "parent id in upper case": (_parent(f"00-{TRACE_ID}-{PARENT_ID.upper()}-01"), None),
    "parent id that is no number": (_parent(f"00-{TRACE_ID}-{PARENT_ID[:-1]}.-01"), None),
    "parent id too long": (_parent(f"00-{TRACE_ID}-{PARENT_ID}0-01"), None),
    "half an id of zeros": (
        _parent(f"00-{'0' * 16}{TRACE_ID[16:]}-{PARENT_ID}-01"),
        Context(trace_id="0" * 16 + TRACE_ID[16:]),
    ),
    "the other half": (
        _parent(f"00-{TRACE_ID[:16]}{'0' * 16}-{PARENT_ID}-01"),
        Context(trace_id=TRACE_ID[:16] + "0" * 16),
    ),
    "one flag digit": (_parent(VALID[:-1]), None),
    "flags in upper case": (_parent(VALID[:-2] + "0B"), None),
    "flags that are no number": (_parent(VALID[:-2] + "0."), None),
    "other separators": (_parent(VALID.replace("-", "_")), None),
    "empty": (_parent(""), None),
    "two alike": (_parent(VALID) * 2, None),
    "two that differ": (_parent(VALID) + _parent(VALID.replace("b7", "c8")), None),
    "a malformed one before": (_parent("nonsense") + _parent(VALID), None),
    "a malformed one behind": (_parent(VALID) + _parent("nonsense"), None),
    "name in mixed case": ([("TraceParent", VALID)], Context()),
    "name in upper case": ([("TRACEPARENT", VALID), ("TraceState", "a=1")], Context(state="a=1")),
    "names that begin or end alike": ([("traceparent2", VALID), ("x-traceparent", VALID), ("traceparen", VALID)], None),
    "state": (_parent(VALID) + _STATE, Context(state="one=1,two@other=2")),
    "state first": (_STATE + _parent(VALID), Context(state="one=1,two@other=2")),
    "state in two lines": (
        [("tracestate", "one=1"), *_parent(VALID), ("tracestate", "two@other=2")],
        Context(state="one=1,two@other=2"),
    ),
    "empty state": ([*_parent(VALID), ("tracestate", "")], Context()),
    "state alone": (_STATE, None),
    "state of a malformed parent": (_parent(VALID[:-1]) + _STATE, None),
}


def head(target: str, headers: Headers) -> bytes:
    """Return a whole GET request. Header lines may repeat, unlike with `request_bytes`."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"GET {target} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode()


def check_context(trace: Trace, expected: Context | None) -> list[str]:
    """Return how the trace differs from `expected`. None means that the trace begins here."""
    server = trace.server
    continued = Context(trace.trace_flags, trace.trace_state, trace.trace_id, server.parent_span_id or "")
    if expected is None:
        expected = Context(1, "", continued.trace_id, "")
        if continued.trace_id == TRACE_ID or not int(continued.trace_id, 16):
            return [f"{continued} begins here"]
    return [] if continued == expected else [f"{continued}, not {expected}"]


def check_cases(exchanges: list[Exchange]) -> None:
    """Check the exchanges: one for each case, with the number of the case in the query."""
    cases = list(CASES.items())
    wrong = {}
    for each in exchanges:
        name, (_, expected) = cases[int(each.log["request_uri"].partition("?")[2])]
        if found := check_context(each.trace, expected):
            wrong[name] = found
    assert wrong == {}
