"""Describes a request and everything known about it, for a person. Times are milliseconds since the trace's start."""

from dataclasses import asdict
from typing import Any

from e2e.agent_process import Span
from e2e.nginx_server import LogLine

from truth.actions import Ask
from truth.judge import Case

# The log line below has these, too, or they are the same in every trace.
LEFT_OUT = {
    *("url.scheme", "url.path", "url.query", "http.route", "network.protocol.version", "http.request.method"),
    *("server.address", "server.port", "client.address", "client.port", "user_agent.original", "error.type"),
    *("nginx.worker.pid", "nginx.connection.id", "nginx.connection.requests", "nginx.upstream.name"),
}
LOGGED_LEFT_OUT = {"msec", "pid", "remote_addr", "host", "http_user_agent", "upstream_cache_status"}


def describe(case: Case, violation: str) -> str:
    begin_ns = case.trace.server.start_unix_ns

    def since(at_ns: int | None) -> str:
        return "never" if at_ns is None else f"{(at_ns - begin_ns) / 1e6:.1f}"

    lines = [violation, *(_line(span, begin_ns) for span in case.trace.spans)]
    logged_ns = round(float(case.log["msec"]) * 1000) * 1_000_000
    lines.append(f"  logged {since(logged_ns)} (lag allowed {case.lag_ms:.0f} ms): {_short(case.log)}")
    if each := case.known:
        lines.append(
            f"  client sent {since(each.sent_ns)}, all {since(each.all_sent_ns)}, first {since(each.first_byte_ns)},"
            f" last {since(each.last_byte_ns)}, left {since(each.left_ns)}, status {each.status},"
            f" {each.received_bytes} bytes {each.problem} {'shared' if each.shared else ''}: {_ask(each.ask)}"
        )
    lines += [
        f"  upstream {each.address} {each.sub} accepted {since(each.accepted_ns)}, first {since(each.first_byte_ns)},"
        f" sent {since(each.first_sent_ns)} … {since(each.last_sent_ns)}, over {since(each.over_ns)},"
        f" {each.received_bytes} in, {each.sent_bytes} out, number {each.number}{', kept' if each.kept else ''}"
        for each in case.seen
    ]
    lines += [f"  subrequest {_short(line)}" for line in case.subrequests]
    return "\n".join(lines)


def _line(span: Span, begin_ns: int) -> str:
    start_ms, end_ms = ((at_ns - begin_ns) / 1e6 for at_ns in (span.start_unix_ns, span.end_unix_ns))
    kept = {
        name.removeprefix("nginx.").removeprefix("upstream."): value
        for name, value in span.attributes.items()
        if name not in LEFT_OUT
    }
    told = " ".join(f"{name}={value}" for name, value in kept.items())
    return f"  {start_ms:10.3f} … {end_ms:10.3f} {span.name} {span.error or ''} {told}"


def _short(line: LogLine) -> str:
    return " ".join(
        f"{name.removeprefix('upstream_')}={value}"
        for name, value in line.items()
        if value and name not in LOGGED_LEFT_OUT
    )


def _ask(ask: Ask) -> dict[str, Any]:
    """Return the fields that differ from their defaults."""
    usual = asdict(Ask("", "", ""))
    return {name: value for name, value in asdict(ask).items() if value != usual[name] and name not in ("id", "prefix")}
