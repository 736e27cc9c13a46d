/*
 * What the probes remember between their hits: processes, sockets, running requests, finished upstream attempts.
 *
 * The loader puts in front of this text: record.h, x86_64.h, context.h, and from the layout and the binary
 *     OFFSET_<struct>__<member>, SIZEOF_<struct>    bytes
 *     SITE_ngx_http_free_request, ADDRESS_ngx_http_core_module    virtual addresses in the binary
 *     SAMPLE_…, KEEP_…, PROPAGATOR_…, ADOPT_UPSTREAM_CONTEXT, PROPAGATE    the settings: sampling.py
 *     FOLLOW_ALL    1: every process that hits a probe is traced; 0: only those the agent named, and their children
 *     FOLLOW_FORKS    1: a fork's result is the child's pid as the agent counts; 0: nginx has another pid namespace
 *     PID_NAMESPACE_DEVICE, PID_NAMESPACE_INODE    the agent's, unless that is the host's
 *     REQUEST_METRICS    1: the durations of all requests are counted (metrics.c)
 *     DETAIL_REQUEST    1: there is one probe, at a request's end, and no tracepoint of system calls
 *     ACTIVE_REQUESTS_MAX, RING_BUFFER_PAGES
 * BCC rewrites only the main text, so maps and handlers stand in .c files that are joined into one.
 */

#define PROCESSES_MAX 512
#define SOCKETS_MAX 65536
#define FLUSHES_MAX 16384

#define TIMES_REQUESTS (REQUEST_METRICS || KEEP_SLOWER_THAN_NS) /* the kernel is to know how long they took */

/* Room for a bulk read of the struct; the largest of nginx 1.14-1.31 is 1,560 bytes. */
#define REQUEST_BYTES_MAX 2048

struct ngx_str {
    u64 len;
    u64 data;
};

/* The headers that tell of a trace. */
enum context_header {
    HEADER_TRACEPARENT,
    HEADER_TRACESTATE,
    HEADER_B3,
    HEADER_B3_TRACE_ID,
    HEADER_B3_SPAN_ID,
    HEADER_B3_SAMPLED,
    HEADER_B3_FLAGS,
    HEADER_REQUEST_ID,
    CONTEXT_HEADERS,
};

#define HEADERS_IN_PART 20    /* ngx_list_init(&r->headers_in.headers, r->pool, 20, …), in every protocol; a longer list has more parts */
#define TRACESTATE_LINES_MAX 4

/* What was decided of a request. */
struct request_trace {
    u64 trace_id_high;
    u64 trace_id_low;
    u64 parent_span_id;
    u8 flags;
    u8 sampled;
    u8 parent_said_no;
    u8 has_tracestate;        /* the context is W3C's, and valid */
    u32 reserved;
};

struct attempt_state {
    struct upstream_attempt attempt;
    u64 state;                /* ngx_http_upstream_state_t *; stays readable to the request's end: pools free nothing before */
    u64 upstream;             /* ngx_http_upstream_t *; the same */
    u64 request;              /* the subrequest's ngx_http_request_t *, or 0 */
    u64 serial;               /* its worker's number for it */
    s32 fd;
    u8 settled;               /* `attempt` has its times; else its socket has them */
    u8 peer_closed;           /* end of file, or an error, before that */
    u16 reserved;
};

#if REQUEST_METRICS
struct duration_name {
    u64 bytes;
    u8 text[NAME_BYTES_MAX];
};

struct client_key {
    struct client_series series;
    u8 peer[PEER_BYTES_MAX];
};
#endif

struct process {
    u64 known_since_ns;       /* its system calls are seen since then. The first member: the agent writes it (kernel/attachment.py) */
    u64 last_event_ns;        /* the worker's latest system call exit or probe hit: what comes next began no earlier */
    u64 turn_began_ns;        /* epoll_wait() returned last */
    u64 wanted_until_ns;      /* a socket's ngx_connection_t is not known, and looked for among events */
    u64 attempt_serial;       /* the latest attempt's */
    s32 latest_read_fd;       /* what was read last in this turn; -1: nothing */
    u32 system_call_seen;     /* its latest one's end, by sys_exit */
    u32 core_module_index_known;
    u64 core_module_index;
    u64 plain_requests;
    u8 request[REQUEST_BYTES_MAX]; /* scratch: a worker runs one probe at a time, while a CPU may be shared by many */
    u8 connection[512];
    u8 upstream_state[256];
    u8 headers[HEADERS_IN_PART * SIZEOF_ngx_table_elt_t];
    u64 headers_read; /* how many; to the verifier any number whenever it is read */
    u8 header_part[24];
    u64 header_lines[CONTEXT_HEADERS];
    struct ngx_str header_values[CONTEXT_HEADERS];
    struct ngx_str tracestate[TRACESTATE_LINES_MAX];
    u8 context_value[CONTEXT_VALUE_BYTES];
    struct trace_context incoming;
    struct trace_context told;
    u64 client_span_id;
    struct request_trace trace;
    u64 found_at;
    struct layout_look layout;
    struct layout_trust layout_trust[LAYOUT_PARTS];
    struct attempt_state attempt;
    struct ngx_str method_name;                /* as the client sent it */
    u64 upstream_configurations[ATTEMPTS_MAX]; /* of the request's attempts: ngx_http_upstream_srv_conf_t * */
    u64 attempt_peers[ATTEMPTS_MAX];           /* ngx_str_t * */
    u64 seen_peers[ATTEMPTS_MAX];              /* the main request's among them */
    u64 unseen_peers[ATTEMPTS_MAX];
    u64 seen_peers_count;
    u64 unseen_peers_count;
    u64 next_seen;
    u64 main_tls;                              /* that attempt's */
    u64 main_outcome;                          /* enum outcome, of the main request's last attempt */
    u64 exchange_ns[ATTEMPTS_MAX];             /* 0: the attempt had none. This and the next two: if TIMES_REQUESTS */
    u64 last_end_ns;
    u64 request_ns;
#if REQUEST_METRICS
    u64 attempt_states[ATTEMPTS_MAX];
    u64 method;
    struct duration_name name;
    struct client_key client_key;
#endif
    u64 record_bytes;
    u8 record[RECORD_BYTES_MAX];
};

/* What comes to a running request. */
struct request_progress {
    u64 body_read_ns;
    u32 attempts;
    u32 body_unseen;          /* of a stream: a part of its body came, and nothing says when */
};

struct socket {
    u64 running;              /* a client's request that no probe has marked. The first member: the agent reads it (kernel/attachment.py) */
    u64 opened_ns;            /* accept() or socket() returned; 0: before the agent came, or a kept-alive upstream connection */
    u64 ready_ns;             /* getsockopt(SO_ERROR) was 0: nginx asks when it is about to send an upstream request */
    u64 connect_failed_ns;
    u64 first_read_ns;        /* of a client connection, since its last request's end: the next request's first bytes */
    u64 first_read_began_ns;  /* that read began, at the earliest */
    u64 last_read_ns;
    u64 request_read_ns;      /* the last read before the first write: of a client connection, the request's last bytes */
    u64 first_write_ns;
    u64 last_write_ns;
    u64 tls_connection;       /* of a client over TLS: the ngx_connection_t * of its last request; 0: had none */
    u32 connect_errno;
    u16 client;               /* 0: an upstream's, or a client's that is older than the probes, until its first request has ended */
    u8 tls;
    u8 datagrams;             /* HTTP/3's listening socket: recvmsg() is for nothing else */
    u8 peer_closed;           /* end of file was read, or an error: the peer has gone */
    u8 lingers;               /* of a client connection: nginx has shut its side, and waits for the client to end */
    u8 announced;             /* of an upstream connection: nginx is about to send */
    u8 reserved;
    u32 attempt_index;        /* of an upstream connection: the attempt that it serves, or served last */
    u64 attempt_serial;       /* 0: none */
    u64 client_connection;    /* of that attempt's request: ngx_connection_t * */
    u64 connection;           /* its own ngx_connection_t *; 0: not known */
    u64 earlier_write_ns;     /* of a client over TLS: the last write but one */
    u64 last_sent;            /* and ngx_connection_s.sent at the last one: without that one's bytes */
    u64 flush_began_ns;       /* of an HTTP/2 client connection: its frames were last to be sent */
    u64 requests;             /* that ended on this client connection */
    u64 next_began_ns;        /* the next one, whose first bytes had come with the last one's; 0: it did not */
    struct request_progress progress;
};

/* Every key begins with the process: the agent finds by it what a dead worker left behind. */
struct socket_key {
    u32 tgid;
    s32 fd;
};

struct request_key {
    u32 tgid;
    u32 reserved;
    u64 connection;           /* the client's ngx_connection_t *; a stream of HTTP/2 has its own */
};

/* A request whose beginning a probe has marked, or a stream that has an upstream. A plain HTTP/1 request has none while that
 * probe is let go: its client's socket tells all of it. */
struct active_request {
    u64 created_ns;           /* 0: no probe has marked it */
    u64 read_ns;              /* the client socket's last read when the request was created; 0: none since an earlier one's end */
    u64 first_write_ns;       /* HTTP/2: its first frame was handed to the connection */
    u64 last_flush_ns;        /* HTTP/2: its last one was */
    u64 body_wanted_ns;       /* HTTP/2: nginx began to read its body */
    struct request_progress progress;
#if PROPAGATE
    struct request_trace trace;
    u64 told_span_id;         /* written into the request's headers; 0: not */
    u64 decided;
#endif
};

struct attempt_key {
    u32 tgid;
    u32 index;
    u64 connection;
};

/* When what an HTTP/2 connection had to send at a time was written. */
struct flush_key {
    u32 tgid;
    s32 fd;
    u64 began_ns;
};

BPF_TABLE("hash", u32, struct process, processes, PROCESSES_MAX);
BPF_ARRAY(new_processes, struct process, 1); /* all zero: too large for the stack */
BPF_ARRAY(live, u32, 1); /* 1: every probe is attached. Before that no process is known, so that none is seen in part */
BPF_TABLE("hash", struct socket_key, struct socket, sockets, SOCKETS_MAX);
BPF_TABLE("hash", struct request_key, struct active_request, active_requests, ACTIVE_REQUESTS_MAX);
BPF_TABLE("hash", struct attempt_key, struct attempt_state, attempts, ACTIVE_REQUESTS_MAX);
BPF_TABLE("lru_hash", struct flush_key, u64, flush_ends, FLUSHES_MAX);
BPF_F_TABLE("array", u32, u64, loss_counts, LOSS_CAUSES, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, u64, beginnings, BEGINNINGS, BPF_F_MMAPABLE);
BPF_RINGBUF_OUTPUT(records, RING_BUFFER_PAGES);

static __always_inline void count_loss(u32 cause)
{
    u64 *count = loss_counts.lookup(&cause);
    if (count)
        lock_xadd(count, 1);
}

/* Thread and process as the agent counts them: in its own pid namespace. 0: a process that is not in it. */
static __always_inline u64 current_pid_tgid(void)
{
#ifdef PID_NAMESPACE_INODE
    struct bpf_pidns_info ids = {};
    if (bpf_get_ns_current_pid_tgid(PID_NAMESPACE_DEVICE, PID_NAMESPACE_INODE, &ids, sizeof(ids)) != 0)
        return 0;
    return (u64)ids.tgid << 32 | ids.pid;
#else
    return bpf_get_current_pid_tgid();
#endif
}

static __always_inline u32 current_tgid(void)
{
    return current_pid_tgid() >> 32;
}

static __always_inline void add_process(u32 tgid)
{
    u32 zero = 0;
    struct process *fresh = new_processes.lookup(&zero);
    if (!fresh)
        return;
    processes.insert(&tgid, fresh);
    struct process *process = processes.lookup(&tgid);
    if (!process)
        count_loss(LOST_PROCESSES_FULL);
    else if (!process->known_since_ns)
        process->known_since_ns = bpf_ktime_get_ns();
}

static __always_inline bool is_live(void)
{
    u32 zero = 0, *all_attached = live.lookup(&zero);
    return all_attached && *all_attached;
}

/* The process that hits a uprobe. NULL: it is not to be traced. */
static __always_inline struct process *probed_process(u32 tgid)
{
    struct process *process = processes.lookup(&tgid);
#if FOLLOW_ALL
    if (!process && tgid && is_live()) {
        add_process(tgid);
        process = processes.lookup(&tgid);
    }
#endif
    return process;
}

/* Empty. Linux 6.13 and later give a program a stack that is its processor's alone, unless it can make a tail call. A uprobe's
 * program can be preempted (PREEMPT_LAZY, PREEMPT), and another worker's run on that processor then overwrites the stack of the
 * first: seen on 7.2 as a crash of the kernel. */
BPF_PROG_ARRAY(no_programs, 1);

/* For every program of a uprobe, somewhere. */
static __always_inline void want_no_private_stack(struct pt_regs *ctx)
{
    no_programs.call(ctx, 0);
}

/* What every uprobe begins with. NULL: the process is not to be traced. */
static __always_inline struct process *entered(struct pt_regs *ctx, u32 *tgid, u64 *now)
{
    *now = bpf_ktime_get_ns();
    *tgid = current_tgid();
    if (!*tgid) { /* in another pid namespace */
        want_no_private_stack(ctx);
        return NULL;
    }
    struct process *process = probed_process(*tgid);
    if (process)
        process->last_event_ns = *now;
    return process;
}

/* Counts up to a number that the verifier need not know. clang would make of two conditions one that compares for equality
 * with the smaller number, which the verifiers of older kernels cannot follow: it must not see both. */
#define EACH(i, count, limit)                                                                                          \
    for (u32 i = 0; i < (limit) && ({ asm volatile("" : "+r"(count)); i < (count); }); i++)

/* A place among ATTEMPTS_MAX, as the verifier sees it: clang would leave out what it can prove, and the verifier forget that. */
static __always_inline u64 slot(u64 index)
{
    asm volatile("%[index] &= %[mask]" : [index] "+r"(index) : [mask] "i"(ATTEMPTS_MAX - 1));
    return index;
}

/* Never 0, which is no id. */
static __always_inline u64 random_id(void)
{
    u64 id = (u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32();
    return id ? id : 1;
}

/* Reads nginx's memory. False: counted, and the caller gives up. */
static __always_inline bool read_memory(void *to, u32 bytes, u64 address)
{
    if (bpf_probe_read_user(to, bytes, (void *)address) == 0)
        return true;
    count_loss(LOST_READ_FAILED);
    return false;
}

static __always_inline bool read_pointer(u64 *value, u64 address)
{
    return read_memory(value, sizeof(*value), address);
}

#define HTTP_MODULE 0x50545448 /* "HTTP", r->signature */
