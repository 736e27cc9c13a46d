import os
import stat
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.traces import capture
from otel_nginx_ebpf.traces.abi import LIMITS
from otel_nginx_ebpf.traces.capture import MAGIC, CaptureError, CaptureWriter, read_capture, read_header
from unit.sample_traces import RETRIED, STATIC

one_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
frames = st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.binary(max_size=300)), max_size=8)


def written(path: Path, records: list[tuple[int, bytes]]) -> bytes:
    with CaptureWriter(path, {"nginx": "1.22.1"}) as writer:
        for unix_offset_ns, raw in records:
            writer.append(unix_offset_ns, raw)
    assert writer.records == len(records)
    assert writer.bytes == path.stat().st_size
    return path.read_bytes()


def until_damage(path: Path) -> tuple[list[tuple[int, bytes]], CaptureError | None]:
    read: list[tuple[int, bytes]] = []
    try:
        for frame in read_capture(path):
            read.append(frame)
    except CaptureError as error:
        return read, error
    return read, None


@given(frames)
@one_file
def test_what_is_written_is_read(tmp_path: Path, records: list[tuple[int, bytes]]) -> None:
    path = tmp_path / "a.capture"
    written(path, records)
    assert list(read_capture(path)) == records


@given(frames, st.data())
@one_file
def test_a_cut_file_gives_all_whole_records_and_says_where_it_ends(
    tmp_path: Path, records: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    path = tmp_path / "a.capture"
    whole = written(path, records)
    header_end = len(written(path, []))
    ends = [header_end]
    for _, raw in records:
        ends.append(ends[-1] + 16 + len(raw))
    cut = data.draw(st.integers(header_end, len(whole)))
    path.write_bytes(whole[:cut])
    read, error = until_damage(path)
    last_end = max(end for end in ends if end <= cut)
    assert read == records[: ends.index(last_end)]
    if cut == last_end:
        assert error is None
    else:
        assert f"at byte {last_end}" in str(error)


@given(st.data())
@one_file
def test_a_flipped_bit_is_found_and_all_before_it_is_read(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.capture"
    records = [(7, STATIC), (8, RETRIED), (9, STATIC)]
    whole = bytearray(written(path, records))
    second = len(written(path, records[:1]))
    position = data.draw(st.integers(second, len(whole) - 1))
    whole[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    read, error = until_damage(path)
    assert error is not None
    assert read == records[: 1 if position < second + 16 + len(RETRIED) else 2]


@given(st.binary(max_size=400))
@one_file
def test_noise_behind_the_header_never_ends_in_a_traceback(tmp_path: Path, noise: bytes) -> None:
    path = tmp_path / "a.capture"
    path.write_bytes(written(path, [(1, STATIC)]) + noise)
    read, error = until_damage(path)
    assert read[0] == (1, STATIC)
    assert error is not None or not noise


@given(st.binary(max_size=200))
@one_file
def test_noise_instead_of_a_header_is_refused(tmp_path: Path, noise: bytes) -> None:
    path = tmp_path / "a.capture"
    path.write_bytes(MAGIC + noise)
    with pytest.raises(CaptureError):
        list(read_capture(path))


def test_a_hostile_length_is_refused_without_reading_that_much(tmp_path: Path) -> None:
    path = tmp_path / "a.capture"
    header_end = len(written(path, []))
    with path.open("ab") as file:
        file.write((LIMITS["RECORD_BYTES_MAX"] + 1).to_bytes(4, "little") + bytes(12))
        file.truncate(1 << 32)
    with pytest.raises(CaptureError, match=f"damaged at byte {header_end}: a record of 16385 bytes"):
        list(read_capture(path))


@pytest.mark.parametrize("raw", [b"[]", b"\xff", b"[" * 100_000])
def test_a_header_that_is_no_object_is_damage(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "a.capture"
    path.write_bytes(MAGIC + len(raw).to_bytes(4, "little") + zlib.crc32(raw).to_bytes(4, "little") + raw)
    with pytest.raises(CaptureError, match="not a JSON object"):
        list(read_capture(path))


def test_the_header_says_where_the_records_come_from(tmp_path: Path) -> None:
    path = tmp_path / "a.capture"
    written(path, [])
    header = read_header(path)
    assert header["about"] == {"kernel": os.uname().release, "nginx": "1.22.1"}
    assert ["__u64", "accepted_ns"] in header["record"]["structs"]["request_record"]


def test_only_the_owner_may_read_a_capture(tmp_path: Path) -> None:
    path = tmp_path / "a.capture"
    written(path, [])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "passwd"
    path.write_text("root:x:0:0")
    with pytest.raises(UserError, match="not a capture file"):
        list(read_capture(path))


def test_another_record_layout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.capture"
    other = capture.record_layout()
    other["structs"]["request_record"] = other["structs"]["request_record"][1:]
    with monkeypatch.context() as patched:
        patched.setattr(capture, "record_layout", lambda: other)
        written(path, [(1, STATIC)])
    with pytest.raises(UserError, match="lays records out in another way"):
        list(read_capture(path))


def test_a_missing_file_and_a_directory_are_the_users_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        list(read_capture(tmp_path / "none"))
    with pytest.raises(UserError, match="Is a directory"):
        CaptureWriter(tmp_path, {})
