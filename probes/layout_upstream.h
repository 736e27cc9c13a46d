/* Like layout.h, for what only some requests have: upstreams, and streams of HTTP/2. */

/* Checks a stream of HTTP/2, its connection and the connection's frames. */
static __always_inline void look_at_stream(struct layout_look *look, u8 *request)
{
    u64 stream = OF_R(u64, stream);
#ifdef SIZEOF_ngx_http_v2_stream_s
    expect(look, word_at(stream + OFFSET_ngx_http_v2_stream_s__request) == look->r, FACT_STREAM);
    expect(look, is_pointer(word_at(stream + SIZEOF_ngx_http_v2_stream_s - 16)), FACT_STREAM);
    expect(look, (u32)word_at(stream + SIZEOF_ngx_http_v2_stream_s - 8) < 256, FACT_STREAM);
#endif
#ifdef OFFSET_ngx_http_v2_connection_s__last_out
    u64 h2c = word_at(stream + OFFSET_ngx_http_v2_stream_s__connection);
    u64 connection = word_at(h2c + OFFSET_ngx_http_v2_connection_s__connection);
    u64 frame = word_at(h2c + OFFSET_ngx_http_v2_connection_s__last_out);
    expect(look, is_pointer(connection) && word_at(connection + OFFSET_ngx_connection_s__data) == h2c, FACT_STREAM);
    /* last_out, then two queues, each an ngx_queue_t: prev, next */
    u64 dependencies = h2c + OFFSET_ngx_http_v2_connection_s__last_out + 8, closed = dependencies + 16;
    expect(look, word_at(word_at(dependencies) + 8) == dependencies && word_at(word_at(closed) + 8) == closed, FACT_STREAM);
    if (frame) {
        u64 next = word_at(frame + OFFSET_ngx_http_v2_out_frame_s__next);
        u64 sent = word_at(frame + OFFSET_ngx_http_v2_out_frame_s__stream);
        expect(look, is_pointer(frame) && (!next || is_pointer(next)), FACT_STREAM);
        expect(look, !sent || word_at(sent + OFFSET_ngx_http_v2_stream_s__connection) == h2c, FACT_STREAM);
        /* handler, stream */
        expect(look, is_pointer(word_at(frame + OFFSET_ngx_http_v2_out_frame_s__stream - 8)), FACT_STREAM);
    }
#endif
#ifdef OFFSET_ngx_http_v2_node_s__id
    u64 node = word_at(stream + OFFSET_ngx_http_v2_stream_s__node), id = word_at(node + OFFSET_ngx_http_v2_node_s__id);
    expect(look, is_pointer(node) && id && id < 0x80000000, FACT_STREAM);
#endif
}

static __always_inline bool is_time(u64 msec)
{
    return msec == -1ULL || msec < MEMORY_ENDS;
}

/* Checks the request's upstream, and the array with the states of its attempts. */
static __always_inline void look_at_upstream(struct layout_look *look, u8 *request, u8 *connection)
{
    u64 upstream = OF_R(u64, upstream), states = OF_R(u64, upstream_states), log = OF_C(u64, log);
    u64 pool = POOL_OF_LIST(request + OFFSET_ngx_http_request_s__headers_out);
    u64 peer = upstream + OFFSET_ngx_http_upstream_s__peer, state = word_at(upstream + OFFSET_ngx_http_upstream_s__state);
    u64 elements = word_at(states + OFFSET_ngx_array_t__elts), count = word_at(states + OFFSET_ngx_array_t__nelts);
    u64 peer_connection = word_at(peer + OFFSET_ngx_peer_connection_s__connection);

    expect(look, word_at(peer + OFFSET_ngx_peer_connection_s__log) == log, FACT_UPSTREAM);
    expect(look, FOLLOWS(ngx_http_request_s, upstream, 8, upstream_states), FACT_UPSTREAM);
    u64 peer_write = word_at(peer_connection + OFFSET_ngx_connection_s__write);
    expect(look, !peer_connection || is_event_of(peer_write, peer_connection), FACT_UPSTREAM);
    /* ngx_array_t: size, nalloc */
    u64 size = word_at(states + OFFSET_ngx_array_t__size), room = word_at(states + OFFSET_ngx_array_t__size + 8);
    bool is_array = size == SIZEOF_ngx_http_upstream_state_t && count <= room && is_pointer(elements);
    expect(look, !states || is_array, FACT_UPSTREAM_STATES);
    u64 into = state - elements, writer_pool = word_at(upstream + OFFSET_ngx_http_upstream_s__writer + WRITER_POOL);
    bool is_element = into < count * SIZEOF_ngx_http_upstream_state_t && into % SIZEOF_ngx_http_upstream_state_t == 0;
    expect(look, !state || is_element, FACT_UPSTREAM_STATES);
    /* When nginx sets the writer, it soon adds a state, which u->state then points to (ngx_http_upstream_init_request, _connect). */
    expect(look, state ? writer_pool == pool : !count || !writer_pool, FACT_UPSTREAM);

    u64 conf = word_at(upstream + UPSTREAM_CONF);
    u64 server_conf = word_at(upstream + OFFSET_ngx_http_upstream_s__upstream);
    u64 of_conf = word_at(conf); /* ngx_http_upstream_conf_t: upstream, unless variables name the host */
    expect(look, is_pointer(conf) && (!of_conf || of_conf == server_conf || (!server_conf && !state)), FACT_UPSTREAM);
    /* ngx_chain_writer_ctx_t has 40 bytes; conf follows */
    expect(look, FOLLOWS(ngx_http_upstream_s, writer, 48, upstream), FACT_UPSTREAM);
    expect(look, !server_conf || is_name_at(server_conf + OFFSET_ngx_http_upstream_srv_conf_s__host), FACT_UPSTREAM);
    expect(look, word_at(upstream + OFFSET_ngx_http_upstream_s__start_time) <= look->current_msec, FACT_UPSTREAM);
    expect(look, FOLLOWS(ngx_http_upstream_s, start_time, 8, state), FACT_UPSTREAM);
    expect(look, FOLLOWS(ngx_http_upstream_s, pipe, 8, request_bufs), FACT_UPSTREAM);

#ifdef OFFSET_ngx_http_upstream_s__cleanup
    /* It leads to the handler in an ngx_http_cleanup_t: handler, data; ngx_http_upstream_init_request. NULL: nginx is done. */
    u64 cleanup = word_at(upstream + OFFSET_ngx_http_upstream_s__cleanup);
    expect(look, !cleanup || (is_pointer(cleanup) && word_at(cleanup + 8) == look->r), FACT_UPSTREAM);
#endif

    u64 pipe = word_at(upstream + OFFSET_ngx_http_upstream_s__pipe);
    u64 chain = word_at(upstream + OFFSET_ngx_http_upstream_s__request_bufs);
    u64 pipe_pool = word_at(pipe + PIPE_POOL), pipe_log = word_at(pipe + PIPE_POOL + 8);
    /* ngx_event_pipe_t: upstream, downstream. nginx sets both together with pool and log when a response begins. */
    bool piping = word_at(pipe + 8) == look->c;
    bool is_pipe = is_pointer(pipe) && pipe_pool == (piping ? pool : 0) && pipe_log == (piping ? log : 0);
    expect(look, !pipe || is_pipe, FACT_PIPE);
    if (chain) {
        u64 buf = word_at(chain + OFFSET_ngx_chain_s__buf), start = word_at(buf + OFFSET_ngx_buf_s__start);
        u64 pos = word_at(buf + OFFSET_ngx_buf_s__pos), last = word_at(buf + OFFSET_ngx_buf_s__last);
        bool is_buffer = start <= pos && pos <= last && (!start || last - start < BUFFER_BYTES_MAX);
        expect(look, is_pointer(buf) && is_buffer, FACT_PIPE);
    }

    u64 name = word_at(state + OFFSET_ngx_http_upstream_state_t__peer);
    u64 connect = word_at(state + OFFSET_ngx_http_upstream_state_t__connect_time);
    u64 header = word_at(state + OFFSET_ngx_http_upstream_state_t__header_time);
    u64 response = word_at(state + OFFSET_ngx_http_upstream_state_t__response_time);
    expect(look, !state || !name || is_name_at(name), FACT_UPSTREAM_STATES);
    expect(look, !state || word_at(state + OFFSET_ngx_http_upstream_state_t__status) < 1000, FACT_UPSTREAM_STATES);
    expect(look, !state || (is_time(connect) && is_time(header) && is_time(response)), FACT_UPSTREAM_STATES);
}
