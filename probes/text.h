/*
 * Finds bytes in text, and methods, eight bytes at a time.
 *
 * The code uses no maps and has no loops, so that the kernel program and the unit tests (gcc) compile the same text.
 */

#define LOWER_CASE 0x2020202020202020ULL

/* Returns 0 for 0, and 1 for other numbers, without a branch. The asm keeps clang from making a branch. */
static __always_inline u64 is_not_0(u64 number)
{
    u64 sign = number | -number;
    asm volatile("" : "+r"(sign));
    return sign >> 63;
}

/* Marks the bytes of a word that are 0 with 0x80. Bytes above the lowest such byte may be marked wrongly. */
static __always_inline u64 zero_bytes(u64 word)
{
    return (word - EVERY_BYTE) & ~word & 0x80 * EVERY_BYTE;
}

/* Returns how many bytes of a word precede the end of its lowest marked byte, with that byte; 8: no byte is marked, or the last. */
static __always_inline u64 bytes_through(u64 marked)
{
    return ((((marked & -marked) - 1) & EVERY_BYTE) * EVERY_BYTE) >> 56;
}

/* Returns the first `bytes` bytes of a text, as a little-endian number. */
static __always_inline u64 first_bytes(u64 text, u64 bytes)
{
    return bytes >= sizeof(text) ? text : text & ((1ULL << (8 * bytes)) - 1);
}

/* Returns the text with A-Z as a-z. */
static __always_inline u64 lower_case(u64 text)
{
    u64 low_bits = text & 0x7f * EVERY_BYTE;
    u64 from_a = low_bits + (0x80 - 'A') * EVERY_BYTE, behind_z = low_bits + (0x7f - 'Z') * EVERY_BYTE;
    return text | ((from_a ^ behind_z) & ~text & 0x80 * EVERY_BYTE) >> 2;
}

/* Returns the number of bytes before the first space in 16 bytes of text; 16: there is no space. */
static __always_inline u64 bytes_before_space(u64 low, u64 high)
{
    u64 in_low = zero_bytes(low ^ ' ' * EVERY_BYTE), in_high = zero_bytes(high ^ ' ' * EVERY_BYTE);
    return in_low ? bytes_through(in_low) - 1 : in_high ? 7 + bytes_through(in_high) : 16;
}

/* Returns the number of spaces at the beginning of 8 bytes of text; 8: all are spaces. */
static __always_inline u64 leading_spaces(u64 text)
{
    u64 other = text ^ ' ' * EVERY_BYTE, low_bits = 0x7f * EVERY_BYTE;
    u64 marked = (((other & low_bits) + low_bits) | other) & 0x80 * EVERY_BYTE;
    return marked ? bytes_through(marked) - 1 : 8;
}

/* Returns the bit of a method. `text` is its text as a little-endian number. 1: another method. */
static __always_inline u32 method_of_text(u64 text)
{
    switch (text) {
    case 0x544547: /* GET */
        return METHOD_GET;
    case 0x44414548: /* HEAD */
        return METHOD_HEAD;
    case 0x54534f50: /* POST */
        return METHOD_POST;
    case 0x545550: /* PUT */
        return METHOD_PUT;
    case 0x4554454c4544: /* DELETE */
        return METHOD_DELETE;
    case 0x534e4f4954504f: /* OPTIONS */
        return METHOD_OPTIONS;
    case 0x4843544150: /* PATCH */
        return METHOD_PATCH;
    case 0x4543415254: /* TRACE */
        return METHOD_TRACE;
    case 0x5443454e4e4f43: /* CONNECT */
        return METHOD_CONNECT;
    case 0x5952455551: /* QUERY */
        return METHOD_QUERY;
    }
    return 1;
}
