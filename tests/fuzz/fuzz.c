/* Fuzz targets over the program in memory, for libFuzzer, AFL++ and the replay of the corpus.
 *
 *   clang -fsanitize=fuzzer,address,undefined ...          FUZZ_TARGET=server ./fuzz-libfuzzer FOLDER
 *   afl-clang-fast -fsanitize=fuzzer ...                   FUZZ_TARGET=server afl-fuzz -i ... -o ... ./fuzz-afl
 *   cc -DFUZZ_REPLAY -fsanitize=address,undefined ...      ./fuzz-replay tests/fuzz/corpus  (or TARGET FILE...)
 *
 * fuzz.py builds and runs all three; `fuzz-replay seeds DIR` writes the seeds, `fuzz-replay dict TARGET` a dictionary.
 * The corpus of a target is corpus/TARGET.txt, base64, one input a line; a comment names what the next one has found.
 * With FUZZ_VERBOSE set the replay tells what goes on.
 * Where the program asks the system for something, a few functions here answer: sockets are buffers, the clock is what
 * the input says, files are three texts, randomness is a counter.  Everything else is the program as it is.
 *
 * server, client, tls-server, tls-client: four bytes of options, then operations: a letter, three bytes a b c, a
 * length of two, so many bytes of payload.  A capital letter lets the loop run afterwards, a small one does not yet.
 *   F type flags id      a frame with that payload            R               the payload as it is
 *   M compressed flags id   a gRPC message in DATA            Q path flags id    a field block, the payload at its end
 *   O n n                the last of these n times more       L n             go on with connection n
 *   C n n                reads get n bytes at a time         D n n           the socket takes n more bytes
 *   T ms ms ms           time goes by                         E, Z, P         end of input, reset, a broken pipe
 *   W on                 stdout takes nothing                 S               the loop is told to stop
 *   X                    the payload is a line on stdin       N n n           the n-th allocation from here fails
 *   Y at with            TLS: damages the next record         V               TLS: the peer closes
 * The others take plain input; see the comments above them.
 */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* ---- What the program gets instead of the system ---- */
static ssize_t fake_read(int fd, void *p, size_t n);
static ssize_t fake_write(int fd, const void *p, size_t n);
static ssize_t fake_send(int fd, const void *p, size_t n, int flags);
static int fake_open(const char *path, int flags, ...);
static int fake_fstat(int fd, struct stat *st);
static int fake_stat(const char *path, struct stat *st);
static int fake_getsockopt(int fd, int level, int name, void *value, socklen_t *len);
static int fake_getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **list);
static int fake_poll(struct pollfd *p, nfds_t n, int timeout);
static int fake_getentropy(void *p, size_t n);
static int fake_epoll_ctl(int epoll, int op, int fd, struct epoll_event *e);
static char *fake_getenv(const char *name);

static int fake_close(int fd)
{
    (void)fd;
    return 0;
}

static int fake_shutdown(int fd, int how)
{
    (void)fd, (void)how;
    return 0;
}

static int fake_socket(int family, int type, int protocol)
{
    (void)family, (void)type, (void)protocol;
    errno = EMFILE;
    return -1;
}

static int fake_access(const char *path, int mode)
{
    (void)path, (void)mode;
    errno = ENOENT;
    return -1;
}

#define read fake_read
#define write fake_write
#define send fake_send
#define open fake_open
#define close fake_close
#define fstat fake_fstat
#define stat(path, st) fake_stat(path, st)
#define lstat(path, st) fake_stat(path, st)
#define unlink(path) ((void)(path))
#define ftruncate(fd, n) ((void)(fd), 0)
#define shutdown fake_shutdown
#define socket fake_socket
#define access fake_access
#define getsockopt fake_getsockopt
#define getaddrinfo fake_getaddrinfo
#define poll fake_poll
#define getentropy fake_getentropy
#define epoll_ctl fake_epoll_ctl
#define getenv fake_getenv
#define time(p) ((void)(p), (time_t)1800000000)
#include "../unit/core_test.h"
#undef read
#undef write
#undef send
#undef open
#undef close
#undef fstat
#undef stat
#undef unlink
#undef shutdown
#undef socket
#undef access
#undef getsockopt
#undef getaddrinfo
#undef poll
#undef getentropy
#undef epoll_ctl
#undef getenv
#undef time
#define main exchanges_main
#include "../unit/test_core.c"
#undef main
#include "keys.h"

#if defined(__SANITIZE_ADDRESS__)
#define FUZZ_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FUZZ_ASAN 1
#endif
#endif
#ifdef FUZZ_ASAN
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

static bool verbose;                  /* the replay tells what happens */
static const char *running = "";      /* where its input came from */

/* What must hold whatever the input is. */
#define MUST(condition) must(__FILE__, __LINE__, #condition, condition)
static void must(const char *file, int line, const char *what, bool holds)
{
    if (holds)
        return;
    fprintf(stderr, "%s:%d: must hold: %s (%s)\n", file, line, what, running);
    abort();
}

/* While the harness itself works no allocation fails; `left` is what allocs_go is to get. */
static long allocs_hold(void)
{
    long left = alloc_fail ? alloc_fail - alloc_count : 0;
    alloc_fail = 0;
    return left > 0 ? left : 0;
}

static void allocs_go(long left)
{
    alloc_fail = left ? alloc_count + left : 0;
}

/* Appends whatever happens. */
static void keep_put(struct buf *b, const void *p, size_t n)
{
    long left = allocs_hold();
    buf_put(b, p, n);
    MUST(!b->failed);
    allocs_go(left);
}

/* What the inputs so far have brought about; the replay wants all of it. */
static struct {
    bool frame[FRAME_TYPES], goaway[H2_ERRORS], reset[H2_ERRORS], status[GRPC_STATUSES];
    bool protobuf[PB_LIMIT + 1], hpack[HPACK_TOO_MANY + 1];
} seen;

/* A cursor over the input. */
struct input {
    const uint8_t *p;
    size_t n;
};

static unsigned take8(struct input *in)
{
    if (!in->n)
        return 0;
    in->n--;
    return *in->p++;
}

static unsigned take16(struct input *in)
{
    unsigned high = take8(in);
    return high << 8 | take8(in);
}

static struct bytes take(struct input *in, size_t n)
{
    struct bytes b = { in->p, min_size(n, in->n) };
    in->p += b.n;
    in->n -= b.n;
    return b;
}

/* Everything up to the octet, which is dropped, or to the end. */
static struct bytes take_until(struct input *in, uint8_t octet)
{
    const uint8_t *end = in->n ? memchr(in->p, octet, in->n) : NULL;
    struct bytes b = take(in, end ? (size_t)(end - in->p) : in->n);
    take8(in);
    return b;
}

/* ---- Files: the three that there are ---- */
enum { FIRST_FILE = 1000, FIRST_SOCKET = 2000, FILES = 3, WIRES = 8, MAX_ROUNDS = 10000 };
static struct {
    const char *name;
    struct bytes content;
    size_t at;
} files[FILES] = { { .name = "key.pem" }, { .name = "in.json" }, { .name = "data" } };

static const char public_key[] =
    "-----BEGIN PUBLIC KEY-----\n"
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE6ovlGrP9Mz4XC5dW0Mlq1GRx1OYg\n"
    "OgljrV9j73ajbjmtJYABSqxKLtdUiSBzyhnO1Q8fEDu4opuG77RCV9Eiig==\n"
    "-----END PUBLIC KEY-----\n";

static void files_reset(void)
{
    files[0].content = BYTES(public_key);
    files[1].content = BYTES("{}");
    files[2].content = BYTES("data");
}

static int file_named(const char *path)
{
    for (int i = 0; i < FILES; i++)
        if (strcmp(path, files[i].name) == 0)
            return i;
    errno = ENOENT;
    return -1;
}

static int fake_open(const char *path, int flags, ...)
{
    int i = flags & O_DIRECTORY ? -1 : flags & O_CREAT && *path ? FILES : file_named(path);
    errno = ENOENT;
    if (i < 0)
        return -1;
    if (i == FILES)                   /* written to */
        return FIRST_FILE + FILES;
    files[i].at = 0;
    return FIRST_FILE + i;
}

static int fake_fstat(int fd, struct stat *st)
{
    *st = (struct stat){ .st_mode = fd >= FIRST_FILE ? S_IFREG | 0644 : S_IFIFO };
    if (fd >= FIRST_FILE && fd < FIRST_FILE + FILES)
        st->st_size = (off_t)files[fd - FIRST_FILE].content.n;
    return 0;
}

static int fake_stat(const char *path, struct stat *st)
{
    int i = file_named(path);
    return i < 0 ? -1 : fake_fstat(FIRST_FILE + i, st);
}

static int fake_getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **list)
{
    (void)node, (void)service, (void)hints, (void)list;
    return EAI_FAIL;
}

/* Each run begins with the same randomness. */
static uint32_t entropy;

static int fake_getentropy(void *p, size_t n)
{
    for (uint8_t *to = p; n; n--)
        *to++ = (uint8_t)((entropy = entropy * 1664525 + 1013904223) >> 24);
    return 0;
}

/* Variables: what the input has set, as NAME=VALUE. */
static char *variables[8];

static char *fake_getenv(const char *name)
{
    size_t n = strlen(name);
    for (size_t i = 0; i < PB_COUNT(variables); i++)
        if (variables[i] && strncmp(variables[i], name, n) == 0 && variables[i][n] == '=')
            return variables[i] + n + 1;
    return NULL;
}

/* ---- Sockets ---- */
struct wire {
    struct buf in, sent, plain;       /* not yet read; sent and not yet looked at; the same out of TLS */
    size_t in_at, cut, room;
    bool eof, reset, broken;
    struct tls *far;                  /* the peer's end of TLS */
    unsigned damage_at, damage;
    struct hpack hpack;
    bool preface_seen, ended, raw_answer;
    uint8_t stream[256];              /* what we have ended: 1 END_STREAM, 2 RST_STREAM */
    struct buf data;                  /* DATA of stream 1 */
};

static struct wire wires[WIRES];
static struct loop loop;
static bool stdout_blocked;
static struct buf printed, noted, recorded, filed;   /* what came out of descriptors 1, 2 and 3, and into files */

static struct wire *wire_of(int fd)
{
    return fd >= FIRST_SOCKET && fd < FIRST_SOCKET + WIRES ? &wires[fd - FIRST_SOCKET] : NULL;
}

static ssize_t fake_read(int fd, void *p, size_t n)
{
    struct wire *w = wire_of(fd);
    if (fd >= FIRST_FILE && fd < FIRST_FILE + FILES) {
        struct bytes rest = bytes_from(files[fd - FIRST_FILE].content, files[fd - FIRST_FILE].at);
        n = min_size(n, rest.n);
        if (n)
            memcpy(p, rest.p, n);
        files[fd - FIRST_FILE].at += n;
        return (ssize_t)n;
    }
    MUST(w != NULL);
    errno = w->reset ? ECONNRESET : EAGAIN;
    size_t waiting = w->in.len - w->in_at;
    if (w->reset || (!waiting && !w->eof))
        return -1;
    size_t least = waiting / 500 + 1, cut = w->cut > least ? w->cut : least;   /* few rounds all the same */
    n = min_size(min_size(n, waiting), w->cut ? cut : SIZE_MAX);
    ASAN_UNPOISON_MEMORY_REGION(loop.read_buf, sizeof loop.read_buf);
    if (n)
        memcpy(p, w->in.p + w->in_at, n);
    ASAN_POISON_MEMORY_REGION(loop.read_buf + n, sizeof loop.read_buf - n);
    w->in_at += n;
    return (ssize_t)n;
}

static ssize_t fake_send(int fd, const void *p, size_t n, int flags)
{
    struct wire *w = wire_of(fd);
    (void)flags;
    MUST(w != NULL);
    errno = w->broken ? EPIPE : EAGAIN;
    if (w->broken || !w->room)
        return -1;
    n = min_size(n, w->room);
    w->room -= w->room == SIZE_MAX ? 0 : n;
    keep_put(&w->sent, p, n);
    return (ssize_t)n;
}

static ssize_t fake_write(int fd, const void *p, size_t n)
{
    static struct buf *const to[] = { &printed, &noted, &recorded };
    if (fd == FIRST_FILE + FILES) {
        keep_put(&filed, p, n);
        return (ssize_t)n;
    }
    MUST(fd >= 1 && fd <= 3);
    errno = EAGAIN;
    if (fd == 1 && stdout_blocked)
        return -1;
    keep_put(to[fd - 1], p, n);
    if (verbose)
        printf("%d: %.*s", fd, (int)n, (const char *)p);
    return (ssize_t)n;
}

static int fake_poll(struct pollfd *p, nfds_t n, int timeout)
{
    (void)n, (void)timeout;
    p->revents = p->events;
    return p->fd != 1 || !stdout_blocked;
}

static int fake_getsockopt(int fd, int level, int name, void *value, socklen_t *len)
{
    (void)fd, (void)level, (void)name, (void)len;
    memset(value, 0, sizeof(int));
    return 0;
}

static int fake_epoll_ctl(int epoll, int op, int fd, struct epoll_event *e)
{
    (void)epoll, (void)op, (void)fd, (void)e;
    return 0;
}

/* ---- What comes out is held to the standards ---- */
static void ignore_field(void *arg, struct bytes name, struct bytes value)
{
    unsigned *status = arg;
    for (size_t i = 0; i < name.n; i++)
        MUST(name.p[i] > ' ' && name.p[i] < 0x7f && (name.p[i] < 'A' || name.p[i] > 'Z'));
    MUST(field_value_ok(value));
    if (bytes_eq(name, BYTES("grpc-status")))
        *status = (unsigned)parse_decimal(value);
}

/* One whole frame of ours. */
static void check_frame(struct wire *w, const struct frame *f, const uint8_t *p)
{
    static uint8_t scratch[HPACK_SCRATCH(MAX_HEADER_LIST)];
    bool scope;
    unsigned status = GRPC_STATUSES;
    if (verbose)
        printf("wire %d: %s flags=%x stream=%u len=%u\n", (int)(w - wires), f->type < FRAME_TYPES ?
               frame_rules[f->type].name : "?", f->flags, (unsigned)f->stream_id, (unsigned)f->len);
    MUST(frame_check(f, &scope) == NO_ERROR && f->type < FRAME_TYPES && f->type != FRAME_PUSH_PROMISE);
    uint8_t *state = f->stream_id && f->stream_id < 256 ? &w->stream[f->stream_id] : NULL;
    MUST(!w->ended || f->type == FRAME_GOAWAY);
    MUST(!state || *state == 0 || f->type == FRAME_RST_STREAM || (*state == 1 && f->type == FRAME_WINDOW_UPDATE));
    if (f->type == FRAME_HEADERS) {
        struct hpack_reader reader = { .huffman = &core.huffman, .scratch = scratch, .list_limit = MAX_HEADER_LIST,
                                       .field = ignore_field, .arg = &status };
        MUST(f->flags & END_HEADERS);
        MUST(hpack_decode(&w->hpack, (struct bytes){ p, f->len }, &reader) == HPACK_OK && !reader.too_large);
        if (status < GRPC_STATUSES)
            seen.status[status] = true;
    } else if (f->type == FRAME_DATA && f->stream_id == 1) {
        buf_put(&w->data, p, f->len);
    } else if (f->type == FRAME_RST_STREAM) {
        MUST(get_be32(p) < H2_ERRORS);
        seen.reset[get_be32(p)] = true;
    } else if (f->type == FRAME_GOAWAY) {
        MUST(get_be32(p + 4) < H2_ERRORS);
        seen.goaway[get_be32(p + 4)] = true;
        w->ended = get_be32(p + 4) != NO_ERROR;
    } else if (f->type == FRAME_WINDOW_UPDATE) {
        MUST((get_be32(p) & 0x7fffffff) != 0);
    }
    if (state && f->type == FRAME_RST_STREAM)
        *state = 2;
    else if (state && (f->type == FRAME_HEADERS || f->type == FRAME_DATA) && f->flags & END_STREAM)
        *state = 1;
}

/* Takes whole frames off what has been sent in plaintext. */
static void check_sent(struct wire *w, struct buf *sent, bool client)
{
    size_t at = 0;
    if (!sent->len)
        return;
    if (client && !w->preface_seen) {
        if (sent->len < PREFACE_LEN)
            return;
        MUST(memcmp(sent->p, preface, PREFACE_LEN) == 0);
        w->preface_seen = true;
        at = PREFACE_LEN;
    }
    if (!client && sent->len >= 5 && memcmp(sent->p, "HTTP/", 5) == 0)
        w->raw_answer = true;
    while (!w->raw_answer && sent->len - at >= FRAME_HEADER_LEN) {
        struct frame f = frame_parse(sent->p + at);
        if (sent->len - at < FRAME_HEADER_LEN + (size_t)f.len)
            break;
        check_frame(w, &f, sent->p + at + FRAME_HEADER_LEN);
        at += FRAME_HEADER_LEN + (size_t)f.len;
    }
    if (w->raw_answer)
        at = sent->len;
    if (at)
        memmove(sent->p, sent->p + at, sent->len - at);
    sent->len -= at;
}

/* Lines for people: UTF-8, and nothing that a terminal would take for more than text but our own colours. */
static void check_text_safe(struct bytes t, bool color)
{
    const uint8_t *end = t.n ? t.p + t.n : t.p;
    MUST(pb_utf8_valid(t));
    for (uint32_t c; t.n; t = bytes_from(t, (size_t)pb_utf8_char(t.p, end, &c))) {
        MUST(pb_utf8_char(t.p, end, &c) != 0);
        MUST(!pb_is_unsafe(c) || c == '\n' || c == '\t' || (color && c == 0x1b && t.n > 3 && t.p[1] == '['));
    }
}

static struct pb_arena arena;

/* Every line is one JSON message of the table. */
static void check_json_lines(struct bytes t, const struct pb_message *m)
{
    char err[300] = "";
    uint8_t msg[512] __attribute__((aligned(16)));
    MUST(m->size <= sizeof msg);
    for (struct input in = { t.p, t.n }; in.n;) {
        memset(msg, 0, sizeof msg);
        pb_arena_reset(&arena);
        bool parses = pb_json_parse(m, msg, take_until(&in, '\n'), &arena, err, sizeof err);
        if (!parses)
            fprintf(stderr, "%s\n", err);
        MUST(parses);
    }
}

/* ---- The link targets ---- */
enum role { SERVER, AGENT_CLIENT, HEALTH_CLIENT, REPLAY_CLIENT };

struct run_state {
    enum role role;
    bool secure, mutual;
    struct options options;
    struct server server;
    struct manifest other;            /* of the agents with the job-id "job" */
    struct agent agent;
    struct health health;
    struct replay replay;
    unsigned current, used;
    struct buf last;                  /* what O repeats */
    struct tls_config *far_config, *client_tls;
    struct tls_pool far_pool;
};
static struct run_state st;
static struct tls_config *configs[4]; /* as server and as client, without client certificates and with; made once */
static struct addrinfo no_address;

static struct tls_config *config_of(bool client, bool mutual)
{
    struct err e = { "" };
    struct tls_options o = {
        .cert = { "cert", client ? client_pem : server_pem }, .key = { "key", client ? client_key : server_key },
        .server_ca = { "ca", client ? ca_pem : NULL }, .client_ca = { "ca", mutual && !client ? ca_pem : NULL },
        .server_name = "server",
    };
    struct tls_config **at = &configs[2 * client + mutual];
    if (!*at)
        *at = client ? tls_client_config(&o, 1800000000, &e) : tls_server_config(&o, 1800000000, &e);
    if (!*at)
        fprintf(stderr, "%s\n", e.text);
    MUST(*at != NULL);
    (*at)->refs++;
    return *at;
}

static struct link *link_of(unsigned wire)
{
    for (struct link *k = loop.links; k; k = k->next)
        if (k->watch.fd == FIRST_SOCKET + (int)wire)
            return k;
    return NULL;
}

/* A wire for a new connection; false when all are used up. */
static bool wire_new(int *fd)
{
    if (st.used == WIRES)
        return false;
    struct wire *w = &wires[st.used];
    *w = (struct wire){ .room = SIZE_MAX };
    hpack_init(&w->hpack);
    if (st.far_config)
        w->far = tls_new(st.far_config, &st.far_pool, 1800000000);
    *fd = FIRST_SOCKET + (int)st.used++;
    return true;
}

/* What the listener does with a new connection. */
static void accept_one(void)
{
    int fd;
    char name[56];
    if (!wire_new(&fd))
        return;
    snprintf(name, sizeof name, "127.0.0.1:%d", fd);
    struct link *k = link_new(&loop, fd);
    loop.accepted_count += k != NULL;
    if (k && link_begin(k, &loop.serving, loop.tls, name))
        link_ready(&loop, &k->watch, WATCH_IN);
}

/* What the poller does when a connect is through. */
static void connect_all(void)
{
    for (struct link *k = loop.links, *next; k; k = next) {
        next = k->next;
        if (k->connecting && wire_new(&k->watch.fd)) {
            connect_ready(&loop, &k->watch, WATCH_OUT);
            next = loop.links;        /* it may have dialled another */
        }
    }
}

/* The far end of TLS: takes what has been sent, and moves what it has to say, damaged if asked, into the wire. */
static void far_turn(struct wire *w, struct buf *plain)
{
    if (!w->far) {
        w->sent.len = 0;
        return;
    }
    for (bool moved = true; moved;) {
        size_t n = w->sent.len ? tls_take(w->far, w->sent.p, w->sent.len) : 0;
        moved = n;
        w->sent.len -= n;
        if (n)
            memmove(w->sent.p, w->sent.p + n, w->sent.len);
        const uint8_t *p;
        while ((p = tls_app_in(w->far, &n)) != NULL && n) {
            buf_put(plain, p, n);
            tls_app_in_ack(w->far, n);
            moved = true;
        }
        while ((p = tls_send_buf(w->far, &n)) != NULL && n) {
            buf_put(&w->in, p, n);
            if (w->damage && !w->in.failed && w->damage_at < n)
                w->in.p[w->in.len - n + w->damage_at] ^= (uint8_t)w->damage;
            w->damage = 0;
            tls_send_ack(w->far, n);
            moved = true;
        }
    }
    if (w->far->state >= TLS_CLOSING)
        w->sent.len = 0;
}

/* Octets from the peer, as they are or through its TLS. */
static void feed(struct wire *w, struct bytes b, bool as_it_is)
{
    if (!w->far || as_it_is) {
        buf_put(&w->in, b.p, b.n);
        return;
    }
    while (b.n) {
        far_turn(w, &w->plain);
        size_t n = tls_put(w->far, b.p, b.n);
        if (!n)
            return;
        b = bytes_from(b, n);
    }
    far_turn(w, &w->plain);
}

/* What each connection may hold, whatever its peer does. */
static void check_bounds(void)
{
    for (struct link *k = loop.links; k; k = k->next) {
        const struct conn *c = &k->conn;
        if (k->connecting)
            continue;
        MUST(c->stream_count <= MAX_CONCURRENT_STREAMS);
        MUST(c->in.len <= MAX_FRAME_SIZE && c->block.len <= MAX_FIELD_BLOCK);
        MUST(c->hpack.cap <= HPACK_TABLE_SIZE && c->hpack.max <= HPACK_TABLE_SIZE);
        MUST(c->client || c->queued_bytes <= MAX_QUEUED_BYTES + 256);
        MUST(c->out.len <= 4 * OUT_HIGH);
        uint32_t n = 0;
        size_t own = 0;
        for (const struct stream *s = c->streams; s; s = s->next, n++) {
            uint32_t here = 0;
            for (const struct item *i = s->head; i; i = i->next, here++)
                own += i->own;
            MUST(here == s->queued);
            MUST(s->grpc.message.len <= c->endpoint->max_message);
        }
        MUST(n == c->stream_count && own == c->queued_bytes);
    }
    for (size_t i = 2; i <= loop.heap_len; i++)
        MUST(loop.heap[i / 2]->deadline_ms <= loop.heap[i]->deadline_ms);
}

/* Once round the loop: everything that is ready, until nothing is. */
static void turn_around(void)
{
    for (int rounds = 0, busy = 1; busy; rounds++) {
        busy = 0;
        MUST(rounds < MAX_ROUNDS);
        for (unsigned i = 0; i < st.used; i++) {
            struct wire *w = &wires[i];
            struct link *k = link_of(i);
            long left = allocs_hold();
            if (st.secure)
                far_turn(w, &w->plain);
            allocs_go(left);
            if (k && !k->connecting) {
                bool in = w->in.len > w->in_at || w->eof || w->reset, out = w->room || w->broken;
                unsigned ready = (k->watch.interest & WATCH_IN && in ? WATCH_IN : 0u) |
                                 (k->watch.interest & WATCH_OUT && out ? WATCH_OUT : 0u);
                if (w->reset)
                    ready |= WATCH_ERROR;
                if (ready) {
                    busy = 1;
                    link_ready(&loop, &k->watch, ready);
                }
            }
            left = allocs_hold();
            if (!st.secure)
                check_sent(w, &w->sent, st.role != SERVER);
            else if (w->far)
                check_sent(w, &w->plain, st.role != SERVER);
            allocs_go(left);
        }
        if (loop.turn && !loop.stop_why)
            loop.turn(&loop);
        if (loop.stop_why && !loop.stopping)
            loop_goodbye(&loop);
        if (loop.core.touched)
            loop_flush_all(&loop);
        sink_flush(&loop, &loop.out);
        sink_flush(&loop, &loop.record);
        sink_flush(&loop, &loop.err);
        loop_pressure(&loop);
        loop_bury(&loop);
        if (st.role != SERVER)
            connect_all();
    }
    check_bounds();
}

/* ---- Operations ---- */
struct op_record {
    uint8_t letter, a, b, c;
    struct bytes payload;
};

enum { OP_HEAD = 6 };

static struct op_record op_take(struct input *in)
{
    struct op_record op = { (uint8_t)take8(in), 0, 0, 0, { NULL, 0 } };
    op.a = (uint8_t)take8(in);
    op.b = (uint8_t)take8(in);
    op.c = (uint8_t)take8(in);
    op.payload = take(in, take16(in));
    return op;
}

static void put_op_frame(struct buf *b, unsigned type, unsigned flags, unsigned id, struct bytes p)
{
    frame_put(b, (uint32_t)p.n, FRAME_DATA, flags, id);
    if (!b->failed)
        b->p[b->len - 6] = (uint8_t)type;
    buf_put(b, p.p, p.n);
    if (type < FRAME_TYPES)
        seen.frame[type] = true;
}

static const char *const paths[] = {
    "/cvms.Service/Process", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List",
    "/grpc.health.v1.Health/Watch", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "/grpc.health.v1.Health/None", "/x/y", "/", "*",
};

/* A field block: a request of ours to this path, or a response. */
static void put_op_block(struct buf *b, const struct op_record *op)
{
    struct buf block = { 0 };
    char number[8];
    snprintf(number, sizeof number, "%u", op->a >> 2);
    if (st.role == SERVER) {
        put_field(&block, ":method", op->a & 0x80 ? BYTES("GET") : BYTES("POST"));
        put_field(&block, ":scheme", BYTES("http"));
        put_field(&block, ":path", bytes_of(paths[(op->a & 0x7f) % PB_COUNT(paths)]));
        put_field(&block, "content-type", BYTES("application/grpc"));
    } else {
        if (!(op->a & 1)) {
            put_field(&block, ":status", BYTES("200"));
            put_field(&block, "content-type", BYTES("application/grpc"));
        }
        if (op->a & 2)
            put_field(&block, "grpc-status", bytes_of(number));
    }
    buf_put(&block, op->payload.p, op->payload.n);
    put_op_frame(b, FRAME_HEADERS, (op->b & 0x80 ? 0u : (unsigned)END_HEADERS) | (op->b & END_STREAM), op->c, whole(&block));
    buf_free(&block);
}

static void put_op_message(struct buf *b, const struct op_record *op)
{
    struct buf m = { 0 };
    put_message(&m, op->a, op->payload);
    for (size_t at = 0, n; at < m.len; at += n) {
        n = min_size(m.len - at, MAX_FRAME_SIZE);
        put_op_frame(b, FRAME_DATA, at + n == m.len ? op->b : 0u, op->c, (struct bytes){ m.p + at, n });
    }
    buf_free(&m);
}

/* Octets for the peer's side of the current connection. */
static bool op_payload(struct wire *w, const struct op_record *op, char letter)
{
    enum { REPEAT_MAX = 1 << 18 };
    unsigned times = 1;
    if (letter == 'O')
        times = (unsigned)op->a << 8 | op->b;
    else
        st.last.len = 0;
    switch (letter) {
    case 'F': put_op_frame(&st.last, op->a, op->b, op->c, op->payload); break;
    case 'R': buf_put(&st.last, op->payload.p, op->payload.n); break;
    case 'M': put_op_message(&st.last, op); break;
    case 'Q': put_op_block(&st.last, op); break;
    case 'O': break;
    default: return false;
    }
    if (st.last.len)
        for (size_t left = REPEAT_MAX / st.last.len + 1; times && left; times--, left--)
            feed(w, whole(&st.last), letter == 'R' && op->a & 1);
    return true;
}

static void op_control(const struct op_record *op)
{
    if (st.role == SERVER) {
        control_bytes(&st.server, (const char *)op->payload.p, op->payload.n);
        control_bytes(&st.server, "\n", 1);
    }
}

static void op_run(struct op_record *op)
{
    if (verbose)
        printf("op %c %u %u %u, %zu bytes\n", op->letter, op->a, op->b, op->c, op->payload.n);
    bool later = op->letter >= 'a' && op->letter <= 'z';
    char letter = (char)(later ? op->letter - 'a' + 'A' : op->letter);
    unsigned n = (unsigned)op->a << 8 | op->b;
    struct wire *w = &wires[st.current];
    long left = allocs_hold();
    bool bytes = op_payload(w, op, letter);
    allocs_go(left);
    if (!bytes)
        switch (letter) {
        case 'L':
            if (st.role == SERVER && op->a % WIRES >= st.used)
                accept_one();
            st.current = st.used ? op->a % st.used : 0;
            break;
        case 'C': w->cut = n; break;
        case 'D': w->room = n == 0xffff ? SIZE_MAX : w->room == SIZE_MAX ? n : w->room + n; break;
        case 'T':
            loop.core.now_ms += (int64_t)n << 8 | op->c;
            loop.core.wall_ms += (int64_t)n << 8 | op->c;
            loop_deadlines(&loop);
            break;
        case 'E': w->eof = true; break;
        case 'Z': w->reset = true; break;
        case 'P': w->broken = true; break;
        case 'W':
            stdout_blocked = op->a & 1;
            break;
        case 'S': loop_stop(&loop, "the server is shutting down"); break;
        case 'X': op_control(op); break;
        case 'N': alloc_fail = n ? alloc_count + (long)n : 0; break;
        case 'Y': w->damage_at = op->a, w->damage = op->b; break;
        case 'V':
            if (w->far)
                tls_close(w->far);
            break;
        default: return;
        }
    if (!later)
        turn_around();
}

/* ---- Beginning and end of a run ---- */
static void run_begin(void)
{
    printed.len = noted.len = recorded.len = filed.len = 0;
    stdout_blocked = false;
    alloc_count = alloc_fail = 0;
    entropy = 1;
    files_reset();
    memset(variables, 0, sizeof variables);
}

/* A manifest with everything in it, of about n bytes more. */
static struct manifest *manifest_made(size_t more)
{
    static struct manifest m;
    static struct Dataset d[2];
    static struct Algorithm a;
    static struct AgentConfig config;
    static struct ResultConsumer c;
    static uint8_t hash[32], filler[300000];
    static struct buf der;
    struct bytes key = { 0 };
    char label[PEM_LABEL];
    struct bytes pem = BYTES(public_key);
    if (!der.len)
        pem_next(&pem, label, &der);
    key = whole(&der);
    d[0] = (struct Dataset){ .hash = { hash, 32 }, .userKey = key, .filename = BYTES("d.csv") };
    d[1] = d[0];
    a = (struct Algorithm){ .hash = { hash, 32 }, .userKey = key, .algo_type = BYTES("bin") };
    c.userKey = key;
    config = (struct AgentConfig){ .port = BYTES("7002") };
    m = (struct manifest){ .req = { .id = BYTES("1"), .name = { filler, more }, .algorithm = &a, .agent_config = &config,
                                    .datasets = { d, 2, 0 }, .result_consumers = { &c, 1, 0 } } };
    memset(filler, 'x', sizeof filler);
    return &m;
}

static void loop_begin(void)
{
    ASAN_UNPOISON_MEMORY_REGION(loop.read_buf, sizeof loop.read_buf);
    memset(&loop, 0, offsetof(struct loop, read_buf));
    loop.stop_ms = loop.timer_ms = loop.accept_ms = INT64_MAX;
    loop.core.huffman = core.huffman;
    loop.core.arena.limit = 64 << 20;
    sink_init(&loop.out, 1, &loop.core.out);
    sink_init(&loop.err, 2, &loop.core.err);
    sink_init(&loop.record, 3, &loop.core.record);
    loop.core.now_ms = NOW;
    loop.core.wall_ms = wall;
    loop.max_accepted = WIRES;
    run_begin();
}

static void server_begin(unsigned how, unsigned fault, unsigned more)
{
    struct server *v = &st.server;
    struct manifest *m = manifest_made(more & 1 ? 200000 : 0);
    *v = (struct server){ .loop = &loop, .o = &st.options, .manifest = *m };
    for (size_t i = 0; i < FAULTS; i++)
        v->faults.value[i] = -1;
    if (how & 0x80)
        v->faults.value[fault % FAULTS] = fault_table[fault % FAULTS].arg ? fault / FAULTS : 0;
    v->manifest.faults = how & 0x80 ? &v->faults : NULL;
    st.other = *m;
    st.other.job_id = "job";
    v->manifest.next = &st.other;
    MUST(manifest_encode(&v->manifest) && manifest_encode(&st.other));
    v->verdict = (struct verdict){ .timeout_ms = INT64_MAX, .end_ms = INT64_MAX, .next_poll_ms = INT64_MAX,
                                   .grace_ms = 15000, .poll_ms = INT64_MAX, .agents = 1, .control = true };
    if (how & 8) {
        v->verdict.wanted = true;
        v->verdict.until = STAGE_READY;
        v->verdict.timeout_ms = NOW + 600000;
        v->verdict.poll_ms = 5000;
        v->verdict.next_poll_ms = NOW + 5000;
        v->verdict.start_ms = NOW;
    }
    loop.serving = (struct endpoint){ .on = &grpc_server, .methods = server_methods,
                                      .method_count = PB_COUNT(server_methods), .max_message = how & 0x20 ? 100 : 4 << 20 };
    st.options.skip_forwarder = how & 0x10;
    v->json = how & 1;
    loop.core.out_look = how & 2 ? LOOK_COLOR | LOOK_BRIEF : 0;
    loop.core.recording = how & 4;
    loop.core.app = v;
    loop.turn = server_turn;
    if (st.secure)
        loop.tls = config_of(false, st.mutual);
    accept_one();
}

static const char replay_lines[] =
    "{\"time\":\"2025-01-01T00:00:00Z\",\"peer\":\"a:1\",\"stream\":\"agent\",\"job_id\":\"j\",\"message\":{}}\n"
    "{\"time\":\"2025-01-01T00:00:01Z\",\"peer\":\"a:2\",\"stream\":\"log-forwarder\",\"job_id\":\"j\",\"message\":{\"agentLog\":{}}}\n";

static void client_begin(unsigned how)
{
    st.options = (struct options){ .repeat = 2, .wait_ms = 1000, .once = how & 4, .service = "", .fast = how & 8,
                                   .job_id = how & 0x10 ? "job" : NULL, .replay = "in.json" };
    st.options.arena.limit = SIZE_MAX / 2;
    st.client_tls = st.secure ? config_of(true, st.mutual) : NULL;
    struct client c = {
        .loop = &loop, .o = &st.options,
        .dial = { .endpoint = { .on = &grpc_client, .client = true, .max_message = CLIENT_MAX_MESSAGE },
                  .name = "server", .where = "localhost:7001", .addresses = &no_address, .give_up_ms = INT64_MAX,
                  .connect_ms = CONNECT_MS, .tls = st.client_tls, .down = client_down }
    };
    if (st.role == AGENT_CLIENT) {
        st.agent = (struct agent){ .c = c, .run = 1, .state = "ReceivingManifest",
                                   .fail = how >> 5 ? &failures[(how >> 5) - 1] : NULL };
        loop.core.app = &st.agent;
        st.agent.c.dial.up = agent_up;
        loop.turn = agent_turn;
        client_dial(&st.agent.c, &st.agent.stream[AGENT]);
    } else if (st.role == HEALTH_CLIENT) {
        st.health = (struct health){ .c = c };
        loop.core.app = &st.health;
        st.health.c.dial.up = health_up;
        st.health.c.dial.down = health_down;
        loop.turn = health_turn;
        client_dial(&st.health.c, NULL);
    } else {
        struct mistakes report = { 0 };
        st.replay = (struct replay){ .c = c };
        files[1].content = BYTES(replay_lines);
        MUST(replay_load(&st.replay, &st.options, &report));
        loop.core.app = &st.replay;
        st.replay.c.dial.up = replay_up;
        loop.turn = replay_turn;
        for (size_t i = 0; i < st.replay.part_count; i++)
            client_dial(&st.replay.c, &st.replay.parts[i]);
    }
    turn_around();
}

/* Nobody says anything more.  A server has to be rid of every connection in a few deadlines' time. */
static void server_silence(void)
{
    alloc_fail = 0;
    stdout_blocked = false;
    for (int i = 0; i < 300 && loop.links; i++) {
        turn_around();
        int64_t at = loop.heap_len ? loop.heap[1]->deadline_ms : INT64_MAX;
        MUST(!loop.links || at != INT64_MAX);
        if (at > loop.core.now_ms && at != INT64_MAX) {
            loop.core.wall_ms += at - loop.core.now_ms;
            loop.core.now_ms = at;
        }
        loop_deadlines(&loop);
    }
    turn_around();
    MUST(!loop.links && !st.server.sessions);
}

static void loop_end(void)
{
    alloc_fail = 0;
    for (struct link *k = loop.links, *next; k; k = next) {
        next = k->next;
        link_close(k, "the program ends");
    }
    loop_bury(&loop);
    tls_config_free(loop.tls);
    tls_config_free(st.client_tls);
    tls_pool_free(&loop.tls_pool);
    for (unsigned i = 0; i < st.used; i++) {
        struct wire *w = &wires[i];
        tls_free(w->far);
        buf_free(&w->in);
        buf_free(&w->sent);
        buf_free(&w->data);
        buf_free(&w->plain);
        hpack_free(&w->hpack);
    }
    tls_pool_free(&st.far_pool);
    if (st.far_config)
        tls_config_free(st.far_config);
    buf_free(&loop.core.out);
    buf_free(&loop.core.err);
    buf_free(&loop.core.record);
    buf_free(&loop.core.spare);
    pb_arena_free(&loop.core.arena);
    free(loop.heap);
    buf_free(&st.last);
}

static void link_target(struct input *in, bool client, bool secure)
{
    unsigned how = take8(in), fault = take8(in), more = take8(in), kind = take8(in);
    loop_begin();
    st = (struct run_state){ .role = !client ? SERVER : (how & 3) == 0 ? AGENT_CLIENT : (how & 3) == 1 ? HEALTH_CLIENT
                             : (how & 3) == 2 ? REPLAY_CLIENT : AGENT_CLIENT,
                             .secure = secure, .mutual = kind & 1 };
    if (secure && !(kind & 2))
        st.far_config = config_of(!client, st.mutual);
    if (client)
        client_begin(how);
    else
        server_begin(how, fault, more);
    for (int ops = 0; in->n && ops < 400; ops++) {
        struct op_record op = op_take(in);
        op_run(&op);
    }
    bool ran_out = alloc_fail != 0;
    if (!client)
        server_silence();
    if (!client && how & 8) {
        st.options.report = how & 1 ? "report.json" : "report.xml";
        MUST(verdict_finish(&st.server, 0) <= 128);
        check_text_safe(whole(&filed), false);
    }
    check_text_safe(whole(&noted), false);
    if (!client && st.server.json && !ran_out)
        check_json_lines(whole(&printed), &Line_message);
    else if (!client)
        check_text_safe(whole(&printed), loop.core.out_look);
    if (!client && !ran_out)
        check_json_lines(whole(&recorded), &Line_message);
    loop_end();
    if (client) {
        download_free(&st.agent);
        pb_arena_free(&st.agent.arena);
        buf_free(&st.agent.manifest);
        buf_free(&st.agent.id);
        pb_arena_free(&st.options.arena);
    } else {
        MUST(st.server.manifest.stream->refs == 1 && st.other.stream->refs == 1);
        manifest_free(&st.server.manifest);
        verdict_free(&st.server.verdict);
    }
}

static void fuzz_server(struct input *in)
{
    link_target(in, false, false);
}

static void fuzz_client(struct input *in)
{
    link_target(in, true, false);
}

static void fuzz_tls_server(struct input *in)
{
    link_target(in, false, true);
}

static void fuzz_tls_client(struct input *in)
{
    link_target(in, true, true);
}

/* ---- Codecs ---- */
static const struct pb_message *table_of(unsigned n)
{
    size_t i = 0;
    for (size_t f = 0; f < PB_COUNT(all_files); f++)
        for (size_t k = 0; all_files[f].messages[k]; k++, i++)
            if (i == n)
                return all_files[f].messages[k];
    return n < 0x80 ? &Line_message : table_of(n - 0x80);
}

static void count_unknown(void *arg, const char *path, unsigned wire, uint64_t number, struct bytes value)
{
    *(size_t *)arg += 1;
    MUST(*path && wire <= PB_FIXED32 && wire != PB_EGROUP && (number == 0 || value.n == 0));
}

/* A message whatever it came from: its wire form, and its JSON, come back as the same message. */
static void check_message(const struct pb_message *m, const void *msg, struct pb_arena *a)
{
    struct buf wire = { 0 }, wire2 = { 0 }, json = { 0 };
    char err[300] = "";
    bool unknown;
    struct bytes w = pb_encode(&wire, m, msg);
    MUST(!wire.failed);
    void *back = pb_arena_alloc(a, m->size);
    MUST(back && pb_decode(m, back, w, a, &unknown) == PB_OK && !unknown);
    MUST(bytes_eq(pb_encode(&wire2, m, back), w));
    for (int indent = m == &HealthCheckResponse_message ? 4 : 0; indent <= 2; indent += 2) {      /* enums are not read by name */
        json.len = 0;
        pb_json(&json, m, msg, indent);
        MUST(pb_utf8_valid(whole(&json)) && (indent || !memchr(json.p, '\n', json.len)));
        check_text_safe(whole(&json), false);
        back = pb_arena_alloc(a, m->size);
        bool parses = pb_json_parse(m, back, whole(&json), a, err, sizeof err);
        if (!parses)
            fprintf(stderr, "%s\n", err);
        MUST(parses);
        MUST(bytes_eq(pb_encode(&wire2, m, back), w));
    }
    buf_free(&wire);
    buf_free(&wire2);
    buf_free(&json);
}

/* An octet that names a table, then a message of it. */
static void fuzz_protobuf(struct input *in)
{
    enum { SMALL = 256 << 10, LARGE = 256 << 20 };
    const struct pb_message *m = table_of(take8(in));
    struct pb_arena small = { .limit = SMALL }, large = { .limit = LARGE };
    struct bytes wire = { in->p, in->n };
    bool unknown, again;
    size_t reported = 0;
    run_begin();
    void *msg = pb_arena_alloc(&large, m->size), *twice = pb_arena_alloc(&large, m->size);
    void *merged = pb_arena_alloc(&large, m->size);
    enum pb_error e = pb_decode(m, msg, wire, &small, &unknown);
    seen.protobuf[e] = true;
    MUST(small.held <= SMALL);
    pb_unknown(m, wire, count_unknown, &reported);
    MUST(e != PB_OK || unknown == (reported != 0));
    if (e == PB_OK) {
        struct buf both = { 0 }, one = { 0 }, two = { 0 };
        check_message(m, msg, &large);
        buf_put(&both, wire.p, wire.n);    /* a message behind itself is the message merged into itself */
        buf_put(&both, wire.p, wire.n);
        MUST(pb_decode(m, twice, whole(&both), &large, &again) == PB_OK && again == unknown);
        MUST(pb_decode(m, merged, wire, &large, &again) == PB_OK);
        MUST(pb_decode(m, merged, wire, &large, &again) == PB_OK);
        MUST(bytes_eq(pb_encode(&one, m, twice), pb_encode(&two, m, merged)));
        buf_free(&both);
        buf_free(&one);
        buf_free(&two);
    }
    pb_arena_free(&small);
    pb_arena_free(&large);
}

/* An octet that names a table, then JSON of it. */
static void fuzz_json(struct input *in)
{
    const struct pb_message *m = table_of(take8(in));
    struct pb_arena a = { .limit = 256 << 20 };
    char err[200] = "";
    run_begin();
    void *msg = pb_arena_alloc(&a, m->size);
    if (pb_json_parse(m, msg, (struct bytes){ in->p, in->n }, &a, err, sizeof err))
        check_message(m, msg, &a);
    else
        MUST(strncmp(err, "line ", 5) == 0 && bytes_printable(bytes_of(err)));
    pb_arena_free(&a);
}

/* ---- HPACK ---- */
struct field_list {
    struct buf text;                  /* name length, value length, name, value of each */
    size_t size, n;
};

static void list_add(void *arg, struct bytes name, struct bytes value)
{
    struct field_list *list = arg;
    uint32_t n[2] = { (uint32_t)name.n, (uint32_t)value.n };
    buf_put(&list->text, n, sizeof n);
    buf_put(&list->text, name.p, name.n);
    buf_put(&list->text, value.p, value.n);
    list->size += name.n + value.n + HPACK_OVERHEAD;
    list->n++;
}

/* The Huffman form of a string (RFC 7541 5.2), from the same lengths. */
static void put_huffman(struct buf *out, struct bytes s)
{
    uint64_t acc = 0;
    unsigned bits = 0;
    for (size_t i = 0; i < s.n; i++) {
        unsigned n = huffman_bits[s.p[i]], k = core.huffman.len[n].index;
        while (core.huffman.symbol[k] != s.p[i])
            k++;
        acc = acc << n | (core.huffman.len[n].first + k - core.huffman.len[n].index);
        for (bits += n; bits >= 8; bits -= 8)
            buf_putc(out, (int)(acc >> (bits - 8) & 255));
    }
    if (bits)
        buf_putc(out, (int)((acc << (8 - bits) | 0xff >> bits) & 255));
}

/* A list of fields, encoded plainly, or in Huffman's code with every field entering the table, comes back. */
static void check_fields_again(const struct field_list *list, bool huffman)
{
    static uint8_t scratch[HPACK_SCRATCH(1 << 20)];
    struct hpack h;
    struct field_list back = { 0 };
    struct buf block = { 0 };
    hpack_init(&h);
    for (struct input in = { list->text.p, list->text.len }; in.n;) {
        uint32_t n[2];
        memcpy(n, take(&in, sizeof n).p, sizeof n);
        struct bytes part[2];
        part[0] = take(&in, n[0]);
        part[1] = take(&in, n[1]);
        if (!huffman) {
            hpack_encode_field(&block, part[0], part[1]);
            continue;
        }
        hpack_put_int(&block, 0x40, 6, 0);
        for (int i = 0; i < 2; i++) {
            struct buf coded = { 0 };
            put_huffman(&coded, part[i]);
            hpack_put_int(&block, 0x80, 7, coded.len);
            buf_put(&block, coded.p, coded.len);
            buf_free(&coded);
        }
    }
    struct hpack_reader r = { .huffman = &core.huffman, .scratch = scratch, .list_limit = 1 << 20, .field = list_add,
                              .arg = &back };
    MUST(hpack_decode(&h, whole(&block), &r) == HPACK_OK && !r.too_large);
    MUST(bytes_eq(whole(&back.text), whole(&list->text)) && back.n == list->n);
    MUST(huffman || h.count == 0);
    buf_free(&block);
    buf_free(&back.text);
    hpack_free(&h);
}

/* A byte for the limit of the list, then field blocks, each with its length in two bytes. */
static void fuzz_hpack(struct input *in)
{
    static uint8_t scratch[HPACK_SCRATCH(MAX_HEADER_LIST)];
    struct hpack h;
    size_t limit = take8(in) & 1 ? 100 : MAX_HEADER_LIST;
    run_begin();
    hpack_init(&h);
    for (enum hpack_error e = HPACK_OK; in->n && e == HPACK_OK;) {
        struct field_list list = { 0 };
        uint8_t *copy = NULL;
        struct bytes block = take(in, take16(in));
        if (block.n)
            copy = memcpy((malloc)(block.n), block.p, block.n);
        struct hpack_reader r = { .huffman = &core.huffman, .scratch = scratch, .list_limit = limit, .field = list_add,
                                  .arg = &list };
        e = hpack_decode(&h, (struct bytes){ copy, block.n }, &r);
        seen.hpack[e] = true;
        MUST(list.size <= limit && h.max <= HPACK_TABLE_SIZE && h.cap <= HPACK_TABLE_SIZE && h.len <= h.cap);
        MUST(h.len + h.count * HPACK_SAVED <= h.max);
        size_t size = 0;
        for (uint32_t i = 1; i <= h.count; i++) {
            struct bytes name, value;
            MUST(hpack_lookup(&h, HPACK_STATIC + i, &name, &value));
            size += name.n + value.n + HPACK_OVERHEAD;
        }
        MUST(size == h.len + h.count * HPACK_SAVED);
        check_fields_again(&list, false);
        check_fields_again(&list, true);
        buf_free(&list.text);
        (free)(copy);
    }
    hpack_free(&h);
}

/* ---- HTTP/1 ---- */
static void http1_check(void *arg, struct bytes name, struct bytes value)
{
    struct bytes *head = arg;
    const uint8_t *end = head->p + head->n;
    MUST(name.n && name.p >= head->p && name.p + name.n < value.p && value.p + value.n < end);
    for (size_t i = 0; i < name.n; i++)
        MUST(name.p[i] > ' ' && name.p[i] < 0x7f && name.p[i] != ':' && (name.p[i] < 'A' || name.p[i] > 'Z'));
    MUST(field_value_ok(value));
}

/* Request heads, one behind the other; what is found does not hang on how the input is cut. */
static void fuzz_http1(struct input *in)
{
    run_begin();
    for (int n = 1; n > 0 && in->n;) {
        struct http1_head h;
        n = http1_head_len((struct bytes){ in->p, in->n });
        MUST(n == HTTP1_BAD || (n >= 0 && (size_t)n <= in->n && n <= HTTP1_HEAD_MAX && n != 1));
        for (size_t cut = 0; cut < in->n && cut < 300; cut++) {
            int shorter = http1_head_len((struct bytes){ in->p, cut });
            MUST(shorter == 0 || shorter == n);
        }
        if (n <= 2) {
            take(in, 2);
            continue;
        }
        uint8_t *copy = memcpy((malloc)((size_t)n), in->p, (size_t)n);
        unsigned status = http1_parse(copy, (size_t)n, &h, http1_check, &(struct bytes){ copy, (size_t)n });
        MUST(status == 0 || status == 400 || status == 431 || status == 505);
        MUST(status || (http1_token(h.method) && h.target.n && h.fields <= HTTP1_FIELDS_MAX && h.lengths <= 1));
        MUST(status || h.hosts == 1 || (h.http10 && h.hosts == 0));
        (free)(copy);
        take(in, (size_t)n);
    }
}

/* ---- Reflection ---- */

/* The messages of stream 1 in what has been sent: each is a response, and holds what it says it holds. */
static void check_reflection(struct bytes data)
{
    for (struct input in = { data.p, data.n }; in.n;) {
        struct ServerReflectionResponse res = { 0 };
        bool unknown;
        struct bytes head = take(&in, 5);
        if (head.n < 5)
            return;
        struct bytes wire = take(&in, get_be32(head.p + 1));
        pb_arena_reset(&arena);
        if (wire.n < get_be32(head.p + 1))
            return;
        MUST(pb_decode(&ServerReflectionResponse_message, &res, wire, &arena, &unknown) == PB_OK && !unknown);
        MUST(res.original_request && bytes_eq(res.valid_host, res.original_request->host));
        MUST(!res.file_descriptor_response + !res.list_services_response + !res.all_extension_numbers_response +
             !res.error_response == 3);
        MUST(!res.file_descriptor_response || res.file_descriptor_response->file_descriptor_proto.n > 0);
    }
}

/* A byte for the version, then messages, each with its length in two bytes: a call from beginning to end. */
static void fuzz_reflection(struct input *in)
{
    struct op_record op = { 'q', (uint8_t)(4 + (take8(in) & 1)), 0, 1, { NULL, 0 } };
    loop_begin();
    st = (struct run_state){ .role = SERVER };
    server_begin(0, 0, 0);
    op_run(&(struct op_record){ 'r', 0, 0, 0, BYTES(preface) });
    op_run(&(struct op_record){ 'f', FRAME_SETTINGS, 0, 0, { NULL, 0 } });
    op_run(&(struct op_record){ 'f', FRAME_WINDOW_UPDATE, 0, 0, BYTES("\x3f\xff\0\0") });
    op_run(&(struct op_record){ 'f', FRAME_SETTINGS, 0, 0, BYTES("\0\4\x3f\xff\0\0") });
    op_run(&op);
    while (in->n)
        op_run(&(struct op_record){ 'M', 0, 0, 1, take(in, take16(in)) });
    op_run(&(struct op_record){ 'F', FRAME_DATA, END_STREAM, 1, { NULL, 0 } });
    MUST(wires[0].stream[1] != 0);    /* the call has ended */
    check_reflection(whole(&wires[0].data));
    server_silence();
    loop_end();
    manifest_free(&st.server.manifest);
    verdict_free(&st.server.verdict);
}

/* ---- PEM, DER ---- */
static char *text_of(struct bytes b)
{
    char *s = (malloc)(b.n + 1);
    MUST(s != NULL);
    if (b.n)
        memcpy(s, b.p, b.n);
    s[b.n] = 0;
    return s;
}

/* Three texts, parted by NUL: a certificate, a key, authorities.  One that is empty is replaced by a good one.  The
 * first is taken for a public key as well. */
static void fuzz_pem(struct input *in)
{
    struct err e;
    struct buf der = { 0 };
    struct bytes part[3];
    char *text[3];
    run_begin();
    for (int i = 0; i < 3; i++)
        text[i] = text_of(part[i] = take_until(in, 0));
    files[2].content = part[0];
    if (public_key_load("data", &der, &e))
        MUST(der_is_spki(whole(&der)));
    else
        MUST(*e.text != 0);
    buf_free(&der);
    struct tls_options o = {
        .cert = { "cert", *text[0] ? text[0] : server_pem }, .key = { "key", *text[1] ? text[1] : server_key },
        .client_ca = { "ca", *text[2] ? text[2] : NULL }, .client_san = *text[2] ? "client" : NULL,
    };
    struct tls_config *c = tls_server_config(&o, 1800000000, &e);
    MUST(c || *e.text);
    if (c)
        tls_config_free(c);
    for (int i = 0; i < 3; i++)
        (free)(text[i]);
}

/* DER in all that reads it: a certificate, a private key, a public key. */
static void fuzz_der(struct input *in)
{
    static struct cert c;
    br_skey_decoder_context key;
    struct tls_source source = { "key", "path" };
    struct bytes der = { in->p, in->n };
    struct buf text = { 0 };
    struct err e;
    run_begin();
    int error = cert_decode(&c, der);
    dn_text(&text, c.subject);
    MUST(text.len && text.len <= TLS_SUBJECT_MAX + 20 && bytes_printable((struct bytes){ text.p, text.len - 1 }));
    cert_allows(c.extensions, false);
    cert_has_name(c.extensions, "agent.example");
    cert_has_name(c.extensions, "127.0.0.1");
    if (!error) {
        char date[32];
        br_x509_trust_anchor a;
        date_text(date, c.not_before);
        date_text(date, c.not_after);
        if (anchor_make(&a, &c))
            free(a.dn.data);
    }
    if (key_decode(&key, &source, der, &e) && !error)
        key_fits(&key, c.pkey);
    MUST(!der_is_spki(der) || !der_is_pkcs1_public(der));
    buf_free(&text);
}

/* ---- The command line, and manifests ---- */

/* What an agent would make of the stream: the chunks joined are the request. */
static void check_manifest_stream(const struct manifest *m)
{
    struct buf joined = { 0 }, wire = { 0 };
    bool last = false;
    for (struct input in = { m->stream->p, m->stream->n }; in.n;) {
        struct ServerStreamMessage msg = { 0 };
        bool unknown;
        struct bytes head = take(&in, 5);
        MUST(head.n == 5 && !last);
        pb_arena_reset(&arena);
        MUST(pb_decode(&ServerStreamMessage_message, &msg, take(&in, get_be32(head.p + 1)), &arena, &unknown) == PB_OK);
        MUST(msg.runReqChunks && bytes_eq(msg.runReqChunks->id, m->req.id) && msg.runReqChunks->data.n <= CHUNK_LEN);
        buf_put(&joined, msg.runReqChunks->data.p, msg.runReqChunks->data.n);
        last = msg.runReqChunks->is_last;
    }
    MUST(last && bytes_eq(whole(&joined), pb_encode(&wire, &ComputationRunReq_message, &m->req)));
    buf_free(&joined);
    buf_free(&wire);
}

static void cli_serve(struct options *o, struct mistakes *r)
{
    struct server v = { .o = o };
    bool good = server_check(&v, o, r) && manifest_finish(&v.manifest, r);
    MUST(good == !(r->usage || r->start));
    MUST(!good || v.manifest.stream);
    for (const struct manifest *m = &v.manifest; good && m; m = m->next)
        if (!o->fault.n)
            check_manifest_stream(m);
    verdict_start(&v.verdict, o, NOW);
    manifest_free(&v.manifest);
    verdict_free(&v.verdict);
    if (v.tls)
        tls_config_free(v.tls);
}

/* Words, one a line; NAME=VALUE with @ in front is a variable.  Files that exist: key.pem, in.json, data. */
static void fuzz_cli(struct input *in)
{
    enum { WORDS = 60 };
    char *words[WORDS], *kept[WORDS];
    size_t n = 0, env = 0, lines = 0;
    struct options o = { .command = CMD_SERVE };
    struct mistakes r = { 0 };
    int status;
    run_begin();
    while (in->n && lines < WORDS) {
        char *word = kept[lines++] = text_of(take_until(in, '\n'));
        if (*word == '@' && env < PB_COUNT(variables))
            variables[env++] = word + 1;
        else
            words[n++] = word;
    }
    o.arena.limit = SIZE_MAX / 2;
    size_t at = 0;
    for (size_t i = 0; n && i < COMMANDS; i++)
        if (strcmp(words[0], command_table[i].name) == 0) {
            o.command = command_table[i].command;
            at = 1;
        }
    options_parse(&r, &o, words + at, n - at);
    if (o.command & BOTH && !positional_form(&o, &r, o.flagged))
        MUST(r.usage);
    else if (o.command == CMD_SERVE)
        cli_serve(&o, &r);
    else if (o.command == CMD_CHECKSUM)
        MUST(run(&o, &r) >= 0);
    else if (o.command == CMD_MANIFEST)
        status = cmd_manifest(&o, &r), MUST((status == 0) == !(r.usage || r.start));
    else if (!r.usage) {
        struct tls_config *c = NULL;
        struct address where;
        client_address(&o, &r, &where);
        o.wait_ms = 0;
        MUST(r.usage || !client_resolve(&o, &r, &where));
        if (!r.usage && client_tls(&o, &r, where.host, &c) && c)
            tls_config_free(c);
    }
    check_text_safe(whole(&noted), false);
    if (o.command != CMD_CHECKSUM)    /* which prints a file's name as it is */
        check_text_safe(whole(&printed), false);
    pb_arena_free(&o.arena);
    for (size_t i = 0; i < lines; i++)
        (free)(kept[i]);
}

/* JSON as `-manifest` gets it, then as `cvms agent -replay` does. */
static void fuzz_manifest(struct input *in)
{
    char *words[] = { (char[]){ "-manifest" }, (char[]){ "in.json" }, (char[]){ "-algo-path" }, (char[]){ "data" } };
    struct options o = { .command = CMD_SERVE };
    struct mistakes r = { 0 };
    struct replay replay = { .c.o = &o };
    run_begin();
    files[1].content = (struct bytes){ in->p, in->n };
    o.arena.limit = SIZE_MAX / 2;
    options_parse(&r, &o, words, PB_COUNT(words));
    cli_serve(&o, &r);
    o.replay = "in.json";
    bool good = replay_load(&replay, &o, &r);
    MUST(good || r.start);
    check_text_safe(whole(&noted), false);
    pb_arena_free(&o.arena);
}

/* ---- Targets ---- */
static const struct target {
    const char *name;
    void (*run)(struct input *);
    bool ops;                         /* the input is operations behind four bytes of options */
} targets[] = {
    { "server", fuzz_server, true }, { "client", fuzz_client, true }, { "tls-server", fuzz_tls_server, true },
    { "tls-client", fuzz_tls_client, true }, { "hpack", fuzz_hpack, false }, { "http1", fuzz_http1, false }, { "protobuf", fuzz_protobuf, false },
    { "json", fuzz_json, false }, { "reflection", fuzz_reflection, false }, { "pem", fuzz_pem, false },
    { "der", fuzz_der, false }, { "cli", fuzz_cli, false }, { "manifest", fuzz_manifest, false },
};

static const struct target *target;

static const struct target *target_named(const char *name)
{
    for (size_t i = 0; i < PB_COUNT(targets); i++)
        if (name && strcmp(targets[i].name, name) == 0)
            return &targets[i];
    return NULL;
}

/* Made once: what runs have in common. */
static void fuzz_init(void)
{
    huffman_init(&core.huffman);
    arena.limit = 512 << 20;
    for (int i = 0; i < 4; i++)
        tls_config_free(config_of(i & 2, i & 1));
}

/* One input, in memory that ends where it does. */
static void fuzz_one(const struct target *t, const uint8_t *p, size_t n)
{
    uint8_t *copy = (malloc)(n ? n : 1);
    MUST(copy != NULL);
    if (n)
        memcpy(copy, p, n);
    struct input in = { copy, n };
    t->run(&in);
    (free)(copy);
}

#ifndef FUZZ_REPLAY
int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n);
size_t LLVMFuzzerMutate(uint8_t *p, size_t n, size_t max);
size_t LLVMFuzzerCustomMutator(uint8_t *p, size_t n, size_t max, unsigned seed);

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    target = target_named((getenv)("FUZZ_TARGET"));
    if (!target) {
        fprintf(stderr, "set FUZZ_TARGET to one of:");
        for (size_t i = 0; i < PB_COUNT(targets); i++)
            fprintf(stderr, " %s", targets[i].name);
        fprintf(stderr, "\n");
        exit(2);
    }
    fuzz_init();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n)
{
    fuzz_one(target, p, n);
    return 0;
}

#ifdef FUZZ_MUTATOR
/* Operations stay operations: one is changed inside, copied, moved or dropped; its length keeps agreeing. */
size_t LLVMFuzzerCustomMutator(uint8_t *p, size_t n, size_t max, unsigned seed)
{
    enum { OPS = 400, OPTIONS_LEN = 4, GROW = 64 };
    static const char letters[] = "FRMQOLCDTEZPWSXNYVfrmqo";
    struct { size_t at, len; } op[OPS];
    size_t count = 0;
    if (!target->ops || seed % 8 == 0 || n < OPTIONS_LEN + OP_HEAD)
        return LLVMFuzzerMutate(p, n, max);
    for (size_t at = OPTIONS_LEN; at + OP_HEAD <= n && count < OPS; count++) {
        size_t len = OP_HEAD + ((size_t)p[at + 4] << 8 | p[at + 5]);
        op[count].at = at;
        op[count].len = min_size(len, n - at);
        at += op[count].len;
    }
    seed /= 8;
    size_t i = seed / 16 % count, at = op[i].at, len = op[i].len, rest = n - at - len;
    size_t j = op[seed / 4096 % count].at;
    uint8_t copy[OP_HEAD + 0xffff];
    memcpy(copy, p + at, len);
    switch (seed % 16) {
    case 0:                           /* drop */
        memmove(p + at, p + at + len, rest);
        return n - len;
    case 1: case 2:                   /* copy to another place */
        if (n + len > max)
            return n;
        memmove(p + j + len, p + j, n - j);
        memcpy(p + j, copy, len);
        return n + len;
    case 3:
        p[at] = (uint8_t)letters[seed / 64 % (sizeof letters - 1)];
        return n;
    case 4: case 5: case 6:
        LLVMFuzzerMutate(p + at + 1, 3, 3);
        return n;
    case 7:                           /* a new one */
        if (n + OP_HEAD > max)
            return n;
        memmove(p + at + OP_HEAD, p + at, n - at);
        memset(p + at, 0, OP_HEAD);
        p[at] = (uint8_t)letters[seed / 64 % (sizeof letters - 1)];
        return n + OP_HEAD;
    case 8:
        LLVMFuzzerMutate(p, OPTIONS_LEN, OPTIONS_LEN);
        return n;
    default:;                         /* the payload */
        size_t room = min_size(min_size(len + GROW, sizeof copy), len + max - n), was = len - OP_HEAD;
        if (room == OP_HEAD)
            return n;
        size_t now = LLVMFuzzerMutate(copy + OP_HEAD, was, room - OP_HEAD);
        memmove(p + at + OP_HEAD + now, p + at + len, rest);
        memcpy(p + at, copy, OP_HEAD + now);
        p[at + 4] = (uint8_t)(now >> 8);
        p[at + 5] = (uint8_t)now;
        return n - was + now;
    }
}
#endif

#else
static struct buf file_read_whole(const char *path)
{
    struct buf b = { 0 };
    FILE *f = fopen(path, "rb");
    MUST(f != NULL);
    for (size_t n; buf_room(&b, 65536) && (n = fread(b.p + b.len, 1, 65536, f)) != 0;)
        b.len += n;
    fclose(f);
    return b;
}

/* An input of the corpus; where it came from is what a crash is known by. */
static void replay(const struct target *t, const char *where, struct bytes b)
{
    struct timespec from, to;
    running = where;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &from);
    fuzz_one(t, b.p, b.n);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &to);
    double ms = (double)(to.tv_sec - from.tv_sec) * 1e3 + (double)(to.tv_nsec - from.tv_nsec) / 1e6;
    if (ms > 500)
        printf("slow: %s: %.0f ms\n", where, ms);
    passed++;
}

/* Above PAUSE_BYTES nothing more is read in the same turn either: one message may have become twenty times its size. */
static void check_pause(void)
{
    loop_begin();
    st = (struct run_state){ .role = SERVER };
    server_begin(0, 0, 0);
    stdout_blocked = true;
    for (size_t n = PAUSE_BYTES - 1; n <= PAUSE_BYTES + 1; n++) {
        struct wire *w = &wires[0];
        loop.core.out.len = 0;
        buf_room(&loop.core.out, n);
        loop.core.out.len = n;
        buf_puts(&w->in, "P");
        link_ready(&loop, &loop.links->watch, WATCH_IN);
        CHECK(w->in_at == w->in.len, n <= PAUSE_BYTES);
    }
    loop.core.out.len = 0;
    errno = EMFILE;                   /* without a descriptor the listeners rest for a second, and the loop with them */
    accept_error(&loop);
    loop_deadlines(&loop);
    CHECK(loop.accept_ms, loop.core.now_ms + 1000);
    loop.core.now_ms += 1000;
    loop_deadlines(&loop);
    CHECK(loop.accept_ms, INT64_MAX);
    server_silence();
    loop_end();
    manifest_free(&st.server.manifest);
    verdict_free(&st.server.verdict);
}

/* A server that sends chunks for ever does not fill the memory of `cvms agent`. */
static void check_endless_manifest(void)
{
    const struct RunReqChunks chunk = { .id = BYTES("1"), .data = BYTES("more") };
    struct agent *a = &st.agent;
    loop_begin();
    st = (struct run_state){ .role = AGENT_CLIENT };
    client_begin(4);
    a->manifest = (struct buf){ .p = (malloc)((size_t)MANIFEST_FILE_MAX + 8), .cap = (size_t)MANIFEST_FILE_MAX + 8 };
    a->manifest.len = MANIFEST_FILE_MAX - 4;
    agent_chunk(a, &chunk);
    CHECK(loop.stop_why != NULL, false);
    agent_chunk(a, &chunk);
    CHECK(loop.stop_why != NULL, true);
    CHECK(a->manifest.len, MANIFEST_FILE_MAX + 4);
    loop_end();
    pb_arena_free(&a->arena);
    buf_free(&a->manifest);
    buf_free(&a->id);
    pb_arena_free(&st.options.arena);
}

/* Every frame type has come, every error has gone out, every verdict on a message has been given. */
static void check_seen(void)
{
    static const enum h2_error not_ours[] = { SETTINGS_TIMEOUT, CONNECT_ERROR, INADEQUATE_SECURITY, HTTP_1_1_REQUIRED };
    for (int i = 0; i < FRAME_TYPES; i++)
        if (!CHECK(seen.frame[i], true))
            printf("no input with a frame of type %s\n", frame_rules[i].name);
    for (int i = 0; i < H2_ERRORS; i++) {
        bool ours = true;
        for (size_t k = 0; k < PB_COUNT(not_ours); k++)
            ours &= (int)not_ours[k] != i;
        if (!CHECK(seen.goaway[i] || seen.reset[i], ours))
            printf("%s is seen by: %d\n", h2_error_names[i], seen.goaway[i] || seen.reset[i]);
    }
    for (int i = 0; i <= PB_LIMIT; i++)
        if (!CHECK(seen.protobuf[i], true))
            printf("no message that is: %s\n", pb_error_text[i]);
    CHECK(seen.hpack[HPACK_OK] && seen.hpack[HPACK_COMPRESSION_ERROR] && seen.hpack[HPACK_TOO_MANY], true);
}

/* The inputs of TARGET.txt: base64, one a line; the others are comments. */
static void replay_corpus(const struct target *t, const char *folder)
{
    char path[1000], name[1100];
    snprintf(path, sizeof path, "%s/%s.txt", folder, t->name);
    struct buf text = file_read_whole(path), in = { 0 };
    struct input lines = { text.p, text.len };
    long before = passed;
    for (int n = 1; lines.n; n++) {
        struct bytes line = take_until(&lines, '\n');
        struct base64 base64 = { 0 };
        if (bytes_start(line, "#"))
            continue;
        in.len = 0;
        base64_line(&base64, line, &in);
        MUST(!base64.bad && base64.count % 4 == 0);
        snprintf(name, sizeof name, "%s:%d", path, n);
        replay(t, name, whole(&in));
    }
    CHECK(passed > before, true);
    buf_free(&text);
    buf_free(&in);
}

#include "seeds.h"

int main(int argc, char **argv)
{
    verbose = getenv("FUZZ_VERBOSE") && setvbuf(stdout, NULL, _IOLBF, 0) == 0;
    fuzz_init();
    if (argc == 3 && strcmp(argv[1], "seeds") == 0)
        return write_seeds(argv[2]);
    if (argc == 3 && strcmp(argv[1], "dict") == 0)
        return write_dictionary(argv[2]);
    target = argc > 2 ? target_named(argv[1]) : NULL;
    if (argc < 2 || (argc > 2 && !target)) {
        fprintf(stderr, "usage: fuzz-replay CORPUS | TARGET FILE... | seeds DIR | dict TARGET\n");
        return 2;
    }
    for (int i = 2; i < argc; i++) {
        struct buf b = file_read_whole(argv[i]);
        replay(target, argv[i], whole(&b));
        buf_free(&b);
    }
    for (size_t i = 0; i < PB_COUNT(targets) && argc == 2; i++)
        replay_corpus(&targets[i], argv[1]);
    if (argc == 2) {
        check_seen();
        check_pause();
        check_endless_manifest();
    }
    for (int i = 0; i < 4; i++)
        tls_config_free(configs[i]);
    return closing();
}
#endif
