"""Answers as the application behind nginx, on the given port: fast, slowly (/slow) or with an error (/broken)."""

import random
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        slow = self.path.startswith("/slow")
        time.sleep(random.uniform(0.2, 0.8) if slow else random.uniform(0.001, 0.02))
        body = b"hello\n"
        self.send_response(500 if self.path.startswith("/broken") else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


ThreadingHTTPServer(("", int(sys.argv[1])), Handler).serve_forever()
