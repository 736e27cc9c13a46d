"""The report's page as text. `tests/e2e/test_report_page.py` opens the page in a browser."""

import html
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_nginx_ebpf.analysis.report import SLOWEST, Report
from otel_nginx_ebpf.analysis.report.charts import latency_chart, rate_chart, time_chart
from otel_nginx_ebpf.analysis.report.timeline import SLOTS_MAX, Timeline
from otel_nginx_ebpf.analysis.tally import Row, Tally
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.traces.choices import SpanChoices
from otel_nginx_ebpf.traces.error_log import LogLine
from otel_nginx_ebpf.traces.record import Request, decode
from unit.sample_traces import RETRIED, STATIC, UNIX_OFFSET_NS

HOSTILE = """/</script><script>alert(1)</script>'"><img src=x onerror=alert(1)>{{ 7 * 7 }}\x1b[2J\u202e"""


def report_of(*requests: Request, query: bool = True) -> Report:
    report = Report(Stats(), SpanChoices(query=query))
    report.take([(request, UNIX_OFFSET_NS, {}) for request in requests])
    return report


class Elements(HTMLParser):
    """What elements a page has, with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_an_empty_file() -> None:
    page = report_of().page("empty.capture", [])
    assert "This file contains no requests." in page


def test_notes_are_shown() -> None:
    assert "damaged at byte &lt;7&gt;" in report_of(decode(STATIC)).page("a", ["damaged at byte <7>"])


def test_a_request_without_a_status_is_shown() -> None:
    page = report_of(replace(decode(STATIC), status=0)).page("a", [])
    assert '<span class="status s0">-</span>' in page


def hostile() -> Request:
    retried = decode(RETRIED)
    attempts = tuple(replace(attempt, peer=HOSTILE, upstream=HOSTILE) for attempt in retried.attempts)
    names = dict.fromkeys(("uri", "method", "host", "user_agent", "location", "server_name"), HOSTILE)
    return replace(retried, attempts=attempts, **names)


def test_a_line_of_the_error_log_is_shown() -> None:
    line = LogLine(0, "error", 0, None, f"open() {HOSTILE} failed")
    page = Elements(report_of(replace(decode(STATIC), log_lines=(line,))).page("a", []))
    assert "[error] open() /</script><script>alert(1)" in page.text


def test_what_strangers_sent_is_text() -> None:
    page = Elements(report_of(hostile(), decode(STATIC)).page(HOSTILE, [HOSTILE]))
    tame = Elements(report_of(decode(RETRIED), decode(STATIC)).page("name", ["note"]))
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in tame.elements}
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "{{ 7 * 7 }}" in page.text
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text


def test_nothing_is_fetched() -> None:
    page = Elements(report_of(hostile()).page("a", []))
    assert not {"src", "href", "action", "style"} & {name for _, attributes in page.elements for name in attributes}
    (policy,) = [each["content"] for _, each in page.elements if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert re.sub(r"sha256-\S{44}'", "HASH'", policy) == (
        "default-src 'none'; style-src 'HASH'; script-src 'HASH'; base-uri 'none'; form-action 'none'"
    )


def test_queries_stay_out_where_they_are_not_wanted() -> None:
    assert "id=1" in report_of(decode(RETRIED)).page("a", [])
    assert "id=1" not in report_of(decode(RETRIED), query=False).page("a", [])


def test_the_slowest_are_kept_and_no_tunnel() -> None:
    requests = []
    for number in range(3 * SLOWEST):
        static = decode(STATIC)
        end = static.ended_mono_ns + number * 1_000_000
        requests.append(replace(static, uri=f"/number-{number:02}", last_write_mono_ns=end, ended_mono_ns=end))
    tunnel = replace(requests[-1], uri="/tunnel", status=101, ended_mono_ns=requests[-1].ended_mono_ns + 10**12)
    page = report_of(*requests[::2], tunnel, *requests[1::2]).page("a", [])
    shown = re.findall(r"GET (/\S+?)</span>", page)
    assert shown == [f"/number-{number:02}" for number in range(3 * SLOWEST - 1, 2 * SLOWEST - 1, -1)]


def test_numbers_are_the_tally_s() -> None:
    requests = [decode(STATIC)] * 7 + [replace(decode(STATIC), status=503)] * 2 + [decode(RETRIED)]
    page = html.unescape(report_of(*requests).page("a", []))
    assert '<dd id="requests">10</dd>' in page
    assert re.findall(r"<dt>5xx</dt><dd>(.*?)</dd>", page) == ["20%"]


@given(st.lists(st.integers(0, 10**14), min_size=1, max_size=60))
def test_a_series_has_room_for_any_time_and_loses_nothing(times_ns: list[int]) -> None:
    series = Timeline()
    for time_ns in times_ns:
        series.at(UNIX_OFFSET_NS + time_ns).count += 1
    assert sum(row.count for row in series.rows.values()) == len(times_ns)
    assert 0 <= min(series.rows) <= max(series.rows) < SLOTS_MAX
    first = times_ns[0]
    for time_ns in times_ns:
        assert series.rows[max(time_ns - first, 0) // series.width_ns].count


def paths(series: Timeline) -> list[str]:
    charts = [time_chart(series), rate_chart(series), *(latency_chart(series, index) for index in range(3))]
    return [line.path for chart in charts for line in chart.lines]


@given(st.lists(st.tuples(st.integers(0, 10**13), st.integers(200, 599)), max_size=20))
def test_paths_stay_inside_the_picture(found: list[tuple[int, int]]) -> None:
    series, tally = Timeline(), Tally()
    for time_ns, status in found:
        tally.add(replace(decode(RETRIED), status=status), series.at(UNIX_OFFSET_NS + time_ns))
    for path in paths(series):
        assert re.fullmatch(r"(M|L|Z|[\d.]+ [\d.]+)*", path)
        for x, y in re.findall(r"([\d.]+) ([\d.]+)", path):
            assert 84 <= float(x) <= 952
            assert 12 <= float(y) <= 232


@pytest.mark.parametrize("count", [0, 1])
def test_charts_of_next_to_nothing(count: int) -> None:
    series = Timeline()
    for _ in range(count):
        Tally().add(decode(STATIC), series.at(UNIX_OFFSET_NS))
    assert len(rate_chart(series).columns) == count
    assert paths(series)
    assert Row().count == 0
