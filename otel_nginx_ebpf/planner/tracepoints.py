"""Raw tracepoints, and which handlers of `probes/` they need."""

from otel_nginx_ebpf.kernel.release import release_numbers

_LEAVES_OUT_SINCE = (7, 0)


def _leaves_out(release: str | None) -> bool:
    """Whether a tracepoint's program may be preempted.

    Meanwhile it is left out for all others that come to the tracepoint on that processor, and counted in its
    `recursion_misses` (__bpf_trace_run() in kernel/trace/bpf_trace.c).
    """
    numbers = release_numbers(release)
    return numbers is not None and numbers >= _LEAVES_OUT_SINCE


def handlers(*, system_calls: bool, release: str | None = None) -> dict[str, str]:
    """The tracepoint of each handler, in the order in which they are to run.

    Args:
        system_calls: The end of each is to be seen, not only that of processes.
        release: The kernel's; by default the running one's.
    """
    chosen = {"sched_process_exit": "sched_process_exit"}
    if system_calls:
        chosen["sys_exit"] = "sys_exit"
        if _leaves_out(release):
            chosen["sys_exit_missed"] = "sys_exit"
    return chosen
