"""The probe that marks when a request begins: attached only while there are requests that need it.

Of a plain HTTP/1 request the client's socket tells as much (`probes/beginnings.c`). The kernel program says in the
`beginnings` map when a request last needed the probe.
"""

import logging
import os
import time

from otel_nginx_ebpf.kernel import uprobes
from otel_nginx_ebpf.kernel.ring_buffer import CounterArray
from otel_nginx_ebpf.traces.abi import c_enum

_log = logging.getLogger(__name__)

_INDEX = c_enum("beginnings")

# The probe is let go when so many requests, in so many seconds at least, did not need it. Who does after that brings it
# back, and lacks an exact beginning: so many seconds, that a client over TLS which asks every ten keeps the probe; so
# many requests, that an nginx without work keeps it, as nothing would be saved.
_QUIET = "1000 30"

# For tests: other numbers of requests and seconds. `0 0`: the probe is let go at once.
_QUIET_VARIABLE = "OTEL_NGINX_EBPF_TEST_QUIET"


class BeginningsProbe:
    """Owns the descriptors but the program's. Attached when made; call `adapt` again and again."""

    def __init__(self, counters: int, link: int, program: int, executable: int, file_offset: int) -> None:
        """Descriptors of the `beginnings` map, the link, its program and the binary (O_PATH); where in it, bytes."""
        self._counters = CounterArray(counters, len(_INDEX) - 1)
        self._program = program
        self._executable = executable
        self._file_offset = file_offset
        self._link: int | None = link
        requests, seconds = os.environ.get(_QUIET_VARIABLE, _QUIET).split()
        self._quiet_requests, self._quiet_ns = int(requests), int(float(seconds) * 1e9)
        self._needed_ns = 0
        self._quiet_since_ns = time.monotonic_ns()
        self._spared_before = 0
        self.adapt()

    def adapt(self) -> None:
        """Attaches the probe where a request needed it since the last call; lets it go after a while without one."""
        counts = self._counters.read()
        needed_ns, spared = counts[_INDEX["BEGINNINGS_NEEDED_NS"]], counts[_INDEX["BEGINNINGS_SPARED"]]
        now_ns = time.monotonic_ns()
        if needed_ns != self._needed_ns:
            self._needed_ns, self._quiet_since_ns, self._spared_before = needed_ns, now_ns, spared
            self._attach()
        elif (
            self._link is not None
            and spared - self._spared_before >= self._quiet_requests
            and now_ns - self._quiet_since_ns >= self._quiet_ns
        ):
            self.detach()

    def _attach(self) -> None:
        if self._link is not None:
            return
        try:
            self._link = uprobes.attach(self._program, f"/proc/self/fd/{self._executable}", self._file_offset)
        except OSError as error:
            _log.warning("requests over TLS or HTTP/2 lack their exact beginning: cannot attach: %s", error.strerror)

    def detach(self) -> None:
        """Lets the probe go."""
        if self._link is not None:
            os.close(self._link)
            self._link = None

    def close(self) -> None:
        self.detach()
        os.close(self._executable)
        self._counters.close()
