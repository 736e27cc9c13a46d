"""Ctrl-C at any moment of the start: the program ends at once, without a traceback."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).with_name("otel-nginx-ebpf")

# Says that it is being imported, and takes its time.
SLOW = "import os, time; os.write(2, b'importing'); time.sleep(60)"


@pytest.mark.parametrize(
    ("module", "command", "code"),
    [
        ("typer", ("run", "--pid", "1"), -signal.SIGINT),
        ("pydantic_settings", ("replay", "none.capture"), -signal.SIGINT),
        ("psutil", ("run", "--pid", "1"), 130),
        ("opentelemetry", ("replay", "none.capture"), 130),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_ctrl_c_while_a_module_is_imported(module: str, command: tuple[str, ...], code: int, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text(SLOW)
    terminal, end = pty.openpty()
    with subprocess.Popen(
        [PROGRAM, *command],
        stdin=end,
        stdout=end,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(end, termios.TIOCSCTTY, 0),  # its Ctrl-C is for this program
    ) as process:
        os.close(end)
        assert process.stderr
        try:
            assert process.stderr.read(9) == b"importing"
            os.write(terminal, b"\x03")
            _, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
            os.close(terminal)
    assert (process.returncode, stderr) == (code, b"")
