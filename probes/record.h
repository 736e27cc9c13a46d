/*
 * What the kernel sends to user space: a record for each completed request.
 *
 * This file is the only declaration of the record. probes/ compiles it; otel_nginx_ebpf/traces/abi.py
 * parses it. It may contain only enums and structs of fixed-width scalars, without padding.
 *
 * A record in the ring buffer is
 *     struct request_record
 *     struct upstream_attempt   * attempts
 *     struct string_header, then `bytes` bytes, padded to 8   * as many as fit into the record; captured headers last
 *
 * Times are CLOCK_MONOTONIC nanoseconds; 0 means that it did not happen or was not seen.
 */

enum string_kind {
    STRING_METHOD = 1,        /* as the client sent it, also if nginx or a module has overwritten r->method_name */
    STRING_URI = 2,           /* r->unparsed_uri */
    STRING_HOST = 3,          /* the Host header, or :authority. Over HTTP/1 it and the next are as the client sent them */
    STRING_USER_AGENT = 4,
    STRING_LOCATION = 5,      /* ngx_http_core_loc_conf_t.name of the location that the client asked for */
    STRING_SERVER_NAME = 6,   /* ngx_http_core_srv_conf_t.server_name */
    STRING_CLIENT_SOCKADDR = 7,
    STRING_LOCAL_SOCKADDR = 8,
    STRING_PEER = 9,          /* ngx_http_upstream_state_t.peer, as in $upstream_addr */
    STRING_UPSTREAM = 10,     /* ngx_http_upstream_srv_conf_t.host: the upstream block's name */
    STRING_SUBREQUEST_URI = 11,
    STRING_TRACESTATE = 12,   /* never cut. `attempt` numbers the header's lines, from 0 */
    STRING_UNSEEN_PEER = 13,  /* an element of $upstream_addr that has no attempt in the record */
    STRING_REQUEST_TARGET = 14, /* what follows the method in the client's request line, if the target is in absolute form */
    STRING_PEER_SOCKADDR = 15, /* the socket's peer, if nginx has replaced the client's address (realip) */
    STRING_SENT_LINE = 16,    /* the request line that nginx sent to the peer, without its line end (HTTP/1). Attempts with the
                                 same upstream_request may have it only once */
    STRING_SENT_HOST = 17,    /* the Host header that nginx sent to the peer (HTTP/1) */
    STRING_FORWARDED = 18,    /* the last three: only with --trusted-proxy */
    STRING_X_FORWARDED_PROTO = 19,
    STRING_X_FORWARDED_HOST = 20,
    STRING_SENT_PATH = 21,    /* the field :path that nginx sent to the peer, as encoded (RFC 7541; HTTP/2). As STRING_SENT_LINE */
    STRING_SENT_AUTHORITY = 22, /* the value of :authority that nginx sent to the peer, as encoded (HTTP/2) */
    STRING_REQUEST_HEADER = 23, /* the name of a header that is captured, in lower case. `attempt`: enum captured */
    STRING_RESPONSE_HEADER = 24,
    STRING_HEADER_VALUE = 25, /* the value of the header before it. Absent: it is empty, or not in the record */
};

/* string_header.attempt of a header's name. */
enum captured {
    CAPTURED_VALUE = 0,
    CAPTURED_REDACTED = 1,    /* the value was not read */
    CAPTURED_NOT = 2,         /* the value could not be read, or had no room in the record */
    CAPTURED_NUMBER = 3,      /* the value is a number of 8 bytes */
    CAPTURED_TIME = 4,        /* as well: Unix time in seconds */
};

/* How a request ended. */
enum ending {
    ENDED_WHOLE = 0,          /* complete, as nginx intended */
    ENDED_TIMEOUT = 1,        /* the client took too long to send its request or to receive the response */
    ENDED_CLIENT_CLOSED_REQUEST = 2,
    ENDED_UPSTREAM_INCOMPLETE = 3, /* the peer's response was cut short: the peer closed the connection, or the reason is not known */
    ENDED_UPSTREAM_TIMEOUT = 4,    /* the peer's response was cut short: the peer stopped sending, but kept the connection open */
    ENDED_SHUTDOWN = 5,       /* worker_shutdown_timeout */
    ENDED_ABORTED = 6,        /* nginx or a module abandoned the response */
};

/* How an upstream attempt ended. */
enum outcome {
    OUTCOME_WHOLE = 0,
    OUTCOME_INCOMPLETE = 1,   /* the peer closed the connection in the middle of its response */
    OUTCOME_TIMEOUT = 2,      /* the peer stopped sending in the middle of its response */
    OUTCOME_ABANDONED = 3,    /* nginx abandoned the attempt together with the request; the peer did nothing wrong */
};

/* Why a request has a record although the sampler left it out. */
enum kept {
    KEPT_SAMPLED = 0,         /* the sampler did not leave it out */
    KEPT_ERROR = 1,
    KEPT_SLOW = 2,
};

/* request_record.method: nginx's bits of the methods that the semantic conventions know (ngx_http_request.h). */
enum method {
    METHOD_GET = 2,
    METHOD_HEAD = 4,
    METHOD_POST = 8,
    METHOD_PUT = 16,
    METHOD_DELETE = 32,
    METHOD_OPTIONS = 512,
    METHOD_PATCH = 16384,
    METHOD_TRACE = 32768,
    METHOD_CONNECT = 65536,   /* since nginx 1.21.1; before, r->method is 1, as for every method that nginx does not know */
    METHOD_QUERY = 1073741824,
};

/* upstream_attempt.protocol: what nginx speaks to the peer, by the first bytes of its request. */
enum protocol {
    PROTOCOL_UNKNOWN = 0,
    PROTOCOL_HTTP_1 = 1,      /* STRING_SENT_LINE has the version */
    PROTOCOL_HTTP_2 = 2,      /* gRPC, and proxy_http_version 2 */
    PROTOCOL_FASTCGI = 3,
    PROTOCOL_UWSGI = 4,
    PROTOCOL_SCGI = 5,
    PROTOCOL_MEMCACHED = 6,
};

/* request_record.cache_status: nginx's numbers (ngx_http_cache.h). 0: the cache was not asked, or it is not known. */
enum cache_status {
    CACHE_MISS = 1,
    CACHE_BYPASS = 2,
    CACHE_EXPIRED = 3,
    CACHE_STALE = 4,
    CACHE_UPDATING = 5,
    CACHE_REVALIDATED = 6,
    CACHE_HIT = 7,            /* the next, SCARCE, does not fit into nginx's three bits: nginx itself does not tell it */
};

/* request_record.limit_req_status: nginx's numbers (ngx_http_limit_req_module.c). 0: no limit applies, or it is not known. */
enum limit_req_status {
    LIMIT_REQ_PASSED = 1,
    LIMIT_REQ_DELAYED = 2,
    LIMIT_REQ_REJECTED = 3,
    LIMIT_REQ_DELAYED_DRY_RUN = 4,
    LIMIT_REQ_REJECTED_DRY_RUN = 5,
};

/* request_record.limit_conn_status: nginx's numbers (ngx_http_limit_conn_module.c). 0: as above. */
enum limit_conn_status {
    LIMIT_CONN_PASSED = 1,
    LIMIT_CONN_REJECTED = 2,
    LIMIT_CONN_REJECTED_DRY_RUN = 3,
};

/* request_record.http_version: nginx's numbers. */
enum http_version {
    HTTP_VERSION_0_9 = 9,
    HTTP_VERSION_1_0 = 1000,
    HTTP_VERSION_1_1 = 1001,
    HTTP_VERSION_2 = 2000,
    HTTP_VERSION_3 = 3000,
};

/* Index into the `loss_counts` map. LOST causes lose a whole trace; PARTIAL causes lose a part of a trace. */
enum loss {
    LOST_RING_BUFFER_FULL = 0,
    PARTIAL_BEGINNING = 1,    /* the beginning is only known from nginx's clock: neither a probe nor the socket saw it */
    LOST_READ_FAILED = 2,     /* nginx's memory could not be read */
    LOST_LAYOUT_MISMATCH = 3, /* an invariant of ngx_http_request_t did not hold */
    LOST_PROCESSES_FULL = 4,
    BEGAN_BEFORE_ATTACH = 5,  /* a request that was already running when the probes went live */
    PARTIAL_SOCKETS_FULL = 6, /* socket times missing */
    PARTIAL_ATTEMPTS_FULL = 7,
    PARTIAL_ATTEMPTS_LIMIT = 8, /* more than ATTEMPTS_MAX upstream attempts in one request */
    PARTIAL_STRING_CUT = 9,
    PARTIAL_STRING_READ_FAILED = 10,
    NOT_SAMPLED = 11,         /* not a loss: the sampler left the request out */
    PARTIAL_PROPAGATION_NO_ROOM = 12,   /* --propagate: the request has too many headers to add one */
    PARTIAL_PROPAGATION_MALFORMED = 13, /* the client's own traceparent is malformed, or the client sent several */
    PARTIAL_PROPAGATION_UNSAFE = 14,    /* nginx's header list is not as expected, or could not be written */
    LOST_CLOCK_SET_BACK = 15, /* nginx's clock was set back during a request whose beginning only that clock tells */
    NOT_MEASURED = 16,        /* not in the metrics, because their maps are full */
    PARTIAL_PROPAGATION_CONNECTION = 17, /* on the socket: a connection that is older than the probes, or that this kernel allows one request */
    PARTIAL_PROPAGATION_PROTOCOL = 18,  /* on the socket: not HTTP/1 over TCP without TLS */
    PARTIAL_PROPAGATION_CONFIGURED = 19, /* on the socket: nginx's configuration sends a traceparent of its own */
    PARTIAL_LOG_LINES_LIMIT = 20,       /* the request has more than LOG_LINES_MAX lines, or the worker more than LOG_LINES_PER_SECOND_MAX */
    PARTIAL_LOG_LINES_UNATTACHED = 21,  /* a line that nginx logged for a request after its end, or in another thread */
    PARTIAL_LOG_LINES_UNSENT = 22,      /* no trace lacks it: a line for no running request (--logs); the ring buffer was full */
    PARTIAL_CAPTURED_HEADERS = 23,      /* a header to be captured is missing: too many headers, no room, or nginx's memory could not be read */
    NOT_TRACED_BY_RULE = 24,  /* not a loss: a rule leaves the request out */
    LOSS_CAUSES = 25,
};

/* Index into the `beginnings` map, which tells whether requests need the probe that marks their beginning. */
enum beginnings {
    BEGINNINGS_NEEDED_NS = 0, /* when a request last needed it (TLS, HTTP/2, HTTP/3, PROXY protocol). CLOCK_MONOTONIC */
    BEGINNINGS_SPARED = 1,    /* how many requests did not need it, counted in steps */
    BEGINNINGS = 2,
};

/* The facts by which a layout is checked (layout.h). Each is a bit of layout_doubt.facts. */
enum layout_fact {
    FACT_REQUEST = 0,         /* the request's signature; the request is its own main request */
    FACT_CONNECTION = 1,
    FACT_NUMBER = 2,
    FACT_ADDRESSES = 3,
    FACT_HEADERS_IN = 4,
    FACT_HEADER_LINES = 5,
    FACT_HEADER_IN = 6,
    FACT_HEADERS_OUT = 7,
    FACT_START = 8,
    FACT_REQUEST_LINE = 9,
    FACT_CONFIGURATION = 10,
    FACT_HTTP_CONNECTION = 11,
    FACT_UPSTREAM = 12,
    FACT_UPSTREAM_STATES = 13,
    FACT_PIPE = 14,
    FACT_STREAM = 15,
};

enum limit {
    ATTEMPTS_MAX = 32,
    STRING_BYTES_MAX = 4096,
    RECORD_BYTES_MAX = 16384,
    LONG_TURN_NS = 10000000,
    LOG_LINE_BYTES_MAX = 2560,  /* nginx cuts lines at 2,048; syslog's header is before them */
    LOG_LINES_MAX = 32,
    LOG_LINES_PER_SECOND_MAX = 1000,
    NO_ATTEMPT = 255,
};

/* log_line.marker: a record does not begin with it. */
enum log_marker {
    LOG_MARKER = 7453295172825737070, /* "nginxlog" */
};

struct request_record {
    __u64 accepted_ns;        /* accept() of the client connection returned */
    __u64 first_read_ns;      /* the first request byte was read; 0: it arrived together with an earlier request's bytes */
    __u64 created_ns;         /* nginx began to work on the request */
    __u64 last_read_ns;       /* the last read of request bytes after created_ns returned */
    __u64 first_write_ns;     /* the earliest time at which the write of the first response byte began */
    __u64 last_write_ns;      /* the last write of response bytes returned */
    __u64 ended_ns;           /* ngx_http_free_request entered */
    __u64 handshake_ns;       /* from accept() to the end of the TLS handshake; 0: not the connection's first request, or not seen */
    __u64 longest_turn_ns;    /* the longest time in the request in which the worker did not come back to epoll_wait(); 0: less than
                                 LONG_TURN_NS */
    __s64 rc;                 /* the second argument of ngx_http_free_request: 0, or the status with which nginx closed the request */
    __u64 connection;         /* c->number: $connection */
    __u64 connection_requests; /* $connection_requests */
    __s64 request_length;     /* $request_length, in bytes; sometimes below 0 in nginx */
    __s64 bytes_sent;         /* $bytes_sent, in bytes */
    __u64 nginx_start_sec;    /* r->start_sec, r->start_msec: nginx's own cached Unix clock */
    __u64 nginx_start_msec;
    __u32 http_version;       /* enum http_version */
    __u16 limit_req_status;
    __u8 limit_conn_status;
    __u8 waited_for_cache;    /* 1: nginx let the request wait while another one filled the cache (proxy_cache_lock) */
    __u64 err_status;         /* r->err_status and r->headers_out.status, which decide $status */
    __u64 out_status;
    __u32 worker_pid;
    __u32 upstream_states;    /* the number of elements of $upstream_addr; each is an attempt or a STRING_UNSEEN_PEER */
    __u8 tls;                 /* the client connection is encrypted */
    __u8 multiplexed;         /* a stream of HTTP/2 or HTTP/3, which shares its socket */
    __u8 attempts;
    __u8 attempts_lost;       /* the number of the main request's elements above ATTEMPTS_MAX, at most 255 */
    __u32 method;             /* r->method: enum method, or another bit. Must agree with STRING_METHOD */
    __u32 requests_seen;      /* requests on this connection since its accept; must agree with connection_requests; 0: unknown */
    __u8 trace_flags;         /* W3C trace-flags of the spans; bit 0, sampled, is this program's decision */
    __u8 kept;
    __u8 coarse_start;        /* 1: created_ns comes from r->start_sec and r->start_msec, at most 1 ms off; first_read_ns is 0 */
    __u8 ending;
    __u8 ends_with_write;     /* 1: the request ended with last_write_ns; 0: with ended_ns */
    __u8 location_unknown;    /* 1: nginx redirected the request (error_page, X-Accel-Redirect, post_action), and had not tried a peer */
    __u8 peer_known;          /* 1: the socket's peer is STRING_PEER_SOCKADDR, or STRING_CLIENT_SOCKADDR if there is none */
    __u8 cache_status;
    __u16 headers_at;         /* where the captured headers begin, which come after all other strings; 0: there are none */
    __u8 headers_missing;     /* 1: more headers may have been there that were to be captured */
    __u8 rule;                /* the number of the rule that matched, from 1; 0: none */
    __u64 trace_id_high;      /* from the incoming context, from what nginx sent upstream, or random; never all 0 */
    __u64 trace_id_low;
    __u64 parent_span_id;     /* from the incoming context; 0: the trace begins here */
};

struct upstream_attempt {
    __u64 connect_start_ns;   /* socket() returned; 0: the connection was open already, or only connected_ns is known */
    __u64 connected_ns;       /* getsockopt(SO_ERROR) found the connection established; with TLS: after the handshake */
    __u64 connect_failed_ns;
    __u64 first_write_ns;     /* the earliest time at which the write of the first request byte began */
    __u64 last_write_ns;
    __u64 first_read_ns;      /* the read of the first response byte returned */
    __u64 last_read_ns;       /* the read of the last response byte, or of the end of file that ends the response, returned */
    __u64 ended_ns;           /* nginx closed the connection, or kept it for another request */
    __u64 connect_msec;       /* nginx's own times, from ngx_http_upstream_state_t; all ones: not set */
    __u64 header_msec;
    __u64 response_msec;
    __s64 bytes_sent;         /* -1: this nginx does not count sent bytes */
    __s64 bytes_received;
    __u32 status;             /* 0: no response */
    __s32 connect_errno;
    __u32 subrequest;         /* 1: a subrequest made the attempt (auth_request, mirror, SSI, slice) */
    __u8 tls;
    __u8 outcome;
    __u8 ends_with_read;      /* 1: the exchange ended with last_read_ns; 0: with ended_ns */
    __u8 protocol;
    __u32 method;             /* the method that the peer was sent: enum method, or another bit; 0: not known */
    __u32 upstream_request;   /* attempts that send the same request to one peer after another share this number */
    __u64 span_id;            /* the exchange span's id that the peer received; attempts may share it. 0: the peer received none */
};

struct string_header {
    __u8 kind;
    __u8 attempt;             /* the index of the attempt, if the kind belongs to an attempt */
    __u16 bytes;              /* the number of bytes that follow */
    __u32 whole_bytes;        /* the length of the string in nginx; more than `bytes`: the string was cut */
};

/* Sent instead of a record, for a request that contradicts the layout. Such a request has no trace. */
struct layout_doubt {
    __u64 facts;
    __u32 worker_pid;
    __u32 connections;        /* how many connections in a row had requests that contradict, without an agreeing request between them */
};

/* A line of nginx's error log for a running request, followed by `bytes` bytes of text. Sent before the request's record.
 * With --logs also a line for no running request: `lines` is 0. */
struct log_line {
    __u64 marker;
    __u64 connection;         /* as in the request's record; the two and the process tell which request it is. Without a request, the
                                 connection that the line names, or 0 */
    __u64 connection_requests;
    __u64 logged_ns;
    __u32 worker_pid;
    __s32 error_number;       /* errno of the failed system call; 0: none failed */
    __u32 lines;              /* how many lines of the request were sent, including this one */
    __u8 level;               /* nginx's number, from 1 (emerg) to 8 (debug). 0: no line, but the request's end; its record follows, if any */
    __u8 attempt;             /* the index of the latest attempt of the (sub)request that nginx worked on, or NO_ATTEMPT */
    __u16 bytes;
};
