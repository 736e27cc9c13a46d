/* --adopt-upstream-context: reads the trace context that nginx itself sent to a peer, when nginx has finished with the peer. */

#if ADOPT_UPSTREAM_CONTEXT
struct told_key {
    u32 tgid;
    u32 reserved;
    u64 state;                /* the attempt's ngx_http_upstream_state_t * */
};

/* The entries of other modules' attempts (stream, mail) are never looked up; the LRU map drops them. */
BPF_TABLE("lru_hash", struct told_key, struct trace_context, told_contexts, ACTIVE_REQUESTS_MAX);

/* ngx_http_upstream_free_round_robin_peer(ngx_peer_connection_t *pc, void *data, ngx_uint_t state) */
int enter_ngx_http_upstream_free_round_robin_peer(struct pt_regs *ctx)
{
    u64 now;
    struct told_key key = {};
    struct process *process = entered(ctx, &key.tgid, &now);
    u64 upstream = PT_REGS_PARM1(ctx) - OFFSET_ngx_http_upstream_s__peer;
    if (!process || bpf_probe_read_user(&key.state, sizeof(u64), (void *)(upstream + OFFSET_ngx_http_upstream_s__state)) != 0)
        return 0;
    read_told_context(process, upstream);
    if (process->told.valid)
        told_contexts.update(&key, &process->told);
    return 0;
}

/* Returns the span id that nginx sent to an attempt's peer, if it belongs to the request's trace. 0: there is no such
 * id. */
static __always_inline u64 told_span_of(struct process *process, u32 tgid, u64 state)
{
    struct told_key key = {.tgid = tgid, .state = state};
    struct trace_context *told = told_contexts.lookup(&key);
    u64 span_id = 0;
    if (!told)
        return 0;
    if (tells_something_new(process, told)) {
        if (!process->told.valid)
            process->told = *told;
        if (told->trace_id_high == process->told.trace_id_high && told->trace_id_low == process->told.trace_id_low)
            span_id = told->parent_span_id;
    }
    told_contexts.delete(&key);
    return span_id;
}
#endif
