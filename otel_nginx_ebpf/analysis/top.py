"""`top`: shows the requests of the last seconds as tables, live in a terminal, or as text once in each interval."""

import os
import re
import select
import signal
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from rich.console import Console, ConsoleDimensions, Group
from rich.text import Text

from otel_nginx_ebpf.analysis.tables import PERCENTILES, SORTS, View, screen
from otel_nginx_ebpf.analysis.tally import Tally
from otel_nginx_ebpf.analysis.terminal import last_kept_line
from otel_nginx_ebpf.errors import UserError
from otel_nginx_ebpf.export.console import make_console
from otel_nginx_ebpf.export.interface import Completed
from otel_nginx_ebpf.export.text import open_output
from otel_nginx_ebpf.metrics.stats import Stats
from otel_nginx_ebpf.printable import printable
from otel_nginx_ebpf.settings.model import Settings
from otel_nginx_ebpf.traces.losses import LOST, of_kind

PLAIN_WIDTH = 200
"""The columns of a table that goes to a file or a pipe, unless $COLUMNS says otherwise."""

_REDRAW_S = 1.0
_SLOTS = 10

_KEYS = "q quit  ←→ sort  p percentile  u peers  a all time  space pause  / filter"

# The escape sequence of an arrow or another key, or a single character.
_KEY = re.compile(r"\x1b[\[O][0-9;]*.|.", re.DOTALL)
_MOVES = {"\x1b[C": 1, "\x1bOC": 1, ">": 1, "\x1b[D": -1, "\x1bOD": -1, "<": -1}
_CTRL_C = "\x03"


class Recent:
    """The requests of the last seconds, and of all the time before."""

    def __init__(self, seconds: float, now_s: float) -> None:
        self._seconds = seconds
        self.start_s = now_s
        self._slots = deque([(now_s, Tally())])
        self._before = Tally()

    @property
    def newest(self) -> Tally:
        """The tally for requests that end now."""
        return self._slots[-1][1]

    def turn(self, now_s: float) -> None:
        """Moves requests that are too old out of the last seconds, a tenth of the time at once."""
        if now_s - self._slots[-1][0] >= self._seconds / _SLOTS:
            self._slots.append((now_s, Tally()))
        while len(self._slots) > 1 and now_s - self._slots[1][0] >= self._seconds:
            self._before.merge(self._slots.popleft()[1])

    def tally(self, now_s: float, *, all_time: bool = False) -> tuple[Tally, float]:
        """Returns the requests of the last seconds, or of all time, and the length of that time in seconds."""
        found = Tally()
        if all_time:
            found.merge(self._before)
        for _, tally in self._slots:
            found.merge(tally)
        return found, now_s - (self.start_s if all_time else self._slots[0][0])


class Controls:
    """The state that the keys change."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.all_time = False
        self.paused = False
        self.ended = False
        self.typing = False
        """The user is typing the filter."""

    def press(self, key: str) -> None:
        view = self.view
        if key == _CTRL_C:
            self.ended = True
        elif self.typing:
            if key in "\r\n":
                self.typing = False
            elif key in "\x7f\b":
                view.filter = view.filter[:-1]
            elif key.isprintable():
                view.filter += key
        elif key in _MOVES:
            view.sort = (view.sort + _MOVES[key]) % len(SORTS)
        elif key == "p":
            view.percentile = (view.percentile + 1) % len(PERCENTILES)
        elif key == "u":
            view.peers = not view.peers
        elif key == "a":
            self.all_time = not self.all_time
        elif key == " ":
            self.paused = not self.paused
        elif key == "/":
            self.typing, view.filter = True, ""
        elif key == "q":
            self.ended = True

    def footer(self) -> str:
        if self.typing:
            return f" show only: {self.view.filter}▏  (enter)"
        return f" {_KEYS}" + (f" [{self.view.filter}]" if self.view.filter else "")


class Terminal:
    """Takes the terminal, its alternate screen and its keys, until `close`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._restore = ExitStack()
        self._keys = sys.stdin.fileno() if os.isatty(sys.stdin.fileno()) else None
        if self._keys is not None:
            self._take_keys(self._keys)
        self._screen = self._restore.enter_context(console.screen())

    def _take_keys(self, terminal: int) -> None:
        # The terminal belongs to the process group that the user started. This process may be in another group.
        self._restore.callback(signal.signal, signal.SIGTTOU, signal.signal(signal.SIGTTOU, signal.SIG_IGN))
        self._restore.callback(os.tcsetpgrp, terminal, os.tcgetpgrp(terminal))
        os.tcsetpgrp(terminal, os.getpgrp())
        before = termios.tcgetattr(terminal)
        self._restore.callback(termios.tcsetattr, terminal, termios.TCSAFLUSH, before)
        tty.setcbreak(terminal)
        attributes = termios.tcgetattr(terminal)
        # Ctrl-C becomes a key. As a signal it would reach this process, not the one that detaches the probes.
        attributes[3] &= ~termios.ISIG
        termios.tcsetattr(terminal, termios.TCSANOW, attributes)

    def keys(self) -> list[str]:
        """Returns the keys that were pressed since the last call."""
        if self._keys is None or not select.select([self._keys], [], [], 0)[0]:
            return []
        return _KEY.findall(os.read(self._keys, 256).decode(errors="replace"))

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, as they are now. $COLUMNS may be out of date."""
        width, height = os.get_terminal_size(self._console.file.fileno())
        if width and height:
            self._console.size = ConsoleDimensions(width, height)
        return self._console.size

    def show(self, lines: Sequence[Text]) -> None:
        for line in lines:
            line.no_wrap, line.overflow = True, "crop"
        self._screen.update(Group(*lines))

    def close(self) -> None:
        with suppress(OSError, termios.error):  # the terminal is gone, so there is nothing to restore
            self._restore.close()


def print_tally(console: Console, title: str, tally: Tally, seconds: float, view: View) -> None:
    """Prints the tables as text, followed by an empty line.

    Raises:
        BrokenPipeError: The reader of the output is gone.
        UserError: The output cannot be written.
    """
    width = console.width if console.is_terminal or "COLUMNS" in os.environ else PLAIN_WIDTH
    lines = screen(title, tally, seconds, view, width, bar=console.color_system is not None)
    try:
        # Render first, write later: on a broken pipe rich itself would end the program.
        with console.capture() as capture:
            console.print(*lines, "", sep="\n", overflow="ignore", no_wrap=True, crop=False)
        console.file.write(capture.get())
        console.file.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"cannot write to {console.file.name}: {error.strerror}; stopping") from error


class Totals:
    """An exporter that prints the tables of all requests at the end."""

    at_once = 1024

    def __init__(self, settings: Settings, stats: Stats) -> None:
        assert settings.top is not None
        self._stats = stats
        self._console = make_console(open_output(None), settings.color)
        self._view = View(SORTS.index(settings.top.sort))
        self._tally = Tally()
        self._start_unix_ns, self._end_unix_ns = 2**63, 0

    def take(self, completed: Sequence[Completed]) -> None:
        for request, unix_offset_ns, _ in completed:
            end_unix_ns = request.ended_mono_ns + unix_offset_ns
            length_ns = self._tally.add(request)
            self._end_unix_ns = max(self._end_unix_ns, end_unix_ns)
            self._start_unix_ns = min(self._start_unix_ns, end_unix_ns - length_ns)
        self._stats.exported += len(completed)

    def shutdown(self, timeout_s: float) -> None:
        if not self._tally.locations:
            return
        seconds = max(self._end_unix_ns - self._start_unix_ns, 0) / 1e9
        with suppress(BrokenPipeError):
            print_tally(self._console, "the file", self._tally, seconds, self._view)


class Top:
    """An exporter to the terminal. It redraws when `take` is called, even without requests."""

    at_once = 256

    def __init__(self, settings: Settings, stats: Stats) -> None:
        assert settings.top is not None
        self._stats = stats
        self._interval_s = settings.top.interval_s
        self._once = settings.top.once
        stream = open_output()
        self._console = make_console(stream, settings.color)
        self._live = stream.isatty() and not self._once
        if self._live and not self._console.is_terminal:
            # The user wants no colours, but a terminal can still show a screen.
            self._console = Console(file=stream, force_terminal=True, color_system=None, highlight=False)
        self._controls = Controls(View(SORTS.index(settings.top.sort)))
        self._recent: Recent | None = None
        self._terminal: Terminal | None = None
        self._shown: tuple[Tally, float] = Tally(), 0.0
        self._drawn_s, self._drawn_size = 0.0, (0, 0)

    def take(self, completed: Sequence[Completed]) -> None:
        """Counts and shows requests. Raises `BrokenPipeError` if the user quits or the output's reader is gone."""
        now_s = time.monotonic()
        if self._recent is None:
            # The first call means that the probes are live. The time counts from now.
            self._recent = Recent(self._interval_s, now_s)
            if self._live:
                self._terminal = Terminal(self._console)
        for request, _, _ in completed:
            self._recent.newest.add(request)
        self._stats.exported += len(completed)
        if self._terminal is not None:
            try:
                self._draw(self._terminal, self._recent, now_s)
            except OSError as error:  # the user quits, or the terminal is gone
                self._terminal.close()
                raise BrokenPipeError from error
        elif now_s - self._recent.start_s >= self._interval_s:
            self._print(self._recent, now_s)
            self._recent = Recent(self._interval_s, now_s)
            if self._once:
                raise BrokenPipeError

    def shutdown(self, timeout_s: float) -> None:
        if self._terminal is not None:
            self._terminal.close()
        elif self._recent is not None and self._recent.newest.locations:
            self._print(self._recent, time.monotonic())

    def _print(self, recent: Recent, now_s: float) -> None:
        tally, seconds = recent.tally(now_s)
        print_tally(self._console, "the interval", tally, seconds, self._controls.view)

    def _draw(self, terminal: Terminal, recent: Recent, now_s: float) -> None:
        keys = terminal.keys()
        for key in keys:
            self._controls.press(key)
        if self._controls.ended:
            raise BrokenPipeError
        width, height = size = terminal.size
        if not keys and size == self._drawn_size and now_s - self._drawn_s < _REDRAW_S:
            return
        self._drawn_s, self._drawn_size = now_s, size
        recent.turn(now_s)
        if not self._controls.paused:
            self._shown = recent.tally(now_s, all_time=self._controls.all_time)
        title = "all time" if self._controls.all_time else f"the last {self._interval_s:g} s"
        below = [*self._told(), Text(self._controls.footer(), style="reverse")]
        lines = screen(
            title + " (paused)" * self._controls.paused,
            *self._shown,
            self._controls.view,
            width,
            max(height - len(below), 0),
            bar=self._console.color_system is not None,
        )
        lines += [Text()] * (height - len(below) - len(lines))
        terminal.show(lines[: height - len(below)] + below)

    def _told(self) -> list[Text]:
        """Returns a line with the counts of received and lost requests, and the program's last message."""
        lost = {cause: count for cause, count in sorted(self._stats.losses().items()) if count}
        causes = "  ".join(f"{cause} {count}" for cause, count in lost.items())
        grave = any(of_kind(lost, LOST))
        return [
            Text(f" received {self._stats.received}  ").append(causes or "lost 0", style="bold red" if grave else ""),
            Text(" " + printable(last_kept_line()), style="dim"),
        ]
