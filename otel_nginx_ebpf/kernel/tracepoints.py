"""Raw tracepoints, whose programs newer kernels may leave out."""

import os
import re

_SINCE = (7, 0)


def programs_are_left_out(release: str | None = None) -> bool:
    """Whether a tracepoint's program may be preempted: by default in the running kernel.

    Meanwhile it is left out for all others that come to the tracepoint on that processor, and counted in its
    `recursion_misses` (bpf_prog_get_recursion_context() in include/linux/filter.h, from Linux 7.0 on).
    """
    numbers = re.match(r"(\d+)\.(\d+)", release or os.uname().release)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= _SINCE
