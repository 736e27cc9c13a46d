/*
 * Rules: which requests are traced, and under which names. planner/rules.py writes match_rules() from the user's rules: the first
 * rule that matches process->rule_facts sets process->rule. otel_nginx_ebpf/traces/rules.py reads rules in the same way.
 */

#if RULES
/* Reads a text's last `bytes` bytes, at most RULE_TEXT_BYTES, to the end of `tail`. */
static __always_inline bool read_rule_tail(u8 *tail, u64 end, u64 bytes)
{
    u64 at = RULE_TEXT_BYTES - bytes;
    asm volatile("" : "+r"(at), "+r"(bytes)); /* so that clang keeps the bounds checks, which the verifier needs */
    return at <= RULE_TEXT_BYTES && bytes <= RULE_TEXT_BYTES && bpf_probe_read_user(tail + at, bytes, (void *)(end - bytes)) == 0;
}

/* Reads a text that rules compare: its first bytes and, if `tail` is not NULL, its last bytes. */
static __always_inline void read_rule_text(u64 *text_bytes, u8 *head, u8 *tail, u64 data, u64 whole_bytes)
{
    u64 bytes = whole_bytes > RULE_TEXT_BYTES ? RULE_TEXT_BYTES : whole_bytes;
    *text_bytes = 0;
    asm volatile("" : "+r"(bytes));
    if (bytes > RULE_TEXT_BYTES || bpf_probe_read_user(head, bytes, (void *)data) != 0)
        return;
    if (tail && !read_rule_tail(tail, data + whole_bytes, bytes))
        return;
    *text_bytes = whole_bytes < RULE_PATH_BYTES ? whole_bytes : RULE_TEXT_TOO_LONG;
}

#define READ_RULE_TEXT(name, has_tail, data, bytes)                                                                    \
    read_rule_text(&process->rule_facts.name##_bytes, process->rule_facts.name##_head,                                 \
                   (has_tail) ? process->rule_facts.name##_tail : NULL, data, bytes)

/* Reads the path as the client sent it, without the query. */
static __always_inline void read_rule_path(struct process *process)
{
    struct rule_facts *facts = &process->rule_facts;
    struct ngx_str *uri = REQUEST_STR(unparsed_uri);
    u64 bytes = uri->len > RULE_PATH_BYTES ? RULE_PATH_BYTES : uri->len;
    facts->path_bytes = 0;
    asm volatile("" : "+r"(bytes));
    if (bytes > RULE_PATH_BYTES || bpf_probe_read_user(facts->path_head, bytes, (void *)uri->data) != 0)
        return;
    process->rule_path_end = bytes; /* in the map's memory: any number, to the verifier */
    u64 words = (bytes + 7) / 8;
    EACH(i, words, RULE_PATH_BYTES / 8) {
        u64 marked = zero_bytes(*(u64 *)(facts->path_head + i * 8) ^ '?' * EVERY_BYTE);
        if (marked) {
            process->rule_path_end = i * 8 + bytes_through(marked) - 1;
            break;
        }
    }
    asm volatile("" ::: "memory");
    u64 end = process->rule_path_end;
    if (end >= bytes) /* behind the end are an earlier path's bytes */
        end = bytes;
    if (RULES_BY_PATH_TAIL && !read_rule_tail(facts->path_tail, uri->data + end, end > RULE_TEXT_BYTES ? RULE_TEXT_BYTES : end))
        return;
    facts->path_bytes = end < RULE_PATH_BYTES ? end : RULE_TEXT_TOO_LONG;
}

static __always_inline void read_rule_user_agent(struct process *process)
{
    struct ngx_str value = {};
    u64 header = MEMBER(process->request + OFFSET_ngx_http_request_s__headers_in, u64, ngx_http_headers_in_t, user_agent);
    process->rule_facts.user_agent_bytes = 0;
    if (header && bpf_probe_read_user(&value, sizeof(value), (void *)(header + OFFSET_ngx_table_elt_t__value)) == 0)
        READ_RULE_TEXT(user_agent, RULES_BY_USER_AGENT_TAIL, value.data, value.len);
}

/* Sets process->rule for the request in process->request. `location`: r->loc_conf; 0: not known yet. `status`: 0: as well. */
static __always_inline void find_rule(struct process *process, const struct ngx_str *method, u64 location, u64 status)
{
    struct rule_facts *facts = &process->rule_facts;
    struct known_name *name;
    facts->status = status;
    if (RULES_BY_PATH)
        read_rule_path(process);
    if (RULES_BY_METHOD)
        READ_RULE_TEXT(method, false, method->data, method->len);
    if (RULES_BY_USER_AGENT)
        read_rule_user_agent(process);
    facts->server_name_bytes = 0;
    facts->location_bytes = 0;
    if (RULES_BY_SERVER_NAME && process->core_module_index_known) {
        name = core_conf_name(process, STRING_SERVER_NAME, MEMBER(process->request, u64, ngx_http_request_s, srv_conf),
                              OFFSET_ngx_http_core_srv_conf_t__server_name);
        if (name)
            READ_RULE_TEXT(server_name, RULES_BY_SERVER_NAME_TAIL, name->name.data, name->name.len);
    }
    if (RULES_BY_LOCATION && process->core_module_index_known && location) {
        name = core_conf_name(process, STRING_LOCATION, location, OFFSET_ngx_http_core_loc_conf_s__name);
        if (name)
            READ_RULE_TEXT(location, RULES_BY_LOCATION_TAIL, name->name.data, name->name.len);
    }
    process->rule = (struct rule){.keep_slower_than_ns = KEEP_SLOWER_THAN_NS,
                                  .sample_ratio_bound = SAMPLE_RATIO_BOUND,
                                  .samples_by_parent = SAMPLE_BY_PARENT,
                                  .samples_always = SAMPLE_ALWAYS};
    match_rules(process, facts);
}

#if TELLS
/* Sets process->rule at the moment when an upstream is to be told the decision. The settings exclude rules that would need what is
 * known only later. */
static __always_inline void find_rule_for_upstream(struct process *process, u64 location)
{
    struct ngx_str method = *REQUEST_STR(request_line);
    u64 text[2] = {};
    u64 bytes = method.len > sizeof(text) ? sizeof(text) : method.len;
    asm volatile("" : "+r"(bytes));
    if (bytes > sizeof(text) || bpf_probe_read_user(text, bytes, (void *)method.data) != 0)
        bytes = 0;
    method.len = bytes ? bytes_before_space(text[0], text[1]) : 0;
    find_rule(process, &method, location, 0);
}
#endif
#endif

/* Tells whether the request is sampled: by its rule's sampler, if its rule has one. */
static __always_inline bool is_wanted(const struct process *process, u64 trace_id_low)
{
#if RULES
    const struct rule *rule = &process->rule;
    if (rule->drops)
        return false;
    if (rule->samples_by_parent && process->incoming.decision != DECISION_NONE)
        return process->incoming.decision == DECISION_YES;
    return rule->samples_always || trace_id_low < rule->sample_ratio_bound;
#else
    return is_sampled(&process->incoming, trace_id_low);
#endif
}

/* Tells whether a rule leaves the request out. */
static __always_inline bool is_dropped(const struct process *process)
{
    return RULES && process->trace.dropped;
}

/* Returns the duration in nanoseconds above which a request is kept. 0: none. */
static __always_inline u64 keep_slower_than_ns(const struct process *process)
{
#if RULES
    return process->rule.keep_slower_than_ns;
#else
    return KEEP_SLOWER_THAN_NS;
#endif
}

/* Tells whether the request counts in the metrics. */
static __always_inline bool is_measured(const struct process *process)
{
#if RULES
    return REQUEST_METRICS && !process->rule.unmeasured;
#else
    return REQUEST_METRICS;
#endif
}
