"""Attaches programs that do nothing where the program attaches its own: what no kernel program can be cheaper than."""

import json
import signal
import sys

from bench.programs import compile_program
from otel_nginx_ebpf.kernel import uprobes
from otel_nginx_ebpf.kernel.loader import import_bcc
from otel_nginx_ebpf.nginx.processes import instance_of
from otel_nginx_ebpf.planner.client import make_target
from otel_nginx_ebpf.settings.sources import load

_TEXT = "int at_probe(void *ctx) { return 0; }\nint at_tracepoint(void *ctx) { return 0; }\n"


def main() -> None:
    """Attach to the nginx of a pid, and wait for Ctrl-C. Arguments: the pid, the detail (`phases`, `request`)."""
    pid, detail = sys.argv[1:]
    instance = instance_of(int(pid))
    _, planned = make_target((instance,), load({"detail": detail}))
    request = json.loads(planned)
    bcc = import_bcc()
    program = compile_program(_TEXT)
    at_probe = program.load_func(b"at_probe", bcc.BPF.KPROBE, attach_type=uprobes.ATTACH_TYPE)
    at_tracepoint = program.load_func(b"at_tracepoint", bcc.BPF.RAW_TRACEPOINT)
    for name in request["tracepoints"].values():
        if bcc.lib.bpf_attach_raw_tracepoint(at_tracepoint.fd, name.encode()) < 0:
            raise RuntimeError(f"cannot attach to {name}")
    for probe in request["probes"]:
        if not probe["spared"]:  # as the program itself while clients use plain HTTP/1
            uprobes.attach(at_probe.fd, str(instance.executable), probe["file_offset"])
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    print("ready", file=sys.stderr, flush=True)
    signal.sigwait([signal.SIGINT])
    print("lost 0", file=sys.stderr)


if __name__ == "__main__":
    main()
