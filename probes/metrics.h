/*
 * The keys and values of the maps of metrics.c, which count the durations of all requests in the kernel, sampled or not.
 *
 * This file is their only declaration: otel_nginx_ebpf/metrics/series.py parses it, as traces/abi.py parses record.h.
 * A value is the sum of the durations in nanoseconds (u64), then a count (u64) for each bucket of `duration_bound_ms`, then a
 * count for durations above all bounds.
 */

/* The semantic conventions' buckets of http.server.request.duration and http.client.request.duration. Each number is the upper
 * bound of its bucket, and belongs to the bucket. */
enum duration_bound_ms {
    BOUND_0 = 5,
    BOUND_1 = 10,
    BOUND_2 = 25,
    BOUND_3 = 50,
    BOUND_4 = 75,
    BOUND_5 = 100,
    BOUND_6 = 250,
    BOUND_7 = 500,
    BOUND_8 = 750,
    BOUND_9 = 1000,
    BOUND_10 = 2500,
    BOUND_11 = 5000,
    BOUND_12 = 7500,
    BOUND_13 = 10000,
};

/* nginx's r->method is a bit; 1 means an unknown method. These are methods that the conventions know but not every nginx: */
enum unknown_method {
    METHOD_CONNECT = 65536,   /* nginx's own bit since 1.21.1 */
    METHOD_QUERY = 1073741824,
};

enum metrics_limit {
    SERIES_MAX = 16384,       /* the series of each kind, of all workers together */
    NAMES_MAX = 8192,
    NAME_BYTES_MAX = 512,     /* as in the record */
    PEER_BYTES_MAX = 64,      /* a longer peer name is left out */
};

/* Pointers are good keys, because a worker's configuration does not change while the worker lives. */
struct server_series {
    __u32 tgid;
    __u32 method;             /* r->method; 0: the request line was not parsed */
    __u64 location;           /* ngx_http_core_loc_conf_t *; 0: not known */
    __u64 server;             /* ngx_http_core_srv_conf_t * */
    __u16 http_version;       /* http_version and ending: as in the record */
    __u8 ending;
    __u8 reserved;
    __u16 status;
    __u8 tls;
    __u8 overflow;            /* 1: the sum of all series of this worker that found no room */
};

struct client_series {
    __u32 tgid;
    __u32 method;             /* the method of the client's request; 0: a subrequest's attempt */
    __u64 upstream;           /* ngx_http_upstream_srv_conf_t *; 0: none */
    __u16 status;             /* as in the record's attempt */
    __u16 connect_errno;
    __u8 no_header;           /* 1: nginx has no $upstream_header_time, because the peer sent no response */
    __u8 overflow;
    __u8 peer_bytes;          /* how many of the following PEER_BYTES_MAX bytes are used; 0: no peer name, or it is too long */
    __u8 outcome;             /* as in the record's attempt */
};

/* The key of a configuration's name. The value is the name's length in bytes (u64), then NAME_BYTES_MAX bytes. */
struct duration_name_key {
    __u32 tgid;
    __u32 reserved;
    __u64 configuration;      /* one of the pointers above */
};
