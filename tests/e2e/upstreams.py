"""Runs a real HTTP/1.1 upstream that does what each request's query string asks for.

Runs as a separate process (`python upstreams.py DIRECTORY`), so that it shares no interpreter lock with the clients;
`UpstreamProcess` starts it. Query parameters, all optional:

    status=N  bytes=N  chunked=1   the response; `bytes` counts the body
    delay_ms=N                     wait before the response's first byte
    head_ms=N                      wait inside the response's header
    stall_ms=N                     wait between the response's header and its body
    parts=N part_ms=N              the body in N pieces, with a wait before each
    end=close|reset                close or reset without answer
    end=truncate|abort             close or reset in the middle of the body
    end=head|nonsense|garble       close inside the header; answer something other than HTTP; send invalid chunks
    keep_alive=0                   answer `Connection: close`, then close
    etag=TEXT                      answer 304 to a matching If-None-Match
    header=NAME:VALUE              another response header, repeatable
    early=1                        answer before reading the request's body
    echo=1                         the body is the request's header as received

A request with an `Upgrade` header gets 101, and then an echo until the client closes.
"""

import asyncio
import contextlib
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

_PIECE_BYTES = 1 << 16

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]]


def make_certificate(directory: Path) -> None:
    """Write the self-signed `certificate.pem` and `key.pem` for localhost."""
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(directory / "key.pem"), "-out", str(directory / "certificate.pem")]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    (directory / "key.pem").chmod(0o644)  # workers read the key if the configuration names it by a variable


class UpstreamProcess:
    """Starts the upstream on IPv4 (twice), IPv6, a unix socket and TLS, on ports that the kernel chooses."""

    def __init__(self, directory: Path, program: str | Path = __file__) -> None:
        self._process = subprocess.Popen(
            [sys.executable, program, directory], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self.addresses: dict[str, str] = json.loads(self._process.stdout.readline())
        """Addresses in nginx's form: `127.0.0.1:80`, `[::1]:80`, `unix:/path`; keys ipv4, other, ipv6, unix, tls."""

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> int:
    if headers.get("transfer-encoding") == "chunked":
        total = 0
        while size := int(await reader.readline(), 16):
            await reader.readexactly(size + 2)
            total += size
        await reader.readline()
        return total
    total = left = int(headers.get("content-length", 0))
    while left:
        left -= len(await reader.readexactly(min(left, _PIECE_BYTES)))
    return total


async def _write_body(writer: asyncio.StreamWriter, query: dict[str, list[str]], total: int, chunked: bool) -> None:
    parts = int(query.get("parts", ["1"])[0])
    pause = int(query.get("part_ms", ["0"])[0]) / 1000
    for index in range(parts):
        if pause:
            await writer.drain()
            await asyncio.sleep(pause)
        left = total * (index + 1) // parts - total * index // parts
        while left:
            piece = b"x" * min(left, _PIECE_BYTES)
            left -= len(piece)
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            await writer.drain()
    if chunked:
        writer.write(b"0\r\n\r\n")


async def _respond(writer: asyncio.StreamWriter, head: list[str], query: dict[str, list[str]]) -> bool:
    """Answer a request; return whether the connection stays open."""
    method, headers = head[0].partition(" ")[0], _headers(head)
    await asyncio.sleep(int(query.get("delay_ms", ["0"])[0]) / 1000)
    end = query.get("end", [""])[0]
    if end in ("reset", "abort"):
        # With a linger time of zero, close() sends RST instead of FIN.
        connection = writer.get_extra_info("socket")  # None after nginx has left
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if end in ("close", "reset"):
        return False
    if end == "nonsense":
        writer.write(b"SSH-2.0-nonsense\r\n\r\n")
        return False
    status, total = int(query.get("status", ["200"])[0]), int(query.get("bytes", ["5"])[0])
    echo = "\r\n".join(head[1:]).encode("latin-1") if "echo" in query else b""
    lines = [header.replace(":", ": ", 1) for header in query.get("header", [])]
    if "etag" in query:
        etag = f'"{query["etag"][0]}"'
        lines.append(f"ETag: {etag}")
        if headers.get("if-none-match") == etag:
            status = 304
    chunked = "chunked" in query
    if status in (204, 304):
        total = 0
    else:
        lines.append("Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(echo) or total}")
    # By default nginx speaks HTTP/1.0 to an upstream, and asks for a close.
    keep = query.get("keep_alive") != ["0"] and headers.get("connection", "").lower() != "close"
    lines.append(f"Connection: {'keep-alive' if keep else 'close'}")
    writer.write(f"HTTP/1.1 {status} Whatever\r\n".encode())
    if head := int(query.get("head_ms", ["0"])[0]):
        await writer.drain()
        await asyncio.sleep(head / 1000)
    if end == "head":
        return False
    writer.write("\r\n".join([*lines, "", ""]).encode())
    if stall := int(query.get("stall_ms", ["0"])[0]):
        await writer.drain()
        await asyncio.sleep(stall / 1000)
    if method != "HEAD" and status not in (204, 304):
        if end in ("truncate", "abort", "garble"):
            if chunked and end != "garble":
                writer.write(b"%x\r\n" % total)
            writer.write(b"x" * (total // 2))
            return False
        if echo:
            writer.write(echo)
        else:
            await _write_body(writer, query, total, chunked)
    return keep


def _headers(head: list[str]) -> dict[str, str]:
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        keep = True
        while keep:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
            headers = _headers(head)
            if "upgrade" in headers:
                writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: upgrade\r\n\r\n")
                while data := await reader.read(_PIECE_BYTES):
                    writer.write(data)
                break
            query = parse_qs(urlsplit(head[0].split(" ")[1]).query)
            if "early" not in query:
                await _read_body(reader, headers)
            keep = await _respond(writer, head, query)
            if "early" in query:
                await _read_body(reader, headers)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()
        await writer.wait_closed()


async def listen(directory: Path, serve: Serve = serve) -> None:
    """Print the addresses as JSON on stdout, and serve for ever."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "certificate.pem", directory / "key.pem")
    path = directory / "upstream.sock"
    servers = {
        "ipv4": await asyncio.start_server(serve, "127.0.0.1", 0),
        "other": await asyncio.start_server(serve, "127.0.0.1", 0),
        "ipv6": await asyncio.start_server(serve, "::1", 0),
        "tls": await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context),
        "unix": await asyncio.start_unix_server(serve, path),
    }
    os.chmod(path, 0o666)  # nginx's workers run as another user
    addresses = {"unix": f"unix:{path}"}
    for name, server in servers.items():
        if name != "unix":
            host, port = server.sockets[0].getsockname()[:2]
            addresses[name] = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(json.dumps(addresses), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(listen(Path(sys.argv[1])))
