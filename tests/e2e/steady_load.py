"""Makes requests at a steady rate over HTTP/1.1, with h2load as a separate process."""

import re
import subprocess
from collections.abc import Sequence
from types import TracebackType

CLIENTS = 20


class SteadyLoad:
    """Runs from the constructor until `wait`, or until the `with` block ends."""

    def __init__(self, urls: Sequence[str], requests: int, rate: int) -> None:
        """Start the load. `requests` and `rate` (a second) must be multiples of CLIENTS."""
        self._requests = requests
        command = ["h2load", "--h1", f"--clients={CLIENTS}", f"--requests={requests}", f"--rps={rate // CLIENTS}"]
        self._process = subprocess.Popen([*command, *urls], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def __enter__(self) -> "SteadyLoad":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    @property
    def is_over(self) -> bool:
        return self._process.poll() is not None

    def wait(self, seconds: float) -> None:
        """Wait until all requests are made. Raise AssertionError unless every answer was 2xx."""
        report, _ = self._process.communicate(timeout=seconds)
        answered = re.search(r"^status codes: (\d+) 2xx, 0 3xx, 0 4xx, 0 5xx", report, re.MULTILINE)
        assert answered, report
        assert int(answered[1]) == self._requests, report
