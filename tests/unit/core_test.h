/* Shared by test_core*.c: a core, payloads from text, frames to text. */
#ifndef CORE_TEST_H
#define CORE_TEST_H
#define HARNESS_ALLOC
#include "../harness.h"

/* ---- The core ---- */
enum { NOW = 1000000 };
static const int64_t wall = 1700000000123; /* 2023-11-14T22:13:20.123Z */
static struct core core;
static struct options options;
static struct server server = { .o = &options };
static struct endpoint serving = { .on = &grpc_server, .methods = server_methods,
                                   .method_count = PB_COUNT(server_methods) };

static void core_reset(void)
{
    static bool ready;
    if (!ready) {
        huffman_init(&core.huffman);
        core.arena.limit = 64 << 20;
    }
    ready = true;
    core.now_ms = NOW;
    core.wall_ms = wall;
    core.backpressure = server.json = false;
    core.out_look = 0;
    core.name_column = 0;
    core.out.len = core.err.len = 0;
    core.out.failed = core.err.failed = false;
    memset(core.cap_told_ms, 0, sizeof core.cap_told_ms);
    core.strangers = (struct bucket){ 0 };
    serving.max_message = 4 << 20;
    core.app = &server;
    pb_arena_reset(&core.arena);
}

static void core_drop(void)
{
    buf_free(&core.out);
    buf_free(&core.err);
    buf_free(&core.spare);
    pb_arena_free(&core.arena);
    blob_unref(server.manifest.stream);
    server.manifest.stream = NULL;
}

static inline void set_manifest(struct bytes b)
{
    blob_unref(server.manifest.stream);
    server.manifest.stream = blob_copy(b);
}

/* ---- Payloads from text: hex, "text", zero*N, [ message ], z[ compressed message ], N:"x" N:=5 N:{ } N:hex ---- */
static void skip_blanks(const char **s)
{
    while (**s == ' ' || **s == '\t')
        ++*s;
}

static int hex_digit(char ch)
{
    const char *digits = "0123456789abcdef", *at = ch ? strchr(digits, ch) : NULL;
    return at ? (int)(at - digits) : -1;
}

/* A quoted string; \n \r \t \" \\ and \xNN. */
static void put_quoted(struct buf *b, const char **s)
{
    for (++*s; **s && **s != '"'; ++*s) {
        char ch = **s;
        if (ch == '\\') {
            static const char names[] = "nrt0", values[] = "\n\r\t";
            ch = *++*s;
            const char *name = strchr(names, ch);
            if (ch == 'x') {
                ch = (char)(hex_digit((*s)[1]) << 4 | hex_digit((*s)[2]));
                *s += 2;
            } else if (ch && name) {
                ch = values[name - names];
            }
        }
        buf_putc(b, ch);
    }
    if (**s)
        ++*s;
}

static void put_varint(struct buf *b, uint64_t v)
{
    for (; v >= 128; v >>= 7)
        buf_putc(b, (int)(v & 127) | 128);
    buf_putc(b, (int)v);
}

static void put_message(struct buf *b, int flag, struct bytes m)
{
    uint8_t n[4];
    put_be32(n, (uint32_t)m.n);
    buf_putc(b, flag);
    buf_put(b, n, 4);
    buf_put(b, m.p, m.n);
}

static void put_payload(struct buf *b, const char **s, char end);

static void put_pb_field(struct buf *b, const char **s, unsigned long number)
{
    struct buf inner = { 0 };
    if (**s == '=') {
        ++*s;
        put_varint(b, (uint64_t)number << 3);
        put_varint(b, strtoull(*s, (char **)s, 10));
        return;
    }
    if (**s == '{') {
        ++*s;
        put_payload(&inner, s, '}');
    } else if (**s == '"') {
        put_quoted(&inner, s);
    } else {
        for (; hex_digit(**s) >= 0; *s += 2)
            buf_putc(&inner, hex_digit((*s)[0]) << 4 | hex_digit((*s)[1]));
    }
    put_varint(b, (uint64_t)number << 3 | PB_LEN);
    put_varint(b, inner.len);
    buf_put(b, inner.p, inner.len);
    buf_free(&inner);
}

static void put_item(struct buf *b, const char **s)
{
    struct buf inner = { 0 };
    char *after;
    if (**s == '"') {
        put_quoted(b, s);
    } else if (strncmp(*s, "zero*", 5) == 0) {
        for (unsigned long n = strtoul(*s + 5, (char **)s, 10); n; n--)
            buf_putc(b, 0);
    } else if (**s == '[' || strncmp(*s, "z[", 2) == 0) {
        int flag = **s == 'z';
        *s += flag + 1;
        put_payload(&inner, s, ']');
        put_message(b, flag, whole(&inner));
        buf_free(&inner);
    } else if (strtoul(*s, &after, 10) && *after == ':') {
        unsigned long number = strtoul(*s, &after, 10);
        *s = after + 1;
        put_pb_field(b, s, number);
    } else if (hex_digit((*s)[0]) >= 0 && hex_digit((*s)[1]) >= 0) {
        for (; hex_digit(**s) >= 0; *s += 2)
            buf_putc(b, hex_digit((*s)[0]) << 4 | hex_digit((*s)[1]));
    } else {
        stop(__FILE__, __LINE__, "no payload", *s);
    }
}

static void put_payload(struct buf *b, const char **s, char end)
{
    for (skip_blanks(s); **s && **s != end; skip_blanks(s))
        put_item(b, s);
    if (**s)
        ++*s;
}

/* ---- Our frames as text, one line each ---- */
struct peer {
    struct hpack hpack;
    char who;                         /* 'S': the frames are the server's */
    struct buf *line;
    const char *fault;                /* a fault in our own framing */
};

static void put_hex_text(struct buf *b, struct bytes v)
{
    for (size_t i = 0; i < v.n; i++)
        buf_printf(b, "%02x", v.p[i]);
}

static void put_value(struct buf *b, struct bytes v)
{
    bool plain = true;
    for (size_t i = 0; i < v.n; i++)
        plain &= v.p[i] > ' ' && v.p[i] != '"' && v.p[i] < 0x7f;
    buf_puts(b, plain ? "" : "\"");
    put_text(b, v, NULL);
    buf_puts(b, plain ? "" : "\"");
}

static void peer_field(void *arg, struct bytes name, struct bytes value)
{
    struct peer *peer = arg;
    for (size_t i = 0; i < name.n; i++)
        if (name.p[i] >= 'A' && name.p[i] <= 'Z')
            peer->fault = "a capital letter in a field name";
    buf_putc(peer->line, ' ');
    buf_put(peer->line, name.p, name.n);
    buf_putc(peer->line, '=');
    put_value(peer->line, value);
}

static void peer_headers(struct peer *peer, struct bytes block)
{
    static uint8_t scratch[HPACK_SCRATCH(MAX_HEADER_LIST)];
    struct hpack_reader reader = { .huffman = &core.huffman, .scratch = scratch, .list_limit = MAX_HEADER_LIST,
                                   .field = peer_field, .arg = peer };
    if (block.n && (block.p[0] & 0xe0) == 0x20)
        buf_printf(peer->line, " size-update=%d", block.p[0] & 0x1f);
    if (hpack_decode(&peer->hpack, block, &reader) != HPACK_OK || reader.too_large)
        peer->fault = "a field block that does not decode";
}

static const char *code_name(uint32_t code)
{
    return code < H2_ERRORS ? h2_error_names[code] : "?";
}

static const char *const setting_names[SETTINGS_COUNT] = {
    "?", "HEADER_TABLE_SIZE", "ENABLE_PUSH", "MAX_CONCURRENT_STREAMS", "INITIAL_WINDOW_SIZE", "MAX_FRAME_SIZE",
    "MAX_HEADER_LIST_SIZE",
};

static void peer_payload(struct peer *peer, const struct frame *f, struct bytes p)
{
    struct buf *b = peer->line;
    switch (f->type) {
    case FRAME_HEADERS:
        peer_headers(peer, p);
        break;
    case FRAME_RST_STREAM:
        buf_printf(b, " %s", code_name(get_be32(p.p)));
        break;
    case FRAME_SETTINGS:
        for (size_t i = 0; i + 6 <= p.n; i += 6)
            buf_printf(b, " %s=%lu", p.p[i + 1] < SETTINGS_COUNT ? setting_names[p.p[i + 1]] : "?",
                       (unsigned long)get_be32(p.p + i + 2));
        break;
    case FRAME_GOAWAY:
        buf_printf(b, " last=%lu %s ", (unsigned long)get_be32(p.p), code_name(get_be32(p.p + 4)));
        put_value(b, (struct bytes){ p.p + 8, p.n - 8 });
        break;
    case FRAME_WINDOW_UPDATE:
        buf_printf(b, " add=%lu", (unsigned long)get_be32(p.p));
        break;
    default:
        buf_printf(b, " len=%zu", p.n);
        if (p.n <= 2048) {
            buf_puts(b, " hex=");
            put_hex_text(b, p);
        }
    }
}

/* Appends one line for the frame at the front of out and returns its bytes; 0 if it is not whole. */
static size_t peer_frame(struct peer *peer, struct bytes out, struct buf *line)
{
    if (out.n < FRAME_HEADER_LEN)
        return 0;
    struct frame f = frame_parse(out.p);
    bool scope;
    if (frame_check(&f, &scope) != NO_ERROR || f.type >= FRAME_TYPES)
        peer->fault = "a frame that is not well formed";
    if (out.n < FRAME_HEADER_LEN + (size_t)f.len)
        return 0;
    peer->line = line;
    buf_printf(line, "%c %s", peer->who, f.type < FRAME_TYPES ? frame_rules[f.type].name : "?");
    if (f.stream_id || f.type == FRAME_WINDOW_UPDATE)
        buf_printf(line, " stream=%lu", (unsigned long)f.stream_id);
    bool ack = f.type == FRAME_SETTINGS || f.type == FRAME_PING;
    if (f.flags & ACK)
        buf_puts(line, ack ? " ACK" : " END_STREAM");
    if (f.type == FRAME_HEADERS && !(f.flags & END_HEADERS))
        buf_puts(line, " NO_END_HEADERS");
    if (f.flags & ~(unsigned)(f.type == FRAME_HEADERS ? END_HEADERS | END_STREAM : END_STREAM))
        buf_printf(line, " flags=%u", f.flags);
    if (!peer->fault)
        peer_payload(peer, &f, (struct bytes){ out.p + FRAME_HEADER_LEN, f.len });
    buf_putc(line, '\n');
    return FRAME_HEADER_LEN + (size_t)f.len;
}
#endif
