/* The end of each try of an upstream peer: takes the connection's times before nginx reuses or closes it. */

/* ngx_http_upstream_free_round_robin_peer(ngx_peer_connection_t *pc, void *data, ngx_uint_t state) */
int enter_ngx_http_upstream_free_round_robin_peer(struct pt_regs *ctx)
{
    u64 now;
    u32 tgid;
    struct process *process = entered(&tgid, &now);
    if (!process)
        return 0;

    u64 pc = PT_REGS_PARM1(ctx);
    u64 upstream = pc - OFFSET_ngx_http_upstream_s__peer;
    u64 log, log_ctx, state, request, main_request;
    struct request_key key = {.tgid = tgid};

    if (!read_pointer(&log, pc + OFFSET_ngx_peer_connection_s__log)
        || !read_pointer(&log_ctx, log + OFFSET_ngx_log_s__data)
        || !read_pointer(&key.connection, log_ctx + OFFSET_ngx_http_log_ctx_t__connection)
        || !read_pointer(&request, log_ctx + OFFSET_ngx_http_log_ctx_t__current_request) || !request
        || !read_pointer(&main_request, request + OFFSET_ngx_http_request_s__main))
        return 0;
    struct request_progress *progress = find_progress(&key, main_request);
    if (!progress)
        return 0;
#if ADOPT_UPSTREAM_CONTEXT
    read_told_context(process, upstream); /* before the ways part: the verifier goes through its loop once for each */
#endif

    struct attempt_state ended = {};
    ended.attempt.ended_ns = now;
    u64 peer_connection, connect_msec;
    if (!read_pointer(&state, upstream + OFFSET_ngx_http_upstream_s__state)
        || !read_pointer(&ended.upstream, upstream + OFFSET_ngx_http_upstream_s__upstream)
        || !read_pointer(&peer_connection, pc + OFFSET_ngx_peer_connection_s__connection)
        || !read_pointer(&connect_msec, state + OFFSET_ngx_http_upstream_state_t__connect_time)) {
        progress->attempts_lost++;
        return 0;
    }
    ended.state = state;

    /* Whose attempt: the request nginx is at work for, or, when another's event ends it, the main one. */
    u64 owner_upstream = 0;
    if (read_pointer(&owner_upstream, request + OFFSET_ngx_http_request_s__upstream)) {
        if (owner_upstream == upstream) {
            ended.attempt.subrequest = request != main_request;
            ended.request = request != main_request ? request : 0;
        } else {
            read_pointer(&owner_upstream, main_request + OFFSET_ngx_http_request_s__upstream);
            ended.attempt.subrequest = owner_upstream != upstream;
        }
    }

    /* The keep-alive cache has taken the connection by now; the request's writer still names it. Not after a connect() that
     * failed at once: then the writer names an earlier attempt's. */
    if (!peer_connection && connect_msec != -1ULL)
        read_pointer(&peer_connection, upstream + OFFSET_ngx_http_upstream_s__writer + OFFSET_ngx_chain_writer_ctx_t__connection);

    if (peer_connection) {
        struct socket_key socket_key = {.tgid = tgid};
        bpf_probe_read_user(&socket_key.fd, sizeof(socket_key.fd), (void *)(peer_connection + OFFSET_ngx_connection_s__fd));
#ifdef OFFSET_ngx_connection_s__ssl
        u64 ssl = 0;
        read_pointer(&ssl, peer_connection + OFFSET_ngx_connection_s__ssl);
        ended.attempt.tls = ssl != 0;
#endif
        struct socket *socket = sockets.lookup(&socket_key);
        if (socket) {
            ended.attempt.connect_start_ns = socket->opened_ns;
            ended.attempt.connected_ns = socket->opened_ns ? socket->ready_ns : 0;
            ended.attempt.connect_failed_ns = socket->connect_failed_ns;
            ended.attempt.connect_errno = socket->connect_errno;
            if (socket->ready_ns) {
                ended.attempt.first_write_ns = socket->first_write_ns;
                ended.attempt.last_write_ns = socket->last_write_ns;
                ended.attempt.first_read_ns = socket->first_read_ns;
                ended.attempt.last_read_ns = socket->last_read_ns;
            }
            socket->opened_ns = 0;
            socket->ready_ns = 0;
            socket->connect_failed_ns = 0;
            socket->connect_errno = 0;
        }
    } else if (process->failed_connect_start_ns) {
        ended.attempt.connect_start_ns = process->failed_connect_start_ns;
        ended.attempt.connect_failed_ns = process->failed_connect_ns;
        ended.attempt.connect_errno = process->failed_connect_errno;
    }
    process->failed_connect_start_ns = 0;
#if ADOPT_UPSTREAM_CONTEXT
    ended.told = process->told;
#endif

    if (progress->attempts >= ATTEMPTS_MAX) {
        progress->attempts_lost++;
        count_loss(PARTIAL_ATTEMPTS_LIMIT);
        return 0;
    }
    struct attempt_key attempt_key = {.connection = key.connection, .tgid = tgid, .index = progress->attempts};
    if (attempts.update(&attempt_key, &ended) != 0) {
        progress->attempts_lost++;
        count_loss(PARTIAL_ATTEMPTS_FULL);
        return 0;
    }
    progress->attempts++;
    return 0;
}
