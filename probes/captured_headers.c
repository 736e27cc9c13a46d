/*
 * Copies the headers that the user chose into the record: what the client sent, and what nginx answered.
 *
 * This is a separate BPF program, because the verifiers of older kernels reject one program that does all. The program that makes the
 * record calls it by tail call, for requests that are kept. These are its constants (planner/captured_headers.py):
 *     CAPTURED_REQUEST_BITS    bit n: the hash of a wanted name, modulo 64, is n. 0: no header of requests is wanted
 *     CAPTURED_RESPONSE_BITS   bit n: the length of a wanted name, modulo 64, is n
 *     CAPTURED_NAMES_MAX       the number of wanted names
 */

#if CAPTURES_HEADERS
#define CAPTURED_PARTS_MAX 8
#define CAPTURED_VALUE_BYTES_MAX 1024

struct captured_name {
    u8 text[CAPTURED_NAME_BYTES]; /* in lower case, then zeros. The last byte: enum string_kind */
};

/* The wanted names. 1: the value is redacted. */
BPF_TABLE("hash", struct captured_name, u64, captured_names, CAPTURED_NAMES_MAX);
BPF_PROG_ARRAY(capturing, 1);

/* Continues with the program that copies headers and sends the record. Returns only if that program is not loaded. */
static __always_inline void capture(struct pt_regs *ctx)
{
    capturing.call(ctx, 0);
}

static __always_inline void miss_headers(struct process *process)
{
    count_loss(PARTIAL_CAPTURED_HEADERS);
    ((struct request_record *)process->record)->headers_missing = 1;
}

/* Notes the headers of a list whose names may be wanted. Most are ruled out by a bit, and without a branch, which would be another path
 * for the verifier. */
static __always_inline void find_headers(struct process *process, u8 *list, u64 kind, u64 bits)
{
    u8 *part = list + OFFSET_ngx_list_t__part;
    u64 elements = MEMBER(part, u64, ngx_list_part_s, elts);
    u64 count = MEMBER(part, u64, ngx_list_part_s, nelts);
    u64 next = MEMBER(part, u64, ngx_list_part_s, next);

    for (int p = 0; p < CAPTURED_PARTS_MAX; p++) {
        if (count > HEADERS_IN_PART) {
            miss_headers(process);
            return;
        }
        u64 bytes = count * SIZEOF_ngx_table_elt_t;
        asm volatile("" : "+r"(bytes));
        if (elements != process->headers_address || count != process->headers_read) { /* else trace_headers.c has read them */
            process->headers_address = 0;
            if (bytes && (bytes > sizeof(process->headers) || bpf_probe_read_user(process->headers, bytes, (void *)elements) != 0)) {
                miss_headers(process);
                return;
            }
            process->headers_read = count;
            process->headers_address = elements;
        }
        for (u32 i = 0; i < HEADERS_IN_PART && i < *(volatile u64 *)&process->headers_read; i++) {
            u8 *header = process->headers + i * SIZEOF_ngx_table_elt_t;
            u64 number = kind == STRING_REQUEST_HEADER ? MEMBER(header, u64, ngx_table_elt_t, hash)
                                                       : MEMBER(header, u64, ngx_table_elt_t, key);
            u64 found = process->found_headers_count, wanted = bits >> (number & 63) & 1;
            u64 room = (found - (CAPTURED_FOUND_MAX - 1)) >> 63;
            struct found_header *place = &process->found_headers[found & (CAPTURED_FOUND_MAX - 1)];
            place->address = elements + i * SIZEOF_ngx_table_elt_t;
            place->kind = kind;
            process->found_headers_count = found + (wanted & room);
            process->found_too_many |= wanted & ~room;
        }
        if (!next)
            return;
        u8 *following = process->header_part;
        if (bpf_probe_read_user(following, sizeof(process->header_part), (void *)next) != 0) {
            miss_headers(process);
            return;
        }
        elements = MEMBER(following, u64, ngx_list_part_s, elts);
        count = MEMBER(following, u64, ngx_list_part_s, nelts);
        next = MEMBER(following, u64, ngx_list_part_s, next);
    }
    miss_headers(process); /* more than 160 headers */
}

/* Members of ngx_http_headers_out_t that no layout has. They are at the same distance from members of the layout in every release
 * since 1.14, but for two members that became pointers in 1.23, as ngx_table_elt_t got `next`. */
#define OUT_CONTENT_LENGTH (OFFSET_ngx_http_headers_out_t__status + 40)
#define OUT_LOCATION (OFFSET_ngx_http_headers_out_t__status + 56)
#define OUT_LAST_MODIFIED (OFFSET_ngx_http_headers_out_t__status + 72)
#ifdef OFFSET_ngx_table_elt_t__next
#define OUT_CONTENT_TYPE (OFFSET_ngx_http_headers_out_t__content_length_n - 48)
#else
#define OUT_CONTENT_TYPE (OFFSET_ngx_http_headers_out_t__content_length_n - 128)
#endif
#define OUT_LAST_MODIFIED_TIME (OFFSET_ngx_http_headers_out_t__content_length_n + 24)
#define OF_HEADERS_OUT(type, offset) (*(type *)(process->request + OFFSET_ngx_http_request_s__headers_out + (offset)))

/* Tells whether the response's header was sent whole, and nginx still has it: a post_action's response replaces it. */
static __always_inline bool has_response_header(struct process *process)
{
    struct request_record *record = (struct request_record *)process->record;
    return *(s64 *)(process->request + HEADER_SIZE) > 0 && has_sent_header(process, record->bytes_sent) && !process->acted;
}

/* Appends the name in process->header_name, if it is wanted. Returns how the value is to be appended, or CAPTURED_NOT. */
static __always_inline u64 append_name(struct process *process, u64 kind, u64 name_bytes, u64 how)
{
    process->header_name[CAPTURED_NAME_BYTES - 1] = kind;
    u64 *redacted = captured_names.lookup((struct captured_name *)process->header_name);
    u64 at = process->record_bytes;
    if (!redacted)
        return CAPTURED_NOT;
    if (at > STRING_AT_MAX) {
        miss_headers(process);
        return CAPTURED_NOT;
    }
    struct string_header *header = string_at(process, at);
    u64 *name = (u64 *)process->header_name, *text = (u64 *)(header + 1);
    for (int i = 0; i < CAPTURED_NAME_BYTES_MAX / 8; i++)
        text[i] = name[i];
    header->kind = kind;
    header->attempt = *redacted ? CAPTURED_REDACTED : how;
    header->bytes = name_bytes;
    header->whole_bytes = name_bytes;
    process->record_bytes = at + sizeof(struct string_header) + ((name_bytes + 7) & ~7ULL);
    return header->attempt;
}

/* Appends a header if its name is wanted. `data` is the address of its value, or of text that ends with a NUL. */
static __always_inline void append_captured(struct process *process, u64 kind, u64 name_bytes, struct ngx_str *value, u64 data)
{
    u64 at = process->record_bytes;
    if (append_name(process, kind, name_bytes, CAPTURED_VALUE) != CAPTURED_VALUE || (data == value->data && !value->len))
        return;
    u64 behind = process->record_bytes;
    if (data == value->data)
        append_string(process, STRING_HEADER_VALUE, 0, data, value->len, CAPTURED_VALUE_BYTES_MAX);
    else
        append_terminated(process, STRING_HEADER_VALUE, data, CAPTURED_VALUE_BYTES_MAX);
    asm volatile("" ::: "memory");
    if (process->record_bytes == behind)
        string_at(process, at)->attempt = CAPTURED_NOT;
}

/* nginx does not send headers of the hash 0. It sets the hash of a Location to 0 if it makes it absolute and sends it itself. Then `value`
 * is what it sent (ngx_http_header_filter). */
static __always_inline bool is_absolute_location(struct process *process, const struct found_header *found, u64 data)
{
    return !OF_FORK && found->kind == STRING_RESPONSE_HEADER && OF_HEADERS_OUT(u64, OUT_LOCATION) == found->address
        && byte_at(data) == 'h';
}

static __always_inline void capture_header(struct process *process, struct found_header *found)
{
    u64 kind = found->kind;
    u8 *header = (u8 *)process->header;
    if (bpf_probe_read_user(header, SIZEOF_ngx_table_elt_t, (void *)found->address) != 0) {
        miss_headers(process);
        return;
    }
    struct ngx_str *key = (struct ngx_str *)(header + OFFSET_ngx_table_elt_t__key);
    struct ngx_str *value = (struct ngx_str *)(header + OFFSET_ngx_table_elt_t__value);
    u64 name_bytes = key->len, data = value->data, *name = (u64 *)process->header_name;
    asm volatile("" : "+r"(name_bytes));
    if (name_bytes > CAPTURED_NAME_BYTES_MAX || (!MEMBER(header, u64, ngx_table_elt_t, hash) && !is_absolute_location(process, found, data)))
        return;
    for (int i = 0; i < CAPTURED_NAME_BYTES / 8; i++)
        name[i] = 0;
    if (bpf_probe_read_user(name, name_bytes, (void *)key->data) != 0) {
        miss_headers(process);
        return;
    }
    for (int i = 0; i < CAPTURED_NAME_BYTES_MAX / 8; i++)
        name[i] = lower_case(name[i]);
    if (kind == STRING_REQUEST_HEADER) {
        data = find_received(process, name_bytes);
        if (!data) /* not the client's header */
            return;
    }
    append_captured(process, kind, name_bytes, value, data);
}

/* Sets process->header_name to a name of at most 16 bytes. */
static __always_inline void set_name(struct process *process, u64 low, u64 high)
{
    u64 *name = (u64 *)process->header_name;
    for (int i = 2; i < CAPTURED_NAME_BYTES / 8; i++)
        name[i] = 0;
    name[0] = low;
    name[1] = high;
}

static __always_inline void append_number(struct process *process, u64 name_bytes, u64 how, u64 number)
{
    u64 at;
    if (append_name(process, STRING_RESPONSE_HEADER, name_bytes, how) != how)
        return;
    at = process->record_bytes;
    if (at > STRING_AT_MAX) {
        miss_headers(process);
        return;
    }
    struct string_header *header = string_at(process, at);
    header->kind = STRING_HEADER_VALUE;
    header->attempt = 0;
    header->bytes = sizeof(number);
    header->whole_bytes = sizeof(number);
    *(u64 *)(header + 1) = number;
    process->record_bytes = at + sizeof(struct string_header) + sizeof(number);
}

/* Headers that nginx makes from members of its struct when it sends the response. In the list they are only if a peer or a module
 * made them (ngx_http_header_filter). It adds the charset to content_type itself. */
static __always_inline void capture_members(struct process *process)
{
#if CAPTURES_CONTENT_TYPE
    if (OF_HEADERS_OUT(struct ngx_str, OUT_CONTENT_TYPE).len) {
        struct ngx_str *value = &OF_HEADERS_OUT(struct ngx_str, OUT_CONTENT_TYPE);
        set_name(process, NAME_LOW_content_type, NAME_HIGH_content_type);
        append_captured(process, STRING_RESPONSE_HEADER, LENGTH_content_type, value, value->data);
    }
#endif
#if CAPTURES_CONTENT_LENGTH
    if (!OF_HEADERS_OUT(u64, OUT_CONTENT_LENGTH) && OF_HEADERS_OUT(s64, OFFSET_ngx_http_headers_out_t__content_length_n) >= 0) {
        set_name(process, NAME_LOW_content_length, NAME_HIGH_content_length);
        append_number(process, LENGTH_content_length, CAPTURED_NUMBER,
                      OF_HEADERS_OUT(u64, OFFSET_ngx_http_headers_out_t__content_length_n));
    }
#endif
#if CAPTURES_LAST_MODIFIED
    if (!OF_HEADERS_OUT(u64, OUT_LAST_MODIFIED) && OF_HEADERS_OUT(s64, OUT_LAST_MODIFIED_TIME) != -1) {
        set_name(process, NAME_LOW_last_modified, NAME_HIGH_last_modified);
        append_number(process, LENGTH_last_modified, CAPTURED_TIME, OF_HEADERS_OUT(u64, OUT_LAST_MODIFIED_TIME));
    }
#endif
}

/* Copies headers into the record that was just made, and sends it. */
int capture_headers(struct pt_regs *ctx)
{
    u32 tgid = current_tgid();
    struct process *process = processes.lookup(&tgid);
    if (!process) {
        want_no_private_stack(ctx);
        return 0;
    }
    struct request_record *record = (struct request_record *)process->record;
    u64 begin = process->record_bytes;
    bool answered = CAPTURED_RESPONSE_BITS && has_response_header(process);
    process->found_headers_count = 0;
    process->found_too_many = 0;
    if (CAPTURED_REQUEST_BITS) {
        u8 *headers_in = process->request + OFFSET_ngx_http_request_s__headers_in;
        find_headers(process, headers_in + OFFSET_ngx_http_headers_in_t__headers, STRING_REQUEST_HEADER, CAPTURED_REQUEST_BITS);
    }
    if (answered) /* the list is the first member */
        find_headers(process, process->request + OFFSET_ngx_http_request_s__headers_out, STRING_RESPONSE_HEADER,
                     CAPTURED_RESPONSE_BITS);
    if (process->found_too_many)
        miss_headers(process);
    asm volatile("" ::: "memory");
    u64 count = process->found_headers_count;
    EACH(i, count, CAPTURED_FOUND_MAX - 1)
        capture_header(process, &process->found_headers[i]);
    if (answered)
        capture_members(process);
    asm volatile("" ::: "memory");
    if (process->record_bytes != begin)
        record->headers_at = begin;
    send_record(process);
#if REQUEST_METRICS
    measure(ctx);
#else
    want_no_private_stack(ctx);
#endif
    return 0;
}
#endif
