/* Histograms that the kernel counts, and the first of them: the turns of workers' event loops. metrics.c has the requests'. */

#if REQUEST_METRICS
#define HISTOGRAM_BUCKETS 15

#if EXPONENTIAL_HISTOGRAMS
#define HISTOGRAMS_MAX PLACES_MAX
#define LOOPS_MAX (PROCESSES_MAX * 32) /* so many places a worker */
struct histogram {
    u64 sum;
    u64 count;
};
#else
#define HISTOGRAMS_MAX SERIES_MAX
#define LOOPS_MAX PROCESSES_MAX
struct histogram {
    u64 sum;
    u64 counts[HISTOGRAM_BUCKETS];
};
#endif

struct loop_key {
    struct worker_loop loop;
#if EXPONENTIAL_HISTOGRAMS
    struct place place;
#endif
};

/* The additions are not atomic, and there is no copy for each processor: an entry has one writer, the thread of its
 * worker. */
BPF_TABLE("hash", struct loop_key, struct histogram, worker_loops, LOOPS_MAX);

static __always_inline void add(struct histogram *histogram, u64 amount, struct place place)
{
#if EXPONENTIAL_HISTOGRAMS
    histogram->count++;
#else
    u64 bucket = place.bucket;
    if (bucket >= HISTOGRAM_BUCKETS)
        return;
    histogram->counts[bucket]++;
#endif
    histogram->sum += amount;
}

/* Counts a turn of a worker's event loop: from the return of epoll_wait() to `last_event_ns`, the end of the last system call before
 * the next epoll_wait(). What the worker computed after that call is not seen. */
static __always_inline void count_turn(struct caller *caller, u64 last_event_ns)
{
    if (!caller->turn_began_ns || last_event_ns <= caller->turn_began_ns)
        return;
    u64 ns = last_event_ns - caller->turn_began_ns;
    struct loop_key key = {.loop = {.tgid = caller->tgid}};
    struct place place = place_of_turn(ns);
#if EXPONENTIAL_HISTOGRAMS
    key.place = place;
#endif
    struct histogram none = {};
    struct histogram *turns = worker_loops.lookup_or_try_init(&key, &none);
    if (turns)
        add(turns, ns, place);
    else
        count_loss(NOT_MEASURED);
}
#endif
