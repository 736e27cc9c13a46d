"""What the kernel program is to know of the settings about context and sampling: it decides at each request's end."""

from otel_nginx_ebpf.settings.model import Settings

_PARENT_BASED = "parentbased_"


def constants(settings: Settings) -> dict[str, int]:
    """Constants of the kernel program's text, by name.

    SAMPLE_BY_PARENT: 1: the incoming context's decision counts, where it has one; else what follows decides.
    SAMPLE_ALWAYS: 1: everything is sampled.
    SAMPLE_RATIO_BOUND: else sampled where the trace id's low 64 bits are below this number. The SDK's rule
        (`TraceIdRatioBased`), whose bound for a ratio of 1, 2^64, is SAMPLE_ALWAYS here as it does not fit in 64 bits.
    KEEP_ERRORS, KEEP_SLOWER_THAN_NS: what is kept though not sampled; nanoseconds, 0: nothing for being slow.
    PROPAGATOR_TRACECONTEXT, PROPAGATOR_B3, PROPAGATOR_B3MULTI, PROPAGATOR_XREQUESTID: 1: these headers are read.
    ADOPT_UPSTREAM_CONTEXT, PROPAGATE: 1: on.
    """
    sampler = settings.sampler.removeprefix(_PARENT_BASED)
    ratio = {"always_on": 1.0, "always_off": 0.0}.get(sampler, settings.sampler_arg)
    bound = round(ratio * 2**64)
    slower = settings.keep_slower_than
    propagators = () if "none" in settings.propagators else settings.propagators
    return {
        "SAMPLE_BY_PARENT": int(settings.sampler.startswith(_PARENT_BASED)),
        "SAMPLE_ALWAYS": bound >> 64,
        "SAMPLE_RATIO_BOUND": bound % 2**64,
        "KEEP_ERRORS": int(settings.keep_errors),
        "KEEP_SLOWER_THAN_NS": 0 if slower is None else slower,
        "PROPAGATOR_TRACECONTEXT": int("tracecontext" in propagators),
        "PROPAGATOR_B3": int("b3" in propagators),
        "PROPAGATOR_B3MULTI": int("b3multi" in propagators),
        "PROPAGATOR_XREQUESTID": int("xrequestid" in propagators),
        "ADOPT_UPSTREAM_CONTEXT": int(settings.adopt_upstream_context),
        "PROPAGATE": int(settings.propagate),
    }
