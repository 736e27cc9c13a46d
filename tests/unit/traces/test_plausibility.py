"""What the kernel program sends about a request that contradicts the layout."""

import struct

import pytest

from otel_nginx_ebpf.traces.abi import REQUEST_RECORD, c_enum
from otel_nginx_ebpf.traces.plausibility import doubt

FACTS = c_enum("layout_fact")


def test_a_record_is_none() -> None:
    assert doubt(bytes(REQUEST_RECORD.size)) is None
    assert doubt(b"") is None


@pytest.mark.parametrize(("connections", "refutes"), [(1, False), (2, False), (3, True), (900, True)])
def test_connections_in_a_row_refute_a_layout(connections: int, refutes: bool) -> None:
    bits = 1 << FACTS["FACT_HEADERS_IN"] | 1 << FACTS["FACT_UPSTREAM_STATES"]
    found = doubt(struct.pack("<QII", bits, 4711, connections))
    assert found is not None
    assert (found.what, found.worker_pid, found.refutes) == ("headers in, upstream states", 4711, refutes)


def test_it_is_told_from_records_by_its_length() -> None:
    assert REQUEST_RECORD.size > struct.calcsize("<QII")
