"""The raw tracepoints, and the handlers of `probes/` that attach to them."""

from otel_nginx_ebpf.kernel.release import release_numbers

_LEAVES_OUT_SINCE = (7, 0)


def _leaves_out(release: str | None) -> bool:
    """Tells whether the kernel may preempt a tracepoint's program.

    While a program is preempted, the kernel skips it for every other thread that reaches the tracepoint on that
    processor. It counts the skipped runs in `recursion_misses` (__bpf_trace_run() in kernel/trace/bpf_trace.c).
    """
    numbers = release_numbers(release)
    return numbers is not None and numbers >= _LEAVES_OUT_SINCE


def handlers(*, system_calls: bool, release: str | None = None) -> dict[str, str]:
    """Returns the tracepoint of each handler, in the order in which the handlers must run.

    Args:
        system_calls: Attach to the end of system calls too, not only to the end of processes.
        release: The kernel's release; by default the running kernel's.
    """
    chosen = {"sched_process_exit": "sched_process_exit"}
    if system_calls:
        chosen["sys_exit"] = "sys_exit"
        if _leaves_out(release):
            chosen["sys_exit_missed"] = "sys_exit"
    return chosen
