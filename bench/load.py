"""Load generators: h2load at most speed, for processor time and throughput."""

import re
import subprocess

from bench.site import Scenario

CONNECTIONS = 8
STREAMS = 4
"""Of each HTTP/2 connection."""


def at_most_speed(url: str, scenario: Scenario) -> float:
    """Makes the scenario's requests as fast as one thread can; requests a second. Raises RuntimeError if any fails."""
    protocol = [f"--max-concurrent-streams={STREAMS}"] if scenario.http2 else ["--h1"]
    connections = CONNECTIONS // STREAMS if scenario.http2 else CONNECTIONS
    command = ["h2load", *protocol, f"--clients={connections}", f"--requests={scenario.requests}", url]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse_rate(output, scenario.requests)


def parse_rate(output: str, requests: int) -> float:
    """Requests a second out of h2load's report. Raises RuntimeError unless all of them were answered with 2xx."""
    finished = re.search(r"^finished in .*?, ([0-9.]+) req/s", output, re.MULTILINE)
    succeeded = re.search(r"^status codes: (\d+) 2xx", output, re.MULTILINE)
    if not finished or not succeeded or int(succeeded[1]) != requests:
        raise RuntimeError(f"h2load did not get {requests} answers:\n{output}")
    return float(finished[1])
