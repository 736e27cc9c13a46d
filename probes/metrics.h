/*
 * How long a request, its exchanges and its failed connects took. Also the keys and values of the maps of metrics.c. These maps count the
 * durations of all requests in the kernel, sampled or not.
 *
 * This file is the maps' only declaration: otel_nginx_ebpf/metrics/series.py parses it, as traces/abi.py parses
 * record.h. A value is the sum of the durations in nanoseconds (u64), then a count (u64) for each bucket of
 * `duration_bound_ms`, then a count for durations above all bounds.
 *
 * With EXPONENTIAL_HISTOGRAMS a key ends with a struct duration_place, and a value is the sum and the count (u64 both) of the
 * durations in that place. So only places that durations fell into take room.
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

/* OpenTelemetry's exponential histograms (Metrics Data Model, "ExponentialHistogram"): a bucket's upper bound is the 2^(1/4) of
 * its lower bound, and belongs to it. Bucket 0 begins above 1 s. */
enum exponential_histogram {
    EXPONENTIAL_SCALE = 2,
    EXPONENTIAL_ZERO = 2147483647, /* duration_place.index of durations of 0 */
};

struct duration_place {
    __s32 index;              /* of the exponential bucket */
    __u32 bucket;             /* by `duration_bound_ms` */
};

enum metrics_limit {
    SERIES_MAX = 16384,       /* the series of each kind, of all workers together */
    PLACES_MAX = 65536,       /* with EXPONENTIAL_HISTOGRAMS: of all series of a kind together */
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
    __u16 http_version;       /* as in the record; 0: the request line was not parsed */
    __u8 ending;              /* as in the record */
    __u8 cache_status;        /* as in the record */
    __u16 status;
    __u8 tls;
    __u8 overflow;            /* 1: the sum of all series of this worker that found no room */
};

struct client_series {
    __u32 tgid;
    __u32 method;             /* the method that the peer was sent, as in the record's attempt; 0: not known */
    __u64 upstream;           /* ngx_http_upstream_srv_conf_t *; 0: no upstream */
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

/* 1: the duration is above the bound. Computed from the sign of a difference. A comparison would be a branch, and 14
 * branches are 15 paths to verify. */
#define ABOVE_NS(ns, bound_ns) (((bound_ns) - (ns)) >> 63)
#define ABOVE(ns, bound_ms) ABOVE_NS(ns, (bound_ms) * 1000000ULL)

static __always_inline u32 bucket_of(u64 ns)
{
    return ABOVE(ns, BOUND_0) + ABOVE(ns, BOUND_1) + ABOVE(ns, BOUND_2) + ABOVE(ns, BOUND_3) + ABOVE(ns, BOUND_4)
        + ABOVE(ns, BOUND_5) + ABOVE(ns, BOUND_6) + ABOVE(ns, BOUND_7) + ABOVE(ns, BOUND_8) + ABOVE(ns, BOUND_9)
        + ABOVE(ns, BOUND_10) + ABOVE(ns, BOUND_11) + ABOVE(ns, BOUND_12) + ABOVE(ns, BOUND_13);
}

/* The bounds in the highest octave, from 2^32 to 2^33 s, in nanoseconds. Those within it are irrational: rounded down. */
#define OCTAVE 32
#define OCTAVE_END (1000000000ULL << (OCTAVE + 1))
#define OCTAVE_BOUND_1 5107605667107197932ULL /* 10^9 · 2^(32 + 1/4) */
#define OCTAVE_BOUND_2 6074000999952099384ULL
#define OCTAVE_BOUND_3 7223245205676679009ULL

/* Shifts a duration into the highest octave: exact, as every octave has the same bounds but for a power of two. */
#define SHIFT_IF_IT_FITS(bits)                                                                                         \
    do {                                                                                                               \
        u64 fits = 1 - ABOVE_NS(ns, OCTAVE_END >> (bits));                                                             \
        ns <<= (bits) * fits;                                                                                          \
        shift += (bits) * fits;                                                                                        \
    } while (0)

/* Returns the index of the exponential bucket of a duration below OCTAVE_END, which is 272 years. */
static __always_inline s32 exponential_index(u64 ns)
{
    u64 shift = 0;
    if (!ns)
        return EXPONENTIAL_ZERO;
    SHIFT_IF_IT_FITS(32);
    SHIFT_IF_IT_FITS(16);
    SHIFT_IF_IT_FITS(8);
    SHIFT_IF_IT_FITS(4);
    SHIFT_IF_IT_FITS(2);
    SHIFT_IF_IT_FITS(1);
    return (s32)(OCTAVE - (s64)shift) * (1 << EXPONENTIAL_SCALE) + ABOVE_NS(ns, OCTAVE_BOUND_1) + ABOVE_NS(ns, OCTAVE_BOUND_2)
        + ABOVE_NS(ns, OCTAVE_BOUND_3);
}

static __always_inline struct duration_place place_of(u64 ns)
{
    return (struct duration_place){.index = exponential_index(ns), .bucket = bucket_of(ns)};
}

#if REQUEST_METRICS
/* Two series that the user's choice of attributes does not tell apart (SERIES_BY_…) become one here, so that they take one place.
 * tests/unit/metrics/test_choices.py checks that this agrees with otel_nginx_ebpf/metrics/series.py. */

static __always_inline void choose_server_series(struct server_series *series)
{
    if (!SERIES_BY_VERSION || !series->method)
        series->http_version = 0;
    if (!SERIES_BY_METHOD)
        series->method = 0;
    if (!SERIES_BY_LOCATION)
        series->location = 0;
    if (!SERIES_BY_SERVER_NAME)
        series->server = 0;
    if (!SERIES_BY_ERROR)
        series->ending = 0;
    if (!SERIES_BY_CACHE_STATUS)
        series->cache_status = 0;
    if (!SERIES_BY_STATUS)
        series->status = 0;
    if (!SERIES_BY_SCHEME)
        series->tls = 0;
}

static __always_inline void choose_client_series(struct client_series *series)
{
    if (!SERIES_BY_METHOD)
        series->method = 0;
    if (!SERIES_BY_UPSTREAM)
        series->upstream = 0;
    if (!SERIES_BY_STATUS) {
        series->status = 0;
        series->no_header = 0;
    }
    if (!SERIES_BY_ERROR) {
        series->connect_errno = 0;
        series->outcome = 0;
    }
}
#endif

/* How long a request and its exchanges took, by the rules of otel_nginx_ebpf/traces/phases.py. A phase counts only if
 * it has a length. tests/unit/traces/test_phases.py checks that both files agree. */

static __always_inline u64 connect_end_ns(const struct upstream_attempt *attempt)
{
    u64 end_ns = attempt->connect_failed_ns;
    if (attempt->connect_msec != -1ULL && attempt->connected_ns)
        end_ns = attempt->connected_ns;
    return end_ns ? end_ns : attempt->ended_ns;
}

/* Returns when an attempt's exchange ended. 0: there was no exchange. */
static __always_inline u64 exchange_end_ns(const struct upstream_attempt *attempt)
{
    if (attempt->connect_msec == -1ULL || !attempt->first_write_ns)
        return 0;
    return attempt->ends_with_read ? attempt->last_read_ns : attempt->ended_ns;
}

static __always_inline void ends_at(u64 *last_end_ns, u64 start_ns, u64 end_ns)
{
    if (end_ns > start_ns && end_ns > *last_end_ns)
        *last_end_ns = end_ns;
}

/* Returns when a request was read completely: the end of its phases before any attempt. */
static __always_inline u64 read_end_ns(const struct request_record *record)
{
    return record->last_read_ns > record->created_ns ? record->last_read_ns : record->created_ns;
}

/* Returns how long an attempt's exchange took. 0: there was no exchange. If a phase of the attempt ended after
 * `last_end_ns`, moves `last_end_ns` to that end. */
static __always_inline u64 exchange_ns(const struct upstream_attempt *attempt, u64 *last_end_ns)
{
    u64 end_ns = exchange_end_ns(attempt);
    if (attempt->connect_start_ns)
        ends_at(last_end_ns, attempt->connect_start_ns, connect_end_ns(attempt));
    ends_at(last_end_ns, attempt->first_write_ns, end_ns);
    return end_ns > attempt->first_write_ns ? end_ns - attempt->first_write_ns : 0;
}

/* Returns how long an attempt's connect took, if it failed and was all of the attempt. 0: it was not so, or nginx abandoned
 * the attempt. */
static __always_inline u64 failed_connect_ns(const struct upstream_attempt *attempt)
{
    u64 end_ns = connect_end_ns(attempt);
    if (!attempt->connect_start_ns || end_ns <= attempt->connect_start_ns)
        return 0;
    if (attempt->connect_msec != -1ULL && (attempt->connected_ns || attempt->first_write_ns))
        return 0;
    if (!attempt->connect_errno && attempt->outcome == OUTCOME_ABANDONED)
        return 0;
    return end_ns - attempt->connect_start_ns;
}

/* Returns how long a request took. `last_end_ns`: when the last of its phases ended, except the downstream write. */
static __always_inline u64 request_ns(const struct request_record *record, u64 last_end_ns)
{
    u64 start_ns = record->first_read_ns ? record->first_read_ns : record->created_ns;
    u64 end_ns = record->ended_ns;
    if (record->ends_with_write)
        end_ns = record->last_write_ns > last_end_ns ? record->last_write_ns : last_end_ns;
    return end_ns > start_ns ? end_ns - start_ns : 0;
}
