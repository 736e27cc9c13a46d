/*
 * --propagate on the socket: which upstream connections can be told something.
 *
 * Only nginx's own upstream connections over TCP are ever in upstream_sockets. nginx adds a connection to epoll before it calls
 * connect(): then sys_exit finds the request that owns the connection, and expects connect(). The SOCK_OPS program sees connect() in
 * the worker, and puts the socket into the map when it is established.
 *
 * A socket in such a map answers 0 to FIONREAD on kernels since 6.6.128, 6.12.75, 6.18.14 and 6.19. nginx then waits for bytes that
 * it has. There a socket leaves the map when the peer has acknowledged its first request, before a response is read
 * (kernel/socket_propagation.py tests the kernel).
 */

/* linux/bpf.h; BCC's copy may be older than the kernel */
#define OP_TCP_CONNECT 3
#define OP_ACTIVE_ESTABLISHED 4
#define OP_RETRANS 9
#define OP_RTT 12
#define FLAG_RETRANS (1 << 1)
#define FLAG_RTT (1 << 3)
#define MAP_NOEXIST 1

#define FIONREAD 0x541b        /* asm-generic/ioctls.h */
#define STALLED_NS 1000000000ULL

/* epoll_ctl(ADD) has named a connection, which may be a new upstream connection: nginx calls connect() next. */
static __always_inline void expect_connection(struct socket_key *key)
{
    struct owner owner = {};
    u64 log = 0;
    struct socket *socket = sockets.lookup(key);
    struct process *process = processes.lookup(&key->tgid);
    if (!process || !socket || socket->client || !socket->connection || socket->attempt_serial
        || !read_quietly(&log, socket->connection + OFFSET_ngx_connection_s__log)
        || !is_owned_by(process, &owner, connecting_request(log), socket->connection))
        return;
    struct telling *telling = find_or_add_telling();
    if (!telling)
        return;
    telling->expects = 1;
    telling->connected = 0;
}

/* connect() returned. */
static __always_inline void note_connection(struct socket_key *key)
{
    struct telling *telling = find_telling();
    struct socket *socket = sockets.lookup(key);
    if (!telling || !telling->expects || !socket)
        return;
    socket->peer_number = telling->connected ? telling->connected : NOT_OVER_TCP;
    socket->cookie = telling->connected ? telling->connected_cookie : 0;
    telling->expects = 0;
    telling->connected = 0;
}

/* Counts an attempt that is not told, once: with TLS nginx tests a new connection before the handshake and after it. */
static __always_inline void count_untold(struct attempt_state *attempt, u64 result)
{
    if (attempt->untold)
        return;
    attempt->untold = 1;
    switch (result) {
    case TELLING_UNSEEN:
        count_loss(PARTIAL_PROPAGATION_CONNECTION);
        return;
    case TELLING_NOT_HTTP1:
        count_loss(PARTIAL_PROPAGATION_PROTOCOL);
        return;
    case TELLING_MALFORMED:
        count_loss(PARTIAL_PROPAGATION_MALFORMED);
        return;
    case TELLING_OTHER_CONTEXT:
        count_loss(PARTIAL_PROPAGATION_CONFIGURED);
        return;
    case TELLING_NOT_WHOLE:
    case TELLING_NO_MEMORY:
    case TELLING_UNDONE:
        count_loss(PARTIAL_PROPAGATION_UNSAFE);
    }
}

/* A write on the announced connection returned (`again`: EAGAIN), or the connection was closed. Copies what was told into the
 * attempt. */
static __always_inline void note_told(struct caller *caller, struct socket_key *key, s64 bytes, bool again)
{
    struct telling *telling = find_telling();
    if (!telling || caller->told_fd != key->fd)
        return;
    if (again) { /* nothing was sent: nginx will send the same again */
        telling->connection = telling->announced;
        return;
    }
    caller->told_fd = 0;
    telling->connection = 0;
    struct attempt_key attempt_key = {
        .tgid = key->tgid, .index = telling->attempt_index, .connection = telling->client_connection};
    struct attempt_state *attempt = attempts.lookup(&attempt_key);
    if (bytes <= 0 || !attempt || attempt->serial != telling->attempt_serial)
        return;
    if (telling->result == TELLING_WRITTEN) {
        attempt->told_span_id = telling->span_id;
        if (telling->b3_left)
            count_loss(PARTIAL_PROPAGATION_MALFORMED);
    }
    else if (telling->nothing_new)
        attempt->untold = 1;
    else
        count_untold(attempt, telling->result);
}

/* An answer's first bytes were read. Where a connection may be told only once, it has left upstream_sockets by then; else the watch
 * in user space ends the telling (supervisor/propagation.py). */
static __always_inline void answered(struct socket *socket)
{
    struct socket_use *use = socket_use();
    u64 cookie = socket->cookie;
    if (cookie && use && use->once && enrolling.lookup(&cookie))
        lock_xadd(&use->overstayed, 1);
    socket->cookie = 0;
}

/* ioctl(FIONREAD) said how many bytes can be read. nginx asks when a read has filled its buffer, and waits for an event if it is 0. */
static __always_inline void bytes_counted(struct socket_key *key, u64 address, u64 now)
{
    s32 bytes = 0;
    struct socket *socket = sockets.lookup(key);
    if (socket && socket->peer_number > NOT_OVER_TCP && bpf_probe_read_user(&bytes, sizeof(bytes), (void *)address) == 0)
        socket->empty_ns = bytes ? 0 : now;
}

/* nginx closes an upstream connection. If it has waited in vain since FIONREAD said 0, perhaps the answer was there. */
static __always_inline void gave_up(struct socket *socket, struct attempt_state *attempt, u64 now)
{
    struct socket_use *use = socket_use();
    if (use && now - socket->empty_ns > STALLED_NS && !is_answered(attempt->upstream))
        lock_xadd(&use->stalled, 1);
}

/* nginx is about to send an attempt's request. */
static __always_inline void announce(struct process *process, struct caller *caller, struct socket_key *key, struct owner *owner)
{
    caller->told_fd = key->fd;
    process->told_request = owner->main_request;
    process->told_upstream = owner->upstream;
    process->announces = 1;
}

/* A SOCK_OPS program: a TCP connection of any process of the cgroup. Puts nginx's upstream connections into the map. It must return
 * 1. */
int upstream_connection(struct bpf_sock_ops *ops)
{
    u64 cookie, task;
    u32 flags, port, *before;
    struct telling *telling;
    struct socket_use *use;

    if (ops->op != OP_TCP_CONNECT && ops->op != OP_ACTIVE_ESTABLISHED) /* a connection has some ten operations */
        return 1;
    use = socket_use();
    if (!use)
        return 1;
    cookie = bpf_get_socket_cookie(ops);
    switch (ops->op) {
    case OP_TCP_CONNECT: /* within connect() */
        port = ops->remote_port;
        if (use->rehearsed_port && use->rehearsed_port == port) {
            use->rehearsed.connection = NUMBER_OF(ops);
            task = bpf_get_current_task();
            tellings.update(&task, &use->rehearsed);
        } else {
            telling = find_telling();
            if (!telling || !telling->expects)
                return 1;
            telling->connected = NUMBER_OF(ops);
            telling->connected_cookie = cookie;
        }
        flags = ops->bpf_sock_ops_cb_flags;
        enrolling.update(&cookie, &flags);
        return 1;
    case OP_ACTIVE_ESTABLISHED:
        before = enrolling.lookup(&cookie);
        if (!before)
            return 1;
        if (use->once) { /* first: a socket that cannot be taken out again must not be put in */
            if (bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | FLAG_RETRANS | FLAG_RTT) != 0) {
                enrolling.delete(&cookie);
                return 1;
            }
        }
        upstream_sockets.sock_hash_update(ops, &cookie, MAP_NOEXIST);
        port = ops->remote_port;
        if (use->rehearsed_port == port)
            use->enrolled++;
        if (!use->once)
            enrolling.delete(&cookie);
    }
    return 1;
}

/* Another SOCK_OPS program: takes a connection out of the map when its first request is acknowledged. It has a link of its own,
 * which outlives that of upstream_connection when the tracing process is killed: kernel/socket_propagation.py. */
int released_connection(struct bpf_sock_ops *ops)
{
    u64 cookie;
    u32 flags, *before;

    if (ops->op != OP_RTT && ops->op != OP_RETRANS)
        return 1;
    cookie = bpf_get_socket_cookie(ops);
    upstream_sockets.delete(&cookie);
    before = enrolling.lookup(&cookie);
    if (!before)
        return 1;
    flags = *before | ~(FLAG_RETRANS | FLAG_RTT);
    enrolling.delete(&cookie);
    bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags & flags);
    return 1;
}
