"""Writes traces as text to stdout or a file, each trace at once."""

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.traces.model import Trace


class TextExporter:
    """Writes the text that `render` returns for a trace, which includes line ends."""

    def __init__(self, stream: TextIO, stats: Stats, render: Callable[[Trace], str]) -> None:
        self._stream = stream
        self._stats = stats
        self._render = render

    def export(self, trace: Trace) -> None:
        try:
            self._stream.write(self._render(trace))
            self._stream.flush()
        except BrokenPipeError:
            self._stats.lose("lost_output_closed")
            raise
        except OSError as error:
            self._stats.lose("lost_output_failed")
            name = getattr(self._stream, "name", "output")
            raise UserError(f"cannot write to {name}: {error.strerror}; stopping") from error
        self._stats.exported += 1

    def shutdown(self, timeout_s: float) -> None:
        if self._stream is not sys.stdout:
            with contextlib.suppress(OSError):  # closing repeats a failed write, which was reported already
                self._stream.close()


def open_output(descriptor: int | None = None, path: Path | None = None) -> TextIO:
    """Returns stdout, or the file that is open as `descriptor`. Messages call the file `path`."""
    if descriptor is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Without this, a character that the terminal's encoding lacks would end the program with a traceback.
            sys.stdout.reconfigure(errors="backslashreplace")
        return sys.stdout
    return open(
        path or descriptor, "a", encoding="utf-8", errors="backslashreplace", opener=lambda name, flags: descriptor
    )
