/* The core where a text file of frames does not reach: long manifests under flow control, windows shared by streams,
 * descriptors, caps counted in bytes, timers, and every allocation failed in turn.
 */
#include "core_test.h"

/* ---- A peer that counts ---- */
struct side {
    struct conn conn;
    struct peer peer;
    struct buf in, out, lines;        /* to the server; from it; as text */
    uint64_t data[8];                 /* bytes of DATA on streams 1, 3, 5 ... */
    size_t largest;
    bool same;                        /* all DATA on stream 1 is the manifest's, in order */
};

static void side_open(struct side *a)
{
    memset(a, 0, sizeof *a);
    a->peer.who = 'S';
    a->same = true;
    hpack_init(&a->peer.hpack);
    conn_init(&a->conn, &core, &serving, "peer");
}

static void side_close(struct side *a)
{
    conn_free(&a->conn);
    hpack_free(&a->peer.hpack);
    buf_free(&a->in);
    buf_free(&a->out);
    buf_free(&a->lines);
}

/* Gives the server what has been put into a->in, in reads of 64 KiB. */
static void side_send(struct side *a)
{
    for (size_t at = 0, n; at < a->in.len; at += n) {
        n = min_size(a->in.len - at, 65536);
        if (conn_wants_input(&a->conn))
            conn_recv(&a->conn, a->in.p + at, n);
    }
    a->in.len = 0;
}

static void side_count(struct side *a, const struct frame *f, const uint8_t *p)
{
    uint64_t *n = &a->data[f->stream_id / 2 % 8];
    if (f->stream_id == 1)
        a->same &= *n + f->len <= server.manifest.stream->n && memcmp(server.manifest.stream->p + *n, p, f->len) == 0;
    *n += f->len;
    a->largest = f->len > a->largest ? f->len : a->largest;
}

/* Takes what the server has to say, up to `limit` bytes; DATA is counted, all else becomes lines. */
static void side_take(struct side *a, size_t limit)
{
    const uint8_t *p;
    for (size_t n; limit && (n = conn_peek(&a->conn, &p)) != 0;) {
        n = min_size(n, limit);
        buf_put(&a->out, p, n);
        conn_sent(&a->conn, n);
        limit -= n;
    }
    size_t at = 0;
    for (;;) {
        struct bytes rest = { a->out.p + at, a->out.len - at };
        struct frame f = rest.n >= FRAME_HEADER_LEN ? frame_parse(rest.p) : (struct frame){ .len = 1 << 30 };
        if (rest.n < FRAME_HEADER_LEN + (size_t)f.len)
            break;
        if (f.type == FRAME_DATA)
            side_count(a, &f, rest.p + FRAME_HEADER_LEN);
        if (f.type != FRAME_DATA || f.flags & END_STREAM)
            peer_frame(&a->peer, rest, &a->lines);
        at += FRAME_HEADER_LEN + (size_t)f.len;
    }
    if (at)
        memmove(a->out.p, a->out.p + at, a->out.len - at);
    a->out.len -= at;
}

static void side_exchange(struct side *a)
{
    side_send(a);
    side_take(a, SIZE_MAX);
}

/* The lines since the last call. */
#define SIDE_LINES(a, wanted) do { CHECK_TEXT(whole(&(a)->lines), wanted); (a)->lines.len = 0; } while (0)

static void put_setting(struct side *a, enum setting id, uint32_t value)
{
    frame_put(&a->in, 6, FRAME_SETTINGS, 0, 0);
    frame_put_setting(&a->in, id, value);
}

static void put_window(struct side *a, uint32_t id, uint32_t add)
{
    frame_put_u32(&a->in, FRAME_WINDOW_UPDATE, id, add);
}

static void put_data(struct side *a, uint32_t id, const void *p, size_t n, unsigned flags)
{
    frame_put(&a->in, (uint32_t)n, FRAME_DATA, flags, id);
    buf_put(&a->in, p, n);
}

static void put_call(struct side *a, uint32_t id, const char *path, unsigned flags, const char *job_id)
{
    struct buf b = { 0 };
    put_field(&b, ":method", BYTES("POST"));
    put_field(&b, ":scheme", BYTES("http"));
    put_field(&b, ":path", bytes_of(path));
    put_field(&b, "content-type", BYTES("application/grpc"));
    if (job_id)
        put_field(&b, "job-id", bytes_of(job_id));
    frame_put(&a->in, (uint32_t)b.len, FRAME_HEADERS, END_HEADERS | flags, id);
    buf_put(&a->in, b.p, b.len);
    buf_free(&b);
}

static void put_preface(struct side *a)
{
    buf_put(&a->in, preface, PREFACE_LEN);
    frame_put(&a->in, 0, FRAME_SETTINGS, 0, 0);
}

/* Data of which every octet tells where it stands. */
static void manifest_of(size_t n)
{
    blob_unref(server.manifest.stream);
    server.manifest.stream = blob_new(n);
    for (size_t i = 0; server.manifest.stream && i < n; i++)
        server.manifest.stream->p[i] = (uint8_t)(i * 2654435761u >> 13);
}

static const char *const process = "/cvms.Service/Process";
#define OPENED "S SETTINGS MAX_CONCURRENT_STREAMS=100 MAX_HEADER_LIST_SIZE=16384\nS SETTINGS ACK\n"
#define ANSWER(id) "S HEADERS stream=" #id " :status=200 content-type=application/grpc\n"

/* ---- A manifest of 3 MiB under flow control (RFC 9113 6.9) ---- */
static void test_long_manifest(void)
{
    struct side a;
    core_reset();
    manifest_of(3 << 20);
    side_open(&a);
    put_preface(&a);
    put_call(&a, 1, process, 0, NULL);
    side_exchange(&a);
    SIDE_LINES(&a, OPENED ANSWER(1));
    CHECK(core.touched, false);                             /* no other connection is to be flushed for it */
    CHECK(a.data[0], 65535);
    put_window(&a, 0, 10 << 20);
    side_exchange(&a);
    CHECK(a.data[0], 65535);
    put_window(&a, 1, (3 << 19) - 65535);
    side_exchange(&a);
    CHECK(a.data[0], 3 << 19);
    put_setting(&a, SETTINGS_INITIAL_WINDOW_SIZE, 0);       /* the stream's window: -65535 */
    put_window(&a, 1, 65535);
    side_exchange(&a);
    CHECK(a.data[0], 3 << 19);
    put_window(&a, 1, 1);
    side_exchange(&a);
    CHECK(a.data[0], (3 << 19) + 1);
    put_setting(&a, SETTINGS_INITIAL_WINDOW_SIZE, 1000);
    put_setting(&a, SETTINGS_INITIAL_WINDOW_SIZE, 10);      /* up and down again before anything goes: 10 - 0 - 0 */
    put_data(&a, 1, "", 0, END_STREAM);
    side_exchange(&a);
    CHECK(a.data[0], (3 << 19) + 11);
    put_setting(&a, SETTINGS_INITIAL_WINDOW_SIZE, 1 << 22);
    side_exchange(&a);
    CHECK(a.data[0], 3 << 20);
    CHECK(a.same, true);
    CHECK(a.largest, MAX_FRAME_SIZE);
    SIDE_LINES(&a, "S SETTINGS ACK\nS SETTINGS ACK\nS SETTINGS ACK\nS SETTINGS ACK\n"
                   "S HEADERS stream=1 END_STREAM grpc-status=0\n");
    CHECK(a.conn.stream_count, 0);
    CHECK(server.manifest.stream->refs, 1);
    side_close(&a);
}

/* The connection's window is shared, in turn; a peer that takes larger frames gets 16,384 all the same. */
static void test_shared_window(void)
{
    struct side a;
    core_reset();
    manifest_of(1 << 20);
    side_open(&a);
    put_preface(&a);
    put_setting(&a, SETTINGS_INITIAL_WINDOW_SIZE, 4 << 20);
    put_setting(&a, SETTINGS_MAX_FRAME_SIZE, 1 << 20);
    put_window(&a, 0, 3 * 16384 * 20 - 65535);
    put_call(&a, 1, process, 0, NULL);
    put_call(&a, 3, process, 0, NULL);
    put_call(&a, 5, process, 0, NULL);
    side_exchange(&a);
    CHECK(a.data[0], 16384 * 20);
    CHECK(a.data[1], 16384 * 20);
    CHECK(a.data[2], 16384 * 20);
    CHECK(a.largest, MAX_FRAME_SIZE);
    CHECK(server.manifest.stream->refs, 4);
    side_close(&a);
    CHECK(server.manifest.stream->refs, 1);
}

/* A socket that takes little: never more output is made than a few large writes, and the rest is not lost. */
static void test_slow_socket(void)
{
    struct side a;
    core_reset();
    manifest_of(1 << 20);
    side_open(&a);
    put_preface(&a);
    put_setting(&a, SETTINGS_INITIAL_WINDOW_SIZE, 4 << 20);
    put_window(&a, 0, 4 << 20);
    put_call(&a, 1, process, END_STREAM, NULL);
    side_send(&a);
    size_t most = 0;
    for (size_t n = 1; a.conn.stream_count && n < 100000; n++) {
        side_take(&a, n % 7000 + 1);
        most = conn_pending(&a.conn) > most ? conn_pending(&a.conn) : most;
    }
    side_take(&a, SIZE_MAX);
    CHECK(a.data[0], 1 << 20);
    CHECK(a.same, true);
    CHECK(most <= OUT_TARGET + MAX_FRAME_SIZE + FRAME_HEADER_LEN, true);
    side_close(&a);
}

/* The log-forwarder that never reads: its window is shut, its messages are shown all the same. */
static void test_never_read(void)
{
    static const uint8_t log[] = "\0\0\0\0\7\12\5\12\3abc";
    struct side a;
    core_reset();
    manifest_of(3 << 20);
    side_open(&a);
    put_preface(&a);
    put_call(&a, 1, process, 0, NULL);
    side_exchange(&a);
    a.lines.len = 0;
    int credit = 0;
    for (int i = 0; i < 100000; i++) {
        put_data(&a, 1, log, sizeof log - 1, 0);
        if (i % 2000 == 1999)
            side_exchange(&a);
    }
    for (size_t i = 0; i + 15 < a.lines.len; i++)
        credit += memcmp(a.lines.p + i, "S WINDOW_UPDATE", 15) == 0;
    CHECK(a.data[0], 65535);
    CHECK(credit, 2 * (100000 * 12 / 32767));
    long lines = 0;
    for (size_t i = 0; i < core.out.len; i++)
        lines += core.out.p[i] == '\n';
    CHECK(lines, 100000);
    CHECK(a.conn.phase, CONN_OPEN);
    side_close(&a);
}

/* ---- Long messages: one stream of a connection at a time is let past its window ---- */

/* Two streams with the first 32,767 bytes of a message of 300,000 each; the first is let past its window. */
static void begin_two_long(struct side *a)
{
    static uint8_t zeros[16384];
    uint8_t prefix[5];
    core_reset();
    serving.max_message = 300000;        /* shares are powers of two: there is one for one of them */
    manifest_of(10);
    side_open(a);
    put_preface(a);
    put_call(a, 1, process, 0, NULL);
    put_call(a, 3, process, 0, NULL);
    grpc_put_prefix(prefix, 300000);
    for (uint32_t id = 1; id <= 3; id += 2) {
        put_data(a, id, prefix, 5, 0);
        for (size_t left = 32767 - 5, n; left; left -= n) {
            n = min_size(left, sizeof zeros);
            put_data(a, id, zeros, n, 0);
        }
        side_exchange(a);
    }
    SIDE_LINES(a, OPENED ANSWER(1) ANSWER(3) "S WINDOW_UPDATE stream=0 add=32767\nS WINDOW_UPDATE stream=1 add=32767\n"
                  "S WINDOW_UPDATE stream=0 add=32767\n");
}

static void put_zeros(struct side *a, uint32_t id, size_t left)
{
    static uint8_t zeros[16384];
    for (size_t n; left; left -= n) {
        n = min_size(left, sizeof zeros);
        put_data(a, id, zeros, n, 0);
    }
}

static uint32_t credit_of(struct side *a, uint32_t id)
{
    uint32_t sum = 0;
    char want[40];
    buf_putc(&a->lines, 0);
    const char *at = (char *)a->lines.p;
    snprintf(want, sizeof want, "S WINDOW_UPDATE stream=%u add=", (unsigned)id);
    while ((at = strstr(at, want)) != NULL) {
        at += strlen(want);
        sum += (uint32_t)strtoul(at, NULL, 10);
    }
    a->lines.len = 0;
    return sum;
}

/* Brings stream 1 past its window and stream 3 to the end of its own, both in the middle of a message. */
static void block_second(struct side *a)
{
    put_zeros(a, 1, 65535);
    side_exchange(a);
    CHECK(credit_of(a, 1) >= CREDIT_STEP, true);
    put_zeros(a, 3, 65535 - 32767);
    side_exchange(a);
    CHECK(credit_of(a, 3), 0);
    CHECK(a->conn.phase, CONN_OPEN);
}

static void test_big_completes(void)
{
    struct side a;
    begin_two_long(&a);
    block_second(&a);
    put_zeros(&a, 1, 65535);
    put_zeros(&a, 1, 32767);
    side_exchange(&a);
    a.lines.len = 0;
    put_zeros(&a, 1, 300000 + 5 - 32767 - 65535 - 65535 - 32767);
    side_exchange(&a);                /* all zeros is no message: the stream ends, and the other goes on */
    CHECK(credit_of(&a, 3), 65535);
    CHECK(a.conn.phase, CONN_OPEN);
    side_close(&a);
}

static void test_big_reset(void)
{
    struct side a;
    begin_two_long(&a);
    block_second(&a);
    frame_put_u32(&a.in, FRAME_RST_STREAM, 1, CANCEL);
    side_exchange(&a);
    CHECK(credit_of(&a, 3), 65535);
    side_close(&a);
}

static void test_big_deadline(void)
{
    struct side a;
    begin_two_long(&a);
    block_second(&a);
    for (struct stream *s = a.conn.streams; s; s = s->next)
        s->deadline_ms = s->id == 1 ? NOW + 1 : INT64_MAX;
    core.now_ms++;
    conn_tick(&a.conn);
    side_exchange(&a);
    CHECK(a.conn.stream_count, 1);
    CHECK(credit_of(&a, 3), 65535);
    side_close(&a);
}

/* A long message that stands still while another waits ends in time, and not before. */
static void test_share_stalls(void)
{
    struct side a;
    begin_two_long(&a);
    block_second(&a);
    CHECK(conn_deadline(&a.conn), NOW + SHARE_MS);
    core.now_ms += SHARE_MS - 1;
    conn_tick(&a.conn);
    CHECK(a.conn.shared, 1 << 19);
    put_zeros(&a, 1, CREDIT_STEP);    /* it moves */
    side_exchange(&a);
    core.now_ms += SHARE_MS - 1;
    core.backpressure = true;         /* we do not listen */
    conn_tick(&a.conn);
    core.now_ms++;
    conn_tick(&a.conn);
    CHECK(a.conn.stream_count, 2);
    core.backpressure = false;
    core.now_ms += SHARE_MS;
    a.lines.len = 0;
    conn_tick(&a.conn);
    side_exchange(&a);
    CHECK(bytes_behind(whole(&core.err), BYTES("stands still while others wait (10): the stream ends")).p != NULL, true);
    CHECK(bytes_behind(whole(&a.lines), BYTES("grpc-status=8")).p != NULL, true);
    CHECK(credit_of(&a, 3), 65535);
    side_close(&a);
}

/* Messages that fit side by side do not wait for each other: one has stopped, two more go on. */
static void test_share_beside(void)
{
    struct side a;
    begin_two_long(&a);
    serving.max_message = 4 << 20;
    put_zeros(&a, 1, 65535);
    put_zeros(&a, 3, 65535);
    side_exchange(&a);
    CHECK(a.conn.shared, 2 << 19);
    CHECK(credit_of(&a, 3) >= CREDIT_STEP, true);
    CHECK(a.conn.share_waiting, 0);
    side_close(&a);
}

/* RFC 9113 6.9.1: over a stream's own window, the connection's still being open: that stream alone ends. */
static void test_stream_overrun(void)
{
    struct side a;
    begin_two_long(&a);
    block_second(&a);
    put_data(&a, 3, "x", 1, 0);
    side_exchange(&a);
    SIDE_LINES(&a, "S RST_STREAM stream=3 FLOW_CONTROL_ERROR\n");
    CHECK(a.conn.stream_count, 1);
    side_close(&a);
}

/* A message that would take more memory than the arena may: INTERNAL on its stream, and nothing is kept. */
static void test_message_memory(void)
{
    enum { PAIRS = 400 };
    struct side a;
    size_t limit = core.arena.limit;
    core_reset();
    side_open(&a);
    put_preface(&a);
    put_call(&a, 1, process, 0, NULL);
    side_exchange(&a);
    a.lines.len = 0;
    core.arena.limit = 16384;
    uint8_t message[5 + 4 * PAIRS];
    grpc_put_prefix(message, 4 * PAIRS);
    for (size_t i = 0; i < PAIRS; i++)                      /* of a oneof, one member and the other: both are made anew */
        memcpy(message + 5 + 4 * i, "\x0a\0\x12\0", 4);
    put_data(&a, 1, message, sizeof message, 0);
    side_exchange(&a);
    CHECK(core.arena.held <= 16384, true);
    SIDE_LINES(&a, "S HEADERS stream=1 END_STREAM grpc-status=13 grpc-message=\"message 1 of 1600 bytes is not a "
                   "cvms.ClientStreamMessage: message needs too much memory\"\nS RST_STREAM stream=1 NO_ERROR\n");
    CHECK(a.conn.phase, CONN_OPEN);
    side_close(&a);
    core.arena.limit = limit;
}

/* ---- Caps in bytes ---- */
static void put_block_in_parts(struct side *a, const struct buf *b, uint32_t id)
{
    for (size_t at = 0, n; at < b->len; at += n) {
        n = min_size(b->len - at, MAX_FRAME_SIZE);
        frame_put(&a->in, (uint32_t)n, at ? FRAME_CONTINUATION : FRAME_HEADERS,
                  (at ? 0 : END_STREAM) | (at + n == b->len ? (unsigned)END_HEADERS : 0u), id);
        buf_put(&a->in, b->p + at, n);
    }
}

/* A request whose header list counts so many bytes (RFC 9113 6.5.2). */
static void put_list_of(struct side *a, uint32_t id, size_t size)
{
    struct buf b = { 0 }, value = { 0 };
    put_field(&b, ":method", BYTES("POST"));
    put_field(&b, ":scheme", BYTES("http"));
    put_field(&b, ":path", BYTES("/x"));
    put_field(&b, "content-type", BYTES("application/grpc"));
    size -= 7 + 4 + 7 + 4 + 5 + 2 + 12 + 16 + 4 * HPACK_OVERHEAD + 1 + HPACK_OVERHEAD;
    while (value.len < size && !value.failed)
        buf_putc(&value, 'v');
    put_field(&b, "x", whole(&value));
    put_block_in_parts(a, &b, id);
    buf_free(&b);
    buf_free(&value);
}

static void test_header_list(void)
{
    struct side a;
    core_reset();
    side_open(&a);
    put_preface(&a);
    put_list_of(&a, 1, MAX_HEADER_LIST - 1);
    put_list_of(&a, 3, MAX_HEADER_LIST);
    side_exchange(&a);
    SIDE_LINES(&a, OPENED
               "S HEADERS stream=3 END_STREAM :status=200 content-type=application/grpc grpc-status=12 "
               "grpc-message=\"unknown service /x\" grpc-accept-encoding=identity\n"
               "S HEADERS stream=1 END_STREAM :status=200 content-type=application/grpc grpc-status=12 "
               "grpc-message=\"unknown service /x\" grpc-accept-encoding=identity\n");
    put_list_of(&a, 5, MAX_HEADER_LIST + 1);
    side_exchange(&a);
    CHECK(strncmp((char *)a.lines.p, "S HEADERS stream=5 :status=431", 30), 0);
    CHECK(a.conn.phase, CONN_OPEN);
    side_close(&a);
}

/* A request of so many fields: up to the cap it is but a header list that is too large. */
static void run_fields(unsigned n)
{
    struct side a;
    struct buf b = { 0 };
    core_reset();
    side_open(&a);
    put_preface(&a);
    put_field(&b, ":method", BYTES("POST"));
    put_field(&b, ":scheme", BYTES("http"));
    put_field(&b, ":path", BYTES("/"));
    for (unsigned i = 3; i < n; i++)
        buf_putc(&b, 0x80 | 19);      /* accept: "" */
    put_block_in_parts(&a, &b, 1);
    side_exchange(&a);
    CHECK(bytes_contain(whole(&a.lines), "S HEADERS stream=1 :status=431"), n <= HPACK_FIELDS_MAX);
    CHECK(bytes_contain(whole(&a.lines), "ENHANCE_YOUR_CALM \"fields of a field block\""), n > HPACK_FIELDS_MAX);
    CHECK(bytes_contain(whole(&core.err), "over the cap on fields of a field block (1024)"), n > HPACK_FIELDS_MAX);
    buf_free(&b);
    side_close(&a);
}

/* A field block of so many bytes, one field in it: the list is far over its limit. */
static void run_field_block(size_t size, enum conn_phase wanted)
{
    struct side a;
    struct buf b = { 0 };
    core_reset();
    side_open(&a);
    put_preface(&a);
    hpack_put_int(&b, 0, 4, 1);
    hpack_put_int(&b, 0, 7, size - 5);
    CHECK(b.len, 5);
    while (b.len < size)
        buf_putc(&b, 'x');
    put_block_in_parts(&a, &b, 1);
    side_exchange(&a);
    CHECK(a.conn.phase, wanted);
    CHECK(strstr((buf_putc(&a.lines, 0), (char *)a.lines.p), "ENHANCE_YOUR_CALM") != NULL, wanted == CONN_CLOSING);
    buf_free(&b);
    side_close(&a);
}

/* ---- Timers ---- */
static void test_timers(void)
{
    struct side a;
    core_reset();
    side_open(&a);
    CHECK(conn_deadline(&a.conn), NOW + SHARE_MS);
    put_preface(&a);
    side_send(&a);
    CHECK(conn_deadline(&a.conn), NOW + STUCK_MS);
    core.now_ms += 20000;
    side_take(&a, 5);                 /* some progress */
    core.now_ms += STUCK_MS - 1;
    conn_tick(&a.conn);
    CHECK(conn_finished(&a.conn), false);
    CHECK(core.err.len, 0);
    core.now_ms++;
    conn_tick(&a.conn);
    CHECK(conn_finished(&a.conn), true);
    CHECK(bytes_contain(whole(&core.err),
                        "over the cap on seconds in which no output is taken (30): the connection ends"), true);
    side_close(&a);

    core_reset();
    side_open(&a);
    put_preface(&a);
    side_exchange(&a);
    CHECK(conn_deadline(&a.conn), NOW + IDLE_MS);  /* nothing else waits */
    frame_put(&a.in, 0, FRAME_PING, 0, 0);
    side_exchange(&a);
    CHECK(a.conn.phase, CONN_CLOSING);
    CHECK(conn_deadline(&a.conn), NOW + LINGER_MS);
    core.now_ms += LINGER_MS;
    conn_tick(&a.conn);
    CHECK(conn_finished(&a.conn), true);
    side_close(&a);
}

/* Stream 1 asks for a file of this directory; its body goes out at the pace of the peer's windows. */
static void begin_fetch(struct side *a, unsigned flags)
{
    static struct resource x = { .name = "test_pb.c", .stem = 7, .path = "/blobs/x" };
    static struct checksum in = { .path = "test_pb.c" };
    static struct verdict verdict;
    struct source at;
    struct buf b = { 0 };
    struct err e;
    core_reset();
    manifest_of(10);
    CHECK(source_open(&at, in.path, &e), true);
    in.id = at.id;
    source_close(&at);
    x.input = &in;
    server.delivery = (struct delivery){ .manifest = &server.manifest, .verdict = &verdict, .resources = &x,
                                         .resource_count = 1 };
    serving.plain = &fetch_method;
    side_open(a);
    put_preface(a);
    put_setting(a, SETTINGS_INITIAL_WINDOW_SIZE, 0);
    put_field(&b, ":method", BYTES("GET"));
    put_field(&b, ":scheme", BYTES("http"));
    put_field(&b, ":path", BYTES("/blobs/x"));
    frame_put(&a->in, (uint32_t)b.len, FRAME_HEADERS, END_HEADERS | flags, 1);
    buf_put(&a->in, b.p, b.len);
    buf_free(&b);
    side_exchange(a);
    CHECK(server.delivery.fetches, 1);
}

/* A body whose window stays shut gives back its place and its file, whether the request has ended or not. */
static void run_fetch_still(unsigned flags)
{
    struct side a;
    begin_fetch(&a, flags);
    core.now_ms += STILL_MS - 1;
    put_window(&a, 1, 5);             /* it moves */
    side_exchange(&a);
    core.now_ms += STILL_MS - 1;
    conn_tick(&a.conn);
    CHECK(server.delivery.fetches, 1);
    core.now_ms++;
    conn_tick(&a.conn);
    side_exchange(&a);
    CHECK(a.conn.stream_count, 0);
    CHECK(server.delivery.fetches, 0);
    CHECK(a.data[0], 5);
    CHECK(bytes_contain(whole(&core.out), "200, ") && bytes_contain(whole(&core.out), "broken off"), true);
    side_close(&a);
    serving.plain = NULL;
    server.delivery = (struct delivery){ 0 };
}

/* Output that is not taken: the connection is not read above OUT_HIGH, and goes on when it is. */
static void test_output_full(void)
{
    struct side a;
    core_reset();
    side_open(&a);
    put_preface(&a);
    side_exchange(&a);
    size_t sent = 0;
    for (; conn_wants_input(&a.conn) && sent < 100000; sent++) {
        core.now_ms += 10;            /* so slowly that no cap on PING is met */
        frame_put(&a.in, 8, FRAME_PING, 0, 0);
        buf_puts(&a.in, "pingpong");
        conn_recv(&a.conn, a.in.p, a.in.len);
        a.in.len = 0;
    }
    CHECK(sent, OUT_HIGH / 17 + 1);
    side_take(&a, SIZE_MAX);
    CHECK(conn_wants_input(&a.conn) > 0, true);
    side_close(&a);
}

/* HTTP/1: the time for a head begins when the answer before it has gone out. */
static void test_head_behind_answer(void)
{
    struct side a;
    const uint8_t *p;
    core_reset();
    side_open(&a);
    buf_puts(&a.in, "GET / HTTP/1.1\r\nhost: x\r\n\r\nGET ");
    side_send(&a);
    size_t n = conn_peek(&a.conn, &p);
    core.now_ms += PREFACE_MS + 1;
    conn_tick(&a.conn);
    CHECK(conn_peek(&a.conn, &p), n);
    conn_sent(&a.conn, n);
    CHECK(conn_deadline(&a.conn), core.now_ms + PREFACE_MS);
    side_close(&a);
}

/* A peer that takes a little less than it makes us say, for ever: the output's buffer does not grow with it. */
static void test_never_drained(void)
{
    struct side a;
    const uint8_t *p;
    core_reset();
    side_open(&a);
    put_preface(&a);
    side_exchange(&a);
    size_t largest = 0;
    for (int i = 0; i < 200000; i++) {
        core.now_ms += 10;
        frame_put(&a.in, 8, FRAME_PING, 0, 0);
        buf_puts(&a.in, "pingpong");
        conn_recv(&a.conn, a.in.p, a.in.len);
        a.in.len = 0;
        if (i && conn_peek(&a.conn, &p))
            conn_sent(&a.conn, 17);
        largest = a.conn.out.cap > largest ? a.conn.out.cap : largest;
    }
    CHECK(conn_pending(&a.conn), 17);
    CHECK(largest <= 2 * OUT_HIGH, true);
    side_close(&a);
}

/* Asks so that an answer of n bytes waits, prefix included: the host comes back twice, the symbol mends an odd length. */
static void put_reflection_of(struct side *a, size_t n)
{
    static uint8_t text[MAX_FRAME_SIZE];
    struct ErrorResponse error = { .error_code = GRPC_NOT_FOUND, .error_message = BYTES("not found") };
    struct buf answer = { 0 }, ask = { 0 };
    uint8_t prefix[5];
    bool found = false;
    memset(text, 'h', sizeof text);
    for (size_t at = 0; at < 128 && !found; at++) {
        struct ServerReflectionRequest req = { .host = { text, n / 2 - 64 + at / 2 },
                                               .file_containing_symbol = { text, 1 + at % 2 } };
        struct ServerReflectionResponse res = { .valid_host = req.host, .original_request = &req, .error_response = &error };
        buf_free(&answer);
        found = 5 + pb_encode(&answer, &ServerReflectionResponse_message, &res).n == n;
        if (!found)
            continue;
        struct bytes wire = pb_encode(&ask, &ServerReflectionRequest_message, &req);
        grpc_put_prefix(prefix, wire.n);
        put_data(a, 1, prefix, 5, 0);
        put_data(a, 1, wire.p, wire.n, 0);
    }
    CHECK(found, true);
    buf_free(&answer);
    buf_free(&ask);
}

/* Answers of our own making that wait, in bytes: one under the cap, the cap, one over. */
static void run_queued_bytes(size_t bytes)
{
    enum { ANSWERS = 9 };
    struct side a;
    core_reset();
    side_open(&a);
    put_preface(&a);
    put_setting(&a, SETTINGS_INITIAL_WINDOW_SIZE, 0);
    put_call(&a, 1, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", 0, NULL);
    const size_t extra = sizeof(struct blob) + sizeof(struct item), each = bytes / ANSWERS - extra;
    for (int i = 0; i < ANSWERS; i++) {
        put_reflection_of(&a, i ? each : bytes - (ANSWERS - 1) * each - ANSWERS * extra);
        side_exchange(&a);
    }
    CHECK(a.conn.stream_count, bytes <= MAX_QUEUED_BYTES);
    CHECK(a.conn.streams ? a.conn.streams->queued : 0, bytes <= MAX_QUEUED_BYTES ? ANSWERS : 0);
    CHECK(a.conn.queued_bytes, bytes <= MAX_QUEUED_BYTES ? bytes : 0);
    CHECK(strstr((buf_putc(&a.lines, 0), (char *)a.lines.p), "grpc-status=8") != NULL, bytes > MAX_QUEUED_BYTES);
    a.lines.len = 0;
    put_setting(&a, SETTINGS_INITIAL_WINDOW_SIZE, 1 << 30);
    put_window(&a, 0, 1 << 30);
    side_exchange(&a);
    CHECK(a.conn.queued_bytes, 0);
    CHECK(a.data[0], bytes <= MAX_QUEUED_BYTES ? bytes - ANSWERS * extra : 0);
    side_close(&a);
}

/* The manifest is everybody's: a hundred streams that do not take it own their places in the queue. */
static void test_queued_shared(void)
{
    struct side a;
    core_reset();
    manifest_of(1 << 20);
    side_open(&a);
    put_preface(&a);
    put_setting(&a, SETTINGS_INITIAL_WINDOW_SIZE, 0);
    for (uint32_t i = 0; i < MAX_CONCURRENT_STREAMS; i++)
        put_call(&a, 2 * i + 1, process, 0, NULL);
    side_exchange(&a);
    CHECK(a.conn.stream_count, MAX_CONCURRENT_STREAMS);
    CHECK(a.conn.queued_bytes, MAX_CONCURRENT_STREAMS * sizeof(struct item));
    side_close(&a);
}

/* The longest part of a message that a stream other than the first long one can make us keep. */
static void run_partial(size_t bytes)
{
    struct side a;
    begin_two_long(&a);
    block_second(&a);
    size_t kept = 0;
    for (struct stream *s = a.conn.streams; s; s = s->next)
        kept += s->id == 3 ? s->grpc.message.len : 0;
    CHECK(kept + 5, DEFAULT_WINDOW);
    if (bytes > DEFAULT_WINDOW)
        put_zeros(&a, 3, bytes - DEFAULT_WINDOW);
    side_exchange(&a);
    CHECK(a.conn.stream_count, bytes > DEFAULT_WINDOW ? 1 : 2);
    side_close(&a);
}

/* Messages up to a window's length get through beside a long one that has stopped; a longer one has to wait. */
static void run_beside_big(size_t len)
{
    struct side a;
    uint8_t head[10] = { 0 };         /* prefix; a log whose text is all of it */
    begin_two_long(&a);
    put_zeros(&a, 1, 65535);          /* stream 1 stops in its message */
    put_call(&a, 5, process, 0, NULL);
    for (int i = 0; i < 200; i++)     /* so that the message does not begin with a whole window */
        put_data(&a, 5, "\0\0\0\0\0", 5, 0);
    side_exchange(&a);
    size_t lines = core.out.len;
    grpc_put_prefix(head, len);
    put_data(&a, 5, head, 5, 0);
    put_data(&a, 5, (uint8_t[]){ 0x52, 0xfb, 0xff, 3 }, 4, 0);   /* field 10, 65,531 bytes */
    side_exchange(&a);
    for (size_t left = len - 4, n; left; left -= n) {            /* as far as the window lets us */
        a.lines.len = 0;
        struct stream *s = stream_find(&a.conn, 5);
        n = s ? min_size(left, (size_t)s->recv_window) : 0;
        if (n == 0)
            break;
        put_zeros(&a, 5, n);
        side_exchange(&a);
    }
    CHECK(core.out.len > lines, len <= DEFAULT_WINDOW);
    CHECK(a.conn.stream_count, 3);
    side_close(&a);
}

/* ---- What one connection can make us hold, by the caps: the README's figure ---- */
enum {
    JOB_ID_MAX = 1024,                /* 200 bytes of a job-id, escaped */
    WORST_STREAM = sizeof(struct stream) + sizeof(struct session) + JOB_ID_MAX + 4 * ALLOC_OWN,
    WORST_OUT = 2 * OUT_HIGH,         /* OUT_HIGH, what one read adds, OUT_TARGET that has gone; rounded up */
    WORST_REST = MAX_FIELD_BLOCK + MAX_FRAME_SIZE + HPACK_TABLE_SIZE + 4 * ALLOC_OWN,
    WORST = MAX_CONCURRENT_STREAMS * WORST_STREAM + (MAX_CONCURRENT_STREAMS - 1) * (DEFAULT_WINDOW + 1) +
            MAX_QUEUED_BYTES + MAX_QUEUED_ITEMS * 2 * MAX_CONCURRENT_STREAMS * ALLOC_OWN + WORST_OUT + WORST_REST,
    IDLE_TOLD = 2048,
    WORST_TOLD = 15 << 19,            /* README: 7.5 MiB beside -max-message; the rest is for TLS, 100 KiB */
};

/* Frees the connection and returns how many bytes it held. */
static long long side_held(struct side *a)
{
    long long before = alloc_live;
    conn_free(&a->conn);
    before -= alloc_live;
    conn_init(&a->conn, &core, &serving, "peer");
    side_close(a);
    return before;
}

static void put_ping(struct side *a)
{
    frame_put(&a->in, 8, FRAME_PING, 0, 0);
    buf_puts(&a->in, "pingpong");
}

/* A hundred streams: one with answers that no window lets out, the others in the middle of a message. */
static void put_many_partial(struct side *a)
{
    char job[201];
    uint8_t prefix[5];
    memset(job, 1, 200);
    job[200] = 0;
    put_setting(a, SETTINGS_INITIAL_WINDOW_SIZE, 0);
    put_call(a, 1, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", 0, NULL);
    grpc_put_prefix(prefix, serving.max_message);
    for (uint32_t i = 1; i < MAX_CONCURRENT_STREAMS; i++) {
        put_call(a, 2 * i + 1, process, 0, job);
        put_data(a, 2 * i + 1, prefix, 5, 0);
        put_zeros(a, 2 * i + 1, DEFAULT_WINDOW - 5);
        side_exchange(a);
    }
    /* the one that is let past its window */
    for (size_t left = serving.max_message - 1 - (DEFAULT_WINDOW - 5), n; left; left -= n) {
        n = min_size(left, CREDIT_STEP);
        put_zeros(a, 3, n);
        side_exchange(a);
    }
    const size_t each = 8192;
    while (a->conn.phase == CONN_OPEN && a->conn.queued_bytes + each + sizeof(struct item) < MAX_QUEUED_BYTES) {
        put_reflection_of(a, each - sizeof(struct blob));
        side_exchange(a);
    }
}

/* Output that waits, as much as there can be, then a field block and a frame that do not end. */
static void put_unread(struct side *a)
{
    while (a->conn.phase == CONN_OPEN && conn_pending(&a->conn) + 17 < OUT_HIGH) {
        core.now_ms += 10;
        put_ping(a);
        side_send(a);
    }
    for (size_t n = 0; n < MAX_FIELD_BLOCK; n += MAX_FRAME_SIZE) {
        frame_put(&a->in, MAX_FRAME_SIZE, n ? FRAME_CONTINUATION : FRAME_HEADERS, 0, 999);
        for (int i = 0; i < MAX_FRAME_SIZE; i++)
            buf_putc(&a->in, 0x80 | 19);
    }
    frame_put(&a->in, MAX_FRAME_SIZE, FRAME_CONTINUATION, 0, 999);
    for (int i = 0; i < MAX_FRAME_SIZE - 1; i++)
        buf_putc(&a->in, 0x80 | 19);
    side_send(a);
}

/* Fills the dynamic table, with a request over MAX_CONCURRENT_STREAMS. */
static void put_table(struct side *a)
{
    struct buf b = { 0 };
    hpack_put_int(&b, 0x40, 6, 19);
    hpack_put_int(&b, 0, 7, HPACK_TABLE_SIZE - HPACK_OVERHEAD - 6);
    for (int i = 0; i < HPACK_TABLE_SIZE - HPACK_OVERHEAD - 6; i++)
        buf_putc(&b, 'x');
    frame_put(&a->in, (uint32_t)b.len, FRAME_HEADERS, END_HEADERS, 997);
    buf_put(&a->in, b.p, b.len);
    buf_free(&b);
    side_exchange(a);
}

static void test_worst(void)
{
    struct side a;
    core_reset();
    manifest_of(10);
    buf_free(&core.spare);
    side_open(&a);
    put_preface(&a);
    put_many_partial(&a);
    CHECK(a.conn.stream_count, MAX_CONCURRENT_STREAMS);
    put_table(&a);
    CHECK(a.conn.hpack.len + HPACK_SAVED, HPACK_TABLE_SIZE);
    put_unread(&a);
    CHECK(a.conn.phase, CONN_OPEN);
    CHECK(a.conn.block.len, MAX_FIELD_BLOCK);
    CHECK(a.conn.in.len, MAX_FRAME_SIZE - 1);
    CHECK(conn_pending(&a.conn) > OUT_HIGH - 20, true);
    long long held = side_held(&a);
    CHECK(held <= (long long)(serving.max_message + WORST), true);
    CHECK(held > (long long)(serving.max_message + WORST) / 10 * 9, true);
    CHECK(WORST + (100 << 10) <= WORST_TOLD, true);
}

/* An idle connection with one open stream holds next to nothing. */
static void test_idle(void)
{
    struct side a;
    core_reset();
    manifest_of(1 << 20);
    side_open(&a);
    put_preface(&a);
    put_setting(&a, SETTINGS_INITIAL_WINDOW_SIZE, 1 << 30);
    put_window(&a, 0, 1 << 30);
    put_call(&a, 1, process, 0, "job");
    side_exchange(&a);
    CHECK(a.data[0], 1 << 20);
    long long held = side_held(&a);
    CHECK(held > 0 && held < IDLE_TOLD, true);
}

/* ---- The README's limits are those of the source ---- */

/* Whether the README has a line with all of these words; % stands for the next number, as it writes numbers. */
static void check_limit(const struct buf *readme, const char *words, long a, long b)
{
    char want[200], number[2][20];
    for (int i = 0; i < 2; i++) {
        long v = i ? b : a;
        int k = v < 1000 ? snprintf(number[i], 20, "%ld", v)
                         : v < 1000000 ? snprintf(number[i], 20, "%ld,%03ld", v / 1000, v % 1000)
                                       : snprintf(number[i], 20, "%ld,%03ld,%03ld", v / 1000000, v / 1000 % 1000, v % 1000);
        CHECK(k > 0 && k < 20, true);
    }
    size_t n = 0;
    for (int i = 0; *words && n < sizeof want - 20; words++)
        if (*words == '%')
            n += (size_t)snprintf(want + n, sizeof want - n, "%s", number[i++]);
        else
            want[n++] = *words;
    want[n] = 0;
    if (!CHECK(strstr((char *)readme->p, want) != NULL, true))
        printf("  the README's limits do not say [%s]\n", want);
}

static void test_readme(void)
{
    static char text[1 << 17];
    struct buf readme = { .p = (uint8_t *)text };
    FILE *f = fopen("../../README.md", "r");
    if (!CHECK(f != NULL, true))
        return;
    readme.len = fread(text, 1, sizeof text - 1, f);
    fclose(f);
    check_limit(&readme, "hard limit of descriptors less %.", SPARE_DESCRIPTORS, 0);
    check_limit(&readme, "| streams of a connection | %, then REFUSED_STREAM |", MAX_CONCURRENT_STREAMS, 0);
    check_limit(&readme, "in pieces on a connection | % bytes each; those longer share", DEFAULT_WINDOW, 0);
    check_limit(&readme, "stands still for % s while others wait", SHARE_MS / 1000, 0);
    check_limit(&readme, "| header list | % bytes, then HTTP status 431 |", MAX_HEADER_LIST, 0);
    check_limit(&readme, "CONTINUATION frames | % bytes, % fields,", MAX_FIELD_BLOCK, HPACK_FIELDS_MAX);
    check_limit(&readme, "% fields, % frames, then ENHANCE_YOUR_CALM |", HPACK_FIELDS_MAX, MAX_CONTINUATIONS);
    check_limit(&readme, "| HPACK dynamic table, frame | % bytes, % bytes |", HPACK_TABLE_SIZE, MAX_FRAME_SIZE);
    check_limit(&readme, "`-max-message`, % bytes,", 4 << 20, 0);
    check_limit(&readme, "header lists over the cap | %, and % a second,", caps[CAP_STREAM_ERRORS].max,
                caps[CAP_STREAM_ERRORS].per_s);
    check_limit(&readme, "ends; beyond that %, and % a second,", caps[CAP_CONTROL_FRAMES].max,
                caps[CAP_CONTROL_FRAMES].per_s);
    check_limit(&readme, "| % for each DATA frame that the server sends", ANSWERS_PER_FRAME, 0);
    check_limit(&readme, "| % bytes each, then FLOW_CONTROL_ERROR |", DEFAULT_WINDOW, 0);
    check_limit(&readme, "| % on a stream, % bytes on a connection,", MAX_QUEUED_ITEMS, MAX_QUEUED_BYTES);
    check_limit(&readme, "| % bytes, then it is not read; % s in which", OUT_HIGH, STUCK_MS / 1000);
    check_limit(&readme, "preface and SETTINGS | % s |", PREFACE_MS / 1000, 0);
    check_limit(&readme, "before the first request too | % s,", IDLE_MS / 1000, 0);
    check_limit(&readme, "| % s, then a PING, which it must answer within % s;", SILENCE_MS / 1000, ANSWER_MS / 1000);
    check_limit(&readme, "| end of a connection | % s,", LINGER_MS / 1000, 0);
    check_limit(&readme, "| % MiB before senders get no more credit, % MiB before", HOLD_BYTES >> 20,
                PAUSE_BYTES >> 20);
    check_limit(&readme, "| lines waiting for stderr | % MiB,", NOTES_MAX >> 20, 0);
    check_limit(&readme, "smoke test tells apart | % |", MAX_HOSTS, 0);
    check_limit(&readme, "| `-max-message` (as a power of two) and %.% MiB |", WORST_TOLD >> 20,
                (WORST_TOLD >> 19 & 1) * 5);
    check_limit(&readme, "| memory of an idle connection | % KiB,", IDLE_TOLD >> 10, 0);
}

/* Lines that wait for a stderr that nobody reads are bounded; how many are lost is told. */
static void test_notes_full(void)
{
    core_reset();
    while (core.err.len <= NOTES_MAX)
        core_note(&core, "peer", "a line");
    size_t full = core.err.len;
    for (int i = 0; i < 1000; i++)
        core_note(&core, "peer", "a line");
    CHECK(core.err.len, full);
    core.err.len = 0;
    core_note(&core, "peer", "the next");
    CHECK_TEXT(whole(&core.err), "2023-11-14T22:13:20.123Z cvms      server        1000 lines lost: stderr is not read, or memory is short\n"
                                 "2023-11-14T22:13:20.123Z peer      port -        the next\n");
    core.err.len = 0;
    core_note(&core, "peer", "one more");
    CHECK_TEXT(whole(&core.err), "2023-11-14T22:13:20.123Z peer      port -        one more\n");
}

/* Agent hosts that a verdict tells apart: up to the cap; those that are known stay so, another one is told. */
static void test_hosts(void)
{
    struct verdict *v = &server.verdict;
    struct side a;
    char name[20];
    core_reset();
    *v = (struct verdict){ .wanted = true, .agents = 1 };
    for (int i = 0; i < MAX_HOSTS - 1; i++) {
        snprintf(name, sizeof name, "host-%d", i);
        CHECK(verdict_host(v, name, "peer:1") != NULL, true);
    }
    manifest_of(10);
    side_open(&a);
    put_preface(&a);
    put_call(&a, 1, process, 0, "the last");
    side_exchange(&a);
    CHECK(v->host_count, MAX_HOSTS);
    CHECK(bytes_contain(whole(&core.err), "over the cap"), false);
    put_call(&a, 3, process, 0, "one more");
    put_call(&a, 5, process, 0, "host-7");
    side_exchange(&a);
    CHECK(v->host_count, MAX_HOSTS);
    CHECK(bytes_contain(whole(&core.err), "over the cap on agent hosts that are told apart (1000): "
                                          "the verdict passes over the new one"), true);
    CHECK(verdict_host(v, "host-7", "peer:1")->agents, 1);
    CHECK(a.conn.stream_count, 3);
    side_close(&a);
    verdict_free(v);
    *v = (struct verdict){ 0 };
}

/* Output that waits for stdout: above one cap no more credit is given, above the other nothing is read. */
static void test_pressure(void)
{
    static const struct {
        size_t waiting;
        bool held, paused;
    } steps[] = {
        { HOLD_BYTES - 1, false, false }, { HOLD_BYTES, false, false }, { HOLD_BYTES + 1, true, false },
        { PAUSE_BYTES - 1, true, false }, { PAUSE_BYTES, true, false }, { PAUSE_BYTES + 1, true, true },
        { PAUSE_BYTES, true, false }, { HOLD_BYTES / 4, true, false }, { HOLD_BYTES / 4 - 1, false, false },
    };
    struct loop *l = (calloc)(1, sizeof *l);
    l->out.lines = &l->core.out;
    l->err.lines = &l->core.err;
    l->record.lines = &l->core.record;
    for (size_t i = 0; i < PB_COUNT(steps); i++) {
        l->core.out.len = steps[i].waiting;
        loop_pressure(l);
        CHECK(l->core.backpressure, steps[i].held);
        CHECK(l->paused, steps[i].paused);
    }
    (free)(l);
}

/* A bucket gives back what it says, at whatever intervals it is asked. */
static void test_bucket(void)
{
    struct side a;
    core_reset();
    side_open(&a);
    core.now_ms += 123;
    for (int i = 0; i < caps[CAP_CONTROL_FRAMES].max; i++)
        CHECK(conn_spend(&a.conn, CAP_CONTROL_FRAMES), true);
    for (int i = 0; i < 200; i++) {   /* in 3 s 300 come back, and 200 are spent */
        core.now_ms += 15;
        CHECK(conn_spend(&a.conn, CAP_CONTROL_FRAMES), true);
    }
    for (int i = 0; i < 100; i++)
        CHECK(conn_spend(&a.conn, CAP_CONTROL_FRAMES), true);
    CHECK(conn_spend(&a.conn, CAP_CONTROL_FRAMES), false);
    CHECK(a.conn.phase, CONN_CLOSING);
    side_close(&a);
}

/* One line a second for each cap, however many meet it. */
static void test_cap_log(void)
{
    core_reset();
    for (int i = 0; i < 100; i++) {
        for (enum cap cap = 0; cap < CAPS; cap++)
            core_cap(&core, "p", cap);
    }
    core.now_ms += 999;
    core_cap(&core, "p", CAP_STUCK);
    core.now_ms++;
    core_cap(&core, "p", CAP_STUCK);
    long lines = 0;
    for (size_t i = 0; i < core.err.len; i++)
        lines += core.err.p[i] == '\n';
    CHECK(lines, CAPS + 1);
}

/* ---- Reflection: the descriptors name what is on the wire ---- */

/* Asks for one thing; the answer is the message of ServerReflectionResponse, decoded into the arena. */
static const struct ServerReflectionResponse *reflect(struct side *a, struct pb_arena *arena, unsigned field,
                                                      const char *what)
{
    static struct ServerReflectionResponse res;
    struct buf m = { 0 }, all = { 0 };
    const uint8_t *p;
    bool unknown;
    buf_putc(&m, (int)(field << 3 | PB_LEN));
    buf_putc(&m, (int)strlen(what));
    buf_puts(&m, what);
    side_open(a);
    put_preface(a);
    put_call(a, 1, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", 0, NULL);
    frame_put(&a->in, (uint32_t)m.len + 5, FRAME_DATA, 0, 1);
    buf_put(&a->in, (uint8_t[]){ 0, 0, 0, 0, (uint8_t)m.len }, 5);
    buf_put(&a->in, m.p, m.len);
    side_send(a);
    for (size_t n; (n = conn_peek(&a->conn, &p)) != 0; conn_sent(&a->conn, n))
        buf_put(&all, p, n);
    buf_free(&m);
    *arena = (struct pb_arena){ .limit = 1 << 20 };
    res = (struct ServerReflectionResponse){ 0 };
    for (size_t at = 0; at < all.len;) {
        struct frame f = frame_parse(all.p + at);
        if (f.type == FRAME_DATA) {
            uint8_t *copy = pb_arena_alloc(arena, f.len);
            memcpy(copy, all.p + at + FRAME_HEADER_LEN, f.len);
            CHECK(pb_decode(&ServerReflectionResponse_message, &res, (struct bytes){ copy + 5, f.len - 5u }, arena,
                            &unknown), PB_OK);
        }
        at += FRAME_HEADER_LEN + (size_t)f.len;
    }
    buf_free(&all);
    side_close(a);
    return &res;
}

/* Number of files in the answer; the first must begin with this name (FileDescriptorProto.name is field 1). */
static void check_files(unsigned field, const char *what, const char *name, size_t n)
{
    struct side a;
    struct pb_arena arena;
    core_reset();
    const struct ServerReflectionResponse *res = reflect(&a, &arena, field, what);
    const struct FileDescriptorResponse *files = res->file_descriptor_response;
    if (CHECK(files != NULL, true)) {
        const struct bytes *first = files->file_descriptor_proto.items;
        CHECK(files->file_descriptor_proto.n, n);
        CHECK(first->p[0], 0x0a);
        CHECK_TEXT(((struct bytes){ first->p + 2, first->p[1] }), name);
    }
    pb_arena_free(&arena);
}

static void test_reflection(void)
{
    static const char cvms[] = "agent/cvms/cvms.proto";
    check_files(3, cvms, cvms, 2);
    check_files(4, "cvms.Service", cvms, 2);
    check_files(4, "cvms.Service.Process", cvms, 2);
    check_files(4, "cvms.ServerStreamMessage", cvms, 2);
    check_files(4, "cvms.azureAttestationToken", cvms, 2);
    check_files(4, "cvms.Source.kbs_resource_path", cvms, 2);
    check_files(4, "cvms.ServerStreamMessage.message", cvms, 2);       /* a oneof, and one of its members */
    check_files(4, "cvms.ServerStreamMessage.runReq", cvms, 2);
    check_files(4, "grpc.health.v1.HealthCheckResponse.ServingStatus", "grpc/health/v1/health.proto", 1);
    check_files(3, "google/protobuf/timestamp.proto", "google/protobuf/timestamp.proto", 1);
    check_files(4, "google.protobuf.Timestamp", "google/protobuf/timestamp.proto", 1);
    check_files(4, "grpc.health.v1.Health", "grpc/health/v1/health.proto", 1);
    check_files(4, "grpc.reflection.v1.ServerReflection", "grpc/reflection/v1/reflection.proto", 1);
    check_files(4, "grpc.reflection.v1alpha.ServerReflection", "grpc/reflection/v1alpha/reflection.proto", 1);
}

/* ---- Every allocation failed in turn ---- */

/* Messages of one agent: text, a long log in two frames, one with unknown fields. */
static void put_messages(struct side *a, uint32_t id)
{
    static const uint8_t plain[] = "\0\0\0\0\7\12\5\12\3abc", unknown[] = "\0\0\0\0\12\52\4\12\2id\232\6\1x";
    uint8_t text[9000];
    memset(text, 'x', sizeof text);
    memcpy(text, (uint8_t[]){ 0, 0, 0, 0x23, 0x23, 0x0a, 0xa0, 0x46, 0x0a, 0x9d, 0x46 }, 11);
    put_data(a, id, plain, sizeof plain - 1, 0);
    put_data(a, id, text, 4000, 0);
    put_data(a, id, text + 4000, 8995 + 5 - 4000, 0);
    put_data(a, id, unknown, sizeof unknown - 1, 0);
}

/* A connection from its preface to its end, with all services. */
static void play_all(struct side *a)
{
    static const uint8_t empty[5], list[] = "\0\0\0\0\2\72\0", file[] = "\0\0\0\0\16\42\14cvms.Service";
    char job[180];
    memset(job, 1, sizeof job);       /* escaped it is four times as long */
    job[sizeof job - 1] = 0;
    put_preface(a);
    put_setting(a, SETTINGS_HEADER_TABLE_SIZE, 0);
    put_window(a, 0, 1 << 20);
    put_call(a, 1, process, 0, job);
    side_exchange(a);
    put_messages(a, 1);
    put_call(a, 3, "/grpc.health.v1.Health/Check", 0, NULL);
    put_data(a, 3, empty, 5, END_STREAM);
    put_call(a, 5, "/grpc.health.v1.Health/Watch", 0, NULL);
    put_data(a, 5, empty, 5, END_STREAM);
    put_call(a, 7, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", 0, NULL);
    put_data(a, 7, list, 7, 0);
    put_data(a, 7, file, 5 + 14, END_STREAM);
    put_call(a, 9, "/x.Y/Z", END_STREAM, NULL);
    put_list_of(a, 11, 17000);
    frame_put(&a->in, 3, FRAME_HEADERS, END_HEADERS | END_STREAM, 13);
    buf_put(&a->in, "\x82\x84\x86", 3);
    frame_put(&a->in, 7, FRAME_HEADERS, END_HEADERS | END_STREAM, 15);
    buf_put(&a->in, "\x82\x84\x86\x40\1x\0", 7);
    side_exchange(a);
    put_data(a, 1, "", 0, END_STREAM);
    side_exchange(a);
}

/* Whether the first stream ended well: then everything that came on it must have been shown. */
static bool ended_well(struct side *a)
{
    buf_putc(&a->lines, 0);
    return a->lines.p && strstr((char *)a->lines.p, "S HEADERS stream=1 END_STREAM grpc-status=0\n");
}

static void test_allocations(bool json)
{
    struct side a;
    struct buf whole_out = { 0 };
    long total = 0, lost = 0, first_lost = 0, ended = 0, garbled = 0;
    for (long n = 0; n == 0 || n <= total; n++) {
        core_reset();
        core_drop();
        core_reset();
        server.json = json;
        core.stamp[0] = 0;
        manifest_of(20000);
        side_open(&a);
        /* The test's own buffers are made beforehand: only the core's allocations fail. */
        alloc_fail = 0;
        buf_room(&a.in, 1 << 17);
        buf_room(&a.out, 1 << 17);
        buf_room(&a.lines, 1 << 17);
        alloc_count = 0;
        alloc_fail = n;
        play_all(&a);
        if (n == 0) {
            total = alloc_count;
            buf_put(&whole_out, core.out.p, core.out.len);
        }
        bool failed_here = alloc_count >= n;
        alloc_fail = 0;
        ended += a.conn.phase != CONN_OPEN;
        garbled += a.peer.fault != NULL && a.conn.phase == CONN_OPEN;
        if (failed_here && ended_well(&a) && !bytes_eq(whole(&core.out), whole(&whole_out))) {
            lost++;
            first_lost = first_lost ? first_lost : n;
        }
        if (n == 0)
            CHECK(ended_well(&a), true);
        side_close(&a);
    }
    CHECK(total > 30, true);
    CHECK(garbled, 0);
    if (!CHECK(lost, 0))
        printf("  of %ld allocations the %ldth was the first whose failure lost or changed a line on stdout\n", total,
               first_lost);
    CHECK(ended < total, true);
    buf_free(&whole_out);
}

/* Memory was short for a connection that has no output buffer: it ends, also when it borrows one after that. */
static void test_failure_sticks(void)
{
    struct conn c;
    core_reset();
    conn_init(&c, &core, &serving, "peer");
    buf_room(&core.spare, 100);
    c.out.failed = true;
    CHECK(conn_out(&c)->p != NULL, true);
    CHECK(c.out.failed, true);
    CHECK(core.spare.failed, false);
    conn_free(&c);
}

/* Addresses as inet_ntop shows them: every choice of groups that are zero. */
static void test_peer_name(void)
{
    for (unsigned set = 0; set <= 0x100; set++) {
        struct sockaddr_in6 a = { .sin6_family = AF_INET6, .sin6_port = htons(7001) };
        char got[56], ip[INET6_ADDRSTRLEN], wanted[56];
        for (unsigned i = 0; i < 8; i++)
            if (set >> i & 1)
                memcpy(&a.sin6_addr.s6_addr[2 * i], i % 2 ? "\x0a\xbc" : "\x00\x05", 2);
        if (set == 0x100)             /* ::ffff:1.2.3.4 */
            memcpy(&a.sin6_addr.s6_addr[10], "\xff\xff\1\2\3\4", 6);
        snprintf(wanted, sizeof wanted, "[%s]:7001", inet_ntop(AF_INET6, &a.sin6_addr, ip, sizeof ip));
        peer_name(got, (const struct sockaddr_storage *)(const void *)&a);
        if (set == 0x100)
            CHECK_TEXT(bytes_of(got), "1.2.3.4:7001");
        else if (!strchr(wanted, '.'))   /* what begins with 96 zero bits: as IPv4 by glibc, not by RFC 5952 */
            CHECK_TEXT(bytes_of(got), wanted);
    }
    struct sockaddr_in four = { .sin_family = AF_INET, .sin_port = htons(65535) };
    char got[56];
    four.sin_addr.s_addr = htonl(0x7f0000ff);
    peer_name(got, (const struct sockaddr_storage *)(const void *)&four);
    CHECK_TEXT(bytes_of(got), "127.0.0.255:65535");
}

int main(void)
{
    test_failure_sticks();
    test_peer_name();
    test_long_manifest();
    test_shared_window();
    test_slow_socket();
    test_never_read();
    test_big_completes();
    test_big_reset();
    test_big_deadline();
    test_share_stalls();
    test_share_beside();
    test_stream_overrun();
    test_message_memory();
    test_header_list();
    run_fields(HPACK_FIELDS_MAX - 1);
    run_fields(HPACK_FIELDS_MAX);
    run_fields(HPACK_FIELDS_MAX + 1);
    run_field_block(MAX_FIELD_BLOCK - 1, CONN_OPEN);
    run_field_block(MAX_FIELD_BLOCK, CONN_OPEN);
    run_field_block(MAX_FIELD_BLOCK + 1, CONN_CLOSING);
    test_timers();
    run_fetch_still(END_STREAM);
    run_fetch_still(0);
    test_output_full();
    test_never_drained();
    test_head_behind_answer();
    run_queued_bytes(MAX_QUEUED_BYTES - 1);
    run_queued_bytes(MAX_QUEUED_BYTES);
    run_queued_bytes(MAX_QUEUED_BYTES + 1);
    test_queued_shared();
    run_partial(DEFAULT_WINDOW);
    run_partial(DEFAULT_WINDOW + 1);
    run_beside_big(DEFAULT_WINDOW);
    run_beside_big(DEFAULT_WINDOW + 1);
    test_worst();
    test_idle();
    test_readme();
    test_notes_full();
    test_hosts();
    test_pressure();
    test_bucket();
    test_cap_log();
    test_reflection();
    test_allocations(false);
    test_allocations(true);
    core_drop();
    return closing();
}
