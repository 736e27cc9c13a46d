/*
 * What the probes remember between their hits: processes, sockets, running requests, finished upstream attempts.
 *
 * planner/program.py puts in front of this text x86_64.h or arm64.h, helpers.h, record.h, metrics.h, trace_context.h, layout.h,
 * layout_upstream.h, text.h, and before them these constants:
 *     OFFSET_<struct>__<member>, SIZEOF_<struct>    the layout, in bytes
 *     BIT_<struct>__<member>    a bit-field, in bits
 *     SITE_ngx_http_free_request, ADDRESS_<symbol>    virtual addresses in the binary
 *     SAMPLE_…, KEEP_…, PROPAGATOR_…, ADOPT_UPSTREAM_CONTEXT, PROPAGATE, PROPAGATE_SOCKET, TRUSTED_PROXIES    the settings (planner/sampling.py)
 *     HASH_<header>, LENGTH_<header>, NAME_LOW_<header>, NAME_HIGH_<header>    nginx's hash of a header's name, and its bytes
 *     HTTP_CACHE    1: it is known where nginx keeps the status of its cache
 *     OF_FORK    1: the binary is a fork of nginx
 *     FOLLOW_ALL    1: trace every process that hits a probe; 0: only the processes that user space named, and their children
 *     FOLLOW_FORKS    1: the result of fork is the child's pid in user space too; 0: nginx has another pid namespace
 *     PID_NAMESPACE_DEVICE, PID_NAMESPACE_INODE    the pid namespace of user space, unless it is the host's
 *     RULES, RULES_…    the rules (planner/rules.py)
 *     REQUEST_METRICS    1: the durations of all requests are counted (metrics.c)
 *     EXPONENTIAL_HISTOGRAMS    1: they are counted in exponential buckets
 *     SERIES_BY_…    1: the metrics' series differ by this (metrics/choices.py)
 *     ERROR_LOG    1: the lines of nginx's error log are sent, up to the level LOG_LEVEL, nginx's number
 *     OTHER_LOG_LINES 1: also lines for no running request
 *     CAPTURES_HEADERS    1: headers are captured; CAPTURED_REQUEST_BITS, CAPTURED_RESPONSE_BITS, CAPTURED_NAMES_MAX (captured_headers.c)
 *     DETAIL_REQUEST    1: there is a single probe, at the end of a request, and no tracepoint of system calls
 *     ACTIVE_REQUESTS_MAX, RING_BUFFER_PAGES
 * BCC rewrites only the main text. So maps and handlers are in .c files, which program.py joins into one text.
 */

#define PROCESSES_MAX 512
#define CALLERS 8192 /* a power of two; so many more than processes that a process finds a place soon */
#define CALLERS_BITS 13
#define CALLER_PLACES 8
#define CALLER_GONE 0xffffffff
#define SOCKETS_MAX 65536
#define FLUSHES_MAX 16384

#define TELLS (PROPAGATE || PROPAGATE_SOCKET) /* upstreams are told the context: in nginx's memory, or on the socket */
/* Whether a request can be left out when its first attempt begins: nothing that is known later can keep it. */
#define LEAVES_OUT_EARLY                                                                                               \
    (!SAMPLE_ALWAYS && !KEEP_ERRORS && !KEEP_SLOWER_THAN_NS && !REQUEST_METRICS && !ADOPT_UPSTREAM_CONTEXT && !TELLS   \
     && !DETAIL_REQUEST && !RULES_KEEP)
#define TIMES_REQUESTS (REQUEST_METRICS || KEEP_SLOWER_THAN_NS || RULES_KEEP_SLOWER) /* whether the kernel program computes how long requests took */

/* Room for a read of the whole struct. The largest of nginx 1.14-1.31 has 1,560 bytes. */
#define REQUEST_BYTES_MAX 2048

/* Members that are read together. Forks may have them in another order. */
#define GREATER(one, other) ((one) > (other) ? (one) : (other))
#define LESS(one, other) ((one) < (other) ? (one) : (other))
#define UPSTREAM_MIDDLE LESS(OFFSET_ngx_http_upstream_s__pipe, OFFSET_ngx_http_upstream_s__upstream)
#define UPSTREAM_END LESS(OFFSET_ngx_http_upstream_s__length, OFFSET_ngx_http_upstream_s__state)
#define UPSTREAM_HEAD LESS(OFFSET_ngx_http_upstream_s__peer, OFFSET_ngx_http_upstream_s__request_bufs)
#define REQUEST_PART LESS(OFFSET_ngx_http_request_s__method, LESS(OFFSET_ngx_http_request_s__main, OFFSET_ngx_http_request_s__stream))
#ifdef OFFSET_ngx_connection_s__ssl
#define CONNECTION_HEAD_BYTES (GREATER(OFFSET_ngx_connection_s__log, OFFSET_ngx_connection_s__ssl) + 8)
#else
#define CONNECTION_HEAD_BYTES (OFFSET_ngx_connection_s__log + 8)
#endif

struct ngx_str {
    u64 len;
    u64 data;
};

/* The headers that carry a trace context. */
enum context_header {
    HEADER_TRACEPARENT,
    HEADER_TRACESTATE,
    HEADER_B3,
    HEADER_B3_TRACE_ID,
    HEADER_B3_SPAN_ID,
    HEADER_B3_SAMPLED,
    HEADER_B3_FLAGS,
    HEADER_REQUEST_ID,
    HEADER_FORWARDED,         /* from here on not a trace context; the last line counts */
    HEADER_X_FORWARDED_PROTO,
    HEADER_X_FORWARDED_HOST,
    CONTEXT_HEADERS,
};

#define HEADERS_IN_PART 20    /* ngx_list_init(&r->headers_in.headers, r->pool, 20, …), for every protocol; more headers take more parts */
#define TRACESTATE_LINES_MAX 4

#define SOCKADDR_BYTES 28 /* struct sockaddr_in6 */
#define SOCKADDR_WORDS 4

/* The decision about a request's trace. */
struct request_trace {
    u64 trace_id_high;
    u64 trace_id_low;
    u64 parent_span_id;
    u8 flags;
    u8 sampled;
    u8 parent_said_no;
    u8 has_tracestate;        /* the context is a valid W3C context */
    u32 dropped;              /* a rule leaves the request out */
};

#define KNOWN_NAMES_MAX 64 /* a power of two */

/* Where a name of nginx's configuration is. */
struct known_name {
    u64 key;                  /* the address of the configuration, and which name of it; 0: none */
    struct ngx_str name;
};

/* The request line that a peer is sent. */
struct sent_line {
    u64 text;                 /* its address; 0: not known */
    u64 bytes;
};

struct attempt_state {
    struct upstream_attempt attempt;
    u64 location;             /* the main request's r->loc_conf when the attempt began; 0: a subrequest's, or not known */
    u64 method_name;          /* r->method_name.data at that time */
    struct sent_line sent_line;
    u64 sent_host;            /* the address of the value of Host; 0: there is none */
    u64 sent_host_bytes;
    u64 state;                /* ngx_http_upstream_state_t *; readable until the request ends, because pools free nothing earlier */
    u64 upstream;             /* ngx_http_upstream_t *; readable as long as `state` */
    u64 request;              /* the subrequest's ngx_http_request_t *, or 0 */
    u64 serial;               /* the worker's number for this attempt */
    s32 fd;
    u8 settled;               /* 1: `attempt` has the times; 0: the socket has them */
    u8 peer_closed;           /* the socket saw end of file or an error before the attempt was settled */
    u8 acts;                  /* 1: of a post_action */
    u8 reserved;
#if PROPAGATE_SOCKET
    u64 told_span_id;         /* the span id that the peer was told on the socket; 0: none */
    u32 decided;              /* 1: `trace` is set. Only in a request's first attempt */
    u32 untold;               /* 1: the socket does not tell the peer. This was counted, if it should be told and is not told in memory */
    struct request_trace trace;
#endif
};

struct attempt_key {
    u32 tgid;
    u32 index;
    u64 connection;
};

/* The attempt that began in the latest system call. */
struct begun_attempt {
    struct attempt_key key;
    u64 main_request;
    u64 location;             /* r->loc_conf of the (sub)request */
    u64 request_bufs;         /* u->request_bufs */
    u64 is_new;
};

/* How much of what is sent to a peer is examined at once, in steps of 8 bytes and one more for each line. */
#define SENT_BYTES 256
#define SENT_STEPS_MAX 48
#define SENT_TURNS_MAX 24     /* parts and lines that count: enough for the longest request line of a record and for Host behind it */
#define SENT_GUARD 16         /* bytes in front of it and behind it that may be read, too */

/* Offsets in what is sent are from its beginning; `at` and `end` are from the beginning of the part in process->sent. */
struct sent_search {
    u64 start;                /* the address of what is sent */
    u64 bytes;
    u64 first;                /* the first 8 bytes */
    u64 at;
    u64 end;
    u64 before;               /* the offset of the part in process->sent */
    u64 is_last_part;
    u64 found;                /* 1: the line at `at` counts */
    u64 begins_line;          /* 1: a line begins at `at` */
    u64 is_header;            /* 1: the request line is over, and Host was not found yet */
    u64 line_end;             /* behind the request line and its line end; 0: not found */
    u64 version;              /* the request line's last 8 bytes */
    u64 host;                 /* where the value of Host begins; 0: not found */
    u64 host_end;             /* behind its line end; 0: not found */
};

#if REQUEST_METRICS
struct duration_name {
    u64 bytes;
    u8 text[NAME_BYTES_MAX];
};

struct client_key {
    struct client_series series;
    u8 peer[PEER_BYTES_MAX];
#if EXPONENTIAL_HISTOGRAMS
    struct place place;
#endif
};
#endif

/* request_progress.answer: how the response stood when nginx sent the request of a post_action. 0: it did not. */
#define ANSWER_NOTED 1
#define ANSWER_WHOLE 2        /* the client had been sent the whole response */
#define ANSWER_CUT 4          /* the client had been sent less than the response's length */
#define ANSWER_LEFT 8         /* the client had left */
#define ANSWER_STATUS 16      /* where the bits of $status begin */

/* What has happened to a running request. */
struct request_progress {
    u64 body_read_ns;
    u32 attempts;
    u32 body_unseen;          /* a part of a stream's body arrived at an unknown time */
    u64 answer;
#if LEAVES_OUT_EARLY
    u64 root_id;              /* the low half of the trace's id, if the trace begins here; 0: not decided yet */
    u64 left_out;             /* 1: the request has no context, and the sampler leaves it out. Its attempts are not kept */
#endif
};

struct socket {
    u64 running;              /* client: a request whose beginning no probe marked. Must be first: kernel/attachment.py reads it */
    u64 opened_ns;            /* accept() or socket() returned; 0: older than the probes, or a kept-alive upstream connection */
    u64 ready_ns;             /* getsockopt(SO_ERROR) returned 0: nginx calls it before it sends an upstream request */
    u64 connect_failed_ns;
    u64 first_read_ns;        /* client connection: the first read since the last request's end, which brings the next request */
    u64 first_read_began_ns;  /* the earliest beginning of that read */
    u64 last_read_ns;
    u64 request_read_ns;      /* the last read before the first write; client connection: it brought the request's last bytes */
    u64 first_write_ns;
    u64 last_write_ns;
    u64 handshake_ns;         /* client over TLS: from accept() to the end of the handshake; 0: not seen */
    u64 tls_connection;       /* client over TLS: the ngx_connection_t * of its last request; 0: no request yet */
    u32 connect_errno;
    u16 client;               /* 0: upstream connection, or a client's that is older than the probes, until its first request ends */
    u8 tls;
    u8 datagrams;             /* HTTP/3's listening socket: the only use of recvmsg() */
    u8 peer_closed;           /* a read returned end of file or an error: the peer is gone */
    u8 lingers;               /* client connection: nginx has shut down its side and waits for the client to close */
    u8 announced;             /* upstream connection: nginx is about to send */
    u8 sought;                /* epoll's events were searched for the connection: sockets that epoll does not watch are sought once */
    u32 attempt_index;        /* upstream connection: the attempt that it serves, or served last */
    u64 attempt_serial;       /* the serial of that attempt; 0: none */
    u64 client_connection;    /* the client's ngx_connection_t * of that attempt's request */
    u64 peer[SOCKADDR_WORDS]; /* client connection: the struct sockaddr that accept() returned; 0: not seen */
    u64 connection;           /* the socket's own ngx_connection_t *; 0: not known */
    u64 earlier_write_ns;     /* client over TLS: the last write but one */
    u64 last_sent;            /* client over TLS: ngx_connection_s.sent at the last write, without that write's bytes */
    u64 flush_began_ns;       /* HTTP/2 client connection: nginx last began to send frames */
    u64 requests;             /* the number of requests that ended on this client connection */
    u64 next_began_ns;        /* the next request began with the last one's end, as its first bytes had come earlier; 0: they had not */
    struct request_progress progress;
#if PROPAGATE_SOCKET
    u64 peer_number;          /* upstream connection: connection_number(), or NOT_OVER_TCP; 0: connect() was not seen */
    u64 cookie;
    u64 empty_ns;             /* since then FIONREAD says that there is nothing to read; 0: it says otherwise */
#endif
};

#if CAPTURES_HEADERS
#define CAPTURED_FOUND_MAX 32 /* a power of two */
#define CAPTURED_NAME_BYTES 64
#define CAPTURED_NAME_BYTES_MAX 56

/* A header that may be wanted. */
struct found_header {
    u64 address;              /* ngx_table_elt_t * */
    u64 kind;                 /* enum string_kind */
};
#endif

/* Every key begins with the process, so that user space finds the state of dead workers. */
struct socket_key {
    u32 tgid;
    s32 fd;
};

struct request_key {
    u32 tgid;
    u32 reserved;
    u64 connection;           /* the client's ngx_connection_t *; each stream of HTTP/2 has its own */
};

#if RULES
#define RULE_TEXT_BYTES 128   /* how much of a text before and after a * is compared. planner/rules.py has the limits, too */
#define RULE_PATH_BYTES 512   /* longer paths match only by their beginning; so do other texts */
#define RULE_TEXT_TOO_LONG (1ULL << 32)

#define RULE_TEXT(name)                                                                                                \
    u64 name##_bytes; /* 0: there is none; RULE_TEXT_TOO_LONG */                                                       \
    u8 name##_head[RULE_TEXT_BYTES];                                                                                   \
    u8 name##_tail[RULE_TEXT_BYTES] /* ends with the text's end */

/* What rules compare of a request. */
struct rule_facts {
    u64 status;               /* 0: not known yet */
    RULE_TEXT(server_name);
    RULE_TEXT(location);
    RULE_TEXT(method);
    RULE_TEXT(user_agent);
    u64 path_bytes;           /* without the query */
    u8 path_head[RULE_PATH_BYTES];
    u8 path_tail[RULE_TEXT_BYTES];
    u8 guard[RULE_TEXT_BYTES]; /* the verifier adds the largest offset and the largest length */
};

/* What holds for the request: what its rule says, else the settings. */
struct rule {
    u64 keep_slower_than_ns;
    u64 sample_ratio_bound;
    u32 number;               /* 0: no rule matches */
    u8 drops;
    u8 samples_by_parent;
    u8 samples_always;
    u8 unmeasured;
};
#endif

#define LONG_TURNS 16 /* a power of two */

/* A turn of a worker's event loop: from the return of epoll_wait() to the end of the last system call before the next one. */
struct turn {
    u64 began_ns;
    u64 ended_ns;
};

struct process {
    u64 known_since_ns;       /* system calls are seen since then. Must be first: kernel/attachment.py writes it */
    u64 turn_began_ns;        /* of its caller, as the running probe found it */
    u64 attempt_serial;       /* the serial of the latest attempt */
    s32 latest_read_fd;       /* as turn_began_ns */
    u32 core_module_index_known;
    u64 core_module_index;
    u64 keeps_configuration;  /* 1: the process's configuration does not change while it lives */
    u64 plain_requests;
    u64 long_turns_count;
    struct turn long_turns[LONG_TURNS];        /* the latest that took at least LONG_TURN_NS */
    u8 request[REQUEST_BYTES_MAX]; /* scratch memory, per worker: a worker runs one probe at a time, but several workers share a CPU */
    u8 connection[512];
    u8 upstream_state[256];
    u8 upstream_head[GREATER(OFFSET_ngx_http_upstream_s__peer, OFFSET_ngx_http_upstream_s__request_bufs) + 8 - UPSTREAM_HEAD];
    u8 upstream_middle[GREATER(OFFSET_ngx_http_upstream_s__pipe, OFFSET_ngx_http_upstream_s__upstream) + 8 - UPSTREAM_MIDDLE];
    u8 upstream_connection[CONNECTION_HEAD_BYTES];
    u8 request_head[GREATER(OFFSET_ngx_http_request_s__loc_conf,
                            GREATER(OFFSET_ngx_http_request_s__upstream, OFFSET_ngx_http_request_s__upstream_states)) + 8];
    u8 request_part[GREATER(OFFSET_ngx_http_request_s__method_name + 8,
                            GREATER(OFFSET_ngx_http_request_s__main, OFFSET_ngx_http_request_s__stream)) + 8 - REQUEST_PART];
    u8 upstream_end[GREATER(OFFSET_ngx_http_upstream_s__length, OFFSET_ngx_http_upstream_s__state) + 8 - UPSTREAM_END];
    u8 headers[HEADERS_IN_PART * SIZEOF_ngx_table_elt_t];
    u64 headers_read; /* the number of headers; read as volatile, so that the verifier assumes any number */
    u64 headers_address;                       /* where nginx has `headers`; 0: `headers` are another request's */
    u64 header[SIZEOF_ngx_table_elt_t / 8];
    u8 header_part[24];
    u64 header_lines[CONTEXT_HEADERS];
    struct ngx_str header_values[CONTEXT_HEADERS];
    struct ngx_str tracestate[TRACESTATE_LINES_MAX];
    u8 context_value[CONTEXT_VALUE_BYTES];
    struct trace_context incoming;
    struct trace_context told;
    u64 client_span_id;
    struct request_trace trace;
    u64 root_id;                               /* as in struct request_progress */
    u64 found_at;
    struct layout_look layout;
    struct layout_trust layout_trust[LAYOUT_PARTS];
    struct attempt_state attempt;
    struct socket opened_socket;               /* too large for the stack */
    struct begun_attempt begun;
    struct sent_search sent_search;
    u8 sent[SENT_GUARD + SENT_BYTES + SENT_GUARD]; /* a part of what is sent to a peer */
    u64 redirected_method;                     /* the data of ngx_http_core_get_method; 0: not known */
    u64 header_pos;                            /* r->header_in->pos, last and start */
    u64 header_last;
    u64 header_start;
    u64 location;                              /* r->loc_conf of the location that the client asked for; 0: not known */
    u64 location_method;                       /* r->method_name.data when the request was there */
    u64 last_sent_line;
    u64 peer[SOCKADDR_WORDS];                  /* as in struct socket */
    struct ngx_str method_name;                /* as the client sent it */
    struct known_name known_names[KNOWN_NAMES_MAX];
    u64 upstream_configurations[ATTEMPTS_MAX]; /* of the request's attempts: ngx_http_upstream_srv_conf_t * */
    u64 attempt_peers[ATTEMPTS_MAX];           /* ngx_str_t * */
    struct sent_line sent_lines[ATTEMPTS_MAX];
    u64 seen_peers[ATTEMPTS_MAX];              /* the peers of the main request's own attempts */
    u64 seen_states[ATTEMPTS_MAX];             /* their ngx_http_upstream_state_t * */
    u64 unseen_peers[ATTEMPTS_MAX];
    u64 seen_peers_count;
    u64 unseen_peers_count;
    u64 next_seen;
    u64 main_tls;                              /* the main request's last attempt used TLS */
    u64 main_outcome;                          /* enum outcome of the main request's last attempt, before a post_action */
    u64 version_lost;                          /* nginx has overwritten the client's version: for a post_action, or for a peer's
                                                  response without a status line */
    u64 acted;                                 /* nginx ran a post_action on the request */
    u64 answer;                                /* request_progress.answer then, else 0 */
    u64 last_location;                         /* r->loc_conf of the main request's last attempt before a post_action; 0: none */
    u64 exchange_ns[ATTEMPTS_MAX];             /* how long each attempt's exchange took; 0: no exchange. It and the
                                                  next two need TIMES_REQUESTS */
    u64 last_end_ns;
    u64 request_ns;
#if RULES
    struct rule rule;
    struct rule_facts rule_facts;
    u64 rule_path_end;
#endif
#if REQUEST_METRICS
    u64 attempt_states[ATTEMPTS_MAX];
    struct duration_name name;
    struct client_key client_key;
#endif
#if PROPAGATE_SOCKET
    u64 announces;                             /* the next three are of a request that nginx is about to send */
    u64 told_request;                          /* the main request's ngx_http_request_t * */
    u64 told_upstream;                         /* ngx_http_upstream_t * */
#endif
#if ERROR_LOG
    struct log_line log_line;                  /* a line that nginx is about to write */
    u64 log_second_ns;
    u64 log_second_lines;
    u64 logged_requests;                       /* the number of the worker's entries in the map logged_requests, or more */
    u64 ended_connection;                      /* the last request that ended: its connection, and its number there */
    u64 ended_connection_requests;
    u64 worst_level;                           /* the lowest level that nginx logged for that request; 0: none */
    struct request_key logged_key;
#endif
#if CAPTURES_HEADERS
    struct found_header found_headers[CAPTURED_FOUND_MAX]; /* the last one is never used */
    u64 found_headers_count;
    u64 found_too_many;                        /* 1: there are more */
    u8 header_name[CAPTURED_NAME_BYTES];
#endif
    u64 record_bytes;
    u8 record[RECORD_BYTES_MAX];
};

/* What each system call of a traced process needs. */
struct caller {
    u32 tgid;                 /* 0: nobody was here yet; CALLER_GONE: nobody is here any more */
    u32 system_call_seen;     /* sys_exit saw the end of the worker's latest system call */
    u64 last_event_ns;        /* the worker's latest system call exit or probe hit: the next event began no earlier */
    u64 turn_began_ns;        /* the last return of epoll_wait() */
    u64 wanted_until_ns;      /* until then, search epoll's events for the unknown ngx_connection_t of a socket */
    s32 latest_read_fd;       /* the descriptor of the last read in this turn; -1: none */
    s32 told_fd;              /* --propagate on the socket: the connection on which a request is announced; 0: none */
    u64 log_stack;            /* a line for nginx's error log is expected; the address on the stack below which nginx makes it; 0: none */
    u64 reserved;             /* up to a cache line */
};

#if ERROR_LOG
/* A running request for which nginx has logged something. The first two members are as in struct log_line. */
struct logged_request {
    u64 connection;
    u64 connection_requests;
    u32 level;                /* the lowest, which is the worst */
    u32 lines;                /* how many were sent */
};
#endif

/* A request whose beginning a probe has marked, or a stream with an upstream. While that probe is detached, a plain HTTP/1
 * request has no active_request: the client's socket has all its times. */
struct active_request {
    struct request_progress progress; /* first: clang would add an offset before it tests the pointer, which the verifier refuses */
    u64 created_ns;           /* 0: no probe has marked the beginning */
    u64 read_ns;              /* the client socket's last read when the request was created; 0: no read since the earlier request's end */
    u64 first_write_ns;       /* HTTP/2: the request's first frame was handed to the connection */
    u64 last_flush_ns;        /* HTTP/2: the request's last frame was handed to the connection */
    u64 body_wanted_ns;       /* HTTP/2: nginx began to read the request's body */
#if PROPAGATE
    struct request_trace trace;
    u64 told_span_id;         /* the span id that was written into the request's headers; 0: none */
    u64 decided;              /* 1: `trace` is set */
#endif
};

/* An HTTP/2 connection that began to send at a time. The value is the time of the last write. */
struct flush_key {
    u32 tgid;
    s32 fd;
    u64 began_ns;
};

/* Every system call of the machine looks here first, so this is an array, which costs less than a hash. A process is at the place that
 * its pid gives, or at one of the next places (kernel/callers.py). */
BPF_ARRAY(callers, struct caller, CALLERS);
BPF_TABLE("hash", u32, struct process, processes, PROCESSES_MAX);
BPF_ARRAY(new_processes, struct process, 1); /* all zero; too large for the stack */
BPF_ARRAY(new_sockets, struct socket, 1);    /* as well */
BPF_ARRAY(live, u32, 1); /* 1: all probes are attached. Earlier no process is added, because only some probes would see it */
BPF_TABLE("hash", struct socket_key, struct socket, sockets, SOCKETS_MAX);
BPF_TABLE("hash", struct request_key, struct active_request, active_requests, ACTIVE_REQUESTS_MAX);
BPF_TABLE("hash", struct attempt_key, struct attempt_state, attempts, ACTIVE_REQUESTS_MAX);
BPF_TABLE("lru_hash", struct flush_key, u64, flush_ends, FLUSHES_MAX);
#if REQUEST_METRICS
BPF_TABLE("hash", u32, u64, accepted_connections, PROCESSES_MAX); /* by process; user space removes those that have ended */
#endif
#if ERROR_LOG
BPF_TABLE("lru_hash", struct request_key, struct logged_request, logged_requests, ACTIVE_REQUESTS_MAX);
#endif
BPF_F_TABLE("array", u32, u64, loss_counts, LOSS_CAUSES, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, u64, beginnings, BEGINNINGS, BPF_F_MMAPABLE);
BPF_RINGBUF_OUTPUT(records, RING_BUFFER_PAGES);

static __always_inline void count_loss(u32 cause)
{
    u64 *count = loss_counts.lookup(&cause);
    if (count)
        lock_xadd(count, 1);
}

/* Returns process and thread in the pid namespace of user space. 0: the process is not in that namespace. */
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

static __always_inline u32 caller_place(u32 tgid)
{
    return tgid * 0x9e3779b1U >> (32 - CALLERS_BITS);
}

/* Returns NULL if the process is not traced. */
static __always_inline struct caller *find_caller(u32 tgid)
{
    u32 place = caller_place(tgid);
    for (int i = 0; i < CALLER_PLACES; i++) {
        struct caller *caller = callers.lookup(&place);
        if (!caller || !caller->tgid)
            return NULL;
        if (caller->tgid == tgid)
            return caller;
        place = (place + 1) & (CALLERS - 1);
    }
    return NULL;
}

/* Two processes could take the same place at the same time. Then the one that lost it is added again at its next probe. */
static __always_inline struct caller *add_caller(u32 tgid)
{
    u32 place = caller_place(tgid);
    for (int i = 0; i < CALLER_PLACES; i++) {
        struct caller *caller = callers.lookup(&place);
        if (!caller)
            return NULL;
        if (!caller->tgid || caller->tgid == CALLER_GONE) {
            __builtin_memset(caller, 0, sizeof(*caller));
            caller->tgid = tgid;
            return caller;
        }
        place = (place + 1) & (CALLERS - 1);
    }
    return NULL;
}

static __always_inline void forget_process(u32 tgid)
{
    struct caller *caller = find_caller(tgid);
    if (caller)
        caller->tgid = CALLER_GONE;
    processes.delete(&tgid);
}

static __always_inline void add_process(u32 tgid)
{
    u32 zero = 0;
    struct process *fresh = new_processes.lookup(&zero);
    if (!fresh)
        return;
    processes.insert(&tgid, fresh);
    struct process *process = processes.lookup(&tgid);
    if (!process) {
        count_loss(LOST_PROCESSES_FULL);
        return;
    }
    if (!process->known_since_ns)
        process->known_since_ns = bpf_ktime_get_ns();
    if (find_caller(tgid) || add_caller(tgid))
        return;
    processes.delete(&tgid);
    count_loss(LOST_PROCESSES_FULL);
}

static __always_inline bool is_live(void)
{
    u32 zero = 0, *all_attached = live.lookup(&zero);
    return all_attached && *all_attached;
}

/* Returns the process that hits a uprobe. NULL: it is not traced. */
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

/* Empty. Since Linux 6.13 a program has a private stack for each processor, unless the program can make a tail call. A uprobe's
 * program can be preempted (PREEMPT_LAZY, PREEMPT). Then another worker's run on the same processor overwrites the first run's
 * stack. On 7.2 this crashed the kernel. */
BPF_PROG_ARRAY(no_programs, 1);

/* Every program of a uprobe must contain this call somewhere. */
static __always_inline void want_no_private_stack(struct pt_regs *ctx)
{
    no_programs.call(ctx, 0);
}

/* Every uprobe's handler begins with this. Returns NULL if the process is not traced. */
static __always_inline struct process *entered(struct pt_regs *ctx, u32 *tgid, u64 *now)
{
    *now = bpf_ktime_get_ns();
    *tgid = current_tgid();
    if (!*tgid) { /* in another pid namespace */
        want_no_private_stack(ctx);
        return NULL;
    }
    struct process *process = probed_process(*tgid);
#if !DETAIL_REQUEST
    if (!process)
        return NULL;
    struct caller *caller = find_caller(*tgid);
    if (!caller)
        caller = add_caller(*tgid);
    if (!caller) {
        count_loss(LOST_PROCESSES_FULL);
        return NULL;
    }
    caller->last_event_ns = *now;
    process->turn_began_ns = caller->turn_began_ns;
    process->latest_read_fd = caller->latest_read_fd;
#endif
    return process;
}

/* Loops up to a count that the verifier does not know. clang would merge the two conditions into a comparison for equality with
 * the smaller number, which the verifiers of older kernels cannot follow. The asm hides the count from clang. */
#define EACH(i, count, limit)                                                                                          \
    for (u32 i = 0; i < (limit) && ({ asm volatile("" : "+r"(count)); i < (count); }); i++)

/* Limits an index to ATTEMPTS_MAX in a way that the verifier sees. clang would remove a mask that it can prove needless, but the
 * verifier may not know that proof. */
static __always_inline u64 slot(u64 index)
{
    asm volatile("%[index] &= %[mask]" : [index] "+r"(index) : [mask] "i"(ATTEMPTS_MAX - 1));
    return index;
}

/* Returns a random id; never 0, which is not a valid id. */
static __always_inline u64 random_id(void)
{
    u64 id = (u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32();
    return id ? id : 1;
}

static __always_inline bool read_quietly(u64 *value, u64 address)
{
    return bpf_probe_read_user(value, sizeof(*value), (void *)address) == 0;
}

/* Reads nginx's memory. If that fails, counts a lost request and returns false; the caller must give up. */
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
