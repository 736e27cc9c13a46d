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

/* Searches a message for the end of its request line, for traceparent headers and for the blank line, up to `end`. What it finds is
 * kept in the map's memory, not in registers, so that the verifier need not follow each combination. */
static __always_inline void search_head(struct telling *telling, u8 *data, u8 *end)
{
    volatile struct telling *search = telling;
    search->at = 0;
    search->at_line_start = 1;
    search->found = 0;
    search->found_at = 0;
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
        search->found += named;
        search->found_at += named * at; /* of several headers: useless, and not used */
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

/* Writes our span into the only traceparent of the head, which must be the client's. */
static __always_inline u64 replace_header(struct sk_msg_md *msg, struct telling *telling)
{
    u8 *data = msg->data, *end = msg->data_end;
    u8 *line = data + at_most(telling->found_at, TOLD_HEAD_BYTES_MAX);
    if (line + TOLD_LINE_BYTES > end || line[12] != ' ')
        return TELLING_MALFORMED;
    u8 *value = line + TOLD_NAME_BYTES;
    bool ends = value[TRACEPARENT_BYTES] == '\r' && value[TRACEPARENT_BYTES + 1] == '\n';
    if (telling->client_lines != 1)
        return telling->client_lines ? TELLING_MALFORMED : TELLING_OTHER_CONTEXT;
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

/* Adds the header behind the request line. */
static __always_inline u64 add_header(struct sk_msg_md *msg, struct telling *telling)
{
    u32 at = at_most(telling->line_end + 1, TOLD_HEAD_BYTES_MAX);
    u32 together = (u64)msg->data_end - (u64)msg->data + TOLD_LINE_BYTES;

    if (bpf_msg_push_data(msg, at, TOLD_LINE_BYTES, 0) != 0)
        return TELLING_NO_MEMORY;
    u8 *data, *end;
    if (bpf_msg_pull_data(msg, at, at + TOLD_LINE_BYTES, 0) == 0) { /* the new part alone: allocates nothing */
        data = msg->data;
        end = msg->data_end;
        if (data + TOLD_LINE_BYTES <= end) {
            u8 text[TRACEPARENT_BYTES + 1];
            write_told(text, telling);
            const char name[] = "traceparent: ";
            for (int i = 0; i < TOLD_NAME_BYTES; i++)
                data[i] = name[i];
            for (int i = 0; i < TRACEPARENT_BYTES; i++)
                data[TOLD_NAME_BYTES + i] = text[i];
            data[TOLD_LINE_BYTES - 2] = '\r';
            data[TOLD_LINE_BYTES - 1] = '\n';
            /* Makes one part of the three again. TCP would send the request line alone, and wait 40 ms for its acknowledgement
             * before it sends the rest (Nagle). If memory is short, only that happens. */
            bpf_msg_pull_data(msg, 0, together, 0);
            return TELLING_WRITTEN;
        }
    }
    return bpf_msg_pop_data(msg, at, TOLD_LINE_BYTES, 0) == 0 ? TELLING_NO_MEMORY : TELLING_UNDONE;
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
    if (telling->found > 1)
        return TELLING_MALFORMED;
    if (telling->found == 1)
        return replace_header(msg, telling);
    return telling->nothing_new ? TELLING_NOTHING_NEW : add_header(msg, telling);
}

/* The SK_MSG program: a worker sends bytes on a connection in upstream_sockets. */
int upstream_message(struct sk_msg_md *msg)
{
    struct telling *telling = find_telling();
    if (!telling || !telling->connection || telling->connection != NUMBER_OF(msg))
        return SK_PASS;
    telling->connection = 0;
    telling->result = tell(msg, telling);
    return telling->result == TELLING_UNDONE ? SK_DROP : SK_PASS;
}

/* Reads where nginx's request begins: its first buffer has the whole head. */
static __always_inline bool read_head(struct telling *telling, u64 upstream)
{
    u64 start = 0;
    telling->head_bytes = sent_buffer(upstream, &start);
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
        decide_trace(process);
    first->trace = process->trace;
    first->decided = 1;
    return true;
}

/* The end of the system call by which nginx tests a connection before it sends a request. sys_exit calls this program. */
int tell_attempt(struct bpf_raw_tracepoint_args *ctx)
{
    u32 tgid = current_tgid();
    struct process *process = processes.lookup(&tgid);
    if (!process)
        return 0;
    struct socket_key socket_key = {.tgid = tgid, .fd = process->told_fd};
    struct socket *socket = sockets.lookup(&socket_key);
    struct telling *telling = find_or_add_telling();
    process->told_fd = 0;
    if (!socket)
        return 0;
    struct attempt_state *attempt = attempt_on(&socket_key, socket);
    if (!attempt)
        return 0;
    if (!socket->peer_number || !telling) {
        count_untold(attempt, TELLING_UNSEEN);
        return 0;
    }
    if (socket->tls || socket->peer_number == NOT_OVER_TCP) {
        count_untold(attempt, TELLING_NOT_HTTP1);
        return 0;
    }
    struct request_key key = {.tgid = tgid, .connection = socket->client_connection};
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
    process->told_fd = socket_key.fd;
    return 0;
}
