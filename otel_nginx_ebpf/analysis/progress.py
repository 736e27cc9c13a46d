"""Shows on the terminal how much of a long file has been read."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from otel_nginx_ebpf.traces.capture import FRAME_BYTES, Frame

_FRAMES_AT_ONCE = 1000


def with_progress(frames: Iterable[Frame], path: Path) -> Iterator[Frame]:
    """Yields the frames of a capture file unchanged, and shows a progress bar if stderr is a terminal.

    The bar disappears at the end.
    """
    if not sys.stderr.isatty():
        yield from frames
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=path.stat().st_size)
        read_bytes = 0
        for number, frame in enumerate(frames):
            yield frame
            read_bytes += FRAME_BYTES + len(frame.raw)
            if number % _FRAMES_AT_ONCE == 0:
                progress.update(task, completed=read_bytes)
