"""The calculations and the parsers of `make bench`."""

from pathlib import Path

import pytest

from bench.counts import parse_totals
from bench.emitter import spans_received
from bench.figures import paired, percentile, quartiles
from bench.load import parse_latencies, parse_rate
from bench.memory import by_group, parse_smaps
from bench.programs import Program, parse_program
from bench.tables import cpu
from bench.variants import FEATURES, Variant
from bench.worker import compare
from otel_nginx_ebpf.settings.sources import load

# From h2load 1.52, its progress left out.
H2LOAD = """\
finished in 974.19ms, 20529.86 req/s, 2.92MB/s
requests: 20000 total, 20000 started, 20000 done, 20000 succeeded, 0 failed, 0 errored, 0 timeout
status codes: {answered} 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 2.84MB (2980000) total, 2.06MB (2160000) headers (space savings 0.00%), 39.06KB (40000) data
"""


@pytest.mark.parametrize(("percent", "expected"), [(50, 50), (99, 99), (99.9, 100), (100, 100), (0, 1)])
def test_a_percentile_is_one_of_the_values(percent: float, expected: int) -> None:
    assert percentile(range(1, 101), percent) == expected


def test_percentiles_of_one_value_and_of_none() -> None:
    assert percentile([7], 99.9) == 7
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_quartiles() -> None:
    assert quartiles([5]) == (5, 5, 5)
    assert quartiles([4, 1, 3, 2, 5]) == (2, 3, 4)


def test_what_both_of_a_round_share_drops_out() -> None:
    assert paired([13, 33, 23], [10, 30, 20]) == [3, 3, 3]
    with pytest.raises(ValueError, match="shorter"):
        paired([1, 2], [1])


def test_a_variant_is_held_against_off_round_by_round() -> None:
    figures = compare({"off": [10, 30, 20], "on": [13, 33, 23]})
    assert figures["on"]["above_off"] == {"median": 3, "lower_quartile": 3, "upper_quartile": 3, "least": 3}
    assert figures["on"]["to_off"]["median"] == pytest.approx(1.15)
    assert figures["off"]["median"] == 20
    assert "above_off" not in figures["off"]


def test_the_table_tells_ratio_and_share() -> None:
    series = {"static": compare({"off": [10.0], "all": [13.0]})}
    rates = {"static": {label: {"median": 50_000} for label in ("off", "all")}}
    columns = [list(column.cells) for column in cpu(series, rates).columns]
    assert columns == [
        ["static", "static"],
        ["off", "all"],
        ["", "1.30"],
        ["", "1.30 … 1.30"],
        ["", "1.30"],
        ["10.00", "13.00"],
        ["", "+3.00"],
        ["", "+3.00"],
        ["", "0.3%"],
        ["", "3.0%"],
        ["", "15.0%"],
        ["50000", "50000"],
    ]


def test_h2load_tells_its_rate() -> None:
    assert parse_rate(H2LOAD.format(answered=20000), 20000) == 20529.86


def test_a_run_with_failures_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="did not get 20000"):
        parse_rate(H2LOAD.format(answered=19999), 20000)


def vegeta_row(begin_ns: int, taken_ns: int, number: int, status: int = 200) -> str:
    return f"{begin_ns},{status},{taken_ns},0,5,,,,{number},GET,http://127.0.0.1/,"


def test_a_latency_counts_from_when_the_request_was_due() -> None:
    """The second of four, one due every millisecond, began 2 ms late."""
    rows = [(10_000_000, 300_000, 0), (13_000_000, 100_000, 1), (13_100_000, 100_000, 2), (13_200_000, 50_000, 3)]
    lines = [vegeta_row(*row) for row in reversed(rows)]
    assert sorted(parse_latencies(lines, 1000)) == pytest.approx([250, 300, 1200, 2100])


def test_a_failed_request_has_no_latency() -> None:
    with pytest.raises(RuntimeError, match="request 0 was answered with 502"):
        parse_latencies([vegeta_row(0, 5, 0, 502)], 1000)


def test_bpftool_tells_runs_only_while_the_kernel_counts() -> None:
    shown = {
        "id": 9,
        "type": "kprobe",
        "name": "enter_ngx_http_free_request",
        "bytes_xlated": 13160,
        "bytes_jited": 7742,
    }
    assert parse_program(shown) == Program("free_request", 1645, 7742, 0, 0)
    shown |= {"run_cnt": 4, "run_time_ns": 4000}
    assert parse_program(shown) == Program("free_request", 1645, 7742, 4, 4000)


@pytest.mark.parametrize(
    ("text", "program", "arguments"),
    [
        ("on", "otel-nginx-ebpf", ()),
        ("request=--detail request", "otel-nginx-ebpf", ("--detail", "request")),
        ("before=/other/otel-nginx-ebpf --no-query", "/other/otel-nginx-ebpf", ("--no-query",)),
    ],
)
def test_a_variant_is_the_program_with_arguments_or_another_program(
    text: str, program: str, arguments: tuple[str, ...]
) -> None:
    variant = Variant.parse(text)
    assert (variant.name, variant.arguments) == (text.partition("=")[0], arguments)
    assert str(variant.program).endswith(program)


SMAPS = """\
55d0c8a00000-55d0c8a01000 r--p 00000000 fe:00 1234                       /usr/bin/python3.11
Size:                  4 kB
Rss:                2048 kB
Pss:                   1 kB
7f0000000000-7f0000001000 rw-p 00000000 00:00 0
Rss:                1024 kB
7f0000002000-7f0000003000 r--p 00000000 00:10 9                          anon_inode:bpf-map
Rss:                 512 kB
7f0000004000-7f0000005000 r-xp 00000000 fe:00 5                          /opt/a directory/other.so
Rss:                 256 kB
"""


def test_the_rules_that_are_measured() -> None:
    (variant,) = (each for each in map(Variant.parse, FEATURES) if each.name == "rules")
    option, path = variant.arguments
    assert option == "--config"
    rules = load({}, Path(path)).rules
    assert len(rules) == 10
    assert (rules[-1].path, rules[-1].drop) == (("/proxied/*",), True)


def test_resident_memory_by_what_it_is_mapped_from() -> None:
    groups = by_group(parse_smaps(SMAPS))
    assert {name: megabytes for name, megabytes in groups.items() if megabytes} == {
        "ring buffer": 0.5,
        "Python and modules": 2,
        "heap": 1,
        "other": 0.25,
    }


def test_callgrind_tells_its_instructions() -> None:
    assert parse_totals("version: 1\nevents: Ir\nfn=(1) main\n16 4\n\ntotals: 162476\n") == 162476
    with pytest.raises(RuntimeError, match="no totals"):
        parse_totals("")


def test_the_collector_tells_its_spans() -> None:
    log = """2026-11-22T16:55:33.799Z\tinfo\tStarting otelcol...\t{"spans of": "something"}
Traces\t{"resource spans": 1334, "spans": 4094}
Traces\t{"resource spans": 1, "spans": 5}
"""
    assert spans_received(log) == 4099
