"""Runs a real terminal in tmux, and reads its screen."""

import re
import subprocess
from pathlib import Path

from e2e.nginx_server import wait_until

SIZE = (200, 40)


class Terminal:
    """A shell in a terminal of its own."""

    def __init__(self, directory: Path, shell: str = "bash --norc --noprofile") -> None:
        self._tmux = ["tmux", "-S", str(directory / "tmux"), "-f", "/dev/null"]
        width, height = map(str, SIZE)
        subprocess.run([*self._tmux, "new-session", "-d", "-x", width, "-y", height, shell], check=True)

    def _do(self, *arguments: str) -> str:
        return subprocess.run([*self._tmux, *arguments], check=True, capture_output=True, text=True).stdout

    def type(self, *keys: str) -> None:
        self._do("send-keys", *keys)

    def resize(self, columns: int, lines: int) -> None:
        self._do("resize-window", "-x", str(columns), "-y", str(lines))

    @property
    def shell_pid(self) -> int:
        return int(self._do("display-message", "-p", "#{pane_pid}"))

    @property
    def lines(self) -> list[str]:
        return self._do("capture-pane", "-p").splitlines()

    def wait_for(self, text: str, seconds: float = 15) -> list[str]:
        """Wait until the screen matches `text`, a regular expression; return the screen."""
        wait_until(
            lambda: re.search(text, "\n".join(self.lines), re.MULTILINE) is not None, f"{text!r} on the screen", seconds
        )
        return self.lines

    def close(self) -> None:
        self._do("kill-server")
