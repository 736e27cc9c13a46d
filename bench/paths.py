"""Counts what the kernel programs do for a request on each path: kept, or left out at one of two moments.

The programs are interpreted while a worker of nginx stands still, so that the counts do not depend on the machine.
"""

import http.client
import json
import os
import re
import signal
import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.bpf import Instruction, Machine, Map, parse
from bench.programs import compile_program
from bench.site import BROKEN, SCENARIOS, Scenario, Site
from bench.stopped_worker import StoppedWorker
from otel_nginx_ebpf.nginx.processes import instance_of
from otel_nginx_ebpf.planner.client import make_target
from otel_nginx_ebpf.settings.sources import load
from otel_nginx_ebpf.traces.error_log import is_log_line
from otel_nginx_ebpf.traces.record import decode

PATHS: dict[str, dict[str, Any]] = {
    "kept": {},
    "kept, with four headers": {
        "capture_request_headers": ["host", "accept-encoding"],
        "capture_response_headers": ["content-type", "content-length"],
    },
    "kept, with metrics": {"metrics": True},
    "left out by the sampler": {"sampler": "always_off"},
    "left out at the end": {"sampler": "always_off", "keep_errors": True},
}
"""Settings for each path. With --keep-errors a request that the sampler leaves out may be kept until it has ended."""
LOGGED: dict[str, dict[str, Any]] = {"with a line of the error log": {}, "without it": {"log_level": "none"}}
"""Settings for a request for which nginx logs an error."""
_SCENARIOS = {
    "static": (SCENARIOS["static"], PATHS),
    "proxied": (SCENARIOS["proxied"], PATHS),
    "broken": (BROKEN, LOGGED),
}
_WARM_UP = 110
"""Requests after which the programs know all names and trust the layout (LAYOUT_LOOKS)."""
_LOOKS = 7

Counts = dict[str, Counter[str]]
"""By program, what `Machine.counts` has, and `runs`."""


class Programs(NamedTuple):
    """The programs for an nginx, as BCC has compiled them."""

    code: dict[str, list[Instruction]]
    maps: dict[int, Map]
    called: dict[int, list[Instruction]]
    """Programs that others call by tail call, by the number of the map that has them."""
    wanted: dict[int, list[bytes]]
    """The keys in a hash, by its number."""
    keeps: bool
    """They send a record of each request."""
    at: dict[str, int]
    """The addresses in the worker where uprobes' programs run."""


def compiled(worker: int, settings: dict[str, Any]) -> Programs:
    """Compile the programs, except the one that is detached while clients use plain HTTP/1."""
    _, planned = make_target((instance_of(worker),), load(settings))
    request = json.loads(planned)
    probes = [probe for probe in request["probes"] if not probe["spared"]]
    program = compile_program(request["text"])
    names = [*request["tracepoints"], *(probe["handler"] for probe in request["probes"])]
    headers = request["captured_headers"]
    names += ["capture_headers"] if headers else []
    names += ["measure_request"] if request["request_metrics"] else []
    code = {name: parse(program.dump_func(name.encode())) for name in names}
    maps = {
        each.number: _map(each.number) for one in code.values() for each in one if each.code == 0x18 and each.source
    }
    maps[program["live"].map_fd].content = b"\x01"
    called, wanted = {}, {}
    if headers:
        called[program["capturing"].map_fd] = code.pop("capture_headers")
        keys = [each["name"].encode().ljust(63, b"\0") + bytes([each["kind"]]) for each in headers]
        wanted[program["captured_names"].map_fd] = keys
    if request["request_metrics"]:
        called[program["measuring"].map_fd] = code.pop("measure_request")
    program.cleanup()
    keeps = "sampler" not in settings
    return Programs(
        code,
        maps,
        called,
        wanted,
        keeps,
        {probe["handler"]: _address(worker, probe["file_offset"]) for probe in probes},
    )


def _map(descriptor: int) -> Map:
    info = dict(re.findall(r"^(\w+):\s+(\d+)$", Path(f"/proc/self/fdinfo/{descriptor}").read_text(), re.MULTILINE))
    return Map(int(info["map_type"]), int(info["key_size"]), int(info["value_size"]), int(info["max_entries"]))


def _address(worker: int, file_offset: int) -> int:
    """Return where the code at this offset of nginx's file is in the worker."""
    for line in Path(f"/proc/{worker}/maps").read_text().splitlines():
        place, access, offset, *_ = line.split()
        start, end = (int(number, 16) for number in place.split("-"))
        if "x" in access and 0 <= file_offset - int(offset, 16) < end - start:
            return start + file_offset - int(offset, 16)
    raise ValueError(f"no code at offset {file_offset:#x}")


def of_a_request(site: Site, scenario: Scenario, programs: Programs) -> Counts:
    """Return what each program does for a request of a scenario, on a connection that has served others.

    Of a few requests the one with the fewest instructions counts: a peer's response may come in two parts.
    """
    machine = Machine(programs.maps, site.worker)
    machine.tails |= programs.called
    for number, keys in programs.wanted.items():
        for key in keys:
            machine.insert(number, key, bytes(8))
    counts: Counts = {}
    looks: list[Counts] = []

    def end() -> None:
        looks.append(dict(counts))
        counts.clear()

    def runs(program: str, context: bytes) -> None:
        machine.counts.clear()
        machine.run(programs.code[program], machine.put_context(context))
        counts.setdefault(program, Counter()).update(machine.counts, runs=1)

    def at_probe(program: str) -> Callable[[bytes], None]:
        return lambda registers: runs(program, registers)

    def at_system_call(registers: bytes, result: int) -> None:
        runs("sys_exit", struct.pack("<2Q", machine.put_registers(registers), result))

    at = {address: at_probe(program) for program, address in programs.at.items()}
    with StoppedWorker(site.worker, at, at_system_call) as stopped:
        client = threading.Thread(target=_ask, args=(site, scenario, stopped.waits, end))
        client.start()
        stopped.run()
        client.join()
    machine.close()
    if len(looks) != 1 + _WARM_UP + _LOOKS:
        raise RuntimeError(f"{scenario.path}: only {len(looks)} requests were answered")
    _examine(machine.records, scenario, len(looks) - 1 if programs.keeps else 0, bool(programs.wanted))
    return min(looks[-_LOOKS:], key=total)


def _examine(records: Sequence[bytes], scenario: Scenario, expected: int, has_headers: bool) -> None:
    """Raise RuntimeError unless the interpreted programs have sent what the kernel's would have sent.

    The first request is older than the programs know the process, so it has no record.
    """
    requests = [decode(each) for each in records if not is_log_line(each)]
    sent = Counter((each.uri, f"{each.status // 100}xx", each.captured_headers != b"") for each in requests)
    if sent != Counter({(scenario.path, scenario.answer, has_headers): expected} if expected else {}):
        raise RuntimeError(f"{scenario.path}: the programs sent {sent}")


def total(counts: Counts) -> int:
    """Return the instructions of all programs."""
    return sum(each["instructions"] for each in counts.values())


def _ask(site: Site, scenario: Scenario, waits: threading.Event, end: Callable[[], None]) -> None:
    """Make the requests, call `end` after each, and at last stop the worker."""
    try:
        for requests in (1, _WARM_UP + _LOOKS):  # the programs know no connection of before their first request
            connection = http.client.HTTPConnection("127.0.0.1", site.plain_port)
            for _ in range(requests):
                _answered(connection, scenario, waits)
                end()
            connection.close()
    finally:
        os.kill(site.worker, signal.SIGSTOP)


def _answered(connection: http.client.HTTPConnection, scenario: Scenario, waits: threading.Event) -> None:
    connection.request("GET", scenario.path, headers={"User-Agent": "bench"})
    response = connection.getresponse()
    response.read()
    if f"{response.status // 100}xx" != scenario.answer:
        raise RuntimeError(f"{scenario.path} was answered with {response.status}")
    if not waits.wait(10):
        raise TimeoutError("the worker does not wait for events")


def measure(site: Site) -> dict[str, Any]:
    """Return the programs' sizes in instructions, and what each does for a request, by scenario and path."""
    by_path = {path: compiled(site.worker, settings) for path, settings in {**PATHS, **LOGGED}.items()}
    return {
        "sizes": {program: len(code) for program, code in by_path["kept"].code.items()},
        "requests": {
            name: {path: of_a_request(site, scenario, by_path[path]) for path in paths}
            for name, (scenario, paths) in _SCENARIOS.items()
        },
    }
