/* The end of each try of an upstream peer: takes the connection's times before nginx reuses or closes it. */

/* What is read of an ngx_http_upstream_t at once: all of its members that lie near its peer. */
#define WRITER_CONNECTION (OFFSET_ngx_http_upstream_s__writer + OFFSET_ngx_chain_writer_ctx_t__connection)
#define UPSTREAM_READ_LAST \
    (WRITER_CONNECTION > OFFSET_ngx_http_upstream_s__upstream ? WRITER_CONNECTION : OFFSET_ngx_http_upstream_s__upstream)
_Static_assert(UPSTREAM_READ_LAST + 8 <= REQUEST_BYTES_MAX, "process->request has room for it");

/* And of its peer's ngx_connection_t. */
#ifdef OFFSET_ngx_connection_s__ssl
#define PEER_CONNECTION_BYTES (OFFSET_ngx_connection_s__ssl + 8)
#else
#define PEER_CONNECTION_BYTES (OFFSET_ngx_connection_s__fd + 4)
#endif

/* ngx_http_upstream_free_round_robin_peer(ngx_peer_connection_t *pc, void *data, ngx_uint_t state) */
int enter_ngx_http_upstream_free_round_robin_peer(struct pt_regs *ctx)
{
    u64 now;
    u32 tgid;
    struct process *process = entered(ctx, &tgid, &now);
    if (!process)
        return 0;

    u64 upstream = PT_REGS_PARM1(ctx) - OFFSET_ngx_http_upstream_s__peer;
    u8 *peer = process->request + OFFSET_ngx_http_upstream_s__peer;
    u8 *log_ctx = process->connection;
    u64 log_ctx_address, state, main_request;

    if (!read_memory(process->request, UPSTREAM_READ_LAST + 8, upstream)
        || !read_pointer(&log_ctx_address, MEMBER(peer, u64, ngx_peer_connection_s, log) + OFFSET_ngx_log_s__data)
        || !read_memory(log_ctx, OFFSET_ngx_http_log_ctx_t__current_request + 8, log_ctx_address))
        return 0;
    struct request_key key = {.tgid = tgid, .connection = MEMBER(log_ctx, u64, ngx_http_log_ctx_t, connection)};
    u64 request = MEMBER(log_ctx, u64, ngx_http_log_ctx_t, current_request);
    if (!request || !read_pointer(&main_request, request + OFFSET_ngx_http_request_s__main))
        return 0;
    struct request_progress *progress = find_progress(&key, main_request);
    if (!progress)
        return 0;
#if ADOPT_UPSTREAM_CONTEXT
    read_told_context(process, upstream); /* before the ways part: the verifier goes through its loop once for each */
#endif

    struct attempt_state *ended = &process->attempt;
    __builtin_memset(ended, 0, sizeof(*ended));
    u64 peer_connection = MEMBER(peer, u64, ngx_peer_connection_s, connection), connect_msec;
    ended->attempt.ended_ns = now;
    ended->upstream = MEMBER(process->request, u64, ngx_http_upstream_s, upstream);
    if (!read_pointer(&state, upstream + OFFSET_ngx_http_upstream_s__state)
        || !read_pointer(&connect_msec, state + OFFSET_ngx_http_upstream_state_t__connect_time)) {
        progress->attempts_lost++;
        return 0;
    }
    ended->state = state;

    /* Whose attempt: the request nginx is at work for, or, when another's event ends it, the main one. */
    u64 owner_upstream = 0;
    if (read_pointer(&owner_upstream, request + OFFSET_ngx_http_request_s__upstream)) {
        if (owner_upstream == upstream) {
            ended->attempt.subrequest = request != main_request;
            ended->request = request != main_request ? request : 0;
        } else {
            read_pointer(&owner_upstream, main_request + OFFSET_ngx_http_request_s__upstream);
            ended->attempt.subrequest = owner_upstream != upstream;
        }
    }

    /* The keep-alive cache has taken the connection by now; the request's writer still names it. Not after a connect() that
     * failed at once: then the writer names an earlier attempt's. */
    if (!peer_connection && connect_msec != -1ULL)
        peer_connection = *(u64 *)(process->request + WRITER_CONNECTION);

    if (peer_connection) {
        if (!read_memory(process->connection, PEER_CONNECTION_BYTES, peer_connection)) {
            progress->attempts_lost++;
            return 0;
        }
        struct socket_key socket_key = {.tgid = tgid, .fd = MEMBER(process->connection, s32, ngx_connection_s, fd)};
#ifdef OFFSET_ngx_connection_s__ssl
        ended->attempt.tls = MEMBER(process->connection, u64, ngx_connection_s, ssl) != 0;
#endif
        struct socket *socket = sockets.lookup(&socket_key);
        if (socket) {
            ended->attempt.connect_start_ns = socket->opened_ns;
            ended->attempt.connected_ns = socket->opened_ns ? socket->ready_ns : 0;
            ended->attempt.connect_failed_ns = socket->connect_failed_ns;
            ended->attempt.connect_errno = socket->connect_errno;
            if (socket->ready_ns) {
                ended->attempt.first_write_ns = socket->first_write_ns;
                ended->attempt.last_write_ns = socket->last_write_ns;
                ended->attempt.first_read_ns = socket->first_read_ns;
                ended->attempt.last_read_ns = socket->last_read_ns;
            }
            socket->opened_ns = 0;
            socket->ready_ns = 0;
            socket->connect_failed_ns = 0;
            socket->connect_errno = 0;
        }
    } else if (process->failed_connect_start_ns) {
        ended->attempt.connect_start_ns = process->failed_connect_start_ns;
        ended->attempt.connect_failed_ns = process->failed_connect_ns;
        ended->attempt.connect_errno = process->failed_connect_errno;
    }
    process->failed_connect_start_ns = 0;
#if ADOPT_UPSTREAM_CONTEXT
    ended->told = process->told;
#endif

    if (progress->attempts >= ATTEMPTS_MAX) {
        progress->attempts_lost++;
        count_loss(PARTIAL_ATTEMPTS_LIMIT);
        return 0;
    }
    struct attempt_key attempt_key = {.connection = key.connection, .tgid = tgid, .index = progress->attempts};
    if (attempts.update(&attempt_key, ended) != 0) {
        progress->attempts_lost++;
        count_loss(PARTIAL_ATTEMPTS_FULL);
        return 0;
    }
    progress->attempts++;
    return 0;
}
