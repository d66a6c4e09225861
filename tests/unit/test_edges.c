/* Values at an edge, where a small mistake shows in no whole run: durations and presets, DER lengths, a read that a signal
 * interrupts, a file of the same size and time, the end of a zip, when a verdict wants its turn.  Works in a new folder
 * under $TMPDIR or /tmp. */
#include <unistd.h>

static long interrupts;               /* so many calls of read are interrupted first */

static ssize_t test_read(int fd, void *p, size_t n);
#define read test_read
#include "../harness.h"
#undef read

static ssize_t test_read(int fd, void *p, size_t n)
{
    if (interrupts > 0 && interrupts--) {
        errno = EINTR;
        return -1;
    }
    return read(fd, p, n < 3 ? n : 3);
}

static void test_durations(void)
{
    static const struct {
        const char *text;
        int64_t ms;
    } rows[] = {
        { "0", 0 }, { "0s", 0 }, { "1ns", 1 }, { "500us", 1 }, { "1ms", 1 }, { "1999us", 1 }, { "2s", 2000 }, { "2m", 120000 },
        { "2m30s", 150000 }, { "3h", 10800000 }, { "1.25s", 1250 }, { "1.125s", 1125 }, { "0.05s", 50 }, { ".5m", 30000 },
        { "1.s", 1000 }, { "1h1m1s1ms", 3661001 }, { "", -1 }, { "2", -1 }, { "2 s", -1 }, { "-1s", -1 }, { "1d", -1 },
        { ".s", -1 }, { "s", -1 }, { "87660h", 315576000000 }, { "87661h", -1 },
    };
    const char *why;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (!CHECK(parse_duration(rows[i].text, &why), rows[i].ms))
            printf("the duration is \"%s\"\n", rows[i].text);
}

static struct options parsed(enum command command)
{
    struct mistakes r = { 0 };
    struct options o = { .command = command, .arena.limit = SIZE_MAX / 2 };
    char *words[1] = { NULL };
    options_parse(&r, &o, words, 0);
    pb_arena_free(&o.arena);
    return o;
}

static void test_presets(void)
{
    struct options serve = parsed(CMD_SERVE), agent = parsed(CMD_AGENT), health = parsed(CMD_HEALTH);
    CHECK(serve.timeout_ms, 0);
    CHECK(serve.grace_ms, 15000);
    CHECK(serve.poll_ms, 5000);
    CHECK(serve.agents, 1);
    CHECK(serve.max_message, 4194304);
    CHECK(serve.max_connections, 0);
    CHECK_STR(serve.python_runtime, "python3");
    CHECK_STR(serve.algo_source_type, "oci-image");
    CHECK_STR(serve.dataset_source_type, "oci-image");
    CHECK_STR(serve.compat, "all");
    CHECK_STR(serve.output, "text");
    CHECK(agent.wait_ms, 10000);
    CHECK(agent.timeout_ms, 30000);
    CHECK(agent.repeat, 1);
    CHECK(agent.max_message, 4194304);
    CHECK(health.wait_ms, 0);
    CHECK(health.timeout_ms, 10000);
    CHECK_STR(health.service, "");
}

static void test_der(void)
{
    static uint8_t p[70000];
    static const struct {
        uint8_t head[5];
        size_t n, content;
        bool good;
    } rows[] = {
        { { 0x30, 0x7f }, 2, 127, true }, { { 0x30, 0x81, 0x7f }, 3, 127, false }, { { 0x30, 0x81, 0x80 }, 3, 128, true },
        { { 0x30, 0x82, 0x00, 0x80 }, 4, 128, false }, { { 0x30, 0x82, 0x00, 0xff }, 4, 255, false },
        { { 0x30, 0x82, 0x01, 0x00 }, 4, 256, true }, { { 0x30, 0x83, 0x00, 0xff, 0xff }, 5, 65535, false },
        { { 0x30, 0x83, 0x01, 0x00, 0x00 }, 5, 65536, true }, { { 0x30, 0x80 }, 2, 0, false },
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct bytes in = { p, rows[i].n + rows[i].content }, value = { 0 };
        memcpy(p, rows[i].head, rows[i].n);
        CHECK(der_next(&in, &value), rows[i].good ? 0x30 : -1);
        CHECK(value.n, rows[i].good ? rows[i].content : 0);
        in = (struct bytes){ p, rows[i].n + rows[i].content - 1 };
        CHECK(rows[i].content ? der_next(&in, &value) : -1, -1);
    }
}

static void put_file(const char *name, const char *text)
{
    FILE *f = fopen(name, "w");
    NEED(f && fputs(text, f) >= 0 && fclose(f) == 0);
}

static void test_interrupted(void)
{
    static const char text[] = "read in pieces of three";
    uint8_t p[100];
    struct err e;
    put_file("f", text);
    for (interrupts = 1; interrupts <= 3; interrupts++) {
        long n = interrupts;
        struct buf b = { 0 };
        CHECK(file_load("f", sizeof text, &b, &e), true);
        CHECK(b.len, sizeof text - 1);
        buf_free(&b);
        interrupts = n;
        int fd = open("f", O_RDONLY);
        NEED(fd >= 0);
        CHECK(file_read(fd, p, sizeof p), (ssize_t)sizeof text - 1);
        CHECK(memcmp(p, text, sizeof text - 1), 0);
        close(fd);
        interrupts = n;
    }
    interrupts = 0;
}

/* What is written over a longer file is all that is there then. */
static void test_written_over(void)
{
    struct stat st;
    struct err e;
    put_file("f", "a longer text");
    CHECK(write_file("f", (const uint8_t *)"short", 5, &e), true);
    CHECK(stat("f", &st), 0);
    CHECK(st.st_size, 5);
}

/* A manifest of exactly n MiB goes in n chunks and the empty one. */
static void test_whole_chunks(void)
{
    static uint8_t manifest[2 * CHUNK_LEN + 1];
    const struct ComputationRunReq req = { .id = BYTES("1") };
    static const size_t sizes[] = { 0, 1, CHUNK_LEN - 1, CHUNK_LEN, CHUNK_LEN + 1, 2 * CHUNK_LEN, 2 * CHUNK_LEN + 1 };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        size_t n = sizes[i];
        size_t messages = 0;
        struct blob *b = manifest_chunks(&req, (struct bytes){ manifest, n }, NULL);
        NEED(b);
        for (size_t at = 0; at < b->n; at += 5 + get_be32(b->p + at + 1))
            messages++;
        if (!CHECK(messages, (n + CHUNK_LEN - 1) / CHUNK_LEN + 1))
            printf("the manifest has %zu octets\n", n);
        blob_unref(b);
    }
}

/* Written anew with the size and the modification time that it had. */
static void test_same_size_and_time(void)
{
    struct stat before, now;
    put_file("g", "one");
    NEED(stat("g", &before) == 0);
    struct file_id id = path_id("g");
    CHECK(checksum_changed("g", &id), false);
    do {                              /* until the clock of the file system has gone on */
        struct timespec t[2] = { before.st_atim, before.st_mtim };
        put_file("g", "two");
        NEED(utimensat(AT_FDCWD, "g", t, 0) == 0 && stat("g", &now) == 0);
    } while (now.st_ctim.tv_sec == before.st_ctim.tv_sec && now.st_ctim.tv_nsec == before.st_ctim.tv_nsec);
    CHECK(now.st_size == before.st_size && now.st_mtim.tv_nsec == before.st_mtim.tv_nsec, true);
    CHECK(checksum_changed("g", &id), true);
}

/* Go's archive/zip writes the Zip64 records from 65,535 files on, a count that would mean "look there". */
static void test_zip_end(void)
{
    for (uint64_t n = 65534; n <= 65536; n++) {
        struct zip z = { .len = 1000, .start = 900 };
        struct source s = { .form = SOURCE_ZIP, .tree.n = (size_t)n };
        zip_end(&z, n);
        CHECK(z.out.len, n < 65535 ? 22 : 56 + 20 + 22);
        buf_free(&z.out);
        s.tree.entry = calloc(s.tree.n, sizeof *s.tree.entry);
        NEED(s.tree.entry);
        for (size_t i = 0; i < s.tree.n; i++)
            s.tree.entry[i].name = "";
        CHECK(source_measure(&s), n * (46 + 9 + 30 + 9 + 16) + (n < 65535 ? 22 : 56 + 20 + 22));
        free(s.tree.entry);
        buf_free(&s.zip.out);
    }
}

/* A host that was lost, an end, a time-out and a poll: the first of them wakes the loop. */
static void test_verdict_deadline(void)
{
    struct host h = { .lost_ms = 1000 };
    struct verdict v = { .wanted = true, .until = STAGE_RUNNING, .hosts = &h, .grace_ms = 500, .end_ms = INT64_MAX,
                         .timeout_ms = INT64_MAX, .next_poll_ms = INT64_MAX };
    CHECK(verdict_tick(&v, 0), 1500);
    v.next_poll_ms = 1400;
    CHECK(verdict_tick(&v, 0), 1400);
    v.timeout_ms = 1300;
    CHECK(verdict_tick(&v, 0), 1300);
    v.end_ms = 1200;
    CHECK(verdict_tick(&v, 0), 1200);
    h.lost_ms = INT64_MAX;
    v.end_ms = v.timeout_ms = v.next_poll_ms = INT64_MAX;
    CHECK(verdict_tick(&v, 0), INT64_MAX);
    v.timeout_ms = 7;
    v.over = true;
    CHECK(verdict_tick(&v, 0), INT64_MAX);
}

/* An upload that nobody reads, though PINGs are answered, ends, and the agent is asked where it stands. */
static void test_still_upload(void)
{
    static struct loop l;
    static uint8_t piece[PIECE_LEN];
    const struct checksum in = { .path = "f" };
    struct errand errand = { .role = ROLE_DATA, .input = &in, .filename = "f" };
    struct delivery d = { .loop = &l, .errands = &errand, .count = 1, .piece = piece };
    struct parcel parcel = { .name = "f" };
    struct host h = { .name = (char[]){ "vm" }, .parcels = &parcel };
    struct courier c = { .delivery = &d, .host = &h, .where = "10.0.0.7:7002", .fd = -1 };
    const struct endpoint e = { .on = &grpc_client, .client = true, .max_message = 1 << 20 };
    struct conn conn;
    struct err why;
    const uint8_t *p;
    l.core.now_ms = 1000;
    NEED(source_open(&c.source, "f", &why));
    c.open = true;
    conn_init(&conn, &l.core, &e, "agent");
    conn.settings_seen = true;
    struct stream *s = grpc_call(&conn, &courier_methods[ROLE_DATA], c.where, NULL);
    NEED(s);
    s->user = &c;
    courier_pull(s);
    for (int i = 0; i < 2; i++) {
        conn_sent(&conn, conn_peek(&conn, &p));
        int64_t at[CONN_TIMERS];
        conn_timers(&conn, at);
        CHECK(at[TIMER_STREAMS], l.core.now_ms + STILL_MS);
        l.core.now_ms += STILL_MS - 1;
        streams_fire(&conn);
        CHECK(c.over, false);
        if (i == 0)
            courier_pull(s);          /* it moves */
    }
    l.core.now_ms++;
    streams_fire(&conn);
    CHECK(c.over && c.ask, true);
    CHECK_STR(h.trouble, "the upload of f to 10.0.0.7:7002 broke off after 5 bytes: nothing has moved for 300 s");
    courier_close(&c);
    conn_free(&conn);
    buf_free(&l.core.err);
    buf_free(&l.core.spare);
    free(h.trouble);
}

int main(void)
{
    char folder[200];
    const char *tmp = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/cvms-edges-XXXXXX", tmp && *tmp ? tmp : "/tmp");
    NEED(mkdtemp(folder) && chdir(folder) == 0);
    test_durations();
    test_presets();
    test_der();
    test_interrupted();
    test_written_over();
    test_whole_chunks();
    test_same_size_and_time();
    test_zip_end();
    test_verdict_deadline();
    test_still_upload();
    NEED(unlink("f") == 0 && unlink("g") == 0 && rmdir(folder) == 0);
    return closing();
}
