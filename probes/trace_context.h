/*
 * Trace context: reads it from a request's headers, decides about sampling, and writes ids as text.
 *
 * The code uses no maps and makes no calls, so that the kernel program and the unit tests (gcc) compile the same text. It is
 * straight-line code: arithmetic decodes 8 hexadecimal digits at once, without loops or branches that the verifier would
 * have to follow.
 *
 *     struct trace_context context = {};                      all zero: no context
 *     read_traceparent(&context, value, length)               or read_b3, read_request_id; or, for B3 in several headers,
 *     read_b3_trace_id, read_b3_span_id, read_b3_sampled, read_b3_flags, then finish_b3_multi(&context)
 *     is_sampled(&context, trace_id_low)                      trace_id_low: of the request's trace, which may be a new one
 *     write_hex_16(text, id), write_traceparent(text, …)      write 16 and TRACEPARENT_BYTES bytes, without a final zero
 *
 * `value` is a buffer of CONTEXT_VALUE_BYTES that begins with the value's bytes. `length` is the length of the whole value,
 * which may be longer. A malformed value changes nothing. The caller handles repeated headers: two traceparent headers
 * count as none (W3C), and of repeated B3 headers the first wins. b3 wins over X-B3-….
 */

#define CONTEXT_VALUE_BYTES 72 /* the longest value, b3 with a parent, has 68 */
#define TRACEPARENT_BYTES 55

#define FLAG_SAMPLED 1
#define FLAG_RANDOM 2          /* W3C Trace Context level 2: the trace id's low 7 bytes are random */

enum decision {
    DECISION_NONE = 0,         /* the context leaves the decision to this program */
    DECISION_YES = 1,
    DECISION_NO = 2,
};

struct trace_context {
    u64 trace_id_high;
    u64 trace_id_low;
    u64 parent_span_id;        /* 0: none (X-Request-ID names only a trace) */
    u8 flags;                  /* FLAG_SAMPLED, FLAG_RANDOM */
    u8 decision;               /* may be set without ids: `b3: 0` */
    u8 valid;                  /* the ids can be used */
};

#define EACH_BYTE 0x0101010101010101ULL

static __always_inline u64 load_8(const u8 *at)
{
    return (u64)at[0] << 56 | (u64)at[1] << 48 | (u64)at[2] << 40 | (u64)at[3] << 32
           | (u64)at[4] << 24 | (u64)at[5] << 16 | (u64)at[6] << 8 | at[7];
}

/* Returns the top bit of each byte that is at least `least`. All bytes of `bytes` must be below 0x80. */
static __always_inline u64 not_below(u64 bytes, u8 least)
{
    return bytes + (0x80 - least) * EACH_BYTE;
}

/* Decodes 8 hexadecimal digits; the first digit is in the top byte. Sets bits in *bad for bytes that are not digits.
   case_bit: 0x20 accepts upper-case digits too, 0 does not. */
static __always_inline u64 decode_8(u64 text, u8 case_bit, u64 *bad)
{
    u64 low = text & 0x7f * EACH_BYTE, folded = low | case_bit * EACH_BYTE;
    u64 digits = not_below(low, '0') & ~not_below(low, '9' + 1);
    u64 letters = not_below(folded, 'a') & ~not_below(folded, 'f' + 1) & 0x80 * EACH_BYTE;
    *bad |= (text | ~(digits | letters)) & 0x80 * EACH_BYTE;
    u64 nibbles = (text & 0x0f * EACH_BYTE) + 9 * (letters >> 7);
    u64 bytes = (nibbles | nibbles >> 4) & 0x00ff00ff00ff00ffULL;
    u64 halves = (bytes | bytes >> 8) & 0x0000ffff0000ffffULL;
    return (halves | halves >> 16) & 0xffffffff;
}

static __always_inline u64 decode_16(const u8 *at, u8 case_bit, u64 *bad)
{
    u64 high = decode_8(load_8(at), case_bit, bad);
    return high << 32 | decode_8(load_8(at + 8), case_bit, bad);
}

static __always_inline u64 decode_2(const u8 *at, u64 *bad)
{
    return decode_8('0' * (EACH_BYTE << 16) | (u64)at[0] << 8 | at[1], 0, bad);
}

/* W3C Trace Context level 2, "traceparent Header Field Values", "Versioning of traceparent". */
static __always_inline void read_traceparent(struct trace_context *context, const u8 *value, u64 length)
{
    if (length < TRACEPARENT_BYTES)
        return;
    u64 bad = 0;
    u64 version = decode_2(value, &bad);
    u64 high = decode_16(value + 3, 0, &bad), low = decode_16(value + 19, 0, &bad), parent = decode_16(value + 36, 0, &bad);
    u64 flags = decode_2(value + 53, &bad) & (FLAG_SAMPLED | FLAG_RANDOM);
    bad |= (value[2] ^ '-') | (value[35] ^ '-') | (value[52] ^ '-');
    if (bad || version == 0xff || (high | low) == 0 || parent == 0)
        return;
    if (length > TRACEPARENT_BYTES && (version == 0 || value[TRACEPARENT_BYTES] != '-')) /* a later version may append */
        return;
    context->trace_id_high = high;
    context->trace_id_low = low;
    context->parent_span_id = parent;
    context->flags = flags;
    context->decision = flags & FLAG_SAMPLED ? DECISION_YES : DECISION_NO;
    context->valid = 1;
}

static __always_inline void decide(struct trace_context *context, u8 state)
{
    context->decision = state == '0' ? DECISION_NO : DECISION_YES;
    context->flags = state == '0' ? 0 : FLAG_SAMPLED;
}

/* Reads what follows b3's trace id: `-{span}[-{state}[-{parent}]]`. `length` is its length; a huge number if the value ended
   before. */
static __always_inline void read_b3_tail(struct trace_context *context, u64 high, u64 low, const u8 *value, u64 length, u64 bad)
{
    u64 span = decode_16(value + 1, 0, &bad);
    u8 state = value[18];
    bad |= value[0] ^ '-';
    if (length > 17)
        bad |= (value[17] ^ '-') | (u64)(state != '0' && state != '1' && state != 'd');
    if (length > 19) {
        bad |= value[19] ^ '-';
        decode_16(value + 20, 0, &bad);
    }
    if (bad || (length != 17 && length != 19 && length != 36) || (high | low) == 0 || span == 0)
        return;
    context->trace_id_high = high;
    context->trace_id_low = low;
    context->parent_span_id = span;
    context->valid = 1;
    if (length > 17)
        decide(context, state);
}

/* openzipkin/b3-propagation, "Single Header": `{trace}-{span}[-{state}[-{parent}]]`, or the state alone. */
static __always_inline void read_b3(struct trace_context *context, const u8 *value, u64 length)
{
    u64 bad = 0;
    if (length == 1) {
        if (value[0] == '0' || value[0] == '1' || value[0] == 'd')
            decide(context, value[0]);
        return;
    }
    u64 first = decode_16(value, 0, &bad);
    if (value[16] == '-') {
        read_b3_tail(context, 0, first, value + 16, length - 16, bad);
    } else {
        u64 low = decode_16(value + 16, 0, &bad);
        read_b3_tail(context, first, low, value + 32, length - 32, bad);
    }
}

/* X-B3-TraceId: 32 or 16 digits. */
static __always_inline void read_b3_trace_id(struct trace_context *context, const u8 *value, u64 length)
{
    u64 bad = 0, high = 0;
    u64 low = decode_16(value, 0, &bad);
    if (length == 32) {
        high = low;
        low = decode_16(value + 16, 0, &bad);
    }
    if (bad || (length != 32 && length != 16))
        return;
    context->trace_id_high = high;
    context->trace_id_low = low;
}

/* X-B3-SpanId: 16 digits. */
static __always_inline void read_b3_span_id(struct trace_context *context, const u8 *value, u64 length)
{
    u64 bad = 0;
    u64 span = decode_16(value, 0, &bad);
    if (!bad && length == 16)
        context->parent_span_id = span;
}

/* X-B3-Sampled: 1 or 0; true or false from tracers older than the specification. X-B3-Flags wins over it. */
static __always_inline void read_b3_sampled(struct trace_context *context, const u8 *value, u64 length)
{
    if (context->decision != DECISION_NONE)
        return;
    u64 word = load_8(value);
    if ((length == 1 && value[0] == '1') || (length == 4 && word >> 32 == 0x74727565)) /* true */
        decide(context, '1');
    else if ((length == 1 && value[0] == '0') || (length == 5 && word >> 24 == 0x66616c7365)) /* false */
        decide(context, '0');
}

/* X-B3-Flags: 1 is debug, which implies sampled. */
static __always_inline void read_b3_flags(struct trace_context *context, const u8 *value, u64 length)
{
    if (length == 1 && value[0] == '1')
        decide(context, '1');
}

/* Trace id and span id count only together. A decision counts without them too. */
static __always_inline void finish_b3_multi(struct trace_context *context)
{
    if ((context->trace_id_high | context->trace_id_low) != 0 && context->parent_span_id != 0) {
        context->valid = 1;
        return;
    }
    context->trace_id_high = 0;
    context->trace_id_low = 0;
    context->parent_span_id = 0;
}

/* X-Request-ID as trace id: 32 digits in upper or lower case (nginx's $request_id), or a UUID with dashes. */
static __always_inline void read_request_id(struct trace_context *context, const u8 *value, u64 length)
{
    u64 bad = 0, high, low;
    if (length == 32) {
        high = decode_16(value, 0x20, &bad);
        low = decode_16(value + 16, 0x20, &bad);
    } else if (length == 36) {
        /* 01234567-9012-4567-9012-456789012345 */
        u64 middle = load_8(value + 9) >> 32 << 32 | load_8(value + 14) >> 32;
        u64 next = load_8(value + 19) >> 32 << 32 | load_8(value + 24) >> 32;
        high = decode_8(load_8(value), 0x20, &bad) << 32 | decode_8(middle, 0x20, &bad);
        low = decode_8(next, 0x20, &bad) << 32 | decode_8(load_8(value + 28), 0x20, &bad);
        bad |= (value[8] ^ '-') | (value[13] ^ '-') | (value[18] ^ '-') | (value[23] ^ '-');
    } else {
        return;
    }
    if (bad || (high | low) == 0)
        return;
    context->trace_id_high = high;
    context->trace_id_low = low;
    context->valid = 1;
}

#ifdef SAMPLE_RATIO_BOUND
/* The SDK's ParentBased and TraceIdRatioBased; planner/sampling.py explains the constants. */
static __always_inline bool is_sampled(const struct trace_context *parent, u64 trace_id_low)
{
    if (SAMPLE_BY_PARENT && parent->decision != DECISION_NONE)
        return parent->decision == DECISION_YES;
    return SAMPLE_ALWAYS || trace_id_low < SAMPLE_RATIO_BOUND;
}
#endif

static __always_inline void write_hex_8(u8 *to, u32 number)
{
    u64 halves = (number | (u64)number << 16) & 0x0000ffff0000ffffULL;
    u64 bytes = (halves | halves << 8) & 0x00ff00ff00ff00ffULL;
    u64 nibbles = (bytes | bytes << 4) & 0x0f * EACH_BYTE;
    u64 letters = (not_below(nibbles, 10) >> 7) & EACH_BYTE;
    u64 text = nibbles + '0' * EACH_BYTE + letters * ('a' - '9' - 1);
    to[0] = text >> 56;
    to[1] = text >> 48;
    to[2] = text >> 40;
    to[3] = text >> 32;
    to[4] = text >> 24;
    to[5] = text >> 16;
    to[6] = text >> 8;
    to[7] = text;
}

static __always_inline void write_hex_16(u8 *to, u64 id)
{
    write_hex_8(to, id >> 32);
    write_hex_8(to + 8, id);
}

static __always_inline void write_traceparent(u8 *to, u64 trace_id_high, u64 trace_id_low, u64 span_id, u8 flags)
{
    to[0] = '0';
    to[1] = '0';
    to[2] = '-';
    write_hex_16(to + 3, trace_id_high);
    write_hex_16(to + 19, trace_id_low);
    to[35] = '-';
    write_hex_16(to + 36, span_id);
    to[52] = '-';
    to[53] = '0';
    to[54] = '0' + (flags & (FLAG_SAMPLED | FLAG_RANDOM));
}
