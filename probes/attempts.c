/*
 * Finds upstream attempts by the owner of the connection: descriptor → ngx_connection_t → (sub)request. This works with every
 * balancer.
 *
 * epoll_ctl(ADD) names a socket's ngx_connection_t. For a socket that is older than the probes, epoll_wait names it.
 *
 * On a new connection an attempt begins at connect(). The connection's log then names the request for which nginx works. On a
 * kept-alive connection an attempt begins at getsockopt(SO_ERROR), which nginx calls just before it sends, or at the first write
 * (Angie does not call getsockopt). c->data is the request then. Both count only if r->upstream->peer.connection is this
 * connection; for a cosocket, a resolver or a stream's session it is not. Each attempt has its own ngx_http_upstream_state_t,
 * which distinguishes it from the attempt before.
 *
 * The socket holds the attempt's times until it is closed, it serves the next attempt, or the request ends.
 */

/* How long the events of epoll_wait are searched for the connection of a socket that is older than the probes. */
#define WANTED_NS (60 * 1000000000ULL)
#define EVENTS_MAX 16

/* The request for which an attempt begins, and its upstream. */
struct owner {
    u64 request;
    u64 main_request;
    u64 client_connection;
    u64 upstream;             /* ngx_http_upstream_t * */
    u64 state;
    u64 location;             /* r->loc_conf */
    u64 request_bufs;         /* u->request_bufs */
    u64 is_stream;
};

/* A member of the main request, of which process->request_part has a copy. */
#define OF_PART(process, type, member) (*(type *)((process)->request_part + OFFSET_ngx_http_request_s__##member - REQUEST_PART))

/* Tells whether a state is the last one that ngx_http_upstream_connect pushed to r->upstream_states. */
static __always_inline bool is_latest_state(u64 states, u64 state)
{
    u8 array[OFFSET_ngx_array_t__nelts + 8];
    if (!states || bpf_probe_read_user(array, sizeof(array), (void *)states) != 0)
        return false;
    u64 elements = MEMBER(array, u64, ngx_array_t, elts), count = MEMBER(array, u64, ngx_array_t, nelts);
    return state == elements + (count - 1) * SIZEOF_ngx_http_upstream_state_t;
}

static __always_inline bool read_request_part(struct process *process, u64 request)
{
    return bpf_probe_read_user(process->request_part, sizeof(process->request_part), (void *)(request + REQUEST_PART)) == 0;
}

/* Tells whether `request` is a request whose upstream uses this connection now. Fills in `owner` and process->request_part. */
static __always_inline bool is_owned_by(struct process *process, struct owner *owner, u64 request, u64 connection)
{
    u8 *head = process->request_head;      /* signature, connection, …, upstream_states */
    u8 *upstream = process->upstream_head; /* peer, …, request_bufs */
    if (!request || bpf_probe_read_user(head, sizeof(process->request_head), (void *)request) != 0
        || MEMBER(head, u32, ngx_http_request_s, signature) != HTTP_MODULE)
        return false;
    owner->upstream = MEMBER(head, u64, ngx_http_request_s, upstream);
    if (!owner->upstream
        || bpf_probe_read_user(upstream, sizeof(process->upstream_head), (void *)(owner->upstream + UPSTREAM_HEAD)) != 0
        || MEMBER(upstream + OFFSET_ngx_http_upstream_s__peer - UPSTREAM_HEAD, u64, ngx_peer_connection_s, connection) != connection
        || !read_quietly(&owner->state, owner->upstream + OFFSET_ngx_http_upstream_s__state)
        || !is_latest_state(MEMBER(head, u64, ngx_http_request_s, upstream_states), owner->state)
        || !read_request_part(process, request))
        return false;
    owner->request = request;
    owner->main_request = OF_PART(process, u64, main);
    if (owner->main_request != request && !read_request_part(process, owner->main_request))
        return false;
    owner->is_stream = OF_PART(process, u64, stream);
    owner->client_connection = MEMBER(head, u64, ngx_http_request_s, connection);
    owner->location = MEMBER(head, u64, ngx_http_request_s, loc_conf);
    owner->request_bufs = *(u64 *)(upstream + OFFSET_ngx_http_upstream_s__request_bufs - UPSTREAM_HEAD);
    return true;
}

/* Returns the request for which nginx connects: the connection's log names it. c->data is set only later. 0: not known. */
static __always_inline u64 connecting_request(u64 log)
{
    u64 log_ctx = 0, request = 0;
    if (read_quietly(&log_ctx, log + OFFSET_ngx_log_s__data) && log_ctx)
        read_quietly(&request, log_ctx + OFFSET_ngx_http_log_ctx_t__current_request);
    return request;
}

/* Returns the attempt whose times the socket holds. NULL: there is no such attempt, or its request has ended. */
static __always_inline struct attempt_state *attempt_on(struct socket_key *key, struct socket *socket)
{
    if (!socket->attempt_serial)
        return NULL;
    struct attempt_key attempt_key = {.tgid = key->tgid, .index = socket->attempt_index, .connection = socket->client_connection};
    struct attempt_state *attempt = attempts.lookup(&attempt_key);
    return attempt && attempt->serial == socket->attempt_serial ? attempt : NULL;
}

/* Copies a socket's times to its attempt, which ended at `ended_ns` at the latest. */
static __always_inline void settle(struct attempt_state *state, struct socket *socket, u64 ended_ns)
{
    struct upstream_attempt *attempt = &state->attempt;
    attempt->connect_start_ns = socket->opened_ns;
    attempt->connected_ns = socket->opened_ns ? socket->ready_ns : 0;
    attempt->connect_failed_ns = socket->connect_failed_ns;
    attempt->connect_errno = socket->connect_errno;
    attempt->tls = socket->tls;
    if (socket->ready_ns) {
        attempt->first_write_ns = socket->first_write_ns;
        attempt->last_write_ns = socket->last_write_ns;
        attempt->first_read_ns = socket->first_read_ns;
        attempt->last_read_ns = socket->last_read_ns;
    }
    attempt->ended_ns = ended_ns;
    state->peer_closed = socket->peer_closed;
    state->settled = 1;
}

/* Notes what the attempt that began in this system call sends, and where its request is at this time: an internal redirect changes
 * both. This comes last in the program, because the verifier follows it anew for each state that is left from before. */
static __always_inline void examine_begun(struct process *process)
{
    struct begun_attempt *begun = &process->begun;
    begun->is_new = 0;
    struct attempt_state *attempt = attempts.lookup(&begun->key);
    if (!attempt)
        return;
    /* For post_action nginx sets the version to HTTP/0.9. */
    attempt->acts = !attempt->request && OF_PART(process, u64, http_version) == HTTP_VERSION_0_9;
    if (!attempt->request && !attempt->acts) {
        attempt->location = begun->location;
        attempt->method_name = OF_PART(process, struct ngx_str, method_name).data;
    }
    if (attempt->acts)
        note_answer(process, begun);
    note_sent(process, attempt, begun->request_bufs, attempt->request ? attempt->request : begun->main_request,
              OF_PART(process, u64, method));
}

#if LEAVES_OUT_EARLY
#define IS_ANOTHER(hash, name) is_not_0((hash) ^ HASH_##name)

/* Tells whether a request certainly has no header with a trace context. It may have more than a part of the list holds. */
static __always_inline bool has_no_context(struct process *process, u64 main_request)
{
    u8 *part = process->header_part;
    u64 list = main_request + OFFSET_ngx_http_request_s__headers_in + OFFSET_ngx_http_headers_in_t__headers, other = 1;
    if (bpf_probe_read_user(part, sizeof(process->header_part), (void *)(list + OFFSET_ngx_list_t__part)) != 0)
        return false;
    u64 count = MEMBER(part, u64, ngx_list_part_s, nelts), bytes = count * SIZEOF_ngx_table_elt_t;
    asm volatile("" : "+r"(bytes));
    if (count > HEADERS_IN_PART || bytes > sizeof(process->headers) || MEMBER(part, u64, ngx_list_part_s, next)
        || bpf_probe_read_user(process->headers, bytes, (void *)MEMBER(part, u64, ngx_list_part_s, elts)) != 0)
        return false;
    process->headers_read = count;
    for (u32 i = 0; i < HEADERS_IN_PART && i < *(volatile u64 *)&process->headers_read; i++) {
        u64 hash = MEMBER(process->headers + i * SIZEOF_ngx_table_elt_t, u64, ngx_table_elt_t, hash);
#if PROPAGATOR_TRACECONTEXT
        other &= IS_ANOTHER(hash, traceparent);
#endif
#if PROPAGATOR_B3
        other &= IS_ANOTHER(hash, b3);
#endif
#if PROPAGATOR_B3MULTI
        other &= IS_ANOTHER(hash, x_b3_traceid) & IS_ANOTHER(hash, x_b3_spanid) & IS_ANOTHER(hash, x_b3_sampled)
            & IS_ANOTHER(hash, x_b3_flags);
#endif
#if PROPAGATOR_XREQUESTID
        other &= IS_ANOTHER(hash, x_request_id);
#endif
    }
    return other;
}

/* Decides at a request's first attempt whether the sampler leaves the request out, if no other service has decided. Most of what an
 * attempt costs is spared then. */
static __always_inline bool is_left_out(struct process *process, struct request_progress *progress, u64 main_request)
{
    if (!progress->root_id) {
        progress->root_id = random_id();
        progress->left_out = progress->root_id >= SAMPLE_RATIO_BOUND && has_no_context(process, main_request);
    }
    return progress->left_out;
}
#endif

static __always_inline void begin_attempt(
    struct process *process, struct socket_key *key, struct socket *socket, struct owner *owner, u64 now)
{
    struct request_key request_key = {.tgid = key->tgid, .connection = owner->client_connection};
    struct attempt_state *before = attempt_on(key, socket);
    if (before && before->state == owner->state)
        return;
    if (before)
        settle(before, socket, socket->last_read_ns ? socket->last_read_ns : now);
    if (socket->attempt_serial) { /* kept alive since an earlier attempt of this or another request */
        socket->opened_ns = 0;
        socket->ready_ns = 0;
        socket->connect_failed_ns = 0;
        socket->connect_errno = 0;
        socket->attempt_serial = 0;
    }
    struct request_progress *progress = find_progress_of(&request_key, owner->is_stream);
    if (!progress && owner->is_stream)
        progress = keep_progress(&request_key);
    if (!progress)
        return;
#if LEAVES_OUT_EARLY
    if (is_left_out(process, progress, owner->main_request)) {
        socket->attempt_serial = ++process->attempt_serial; /* it serves an attempt, but nothing keeps that */
        return;
    }
#endif
    if (progress->attempts >= ATTEMPTS_MAX) {
        count_loss(PARTIAL_ATTEMPTS_LIMIT);
        return;
    }
    struct attempt_state *begun = &process->attempt;
    __builtin_memset(begun, 0, sizeof(*begun));
    begun->state = owner->state;
    begun->upstream = owner->upstream;
    begun->serial = ++process->attempt_serial;
    begun->fd = key->fd;
    if (owner->request != owner->main_request) {
        begun->request = owner->request;
        begun->attempt.subrequest = 1;
    }
    struct attempt_key attempt_key = {.tgid = key->tgid, .index = progress->attempts, .connection = owner->client_connection};
    if (attempts.update(&attempt_key, begun) != 0) {
        count_loss(PARTIAL_ATTEMPTS_FULL);
        return;
    }
    socket->client_connection = owner->client_connection;
    socket->attempt_index = progress->attempts;
    socket->attempt_serial = begun->serial;
    progress->attempts++;
    process->begun.key = attempt_key;
    process->begun.main_request = owner->main_request;
    process->begun.location = owner->location;
    process->begun.request_bufs = owner->request_bufs;
    process->begun.is_new = 1;
}

/* epoll_ctl(epfd, op, fd, event) */
static __always_inline void was_added(struct socket_key *key, u64 event_address)
{
    struct event event = {};
    struct socket *socket = sockets.lookup(key);
    if (socket && bpf_probe_read_user(&event, sizeof(event), (void *)event_address) == 0)
        socket->connection = event.data & ~1ULL; /* nginx keeps the event's instance in the lowest bit */
}

/* Tells whether an event's data is a connection. The notify event, a channel and other libraries have other data. */
static __always_inline bool is_connection(u64 connection)
{
    u64 read_event = 0, data = 0;
    return read_quietly(&read_event, connection + OFFSET_ngx_connection_s__read)
        && read_quietly(&data, read_event + OFFSET_ngx_event_s__data) && data == connection;
}

/* epoll_wait(epfd, events, maxevents, timeout) returned: a turn of nginx's event loop begins. */
static __always_inline void turn_began(struct caller *caller, u32 tgid, u64 events, s64 count, u64 now)
{
    caller->turn_began_ns = now;
    caller->latest_read_fd = -1;
    if (now > caller->wanted_until_ns)
        return;
    u64 wanted = count > 0 ? count : 0;
    EACH(i, wanted, EVENTS_MAX) {
        struct event event = {};
        struct socket_key key = {.tgid = tgid};
        bpf_probe_read_user(&event, sizeof(event), (void *)(events + i * sizeof(event)));
        u64 connection = event.data & ~1ULL;
        if (!connection || bpf_probe_read_user(&key.fd, sizeof(key.fd), (void *)(connection + OFFSET_ngx_connection_s__fd)) != 0)
            continue;
        struct socket *socket = sockets.lookup(&key);
        if (socket && !socket->connection && is_connection(connection))
            socket->connection = connection;
    }
}

/* ngx_event_pipe_t has in every release: the bit-fields, allocated, bufs, tag, busy_size, read_length, length. */
#define PIPE_FLAGS (OFFSET_ngx_event_pipe_s__length - 56)
#define PIPE_UPSTREAM_DONE (1 << 4)
#define PIPE_UPSTREAM_ERROR (1 << 5)
#define PIPE_UPSTREAM_EOF (1 << 6)

#define UNTIL_EOF -1

/* How much of a peer's response has arrived. */
enum response_state {
    RESPONSE_WHOLE,
    RESPONSE_FAILED,          /* nginx could not read the rest, or waited too long for it */
    RESPONSE_CLOSED,          /* the peer closed the connection before the rest */
    RESPONSE_UNFINISHED,
};

/* Returns the state of a response that nginx passes on, by the bytes that nginx still waits for: in u->pipe if nginx buffers the
 * response, else in u->length. `eof`: the peer has closed the connection, or it is not known whether it has. */
static __always_inline u32 response_state(u64 pipe, s64 length, bool eof)
{
    struct {
        u64 flags;
        u64 others[6];
        s64 length;
    } waits = {.length = UNTIL_EOF};
    if (pipe && bpf_probe_read_user(&waits, sizeof(waits), (void *)(pipe + PIPE_FLAGS)) != 0)
        return RESPONSE_WHOLE;
    s64 pipe_length = waits.length;
    u32 flags = waits.flags;
    if (!length || !pipe_length || flags & PIPE_UPSTREAM_DONE)
        return RESPONSE_WHOLE;
    if (flags & PIPE_UPSTREAM_ERROR)
        return RESPONSE_FAILED;
    if (length != UNTIL_EOF || pipe_length != UNTIL_EOF)
        return flags & PIPE_UPSTREAM_EOF ? RESPONSE_CLOSED : RESPONSE_UNFINISHED;
    /* without a pipe nginx wants no body (HEAD) */
    return !pipe || eof || flags & PIPE_UPSTREAM_EOF ? RESPONSE_WHOLE : RESPONSE_UNFINISHED;
}

/* Tells whether the whole response of the attempt that is going on has arrived, if the peer has not closed the connection. */
static __always_inline bool is_answered(u64 upstream)
{
    u64 pipe = 0, length = 0;
    return !read_quietly(&length, upstream + OFFSET_ngx_http_upstream_s__length)
        || !read_quietly(&pipe, upstream + OFFSET_ngx_http_upstream_s__pipe)
        || response_state(pipe, length, false) == RESPONSE_WHOLE;
}
