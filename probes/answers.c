/* How much of its response a client has got, and whether it is still there. */

#define REQUEST_STR(member) ((struct ngx_str *)(process->request + OFFSET_ngx_http_request_s__##member))

/* Returns $status, as ngx_http_free_request and ngx_http_variable_status decide it. */
static __always_inline u64 final_status(const struct request_record *record)
{
    if (record->err_status)
        return record->err_status;
    if (record->rc > 0 && (!record->out_status || !record->bytes_sent))
        return record->rc;
    return record->out_status;
}

#define STREAM_OUT_CLOSED (1 << 4) /* one of the bit-fields at the end of ngx_http_v2_stream_s: waiting, blocked, exhausted, … */
#define STREAM_RST_SENT (1 << 5)

/* Tells whether an HTTP/2 stream is closed on nginx's side, but nginx did not reset it. Then the client has reset the
 * stream, or the whole response was sent. */
static __always_inline bool is_out_closed(struct process *process)
{
#ifndef SIZEOF_ngx_http_v2_stream_s
    return false; /* a build without HTTP/2 */
#else
    u32 flags = 0;
    u64 stream = MEMBER(process->request, u64, ngx_http_request_s, stream);
    return stream && bpf_probe_read_user(&flags, sizeof(flags), (void *)(stream + SIZEOF_ngx_http_v2_stream_s - 8)) == 0
        && flags & STREAM_OUT_CLOSED && !(flags & STREAM_RST_SENT);
#endif
}

#define HEADER_SIZE (OFFSET_ngx_http_request_s__request_length - 8) /* header_size, request_length */

/* Tells whether the response's header was sent. An interim response (100 Continue) is shorter. */
static __always_inline bool has_sent_header(struct process *process, u64 bytes_sent)
{
    return bytes_sent && (s64)bytes_sent >= *(s64 *)(process->request + HEADER_SIZE);
}

/* Returns the length of the response's body. Below 0: not known. */
static __always_inline s64 body_length(struct process *process, u64 status)
{
    s64 length = MEMBER(process->request + OFFSET_ngx_http_request_s__headers_out, s64, ngx_http_headers_out_t, content_length_n);
    return MEMBER(process->request, u64, ngx_http_request_s, method) == METHOD_HEAD || status == 204 || status == 304 ? 0 : length;
}

/* Tells whether the whole response was sent before nginx gave up. nginx then waited for the rest of the request, or for
 * a mirror. */
static __always_inline bool had_answered(struct process *process, u64 bytes_sent, u64 status)
{
    s64 length = body_length(process, status), header_size = *(s64 *)(process->request + HEADER_SIZE);
    return bytes_sent > 0 && length >= 0 && (s64)bytes_sent - header_size >= length;
}

/* Notes how the response stood when nginx sent the request of a post_action, whose own response replaces these facts. */
static __always_inline void note_answer(struct process *process, const struct begun_attempt *begun)
{
    u64 connection = begun->key.connection;
    struct request_key request_key = {.tgid = begun->key.tgid, .connection = connection};
    struct request_progress *progress = find_progress(&request_key, begun->main_request);
    if (!progress || progress->answer
        || bpf_probe_read_user(process->request, SIZEOF_ngx_http_request_s, (void *)begun->main_request) != 0
        || bpf_probe_read_user(process->connection, SIZEOF_ngx_connection_s, (void *)connection) != 0)
        return;
    struct socket_key key = {.tgid = request_key.tgid, .fd = MEMBER(process->connection, s32, ngx_connection_s, fd)};
    struct socket *socket = sockets.lookup(&key);
    u64 status = MEMBER(process->request, u64, ngx_http_request_s, err_status);
    if (!status)
        status = MEMBER(process->request + OFFSET_ngx_http_request_s__headers_out, u64, ngx_http_headers_out_t, status);
    u32 answer = ANSWER_NOTED | (u32)(status & 0xffff) << ANSWER_STATUS;
    u64 bytes_sent = MEMBER(process->connection, u64, ngx_connection_s, sent);
    if (had_answered(process, bytes_sent, status))
        answer |= ANSWER_WHOLE;
    else if (!bytes_sent || body_length(process, status) >= 0)
        answer |= ANSWER_CUT;
    if ((answer & ANSWER_CUT && is_out_closed(process)) || (socket && socket->peer_closed))
        answer |= ANSWER_LEFT;
    progress->answer = answer;
}
