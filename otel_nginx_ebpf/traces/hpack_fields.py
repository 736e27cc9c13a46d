"""Decodes two fields of an HTTP/2 request as nginx encodes them (RFC 7541): `:path` and the value of `:authority`."""

_ROOT = 0x84  # the static table's `:path: /`


def path(field: bytes) -> str | None:
    """Returns the value of a `:path` field. `None`: the bytes are cut short, or are not such a field."""
    return "/" if field[0] == _ROOT else value(field[1:])


def value(literal: bytes) -> str | None:
    """Returns the text of a string literal (RFC 7541, 5.2). `None`: the bytes are cut short, or are no such literal."""
    # Only who has gRPC or HTTP/2 upstreams needs the library.
    from hpack.exceptions import HPACKError
    from hpack.hpack import decode_integer
    from hpack.huffman_table import decode_huffman

    try:
        length, begins = decode_integer(literal, 7)
        text = literal[begins : begins + length]
        if len(text) < length:
            return None
        return (decode_huffman(text) if literal[0] & 0x80 else text).decode("utf-8", "backslashreplace")
    except HPACKError:
        return None
