/*
 * When each socket of a worker was opened, connected, first and last read and written: one program for all system calls.
 * A system call's exit tells what no function entry can: whether bytes moved.
 */

#define SOL_SOCKET 1
#define SO_ERROR 4
#define MSG_PEEK 2
#define EINPROGRESS 115
#define CLONE_THREAD 0x00010000

static __always_inline struct socket *find_or_add_socket(struct socket_key *key)
{
    struct socket *socket = sockets.lookup(key);
    if (socket)
        return socket;
    struct socket opened_before_attach = {};
    if (sockets.update(key, &opened_before_attach) != 0) {
        count_loss(PARTIAL_SOCKETS_FULL);
        return NULL;
    }
    return sockets.lookup(key);
}

static __always_inline void opened(struct socket_key *key, u64 now, u8 client)
{
    struct socket socket = {.opened_ns = now, .client = client};
    if (sockets.update(key, &socket) != 0)
        count_loss(PARTIAL_SOCKETS_FULL);
}

/* An upstream connection was found connected (or not): ngx_http_upstream_test_connect, called before a request is sent on
 * a new connection, after its TLS handshake, and before each request on a kept-alive one. */
static __always_inline void connect_tested(struct socket_key *key, const struct syscall_entry *entry, u64 now)
{
    s32 error = 0;

    if (entry->argument2 != SOL_SOCKET || entry->argument3 != SO_ERROR)
        return;
    struct socket *socket = find_or_add_socket(key);
    if (!socket || socket->client)
        return;
    if (bpf_probe_read_user(&error, sizeof(error), (void *)entry->argument4) != 0)
        return;
    if (error) {
        socket->connect_failed_ns = now;
        socket->connect_errno = error;
        return;
    }
    socket->ready_ns = now;
    socket->first_read_ns = 0; /* what went before was the TLS handshake */
    socket->last_read_ns = 0;
    socket->first_write_ns = 0;
    socket->last_write_ns = 0;
}

static __always_inline void connected_at_once(struct process *process, struct socket_key *key, s64 result, u64 now)
{
    struct socket *socket = sockets.lookup(key);
    if (!socket || result >= 0 || result == -EINPROGRESS)
        return;
    process->failed_connect_start_ns = socket->opened_ns;
    process->failed_connect_ns = now;
    process->failed_connect_errno = -result;
}

/* RFC 9113, 6: a frame's header, and the frames that a peer may send unasked, ahead of its answer. */
#define HTTP2_FRAME_HEADER_BYTES 9
#define HTTP2_SETTINGS 4
#define HTTP2_PING 6
#define HTTP2_WINDOW_UPDATE 8
#define HTTP2_FRAMES_MAX 8

/* What a gRPC upstream sends of its own accord: nothing but frames of the connection (stream 0). No other protocol's answer
 * looks like that: HTTP/1 and memcached are text, and FastCGI's fourth byte is the request's number, 1. */
static __always_inline bool are_connection_frames(u64 data, s64 bytes)
{
    u8 frame[HTTP2_FRAME_HEADER_BYTES];

    for (int i = 0; i < HTTP2_FRAMES_MAX && bytes > 0; i++) {
        if (bytes < HTTP2_FRAME_HEADER_BYTES || bpf_probe_read_user(frame, sizeof(frame), (void *)data) != 0)
            return false;
        if (frame[5] | frame[6] | frame[7] | frame[8])
            return false;
        if (frame[3] != HTTP2_SETTINGS && frame[3] != HTTP2_PING && frame[3] != HTTP2_WINDOW_UPDATE)
            return false;
        u64 whole = HTTP2_FRAME_HEADER_BYTES + (frame[0] << 16 | frame[1] << 8 | frame[2]);
        data += whole;
        bytes -= whole;
    }
    return bytes <= 0;
}

/* The interim answer "HTTP/1.1 100 Continue"; a response's own header is always longer. */
#define INTERIM_RESPONSE_BYTES_MAX 64

/* Whether something was written, and on a client connection something of a response, not just an interim answer's few
 * bytes. Over TLS ngx_connection_s.sent counts them, and nothing of a handshake that ends only now, since its request came
 * as early data. */
static __always_inline bool has_begun_to_write(struct socket *socket)
{
    u64 sent = socket->written_bytes;
    if (!socket->first_write_ns || is_upstream(socket))
        return socket->first_write_ns != 0;
    if (socket->tls_connection
        && bpf_probe_read_user(&sent, sizeof(sent), (void *)(socket->tls_connection + OFFSET_ngx_connection_s__sent)) != 0)
        return true;
    return sent > INTERIM_RESPONSE_BYTES_MAX;
}

/* What a read of a few KiB takes at most while nothing interrupts it: all else since the worker was last seen is no reading. */
#define READ_NS_MAX 10000

/* `data`: where the bytes are, or 0. */
static __always_inline void was_read(struct socket_key *key, u64 data, s64 bytes, u64 began_ns, u64 now, bool datagrams)
{
    struct socket *socket = find_or_add_socket(key);
    if (!socket)
        return;
    socket->datagrams |= datagrams;
    if (data && bytes > 0 && !socket->client && !socket->first_read_ns && are_connection_frames(data, bytes))
        return;
    if (bytes == 0) { /* end of file: of an upstream's answer, its end */
        if (!socket->client && socket->first_read_ns)
            socket->last_read_ns = now;
        return;
    }
    if (!socket->first_read_ns) {
        socket->first_read_ns = now;
        socket->first_read_began_ns = began_ns + READ_NS_MAX > now ? began_ns : now - READ_NS_MAX;
        socket->running = socket->client && !socket->tls;
    }
    socket->last_read_ns = now;
    if (!has_begun_to_write(socket))
        socket->request_read_ns = now;
}

static __always_inline void was_written(struct socket_key *key, s64 bytes, u64 began_ns, u64 now)
{
    struct socket *socket = find_or_add_socket(key);
    if (!socket || bytes <= 0)
        return;
    if (!has_begun_to_write(socket))
        socket->first_write_ns = began_ns;
    socket->last_write_ns = now;
    socket->written_bytes += bytes;
}

/* nginx looks ahead into what a client sends only where TLS is spoken: its requests' beginnings are to be marked. */
static __always_inline void was_peeked_at(struct socket_key *key, u64 now)
{
    struct socket *socket = sockets.lookup(key);
    if (!socket || !socket->client || socket->first_read_ns)
        return;
    socket->tls = 1;
    beginnings_needed(now);
}

static __always_inline int system_call_ended(
    struct bpf_raw_tracepoint_args *ctx, struct process *process, u32 tgid, bool worker)
{
    struct pt_regs *regs = (struct pt_regs *)ctx->args[0];
    s64 result = ctx->args[1];
    u64 now = bpf_ktime_get_ns();
    u64 began_ns = process->last_event_ns ? process->last_event_ns : now;
    struct syscall_entry entry = {};

    if (worker) /* a thread pool's threads interleave with it */
        process->last_event_ns = now;
    bpf_probe_read_kernel(&entry, sizeof(entry), SYSCALL_ENTRY(regs));
    struct socket_key key = {.tgid = tgid, .fd = entry.argument1};

    u64 data = 0;

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
        if (result >= 0)
            was_read(&key, data, result, began_ns, now, entry.number == SYS_recvmsg);
        break;
    case SYS_write:
    case SYS_writev:
    case SYS_sendto:
    case SYS_sendmsg:
    case SYS_sendfile:
        if (result > 0)
            was_written(&key, result, began_ns, now);
        break;
    case SYS_accept:
    case SYS_accept4:
        key.fd = result;
        if (result >= 0)
            opened(&key, now, 1);
        break;
    case SYS_socket:
        key.fd = result;
        if (result >= 0)
            opened(&key, now, 0);
        break;
    case SYS_connect:
        connected_at_once(process, &key, result, now);
        break;
    case SYS_getsockopt:
        connect_tested(&key, &entry, now);
        break;
    case SYS_close:
        sockets.delete(&key);
        break;
#if FOLLOW_FORKS
    case SYS_clone:
        if (entry.argument1 & CLONE_THREAD)
            break;
    /* fall through */
    case SYS_fork:
        if (result > 0) /* a master's new worker, known before its first connection */
            add_process(result);
        break;
#endif
    }
    return 0;
}

int sys_exit(struct bpf_raw_tracepoint_args *ctx)
{
    u64 pid_tgid = current_pid_tgid();
    u32 tgid = pid_tgid >> 32;
    struct process *process = processes.lookup(&tgid);
    if (!process)
        return 0;
    bool worker = (u32)pid_tgid == tgid;
    if (worker)
        process->system_call_seen = 1;
    return system_call_ended(ctx, process, tgid, worker);
}

/* The same after it, where the kernel may leave a program out (kernel/tracepoints.py): for the system calls that the other one
 * has not seen. */
int sys_exit_missed(struct bpf_raw_tracepoint_args *ctx)
{
    u64 pid_tgid = current_pid_tgid();
    u32 tgid = pid_tgid >> 32;
    struct process *process = processes.lookup(&tgid);
    if (!process || (u32)pid_tgid != tgid)
        return 0;
    if (process->system_call_seen) {
        process->system_call_seen = 0;
        return 0;
    }
    return system_call_ended(ctx, process, tgid, true);
}
