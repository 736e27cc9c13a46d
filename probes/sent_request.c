/*
 * Notes what nginx sends to a peer. When an attempt begins, u->create_request has written the whole header into the first buffer
 * of u->request_bufs. A request's pool keeps that memory until the request ends, even if the buffer's chain link is reused. So
 * addresses are enough, and the texts are read when the record is made.
 *
 * Of these texts only the request line and the value of Host reach user space.
 */

#define FASTCGI_BEGIN 0x0000080001000101ULL /* version 1, FCGI_BEGIN_REQUEST, request 1, 8 bytes, no padding */
#define HTTP2_PREFACE 0x5448202a20495250ULL /* "PRI * HT" */
#define SCGI_FIRST_NAME 0x5f544e45544e4f43ULL /* "CONTENT_", of CONTENT_LENGTH, which comes first */
#define MEMCACHED_GET 0x20746567
#define HTTP_1 0x2e312f50545448ULL /* "HTTP/1." */
#define HOST_NAME 0x3a74736f68ULL /* "host:" */
#define LINE_END 0x0a0d

/* ngx_http_grpc_connection_start: the preface, SETTINGS, WINDOW_UPDATE. A frame follows that begins with :method. */
#define HTTP2_START_BYTES 64
#define HTTP2_HEADERS 1
#define HPACK_GET 0x82
#define HPACK_POST 0x83
#define HPACK_METHOD 0x42 /* these three: an indexed name, and a value of its own behind it */
#define HPACK_PATH 0x44
#define HPACK_AUTHORITY 0x41
#define HPACK_ROOT 0x84
#define HPACK_HTTP 0x86
#define HPACK_HTTPS 0x87

/* Returns the length of the first buffer that nginx sends to a peer; 0: there is none. */
static __always_inline u64 sent_buffer(u64 chain, u64 *start)
{
    u8 buffer[OFFSET_ngx_buf_s__start + 8] = {}; /* pos, last, …, start */
    u64 address = 0;
    if (!chain || !read_quietly(&address, chain + OFFSET_ngx_chain_s__buf) || !address
        || bpf_probe_read_user(buffer, sizeof(buffer), (void *)address) != 0)
        return 0;
    u64 last = MEMBER(buffer, u64, ngx_buf_s, last);
    *start = MEMBER(buffer, u64, ngx_buf_s, start);
    return *start && last > *start ? last - *start : 0;
}

/* Copies a part of the buffer to process->sent, from `before` on. Each further part repeats the last bytes of the part before it,
 * in front of `at`. */
static __always_inline bool read_sent(struct process *process, u64 before, u64 at)
{
    struct sent_search *search = &process->sent_search;
    u64 count = search->bytes - before;
    search->is_last_part = count <= SENT_BYTES;
    if (count > SENT_BYTES)
        count = SENT_BYTES;
    asm volatile("" : "+r"(count));
    if (count > SENT_BYTES || bpf_probe_read_user(process->sent + SENT_GUARD, count, (void *)(search->start + before)) != 0)
        return false;
    *(u64 *)(process->sent + SENT_GUARD + count) = 0;
    search->before = before;
    search->at = at;
    search->end = count - (search->is_last_part ? 0 : sizeof(u64));
    return true;
}

/* Goes on until a line begins that counts: the line after the request line, Host or the blank line, the line after Host. Returns
 * whether there is one in this part. What the loop knows is in the map's memory, and it has a single branch, so that to the verifier
 * all its turns look the same. */
static __always_inline bool find_line(struct process *process)
{
    struct sent_search *search = &process->sent_search;
    for (int step = 0; step < SENT_STEPS_MAX; step++) {
        u64 at = *(volatile u64 *)&search->at;
        u64 word = *(u64 *)(process->sent + SENT_GUARD + (at & (SENT_BYTES - 1)));
        u64 other = is_not_0(((word | LOWER_CASE) & 0xffffffffff) ^ HOST_NAME) & is_not_0((word & 0xffff) ^ LINE_END);
        u64 is_in_part = (at - *(volatile u64 *)&search->end) >> 63;
        search->found = is_in_part & *(volatile u64 *)&search->begins_line & ~(other & search->is_header);
        if ((is_in_part ^ *(volatile u64 *)&search->found) != 1)
            break;
        u64 ends = zero_bytes(word ^ '\n' * EVERY_BYTE);
        search->begins_line = is_not_0(ends);
        search->at = at + bytes_through(ends);
    }
    return *(volatile u64 *)&search->found;
}

/* Searches an HTTP/1 request for the end of its first line and for Host. */
static __always_inline void search_sent(struct process *process)
{
    struct sent_search *search = &process->sent_search;
    for (int turn = 0; turn < SENT_TURNS_MAX; turn++) {
        if (!find_line(process)) {
            if (search->is_last_part || !read_sent(process, search->before + search->at - SENT_GUARD, SENT_GUARD))
                return;
            continue;
        }
        u64 at = search->at & (SENT_BYTES - 1), here = search->before + at;
        search->begins_line = 0;
        if (!search->line_end) {
            search->line_end = here;
            search->version = *(u64 *)(process->sent + SENT_GUARD + at - 10);
            search->is_header = 1;
            search->begins_line = 1; /* this line may be Host */
        } else if (search->host) {
            search->host_end = here;
            return;
        } else if (process->sent[SENT_GUARD + at] == '\r') {
            return;
        } else {
            search->host = here + 6; /* nginx writes a space behind the colon */
            search->is_header = 0;
        }
    }
}

/* Notes the request line and Host, if this is an HTTP/1 request. */
static __always_inline void note_http1(struct process *process, struct attempt_state *attempt)
{
    struct sent_search *search = &process->sent_search;
    asm volatile("" ::: "memory"); /* from here on all is in the map's memory, where it is any number to the verifier */
    search_sent(process);
    asm volatile("" ::: "memory");
    u64 first = search->first, start = search->start;
    u64 method_bytes = bytes_before_space(first, 0);
    u32 method = method_bytes < 8 ? method_of_text(first_bytes(first, method_bytes)) : 1;
    if (search->line_end) {
        if ((search->version & 0xffffffffffffffULL) != HTTP_1)
            return;
        attempt->sent_line.bytes = search->line_end - 2;
    } else if (method == 1 || search->before + SENT_BYTES <= STRING_BYTES_MAX) {
        return;
    } else {
        attempt->sent_line.bytes = STRING_BYTES_MAX + 1; /* so that it counts as cut */
    }
    attempt->attempt.protocol = PROTOCOL_HTTP_1;
    attempt->attempt.method = method;
    attempt->sent_line.text = start;
    if (search->host_end > search->host + 2) {
        attempt->sent_host = start + search->host;
        attempt->sent_host_bytes = search->host_end - 2 - search->host;
    }
}

/* Returns the length of a string of HPACK with its own length in front (RFC 7541, 5.2); 0: not known. */
static __always_inline u64 hpack_bytes(u64 address)
{
    u8 prefix[4] = {};
    if (bpf_probe_read_user(prefix, sizeof(prefix), (void *)address) != 0)
        return 0;
    u64 bytes = prefix[0] & 0x7f;
    if (bytes < 0x7f)
        return 1 + bytes;
    bytes += prefix[1] & 0x7f;
    if (prefix[1] < 0x80)
        return 2 + bytes;
    return prefix[2] < 0x80 ? 3 + bytes + ((u64)prefix[2] << 7) : 0;
}

/* Notes where :path and :authority of an HTTP/2 request lie. nginx writes :method, :scheme, :path and :authority in this order
 * (ngx_http_grpc_create_request), and encodes each name in one byte. `at`: the address of the first field. */
static __always_inline void note_http2(struct attempt_state *attempt, u64 at)
{
    u8 name = byte_at(at);
    u64 bytes = 0;
    if (name == HPACK_METHOD)
        bytes = hpack_bytes(at + 1);
    at += 1 + bytes;
    u8 scheme = byte_at(at), path = byte_at(at + 1);
    if (scheme != HPACK_HTTP && scheme != HPACK_HTTPS)
        return;
    at += 1;
    bytes = path == HPACK_PATH ? hpack_bytes(at + 1) : 0;
    if (path != HPACK_ROOT && !bytes)
        return;
    attempt->sent_line.text = at;
    attempt->sent_line.bytes = 1 + bytes;
    at += 1 + bytes;
    if (byte_at(at) != HPACK_AUTHORITY)
        return;
    attempt->sent_host = at + 1;
    attempt->sent_host_bytes = hpack_bytes(at + 1);
}

/* Notes the protocol that an attempt speaks, and what it sends. `chain`: u->request_bufs; `request`: the (sub)request;
 * `main_method`: the main request's r->method, or 0. */
static __always_inline void note_sent(
    struct process *process, struct attempt_state *attempt, u64 chain, u64 request, u32 main_method)
{
    struct sent_search *search = &process->sent_search;
    const u8 *sent = process->sent + SENT_GUARD;
    u64 start = 0, bytes = sent_buffer(chain, &start), method = 0;

    __builtin_memset(search, 0, sizeof(*search));
    attempt->attempt.upstream_request = (u32)(attempt->upstream >> 3) | 1; /* retries share the ngx_http_upstream_t */
    search->start = start;
    search->bytes = bytes;
    if (bytes < sizeof(u32) || !read_sent(process, 0, 0))
        return;
    u64 first = search->first = *(u64 *)sent; /* zeros follow what is sent */
    u64 size = first >> 8 & 0xffff, colon = bytes_through(zero_bytes(first ^ ':' * EVERY_BYTE));
    if (first == HTTP2_PREFACE) {
        u8 field = sent[HTTP2_START_BYTES + 3] == HTTP2_HEADERS ? sent[HTTP2_START_BYTES + 9] : 0;
        attempt->attempt.protocol = PROTOCOL_HTTP_2;
        read_quietly(&method, request + OFFSET_ngx_http_request_s__method);
        attempt->attempt.method = field == HPACK_GET ? METHOD_GET : field == HPACK_POST ? METHOD_POST : method;
        if (field == HPACK_GET || field == HPACK_POST || field == HPACK_METHOD)
            note_http2(attempt, start + HTTP2_START_BYTES + 9);
    } else if (first == FASTCGI_BEGIN) {
        attempt->attempt.protocol = PROTOCOL_FASTCGI;
        attempt->attempt.method = main_method; /* $request_method */
    } else if (size + 4 == bytes && !(first >> 40 & 0xff)) { /* modifier1, size, modifier2, the length of the first name */
        attempt->attempt.protocol = PROTOCOL_UWSGI;
        attempt->attempt.method = main_method;
    } else if ((u8)first >= '0' && (u8)first <= '9' && *(u64 *)(sent + (colon & 15)) == SCGI_FIRST_NAME) {
        attempt->attempt.protocol = PROTOCOL_SCGI;
        attempt->attempt.method = main_method;
    } else if ((u32)first == MEMCACHED_GET) {
        attempt->attempt.protocol = PROTOCOL_MEMCACHED;
    } else if ((u8)first > ' ') {
        note_http1(process, attempt);
    }
}
