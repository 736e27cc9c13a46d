/*
 * Whether nginx's memory is as its layout says, by facts that no request can influence: pointers back to their owner, sizes
 * of arrays and lists, signatures, the clock. docs/decisions/0014 tells which fact speaks for which member.
 *
 * Map-free, so that the kernel program and the tests (gcc, with /proc/PID/mem to read from) compile one text. What a fact
 * needs beyond the layout's members lies beside one of them in every release from 1.14 on, and is named here.
 */

#define LOG_CONNECTION (OFFSET_ngx_log_s__data - 24)        /* ngx_log_t: connection, disk_full_time, handler, data */
#define HEADERS_OUT_TRAILERS (OFFSET_ngx_http_headers_out_t__status - SIZEOF_ngx_list_t) /* trailers, status */
#define HTTP_CONNECTION (OFFSET_ngx_http_request_s__err_status + 8) /* err_status, http_connection */
#define HTTP_CONNECTION_CONF_CTX 8                           /* ngx_http_connection_t: addr_conf, conf_ctx */
#define SRV_CONF_CTX 40                                      /* ngx_http_core_srv_conf_t: server_names, ctx */
#define LOC_CONF_SCANNED 12                                  /* ngx_http_core_loc_conf_t: loc_conf is among its first words */
#define UPSTREAM_CONF (OFFSET_ngx_http_upstream_s__upstream - 8) /* conf, upstream */
#define WRITER_POOL (OFFSET_ngx_chain_writer_ctx_t__connection + 8) /* connection, pool */
#define PIPE_POOL (OFFSET_ngx_event_pipe_s__length + 48)     /* length, …, pool, log */
#define SIZEOF_ngx_list_t (OFFSET_ngx_list_t__nalloc + 16)   /* nalloc, pool */

/* Where a process has memory: no pointer is below, and no number that nginx counts is above. */
#define MEMORY_BEGINS 0x100000ULL
#define MEMORY_ENDS 0x800000000000ULL
#define TEXT_BYTES_MAX (1 << 20)
#define YEARS_S 315360000LL /* ten; the machine's clock may be set meanwhile */
#define HASH_OF_HOST 3208616

/* A request that is looked at; `request` and `connection` below are copies of its structs. */
struct layout_look {
    u64 r;                    /* its address */
    u64 c;                    /* its connection's */
    u64 core_module_index;
    u64 cached_time;          /* *ngx_cached_time */
    u64 current_msec;         /* ngx_current_msec */
    u64 contradicted;         /* bits of enum layout_fact */
    u64 words[LOC_CONF_SCANNED];
};

#define MEMBER(bytes, type, structure, member) (*(type *)((bytes) + OFFSET_##structure##__##member))
#define FOLLOWS(structure, member, bytes, next) (OFFSET_##structure##__##next == OFFSET_##structure##__##member + (bytes))
#define OF_R(type, member) MEMBER(request, type, ngx_http_request_s, member)
#define OF_C(type, member) MEMBER(connection, type, ngx_connection_s, member)

/* What is verified apart from the rest, since only some requests have it. */
enum layout_part {
    LAYOUT_REQUEST,
    LAYOUT_UPSTREAM,
    LAYOUT_STREAM,
    LAYOUT_PARTS,
};

/* How far a worker's requests have agreed with one part of the layout. */
struct layout_trust {
    u64 last_number;          /* c->number of the last request that contradicted it */
    u32 agreed;
    u32 connections;          /* whose requests have contradicted it since one agreed */
};

static __always_inline void expect(struct layout_look *look, bool holds, u32 fact)
{
    look->contradicted |= (u64)!holds << fact;
}

static __always_inline bool is_pointer(u64 value)
{
    return value >= MEMORY_BEGINS && value < MEMORY_ENDS;
}

/* 0 where nothing can be read, too. */
static __always_inline u64 word_at(u64 address)
{
    u64 word = 0;
    return bpf_probe_read_user(&word, sizeof(word), (void *)address) == 0 ? word : 0;
}

static __always_inline u8 byte_at(u64 address)
{
    u8 byte = 0;
    return bpf_probe_read_user(&byte, sizeof(byte), (void *)address) == 0 ? byte : 0;
}

/* An ngx_str_t that may be empty. */
static __always_inline bool is_text(u64 length, u64 data)
{
    return length < TEXT_BYTES_MAX && (!length || is_pointer(data));
}

/* The same, in nginx's memory; its first character is none that controls. */
static __always_inline bool is_name_at(u64 address)
{
    u64 str[2] = {};
    if (bpf_probe_read_user(str, sizeof(str), (void *)address) != 0 || !is_text(str[0], str[1]))
        return false;
    return !str[0] || byte_at(str[1]) >= ' ';
}

#define EVERY_BYTE 0x0101010101010101ULL

/* Begins as a method does, and has no / in its first eight characters: neither a URI nor a protocol. */
static __always_inline bool is_method_name(u64 length, u64 data)
{
    u64 text = 0, bytes = length < sizeof(text) ? length : sizeof(text);
    if (!is_text(length, data))
        return false;
    asm volatile("" : "+r"(bytes));
    if (bytes > sizeof(text) || !bytes)
        return !bytes;
    if (bpf_probe_read_user(&text, bytes, (void *)data) != 0)
        return false;
    u64 slashes = text ^ '/' * EVERY_BYTE;
    u8 first = text;
    return ((first >= 'A' && first <= 'Z') || first == '_' || first == '-')
        && !((slashes - EVERY_BYTE) & ~slashes & 0x80 * EVERY_BYTE);
}

/* A list that lies in the request, at its own address: of one part, whose address it has, or of several. */
static __always_inline bool is_list(u8 *list, u64 address)
{
    u8 *part = list + OFFSET_ngx_list_t__part;
    u64 last = MEMBER(list, u64, ngx_list_t, last), next = MEMBER(part, u64, ngx_list_part_s, next);
    bool ends = next ? is_pointer(next) && is_pointer(last) && last != address + OFFSET_ngx_list_t__part
                     : last == address + OFFSET_ngx_list_t__part;
    return ends && MEMBER(list, u64, ngx_list_t, size) == SIZEOF_ngx_table_elt_t && is_pointer(MEMBER(part, u64, ngx_list_part_s, elts))
        && MEMBER(part, u64, ngx_list_part_s, nelts) <= MEMBER(list, u64, ngx_list_t, nalloc)
        && MEMBER(list, u64, ngx_list_t, nalloc) < TEXT_BYTES_MAX;
}

#define POOL_OF_LIST(list) (*(u64 *)((list) + OFFSET_ngx_list_t__nalloc + 8))

/* An event of the connection. */
static __always_inline bool is_event_of(u64 event, u64 connection)
{
    /* ngx_event_t: handler, index, log */
    u64 handler = event + OFFSET_ngx_event_s__handler;
    return word_at(event + OFFSET_ngx_event_s__data) == connection && is_pointer(word_at(handler)) && is_pointer(word_at(handler + 16));
}

#define FAMILY_UNIX 1
#define FAMILY_INET 2
#define FAMILY_INET6 10

/* A struct sockaddr of as many bytes as its family has. */
static __always_inline bool is_address(u64 sockaddr, u32 length)
{
    u16 family = 0;
    if (bpf_probe_read_user(&family, sizeof(family), (void *)sockaddr) != 0)
        return false;
    return (family == FAMILY_INET && length == 16) || (family == FAMILY_INET6 && length == 28)
        || (family == FAMILY_UNIX && length >= 2 && length <= 110);
}

static __always_inline void look_at_connection(struct layout_look *look, u8 *connection)
{
    u64 log = OF_C(u64, log), log_ctx = word_at(log + OFFSET_ngx_log_s__data), write = OF_C(u64, write);
    u64 current = word_at(log_ctx + OFFSET_ngx_http_log_ctx_t__current_request);
    u64 requests_after = OFFSET_ngx_connection_s__requests - OFFSET_ngx_connection_s__number;
    expect(look, word_at(log_ctx + OFFSET_ngx_http_log_ctx_t__connection) == look->c, FACT_CONNECTION);
    expect(look, !current || word_at(current + OFFSET_ngx_http_request_s__main) == look->r, FACT_CONNECTION);
    expect(look, is_event_of(OF_C(u64, read), look->c) && is_event_of(write, look->c), FACT_CONNECTION);
    expect(look, FOLLOWS(ngx_connection_s, read, 8, write) && FOLLOWS(ngx_connection_s, log, 8, pool), FACT_CONNECTION);
    /* ngx_connection_s: write, fd; sent, log */
    expect(look, *(u64 *)(connection + OFFSET_ngx_connection_s__fd - 8) == write && OF_C(u32, fd) < TEXT_BYTES_MAX, FACT_CONNECTION);
    expect(look, *(u64 *)(connection + OFFSET_ngx_connection_s__sent + 8) == log && is_pointer(OF_C(u64, pool)), FACT_CONNECTION);
    expect(look, word_at(log + LOG_CONNECTION) == OF_C(u64, number), FACT_NUMBER);
    /* number, start_time (since 1.19.10), requests */
    expect(look, requests_after == 8 || (requests_after == 16 && *(u64 *)(connection + OFFSET_ngx_connection_s__number + 8) <= look->current_msec), FACT_NUMBER);
    /* requests, buffered:8, log_error:3, which ngx_http_init_connection makes NGX_ERROR_INFO, 2 */
    expect(look, (connection[OFFSET_ngx_connection_s__requests + 9] & 7) == 2, FACT_NUMBER);
    expect(look, is_address(OF_C(u64, sockaddr), OF_C(u32, socklen)), FACT_ADDRESSES);
    expect(look, is_address(OF_C(u64, local_sockaddr), OF_C(u32, local_socklen)), FACT_ADDRESSES);
#ifdef OFFSET_ngx_connection_s__proxy_protocol
    /* addr_text, proxy_protocol */
    u64 *addr_text = (u64 *)(connection + OFFSET_ngx_connection_s__proxy_protocol - 16);
    u64 proxy_protocol = OF_C(u64, proxy_protocol);
    expect(look, is_text(addr_text[0], addr_text[1]) && addr_text[0], FACT_ADDRESSES);
    expect(look, !proxy_protocol || is_name_at(proxy_protocol), FACT_ADDRESSES);
#endif
#ifdef OFFSET_ngx_connection_s__ssl
    /* ssl, then udp but in 1.14, local_sockaddr; what lies before ssl is no pointer in 1.14, and set for QUIC only in 1.25 */
    u64 ssl = OF_C(u64, ssl), ssl_before = OFFSET_ngx_connection_s__local_sockaddr - OFFSET_ngx_connection_s__ssl;
    expect(look, !ssl || is_pointer(word_at(ssl)), FACT_ADDRESSES);
    expect(look, ssl_before == 16 || (ssl_before == 8 && !is_pointer(*(u64 *)(connection + OFFSET_ngx_connection_s__ssl - 8))), FACT_ADDRESSES);
#endif
}

/* A header that nginx knows: NULL, or an element with its name. */
static __always_inline bool is_header(struct layout_look *look, u64 header, u64 length, u32 name)
{
    u8 *element = (u8 *)look->words;
    u32 lowcase = 0;
    if (!header)
        return true;
    if (bpf_probe_read_user(element, OFFSET_ngx_table_elt_t__lowcase_key + 8, (void *)header) != 0)
        return false;
    u64 *value = (u64 *)(element + OFFSET_ngx_table_elt_t__value), key = MEMBER(element, u64, ngx_table_elt_t, lowcase_key);
    /* Modules that make one leave the lower-case name away. */
    if (key && (bpf_probe_read_user(&lowcase, sizeof(lowcase), (void *)key) != 0 || lowcase != name))
        return false;
    return MEMBER(element, u64, ngx_table_elt_t, key) == length && is_text(value[0], value[1]);
}

/* The hash of a header's name: nginx's own, or what modules write for "deleted" and "any". */
static __always_inline bool is_hash(u64 hash, u64 of_name)
{
    return hash <= 1 || hash == of_name;
}

static __always_inline void look_at_headers(struct layout_look *look, u8 *request)
{
    u8 *headers_in = request + OFFSET_ngx_http_request_s__headers_in;
    u8 *headers_out = request + OFFSET_ngx_http_request_s__headers_out;
    u8 *in = headers_in + OFFSET_ngx_http_headers_in_t__headers, *trailers = headers_out + HEADERS_OUT_TRAILERS;
    u64 r = look->r, pool = POOL_OF_LIST(headers_out);
    /* It is made when a request line has been parsed that is no HTTP/0.9's. */
    bool none = !MEMBER(in, u64, ngx_list_t, size) && !MEMBER(in, u64, ngx_list_t, last) && !MEMBER(in, u64, ngx_list_t, nalloc);
    expect(look, none || (is_list(in, r + OFFSET_ngx_http_request_s__headers_in + OFFSET_ngx_http_headers_in_t__headers)
                          && POOL_OF_LIST(in) == pool), FACT_HEADERS_IN);
    expect(look, is_list(headers_out, r + OFFSET_ngx_http_request_s__headers_out), FACT_HEADERS_OUT);
    expect(look, is_list(trailers, r + OFFSET_ngx_http_request_s__headers_out + HEADERS_OUT_TRAILERS)
               && POOL_OF_LIST(trailers) == pool, FACT_HEADERS_OUT);
    /* content_length_n, content_offset, date_time, last_modified_time; request_body, lingering_time, start_sec */
    expect(look, OFFSET_ngx_http_request_s__start_sec
                     == OFFSET_ngx_http_request_s__headers_out + OFFSET_ngx_http_headers_out_t__content_length_n + 48, FACT_HEADERS_OUT);
    /* pool, header_in */
    expect(look, *(u64 *)(request + OFFSET_ngx_http_request_s__header_in - 8) == pool && is_pointer(pool), FACT_HEADERS_OUT);

    u64 host = MEMBER(headers_in, u64, ngx_http_headers_in_t, host);
    expect(look, is_header(look, MEMBER(headers_in, u64, ngx_http_headers_in_t, user_agent), 10, 0x72657375 /* user */), FACT_HEADER_LINES);
    expect(look, is_header(look, host, 4, 0x74736f68 /* host */), FACT_HEADER_LINES);
    expect(look, FOLLOWS(ngx_table_elt_t, hash, 8, key) && FOLLOWS(ngx_table_elt_t, key, 16, value)
               && FOLLOWS(ngx_table_elt_t, value, 16, lowcase_key), FACT_HEADER_LINES);
    expect(look, !host || is_hash(MEMBER((u8 *)look->words, u64, ngx_table_elt_t, hash), HASH_OF_HOST), FACT_HEADER_LINES);

    u64 header_in = OF_R(u64, header_in), start = word_at(header_in + OFFSET_ngx_buf_s__start);
    u64 pos = word_at(header_in + OFFSET_ngx_buf_s__pos), last = word_at(header_in + OFFSET_ngx_buf_s__last);
    /* ngx_buf_t: start, end. HTTP/3's has none of its own, and h2's may be empty. */
    bool buffered = !header_in || (start <= pos && pos <= last && last <= word_at(header_in + OFFSET_ngx_buf_s__start + 8) && (!last || is_pointer(last)));
    expect(look, buffered, FACT_HEADER_IN);
}

#define METHOD_IS_CONNECT 0x10000
#define METHODS_END 0x1000000
#define VERSION_IS_2 2000
#define HTTP_TEXT 0x50545448

static __always_inline void look_at_request_line(struct layout_look *look, u8 *request)
{
    u64 method = OF_R(u64, method), version = OF_R(u64, http_version);
    u64 *line = (u64 *)(request + OFFSET_ngx_http_request_s__request_line), *uri = (u64 *)(request + OFFSET_ngx_http_request_s__uri);
    u64 *unparsed = (u64 *)(request + OFFSET_ngx_http_request_s__unparsed_uri);
    u64 *name = (u64 *)(request + OFFSET_ngx_http_request_s__method_name);
    u64 *protocol = (u64 *)(request + OFFSET_ngx_http_request_s__http_protocol);
    u64 write_handler = OF_R(u64, write_event_handler); /* NULL while the header is read */
    s64 start_sec = OF_R(u64, start_sec), now_sec = word_at(look->cached_time);
    u32 http = 0;

    expect(look, start_sec > now_sec - YEARS_S && start_sec < now_sec + YEARS_S && OF_R(u64, start_msec) < 1000, FACT_START);
    /* start_sec, start_msec, method, http_version, request_line, uri, args, exten, unparsed_uri, method_name, http_protocol */
    expect(look, FOLLOWS(ngx_http_request_s, start_sec, 8, start_msec) && FOLLOWS(ngx_http_request_s, start_msec, 8, method)
               && FOLLOWS(ngx_http_request_s, method, 8, http_version), FACT_REQUEST_LINE);
    expect(look, FOLLOWS(ngx_http_request_s, http_version, 8, request_line) && FOLLOWS(ngx_http_request_s, request_line, 16, uri)
               && FOLLOWS(ngx_http_request_s, uri, 48, unparsed_uri), FACT_REQUEST_LINE);
    expect(look, FOLLOWS(ngx_http_request_s, unparsed_uri, 16, method_name)
               && FOLLOWS(ngx_http_request_s, method_name, 16, http_protocol), FACT_REQUEST_LINE);
    expect(look, method && method < METHODS_END && !(method & (method - 1)), FACT_REQUEST_LINE);
    expect(look, version == 9 || version / 100 == 10 || version == VERSION_IS_2 || version == 3000, FACT_REQUEST_LINE);
    expect(look, (version == VERSION_IS_2) == (OF_R(u64, stream) != 0), FACT_REQUEST_LINE);
    expect(look, is_method_name(name[0], name[1]), FACT_REQUEST_LINE);
    expect(look, is_text(line[0], line[1]) && is_text(uri[0], uri[1]), FACT_REQUEST_LINE);
    u8 first = unparsed[0] && is_pointer(unparsed[1]) ? byte_at(unparsed[1]) : '/';
    /* "http://host?arguments" begins with its arguments */
    expect(look, first == '/' || first == '?' || first == '*' || method == METHOD_IS_CONNECT, FACT_REQUEST_LINE);
    expect(look, is_text(unparsed[0], unparsed[1]), FACT_REQUEST_LINE);
    bool is_http = !protocol[0] || (bpf_probe_read_user(&http, sizeof(http), (void *)protocol[1]) == 0 && http == HTTP_TEXT);
    expect(look, is_text(protocol[0], protocol[1]) && is_http, FACT_REQUEST_LINE);
    expect(look, is_pointer(OF_R(u64, read_event_handler)) && (!write_handler || is_pointer(write_handler)), FACT_REQUEST);
}

/* The server that answers leads back to where it was found, and so do the location and the connection. */
static __always_inline void look_at_configuration(struct layout_look *look, u8 *request)
{
    u64 srv_conf = OF_R(u64, srv_conf), loc_conf = OF_R(u64, loc_conf), at = look->core_module_index * 8;
    u64 server = word_at(srv_conf + at), location = word_at(loc_conf + at), ctx[3] = {};
    /* ngx_http_conf_ctx_t: main_conf, srv_conf, loc_conf */
    bpf_probe_read_user(ctx, sizeof(ctx), (void *)word_at(server + SRV_CONF_CTX));
    expect(look, is_pointer(server) && ctx[1] == srv_conf, FACT_CONFIGURATION);
    bpf_probe_read_user(look->words, sizeof(look->words), (void *)location);
    bool found = loc_conf == ctx[2];
    for (int i = 2; i < LOC_CONF_SCANNED; i++)
        found |= look->words[i] == loc_conf;
    expect(look, is_pointer(location) && found, FACT_CONFIGURATION);
    expect(look, is_name_at(server + OFFSET_ngx_http_core_srv_conf_t__server_name)
               && is_pointer(word_at(server + OFFSET_ngx_http_core_srv_conf_t__server_name + 8)), FACT_CONFIGURATION);
    expect(look, is_name_at(location + OFFSET_ngx_http_core_loc_conf_s__name)
               && (loc_conf == ctx[2] || is_pointer(word_at(location + OFFSET_ngx_http_core_loc_conf_s__name + 8))), FACT_CONFIGURATION);

    u64 http_connection = *(u64 *)(request + HTTP_CONNECTION);
    u64 conf_ctx = word_at(http_connection + HTTP_CONNECTION_CONF_CTX);
    expect(look, is_pointer(conf_ctx) && word_at(conf_ctx) == ctx[0], FACT_HTTP_CONNECTION);
    /* request_length, err_status */
    expect(look, FOLLOWS(ngx_http_request_s, request_length, 8, err_status), FACT_HTTP_CONNECTION);
}

/* A stream of HTTP/2, its connection and that one's frames. */
static __always_inline void look_at_stream(struct layout_look *look, u8 *request)
{
    u64 stream = OF_R(u64, stream);
    expect(look, word_at(stream + OFFSET_ngx_http_v2_stream_s__request) == look->r, FACT_STREAM);
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

/* What was made to ask upstreams, and the array of what became of it. */
static __always_inline void look_at_upstream(struct layout_look *look, u8 *request, u8 *connection)
{
    u64 upstream = OF_R(u64, upstream), states = OF_R(u64, upstream_states), pool = POOL_OF_LIST(request + OFFSET_ngx_http_request_s__headers_out);
    u64 peer = upstream + OFFSET_ngx_http_upstream_s__peer, log = OF_C(u64, log), state = word_at(upstream + OFFSET_ngx_http_upstream_s__state);
    u64 elements = word_at(states + OFFSET_ngx_array_t__elts), count = word_at(states + OFFSET_ngx_array_t__nelts);
    u64 peer_connection = word_at(peer + OFFSET_ngx_peer_connection_s__connection);

    expect(look, word_at(peer + OFFSET_ngx_peer_connection_s__log) == log, FACT_UPSTREAM);
    expect(look, FOLLOWS(ngx_http_request_s, upstream, 8, upstream_states), FACT_UPSTREAM);
    expect(look, !peer_connection || is_event_of(word_at(peer_connection + OFFSET_ngx_connection_s__write), peer_connection), FACT_UPSTREAM);
    /* ngx_array_t: size, nalloc */
    expect(look, !states || (word_at(states + OFFSET_ngx_array_t__size) == SIZEOF_ngx_http_upstream_state_t
                             && count <= word_at(states + OFFSET_ngx_array_t__size + 8) && is_pointer(elements)), FACT_UPSTREAM_STATES);
    u64 into = state - elements, writer_pool = word_at(upstream + OFFSET_ngx_http_upstream_s__writer + WRITER_POOL);
    expect(look, !state || (into < count * SIZEOF_ngx_http_upstream_state_t && into % SIZEOF_ngx_http_upstream_state_t == 0), FACT_UPSTREAM_STATES);
    /* Once there is a writer a state is added, and the upstream has it (ngx_http_upstream_init_request, _connect). */
    expect(look, state ? writer_pool == pool : !count || !writer_pool, FACT_UPSTREAM);

    u64 conf = word_at(upstream + UPSTREAM_CONF), server_conf = word_at(upstream + OFFSET_ngx_http_upstream_s__upstream);
    u64 of_conf = word_at(conf); /* ngx_http_upstream_conf_t: upstream, unless variables name the host */
    expect(look, is_pointer(conf) && (!of_conf || of_conf == server_conf || (!server_conf && !state)), FACT_UPSTREAM);
    /* ngx_chain_writer_ctx_t has 40 bytes, then there is conf */
    expect(look, FOLLOWS(ngx_http_upstream_s, writer, 48, upstream), FACT_UPSTREAM);
    expect(look, !server_conf || is_name_at(server_conf + OFFSET_ngx_http_upstream_srv_conf_s__host), FACT_UPSTREAM);
    expect(look, word_at(upstream + OFFSET_ngx_http_upstream_s__start_time) <= look->current_msec, FACT_UPSTREAM);
    expect(look, FOLLOWS(ngx_http_upstream_s, start_time, 8, state) && FOLLOWS(ngx_http_upstream_s, pipe, 8, request_bufs), FACT_UPSTREAM);

    u64 pipe = word_at(upstream + OFFSET_ngx_http_upstream_s__pipe), chain = word_at(upstream + OFFSET_ngx_http_upstream_s__request_bufs);
    u64 pipe_pool = word_at(pipe + PIPE_POOL), pipe_log = word_at(pipe + PIPE_POOL + 8);
    /* ngx_event_pipe_t: upstream, downstream; set with pool and log, when a response begins */
    bool piping = word_at(pipe + 8) == look->c;
    expect(look, !pipe || (is_pointer(pipe) && pipe_pool == (piping ? pool : 0) && pipe_log == (piping ? log : 0)), FACT_PIPE);
    if (chain) {
        u64 buf = word_at(chain + OFFSET_ngx_chain_s__buf), start = word_at(buf + OFFSET_ngx_buf_s__start);
        u64 pos = word_at(buf + OFFSET_ngx_buf_s__pos), last = word_at(buf + OFFSET_ngx_buf_s__last);
        expect(look, is_pointer(buf) && start <= pos && pos <= last && last - start < MEMORY_ENDS / 2, FACT_PIPE);
    }

    u64 name = word_at(state + OFFSET_ngx_http_upstream_state_t__peer), connect = word_at(state + OFFSET_ngx_http_upstream_state_t__connect_time);
    u64 header = word_at(state + OFFSET_ngx_http_upstream_state_t__header_time);
    expect(look, !state || !name || is_name_at(name), FACT_UPSTREAM_STATES);
    expect(look, !state || word_at(state + OFFSET_ngx_http_upstream_state_t__status) < 1000, FACT_UPSTREAM_STATES);
    expect(look, !state || (is_time(connect) && is_time(header) && is_time(word_at(state + OFFSET_ngx_http_upstream_state_t__response_time))), FACT_UPSTREAM_STATES);
}
