"""The page of `report` in a browser: only the page's own script runs, and the numbers agree with the capture."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright
from unit.sample_traces import MONO_NS, UNIX_OFFSET_NS, record

from e2e.agent_process import PROGRAM
from e2e.terminal import Terminal
from otel_nginx_ebpf.traces.capture import CaptureWriter

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = """/</script><script>document.title='taken'</script>'"><img src=x onerror="document.title='taken'">"""
COUNTS = {"/": 400, "/api/": 200, "/slow/": 20, HOSTILE: 3}
ALL = sum(COUNTS.values())


def requests() -> Iterator[bytes]:
    """One every 50 ms, the locations in turn; how long each takes is its location's, and every tenth fails."""
    lengths_ns = {"/": 200_000, "/api/": 5_000_000, "/slow/": 900_000_000, HOSTILE: 50_000_000}
    left = dict(COUNTS)
    number = 0
    while any(left.values()):
        for location in [each for each in left if left[each]]:
            left[location] -= 1
            start_ns = MONO_NS + number * 50_000_000
            sent_ns, wait_ns = start_ns + 20_000, lengths_ns[location]
            attempt = {
                "connect_start_ns": start_ns + 5_000,
                "connected_ns": start_ns + 15_000,
                "first_write_ns": sent_ns,
                "last_write_ns": sent_ns,
                "first_read_ns": sent_ns + wait_ns,
                "last_read_ns": sent_ns + wait_ns + 30_000,
                "ended_ns": sent_ns + wait_ns + 31_000,
                "status": 200,
            }
            end_ns = sent_ns + wait_ns + 100_000
            yield record(
                {"STRING_METHOD": "GET", "STRING_URI": location, "STRING_LOCATION": location},
                [] if location == "/" else [("127.0.0.1:80", attempt)],
                first_read_ns=start_ns,
                created_ns=start_ns + 1_000,
                last_read_ns=start_ns,
                first_write_ns=end_ns - 50_000,
                last_write_ns=end_ns,
                ended_ns=end_ns,
                http_version=1001,
                out_status=503 if number % 10 == 0 else 200,
                worker_pid=1,
                trace_id_low=number + 1,
                trace_flags=1,
            )
            number += 1


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    with CaptureWriter(directory / "day.capture", {}) as writer:
        for raw in requests():
            writer.append(UNIX_OFFSET_NS, raw)
    command = [PROGRAM, "report", directory / "day.capture", "-o", directory / "day.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return directory / "day.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip("needs Debian's chromium; run it with `sudo make test`")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@dataclass
class Opened:
    page: Page
    said: list[str]
    """What the browser has to complain of."""
    asked: list[str]
    """What was fetched."""


@pytest.fixture(params=[(1280, 900, "light"), (390, 844, "dark")], ids=["desktop", "phone"])
def opened(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[Opened]:
    width, height, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    found = Opened(page, [], [])

    def said(message: ConsoleMessage) -> None:
        found.said.append(message.text)

    page.on("console", said)
    page.on("pageerror", lambda error: found.said.append(str(error)))
    page.on("request", lambda each: found.asked.append(each.url))
    page.goto(report.as_uri())
    yield found
    page.close()
    assert found.said == []
    assert found.asked == [report.as_uri()]


VISIBLE_CELLS = """section => Object.fromEntries(
    [...document.querySelectorAll(`#${section} tbody tr`)].map(row => [
        row.cells[0].innerText,
        [...row.querySelectorAll("td:not(.bars)")].filter(cell => cell.offsetParent).map(cell => cell.innerText),
    ]))"""


def rows(page: Page, section: str) -> dict[str, list[str]]:
    """The visible cells of each row: count, 4xx, 5xx, then one percentile of each duration."""
    found: dict[str, list[str]] = page.evaluate(VISIBLE_CELLS, section)
    return found


def test_numbers(opened: Opened) -> None:
    page = opened.page
    assert page.locator("#requests").inner_text() == str(ALL)
    found = rows(page, "locations")
    assert {name: cells[0] for name, cells in found.items()} == {
        "(all)": str(ALL),
        **{name: str(count) for name, count in COUNTS.items()},
    }
    value, unit = found["/api/"][3].split()
    assert (float(value), unit) == (pytest.approx(5.12, rel=1 / 64), "ms")
    assert {name: cells[0] for name, cells in rows(page, "upstreams").items()} == {"127.0.0.1:80": str(ALL - 400)}
    assert page.title().startswith("day.capture")


def test_it_fits_the_screen(opened: Opened) -> None:
    wider = opened.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wider <= 0


def test_percentiles_and_order_change(opened: Opened) -> None:
    page = opened.page
    before = rows(page, "locations")
    page.locator("#locations [data-show=p50]").click()
    after = rows(page, "locations")
    assert len(before["/"]) == len(after["/"]) == 10
    assert before["(all)"][3] != after["(all)"][3]
    page.locator("#locations thead th.p50").first.click()
    assert list(rows(page, "locations"))[:3] == ["(all)", "/slow/", HOSTILE]
    page.locator("#locations thead th").first.click()
    assert list(rows(page, "locations"))[1:] == sorted(COUNTS)


def test_a_chart_tells_its_numbers(opened: Opened) -> None:
    page = opened.page
    chart = page.locator("svg[data-columns]").last
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    told = page.locator("#tip").inner_text()
    assert re.search(r"requests: \d+", told)
    page.mouse.move(1, 1)
    assert not page.locator("#tip").is_visible()


def test_the_slowest_requests(opened: Opened) -> None:
    page = opened.page
    assert page.locator("#slowest > details").count() == 20
    first = page.locator("#slowest > details").first
    names = [line.split("\n")[0].split(" 127")[0] for line in first.locator(".span .name").all_inner_texts()]
    assert names == ["GET /slow/", "downstream read", "upstream connect", "upstream exchange", "downstream write"]
    first.locator(".span summary").last.click()
    page.locator("#slowest > details").nth(1).locator("summary").first.click()
    assert page.locator("#slowest > details").nth(1).locator(".span").first.is_visible()


def test_progress_on_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    raw = next(requests())
    with CaptureWriter(tmp_path / "long.capture", {}) as writer:
        for _ in range(60_000):
            writer.append(UNIX_OFFSET_NS, raw)
    terminal.type(f"cd {tmp_path}; {PROGRAM} report long.capture -o page.html; echo it ended with $?", "Enter")
    terminal.wait_for(r"^reading .* \d+%")
    lines = terminal.wait_for("^it ended with 0", 60)
    assert not any(line.startswith("reading") for line in lines)
    assert '<dd id="requests">60000</dd>' in (tmp_path / "page.html").read_text()
