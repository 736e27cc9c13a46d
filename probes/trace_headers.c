/*
 * Decides which trace a request belongs to and whether it is sampled, by its headers and by what nginx sent to the upstream.
 * maps.c lists the constants.
 */

/* Each part of the list is more to follow for the verifier, and so is each name that is looked for. */
#define HEADER_PARTS_MAX (PROPAGATOR_B3MULTI && TELLS ? 4 : 8)

/* Notes where a header's value is, if the header has this name. Repeated headers: the first counts; each tracestate
 * counts; of the headers of proxies the last. */
static __always_inline void note_header(struct process *process, u8 *header, u32 place, u64 length, u64 name_low, u64 name_high)
{
    u64 name[2] = {};
    u64 compared = length > sizeof(name) ? sizeof(name) : length; /* the hash confirms a longer name */
    if (MEMBER(header, u64, ngx_table_elt_t, key) != length
        || bpf_probe_read_user(name, compared, (void *)MEMBER(header, u64, ngx_table_elt_t, lowcase_key)) != 0
        || name[0] != name_low || name[1] != name_high)
        return;
    u64 line = process->header_lines[place]++;
    if (place == HEADER_TRACESTATE) {
        if (line >= TRACESTATE_LINES_MAX)
            return;
        process->tracestate[line & (TRACESTATE_LINES_MAX - 1)] = *(struct ngx_str *)(header + OFFSET_ngx_table_elt_t__value);
    } else if (line == 0 || place >= HEADER_FORWARDED) {
        process->header_values[place] = *(struct ngx_str *)(header + OFFSET_ngx_table_elt_t__value);
    }
}

#define NOTE_HEADER(name, place)                                                                                       \
    if (hash == HASH_##name)                                                                                           \
    note_header(process, header, place, LENGTH_##name, NAME_LOW_##name, NAME_HIGH_##name)

#define HEADERS_ARE_READ                                                                                               \
    (PROPAGATOR_TRACECONTEXT || PROPAGATOR_B3 || PROPAGATOR_B3MULTI || PROPAGATOR_XREQUESTID || TELLS                  \
     || ADOPT_UPSTREAM_CONTEXT || TRUSTED_PROXIES)

/* Goes through the list at r->headers_in.headers; process->request holds r. */
static __always_inline void find_context_headers(struct process *process)
{
    u8 *list = process->request + OFFSET_ngx_http_request_s__headers_in + OFFSET_ngx_http_headers_in_t__headers;
    u8 *part = list + OFFSET_ngx_list_t__part;
    u64 elements = MEMBER(part, u64, ngx_list_part_s, elts);
    u64 count = MEMBER(part, u64, ngx_list_part_s, nelts);
    u64 next = MEMBER(part, u64, ngx_list_part_s, next);

    __builtin_memset(process->header_lines, 0, sizeof(process->header_lines));
    process->headers_address = 0;
    for (int p = 0; p < HEADER_PARTS_MAX; p++) {
        if (count > HEADERS_IN_PART)
            count = HEADERS_IN_PART;
        u64 bytes = count * SIZEOF_ngx_table_elt_t;
        if (bytes && (bytes > sizeof(process->headers) || bpf_probe_read_user(process->headers, bytes, (void *)elements) != 0)) {
            count_loss(PARTIAL_STRING_READ_FAILED);
            process->headers_address = 0; /* process->headers still holds other headers */
            return;
        }
        process->headers_read = count;
        process->headers_address = elements;
        for (u32 i = 0; i < HEADERS_IN_PART && i < *(volatile u64 *)&process->headers_read; i++) {
            u8 *header = process->headers + i * SIZEOF_ngx_table_elt_t;
            u64 hash = MEMBER(header, u64, ngx_table_elt_t, hash);
#if PROPAGATOR_TRACECONTEXT || TELLS || ADOPT_UPSTREAM_CONTEXT
            NOTE_HEADER(traceparent, HEADER_TRACEPARENT);
            NOTE_HEADER(tracestate, HEADER_TRACESTATE);
#endif
#if PROPAGATOR_B3
            NOTE_HEADER(b3, HEADER_B3);
#endif
#if PROPAGATOR_B3MULTI
            NOTE_HEADER(x_b3_traceid, HEADER_B3_TRACE_ID);
            NOTE_HEADER(x_b3_spanid, HEADER_B3_SPAN_ID);
            NOTE_HEADER(x_b3_sampled, HEADER_B3_SAMPLED);
            NOTE_HEADER(x_b3_flags, HEADER_B3_FLAGS);
#endif
#if PROPAGATOR_XREQUESTID
            NOTE_HEADER(x_request_id, HEADER_REQUEST_ID);
#endif
#if TRUSTED_PROXIES
            NOTE_HEADER(forwarded, HEADER_FORWARDED);
            NOTE_HEADER(x_forwarded_proto, HEADER_X_FORWARDED_PROTO);
            NOTE_HEADER(x_forwarded_host, HEADER_X_FORWARDED_HOST);
#endif
        }
        if (!next)
            return;
        u8 *following = process->header_part;
        if (bpf_probe_read_user(following, sizeof(process->header_part), (void *)next) != 0) {
            count_loss(PARTIAL_STRING_READ_FAILED);
            return;
        }
        elements = MEMBER(following, u64, ngx_list_part_s, elts);
        count = MEMBER(following, u64, ngx_list_part_s, nelts);
        next = MEMBER(following, u64, ngx_list_part_s, next);
    }
    count_loss(PARTIAL_STRING_CUT); /* more than 160 headers, or 80 */
}

/* Copies a header's value to process->context_value. Returns the value's length; 0: no such header. */
static __always_inline u64 read_header_value(struct process *process, u32 place)
{
    struct ngx_str *value = &process->header_values[place];
    u64 bytes = value->len;
    if (!process->header_lines[place] || !bytes)
        return 0;
    if (bytes > CONTEXT_VALUE_BYTES)
        bytes = CONTEXT_VALUE_BYTES;
    asm volatile("" : "+r"(bytes));
    if (bytes > CONTEXT_VALUE_BYTES || bpf_probe_read_user(process->context_value, bytes, (void *)value->data) != 0) {
        count_loss(PARTIAL_STRING_READ_FAILED);
        return 0;
    }
    return value->len;
}

#define READ_HEADER(place, read)                                                                                       \
    do {                                                                                                               \
        u64 length = read_header_value(process, place);                                                                \
        if (length)                                                                                                    \
            read(context, process->context_value, length);                                                             \
    } while (0)

/* Reads the request's incoming context into process->incoming. find_context_headers has found its headers. */
static __always_inline void read_incoming_context(struct process *process)
{
    struct trace_context *context = &process->incoming;
    __builtin_memset(context, 0, sizeof(*context));
    process->trace.has_tracestate = 0;
#if PROPAGATOR_TRACECONTEXT
    if (process->header_lines[HEADER_TRACEPARENT] == 1) /* W3C: two of them count as none */
        READ_HEADER(HEADER_TRACEPARENT, read_traceparent);
    process->trace.has_tracestate = context->valid;
#endif
#if PROPAGATOR_B3
    if (!context->valid)
        READ_HEADER(HEADER_B3, read_b3);
#endif
#if PROPAGATOR_B3MULTI
    if (!context->valid && context->decision == DECISION_NONE) {
        READ_HEADER(HEADER_B3_TRACE_ID, read_b3_trace_id);
        READ_HEADER(HEADER_B3_SPAN_ID, read_b3_span_id);
        READ_HEADER(HEADER_B3_FLAGS, read_b3_flags);
        READ_HEADER(HEADER_B3_SAMPLED, read_b3_sampled);
        finish_b3_multi(context);
    }
#endif
#if PROPAGATOR_XREQUESTID
    if (!context->valid)
        READ_HEADER(HEADER_REQUEST_ID, read_request_id);
#endif
}

#if ADOPT_UPSTREAM_CONTEXT
/* How much of what nginx sent upstream is searched. Twice as much is too much for the verifier of Linux 5.10. */
#define SENT_BYTES_MAX 2048
#define BLANK_LINE 0x0a0d0a0d
#define RESPONSE 0x50545448 /* "HTTP" */

#define RACEPARE 0x6572617065636172ULL /* "racepare", the middle of "traceparent" */

/* Returns where the value begins, given "racepare" at `at`. 0: this is not the name of a header.
 *     HTTP/1   \n traceparent : ' ' value
 *     FastCGI  16 55 HTTP_TRACEPARENT value
 *     uwsgi    16 0 HTTP_TRACEPARENT 55 0 value
 *     SCGI     0 HTTP_TRACEPARENT 0 value */
static __always_inline u64 sent_value(const u8 *sent, u64 at)
{
    const u8 *name = sent + at, *behind = name + 10;
    if ((name[-1] | 0x20) != 't' || (name[8] | 0x20) != 'n' || (name[9] | 0x20) != 't')
        return 0;
    if (name[-2] == '\n')
        return behind[0] == ':' && behind[1] == ' ' ? at + 12 : 0;
    if (name[-2] != '_')
        return 0;
    if (name[-7] == TRACEPARENT_BYTES && name[-8] == 16)
        return at + 10;
    if (name[-7] == 0 && name[-8] == 16)
        return at + 12;
    return name[-7] == 0 && behind[0] == 0 ? at + 11 : 0;
}

/* Returns 0 for "racepare" in a header's name; the bytes before it tell a name from a URI or a value. The result is computed as
 * a number without branches, because a loop with several branches has more states than older verifiers can follow. */
static __always_inline u64 has_no_name(const u8 *at)
{
    return ((*(u64 *)at | LOWER_CASE) ^ RACEPARE) | (u64)(at[-2] ^ '\n') * (at[-8] ^ 16) * at[-7];
}

/* Returns 0 where the search ends: at such a name, or at the blank line. Behind the blank line proxy_set_body may put text from
 * the client. */
static __always_inline u64 goes_on(const u8 *at)
{
    u64 name = has_no_name(at), blank = *(u32 *)at ^ BLANK_LINE;
    return ((name | -name) & (blank | -blank)) >> 63;
}

/* Reads the traceparent that nginx sent to the upstream into process->told, from the first buffer of u->request_bufs, which holds
 * the header. Called when the attempt ends; it uses process->record as scratch memory. */
static __always_inline void read_told_context(struct process *process, u64 upstream)
{
    struct trace_context *told = &process->told;
    __builtin_memset(told, 0, sizeof(*told));
    u64 chain = 0, buffer = 0, start = 0, last = 0;
    if (!read_pointer(&chain, upstream + OFFSET_ngx_http_upstream_s__request_bufs) || !chain
        || !read_pointer(&buffer, chain + OFFSET_ngx_chain_s__buf) || !buffer
        || !read_pointer(&start, buffer + OFFSET_ngx_buf_s__start) || !read_pointer(&last, buffer + OFFSET_ngx_buf_s__last))
        return;
    u64 bytes = last - start;
    if (!start || last <= start)
        return;
    if (bytes > SENT_BYTES_MAX)
        bytes = SENT_BYTES_MAX;
    asm volatile("" : "+r"(bytes));
    if (bytes > SENT_BYTES_MAX || bpf_probe_read_user(process->record, bytes, (void *)start) != 0)
        return;
    /* With proxy_request_buffering off nginx frees the chain's link when it is sent (ngx_http_upstream_send_request_body), and may
     * have reused it for a response. */
    if (*(u32 *)process->record == RESPONSE)
        return;

    process->found_at = 0; /* kept in the map's memory, so that the verifier does not track each position separately */
    EACH(i, bytes, SENT_BYTES_MAX) {
        if (i < 8)
            continue;
        if (!goes_on(process->record + i)) {
            process->found_at = i;
            break;
        }
    }
    asm volatile("" ::: "memory");
    u64 at = process->found_at;
    if (at < 8)
        return;
    asm volatile("" : "+r"(at)); /* keeps two comparisons that the verifier follows; clang would merge them into one */
    if (at >= SENT_BYTES_MAX)
        return;
    u64 value = sent_value(process->record, at);
    asm volatile("" : "+r"(value));
    if (value && value <= SENT_BYTES_MAX + 16 && value + TRACEPARENT_BYTES <= bytes)
        read_traceparent(told, process->record + value, TRACEPARENT_BYTES);
}

/* Returns the span id in the client's first traceparent, even if that is malformed, repeated, or its propagator is off: nginx
 * passes it on unchanged. 0: none. */
static __always_inline u64 read_client_span_id(struct process *process)
{
    u64 bad = 0;
    if (read_header_value(process, HEADER_TRACEPARENT) < TRACEPARENT_BYTES)
        return 0;
    return decode_16(process->context_value + 36, 0, &bad);
}

/* Tells whether `told` names a span other than the incoming context's and the client's. Two spans must not share an id. */
static __always_inline bool tells_something_new(const struct process *process, const struct trace_context *told)
{
    const struct trace_context *incoming = &process->incoming;
    return told->valid && told->parent_span_id != process->client_span_id
        && (told->parent_span_id != incoming->parent_span_id || told->trace_id_low != incoming->trace_id_low
            || told->trace_id_high != incoming->trace_id_high);
}
#endif

/* Sets process->trace: the trace of the incoming context, or a new trace. */
static __always_inline void decide_trace(struct process *process)
{
    struct trace_context *incoming = &process->incoming;
    struct request_trace *trace = &process->trace;
    trace->trace_id_high = incoming->valid ? incoming->trace_id_high : random_id();
    trace->trace_id_low = incoming->valid ? incoming->trace_id_low : process->root_id ? process->root_id : random_id();
    trace->parent_span_id = incoming->valid ? incoming->parent_span_id : 0;
    trace->parent_said_no = incoming->decision == DECISION_NO;
    trace->sampled = is_wanted(process, trace->trace_id_low);
#if RULES
    trace->dropped = process->rule.drops;
#endif
    trace->flags = (incoming->flags & FLAG_RANDOM) | trace->sampled;
}

#if ADOPT_UPSTREAM_CONTEXT
/* If nginx sent a different trace to the upstream, the request belongs to that trace, and the trace begins here. */
static __always_inline void adopt_trace(struct process *process)
{
    struct trace_context *told = &process->told;
    struct request_trace *trace = &process->trace;
    if (!told->valid || (told->trace_id_high == trace->trace_id_high && told->trace_id_low == trace->trace_id_low))
        return;
    trace->trace_id_high = told->trace_id_high;
    trace->trace_id_low = told->trace_id_low;
    trace->parent_span_id = 0;
    trace->has_tracestate = 0;
#if !TELLS
    trace->sampled = is_wanted(process, told->trace_id_low);
#endif
    trace->flags = trace->sampled; /* without FLAG_RANDOM: it is not known whether the id is random */
}
#endif
