"""Runs for minutes without a collector at a real rate of requests; watches memory and each request (`make soak`).

Exits with 1 unless memory stays within its limit, and nginx logged as many requests as were delivered and lost.
"""

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

import psutil
from e2e.agent_process import AgentProcess
from e2e.nginx_server import NginxServer, free_ports, wait_until
from e2e.steady_load import CLIENTS, SteadyLoad
from unit.otlp_receiver import GrpcReceiver

# Half of the requests are proxied, and make the other half.
NGINX_HTTP = """
log_format short '$status';
keepalive_requests 1000000000;
upstream application {{ server 127.0.0.1:{upstream}; keepalive 64; keepalive_requests 1000000000; }}
server {{
    listen 127.0.0.1:{port};
    access_log logs/all.log short;
    location / {{ proxy_pass http://application; proxy_http_version 1.1; proxy_set_header Connection ''; }}
}}
server {{ listen 127.0.0.1:{upstream}; access_log logs/all.log short; return 200 ok; }}
"""

BESIDE_THE_QUEUE_MIB = 80
"""Memory of the emitter without its queue, as in tests/e2e/test_memory.py."""


def memory_mib(agent: AgentProcess) -> dict[str, float]:
    """Return resident MiB of the agent's processes, by their role."""
    parts = {}
    for pid in agent.pids:
        process = psutil.Process(pid)
        part = "supervisor" if pid == agent.pid and len(agent.pids) > 1 else "emitter"
        parts[part] = parts.get(part, 0) + process.memory_info().rss / 2**20
    return parts


def soak(minutes: float, rate: int, queue_mib: int, directory: Path) -> bool:
    port, upstream, collector = free_ports(3)
    nginx = NginxServer(directory, NGINX_HTTP.format(port=port, upstream=upstream), workers=2)
    nginx.start([("127.0.0.1", port)])
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector}"}
    options = [
        "--pid",
        str(nginx.pid),
        "--queue-mib",
        str(queue_mib),
        "--grace-seconds",
        "60",
        "--sampler",
        "always_on",
    ]
    agent = AgentProcess(nginx.pid, directory, ["run", *options], environment)
    most: dict[str, float] = {}
    requests = int(minutes * 60 * rate) // 2 // CLIENTS * CLIENTS
    log = directory / "logs" / "all.log"
    began_s = time.monotonic()

    def look() -> dict[str, float]:
        now = memory_mib(agent)
        most.update({part: max(mib, most.get(part, 0)) for part, mib in now.items()})
        return now

    with SteadyLoad([f"http://127.0.0.1:{port}/"], requests, rate // 2) as load:
        told_s = 0.0
        while not load.is_over:
            now = look()
            passed_s = time.monotonic() - began_s
            if passed_s >= told_s:
                told_s += 30
                parts = ", ".join(f"{part} {mib:.1f}" for part, mib in now.items())
                print(f"{passed_s:5.0f} s  {log.stat().st_size // 4:>9,} requests  MiB resident: {parts}", flush=True)
            time.sleep(0.2)  # the interval between looks at memory
        load.wait(1)
    with GrpcReceiver(collector) as receiver:
        wait_until(lambda: look() is not None and bool(receiver.requests), "the first message to the collector", 60)
        agent.stop()
    nginx.stop()
    logged = log.stat().st_size // 4  # a line has a status and its end
    counts = re.search(r"received (\d+), exported (\d+), lost (\d+)(?: \((.*)\))?", agent.stderr())
    assert counts, agent.stderr()
    received, exported, lost = (int(number) for number in counts.groups()[:3])
    delivered, traces = len(receiver.trace_ids), len(set(receiver.trace_ids))
    print(agent.stderr().splitlines()[-1])
    print(f"highest MiB resident: {', '.join(f'{part} {mib:.1f}' for part, mib in most.items())}")
    checks = {
        f"nginx logged every request: {logged:,} of {2 * requests:,}": logged == 2 * requests,
        f"logged = exported + lost: {logged:,} = {exported:,} + {lost:,}": logged == exported + lost,
        f"each trace delivered once: {delivered:,}, {traces:,}": delivered == traces == exported,
        f"received no more than logged: {received:,}": received <= logged,
        "some requests had to be dropped": lost > 0,
        f"emitter within {queue_mib} + {BESIDE_THE_QUEUE_MIB} MiB": most["emitter"] < queue_mib + BESIDE_THE_QUEUE_MIB,
        f"nginx's error log: {nginx.problems()}": nginx.problems() == [],
    }
    for check, holds in checks.items():
        print(f"{'ok  ' if holds else 'FAIL'} {check}")
    return all(checks.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rate", type=int, default=5000, help="requests a second, half of them proxied")
    parser.add_argument("--queue-mib", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="otel-nginx-") as name:
        Path(name).chmod(0o755)
        sys.exit(not soak(options.minutes, options.rate, options.queue_mib, Path(name)))


if __name__ == "__main__":
    main()
