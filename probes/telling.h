/* --propagate on the socket: what is told to the peer of an upstream attempt, in the next message on its connection. */

#define TOLD_NAME_BYTES 13     /* "traceparent: " */
#define TOLD_LINE_BYTES (TOLD_NAME_BYTES + TRACEPARENT_BYTES + 2)
#define B3_LINE_BYTES 57       /* b3: {trace id}-{span id}-{flag} */
#define B3_MULTI_BYTES 96      /* X-B3-TraceId, X-B3-SpanId, X-B3-Sampled */
#define COMPARED_BYTES 32      /* the first bytes of a message must be the first bytes of the request */
#define TOLD_HEAD_BYTES_MAX 16384

/* Why a message carries a context, or does not. */
enum telling_result {
    TELLING_UNSEEN,           /* no message passed: the connection is not in upstream_sockets */
    TELLING_WRITTEN,
    TELLING_NOTHING_NEW,      /* the client said no to sampling, and the sampler agrees */
    TELLING_NOT_HTTP1,
    TELLING_NOT_WHOLE,        /* not the request that was announced, or not its whole head */
    TELLING_MALFORMED,        /* the client's headers cannot be repaired in place */
    TELLING_OTHER_CONTEXT,    /* nginx's configuration sends a context of its own */
    TELLING_NO_MEMORY,
    TELLING_UNDONE,           /* a place was made for the header, and could be neither filled nor removed: the message is refused */
};

struct telling {
    u64 connection;           /* message_connection() of the message; 0: nothing is to be told */
    u64 announced;            /* `connection` of the latest announcement */
    u64 connected;            /* connection that the worker's latest connect() made, and its socket's cookie */
    u64 connected_cookie;
    u64 trace_id_high;
    u64 trace_id_low;
    u64 span_id;
    u64 head_bytes;           /* length of nginx's first buffer, which has the whole head */
    u64 client_connection;    /* the client's ngx_connection_t *, the attempt's index and serial */
    u64 attempt_serial;
    u32 attempt_index;
    u8 expects;               /* the worker is about to call connect() for an upstream */
    u8 flags;                 /* trace flags */
    u8 nothing_new;
    u8 client_valid;          /* the client's own traceparent is the parent */
    u64 result;               /* enum telling_result */
    u64 client_lines;         /* how many traceparent headers the client sent */
    u8 first[COMPARED_BYTES];
    u8 client_value[TRACEPARENT_BYTES + 1];
    u64 at;                   /* of the search in the message */
    u64 at_line_start;
    u64 found;                /* how many traceparent headers the head has */
    u64 found_at;             /* the first; the last */
    u64 found_last_at;
#if PROPAGATOR_B3
    u64 b3_lines;             /* how many b3 headers the head has */
    u64 b3_at;
#endif
#if PROPAGATOR_B3MULTI
    u64 x_b3_lines;           /* as well: X-B3-…; in the bytes above, of them: trace id, span id, sampled */
    u64 x_b3_trace_id_at;
    u64 x_b3_span_id_at;
    u64 x_b3_sampled_at;
#endif
    u64 line_end;             /* the position of the request line's last byte */
    u64 whole;                /* the blank line was found */
    u64 b3_left;              /* the head has B3 headers that cannot be repaired in place */
};

/* What user space sets: how sockets may be used on this kernel, and a connection of its own that tests it. */
struct socket_use {
    u32 once;                 /* a connection leaves upstream_sockets when its first request is acknowledged */
    u32 rehearsed_port;       /* the port to which the loader connects, as bpf_sock_ops has it; 0: none */
    u32 enrolled;             /* how many connections to that port were put into upstream_sockets */
    u32 overstayed;           /* how many answers came on connections that should have left upstream_sockets. Read by user space */
    u32 stalled;              /* how many answers broke off after FIONREAD had said 0. Read by user space */
    u32 reserved;
    struct telling rehearsed;
};
