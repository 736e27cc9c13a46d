/*
 * --propagate on the socket: writes the exchange span's id into the request that nginx sends upstream (HTTP/1 over TCP).
 *
 * When nginx is about to send an attempt's request, tell_attempt announces what the worker's next message on that connection must
 * be. The SK_MSG program runs within the worker's system call, before TCP gets the bytes. It writes only if the bytes are those that
 * were announced: the connection, the first bytes, a request line of HTTP/1, a whole head. nginx's own memory is never written.
 */

#define TLS_HANDSHAKE 0x0316   /* the first bytes of a record that begins a handshake */
#define CRLF 0x0a0d
#define CRLF_CRLF 0x0a0d0a0d
#define SPACE_HTTP_1 0x2e312f5054544820ULL /* " HTTP/1." */
#define TRACEPAR 0x7261706563617274ULL /* "tracepar" */
#define ENT_COLON 0x3a746e65 /* "ent:" */
#define LOWER_4 0x20202020
#define B3_COLON 0x3a3362 /* "b3:" */
#define X_B3 0x2d33622d78ULL /* "x-b3-" */
#define X_B3_TRA 0x6172742d33622d78ULL /* "x-b3-tra", and so on */
#define X_B3_SPA 0x6170732d33622d78ULL
#define X_B3_SAM 0x6d61732d33622d78ULL

#define SEARCH_STEPS_MAX 2400  /* each step is 8 bytes, or a part of 8 at a line's end */

/* Limits a number in a way that the verifier sees and clang cannot remove. */
static __always_inline u64 at_most(u64 number, u64 max)
{
    asm volatile("if %[number] <= %[max] goto +1\n\t%[number] = %[max]" : [number] "+r"(number) : [max] "i"(max));
    return number;
}

/* Without branches: a verifier follows 8,192 open branches at most. The asm hides from clang what is computed. */
static __always_inline u64 is_zero(u64 number)
{
    u64 negative = -number, zero;
    asm volatile("" : "+r"(number), "+r"(negative));
    zero = 1 ^ (number | negative) >> 63;
    asm volatile("" : "+r"(zero));
    return zero;
}

#if PROPAGATOR_B3 || PROPAGATOR_B3MULTI
/* Notes a header of B3 at the beginning of a line. */
static __always_inline void note_b3(volatile struct telling *search, u64 starts, u64 word, u64 at)
{
    word |= LOWER_CASE;
#if PROPAGATOR_B3
    u64 single = starts & is_zero((word & 0xffffff) ^ B3_COLON);
    search->b3_lines += single;
    search->b3_at += single * at;
#endif
#if PROPAGATOR_B3MULTI
    u64 of_trace_id = starts & is_zero(word ^ X_B3_TRA), of_span_id = starts & is_zero(word ^ X_B3_SPA);
    u64 of_sampled = starts & is_zero(word ^ X_B3_SAM);
    search->x_b3_lines += (starts & is_zero((word & 0xffffffffff) ^ X_B3)) + (of_trace_id << 8) + (of_span_id << 16) + (of_sampled << 24);
    search->x_b3_trace_id_at += of_trace_id * at;
    search->x_b3_span_id_at += of_span_id * at;
    search->x_b3_sampled_at += of_sampled * at;
#endif
}
#endif

/* Searches a message for the end of its request line, for headers with a context and for the blank line, up to `end`. What it finds
 * is kept in the map's memory, not in registers, so that the verifier need not follow each combination. */
static __always_inline void search_head(struct telling *telling, u8 *data, u8 *end)
{
    volatile struct telling *search = telling;
    search->at = 0;
    search->at_line_start = 1;
    search->found = 0;
    search->found_at = 0;
    search->found_last_at = 0;
#if PROPAGATOR_B3
    search->b3_lines = 0;
    search->b3_at = 0;
#endif
#if PROPAGATOR_B3MULTI
    search->x_b3_lines = 0;
    search->x_b3_trace_id_at = 0;
    search->x_b3_span_id_at = 0;
    search->x_b3_sampled_at = 0;
#endif
    search->line_end = 0;
    search->whole = 0;
    for (u32 i = 0; i < SEARCH_STEPS_MAX; i++) {
        u64 at = search->at;
        asm volatile("%[at] &= %[mask]" : [at] "+r"(at) : [mask] "i"(2 * TOLD_HEAD_BYTES_MAX - 1)); /* no branch */
        u8 *place = data + at;
        if (place + 12 > end)
            break;
        u64 word = *(u64 *)place;
        u32 next = *(u32 *)(place + 8);
        u64 starts = search->at_line_start;
        u64 named = starts & is_zero(((word | LOWER_CASE) ^ TRACEPAR) | ((next | LOWER_4) ^ ENT_COLON));
        search->found_at += named * at * is_zero(search->found);
        search->found_last_at += named * (at - search->found_last_at);
        search->found += named;
#if PROPAGATOR_B3 || PROPAGATOR_B3MULTI
        note_b3(search, starts, word, at); /* of several headers of a name the place is useless, and not used */
#endif
        u64 blank = starts & is_zero((word & 0xffff) ^ CRLF);
        search->whole = blank;
        u64 lines = zero_bytes(word ^ '\n' * EVERY_BYTE);
        u64 first = (lines & -lines) >> 7, ends = 1 ^ is_zero(lines);
        u64 in_line = (first * 0x0001020304050607ULL >> 56) + (1 ^ ends) * 7; /* the newline's place in the word; 7: none */
        search->line_end += (at + in_line) * (ends & is_zero(search->line_end));
        search->at_line_start = ends;
        search->at = at + in_line + 1;
        if (blank)
            break;
    }
    asm volatile("" ::: "memory"); /* reads the results back: each is one unknown number then */
}

static __always_inline bool is_crlf_crlf(u8 *data, u8 *end, u64 head_bytes)
{
    u8 *place = data + at_most(head_bytes - 4, TOLD_HEAD_BYTES_MAX);
    return place + 4 <= end && *(u32 *)place == CRLF_CRLF;
}

static __always_inline bool is_http1(u8 *data, u8 *end, u64 line_end)
{
    u8 *place = data + at_most(line_end - 10, TOLD_HEAD_BYTES_MAX);
    return place + 11 <= end && *(u64 *)place == SPACE_HTTP_1 && (place[8] == '0' || place[8] == '1') && place[9] == '\r';
}

static __always_inline void write_told(u8 *to, const struct telling *telling)
{
    write_traceparent(to, telling->trace_id_high, telling->trace_id_low, telling->span_id, telling->flags);
}

/* Returns the header line at a place of the message; its value begins behind TOLD_NAME_BYTES. NULL: it has less than
 * TOLD_LINE_BYTES. */
static __always_inline u8 *traceparent_line(struct sk_msg_md *msg, u64 at)
{
    u8 *data = msg->data, *end = msg->data_end;
    u8 *line = data + at_most(at, TOLD_HEAD_BYTES_MAX);
    return line + TOLD_LINE_BYTES <= end && line[12] == ' ' ? line : NULL;
}

static __always_inline bool ends_behind_value(const u8 *line)
{
    return line[TOLD_LINE_BYTES - 2] == '\r' && line[TOLD_LINE_BYTES - 1] == '\n';
}

/* Writes our context over a line, and gives the line beside it a name that means nothing. */
static __always_inline u64 replace_one(u8 *line, u8 *other, const struct telling *telling)
{
    u8 text[TRACEPARENT_BYTES + 1];
    const char name[] = "x-duplicate";
    if (telling->nothing_new)
        return TELLING_NOTHING_NEW;
    write_told(text, telling);
    for (int i = 0; i < TRACEPARENT_BYTES; i++)
        line[TOLD_NAME_BYTES + i] = text[i];
    for (int i = 0; i < sizeof(name) - 1; i++)
        other[i] = name[i];
    return TELLING_WRITTEN;
}

/* Repairs two traceparent headers of the client, if one of them has the right length. */
static __always_inline u64 replace_doubled(struct sk_msg_md *msg, struct telling *telling)
{
    u8 *first = traceparent_line(msg, telling->found_at), *last = traceparent_line(msg, telling->found_last_at);
    if (!first || !last)
        return TELLING_MALFORMED;
    if (ends_behind_value(first))
        return replace_one(first, last, telling);
    return ends_behind_value(last) ? replace_one(last, first, telling) : TELLING_MALFORMED;
}

/* Writes our span into the client's traceparent headers. */
static __always_inline u64 replace_header(struct sk_msg_md *msg, struct telling *telling)
{
    if (telling->found != telling->client_lines)
        return TELLING_OTHER_CONTEXT;
    if (telling->found == 2)
        return replace_doubled(msg, telling);
    u8 *line = traceparent_line(msg, telling->found_at);
    if (telling->found != 1 || !line)
        return TELLING_MALFORMED;
    u8 *value = line + TOLD_NAME_BYTES;
    bool ends = ends_behind_value(line);
    u64 differs = 0;
    for (int i = 0; i < TRACEPARENT_BYTES; i++)
        differs |= value[i] ^ telling->client_value[i];
    if (differs)
        return ends ? TELLING_OTHER_CONTEXT : TELLING_MALFORMED;
    if (!ends && !telling->client_valid)
        return TELLING_MALFORMED;
    if (telling->nothing_new)
        return TELLING_NOTHING_NEW;
    u8 text[TRACEPARENT_BYTES + 1];
    write_told(text, telling);
    if (!telling->client_valid) {
        for (int i = 0; i < 36; i++)
            value[i] = text[i];
    }
    for (int i = 36; i < TRACEPARENT_BYTES; i++) /* span id and flags: W3C, "Mutating the traceparent Field" */
        value[i] = text[i];
    return TELLING_WRITTEN;
}

#if PROPAGATOR_B3 || PROPAGATOR_B3MULTI
static __always_inline u8 flag_of(const struct telling *telling)
{
    return '0' + (telling->flags & FLAG_SAMPLED);
}

/* Tells whether 16 hexadecimal digits are those of an id. */
static __always_inline bool is_id(const u8 *digits, u64 id)
{
    u8 text[16];
    u64 differs = 0;
    write_hex_16(text, id);
    for (int i = 0; i < 16; i++)
        differs |= digits[i] ^ text[i];
    return !differs;
}
#endif

#if PROPAGATOR_B3
/* Writes our span and decision into `-{span}[-{state}…]`, which follows b3's trace id. */
static __always_inline bool replace_b3_tail(u8 *tail, const struct telling *telling)
{
    if (tail[0] != '-' || (tail[17] != '\r' && tail[17] != '-'))
        return false;
    write_hex_16(tail + 1, telling->span_id);
    if (tail[17] == '-' && (tail[18] != 'd' || !(telling->flags & FLAG_SAMPLED))) /* debug implies sampled */
        tail[18] = flag_of(telling);
    return true;
}

/* Writes our span into the head's only b3 header, if it has this trace id of 32 or 16 digits. */
static __always_inline bool replace_b3(struct sk_msg_md *msg, struct telling *telling)
{
    u8 *data = msg->data, *end = msg->data_end;
    u8 *value = data + at_most(telling->b3_at, TOLD_HEAD_BYTES_MAX) + 4; /* nginx writes a space behind the colon */
    if (telling->b3_lines != 1 || value + 16 + 20 > end) /* shorter than any header with ids and the blank line */
        return false;
    if (value[16] == '-')
        return !telling->trace_id_high && is_id(value, telling->trace_id_low) && replace_b3_tail(value + 16, telling);
    return value + 32 + 20 <= end && is_id(value, telling->trace_id_high) && is_id(value + 16, telling->trace_id_low)
        && replace_b3_tail(value + 32, telling);
}
#endif

#if PROPAGATOR_B3MULTI
/* Writes our span into the head's X-B3-SpanId, and the decision into X-B3-Sampled, if X-B3-TraceId has this trace id. */
static __always_inline bool replace_b3_multi(struct sk_msg_md *msg, struct telling *telling)
{
    u8 *data = msg->data, *end = msg->data_end;
    u8 *trace_id = data + at_most(telling->x_b3_trace_id_at, TOLD_HEAD_BYTES_MAX) + sizeof("x-b3-traceid: ") - 1;
    u8 *span_id = data + at_most(telling->x_b3_span_id_at, TOLD_HEAD_BYTES_MAX) + sizeof("x-b3-spanid: ") - 1;
    u8 *sampled = data + at_most(telling->x_b3_sampled_at, TOLD_HEAD_BYTES_MAX) + sizeof("x-b3-sampled: ") - 1;
    u64 lines = telling->x_b3_lines >> 8;
    if ((lines & 0xffff) != 0x0101 || lines >> 16 > 1 || trace_id + 34 > end || span_id + 18 > end || sampled + 2 > end)
        return false;
    if (span_id[-2] != ':' || span_id[16] != '\r' || trace_id[-2] != ':')
        return false;
    if (trace_id[16] == '\r' ? telling->trace_id_high || !is_id(trace_id, telling->trace_id_low)
                             : !is_id(trace_id, telling->trace_id_high) || !is_id(trace_id + 16, telling->trace_id_low)
                                   || trace_id[32] != '\r')
        return false;
    if (lines >> 16) {
        if (sampled[-2] != ':' || sampled[1] != '\r')
            return false;
        sampled[0] = flag_of(telling);
    }
    write_hex_16(span_id, telling->span_id);
    return true;
}
#endif

/* Headers that are added. */
#define ADD_TRACEPARENT 1
#define ADD_B3 2
#define ADD_B3_MULTI 4

static __always_inline void copy_text(u8 *to, const char *text, u32 bytes)
{
    for (u32 i = 0; i < bytes; i++)
        to[i] = text[i];
}

#define COPY_TEXT(to, text) copy_text(to, text, sizeof(text) - 1)

/* Writes the lines to the place that was made for them. Returns false if the place is too small, which it never is. */
static __always_inline bool write_lines(u8 *line, u8 *end, u64 added, const struct telling *telling)
{
    if (added & ADD_TRACEPARENT) {
        u8 text[TRACEPARENT_BYTES + 1];
        if (line + TOLD_LINE_BYTES > end)
            return false;
        write_told(text, telling);
        COPY_TEXT(line, "traceparent: ");
        copy_text(line + TOLD_NAME_BYTES, (const char *)text, TRACEPARENT_BYTES);
        COPY_TEXT(line + TOLD_LINE_BYTES - 2, "\r\n");
        line += TOLD_LINE_BYTES;
    }
#if PROPAGATOR_B3
    if (added & ADD_B3) {
        if (line + B3_LINE_BYTES > end)
            return false;
        COPY_TEXT(line, "b3: ");
        write_hex_16(line + 4, telling->trace_id_high);
        write_hex_16(line + 20, telling->trace_id_low);
        line[36] = '-';
        write_hex_16(line + 37, telling->span_id);
        line[53] = '-';
        line[54] = flag_of(telling);
        COPY_TEXT(line + B3_LINE_BYTES - 2, "\r\n");
        line += B3_LINE_BYTES;
    }
#endif
#if PROPAGATOR_B3MULTI
    if (added & ADD_B3_MULTI) {
        if (line + B3_MULTI_BYTES > end)
            return false;
        COPY_TEXT(line, "X-B3-TraceId: ");
        write_hex_16(line + 14, telling->trace_id_high);
        write_hex_16(line + 30, telling->trace_id_low);
        COPY_TEXT(line + 46, "\r\nX-B3-SpanId: ");
        write_hex_16(line + 61, telling->span_id);
        COPY_TEXT(line + 77, "\r\nX-B3-Sampled: ");
        line[93] = flag_of(telling);
        COPY_TEXT(line + B3_MULTI_BYTES - 2, "\r\n");
    }
#endif
    return true;
}

/* Adds headers behind the request line. */
static __always_inline u64 add_headers(struct sk_msg_md *msg, struct telling *telling, u64 added)
{
    u32 at = at_most(telling->line_end + 1, TOLD_HEAD_BYTES_MAX);
    u32 bytes = (added & ADD_TRACEPARENT ? TOLD_LINE_BYTES : 0) + (added & ADD_B3 ? B3_LINE_BYTES : 0)
        + (added & ADD_B3_MULTI ? B3_MULTI_BYTES : 0);
    u32 together = (u64)msg->data_end - (u64)msg->data + bytes;

    if (bpf_msg_push_data(msg, at, bytes, 0) != 0)
        return TELLING_NO_MEMORY;
    if (bpf_msg_pull_data(msg, at, at + bytes, 0) == 0 /* the new part alone: allocates nothing */
        && write_lines(msg->data, msg->data_end, added, telling)) {
        /* Makes one part of the three again. TCP would send the request line alone, and wait 40 ms for its acknowledgement
         * before it sends the rest (Nagle). If memory is short, only that happens. */
        bpf_msg_pull_data(msg, 0, together, 0);
        return TELLING_WRITTEN;
    }
    return bpf_msg_pop_data(msg, at, bytes, 0) == 0 ? TELLING_NO_MEMORY : TELLING_UNDONE;
}

/* Replaces the headers of B3 that the head has. Returns which must be added. */
static __always_inline u64 replace_b3_headers(struct sk_msg_md *msg, struct telling *telling)
{
    u64 added = 0;
#if PROPAGATOR_B3
    if (!telling->b3_lines)
        added |= ADD_B3;
    else if (!replace_b3(msg, telling))
        telling->b3_left = 1;
#endif
#if PROPAGATOR_B3MULTI
    if (!telling->x_b3_lines)
        added |= ADD_B3_MULTI;
    else if (!replace_b3_multi(msg, telling))
        telling->b3_left = 1;
#endif
    return added;
}

static __always_inline u64 tell(struct sk_msg_md *msg, struct telling *telling)
{
    u64 head_bytes = telling->head_bytes;
    if (head_bytes < COMPARED_BYTES || head_bytes > TOLD_HEAD_BYTES_MAX || msg->size < head_bytes)
        return TELLING_NOT_WHOLE;
    u8 *data = msg->data, *end = msg->data_end;
    if ((u64)end - (u64)data < head_bytes) {
        if (bpf_msg_pull_data(msg, 0, head_bytes, 0) != 0)
            return TELLING_NO_MEMORY;
        data = msg->data;
        end = msg->data_end;
    }
    if (data + COMPARED_BYTES > end)
        return TELLING_NOT_WHOLE;
    u64 differs = 0;
    for (int i = 0; i < COMPARED_BYTES; i += 8)
        differs |= *(u64 *)(data + i) ^ *(u64 *)(telling->first + i);
    if (differs)
        return *(u16 *)data == TLS_HANDSHAKE ? TELLING_NOT_HTTP1 : TELLING_NOT_WHOLE;
    search_head(telling, data, end);
    if (telling->line_end < 15 || telling->line_end >= head_bytes || !is_http1(data, end, telling->line_end))
        return TELLING_NOT_HTTP1;
    /* A blank line within the last bytes is not searched for. */
    if (telling->whole ? telling->at > head_bytes : telling->at + 12 <= head_bytes || !is_crlf_crlf(data, end, head_bytes))
        return TELLING_NOT_WHOLE;
    u64 added = 0;
    if (telling->found) {
        u64 result = replace_header(msg, telling);
        if (result != TELLING_WRITTEN)
            return result;
    } else if (telling->nothing_new) {
        return TELLING_NOTHING_NEW;
    } else {
        added = ADD_TRACEPARENT;
    }
    added |= replace_b3_headers(msg, telling);
    u64 result = added ? add_headers(msg, telling, added) : TELLING_WRITTEN;
    if (result != TELLING_NO_MEMORY || added & ADD_TRACEPARENT)
        return result;
    telling->b3_left = 1; /* traceparent has our span, B3 is missing */
    return TELLING_WRITTEN;
}

/* The SK_MSG program: a worker sends bytes on a connection in upstream_sockets. */
int upstream_message(struct sk_msg_md *msg)
{
    struct telling *telling = find_telling();
    if (!telling || !telling->connection || telling->connection != NUMBER_OF(msg))
        return SK_PASS;
    telling->connection = 0;
    telling->b3_left = 0;
    telling->result = tell(msg, telling);
    return telling->result == TELLING_UNDONE ? SK_DROP : SK_PASS;
}

/* Reads where nginx's request begins: its first buffer has the whole head. */
static __always_inline bool read_head(struct telling *telling, u64 upstream)
{
    u64 start = 0, chain = 0;
    read_quietly(&chain, upstream + OFFSET_ngx_http_upstream_s__request_bufs);
    telling->head_bytes = sent_buffer(chain, &start);
    return telling->head_bytes >= COMPARED_BYTES && bpf_probe_read_user(telling->first, COMPARED_BYTES, (void *)start) == 0;
}

/* Decides about the request's trace with its first attempt that sends something. Later attempts and the record keep the decision. */
static __always_inline bool decide_at_attempt(struct process *process, struct request_key *key, struct attempt_state *first)
{
    u64 r = process->told_request;
    if (bpf_probe_read_user(process->request, SIZEOF_ngx_http_request_s, (void *)r) != 0
        || MEMBER(process->request, u32, ngx_http_request_s, signature) != HTTP_MODULE
        || MEMBER(process->request, u64, ngx_http_request_s, connection) != key->connection)
        return false;
    find_context_headers(process);
    read_incoming_context(process);
    if (first->decided) {
        process->trace = first->trace;
        return true;
    }
#if PROPAGATE
    struct active_request *active = active_requests.lookup(key);
    if (active && active->decided)
        process->trace = active->trace;
    else
#endif
    {
#if RULES
        find_rule_for_upstream(process, MEMBER(process->request, u64, ngx_http_request_s, loc_conf));
#endif
        decide_trace(process);
    }
    first->trace = process->trace;
    first->decided = 1;
    return true;
}

/* The end of the system call by which nginx tests a connection before it sends a request. sys_exit and sys_exit_missed call this
 * program, so that it may run for two workers on one processor: it must have no private stack (docs/decisions/0012). */
int tell_attempt(struct bpf_raw_tracepoint_args *ctx)
{
    u32 tgid = current_tgid();
    struct process *process = processes.lookup(&tgid);
    struct caller *caller = find_caller(tgid);
    if (!process || !caller) {
        tellers.call(ctx, NO_TELLER);
        return 0;
    }
    struct socket_key socket_key = {.tgid = tgid, .fd = caller->told_fd};
    struct socket *socket = sockets.lookup(&socket_key);
    struct telling *telling = find_or_add_telling();
    caller->told_fd = 0;
    if (!socket)
        return 0;
    struct attempt_state *attempt = attempt_on(&socket_key, socket);
    if (!attempt)
        return 0;
    struct request_key key = {.tgid = tgid, .connection = socket->client_connection};
#if PROPAGATE
    struct active_request *active = active_requests.lookup(&key);
    if (active && active->told_span_id) /* in memory */
        attempt->untold = 1;
#endif
    if (!socket->peer_number || !telling) {
        count_untold(attempt, TELLING_UNSEEN);
        return 0;
    }
    if (socket->tls || socket->peer_number == NOT_OVER_TCP) {
        count_untold(attempt, TELLING_NOT_HTTP1);
        return 0;
    }
    struct attempt_key first_key = {.tgid = tgid, .connection = socket->client_connection};
    struct attempt_state *first = attempts.lookup(&first_key);
    telling->connection = 0;
    if (!first || !read_head(telling, process->told_upstream) || !decide_at_attempt(process, &key, first)) {
        count_untold(attempt, TELLING_NOT_WHOLE);
        return 0;
    }
    struct request_trace *trace = &process->trace;
    telling->trace_id_high = trace->trace_id_high;
    telling->trace_id_low = trace->trace_id_low;
    telling->span_id = random_id();
    telling->flags = trace->flags;
    telling->nothing_new = trace->parent_said_no && !trace->sampled;
    telling->client_valid = trace->has_tracestate;
    telling->client_lines = process->header_lines[HEADER_TRACEPARENT];
    if (telling->client_lines == 1 && read_header_value(process, HEADER_TRACEPARENT) >= TRACEPARENT_BYTES)
        __builtin_memcpy(telling->client_value, process->context_value, TRACEPARENT_BYTES + 1);
    else
        telling->client_value[0] = 0;
    telling->client_connection = socket->client_connection;
    telling->attempt_index = socket->attempt_index;
    telling->attempt_serial = socket->attempt_serial;
    telling->result = TELLING_UNSEEN;
    telling->announced = socket->peer_number;
    telling->connection = socket->peer_number;
    caller->told_fd = socket_key.fd;
    return 0;
}
