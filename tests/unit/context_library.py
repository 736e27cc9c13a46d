"""Makes the functions of `probes/trace_context.h` callable: gcc compiles the text that the kernel program compiles."""

import ctypes
import mmap
from dataclasses import dataclass
from pathlib import Path

from otel_nginx_ebpf.traces.abi import c_enum
from tests.unit.c_compiler import compile_library

PROBES = Path(__file__).parents[2] / "probes"
HEADER_TEXT = (PROBES / "trace_context.h").read_text(encoding="utf-8")
DECISIONS = {value: name.removeprefix("DECISION_").lower() for name, value in c_enum("decision", HEADER_TEXT).items()}

_SOURCE = r"""
#include <linux/types.h>
bool sample_by_parent, sample_always;
u64 sample_ratio_bound;
#define SAMPLE_BY_PARENT sample_by_parent
#define SAMPLE_ALWAYS sample_always
#define SAMPLE_RATIO_BOUND sample_ratio_bound
#include "trace_context.h"

u64 value_bytes = CONTEXT_VALUE_BYTES;
u64 context_bytes = sizeof(struct trace_context);

void members(const struct trace_context *context, u64 *to)
{
    to[0] = context->valid;
    to[1] = context->trace_id_high;
    to[2] = context->trace_id_low;
    to[3] = context->parent_span_id;
    to[4] = context->flags;
    to[5] = context->decision;
}

bool sampled(u8 decision, u64 trace_id_low)
{
    struct trace_context context = {.decision = decision};
    return is_sampled(&context, trace_id_low);
}

#define EXPORT(function) \
    void call_##function(struct trace_context *context, const u8 *value, u64 length) \
    {                                                                                \
        function(context, value, length);                                            \
    }
EXPORT(read_traceparent)
EXPORT(read_b3)
EXPORT(read_b3_trace_id)
EXPORT(read_b3_span_id)
EXPORT(read_b3_sampled)
EXPORT(read_b3_flags)
EXPORT(read_request_id)

void call_finish_b3_multi(struct trace_context *context)
{
    finish_b3_multi(context);
}

void call_write_traceparent(u8 *to, u64 trace_id_high, u64 trace_id_low, u64 span_id, u8 flags)
{
    write_traceparent(to, trace_id_high, trace_id_low, span_id, flags);
}
"""

_library = compile_library(_SOURCE, [PROBES / "stub_headers" / "include", PROBES])
VALUE_BYTES = ctypes.c_uint64.in_dll(_library, "value_bytes").value
_CONTEXT_BYTES = ctypes.c_uint64.in_dll(_library, "context_bytes").value

# A page of memory and one that may not be touched: whoever reads beyond the value's buffer ends the process.
_pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
_guard = ctypes.addressof(ctypes.c_char.from_buffer(_pages)) + mmap.PAGESIZE
if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(_guard), mmap.PAGESIZE, 0):
    raise OSError(ctypes.get_errno(), "mprotect")
_value = ctypes.c_void_p(_guard - VALUE_BYTES)


@dataclass(frozen=True)
class Context:
    """What the headers said; ids None where they are not to be used. `decision` is yes, no or none."""

    trace_id: int | None
    parent_span_id: int | None
    flags: int
    decision: str


def read(*headers: tuple[str, bytes], stale: int = 0) -> Context:
    """Gives (reader, value) pairs to the readers in order. `stale` is what stands in the buffer behind each value."""
    context = ctypes.create_string_buffer(_CONTEXT_BYTES)
    for reader, value in headers:
        ctypes.memmove(_value, value[:VALUE_BYTES].ljust(VALUE_BYTES, bytes([stale])), VALUE_BYTES)
        getattr(_library, f"call_read_{reader}")(context, _value, ctypes.c_uint64(len(value)))
    if any(reader.startswith("b3_") for reader, _ in headers):
        _library.call_finish_b3_multi(context)
    members = (ctypes.c_uint64 * 6)()
    _library.members(context, members)
    valid, high, low, parent, flags, decision = members
    assert valid or not (high or low or parent)
    return Context(high << 64 | low if valid else None, parent or None, flags, DECISIONS[decision])


def is_sampled(constants: dict[str, int], decision: str, trace_id: int) -> bool:
    ctypes.c_bool.in_dll(_library, "sample_by_parent").value = bool(constants["SAMPLE_BY_PARENT"])
    ctypes.c_bool.in_dll(_library, "sample_always").value = bool(constants["SAMPLE_ALWAYS"])
    ctypes.c_uint64.in_dll(_library, "sample_ratio_bound").value = constants["SAMPLE_RATIO_BOUND"]
    _library.sampled.restype = ctypes.c_bool
    number = next(value for value, name in DECISIONS.items() if name == decision)
    return bool(_library.sampled(number, ctypes.c_uint64(trace_id % 2**64)))


def traceparent(trace_id: int, span_id: int, flags: int) -> bytes:
    text = ctypes.create_string_buffer(b"?" * 60, 60)
    numbers = (ctypes.c_uint64(number) for number in (trace_id >> 64, trace_id % 2**64, span_id, flags))
    _library.call_write_traceparent(text, *numbers)
    assert text.raw[55:] == b"?????"
    return text.raw[:55]
