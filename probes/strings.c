/* Appends the strings to the record. */

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

/* Appends the ngx_str_t at an address in nginx's memory. */
static __always_inline void append_str_at(struct process *process, u8 kind, u8 attempt, u64 address, u64 limit)
{
    struct ngx_str str = {};
    if (!address || bpf_probe_read_user(&str, sizeof(str), (void *)address) != 0)
        return;
    append_string(process, kind, attempt, str.data, str.len, limit);
}

#define SHORT_STRING_BYTES_MAX 512
#define USER_AGENT_BYTES_MAX 1024

/* Appends the name in the http core module's configuration. `confs` is r->srv_conf or r->loc_conf. */
static __always_inline void append_core_conf_name(struct process *process, u8 kind, u64 confs, u64 name_offset)
{
    u64 conf = 0;
    bpf_probe_read_user(&conf, sizeof(conf), (void *)(confs + process->core_module_index * 8));
    if (conf)
        append_str_at(process, kind, 0, conf + name_offset, SHORT_STRING_BYTES_MAX);
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

/* Appends first the strings that differ for each request, then those that many requests share: user space caches the decoded
 * end of a record. */
static __always_inline void append_request_strings(struct process *process)
{
    struct ngx_str *method = &process->method_name, *uri = REQUEST_STR(unparsed_uri);
    u8 *headers_in = process->request + OFFSET_ngx_http_request_s__headers_in;
    u64 host = MEMBER(headers_in, u64, ngx_http_headers_in_t, host);
    u64 user_agent = MEMBER(headers_in, u64, ngx_http_headers_in_t, user_agent);
    u32 client_length = MEMBER(process->connection, u32, ngx_connection_s, socklen);
    u32 local_length = MEMBER(process->connection, u32, ngx_connection_s, local_socklen);

    append_string(process, STRING_URI, 0, uri->data, uri->len, STRING_BYTES_MAX);
    if (user_agent)
        append_str_at(process, STRING_USER_AGENT, 0, user_agent + OFFSET_ngx_table_elt_t__value, USER_AGENT_BYTES_MAX);
    append_string(process, STRING_CLIENT_SOCKADDR, 0, MEMBER(process->connection, u64, ngx_connection_s, sockaddr),
                  client_length, SHORT_STRING_BYTES_MAX);
    if (process->trace.has_tracestate)
        append_tracestate(process);

    append_string(process, STRING_METHOD, 0, method->data, method->len, SHORT_STRING_BYTES_MAX);
    if (host)
        append_str_at(process, STRING_HOST, 0, host + OFFSET_ngx_table_elt_t__value, SHORT_STRING_BYTES_MAX);
    if (process->core_module_index_known) {
        if (!((struct request_record *)process->record)->location_unknown)
            append_core_conf_name(process, STRING_LOCATION, MEMBER(process->request, u64, ngx_http_request_s, loc_conf),
                                  OFFSET_ngx_http_core_loc_conf_s__name);
        append_core_conf_name(process, STRING_SERVER_NAME, MEMBER(process->request, u64, ngx_http_request_s, srv_conf),
                              OFFSET_ngx_http_core_srv_conf_t__server_name);
    }
    append_string(process, STRING_LOCAL_SOCKADDR, 0, MEMBER(process->connection, u64, ngx_connection_s, local_sockaddr),
                  local_length, SHORT_STRING_BYTES_MAX);
}
