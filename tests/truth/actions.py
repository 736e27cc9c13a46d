"""Makes what random clients do: a list of requests for each connection, and how each request ends."""

import json
from dataclasses import asdict, dataclass, field
from random import Random
from urllib.parse import quote

from truth.configuration import KINDS, Configuration
from truth.locations import FILES, INSTEAD, Location

FATES = ("whole", "unanswered", "midway", "sending", "half_close")
"""How the client leaves a request: not at all; before the answer; inside it; inside its own body; with a half-close."""


@dataclass(frozen=True)
class Ask:
    """A request. `fate` says how the client leaves it, after `leave_ms` or after `leave_bytes` of the answer."""

    id: str
    prefix: str
    target: str
    method: str = "GET"
    version: str = "HTTP/1.1"
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""
    body_bytes: int = 0
    body_mode: str = "at once"
    """`at once`, `slowly`, `chunked`, `expect`."""
    pause_ms: int = 0
    fate: str = "whole"
    leave_ms: int = 0
    leave_bytes: int = 1
    abort: bool = False
    slow_reader: bool = False
    features: tuple[str, ...] = ()

    @property
    def body(self) -> bytes:
        return self.message.encode("latin-1") or b"b" * self.body_bytes


@dataclass(frozen=True)
class Action:
    """The requests of a connection. `pipelined` sends all at once over HTTP/1; HTTP/2 always does so with streams."""

    number: int
    kind: str
    pipelined: bool
    asks: tuple[Ask, ...]
    nonsense: str = ""
    """Bytes that are no request, in latin-1, to send instead of requests."""

    @property
    def is_http2(self) -> bool:
        return self.kind.endswith("2")

    def text(self) -> str:
        return json.dumps(asdict(self))


NONSENSE = [
    "GARBAGE\r\n\r\n",
    "GET /unfinished HTTP/1.1\r\nHost:",
    "GET /no-host HTTP/1.1\r\n\r\n",
    "GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: twelve\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "GET /" + "a" * 3000 + " HTTP/1.1\r\nHost: x\r\n\r\n",
    "\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03",
    "\r\n\r\nGET /l1/ HTTP/1.0\r\n\r\n",
]


def actions(configuration: Configuration, count: int) -> list[Action]:
    """Return random actions. Equal configurations have equal actions."""
    chance = Random(f"actions {configuration.seed}")
    return [_action(chance, configuration, number) for number in range(count)]


def _action(chance: Random, configuration: Configuration, number: int) -> Action:
    kind = chance.choice(KINDS)
    http2 = kind.endswith("2")
    if not http2 and chance.random() < 0.04:
        return Action(number, kind, False, (), chance.choice(NONSENSE))
    pipelined = not http2 and chance.random() < 0.25
    count = chance.choice([1, 1, 2, 3, 4] if not http2 else [1, 2, 3, 6])
    asks = []
    for index in range(count):
        location = chance.choice(configuration.locations)
        asks.append(_ask(chance, f"s{configuration.seed}a{number}r{index}", location, http2, pipelined))
    return Action(number, kind, pipelined, tuple(asks))


def _ask(chance: Random, id_: str, location: Location, http2: bool, pipelined: bool) -> Ask:
    features = set(location.features)
    query = {"id": id_, "key": str(chance.randrange(4)), "auth": chance.choice(["", "", "403", "401", "500", "204"])}
    query["sub_ms"] = str(chance.choice([0, 0, 30, 80, 250]))
    query["sub_end"] = chance.choice([""] * 6 + ["close", "reset", "truncate", "abort"])
    query.update(_upstream(chance, features))
    if "cache" in features and chance.random() < 0.5:
        query["header"] = "Cache-Control:max-age=1"
    path = location.prefix + _file(chance, location)
    target = path + "?" + "&".join(f"{name}={quote(value)}" for name, value in query.items() if value)
    headers = {}
    if path.endswith("large.bin"):
        headers["Range"] = f"bytes=0-{chance.choice([0, 50_000, 400_000])}"
    if chance.random() < 0.2:
        headers["Accept-Encoding"] = "gzip"
    if chance.random() < 0.1:
        headers["traceparent"] = f"00-{chance.getrandbits(128) | 1:032x}-{chance.getrandbits(64) | 1:016x}-01"
    fields: dict[str, object] = {}
    if "grpc" in features:
        wish = json.dumps({"bytes": chance.choice([5, 5000]), "delay_ms": chance.choice([0, 40, 150])})
        fields = {"method": "POST", "message": "\0" + len(wish).to_bytes(4, "big").decode("latin-1") + wish}
        headers["Content-Type"] = "application/grpc"
    elif chance.random() < 0.3:
        fields = _body(chance, http2, pipelined)
    elif chance.random() < 0.15:
        fields = {"method": chance.choice(["HEAD", "OPTIONS", "DELETE", "PURGE"])}
    if not http2 and chance.random() < 0.1:
        fields["version"] = "HTTP/1.0"
        if fields.get("body_mode") in ("chunked", "expect"):
            fields["body_mode"] = "at once"
    return Ask(
        id_,
        location.prefix,
        target,
        headers=headers,
        features=tuple(sorted(features)),
        slow_reader=chance.random() < 0.1 and not http2,
        **fields,  # type: ignore[arg-type]
        **_fate(chance, bool(fields.get("body_bytes")), http2),  # type: ignore[arg-type]
    )


def _file(chance: Random, location: Location) -> str:
    if "slice" in location.features:
        return "page.html"
    if "parts" in location.features and "static" in location.features:
        return f"page{chance.randrange(3)}.html"
    if "grpc" in location.features:
        return "test.Echo/unary_unary"
    return chance.choice(FILES if "static" in location.features else ("", "hello.txt"))


def _upstream(chance: Random, features: set[str]) -> dict[str, str]:
    """Choose what the upstream does."""
    query = {"bytes": str(chance.choice([5, 5, 3000, 70_000, 250_000]))}
    if chance.random() < 0.35:
        query["delay_ms"] = str(chance.choice([10, 60, 130, 300]))
    if chance.random() < 0.2:
        query["status"] = str(chance.choice([204, 304, 404, 500, 503]))
    if chance.random() < 0.2:
        query |= {"parts": str(chance.choice([2, 4])), "part_ms": str(chance.choice([20, 60, 150]))}
    if "gateway" in features:
        return query
    if chance.random() < 0.2:
        query["end"] = chance.choice(["close", "reset", "truncate", "abort", "head", "nonsense", "garble"])
    if chance.random() < 0.1:
        query["stall_ms"] = str(chance.choice([60, 200]))
    if chance.random() < 0.06:
        query["head_ms"] = str(chance.choice([60, 130]))
        features.add("slow_head")
    if chance.random() < 0.3:
        query["chunked"] = "1"
    if chance.random() < 0.15:
        query["keep_alive"] = "0"
    if chance.random() < 0.05:
        query["early"] = "1"
    if chance.random() < 0.06 and "proxy" in features:
        query["header"] = f"X-Accel-Redirect:{chance.choice([*INSTEAD, '/l0/page.html', '/l1/'])}"
        features.add("redirect")
    return query


def _body(chance: Random, http2: bool, pipelined: bool) -> dict[str, object]:
    modes = ["at once", "at once", "slowly"] if http2 or pipelined else ["at once", "slowly", "chunked", "expect"]
    return {
        "method": chance.choice(["POST", "POST", "PUT", "GET"]),
        "body_bytes": chance.choice([1, 900, 20_000, 300_000]),
        "body_mode": "at once" if pipelined else chance.choice(modes),
        "pause_ms": chance.choice([30, 90, 200]),
    }


def _fate(chance: Random, body: bool, http2: bool) -> dict[str, object]:
    if chance.random() < 0.7:
        return {}
    fates = [
        fate for fate in FATES if (body or fate != "sending") and not (http2 and fate in ("half_close", "sending"))
    ]
    return {
        "fate": chance.choice(fates),
        "leave_ms": chance.choice([0, 5, 40, 120, 250]),
        "leave_bytes": chance.choice([1, 5000, 100_000]),
        "abort": chance.random() < 0.5,
    }
