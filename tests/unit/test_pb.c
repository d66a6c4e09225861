/* Unit tests of proto_wire.h with the message tables.  Expected wire bytes were worked out by hand from the encoding
 * rules; test_pb.py compares with the reference implementation. */
#define HARNESS_ALLOC
#include "../harness.h"

/* ---- a message of every kind that the real tables lack, and recursive ---- */
struct Node {
    struct Node *child;
    struct pb_list names, nodes;
    int32_t num;
    bool flag;
    struct bytes text, blob;
    int64_t wide;
    struct Node *other;
};
static const struct pb_message Node_message;
PB_DEFINE(Node, PB_PLAIN, "which",
    PB_ROW(Node, 1,   MESSAGE, 0,           child, &Node_message),
    PB_ROW(Node, 2,   INT32,   0,           num,   NULL),
    PB_ROW(Node, 3,   BOOL,    0,           flag,  NULL),
    PB_ROW(Node, 4,   STRING,  PB_REPEATED, names, NULL),
    PB_ROW(Node, 5,   MESSAGE, PB_REPEATED, nodes, &Node_message),
    PB_ROW(Node, 16,  STRING,  PB_ONEOF,    text,  NULL),
    PB_ROW(Node, 17,  BYTES,   PB_ONEOF,    blob,  NULL),
    PB_ROW(Node, 18,  MESSAGE, PB_ONEOF,    other, &Node_message),
    PB_ROW(Node, 536870911, INT64, 0,       wide,  NULL));

/* One arena for all: a test reads what it decoded before it decodes again. */
static struct pb_arena arena;
static bool unknown;

static enum pb_error decode(const struct pb_message *m, void *msg, struct bytes in)
{
    memset(msg, 0, m->size);
    pb_arena_reset(&arena);
    return pb_decode(m, msg, at_edge(in), &arena, &unknown);
}

#define DECODE(T, msg, literal) decode(&T##_message, msg, BYTES(literal))

static struct bytes json_of(struct buf *b, const struct pb_message *m, const void *msg, int indent)
{
    b->len = 0;
    pb_json(b, m, msg, indent);
    return whole(b);
}

static const char *json_error(const struct pb_message *m, const char *json)
{
    static char err[300];
    uint8_t msg[512] __attribute__((aligned(16))) = { 0 };
    pb_arena_reset(&arena);
    strcpy(err, "ok");
    pb_json_parse(m, msg, at_edge(bytes_of(json)), &arena, err, sizeof err);
    return err;
}

/* ---- tests ---- */
static void test_scalars(void)
{
    struct Node n;
    CHECK(DECODE(Node, &n, ""), PB_OK);
    CHECK(decode(&Node_message, &n, (struct bytes){ NULL, 0 }), PB_OK);
    CHECK(pb_decode(&Node_message, &n, (struct bytes){ NULL, 0 }, &arena, &unknown), PB_OK);
    CHECK(DECODE(Node, &n, "\x10\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x18\x05"), PB_OK);
    CHECK(n.num, -1);
    CHECK(n.flag, true);
    CHECK(unknown, false);
    CHECK(DECODE(Node, &n, "\xf8\xff\xff\xff\x0f\x07\xf8\xff\xff\xff\x0f\x09"), PB_OK);
    CHECK(n.wide, 9);                                                       /* the last one wins */
    struct Timestamp t;
    CHECK(DECODE(Timestamp, &t, "\x10\xff\xff\xff\xff\x1f"), PB_OK);        /* 33 bits cut to 32 */
    CHECK(t.nanos, -1);
    CHECK(DECODE(Timestamp, &t, "\x08\x81\x80\x80\x80\x80\x80\x80\x80\x80\x00"), PB_OK);    /* long form of 1 */
    CHECK(t.seconds, 1);
}

static void test_malformed(void)
{
    struct Node n;
    CHECK(DECODE(Node, &n, "\x10\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01"), PB_MALFORMED);
    CHECK(DECODE(Node, &n, "\x10\x80\x80\x80\x80\x80\x80\x80\x80\x80\x02"), PB_MALFORMED);
    CHECK(DECODE(Node, &n, "\x90\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01\x01"), PB_MALFORMED);
    CHECK(DECODE(Node, &n, "\x00\x01"), PB_MALFORMED);                      /* field 0 */
    CHECK(DECODE(Node, &n, "\x80\x80\x80\x80\x10\x01"), PB_MALFORMED);      /* field 2^29 */
    CHECK(DECODE(Node, &n, "\x16"), PB_MALFORMED);                          /* wire types 6 and 7 */
    CHECK(DECODE(Node, &n, "\x4f"), PB_MALFORMED);
    CHECK(DECODE(Node, &n, "\x14"), PB_MALFORMED);                          /* stray end-group */
    CHECK(DECODE(Node, &n, "\x4b\x54"), PB_MALFORMED);                      /* mismatched end-group */
    CHECK(DECODE(Node, &n, "\x0a\x01\x4c"), PB_MALFORMED);                  /* end-group in a sub-message */
    CHECK(DECODE(Node, &n, "\x4b\x0a\x01\x4c"), PB_TRUNCATED);              /* the 4c belongs to the field */
    CHECK(DECODE(Node, &n, "\x8a\x01\x05xxxx"), PB_MALFORMED);
    CHECK(DECODE(Node, &n, "\x0a\x03\x8a\x01\x01x"), PB_MALFORMED);         /* overruns its parent only */
    CHECK(DECODE(Node, &n, "\x8a\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"), PB_MALFORMED);
    CHECK(DECODE(Node, &n, "\x10\x80"), PB_TRUNCATED);
    CHECK(DECODE(Node, &n, "\x10"), PB_TRUNCATED);
    CHECK(DECODE(Node, &n, "\x49\x01\x02\x03\x04\x05\x06\x07"), PB_TRUNCATED);
    CHECK(DECODE(Node, &n, "\x4d\x01\x02\x03"), PB_TRUNCATED);
    CHECK(DECODE(Node, &n, "\x4b\x10\x01"), PB_TRUNCATED);                  /* a group without end */
    for (int e = PB_OK; e <= PB_LIMIT; e++)
        CHECK(strlen(pb_error_text[e]) > 1, 1);
}

static void test_oneof(void)
{
    struct Node n;
    CHECK(DECODE(Node, &n, "\x82\x01\x00"), PB_OK);                         /* an empty string is set */
    CHECK(n.text.p != NULL, 1);
    CHECK(n.text.n, 0);
    CHECK(DECODE(Node, &n, "\x82\x01\x01x\x8a\x01\x01y"), PB_OK);           /* the last member clears the others */
    CHECK(n.text.p == NULL, 1);
    CHECK_TEXT(n.blob, "y");
    CHECK(DECODE(Node, &n, "\x8a\x01\x01y\x92\x01\x00"), PB_OK);
    CHECK(n.blob.p == NULL && n.other, 1);
    CHECK(DECODE(Node, &n, "\x92\x01\x02\x10\x01\x8a\x01\x01y\x92\x01\x02\x18\x01"), PB_OK);    /* cleared between */
    CHECK(n.other->num == 0 && n.other->flag, 1);
    CHECK(DECODE(Node, &n, "\x92\x01\x02\x10\x01\x92\x01\x02\x18\x01"), PB_OK);                 /* merged */
    CHECK(n.other->num == 1 && n.other->flag, 1);
    CHECK(DECODE(Node, &n, "\x0a\x02\x10\x01\x82\x01\x01x\x0a\x03\x82\x01\x00"), PB_OK);
    CHECK(n.child->num == 1 && n.child->text.p && n.text.n == 1, 1);
    struct ClientStreamMessage m;
    CHECK(DECODE(ClientStreamMessage, &m, "\x0a\x03\x0a\x01x\x0a\x03\x12\x01y"), PB_OK);
    CHECK_TEXT(m.agent_log->message, "x");
    CHECK_TEXT(m.agent_log->computation_id, "y");
    CHECK(DECODE(ClientStreamMessage, &m, "\x0a\x00\x3a\x00"), PB_OK);
    CHECK(m.agent_log == NULL && m.azureAttestationToken != NULL, 1);
}

struct seen { struct buf b; };

static void note(void *arg, const char *path, unsigned wire_type, uint64_t value, struct bytes bytes)
{
    char head[400];
    int n = snprintf(head, sizeof head, "%s/%u=%llu:", path, wire_type, (unsigned long long)value);
    buf_put(arg, head, (size_t)n);
    for (size_t i = 0; i < bytes.n; i++)
        buf_put(arg, head, (size_t)snprintf(head, sizeof head, "%02x", bytes.p[i]));
    buf_putc(arg, ';');
}

static void test_unknown(void)
{
    struct ClientStreamMessage m;
    struct Node n;
    struct buf b = { 0 };
    CHECK(DECODE(ClientStreamMessage, &m, "\x0a\x0d\x0a\x01m\x4a\x02hi\x08\x05\x20\x07\x12\x00\x7d\x01\x00\x00\x00"), PB_OK);
    CHECK(unknown, true);
    CHECK_TEXT(m.agent_log->message, "m");
    CHECK(m.agent_log->timestamp == NULL, 1);
    pb_unknown(&ClientStreamMessage_message, BYTES("\x0a\x0d\x0a\x01m\x4a\x02hi\x08\x05\x20\x07\x12\x00"
               "\x7d\x01\x00\x00\x01\x41\xff\x00\x00\x00\x00\x00\x00\x80\x3b\x08\x01\x3c"), note, &b);
    CHECK_TEXT(whole(&b), "agent_log.9/2=0:6869;agent_log.1/0=5:;agent_log.4/0=7:;15/5=16777217:;"
               "8/1=9223372036854776063:;7/3=0:08013c;");
    CHECK(DECODE(Node, &n, "\x4b\x53\x54\x4d\x01\x02\x03\x04\x49\x01\x02\x03\x04\x05\x06\x07\x08\x4c\x10\x05"), PB_OK);
    CHECK(n.num, 5);
    CHECK(DECODE(Node, &n, "\x15\x01\x02\x03\x04\x80\x01\x07\x0b\x0c"), PB_OK);  /* known fields, wrong wire types */
    CHECK(unknown && n.num == 0 && !n.text.p && !n.child, 1);
    b.len = 0;
    pb_unknown(&Node_message, (struct bytes){ NULL, 0 }, note, &b);
    CHECK(b.len, 0);
    buf_free(&b);
}

static void test_depth(void)
{
    uint8_t in[404], *p;
    struct Node n;
    for (unsigned levels = 99; levels <= 101; levels++) {
        struct buf b = { 0 };
        for (unsigned i = 0; i < levels; i++) {
            size_t was = b.len;
            pb_close(&b, 1, 0);
            CHECK(b.len > was, 1);
        }
        struct bytes s = pb_written(&b);
        CHECK(decode(&Node_message, &n, s), levels > 100 ? PB_DEPTH : PB_OK);
        memset(in, 0x4b, levels);
        memset(in + levels, 0x4c, levels);
        CHECK(decode(&Node_message, &n, (struct bytes){ in, 2 * levels }), levels > 100 ? PB_DEPTH : PB_OK);
        p = in;                                                             /* one message, then groups */
        *p++ = 0x0a;
        p = pb_varint_put(p, 2 * (levels - 1));
        memset(p, 0x4b, levels - 1);
        memset(p + levels - 1, 0x4c, levels - 1);
        CHECK(decode(&Node_message, &n, (struct bytes){ in, (size_t)(p - in) + 2 * (levels - 1) }),
              levels > 100 ? PB_DEPTH : PB_OK);
        buf_free(&b);
        char json[2000] = "";
        for (unsigned i = 0; i < levels; i++)
            strcat(json, "{\"child\":");
        strcat(json, "{}");
        for (unsigned i = 0; i < levels; i++)
            strcat(json, "}");
        CHECK(strcmp(json_error(&Node_message, json), "ok") == 0, levels <= 100);
    }
}

static bool utf8(const char *s, size_t n)
{
    return pb_utf8_valid(at_edge((struct bytes){ (const uint8_t *)s, n }));
}

static void test_utf8(void)
{
    static const struct { const char *s; bool good; } v[] = {
        { "\xc2\x80", 1 }, { "\xdf\xbf", 1 }, { "\xe0\xa0\x80", 1 }, { "\xed\x9f\xbf", 1 }, { "\xee\x80\x80", 1 },
        { "\xef\xbf\xbf", 1 }, { "\xf0\x90\x80\x80", 1 }, { "\xf4\x8f\xbf\xbf", 1 }, { "", 1 }, { "\x7f", 1 },
        { "\x80", 0 }, { "\xbf", 0 }, { "\xc0\x80", 0 }, { "\xc1\xbf", 0 }, { "\xc2", 0 }, { "\xc2\x41", 0 },
        { "\xe0\x9f\xbf", 0 }, { "\xe1\x80", 0 }, { "\xe1\x80\xc0", 0 }, { "\xed\xa0\x80", 0 }, { "\xed\xbf\xbf", 0 },
        { "\xf0\x8f\xbf\xbf", 0 }, { "\xf4\x90\x80\x80", 0 }, { "\xf5\x80\x80\x80", 0 }, { "\xf0\x90\x80", 0 },
        { "\xf8\x88\x80\x80\x80", 0 }, { "\xfe", 0 }, { "\xff", 0 },
    };
    char s[160];
    for (size_t i = 0; i < PB_COUNT(v); i++)                /* at every offset, with every length behind it */
        for (size_t before = 0; before < 70; before++)
            for (size_t after = 0; after < 70; after++) {
                memset(s, 'a', sizeof s);
                memcpy(s + before, v[i].s, strlen(v[i].s));
                if (utf8(s, before + strlen(v[i].s) + after) != v[i].good) {
                    CHECK(i * 10000 + before * 100 + after, -1);
                    return;
                }
            }
    CHECK(pb_utf8_valid((struct bytes){ NULL, 0 }), true);
    struct AgentLog log;
    CHECK(DECODE(AgentLog, &log, "\x0a\x02\xc0\x80"), PB_UTF8);
    struct RunReqChunks c;
    CHECK(DECODE(RunReqChunks, &c, "\x0a\x02\xc0\x80"), PB_OK);             /* bytes may be anything */
}

static void test_encode(void)
{
    struct buf b = { 0 };
    struct Source src = { .url = BYTES("u"), .encrypted = true };
    struct Source empty = { 0 };
    struct Dataset sets[] = { { .filename = BYTES("f"), .source = &src }, { .source = &empty, .decompress = true } };
    struct ComputationRunReq req = { .id = BYTES("1"), .datasets = { sets, 2, 0 } };
    struct ServerStreamMessage m = { .runReq = &req };
    struct bytes s = pb_encode(&b, &ServerStreamMessage_message, &m);
    struct bytes wanted = BYTES("\x12\x15\x0a\x01\x31\x22\x0a\x1a\x01" "f\x22\x05\x12\x01u\x20\x01\x22\x04\x22\x00\x28\x01");
    CHECK(s.n, wanted.n);
    CHECK(bytes_eq(s, wanted), 1);
    CHECK(pb_encode(&b, &Source_message, &empty).n, 0);
    CHECK(b.failed, false);
    struct bytes names[] = { BYTES("a"), BYTES("") };
    struct Node n = { .num = -1, .flag = true, .names = { names, 2, 0 }, .text = BYTES(""), .wide = -2 };
    s = pb_encode(&b, &Node_message, &n);
    wanted = BYTES("\x10\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x18\x01\x22\x01" "a\x22\x00\x82\x01\x00"
                   "\xf8\xff\xff\xff\x0f\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01");
    CHECK(bytes_eq(s, wanted), 1);
    uint8_t to[16];
    for (unsigned bits = 0; bits < 64; bits++) {
        CHECK(pb_varint_put(to, (uint64_t)1 << bits) - to, bits / 7 + 1);
        CHECK(pb_varint_size((uint64_t)1 << bits), bits / 7 + 1);
    }
    CHECK(pb_varint_size(0), 1);
    buf_free(&b);
}

static void test_large(void)
{
    enum { BIG = 100 << 20, ITEMS = 1 << 20 };
    uint8_t *data = malloc(BIG);
    struct bytes *args = malloc(ITEMS * sizeof *args);
    memset(data, 7, BIG);
    struct RunReqChunks c = { .data = { data, BIG }, .id = BYTES("1") };
    struct ServerStreamMessage m = { .runReqChunks = &c }, back = { 0 };
    struct buf b = { 0 };
    clock_t t = clock();
    struct bytes s = pb_encode(&b, &ServerStreamMessage_message, &m);
    pb_arena_reset(&arena);
    CHECK(s.n, BIG + 5 + 3 + 5);
    CHECK(pb_decode(&ServerStreamMessage_message, &back, s, &arena, &unknown), PB_OK);
    CHECK(bytes_eq(back.runReqChunks->data, c.data), 1);
    for (size_t i = 0; i < ITEMS; i++)
        args[i] = (struct bytes){ data, 100 };
    struct Algorithm a = { .algo_args = { args, ITEMS, 0 } }, a2 = { 0 };
    s = pb_encode(&b, &Algorithm_message, &a);
    CHECK(s.n, ITEMS * 102);
    CHECK(pb_decode(&Algorithm_message, &a2, s, &arena, &unknown), PB_OK);
    CHECK(a2.algo_args.n, ITEMS);
    CHECK((clock() - t) / CLOCKS_PER_SEC < 20, 1);                          /* quadratic work would take minutes */
    buf_free(&b);
    free(args);
    free(data);
}

/* A ServerStreamMessage with a bit of everything. */
static struct bytes full_message(struct buf *b)
{
    struct Source src = { BYTES("oci-image"), BYTES("docker://h/i:t"), BYTES("default/key/k"), true };
    struct KBSConfig kbs = { BYTES("http://h:8080"), true };
    struct Dataset sets[] = {
        { .hash = BYTES("0123456789abcdef0123456789abcdef"), .userKey = BYTES("\xff\x00k"), .filename = BYTES("a\xc3\xa9.csv"),
          .source = &src, .kbs = &kbs, .decompress = true },
        { .hash = BYTES("x") },
    };
    struct bytes args[] = { BYTES("-a"), BYTES(""), BYTES("b\"\\\n") };
    struct Algorithm algo = { BYTES("h"), BYTES("k"), BYTES("bin"), &src, { args, 3, 0 }, NULL };
    struct ResultConsumer who[] = { { BYTES("one") }, { BYTES("") } };
    struct AgentConfig config = { .port = BYTES("7002"), .attested_tls = true };
    struct ComputationRunReq req = {
        .id = BYTES("1"), .name = BYTES("n"), .description = BYTES("d"), .datasets = { sets, 2, 0 }, .algorithm = &algo,
        .result_consumers = { who, 2, 0 }, .agent_config = &config, .kbs = &kbs,
    };
    struct ServerStreamMessage m = { .runReq = &req };
    return pb_encode(b, &ServerStreamMessage_message, &m);
}

static void test_truncated(void)
{
    struct buf b = { 0 }, again = { 0 };
    struct bytes s = full_message(&b);
    struct ServerStreamMessage m;
    CHECK(decode(&ServerStreamMessage_message, &m, s), PB_OK);
    CHECK(unknown, false);
    CHECK(bytes_eq(pb_encode(&again, &ServerStreamMessage_message, &m), s), 1);
    for (size_t n = 1; n < s.n; n++) {
        enum pb_error e = decode(&ServerStreamMessage_message, &m, (struct bytes){ s.p, n });
        CHECK(e == PB_TRUNCATED || e == PB_MALFORMED, 1);
        pb_unknown(&ServerStreamMessage_message, at_edge((struct bytes){ s.p, n }), note, &again);
    }
    struct bytes inner = { s.p + 3, s.n - 3 };                              /* two bytes of length */
    size_t edge = 0, edges = 0;
    for (size_t n = 0; n <= inner.n; n++) {
        struct ComputationRunReq req;
        CHECK(decode(&ComputationRunReq_message, &req, (struct bytes){ inner.p, n }) == PB_OK, n == edge);
        if (n == edge && n < inner.n) {
            edges++;
            edge += inner.p[n + 1] < 0x80 ? 2u + inner.p[n + 1] : 3u + (inner.p[n + 1] & 0x7fu) + inner.p[n + 2] * 128u;
        }
    }
    CHECK(edges, 10);
    buf_free(&b);
    buf_free(&again);
}

static void test_damaged(void)
{
    struct buf b = { 0 }, out = { 0 };
    struct bytes s = full_message(&b);
    uint8_t *copy = malloc(s.n);
    uint32_t rnd = 12345;
    size_t good = 0, all = 0;
    for (size_t i = 0; i < s.n * 40; i++) {
        memcpy(copy, s.p, s.n);
        for (int k = 0; k < 1 + (int)(i % 3); k++) {
            rnd = rnd * 1664525 + 1013904223;
            copy[k ? rnd >> 8 & (s.n > 255 ? 255 : 127) : i % s.n] = (uint8_t)(rnd >> 24);
        }
        struct ServerStreamMessage m;
        enum pb_error e = decode(&ServerStreamMessage_message, &m, (struct bytes){ copy, s.n });
        json_of(&out, &ServerStreamMessage_message, &m, 0);                 /* a part of a message is safe too */
        all++;
        if (e != PB_OK)
            continue;
        good++;
        struct buf json = out, wire = { 0 }, wire2 = { 0 };
        struct ServerStreamMessage back = { 0 };
        char err[300] = "";
        CHECK(pb_json_parse(&ServerStreamMessage_message, &back, whole(&json), &arena, err, sizeof err), 1);
        struct bytes w1 = pb_encode(&wire, &ServerStreamMessage_message, &m);
        struct bytes w2 = pb_encode(&wire2, &ServerStreamMessage_message, &back);
        CHECK(bytes_eq(w1, w2), 1);
        buf_free(&wire);
        buf_free(&wire2);
        if (unknown) {
            out.len = 0;
            pb_unknown(&ServerStreamMessage_message, (struct bytes){ copy, s.n }, note, &out);
            CHECK(out.len > 0, 1);
        }
    }
    CHECK(good > all / 20 && good < all, 1);
    free(copy);
    buf_free(&b);
    buf_free(&out);
}

static void test_timestamps(void)
{
    static const struct { int64_t s; int32_t n; const char *text; } v[] = {
        { 0, 0, "1970-01-01T00:00:00Z" }, { -1, 0, "1969-12-31T23:59:59Z" },
        { 1735689600, 500000000, "2025-01-01T00:00:00.500Z" }, { 951782400, 1000, "2000-02-29T00:00:00.000001Z" },
        { 951868799, 1, "2000-02-29T23:59:59.000000001Z" }, { 951868800, 120000, "2000-03-01T00:00:00.000120Z" },
        { PB_FIRST_SECOND, 0, "0001-01-01T00:00:00Z" }, { PB_LAST_SECOND, 999999999, "9999-12-31T23:59:59.999999999Z" },
        { 0, 100, "1970-01-01T00:00:00.000000100Z" }, { 0, 100000, "1970-01-01T00:00:00.000100Z" },
        { 4107542400, 0, "2100-03-01T00:00:00Z" }, { 4107542399, 0, "2100-02-28T23:59:59Z" },
    };
    struct buf b = { 0 };
    for (size_t i = 0; i < PB_COUNT(v); i++) {
        b.len = 0;
        CHECK(pb_timestamp(&b, v[i].s, v[i].n), true);
        CHECK_TEXT(whole(&b), v[i].text);
    }
    for (int64_t s = PB_FIRST_SECOND; s <= PB_LAST_SECOND; s += 86400 * 31 + 12345) {      /* against the C library */
        char text[80];
        time_t t = (time_t)s;
        struct tm tm;
        if (t != s)
            continue;                 /* a time_t of 32 bits */
        gmtime_r(&t, &tm);
        snprintf(text, sizeof text, "%04d-%02d-%02dT%02d:%02d:%02dZ", tm.tm_year + 1900, tm.tm_mon + 1, tm.tm_mday,
                 tm.tm_hour, tm.tm_min, tm.tm_sec);
        b.len = 0;
        pb_timestamp(&b, s, 0);
        struct Timestamp back;
        if (!bytes_eq(whole(&b), bytes_of(text)) || !pb_timestamp_read(whole(&b), &back) || back.seconds != s) {
            CHECK_TEXT(whole(&b), text);
            break;
        }
    }
    b.len = 0;
    CHECK(pb_timestamp(&b, PB_FIRST_SECOND - 1, 0), false);
    CHECK(pb_timestamp(&b, PB_LAST_SECOND + 1, 0), false);
    CHECK(pb_timestamp(&b, INT64_MIN, 0) || pb_timestamp(&b, INT64_MAX, 0), false);
    CHECK(pb_timestamp(&b, 0, -1) || pb_timestamp(&b, 0, 1000000000), false);
    CHECK(b.len, 0);
    struct Timestamp t = { PB_LAST_SECOND + 1, 5 };
    struct AgentLog log = { .timestamp = &t };
    CHECK_TEXT(json_of(&b, &AgentLog_message, &log, 0), "{\"timestamp\":{\"seconds\":\"253402300800\",\"nanos\":5}}");
    static const char *const good[] = { "2024-02-29T00:00:00Z", "1969-12-31T23:59:59.1Z", "9999-12-31T23:59:59.999999999Z" };
    static const char *const bad[] = { "", "2024-02-30T00:00:00Z", "2023-02-29T00:00:00Z", "2024-13-01T00:00:00Z",
        "2024-00-01T00:00:00Z", "2024-01-00T00:00:00Z", "2024-01-01T24:00:00Z", "2024-01-01T00:60:00Z",
        "2024-01-01T00:00:60Z", "2024-01-01T00:00:00", "2024-01-01T00:00:00.Z", "2024-01-01T00:00:00.1234567890Z",
        "2024-01-01T00:00:00ZZ", "2024-1-01T00:00:00Z", "2024-01-01 00:00:00Z", "2024-01-01T00:00:00+00:00",
        "0000-01-01T00:00:00Z", "0000-12-31T23:59:59Z", "10000-01-01T00:00:00Z", "2024-04-31T00:00:00Z", "2024-99-99T99:99:99Z",
        "1900-02-29T00:00:00Z", "2024-01-01T00:00:00Z\\u0000" };
    char json[200];
    for (size_t i = 0; i < PB_COUNT(good) + PB_COUNT(bad); i++) {
        bool is_good = i < PB_COUNT(good);
        snprintf(json, sizeof json, "{\"timestamp\":\"%s\"}", is_good ? good[i] : bad[i - PB_COUNT(good)]);
        CHECK(strcmp(json_error(&AgentLog_message, json), "ok") == 0, is_good);
    }
    CHECK(pb_timestamp_read(BYTES("2000-02-29T00:00:00.25Z"), &t), true);
    CHECK(t.seconds, 951782400);
    CHECK(t.nanos, 250000000);
    buf_free(&b);
}

static void test_json_escapes(void)
{
    struct buf b = { 0 };
    static const struct { const char *in, *out; } v[] = {
        { "", "\"\"" }, { "plain text, more than eight", "\"plain text, more than eight\"" },
        { "a\"b\\c/d", "\"a\\\"b\\\\c/d\"" }, { "\b\f\n\r\t", "\"\\b\\f\\n\\r\\t\"" },
        { "\x1b[31m\x07\x7f", "\"\\u001b[31m\\u0007\\u007f\"" }, { "\xc2\x80\xc2\x9f\xc2\xa0", "\"\\u0080\\u009f\xc2\xa0\"" },
        { "\xe2\x80\xa8\xe2\x80\xa9\xe2\x80\xaa\xe2\x80\xae\xe2\x80\xaf", "\"\\u2028\\u2029\\u202a\\u202e\xe2\x80\xaf\"" },
        { "\xe2\x81\xa5\xe2\x81\xa6\xe2\x81\xa9\xe2\x81\xaa", "\"\xe2\x81\xa5\\u2066\\u2069\xe2\x81\xaa\"" },
        { "\xd8\x9c\xe2\x80\x8d\xe2\x80\x8e\xe2\x80\x8f\xef\xbb\xbf", "\"\\u061c\xe2\x80\x8d\\u200e\\u200f\\ufeff\"" },
        { "h\xc3\xa9 \xf0\x9f\x98\x80", "\"h\xc3\xa9 \xf0\x9f\x98\x80\"" }, { "bad \xff\xc0\x80 end", "\"bad \\ufffd\\ufffd\\ufffd end\"" },
    };
    for (size_t i = 0; i < PB_COUNT(v); i++) {
        b.len = 0;
        pb_json_string(&b, at_edge(bytes_of(v[i].in)));
        CHECK_TEXT(whole(&b), v[i].out);
    }
    for (int c = 0; c < 256; c++)                           /* each byte at each place of a run */
        for (size_t at = 0; at < 20; at++) {
            uint8_t s[20];
            memset(s, 'x', sizeof s);
            s[at] = (uint8_t)c;
            b.len = 0;
            pb_json_string(&b, (struct bytes){ s, sizeof s });
            bool raw = b.len == 22 && memcmp(b.p + 1, s, 20) == 0;
            if (raw != (c >= 0x20 && c < 0x7f && c != '"' && c != '\\')) {
                CHECK(c, -1);
                break;
            }
        }
    b.len = 0;
    pb_json_string(&b, (struct bytes){ (const uint8_t *)"a\0b", 3 });
    CHECK_TEXT(whole(&b), "\"a\\u0000b\"");
    static const char *const base64[][2] = { { "", "" }, { "f", "Zg==" }, { "fo", "Zm8=" }, { "foo", "Zm9v" },
                                             { "foob", "Zm9vYg==" }, { "\xfb\xff\xbf", "+/+/" } };     /* RFC 4648 10 */
    for (size_t i = 0; i < PB_COUNT(base64); i++) {
        b.len = 0;
        pb_base64(&b, bytes_of(base64[i][0]));
        CHECK_TEXT(whole(&b), base64[i][1]);
    }
    buf_free(&b);
}

static void test_json_forms(void)
{
    struct buf b = { 0 };
    static const char *const status[] = { "{}", "{\"status\":\"SERVING\"}", "{\"status\":9}", "{\"status\":-1}" };
    for (int i = 0; i < 4; i++) {
        struct HealthCheckResponse res = { (int32_t[]){ 0, HEALTH_SERVING, 9, -1 }[i] };
        CHECK_TEXT(json_of(&b, &HealthCheckResponse_message, &res, 0), status[i]);
    }
    struct bytes args[] = { BYTES("a"), BYTES("") };
    struct Algorithm algo = { .algo_type = BYTES("bin"), .algo_args = { args, 2, 0 } };
    CHECK_TEXT(json_of(&b, &Algorithm_message, &algo, 0), "{\"algoType\":\"bin\",\"algoArgs\":[\"a\",\"\"]}");
    CHECK_TEXT(json_of(&b, &Algorithm_message, &algo, 3),
               "{\n   \"algoType\": \"bin\",\n   \"algoArgs\": [\n      \"a\",\n      \"\"\n   ]\n}");
    struct AttestationResponse token = { BYTES("\x01"), BYTES("s") };
    struct ClientStreamMessage m = { .azureAttestationToken = &token };
    CHECK_TEXT(json_of(&b, &ClientStreamMessage_message, &m, 0),
               "{\"azureAttestationToken\":{\"file\":\"AQ==\",\"certSerialNumber\":\"s\"}}");
    CHECK_TEXT(json_of(&b, &Source_message, &(struct Source){ 0 }, 2), "{}");
    buf_free(&b);
}

static void test_json_errors(void)
{
    static const char *const v[][2] = {
        { "{\"datasets\":[{},\n{\"source\":{\"url\":\"u\",\n\"foo\":1}}]}", "line 3: datasets[1].source.foo: unknown field; "
          "Source has type, url, kbs_resource_path, encrypted" },
        { "{\"a\\u001bb\":1}", "line 1: a?b: unknown field; ComputationRunReq has id, name, description, "
          "datasets, algorithm, result_consumers, agent_config, kbs" },
        { "", "line 1: an object was expected" }, { "[]", "line 1: an object was expected" },
        { "{\"id\":\"1\"]", "line 1: a comma or the end of the object was expected" },
        { "{", "line 1: a string was expected" }, { "{}x", "line 1: more text behind the message" },
        { "{\"id\":\"1\",}", "line 1: a string was expected" },
        { "{\"id\":\"1\" \"name\":\"\"}", "line 1: a comma or the end of the object was expected" },
        { "{\"id\" \"1\"}", "line 1: id: a colon was expected" }, { "{\"id\":1}", "line 1: id: a string was expected" },
        { "{\"id\":\"1", "line 1: id: the string does not end" }, { "{\"id\":\"1\\\"}", "line 1: id: the string does not end" },
        { "{\"id\":\"\\x\"}", "line 1: id: bad escape sequence in a string" },
        { "{\"id\":\"\\u12\"}", "line 1: id: bad escape sequence in a string" },
        { "{\"id\":\"\\ud800\"}", "line 1: id: bad escape sequence in a string" },
        { "{\"id\":\"\\ud800\\u0041\"}", "line 1: id: bad escape sequence in a string" },
        { "{\"id\":\"\\udc00\"}", "line 1: id: invalid UTF-8 in a string" },
        { "{\"id\":\"\xc0\x80\"}", "line 1: id: invalid UTF-8 in a string" },
        { "{\"id\":\"a\nb\"}", "line 1: id: control character in a string" },
        { "{\"id\":\"1\",\"id\":\"2\"}", "line 1: id: given twice" },
        { "{\"agent_config\":{},\"agentConfig\":{}}", "line 1: agentConfig: given twice" },
        { "{\"datasets\":{}}", "line 1: datasets: an array was expected" },
        { "{\"datasets\":[null]}", "line 1: datasets[0]: an object was expected" },
        { "{\"datasets\":[{}", "line 1: datasets: a comma or the end of the list was expected" },
        { "{\"datasets\":[{\"decompress\":1}]}", "line 1: datasets[0].decompress: true or false was expected" },
        { "{\"datasets\":[{\"hash\":\"A\"}]}", "line 1: datasets[0].hash: bad base64" },
        { "{\"datasets\":[{\"hash\":\"AA=\"}]}", "line 1: datasets[0].hash: bad base64" },
        { "{\"datasets\":[{\"hash\":\"A===\"}]}", "line 1: datasets[0].hash: bad base64" },
        { "{\"datasets\":[{\"hash\":\"A!AA\"}]}", "line 1: datasets[0].hash: bad base64" },
    };
    static const char *const number[][2] = {
        { "1", "ok" }, { "-0", "ok" }, { "\"12\"", "ok" }, { "2147483647", "ok" },
        { "-2147483648", "ok" }, { "2147483648", "line 1: errorCode: number out of range" },
        { "-2147483649", "line 1: errorCode: number out of range" }, { "18446744073709551617", "line 1: errorCode: number out of range" },
        { "99999999999999999999", "line 1: errorCode: number out of range" }, { "007", "line 1: errorCode: an integer was expected" },
        { "1.5", "line 1: errorCode: an integer was expected" }, { "1.0", "line 1: errorCode: an integer was expected" },
        { "1e3", "line 1: errorCode: an integer was expected" },
        { "+1", "line 1: errorCode: an integer was expected" }, { "-", "line 1: errorCode: an integer was expected" },
        { "0x10", "line 1: a comma or the end of the object was expected" }, { "\"0x10\"", "line 1: errorCode: an integer was expected" },
        { "\" 1\"", "line 1: errorCode: an integer was expected" }, { "\"\"", "line 1: errorCode: an integer was expected" },
        { "\"1\\u00002\"", "line 1: errorCode: an integer was expected" }, 
        { "nan", "line 1: errorCode: an integer was expected" }, { "true", "line 1: errorCode: an integer was expected" },
        { "\"nan\"", "line 1: errorCode: an integer was expected" }, { "null", "ok" }, { "nullx", "line 1: a comma or the end of the object was expected" },
        { "0000000000000000000000000000000000000000000000000000000000000000000000000000001", "line 1: errorCode: an integer was expected" },
    };
    static const char *const time[][2] = {
        { "2024-02-29T23:59:59.123456789Z", "ok" },
        { "2024-02-29T23:59:59Zx", NULL }, { "2024-02-29T23:59:59+01:00", NULL }, { "2024-02-29T23:59:60Z", NULL },
        { "2024-02-29T23:60:59Z", NULL }, { "2024-02-29T24:59:59Z", NULL }, { "2024-02-30T23:59:59Z", NULL },
        { "2024-2-29T23:59:59Z", NULL }, { "x024-02-29T23:59:59Z", NULL }, { "2024-02-29 23:59:59Z", NULL },
        { "2024-02-29T3:59:59Z", NULL }, { "2024-02-29T23:9:59Z", NULL }, { "2024-02-29T23:59:9Z", NULL },
        { "2024-02-29T23:59:59.Z", NULL }, { "2024-02-29T23:59:59.1234567890Z", NULL }, { "2024-02-29T23:59:59", NULL },
    };
    char json[300];
    for (size_t i = 0; i < PB_COUNT(time); i++) {
        snprintf(json, sizeof json, "\"%s\"", time[i][0]);
        CHECK_TEXT(bytes_of(json_error(&Timestamp_message, json)),
                   time[i][1] ? time[i][1] : "line 1: a time as in 2006-01-02T15:04:05Z was expected");
    }
    CHECK_TEXT(bytes_of(json_error(&Timestamp_message, "\"2024-02")), "line 1: the string does not end");
    for (size_t i = 0; i < PB_COUNT(v); i++)
        CHECK_TEXT(bytes_of(json_error(&ComputationRunReq_message, v[i][0])), v[i][1]);
    for (size_t i = 0; i < PB_COUNT(number); i++) {
        snprintf(json, sizeof json, "{\"errorCode\":%s}", number[i][0]);
        CHECK_TEXT(bytes_of(json_error(&ErrorResponse_message, json)), number[i][1]);
    }
    CHECK_TEXT(bytes_of(json_error(&Timestamp_message, "{\"seconds\":\"-9223372036854775808\"}")), "ok");
    CHECK_TEXT(bytes_of(json_error(&Timestamp_message, "{\"seconds\":9223372036854775808}")),
               "line 1: seconds: number out of range");
    CHECK_TEXT(bytes_of(json_error(&ServerStreamMessage_message, "{\"runReq\":null,\"runReqChunks\":{},\"disconnectReq\":{}}")),
               "line 1: disconnectReq: another member of its oneof is given too");
    CHECK_TEXT(bytes_of(json_error(&HealthCheckResponse_message, "{\"status\":\"SERVING\"}")), "line 1: status: an integer was expected");
    CHECK_TEXT(bytes_of(json_error(&HealthCheckResponse_message, "{\"status\":2}")), "ok");
}

static void test_json_truncated(void)
{
    struct buf b = { 0 }, json = { 0 };
    struct ServerStreamMessage m, back;
    char err[300];
    CHECK(decode(&ServerStreamMessage_message, &m, full_message(&b)), PB_OK);
    json_of(&json, &ServerStreamMessage_message, &m, 2);
    for (size_t n = 0; n < json.len; n++) {
        memset(&back, 0, sizeof back);
        pb_arena_reset(&arena);
        CHECK(pb_json_parse(&ServerStreamMessage_message, &back, at_edge((struct bytes){ json.p, n }), &arena, err, sizeof err), 0);
    }
    memset(&back, 0, sizeof back);
    CHECK(pb_json_parse(&ServerStreamMessage_message, &back, (struct bytes){ NULL, 0 }, &arena, err, 5), 0);
    CHECK(strlen(err), 4);
    buf_free(&b);
    buf_free(&json);
}

static void test_arena(void)
{
    enum { HEAD = sizeof(struct pb_block) };
    struct pb_arena a = { .limit = 2 * PB_BLOCK };
    CHECK(pb_arena_alloc(&a, 1) != NULL && a.held == PB_BLOCK, 1);
    CHECK(pb_arena_alloc(&a, PB_BLOCK - HEAD - 8) != NULL && a.held == PB_BLOCK, 1);
    CHECK(pb_arena_alloc(&a, 1) != NULL && a.held == 2 * PB_BLOCK, 1);
    CHECK(pb_arena_alloc(&a, PB_BLOCK - HEAD - 7) == NULL, 1);                 /* the next block is over the limit */
    pb_arena_reset(&a);
    CHECK(a.held, PB_BLOCK);
    pb_arena_free(&a);
    a.limit = 3 * PB_BLOCK;
    CHECK(pb_arena_alloc(&a, 2 * PB_BLOCK) != NULL && a.held == 2 * PB_BLOCK + HEAD, 1);
    pb_arena_reset(&a);
    CHECK(a.held, 0);                                                       /* an outsize block is not kept */
    uint8_t *p = pb_arena_alloc(&a, 8);
    memset(p, 1, 8);
    pb_arena_reset(&a);
    alloc_count = 0;
    CHECK(pb_arena_alloc(&a, 8) == p, 1);                                   /* an ordinary one is */
    CHECK(p[0], 0);
    CHECK(alloc_count, 0);
    pb_arena_free(&a);
    CHECK(a.held, 0);
    struct buf b = { 0 };
    struct bytes s = full_message(&b);
    for (size_t limit = 0; limit <= 2 * PB_BLOCK; limit += PB_BLOCK) {
        struct ServerStreamMessage m = { 0 };
        a = (struct pb_arena){ .limit = limit };
        CHECK(pb_decode(&ServerStreamMessage_message, &m, s, &a, &unknown), limit ? PB_OK : PB_LIMIT);
        CHECK(a.held <= limit, 1);
        pb_arena_free(&a);
    }
    struct buf many = { 0 };                                                /* 2 bytes of input, a struct each */
    for (int i = 0; i < 100000; i++)
        buf_put(&many, "\x22\x00", 2);
    struct ComputationRunReq req = { 0 };
    a = (struct pb_arena){ .limit = 1 << 20 };
    CHECK(pb_decode(&ComputationRunReq_message, &req, whole(&many), &a, &unknown), PB_LIMIT);
    CHECK(a.held <= 1 << 20, 1);
    pb_arena_free(&a);
    buf_free(&many);
    buf_free(&b);
}

/* Sizes whose sums and products do not fit: each is refused before a byte is read or written. */
static void test_huge(void)
{
    struct pb_arena a = { .limit = SIZE_MAX };
    uint8_t byte = 0;
    alloc_count = 0;
    alloc_fail = 1;                     /* what asks for memory gets none, and is counted */
    for (size_t n = 0; n < 40; n++)
        CHECK(pb_arena_alloc(&a, SIZE_MAX - n) == NULL, 1);
    for (size_t size = sizeof(struct bytes); size <= 4096; size += 40) {
        struct pb_list list = { &byte, SIZE_MAX / size, SIZE_MAX / size };
        CHECK(pb_list_add(&a, &list, size) == NULL, 1);
        list.n = list.cap = SIZE_MAX / 2 / size + 1;        /* twice as many wrap */
        CHECK(pb_list_add(&a, &list, size) == NULL, 1);
    }
    CHECK(alloc_count, 0);
    for (size_t n = 0; n < 3; n++) {
        struct buf b = { .p = &byte, .len = 1, .cap = 1 };
        CHECK(buf_room(&b, SIZE_MAX - n) == NULL && b.failed && b.cap == 1, 1);
        b.failed = false;
        CHECK(pb_before(&b, SIZE_MAX - n) == NULL && b.failed && b.len == 1, 1);
        b = (struct buf){ 0 };
        pb_base64(&b, (struct bytes){ &byte, SIZE_MAX / 2 + 1 + n });
        CHECK(b.failed && !b.p, 1);
    }
    CHECK(alloc_count, 0);
    alloc_fail = 0;
    uint8_t room[4];
    struct buf b = buf_fixed(room, sizeof room);
    CHECK(buf_room(&b, 5) == NULL && b.failed, 1);          /* the caller's array does not grow */
}

static const char *set_error(struct ComputationRunReq *req, const char *path, const char *value)
{
    static char err[400];
    strcpy(err, "ok");
    if (pb_set_path(&ComputationRunReq_message, req, bytes_of(path), bytes_of(value), &arena, err, sizeof err) !=
        (strcmp(err, "ok") == 0))
        return "the result does not fit the error";
    return err;
}

static void test_set_path(void)
{
    static const char *const good[][2] = {
        { "id", "7" }, { "name", "old" }, { "name", " a=\"b\" " }, { "agent_config.port", "7010" }, { "agentConfig.logLevel", "debug" },
        { "agent_config.attested_tls", "true" }, { "datasets[0].filename", "a.csv" }, { "datasets[1].source.url", "u" },
        { "datasets[1].hash", "AQI=" }, { "datasets[0].kbs.enabled", "true" }, { "datasets[0].kbs.enabled", "false" },
        { "algorithm.algo_args[0]", "x" }, { "algorithm.algoArgs[1]", "" }, { "algorithm.algo_args[0]", "{\xc3\xa9}" },
    };
    static const char *const bad[][3] = {
        { "nme", "", "nme: unknown field; ComputationRunReq has id, name, description, datasets, algorithm, result_consumers, "
          "agent_config, kbs" },
        { "", "", "unknown field; ComputationRunReq has" }, { "algorithm.source.uri", "", "algorithm.source.uri: unknown field; "
          "Source has type, url, kbs_resource_path, encrypted" },
        { "kbs.\x1b", "", "kbs.?: unknown field; KBSConfig has url, enabled" }, { "kbs..url", "", "kbs.: unknown field" },
        { "kbs", "", "kbs: the field of it must follow; KBSConfig has url, enabled" }, { "kbs[0].url", "", "kbs: the field of it" },
        { "kbs.", "", "kbs.: unknown field" }, { "datasets[0]", "", "datasets[0]: the field of it must follow; Dataset has hash" },
        { "datasets[0]filename", "", "datasets[0]: the field of it" }, { "id.x", "", "id: nothing may follow it" },
        { "id[0]", "", "id: nothing may follow it" }, { "algorithm.algo_args[0].x", "", "algorithm.algo_args[0]: nothing may follow it" },
        { "datasets", "", "datasets: a list of 2: [0] to [2] must follow, of which the last adds one" },
        { "datasets[3].filename", "", "datasets: a list of 2" }, { "datasets[].filename", "", "datasets: a list of 2" },
        { "datasets[-1].filename", "", "datasets: a list of 2" }, { "datasets[x].filename", "", "datasets: a list of 2" },
        { "datasets[0", "", "datasets: a list of 2" }, { "datasets[18446744073709551616].hash", "", "datasets: a list of 2" },
        { "datasets[4294967296].hash", "", "datasets: a list of 2" }, { "datasets.filename", "", "datasets: a list of 2" },
        { "kbs.enabled", "yes", "kbs.enabled: true or false was expected" }, { "kbs.enabled", "", "kbs.enabled: true or false" },
        { "kbs.enabled", "true ", "kbs.enabled: more text behind the value" }, { "id", "\xff", "id: invalid UTF-8" },
        { "datasets[0].hash", "0g!", "datasets[0].hash: bad base64" },
    };
    struct buf b = { 0 };
    struct Dataset own[] = { { .filename = BYTES("first"), .decompress = true } };      /* the caller's own list is copied */
    struct ComputationRunReq req = { .datasets = { own, 1, 0 } };
    pb_arena_reset(&arena);
    for (size_t i = 0; i < PB_COUNT(good); i++)
        CHECK_TEXT(bytes_of(set_error(&req, good[i][0], good[i][1])), "ok");
    const char *wanted =
        "{\"id\":\"7\",\"name\":\" a=\\\"b\\\" \",\"datasets\":[{\"filename\":\"a.csv\",\"decompress\":true,\"kbs\":{}},"
        "{\"hash\":\"AQI=\",\"source\":{\"url\":\"u\"}}],\"algorithm\":{\"algoArgs\":[\"{\xc3\xa9}\",\"\"]},"
        "\"agentConfig\":{\"port\":\"7010\",\"logLevel\":\"debug\",\"attestedTls\":true}}";
    CHECK_TEXT(json_of(&b, &ComputationRunReq_message, &req, 0), wanted);
    for (size_t i = 0; i < PB_COUNT(bad); i++) {
        struct bytes err = bytes_of(set_error(&req, bad[i][0], bad[i][1]));
        err.n = err.n < strlen(bad[i][2]) ? err.n : strlen(bad[i][2]);
        CHECK_TEXT(err, bad[i][2]);
    }
    CHECK(req.datasets.n, 2);
    struct Node n = { .blob = BYTES("old") };
    char err[100] = "", path[700] = "";
#define SET(path, value) pb_set_path(&Node_message, &n, bytes_of(path), bytes_of(value), &arena, err, sizeof err)
    CHECK(SET("other.num", "-5") && !n.blob.p && n.other->num == -5, 1);    /* one member of a oneof clears the others */
    CHECK(pb_set_path(&Node_message, &n, BYTES("text"), (struct bytes){ NULL, 0 }, &arena, err, sizeof err), true);
    CHECK(!n.other && n.text.p, 1);
    CHECK(SET("wide", "-9223372036854775808") && n.wide == INT64_MIN, 1);
    CHECK(SET("nodes[0].nodes[0].names[0]", "x") && n.nodes.n, 1);
    CHECK(SET("num", "2147483648"), false);
    CHECK_TEXT(bytes_of(err), "num: number out of range");
    CHECK(SET("num", "\"1\""), false);
    for (int i = 0; i <= 101; i++) {                                        /* as deep as what is decoded */
        strcpy(path + 6 * i, "num");
        CHECK(SET(path, "1"), i <= 100);
        strcpy(path + 6 * i, "child.");
    }
    struct pb_arena none = { 0 };
    static const char *const needs[] = { "datasets[1].filename", "algorithm.algo_args[0]", "datasets[0].hash" };
    for (size_t i = 0; i < PB_COUNT(needs); i++) {
        CHECK(pb_set_path(&ComputationRunReq_message, &(struct ComputationRunReq){ .datasets = { own, 1, 0 } },
                          bytes_of(needs[i]), BYTES(""), &none, err, sizeof err), false);
        CHECK(strstr(err, "not enough memory") != NULL, 1);
    }
    buf_free(&b);
}

static void test_failing_memory(void)
{
    struct buf b = { 0 };
    struct bytes s = full_message(&b);
    struct buf text = { 0 };
    struct ServerStreamMessage full;
    CHECK(decode(&ServerStreamMessage_message, &full, s), PB_OK);
    json_of(&text, &ServerStreamMessage_message, &full, 4);
    for (int job = 0; job < 5; job++) {
        bool ok = false;
        for (alloc_fail = 1; !ok && alloc_fail <= 1000; alloc_fail++) {
            struct pb_arena a = { .limit = 1 << 20 };
            struct buf out = { 0 };
            struct ServerStreamMessage m = { 0 };
            char err[100] = "";
            alloc_count = 0;
            if (job == 0)
                ok = pb_decode(&ServerStreamMessage_message, &m, s, &a, &unknown) == PB_OK;
            else if (job == 1)
                ok = pb_json_parse(&ServerStreamMessage_message, &m, whole(&text), &a, err, sizeof err);
            else if (job == 2)
                ok = bytes_eq(pb_encode(&out, &ServerStreamMessage_message, &full), s);
            else if (job == 3)
                ok = bytes_eq(json_of(&out, &ServerStreamMessage_message, &full, 4), whole(&text));
            else
                ok = pb_file_descriptor(&out, &all_files[0]).n > 1000;
            CHECK(ok, alloc_count < alloc_fail);
            CHECK(job >= 2 && out.failed == ok, 0);
            buf_free(&out);
            pb_arena_free(&a);
        }
        CHECK(ok && alloc_fail > 2, 1);
    }
    alloc_fail = 0;
    buf_free(&b);
    buf_free(&text);
}

/* buf_printf against the C library, and text_printf cut at every length. */
#define FORMAT(...) do { \
        char want[200], cut[200]; \
        struct buf b = { 0 }; \
        size_t n = (size_t)snprintf(want, sizeof want, __VA_ARGS__); \
        buf_printf(&b, __VA_ARGS__); \
        CHECK_TEXT(((struct bytes){ b.p, b.len }), want); \
        buf_free(&b); \
        for (size_t room = 1; room <= n + 2; room++) { \
            CHECK(text_printf(cut, room, __VA_ARGS__), room > n ? n : room - 1); \
            snprintf(want, room, __VA_ARGS__); \
            CHECK_TEXT(bytes_of(cut), want); \
        } \
    } while (0)

static void test_format(void)
{
    FORMAT("plain");
    FORMAT("%s|%s|%c|%%", "", "text", 'c');
    FORMAT("%d %d %d %d", 0, -1, INT32_MAX, INT32_MIN);
    FORMAT("%ld %lld %lld", -5L, (long long)INT64_MIN, (long long)INT64_MAX);
    FORMAT("%u %lu %llu %zu", UINT32_MAX, 7UL, (unsigned long long)UINT64_MAX, SIZE_MAX);
    FORMAT("%x %X %02x %02X %04x", 0xbeefu, 0xbeefu, 5u, 0xabu, 0x202eu);
    FORMAT("%5d|%-5d|%05d|%3u|%-3u|%1u", 42, 42, 42, 12345u, 1u, 0u);
    FORMAT("%-10s|%10s|%-2s|", "left", "right", "long");
    FORMAT("%.3s|%.10s|%.0s|%.*s|%.*s|%-6.2s|", "abcdef", "abc", "abc", 2, "xyz", 0, "xyz", "abc");
    FORMAT("%.4s", (const char[4]){ 'n', 'o', 'n', 'e' });       /* without an end */
    FORMAT("%lld.%03u", 12LL, 5u);
    const char *volatile nothing = NULL;
    FORMAT("[%.*s]", 0, nothing);     /* what a buffer that never got memory holds */
}

int main(void)
{
    test_format();
    arena.limit = (size_t)256 << 20;
    test_scalars();
    test_malformed();
    test_oneof();
    test_unknown();
    test_depth();
    test_utf8();
    test_encode();
    test_large();
    test_truncated();
    test_damaged();
    test_timestamps();
    test_json_escapes();
    test_json_forms();
    test_json_errors();
    test_json_truncated();
    test_arena();
    test_huge();
    test_set_path();
    test_failing_memory();
    pb_arena_free(&arena);
    return closing();
}
