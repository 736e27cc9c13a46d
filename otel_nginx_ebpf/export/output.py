"""Where the text exporters write: stdout or a file, every line at once."""

import io
import sys
from pathlib import Path
from typing import TextIO

from otel_nginx_ebpf.errors import UserError


class Output:
    """A text stream whose readers see each write at once, and whose lost reader is an error."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        """Raises OSError: nothing, or only a part, could be written."""
        self.stream.write(text)
        self.stream.flush()

    def close(self) -> None:
        if self.stream is not sys.stdout:
            self.stream.close()


def open_output(path: Path | None) -> Output:
    """stdout without a path, else the file, to whose end is written.

    Raises:
        UserError: The file cannot be opened for writing.
    """
    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal that is not UTF-8 gets escapes rather than a traceback.
            sys.stdout.reconfigure(errors="backslashreplace")
        return Output(sys.stdout)
    try:
        return Output(path.open("a", encoding="utf-8", errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"--output (OTEL_NGINX_EBPF_OUTPUT): {path}: {error.strerror}") from error
