/*
 * How long a request, its exchanges and its failed connects took. Also the keys and values of the maps of histograms.c and metrics.c.
 * These maps count amounts in the kernel: durations in nanoseconds, sizes in bytes; of all requests, sampled or not.
 *
 * This file is the maps' only declaration: otel_nginx_ebpf/metrics/series.py parses it, as traces/abi.py parses
 * record.h. A value is the sum of the amounts (u64), then a count (u64) for each bucket of the metric's bounds, then a count for
 * amounts above all bounds.
 *
 * With EXPONENTIAL_HISTOGRAMS a key ends with a struct place, and a value is the sum and the count (u64 both) of the amounts in that
 * place. So only places that amounts fell into take room.
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

/* http.server.response.body.size. The conventions name no buckets. */
enum size_bound_bytes {
    SIZE_0 = 0,
    SIZE_1 = 256,
    SIZE_2 = 1024,
    SIZE_3 = 4096,
    SIZE_4 = 16384,
    SIZE_5 = 65536,
    SIZE_6 = 262144,
    SIZE_7 = 1048576,
    SIZE_8 = 4194304,
    SIZE_9 = 16777216,
    SIZE_10 = 67108864,
    SIZE_11 = 268435456,
    SIZE_12 = 1073741824,
    SIZE_13 = 4294967296,
};

/* nginx.worker.loop */
enum loop_bound_us {
    LOOP_0 = 100,
    LOOP_1 = 250,
    LOOP_2 = 500,
    LOOP_3 = 1000,
    LOOP_4 = 2500,
    LOOP_5 = 5000,
    LOOP_6 = 10000,
    LOOP_7 = 25000,
    LOOP_8 = 50000,
    LOOP_9 = 100000,
    LOOP_10 = 250000,
    LOOP_11 = 500000,
    LOOP_12 = 1000000,
    LOOP_13 = 5000000,
};

/* OpenTelemetry's exponential histograms (Metrics Data Model, "ExponentialHistogram"): a bucket's upper bound is the 2^(1/4) of
 * its lower bound, and belongs to it. Bucket 0 begins above 1 s, or 1 byte. */
enum exponential_histogram {
    EXPONENTIAL_SCALE = 2,
    EXPONENTIAL_ZERO = 2147483647, /* place.index of amounts of 0 */
};

struct place {
    __s32 index;              /* of the exponential bucket */
    __u32 bucket;             /* by the metric's bounds */
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

/* The turns of a worker's event loop. */
struct worker_loop {
    __u32 tgid;
    __u32 reserved;
};

/* The key of a configuration's name. The value is the name's length in bytes (u64), then NAME_BYTES_MAX bytes. */
struct duration_name_key {
    __u32 tgid;
    __u32 reserved;
    __u64 configuration;      /* one of the pointers above */
};

/* 1: the amount is above the bound. Computed from the sign of a difference. A comparison would be a branch, and 14
 * branches are 15 paths to verify. */
#define ABOVE(amount, bound) (((bound) - (amount)) >> 63)

#define BUCKET_OF(amount, unit, bound)                                                                                 \
    (ABOVE(amount, bound##_0 * (unit)) + ABOVE(amount, bound##_1 * (unit)) + ABOVE(amount, bound##_2 * (unit))         \
     + ABOVE(amount, bound##_3 * (unit)) + ABOVE(amount, bound##_4 * (unit)) + ABOVE(amount, bound##_5 * (unit))       \
     + ABOVE(amount, bound##_6 * (unit)) + ABOVE(amount, bound##_7 * (unit)) + ABOVE(amount, bound##_8 * (unit))       \
     + ABOVE(amount, bound##_9 * (unit)) + ABOVE(amount, bound##_10 * (unit)) + ABOVE(amount, bound##_11 * (unit))     \
     + ABOVE(amount, bound##_12 * (unit)) + ABOVE(amount, bound##_13 * (unit)))

/* The highest octave that 63 bits can hold: from 2^32 to 2^33 s, in nanoseconds, or from 2^61 to 2^62 bytes. The bounds within it are
 * irrational: rounded down. */
struct octave {
    u64 exponent;
    u64 end;
    u64 bounds[3];
};

#define OCTAVE_OF_NS {32, 1000000000ULL << 33, {5107605667107197932ULL, 6074000999952099384ULL, 7223245205676679009ULL}}
#define OCTAVE_OF_BYTES {61, 1ULL << 62, {2742124912636209755ULL, 3260954456333195553ULL, 3877950241171266237ULL}}

/* Shifts an amount towards the highest octave. That is exact: the bounds of octaves differ by a power of two. */
#define SHIFT_IF_IT_FITS(bits)                                                                                         \
    do {                                                                                                               \
        u64 fits = 1 - ABOVE(amount, octave.end >> (bits));                                                            \
        amount <<= (bits) * fits;                                                                                      \
        shift += (bits) * fits;                                                                                        \
    } while (0)

/* Returns the index of the exponential bucket of an amount up to the octave's end. */
static __always_inline s32 exponential_index(u64 amount, const struct octave octave)
{
    u64 shift = 0;
    if (!amount)
        return EXPONENTIAL_ZERO;
    SHIFT_IF_IT_FITS(32);
    SHIFT_IF_IT_FITS(16);
    SHIFT_IF_IT_FITS(8);
    SHIFT_IF_IT_FITS(4);
    SHIFT_IF_IT_FITS(2);
    SHIFT_IF_IT_FITS(1);
    return (s32)(octave.exponent - shift) * (1 << EXPONENTIAL_SCALE) + ABOVE(amount, octave.bounds[0])
        + ABOVE(amount, octave.bounds[1]) + ABOVE(amount, octave.bounds[2]);
}

static __always_inline struct place place_of_duration(u64 ns)
{
    return (struct place){exponential_index(ns, (struct octave)OCTAVE_OF_NS), BUCKET_OF(ns, 1000000ULL, BOUND)};
}

static __always_inline struct place place_of_turn(u64 ns)
{
    return (struct place){exponential_index(ns, (struct octave)OCTAVE_OF_NS), BUCKET_OF(ns, 1000ULL, LOOP)};
}

static __always_inline struct place place_of_size(u64 bytes)
{
    return (struct place){exponential_index(bytes, (struct octave)OCTAVE_OF_BYTES), BUCKET_OF(bytes, 1ULL, SIZE)};
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
