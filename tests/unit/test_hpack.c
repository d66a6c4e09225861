/* Tests of the HPACK section of cvms.c.
 *
 * Vectors: RFC 7541 appendices B and C; hpack_cases.txt holds field blocks of another implementation (see
 * gen_hpack_cases.py).  Every field block that is decoded ends at an unreadable page, and so does the scratch area.
 */
#define HARNESS_ALLOC
#include "../harness.h"

static void put_repeated(struct buf *b, int c, size_t n)
{
    while (n-- > 0)
        buf_putc(b, c);
}

/* ---- Decoding at the edge of readable memory ---- */

struct tester {
    struct huffman huffman;
    struct hpack_reader reader;
    struct hpack hpack;
    uint8_t *block_end, *scratch_end;
    struct buf fields; /* "name: value\n" for each delivered */
    long delivered;
};

static void collect(void *arg, struct bytes name, struct bytes value)
{
    struct tester *t = arg;
    buf_put(&t->fields, name.p, name.n);
    buf_puts(&t->fields, ": ");
    buf_put(&t->fields, value.p, value.n);
    buf_putc(&t->fields, '\n');
    t->delivered++;
}

static void tester_init(struct tester *t)
{
    *t = (struct tester){ .block_end = guarded_end(), .scratch_end = guarded_end() };
    huffman_init(&t->huffman);
    hpack_init(&t->hpack);
}

/* A new connection. */
static void renew(struct tester *t)
{
    hpack_free(&t->hpack);
}

static enum hpack_error decode_limit(struct tester *t, struct bytes block, size_t limit)
{
    uint8_t *p = t->block_end - block.n;
    if (block.n)
        memcpy(p, block.p, block.n);
    t->fields.len = 0;
    t->delivered = 0;
    t->reader = (struct hpack_reader){ .huffman = &t->huffman, .scratch = t->scratch_end - HPACK_SCRATCH(limit),
                                       .list_limit = limit, .field = collect, .arg = t,
                                       .too_large = true /* stale */ };
    enum hpack_error error = hpack_decode(&t->hpack, (struct bytes){ p, block.n }, &t->reader);
    if (block.n)
        memset(p, 0xdd, block.n); /* nothing may be kept by pointer */
    memset(t->reader.scratch, 0xdd, HPACK_SCRATCH(limit));
    return error;
}

static enum hpack_error decode(struct tester *t, struct bytes block)
{
    return decode_limit(t, block, 65536);
}

static enum hpack_error decode_hex(struct tester *t, const char *hex)
{
    struct buf b = { 0 };
    put_unhex(&b, hex);
    enum hpack_error error = decode(t, whole(&b));
    buf_free(&b);
    return error;
}

/* On a new connection. */
static enum hpack_error fresh(struct tester *t, const char *hex)
{
    renew(t);
    return decode_hex(t, hex);
}

/* The dynamic table as text and its size in bytes, by way of the lookup that decoding uses. */
static size_t table_text(const struct hpack *h, struct buf *out)
{
    struct bytes name, value;
    size_t size = 0;
    out->len = 0;
    for (uint64_t i = HPACK_STATIC + 1; hpack_lookup(h, i, &name, &value); i++) {
        buf_put(out, name.p, name.n);
        buf_puts(out, ": ");
        buf_put(out, value.p, value.n);
        buf_putc(out, '\n');
        size += name.n + value.n + 32;
    }
    return size;
}

/* What must hold of a table whatever came. */
static bool table_sound(const struct hpack *h)
{
    struct bytes name, value;
    size_t size = 0, len = 0, n = 0;
    for (; hpack_lookup(h, HPACK_STATIC + 1 + n, &name, &value); n++) {
        size += name.n + value.n + 32;
        len += name.n + value.n + 8;
    }
    return n == h->count && len == h->len && len <= h->cap && h->cap <= HPACK_TABLE_SIZE && size <= h->max;
}

/* ---- Appendix C ---- */

static void test_integers(void)
{
    static const struct {
        const char *hex;
        unsigned prefix;
        bool ok;
        uint64_t value;
        size_t taken;
    } rows[] = {
        { "0a", 5, true, 10, 1 },                     /* C.1.1 */
        { "1f9a0a", 5, true, 1337, 3 },               /* C.1.2 */
        { "2a", 8, true, 42, 1 },                     /* C.1.3 */
        { "ea", 5, true, 10, 1 },                     /* the bits above the prefix do not count */
        { "1e", 5, true, 30, 1 },
        { "1f00", 5, true, 31, 2 },
        { "1f80", 5, false, 0, 0 },
        { "1f", 5, false, 0, 0 },
        { "", 5, false, 0, 0 },
        { "7f8000", 7, true, 127, 3 },                /* zero bytes that say nothing are allowed */
        { "7f8080808000", 7, true, 127, 6 },
        { "7f808080808000", 7, false, 0, 0 },         /* ... but not without end */
        { "7f80ffffff0f", 7, true, 0xffffffff, 6 },
        { "7f81ffffff0f", 7, true, 0x100000000, 6 },
        { "7fffffffff7f", 7, true, 0x7ffffffff + 127ull, 6 },
        { "7fffffffffff01", 7, false, 0, 0 },
        { "7fffffffffffffffffff01", 7, false, 0, 0 }, /* over 64 bits */
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct buf b = { 0 }, back = { 0 };
        put_unhex(&b, rows[i].hex);
        struct bytes in = whole(&b);
        uint64_t v = 0;
        CHECK(hpack_int(&in, rows[i].prefix, &v), rows[i].ok);
        if (rows[i].ok) {
            CHECK(v, rows[i].value);
            CHECK(b.len - in.n, rows[i].taken);
        }
        if (i < 3) {
            hpack_put_int(&back, 0, rows[i].prefix, (size_t)rows[i].value);
            CHECK_BYTES(whole(&back), whole(&b));
        }
        buf_free(&b);
        buf_free(&back);
    }
    for (size_t v = 0; v < 70000; v += 1 + v / 300)
        for (unsigned prefix = 4; prefix <= 7; prefix++) {
            struct buf b = { 0 };
            hpack_put_int(&b, 0, prefix, v);
            struct bytes in = whole(&b);
            uint64_t got = 0;
            if (!hpack_int(&in, prefix, &got) || got != v || in.n != 0)
                CHECK(got, v);
            buf_free(&b);
        }
}

#define EXAMPLE "www.example.com"
#define GET_HTTP ":method: GET\n:scheme: http\n:path: /\n:authority: " EXAMPLE "\n"
#define GET_HTTPS \
    ":method: GET\n:scheme: https\n:path: /index.html\n:authority: " EXAMPLE "\ncustom-key: custom-value\n"
#define NO_CACHE "cache-control: no-cache\n"
#define PRIVATE "cache-control: private\n"
#define DATE1 "date: Mon, 21 Oct 2013 20:13:21 GMT\n"
#define DATE2 "date: Mon, 21 Oct 2013 20:13:22 GMT\n"
#define LOCATION "location: https://" EXAMPLE "\n"
#define GZIP "content-encoding: gzip\n"
#define COOKIE "set-cookie: foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1\n"

/* Bars stand between the fields. */
static const struct example {
    const char *section, *hex, *fields, *table;
    size_t size, max; /* max: set before, on a new connection; 0: the connection goes on */
} examples[] = {
    { "C.2.1", "400a637573746f6d2d6b65790d637573746f6d2d686561646572", "custom-key: custom-header\n",
      "custom-key: custom-header\n", 55, 4096 },
    { "C.2.2", "040c2f73616d706c652f70617468", ":path: /sample/path\n", "", 0, 4096 },
    { "C.2.3", "100870617373776f726406736563726574", "password: secret\n", "", 0, 4096 },
    { "C.2.4", "82", ":method: GET\n", "", 0, 4096 },
    { "C.3.1", "82|86|84|410f7777772e6578616d706c652e636f6d", GET_HTTP, ":authority: " EXAMPLE "\n", 57, 4096 },
    { "C.3.2", "82|86|84|be|58086e6f2d6361636865", GET_HTTP NO_CACHE, NO_CACHE ":authority: " EXAMPLE "\n", 110, 0 },
    { "C.3.3", "82|87|85|bf|400a637573746f6d2d6b65790c637573746f6d2d76616c7565", GET_HTTPS,
      "custom-key: custom-value\n" NO_CACHE ":authority: " EXAMPLE "\n", 164, 0 },
    { "C.4.1", "82|86|84|418cf1e3c2e5f23a6ba0ab90f4ff", GET_HTTP, ":authority: " EXAMPLE "\n", 57, 4096 },
    { "C.4.2", "82|86|84|be|5886a8eb10649cbf", GET_HTTP NO_CACHE, NO_CACHE ":authority: " EXAMPLE "\n", 110, 0 },
    { "C.4.3", "82|87|85|bf|408825a849e95ba97d7f8925a849e95bb8e8b4bf", GET_HTTPS,
      "custom-key: custom-value\n" NO_CACHE ":authority: " EXAMPLE "\n", 164, 0 },
    { "C.5.1", "4803333032|580770726976617465|611d4d6f6e2c203231204f637420323031332032303a31333a323120474d54|"
      "6e1768747470733a2f2f7777772e6578616d706c652e636f6d", ":status: 302\n" PRIVATE DATE1 LOCATION,
      LOCATION DATE1 PRIVATE ":status: 302\n", 222, 256 },
    { "C.5.2", "4803333037|c1|c0|bf", ":status: 307\n" PRIVATE DATE1 LOCATION,
      ":status: 307\n" LOCATION DATE1 PRIVATE, 222, 0 },
    { "C.5.3", "88|c1|611d4d6f6e2c203231204f637420323031332032303a31333a323220474d54|c0|5a04677a6970|7738666f6f3d415344"
      "4a4b48514b425a584f5157454f50495541585157454f49553b206d61782d6167653d333630303b2076657273696f6e3d31",
      ":status: 200\n" PRIVATE DATE2 LOCATION GZIP COOKIE, COOKIE GZIP DATE2, 215, 0 },
    { "C.6.1", "4882 6402|5885 aec3771a4b|6196d07abe941054d444a8200595040b8166e082a62d1bff|"
      "6e919d29ad171863c78f0b97c8e9ae82ae43d3", ":status: 302\n" PRIVATE DATE1 LOCATION,
      LOCATION DATE1 PRIVATE ":status: 302\n", 222, 256 },
    { "C.6.2", "4883640eff|c1|c0|bf", ":status: 307\n" PRIVATE DATE1 LOCATION,
      ":status: 307\n" LOCATION DATE1 PRIVATE, 222, 0 },
    { "C.6.3", "88|c1|6196d07abe941054d444a8200595040b8166e084a62d1bff|c0|5a839bd9ab|77ad94e7821dd7f2e6c7b335dfdfcd5b"
      "3960d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007",
      ":status: 200\n" PRIVATE DATE2 LOCATION GZIP COOKIE, COOKIE GZIP DATE2, 215, 0 },
};

static void test_examples(struct tester *t)
{
    struct buf table = { 0 };
    for (size_t i = 0; i < sizeof examples / sizeof *examples; i++) {
        const struct example *e = &examples[i];
        if (e->max) {
            renew(t);
            t->hpack.max = (uint32_t)e->max;
        }
        CHECK(decode_hex(t, e->hex), HPACK_OK);
        CHECK_BYTES(whole(&t->fields), bytes_of(e->fields));
        CHECK(t->reader.too_large, false);
        CHECK(table_text(&t->hpack, &table), e->size);
        CHECK_BYTES(whole(&table), bytes_of(e->table));
        CHECK(table_sound(&t->hpack), true);
    }
    buf_free(&table);
}

/* Decodes what comes before the i-th example on its connection. */
static void lead_up(struct tester *t, size_t i)
{
    size_t first = i;
    while (!examples[first].max)
        first--;
    renew(t);
    t->hpack.max = (uint32_t)examples[first].max;
    for (; first < i; first++)
        CHECK(decode_hex(t, examples[first].hex), HPACK_OK);
}

/* Cut after any octet, a block is damaged unless the cut lies between two fields. */
static void test_truncation(struct tester *t)
{
    for (size_t i = 0; i < sizeof examples / sizeof *examples; i++) {
        struct buf block = { 0 };
        bool boundary[256] = { true };
        for (const char *p = examples[i].hex; *p; p++) {
            if (*p == '|')
                boundary[block.len] = true;
            else if (*p != ' ')
                put_unhex(&block, (char[3]){ p[0], p[1], 0 }), p++;
        }
        boundary[block.len] = true;
        for (size_t n = 0; n <= block.len; n++) {
            lead_up(t, i);
            CHECK(decode(t, (struct bytes){ block.p, n }), boundary[n] ? HPACK_OK : HPACK_COMPRESSION_ERROR);
            CHECK(table_sound(&t->hpack), true);
        }
        buf_free(&block);
    }
}

/* ---- Appendix B ---- */

static const struct {
    uint32_t code;
    uint8_t bits;
} appendix_b[257] = {
    {0x1ff8,13}, {0x7fffd8,23}, {0xfffffe2,28}, {0xfffffe3,28}, {0xfffffe4,28}, {0xfffffe5,28}, {0xfffffe6,28},
    {0xfffffe7,28}, {0xfffffe8,28}, {0xffffea,24}, {0x3ffffffc,30}, {0xfffffe9,28}, {0xfffffea,28}, {0x3ffffffd,30},
    {0xfffffeb,28}, {0xfffffec,28}, {0xfffffed,28}, {0xfffffee,28}, {0xfffffef,28}, {0xffffff0,28}, {0xffffff1,28},
    {0xffffff2,28}, {0x3ffffffe,30}, {0xffffff3,28}, {0xffffff4,28}, {0xffffff5,28}, {0xffffff6,28}, {0xffffff7,28},
    {0xffffff8,28}, {0xffffff9,28}, {0xffffffa,28}, {0xffffffb,28}, {0x14,6}, {0x3f8,10}, {0x3f9,10}, {0xffa,12},
    {0x1ff9,13}, {0x15,6}, {0xf8,8}, {0x7fa,11}, {0x3fa,10}, {0x3fb,10}, {0xf9,8}, {0x7fb,11}, {0xfa,8}, {0x16,6},
    {0x17,6}, {0x18,6}, {0x0,5}, {0x1,5}, {0x2,5}, {0x19,6}, {0x1a,6}, {0x1b,6}, {0x1c,6}, {0x1d,6}, {0x1e,6},
    {0x1f,6}, {0x5c,7}, {0xfb,8}, {0x7ffc,15}, {0x20,6}, {0xffb,12}, {0x3fc,10}, {0x1ffa,13}, {0x21,6}, {0x5d,7},
    {0x5e,7}, {0x5f,7}, {0x60,7}, {0x61,7}, {0x62,7}, {0x63,7}, {0x64,7}, {0x65,7}, {0x66,7}, {0x67,7}, {0x68,7},
    {0x69,7}, {0x6a,7}, {0x6b,7}, {0x6c,7}, {0x6d,7}, {0x6e,7}, {0x6f,7}, {0x70,7}, {0x71,7}, {0x72,7}, {0xfc,8},
    {0x73,7}, {0xfd,8}, {0x1ffb,13}, {0x7fff0,19}, {0x1ffc,13}, {0x3ffc,14}, {0x22,6}, {0x7ffd,15}, {0x3,5}, {0x23,6},
    {0x4,5}, {0x24,6}, {0x5,5}, {0x25,6}, {0x26,6}, {0x27,6}, {0x6,5}, {0x74,7}, {0x75,7}, {0x28,6}, {0x29,6},
    {0x2a,6}, {0x7,5}, {0x2b,6}, {0x76,7}, {0x2c,6}, {0x8,5}, {0x9,5}, {0x2d,6}, {0x77,7}, {0x78,7}, {0x79,7},
    {0x7a,7}, {0x7b,7}, {0x7ffe,15}, {0x7fc,11}, {0x3ffd,14}, {0x1ffd,13}, {0xffffffc,28}, {0xfffe6,20}, {0x3fffd2,22},
    {0xfffe7,20}, {0xfffe8,20}, {0x3fffd3,22}, {0x3fffd4,22}, {0x3fffd5,22}, {0x7fffd9,23}, {0x3fffd6,22},
    {0x7fffda,23}, {0x7fffdb,23}, {0x7fffdc,23}, {0x7fffdd,23}, {0x7fffde,23}, {0xffffeb,24}, {0x7fffdf,23},
    {0xffffec,24}, {0xffffed,24}, {0x3fffd7,22}, {0x7fffe0,23}, {0xffffee,24}, {0x7fffe1,23}, {0x7fffe2,23},
    {0x7fffe3,23}, {0x7fffe4,23}, {0x1fffdc,21}, {0x3fffd8,22}, {0x7fffe5,23}, {0x3fffd9,22}, {0x7fffe6,23},
    {0x7fffe7,23}, {0xffffef,24}, {0x3fffda,22}, {0x1fffdd,21}, {0xfffe9,20}, {0x3fffdb,22}, {0x3fffdc,22},
    {0x7fffe8,23}, {0x7fffe9,23}, {0x1fffde,21}, {0x7fffea,23}, {0x3fffdd,22}, {0x3fffde,22}, {0xfffff0,24},
    {0x1fffdf,21}, {0x3fffdf,22}, {0x7fffeb,23}, {0x7fffec,23}, {0x1fffe0,21}, {0x1fffe1,21}, {0x3fffe0,22},
    {0x1fffe2,21}, {0x7fffed,23}, {0x3fffe1,22}, {0x7fffee,23}, {0x7fffef,23}, {0xfffea,20}, {0x3fffe2,22},
    {0x3fffe3,22}, {0x3fffe4,22}, {0x7ffff0,23}, {0x3fffe5,22}, {0x3fffe6,22}, {0x7ffff1,23}, {0x3ffffe0,26},
    {0x3ffffe1,26}, {0xfffeb,20}, {0x7fff1,19}, {0x3fffe7,22}, {0x7ffff2,23}, {0x3fffe8,22}, {0x1ffffec,25},
    {0x3ffffe2,26}, {0x3ffffe3,26}, {0x3ffffe4,26}, {0x7ffffde,27}, {0x7ffffdf,27}, {0x3ffffe5,26}, {0xfffff1,24},
    {0x1ffffed,25}, {0x7fff2,19}, {0x1fffe3,21}, {0x3ffffe6,26}, {0x7ffffe0,27}, {0x7ffffe1,27}, {0x3ffffe7,26},
    {0x7ffffe2,27}, {0xfffff2,24}, {0x1fffe4,21}, {0x1fffe5,21}, {0x3ffffe8,26}, {0x3ffffe9,26}, {0xffffffd,28},
    {0x7ffffe3,27}, {0x7ffffe4,27}, {0x7ffffe5,27}, {0xfffec,20}, {0xfffff3,24}, {0xfffed,20}, {0x1fffe6,21},
    {0x3fffe9,22}, {0x1fffe7,21}, {0x1fffe8,21}, {0x7ffff3,23}, {0x3fffea,22}, {0x3fffeb,22}, {0x1ffffee,25},
    {0x1ffffef,25}, {0xfffff4,24}, {0xfffff5,24}, {0x3ffffea,26}, {0x7ffff4,23}, {0x3ffffeb,26}, {0x7ffffe6,27},
    {0x3ffffec,26}, {0x3ffffed,26}, {0x7ffffe7,27}, {0x7ffffe8,27}, {0x7ffffe9,27}, {0x7ffffea,27}, {0x7ffffeb,27},
    {0xffffffe,28}, {0x7ffffec,27}, {0x7ffffed,27}, {0x7ffffee,27}, {0x7ffffef,27}, {0x7fffff0,27}, {0x3ffffee,26},
    {0x3fffffff,30},
};

struct bits {
    uint8_t bytes[65536];
    size_t n; /* bits */
};

static void put_bits(struct bits *b, uint32_t v, unsigned n)
{
    for (; n > 0; n--, b->n++) {
        if (b->n % 8 == 0)
            b->bytes[b->n / 8] = 0;
        b->bytes[b->n / 8] |= (uint8_t)((v >> (n - 1) & 1) << (7 - b->n % 8));
    }
}

static void put_symbol(struct bits *b, unsigned symbol)
{
    put_bits(b, appendix_b[symbol].code, appendix_b[symbol].bits);
}

static void pad(struct bits *b)
{
    while (b->n % 8)
        put_bits(b, 1, 1);
}

/* Decodes into `out`, right before an unreadable page both ways; -1: refused. */
static long huffman(struct tester *t, const struct bits *b, uint8_t **out, size_t room)
{
    size_t n = b->n / 8, len = 0;
    uint8_t *in = t->block_end - n;
    memcpy(in, b->bytes, n);
    *out = t->scratch_end - room;
    return huffman_decode(&t->huffman, (struct bytes){ in, n }, *out, room, &len) ? (long)len : -1;
}

static void test_huffman(struct tester *t)
{
    static struct bits b;
    uint8_t *out;
    for (unsigned s = 0; s < 256; s++) /* alone, and between two neighbours of other lengths */
        for (unsigned before = 0; before < 256; before += 5) {
            b.n = 0;
            if (before)
                put_symbol(&b, before);
            put_symbol(&b, s);
            if (before)
                put_symbol(&b, 255 - before);
            pad(&b);
            long wanted = before ? 3 : 1, got = huffman(t, &b, &out, 3);
            if (got != wanted || out[before ? 1 : 0] != s ||
                (before && (out[0] != before || out[2] != 255 - before)))
                CHECK(got, -1000 - (long)s);
            else
                passed++;
        }
    b.n = 0;
    CHECK(huffman(t, &b, &out, 0), 0);
    for (unsigned s = 0; s < 256; s++)
        put_symbol(&b, s);
    pad(&b);
    CHECK(huffman(t, &b, &out, 256), 256);
    for (unsigned s = 0; s < 256; s++)
        CHECK(out[s], s);
    CHECK(huffman(t, &b, &out, 100), 256); /* less room: the rest is counted only */
    CHECK(out[99], 99);
}

/* RFC 7541 5.2: padding of 0 to 7 ones, nothing else, and never EOS. */
static void test_padding(struct tester *t)
{
    static struct bits b;
    uint8_t *out;
    for (unsigned s = 0; s < 256; s++) {
        unsigned rest = 8 - appendix_b[s].bits % 8;
        for (uint32_t padding = 0; padding < 1u << rest; padding++) { /* rest 8: a whole octet more, or none */
            b.n = 0;
            put_symbol(&b, s);
            put_bits(&b, padding, rest);
            bool ones = padding + 1 == 1u << rest;
            bool symbol = false; /* the padding may happen to start with a symbol, its own padding after it */
            for (unsigned x = 0; x < 256; x++) {
                unsigned n = appendix_b[x].bits, left = rest - n;
                if (n <= rest && padding >> left == appendix_b[x].code &&
                    (padding & ((1u << left) - 1)) == (1u << left) - 1)
                    symbol = true;
            }
            long wanted = symbol ? 2 : ones && rest < 8 ? 1 : -1;
            if (huffman(t, &b, &out, 2) != wanted)
                CHECK(huffman(t, &b, &out, 2), wanted);
            else
                passed++;
        }
    }
    for (unsigned n = 1; n <= 8; n++) { /* nothing but ones: too much padding, or EOS from 30 bits on */
        b.n = 0;
        for (unsigned i = 0; i < n; i++)
            put_bits(&b, 0xff, 8);
        CHECK(huffman(t, &b, &out, 8), -1);
    }
    for (unsigned s = 0; s < 256; s += 3) { /* EOS between symbols, and at the end */
        b.n = 0;
        put_symbol(&b, s);
        put_symbol(&b, HUFFMAN_EOS);
        pad(&b);
        CHECK(huffman(t, &b, &out, 2), -1);
        put_symbol(&b, s);
        pad(&b);
        CHECK(huffman(t, &b, &out, 2), -1);
    }
}

/* ---- Damage ---- */

static void test_damage(struct tester *t)
{
    static const struct {
        const char *hex;
        enum hpack_error wanted;
    } rows[] = {
        { "", HPACK_OK },
        { "80", HPACK_COMPRESSION_ERROR },           /* index 0 */
        { "bd", HPACK_OK },                          /* 61 */
        { "be", HPACK_COMPRESSION_ERROR },           /* 62: the dynamic table is empty */
        { "ff00", HPACK_COMPRESSION_ERROR },         /* 127 */
        { "fffffffff0", HPACK_COMPRESSION_ERROR },
        { "ffffffffff0f", HPACK_COMPRESSION_ERROR }, /* 2^32 and more */
        { "ff80808080808080808001", HPACK_COMPRESSION_ERROR },
        { "40016101 62 be", HPACK_OK },
        { "40016101 62 bf", HPACK_COMPRESSION_ERROR },
        { "7e0161", HPACK_COMPRESSION_ERROR },       /* names: 62, with and without insertion, and never indexed */
        { "0f2f0161", HPACK_COMPRESSION_ERROR },
        { "1f2f0161", HPACK_COMPRESSION_ERROR },
        { "0f2e0161", HPACK_OK },                    /* 61 */
        { "00016101 62", HPACK_OK },
        { "0000 00", HPACK_OK },                     /* empty name and value */
        { "0080 80", HPACK_OK },                     /* the same, Huffman-coded */
        { "00016102 62", HPACK_COMPRESSION_ERROR },  /* string longer than the block */
        { "00016182 1f", HPACK_COMPRESSION_ERROR },
        { "000161", HPACK_COMPRESSION_ERROR },
        { "007fffffff0f61", HPACK_COMPRESSION_ERROR },
        { "007f80ffffff0f61", HPACK_COMPRESSION_ERROR },
        { "00ff80ffffff0f61", HPACK_COMPRESSION_ERROR },
        { "007fffffffffffffffffff0161", HPACK_COMPRESSION_ERROR },
        { "0001618118", HPACK_COMPRESSION_ERROR },   /* Huffman-coded value: "a" and 3 bits, 000 */
        { "000161811f", HPACK_OK },
        { "000161821fff", HPACK_COMPRESSION_ERROR }, /* 11 bits of padding */
        { "00811801 61", HPACK_COMPRESSION_ERROR },  /* the same of a name */
        { "20", HPACK_OK },                          /* size update to 0 */
        { "20 3fe11f 82", HPACK_OK },                /* 0, then 4,096 */
        { "3fe11f 3fe11f", HPACK_OK },
        { "20 20 20", HPACK_COMPRESSION_ERROR },     /* three */
        { "3fe21f", HPACK_COMPRESSION_ERROR },       /* 4,097 */
        { "3fffffffff0f", HPACK_COMPRESSION_ERROR },
        { "3fffffffffffff0f", HPACK_COMPRESSION_ERROR },
        { "3f", HPACK_COMPRESSION_ERROR },
        { "82 20", HPACK_COMPRESSION_ERROR },        /* after a field */
        { "20 82 20", HPACK_COMPRESSION_ERROR },
        { "0001610162 20", HPACK_COMPRESSION_ERROR },
        { "4001610162 20", HPACK_COMPRESSION_ERROR },
        { "4001610162 be 20", HPACK_COMPRESSION_ERROR },
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        enum hpack_error got = fresh(t, rows[i].hex);
        CHECK(got, rows[i].wanted);
        if (got != rows[i].wanted)
            printf("    in %s\n", rows[i].hex);
    }
    CHECK(fresh(t, "4001610162 4001630164"), HPACK_OK); /* a size update takes effect at once, oldest first */
    CHECK(decode_hex(t, "3f03 be"), HPACK_OK);
    CHECK_BYTES(whole(&t->fields), bytes_of("c: d\n"));
    CHECK(t->hpack.max, 34);
    CHECK(decode_hex(t, "bf"), HPACK_COMPRESSION_ERROR);
    CHECK(decode_hex(t, "3f02 be"), HPACK_COMPRESSION_ERROR);
    CHECK(fresh(t, "4001610162"), HPACK_OK); /* the smaller of two empties the table */
    CHECK(decode_hex(t, "20 3fe11f be"), HPACK_COMPRESSION_ERROR);
    CHECK(fresh(t, "20 4001610162"), HPACK_OK); /* size 0: nothing enters */
    CHECK(t->delivered, 1);
    CHECK(t->hpack.count, 0);
}

/* ---- List limit ---- */

static void test_limit(struct tester *t)
{
    struct buf block = { 0 }, table = { 0 };
    for (size_t i = 0; i < sizeof examples / sizeof *examples; i++) {
        size_t size = 0;
        for (const char *p = examples[i].fields; *p; p++) /* ": " and the line's end stand for 32 */
            size += *p == '\n' ? 32 - 2 : 1;
        for (int over = -1; over <= 1; over++) {
            lead_up(t, i);
            block.len = 0;
            put_unhex(&block, examples[i].hex);
            CHECK(decode_limit(t, whole(&block), size + (size_t)over), HPACK_OK);
            CHECK(t->reader.too_large, over < 0);
            struct bytes all = bytes_of(examples[i].fields);
            if (over < 0) /* all but the last */
                for (all.n--; all.n > 0 && all.p[all.n - 1] != '\n'; all.n--)
                    ;
            CHECK_BYTES(whole(&t->fields), all);
            CHECK(table_text(&t->hpack, &table), examples[i].size);
            CHECK_BYTES(whole(&table), bytes_of(examples[i].table));
        }
    }
    lead_up(t, 10); /* nothing is delivered after the first that is too much, even if it would fit */
    block.len = 0;
    put_unhex(&block, "4001610461616161 4001620162");
    CHECK(decode_limit(t, whole(&block), 34), HPACK_OK);
    CHECK(t->delivered, 0);
    CHECK(t->reader.too_large, true);
    CHECK(decode_limit(t, (struct bytes){ (const uint8_t *)"\xbe", 1 }, 34), HPACK_OK); /* told per block */
    CHECK(t->reader.too_large, false);
    CHECK_BYTES(whole(&t->fields), bytes_of("b: b\n"));
    CHECK(decode_limit(t, (struct bytes){ (const uint8_t *)"\xbe", 1 }, 0), HPACK_OK);
    CHECK(t->delivered, 0);
    CHECK(decode_limit(t, (struct bytes){ NULL, 0 }, 0), HPACK_OK);
    CHECK(t->reader.too_large, false);
    buf_free(&block);
    buf_free(&table);
}

/* ---- Large strings, growth, eviction ---- */

/* A literal that enters the table: name (index, or n times c) and n times c. */
static void put_literal(struct buf *b, unsigned index, int name_c, size_t name_n, int value_c, size_t value_n)
{
    hpack_put_int(b, 0x40, 6, index);
    if (index == 0) {
        hpack_put_int(b, 0, 7, name_n);
        put_repeated(b, name_c, name_n);
    }
    hpack_put_int(b, 0, 7, value_n);
    put_repeated(b, value_c, value_n);
}

/* n times "a" (5 bits each), as a Huffman-coded string literal; with damage, EOS follows. */
static void put_coded(struct buf *b, size_t n, bool damage)
{
    static struct bits bits;
    bits.n = 0;
    for (size_t i = 0; i < n; i++)
        put_symbol(&bits, 'a');
    if (damage)
        put_symbol(&bits, HUFFMAN_EOS);
    pad(&bits);
    hpack_put_int(b, 0x80, 7, bits.n / 8);
    buf_put(b, bits.bytes, bits.n / 8);
}

static void test_table(struct tester *t)
{
    struct buf b = { 0 };
    static const size_t shapes[][2] = { { 32, 4032 }, { 0, 4064 }, { 4064, 0 }, { 2032, 2032 }, { 4000, 64 } };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) /* one entry of 4,095, 4,096 and 4,097 */
        for (size_t more = 0; more < 3; more++) {
            size_t name = shapes[i][0], value = shapes[i][1];
            name = name ? name + more - 1 : 0;
            value = name ? value : value + more - 1;
            for (int first = 0; first < 2; first++) { /* into a new table, and over other entries */
                renew(t);
                b.len = 0;
                if (first)
                    put_literal(&b, 0, 'x', 200, 'y', 300);
                put_literal(&b, 0, 'n', name, 'v', value);
                CHECK(decode(t, whole(&b)), HPACK_OK);
                CHECK(t->delivered, 1 + first);
                CHECK(t->hpack.count, more < 2);
                CHECK(t->hpack.len, more < 2 ? 4071 + more : 0);
                CHECK(table_sound(&t->hpack), true);
                if (more < 2) {
                    CHECK(t->hpack.cap, 4096);
                    CHECK(decode_hex(t, "be"), HPACK_OK);
                    CHECK(t->fields.len, name + value + 3);
                }
            }
        }
    renew(t); /* 128 of the smallest entries fill the table; one more drops one */
    for (unsigned n = 1; n <= 130; n++) {
        CHECK(decode_hex(t, "400000"), HPACK_OK);
        CHECK(t->hpack.count, n < 128 ? n : 128);
        CHECK(table_sound(&t->hpack), true);
    }
    CHECK(t->hpack.cap, 1024);
    CHECK(decode_hex(t, "ff3e"), HPACK_OK); /* 189 = 61 + 128 */
    CHECK(decode_hex(t, "ff3f"), HPACK_COMPRESSION_ERROR);
    renew(t); /* growth to 4,096 by small entries: no octet goes astray on the way */
    size_t cap = 0;
    for (unsigned n = 0; n < 400; n++) {
        b.len = 0;
        put_literal(&b, 0, 'a' + (int)(n % 26), 1 + n % 7, 'A' + (int)(n % 26), n % 500);
        CHECK(decode(t, whole(&b)), HPACK_OK);
        CHECK(decode_hex(t, "be"), HPACK_OK);
        CHECK(t->fields.len, 1 + n % 7 + n % 500 + 3);
        CHECK(t->fields.p[0], 'a' + n % 26);
        CHECK(table_sound(&t->hpack), true);
        CHECK(t->hpack.cap >= cap, true);
        cap = t->hpack.cap;
    }
    CHECK(cap > 3072, true);
    CHECK(sizeof t->hpack <= 32, true);
    buf_free(&b);
}

/* A name taken from an entry that its own insertion drops or moves (RFC 7541 4.4). */
static void test_borrowed_name(struct tester *t)
{
    struct buf b = { 0 };
    for (size_t value = 0; value <= 3000; value += 50)
        for (int coded = 0; coded < 2; coded++)
            for (unsigned index = 62; index <= 63; index++) {
                renew(t);
                b.len = 0;
                put_literal(&b, 0, index == 63 ? 'n' : 'o', 1000, 'v', 20);
                put_literal(&b, 0, index == 63 ? 'o' : 'n', 1000, 'w', 20);
                CHECK(decode(t, whole(&b)), HPACK_OK);
                b.len = 0;
                if (coded) {
                    hpack_put_int(&b, 0x40, 6, index);
                    put_coded(&b, value, false);
                } else {
                    put_literal(&b, index, 0, 0, 'a', value);
                }
                hpack_put_int(&b, 0x80, 7, 62);
                CHECK(decode(t, whole(&b)), HPACK_OK);
                CHECK(t->delivered, 2);
                CHECK(t->fields.len, 2 * (1000 + value + 3));
                size_t half = t->fields.len / 2;
                CHECK(memcmp(t->fields.p, t->fields.p + half, half), 0);
                CHECK(t->fields.p[0] == 'n' && t->fields.p[999] == 'n', true);
                CHECK(value == 0 || (t->fields.p[1002] == 'a' && t->fields.p[1001 + value] == 'a'), true);
                CHECK(table_sound(&t->hpack), true);
            }
    buf_free(&b);
}

/* Huffman-coded strings longer than the scratch area: the table is emptied, nothing is delivered, damage is seen. */
static void test_long_coded(struct tester *t)
{
    struct buf b = { 0 };
    static const size_t lengths[] = { 0, 1, 4032, 4063, 4064, 4095, 4096, 4097, 5000, 40000 };
    enum { N = sizeof lengths / sizeof *lengths };
    for (size_t i = 0; i < 2 * N * N; i++) {
        size_t name = lengths[i % N], value = lengths[i / N % N];
        bool damage = i >= N * N;
        renew(t);
        CHECK(decode_hex(t, "4001610162"), HPACK_OK);
        b.len = 0;
        buf_putc(&b, 0x40);
        put_coded(&b, name, false);
        put_coded(&b, value, damage);
        enum hpack_error error = decode_limit(t, whole(&b), 1000);
        CHECK(error, damage ? HPACK_COMPRESSION_ERROR : HPACK_OK);
        if (damage)
            continue;
        CHECK(t->reader.too_large, name + value + 32 > 1000);
        CHECK(t->delivered, name + value + 32 <= 1000);
        CHECK(t->hpack.count, name + value + 32 > 4096 ? 0 : name + value + 32 + 34 > 4096 ? 1 : 2);
        CHECK(table_sound(&t->hpack), true);
        CHECK(decode_hex(t, "4001610162 be"), HPACK_OK);
        CHECK_BYTES(whole(&t->fields), bytes_of("a: b\na: b\n"));
    }
    for (size_t value = 3000; value < 3100; value++) { /* a borrowed name of 1,000 and a coded value around the edge */
        renew(t);
        b.len = 0;
        put_literal(&b, 0, 'n', 1000, 'v', 0);
        hpack_put_int(&b, 0x40, 6, 62);
        put_coded(&b, value, false);
        CHECK(decode_limit(t, whole(&b), 1100), HPACK_OK);
        CHECK(t->delivered, 1);
        CHECK(t->hpack.count, value + 1032 <= 4096);
        CHECK(table_sound(&t->hpack), true);
    }
    buf_free(&b);
}

/* ---- No memory ---- */

static void test_no_memory(struct tester *t)
{
    struct buf b = { 0 };
    for (int i = 0; i < 12; i++)
        put_literal(&b, 0, 'n', 10, 'v', 238);
    long n = 0;
    enum hpack_error error;
    do {
        renew(t);
        uint8_t *p = t->block_end - b.len;
        memcpy(p, b.p, b.len);
        t->fields.len = 0;
        t->reader = (struct hpack_reader){ .huffman = &t->huffman, .scratch = t->scratch_end - HPACK_TABLE_SIZE,
                                           .list_limit = 0, .field = collect, .arg = t };
        alloc_fail = alloc_count + ++n;
        error = hpack_decode(&t->hpack, (struct bytes){ p, b.len }, &t->reader);
        bool hit = alloc_count >= alloc_fail;
        alloc_fail = 0;
        CHECK(error, hit ? HPACK_NO_MEMORY : HPACK_OK);
        CHECK(table_sound(&t->hpack), true);
        CHECK(t->hpack.count, hit ? n - 1 : 12);
    } while (error == HPACK_NO_MEMORY);
    CHECK(n, 13); /* each of these entries takes 256 bytes, one step of growth */
    buf_free(&b);
    alloc_fail = alloc_count + 1;
    hpack_encode_field(&b, BYTES("a"), BYTES("b"));
    CHECK(alloc_count, alloc_fail);
    CHECK(b.failed, true);
    buf_free(&b);
}

/* ---- Encoder ---- */

static void test_encoder(struct tester *t)
{
    static const struct {
        const char *name, *value, *hex;
    } rows[] = {
        { ":status", "200", "88" },
        { ":status", "404", "8d" },
        { ":status", "415", "0803 343135" },
        { ":method", "GET", "82" },
        { ":path", "/index.html", "85" },
        { ":path", "/sample/path", "040c2f73616d706c652f70617468" }, /* C.2.2 */
        { "accept-encoding", "gzip, deflate", "90" },
        { "accept-encoding", "gzip", "0f01 04 677a6970" },
        { "accept-charset", "", "8f" },
        { "accept-charset", "x", "0f00 01 78" },
        { "content-type", "application/grpc", "0f10 10 6170706c69636174696f6e2f67727063" },
        { "www-authenticate", "", "bd" },
        { "grpc-status", "0", "00 0b 677270632d737461747573 01 30" },
        { "accep", "", "00 05 6163636570 00" },
        { "", "", "000000" },
        { "", "v", "00000176" },
    };
    struct buf b = { 0 }, wanted = { 0 }, text = { 0 };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        size_t at = b.len;
        put_unhex(&wanted, rows[i].hex);
        hpack_encode_field(&b, bytes_of(rows[i].name), bytes_of(rows[i].value));
        CHECK(b.len, wanted.len);
        CHECK(b.len == wanted.len && memcmp(b.p + at, wanted.p + at, b.len - at) == 0, true);
        buf_printf(&text, "%s: %s\n", rows[i].name, rows[i].value);
    }
    renew(t);
    CHECK(decode(t, whole(&b)), HPACK_OK);
    CHECK_BYTES(whole(&t->fields), whole(&text));
    CHECK(t->hpack.table == NULL, true);
    for (unsigned i = 1; i <= HPACK_STATIC; i++) { /* each row is found, and by its own index */
        struct bytes name, value;
        CHECK(hpack_lookup(&t->hpack, i, &name, &value), true);
        b.len = 0;
        hpack_encode_field(&b, name, value);
        CHECK(b.len == 1 && b.p[0] == (0x80 | i), true);
    }
    static const struct {
        uint32_t max;
        const char *hex;
    } updates[] = { { 0, "20" }, { 30, "3e" }, { 31, "3f00" }, { 256, "3fe101" }, { 4096, "3fe11f" } };
    for (size_t i = 0; i < sizeof updates / sizeof *updates; i++) {
        b.len = wanted.len = 0;
        put_unhex(&wanted, updates[i].hex);
        hpack_put_int(&b, 0x20, 5, updates[i].max);
        CHECK_BYTES(whole(&b), whole(&wanted));
    }
    b.len = 0; /* lengths around each step of the integer, name without a pointer */
    for (size_t n = 0; n < 17000; n += n < 300 ? 1 : 1601) {
        b.len = 0;
        put_repeated(&b, 'v', n);
        struct buf out = { 0 };
        hpack_encode_field(&out, (struct bytes){ NULL, 0 }, whole(&b));
        CHECK(decode(t, whole(&out)), HPACK_OK);
        CHECK(t->fields.len, n + 3);
        buf_free(&out);
    }
    buf_free(&b);
    buf_free(&wanted);
    buf_free(&text);
}

/* ---- Another implementation's blocks ---- */

static void put_escaped(struct buf *b, const char *s, size_t n)
{
    for (const char *end = s + n; s < end; s++) {
        char pair[3] = "";
        if (*s == '%') {
            memcpy(pair, s + 1, 2);
            s += 2;
        }
        buf_putc(b, pair[0] ? (int)strtol(pair, NULL, 16) : *s);
    }
}

static void test_cases(struct tester *t, const char *path)
{
    static char line[65536];
    struct buf wanted = { 0 }, text = { 0 };
    long blocks = 0;
    FILE *f = fopen(path, "r");
    if (!f) {
        perror(path);
        failed++;
        return;
    }
    while (fgets(line, sizeof line, f)) {
        size_t n = strcspn(line, "\n"), tab = strcspn(line, "\t");
        unsigned long count, size;
        line[n] = 0;
        if (line[0] == 'N') {
            renew(t);
        } else if (line[0] == 'B') {
            CHECK(decode_hex(t, line + 2), HPACK_OK);
            wanted.len = 0;
            blocks++;
        } else if (line[0] == 'F') {
            put_escaped(&wanted, line + 2, tab - 2);
            buf_puts(&wanted, ": ");
            put_escaped(&wanted, line + tab + 1, n - tab - 1);
            buf_putc(&wanted, '\n');
        } else if (sscanf(line, "T %lu %lu", &count, &size) == 2) {
            CHECK_BYTES(whole(&t->fields), whole(&wanted));
            CHECK(t->hpack.count, count);
            CHECK(table_text(&t->hpack, &text), size);
            CHECK(table_sound(&t->hpack), true);
        }
    }
    CHECK(blocks > 300, true);
    fclose(f);
    buf_free(&wanted);
    buf_free(&text);
}

/* ---- Noise ---- */

static uint32_t noise(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

/* Random blocks, and examples with bytes changed: whatever comes, the table stays sound and the limit holds. */
static void test_noise(struct tester *t)
{
    uint32_t state = 7541;
    long good = 0;
    for (int round = 0; round < 30000; round++) {
        struct buf b = { 0 };
        if (round % 2) {
            put_unhex(&b, examples[noise(&state) % (sizeof examples / sizeof *examples)].hex);
            for (uint32_t n = noise(&state) % 4; n > 0; n--)
                b.p[noise(&state) % b.len] = (uint8_t)noise(&state);
        } else {
            for (uint32_t n = noise(&state) % 64; n > 0; n--)
                buf_putc(&b, (int)(noise(&state) & 255));
        }
        if (round % 16 == 0)
            renew(t);
        size_t limit = noise(&state) % 400;
        good += decode_limit(t, whole(&b), limit) == HPACK_OK;
        CHECK(table_sound(&t->hpack), true);
        CHECK(t->fields.len + 29 * (size_t)t->delivered <= limit, true);
        buf_free(&b);
    }
    CHECK(good > 1000, true);
}

int main(int argc, char **argv)
{
    struct tester t;
    tester_init(&t);
    test_integers();
    test_examples(&t);
    test_truncation(&t);
    test_huffman(&t);
    test_padding(&t);
    test_damage(&t);
    test_limit(&t);
    test_table(&t);
    test_borrowed_name(&t);
    test_long_coded(&t);
    test_no_memory(&t);
    test_encoder(&t);
    test_cases(&t, argc > 1 ? argv[1] : "hpack_cases.txt");
    test_noise(&t);
    hpack_free(&t.hpack);
    buf_free(&t.fields);
    return closing();
}
