"""A process that becomes another program, but stays the same process."""

import subprocess
import sys

import pytest

# More than a pipe holds.
MANY = 200_000


def become(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_the_work_its_arguments_and_its_result_cross_over() -> None:
    done = become(
        f"from otel_nginx_ebpf.process import entry; import operator; entry.become(operator.countOf, (7,) * {MANY}, 8)"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (
        become(
            "from otel_nginx_ebpf.process import entry; import operator; entry.become(operator.mul, 6, 7)"
        ).returncode
        == 42
    )


def test_it_is_the_same_process_without_what_was_imported() -> None:
    show = "import os, sys; print(os.getpid(), *sorted({'typer', 'pydantic'} & set(sys.modules)), flush=True)"
    done = become(
        f"from otel_nginx_ebpf import cli; from otel_nginx_ebpf.process import entry; {show};"
        f"entry.become(exec, {show!r})"
    )
    before, after = (line.split() for line in done.stdout.splitlines())
    assert before == [after[0], "pydantic", "typer"]
    assert after == before[:1]
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_that_comes_meanwhile_is_not_lost_and_kills_nobody() -> None:
    done = become(
        "import os, signal, time; from otel_nginx_ebpf.process import entry;"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); os.kill(os.getpid(), signal.SIGTERM);"
        "entry.become(time.sleep, 600)"
    )
    assert (done.returncode, done.stderr) == (130, "")


def test_a_mistake_of_the_user_s_is_told_in_one_line() -> None:
    done = become(
        "from pathlib import Path; from otel_nginx_ebpf import commands; from otel_nginx_ebpf.process import entry;"
        "from otel_nginx_ebpf.settings import sources;"
        "entry.become(commands.replay, sources.load({'exporter': 'line'}), Path('none.capture'))"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "otel-nginx-ebpf: cannot read the capture file none.capture: No such file or directory\n"


FOREIGN = {"bcc", "capstone", "elftools", "prometheus_client", "pydantic", "rich", "typer"}


@pytest.mark.parametrize(
    ("process", "has", "lacks"),
    [
        (
            "otel_nginx_ebpf.commands, otel_nginx_ebpf.supervisor.supervise",
            {"psutil"},
            {"grpc", "google", "requests", *FOREIGN},
        ),
        (
            "otel_nginx_ebpf.commands, otel_nginx_ebpf.emitter.deliver, otel_nginx_ebpf.emitter.loop, "
            "otel_nginx_ebpf.export.otlp.exporter, otel_nginx_ebpf.export.otlp.grpc",
            {"grpc"},
            FOREIGN,
        ),
    ],
)
def test_a_process_that_stays_imports_nothing_of_the_others(process: str, has: set[str], lacks: set[str]) -> None:
    done = become(f"import sys, {process};print(*sorted({{name.partition('.')[0] for name in sys.modules}}))")
    assert done.stderr == ""
    imported = set(done.stdout.split())
    assert has <= imported
    assert imported & lacks == set()
