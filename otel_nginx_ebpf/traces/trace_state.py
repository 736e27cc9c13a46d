"""Parses the tracestate header (W3C Trace Context level 2, "tracestate Header Field Values").

The API's `TraceState.from_header` does not fit: it accepts only the keys of level 1, and logs a line for each header
that it refuses. Any client can send such headers.
"""

import re
from functools import lru_cache

_MEMBERS_MAX = 32
_KEPT_HEADERS = 256

# key: ( lcalpha / DIGIT ) 0*255( keychar ); value: printable ASCII except comma and "=", without a blank at its end.
_MEMBER = re.compile(r"([a-z0-9][a-z0-9_\-*/@]{0,255})=[ -+\--<>-~]{0,255}[!-+\--<>-~]")


@lru_cache(_KEPT_HEADERS)
def canonical(header: str | None) -> str:
    """Returns the list without optional white space and empty members.

    If several members have one key, the first member wins, because it is the latest.

    Args:
        header: The header's lines in order, joined by commas; `None`: there was no header.

    Returns:
        "" if nothing is left. Also "" if a member is malformed or there are more than 32 members, because the whole
        list must then not be used.
    """
    members: dict[str, str] = {}
    for part in (header or "").split(","):
        if member := part.strip(" \t"):
            match = _MEMBER.fullmatch(member)
            if match is None:
                return ""
            members.setdefault(match[1], member)
    return ",".join(members.values()) if len(members) <= _MEMBERS_MAX else ""
