"""Runs load generators: h2load at full speed for processor time and throughput, vegeta at a fixed rate for latency."""

import csv
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.site import Scenario

CONNECTIONS = 8
STREAMS = 4
"""Concurrent streams of each HTTP/2 connection."""

_OPEN_LOOP_CONNECTIONS = 32
_OPEN_LOOP_IN_FLIGHT = 512
_WARM_UP_S = 1


def at_most_speed(urls: Sequence[str], scenario: Scenario, requests: int = 0, user_agent: str = "h2load") -> float:
    """Make requests as fast as one thread can; return requests a second. 0 requests: as many as the scenario has.

    Raises RuntimeError if a response is not as the scenario says.
    """
    requests = requests or scenario.requests
    protocol = [f"--max-concurrent-streams={STREAMS}"] if scenario.http2 else ["--h1"]
    connections = min(CONNECTIONS // STREAMS if scenario.http2 else CONNECTIONS, requests)
    command = ["h2load", *protocol, f"--clients={connections}", f"--requests={requests}", "--input-file=-"]
    output = subprocess.run(
        [*command, f"--header=user-agent: {user_agent}"],
        input="\n".join(urls) + "\n",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return parse_rate(output, requests, scenario.answer)


def parse_rate(output: str, requests: int, answer: str = "2xx") -> float:
    """Return requests a second from h2load's report. Raise RuntimeError unless every request got this answer."""
    finished = re.search(r"^finished in .*?, ([0-9.]+) req/s", output, re.MULTILINE)
    answered = re.search(rf"^status codes:.*? (\d+) {answer}", output, re.MULTILINE)
    if not finished or not answered or int(answered[1]) != requests:
        raise RuntimeError(f"h2load did not get {requests} answers {answer}:\n{output}")
    return float(finished[1])


def vegeta() -> Path:
    """Return vegeta's binary. Raise CalledProcessError if the build fails."""
    script = Path(__file__).with_name("install-vegeta")
    return Path(subprocess.run([script], check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def at_rate(url: str, scenario: Scenario, requests_a_second: int, seconds: int) -> list[float]:
    """Start requests at a fixed rate, whether answers come or not; return their latencies in microseconds, sorted.

    The first second, which opens connections, does not count. Each latency counts from the moment when the request was
    due, so it includes the time that the request waited. Raises RuntimeError if a request fails.
    """
    attack = [
        "attack",
        f"-rate={requests_a_second}",
        f"-duration={_WARM_UP_S + seconds}s",
        f"-http2={'true' if scenario.http2 else 'false'}",
        "-insecure",
        f"-max-workers={_OPEN_LOOP_IN_FLIGHT}",
        f"-max-connections={1 if scenario.http2 else _OPEN_LOOP_CONNECTIONS}",
    ]
    with tempfile.TemporaryFile() as results:
        subprocess.run([vegeta(), *attack], input=f"GET {url}\n".encode(), stdout=results, check=True)
        results.seek(0)
        table = subprocess.run([vegeta(), "encode", "-to=csv"], stdin=results, stdout=subprocess.PIPE, text=True)
    return sorted(parse_latencies(table.stdout.splitlines(), requests_a_second, _WARM_UP_S * requests_a_second))


def parse_latencies(lines: Iterable[str], requests_a_second: int, first: int = 0) -> list[float]:
    """Return latencies from vegeta's table: microseconds from when a request was due to its answer.

    The table's columns are: begin in Unix ns, status, ns taken, bytes out and in, error, body, name, number, and more.
    Request n is due n / rate after the first request. The request that was least late decides when the first one was
    due. Requests before number `first` do not count.
    """
    period_ns = 1e9 / requests_a_second
    began_ns: dict[int, int] = {}
    answered_ns: dict[int, int] = {}
    for row in csv.reader(lines):
        number, begin_ns = int(row[8]), int(row[0])
        if row[1] != "200":
            raise RuntimeError(f"request {number} was answered with {row[1]}: {row[5]}")
        began_ns[number], answered_ns[number] = begin_ns, begin_ns + int(row[2])
    first_due_ns = min(begin_ns - number * period_ns for number, begin_ns in began_ns.items())
    return [
        (answer_ns - first_due_ns - number * period_ns) / 1000
        for number, answer_ns in answered_ns.items()
        if number >= first
    ]
