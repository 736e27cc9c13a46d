/* The end of a client's request, and its record. */

#define PROCESS_WORKER 3 /* NGX_PROCESS_WORKER */

static __always_inline void learn_core_module_index(struct process *process, u64 load_address)
{
    if (bpf_probe_read_user(&process->core_module_index, sizeof(u64),
                            (void *)(load_address + ADDRESS_ngx_http_core_module + OFFSET_ngx_module_s__ctx_index)) == 0)
        process->core_module_index_known = 1;
    u64 kind = 0;
    process->keeps_configuration = ADDRESS_ngx_process && read_quietly(&kind, load_address + ADDRESS_ngx_process)
        && kind == PROCESS_WORKER;
    if (ADDRESS_ngx_http_core_get_method)
        read_quietly(&process->redirected_method, load_address + ADDRESS_ngx_http_core_get_method + sizeof(u64));
}

/* Sets the location that the client asked for: the location where the main request's first attempt began, or else the location
 * that nginx has found at the end, unless it is the location of post_action. */
static __always_inline void find_location(struct process *process, struct request_record *record)
{
    if (!process->location && !process->version_lost) {
        process->location = MEMBER(process->request, u64, ngx_http_request_s, loc_conf);
        process->location_method = REQUEST_STR(method_name)->data;
    }
    if (is_of_a_redirect(process, process->location_method))
        process->location = 0;
    record->location_unknown = !process->location;
}

/* Tells whether nginx has taken the main request to another location since its last attempt. Not known with `--detail request`. */
static __always_inline bool has_moved(struct process *process)
{
    return !DETAIL_REQUEST && process->last_location != MEMBER(process->request, u64, ngx_http_request_s, loc_conf);
}

/* Returns the reason to send a request that the sampler left out. KEPT_SAMPLED: there is no reason. */
static __always_inline u8 keep(const struct process *process, const struct request_record *record)
{
    u64 status = final_status(record);
    if (KEEP_ERRORS && status >= 500 && status < 600) /* modules make up higher numbers */
        return KEPT_ERROR;
#if ERROR_LOG
    if (KEEP_ERRORS && process->worst_level && process->worst_level <= LOG_LEVEL_ERROR)
        return KEPT_ERROR;
#endif
    u64 slow_ns = keep_slower_than_ns(process);
    return slow_ns && process->request_ns >= slow_ns ? KEPT_SLOW : KEPT_SAMPLED;
}

/* Returns what nginx's cache said about the request: $upstream_cache_status. ngx_http_upstream_s: cleanup, then the bits store,
 * cacheable, accel, ssl, and three bits cache_status. */
static __always_inline u8 cache_status(struct process *process)
{
#if HTTP_CACHE
    u64 upstream = MEMBER(process->request, u64, ngx_http_request_s, upstream);
    return upstream ? byte_at(upstream + OFFSET_ngx_http_upstream_s__cleanup + 8) >> 4 & 7 : 0;
#else
    return 0;
#endif
}

#define REQUEST_CACHE (OFFSET_ngx_http_request_s__upstream - 8) /* cache, upstream */

/* Tells whether the request waited while another one filled the cache. Only then nginx sets the time until which it waits
 * (ngx_http_file_cache_lock). */
static __always_inline u8 waited_for_cache(struct process *process)
{
#if HTTP_CACHE && defined(OFFSET_ngx_http_cache_s__wait_time)
    u64 cache = *(u64 *)(process->request + REQUEST_CACHE), wait_time = 0;
    return cache && read_quietly(&wait_time, cache + OFFSET_ngx_http_cache_s__wait_time) && wait_time;
#else
    return 0;
#endif
}

/* Returns a bit-field of the request, of up to 8 bits. */
static __always_inline u16 bit_field(struct process *process, u32 bit, u32 width)
{
    u32 at = bit / 8;
    return (process->request[at] | process->request[at + 1] << 8) >> bit % 8 & ((1 << width) - 1);
}

/* Sets what nginx's limits said: $limit_req_status, $limit_conn_status. */
static __always_inline void find_limits(struct process *process, struct request_record *record)
{
    record->limit_req_status = 0;
    record->limit_conn_status = 0;
#if defined(BIT_ngx_http_request_s__limit_req_status) && defined(BIT_ngx_http_request_s__limit_conn_status)
    record->limit_req_status = bit_field(process, BIT_ngx_http_request_s__limit_req_status, 3);
    record->limit_conn_status = bit_field(process, BIT_ngx_http_request_s__limit_conn_status, 2);
#endif
}

#define METHOD_BYTES_MAX 16

/* Finds the method that the client sent. An internal redirect sets r->method and r->method_name to GET, and modules set other
 * methods. None of them changes the request line. r->method_name points to its beginning, unless nginx or a module has
 * overwritten r->method_name, or the request came over HTTP/2 or HTTP/3, for which nginx makes up a request line. */
static __always_inline void find_method(struct process *process, struct request_record *record)
{
    struct ngx_str *name = REQUEST_STR(method_name), *line = REQUEST_STR(request_line), *uri = REQUEST_STR(unparsed_uri);
    u64 text[METHOD_BYTES_MAX / 8] = {};
    process->method_name = *name;
    record->method = MEMBER(process->request, u64, ngx_http_request_s, method);
    /* nginx could not parse it, or it was too long (414). For error_page nginx itself sets a method then. */
    bool unparsed = !line->len || !name->len || (!uri->len && !REQUEST_STR(http_protocol)->len);
    if (unparsed && !record->multiplexed) {
        process->method_name.len = 0;
        record->method = 0;
        return;
    }
    if (name->data == line->data || !line->len
        || bpf_probe_read_user(text, sizeof(text), (void *)line->data) != 0)
        return;
    u64 bytes = bytes_before_space(text[0], text[1]);
    if (bytes == METHOD_BYTES_MAX) /* METHOD URI HTTP/1.1 */
        bytes = line->len - uri->len - 10;
    if (bytes >= line->len)
        return;
    u32 method = bytes < 8 ? method_of_text(first_bytes(text[0], bytes)) : 1;
    if (bytes == name->len && (method == record->method || method == 1) && record->multiplexed)
        return; /* as received, and nginx may know the method */
    process->method_name.data = line->data;
    process->method_name.len = bytes;
    record->method = method;
}

/* Returns the HTTP version that the client sent. nginx overwrites it with HTTP/0.9 for post_action, and if a peer sent
 * no header. */
static __always_inline u64 asked_version(struct process *process, u64 http_version)
{
    struct ngx_str *protocol = (struct ngx_str *)(process->request + OFFSET_ngx_http_request_s__http_protocol);
    u64 text = 0;
    if (http_version != HTTP_VERSION_0_9 || protocol->len != sizeof(text)
        || bpf_probe_read_user(&text, sizeof(text), (void *)protocol->data) != 0 || (text & 0xff00ffffffffffULL) != 0x2e002f50545448ULL)
        return http_version;
    return ((text >> 40 & 0xff) - '0') * 1000 + ((text >> 56) - '0');
}

/* Reads the method that the client sent, and what decides $status. */
static __always_inline void read_method_and_status(struct process *process, struct request_record *record, u64 rc, u64 http_version)
{
    record->rc = rc;
    record->bytes_sent = MEMBER(process->connection, u64, ngx_connection_s, sent);
    record->err_status = MEMBER(process->request, u64, ngx_http_request_s, err_status);
    record->out_status = MEMBER(process->request + OFFSET_ngx_http_request_s__headers_out, u64, ngx_http_headers_out_t, status);
    process->version_lost = record->http_version != http_version;
    find_method(process, record);
}

#if RULES
/* Finds the rule of a request that has ended. `count`: the number of its attempts. */
static __always_inline void find_rule_at_end(
    struct process *process, struct request_record *record, struct attempt_key *key, u32 count)
{
#if RULES_BY_LOCATION
#if !DETAIL_REQUEST
    EACH(i, count, ATTEMPTS_MAX) {
        key->index = i;
        struct attempt_state *attempt = attempts.lookup(key);
        if (attempt && !attempt->request) { /* the main request's first attempt; take_attempt() finds the same */
            process->location = attempt->location;
            process->location_method = attempt->method_name;
            break;
        }
    }
#endif
    find_location(process, record);
#endif
    /* After a post_action nginx has another status. */
    find_rule(process, &process->method_name, process->location, process->version_lost ? 0 : final_status(record));
    record->rule = process->rule.number;
}
#endif

/* Tells whether nginx made the request for itself during a TLS handshake, for a certificate whose name has variables
 * (ngx_http_ssl_certificate). nginx counts a client's request when it creates the request. It does not count its own
 * request. */
static __always_inline bool is_of_a_handshake(struct process *process)
{
    return !MEMBER(process->connection, u64, ngx_connection_s, requests) && !REQUEST_STR(method_name)->len
        && !REQUEST_STR(request_line)->len && !REQUEST_STR(unparsed_uri)->len;
}

/* ngx_http_free_request(ngx_http_request_t *r, ngx_int_t rc): called once for each request, before nginx logs the
 * request */
int enter_ngx_http_free_request(struct pt_regs *ctx)
{
    u64 now;
    u32 tgid;
    struct process *process = entered(ctx, &tgid, &now);
    if (!process)
        return 0;

    u64 r = PT_REGS_PARM1(ctx);
    struct request_key key = {.tgid = tgid};
    if (bpf_probe_read_user(process->request, SIZEOF_ngx_http_request_s, (void *)r) != 0) {
        count_loss(LOST_READ_FAILED);
        return 0;
    }
    key.connection = MEMBER(process->request, u64, ngx_http_request_s, connection);
    bool readable = bpf_probe_read_user(process->connection, SIZEOF_ngx_connection_s, (void *)key.connection) == 0;
#if ERROR_LOG
    if (readable)
        end_lines(process, &key);
#endif
    if (readable && is_of_a_handshake(process))
        return 0;
    u64 load_address = PT_REGS_IP(ctx) - SITE_ngx_http_free_request;
    if (!process->core_module_index_known)
        learn_core_module_index(process, load_address);
    if (is_doubted(process, r, readable, load_address, tgid))
        return 0;

    struct request_record *record = (struct request_record *)process->record;
    struct active_request active = {};
    u64 http_version = MEMBER(process->request, u64, ngx_http_request_s, http_version);
    record->http_version = asked_version(process, http_version);
    process->location = 0;
    process->headers_address = 0;
    process->peer[0] = 0;
    record->multiplexed =
        MEMBER(process->request, u64, ngx_http_request_s, stream) != 0 || record->http_version == HTTP_VERSION_3;
#ifdef OFFSET_ngx_connection_s__ssl
    record->tls = MEMBER(process->connection, u64, ngx_connection_s, ssl) != 0;
#else
    record->tls = 0; /* a build without TLS */
#endif
    record->accepted_ns = 0;
    record->first_read_ns = 0;
    record->last_read_ns = 0;
    record->first_write_ns = 0;
    record->last_write_ns = 0;
    record->requests_seen = 0;
    record->coarse_start = 0;
    record->peer_known = 0;
    record->headers_at = 0;
    record->headers_missing = 0;
    record->rule = 0;
    read_header_in(process);
    struct attempt_key attempt_key = {.connection = key.connection, .tgid = tgid};
    struct socket *socket = NULL;
#if DETAIL_REQUEST
    active.created_ns = monotonic_ns_of_start(process, load_address, now);
    if (!active.created_ns)
        return 0;
#else
    struct socket_key socket_key = {.tgid = tgid, .fd = MEMBER(process->connection, s32, ngx_connection_s, fd)};
    socket = sockets.lookup(&socket_key);
    if (!take_times(process, &key, socket, &active, load_address, now)) {
        forget_attempts(&attempt_key, active.progress.attempts);
        return 0;
    }
#endif
#if LEAVES_OUT_EARLY
    if (active.progress.left_out) {
        count_loss(NOT_SAMPLED);
        return 0;
    }
    process->root_id = active.progress.root_id;
#endif
    struct request_trace *trace = &process->trace;
    u64 told_span_id = 0;
#if TELLS
    bool told = false;
#if PROPAGATE
    told_span_id = active.told_span_id;
    if (active.decided) {
        process->trace = active.trace;
        told = true;
    }
#endif
#if PROPAGATE_SOCKET
    struct attempt_state *first = active.progress.attempts ? attempts.lookup(&attempt_key) : NULL;
    if (first && first->decided) {
        process->trace = first->trace;
        told = true;
    }
#endif
    asm volatile("" : "+r"(told)); /* a flag of its own: older verifiers cannot follow what clang would derive it from */
#endif
#if RULES
    read_method_and_status(process, record, PT_REGS_PARM2(ctx), http_version);
    find_rule_at_end(process, record, &attempt_key, active.progress.attempts);
    bool dropped = process->rule.drops;
#if TELLS
    if (told)
        dropped = process->trace.dropped;
#endif
    if (dropped && !is_measured(process)) {
        forget_attempts(&attempt_key, active.progress.attempts);
        count_loss(NOT_TRACED_BY_RULE);
        return 0;
    }
#endif
    bool reads_headers = HEADERS_ARE_READ;
#if TELLS && !ADOPT_UPSTREAM_CONTEXT && !TRUSTED_PROXIES
    reads_headers = !told || process->trace.has_tracestate;
#endif
    if (reads_headers)
        find_context_headers(process);
#if TELLS
    if (told)
        recall_trace(process);
    else
#endif
    {
        read_incoming_context(process);
        decide_trace(process);
    }
#if !ADOPT_UPSTREAM_CONTEXT && !KEEP_ERRORS && !KEEP_SLOWER_THAN_NS && !REQUEST_METRICS
    if (!trace->sampled && !keep_slower_than_ns(process)) {
        forget_attempts(&attempt_key, active.progress.attempts);
        count_loss(NOT_SAMPLED);
        return 0;
    }
#endif
#if DETAIL_REQUEST
    active.progress.attempts = recall_last_attempt(process, r, &active.created_ns, now);
#endif
    record->created_ns = active.created_ns;
    record->ended_ns = now;
#if !RULES
    read_method_and_status(process, record, PT_REGS_PARM2(ctx), http_version);
#endif
    record->connection = MEMBER(process->connection, u64, ngx_connection_s, number);
    record->connection_requests = MEMBER(process->connection, u64, ngx_connection_s, requests);
    record->handshake_ns = socket && record->connection_requests == 1 ? socket->handshake_ns : 0;
    record->request_length = MEMBER(process->request, u64, ngx_http_request_s, request_length);
    record->nginx_start_sec = MEMBER(process->request, u64, ngx_http_request_s, start_sec);
    record->nginx_start_msec = MEMBER(process->request, u64, ngx_http_request_s, start_msec);
    record->cache_status = cache_status(process);
    record->waited_for_cache = waited_for_cache(process);
    find_limits(process, record);
    process->answer = process->version_lost ? active.progress.answer : 0;
    process->last_location = 0;
    record->worker_pid = tgid;

#if ADOPT_UPSTREAM_CONTEXT
    __builtin_memset(&process->told, 0, sizeof(process->told));
    process->client_span_id = read_client_span_id(process);
#endif
    process->seen_peers_count = 0;
    process->main_outcome = OUTCOME_WHOLE;
    process->main_tls = 0;
    record->attempts = 0;
    u32 attempts_count = active.progress.attempts;
    EACH(i, attempts_count, ATTEMPTS_TAKEN_MAX) {
        attempt_key.index = i;
        if (!take_attempt(process, &attempt_key, told_span_id, now)) {
            count_loss(LOST_READ_FAILED);
            return 0;
        }
        record->attempts = i + 1;
    }
    asm volatile("" ::: "memory"); /* as with record_bytes: read back, it is one unknown number, not 33 known numbers */
    u32 taken = record->attempts;
    find_unseen(process, record);
    process->acted = process->version_lost && (process->answer || has_moved(process));
    if (process->acted) { /* nginx has the status of the post_action's response */
        record->err_status = 0;
        record->out_status = process->answer >> ANSWER_STATUS;
    }
    find_location(process, record);
    record->ending = ending_of(process, socket, record, process->main_outcome, load_address);
    record->ends_with_write = ends_with_write(process, socket, record, load_address);
#if DETAIL_REQUEST
    record->longest_turn_ns = 0;
#else
    record->longest_turn_ns = longest_turn_ns(process, record, now);
#endif
    if (TIMES_REQUESTS)
        process->last_end_ns = read_end_ns(record);
    EACH(i, taken, ATTEMPTS_TAKEN_MAX) { /* one loop: two loops are too much for the verifier */
        conclude(process, record, attempt_of(process, i));
        if (TIMES_REQUESTS)
            process->exchange_ns[i] = exchange_ns(attempt_of(process, i), &process->last_end_ns);
    }
    if (TIMES_REQUESTS)
        process->request_ns = request_ns(record, process->last_end_ns);

#if ADOPT_UPSTREAM_CONTEXT
    adopt_trace(process);
#endif
    record->trace_id_high = trace->trace_id_high;
    record->trace_id_low = trace->trace_id_low;
    record->parent_span_id = trace->parent_span_id;
    record->trace_flags = trace->flags;
    record->kept = KEPT_SAMPLED;
    if (!trace->sampled) {
        record->kept = trace->parent_said_no || is_dropped(process) ? KEPT_SAMPLED : keep(process, record);
        if (record->kept == KEPT_SAMPLED) {
            forget_attempts(&attempt_key, taken);
            count_loss(is_dropped(process) ? NOT_TRACED_BY_RULE : NOT_SAMPLED);
#if REQUEST_METRICS
            if (is_measured(process))
                measure(ctx);
#endif
            return 0;
        }
    }

    process->record_bytes = sizeof(struct request_record) + taken * sizeof(struct upstream_attempt);
    append_request_strings(process);
    process->last_sent_line = 0;
    EACH(i, taken, ATTEMPTS_TAKEN_MAX)
        append_sent_line(process, i);
    append_common_strings(process);
    EACH(i, taken, ATTEMPTS_TAKEN_MAX) {
        attempt_key.index = i;
        append_attempt_strings(process, &attempt_key);
    }
    u64 unseen = process->unseen_peers_count;
    EACH(i, unseen, ATTEMPTS_MAX)
        append_str_at(process, STRING_UNSEEN_PEER, i, process->unseen_peers[i], SHORT_STRING_BYTES_MAX);
#if CAPTURES_HEADERS
    capture(ctx);
#endif
    send_record(process);
#if REQUEST_METRICS
    if (is_measured(process))
        measure(ctx);
#endif
    return 0;
}
