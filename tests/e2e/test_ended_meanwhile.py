"""A process that ends before the program has attached to it: another process of its binary is traced.

That process may run already, or start later.
"""

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil

from e2e.nginx_server import wait_until
from e2e.private_nginx import PrivateNginx, StartAgent, wait_for_paths, wait_for_ready_lines


def loader_of(nginx: PrivateNginx) -> bool:
    """Whether an agent that was told of this binary is about to attach to it."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any("otel_nginx_ebpf.kernel.loader" in part for part in process.cmdline()):
                parent = process.parent()
                if parent and str(nginx.binary) in parent.cmdline():
                    return True
    return False


def test_the_nginx_chosen_for_attaching_ends_meanwhile(make_nginx: type[PrivateNginx], start_agent: StartAgent) -> None:
    """Another that runs the same binary takes its place."""
    chosen = make_nginx("chosen")
    other = make_nginx("other", chosen.binary)
    chosen.start()
    other.start()
    with ThreadPoolExecutor(1) as starter:
        started = starter.submit(start_agent, "--binary", chosen.binary)
        wait_until(lambda: loader_of(chosen), "the loader", 20)
        chosen.stop()
        agent = started.result()
    other.get("/other")
    wait_for_paths(agent, "/other")
    agent.stop()
    assert "cannot attach" not in agent.stderr()


def test_all_that_was_found_ends_meanwhile(make_nginx: type[PrivateNginx], start_agent: StartAgent) -> None:
    """As where a service is restarted: by the first look, and by a later one. The next is traced."""
    early, late = make_nginx("early"), make_nginx("late")
    early.start()
    with ThreadPoolExecutor(1) as starter:
        started = starter.submit(start_agent, "--binary", early.binary, "--binary", late.binary)
        wait_until(lambda: loader_of(early), "the loader", 20)
        early.stop()
        early.start()
        agent = started.result()
    late.start()
    wait_until(lambda: loader_of(late), "the loader", 20)
    late.stop()
    late.start()
    wait_for_ready_lines(agent, 2)
    early.get("/early")
    late.get("/late")
    wait_for_paths(agent, "/early", "/late")
    agent.stop()
    assert agent.stderr().count("every nginx that was found has ended; waiting for another") == 1
    assert "not traced" not in agent.stderr()


def test_nginx_that_only_tests_its_configuration(make_nginx: type[PrivateNginx], start_agent: StartAgent) -> None:
    """Debian's unit runs one before each start. It is nothing to trace, and in no one's way."""
    traced, tested = make_nginx("traced"), make_nginx("tested")
    traced.start()
    agent = start_agent("--binary", traced.binary, "--binary", tested.binary)
    test = [tested.binary, "-t", "-q", "-p", tested.server.prefix, "-c", "nginx.conf"]
    end_s = time.monotonic() + 3
    while time.monotonic() < end_s:
        subprocess.run(test, check=True)
    tested.start()
    wait_for_ready_lines(agent, 2)
    tested.get("/tested")
    wait_for_paths(agent, "/tested")
    agent.stop()
    assert "not traced" not in agent.stderr()
