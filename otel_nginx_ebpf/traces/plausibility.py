"""The kernel program's reports of requests that contradict the layout (`probes/layout.h`). Pure."""

from typing import NamedTuple

from otel_nginx_ebpf.traces.abi import CStruct, c_enum

LAYOUT_DOUBT = CStruct("layout_doubt")
_FACTS = {value: name.removeprefix("FACT_").lower().replace("_", " ") for name, value in c_enum("layout_fact").items()}

# The layout is wrong when this many connections in a row had a contradicting request, without an agreeing request
# between them.
_CONNECTIONS = 3


class Doubt(NamedTuple):
    """One request that contradicts the layout. Such a request has no record."""

    what: str
    """The facts that do not hold, in words."""
    worker_pid: int
    refutes: bool
    """Whether enough connections contradicted the layout: it is not the layout of this nginx."""


def doubt(raw: bytes) -> Doubt | None:
    """Returns the doubt that the kernel sent instead of a record. `None`: the bytes are a record, by their length."""
    if len(raw) != LAYOUT_DOUBT.size:
        return None
    facts, worker_pid, connections = LAYOUT_DOUBT.struct.unpack(raw)
    what = ", ".join(words for bit, words in _FACTS.items() if facts >> bit & 1)
    return Doubt(what, worker_pid, connections >= _CONNECTIONS)
