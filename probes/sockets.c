/*
 * Notes when each socket of a worker was opened, connected, first and last read and written. One program serves all system
 * calls. The exit of a system call tells what no function entry can: whether bytes moved.
 */

#define SOL_SOCKET 1
#define SO_ERROR 4
#define MSG_PEEK 2
#define EINTR 4
#define EAGAIN 11
#define EPIPE 32
#define ECONNRESET 104
#define EINPROGRESS 115
#define EPOLL_CTL_ADD 1
#define AT_EMPTY_PATH 0x1000
#define CLONE_THREAD 0x00010000

static __always_inline struct socket *find_or_add_socket(struct socket_key *key)
{
    struct socket *socket = sockets.lookup(key);
    if (socket)
        return socket;
    u32 zero = 0;
    struct socket *opened_before_attach = new_sockets.lookup(&zero);
    if (!opened_before_attach || sockets.update(key, opened_before_attach) != 0) {
        count_loss(PARTIAL_SOCKETS_FULL);
        return NULL;
    }
    return sockets.lookup(key);
}

static __always_inline void count_accepted(u32 tgid)
{
#if REQUEST_METRICS
    u64 none = 0, *count = accepted_connections.lookup_or_try_init(&tgid, &none);
    if (count)
        lock_xadd(count, 1);
#endif
}

/* `peer`: the address of accept()'s second argument; 0: a socket without a client. */
static __always_inline void opened(struct socket_key *key, u64 now, u8 client, u64 peer)
{
    struct process *process = processes.lookup(&key->tgid);
    if (!process)
        return;
    struct socket *socket = &process->opened_socket;
    __builtin_memset(socket, 0, sizeof(*socket));
    socket->opened_ns = now;
    socket->client = client;
    if (peer)
        bpf_probe_read_user(socket->peer, SOCKADDR_BYTES, (void *)peer);
    if (sockets.update(key, socket) != 0)
        count_loss(PARTIAL_SOCKETS_FULL);
}

/* Why the request of a connection must be found. */
enum wanted {
    NOT_WANTED,
    WANTED_TO_CONNECT,
    WANTED_TO_SEND,           /* getsockopt() announced that nginx will send */
    WANTED_TO_WRITE,          /* a write without announcement, perhaps the first of another exchange */
    WANTED_TO_READ,           /* an answer came on a connection that is older than the probes */
    WANTED_BY_EVENT,          /* a write on a socket that is older than the probes; an event will name its connection */
};

/* An exchange begins on an upstream connection. Earlier reads and writes were a TLS handshake or an earlier exchange. */
static __always_inline void exchange_begins(struct socket *socket, u64 now)
{
    socket->ready_ns = now;
    socket->first_read_ns = 0;
    socket->last_read_ns = 0;
    socket->first_write_ns = 0;
    socket->last_write_ns = 0;
}

/* getsockopt(SO_ERROR) told whether an upstream connection is established. ngx_http_upstream_test_connect calls it before it
 * sends a request: on a new connection after the TLS handshake, and before each request on a kept-alive connection. nginx tests
 * a client's connection only when it has found it closed (ngx_http_test_reading, ngx_http_upstream_check_broken_connection). */
static __always_inline u32 connect_tested(struct socket_key *key, const struct syscall_entry *entry, u64 now)
{
    s32 error = 0;

    if (entry->argument2 != SOL_SOCKET || entry->argument3 != SO_ERROR)
        return NOT_WANTED;
    struct socket *socket = find_or_add_socket(key);
    if (!socket)
        return NOT_WANTED;
    if (socket->client) {
        socket->peer_closed = 1;
        return NOT_WANTED;
    }
    if (bpf_probe_read_user(&error, sizeof(error), (void *)entry->argument4) != 0)
        return NOT_WANTED;
    if (!error)
        return WANTED_TO_SEND;
    socket->connect_failed_ns = now;
    socket->connect_errno = error;
    return NOT_WANTED;
}

static __always_inline u32 connected(struct socket_key *key, s64 result, u64 now)
{
    struct socket *socket = sockets.lookup(key);
    if (!socket)
        return NOT_WANTED;
    if (result < 0 && result != -EINPROGRESS) {
        socket->connect_failed_ns = now;
        socket->connect_errno = -result;
    }
    return WANTED_TO_CONNECT;
}

/* RFC 9113, 6: a frame's header, and the frames that a peer may send before its answer. */
#define HTTP2_FRAME_HEADER_BYTES 9
#define HTTP2_PRIORITY 2
#define HTTP2_SETTINGS 4
#define HTTP2_PING 6
#define HTTP2_GOAWAY 7
#define HTTP2_WINDOW_UPDATE 8
#define HTTP2_FRAMES_MAX 8

/* Tells whether a gRPC upstream has sent only frames that are not an answer: frames of the connection, and a stream's priority and
 * window. No other protocol's answer looks like that: HTTP/1 and memcached are text, and FastCGI's fourth byte is 1, the request's
 * number. */
static __always_inline bool are_no_answer(u64 data, s64 bytes)
{
    u8 frame[HTTP2_FRAME_HEADER_BYTES];

    for (int i = 0; i < HTTP2_FRAMES_MAX && bytes > 0; i++) {
        if (bytes < HTTP2_FRAME_HEADER_BYTES || bpf_probe_read_user(frame, sizeof(frame), (void *)data) != 0)
            return false;
        u8 type = frame[3];
        if (type != HTTP2_PRIORITY && type != HTTP2_WINDOW_UPDATE
            && ((type != HTTP2_SETTINGS && type != HTTP2_PING && type != HTTP2_GOAWAY)
                || frame[5] | frame[6] | frame[7] | frame[8]))
            return false;
        u64 whole = HTTP2_FRAME_HEADER_BYTES + (frame[0] << 16 | frame[1] << 8 | frame[2]);
        data += whole;
        bytes -= whole;
    }
    return bytes <= 0;
}

/* Tells whether an upstream may send such frames. `attempt`: NULL if it is not known. */
static __always_inline bool may_send_frames(const struct attempt_state *attempt)
{
    return !attempt || attempt->attempt.protocol == PROTOCOL_UNKNOWN || attempt->attempt.protocol == PROTOCOL_HTTP_2;
}

/* Over TLS the interim response "HTTP/1.1 100 Continue" cannot be read, but it is short; the header of a response is longer. */
#define INTERIM_RESPONSE_BYTES_MAX 64

#define HTTP_1_1_SLASH 0x312e312f50545448ULL /* "HTTP/1.1" */

/* Tells whether nginx sends an interim response to a client (RFC 9110, 15.2): " 1xx", except " 101". `parts`: the address of a
 * struct iovec whose first part has the bytes, or 0. */
static __always_inline bool is_interim(u64 data, u64 parts)
{
    u64 text[2] = {};
    if (parts)
        read_quietly(&data, parts);
    return data && bpf_probe_read_user(text, sizeof(text), (void *)data) == 0 && text[0] == HTTP_1_1_SLASH
        && (text[1] & 0xffff) == 0x3120 && (text[1] & 0xffffffff) != 0x31303120;
}

/* Tells whether something was written; on a client connection, whether a part of a response was written. Over TLS
 * ngx_connection_s.sent counts the bytes. It does not count a handshake that ends late because the request came as early data. */
static __always_inline bool has_begun_to_write(struct socket *socket)
{
    u64 sent = 0;
    if (!socket->first_write_ns || is_upstream(socket) || !socket->tls_connection
        || bpf_probe_read_user(&sent, sizeof(sent), (void *)(socket->tls_connection + OFFSET_ngx_connection_s__sent)) != 0)
        return socket->first_write_ns != 0;
    return sent > INTERIM_RESPONSE_BYTES_MAX;
}

/* The longest time of a read of a few KiB without interruption. If more time has passed since the worker was last seen, the rest
 * was not spent on the read. */
#define READ_NS_MAX 10000

/* A read returned or failed. `data`: the address of the bytes, or 0. */
static __always_inline u32 was_read(struct socket_key *key, u64 data, s64 bytes, u64 began_ns, u64 now, bool datagrams)
{
    struct socket *socket = bytes >= 0 ? find_or_add_socket(key) : sockets.lookup(key);
    if (!socket)
        return NOT_WANTED;
    if (bytes <= 0) {
        socket->peer_closed = 1;
        if (bytes || socket->client || !socket->first_read_ns)
            return NOT_WANTED;
        struct attempt_state *attempt = attempt_on(key, socket);
        if (attempt && !is_answered(attempt->upstream)) /* only then does the end of file end the answer */
            socket->last_read_ns = now;
        return NOT_WANTED;
    }
    socket->datagrams |= datagrams;
    if (data && !socket->client && !socket->first_read_ns && may_send_frames(attempt_on(key, socket)) && are_no_answer(data, bytes))
        return NOT_WANTED;
    if (!socket->first_read_ns) {
        socket->first_read_ns = now;
        socket->first_read_began_ns = began_ns + READ_NS_MAX > now ? began_ns : now - READ_NS_MAX;
        socket->running = socket->client && !socket->tls;
#if PROPAGATE_SOCKET
        if (socket->cookie)
            answered(socket);
#endif
    }
#if PROPAGATE_SOCKET
    socket->empty_ns = 0;
#endif
    bool answers_first_write = socket->first_write_ns > socket->last_read_ns;
    socket->last_read_ns = now;
    if (!has_begun_to_write(socket))
        socket->request_read_ns = now;
    if (socket->client || socket->attempt_serial || !socket->connection)
        return NOT_WANTED;
    /* Without an announcement only the first read after the first write tells for certain that what was written is its request. */
    return socket->ready_ns || answers_first_write ? WANTED_TO_READ : NOT_WANTED;
}

static __always_inline void note_write(struct socket *socket, u64 began_ns, u64 now)
{
    if (!has_begun_to_write(socket))
        socket->first_write_ns = began_ns;
    if (socket->tls_connection) {
        read_quietly(&socket->last_sent, socket->tls_connection + OFFSET_ngx_connection_s__sent);
        socket->earlier_write_ns = socket->last_write_ns;
    }
    socket->last_write_ns = now;
    socket->announced = 0;
}

/* A write returned. `data`: the address of the bytes, or 0; `parts`: of their struct iovec, or 0. */
static __always_inline u32 was_written(struct socket_key *key, u64 data, u64 parts, u64 began_ns, u64 now)
{
    struct socket *socket = find_or_add_socket(key);
    if (!socket)
        return NOT_WANTED;
    if (!socket->client && socket->connection && !socket->announced
        && (!socket->first_write_ns || socket->last_read_ns > socket->last_write_ns))
        return WANTED_TO_WRITE;
    if (!socket->first_write_ns && !socket->tls_connection && !is_upstream(socket) && is_interim(data, parts))
        return NOT_WANTED;
    note_write(socket, began_ns, now);
    if (socket->client || socket->connection || socket->sought)
        return NOT_WANTED;
    socket->sought = 1;
    return WANTED_BY_EVENT;
}

/* Finds the request that a connection serves, begins its attempt, and then does what was waiting for this. */
static __always_inline void look_for_attempt(struct process *process, struct caller *caller, struct socket_key *key, u32 wanted,
                                             bool worker, u64 began_ns, u64 now)
{
    struct owner owner = {};
    struct socket *socket = sockets.lookup(key);
    if (!socket)
        return;
    u8 *connection = process->upstream_connection; /* data, …, log, …, ssl */
    u64 serial = socket->attempt_serial, request = 0;
    bool readable = socket->connection
        && bpf_probe_read_user(connection, sizeof(process->upstream_connection), (void *)socket->connection) == 0;
    if (readable)
        request = wanted == WANTED_TO_CONNECT ? connecting_request(MEMBER(connection, u64, ngx_connection_s, log))
                                              : MEMBER(connection, u64, ngx_connection_s, data);
    else if (wanted == WANTED_TO_SEND || wanted == WANTED_BY_EVENT)
        caller->wanted_until_ns = now + WANTED_NS;
    if (is_owned_by(process, &owner, request, socket->connection)) {
        if (wanted == WANTED_TO_READ && !socket->ready_ns) {
            socket->ready_ns = socket->first_write_ns;
            socket->first_read_ns = now;
        }
        begin_attempt(process, key, socket, &owner, now);
    }
#ifdef OFFSET_ngx_connection_s__ssl
    if (readable)
        socket->tls = MEMBER(connection, u64, ngx_connection_s, ssl) != 0;
#endif
    if (wanted == WANTED_TO_SEND) {
        exchange_begins(socket, now);
        socket->announced = 1;
#if PROPAGATE_SOCKET
        if (worker && owner.state && attempt_on(key, socket))
            announce(process, caller, key, &owner);
#endif
    }
    if (wanted == WANTED_TO_WRITE) {
        /* Without an attempt it may be a client's socket that is older than the probes. With TLS it may be a handshake. */
        if (socket->attempt_serial != serial || (serial && !socket->ready_ns && !socket->tls))
            exchange_begins(socket, began_ns);
        note_write(socket, began_ns, now);
    }
}

static __always_inline void was_closed(struct socket_key *key, u64 now)
{
    struct socket *socket = sockets.lookup(key);
    if (!socket)
        return;
    struct attempt_state *attempt = attempt_on(key, socket);
#if PROPAGATE_SOCKET
    if (attempt && socket->empty_ns)
        gave_up(socket, attempt, now);
#endif
    if (attempt)
        settle(attempt, socket, now);
    sockets.delete(key);
}

/* nginx peeks at a client's bytes only where it expects TLS. The beginnings of such requests must be marked. */
static __always_inline void was_peeked_at(struct socket_key *key, u64 now)
{
    struct socket *socket = sockets.lookup(key);
    if (!socket || !socket->client || socket->first_read_ns)
        return;
    socket->tls = 1;
    beginnings_needed(now);
}

/* Tells whether a system call does not matter, and took so little time that not even its end does: it moved no bytes and could not
 * wait. For such a call the program does not ask for the time, which costs more than all before it. */
static __always_inline bool tells_nothing(const struct syscall_entry *entry, s64 result)
{
    switch (entry->number) {
    case SYS_newfstatat:
        return entry->argument4 & AT_EMPTY_PATH; /* fstat() of newer C libraries; with a path it may wait for a disk */
#if PROPAGATE_SOCKET
    case SYS_ioctl:
        return entry->argument2 != FIONREAD;
#else
    case SYS_ioctl:
#endif
    case SYS_fstat:
    case SYS_setsockopt:
    case SYS_getsockname:
        return true;
    case SYS_epoll_ctl:
        return entry->argument2 != EPOLL_CTL_ADD;
    case SYS_recvfrom:
    case SYS_read:
    case SYS_readv:
    case SYS_recvmsg:
        return result == -EAGAIN;
    }
    return false;
}

static __always_inline int system_call_ended(
    struct bpf_raw_tracepoint_args *ctx, struct caller *caller, u32 tgid, bool worker)
{
    struct pt_regs *regs = (struct pt_regs *)ctx->args[0];
    s64 result = ctx->args[1];
    struct syscall_entry entry;

    if (!read_entry(&entry, regs) || tells_nothing(&entry, result))
        return 0;
    u64 now = bpf_ktime_get_ns();
    u64 began_ns = caller->last_event_ns ? caller->last_event_ns : now;
    if (worker) /* threads of a thread pool run in parallel with the worker */
        caller->last_event_ns = now;
    struct socket_key key = {.tgid = tgid, .fd = entry.argument1};
    struct socket *socket;
    u64 data = 0;
    u32 wanted = NOT_WANTED;
    bool logs = false;

    switch (entry.number) {
    case SYS_recvfrom:
        if (entry.argument4 & MSG_PEEK) {
            if (result > 0)
                was_peeked_at(&key, now);
            return 0;
        }
        data = entry.argument2;
    /* fall through */
    case SYS_read:
    case SYS_readv:
    case SYS_recvmsg:
        if (result != -EAGAIN && result != -EINTR)
            wanted = was_read(&key, data, result, began_ns, now, entry.number == SYS_recvmsg);
        if (worker && result > 0)
            caller->latest_read_fd = key.fd;
        break;
    case SYS_writev:
    case SYS_write:
    case SYS_sendto:
    case SYS_sendmsg:
    case SYS_sendfile:
#if PROPAGATE_SOCKET
        if (worker && caller->told_fd == key.fd)
            note_told(caller, &key, result, result == -EAGAIN || result == -EINTR);
#endif
#if ERROR_LOG
        logs = worker && caller->log_stack && result > 0 && is_line(caller, &entry);
#endif
        if (result > 0) {
            wanted = was_written(&key, entry.number == SYS_sendto ? entry.argument2 : 0,
                                 entry.number == SYS_writev ? entry.argument2 : 0, began_ns, now);
        } else if (result == -EPIPE || result == -ECONNRESET) {
            socket = sockets.lookup(&key);
            if (socket)
                socket->peer_closed = 1;
        }
        break;
    case SYS_accept:
    case SYS_accept4:
        key.fd = result;
        if (result >= 0) {
            count_accepted(tgid);
            opened(&key, now, 1, entry.argument2);
        }
        break;
    case SYS_socket:
        key.fd = result;
        if (result >= 0)
            opened(&key, now, 0, 0);
        break;
    case SYS_epoll_ctl:
        key.fd = entry.argument3;
        if (entry.argument2 == EPOLL_CTL_ADD && result == 0)
            was_added(&key, entry.argument4);
#if PROPAGATE_SOCKET
        if (worker && entry.argument2 == EPOLL_CTL_ADD && result == 0)
            expect_connection(&key);
#endif
        break;
#ifdef SYS_epoll_wait
    case SYS_epoll_wait:
#endif
    case SYS_epoll_pwait: /* musl; on arm64 every C library */
        if (!worker)
            break;
#if REQUEST_METRICS
        count_turn(caller, began_ns);
#endif
        note_turn(caller, tgid, began_ns);
        turn_began(caller, tgid, entry.argument2, result, now);
        break;
    case SYS_connect:
#if PROPAGATE_SOCKET
        if (worker)
            note_connection(&key);
#endif
        wanted = connected(&key, result, now);
        break;
    case SYS_getsockopt:
        wanted = connect_tested(&key, &entry, now);
        break;
#if PROPAGATE_SOCKET
    case SYS_ioctl:
        if (worker && entry.argument2 == FIONREAD && result == 0)
            bytes_counted(&key, entry.argument3, now);
        break;
#endif
    case SYS_shutdown:
        socket = sockets.lookup(&key);
        if (socket)
            socket->lingers = 1;
        break;
    case SYS_close:
#if PROPAGATE_SOCKET
        if (worker && caller->told_fd == key.fd)
            note_told(caller, &key, 0, false);
#endif
        was_closed(&key, now);
        break;
#if FOLLOW_FORKS
    case SYS_clone:
        if (entry.argument1 & CLONE_THREAD)
            break;
#ifdef SYS_fork
    /* fall through */
    case SYS_fork:
#endif
        if (result > 0) /* a master's new worker; it is known before its first connection */
            add_process(result);
        break;
#endif
    }
    struct process *process = wanted || logs ? processes.lookup(&tgid) : NULL;
    if (!process)
        return 0;
#if ERROR_LOG
    if (logs)
        send_line(process, caller, &entry);
    if (!wanted)
        return 0;
#endif
    look_for_attempt(process, caller, &key, wanted, worker, began_ns, now);
    if (process->begun.is_new)
        examine_begun(process);
#if PROPAGATE_SOCKET
    if (process->announces && worker) {
        process->announces = 0;
        tellers.call(ctx, 0);
    }
#endif
    return 0;
}

int sys_exit(struct bpf_raw_tracepoint_args *ctx)
{
    u64 pid_tgid = current_pid_tgid();
    u32 tgid = pid_tgid >> 32;
    struct caller *caller = find_caller(tgid);
    if (!caller)
        return 0;
    bool worker = (u32)pid_tgid == tgid;
    if (worker)
        caller->system_call_seen = 1;
    return system_call_ended(ctx, caller, tgid, worker);
}

/* Runs after sys_exit where the kernel may skip a program (planner/tracepoints.py), and handles the system calls that sys_exit has
 * missed. */
int sys_exit_missed(struct bpf_raw_tracepoint_args *ctx)
{
    u64 pid_tgid = current_pid_tgid();
    u32 tgid = pid_tgid >> 32;
    struct caller *caller = find_caller(tgid);
    if (!caller || (u32)pid_tgid != tgid)
        return 0;
    if (caller->system_call_seen) {
        caller->system_call_seen = 0;
        return 0;
    }
    return system_call_ended(ctx, caller, tgid, true);
}
