"""Where the probes sit: a table from a boundary of a request to the nginx functions that mark it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Boundary:
    """A moment in a request's life that only an nginx function tells.

    `functions` are candidates in order of preference; a handler `enter_<function>` exists for each in `probes/`.
    `arguments` is how many of the function's arguments must still be in their registers at the site.
    """

    name: str
    functions: tuple[str, ...]
    arguments: int
    required: bool
    without: str
    """What traces lack without it."""
    at_request_detail: bool = False
    """Whether it is probed at `--detail request` as well."""
    setting: str | None = None
    """The setting that must be on for it to be probed."""
    spared: bool = False
    """Whether it can be let go while no request needs it (`kernel.beginnings`)."""
    writes: bool = False
    """Whether its handler writes to nginx's memory."""


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
        # The second marks the moment a little early, and costs a hit on every request of any protocol.
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
        setting="propagate",
        writes=True,
    ),
)

OBJECTS = ("ngx_http_core_module", "ngx_cached_time", "ngx_current_msec")
"""Exported objects that are read: the first one's ctx_index leads to location and server names, the others are nginx's
clock."""

ENDINGS = ("ngx_http_request_empty_handler", "ngx_http_discarded_request_body_handler", "ngx_exiting")
"""Exported functions and objects that tell how a request ended. Without them no response is known to be incomplete."""
