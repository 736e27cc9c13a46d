"""What the kernel program (`probes/layout.h`) finds that contradicts a layout. Pure."""

from typing import NamedTuple

from otel_nginx_ebpf.traces.abi import CStruct, c_enum

LAYOUT_DOUBT = CStruct("layout_doubt")
_FACTS = {value: name.removeprefix("FACT_").lower().replace("_", " ") for name, value in c_enum("layout_fact").items()}

# A layout is wrong when so many connections in a row had requests that contradict it, and none agreed in between.
_CONNECTIONS = 3


class Doubt(NamedTuple):
    """One request that contradicts the layout, and has no record."""

    what: str
    """Which facts do not hold, in words."""
    worker_pid: int
    refutes: bool
    """Whether it is one too many: the layout is not this nginx's."""


def doubt(raw: bytes) -> Doubt | None:
    """What the kernel handed over instead of a record; None where it is a record, by its length."""
    if len(raw) != LAYOUT_DOUBT.size:
        return None
    facts, worker_pid, connections = LAYOUT_DOUBT.struct.unpack(raw)
    what = ", ".join(words for bit, words in _FACTS.items() if facts >> bit & 1)
    return Doubt(what, worker_pid, connections >= _CONNECTIONS)
