"""The tracestate header (W3C Trace Context level 2, "tracestate Header Field Values").

Not the API's `TraceState.from_header`: that takes level 1's keys only, and logs a line for each header it refuses,
which any client can send.
"""

import re
from functools import lru_cache

_MEMBERS_MAX = 32
_KEPT_HEADERS = 256

# key: ( lcalpha / DIGIT ) 0*255( keychar ); value: printable ASCII but comma and "=", and no blank at its end.
_MEMBER = re.compile(r"([a-z0-9][a-z0-9_\-*/@]{0,255})=[ -+\--<>-~]{0,255}[!-+\--<>-~]")


@lru_cache(_KEPT_HEADERS)
def canonical(header: str | None) -> str:
    """The list without its optional white space and empty members; of one key twice the first, which is the latest.

    Args:
        header: The header's lines in order, joined by commas; None: there was none.

    Returns:
        "" where nothing is left, a member is malformed, or there are more than 32: the whole list is not to be used.
    """
    members: dict[str, str] = {}
    for part in (header or "").split(","):
        if member := part.strip(" \t"):
            match = _MEMBER.fullmatch(member)
            if match is None:
                return ""
            members.setdefault(match[1], member)
    return ",".join(members.values()) if len(members) <= _MEMBERS_MAX else ""
