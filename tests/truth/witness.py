"""Runs the upstream of e2e/upstreams.py as a witness: it records what it saw of each request.

Runs as a separate process (`python witness.py DIRECTORY`). Writes a JSON line to DIRECTORY/witness.jsonl when a request
begins, and another when it is over.
"""

import asyncio
import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from e2e import upstreams


@dataclass
class Seen:
    """A request as its upstream saw it. Times are Unix nanoseconds."""

    id: str
    sub: str
    """The subrequest's location. Empty for the request itself."""
    address: str
    """The upstream's address, as in nginx's $upstream_addr."""
    accepted_ns: int
    number: int
    """1 for the connection's first request."""
    ready_ns: int
    """When the upstream was ready to read it. Before, it may have been busy with an answer that nginx had dropped."""
    first_byte_ns: int
    """When its whole header had arrived."""
    received_bytes: int = 0
    sent_bytes: int = 0
    last_received_ns: int = 0
    first_sent_ns: int | None = None
    last_sent_ns: int | None = None
    over_ns: int | None = None
    kept: bool = False
    """Whether the connection stayed open."""


def pid(directory: Path) -> int:
    """Return the pid of the process that serves in `directory`."""
    return int((directory / "witness.pid").read_text())


def read(directory: Path) -> list[Seen]:
    """Return all requests that began so far. A request with `over_ns` is over."""
    path = directory / "witness.jsonl"
    found: dict[tuple[int, int, str], Seen] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        seen = Seen(**json.loads(line))
        found[seen.accepted_ns, seen.number, seen.address] = seen
    return sorted(found.values(), key=lambda seen: seen.first_byte_ns)


class _Reader:
    """Counts bytes that are read. Reading a header begins a request."""

    def __init__(self, connection: "_Connection", reader: asyncio.StreamReader) -> None:
        self._connection, self._reader = connection, reader

    async def readuntil(self, mark: bytes) -> bytes:
        self._connection.over(kept=True)
        ready_ns = time.time_ns()
        head = await self._reader.readuntil(mark)
        self._connection.begin(head, ready_ns)
        return head

    async def readline(self) -> bytes:
        return self._connection.received(await self._reader.readline())

    async def readexactly(self, count: int) -> bytes:
        return self._connection.received(await self._reader.readexactly(count))

    async def read(self, count: int) -> bytes:
        return self._connection.received(await self._reader.read(count))


class _Writer:
    def __init__(self, connection: "_Connection", writer: asyncio.StreamWriter) -> None:
        self._connection, self._writer = connection, writer

    def write(self, data: bytes) -> None:
        self._connection.sent(data)
        self._writer.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


def _address(name: str | tuple[str, int]) -> str:
    """Return an address in nginx's form."""
    if isinstance(name, str):
        return f"unix:{name}"
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Connection:
    def __init__(self, writer: asyncio.StreamWriter, output: int) -> None:
        name = writer.get_extra_info("sockname")
        self._address = _address(name)
        self._accepted_ns, self._number, self._output = time.time_ns(), 0, output
        self._request: Seen | None = None

    def begin(self, head: bytes, ready_ns: int) -> None:
        self._number += 1
        line = head.partition(b"\r\n")[0].decode("latin-1")
        words = dict(re.findall(r"[?&](id|sub)=(\w+)", line))
        ids, now_ns = (words.get("id", ""), words.get("sub", "")), time.time_ns()
        self._request = Seen(
            *ids, self._address, self._accepted_ns, self._number, ready_ns, now_ns, len(head), last_received_ns=now_ns
        )
        self._say()

    def received(self, data: bytes) -> bytes:
        if self._request and data:
            self._request.received_bytes += len(data)
            self._request.last_received_ns = time.time_ns()
        return data

    def sent(self, data: bytes) -> None:
        if self._request and data:
            self._request.sent_bytes += len(data)
            self._request.last_sent_ns = time.time_ns()
            self._request.first_sent_ns = self._request.first_sent_ns or self._request.last_sent_ns

    def over(self, kept: bool) -> None:
        if self._request:
            self._request.over_ns, self._request.kept = time.time_ns(), kept
            self._say()
            self._request = None

    def _say(self) -> None:
        os.write(self._output, json.dumps(asdict(self._request)).encode() + b"\n")  # type: ignore[arg-type]


async def _main(directory: Path) -> None:
    (directory / "witness.pid").write_text(str(os.getpid()))
    output = os.open(directory / "witness.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer, output)
        try:
            await upstreams.serve(_Reader(connection, reader), _Writer(connection, writer))  # type: ignore[arg-type]
        finally:
            connection.over(kept=False)

    await upstreams.listen(directory, serve)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1])))
