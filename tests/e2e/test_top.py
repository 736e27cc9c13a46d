"""`top` in a real terminal (tmux) and as text, compared with nginx's access log."""

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from e2e.agent_process import PROGRAM, AgentProcess
from e2e.http1_client import Http1Connection
from e2e.nginx_server import AccessLog, NginxServer, free_ports, wait_until
from e2e.terminal import SIZE, Terminal

NGINX_HTTP = """
upstream application { server @UP@; server @OTHER@; keepalive 4; }
upstream dead { server @DEAD1@; }
server {
    listen 127.0.0.1:@PORT@;
    access_log logs/all.log json;
    keepalive_requests 100000;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    location / { return 200 ok; }
    location /api/ { proxy_pass http://application; }
    location /slow/ { proxy_pass http://application; }
    location /broken/ { proxy_pass http://dead; }
}
"""
COUNTS = {"/": 60, "/api/": 30, "/slow/": 10, "/broken/": 5}
TARGETS = {"/": "/x", "/api/": "/api/?delay_ms=2", "/slow/": "/slow/?delay_ms=60", "/broken/": "/broken/"}
ALL = sum(COUNTS.values())


@pytest.fixture
def port() -> int:
    (found,) = free_ports(1)
    return found


@pytest.fixture
def nginx(public_directory: Path, upstream_addresses: dict[str, str], port: int) -> Iterator[NginxServer]:
    prefix = public_directory / f"top-{port}"
    prefix.mkdir()
    words = {"UP": "ipv4", "OTHER": "other", "DEAD1": "dead1"}
    http = NGINX_HTTP.replace("@PORT@", str(port)).replace("logs/", f"{prefix}/logs/")
    for word, kind in words.items():
        http = http.replace(f"@{word}@", upstream_addresses[kind])
    server = NginxServer(prefix, http)
    server.start([("127.0.0.1", port)])
    yield server
    server.stop()
    assert server.problems() == []


def make_requests(port: int) -> None:
    with Http1Connection(("127.0.0.1", port)) as connection:
        for location, count in COUNTS.items():
            for _ in range(count):
                connection.request(TARGETS[location])


def logged(nginx: NginxServer) -> list[dict[str, str]]:
    log = AccessLog(nginx.prefix / "logs" / "all.log")
    wait_until(lambda: len(log.poll()) == ALL, "the access log")
    return log.lines


def location_of(line: dict[str, str]) -> str:
    return max((name for name in COUNTS if line["request_uri"].startswith(name)), key=len)


def table(lines: list[str], title: str) -> dict[str, list[str]]:
    """The cells of each row, by its name, in the order of the screen."""
    start = next(index for index, line in enumerate(lines) if line.startswith(f" {title} "))
    rows: dict[str, list[str]] = {}
    for line in lines[start + 1 :]:
        if not line.strip():
            break
        name, *cells = line.split()
        if not name.startswith(("p50", "▾p50")):
            rows[name] = cells
    return rows


def start(terminal: Terminal, nginx: NginxServer, tmp_path: Path, *arguments: str, **variables: str) -> None:
    command = shlex.join([str(PROGRAM), "top", "--pid", str(nginx.pid), *arguments])
    given = " ".join(f"{name}={value}" for name, value in variables.items())
    terminal.type(f"cd {tmp_path}; stty -g > before; {given} {command}; echo $? > code; stty -g > after", "Enter")
    terminal.wait_for("q quit", 30)


def check_ended(terminal: Terminal, tmp_path: Path) -> None:
    """It said what it received, gave the terminal back as it was, and exited with 0."""
    terminal.wait_for(rf"received {ALL}, exported {ALL}, lost 0")
    wait_until(lambda: (tmp_path / "after").exists() and (tmp_path / "after").read_text() != "", "the shell")
    assert (tmp_path / "code").read_text() == "0\n"
    assert (tmp_path / "after").read_text() == (tmp_path / "before").read_text()
    assert not any("q quit" in line for line in terminal.lines)
    assert any(line.startswith("ready") for line in terminal.lines)


def test_in_a_terminal(terminal: Terminal, nginx: NginxServer, port: int, tmp_path: Path) -> None:
    start(terminal, nginx, tmp_path)
    make_requests(port)
    terminal.wait_for(f"received {ALL} ")
    terminal.type("a")
    lines = terminal.wait_for(f"all time: {ALL} requests")
    locations = table(lines, "LOCATION")
    assert list(locations) == ["(all)", *sorted(COUNTS, key=COUNTS.__getitem__, reverse=True)]
    by_location = Counter(location_of(line) for line in logged(nginx))
    assert {name: int(cells[0]) for name, cells in locations.items()} == {"(all)": ALL, **by_location}
    assert {name: cells[3] for name, cells in locations.items() if cells[3] != "-"} == {
        "(all)": f"{100 * COUNTS['/broken/'] / ALL:.1f}%",
        "/broken/": "100%",
    }
    upstreams = table(lines, "UPSTREAM")
    assert {name: int(cells[0]) for name, cells in upstreams.items()} == {
        "application": COUNTS["/api/"] + COUNTS["/slow/"],
        "dead": COUNTS["/broken/"],
    }

    terminal.type(*["Right"] * 5)  # rate, errors, total, read, connect, wait
    terminal.type("p")
    lines = terminal.wait_for(r"▾p99")
    assert list(table(lines, "LOCATION"))[:3] == ["(all)", "/slow/", "/api/"]
    terminal.type("Left", "Left", "Left", "Left")
    assert next(iter(table(terminal.wait_for("▾5xx"), "UPSTREAM"))) == "dead"

    terminal.type("u")
    lines = terminal.wait_for("UPSTREAM PEER")
    assert sum(line.startswith(" application 127.0.0.1:") for line in lines) == 2
    terminal.type("u", "/", "slow", "Enter")
    lines = terminal.wait_for(r"\[slow\]")
    assert list(table(lines, "LOCATION")) == ["/slow/"]
    terminal.type("/", "Enter")

    terminal.resize(80, 24)
    lines = terminal.wait_for(r"p99 of all time")
    assert lines[-1].startswith(" q quit  ←→ sort")
    assert len(lines) == 24
    assert next(iter(table(lines, "LOCATION"))) == "(all)"
    terminal.resize(*SIZE)
    terminal.wait_for("REQS")
    terminal.type("q")
    check_ended(terminal, tmp_path)


def test_ctrl_c_and_no_colours(terminal: Terminal, nginx: NginxServer, port: int, tmp_path: Path) -> None:
    start(terminal, nginx, tmp_path, NO_COLOR="1")
    make_requests(port)
    lines = terminal.wait_for(f"received {ALL} ")
    assert not any("█" in line for line in lines), "a bar of one colour says nothing"
    terminal.type("Space")
    terminal.wait_for("paused")
    terminal.type("C-c")
    check_ended(terminal, tmp_path)


def test_the_terminal_comes_back_although_the_process_that_had_it_was_killed(
    terminal: Terminal, nginx: NginxServer, tmp_path: Path
) -> None:
    start(terminal, nginx, tmp_path)
    (supervisor,) = psutil.Process(terminal.shell_pid).children()
    (killed,) = supervisor.children()
    killed.kill()
    wait_until(lambda: [each.pid for each in supervisor.children()] not in ([], [killed.pid]), "another emitter")

    def ended() -> bool:
        terminal.type("q")
        return (tmp_path / "after").exists() and (tmp_path / "after").read_text() != ""

    wait_until(ended, "the shell", 60)  # the emitter reads keys once the probes are live again
    assert (tmp_path / "after").read_text() == (tmp_path / "before").read_text()
    assert (tmp_path / "code").read_text() == "0\n"


def milliseconds(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(µs|ms|s)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"µs": 1e-3, "ms": 1, "s": 1e3}[unit]


def as_text(nginx: NginxServer, tmp_path: Path, *arguments: str) -> tuple[AgentProcess, Path]:
    """The program, with its standard output in a file."""
    output = tmp_path / "tables"
    command = shlex.join([str(PROGRAM), "top", "--pid", str(nginx.pid), *arguments])
    return AgentProcess(nginx.pid, tmp_path, ["-c", f"exec {command} > {output}"], program=Path("/bin/sh")), output


def test_as_text(nginx: NginxServer, port: int, tmp_path: Path) -> None:
    agent, output = as_text(nginx, tmp_path, "--interval", "1")
    make_requests(port)
    lines = logged(nginx)
    wait_until(lambda: output.read_text() != "", "a table")
    agent.stop()
    assert f"received {ALL}, exported {ALL}, lost 0" in agent.stderr()
    text = output.read_text()
    assert "\x1b" not in text
    tables = [table(each.splitlines(), "LOCATION") for each in re.split(r"(?m)^(?= the interval)", text) if each]
    totals: Counter[str] = Counter()
    for each in tables:
        totals.update({name: int(cells[0]) for name, cells in each.items()})
    assert totals == {"(all)": ALL, **Counter(location_of(line) for line in lines)}


def test_once_and_its_percentiles(nginx: NginxServer, port: int, tmp_path: Path) -> None:
    agent, output = as_text(nginx, tmp_path, "--once", "--interval", "4")
    make_requests(port)
    lines = logged(nginx)
    assert agent.wait() == 0
    (text,) = re.split(r"(?m)^(?= the interval)", output.read_text())[1:]
    cells = table(text.splitlines(), "LOCATION")["/slow/"]
    times_ms = sorted(float(line["request_time"]) * 1e3 for line in lines if location_of(line) == "/slow/")
    assert cells[0] == str(len(times_ms))
    for shown, exact in zip(cells[4:7], (times_ms[4], times_ms[-1], times_ms[-1]), strict=True):
        # nginx's clock of milliseconds, our buckets, and two digits of text
        assert milliseconds(shown) == pytest.approx(exact, rel=1 / 64, abs=2)
