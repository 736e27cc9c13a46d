/* Appends the strings to the record. */

#define SHORT_STRING_BYTES_MAX 512
#define USER_AGENT_BYTES_MAX 1024

/* When the strings fill half of the record, longer request lines are cut, so that they leave room for the other strings. */
#define SENT_LINES_BYTES_MAX (RECORD_BYTES_MAX / 2)
#define SENT_LINE_BYTES_MIN 256

#define STRING_AT_MAX (RECORD_BYTES_MAX - STRING_BYTES_MAX - sizeof(struct string_header))

/* Returns the place that is `at` bytes from the record's beginning. `at` is at most STRING_AT_MAX already; the asm repeats this for
 * the verifier. Kernels before 6.4 forget the bounds of a number that clang has kept on the stack meanwhile. */
static __always_inline struct string_header *string_at(struct process *process, u64 at)
{
    u8 *place = process->record;
    asm volatile("if %[at] <= %[max] goto +1\n\t%[at] = %[max]\n\t%[place] += %[at]"
                 : [place] "+r"(place), [at] "+r"(at) : [max] "i"(STRING_AT_MAX));
    return (struct string_header *)place;
}

/* Appends a string to the record. The record's length is kept in the map's memory, not in a register. So all paths through this
 * function look the same to the verifier afterwards, and it need not follow each combination of them. */
static __always_inline void append_string(struct process *process, u8 kind, u8 attempt, u64 data, u64 whole_bytes, u64 limit)
{
    if (!data || !whole_bytes)
        return;
    u64 at = process->record_bytes;
    u64 bytes = whole_bytes > limit ? limit : whole_bytes;
    asm volatile("" : "+r"(bytes)); /* so that clang keeps the following bounds check, which the verifier needs */
    if (bytes > STRING_BYTES_MAX || at > STRING_AT_MAX) {
        count_loss(PARTIAL_STRING_CUT);
        return;
    }
    struct string_header *header = string_at(process, at);
    *(u64 *)((u8 *)(header + 1) + ((bytes - 1) & (STRING_BYTES_MAX - 8))) = 0; /* zeros pad the string to 8 bytes */
    if (bpf_probe_read_user(header + 1, bytes, (void *)data) != 0) {
        count_loss(PARTIAL_STRING_READ_FAILED);
        return;
    }
    if (bytes < whole_bytes)
        count_loss(PARTIAL_STRING_CUT);
    header->kind = kind;
    header->attempt = attempt;
    header->bytes = bytes;
    header->whole_bytes = whole_bytes;
    process->record_bytes = at + sizeof(struct string_header) + ((bytes + 7) & ~7ULL);
}

/* Appends the text at an address up to its NUL, at most `limit` bytes. If the text is longer, `whole_bytes` says only that. */
static __always_inline void append_terminated(struct process *process, u8 kind, u64 data, u64 limit)
{
    u64 at = process->record_bytes;
    if (at > STRING_AT_MAX) {
        count_loss(PARTIAL_STRING_CUT);
        return;
    }
    struct string_header *header = string_at(process, at);
    s64 bytes = bpf_probe_read_user_str(header + 1, limit + 2, (void *)data) - 1; /* it counts the NUL */
    if (bytes <= 0)
        return;
    u64 kept = bytes, whole = bytes;
    if (kept > limit) {
        count_loss(PARTIAL_STRING_CUT);
        kept = limit;
    }
    u64 *last = (u64 *)((u8 *)(header + 1) + ((kept - 1) & (STRING_BYTES_MAX - 8)));
    *last = first_bytes(*last, ((kept - 1) & 7) + 1);
    header->kind = kind;
    header->attempt = 0;
    header->bytes = kept;
    header->whole_bytes = whole;
    process->record_bytes = at + sizeof(struct string_header) + ((kept + 7) & ~7ULL);
}

/* Appends the ngx_str_t at an address in nginx's memory. */
static __always_inline void append_str_at(struct process *process, u8 kind, u8 attempt, u64 address, u64 limit)
{
    struct ngx_str str = {};
    if (!address || bpf_probe_read_user(&str, sizeof(str), (void *)address) != 0)
        return;
    append_string(process, kind, attempt, str.data, str.len, limit);
}

/* Appends the name in the http core module's configuration. */
static __always_inline void append_core_conf_name(struct process *process, u8 kind, u64 confs, u64 name_offset)
{
    struct known_name *known = core_conf_name(process, kind, confs, name_offset);
    if (known)
        append_string(process, kind, 0, known->name.data, known->name.len, SHORT_STRING_BYTES_MAX);
}

/* Appends the tracestate lines. A line is never cut, because a part of its list of vendors would be a different list. */
static __always_inline void append_tracestate(struct process *process)
{
    u64 lines = process->header_lines[HEADER_TRACESTATE];
    if (lines > TRACESTATE_LINES_MAX)
        count_loss(PARTIAL_STRING_CUT);
    EACH(i, lines, TRACESTATE_LINES_MAX) {
        struct ngx_str *line = &process->tracestate[i];
        if (line->len <= STRING_BYTES_MAX)
            append_string(process, STRING_TRACESTATE, i, line->data, line->len, STRING_BYTES_MAX);
        else
            count_loss(PARTIAL_STRING_CUT);
    }
}

#define SPACES_MAX 8

/* Copies an ngx_table_elt_t to process->header: from process->headers, if it is among the headers that were read last. */
static __always_inline bool copy_header(struct process *process, u64 header)
{
    u64 at = header - process->headers_address;
    if (process->headers_address && at < process->headers_read * SIZEOF_ngx_table_elt_t
        && at <= sizeof(process->headers) - SIZEOF_ngx_table_elt_t) {
        u64 *read = (u64 *)(process->headers + at);
        for (int i = 0; i < SIZEOF_ngx_table_elt_t / 8; i++)
            process->header[i] = read[i];
        return true;
    }
    return bpf_probe_read_user(process->header, SIZEOF_ngx_table_elt_t, (void *)header) == 0;
}

/* Finds the value of the header in process->header as the client sent it. A module that sets a header replaces `value`, but leaves
 * `key` in the client's text. There nginx has put a NUL in the place of the colon and behind the value
 * (ngx_http_process_request_headers). The headers of HTTP/2 and HTTP/3 do not show whether they were replaced. Returns `value`'s data,
 * or where the client's text begins, which ends with a NUL. 0: the header is not the client's. `name_bytes`: the length of its name */
static __always_inline u64 find_received(struct process *process, u64 name_bytes)
{
    u8 *around = process->sent;
    struct ngx_str *key = (struct ngx_str *)((u8 *)process->header + OFFSET_ngx_table_elt_t__key);
    struct ngx_str *value = (struct ngx_str *)((u8 *)process->header + OFFSET_ngx_table_elt_t__value);
    u64 behind_colon = key->data + name_bytes + 1;
    bool in_buffer = key->data >= process->header_start && key->data < process->header_last;
    if (((struct request_record *)process->record)->multiplexed
        || (in_buffer && value->data - behind_colon < SPACES_MAX))
        return value->data;
    /* The byte before the name, the name, the NUL, the next bytes */
    if (bpf_probe_read_user(around, name_bytes + 10, (void *)(key->data - 1)) != 0 || around[name_bytes + 1])
        return 0;
    u64 spaces = leading_spaces(*(u64 *)(around + name_bytes + 2));
    if (spaces == SPACES_MAX)
        return 0;
    if (value->data == behind_colon + spaces || in_buffer || around[0] == '\n') /* otherwise the name is not the client's either */
        return behind_colon + spaces;
    return 0;
}

/* Appends the value of a header as the client sent it. `name_bytes`: the length of the header's name */
static __always_inline void append_received(struct process *process, u8 kind, u64 header, u64 name_bytes, u64 limit)
{
    if (!header || !copy_header(process, header))
        return;
    struct ngx_str *value = (struct ngx_str *)((u8 *)process->header + OFFSET_ngx_table_elt_t__value);
    u64 data = find_received(process, name_bytes);
    if (data == value->data)
        append_string(process, kind, 0, value->data, value->len, limit);
    else if (data)
        append_terminated(process, kind, data, limit);
}

/* Appends the rest of the request line behind the method if the target is in absolute form. Then r->unparsed_uri begins behind the
 * authority, or, if there is nothing behind it, with a slash of "://". */
static __always_inline void append_request_target(struct process *process)
{
    struct ngx_str *line = REQUEST_STR(request_line), *uri = REQUEST_STR(unparsed_uri);
    struct request_record *record = (struct request_record *)process->record;
    u64 at = process->method_name.len + 1, text = 0;
    if (record->multiplexed || record->method == METHOD_CONNECT || uri->data == line->data + at || at >= line->len
        || process->method_name.data != line->data || !read_quietly(&text, line->data + at))
        return;
    u64 spaces = leading_spaces(text); /* nginx accepts several spaces behind the method */
    u8 begin = text >> (8 * (spaces & 7)) | 0x20;
    u64 bytes = line->len - at;
    if (begin >= 'a' && begin <= 'z') /* the authority is enough */
        append_string(process, STRING_REQUEST_TARGET, 0, line->data + at,
                      bytes > SHORT_STRING_BYTES_MAX ? SHORT_STRING_BYTES_MAX : bytes, SHORT_STRING_BYTES_MAX);
}

#define SIZEOF_POOL 80 /* ngx_pool_t */

/* Tells whether the client's address is the one that accept() returned: ngx_event_accept allocates it as the first thing in the
 * connection's pool, and realip sets another pointer. */
static __always_inline bool is_accepted_address(struct process *process)
{
    return MEMBER(process->connection, u64, ngx_connection_s, sockaddr)
        == MEMBER(process->connection, u64, ngx_connection_s, pool) + SIZEOF_POOL;
}

/* Appends the address that accept() returned. Returns whether it had room. */
static __always_inline bool append_accepted(struct process *process, u8 kind)
{
    u16 family = process->peer[0];
    u64 bytes = family == FAMILY_INET6 ? 28 : family == FAMILY_INET ? 16 : 2, at = process->record_bytes;
    if (at > STRING_AT_MAX) {
        count_loss(PARTIAL_STRING_CUT);
        return false;
    }
    struct string_header *header = string_at(process, at);
    u64 *address = (u64 *)(header + 1);
    for (int i = 0; i < SOCKADDR_WORDS; i++)
        address[i] = process->peer[i];
    header->kind = kind;
    header->attempt = 0;
    header->bytes = bytes;
    header->whole_bytes = bytes;
    process->record_bytes = at + sizeof(struct string_header) + ((bytes + 7) & ~7ULL);
    return true;
}

/* Compares the client's address, which was appended at `at`, with the address of the socket's peer. Appends the latter if realip has
 * replaced the former. */
static __always_inline void append_peer(struct process *process, u64 at)
{
    struct request_record *record = (struct request_record *)process->record;
    u64 end = process->record_bytes;
    if (end == at || at > STRING_AT_MAX)
        return;
    if (!(u16)process->peer[0]) { /* accept() was not seen */
        record->peer_known = is_accepted_address(process);
        return;
    }
    u64 *client = (u64 *)(string_at(process, at) + 1);
    u16 family = process->peer[0];
    u64 others = (client[0] ^ process->peer[0]) & (family == FAMILY_UNIX ? 0xffff : ~0ULL);
    if (family == FAMILY_INET6)
        others |= (client[1] ^ process->peer[1]) | (client[2] ^ process->peer[2]);
    record->peer_known = !others || append_accepted(process, STRING_PEER_SOCKADDR);
}

/* Appends the client's address, and the address of the socket's peer if realip has replaced the client's. */
static __always_inline void append_client(struct process *process)
{
    u64 at = process->record_bytes;
    u16 family = process->peer[0];
    if ((family == FAMILY_INET || family == FAMILY_INET6) && is_accepted_address(process)) {
        ((struct request_record *)process->record)->peer_known = append_accepted(process, STRING_CLIENT_SOCKADDR);
        return;
    }
    append_string(process, STRING_CLIENT_SOCKADDR, 0, MEMBER(process->connection, u64, ngx_connection_s, sockaddr),
                  MEMBER(process->connection, u32, ngx_connection_s, socklen), SHORT_STRING_BYTES_MAX);
    append_peer(process, at);
}

#if TRUSTED_PROXIES
static __always_inline void append_header(struct process *process, u8 kind, u32 place)
{
    struct ngx_str *value = &process->header_values[place];
    if (process->header_lines[place])
        append_string(process, kind, 0, value->data, value->len, SHORT_STRING_BYTES_MAX);
}
#endif

/* Appends the strings that differ for each request. They come first. */
static __always_inline void append_request_strings(struct process *process)
{
    struct ngx_str *uri = REQUEST_STR(unparsed_uri);
    u8 *headers_in = process->request + OFFSET_ngx_http_request_s__headers_in;
    u64 user_agent = MEMBER(headers_in, u64, ngx_http_headers_in_t, user_agent);

    append_string(process, STRING_URI, 0, uri->data, uri->len, STRING_BYTES_MAX);
    append_request_target(process);
    append_received(process, STRING_USER_AGENT, user_agent, sizeof("User-Agent") - 1, USER_AGENT_BYTES_MAX);
    append_client(process);
#if TRUSTED_PROXIES
    append_header(process, STRING_FORWARDED, HEADER_FORWARDED);
#endif
    if (process->trace.has_tracestate)
        append_tracestate(process);
}

/* Appends the strings that many requests share: user space caches the decoded end of a record. */
static __always_inline void append_common_strings(struct process *process)
{
    struct ngx_str *method = &process->method_name;
    u64 host = MEMBER(process->request + OFFSET_ngx_http_request_s__headers_in, u64, ngx_http_headers_in_t, host);
    u32 local_length = MEMBER(process->connection, u32, ngx_connection_s, local_socklen);

    append_string(process, STRING_METHOD, 0, method->data, method->len, SHORT_STRING_BYTES_MAX);
    append_received(process, STRING_HOST, host, sizeof("Host") - 1, SHORT_STRING_BYTES_MAX);
#if TRUSTED_PROXIES
    append_header(process, STRING_X_FORWARDED_PROTO, HEADER_X_FORWARDED_PROTO);
    append_header(process, STRING_X_FORWARDED_HOST, HEADER_X_FORWARDED_HOST);
#endif
    if (process->core_module_index_known) {
        if (process->location)
            append_core_conf_name(process, STRING_LOCATION, process->location, OFFSET_ngx_http_core_loc_conf_s__name);
        append_core_conf_name(process, STRING_SERVER_NAME, MEMBER(process->request, u64, ngx_http_request_s, srv_conf),
                              OFFSET_ngx_http_core_srv_conf_t__server_name);
    }
    append_string(process, STRING_LOCAL_SOCKADDR, 0, MEMBER(process->connection, u64, ngx_connection_s, local_sockaddr),
                  local_length, SHORT_STRING_BYTES_MAX);
}

static __always_inline void send_record(struct process *process)
{
    struct request_record *record = (struct request_record *)process->record;
    u64 bytes = process->record_bytes;
    asm volatile("" : "+r"(bytes));
    if (bytes > RECORD_BYTES_MAX)
        bytes = RECORD_BYTES_MAX;
    if (records.ringbuf_output(record, bytes, BPF_RB_NO_WAKEUP) != 0)
        count_loss(LOST_RING_BUFFER_FULL);
}
