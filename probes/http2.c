/* What only HTTP/2 has: streams whose bodies come early, and frames that wait in a queue. */

/* ngx_http_v2_read_request_body(ngx_http_request_t *r): nginx is about to use the part of a stream's body that arrived earlier */
int enter_ngx_http_v2_read_request_body(struct pt_regs *ctx)
{
    u64 now;
    u32 tgid;
    struct process *process = entered(ctx, &tgid, &now);
    struct request_key key = {.tgid = tgid};
    if (!process || !read_pointer(&key.connection, PT_REGS_PARM1(ctx) + OFFSET_ngx_http_request_s__connection))
        return 0;
    struct active_request *active = active_requests.lookup(&key);
    if (active)
        active->body_wanted_ns = now;
    return 0;
}

#ifdef OFFSET_ngx_http_v2_connection_s__last_out
/* How many frames are examined. nginx queues new frames at the head of the list, so the head is enough. */
#define FRAMES_MAX 32

/* ngx_http_v2_send_output_queue(ngx_http_v2_connection_t *h2c): which streams are about to write */
int enter_ngx_http_v2_send_output_queue(struct pt_regs *ctx)
{
    u64 now;
    u32 tgid;
    struct process *process = entered(ctx, &tgid, &now);
    if (!process)
        return 0;

    u64 h2c = PT_REGS_PARM1(ctx), connection, frame, stream, request;
    struct socket_key socket_key = {.tgid = tgid};
    if (!read_pointer(&connection, h2c + OFFSET_ngx_http_v2_connection_s__connection)
        || !read_pointer(&frame, h2c + OFFSET_ngx_http_v2_connection_s__last_out))
        return 0;
    bpf_probe_read_user(&socket_key.fd, sizeof(socket_key.fd), (void *)(connection + OFFSET_ngx_connection_s__fd));
    struct socket *socket = sockets.lookup(&socket_key);
    u64 last_write_ns = socket ? socket->last_write_ns : 0;
    if (socket) {
        struct flush_key before = {.tgid = tgid, .fd = socket_key.fd, .began_ns = socket->flush_began_ns};
        if (before.began_ns && last_write_ns > before.began_ns)
            flush_ends.update(&before, &last_write_ns);
        socket->flush_began_ns = now;
    }

    for (int i = 0; i < FRAMES_MAX && frame; i++) {
        struct request_key key = {.tgid = tgid};
        if (!read_pointer(&stream, frame + OFFSET_ngx_http_v2_out_frame_s__stream)
            || !read_pointer(&frame, frame + OFFSET_ngx_http_v2_out_frame_s__next))
            return 0;
        if (!stream)
            continue;
        if (!read_pointer(&request, stream + OFFSET_ngx_http_v2_stream_s__request)
            || !read_pointer(&key.connection, request + OFFSET_ngx_http_request_s__connection))
            return 0;
        struct active_request *active = active_requests.lookup(&key);
        if (!active)
            continue;
        active->last_flush_ns = now;
        /* If the socket was full, the previous call wrote nothing, and the frame waited for this call. */
        if (!active->first_write_ns || active->first_write_ns >= last_write_ns)
            active->first_write_ns = now;
    }
    return 0;
}
#endif
