"""Fields of HTTP/2, against an encoder that nobody here wrote."""

from hpack import Encoder
from hypothesis import example, given
from hypothesis import strategies as st

from otel_nginx_ebpf.traces import hpack_fields

TEXTS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=400)


@given(TEXTS, st.booleans())
@example("/", True)
@example("/" + "Z" * 126, False)
def test_what_was_encoded(text: str, huffman: bool) -> None:
    (path,) = [Encoder().encode([(":path", text)], huffman=huffman)]
    assert hpack_fields.path(b"\x44" + path[1:] if path[0] == 0x04 else path) == text
    (authority,) = [Encoder().encode([(":authority", text)], huffman=huffman)]
    assert hpack_fields.value(authority[1:]) == text


@given(st.binary(min_size=1, max_size=60))
@example(b"\xff\xff\xff\xff")
@example(b"\x84\x00")
def test_any_bytes_are_a_text_or_none(field: bytes) -> None:
    assert isinstance(hpack_fields.value(field), str | None)
    assert isinstance(hpack_fields.path(field), str | None)


def test_a_cut_text_is_no_text() -> None:
    authority = Encoder().encode([(":authority", "host.example:8080")])[1:]
    assert [hpack_fields.value(authority[:length]) for length in range(1, len(authority))] == [None] * (
        len(authority) - 1
    )
