"""The attach points: a table of the boundaries of a request and the nginx functions that mark them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Boundary:
    """A moment in a request's life that only a call of an nginx function shows.

    `functions` are candidates in order of preference. Each has a handler `enter_<function>` in `probes/`.
    `arguments` is how many of the function's arguments must still be in their registers at the site.
    """

    name: str
    functions: tuple[str, ...]
    arguments: int
    required: bool
    without: str
    """What traces lack without a probe here."""
    at_request_detail: bool = False
    """The boundary is probed at `--detail request` too."""
    setting: str | None = None
    """The boundary is probed only if this setting is on."""
    spared: bool = False
    """The probe can be detached while no request needs it (`kernel.beginnings`)."""
    writes: bool = False
    """The handler writes to nginx's memory."""
    of: tuple[str, str] | None = None
    """The struct and its member without which nginx has no such boundary."""


BOUNDARIES: tuple[Boundary, ...] = (
    Boundary(
        name="worker starts",
        functions=("ngx_setproctitle",),
        arguments=0,
        required=False,
        without="the accept and the first read of a new worker's first request",
    ),
    Boundary(
        name="request begins",
        functions=("ngx_http_create_request",),
        arguments=1,
        required=True,
        without="everything",
        spared=True,
    ),
    Boundary(
        name="request ends",
        functions=("ngx_http_free_request",),
        arguments=2,
        required=True,
        without="everything",
        at_request_detail=True,
    ),
    Boundary(
        name="TLS handshake ends",
        functions=("ngx_ssl_ocsp_validate",),
        arguments=1,
        required=False,
        without="nginx.tls.handshake.duration_ns",
        of=("ngx_connection_s", "ssl"),
    ),
    Boundary(
        name="upstream attempt ends",
        functions=("ngx_http_upstream_free_round_robin_peer",),
        arguments=1,
        required=False,
        without="what nginx told its peers (--adopt-upstream-context)",
        setting="adopt_upstream_context",
    ),
    Boundary(
        name="request body arrives",
        functions=("ngx_http_request_body_save_filter",),
        arguments=1,
        required=False,
        without="the body's part of downstream read on HTTP/2 and after 100 Continue",
    ),
    Boundary(
        name="HTTP/2 body is wanted",
        functions=("ngx_http_v2_read_request_body",),
        arguments=1,
        required=False,
        without="downstream read spans of some HTTP/2 requests with a body",
    ),
    Boundary(
        name="HTTP/2 response begins",
        # The second function is called a little early, and for every request of any protocol, which costs a hit each.
        functions=("ngx_http_v2_send_output_queue", "ngx_http_send_header"),
        arguments=1,
        required=False,
        without="downstream write spans on HTTP/2",
    ),
    Boundary(
        name="headers are parsed",
        functions=("ngx_http_process_request",),
        arguments=1,
        required=False,
        without="the application's part (--propagate)",
        setting="tells_in_memory",
        writes=True,
    ),
    Boundary(
        name="error is logged",
        # Called only for a level that the log has.
        functions=("ngx_log_error_core",),
        arguments=3,
        required=False,
        without="the lines of nginx's error log",
        setting="reads_error_log",
    ),
)

OBJECTS = ("ngx_http_core_module", "ngx_cached_time", "ngx_current_msec")
"""Exported objects that the probes read. The ctx_index of ngx_http_core_module leads to the names of location and
server; the others are nginx's clock."""

ENDINGS = ("ngx_http_request_empty_handler", "ngx_http_discarded_request_body_handler", "ngx_exiting")
"""Exported functions and objects that tell how a request ended. Without them no response is reported as incomplete."""

REDIRECTS = ("ngx_http_core_get_method",)
"""Exported object with the method that nginx sets for an internal redirect. Without it the program guesses."""

PROCESS = ("ngx_process",)
"""Exported number: what kind of process it is. A worker's configuration does not change. Without this number the
program looks up names in the configuration for each request."""
