/*
 * Counts the durations of all requests, upstream exchanges and failed connects by series, when a request ends. Requests that are not
 * sampled count, too.
 *
 * This is a separate BPF program. The program that makes the record calls it by tail call, because the verifiers of
 * older kernels reject one program that does both. The first program also measures the durations (metrics.h).
 */

#if REQUEST_METRICS
struct server_key {
    struct server_series series;
#if EXPONENTIAL_HISTOGRAMS
    struct place place;
#endif
};

BPF_TABLE("hash", struct server_key, struct histogram, server_durations, HISTOGRAMS_MAX);
BPF_TABLE("hash", struct client_key, struct histogram, client_durations, HISTOGRAMS_MAX);
BPF_TABLE("hash", struct server_key, struct histogram, response_sizes, HISTOGRAMS_MAX);
BPF_TABLE("hash", struct duration_name_key, struct duration_name, duration_names, NAMES_MAX);
BPF_PROG_ARRAY(measuring, 1);

/* Continues with the program that counts durations. Returns only if that program is not loaded. */
static __always_inline void measure(struct pt_regs *ctx)
{
    measuring.call(ctx, 0);
}

/* Stores the name of a configuration for user space, unless it is stored already. It stays as long as the worker's
 * series. Returns whether the name is stored. */
static __always_inline bool keep_name(struct process *process, u32 tgid, u64 configuration, u64 name_offset)
{
    struct duration_name_key key = {.tgid = tgid, .configuration = configuration};
    struct duration_name *name = &process->name;
    struct ngx_str str = {};
    if (!configuration || duration_names.lookup(&key))
        return true;
    if (bpf_probe_read_user(&str, sizeof(str), (void *)(configuration + name_offset)) != 0)
        return false;
    name->bytes = str.len > NAME_BYTES_MAX ? NAME_BYTES_MAX : str.len;
    asm volatile("" ::: "memory"); /* read back from memory: any number, to the verifier */
    u64 bytes = name->bytes;
    if (bytes > NAME_BYTES_MAX || bpf_probe_read_user(name->text, bytes, (void *)str.data) != 0)
        return false;
    return duration_names.update(&key, name) == 0;
}

static __always_inline struct histogram *server_durations_of(struct process *process, struct server_key *key)
{
    struct histogram *found = server_durations.lookup(key);
    if (found)
        return found;
    struct histogram none = {};
    u32 tgid = key->series.tgid;
    struct server_series overflow = {.tgid = tgid, .overflow = 1};
#if !EXPONENTIAL_HISTOGRAMS
    struct client_key *client = &process->client_key;
    __builtin_memset(client, 0, sizeof(*client));
    client->series.tgid = tgid;
    client->series.overflow = 1;
    server_durations.insert(&overflow, &none); /* insert both overflow entries before the maps are full */
    client_durations.insert(client, &none);
#endif
    if (keep_name(process, tgid, key->series.location, OFFSET_ngx_http_core_loc_conf_s__name)
        && keep_name(process, tgid, key->series.server, OFFSET_ngx_http_core_srv_conf_t__server_name)
        && server_durations.insert(key, &none) == 0)
        return server_durations.lookup(key);
    key->series = overflow;
    server_durations.insert(key, &none);
    return server_durations.lookup(key);
}

static __always_inline struct histogram *client_durations_of(struct process *process, struct client_key *key)
{
    struct histogram *found = client_durations.lookup(key);
    if (found)
        return found;
    struct histogram none = {};
    u32 tgid = key->series.tgid;
    if (keep_name(process, tgid, key->series.upstream, OFFSET_ngx_http_upstream_srv_conf_s__host)) {
        client_durations.insert(key, &none);
        found = client_durations.lookup(key);
    }
    if (found)
        return found;
    __builtin_memset(key, 0, sizeof(key->series) + sizeof(key->peer));
    key->series.tgid = tgid;
    key->series.overflow = 1;
    client_durations.insert(key, &none);
    return client_durations.lookup(key);
}

/* Returns r->method, and the bits of QUERY and CONNECT even if nginx does not know them. 0: the request line was not
 * parsed. */
static __always_inline u32 measured_method(struct process *process, u32 method)
{
    struct ngx_str *name = &process->method_name;
    u64 text = 0;
    if (!name->len)
        return 0;
    if (method != 1)
        return method;
    if (name->len == 5 && bpf_probe_read_user(&text, 5, (void *)name->data) == 0 && text == 0x5952455551) /* QUERY */
        return METHOD_QUERY;
    if (name->len == 7 && bpf_probe_read_user(&text, 7, (void *)name->data) == 0 && text == 0x5443454e4e4f43) /* CONNECT */
        return METHOD_CONNECT;
    return method;
}

static __always_inline u64 core_conf(struct process *process, u64 confs)
{
    u64 conf = 0;
    if (process->core_module_index_known)
        bpf_probe_read_user(&conf, sizeof(conf), (void *)(confs + process->core_module_index * 8));
    return conf;
}

static __always_inline void measure_exchange(
    struct process *process, const struct upstream_attempt *attempt, u32 index, u64 ns)
{
    struct client_key *key = &process->client_key; /* not on the stack, because the verifier tracks the stack's contents */
    __builtin_memset(key, 0, sizeof(*key));
    key->series.tgid = ((struct request_record *)process->record)->worker_pid;
    key->series.method = attempt->method;
    key->series.upstream = process->upstream_configurations[index];
    key->series.status = attempt->status;
    key->series.connect_errno = attempt->connect_errno;
    key->series.outcome = attempt->outcome;
    key->series.no_header = attempt->header_msec >> 63; /* all ones: not set */
    struct place place = place_of_duration(ns);
#if EXPONENTIAL_HISTOGRAMS
    key->place = place;
#endif
    choose_client_series(&key->series);
#if SERIES_BY_PEER
    struct ngx_str peer = {};
    u64 peer_name = 0;
    bpf_probe_read_user(&peer_name, sizeof(u64), (void *)(process->attempt_states[index] + OFFSET_ngx_http_upstream_state_t__peer));
    bpf_probe_read_user(&peer, sizeof(peer), (void *)peer_name);
    u64 bytes = peer.len > PEER_BYTES_MAX ? 0 : peer.len;
    asm volatile("" : "+r"(bytes));
    if (bytes <= PEER_BYTES_MAX && bpf_probe_read_user(key->peer, bytes, (void *)peer.data) == 0)
        key->series.peer_bytes = bytes;
#endif
    struct histogram *durations = client_durations_of(process, key);
    if (durations)
        add(durations, ns, place);
    else
        count_loss(NOT_MEASURED);
}

/* Counts the bytes of the response's body as $body_bytes_sent has them. In the series that count the request's duration: their names are
 * known already. */
static __always_inline void measure_response(
    struct process *process, const struct request_record *record, struct server_key *key, u32 overflow)
{
    s64 header_bytes = *(s64 *)(process->request + HEADER_SIZE), bytes = record->bytes_sent - header_bytes;
    struct histogram none = {};
    if (bytes < 0)
        bytes = 0;
    if (overflow)
        key->series = (struct server_series){.tgid = key->series.tgid, .overflow = 1};
    struct place place = place_of_size(bytes);
#if EXPONENTIAL_HISTOGRAMS
    key->place = place;
#endif
    struct histogram *sizes = response_sizes.lookup_or_try_init(key, &none);
    if (sizes)
        add(sizes, bytes, place);
    else
        count_loss(NOT_MEASURED);
}

/* Counts the durations of the request whose record was just made. */
int measure_request(struct pt_regs *ctx)
{
    u32 tgid = current_tgid();
    struct process *process = processes.lookup(&tgid);
    if (!process) {
        want_no_private_stack(ctx);
        return 0;
    }
    struct request_record *record = (struct request_record *)process->record;
    u64 status = final_status(record);
    u32 method = measured_method(process, record->method);

    u32 taken = record->attempts;
    EACH(i, taken, ATTEMPTS_MAX) {
        u64 ns = process->exchange_ns[i];
        if (!ns)
            ns = failed_connect_ns(attempt_of(process, i));
        if (ns)
            measure_exchange(process, attempt_of(process, i), i, ns);
    }

    struct server_key key = {};
    key.series = (struct server_series){
        .tgid = tgid,
        .method = method,
        .location = process->location ? core_conf(process, process->location) : 0,
        .server = core_conf(process, MEMBER(process->request, u64, ngx_http_request_s, srv_conf)),
        .http_version = record->http_version,
        .ending = record->ending,
        .cache_status = record->cache_status,
        .status = status,
        .tls = record->tls,
    };
    choose_server_series(&key.series);
    struct server_key sized = key;
    struct place place = place_of_duration(process->request_ns);
#if EXPONENTIAL_HISTOGRAMS
    key.place = place;
#endif
    struct histogram *durations = server_durations_of(process, &key);
    if (durations)
        add(durations, process->request_ns, place);
    else
        count_loss(NOT_MEASURED);
    if (record->bytes_sent >= 0 && !process->acted && status != SWITCHING_PROTOCOLS)
        measure_response(process, record, &sized, key.series.overflow);
    return 0;
}
#endif
