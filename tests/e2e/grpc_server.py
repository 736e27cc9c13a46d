"""Provides a real gRPC server and its client. Methods of every kind take and return bytes, without generated code.

The server runs as a separate process (`python grpc_server.py DIRECTORY`); `GrpcServer` starts it. Each message of a
request asks, in JSON, for `count` messages of `bytes` each, with `delay_ms` before each, and for a `status` that ends
the call.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

SERVICE = "test.Echo"


class GrpcServer:
    """Runs the server on TCP (`grpc` in `addresses`) and with TLS (`grpcs`), with the certificate in `directory`."""

    def __init__(self, directory: Path) -> None:
        command = [sys.executable, __file__, directory]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.addresses: dict[str, str] = json.loads(self._process.stdout.readline())

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()


def call(channel: grpc.Channel, kind: str, messages: list[dict[str, Any]], prefix: str = "") -> list[bytes]:
    """Call the method `kind` (`unary_unary`, `unary_stream`, `stream_unary`, `stream_stream`); return its answer.

    Raises grpc.RpcError with the call's status.
    """
    method = getattr(channel, kind)(f"{prefix}/{SERVICE}/{kind}")
    encoded = [json.dumps(message).encode() for message in messages]
    answer = method(iter(encoded) if kind.startswith("stream") else encoded[0], timeout=20)
    return list(answer) if kind.endswith("stream") else [answer]


def _replies(message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    wish = json.loads(message)
    for _ in range(wish.get("count", 1)):
        time.sleep(wish.get("delay_ms", 0) / 1000)
        yield b"x" * wish.get("bytes", 5)
    if "status" in wish:
        context.abort(grpc.StatusCode[wish["status"]], "as you wish")


def _unary_unary(message: bytes, context: grpc.ServicerContext) -> bytes:
    return b"".join(_replies(message, context))


def _stream_unary(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    return b"".join(_stream_stream(messages, context))


def _stream_stream(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    for message in messages:
        yield from _replies(message, context)


def _main(directory: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(8))
    handlers = {
        "unary_unary": grpc.unary_unary_rpc_method_handler(_unary_unary),
        "unary_stream": grpc.unary_stream_rpc_method_handler(_replies),
        "stream_unary": grpc.stream_unary_rpc_method_handler(_stream_unary),
        "stream_stream": grpc.stream_stream_rpc_method_handler(_stream_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    key, certificate = ((directory / name).read_bytes() for name in ("key.pem", "certificate.pem"))
    ports = {
        "grpc": server.add_insecure_port("127.0.0.1:0"),
        "grpcs": server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)])),
    }
    print(json.dumps({name: f"127.0.0.1:{port}" for name, port in ports.items()}), flush=True)
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
