"""Compares the log lines on traces with nginx's error log itself."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from e2e.agent_process import Trace
from e2e.nginx_server import LogLine

LEVELS = ("emerg", "alert", "crit", "error", "warn", "notice", "info")
_BYTES_MAX = 2048
"""nginx cuts lines, with their line end."""
_HEAD = re.compile(rb"^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d \[(\w+)\] (\d+)#\d+: (?:\*(\d+) )?", re.MULTILINE)


@dataclass(frozen=True)
class ErrorLine:
    """A line that nginx logged for a request."""

    level: str
    pid: str
    connection: int
    message: str
    request: str | None
    """The request line; its beginning, or `None`, if nginx cut the line."""


def error_lines(error_log: Path) -> list[ErrorLine]:
    """Read the lines for requests: they name a request line, unless they are cut. A line may contain line ends."""
    text = error_log.read_bytes() if error_log.exists() else b""
    heads = list(_HEAD.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    lines = []
    for head, end in zip(heads, ends, strict=True):
        rest = text[head.end() : end].decode("utf-8", "backslashreplace").removesuffix("\n")
        message, client, added = rest.partition(", client: ")
        request = re.search(
            r', request: "(.*?)(?:"(?:, subrequest: |, upstream: |, host: |, referrer: |$)|$)', added, re.DOTALL
        )
        cut = end - head.start() == _BYTES_MAX
        if head[3] and ((client and request) or cut):
            level, pid = head[1].decode(), head[2].decode()
            lines.append(ErrorLine(level, pid, int(head[3]), message, request[1] if request else None))
    return lines


Told = tuple[str, str, int, str, str]


def differences(
    error_log: Path, access_lines: Iterable[LogLine], traces: Iterable[Trace], environment: Mapping[str, str]
) -> tuple[list[Told], list[Told]]:
    """Return the lines that no trace has, and the lines on traces that nginx did not log for that request.

    Level, worker, connection, message and request line must be equal. Each line counts once.
    """
    level = environment.get("OTEL_NGINX_EBPF_LOG_LEVEL", "warn")
    wanted = LEVELS[: LEVELS.index(level) + 1] if level != "none" else ()
    if environment.get("OTEL_NGINX_EBPF_DETAIL") == "request":
        wanted = ()
    requests = {
        (line["pid"], int(line["connection"]), int(line["connection_requests"])): line["request"]
        for line in access_lines
    }
    of_connection: dict[tuple[str, int], list[str]] = {}
    for (pid, connection, _), request in requests.items():
        of_connection.setdefault((pid, connection), []).append(request)
    logged: Counter[Told] = Counter()
    for line in error_lines(error_log):
        named = line.request or ""
        whole = [each for each in of_connection.get((line.pid, line.connection), ()) if each.startswith(named)]
        if line.level in wanted and (whole or line.request is not None):
            logged[line.level, line.pid, line.connection, line.message, min(whole, key=len, default=named)] += 1
    traced: Counter[Told] = Counter()
    for trace in traces:
        attributes = trace.server.attributes
        pid, connection = str(attributes["nginx.worker.pid"]), attributes["nginx.connection.id"]
        request = requests.get((pid, connection, attributes["nginx.connection.requests"]), "")
        for event in (event for span in trace.spans for event in span.events):
            told = event.attributes
            traced[told["log.severity"], pid, connection, told["nginx.error.message"], request] += 1
    return sorted((logged - traced).elements()), sorted((traced - logged).elements())
