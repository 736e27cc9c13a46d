"""Fuzzes a target in a separate process: `python -m fuzz.one TARGET`, then libFuzzer's options and directories."""

import logging
import resource
import sys

import atheris

# The limits for an input. An input that needs more ends the process, and is a finding.
SECONDS, RESIDENT_MIB, ADDRESS_SPACE_BYTES = 20, 1024, 8 << 30

if __name__ == "__main__":
    name, *options = sys.argv[1:]
    logging.disable()
    atheris.enabled_hooks.add("str")
    # elftools reads a hundred thousand entries of the whole nginx, so do not instrument it there.
    read_by = [] if name == "nginx" else ["elftools", "json", "tomllib", "pydantic_settings"]
    with atheris.instrument_imports(include=["otel_nginx_ebpf", *read_by, "fuzz.targets"]):
        from fuzz.targets import PLANTED, TARGETS
    target = (TARGETS | PLANTED)[name]
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    limits = [
        f"-report_slow_units={SECONDS}",
        f"-timeout={2 * SECONDS}",
        f"-rss_limit_mb={RESIDENT_MIB}",
        f"-max_len={target.bytes_max}",
    ]
    # libFuzzer restarts itself in a shell, with its first argument.
    atheris.Setup([f"{sys.executable} -m fuzz.one {name}", *limits, *options], target.check)
    atheris.Fuzz()
