"""Answers as the application behind uwsgi, as a request's query string asks:

status=N bytes=N        the response
delay_ms=N              wait before it
parts=N part_ms=N       the body in N pieces, with a wait before each
echo=1                  the body is the request's header as received, with names in lower case
"""

import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs

StartResponse = Callable[[str, list[tuple[str, str]]], Any]


def application(environ: dict[str, Any], start_response: StartResponse) -> Iterator[bytes]:
    query = parse_qs(environ["QUERY_STRING"])

    def number(name: str, default: int) -> int:
        return int(query.get(name, [str(default)])[0])

    received = len(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))
    names = [name for name in environ if name.startswith("HTTP_")]
    fields = [f"{name[5:].lower().replace('_', '-')}: {environ[name]}" for name in names]
    body = "\r\n".join(fields).encode("latin-1") if number("echo", 0) else b"x" * number("bytes", 5)
    total, parts = len(body), number("parts", 1)
    time.sleep(number("delay_ms", 0) / 1000)
    headers = [("Content-Length", str(total)), ("X-Received", str(received))]
    start_response(f"{number('status', 200)} Whatever", headers)
    for index in range(parts):
        time.sleep(number("part_ms", 0) / 1000)
        yield body[total * index // parts : total * (index + 1) // parts]
