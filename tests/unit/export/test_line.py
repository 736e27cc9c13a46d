import io
import re
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from otel_nginx_ebpf.export.line import to_line
from otel_nginx_ebpf.export.text import TextExporter
from otel_nginx_ebpf.metrics.stats import Stats
from unit.sample_traces import MONO_NS, UNIX_OFFSET_NS, retried_trace, static_trace


def test_static_request() -> None:
    assert to_line(static_trace()) == (
        "1700000005000000000, 192.0.2.7:51234=>-, /index.html, 200, request_size=78, response_size=850, "
        "downstream_request_first_byte_time=40000, downstream_request_last_byte_time=40000, "
        "upstream_connect_time=-, upstream_request_first_byte_time=-, upstream_request_last_byte_time=-, "
        "upstream_response_first_byte_time=-, upstream_response_last_byte_time=-, "
        "downstream_response_first_byte_time=90000, downstream_response_last_byte_time=130000\n"
    )


def test_a_retried_request_has_one_element_for_each_attempt() -> None:
    assert to_line(retried_trace()) == (
        "1700000005000000000, [::1]:51234=>127.0.0.1:9,[::1]:8080, /api/users?id=1, 200, "
        "request_size=99, response_size=5400, "
        "downstream_request_first_byte_time=40000, downstream_request_last_byte_time=180000, "
        "upstream_connect_time=-,450000, upstream_request_first_byte_time=-,460000, "
        "upstream_request_last_byte_time=-,470000, upstream_response_first_byte_time=-,9000000, "
        "upstream_response_last_byte_time=-,12000000, "
        "downstream_response_first_byte_time=9050000, downstream_response_last_byte_time=12100000\n"
    )


def test_a_reused_connection_has_no_connect_time() -> None:
    trace = retried_trace()
    reused = replace(trace.request.attempts[1], connect_start_mono_ns=None, connected_mono_ns=None)
    line = to_line(replace(trace, request=replace(trace.request, attempts=(reused,))))
    assert "=>[::1]:8080, " in line
    assert ", upstream_connect_time=-, upstream_request_first_byte_time=460000, " in line


def test_a_request_that_was_read_at_once_ended_with_its_first_read() -> None:
    trace = static_trace()
    line = to_line(replace(trace, request=replace(trace.request, last_read_mono_ns=None)))
    assert "downstream_request_first_byte_time=40000, downstream_request_last_byte_time=40000, " in line


def test_without_an_accept_times_count_from_the_first_byte() -> None:
    trace = static_trace()
    trace = replace(trace, request=replace(trace.request, accepted_mono_ns=None))
    line = to_line(trace)
    assert line.startswith(f"{MONO_NS + UNIX_OFFSET_NS + 40_000}, ")
    assert "downstream_request_first_byte_time=0, " in line
    assert line.endswith("downstream_response_last_byte_time=90000\n")


def test_without_accept_and_first_byte_times_count_from_nginx_s_own_beginning() -> None:
    trace = static_trace()
    trace = replace(trace, request=replace(trace.request, accepted_mono_ns=None, first_read_mono_ns=None))
    line = to_line(trace)
    assert line.startswith(f"{MONO_NS + UNIX_OFFSET_NS + 41_000}, ")
    assert "downstream_request_first_byte_time=-, " in line


def test_an_unreadable_client_and_request_line_are_absent() -> None:
    trace = static_trace()
    trace = replace(
        trace,
        request=replace(trace.request, client_sockaddr=None),
        spans=(replace(trace.spans[0], attributes={}),),
    )
    assert to_line(trace).startswith("1700000005000000000, -=>-, -, 200, ")


@given(st.text(max_size=60))
def test_hostile_uris_stay_one_field_of_one_line(path: str) -> None:
    line = to_line(static_trace(url__path=path))
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    assert len(line.split(", ")) == 15
    assert re.search(r"=>-, \S+, 200, ", line)


def test_every_line_is_written_at_once_and_counted() -> None:
    stream, stats = io.StringIO(), Stats()
    exporter = TextExporter(stream, stats, to_line)
    exporter.export(static_trace())
    exporter.export(retried_trace())
    assert stream.getvalue() == to_line(static_trace()) + to_line(retried_trace())
    assert stats.exported == 2
