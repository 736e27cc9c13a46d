/* Copies a request's upstream attempts into its record when the request ends. */

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
/* Fills in the request's own last attempt by nginx's clock: u->start_time and the times of its state, each rounded outward to a
 * whole millisecond. Returns false if there is no attempt, or if its times are not within the request. */
static __always_inline bool recall_last_attempt(struct process *process, u64 r, u64 *began_ns, u64 now)
{
    struct attempt_state *last = &process->attempt;
    u64 upstream = MEMBER(process->request, u64, ngx_http_request_s, upstream), start_msec = 0, chain = 0;
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
    if (start_ns < *began_ns) /* the two clocks are rounded down to milliseconds at different moments */
        *began_ns = start_ns;
    if (end_ns > now)
        end_ns = now;
    last->upstream = upstream;
    last->settled = 1;
    bool is_redirected = REQUEST_STR(method_name)->data == process->redirected_method;
    read_quietly(&chain, upstream + OFFSET_ngx_http_upstream_s__request_bufs);
    note_sent(process, last, chain, r, is_redirected ? 0 : MEMBER(process->request, u64, ngx_http_request_s, method));
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
/* Settles an attempt when its request ends, if its connection is still open: kept for another request, or closed later. */
static __always_inline void settle_now(struct attempt_key *key, struct attempt_state *ended, u64 now)
{
    struct socket_key socket_key = {.tgid = key->tgid, .fd = ended->fd};
    struct socket *socket = sockets.lookup(&socket_key);
    if (!socket || socket->attempt_serial != ended->serial)
        return;
    settle(ended, socket, socket->last_read_ns ? socket->last_read_ns : now);
}
#endif

/* Copies an attempt into the record, with nginx's own numbers about it. */
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
#if PROPAGATE_SOCKET
    if (ended->told_span_id)
        attempt->span_id = ended->told_span_id;
    if (!attempt->span_id && !ended->untold && attempt->first_write_ns) /* its announcement was missed */
        count_loss(PARTIAL_PROPAGATION_CONNECTION);
#endif
    u8 *middle = process->upstream_middle; /* pipe, …, upstream */
    if (bpf_probe_read_user(middle, sizeof(process->upstream_middle), (void *)(ended->upstream + UPSTREAM_MIDDLE)) != 0)
        return false;
    process->upstream_configurations[index] = *(u64 *)(middle + OFFSET_ngx_http_upstream_s__upstream - UPSTREAM_MIDDLE);
    process->sent_lines[index] = ended->sent_line;
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
    attempt->outcome = outcome_of(process, ended, attempt);
    if (!ended->request) {
        if (!process->seen_peers_count) {
            process->location = ended->location;
            process->location_method = ended->method_name;
        }
        if (!ended->acts)
            process->last_location = ended->location;
        process->seen_peers[slot(process->seen_peers_count)] = process->attempt_peers[index];
        process->seen_states[slot(process->seen_peers_count)] = ended->state;
        process->seen_peers_count++;
        if (process->answer ? !ended->acts : ended->upstream == MEMBER(process->request, u64, ngx_http_request_s, upstream)) {
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

/* Appends the request line that an attempt's peer was sent. Retries that send the same have it only once. */
static __always_inline void append_sent_line(struct process *process, u32 index)
{
    struct sent_line *line = &process->sent_lines[slot(index)];
    u64 limit = process->record_bytes < SENT_LINES_BYTES_MAX ? STRING_BYTES_MAX : SENT_LINE_BYTES_MIN;
    if (line->text == process->last_sent_line)
        return;
    process->last_sent_line = line->text;
    u8 kind = attempt_of(process, index)->protocol == PROTOCOL_HTTP_2 ? STRING_SENT_PATH : STRING_SENT_LINE;
    append_string(process, kind, index, line->text, line->bytes, limit);
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
    u8 host = ended->attempt.protocol == PROTOCOL_HTTP_2 ? STRING_SENT_AUTHORITY : STRING_SENT_HOST;
    append_string(process, host, index, ended->sent_host, ended->sent_host_bytes, SHORT_STRING_BYTES_MAX);
    if (ended->request)
        append_str_at(process, STRING_SUBREQUEST_URI, index, ended->request + OFFSET_ngx_http_request_s__uri,
                      SHORT_STRING_BYTES_MAX);
#if !DETAIL_REQUEST
    attempts.delete(key);
#endif
}

/* Compares the elements of $upstream_addr with the attempts that were copied. Both are in the order in which they began. Notes
 * elements without an attempt in process->unseen_peers: attempts that were not seen, and the upstream's name if no peer was live. */
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
        u64 state = elements + i * SIZEOF_ngx_http_upstream_state_t, next = slot(process->next_seen);
        if (process->next_seen < process->seen_peers_count && process->seen_states[next] == state)
            peer = process->seen_peers[next];
        else if (!read_pointer(&peer, state + OFFSET_ngx_http_upstream_state_t__peer))
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

/* Removes a request's attempts. Their sockets notice this by the missing entry. */
static __always_inline void forget_attempts(struct attempt_key *attempt_key, u32 count)
{
    EACH(i, count, ATTEMPTS_TAKEN_MAX) {
        attempt_key->index = i;
        attempts.delete(attempt_key);
    }
}
