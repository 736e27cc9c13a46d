/*
 * When a request began, with or without the probe that marks it (ngx_http_create_request).
 *
 * Of a plain HTTP/1 request the client's socket tells all of it: it began with what was first read since the one before it
 * ended, or, had that been read together with it, at that end. Over TLS a read tells neither that a handshake is over nor
 * what it brought; streams of HTTP/2 and HTTP/3 share a socket; a header of the PROXY protocol is read ahead of a request.
 * While no request is such, the agent lets the probe go (kernel/beginnings.py).
 */

#define MILLISECOND_NS 1000000
#define NEEDED_STEP_NS (100 * MILLISECOND_NS) /* workers share it: it is to be written now and then */
#define SPARED_STEP 64 /* workers count by themselves, and together in steps: a counter they share is slow */

/* A request needs, or will need, the probe that marks its beginning. */
static __always_inline void beginnings_needed(u64 now)
{
    u32 index = BEGINNINGS_NEEDED_NS;
    u64 *last_ns = beginnings.lookup(&index);
    if (last_ns && now - *last_ns > NEEDED_STEP_NS)
        *last_ns = now;
}

static __always_inline void beginning_spared(struct process *process)
{
    u32 index = BEGINNINGS_SPARED;
    if (++process->plain_requests % SPARED_STEP)
        return;
    u64 *count = beginnings.lookup(&index);
    if (count)
        lock_xadd(count, SPARED_STEP);
}

static __always_inline bool is_upstream(struct socket *socket)
{
    return socket->ready_ns || socket->attempt_serial || (socket->opened_ns && !socket->client);
}

/* Where what comes to a running request is kept: with its beginning where a probe has marked that; else, of HTTP/1, with its
 * client's socket, which serves one request at a time. NULL: nowhere. */
static __always_inline struct request_progress *find_progress(struct request_key *key, u64 main_request)
{
    struct active_request *active = active_requests.lookup(key);
    if (active)
        return &active->progress;
    struct socket_key socket_key = {.tgid = key->tgid};
    u64 connection = 0, stream = 0;
    if (bpf_probe_read_user(&socket_key.fd, sizeof(socket_key.fd), (void *)(key->connection + OFFSET_ngx_connection_s__fd)) != 0
        || bpf_probe_read_user(&connection, sizeof(connection),
                               (void *)(main_request + OFFSET_ngx_http_request_s__connection)) != 0
        || bpf_probe_read_user(&stream, sizeof(stream), (void *)(main_request + OFFSET_ngx_http_request_s__stream)) != 0
        || connection != key->connection || stream)
        return NULL;
    struct socket *socket = sockets.lookup(&socket_key);
    return socket && !is_upstream(socket) && !socket->datagrams ? &socket->progress : NULL;
}

/* Of a stream whose beginning no probe has marked: from its first attempt on. NULL: it is none, or there is no room. */
static __always_inline struct request_progress *keep_progress(struct request_key *key, u64 main_request)
{
    struct active_request unmarked = {};
    u64 stream = 0;
    if (bpf_probe_read_user(&stream, sizeof(stream), (void *)(main_request + OFFSET_ngx_http_request_s__stream)) != 0 || !stream)
        return NULL;
    active_requests.update(key, &unmarked);
    struct active_request *active = active_requests.lookup(key);
    return active ? &active->progress : NULL;
}

/* When the request began; 0: not known, and counted. nginx notes it by its cached clock, in Unix milliseconds. That clock and
 * ngx_current_msec are taken at one moment (ngx_time_update), so that their difference leads from the one to the other. */
static __always_inline u64 monotonic_ns_of_start(struct process *process, u64 load_address, u64 now)
{
    struct {
        u64 sec;
        u64 msec;
    } cached = {};
    u64 address = 0, current_msec = 0;
    if (bpf_probe_read_user(&address, sizeof(address), (void *)(load_address + ADDRESS_ngx_cached_time)) != 0
        || bpf_probe_read_user(&cached, sizeof(cached), (void *)address) != 0
        || bpf_probe_read_user(&current_msec, sizeof(current_msec), (void *)(load_address + ADDRESS_ngx_current_msec)) != 0) {
        count_loss(LOST_READ_FAILED);
        return 0;
    }
    cached.msec &= 0xffffffff; /* the other half is the time zone */
    u64 start_msec = MEMBER(process->request, u64, ngx_http_request_s, start_sec) * 1000
        + MEMBER(process->request, u64, ngx_http_request_s, start_msec);
    s64 ago_msec = cached.sec * 1000 + cached.msec - start_msec;
    u64 start_ns = (current_msec - ago_msec) * MILLISECOND_NS;
    if (ago_msec >= 0 && start_ns < now)
        return start_ns;
    count_loss(LOST_CLOCK_SET_BACK);
    return 0;
}

#if !DETAIL_REQUEST
#if defined OFFSET_ngx_connection_s__proxy_protocol && defined OFFSET_ngx_http_request_s__header_in && defined OFFSET_ngx_buf_s__pos
/* Whether a header of the PROXY protocol may have been read ahead of the request. */
static __always_inline bool was_introduced(struct process *process, struct socket *socket)
{
    return !socket->requests && MEMBER(process->connection, u64, ngx_connection_s, proxy_protocol);
}

/* Whether the next request's first bytes came with this one's last (ngx_http_set_keepalive, "the pipelined request"). */
static __always_inline bool next_has_begun(struct process *process)
{
    struct {
        u64 pos;
        u64 last;
    } header_in = {};
    u64 buffer = MEMBER(process->request, u64, ngx_http_request_s, header_in);
    return bpf_probe_read_user(&header_in, sizeof(header_in), (void *)(buffer + OFFSET_ngx_buf_s__pos)) == 0
        && header_in.pos < header_in.last;
}
#else
/* nginx before 1.17.6, and releases of a catalogue of before: every request needs the probe. */
static __always_inline bool was_introduced(struct process *process, struct socket *socket)
{
    return true;
}

static __always_inline bool next_has_begun(struct process *process)
{
    return false;
}
#endif

/* When a request began whose beginning was not marked, nor told by a socket that is known since before it. 0: the request is
 * not to be traced, which is counted. */
static __always_inline u64 coarse_start(struct process *process, u64 load_address, u64 now)
{
    u64 start_ns = monotonic_ns_of_start(process, load_address, now);
    if (!start_ns || start_ns >= process->known_since_ns)
        return start_ns;
    count_loss(BEGAN_BEFORE_ATTACH);
    return 0;
}

/* Whether the server promised the stream, and no client asked for it: its number is even (RFC 9113, 5.1.1). */
static __always_inline bool was_pushed(struct process *process)
{
#ifndef SIZEOF_ngx_http_v2_stream_s
    return false; /* a build without HTTP/2 */
#else
    u64 node = 0, id = 0, stream = MEMBER(process->request, u64, ngx_http_request_s, stream);
    return stream && bpf_probe_read_user(&node, sizeof(node), (void *)(stream + OFFSET_ngx_http_v2_stream_s__node)) == 0 && node
        && bpf_probe_read_user(&id, sizeof(id), (void *)(node + OFFSET_ngx_http_v2_node_s__id)) == 0 && id && !(id & 1);
#endif
}

/* When the last of an HTTP/2 stream's own frames was written. 0: not known. */
static __always_inline u64 last_frame_ns(struct process *process, struct socket_key *socket_key, struct socket *socket,
                                         const struct active_request *active)
{
    if (!active->last_flush_ns) /* where its frames cannot be seen: unless something else was written since */
        return socket->last_write_ns >= process->turn_began_ns ? socket->last_write_ns : 0;
    if (active->last_flush_ns == socket->flush_began_ns)
        return socket->last_write_ns > active->last_flush_ns ? socket->last_write_ns : 0;
    struct flush_key key = {.tgid = socket_key->tgid, .fd = socket_key->fd, .began_ns = active->last_flush_ns};
    u64 *ended_ns = flush_ends.lookup(&key);
    return ended_ns ? *ended_ns : 0;
}

/* When the last of an HTTP/1 response was written. What TLS writes behind it, the alert that closes the connection, adds
 * nothing to ngx_connection_s.sent. */
static __always_inline u64 last_response_byte_ns(struct process *process, struct socket *socket)
{
    bool closed = socket->tls_connection && socket->earlier_write_ns > socket->first_write_ns
        && socket->last_sent == MEMBER(process->connection, u64, ngx_connection_s, sent);
    return closed ? socket->earlier_write_ns : socket->last_write_ns;
}

/* Fills in the record's times, and makes the client's socket, if it is known, ready for the connection's next request. False: the
 * request is not to be traced, which is counted. */
static __always_inline bool take_times(struct process *process, struct request_key *key, struct socket *socket,
                                       struct active_request *active, u64 load_address, u64 now)
{
    struct request_record *record = (struct request_record *)process->record;
    struct socket_key socket_key = {.tgid = key->tgid, .fd = MEMBER(process->connection, s32, ngx_connection_s, fd)};
    struct active_request *marked = active_requests.lookup(key);
    u64 told_ns = 0, told_first_read_ns = 0, told_read_ns = 0;
    bool known = false;

    if (marked) {
        *active = *marked;
        active_requests.delete(key);
        if (!active->created_ns)
            marked = NULL;
    } else if (!record->multiplexed && socket) {
        active->progress = socket->progress;
    }
    if (socket) {
        record->accepted_ns = socket->opened_ns;
        record->last_write_ns =
            record->multiplexed ? last_frame_ns(process, &socket_key, socket, active) : last_response_byte_ns(process, socket);
    }
    if (record->multiplexed) {
        record->first_write_ns = active->first_write_ns;
        if (was_pushed(process))
            active->read_ns = 0;
    } else if (socket) {
        record->first_write_ns = socket->first_write_ns;
        record->last_read_ns = socket->request_read_ns;
        if (socket->next_began_ns) {
            told_ns = socket->next_began_ns;
        } else {
            told_ns = told_read_ns = socket->first_read_ns;
            told_first_read_ns = socket->first_read_began_ns;
        }
        if (record->tls || was_introduced(process, socket))
            told_ns = 0;
        known = socket->opened_ns || socket->requests;
        socket->client = 1;
        socket->requests++;
        if (socket->opened_ns)
            record->requests_seen = socket->requests;
        socket->next_began_ns = next_has_begun(process) ? now : 0;
        socket->running = socket->next_began_ns != 0;
        socket->first_read_ns = 0;
        socket->request_read_ns = 0;
        socket->first_write_ns = 0;
        socket->progress = (struct request_progress){};
    }

    if (told_ns && (!marked || active->read_ns == told_read_ns)) {
        beginning_spared(process);
        if (!marked && !known && !coarse_start(process, load_address, now))
            return false;
        active->created_ns = told_ns;
        record->first_read_ns = told_first_read_ns;
    } else {
        beginnings_needed(now);
        record->first_read_ns = active->read_ns;
        if (!marked) {
            active->created_ns = coarse_start(process, load_address, now);
            if (!active->created_ns)
                return false;
            if (active->created_ns < record->accepted_ns)
                active->created_ns = record->accepted_ns;
            count_loss(PARTIAL_BEGINNING);
            record->coarse_start = 1;
            record->first_write_ns = 0;
            record->last_read_ns = 0;
        }
    }

    if (record->last_read_ns < active->progress.body_read_ns)
        record->last_read_ns = active->progress.body_read_ns;
    if (record->last_read_ns <= active->created_ns)
        record->last_read_ns = 0;
    if (active->progress.body_unseen && record->first_read_ns) { /* when the request was complete is not known */
        active->created_ns = record->first_read_ns;
        record->first_read_ns = 0;
        record->last_read_ns = 0;
    }
    /* HTTP/3 packets carry many streams' frames, and leave after the request's end (ngx_quic_push_handler). */
    if (record->last_write_ns <= active->created_ns || record->http_version == HTTP_VERSION_3)
        record->last_write_ns = 0;
    return true;
}
#endif
