/*
 * Decides whether a request agrees with the layout. A worker's first requests are checked (layout.h), and so are its first requests
 * with an upstream and its first streams. A request that contradicts has no trace, and the checks begin again after it. User
 * space decides about the layout by the number of connections in a row with such requests.
 */

#define LAYOUT_LOOKS 100

#define FACTS_OF_UPSTREAM (1ULL << FACT_UPSTREAM | 1ULL << FACT_UPSTREAM_STATES | 1ULL << FACT_PIPE)
#define FACTS_OF_STREAM (1ULL << FACT_STREAM)
#define FACTS_OF_REQUEST ((1ULL << FACT_UPSTREAM) - 1)
/* Without these facts it is not known whether two requests belong to the same connection. */
#define FACTS_OF_NUMBER (1ULL << FACT_REQUEST | 1ULL << FACT_CONNECTION | 1ULL << FACT_NUMBER)

/* Notes whether a request agrees with a part of the layout. */
static __always_inline void weigh(struct process *process, u32 part, u64 facts, bool has_part, u64 number)
{
    struct layout_trust *trust = &process->layout_trust[part];
    u64 contradicted = process->layout.contradicted;
    if (!has_part)
        return;
    if (!(contradicted & facts)) {
        trust->connections = 0;
        if (trust->agreed < LAYOUT_LOOKS)
            trust->agreed++;
        return;
    }
    if (!trust->connections || (contradicted & FACTS_OF_NUMBER) || trust->last_number != number)
        trust->connections++;
    trust->last_number = number;
    trust->agreed = 0;
}

static __always_inline void tell_doubt(struct process *process, u32 tgid)
{
    struct layout_doubt doubt = {.facts = process->layout.contradicted, .worker_pid = tgid};
    for (int part = 0; part < LAYOUT_PARTS; part++)
        if (process->layout_trust[part].connections > doubt.connections)
            doubt.connections = process->layout_trust[part].connections;
    count_loss(LOST_LAYOUT_MISMATCH);
    records.ringbuf_output(&doubt, sizeof(doubt), BPF_RB_NO_WAKEUP);
}

/* Tells whether a request contradicts the layout. process->request holds the request at `r`; process->connection holds its
 * connection if `readable` is set. */
static __always_inline bool is_doubted(struct process *process, u64 r, bool readable, u64 load_address, u32 tgid)
{
    struct layout_look *look = &process->layout;
    u8 *request = process->request, *connection = process->connection;
    bool has_upstream = OF_R(u64, upstream) != 0, is_stream = OF_R(u64, stream) != 0;

    look->contradicted = 0;
    expect(look, OF_R(u32, signature) == HTTP_MODULE && OF_R(u64, main) == r, FACT_REQUEST);
    expect(look, readable, FACT_CONNECTION);
    if (!look->contradicted) {
        look->r = r;
        look->c = OF_R(u64, connection);
        if (process->layout_trust[LAYOUT_REQUEST].agreed < LAYOUT_LOOKS) {
            look->core_module_index = process->core_module_index;
            look->cached_time = word_at(load_address + ADDRESS_ngx_cached_time);
            look->current_msec = word_at(load_address + ADDRESS_ngx_current_msec);
            look_at_connection(look, connection);
            look_at_headers(look, request);
            look_at_request_line(look, request);
            look_at_configuration(look, request);
        }
        if (has_upstream && process->layout_trust[LAYOUT_UPSTREAM].agreed < LAYOUT_LOOKS) {
            look->current_msec = word_at(load_address + ADDRESS_ngx_current_msec);
            look_at_upstream(look, request, connection);
        }
        if (is_stream && process->layout_trust[LAYOUT_STREAM].agreed < LAYOUT_LOOKS)
            look_at_stream(look, request);
    }
    u64 number = OF_C(u64, number);
    weigh(process, LAYOUT_REQUEST, FACTS_OF_REQUEST, true, number);
    bool is_request = !(look->contradicted & FACTS_OF_REQUEST);
    weigh(process, LAYOUT_UPSTREAM, FACTS_OF_UPSTREAM, is_request && has_upstream, number);
    weigh(process, LAYOUT_STREAM, FACTS_OF_STREAM, is_request && is_stream, number);
    if (!look->contradicted)
        return false;
    tell_doubt(process, tgid);
    return true;
}
