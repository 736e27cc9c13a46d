"""Which attempts to attach are repeated, and with which processes."""

import subprocess
import time
from collections.abc import Iterator

import pytest

from otel_nginx_ebpf.errors import TemporaryError, UserError
from otel_nginx_ebpf.nginx.processes import Instance, file_identity, is_brief
from otel_nginx_ebpf.supervisor import attaching
from otel_nginx_ebpf.supervisor.attaching import Attaching


class Processes:
    """Of one program, which is no nginx."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self) -> Instance:
        process = subprocess.Popen(["sleep", "60"])
        self._started.append(process)
        return Instance((process.pid,), file_identity(process.pid))

    def end(self, instance: Instance) -> None:
        (process,) = (each for each in self._started if each.pid == instance.master_pid)
        process.kill()
        process.wait()

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()


@pytest.fixture
def processes() -> Iterator[Processes]:
    found = Processes()
    yield found
    found.close()


class Attempts:
    """What was tried, by masters; each `failures` is raised once."""

    def __init__(self, *failures: Exception) -> None:
        self.made: list[list[int]] = []
        self.at_s: list[float] = []
        self._failures = list(failures)

    def __call__(self, instances: tuple[Instance, ...]) -> str:
        self.made.append([instance.master_pid for instance in instances])
        self.at_s.append(time.monotonic())
        if self._failures:
            raise self._failures.pop(0)
        return "attached"


def outcome(subject: Attaching[str], seconds: float = 10) -> str | UserError:
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        for _, found in subject.ended():
            return found
        time.sleep(0.01)
    raise TimeoutError("nothing came of it")


def test_another_process_where_the_first_has_ended(processes: Processes) -> None:
    ended, running = processes.start(), processes.start()

    def attach(instances: tuple[Instance, ...]) -> str:
        if ended in instances:
            processes.end(ended)
            raise TemporaryError("No such file or directory")
        assert instances == (running,)
        return "attached"

    subject = Attaching(attach)
    assert subject.attempt((ended, running)).result() == "attached"
    subject.end()


def test_what_may_pass_is_tried_again_and_told_once(processes: Processes, caplog: pytest.LogCaptureFixture) -> None:
    attempts = Attempts(TemporaryError("busy"), TemporaryError("busy still"))
    subject = Attaching(attempts)
    instance = processes.start()
    subject.want(instance)
    later = processes.start()
    subject.want(later)
    assert outcome(subject) == "attached"
    both = [instance.master_pid, later.master_pid]
    assert attempts.made == [[instance.master_pid], both, both]
    first_s, second_s = attempts.at_s[1] - attempts.at_s[0], attempts.at_s[2] - attempts.at_s[1]
    assert 1 <= first_s < second_s
    assert second_s >= 2
    assert [record.message for record in caplog.records] == ["not traced yet: busy; trying again"]
    assert not subject
    subject.end()


def test_what_cannot_change_is_not_tried_again(processes: Processes) -> None:
    subject = Attaching(Attempts(UserError("no symbols")))
    subject.want(processes.start())
    assert str(outcome(subject)) == "no symbols"
    assert not subject
    subject.end()


def test_the_next_process_of_the_binary(processes: Processes, caplog: pytest.LogCaptureFixture) -> None:
    """It comes while nothing runs any more; nobody needs to know of the first."""
    brief = processes.start()

    def attach(instances: tuple[Instance, ...]) -> str:
        if brief in instances:
            processes.end(brief)
            raise TemporaryError("No such file or directory")
        return "attached"

    subject = Attaching(attach)
    subject.want(brief)
    while brief.is_running:
        time.sleep(0.01)
    assert list(subject.ended()) == []
    subject.want(processes.start())
    assert outcome(subject) == "attached"
    assert caplog.records == []
    subject.end()


def test_what_has_ended_for_good_is_forgotten(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attaching, "_RETRY_FIRST_S", 0.0)
    attempts = Attempts(TemporaryError("No such file or directory"))
    subject = Attaching(attempts)
    instance = processes.start()
    subject.want(instance)
    while not attempts.made:
        time.sleep(0.01)
    processes.end(instance)
    deadline_s = time.monotonic() + 10
    while subject and time.monotonic() < deadline_s:
        assert list(subject.ended()) == []
    assert not subject
    assert len(attempts.made) == 1
    subject.end()


@pytest.mark.parametrize(
    ("command", "brief"),
    [
        ("nginx", False),
        ("nginx -p /srv -c nginx.conf", False),
        ("nginx -g daemon;on; -q", False),
        ("nginx -p -t", False),
        ("nginx -t", True),
        ("nginx -t -q -g daemon;", True),
        ("nginx -qt", True),
        ("nginx -c /etc/nginx.conf -s reload", True),
        ("nginx -c/etc/t.conf", False),
        ("nginx -V", True),
    ],
)
def test_nginx_that_serves_nothing(command: str, brief: bool) -> None:
    assert is_brief(command.split()) is brief
