/*
 * --propagate: tells the upstream the exchange span's id, by writing a traceparent into nginx's list of request headers.
 *
 * This happens when nginx has parsed all headers, and has not used them yet: every upstream protocol will send what is in
 * r->headers_in then. Before anything is written, everything that the write depends on is read and checked for this request.
 */

#if PROPAGATE

#define LIST_KEY_BYTES 16      /* "traceparent", and zeros */
#define LIST_TEXT_BYTES (LIST_KEY_BYTES + TRACEPARENT_BYTES + 1)
#define TEXT_ELEMENTS 2        /* the last elements of the array, which hold the texts of key and value */

static __always_inline bool write_user(u64 address, const void *bytes, u32 count)
{
    if (bpf_probe_write_user((void *)address, bytes, count) == 0)
        return true;
    count_loss(PARTIAL_PROPAGATION_UNSAFE);
    return false;
}

/* Counts why nothing was written. Where the socket is the other way, it counts the attempts that it does not tell either. */
static __always_inline void not_in_memory(u32 cause)
{
    if (!PROPAGATE_SOCKET)
        count_loss(cause);
}

/* Writes our span into the client's own header, in place. The length does not change. */
static __always_inline bool overwrite_traceparent(struct process *process, u64 span_id)
{
    struct ngx_str *value = &process->header_values[HEADER_TRACEPARENT];
    struct request_trace *trace = &process->trace;
    bool valid = trace->has_tracestate; /* the context comes from this header, not from another propagator */
    u8 text[TRACEPARENT_BYTES + 1] = {};
    if (value->len < TRACEPARENT_BYTES || (!valid && value->len != TRACEPARENT_BYTES)) {
        not_in_memory(PARTIAL_PROPAGATION_MALFORMED);
        return false;
    }
    write_traceparent(text, trace->trace_id_high, trace->trace_id_low, span_id, trace->flags);
    if (!valid)
        return write_user(value->data, text, TRACEPARENT_BYTES);
    if (trace->parent_said_no && !trace->sampled) /* the upstream would learn nothing new */
        return false;
    return write_user(value->data + 36, text + 36, 19); /* span id and flags: W3C, "Mutating the traceparent Field" */
}

/* Tells whether the list is as ngx_list_init and ngx_list_push leave it, has a single part, and has room for a header and its
 * texts. */
static __always_inline bool has_room(struct process *process, u64 list_address, const u8 *list)
{
    const u8 *part = list + OFFSET_ngx_list_t__part;
    u64 count = MEMBER(part, u64, ngx_list_part_s, nelts), elements = MEMBER(part, u64, ngx_list_part_s, elts);
    bool holds = elements && (elements & 7) == 0 && MEMBER(list, u64, ngx_list_t, size) == SIZEOF_ngx_table_elt_t;

    if (MEMBER(part, u64, ngx_list_part_s, next) || MEMBER(list, u64, ngx_list_t, nalloc) != HEADERS_IN_PART
        || count + 1 + TEXT_ELEMENTS > HEADERS_IN_PART) {
        not_in_memory(PARTIAL_PROPAGATION_NO_ROOM);
        return false;
    }
    holds &= MEMBER(list, u64, ngx_list_t, last) == list_address + OFFSET_ngx_list_t__part;
    EACH(i, count, HEADERS_IN_PART) { /* find_context_headers has read the headers */
        u8 *header = process->headers + i * SIZEOF_ngx_table_elt_t;
        struct ngx_str *key = (struct ngx_str *)(header + OFFSET_ngx_table_elt_t__key);
        struct ngx_str *value = (struct ngx_str *)(header + OFFSET_ngx_table_elt_t__value);
        holds &= key->len - 1 < 65536 && key->data && value->len < 1048576 && value->data
              && MEMBER(header, u64, ngx_table_elt_t, lowcase_key);
    }
    if (!holds)
        not_in_memory(PARTIAL_PROPAGATION_UNSAFE);
    return holds;
}

/* Adds a header to the list. The header's texts are in the array's last elements; `nalloc` is lowered, so that nginx never uses
 * those elements. */
static __always_inline bool append_traceparent(struct process *process, u64 list_address, const u8 *list, u64 span_id)
{
    const u8 *part = list + OFFSET_ngx_list_t__part;
    struct request_trace *trace = &process->trace;
    u64 count = MEMBER(part, u64, ngx_list_part_s, nelts), elements = MEMBER(part, u64, ngx_list_part_s, elts);
    u64 room = HEADERS_IN_PART - TEXT_ELEMENTS;
    u64 text_address = elements + room * SIZEOF_ngx_table_elt_t;
    u8 text[LIST_TEXT_BYTES] = "traceparent";
    u8 header[SIZEOF_ngx_table_elt_t] = {};

    write_traceparent(text + LIST_KEY_BYTES, trace->trace_id_high, trace->trace_id_low, span_id, trace->flags);
    MEMBER(header, u64, ngx_table_elt_t, hash) = HASH_traceparent;
    *(struct ngx_str *)(header + OFFSET_ngx_table_elt_t__key) = (struct ngx_str){LENGTH_traceparent, text_address};
    *(struct ngx_str *)(header + OFFSET_ngx_table_elt_t__value) =
        (struct ngx_str){TRACEPARENT_BYTES, text_address + LIST_KEY_BYTES};
    MEMBER(header, u64, ngx_table_elt_t, lowcase_key) = text_address;

    u64 more = count + 1;
    return write_user(text_address, text, sizeof(text))
        && write_user(elements + count * SIZEOF_ngx_table_elt_t, header, sizeof(header))
        && write_user(list_address + OFFSET_ngx_list_t__nalloc, &room, sizeof(room))
        && write_user(list_address + OFFSET_ngx_list_t__part + OFFSET_ngx_list_part_s__nelts, &more, sizeof(more));
}

/* ngx_http_process_request(ngx_http_request_t *r): all headers are parsed */
int enter_ngx_http_process_request(struct pt_regs *ctx)
{
    u64 now;
    u32 tgid;
    struct process *process = entered(ctx, &tgid, &now);
    if (!process)
        return 0;

    u64 r = PT_REGS_PARM1(ctx);
    struct request_key key = {.tgid = tgid};
    if (!read_pointer(&key.connection, r + OFFSET_ngx_http_request_s__connection))
        return 0;
    struct active_request *active = active_requests.lookup(&key);
    if (!active || active->decided)
        return 0;
    if (bpf_probe_read_user(process->request, SIZEOF_ngx_http_request_s, (void *)r) != 0
        || MEMBER(process->request, u32, ngx_http_request_s, signature) != HTTP_MODULE
        || MEMBER(process->request, u64, ngx_http_request_s, main) != r) {
        count_loss(PARTIAL_PROPAGATION_UNSAFE);
        return 0;
    }
    find_context_headers(process);
    read_incoming_context(process);
#if RULES
    find_rule_for_upstream(process, 0);
#endif
    decide_trace(process);
    active->trace = process->trace;
    active->decided = 1;

    u64 span_id = random_id(), list_offset = OFFSET_ngx_http_request_s__headers_in + OFFSET_ngx_http_headers_in_t__headers;
    u64 lines = process->header_lines[HEADER_TRACEPARENT];
    const u8 *list = process->request + list_offset;
    bool written = false;
    if (lines == 1)
        written = overwrite_traceparent(process, span_id);
    else if (lines > 1)
        not_in_memory(PARTIAL_PROPAGATION_MALFORMED);
    else if (has_room(process, r + list_offset, list))
        written = append_traceparent(process, r + list_offset, list, span_id);
    if (written)
        active->told_span_id = span_id;
    return 0;
}

#endif

#if TELLS
/* process->trace is what an upstream was told. The headers cannot be read again: they may contain our own span now. */
static __always_inline void recall_trace(struct process *process)
{
    const struct request_trace *trace = &process->trace;
    process->incoming.trace_id_high = trace->trace_id_high;
    process->incoming.trace_id_low = trace->trace_id_low;
    process->incoming.parent_span_id = trace->parent_span_id;
    process->incoming.decision = trace->parent_said_no ? DECISION_NO : DECISION_NONE;
    process->incoming.valid = trace->parent_span_id != 0;
}
#endif
