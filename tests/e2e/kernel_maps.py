"""Reads the maps of an agent's kernel programs with bpftool, whichever process of the agent holds them."""

import json
import struct
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from e2e.agent_process import AgentProcess

SocketKey = tuple[int, int]
"""The process and the descriptor of a socket."""


def _bpftool(*arguments: object) -> Any:
    return json.loads(subprocess.run(["bpftool", "-j", *map(str, arguments)], capture_output=True, check=True).stdout)


def _numbers(agent: AgentProcess, field: str) -> set[int]:
    """Return the values of a field, such as `map_id:`, in the fdinfo of all descriptors of the agent's processes."""
    texts = []
    for pid in agent.pids:
        for path in Path(f"/proc/{pid}/fdinfo").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                texts.append(path.read_text())
    return {int(line.split()[1]) for text in texts for line in text.splitlines() if line.startswith(field)}


class KernelMaps:
    """The maps that a live agent has for a binary."""

    def __init__(self, agent: AgentProcess) -> None:
        maps = [_bpftool("map", "show", "id", number) for number in _numbers(agent, "map_id:")]
        self._ids = {each["name"]: each["id"] for each in maps}

    def _keys(self, name: str) -> list[bytes]:
        entries = _bpftool("map", "dump", "id", self._ids[name])
        return [bytes(int(byte, 16) for byte in entry["key"]) for entry in entries]

    def in_flight(self) -> dict[str, int]:
        """Return how many requests, and finished attempts of requests, the maps hold."""
        return {name: len(self._keys(name)) for name in ("active_requests", "attempts")}

    def series(self) -> int:
        """Return how many series of durations the maps hold. The kernel cuts the names of maps."""
        return sum(len(self._keys(name[:15])) for name in ("server_durations", "client_durations"))

    def sockets(self) -> set[SocketKey]:
        return {struct.unpack("=Ii", key) for key in self._keys("sockets")}

    def stale_sockets(self) -> set[SocketKey]:
        """Return the sockets in the map that are no longer open."""
        return {(pid, fd) for pid, fd in self.sockets() if not Path(f"/proc/{pid}/fd/{fd}").exists()}

    def callers(self) -> set[int]:
        """Return the processes whose system calls the program looks at."""
        entries = _bpftool("map", "dump", "id", self._ids["callers"])
        pids = {int.from_bytes([int(byte, 16) for byte in entry["value"][:4]], "little") for entry in entries}
        return pids - {0, 2**32 - 1}

    def processes(self) -> set[int]:
        return {struct.unpack("=I", key)[0] for key in self._keys("processes")}


def loaded_programs() -> set[int]:
    """Return the ids of all BPF programs of the machine, attached or called by other programs."""
    return {each["id"] for each in _bpftool("prog", "show")}


def attached_programs(agent: AgentProcess) -> set[int]:
    """Return the ids of the agent's attached programs."""
    return _numbers(agent, "prog_id:")


def links(agent: AgentProcess) -> set[int]:
    """Return the ids of the links that hold the agent's probes and tracepoints."""
    return _numbers(agent, "link_id:")


def is_there(link: int) -> bool:
    return subprocess.run(["bpftool", "link", "show", "id", str(link)], capture_output=True).returncode == 0
