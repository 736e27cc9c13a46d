"""The probe that marks when a request begins. It is attached only while some requests need it.

A plain HTTP/1 request does not need it: reads of the client's socket tell when it began (`probes/beginnings.c`). The
kernel program writes the time when a request last needed the probe to the `beginnings` map.
"""

import logging
import os
import time

from otel_nginx_ebpf.kernel import uprobes
from otel_nginx_ebpf.kernel.ring_buffer import CounterArray
from otel_nginx_ebpf.traces.abi import c_enum

_log = logging.getLogger(__name__)

_INDEX = c_enum("beginnings")

# Requests and seconds. The probe is detached when this many requests did not need it, over at least this many seconds.
# The next request that needs it gets an inexact beginning, and the probe is attached again. 30 s: a TLS client that
# sends a request every ten seconds keeps the probe attached. 1000 requests: an idle nginx keeps the probe, because
# detaching would save nothing.
_QUIET = "1000 30"

# For tests: other numbers of requests and seconds. `0 0` detaches the probe at once.
_QUIET_VARIABLE = "OTEL_NGINX_EBPF_TEST_QUIET"


class BeginningsProbe:
    """The probe, attached from the start. Call `adapt` regularly. Owns all descriptors except the program's."""

    def __init__(self, counters: int, link: int, program: int, executable: int, file_offset: int) -> None:
        """Takes over the descriptors.

        Args:
            counters: The `beginnings` map.
            link: The link that attaches the probe now.
            program: The BPF program of the probe.
            executable: The nginx binary, opened with O_PATH.
            file_offset: Where in the binary's file the probe stands, in bytes.
        """
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
        """Attaches the probe if a request needed it since the last call. Detaches it after a while without need."""
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
            _log.warning(
                "requests over TLS or HTTP/2 lack their exact beginning: the probe cannot be attached: %s",
                error.strerror,
            )

    def detach(self) -> None:
        """Detaches the probe; `adapt` can attach it again."""
        if self._link is not None:
            os.close(self._link)
            self._link = None

    def close(self) -> None:
        self.detach()
        os.close(self._executable)
        self._counters.close()
