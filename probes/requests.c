/* A client's request: its beginning, its body, its HTTP/2 frames, and the record at its end. */

/* ngx_http_create_request(ngx_connection_t *c) */
int enter_ngx_http_create_request(struct pt_regs *ctx)
{
    u64 now;
    u32 tgid;
    struct process *process = entered(ctx, &tgid, &now);
    if (!process)
        return 0;

    struct request_key key = {.connection = PT_REGS_PARM1(ctx), .tgid = tgid};
    struct active_request active = {.created_ns = now};
    struct socket_key socket_key = {.tgid = tgid};
    u64 ssl = 0;

    if (bpf_probe_read_user(&socket_key.fd, sizeof(socket_key.fd), (void *)(key.connection + OFFSET_ngx_connection_s__fd)) != 0) {
        count_loss(LOST_READ_FAILED);
        return 0;
    }
#ifdef OFFSET_ngx_connection_s__ssl
    bpf_probe_read_user(&ssl, sizeof(ssl), (void *)(key.connection + OFFSET_ngx_connection_s__ssl));
#endif
    /* A stream of HTTP/3 has the listening socket's descriptor (ngx_quic_create_stream). */
    struct socket *socket = find_or_add_socket(&socket_key);
    if (socket) {
        active.read_ns = socket->first_read_ns ? socket->last_read_ns : 0;
        socket->client = 1;
        socket->request_read_ns = 0;
        socket->first_write_ns = 0;
        socket->tls_connection = ssl ? key.connection : 0;
    }
    /* If it is full, the request's end is as that of one whose beginning nothing marked. */
    if (active_requests.update(&key, &active) == 0 && socket)
        socket->running = 0;
    return 0;
}

/* ngx_http_v2_read_request_body(ngx_http_request_t *r): what came of a stream's body before it was wanted is about to be used */
int enter_ngx_http_v2_read_request_body(struct pt_regs *ctx)
{
    u64 now;
    u32 tgid;
    struct process *process = entered(ctx, &tgid, &now);
    struct request_key key = {.tgid = tgid};
    if (!process || !read_pointer(&key.connection, PT_REGS_PARM1(ctx) + OFFSET_ngx_http_request_s__connection))
        return 0;
    struct active_request *active = active_requests.lookup(&key);
    if (active)
        active->body_wanted_ns = now;
    return 0;
}

/* Whether nginx kept this part of a stream's body from before, so that the connection's last read did not bring it. */
static __always_inline bool was_kept(struct process *process, struct request_key *key, struct socket *socket, s32 fd)
{
    struct active_request *active = active_requests.lookup(key);
    if (!active || active->read_ns == socket->last_read_ns || active->created_ns >= process->turn_began_ns)
        return false;
    if (active->body_wanted_ns)
        return socket->last_read_ns < active->body_wanted_ns;
    return process->latest_read_fd != fd; /* HTTP/3 */
}

/* ngx_http_request_body_save_filter(ngx_http_request_t *r, ngx_chain_t *in): a part of a body, in any protocol */
int enter_ngx_http_request_body_save_filter(struct pt_regs *ctx)
{
    u64 now;
    u32 tgid;
    struct process *process = entered(ctx, &tgid, &now);
    if (!process)
        return 0;

    struct request_key key = {.tgid = tgid};
    struct socket_key socket_key = {.tgid = tgid};
    u64 main_request;
    if (!read_pointer(&key.connection, PT_REGS_PARM1(ctx) + OFFSET_ngx_http_request_s__connection)
        || !read_pointer(&main_request, PT_REGS_PARM1(ctx) + OFFSET_ngx_http_request_s__main))
        return 0;
    struct request_progress *progress = find_progress(&key, main_request);
    if (!progress)
        return 0;
    bpf_probe_read_user(&socket_key.fd, sizeof(socket_key.fd), (void *)(key.connection + OFFSET_ngx_connection_s__fd));
    struct socket *socket = sockets.lookup(&socket_key);
    if (!socket)
        return 0;
    u64 stream = 0;
    bpf_probe_read_user(&stream, sizeof(stream), (void *)(main_request + OFFSET_ngx_http_request_s__stream));
    progress->body_unseen = (stream || socket->datagrams) && was_kept(process, &key, socket, socket_key.fd);
    if (!progress->body_unseen)
        progress->body_read_ns = socket->last_read_ns;
    return 0;
}

#ifdef OFFSET_ngx_http_v2_connection_s__last_out
/* New frames are queued at the list's head, so the head is enough. */
#define FRAMES_MAX 32

/* ngx_http_v2_send_output_queue(ngx_http_v2_connection_t *h2c): which streams are about to write */
int enter_ngx_http_v2_send_output_queue(struct pt_regs *ctx)
{
    u64 now;
    u32 tgid;
    struct process *process = entered(ctx, &tgid, &now);
    if (!process)
        return 0;

    u64 h2c = PT_REGS_PARM1(ctx), connection, frame, stream, request;
    struct socket_key socket_key = {.tgid = tgid};
    if (!read_pointer(&connection, h2c + OFFSET_ngx_http_v2_connection_s__connection)
        || !read_pointer(&frame, h2c + OFFSET_ngx_http_v2_connection_s__last_out))
        return 0;
    bpf_probe_read_user(&socket_key.fd, sizeof(socket_key.fd), (void *)(connection + OFFSET_ngx_connection_s__fd));
    struct socket *socket = sockets.lookup(&socket_key);
    u64 last_write_ns = socket ? socket->last_write_ns : 0;
    if (socket) {
        struct flush_key before = {.tgid = tgid, .fd = socket_key.fd, .began_ns = socket->flush_began_ns};
        if (before.began_ns && last_write_ns > before.began_ns)
            flush_ends.update(&before, &last_write_ns);
        socket->flush_began_ns = now;
    }

    for (int i = 0; i < FRAMES_MAX && frame; i++) {
        struct request_key key = {.tgid = tgid};
        if (!read_pointer(&stream, frame + OFFSET_ngx_http_v2_out_frame_s__stream)
            || !read_pointer(&frame, frame + OFFSET_ngx_http_v2_out_frame_s__next))
            return 0;
        if (!stream)
            continue;
        if (!read_pointer(&request, stream + OFFSET_ngx_http_v2_stream_s__request)
            || !read_pointer(&key.connection, request + OFFSET_ngx_http_request_s__connection))
            return 0;
        struct active_request *active = active_requests.lookup(&key);
        if (!active)
            continue;
        active->last_flush_ns = now;
        /* A call that finds the socket full writes nothing: the frame waits for a later one. */
        if (!active->first_write_ns || active->first_write_ns >= last_write_ns)
            active->first_write_ns = now;
    }
    return 0;
}
#endif

/* ngx_http_send_header(ngx_http_request_t *r): where the frames of HTTP/2 cannot be seen */
int enter_ngx_http_send_header(struct pt_regs *ctx)
{
    u64 now;
    u32 tgid;
    struct process *process = entered(ctx, &tgid, &now);
    if (!process)
        return 0;

    u64 r = PT_REGS_PARM1(ctx), main_request;
    struct request_key key = {.tgid = tgid};
    if (!read_pointer(&main_request, r + OFFSET_ngx_http_request_s__main) || main_request != r /* a subrequest sends none */
        || !read_pointer(&key.connection, r + OFFSET_ngx_http_request_s__connection))
        return 0;
    struct active_request *active = active_requests.lookup(&key);
    if (active && !active->first_write_ns)
        active->first_write_ns = now;
    return 0;
}

#define STRING_AT_MAX (RECORD_BYTES_MAX - STRING_BYTES_MAX - sizeof(struct string_header))

/* A place in the record, `at` bytes from its beginning and at most STRING_AT_MAX, which it is: said once more to the verifier,
 * where it is used. Kernels before 6.4 forget what they know of a number that clang has kept on the stack in between. */
static __always_inline struct string_header *string_at(struct process *process, u64 at)
{
    u8 *place = process->record;
    asm volatile("if %[at] <= %[max] goto +1\n\t%[at] = %[max]\n\t%[place] += %[at]"
                 : [place] "+r"(place), [at] "+r"(at) : [max] "i"(STRING_AT_MAX));
    return (struct string_header *)place;
}

/* Appends a string to the record. Its end is kept in the map's memory and not in a register: so all paths through here look
 * the same to the verifier afterwards, and it need not follow each combination of them. */
static __always_inline void append_string(struct process *process, u8 kind, u8 attempt, u64 data, u64 whole_bytes, u64 limit)
{
    if (!data || !whole_bytes)
        return;
    u64 at = process->record_bytes;
    u64 bytes = whole_bytes > limit ? limit : whole_bytes;
    asm volatile("" : "+r"(bytes)); /* keeps the bounds check below where the verifier sees it */
    if (bytes > STRING_BYTES_MAX || at > STRING_AT_MAX) {
        count_loss(PARTIAL_STRING_CUT);
        return;
    }
    struct string_header *header = string_at(process, at);
    *(u64 *)((u8 *)(header + 1) + ((bytes - 1) & (STRING_BYTES_MAX - 8))) = 0; /* what pads the string to 8 bytes */
    if (bpf_probe_read_user(header + 1, bytes, (void *)data) != 0) {
        count_loss(PARTIAL_STRING_READ_FAILED);
        return;
    }
    if (bytes < whole_bytes)
        count_loss(PARTIAL_STRING_CUT);
    header->kind = kind;
    header->attempt = attempt;
    header->bytes = bytes;
    header->whole_bytes = whole_bytes;
    process->record_bytes = at + sizeof(struct string_header) + ((bytes + 7) & ~7ULL);
}

/* Appends the ngx_str_t at an address in nginx's memory. */
static __always_inline void append_str_at(struct process *process, u8 kind, u8 attempt, u64 address, u64 limit)
{
    struct ngx_str str = {};
    if (!address || bpf_probe_read_user(&str, sizeof(str), (void *)address) != 0)
        return;
    append_string(process, kind, attempt, str.data, str.len, limit);
}

#define SHORT_STRING_BYTES_MAX 512
#define USER_AGENT_BYTES_MAX 1024

#define REQUEST_STR(member) ((struct ngx_str *)(process->request + OFFSET_ngx_http_request_s__##member))

/* The name in the http core module's configuration that r->srv_conf or r->loc_conf leads to. */
static __always_inline void append_core_conf_name(struct process *process, u8 kind, u64 confs, u64 name_offset)
{
    u64 conf = 0;
    bpf_probe_read_user(&conf, sizeof(conf), (void *)(confs + process->core_module_index * 8));
    if (conf)
        append_str_at(process, kind, 0, conf + name_offset, SHORT_STRING_BYTES_MAX);
}

/* Half a list of vendors' entries would be another list: a line comes whole or not at all. */
static __always_inline void append_tracestate(struct process *process)
{
    u64 lines = process->header_lines[HEADER_TRACESTATE];
    if (lines > TRACESTATE_LINES_MAX)
        count_loss(PARTIAL_STRING_CUT);
    EACH(i, lines, TRACESTATE_LINES_MAX) {
        struct ngx_str *line = &process->tracestate[i];
        if (line->len <= STRING_BYTES_MAX)
            append_string(process, STRING_TRACESTATE, i, line->data, line->len, STRING_BYTES_MAX);
        else
            count_loss(PARTIAL_STRING_CUT);
    }
}

/* First what each request has of its own, then what it has in common with others: user space keeps that decoded. */
static __always_inline void append_request_strings(struct process *process)
{
    struct ngx_str *method = &process->method_name, *uri = REQUEST_STR(unparsed_uri);
    u8 *headers_in = process->request + OFFSET_ngx_http_request_s__headers_in;
    u64 host = MEMBER(headers_in, u64, ngx_http_headers_in_t, host);
    u64 user_agent = MEMBER(headers_in, u64, ngx_http_headers_in_t, user_agent);
    u32 client_length = MEMBER(process->connection, u32, ngx_connection_s, socklen);
    u32 local_length = MEMBER(process->connection, u32, ngx_connection_s, local_socklen);

    append_string(process, STRING_URI, 0, uri->data, uri->len, STRING_BYTES_MAX);
    if (user_agent)
        append_str_at(process, STRING_USER_AGENT, 0, user_agent + OFFSET_ngx_table_elt_t__value, USER_AGENT_BYTES_MAX);
    append_string(process, STRING_CLIENT_SOCKADDR, 0, MEMBER(process->connection, u64, ngx_connection_s, sockaddr),
                  client_length, SHORT_STRING_BYTES_MAX);
    if (process->trace.has_tracestate)
        append_tracestate(process);

    append_string(process, STRING_METHOD, 0, method->data, method->len, SHORT_STRING_BYTES_MAX);
    if (host)
        append_str_at(process, STRING_HOST, 0, host + OFFSET_ngx_table_elt_t__value, SHORT_STRING_BYTES_MAX);
    if (process->core_module_index_known) {
        if (!((struct request_record *)process->record)->location_unknown)
            append_core_conf_name(process, STRING_LOCATION, MEMBER(process->request, u64, ngx_http_request_s, loc_conf),
                                  OFFSET_ngx_http_core_loc_conf_s__name);
        append_core_conf_name(process, STRING_SERVER_NAME, MEMBER(process->request, u64, ngx_http_request_s, srv_conf),
                              OFFSET_ngx_http_core_srv_conf_t__server_name);
    }
    append_string(process, STRING_LOCAL_SOCKADDR, 0, MEMBER(process->connection, u64, ngx_connection_s, local_sockaddr),
                  local_length, SHORT_STRING_BYTES_MAX);
}

#if DETAIL_REQUEST
#define ATTEMPTS_TAKEN_MAX 1
#else
#define ATTEMPTS_TAKEN_MAX ATTEMPTS_MAX
#endif

static __always_inline struct attempt_state *find_attempt(struct process *process, struct attempt_key *key)
{
#if DETAIL_REQUEST
    return &process->attempt;
#else
    return attempts.lookup(key);
#endif
}

#if DETAIL_REQUEST
/* The last attempt of the request itself, by nginx's own clock: u->start_time and its state's times, each rounded outward
 * to a whole millisecond. False: there is none, or what should be times does not lie within the request. */
static __always_inline bool recall_last_attempt(struct process *process, u64 *began_ns, u64 now)
{
    struct attempt_state *last = &process->attempt;
    u64 upstream = MEMBER(process->request, u64, ngx_http_request_s, upstream), start_msec = 0;
    struct {
        u64 status;
        u64 response_msec;
        u64 connect_msec;
    } state = {};
    __builtin_memset(last, 0, sizeof(*last));
    if (!upstream || bpf_probe_read_user(&last->state, sizeof(u64), (void *)(upstream + OFFSET_ngx_http_upstream_s__state)) != 0
        || !last->state
        || bpf_probe_read_user(&start_msec, sizeof(u64), (void *)(upstream + OFFSET_ngx_http_upstream_s__start_time)) != 0
        || bpf_probe_read_user(&state.response_msec, sizeof(u64),
                               (void *)(last->state + OFFSET_ngx_http_upstream_state_t__response_time)) != 0
        || bpf_probe_read_user(&state.connect_msec, sizeof(u64),
                               (void *)(last->state + OFFSET_ngx_http_upstream_state_t__connect_time)) != 0)
        return false;
    u64 start_ns = start_msec * MILLISECOND_NS, end_ns = (start_msec + state.response_msec + 1) * MILLISECOND_NS;
    if (state.response_msec == -1ULL || start_ns + MILLISECOND_NS < *began_ns || end_ns < start_ns || end_ns - MILLISECOND_NS > now)
        return false;
    if (start_ns < *began_ns) /* the two clocks are cut to milliseconds at different moments */
        *began_ns = start_ns;
    if (end_ns > now)
        end_ns = now;
    last->upstream = upstream;
    last->settled = 1;
    last->attempt.ended_ns = end_ns;
    if (state.connect_msec == -1ULL) {
        last->attempt.connect_start_ns = start_ns;
        return true;
    }
    u64 connected_ns = start_ns + state.connect_msec * MILLISECOND_NS;
    last->attempt.connect_start_ns = state.connect_msec ? start_ns : 0;
    last->attempt.connected_ns = connected_ns;
    last->attempt.first_write_ns = connected_ns;
    last->attempt.last_read_ns = end_ns;
    return true;
}
#endif

#if !DETAIL_REQUEST
/* The request ends, and the attempt's connection is kept for another, or is closed only afterwards. */
static __always_inline void settle_now(struct attempt_key *key, struct attempt_state *ended, u64 now)
{
    struct socket_key socket_key = {.tgid = key->tgid, .fd = ended->fd};
    struct socket *socket = sockets.lookup(&socket_key);
    if (!socket || socket->attempt_serial != ended->serial)
        return;
    settle(ended, socket, socket->last_read_ns ? socket->last_read_ns : now);
}
#endif

/* Copies one attempt into the record, with what nginx has noted of it by now. */
static __always_inline bool take_attempt(struct process *process, struct attempt_key *key, u64 told_span_id, u64 now)
{
    struct attempt_state *ended = find_attempt(process, key);
    u32 index = key->index;
    if (!ended || index >= ATTEMPTS_MAX)
        return false;
#if !DETAIL_REQUEST
    if (!ended->settled)
        settle_now(key, ended, now);
#endif
    struct upstream_attempt *attempt = attempt_of(process, index);
    *attempt = ended->attempt;
    attempt->span_id = told_span_id;
    u64 configuration = 0;
    bpf_probe_read_user(&configuration, sizeof(u64), (void *)(ended->upstream + OFFSET_ngx_http_upstream_s__upstream));
    process->upstream_configurations[index] = configuration;
#if REQUEST_METRICS
    process->attempt_states[index] = ended->state;
#endif
    u8 *state = process->upstream_state;
    if (bpf_probe_read_user(state, SIZEOF_ngx_http_upstream_state_t, (void *)ended->state) != 0)
        return false;
    attempt->status = MEMBER(state, u64, ngx_http_upstream_state_t, status);
    attempt->connect_msec = MEMBER(state, u64, ngx_http_upstream_state_t, connect_time);
    attempt->header_msec = MEMBER(state, u64, ngx_http_upstream_state_t, header_time);
    attempt->response_msec = MEMBER(state, u64, ngx_http_upstream_state_t, response_time);
#ifdef OFFSET_ngx_http_upstream_state_t__bytes_sent
    attempt->bytes_sent = MEMBER(state, u64, ngx_http_upstream_state_t, bytes_sent);
#else
    attempt->bytes_sent = -1; /* before 1.15.8 */
#endif
    attempt->bytes_received = MEMBER(state, u64, ngx_http_upstream_state_t, bytes_received);
    process->attempt_peers[index] = MEMBER(state, u64, ngx_http_upstream_state_t, peer);
    attempt->outcome = outcome_of(ended, attempt);
    if (!ended->request) {
        process->seen_peers[slot(process->seen_peers_count)] = process->attempt_peers[index];
        process->seen_peers_count++;
        if (ended->upstream == MEMBER(process->request, u64, ngx_http_request_s, upstream)) {
            process->main_outcome = attempt->outcome;
            process->main_tls = attempt->tls && attempt->outcome != OUTCOME_TIMEOUT;
        }
    }
#if ADOPT_UPSTREAM_CONTEXT
    u64 span_id = told_span_of(process, key->tgid, ended->state);
    if (span_id)
        attempt->span_id = span_id;
#endif
    return true;
}

static __always_inline void append_attempt_strings(struct process *process, struct attempt_key *key)
{
    struct attempt_state *ended = find_attempt(process, key);
    u32 index = key->index;
    if (!ended || index >= ATTEMPTS_MAX)
        return;
    append_str_at(process, STRING_PEER, index, process->attempt_peers[index], SHORT_STRING_BYTES_MAX);
    u64 configuration = process->upstream_configurations[index];
    if (configuration)
        append_str_at(process, STRING_UPSTREAM, index, configuration + OFFSET_ngx_http_upstream_srv_conf_s__host,
                      SHORT_STRING_BYTES_MAX);
    if (ended->request)
        append_str_at(process, STRING_SUBREQUEST_URI, index, ended->request + OFFSET_ngx_http_request_s__uri,
                      SHORT_STRING_BYTES_MAX);
#if !DETAIL_REQUEST
    attempts.delete(key);
#endif
}

/* Holds $upstream_addr's elements against the attempts that were taken: both are in the order in which they began. Those that
 * were not seen, or name the upstream itself as no peer was live, are noted in process->unseen_peers. */
static __always_inline void find_unseen(struct process *process, struct request_record *record)
{
    u64 states = MEMBER(process->request, u64, ngx_http_request_s, upstream_states);
    u8 array[OFFSET_ngx_array_t__nelts + 8];
    process->unseen_peers_count = 0;
    record->upstream_states = 0;
    record->attempts_lost = 0;
    if (!states || !read_memory(array, sizeof(array), states))
        return;
    u64 elements = MEMBER(array, u64, ngx_array_t, elts), count = MEMBER(array, u64, ngx_array_t, nelts), peer;
    if (count > ATTEMPTS_MAX)
        record->attempts_lost = count - ATTEMPTS_MAX > 255 ? 255 : count - ATTEMPTS_MAX;
    process->next_seen = 0;
    EACH(i, count, ATTEMPTS_MAX) {
        if (!read_pointer(&peer, elements + i * SIZEOF_ngx_http_upstream_state_t + OFFSET_ngx_http_upstream_state_t__peer))
            break;
        if (!peer)
            continue;
        record->upstream_states++;
        if (process->next_seen < process->seen_peers_count && process->seen_peers[slot(process->next_seen)] == peer) {
            process->next_seen++;
        } else {
            process->unseen_peers[slot(process->unseen_peers_count)] = peer;
            process->unseen_peers_count++;
        }
    }
}

static __always_inline void learn_core_module_index(struct process *process, u64 load_address)
{
    if (bpf_probe_read_user(&process->core_module_index, sizeof(u64),
                            (void *)(load_address + ADDRESS_ngx_http_core_module + OFFSET_ngx_module_s__ctx_index)) == 0)
        process->core_module_index_known = 1;
}

/* Why a request that the sampler left out is sent all the same. KEPT_SAMPLED: it is not. */
static __always_inline u8 keep(const struct request_record *record)
{
    u64 status = final_status(record);
    if (KEEP_ERRORS && status >= 500 && status < 600) /* beyond it is what modules make up */
        return KEPT_ERROR;
    u64 began_ns = record->first_read_ns ? record->first_read_ns : record->created_ns;
    u64 took_ns = (record->ends_with_write ? record->last_write_ns : record->ended_ns) - began_ns;
    return KEEP_SLOWER_THAN_NS && took_ns >= KEEP_SLOWER_THAN_NS ? KEPT_SLOW : KEPT_SAMPLED;
}

/* Forgets a request's attempts: their sockets find that out by themselves. */
static __always_inline void forget_attempts(struct attempt_key *attempt_key, u32 count)
{
    EACH(i, count, ATTEMPTS_TAKEN_MAX) {
        attempt_key->index = i;
        attempts.delete(attempt_key);
    }
}

#define METHOD_BYTES_MAX 16 /* with the space behind it; a longer one is as nginx has it */

/* ngx_http_request.h, by the method's text as a little-endian number. */
static __always_inline u32 method_of_text(u64 text)
{
    switch (text) {
    case 0x544547: /* GET */
        return 0x2;
    case 0x44414548: /* HEAD */
        return 0x4;
    case 0x54534f50: /* POST */
        return 0x8;
    case 0x545550: /* PUT */
        return 0x10;
    case 0x4554454c4544: /* DELETE */
        return 0x20;
    case 0x534e4f4954504f: /* OPTIONS */
        return 0x200;
    case 0x4843544150: /* PATCH */
        return 0x4000;
    case 0x4543415254: /* TRACE */
        return 0x8000;
    }
    return 1;
}

/* The method that the client sent: an internal redirect makes GET of r->method and r->method_name, but not of the request line.
 * nginx's own name begins there, unless it was redirected or came over HTTP/2. */
static __always_inline void find_method(struct process *process, struct request_record *record)
{
    struct ngx_str *name = REQUEST_STR(method_name), *line = REQUEST_STR(request_line);
    u8 text[METHOD_BYTES_MAX] = {};
    process->method_name = *name;
    record->method = MEMBER(process->request, u64, ngx_http_request_s, method);
    if (name->data == line->data || !line->len
        || bpf_probe_read_user(text, sizeof(text), (void *)line->data) != 0)
        return;
    u64 bytes = 0, number = 0;
    for (int i = 0; i < METHOD_BYTES_MAX; i++) {
        if (text[i] == ' ')
            break;
        if (i < 8)
            number |= (u64)text[i] << (8 * i);
        bytes = i + 1;
    }
    if (!bytes || bytes == METHOD_BYTES_MAX || (bytes == name->len && record->method != 0x2))
        return;
    u32 method = method_of_text(bytes <= 8 ? number : 0);
    if (method == record->method)
        return;
    process->method_name.data = line->data;
    process->method_name.len = bytes;
    record->method = method;
}

/* What the client said, where nginx has overwritten it: with HTTP/0.9, behind post_action and a peer that sent no header. */
static __always_inline u64 asked_version(struct process *process, u64 http_version)
{
    struct ngx_str *protocol = (struct ngx_str *)(process->request + OFFSET_ngx_http_request_s__http_protocol);
    u64 text = 0;
    if (http_version != 9 || protocol->len != sizeof(text)
        || bpf_probe_read_user(&text, sizeof(text), (void *)protocol->data) != 0 || (text & 0xff00ffffffffffULL) != 0x2e002f50545448ULL)
        return http_version;
    return ((text >> 40 & 0xff) - '0') * 1000 + ((text >> 56) - '0');
}

/* nginx makes a request for itself in a TLS handshake, for a certificate whose name has variables (ngx_http_ssl_certificate).
 * A client's is counted when it is created. */
static __always_inline bool is_of_a_handshake(struct process *process)
{
    return !MEMBER(process->connection, u64, ngx_connection_s, requests) && !REQUEST_STR(method_name)->len
        && !REQUEST_STR(request_line)->len && !REQUEST_STR(unparsed_uri)->len;
}

/* ngx_http_free_request(ngx_http_request_t *r, ngx_int_t rc): once a request, before it is logged */
int enter_ngx_http_free_request(struct pt_regs *ctx)
{
    u64 now;
    u32 tgid;
    struct process *process = entered(ctx, &tgid, &now);
    if (!process)
        return 0;

    u64 r = PT_REGS_PARM1(ctx);
    struct request_key key = {.tgid = tgid};
    if (bpf_probe_read_user(process->request, SIZEOF_ngx_http_request_s, (void *)r) != 0) {
        count_loss(LOST_READ_FAILED);
        return 0;
    }
    key.connection = MEMBER(process->request, u64, ngx_http_request_s, connection);
    bool readable = bpf_probe_read_user(process->connection, SIZEOF_ngx_connection_s, (void *)key.connection) == 0;
    if (readable && is_of_a_handshake(process))
        return 0;
    u64 load_address = ctx->ip - SITE_ngx_http_free_request;
    if (!process->core_module_index_known)
        learn_core_module_index(process, load_address);
    if (is_doubted(process, r, readable, load_address, tgid))
        return 0;

    struct request_record *record = (struct request_record *)process->record;
    struct active_request active = {};
    u64 http_version = MEMBER(process->request, u64, ngx_http_request_s, http_version);
    record->http_version = asked_version(process, http_version);
    record->location_unknown = record->http_version != http_version;
    record->multiplexed =
        MEMBER(process->request, u64, ngx_http_request_s, stream) != 0 || record->http_version == HTTP_VERSION_3;
#ifdef OFFSET_ngx_connection_s__ssl
    record->tls = MEMBER(process->connection, u64, ngx_connection_s, ssl) != 0;
#else
    record->tls = 0; /* a build without TLS */
#endif
    record->accepted_ns = 0;
    record->first_read_ns = 0;
    record->last_read_ns = 0;
    record->first_write_ns = 0;
    record->last_write_ns = 0;
    record->requests_seen = 0;
    record->coarse_start = 0;
    record->reserved = 0;
    record->reserved_too = 0;
    struct attempt_key attempt_key = {.connection = key.connection, .tgid = tgid};
    struct socket *socket = NULL;
#if DETAIL_REQUEST
    active.created_ns = monotonic_ns_of_start(process, load_address, now);
    if (!active.created_ns)
        return 0;
#else
    struct socket_key socket_key = {.tgid = tgid, .fd = MEMBER(process->connection, s32, ngx_connection_s, fd)};
    socket = sockets.lookup(&socket_key);
    if (!take_times(process, &key, socket, &active, load_address, now)) {
        forget_attempts(&attempt_key, active.progress.attempts);
        return 0;
    }
#endif
    struct request_trace *trace = &process->trace;
    u64 told_span_id = 0;
#if PROPAGATE
    told_span_id = active.told_span_id;
    if (active.decided)
        recall_trace(process, &active);
    else
#endif
    {
        read_incoming_context(process);
        decide_trace(process);
    }
#if !ADOPT_UPSTREAM_CONTEXT && !KEEP_ERRORS && !KEEP_SLOWER_THAN_NS && !REQUEST_METRICS
    if (!trace->sampled) {
        forget_attempts(&attempt_key, active.progress.attempts);
        count_loss(NOT_SAMPLED);
        return 0;
    }
#endif
#if DETAIL_REQUEST
    active.progress.attempts = recall_last_attempt(process, &active.created_ns, now);
#endif
    record->created_ns = active.created_ns;
    record->ended_ns = now;
    record->rc = PT_REGS_PARM2(ctx);
    record->connection = MEMBER(process->connection, u64, ngx_connection_s, number);
    record->connection_requests = MEMBER(process->connection, u64, ngx_connection_s, requests);
    record->request_length = MEMBER(process->request, u64, ngx_http_request_s, request_length);
    record->bytes_sent = MEMBER(process->connection, u64, ngx_connection_s, sent);
    record->nginx_start_sec = MEMBER(process->request, u64, ngx_http_request_s, start_sec);
    record->nginx_start_msec = MEMBER(process->request, u64, ngx_http_request_s, start_msec);
    record->err_status = MEMBER(process->request, u64, ngx_http_request_s, err_status);
    record->out_status = MEMBER(process->request + OFFSET_ngx_http_request_s__headers_out, u64, ngx_http_headers_out_t, status);
    record->worker_pid = tgid;
    find_method(process, record);

#if ADOPT_UPSTREAM_CONTEXT
    __builtin_memset(&process->told, 0, sizeof(process->told));
    process->client_span_id = read_client_span_id(process);
#endif
    process->seen_peers_count = 0;
    process->main_outcome = OUTCOME_WHOLE;
    process->main_tls = 0;
    record->attempts = 0;
    u32 attempts_count = active.progress.attempts;
    EACH(i, attempts_count, ATTEMPTS_TAKEN_MAX) {
        attempt_key.index = i;
        if (!take_attempt(process, &attempt_key, told_span_id, now)) {
            count_loss(LOST_READ_FAILED);
            return 0;
        }
        record->attempts = i + 1;
    }
    asm volatile("" ::: "memory"); /* like record_bytes: read back, the count is one unknown number and not 33 known ones */
    u32 taken = record->attempts;
    find_unseen(process, record);
    record->ending = ending_of(process, socket, record, process->main_outcome, load_address);
    record->ends_with_write = ends_with_write(process, socket, record, load_address);
    EACH(i, taken, ATTEMPTS_TAKEN_MAX)
        conclude(process, record, attempt_of(process, i));

#if ADOPT_UPSTREAM_CONTEXT
    adopt_trace(process);
#endif
    record->trace_id_high = trace->trace_id_high;
    record->trace_id_low = trace->trace_id_low;
    record->parent_span_id = trace->parent_span_id;
    record->trace_flags = trace->flags;
    record->kept = KEPT_SAMPLED;
    if (!trace->sampled) {
        record->kept = trace->parent_said_no ? KEPT_SAMPLED : keep(record);
        if (record->kept == KEPT_SAMPLED) {
            forget_attempts(&attempt_key, taken);
            count_loss(NOT_SAMPLED);
#if REQUEST_METRICS
            measure(ctx);
#endif
            return 0;
        }
    }

    process->record_bytes = sizeof(struct request_record) + taken * sizeof(struct upstream_attempt);
    append_request_strings(process);
    EACH(i, taken, ATTEMPTS_TAKEN_MAX) {
        attempt_key.index = i;
        append_attempt_strings(process, &attempt_key);
    }
    u64 unseen = process->unseen_peers_count;
    EACH(i, unseen, ATTEMPTS_MAX)
        append_str_at(process, STRING_UNSEEN_PEER, i, process->unseen_peers[i], SHORT_STRING_BYTES_MAX);
    u64 bytes = process->record_bytes;
    asm volatile("" : "+r"(bytes));
    if (bytes > RECORD_BYTES_MAX)
        bytes = RECORD_BYTES_MAX;
    if (records.ringbuf_output(record, bytes, BPF_RB_NO_WAKEUP) != 0)
        count_loss(LOST_RING_BUFFER_FULL);
#if REQUEST_METRICS
    measure(ctx);
#endif
    return 0;
}
