"""The methods that spans and metrics name. A method outside the list is `_OTHER` (semantic conventions)."""

from otel_nginx_ebpf.traces.record import METHODS

OTHER_METHOD = "_OTHER"

KNOWN_METHODS = frozenset(METHODS.values())
"""The methods that the semantic conventions know."""

# nginx's bits of other methods (ngx_http_request.h). The user may add these methods to the list.
_WEBDAV = {
    0x0040: "MKCOL",
    0x0080: "COPY",
    0x0100: "MOVE",
    0x0400: "PROPFIND",
    0x0800: "PROPPATCH",
    0x1000: "LOCK",
    0x2000: "UNLOCK",
}
_BY_BIT = METHODS | _WEBDAV
_WITH_A_BIT = frozenset(_BY_BIT.values())


def method_of_bit(bit: int) -> str | None:
    """Returns the method of nginx's number. `None`: the number is 0 or 1, or a module's own."""
    return _BY_BIT.get(bit)


def known_method(method: str | None, known: frozenset[str]) -> str:
    """Returns `http.request.method` of a span: the method, or `_OTHER` if it is not known. `None`: not readable."""
    return method if method in known else OTHER_METHOD


def counted_method(method: str | None, known: frozenset[str]) -> str:
    """Returns `http.request.method` of a metric's series.

    The kernel counts methods by nginx's numbers, and nginx has one number for all methods that it does not know. So
    such a method is `_OTHER` here, even if it is known.
    """
    return known_method(method, known & _WITH_A_BIT)
