/*
 * When a request began, with or without the probe that marks the beginning (ngx_http_create_request).
 *
 * The client's socket tells when a plain HTTP/1 request began: at the first read since the end of the request before it. If its
 * first bytes were read together with that request, it began at that end. The socket is not enough in three cases. Over TLS a
 * read tells neither whether the handshake is over nor what the read brought. Streams of HTTP/2 and HTTP/3 share a socket. A
 * header of the PROXY protocol is read before a request. While there are no such requests, user space detaches the probe
 * (kernel/beginnings.py).
 */

#define MILLISECOND_NS 1000000
#define NEEDED_STEP_NS (100 * MILLISECOND_NS) /* all workers share the time, so it is written only once in a while */
#define SPARED_STEP 64 /* a counter shared by all workers is slow, so each worker adds to it in steps */

/* Notes that a request needs, or will need, the probe that marks its beginning. */
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

/* Returns the progress of a running request. It is kept with the beginning if a probe has marked it. Otherwise, for HTTP/1, it is
 * kept with the client's socket, which serves one request at a time. NULL: it is kept nowhere. */
static __always_inline struct request_progress *find_progress_of(struct request_key *key, bool is_stream)
{
    struct active_request *active = active_requests.lookup(key);
    if (active)
        return &active->progress;
    struct socket_key socket_key = {.tgid = key->tgid};
    if (is_stream
        || bpf_probe_read_user(&socket_key.fd, sizeof(socket_key.fd), (void *)(key->connection + OFFSET_ngx_connection_s__fd)) != 0)
        return NULL;
    struct socket *socket = sockets.lookup(&socket_key);
    return socket && !is_upstream(socket) && !socket->datagrams ? &socket->progress : NULL;
}

static __always_inline struct request_progress *find_progress(struct request_key *key, u64 main_request)
{
    u64 connection = 0, stream = 0;
    if (!read_quietly(&connection, main_request + OFFSET_ngx_http_request_s__connection) || connection != key->connection
        || !read_quietly(&stream, main_request + OFFSET_ngx_http_request_s__stream))
        return NULL;
    return find_progress_of(key, stream);
}

/* Adds an entry for the progress of a stream whose beginning no probe has marked, at its first attempt. NULL: there is no room. */
static __always_inline struct request_progress *keep_progress(struct request_key *key)
{
    struct active_request unmarked = {};
    active_requests.update(key, &unmarked);
    struct active_request *active = active_requests.lookup(key);
    return active ? &active->progress : NULL;
}

/* Returns when the request began by nginx's clock. 0: not known; the loss is counted. nginx notes the beginning by its cached
 * clock, in Unix milliseconds. nginx sets that clock and ngx_current_msec at the same moment (ngx_time_update), so their
 * difference converts one clock into the other. */
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
    cached.msec &= 0xffffffff; /* the upper half is the time zone */
    u64 start_msec = MEMBER(process->request, u64, ngx_http_request_s, start_sec) * 1000
        + MEMBER(process->request, u64, ngx_http_request_s, start_msec);
    s64 ago_msec = cached.sec * 1000 + cached.msec - start_msec;
    u64 start_ns = (current_msec - ago_msec) * MILLISECOND_NS;
    if (ago_msec >= 0 && start_ns < now)
        return start_ns;
    count_loss(LOST_CLOCK_SET_BACK);
    return 0;
}

/* Reads the places in r->header_in, the buffer with the client's header, or with its last part. ngx_buf_t: pos, last, …, start */
static __always_inline void read_header_in(struct process *process)
{
    u8 buffer[OFFSET_ngx_buf_s__start + 8];
    u64 header_in = MEMBER(process->request, u64, ngx_http_request_s, header_in);
    process->header_pos = process->header_last = process->header_start = 0;
    if (bpf_probe_read_user(buffer, sizeof(buffer), (void *)header_in) != 0)
        return;
    process->header_pos = MEMBER(buffer, u64, ngx_buf_s, pos);
    process->header_last = MEMBER(buffer, u64, ngx_buf_s, last);
    process->header_start = MEMBER(buffer, u64, ngx_buf_s, start);
}

#if !DETAIL_REQUEST
#ifdef OFFSET_ngx_connection_s__proxy_protocol
/* Tells whether a header of the PROXY protocol may have been read before the request. */
static __always_inline bool was_introduced(struct process *process, struct socket *socket)
{
    return !socket->requests && MEMBER(process->connection, u64, ngx_connection_s, proxy_protocol);
}

/* Tells whether the next request's first bytes came with this one's last bytes (ngx_http_set_keepalive, "the pipelined request"). */
static __always_inline bool next_has_begun(struct process *process)
{
    return process->header_pos < process->header_last;
}
#else
/* nginx before 1.17.6, and layouts from an old catalogue: every request needs the probe. */
static __always_inline bool was_introduced(struct process *process, struct socket *socket)
{
    return true;
}

static __always_inline bool next_has_begun(struct process *process)
{
    return false;
}
#endif

/* Returns when a request began by nginx's clock, for a request without a marked beginning and without a socket that was known
 * before it. 0: the request is not traced; this is counted. */
static __always_inline u64 coarse_start(struct process *process, u64 load_address, u64 now)
{
    u64 start_ns = monotonic_ns_of_start(process, load_address, now);
    if (!start_ns || start_ns >= process->known_since_ns)
        return start_ns;
    count_loss(BEGAN_BEFORE_ATTACH);
    return 0;
}

/* Tells whether the server pushed the stream, without a client's request: its number is even (RFC 9113, 5.1.1). */
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

/* Returns when the last of an HTTP/2 stream's own frames was written. 0: not known. */
static __always_inline u64 last_frame_ns(struct process *process, struct socket_key *socket_key, struct socket *socket,
                                         const struct active_request *active)
{
    if (!active->last_flush_ns) /* the frames were not seen: the last write counts if it is of this turn */
        return socket->last_write_ns >= process->turn_began_ns ? socket->last_write_ns : 0;
    if (active->last_flush_ns == socket->flush_began_ns)
        return socket->last_write_ns > active->last_flush_ns ? socket->last_write_ns : 0;
    struct flush_key key = {.tgid = socket_key->tgid, .fd = socket_key->fd, .began_ns = active->last_flush_ns};
    u64 *ended_ns = flush_ends.lookup(&key);
    return ended_ns ? *ended_ns : 0;
}

/* Returns when the last byte of an HTTP/1 response was written. The TLS alert that closes the connection is written after the
 * response, but does not add to ngx_connection_s.sent. */
static __always_inline u64 last_response_byte_ns(struct process *process, struct socket *socket)
{
    bool closed = socket->tls_connection && socket->earlier_write_ns > socket->first_write_ns
        && socket->last_sent == MEMBER(process->connection, u64, ngx_connection_s, sent);
    return closed ? socket->earlier_write_ns : socket->last_write_ns;
}

/* Fills in the record's times, and prepares the client's socket, if it is known, for the connection's next request. False: the
 * request is not traced; this is counted. */
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
        for (int i = 0; i < SOCKADDR_WORDS; i++)
            process->peer[i] = socket->peer[i];
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
    if (active->progress.body_unseen && record->first_read_ns) { /* it is not known when the request was complete */
        active->created_ns = record->first_read_ns;
        record->first_read_ns = 0;
        record->last_read_ns = 0;
    }
    /* HTTP/3 packets carry frames of many streams, and are sent after the request's end (ngx_quic_push_handler). */
    if (record->last_write_ns <= active->created_ns || record->http_version == HTTP_VERSION_3)
        record->last_write_ns = 0;
    return true;
}
#endif
