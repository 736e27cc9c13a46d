"""Runs upstream peers that send exactly the bytes that a test wants. A function handles each connection."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

Handler = Callable[[socket.socket], None]


class RawUpstream:
    """Listens on 127.0.0.1 and calls `handle` for every connection, in a separate thread."""

    def __init__(self, handle: Handler) -> None:
        self._handle = handle
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # stopped
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):  # nginx has closed it
            self._handle(connection)

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def read_head(connection: socket.socket) -> bytes:
    """Read and return everything up to the end of an HTTP/1 request's header, or of the connection."""
    head = b""
    while b"\r\n\r\n" not in head:
        data = connection.recv(65536)
        if not data:
            break
        head += data
    return head
