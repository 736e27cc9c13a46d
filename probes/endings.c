/* How a request ended: whole or abandoned, who abandoned it, and whether it ended with its last byte or later. */

#define SWITCHING_PROTOCOLS 101
#define REQUEST_TIME_OUT 408
#define NO_RESPONSE 444 /* NGX_HTTP_CLOSE */
#define CLIENT_CLOSED_REQUEST 499

static __always_inline bool is_handler(u64 handler, u64 load_address, u64 function)
{
    return function && handler == load_address + function;
}

/* Tells whether nginx finalized the request normally (ngx_http_finalize_request), and did not terminate it. */
static __always_inline bool was_finalized(struct process *process, u64 load_address)
{
    return !ADDRESS_ngx_http_request_empty_handler
        || is_handler(MEMBER(process->request, u64, ngx_http_request_s, write_event_handler), load_address,
                      ADDRESS_ngx_http_request_empty_handler);
}

/* Tells whether nginx waited after the response until the client ended its request (lingering_close,
 * ngx_http_discard_request_body). */
static __always_inline bool has_lingered(struct process *process, struct socket *socket, u64 load_address)
{
    return socket->lingers
        || is_handler(MEMBER(process->request, u64, ngx_http_request_s, read_event_handler), load_address,
                      ADDRESS_ngx_http_discarded_request_body_handler);
}

#define EVENT_TIMEDOUT (1 << 10) /* one of the bit-fields after ngx_event_s.data: write, accept, instance, … */

static __always_inline bool write_timed_out(struct process *process)
{
    u32 flags = 0;
    u64 event = MEMBER(process->connection, u64, ngx_connection_s, write);
    return bpf_probe_read_user(&flags, sizeof(flags), (void *)(event + OFFSET_ngx_event_s__data + 8)) == 0 && flags & EVENT_TIMEDOUT;
}

static __always_inline bool is_exiting(u64 load_address)
{
    u32 exiting = 0;
    return ADDRESS_ngx_exiting && bpf_probe_read_user(&exiting, sizeof(exiting), (void *)(load_address + ADDRESS_ngx_exiting)) == 0
        && exiting;
}

/* Tells whether nginx gave up because the client left. An HTTP/3 stream does not note this, but such a request ends
 * while nginx reads. */
static __always_inline bool did_client_leave(struct process *process, struct socket *socket, const struct request_record *record)
{
    if (record->http_version == HTTP_VERSION_3)
        return process->latest_read_fd == MEMBER(process->connection, s32, ngx_connection_s, fd)
            && socket->last_read_ns > record->created_ns;
    return is_out_closed(process) || socket->peer_closed;
}

/* Tells whether r->method_name.data belongs to a request that nginx has redirected to another URI by error_page or X-Accel-Redirect:
 * then nginx has replaced the method, unless it was HEAD. For the GET of an HTTP/2 stream nginx may use the same text. */
static __always_inline bool is_of_a_redirect(struct process *process, u64 method_name)
{
    struct request_record *record = (struct request_record *)process->record;
    struct ngx_str *line = REQUEST_STR(request_line);
    if (record->multiplexed && record->method == METHOD_GET)
        return false;
    if (process->redirected_method)
        return method_name == process->redirected_method;
    return !record->multiplexed && method_name != line->data; /* not exported; a module may have set the method, too */
}

/* Returns how an incomplete response of the main request's last attempt ended, if the client was still there. */
static __always_inline u8 ending_of_outcome(struct process *process, u8 outcome)
{
    return outcome == OUTCOME_INCOMPLETE || process->main_tls ? ENDED_UPSTREAM_INCOMPLETE : ENDED_UPSTREAM_TIMEOUT;
}

/* Returns how a request ended whose post_action nginx sent to an upstream: by what was noted at that moment. */
static __always_inline u8 ending_of_answer(struct process *process, u8 outcome)
{
    u64 answer = process->answer;
    if (answer & ANSWER_WHOLE)
        return ENDED_WHOLE;
    if (answer & ANSWER_LEFT)
        return ENDED_CLIENT_CLOSED_REQUEST;
    if (outcome == OUTCOME_ABANDONED && !(answer & ANSWER_CUT) && is_of_a_redirect(process, REQUEST_STR(method_name)->data))
        return ENDED_WHOLE; /* X-Accel-Redirect: nginx did not want the rest */
    if (outcome != OUTCOME_WHOLE)
        return ending_of_outcome(process, outcome);
    if (write_timed_out(process))
        return ENDED_TIMEOUT;
    return answer & ANSWER_CUT ? ENDED_ABORTED : ENDED_WHOLE;
}

/* Returns how a request ended. `outcome`: the outcome of the main request's last attempt. */
static __always_inline u8 ending_of(
    struct process *process, struct socket *socket, const struct request_record *record, u8 outcome, u64 load_address)
{
    u64 status = final_status(record);
    bool unsent = record->rc || !record->bytes_sent;
    if (unsent && status == REQUEST_TIME_OUT)
        return ENDED_TIMEOUT;
    if (unsent && status == CLIENT_CLOSED_REQUEST)
        return ENDED_CLIENT_CLOSED_REQUEST;
    if (process->answer)
        return ending_of_answer(process, outcome);
    if (process->acted && outcome == OUTCOME_ABANDONED && socket && socket->peer_closed)
        return ENDED_CLIENT_CLOSED_REQUEST; /* before a post_action without an upstream */
    if (was_finalized(process, load_address))
        return outcome == OUTCOME_WHOLE ? ENDED_WHOLE : ending_of_outcome(process, outcome);
    if (status == SWITCHING_PROTOCOLS || !socket)
        return ENDED_WHOLE;
    if (status == REQUEST_TIME_OUT || write_timed_out(process))
        return ENDED_TIMEOUT;
    if (had_answered(process, record->bytes_sent, status))
        return ENDED_WHOLE;
    if (did_client_leave(process, socket, record))
        return ENDED_CLIENT_CLOSED_REQUEST;
    if (outcome == OUTCOME_INCOMPLETE)
        return ENDED_UPSTREAM_INCOMPLETE;
    if (outcome == OUTCOME_TIMEOUT)
        return ENDED_UPSTREAM_TIMEOUT;
    if (!record->bytes_sent && (record->rc || status == NO_RESPONSE))
        return ENDED_WHOLE;
    if (has_sent_header(process, record->bytes_sent) && outcome == OUTCOME_WHOLE && has_lingered(process, socket, load_address))
        return ENDED_WHOLE; /* nginx waited for the rest of the request */
    return is_exiting(load_address) ? ENDED_SHUTDOWN : ENDED_ABORTED;
}

/* Tells whether the request ended with its last response byte: nginx had no more work with the request afterwards. */
static __always_inline bool ends_with_write(
    struct process *process, struct socket *socket, const struct request_record *record, u64 load_address)
{
    return socket && record->last_write_ns && record->ending == ENDED_WHOLE && !record->rc
        && final_status(record) != SWITCHING_PROTOCOLS
        && (record->last_write_ns >= process->turn_began_ns || has_lingered(process, socket, load_address));
}

static __always_inline struct upstream_attempt *attempt_of(struct process *process, u32 index)
{
    return (struct upstream_attempt *)(process->record + sizeof(struct request_record) + index * sizeof(struct upstream_attempt));
}

/* Returns an attempt's outcome, if the attempt was the last of its request. OUTCOME_ABANDONED: only the request's end
 * tells more. With `--detail request`, no socket tells whether the peer closed the connection. Over TLS, no socket
 * tells it either, if nginx does not buffer. */
static __always_inline u8 outcome_of(struct process *process, const struct attempt_state *ended, const struct upstream_attempt *attempt)
{
    u8 *part = process->upstream_end; /* length, …, state */
    if (attempt->header_msec == -1ULL || !attempt->status || attempt->status == SWITCHING_PROTOCOLS
        || bpf_probe_read_user(part, sizeof(process->upstream_end), (void *)(ended->upstream + UPSTREAM_END)) != 0
        || *(u64 *)(part + OFFSET_ngx_http_upstream_s__state - UPSTREAM_END) != ended->state)
        return OUTCOME_WHOLE;
    s64 length = *(s64 *)(part + OFFSET_ngx_http_upstream_s__length - UPSTREAM_END);
    u64 pipe = *(u64 *)(process->upstream_middle + OFFSET_ngx_http_upstream_s__pipe - UPSTREAM_MIDDLE);
    u32 response = response_state(pipe, length, ended->peer_closed || attempt->tls || DETAIL_REQUEST);
    if (response == RESPONSE_WHOLE)
        return OUTCOME_WHOLE;
    if (response == RESPONSE_CLOSED || ended->peer_closed || DETAIL_REQUEST)
        return OUTCOME_INCOMPLETE;
    return response == RESPONSE_FAILED ? OUTCOME_TIMEOUT : OUTCOME_ABANDONED;
}

/* Sets what the request's end tells about an attempt's end: whose fault it was, and when the exchange ended. */
static __always_inline void conclude(struct process *process, const struct request_record *record, struct upstream_attempt *attempt)
{
    bool answered = attempt->header_msec != -1ULL && attempt->status;
    bool aborted = record->ending == ENDED_ABORTED;
    bool given_up =
        record->ending == ENDED_CLIENT_CLOSED_REQUEST || record->ending == ENDED_TIMEOUT || record->ending == ENDED_SHUTDOWN;
    if (answered && attempt->outcome == OUTCOME_ABANDONED && !given_up)
        attempt->outcome = aborted || attempt->tls ? OUTCOME_INCOMPLETE : OUTCOME_TIMEOUT;
    if (!answered && (given_up || aborted) && !attempt->connect_errno && attempt->ended_ns >= process->turn_began_ns)
        attempt->outcome = OUTCOME_ABANDONED;
    attempt->ends_with_read = answered && attempt->last_read_ns && attempt->outcome == OUTCOME_WHOLE
        && attempt->status != SWITCHING_PROTOCOLS;
}
