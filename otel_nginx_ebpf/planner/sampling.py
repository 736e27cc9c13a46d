"""Turns the settings for context and sampling into constants of the kernel program, which decides for each request."""

from otel_nginx_ebpf.settings.model import Sampler, Settings

_PARENT_BASED = "parentbased_"


def ratio_constants(name: Sampler, argument: float) -> tuple[int, int, int]:
    """Returns SAMPLE_BY_PARENT, SAMPLE_ALWAYS and SAMPLE_RATIO_BOUND of a sampler, as `constants` explains them."""
    ratio = {"always_on": 1.0, "always_off": 0.0}.get(name.removeprefix(_PARENT_BASED), argument)
    bound = round(ratio * 2**64)
    return int(name.startswith(_PARENT_BASED)), bound >> 64, bound % 2**64


def constants(settings: Settings) -> dict[str, int]:
    """Returns constants of the kernel program's text, by name. A flag is 1 or 0.

    SAMPLE_BY_PARENT: The incoming context decides if it has a decision. Otherwise the next two constants decide.
    SAMPLE_ALWAYS: Every request is sampled.
    SAMPLE_RATIO_BOUND: Otherwise a request is sampled if its trace id's low 64 bits are below this number. The SDK has
        the same rule (`TraceIdRatioBased`). Its bound for a ratio of 1 is 2^64, which does not fit in 64 bits; here
        SAMPLE_ALWAYS stands for it.
    KEEP_ERRORS: Requests that failed are kept even if they are not sampled.
    KEEP_SLOWER_THAN_NS: Requests that took longer, in nanoseconds, are kept too; 0 turns this off.
    PROPAGATOR_TRACECONTEXT, PROPAGATOR_B3, PROPAGATOR_B3MULTI, PROPAGATOR_XREQUESTID: These headers are read.
    ADOPT_UPSTREAM_CONTEXT: The setting is on.
    PROPAGATE, PROPAGATE_SOCKET: Upstreams are told the context in nginx's memory, on the socket.
    TRUSTED_PROXIES: Some peers are trusted, so the headers Forwarded and X-Forwarded-… are read.
    """
    by_parent, always, bound = ratio_constants(settings.sampler, settings.sampler_arg)
    slower = settings.keep_slower_than
    propagators = () if "none" in settings.propagators else settings.propagators
    return {
        "SAMPLE_BY_PARENT": by_parent,
        "SAMPLE_ALWAYS": always,
        "SAMPLE_RATIO_BOUND": bound,
        "KEEP_ERRORS": int(settings.keep_errors),
        "KEEP_SLOWER_THAN_NS": 0 if slower is None else slower,
        "PROPAGATOR_TRACECONTEXT": int("tracecontext" in propagators),
        "PROPAGATOR_B3": int("b3" in propagators),
        "PROPAGATOR_B3MULTI": int("b3multi" in propagators),
        "PROPAGATOR_XREQUESTID": int("xrequestid" in propagators),
        "ADOPT_UPSTREAM_CONTEXT": int(settings.adopt_upstream_context),
        "PROPAGATE": int(settings.tells_in_memory),
        "PROPAGATE_SOCKET": int(settings.tells_on_socket),
        "TRUSTED_PROXIES": int(bool(settings.trusted_proxy)),
    }
