/* proto_wire.h: byte strings, growable buffers, and a table-driven codec for proto3 messages.
 *
 * A message is a C struct whose members carry the .proto names, and one table row for each field:
 *
 *     struct Source { struct bytes type, url; bool encrypted; };
 *     PB_DEFINE(Source, PB_PLAIN, NULL,                            -> Source_fields, Source_message
 *         PB_ROW(Source, 1, STRING, 0, type,      NULL),           -> {number, kind, flags, offset, name, sub}
 *         PB_ROW(Source, 2, STRING, 0, url,       NULL),
 *         PB_ROW(Source, 4, BOOL,   0, encrypted, NULL));
 *
 * The rows stand in ascending number order and drive everything: decode, encode, JSON both ways, the walk over
 * unknown fields, and the descriptor that server reflection hands out.
 *
 * In memory    bool, int32 and enum (int32_t), int64; string and bytes are struct bytes; a sub-message is a pointer,
 *              NULL when absent; a repeated field, of strings, bytes or messages, is a struct pb_list.
 * Presence     proto3's implicit presence: zero is absent.  A oneof (one in a message, of messages, strings and
 *              bytes) is set where the pointer, or the p of the bytes, is not NULL.
 * Ownership    decoded bytes point into the input, all else lies in the arena: keep both while the message is used.
 * Left out     proto2, float, fixed and zigzag fields, maps, repeated scalars, extensions: no table here has them.
 */
#ifndef PROTO_WIRE_H
#define PROTO_WIRE_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* A run of bytes that somebody else owns.  p may be NULL only when n is 0. */
struct bytes {
    const uint8_t *p;
    size_t n;
};

/* A growable buffer.  All zero is empty.  A failed allocation sets `failed`, which sticks: later appends do
 * nothing, so a caller may append many times and test once.  A fixed one lies in the caller's array (buf_fixed). */
struct buf {
    uint8_t *p;
    size_t len, cap;
    bool failed, fixed;
};

#if defined(__GNUC__)
#define PRINTF_LIKE(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define PRINTF_LIKE(fmt, args)
#endif

#define BYTES(literal) ((struct bytes){ (const uint8_t *)(literal), sizeof(literal) - 1 })

static inline struct bytes bytes_of(const char *s)
{
    return (struct bytes){ (const uint8_t *)s, strlen(s) };
}

static inline bool bytes_eq(struct bytes a, struct bytes b)
{
    return a.n == b.n && (a.n == 0 || memcmp(a.p, b.p, a.n) == 0);
}

static inline void buf_free(struct buf *b)
{
    free(b->p);
    *b = (struct buf){ 0 };
}

/* A buffer in an array of cap bytes, at whose end it is cut. */
static inline struct buf buf_fixed(void *p, size_t cap)
{
    return (struct buf){ .p = p, .cap = cap, .fixed = true };
}

/* Makes room for n more bytes and returns where they start, or NULL (and `failed`) when there is no memory.
 * The caller adds what it wrote to b->len. */
static inline uint8_t *buf_room(struct buf *b, size_t n)
{
    if (b->failed)
        return NULL;
    if (b->cap - b->len < n) {
        size_t cap = b->cap ? b->cap : 256;
        while (cap - b->len < n && cap <= SIZE_MAX / 2)
            cap *= 2;
        uint8_t *p = b->fixed || cap - b->len < n ? NULL : realloc(b->p, cap);
        if (!p) {
            b->failed = true;
            return NULL;
        }
        b->p = p;
        b->cap = cap;
    }
    return b->p + b->len;
}

static inline void buf_put(struct buf *b, const void *p, size_t n)
{
    if (b->fixed && n > b->cap - b->len)
        n = b->cap - b->len;
    uint8_t *to = n ? buf_room(b, n) : NULL;
    if (to) {
        memcpy(to, p, n);
        b->len += n;
    }
}

static inline void buf_putc(struct buf *b, int c)
{
    buf_put(b, &(uint8_t){ (uint8_t)c }, 1);
}

static inline void buf_puts(struct buf *b, const char *s)
{
    buf_put(b, s, strlen(s));
}

/* Writes v's digits so that they end before `end`; returns where they begin. */
static inline char *buf_digits(char *end, uint64_t v, unsigned base, const char *digits)
{
    do
        *--end = digits[v % base];
    while (v /= base);
    return end;
}

/* Appends formatted text.  Of printf's conversions this has %s %c %d %u %x %X %%, the lengths l, ll and z, a width with
 * a 0 or - in front, and the precision of strings. */
PRINTF_LIKE(2, 0) static inline void buf_vprintf(struct buf *b, const char *fmt, va_list ap)
{
    for (const char *at; *(at = fmt + strcspn(fmt, "%")); fmt++) {
        char number[20], *end = number + sizeof number, *text = end;
        size_t n, width = 0, most = SIZE_MAX;
        buf_put(b, fmt, (size_t)(at - fmt));
        fmt = at + 1;
        char pad = *fmt;
        for (fmt += pad == '-' || pad == '0'; *fmt >= '0' && *fmt <= '9'; fmt++)
            width = width * 10 + (size_t)(*fmt - '0');
        if (*fmt == '.') {
            bool given = *++fmt == '*';
            most = given ? (size_t)va_arg(ap, int) : 0;
            for (fmt += given; *fmt >= '0' && *fmt <= '9'; fmt++)
                most = most * 10 + (size_t)(*fmt - '0');
        }
        unsigned size = *fmt == 'z' ? 3 : *fmt != 'l' ? 0 : fmt[1] == 'l' ? 2 : 1;
        fmt += size == 3 ? 1 : size;
        if (*fmt == 's') {
            text = end = va_arg(ap, char *);
            if (most)                 /* with a precision of 0 the pointer may be NULL */
                end += strnlen(text, most);
        } else if (*fmt == 'c') {
            *--text = (char)va_arg(ap, int);
        } else if (*fmt == 'd') {
            int64_t v = size == 2 ? va_arg(ap, long long) : size == 1 ? va_arg(ap, long) : va_arg(ap, int);
            text = buf_digits(end, v < 0 ? 0 - (uint64_t)v : (uint64_t)v, 10, "0123456789");
            if (v < 0)
                *--text = '-';
        } else if (*fmt == '%') {
            *--text = '%';
        } else {
            uint64_t v = size == 3 ? va_arg(ap, size_t) : size == 2 ? va_arg(ap, unsigned long long)
                       : size == 1 ? va_arg(ap, unsigned long) : va_arg(ap, unsigned);
            text = buf_digits(end, v, *fmt == 'u' ? 10 : 16, *fmt == 'X' ? "0123456789ABCDEF" : "0123456789abcdef");
        }
        n = (size_t)(end - text);
        for (; pad != '-' && width > n; width--)
            buf_putc(b, pad == '0' ? '0' : ' ');
        buf_put(b, text, n);
        for (; width > n; width--)
            buf_putc(b, ' ');
    }
    buf_puts(b, fmt);
}

PRINTF_LIKE(2, 3) static inline void buf_printf(struct buf *b, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    buf_vprintf(b, fmt, ap);
    va_end(ap);
}

/* Formats into an array of cap > 0 bytes, cut at its end, always terminated.  Returns the length. */
PRINTF_LIKE(3, 0) static inline size_t text_vprintf(char *to, size_t cap, const char *fmt, va_list ap)
{
    struct buf b = buf_fixed(to, cap - 1);
    buf_vprintf(&b, fmt, ap);
    to[b.len] = 0;
    return b.len;
}

PRINTF_LIKE(3, 4) static inline size_t text_printf(char *to, size_t cap, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    size_t n = text_vprintf(to, cap, fmt, ap);
    va_end(ap);
    return n;
}

/* ---- Arena -------------------------------------------------------------------------------------------------------
 * Zeroed memory, freed all at once.  `limit` bounds what is taken from malloc, block headers included.  The oldest
 * block outlives a reset unless it is an outsize one, so a stream of small messages costs no malloc per message. */
#define PB_BLOCK 4096

struct pb_block {
    struct pb_block *next;      /* the one before it */
    size_t cap;                 /* bytes after this header */
};

/* Empty when all but `limit` is zero. */
struct pb_arena {
    struct pb_block *newest;
    size_t used;                /* bytes taken of the newest block */
    size_t held, limit;
};

/* Returns n zeroed bytes, aligned to 8, or NULL: over the limit, or no memory. */
static inline void *pb_arena_alloc(struct pb_arena *a, size_t n)
{
    if (n > SIZE_MAX / 2)
        return NULL;
    n = (n + 7) & ~(size_t)7;
    if (!a->newest || n > a->newest->cap - a->used) {
        size_t cap = n > PB_BLOCK - sizeof(struct pb_block) ? n : PB_BLOCK - sizeof(struct pb_block);
        size_t size = cap + sizeof(struct pb_block);
        struct pb_block *b = size > a->limit - a->held ? NULL : malloc(size);
        if (!b)
            return NULL;
        *b = (struct pb_block){ a->newest, cap };
        a->newest = b;
        a->held += size;
        a->used = 0;
    }
    void *p = (uint8_t *)(a->newest + 1) + a->used;
    a->used += n;
    return memset(p, 0, n);
}

static void pb_arena_pop(struct pb_arena *a)
{
    struct pb_block *b = a->newest;
    a->newest = b->next;
    a->held -= b->cap + sizeof *b;
    free(b);
}

/* Ends the life of all that was allocated. */
static inline void pb_arena_reset(struct pb_arena *a)
{
    while (a->newest && (a->newest->next || a->newest->cap > PB_BLOCK))
        pb_arena_pop(a);
    a->used = 0;
}

static inline void pb_arena_free(struct pb_arena *a)
{
    while (a->newest)
        pb_arena_pop(a);
}

/* ---- Tables ------------------------------------------------------------------------------------------------------ */
enum pb_kind { PB_BOOL, PB_INT32, PB_INT64, PB_ENUM, PB_STRING, PB_BYTES, PB_MESSAGE };
enum pb_flag { PB_ONEOF = 1, PB_REPEATED = 2 };
enum pb_form { PB_PLAIN, PB_TIMESTAMP };
enum pb_wire { PB_VARINT, PB_FIXED64, PB_LEN, PB_SGROUP, PB_EGROUP, PB_FIXED32 };
enum { PB_MAX_DEPTH = 100, PB_MAX_NUMBER = (1 << 29) - 1, PB_NAME_MAX = 64 };

struct pb_field {
    uint32_t number;
    uint8_t kind, flags;
    uint16_t offset;
    const char *name;           /* under PB_NAME_MAX bytes */
    const void *sub;            /* struct pb_message, or struct pb_enum, or NULL */
};

struct pb_message {
    const char *name;
    const struct pb_field *fields;
    size_t n, size;             /* rows (at most 64), bytes of the struct */
    enum pb_form form;          /* PB_TIMESTAMP: the struct is struct Timestamp */
    const char *oneof;
};

struct pb_enum {
    const char *name;
    const char *const *values;  /* names of 0, 1, 2 ... */
    size_t n;
};

/* Items stand side by side: struct bytes, or structs of the sub-message.  cap is the decoder's. */
struct pb_list {
    void *items;
    size_t n, cap;
};

#define PB_COUNT(array) (sizeof(array) / sizeof *(array))
#define PB_ROW(T, number, kind, flags, member, sub) \
    { number, PB_##kind, flags, offsetof(struct T, member), #member, sub }
#define PB_DEFINE(T, form, oneof, ...) \
    static const struct pb_field T##_fields[] = { __VA_ARGS__ }; \
    static const struct pb_message T##_message = { #T, T##_fields, PB_COUNT(T##_fields), sizeof(struct T), form, oneof }

#define PB_DEFINE_EMPTY(T) \
    static const struct pb_message T##_message = { #T, NULL, 0, sizeof(struct T), PB_PLAIN, NULL }

/* Index of the row with this number, m->n if there is none. */
static size_t pb_row(const struct pb_message *m, uint64_t number)
{
    size_t i = 0;
    while (i < m->n && m->fields[i].number != number)
        i++;
    return i;
}

static bool pb_is_scalar(const struct pb_field *f)
{
    return f->kind < PB_STRING;
}

/* Bytes of one item of a repeated field. */
static size_t pb_item_size(const struct pb_field *f)
{
    return f->kind == PB_MESSAGE ? ((const struct pb_message *)f->sub)->size : sizeof(struct bytes);
}

static void pb_store(const struct pb_field *f, void *at, uint64_t v)
{
    if (f->kind == PB_BOOL)
        *(bool *)at = v != 0;
    else if (f->kind == PB_INT64)
        *(int64_t *)at = (int64_t)v;
    else
        *(int32_t *)at = (int32_t)v;            /* proto3: the low 32 bits count */
}

/* The value as it goes on the wire: negative ones sign-extended to 64 bits. */
static uint64_t pb_load(const struct pb_field *f, const void *at)
{
    if (f->kind == PB_BOOL)
        return *(const bool *)at;
    return f->kind == PB_INT64 ? (uint64_t)*(const int64_t *)at : (uint64_t)(int64_t)*(const int32_t *)at;
}

/* Members are pointers to many types: copied, not aliased. */
static void *pb_pointer(const void *at)
{
    void *p;
    memcpy(&p, at, sizeof p);
    return p;
}

static bool pb_is_set(const struct pb_field *f, const void *at)
{
    if (f->flags & PB_REPEATED)
        return ((const struct pb_list *)at)->n != 0;
    if (pb_is_scalar(f))
        return pb_load(f, at) != 0;
    if (f->kind == PB_MESSAGE || f->flags & PB_ONEOF)           /* or the p of struct bytes */
        return pb_pointer(at) != NULL;
    return ((const struct bytes *)at)->n != 0;
}

/* Appends a zeroed item of `size` bytes and returns it; NULL when the arena is used up. */
static void *pb_list_add(struct pb_arena *a, struct pb_list *list, size_t size)
{
    if (list->n >= list->cap) {
        if (list->n > SIZE_MAX / 4 / size)
            return NULL;
        size_t cap = list->n < 4 ? 4 : list->n * 2;
        void *items = pb_arena_alloc(a, cap * size);
        if (!items)
            return NULL;
        if (list->n)
            memcpy(items, list->items, list->n * size);
        list->items = items;
        list->cap = cap;
    }
    return (uint8_t *)list->items + size * list->n++;
}

/* The sub-message of a singular field, made if absent; NULL when the arena is used up. */
static void *pb_make(struct pb_arena *a, const struct pb_field *f, void *at)
{
    void *sub = pb_pointer(at);
    if (!sub && (sub = pb_arena_alloc(a, ((const struct pb_message *)f->sub)->size)))
        memcpy(at, &sub, sizeof sub);
    return sub;
}

/* ---- UTF-8 (RFC 3629) -------------------------------------------------------------------------------------------- */
/* Length of the character at p, 1 to 4, with its code point in *c; 0 if it is not well formed.  p < end. */
static size_t pb_utf8_char(const uint8_t *p, const uint8_t *end, uint32_t *c)
{
    static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
    size_t n = p[0] < 0x80 ? 1 : p[0] < 0xc0 ? 0 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : p[0] < 0xf8 ? 4 : 0;
    if (n == 0 || (size_t)(end - p) < n)
        return 0;
    *c = n == 1 ? p[0] : p[0] & (0x7fu >> n);
    for (size_t i = 1; i < n; i++) {
        if ((p[i] & 0xc0) != 0x80)
            return 0;
        *c = *c << 6 | (p[i] & 0x3f);
    }
    return *c < least[n] || *c > 0x10ffff || *c >> 11 == 0xd800 >> 11 ? 0 : n;
}

/* The top bits of 8 bytes; none is set in ASCII. */
static inline uint64_t pb_top8(const uint8_t *p)
{
    uint64_t x;
    memcpy(&x, p, 8);
    return x & 0x8080808080808080;
}

static inline bool pb_utf8_valid(struct bytes s)
{
    const uint8_t *p = s.p, *end = s.n ? s.p + s.n : p;
    while (p < end) {
        while (end - p >= 32 && !(pb_top8(p) | pb_top8(p + 8) | pb_top8(p + 16) | pb_top8(p + 24)))
            p += 32;
        while (end - p >= 8 && !pb_top8(p))
            p += 8;
        if (end - p < 8 && s.n >= 8 && !pb_top8(end - 8))
            return true;
        uint32_t c;
        size_t n = *p >= 0x80 ? pb_utf8_char(p, end, &c) : 1;
        if (n == 0)
            return false;
        p += n;
    }
    return true;
}

/* ---- Decoding ---------------------------------------------------------------------------------------------------- */
enum pb_error { PB_OK, PB_TRUNCATED, PB_MALFORMED, PB_UTF8, PB_DEPTH, PB_LIMIT };

static const char *const pb_error_text[] = {
    [PB_OK] = "ok",
    [PB_TRUNCATED] = "message ends inside a field",
    [PB_MALFORMED] = "malformed message",
    [PB_UTF8] = "string field contains invalid UTF-8",
    [PB_DEPTH] = "message nested too deep",
    [PB_LIMIT] = "message needs too much memory",
};

struct pb_decoder {
    struct pb_arena *arena;
    enum pb_error error;
    bool unknown;
};

/* A number and where the input goes on; p is NULL after an error.  Fits two registers. */
struct pb_num {
    const uint8_t *p;
    uint64_t v;
};

static const uint8_t *pb_fail(struct pb_decoder *d, enum pb_error e)
{
    d->error = e;
    return NULL;
}

static struct pb_num pb_varint_long(struct pb_decoder *d, const uint8_t *p, const uint8_t *end)
{
    uint64_t v = 0;
    for (unsigned shift = 0; shift < 70; shift += 7, p++) {
        if (p == end)
            return (struct pb_num){ pb_fail(d, PB_TRUNCATED), 0 };
        v |= (uint64_t)(*p & 0x7f) << shift;
        if (*p < 0x80)
            return (struct pb_num){ shift == 63 && *p > 1 ? pb_fail(d, PB_MALFORMED) : p + 1, v };
    }
    return (struct pb_num){ pb_fail(d, PB_MALFORMED), 0 };
}

static inline struct pb_num pb_varint(struct pb_decoder *d, const uint8_t *p, const uint8_t *end)
{
    if (p < end && *p < 0x80)
        return (struct pb_num){ p + 1, *p };
    return pb_varint_long(d, p, end);
}

/* A length, with the bytes it counts known to be there. */
static inline struct pb_num pb_length(struct pb_decoder *d, const uint8_t *p, const uint8_t *end)
{
    struct pb_num n = pb_varint(d, p, end);
    if (n.p && n.v > (uint64_t)(end - n.p))
        n.p = pb_fail(d, PB_MALFORMED);
    return n;
}

/* Returns the end of the field whose tag was just read, at p.  A group is skipped with all it holds. */
static const uint8_t *pb_skip(struct pb_decoder *d, uint64_t tag, const uint8_t *p, const uint8_t *end, unsigned depth)
{
    unsigned wire = tag & 7;
    ptrdiff_t size = wire == PB_FIXED64 ? 8 : 4;
    struct pb_num n = { p, 0 };
    if (tag >> 3 == 0 || tag >> 3 > PB_MAX_NUMBER)
        return pb_fail(d, PB_MALFORMED);
    if (wire == PB_VARINT)
        return pb_varint(d, p, end).p;
    if (wire == PB_LEN) {
        n = pb_length(d, p, end);
        return n.p ? n.p + n.v : NULL;
    }
    if (wire == PB_FIXED32 || wire == PB_FIXED64)
        return end - p < size ? pb_fail(d, PB_TRUNCATED) : p + size;
    if (wire != PB_SGROUP)                      /* an end-group that ends nothing, or a wire type that is none */
        return pb_fail(d, PB_MALFORMED);
    if (depth >= PB_MAX_DEPTH)
        return pb_fail(d, PB_DEPTH);
    while (n.p && (n = pb_varint(d, n.p, end)).p && n.v != tag + 1)     /* PB_EGROUP of the same number */
        n.p = pb_skip(d, n.v, n.p, end, depth + 1);
    return n.p;
}

/* Whether the field may come with this wire type. */
static inline bool pb_accepts(const struct pb_field *f, uint64_t wire)
{
    return wire == (pb_is_scalar(f) ? PB_VARINT : PB_LEN);
}

static void pb_clear_oneof(const struct pb_message *m, const struct pb_field *but, void *msg)
{
    for (const struct pb_field *f = m->fields; f < m->fields + m->n; f++)
        if (f != but && f->flags & PB_ONEOF)
            memset((uint8_t *)msg + f->offset, 0, f->kind == PB_MESSAGE ? sizeof(void *) : sizeof(struct bytes));
}

static const uint8_t *pb_decode_message(struct pb_decoder *d, const struct pb_message *m, void *msg,
                                        const uint8_t *p, const uint8_t *end, unsigned depth);

/* Decodes one value into the member at `at`; p is behind the tag.  Returns where the field ends, or NULL. */
static const uint8_t *pb_decode_field(struct pb_decoder *d, const struct pb_field *f, void *at,
                                      const uint8_t *p, const uint8_t *end, unsigned depth)
{
    struct pb_num n = pb_is_scalar(f) ? pb_varint(d, p, end) : pb_length(d, p, end);
    if (!n.p)
        return NULL;
    if (pb_is_scalar(f)) {
        pb_store(f, at, n.v);
        return n.p;
    }
    bool repeated = f->flags & PB_REPEATED;
    if (repeated && !(at = pb_list_add(d->arena, at, pb_item_size(f))))
        return pb_fail(d, PB_LIMIT);
    if (f->kind == PB_MESSAGE) {
        if (depth >= PB_MAX_DEPTH)
            return pb_fail(d, PB_DEPTH);
        void *sub = repeated ? at : pb_make(d->arena, f, at);
        return sub ? pb_decode_message(d, f->sub, sub, n.p, n.p + n.v, depth + 1) : pb_fail(d, PB_LIMIT);
    }
    struct bytes s = { n.p, (size_t)n.v };
    if (f->kind == PB_STRING && !pb_utf8_valid(s))
        return pb_fail(d, PB_UTF8);
    *(struct bytes *)at = s;
    return s.p + s.n;
}

static const uint8_t *pb_decode_message(struct pb_decoder *d, const struct pb_message *m, void *msg,
                                        const uint8_t *p, const uint8_t *end, unsigned depth)
{
    size_t row = 0;                             /* fields mostly come in row order: try the next row first */
    while (p && p < end) {
        struct pb_num tag = pb_varint(d, p, end);
        if (!tag.p)
            return NULL;
        if (row >= m->n || m->fields[row].number != tag.v >> 3)
            row = pb_row(m, tag.v >> 3);
        if (row < m->n && pb_accepts(&m->fields[row], tag.v & 7)) {
            const struct pb_field *f = &m->fields[row];
            if (f->flags & PB_ONEOF)
                pb_clear_oneof(m, f, msg);
            p = pb_decode_field(d, f, (uint8_t *)msg + f->offset, tag.p, end, depth);
            row += !(f->flags & PB_REPEATED);
        } else {
            d->unknown = true;
            p = pb_skip(d, tag.v, tag.p, end, depth);
        }
    }
    return p;
}

/* Merges the encoded message into *msg, which the caller zeroed.  *unknown (it may be NULL) tells whether fields were
 * skipped that the tables do not have, or have with another wire type.  After an error *msg is part of a message, safe to
 * look at. */
static inline enum pb_error pb_decode(const struct pb_message *m, void *msg, struct bytes in, struct pb_arena *a,
                                      bool *unknown)
{
    struct pb_decoder d = { .arena = a };
    if (in.n)
        pb_decode_message(&d, m, msg, in.p, in.p + in.n, 0);
    if (unknown)
        *unknown = d.unknown;
    return d.error;
}

/* ---- Unknown fields ---------------------------------------------------------------------------------------------- */
/* path: the way to the field, "agent_log.9".  A varint or fixed number is in value; in `bytes` is what a length counts,
 * or a group's fields and its end tag.  They point into the input. */
typedef void pb_unknown_fn(void *arg, const char *path, unsigned wire_type, uint64_t value, struct bytes bytes);

struct pb_walk {
    pb_unknown_fn *fn;
    void *arg;
    struct pb_decoder d;
    char path[256];             /* a longer path is cut */
};

static void pb_report(struct pb_walk *w, uint64_t tag, const uint8_t *p, const uint8_t *end)
{
    unsigned wire = tag & 7;
    struct pb_num n = wire == PB_VARINT ? pb_varint(&w->d, p, end) : (struct pb_num){ p, 0 };
    struct bytes bytes = { NULL, 0 };
    if (wire == PB_FIXED32 || wire == PB_FIXED64)
        for (const uint8_t *q = end; q > p;)
            n.v = n.v << 8 | *--q;
    else if (wire != PB_VARINT) {
        const uint8_t *from = wire == PB_LEN ? pb_length(&w->d, p, end).p : p;
        bytes = (struct bytes){ from, (size_t)(end - from) };
    }
    w->fn(w->arg, w->path, wire, n.v, bytes);
}

/* len: of the path so far. */
static void pb_walk(struct pb_walk *w, const struct pb_message *m, const uint8_t *p, const uint8_t *end, size_t len,
                    unsigned depth)
{
    while (p < end && depth <= PB_MAX_DEPTH) {
        struct pb_num tag = pb_varint(&w->d, p, end);
        p = tag.p ? pb_skip(&w->d, tag.v, tag.p, end, depth) : NULL;
        if (!p)
            return;
        size_t row = pb_row(m, tag.v >> 3), room = sizeof w->path - len;
        bool known = row < m->n && pb_accepts(&m->fields[row], tag.v & 7);
        if (known && m->fields[row].kind != PB_MESSAGE)
            continue;
        const char *dot = len ? "." : "";
        size_t more = known ? text_printf(w->path + len, room, "%s%s", dot, m->fields[row].name)
                            : text_printf(w->path + len, room, "%s%u", dot, (unsigned)(tag.v >> 3));
        if (!known)
            pb_report(w, tag.v, tag.p, p);
        else
            pb_walk(w, m->fields[row].sub, pb_length(&w->d, tag.p, end).p, p, len + more, depth + 1);
    }
}

/* Calls fn for each unknown field of a message that pb_decode took, in wire order. */
static inline void pb_unknown(const struct pb_message *m, struct bytes in, pb_unknown_fn *fn, void *arg)
{
    struct pb_walk w = { .fn = fn, .arg = arg };
    if (in.n)
        pb_walk(&w, m, in.p, in.p + in.n, 0, 0);
}

/* ---- Encoding ----------------------------------------------------------------------------------------------------
 * From the last field to the first, into the end of the buffer: when the length of a sub-message is needed, it stands
 * there already, and one pass is enough.  Meanwhile buf.len counts from the end. */
static inline size_t pb_varint_size(uint64_t v)
{
    size_t n = 1;
    while (v >>= 7)
        n++;
    return n;
}

/* Writes at most 10 bytes and returns where they end. */
static inline uint8_t *pb_varint_put(uint8_t *to, uint64_t v)
{
    for (; v >= 0x80; v >>= 7)
        *to++ = (uint8_t)(v | 0x80);
    *to++ = (uint8_t)v;
    return to;
}

/* Room for n > 0 bytes in front of what has been written; NULL when there is no memory. */
static uint8_t *pb_before(struct buf *b, size_t n)
{
    size_t was = b->cap;
    if (!buf_room(b, n))
        return NULL;
    if (was != b->cap && b->len)
        memmove(b->p + b->cap - b->len, b->p + was - b->len, b->len);
    b->len += n;
    return b->p + b->cap - b->len;
}

static void pb_before_varint(struct buf *b, uint64_t v)
{
    uint8_t *to = pb_before(b, pb_varint_size(v));
    if (to)
        pb_varint_put(to, v);
}

static void pb_before_bytes(struct buf *b, struct bytes s)
{
    uint8_t *to = s.n ? pb_before(b, s.n) : NULL;
    if (to)
        memcpy(to, s.p, s.n);
}

static void pb_encode_number(struct buf *b, uint32_t number, uint64_t v)
{
    pb_before_varint(b, v);
    pb_before_varint(b, (uint64_t)number << 3 | PB_VARINT);
}

/* Makes a length-delimited field of all that was written since the length was `mark`. */
static void pb_close(struct buf *b, uint32_t number, size_t mark)
{
    pb_before_varint(b, b->len - mark);
    pb_before_varint(b, (uint64_t)number << 3 | PB_LEN);
}

static void pb_encode_bytes(struct buf *b, uint32_t number, struct bytes s)
{
    size_t mark = b->len;
    pb_before_bytes(b, s);
    pb_close(b, number, mark);
}

/* Recurses as deep as msg, which the tables or what made it (pb_decode, pb_json_parse, pb_set_path) have bounded. */
static void pb_encode_message(struct buf *b, const struct pb_message *m, const void *msg)
{
    for (size_t row = m->n; row-- > 0;) {
        const struct pb_field *f = &m->fields[row];
        const uint8_t *at = (const uint8_t *)msg + f->offset;
        if (!pb_is_set(f, at))
            continue;
        const struct pb_list *list = f->flags & PB_REPEATED ? (const void *)at : NULL;
        for (size_t i = list ? list->n : 1; i-- > 0;) {
            const void *item = list ? (const uint8_t *)list->items + i * pb_item_size(f) : at;
            size_t mark = b->len;
            if (f->kind == PB_MESSAGE)
                pb_encode_message(b, f->sub, list ? item : pb_pointer(at));
            else if (!pb_is_scalar(f))
                pb_before_bytes(b, *(const struct bytes *)item);
            if (pb_is_scalar(f))
                pb_encode_number(b, f->number, pb_load(f, item));
            else
                pb_close(b, f->number, mark);
        }
    }
}

/* What was written from the end, handed out; b is left empty for the next use. */
static struct bytes pb_written(struct buf *b)
{
    struct bytes all = { NULL, 0 };
    if (b->len && !b->failed)
        all = (struct bytes){ b->p + b->cap - b->len, b->len };
    b->len = 0;
    return all;
}

/* Encodes msg, fields in ascending order, always to the same bytes.  b owns the result, which lives until b is used
 * again; what b held is lost.  No memory: b->failed, and no bytes. */
static inline struct bytes pb_encode(struct buf *b, const struct pb_message *m, const void *msg)
{
    b->len = 0;
    pb_encode_message(b, m, msg);
    return pb_written(b);
}

/* ---- Text forms of times and bytes ------------------------------------------------------------------------------- */
#define PB_FIRST_SECOND (-62135596800)          /* 0001-01-01T00:00:00Z */
#define PB_LAST_SECOND  253402300799            /* 9999-12-31T23:59:59Z */

/* google.protobuf.Timestamp, the one message that JSON writes as text. */
struct Timestamp {
    int64_t seconds;
    int32_t nanos;
};

/* n decimal digits, two at a time. */
static uint8_t *pb_digits(uint8_t *to, unsigned n, uint32_t v)
{
    static const char pairs[] = "00010203040506070809101112131415161718192021222324252627282930313233343536373839404142"
                                "43444546474849505152535455565758596061626364656667686970717273747576777879808182838485"
                                "8687888990919293949596979899";
    unsigned i = n;
    for (; i > 1; i -= 2, v /= 100)
        memcpy(to + i - 2, pairs + v % 100 * 2, 2);
    if (i)
        *to = (uint8_t)('0' + v % 10);
    return to + n;
}

static bool pb_timestamp_valid(const struct Timestamp *t)
{
    return t->seconds >= PB_FIRST_SECOND && t->seconds <= PB_LAST_SECOND && t->nanos >= 0 && t->nanos <= 999999999;
}

/* Appends an RFC 3339 time in UTC with 0, 3, 6 or 9 digits of fraction; outside the years 1 to 9999 returns false and
 * appends nothing. */
static inline bool pb_timestamp(struct buf *out, int64_t seconds, int32_t nanos)
{
    uint8_t *to = pb_timestamp_valid(&(struct Timestamp){ seconds, nanos }) ? buf_room(out, 32) : NULL;
    if (!to)
        return false;
    /* Years from March, so that a leap day comes last; days from 0000-03-01, 306 before 0001-01-01. */
    uint64_t s = (uint64_t)(seconds - PB_FIRST_SECOND), days = s / 86400 + 306;
    uint64_t era = days / 146097, in_era = days % 146097;
    uint64_t year = (in_era - in_era / 1460 + in_era / 36524 - in_era / 146096) / 365;
    uint64_t day = in_era - (365 * year + year / 4 - year / 100), month = (5 * day + 2) / 153;
    uint32_t clock = (uint32_t)(s % 86400);
    uint32_t part[] = { (uint32_t)(era * 400 + year + (month > 9)), (uint32_t)(month > 9 ? month - 9 : month + 3),
                        (uint32_t)(day - (153 * month + 2) / 5 + 1), clock / 3600, clock / 60 % 60, clock % 60 };
    for (unsigned i = 0; i < 6; i++) {
        to = pb_digits(to, i ? 2 : 4, part[i]);
        *to++ = (uint8_t)"--T::"[i];
    }
    to[-1] = 'Z';
    if (nanos) {
        to[-1] = '.';
        unsigned digits = nanos % 1000 ? 9 : nanos % 1000000 ? 6 : 3;
        to = pb_digits(to, digits, (uint32_t)nanos / (digits == 9 ? 1 : digits == 6 ? 1000 : 1000000));
        *to++ = 'Z';
    }
    out->len = (size_t)(to - out->p);
    return true;
}

static const char pb_base64_digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/* The value of a base64 digit (RFC 4648 4); -1: it is none. */
static inline int pb_base64_digit(int c)
{
    return c >= 'A' && c <= 'Z' ? c - 'A' : c >= 'a' && c <= 'z' ? c - 'a' + 26 : c >= '0' && c <= '9' ? c - '0' + 52
         : c == '+' ? 62 : c == '/' ? 63 : -1;
}

/* Appends RFC 4648 base64 with padding. */
static inline void pb_base64(struct buf *out, struct bytes s)
{
    if (s.n > SIZE_MAX / 2)
        out->failed = true;
    uint8_t *to = s.n ? buf_room(out, (s.n + 2) / 3 * 4) : NULL;
    if (!to)
        return;
    for (size_t i = 0; i < s.n; i += 3) {
        size_t left = s.n - i;
        uint32_t v = (uint32_t)s.p[i] << 16 | (left > 1 ? (uint32_t)s.p[i + 1] << 8 : 0) | (left > 2 ? s.p[i + 2] : 0);
        for (unsigned k = 0; k < 4; k++)
            *to++ = (uint8_t)(k <= left ? pb_base64_digits[v >> (18 - 6 * k) & 63] : '=');
    }
    out->len = (size_t)(to - out->p);
}

/* ---- JSON out (the canonical mapping of proto3) ------------------------------------------------------------------ */
/* lowerCamelCase by protobuf's rule: underscores go, and a small letter after one becomes a capital. */
static size_t pb_json_name(char to[PB_NAME_MAX], const char *name)
{
    size_t n = 0;
    for (bool up = false; *name; name++) {
        if (*name != '_')
            to[n++] = up && *name >= 'a' && *name <= 'z' ? (char)(*name - 32) : *name;
        up = *name == '_';
    }
    return n;
}

/* Whether a terminal or a line-based reader might take the character for more than text. */
static bool pb_is_unsafe(uint32_t c)
{
    return c < 0x20 || (c >= 0x7f && c < 0xa0) || c == 0x61c || c == 0x200e || c == 0x200f ||
           (c >= 0x2028 && c <= 0x202e) || (c >= 0x2066 && c <= 0x2069) || c == 0xfeff || c == 0xfffe || c == 0xffff;
}

/* The top bits of those of eight bytes that are not printable ASCII, or with json a quote or a backslash.  Carries and
 * borrows come only from bytes that are found themselves. */
static inline uint64_t pb_odd8(const uint8_t *p, bool json)
{
    const uint64_t ones = 0x0101010101010101;
    uint64_t x;
    memcpy(&x, p, 8);
    uint64_t odd = x | (x + ones) | (x - 0x20 * ones);
    if (json)
        odd |= ((x ^ '"' * ones) - ones) | ((x ^ '\\' * ones) - ones);
    return odd & 0x80 * ones;
}

/* How many bytes, by eights, can be shown as they are: most text is plain for long stretches. */
static inline size_t pb_plain(const uint8_t *p, size_t n, bool json)
{
    size_t i = 0;
    while (n - i >= 32 &&
           !(pb_odd8(p + i, json) | pb_odd8(p + i + 8, json) | pb_odd8(p + i + 16, json) | pb_odd8(p + i + 24, json)))
        i += 32;
    while (n - i >= 8 && !pb_odd8(p + i, json))
        i += 8;
    return i;
}

/* Writes the character at p, escaped if need be, and returns how many bytes of input it took. */
static size_t pb_json_char(struct buf *out, const uint8_t *p, const uint8_t *end)
{
    static const char hex[] = "0123456789abcdef", name[] = "\"\\\b\f\n\r\t", letter[] = "\"\\bfnrt";
    uint32_t c;
    size_t n = pb_utf8_char(p, end, &c);
    if (n == 0)
        c = 0xfffd;             /* decoded strings are valid; a caller's own may not be */
    const char *short_form = c && c < 0x80 ? strchr(name, (int)c) : NULL;
    if (short_form)
        buf_put(out, (char[]){ '\\', letter[short_form - name] }, 2);
    else if (n == 0 || pb_is_unsafe(c))
        buf_put(out, (char[]){ '\\', 'u', hex[c >> 12], hex[c >> 8 & 15], hex[c >> 4 & 15], hex[c & 15] }, 6);
    else
        buf_put(out, p, n);
    return n ? n : 1;
}

/* Appends a quoted JSON string that is safe to show on a terminal and stays on its line. */
static inline void pb_json_string(struct buf *out, struct bytes s)
{
    buf_putc(out, '"');
    for (size_t from = 0, i = 0; i < s.n; from = i) {
        i += pb_plain(s.p + i, s.n - i, true);
        while (i < s.n && s.p[i] >= 0x20 && s.p[i] < 0x7f && s.p[i] != '"' && s.p[i] != '\\')
            i++;
        buf_put(out, s.p + from, i - from);
        if (i < s.n)
            i += pb_json_char(out, s.p + i, s.p + s.n);
    }
    buf_putc(out, '"');
}

/* Starts a new line when printing in many lines. */
static void pb_json_line(struct buf *out, int indent, int level)
{
    for (int i = -1; indent && i < indent * level; i++)
        buf_putc(out, i < 0 ? '\n' : ' ');
}

static void pb_json_message(struct buf *out, const struct pb_message *m, const void *msg, int indent, int level);

/* item: the member, or the item of a list. */
static void pb_json_value(struct buf *out, const struct pb_field *f, const void *item, int indent, int level)
{
    const struct pb_enum *e = f->sub;
    uint64_t v = pb_is_scalar(f) ? pb_load(f, item) : 0;
    if (f->kind == PB_MESSAGE)
        pb_json_message(out, f->sub, f->flags & PB_REPEATED ? item : pb_pointer(item), indent, level);
    else if (f->kind == PB_STRING || (f->kind == PB_ENUM && v < e->n))
        pb_json_string(out, f->kind == PB_ENUM ? bytes_of(e->values[v]) : *(const struct bytes *)item);
    else if (f->kind == PB_BYTES) {
        buf_putc(out, '"');
        pb_base64(out, *(const struct bytes *)item);
        buf_putc(out, '"');
    } else if (f->kind == PB_BOOL)
        buf_puts(out, v ? "true" : "false");
    else
        buf_printf(out, f->kind == PB_INT64 ? "\"%lld\"" : "%lld", (long long)v);
}

static void pb_json_list(struct buf *out, const struct pb_field *f, const struct pb_list *list, int indent, int level)
{
    for (size_t i = 0; i < list->n; i++) {
        buf_putc(out, i ? ',' : '[');
        pb_json_line(out, indent, level + 1);
        pb_json_value(out, f, (const uint8_t *)list->items + i * pb_item_size(f), indent, level + 1);
    }
    pb_json_line(out, indent, level);
    buf_putc(out, ']');
}

static void pb_json_message(struct buf *out, const struct pb_message *m, const void *msg, int indent, int level)
{
    const struct Timestamp *t = m->form == PB_TIMESTAMP ? msg : NULL;
    if (t && pb_timestamp_valid(t)) {
        buf_putc(out, '"');
        pb_timestamp(out, t->seconds, t->nanos);
        buf_putc(out, '"');
        return;
    }
    bool any = false;
    for (size_t row = 0; row < m->n; row++) {
        const struct pb_field *f = &m->fields[row];
        const uint8_t *at = (const uint8_t *)msg + f->offset;
        if (!pb_is_set(f, at))
            continue;
        char name[PB_NAME_MAX];
        size_t n = pb_json_name(name, f->name);
        buf_putc(out, any ? ',' : '{');
        any = true;
        pb_json_line(out, indent, level + 1);
        buf_putc(out, '"');
        buf_put(out, name, n);
        buf_puts(out, indent ? "\": " : "\":");
        if (f->flags & PB_REPEATED)
            pb_json_list(out, f, (const void *)at, indent, level + 1);
        else
            pb_json_value(out, f, at, indent, level + 1);
    }
    if (any)
        pb_json_line(out, indent, level);
    else
        buf_putc(out, '{');
    buf_putc(out, '}');
}

/* Appends the message; indent is the number of spaces for each level, 0 for all on one line. */
static inline void pb_json(struct buf *out, const struct pb_message *m, const void *msg, int indent)
{
    pb_json_message(out, m, msg, indent, 0);
}

/* ---- JSON in ----------------------------------------------------------------------------------------------------- */
struct pb_reader {
    const uint8_t *start, *p, *end;
    bool alone;                 /* one value, not JSON: there are no lines */
    struct pb_arena *arena;
    char *err;
    size_t errlen;
    struct buf path;            /* to the field being read, "datasets[1].source"; fixed */
};

/* Sets the error text, with line, path and nothing unprintable in it, and returns false. */
PRINTF_LIKE(2, 3) static bool pb_json_fail(struct pb_reader *r, const char *fmt, ...)
{
    struct buf b = buf_fixed(r->err, r->errlen - 1);
    size_t line = 1;
    for (const uint8_t *p = r->start; p < r->p; p++)
        line += *p == '\n';
    if (!r->alone)
        buf_printf(&b, "line %zu: ", line);
    buf_printf(&b, "%.*s%s", (int)r->path.len, (const char *)r->path.p, r->path.len ? ": " : "");
    va_list ap;
    va_start(ap, fmt);
    buf_vprintf(&b, fmt, ap);
    va_end(ap);
    for (size_t i = 0; i < b.len; i++)
        b.p[i] = b.p[i] >= ' ' && b.p[i] < 0x7f ? b.p[i] : '?';
    r->err[b.len] = 0;
    return false;
}

/* Fails, and says which fields the message has. */
static bool pb_fields_fail(struct pb_reader *r, const struct pb_message *m, const char *why)
{
    char names[400];
    size_t n = 0;
    for (size_t i = 0; i < m->n; i++)
        n += text_printf(names + n, sizeof names - n, "%s%s", i ? ", " : "", m->fields[i].name);
    return pb_json_fail(r, "%s; %s has %s", why, m->name, n ? names : "none");
}

/* The field of this name, in JSON's spelling or the .proto's, which is added to the path; NULL: there is none. */
static const struct pb_field *pb_field_named(struct pb_reader *r, const struct pb_message *m, struct bytes name)
{
    buf_printf(&r->path, "%s%.*s", r->path.len ? "." : "", name.n < 64 ? (int)name.n : 64, (const char *)name.p);
    for (const struct pb_field *f = m->fields; f < m->fields + m->n; f++) {
        char json_name[PB_NAME_MAX];
        size_t n = pb_json_name(json_name, f->name);
        if (bytes_eq(name, (struct bytes){ (uint8_t *)json_name, n }) || bytes_eq(name, bytes_of(f->name)))
            return f;
    }
    pb_fields_fail(r, m, "unknown field");
    return NULL;
}

/* The item of the list, behind the last a new one; NULL, and a failure, when the arena is used up. */
static void *pb_item(struct pb_reader *r, const struct pb_field *f, struct pb_list *list, size_t index)
{
    buf_printf(&r->path, "[%zu]", index);
    bool ok = index < list->n || pb_list_add(r->arena, list, pb_item_size(f)) || pb_json_fail(r, "not enough memory");
    return ok ? (uint8_t *)list->items + index * pb_item_size(f) : NULL;
}

/* The next byte that is not white space, not taken; 0 at the end. */
static int pb_peek(struct pb_reader *r)
{
    while (r->p < r->end && (*r->p == ' ' || *r->p == '\t' || *r->p == '\n' || *r->p == '\r'))
        r->p++;
    return r->p < r->end ? *r->p : 0;
}

static bool pb_take(struct pb_reader *r, const char *word)
{
    size_t n = strlen(word);
    pb_peek(r);
    if ((size_t)(r->end - r->p) < n || memcmp(r->p, word, n) != 0)
        return false;
    r->p += n;
    return true;
}

/* Takes "uXXXX", 4 hexadecimal digits, off *p; false if it is not there. */
static bool pb_hex4(const uint8_t **p, const uint8_t *end, uint32_t *v)
{
    static const char digits[] = "0123456789abcdef0123456789ABCDEF";
    *v = 0;
    for (unsigned i = 1; i < 5; i++) {
        const char *d = end - *p > 4 && **p == 'u' && (*p)[i] ? strchr(digits, (*p)[i]) : NULL;
        if (!d)
            return false;
        *v = *v << 4 | (uint32_t)((d - digits) & 15);
    }
    *p += 5;
    return true;
}

static uint8_t *pb_utf8_put(uint8_t *to, uint32_t c)
{
    unsigned more = c < 0x80 ? 0 : c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
    *to++ = (uint8_t)((more ? 0xff80u >> more : 0) | c >> (6 * more));
    while (more--)
        *to++ = (uint8_t)(0x80 | (c >> (6 * more) & 0x3f));
    return to;
}

/* Undoes the escape sequence whose letter is at *p; false if it is none.  Never writes more than it reads. */
static bool pb_unescape(uint8_t **to, const uint8_t **p, const uint8_t *end)
{
    static const char letter[] = "\"\\/bfnrt", means[] = "\"\\/\b\f\n\r\t";
    const char *found = **p ? strchr(letter, **p) : NULL;
    uint32_t c = found ? (uint8_t)means[found - letter] : 0, low;
    if (found)
        ++*p;
    else if (!pb_hex4(p, end, &c))
        return false;
    if (c >> 10 == 0xd800 >> 10) {                      /* the first half of a pair */
        if (end == *p || *(*p)++ != '\\' || !pb_hex4(p, end, &low) || low >> 10 != 0xdc00 >> 10)
            return false;
        c = 0x10000 + ((c & 0x3ff) << 10) + (low & 0x3ff);
    }
    *to = pb_utf8_put(*to, c);
    return true;
}

/* Reads a string; without escapes it stays where it is in the input.  A value that stands alone has no quotes. */
static bool pb_parse_string(struct pb_reader *r, struct bytes *s)
{
    if (r->alone) {
        *s = (struct bytes){ r->p, (size_t)(r->end - r->p) };
        r->p = r->end;
        return pb_utf8_valid(*s) || pb_json_fail(r, "invalid UTF-8");
    }
    if (!pb_take(r, "\""))
        return pb_json_fail(r, "a string was expected");
    const uint8_t *p = r->p, *end = p;
    while (end < r->end && *end >= 0x20 && *end != '"')
        end += *end == '\\' && r->end - end > 1 ? 2 : 1;
    if (end == r->end)
        return pb_json_fail(r, "the string does not end");
    if (*end != '"')
        return pb_json_fail(r, "control character in a string");
    *s = (struct bytes){ p, (size_t)(end - p) };
    if (s->n && memchr(p, '\\', s->n)) {
        uint8_t *out = pb_arena_alloc(r->arena, s->n), *to = out;
        if (!out)
            return pb_json_fail(r, "not enough memory");
        while (p < end)
            if (*p != '\\')
                *to++ = *p++;
            else if (p++, !pb_unescape(&to, &p, end))
                return pb_json_fail(r, "bad escape sequence in a string");
        *s = (struct bytes){ out, (size_t)(to - out) };
    }
    r->p = end + 1;
    return pb_utf8_valid(*s) || pb_json_fail(r, "invalid UTF-8 in a string");
}

/* Takes decimal digits and returns how many there were.  Their value is exact below UINT64_MAX / 10 * 10. */
static size_t pb_digits_take(struct bytes *s, uint64_t *v)
{
    size_t n = 0;
    for (*v = 0; n < s->n && s->p[n] >= '0' && s->p[n] <= '9'; n++)
        *v = *v < UINT64_MAX / 10 ? *v * 10 + (s->p[n] - '0') : UINT64_MAX;
    *s = (struct bytes){ s->p + n, s->n - n };
    return n;
}

static bool pb_byte_take(struct bytes *s, int c)
{
    if (!s->n || *s->p != c)
        return false;
    *s = (struct bytes){ s->p + 1, s->n - 1 };
    return true;
}

/* Undoes base64, of either alphabet, with or without padding. */
static bool pb_base64_read(struct pb_reader *r, struct bytes s, struct bytes *out)
{
    size_t n = s.n;
    while (s.n % 4 == 0 && n && s.n - n < 2 && s.p[n - 1] == '=')
        n--;
    uint8_t *to = pb_arena_alloc(r->arena, n / 4 * 3 + 3);
    if (!to)
        return pb_json_fail(r, "not enough memory");
    *out = (struct bytes){ to, n / 4 * 3 + (n % 4 ? n % 4 - 1 : 0) };
    uint32_t v = 0;
    for (size_t i = 0; i < n; i++) {
        int digit = pb_base64_digit(s.p[i] == '-' ? '+' : s.p[i] == '_' ? '/' : s.p[i]);
        if (digit < 0 || n % 4 == 1)
            return pb_json_fail(r, "bad base64");
        v = v << 6 | (uint32_t)digit;
        if (i % 4)
            *to++ = (uint8_t)(v >> (6 - i % 4 * 2));
    }
    return true;
}

/* Reads an RFC 3339 time in UTC, as pb_timestamp writes it: a date that does not exist would be written as another. */
static bool pb_timestamp_read(struct bytes s, struct Timestamp *t)
{
    struct bytes rest = s;
    uint64_t part[6], fraction = 0;
    for (unsigned i = 0; i < 6; i++)
        if (pb_digits_take(&rest, &part[i]) != (i ? 2 : 4) || (i < 5 && !pb_byte_take(&rest, "--T::"[i])))
            return false;
    size_t n = pb_byte_take(&rest, '.') ? pb_digits_take(&rest, &fraction) : 9;
    if (n < 1 || n > 9 || !pb_byte_take(&rest, 'Z') || rest.n)
        return false;
    for (; n < 9; n++)
        fraction *= 10;
    int64_t early = part[1] < 3, y = (int64_t)part[0] - early, month = (int64_t)part[1] + 12 * early; /* from March */
    int64_t days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * (month - 3) + 2) / 5 + (int64_t)part[2] - 307;
    t->seconds = PB_FIRST_SECOND + days * 86400 + (int64_t)(part[3] * 3600 + part[4] * 60 + part[5]);
    t->nanos = (int32_t)fraction;
    uint8_t again[32];
    struct buf b = buf_fixed(again, sizeof again);
    return pb_timestamp(&b, t->seconds, t->nanos) && memcmp(again, s.p, 19) == 0;
}

/* Reads an integer that fits the field, written as a number or a string, without a fraction or an exponent. */
static bool pb_parse_integer(struct pb_reader *r, const struct pb_field *f, void *at)
{
    struct bytes s = { NULL, 0 };
    if (pb_peek(r) == '"') {
        if (!pb_parse_string(r, &s))
            return false;
    } else
        for (s.p = r->p; r->p < r->end && *r->p && strchr("+-.0123456789Ee", *r->p); s.n++)
            r->p++;
    uint64_t v, most = f->kind == PB_INT64 ? INT64_MAX : INT32_MAX;
    bool minus = pb_byte_take(&s, '-'), zero = s.n && *s.p == '0';
    size_t n = pb_digits_take(&s, &v);
    if (s.n || n == 0 || (zero && n > 1))
        return pb_json_fail(r, "an integer was expected");
    if (v > most + minus)
        return pb_json_fail(r, "number out of range");
    pb_store(f, at, minus ? 0 - v : v);
    return true;
}

static bool pb_parse_items(struct pb_reader *r, const struct pb_message *m, const struct pb_field *f, void *at,
                           unsigned depth);

static bool pb_parse_message(struct pb_reader *r, const struct pb_message *m, void *msg, unsigned depth)
{
    if (depth > PB_MAX_DEPTH)
        return pb_json_fail(r, "nested too deep");
    if (m->form != PB_TIMESTAMP || pb_peek(r) != '"')
        return pb_parse_items(r, m, NULL, msg, depth);
    struct bytes s;
    return pb_parse_string(r, &s) &&
           (pb_timestamp_read(s, msg) || pb_json_fail(r, "a time as in 2006-01-02T15:04:05Z was expected"));
}

static bool pb_parse_value(struct pb_reader *r, const struct pb_field *f, void *at, unsigned depth)
{
    if (f->kind == PB_BOOL) {
        bool yes = *(bool *)at = pb_take(r, "true");
        return yes || pb_take(r, "false") || pb_json_fail(r, "true or false was expected");
    }
    if (pb_is_scalar(f))
        return pb_parse_integer(r, f, at);
    if (f->kind != PB_MESSAGE)
        return pb_parse_string(r, at) && (f->kind == PB_STRING || pb_base64_read(r, *(struct bytes *)at, at));
    void *sub = f->flags & PB_REPEATED ? at : pb_make(r->arena, f, at);
    return sub ? pb_parse_message(r, f->sub, sub, depth + 1) : pb_json_fail(r, "not enough memory");
}

/* Reads `"name": value` of an object.  seen: a bit for each row met so far. */
static bool pb_parse_member(struct pb_reader *r, const struct pb_message *m, void *msg, unsigned depth, uint64_t *seen)
{
    struct bytes name;
    const struct pb_field *f = pb_parse_string(r, &name) ? pb_field_named(r, m, name) : NULL;
    if (!f)
        return false;
    if (!pb_take(r, ":"))
        return pb_json_fail(r, "a colon was expected");
    if (pb_take(r, "null"))
        return true;
    for (size_t i = 0; i < m->n; i++)
        if (*seen >> i & 1 && (&m->fields[i] == f || f->flags & m->fields[i].flags & PB_ONEOF))
            return pb_json_fail(r, &m->fields[i] == f ? "given twice" : "another member of its oneof is given too");
    *seen |= (uint64_t)1 << (f - m->fields);
    void *at = (uint8_t *)msg + f->offset;
    return f->flags & PB_REPEATED ? pb_parse_items(r, NULL, f, at, depth) : pb_parse_value(r, f, at, depth);
}

/* Reads an object into the message at `at`, or with m NULL an array into the list there, of field f. */
static bool pb_parse_items(struct pb_reader *r, const struct pb_message *m, const struct pb_field *f, void *at,
                           unsigned depth)
{
    if (!pb_take(r, m ? "{" : "["))
        return pb_json_fail(r, m ? "an object was expected" : "an array was expected");
    if (pb_take(r, m ? "}" : "]"))
        return true;
    uint64_t seen = 0;
    do {
        size_t mark = r->path.len;
        void *item = m ? NULL : pb_item(r, f, at, ((const struct pb_list *)at)->n);
        if (m ? !pb_parse_member(r, m, at, depth, &seen) : !item || !pb_parse_value(r, f, item, depth))
            return false;
        r->path.len = mark;
    } while (pb_take(r, ","));
    return pb_take(r, m ? "}" : "]") ||
           pb_json_fail(r, "a comma or the end of the %s was expected", m ? "object" : "list");
}

/* Reads canonical JSON, and the other spellings of it that protobuf's own parsers take, but for enums by name, into
 * *msg, which the caller zeroed.  The result points into `json` and the arena.  On failure err says why, with line and
 * field. */
static inline bool pb_json_parse(const struct pb_message *m, void *msg, struct bytes json, struct pb_arena *a,
                                 char *err, size_t errlen)
{
    uint8_t path[200];
    if (json.n == 0)
        json.p = path;
    struct pb_reader r = { json.p, json.p, json.p + json.n, false, a, err, errlen, buf_fixed(path, sizeof path) };
    return pb_parse_message(&r, m, msg, 0) && ((pb_peek(&r) == 0 && r.p == r.end) ||
                                               pb_json_fail(&r, "more text behind the message"));
}

/* ---- One field by its path ---------------------------------------------------------------------------------------
 * "datasets[1].source.url": names in either spelling, items counted from 0. */

/* Takes "name" or "name[index]" off the path, and *at from the message to that member or item.  NULL: an error. */
static const struct pb_field *pb_path_step(struct pb_reader *r, const struct pb_message *m, void **at,
                                           struct bytes *path)
{
    struct bytes name = { path->p, 0 };
    while (name.n < path->n && path->p[name.n] != '.' && path->p[name.n] != '[')
        name.n++;
    const struct pb_field *f = pb_field_named(r, m, name);
    if (!f)
        return NULL;
    if (f->flags & PB_ONEOF)
        pb_clear_oneof(m, f, *at);
    *path = (struct bytes){ path->p + name.n, path->n - name.n };
    *at = (uint8_t *)*at + f->offset;
    if (!(f->flags & PB_REPEATED))
        return f;
    struct pb_list *list = *at;
    uint64_t index;
    if (!pb_byte_take(path, '[') || !pb_digits_take(path, &index) || !pb_byte_take(path, ']') || index > list->n) {
        pb_json_fail(r, "a list of %zu: [0] to [%zu] must follow, of which the last adds one", list->n, list->n);
        return NULL;
    }
    *at = pb_item(r, f, list, (size_t)index);
    return *at ? f : NULL;
}

/* Sets the field that `path` names; messages on the way are made, the other members of a oneof cleared.  The value of a
 * string stands as it is, bytes are base64, all else is as in JSON.  The result points into `value` and the arena.  On
 * failure err says which part of the path is wrong and what would be right; messages on the way may have been made. */
static inline bool pb_set_path(const struct pb_message *m, void *msg, struct bytes path, struct bytes value,
                               struct pb_arena *a, char *err, size_t errlen)
{
    uint8_t done[200];
    if (value.n == 0)
        value.p = (const uint8_t *)"";                  /* an empty member of a oneof is set, too */
    struct pb_reader r = { value.p, value.p, value.p + value.n, true, a, err, errlen, buf_fixed(done, sizeof done) };
    for (unsigned depth = 0; depth <= PB_MAX_DEPTH; depth++) {
        const struct pb_field *f = pb_path_step(&r, m, &msg, &path);
        if (!f)
            return false;
        if (f->kind != PB_MESSAGE && path.n)
            return pb_json_fail(&r, "nothing may follow it");
        if (f->kind != PB_MESSAGE)
            return pb_parse_value(&r, f, msg, 0) && (r.p == r.end || pb_json_fail(&r, "more text behind the value"));
        m = f->sub;
        if (!pb_byte_take(&path, '.'))
            return pb_fields_fail(&r, m, "the field of it must follow");
        if (!(f->flags & PB_REPEATED) && !(msg = pb_make(a, f, msg)))
            return pb_json_fail(&r, "not enough memory");
    }
    return pb_json_fail(&r, "nested too deep");
}

/* ---- Descriptors (google/protobuf/descriptor.proto) --------------------------------------------------------------
 * What server reflection hands out, written back to front like any message; the numbers are descriptor.proto's. */
struct pb_method {
    const char *name;
    const struct pb_message *in, *out;
    bool client_streaming, server_streaming;
};

/* A .proto file of proto3; enums are nested in the message whose field has them. */
struct pb_file {
    const char *name, *package;
    const struct pb_file *imported;             /* or NULL */
    const struct pb_message *const *messages;   /* up to NULL */
    const char *service;                        /* or NULL, */
    const struct pb_method *methods;            /* and its methods, up to one without a name */
    unsigned needs;                             /* what a server must offer for it to be there; 0: nothing */
};

#define PB_MESSAGES(...) (const struct pb_message *const[]){ __VA_ARGS__, NULL }
#define PB_METHODS(...) (const struct pb_method[]){ __VA_ARGS__, { NULL, NULL, NULL, false, false } }

/* Writes ".package.Type"; the package is that of the file, own or imported, that has the outermost message. */
static void pb_describe_name(struct buf *b, uint32_t number, const struct pb_file *file, const struct pb_message *outer,
                             const char *nested)
{
    const char *package = file->package;
    for (const struct pb_message *const *m = file->imported ? file->imported->messages : NULL; m && *m; m++)
        if (*m == outer)
            package = file->imported->package;
    char text[3 * PB_NAME_MAX];
    size_t n = text_printf(text, sizeof text, nested ? ".%s.%s.%s" : ".%s.%s", package, outer->name, nested);
    pb_encode_bytes(b, number, (struct bytes){ (uint8_t *)text, n });
}

static void pb_describe_field(struct buf *b, const struct pb_file *file, const struct pb_message *m,
                              const struct pb_field *f)
{
    static const uint8_t type[] = { [PB_BOOL] = 8,   [PB_INT32] = 5,  [PB_INT64] = 3,   [PB_ENUM] = 14,
                                    [PB_STRING] = 9, [PB_BYTES] = 12, [PB_MESSAGE] = 11 };
    char name[PB_NAME_MAX];
    size_t n = pb_json_name(name, f->name), mark = b->len;
    pb_encode_bytes(b, 10, (struct bytes){ (uint8_t *)name, n });       /* json_name */
    if (f->flags & PB_ONEOF)
        pb_encode_number(b, 9, 0);                                      /* oneof_index */
    if (f->kind == PB_ENUM)
        pb_describe_name(b, 6, file, m, ((const struct pb_enum *)f->sub)->name);
    else if (f->kind == PB_MESSAGE)
        pb_describe_name(b, 6, file, f->sub, NULL);
    pb_encode_number(b, 5, type[f->kind]);
    pb_encode_number(b, 4, f->flags & PB_REPEATED ? 3 : 1);             /* label */
    pb_encode_number(b, 3, f->number);
    pb_encode_bytes(b, 1, bytes_of(f->name));
    pb_close(b, 2, mark);
}

static void pb_describe_enum(struct buf *b, const struct pb_enum *e)
{
    size_t mark = b->len;
    for (size_t i = e->n; i-- > 0;) {
        size_t value = b->len;
        pb_encode_number(b, 2, i);
        pb_encode_bytes(b, 1, bytes_of(e->values[i]));
        pb_close(b, 2, value);
    }
    pb_encode_bytes(b, 1, bytes_of(e->name));
    pb_close(b, 4, mark);
}

static void pb_describe_message(struct buf *b, const struct pb_file *file, const struct pb_message *m)
{
    size_t mark = b->len;
    if (m->oneof) {
        pb_encode_bytes(b, 1, bytes_of(m->oneof));
        pb_close(b, 8, mark);
    }
    for (size_t i = m->n; i-- > 0;)
        if (m->fields[i].kind == PB_ENUM)
            pb_describe_enum(b, m->fields[i].sub);
    for (size_t i = m->n; i-- > 0;)
        pb_describe_field(b, file, m, &m->fields[i]);
    pb_encode_bytes(b, 1, bytes_of(m->name));
    pb_close(b, 4, mark);
}

static void pb_describe_service(struct buf *b, const struct pb_file *file)
{
    size_t mark = b->len, n = 0;
    while (file->methods[n].name)
        n++;
    while (n--) {
        const struct pb_method *m = &file->methods[n];
        size_t method = b->len;
        if (m->server_streaming)
            pb_encode_number(b, 6, 1);
        if (m->client_streaming)
            pb_encode_number(b, 5, 1);
        pb_describe_name(b, 3, file, m->out, NULL);
        pb_describe_name(b, 2, file, m->in, NULL);
        pb_encode_bytes(b, 1, bytes_of(m->name));
        pb_close(b, 2, method);
    }
    pb_encode_bytes(b, 1, bytes_of(file->service));
    pb_close(b, 6, mark);
}

/* Encodes the file's FileDescriptorProto; the result belongs to b as pb_encode's does. */
static inline struct bytes pb_file_descriptor(struct buf *b, const struct pb_file *file)
{
    b->len = 0;
    pb_encode_bytes(b, 12, BYTES("proto3"));
    if (file->service)
        pb_describe_service(b, file);
    size_t n = 0;
    while (file->messages[n])
        n++;
    while (n--)
        pb_describe_message(b, file, file->messages[n]);
    if (file->imported)
        pb_encode_bytes(b, 3, bytes_of(file->imported->name));
    pb_encode_bytes(b, 2, bytes_of(file->package));
    pb_encode_bytes(b, 1, bytes_of(file->name));
    return pb_written(b);
}

#endif
