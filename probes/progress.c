/* The events of a running request: its beginning, its body, its response. */

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
    /* If the map is full, the request ends like a request whose beginning no probe marked. */
    if (active_requests.update(&key, &active) == 0 && socket)
        socket->running = 0;
    return 0;
}

/* Tells whether this part of a stream's body arrived earlier and nginx kept it, so that the last read did not bring it. */
static __always_inline bool was_kept(struct process *process, struct request_key *key, struct socket *socket, s32 fd)
{
    struct active_request *active = active_requests.lookup(key);
    if (!active || active->read_ns == socket->last_read_ns || active->created_ns >= process->turn_began_ns)
        return false;
    if (active->body_wanted_ns)
        return socket->last_read_ns < active->body_wanted_ns;
    return process->latest_read_fd != fd; /* HTTP/3 */
}

/* ngx_http_request_body_save_filter(ngx_http_request_t *r, ngx_chain_t *in): a part of a body arrived, in any protocol */
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

/* ngx_http_send_header(ngx_http_request_t *r): used if the frames of HTTP/2 cannot be seen */
int enter_ngx_http_send_header(struct pt_regs *ctx)
{
    u64 now;
    u32 tgid;
    struct process *process = entered(ctx, &tgid, &now);
    if (!process)
        return 0;

    u64 r = PT_REGS_PARM1(ctx), main_request;
    struct request_key key = {.tgid = tgid};
    if (!read_pointer(&main_request, r + OFFSET_ngx_http_request_s__main) || main_request != r /* a subrequest sends no header */
        || !read_pointer(&key.connection, r + OFFSET_ngx_http_request_s__connection))
        return 0;
    struct active_request *active = active_requests.lookup(&key);
    if (active && !active->first_write_ns)
        active->first_write_ns = now;
    return 0;
}
