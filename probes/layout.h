/*
 * Checks whether nginx's memory agrees with the layout, by facts that no request can influence: pointers back to their owner,
 * sizes of arrays and lists, signatures, the clock. docs/decisions/0014 says which fact confirms which member.
 *
 * The code uses no maps, so that the kernel program and the tests (gcc, reading from /proc/PID/mem) compile the same text. Some
 * facts need members that are not in the layout. They are next to a member of the layout in every release since 1.14, and named
 * here.
 */

#define LOG_CONNECTION 16                                    /* ngx_log_t: log_level, file, connection */
#define HEADERS_OUT_TRAILERS (OFFSET_ngx_http_headers_out_t__status - SIZEOF_ngx_list_t) /* trailers, status */
#define HTTP_CONNECTION (OFFSET_ngx_http_request_s__err_status + 8) /* err_status, http_connection */
#define HTTP_CONNECTION_CONF_CTX 8                           /* ngx_http_connection_t: addr_conf, conf_ctx */
#define SRV_CONF_CTX 40                                      /* ngx_http_core_srv_conf_t: server_names, ctx */
#define LOC_CONF_SCANNED 12                                  /* ngx_http_core_loc_conf_t: loc_conf is among its first words */
#define UPSTREAM_CONF (OFFSET_ngx_http_upstream_s__upstream - 8) /* conf, upstream */
#define WRITER_POOL (OFFSET_ngx_chain_writer_ctx_t__connection + 8) /* connection, pool */
#define PIPE_POOL (OFFSET_ngx_event_pipe_s__length + 48)     /* length, …, pool, log */
#define SIZEOF_ngx_list_t (OFFSET_ngx_list_t__nalloc + 16)   /* nalloc, pool */

/* The address range of a process. No pointer is below it, and no number that nginx counts is above it. */
#define MEMORY_BEGINS 0x100000ULL
#ifdef __aarch64__
#define MEMORY_ENDS 0x1000000000000ULL /* 48 bits; Linux gives more only to a process that asks for an address above */
#else
#define MEMORY_ENDS 0x800000000000ULL
#endif
#define TEXT_BYTES_MAX (1 << 20)
#define BUFFER_BYTES_MAX (1ULL << 40)
#define DESCRIPTORS_MAX (1 << 30)
#define YEARS_S 315360000LL /* ten years; somebody may set the machine's clock meanwhile */
#define HASH_OF_HOST 3208616

/* The check of a request. `request` and `connection` in the functions are copies of its structs. */
struct layout_look {
    u64 r;                    /* the request's address */
    u64 c;                    /* the connection's address */
    u64 core_module_index;
    u64 cached_time;          /* *ngx_cached_time */
    u64 current_msec;         /* ngx_current_msec */
    u64 contradicted;         /* bits of enum layout_fact */
    u64 words[LOC_CONF_SCANNED];
};

#define MEMBER(bytes, type, structure, member) (*(type *)((bytes) + OFFSET_##structure##__##member))
/* The distance between two members is known only for nginx. Forks put their own members between them. */
#ifndef OF_FORK
#define OF_FORK 0
#endif
#define FOLLOWS(structure, member, bytes, next) (OF_FORK || OFFSET_##structure##__##next == OFFSET_##structure##__##member + (bytes))
#define OF_R(type, member) MEMBER(request, type, ngx_http_request_s, member)
#define OF_C(type, member) MEMBER(connection, type, ngx_connection_s, member)

/* The parts of the layout that are checked separately, because only some requests have an upstream or a stream. */
enum layout_part {
    LAYOUT_REQUEST,
    LAYOUT_UPSTREAM,
    LAYOUT_STREAM,
    LAYOUT_PARTS,
};

/* How far a worker's requests have agreed with a part of the layout. */
struct layout_trust {
    u64 last_number;          /* c->number of the last request that contradicted */
    u32 agreed;
    u32 connections;          /* how many connections had contradicting requests since the last request that agreed */
};

static __always_inline void expect(struct layout_look *look, bool holds, u32 fact)
{
    look->contradicted |= (u64)!holds << fact;
}

static __always_inline bool is_pointer(u64 value)
{
    return value >= MEMORY_BEGINS && value < MEMORY_ENDS;
}

/* Returns the word at an address; 0 if it cannot be read. */
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

/* Tells whether these can be the members of an ngx_str_t, which may be empty. */
static __always_inline bool is_text(u64 length, u64 data)
{
    return length < TEXT_BYTES_MAX && (!length || is_pointer(data));
}

/* Tells whether there is an ngx_str_t at an address, empty or with a first character that is not a control character. */
static __always_inline bool is_name_at(u64 address)
{
    u64 str[2] = {};
    if (bpf_probe_read_user(str, sizeof(str), (void *)address) != 0 || !is_text(str[0], str[1]))
        return false;
    return !str[0] || byte_at(str[1]) >= ' ';
}

#define EVERY_BYTE 0x0101010101010101ULL

/* Tells whether a text begins like a method and has no / in its first eight characters. URIs and protocols have one. */
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

/* Tells whether there is a list in the request at `address`. A list of one part points to the part in itself. */
static __always_inline bool is_list(u8 *list, u64 address)
{
    u8 *part = list + OFFSET_ngx_list_t__part;
    u64 last = MEMBER(list, u64, ngx_list_t, last), next = MEMBER(part, u64, ngx_list_part_s, next);
    bool ends = next ? is_pointer(next) && is_pointer(last) && last != address + OFFSET_ngx_list_t__part
                     : last == address + OFFSET_ngx_list_t__part;
    return ends && MEMBER(list, u64, ngx_list_t, size) == SIZEOF_ngx_table_elt_t
        && is_pointer(MEMBER(part, u64, ngx_list_part_s, elts))
        && MEMBER(part, u64, ngx_list_part_s, nelts) <= MEMBER(list, u64, ngx_list_t, nalloc)
        && MEMBER(list, u64, ngx_list_t, nalloc) < TEXT_BYTES_MAX;
}

#define POOL_OF_LIST(list) (*(u64 *)((list) + OFFSET_ngx_list_t__nalloc + 8))

/* Tells whether this is an event of the connection. */
static __always_inline bool is_event_of(u64 event, u64 connection)
{
    /* ngx_event_t: handler, index, log */
    u64 handler = event + OFFSET_ngx_event_s__handler;
    return word_at(event + OFFSET_ngx_event_s__data) == connection && is_pointer(word_at(handler))
        && is_pointer(word_at(handler + 16));
}

#define FAMILY_UNIX 1
#define FAMILY_INET 2
#define FAMILY_INET6 10

/* Tells whether there is a struct sockaddr whose length fits its family. */
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
    u64 start_time = *(u64 *)(connection + OFFSET_ngx_connection_s__number + 8);
    expect(look, word_at(log_ctx + OFFSET_ngx_http_log_ctx_t__connection) == look->c, FACT_CONNECTION);
    expect(look, !current || word_at(current + OFFSET_ngx_http_request_s__main) == look->r, FACT_CONNECTION);
    expect(look, is_event_of(OF_C(u64, read), look->c) && is_event_of(write, look->c), FACT_CONNECTION);
    expect(look, FOLLOWS(ngx_connection_s, read, 8, write) && FOLLOWS(ngx_connection_s, log, 8, pool), FACT_CONNECTION);
    /* ngx_connection_s: write, fd; sent, log */
    expect(look, FOLLOWS(ngx_connection_s, write, 8, fd) && OF_C(u32, fd) < DESCRIPTORS_MAX, FACT_CONNECTION);
    expect(look, FOLLOWS(ngx_connection_s, sent, 8, log) && is_pointer(OF_C(u64, pool)), FACT_CONNECTION);
    expect(look, word_at(log + LOG_CONNECTION) == OF_C(u64, number), FACT_NUMBER);
    /* number, start_time (since 1.19.10), requests */
    expect(look, requests_after == 8 || (requests_after == 16 && start_time <= look->current_msec), FACT_NUMBER);
    /* requests, buffered:8, log_error:3; ngx_http_init_connection sets log_error to NGX_ERROR_INFO, 2 */
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
    /* ssl, udp, local_sockaddr; 1.14 has no udp, and has a port before ssl */
    u64 ssl = OF_C(u64, ssl), before_ssl = *(u64 *)(connection + OFFSET_ngx_connection_s__ssl - 8);
    bool has_udp = FOLLOWS(ngx_connection_s, ssl, 16, local_sockaddr);
    expect(look, !ssl || is_pointer(word_at(ssl)), FACT_ADDRESSES);
    expect(look, has_udp || (FOLLOWS(ngx_connection_s, ssl, 8, local_sockaddr) && !is_pointer(before_ssl)), FACT_ADDRESSES);
#endif
}

/* Tells whether this is a header that nginx knows: NULL, or an element with the header's name. */
static __always_inline bool is_header(struct layout_look *look, u64 header, u64 length, u32 name)
{
    u8 *element = (u8 *)look->words;
    u32 lowcase = 0;
    if (!header)
        return true;
    if (bpf_probe_read_user(element, OFFSET_ngx_table_elt_t__lowcase_key + 8, (void *)header) != 0)
        return false;
    u64 *value = (u64 *)(element + OFFSET_ngx_table_elt_t__value);
    u64 key = MEMBER(element, u64, ngx_table_elt_t, lowcase_key);
    /* Modules that add a header may leave out the lower-case name. */
    if (key && (bpf_probe_read_user(&lowcase, sizeof(lowcase), (void *)key) != 0 || lowcase != name))
        return false;
    return MEMBER(element, u64, ngx_table_elt_t, key) == length && is_text(value[0], value[1]);
}

/* Tells whether this is the hash of a header's name: nginx's hash, or 0 and 1, which modules write for "deleted" and "any". */
static __always_inline bool is_hash(u64 hash, u64 of_name)
{
    return hash <= 1 || hash == of_name;
}

static __always_inline void look_at_headers(struct layout_look *look, u8 *request)
{
    u8 *headers_in = request + OFFSET_ngx_http_request_s__headers_in;
    u8 *headers_out = request + OFFSET_ngx_http_request_s__headers_out;
    u8 *in = headers_in + OFFSET_ngx_http_headers_in_t__headers, *trailers = headers_out + HEADERS_OUT_TRAILERS;
    u64 in_address = look->r + OFFSET_ngx_http_request_s__headers_in + OFFSET_ngx_http_headers_in_t__headers;
    u64 out_address = look->r + OFFSET_ngx_http_request_s__headers_out;
    u64 pool = POOL_OF_LIST(headers_out), user_agent = MEMBER(headers_in, u64, ngx_http_headers_in_t, user_agent);
    /* nginx makes the list when it has parsed the request line, but not for HTTP/0.9. */
    bool none = !MEMBER(in, u64, ngx_list_t, size) && !MEMBER(in, u64, ngx_list_t, last)
        && !MEMBER(in, u64, ngx_list_t, nalloc);
    expect(look, none || (is_list(in, in_address) && POOL_OF_LIST(in) == pool), FACT_HEADERS_IN);
    expect(look, is_list(headers_out, out_address), FACT_HEADERS_OUT);
    expect(look, is_list(trailers, out_address + HEADERS_OUT_TRAILERS) && POOL_OF_LIST(trailers) == pool, FACT_HEADERS_OUT);
    /* content_length_n, content_offset, date_time, last_modified_time; request_body, lingering_time, start_sec */
    u64 content_length = OFFSET_ngx_http_request_s__headers_out + OFFSET_ngx_http_headers_out_t__content_length_n;
    expect(look, OF_FORK || OFFSET_ngx_http_request_s__start_sec == content_length + 48, FACT_HEADERS_OUT);
    /* pool, header_in */
    expect(look, *(u64 *)(request + OFFSET_ngx_http_request_s__header_in - 8) == pool && is_pointer(pool), FACT_HEADERS_OUT);

    u64 host = MEMBER(headers_in, u64, ngx_http_headers_in_t, host);
    expect(look, is_header(look, user_agent, 10, 0x72657375 /* user */), FACT_HEADER_LINES);
    expect(look, is_header(look, host, 4, 0x74736f68 /* host */), FACT_HEADER_LINES);
    expect(look, FOLLOWS(ngx_table_elt_t, hash, 8, key) && FOLLOWS(ngx_table_elt_t, key, 16, value)
               && FOLLOWS(ngx_table_elt_t, value, 16, lowcase_key), FACT_HEADER_LINES);
    expect(look, !host || is_hash(MEMBER((u8 *)look->words, u64, ngx_table_elt_t, hash), HASH_OF_HOST), FACT_HEADER_LINES);

    u64 header_in = OF_R(u64, header_in), start = word_at(header_in + OFFSET_ngx_buf_s__start);
    u64 pos = word_at(header_in + OFFSET_ngx_buf_s__pos), last = word_at(header_in + OFFSET_ngx_buf_s__last);
    u64 end = word_at(header_in + OFFSET_ngx_buf_s__start + 8); /* ngx_buf_t: start, end */
    bool buffered = start <= pos && pos <= last && last <= end && (!last || is_pointer(last));
    expect(look, !header_in || buffered, FACT_HEADER_IN);
}

#define METHODS_END 0x1000000
#define HTTP_TEXT 0x50545448

static __always_inline void look_at_request_line(struct layout_look *look, u8 *request)
{
    u64 method = OF_R(u64, method), version = OF_R(u64, http_version);
    u64 *line = (u64 *)(request + OFFSET_ngx_http_request_s__request_line);
    u64 *uri = (u64 *)(request + OFFSET_ngx_http_request_s__uri);
    u64 *unparsed = (u64 *)(request + OFFSET_ngx_http_request_s__unparsed_uri);
    u64 *name = (u64 *)(request + OFFSET_ngx_http_request_s__method_name);
    u64 *protocol = (u64 *)(request + OFFSET_ngx_http_request_s__http_protocol);
    u64 write_handler = OF_R(u64, write_event_handler); /* NULL while nginx reads the header */
    s64 start_sec = OF_R(u64, start_sec), now_sec = word_at(look->cached_time);
    u32 http = 0;

    expect(look, start_sec > now_sec - YEARS_S && start_sec < now_sec + YEARS_S, FACT_START);
    expect(look, OF_R(u64, start_msec) < 1000, FACT_START);
    /* start_sec, start_msec, method, http_version, request_line, uri, args, exten, unparsed_uri, method_name, http_protocol */
    expect(look, FOLLOWS(ngx_http_request_s, start_sec, 8, start_msec) && FOLLOWS(ngx_http_request_s, start_msec, 8, method)
               && FOLLOWS(ngx_http_request_s, method, 8, http_version), FACT_REQUEST_LINE);
    expect(look, FOLLOWS(ngx_http_request_s, http_version, 8, request_line)
               && FOLLOWS(ngx_http_request_s, request_line, 16, uri)
               && FOLLOWS(ngx_http_request_s, uri, 48, unparsed_uri), FACT_REQUEST_LINE);
    expect(look, FOLLOWS(ngx_http_request_s, unparsed_uri, 16, method_name)
               && FOLLOWS(ngx_http_request_s, method_name, 16, http_protocol), FACT_REQUEST_LINE);
    expect(look, method && method < METHODS_END && !(method & (method - 1)), FACT_REQUEST_LINE);
    expect(look, version == HTTP_VERSION_0_9 || version / 100 == 10 || version == HTTP_VERSION_2
               || version == HTTP_VERSION_3, FACT_REQUEST_LINE);
    /* nginx overwrites the version with 9 for post_action, and for a peer that sends no header */
    expect(look, version == HTTP_VERSION_0_9 || (version == HTTP_VERSION_2) == (OF_R(u64, stream) != 0), FACT_REQUEST_LINE);
    expect(look, is_method_name(name[0], name[1]), FACT_REQUEST_LINE);
    expect(look, is_text(line[0], line[1]) && is_text(uri[0], uri[1]), FACT_REQUEST_LINE);
    u8 first = unparsed[0] && is_pointer(unparsed[1]) ? byte_at(unparsed[1]) : '/';
    /* for "http://host?arguments" the URI begins with the arguments */
    expect(look, first == '/' || first == '?' || first == '*' || method == METHOD_CONNECT, FACT_REQUEST_LINE);
    expect(look, is_text(unparsed[0], unparsed[1]), FACT_REQUEST_LINE);
    bpf_probe_read_user(&http, sizeof(http), (void *)protocol[1]);
    expect(look, is_text(protocol[0], protocol[1]) && (!protocol[0] || http == HTTP_TEXT), FACT_REQUEST_LINE);
    expect(look, is_pointer(OF_R(u64, read_event_handler)) && (!write_handler || is_pointer(write_handler)), FACT_REQUEST);
}

/* Checks that the server's configuration points back to where it was found, and so do the location and the connection. */
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
    u64 server_name = server + OFFSET_ngx_http_core_srv_conf_t__server_name;
    u64 location_name = location + OFFSET_ngx_http_core_loc_conf_s__name;
    expect(look, is_name_at(server_name) && is_pointer(word_at(server_name + 8)), FACT_CONFIGURATION);
    expect(look, is_name_at(location_name) && (loc_conf == ctx[2] || is_pointer(word_at(location_name + 8))), FACT_CONFIGURATION);

    u64 http_connection = *(u64 *)(request + HTTP_CONNECTION);
    u64 conf_ctx = word_at(http_connection + HTTP_CONNECTION_CONF_CTX);
    expect(look, is_pointer(conf_ctx) && word_at(conf_ctx) == ctx[0], FACT_HTTP_CONNECTION);
    /* request_length, err_status */
    expect(look, FOLLOWS(ngx_http_request_s, request_length, 8, err_status), FACT_HTTP_CONNECTION);
}
