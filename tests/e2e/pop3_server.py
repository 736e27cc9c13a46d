"""Provides a POP3 server for nginx's mail proxy. Its mailboxes are empty and it accepts every user."""

import socketserver
import threading
from types import TracebackType

_ANSWERS = {"STAT": "+OK 0 0", "LIST": "+OK\r\n."}


class _Session(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self._say("+OK ready")
        for line in self.rfile:
            command = line.split()[0].decode().upper()
            self._say(_ANSWERS.get(command, "+OK"))
            if command == "QUIT":
                return

    def _say(self, text: str) -> None:
        self.wfile.write(f"{text}\r\n".encode())


class Pop3Server(socketserver.ThreadingTCPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Session)
        self.port: int = self.server_address[1]
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    def __enter__(self) -> "Pop3Server":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
