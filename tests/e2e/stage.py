"""Provides the stage of a scenario: its own nginx server and access log, its clients, its traces."""

import re
import shutil
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import pytest

from e2e.agent_process import EMPTY, AgentProcess, Trace
from e2e.error_lines import differences
from e2e.http1_client import Address, Http1Connection, Response
from e2e.nginx_server import BUILD, PATIENCE, AccessLog, LogLine, NginxServer, wait_until
from e2e.oracle import check_facts
from e2e.scenario import Scenario
from e2e.timing import NO_SLACK, Lags, Slack, check_times

FILES = {"hello.txt": b"Hello, file!\n", "page.html": b"<p>repeat</p>\n" * 2000, "index.html": b"index\n"}
LARGE_BYTES = 100 * 1024 * 1024


class Site:
    """Runs nginx with a server for each scenario, and the agent attached to it."""

    def __init__(
        self,
        prefix: Path,
        scenarios: list[Scenario],
        upstreams: dict[str, str],
        workers: int = 1,
        http: str = "",
        main: str = "",
        environment: Mapping[str, str] = EMPTY,
        connections: int = 1024,
    ) -> None:
        self.prefix = prefix
        self._environment = environment
        self.upstreams = upstreams
        html = prefix / "html"
        html.mkdir(parents=True)
        for name, content in FILES.items():
            (html / name).write_bytes(content)
        with (html / "large.bin").open("wb") as large:
            large.truncate(LARGE_BYTES)
        certificates = prefix.parent
        words = {
            "UP": upstreams["ipv4"],
            "OTHER": upstreams["other"],
            "UP6": upstreams["ipv6"],
            "UP_UNIX": upstreams["unix"],
            "UP_TLS": upstreams["tls"],
            "DEAD1": upstreams["dead1"],
            "DEAD2": upstreams["dead2"],
            "DEAF": upstreams["deaf"],
            "PREFIX": str(prefix),
            "HTML": str(html),
            "CERTIFICATE": str(certificates / "certificate.pem"),
            "KEY": str(certificates / "key.pem"),
            **{kind.upper(): address for kind, address in upstreams.items()},
        }
        texts = {each.name: (each.http_text(words), each.main_text(words)) for each in scenarios}
        self.nginx = NginxServer(prefix, http, workers, connections=connections)
        self._impossible = self._lacking(http, texts) if BUILD else {}
        """What this build of nginx lacks, in its words, by the scenario that needs it."""
        scenarios = [each for each in scenarios if each.name not in self._impossible]
        self._scenarios = {each.name: each for each in scenarios}
        possible = [texts[name] for name in self._scenarios]
        self.nginx.configure(
            "\n".join([http, *(text for text, _ in possible)]), "\n".join([main, *(text for _, text in possible)])
        )
        self.logs = {each.name: AccessLog(prefix / "logs" / f"{each.identifier}.log") for each in scenarios}
        self.losses_max = 0
        """How many requests may be lost, because a scenario makes nginx lose them without a log line."""
        self.unlogged: set[str] = set()
        """Workers that were killed. Each may have one trace without a log line, if it died just before it logged."""
        self.expected_problems: list[str] = []
        """Text of each [alert], [crit] or [emerg] line that a scenario causes on purpose."""

    def _lacking(self, http: str, texts: Mapping[str, tuple[str, str]]) -> dict[str, str]:
        lacking = {}
        for name, (text, main) in texts.items():
            self.nginx.configure(f"{http}\n{text}", main)
            if lacks := self.nginx.lacks():
                lacking[name] = lacks
        return lacking

    def __enter__(self) -> "Site":
        if self._impossible and not self._scenarios:
            shutil.rmtree(self.prefix)
            pytest.skip(cannot(next(iter(self._impossible.values()))))
        self.nginx.start([address for each in self._scenarios.values() for address in each.addresses.values()])
        try:
            self.agent = AgentProcess(self.nginx.pid, self.prefix, environment=self._environment)
        except BaseException:
            self.nginx.stop()
            raise
        self._stopped = False
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.stop_agent()
        finally:
            self.nginx.stop()
        shutil.rmtree(self.prefix)

    def stop_agent(self) -> None:
        if not self._stopped:
            self._stopped = True
            self.agent.stop()

    def stage(self, name: str) -> "Stage":
        """Return the stage of a scenario. Skip the test if this build of nginx cannot run it."""
        if name in self._impossible:
            pytest.skip(cannot(self._impossible[name]))
        return Stage(self, self._scenarios[name].addresses, self.logs[name])

    def finish(self) -> None:
        """Stop the agent; check that it wrote one trace for each line of every log, and lost nothing."""
        self.stop_agent()
        logged = sorted(key_of_log(line) for log in self.logs.values() for line in log.poll())
        traced = sorted(key_of_trace(trace) for trace in self.agent.traces)
        missing, surplus = set(logged) - set(traced), set(traced) - set(logged)
        interrupted = {key for key in surplus if key[2] in self.unlogged}
        assert not missing, f"log lines without a trace: {missing}"
        assert surplus == interrupted, f"traces without a log line: {surplus - interrupted}"
        assert len({key[2] for key in interrupted}) == len(interrupted), f"traces without a log line: {interrupted}"
        expected = len(logged) + len(interrupted)
        assert len(traced) == expected, f"{len(traced)} traces for {len(logged)} log lines"
        counts = re.search(r"received (\d+), exported (\d+), lost (\d+)", self.agent.stderr())
        assert counts, f"no counts on stderr: {self.agent.stderr()}"
        received, exported, lost = map(int, counts.groups())
        assert (received, exported) == (expected, expected), self.agent.stderr()
        assert lost <= self.losses_max, self.agent.stderr()
        self._check_error_lines()
        problems, meant = self.nginx.problems(), self.expected_problems
        assert [line for line in problems if not any(text in line for text in meant)] == []
        assert [text for text in meant if not any(text in line for line in problems)] == []

    def _check_error_lines(self) -> None:
        """Check that every line of nginx's error log for a request is on its trace, once, and on no other."""
        access_lines = [line for log in self.logs.values() for line in log.lines]
        missing, surplus = differences(self.nginx.error_log, access_lines, self.agent.traces, self._environment)
        missing = [line for line in missing if line[1] not in self.unlogged]
        assert not surplus, f"lines on a trace that nginx did not log for it: {surplus}; without a trace: {missing}"
        counted = sum(map(int, re.findall(r"partial_log_lines_\w+ (\d+)", self.agent.stderr())))
        assert len(missing) == counted, f"{counted} log lines counted as missing, these are: {missing}"


def cannot(lacks: str) -> str:
    return f"this nginx cannot: {lacks}; `make matrix` has builds that can"


Key = tuple[int, int, str]


def key_of_log(log: LogLine) -> Key:
    return int(log["connection"]), int(log["connection_requests"]), log["pid"]


def key_of_trace(trace: Trace) -> Key:
    attributes = trace.server.attributes
    return (
        attributes["nginx.connection.id"],
        attributes["nginx.connection.requests"],
        str(attributes["nginx.worker.pid"]),
    )


@dataclass(frozen=True)
class Exchange:
    """A request: what nginx logged and what the agent traced."""

    log: LogLine
    trace: Trace


class Stage:
    def __init__(self, site: Site, addresses: dict[str, Address], log: AccessLog) -> None:
        self.site = site
        self.addresses = addresses
        self.lags = Lags()
        self.log = log
        self._off_processor_ms = site.nginx.off_processor_ms()
        self._connections: list[Http1Connection] = []

    def connect(
        self, kind: str = "ipv4", tls: ssl.SSLContext | None = None, receive_buffer_bytes: int | None = None
    ) -> Http1Connection:
        """Return a new client connection to the scenario's server. It closes with the scenario."""
        connection = Http1Connection(self.addresses[kind], tls, receive_buffer_bytes)
        self._connections.append(connection)
        return connection

    def get(
        self, target: str, method: str = "GET", headers: dict[str, str] | None = None, body: bytes = b""
    ) -> Response:
        """Make a request on a new connection."""
        with Http1Connection(self.addresses["ipv4"]) as connection:
            return connection.request(target, method, headers, body)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def lines(self, count: int, seconds: float = 10) -> list[LogLine]:
        """Wait for the scenario's log lines; check that there are exactly `count`."""
        wait_until(lambda: len(self.log.poll()) >= count, f"{count} log lines", seconds)
        assert len(self.log.lines) == count, f"{len(self.log.lines)} log lines, not {count}"
        return self.log.lines

    def exchanges(
        self, count: int, slack: Slack | Callable[[LogLine], Slack] = NO_SLACK, seconds: float = 10
    ) -> list[Exchange]:
        """Wait for the log lines and traces of `count` requests, and compare each trace with its line.

        Returns them in the log's order, which is the order in which requests end. `slack` may depend on the line.
        """
        return self.match(self.lines(count, seconds), self.site.agent.poll, slack, seconds)

    def match(
        self,
        lines: list[LogLine],
        poll: Callable[[], list[Trace]],
        slack: Slack | Callable[[LogLine], Slack] = NO_SLACK,
        seconds: float = 10,
    ) -> list[Exchange]:
        """Wait until `poll` has the trace of every line, and compare each trace with its line."""
        wanted = [key_of_log(line) for line in lines]
        assert len(set(wanted)) == len(wanted), "log lines share a connection and request number"
        by_key: dict[Key, Trace] = {}

        def all_traced() -> bool:
            by_key.update({key_of_trace(trace): trace for trace in poll()[len(by_key) :]})
            return by_key.keys() >= set(wanted)

        try:
            wait_until(all_traced, f"{len(lines)} traces", seconds)
        except TimeoutError:
            missing = [line for line in lines if key_of_log(line) not in by_key]
            raise AssertionError(f"{len(missing)} of {len(lines)} requests have no trace: {missing[0]}, …") from None
        exchanges = [Exchange(line, by_key[key]) for line, key in zip(lines, wanted, strict=True)]
        violations = []
        pauses_ms = max(0.0, self.site.nginx.off_processor_ms() - self._off_processor_ms)
        for each in exchanges:
            allowed = slack if isinstance(slack, Slack) else slack(each.log)
            allowed = replace(allowed, late_max_ms=allowed.late_max_ms * PATIENCE + pauses_ms)
            status = {} if allowed.client_status is None else {"status": str(allowed.client_status)}
            found = check_facts(each.trace, each.log | status)
            found += check_times(each.trace, each.log, self.lags, allowed)
            if found:
                violations.append(f"{found}\n  log {each.log}\n{_readable(each.trace)}")
        assert not violations, f"{len(violations)} of {len(lines)} are wrong:\n" + "\n".join(violations[:5])
        usual = slack if isinstance(slack, Slack) else NO_SLACK
        assert self.lags.check_medians(usual.median_max_ms) == []
        return exchanges

    def exchange(self, slack: Slack = NO_SLACK) -> Exchange:
        """Return the scenario's only request."""
        return self.exchanges(1, slack)[0]


def _readable(trace: Trace) -> str:
    start = trace.server.start_unix_ns
    return "\n".join(
        f"  {(span.start_unix_ns - start) / 1e6:10.3f} … {(span.end_unix_ns - start) / 1e6:10.3f} ms"
        f" {span.name} [{span.status} {span.error}] {span.attributes}"
        for span in trace.spans
    )
