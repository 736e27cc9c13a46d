"""The program as a user starts it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from otel_nginx_ebpf import __version__, cli
from otel_nginx_ebpf.settings import sources
from otel_nginx_ebpf.traces.capture import CaptureWriter
from unit.otlp_receiver import GrpcReceiver, HttpReceiver
from unit.sample_traces import MONO_NS, RETRIED, STATIC, UNIX_OFFSET_NS

PROGRAM = Path(sys.executable).with_name("otel-nginx-ebpf")


def start(*arguments: str | Path, **variables: str) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "NO_COLOR"))}
    return subprocess.Popen(
        [PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "COLUMNS": "100", **variables},
    )


def run(*arguments: str | Path, **variables: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with start(*arguments, **variables) as process:
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, out, err


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    path = tmp_path / "day.capture"
    with CaptureWriter(path, {}) as writer:
        writer.append(UNIX_OFFSET_NS, STATIC)
        writer.append(UNIX_OFFSET_NS, RETRIED)
    return path


def test_version() -> None:
    assert run("--version") == (0, f"otel-nginx-ebpf {__version__}\n", "")


@pytest.mark.parametrize("command", ["run", "record", "replay"])
def test_help_names_every_option_s_variable(command: str) -> None:
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    # record's --output is its own: the capture file.
    names = [name for name in sources.SettingsSource.model_fields if (command, name) != ("record", "output")]
    shown = [name for name in names if f" {sources.flag(name)} " in out]
    assert len(shown) >= 4
    for name in shown:
        assert sources.variables(name)[0] in out


def test_help_of_run_has_every_setting() -> None:
    _, out, _ = run("run", "--help")
    missing = [name for name in sources.SettingsSource.model_fields if sources.flag(name) not in out]
    assert sorted(missing) == ["metrics_histograms", "otlp_logs_protocol", "sdk_disabled"], "standard variables only"


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        ("--logs", "--logs=error"),
        ("--logs error --propagate socket -x", "--logs=error --propagate=socket -x"),
        ("--logs off --propagate", "--logs=off --propagate=auto"),
        ("--logs day.capture", "--logs=error day.capture"),
        ("--logs=off error", "--logs=off error"),
        ("--logs --propagate --wait", "--logs=error --propagate=auto --wait"),
    ],
)
def test_options_that_may_stand_alone(given: str, whole: str) -> None:
    assert cli._with_values(given.split()) == whole.split()


def test_without_arguments_there_is_help_and_no_complaint() -> None:
    code, out, err = run()
    assert (code, err) == (2, "")
    assert "Examples:" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run", "--ring-buffer-mib", "3"], "must be a power of two from 1 to 256; it is '3'"),
        (["run", "--exporter", "jaeger"], "must be of otlp, console, line, json; it is 'jaeger'"),
        (["run", "--pid", "-5"], "--pid"),
        (["run", "--output", "x"], "needs exactly one of the exporters console, line and json"),
        (["run", "--config", "none.toml"], "none.toml is not a file"),
        (["run", "--frobnicate"], "No such option: --frobnicate"),
        (["frobnicate"], "No such command"),
        (["record"], "Missing option '-o'"),
        (["replay"], "Missing argument 'FILE'"),
        (["replay", "none.capture"], "none.capture: No such file"),
        (["replay", "none.capture", "--exporter", "line", "--output", "/none/x"], "/none/x: No such file"),
        (["replay", "/"], "cannot read the capture file /: Is a directory"),
        (["replay", "/dev/null"], "/dev/null is not a capture file of this version"),
        (["report", "none.capture", "-o", "x.html"], "none.capture: No such file"),
        (["report", "none.capture"], "Missing option '-o'"),
        (["top", "none.capture"], "none.capture: No such file"),
        (["top", "--sort", "beauty"], "'beauty' is not one of 'rate', 'errors'"),
        (["top", "--interval", "0"], "greater than or equal to 1"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(arguments: list[str], complaint: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("otel-nginx-ebpf: ")
    assert complaint in err
    assert err.count("\n") == 1


def test_a_wrong_variable_is_named() -> None:
    code, _, err = run("run", OTEL_EXPORTER_OTLP_PROTOCOL="http/json")
    assert code == 2
    assert err == (
        "otel-nginx-ebpf: --otlp-protocol (OTEL_EXPORTER_OTLP_PROTOCOL, otlp_protocol in the TOML file) "
        "must be grpc or http/protobuf; it is 'http/json'\n"
    )


def test_a_disabled_sdk_sends_nothing(capture: Path) -> None:
    code, _, err = run("replay", capture, OTEL_SDK_DISABLED="true")
    assert code == 2
    assert "OTEL_SDK_DISABLED" in err
    code, out, _ = run("replay", capture, "--exporter", "line", "--exporter", "otlp", OTEL_SDK_DISABLED="true")
    assert (code, out.count("\n")) == (0, 2)


def test_replay_as_json(capture: Path) -> None:
    code, out, err = run("replay", capture, "--exporter", "json", OTEL_SERVICE_NAME="edge")
    assert (code, err) == (0, "otel-nginx-ebpf: received 2, exported 2, lost 0\n")
    static, retried = map(json.loads, out.splitlines())
    assert static["resource"]["service.name"] == "edge"
    assert static["spans"][0]["kind"] == "SERVER"
    assert static["spans"][0]["start_unix_ns"] == MONO_NS + UNIX_OFFSET_NS + 40_000
    assert [span["name"] for span in retried["spans"]].count("upstream connect") == 2


def test_replay_as_lines_to_a_file(capture: Path, tmp_path: Path) -> None:
    output = tmp_path / "lines"
    for _ in range(2):
        assert run("replay", capture, "--exporter", "line", "--output", output)[:2] == (0, "")
    lines = output.read_text().splitlines()
    assert len(lines) == 4, "a second run must not destroy what the first wrote"
    assert lines[:2] == lines[2:]
    assert lines[0].startswith("1700000005000000000, 192.0.2.7:51234=>-, /index.html, 200, ")


def test_no_query_leaves_the_path(capture: Path) -> None:
    assert "/api/users?id=1, " in run("replay", capture, "--exporter", "line")[1]
    assert "/api/users, " in run("replay", capture, "--exporter", "line", "--no-query")[1]


def test_replay_as_waterfalls(capture: Path) -> None:
    code, out, _ = run("replay", capture, "--exporter", "console")
    assert code == 0
    assert "GET /api/users?id=1  200" in out
    assert "└─ downstream write" in out
    assert "\x1b" not in out
    assert "\x1b[" in run("replay", capture, "--exporter", "console", "--color", "always", TERM="xterm")[1]


@pytest.mark.parametrize(("protocol", "kind"), [("grpc", GrpcReceiver), ("http/protobuf", HttpReceiver)])
def test_replay_to_a_collector_and_the_terminal_at_once(
    capture: Path, protocol: str, kind: type[GrpcReceiver | HttpReceiver]
) -> None:
    with kind() as receiver:
        code, out, err = run(
            *("replay", capture, "--exporter", "line", "--exporter", "otlp"),
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{receiver.port}",
            OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
        )
    assert (code, err) == (0, "otel-nginx-ebpf: received 2, exported 2, lost 0\n")
    assert out.count("\n") == 2
    assert len(receiver.trace_ids) == 2


def test_a_damaged_file_is_exported_up_to_the_damage(capture: Path) -> None:
    raw = bytearray(capture.read_bytes())
    raw[-1] ^= 1
    capture.write_bytes(raw)
    code, out, err = run("replay", capture, "--exporter", "line")
    assert (code, out.count("\n")) == (1, 1)
    damage, counts = err.splitlines()
    assert f"{capture}: damaged at byte " in damage
    assert counts == "otel-nginx-ebpf: received 1, exported 1, lost 0"


def test_a_reader_that_goes_away_ends_it_cleanly(tmp_path: Path) -> None:
    path = tmp_path / "day.capture"
    with CaptureWriter(path, {}) as writer:
        for _ in range(1000):
            writer.append(UNIX_OFFSET_NS, RETRIED)
    with start("replay", path, "--exporter", "json") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("{")
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(30) == 0
    assert "lost_output_closed 1" in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_replay_says_what_was_lost(capture: Path, number: signal.Signals) -> None:
    with GrpcReceiver() as gone:
        pass
    process = start(
        *("replay", capture, "--queue-size", "3", "--grace-seconds", "0.1"),
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{gone.port}",
    )
    assert process.stderr is not None
    try:
        assert "collector: " in process.stderr.readline()
        process.send_signal(number)
        _, rest = process.communicate(timeout=15)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert rest.splitlines()[-1].endswith("exported 0, lost 1 (lost_export_failed 1)")


def test_top_of_a_file(capture: Path) -> None:
    code, out, err = run("top", capture, "--sort", "wait")
    assert (code, err) == (0, "otel-nginx-ebpf: received 2, exported 2, lost 0\n")
    assert out.startswith(" p95 of the file: 2 requests in 0.0 s\n"), "$COLUMNS is 100"
    assert re.search(r"^ \(all\) +2 ", out, re.MULTILINE)
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("/dev/full", "cannot write /dev/full: No space left on device"),
        ("/", "cannot write /: Is a directory"),
        ("/none/x.html", "cannot write /none/x.html: No such file or directory"),
        ("", "is the capture file itself"),
    ],
)
def test_a_page_that_cannot_be_written(capture: Path, page: str, complaint: str) -> None:
    before = capture.read_bytes()
    code, out, err = run("report", capture, "-o", page or capture)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert complaint in err
    assert capture.read_bytes() == before


def test_a_page_of_all_before_the_damage(capture: Path, tmp_path: Path) -> None:
    raw = bytearray(capture.read_bytes())
    raw[-1] ^= 1
    capture.write_bytes(raw)
    page = tmp_path / "page.html"
    code, _, err = run("report", capture, "-o", page)
    assert (code, err.count("\n")) == (1, 1)
    assert f"{capture}: damaged at byte " in err
    assert f"{capture}: damaged at byte " in page.read_text()
    assert '<dd id="requests">1</dd>' in page.read_text()
    assert page.stat().st_mode & 0o077 == 0
