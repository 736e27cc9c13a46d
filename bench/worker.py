"""Measures what tracing costs in the nginx worker, and in a process that has nothing to do with nginx."""

import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.figures import paired, ratios, summary
from bench.load import at_most_speed
from bench.machine import NGINX_CPU
from bench.programs import counting, programs_of
from bench.site import NAMED_SCENARIOS, Site
from bench.variants import OFF, Variant, stopped, tracing, turns

MODULE = "module"
"""nginx with a module that traces, instead of the program."""
MODULE_MAIN_THREAD = "module, main thread"
"""What it costs without the module's own threads: they take processor time, but requests do not wait for them."""

BYSTANDER = "bystander"
"""A process that only makes system calls. Its figures are for a call."""
_BYSTANDER_CALLS = 1_000_000
_LOOKS = 5

Series = dict[str, list[float]]
"""By variant, a value for each round."""


def cpu_us_a_request(site: Site, name: str) -> tuple[float, float, float]:
    """Return the worker's processor time in µs a request, its main thread's, and the requests a second of one client.

    Each is the best of a few short measurements, because other work on the machine can only add time.
    """
    scenario = NAMED_SCENARIOS[name]
    cpu_us, main_thread_cpu_us, requests_a_second = [], [], []
    for _ in range(_LOOKS):
        before = site.counts()
        requests_a_second.append(at_most_speed([site.url(scenario)], scenario, scenario.requests // _LOOKS))
        requests, cpu_ns, main_thread_cpu_ns = (b - a for a, b in zip(before, site.counts(), strict=True))
        cpu_us.append(cpu_ns / 1000 / requests)
        main_thread_cpu_us.append(main_thread_cpu_ns / 1000 / requests)
    return min(cpu_us), min(main_thread_cpu_us), max(requests_a_second)


def bystander_us_a_call() -> float:
    """Return microseconds of processor time for a read or write of one byte, by coreutils' dd on nginx's processor."""
    command = f"dd if=/dev/zero of=/dev/null bs=1 count={_BYSTANDER_CALLS // 2} status=none"
    process = subprocess.Popen(["taskset", "--cpu-list", str(NGINX_CPU), *command.split()])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"dd ended with {process.returncode}")
    return (usage.ru_utime + usage.ru_stime) * 1e6 / _BYSTANDER_CALLS


def interleave(
    site: Site,
    names: Iterable[str],
    variants: Sequence[Variant],
    rounds: int,
    advance: Callable[[str], None],
    with_module: Site | None = None,
    *,
    beside: bool,
) -> tuple[dict[str, Series], dict[str, Series]]:
    """Return processor time and throughput by scenario and variant, with the variants in turn (`turns`).

    Unless `beside` is set, nobody reads records meanwhile. With few processors the emitter takes time from the load
    generator. Then the worker waits for requests more often, and each time it begins to wait costs it time.
    """
    names = list(names)
    cpu_us: dict[str, Series] = {name: {} for name in names}
    rate: dict[str, Series] = {name: {} for name in names}
    untraced = (OFF, MODULE) if with_module else (OFF,)
    for number, label, name, agent in turns(variants, names, site.nginx.pid, rounds, untraced):
        advance(f"round {number}, {label}: {name}")
        if name == BYSTANDER:
            if label != MODULE:
                cpu_us[name].setdefault(label, []).append(bystander_us_a_call())
            continue
        measured = with_module if with_module and label == MODULE else site
        with stopped(None if beside else agent):
            cpu, main_thread_cpu, requests_a_second = cpu_us_a_request(measured, name)
        cpu_us[name].setdefault(label, []).append(cpu)
        if label == MODULE:
            cpu_us[name].setdefault(MODULE_MAIN_THREAD, []).append(main_thread_cpu)
        rate[name].setdefault(label, []).append(requests_a_second)
    return cpu_us, rate


def compare(series: Series) -> dict[str, Any]:
    """Return the series' figures, and how far each variant is above `off` in the same round."""
    return {
        label: {
            **summary(values),
            "rounds": values,
            **(
                {}
                if label == OFF
                else {
                    "above_off": summary(paired(values, series[OFF])),
                    "to_off": summary(ratios(values, series[OFF])),
                }
            ),
        }
        for label, values in series.items()
    }


def probe_accounts(site: Site, name: str, variant: Variant) -> list[dict[str, Any]]:
    """Return runs a request, time a request and size of each of our programs."""
    with tracing(variant, site.nginx.pid) as agent, counting():
        assert agent is not None
        before = {program.name: program for program in programs_of(agent.pid)}
        served = site.counts().requests
        at_most_speed([site.url(NAMED_SCENARIOS[name])], NAMED_SCENARIOS[name])
        requests = site.counts().requests - served
        after = programs_of(agent.pid)
    return [
        {
            "program": program.name,
            "instructions": program.instructions,
            "machine_code_bytes": program.machine_code_bytes,
            "runs_a_request": (program.runs - before[program.name].runs) / requests,
            "ns_a_run": (program.run_ns - before[program.name].run_ns)
            / max(program.runs - before[program.name].runs, 1),
            "us_a_request": (program.run_ns - before[program.name].run_ns) / requests / 1000,
        }
        for program in after
    ]
