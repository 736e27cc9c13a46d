/*
 * nginx's error log: which request a line is for, which attempt, and its text.
 *
 * nginx calls ngx_log_error_core() only for a level that the log has. It makes the line on its stack, and writes it to each of the
 * log's targets: to a file by write(), to syslog by send(). The probe at its beginning finds the request. The first write that
 * follows on the same thread, from that part of the stack, has the text; sys_exit sees it. A line that nginx does not write is none.
 *
 * Lines are sent when nginx writes them. When their request ends, user space is told how many there are, just before the request's
 * record.
 */

#if ERROR_LOG
#define LOG_LEVEL_ERROR 4     /* NGX_LOG_ERR */
#define LOG_STACK_BYTES 16384 /* ngx_log_error_core() and ngx_syslog_writer() have buffers of 2 KiB each */
#define LOG_CTX_REQUEST (OFFSET_ngx_http_log_ctx_t__connection + 8) /* ngx_http_log_ctx_t: connection, request, current_request */
#define SECOND_NS 1000000000ULL

static __always_inline bool is_request(u64 request)
{
    return (u32)word_at(request + OFFSET_ngx_http_request_s__signature) == HTTP_MODULE;
}

/* Finds the running request for which a log is used. log->data is an ngx_http_log_ctx_t only in the log of a client's connection or
 * stream: then all of them point to each other. Returns 0 if it is another log, or no request runs. */
static __always_inline u64 logged_request(struct log_line *line, u64 log, u64 log_ctx, u64 connection)
{
    u64 request = word_at(log_ctx + LOG_CTX_REQUEST);
    if (word_at(connection + OFFSET_ngx_connection_s__log) != log || !is_request(request)
        || word_at(request + OFFSET_ngx_http_request_s__connection) != connection
        || word_at(request + OFFSET_ngx_http_request_s__main) != request)
        return 0;
    line->connection = word_at(connection + OFFSET_ngx_connection_s__number);
    line->connection_requests = word_at(connection + OFFSET_ngx_connection_s__requests);
    return word_at(log + LOG_CONNECTION) == line->connection ? request : 0;
}

/* Notes the latest attempt of the (sub)request for which nginx logs. */
static __always_inline void note_logging_attempt(struct log_line *line, struct request_key *key, u64 request, u64 current)
{
    struct attempt_key attempt_key = {.tgid = key->tgid, .connection = key->connection};
    line->attempt = NO_ATTEMPT;
    if (!is_request(current) || word_at(current + OFFSET_ngx_http_request_s__main) != request)
        return;
    u64 upstream = word_at(current + OFFSET_ngx_http_request_s__upstream);
    u64 state = upstream ? word_at(upstream + OFFSET_ngx_http_upstream_s__state) : 0;
    struct request_progress *progress = state ? find_progress(key, request) : NULL;
    if (!progress)
        return;
    u32 count = progress->attempts;
    EACH(i, count, ATTEMPTS_MAX) {
        attempt_key.index = i;
        struct attempt_state *attempt = attempts.lookup(&attempt_key);
        if (attempt && attempt->state == state)
            line->attempt = i;
    }
}

/* Tells whether a worker may send another line in this second. */
static __always_inline bool has_time_for_a_line(struct process *process, u64 now)
{
    if (now - process->log_second_ns >= SECOND_NS) {
        process->log_second_ns = now;
        process->log_second_lines = 0;
    }
    return process->log_second_lines++ < LOG_LINES_PER_SECOND_MAX;
}

/* The write of a line follows. */
static __always_inline void expect_line(struct pt_regs *ctx, struct process *process, struct caller *caller, u64 level, u64 now)
{
    struct log_line *line = &process->log_line;
    line->marker = LOG_MARKER;
    line->logged_ns = now;
    line->worker_pid = caller->tgid;
    line->error_number = PT_REGS_PARM3(ctx);
    line->level = level;
    caller->log_stack = PT_REGS_SP(ctx);
}

/* The write of a line follows that is for no running request. */
static __always_inline void expect_other_line(struct pt_regs *ctx, struct process *process, struct caller *caller, u64 log, u64 level,
                                              u64 now)
{
    if (!has_time_for_a_line(process, now)) {
        count_loss(PARTIAL_LOG_LINES_LIMIT);
        return;
    }
    process->log_line.connection = word_at(log + LOG_CONNECTION);
    process->log_line.connection_requests = 0;
    process->log_line.attempt = NO_ATTEMPT;
    process->logged_key.connection = 0;
    expect_line(ctx, process, caller, level, now);
}

/* ngx_log_error_core(ngx_uint_t level, ngx_log_t *log, ngx_err_t err, const char *fmt, ...) */
int enter_ngx_log_error_core(struct pt_regs *ctx)
{
    u64 now, level = PT_REGS_PARM1(ctx), log = PT_REGS_PARM2(ctx), pid_tgid = current_pid_tgid();
    u32 tgid = pid_tgid >> 32;
    if (level > LOG_LEVEL)
        return 0;
    if ((u32)pid_tgid != tgid) { /* a thread pool's thread, beside the worker */
        if (processes.lookup(&tgid))
            count_loss(PARTIAL_LOG_LINES_UNATTACHED);
        return 0;
    }
    struct process *process = entered(ctx, &tgid, &now);
    struct caller *caller = find_caller(tgid);
    if (!process || !caller)
        return 0;
    struct log_line *line = &process->log_line;
    u64 log_ctx = word_at(log + OFFSET_ngx_log_s__data);
    struct request_key key = {.tgid = tgid, .connection = word_at(log_ctx + OFFSET_ngx_http_log_ctx_t__connection)};
    caller->log_stack = 0;
    u64 request = logged_request(line, log, log_ctx, key.connection);
    if (request && line->connection == process->ended_connection && line->connection_requests == process->ended_connection_requests) {
        count_loss(PARTIAL_LOG_LINES_UNATTACHED); /* its record is gone */
        request = 0;
    }
    if (!request) {
        if (OTHER_LOG_LINES)
            expect_other_line(ctx, process, caller, log, level, now);
        return 0;
    }

    struct logged_request *logged = logged_requests.lookup(&key);
    if (!logged || logged->connection != line->connection || logged->connection_requests != line->connection_requests) {
        struct logged_request first = {
            .connection = line->connection, .connection_requests = line->connection_requests, .level = level};
        process->logged_requests++;
        logged_requests.update(&key, &first);
        logged = logged_requests.lookup(&key);
    }
    if (!logged)
        return 0;
    if (level < logged->level)
        logged->level = level;
    if (logged->lines >= LOG_LINES_MAX || !has_time_for_a_line(process, now)) {
        count_loss(PARTIAL_LOG_LINES_LIMIT);
        return 0;
    }
    note_logging_attempt(line, &key, request, word_at(log_ctx + OFFSET_ngx_http_log_ctx_t__current_request));
    process->logged_key = key;
    expect_line(ctx, process, caller, level, now);
    return 0;
}

/* Tells whether a write has written the line that is expected: write(fd, data, bytes), sendto(fd, data, bytes, …). */
static __always_inline bool is_line(const struct caller *caller, const struct syscall_entry *entry)
{
    return (entry->number == SYS_write || entry->number == SYS_sendto) && caller->log_stack - entry->argument2 < LOG_STACK_BYTES;
}

/* Sends the line that a system call has written. */
static __always_inline void send_line(struct process *process, struct caller *caller, const struct syscall_entry *entry)
{
    struct log_line *line = (struct log_line *)process->record;
    u64 bytes = entry->argument3;
    caller->log_stack = 0; /* the other targets get the same line */
    bool other = OTHER_LOG_LINES && !process->logged_key.connection;
    struct logged_request *logged = logged_requests.lookup(&process->logged_key);
    asm volatile("" : "+r"(bytes));
    if (bytes > LOG_LINE_BYTES_MAX)
        bytes = LOG_LINE_BYTES_MAX;
    if ((!logged && !other) || bpf_probe_read_user(line + 1, bytes, (void *)entry->argument2) != 0)
        return;
    *line = process->log_line;
    line->bytes = bytes;
    line->lines = 0;
    if (logged)
        line->lines = ++logged->lines;
    /* Of a request's lines, user space counts what is missing. */
    if (records.ringbuf_output(line, sizeof(*line) + bytes, BPF_RB_NO_WAKEUP) != 0 && other)
        count_loss(PARTIAL_LOG_LINES_UNSENT);
}

/* A request ends. process->connection holds its connection. */
static __always_inline void end_lines(struct process *process, struct request_key *key)
{
    struct log_line *end = &process->log_line;
    u64 connection = MEMBER(process->connection, u64, ngx_connection_s, number);
    u64 connection_requests = MEMBER(process->connection, u64, ngx_connection_s, requests);
    process->ended_connection = connection;
    process->ended_connection_requests = connection_requests;
    process->worst_level = 0;
    if (!process->logged_requests)
        return;
    struct logged_request *logged = logged_requests.lookup(key);
    if (!logged)
        return;
    end->marker = LOG_MARKER;
    end->connection = connection;
    end->connection_requests = connection_requests;
    end->worker_pid = key->tgid;
    end->level = 0;
    end->bytes = 0;
    end->lines = 0;
    if (logged->connection == connection && logged->connection_requests == connection_requests) {
        process->worst_level = logged->level;
        end->lines = logged->lines;
    }
    struct caller *caller = find_caller(key->tgid);
    if (caller)
        caller->log_stack = 0;
    process->logged_requests--;
    logged_requests.delete(key);
    if (end->lines)
        records.ringbuf_output(end, sizeof(*end), BPF_RB_NO_WAKEUP);
}
#endif
