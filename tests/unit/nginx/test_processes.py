"""Which processes are nginx or a fork of nginx, by their titles and by the names of their executables."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from otel_nginx_ebpf.nginx.processes import Watch, is_master

SLEEP = Path("/bin/sleep")


@contextmanager
def running(executable: Path, title: str) -> Iterator[int]:
    process = subprocess.Popen([title, "60"], executable=executable)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def found(pid: int) -> bool:
    return any(instance.master_pid == pid for instance in Watch().new_instances())


@pytest.mark.parametrize(
    ("title", "master"),
    [
        ("nginx: master process /usr/sbin/nginx", True),
        ("nginx: worker process", False),
        ("angie: master process v1.12.1 #1 [/usr/sbin/angie -c /etc/angie/angie.conf]", True),
        ("angie: worker process #1", False),
    ],
)
def test_nginx_and_angie_are_found_by_their_titles(title: str, master: bool) -> None:
    with running(SLEEP, title) as pid:
        assert found(pid)
        assert is_master(pid) == master


@pytest.mark.parametrize("name", ["angie", "freenginx", "nginx", "openresty", "tengine"])
def test_a_single_process_is_found_by_its_executable_s_name(tmp_path: Path, name: str) -> None:
    executable = tmp_path / name
    shutil.copy(SLEEP, executable)
    with running(executable, "anything") as pid:
        assert found(pid)
        assert not is_master(pid)


def test_others_are_not() -> None:
    with running(SLEEP, "angiex: worker process") as pid:
        assert not found(pid)
    assert not found(os.getpid())
