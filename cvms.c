/* cvms.c: a CVMS server for Cocos agents, in one file.
 *
 * An agent in a confidential VM opens a gRPC stream, cvms.Service/Process, gets the computation manifest over it, and
 * sends back its attestation report, logs and events.  This program is the server's side of that, with its own HTTP/2
 * (RFC 9113), HPACK (RFC 7541) and gRPC framing, and nothing but libc behind it.
 *
 *   socket --read--> conn_recv --frames--> streams --DATA--> grpc_data --messages--> a service --lines--> stdout
 *   socket <--send-- conn_peek <--frames-- streams <--blobs-- grpc_send <--messages-- a service
 *
 * The sections stand bottom up.  3 to 9 hold no descriptor, read no clock and never block.  The event loop, section 10,
 * owns every socket; 11 to 18 are what this server does with the bytes.
 *
 *    1  this map, includes, beyond POSIX         11  message tables
 *    2  base: bytes, safe text, whole files      12  options: one table for every command
 *    3  HPACK                                    13  inputs: checksums, sealed sources
 *    4  frames; heads of HTTP/1                  14  keys of users
 *    5  PEM and DER                              15  the manifest
 *    6  streams and flow control                 16  the verdict of a smoke test
 *    7  connections                              17  delivery: uploads and results
 *    8  gRPC                                     18  services; how messages are shown
 *    9  TLS                                      19  control: commands on stdin
 *   10  event loop                               20  the client commands: stand-in agent, health
 *                                                21  the server command, main
 *
 * Beside it: proto_wire.h (byte strings, buffers, the protobuf codec) and sha3.h (SHA3-256).
 */
#ifndef CVMS_PORTABLE
#define CVMS_PORTABLE 0               /* 1: nothing beyond ISO C and POSIX.1-2008 with XSI, whatever the system has */
#endif
#define _FILE_OFFSET_BITS 64          /* files over 2 GiB, and any inode, on 32-bit systems too; times past 2038 */
#define _TIME_BITS 64
#define _DARWIN_C_SOURCE              /* macOS and NetBSD hide names of POSIX from those who ask for POSIX alone */
#define _NETBSD_SOURCE
#if CVMS_PORTABLE
#define _XOPEN_SOURCE 700
#define SHA3_X86 0
#elif !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
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
#include <stdio.h>
#include <strings.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#ifndef CVMS_TLS
#define CVMS_TLS 1                    /* 0: without BearSSL */
#endif
#ifndef CVMS_TLS_POOL
#define CVMS_TLS_POOL 1               /* 0: no field that BearSSL calls internal is used; 32 KiB more a connection */
#endif
#if CVMS_TLS
#include <bearssl.h>
#endif

#include "proto_wire.h"
#include "sha3.h"

#define CVMS_VERSION "0.1.0"

enum {
    CLIENT_MAX_MESSAGE = 2 << 20,     /* cvms health */
};

/* ---- Beyond ISO C and POSIX.1-2008: all that the program takes of it, beside what does without ---- */

#if defined(__linux__) && defined(__GNUC__) && !CVMS_PORTABLE /* struct epoll_event is packed by a GNU attribute */
#define CVMS_LINUX 1
#include <sys/epoll.h>
#else
#define CVMS_LINUX 0
#endif
#if defined(__APPLE__)
#include <sys/random.h>
#define st_mtim st_mtimespec
#define st_ctim st_ctimespec
#endif
extern char **environ;                /* of POSIX, but in none of its headers */

/* Fills p with up to 256 bytes of the kernel's randomness.  False: errno tells why. */
static bool random_fill(void *p, size_t n)
{
#if CVMS_PORTABLE
    int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    bool ok = fd >= 0 && read(fd, p, n) == (ssize_t)n;
    if (fd >= 0)
        close(fd);
    return ok;
#else
    return getentropy(p, n) == 0;
#endif
}

/* A descriptor that does not block, and that no other program inherits. */
static bool fd_prepare(int fd)
{
    int flags = fcntl(fd, F_GETFL);
    return flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0 && fcntl(fd, F_SETFD, FD_CLOEXEC) == 0;
}

static int accept_nonblocking(int fd, struct sockaddr_storage *sa, socklen_t *len)
{
#if CVMS_LINUX
    return accept4(fd, (struct sockaddr *)sa, len, SOCK_NONBLOCK | SOCK_CLOEXEC);
#else
    int on = 1, s = accept(fd, (struct sockaddr *)sa, len);
    if (s >= 0 && !fd_prepare(s)) {
        close(s);
        return -1;
    }
    if (s >= 0)
        setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return s;
#endif
}

enum { WATCH_IN = POLLIN, WATCH_OUT = POLLOUT, WATCH_ERROR = POLLERR | POLLHUP | POLLNVAL };

struct loop;
struct watch {
    int fd;
    unsigned interest;                /* 0: not registered */
    void (*ready)(struct loop *, struct watch *, unsigned events);
    size_t index;                     /* poll: where it stands in the list */
};

static void loop_clock(struct loop *l);  /* to be called after each wait */

#if CVMS_LINUX
_Static_assert(EPOLLIN == POLLIN && EPOLLOUT == POLLOUT && EPOLLERR == POLLERR && EPOLLHUP == POLLHUP, "one set");

struct poller {
    int epoll;
};

static bool poller_init(struct poller *p)
{
    p->epoll = epoll_create1(EPOLL_CLOEXEC);
    return p->epoll >= 0;
}

/* Sets what a watch waits for; 0 takes it out.  False: the descriptor can't be waited for (a regular file). */
static bool poller_set(struct poller *p, struct watch *w, unsigned interest)
{
    if (w->interest == interest)
        return true;
    struct epoll_event e = { .events = interest, .data.ptr = w };
    int op = !interest ? EPOLL_CTL_DEL : w->interest ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    if (epoll_ctl(p->epoll, op, w->fd, &e) != 0 && interest)
        return false;
    w->interest = interest;
    return true;
}

/* Waits up to timeout_ms (-1: for ever) and calls what is ready. */
static void poller_wait(struct poller *p, struct loop *l, int timeout_ms)
{
    struct epoll_event e[64];
    int n = epoll_wait(p->epoll, e, 64, timeout_ms);
    loop_clock(l);
    for (int i = 0; i < n; i++) {
        struct watch *w = e[i].data.ptr;
        if (w->interest)
            w->ready(l, w, e[i].events);
    }
}

static void poller_free(struct poller *p)
{
    close(p->epoll);
}
#else
struct poller {
    struct pollfd *polls;
    struct watch **watches;
    size_t count, cap;
};

static bool poller_init(struct poller *p)
{
    (void)p;
    return true;
}

static bool poller_grow(struct poller *p)
{
    size_t cap = p->cap ? 2 * p->cap : 16;
    struct pollfd *polls = realloc(p->polls, cap * sizeof *polls);
    struct watch **w = polls ? realloc(p->watches, cap * sizeof *w) : NULL;
    p->polls = polls ? polls : p->polls;
    if (!w)
        return false;
    p->watches = w;
    p->cap = cap;
    return true;
}

static bool poller_set(struct poller *p, struct watch *w, unsigned interest)
{
    if (!w->interest && interest) {
        if (p->count == p->cap && !poller_grow(p))
            return false;
        w->index = p->count++;
        p->watches[w->index] = w;
    } else if (w->interest && !interest) {
        struct watch *last = p->watches[--p->count];
        p->watches[w->index] = last;
        p->polls[w->index] = p->polls[p->count];
        last->index = w->index;
    }
    if (interest)
        p->polls[w->index] = (struct pollfd){ .fd = w->fd, .events = (short)interest };
    w->interest = interest;
    return true;
}

static void poller_wait(struct poller *p, struct loop *l, int timeout_ms)
{
    int n = poll(p->polls, (nfds_t)p->count, timeout_ms);
    loop_clock(l);
    for (size_t i = p->count; n > 0 && i-- > 0;) {
        if (i >= p->count)
            continue;
        unsigned events = (unsigned short)p->polls[i].revents;
        p->polls[i].revents = 0;
        if (events)
            p->watches[i]->ready(l, p->watches[i], events);
    }
}

static void poller_free(struct poller *p)
{
    free(p->polls);
    free(p->watches);
}
#endif

/* ==== 2. Base: bytes, safe text, lines for the user, whole files ===================================================
 * Owns: one-line error texts, numbers in bytes, the one function that makes foreign text safe to show, what is told on
 * stderr before the loop runs, whole small files.  Byte strings and buffers stand in proto_wire.h.
 * Never: knows a protocol.
 */

/* One clear line for the user: what is wrong and what to do, without a newline.  Empty means no error. */
struct err {
    char text[1600];
};

#if defined(__GNUC__)
#define MUST_USE __attribute__((warn_unused_result))
#else
#define MUST_USE
#endif

enum { TOLD_MS = 5000 };              /* so long a line for the user waits for a reader of stderr */

/* Writes all n bytes; where a descriptor takes no more, waits up to wait_ms for each piece (-1: for ever).  False: errno
 * tells why. */
static bool fd_write(int fd, const void *p, size_t n, int wait_ms)
{
    while (n) {
        struct pollfd w = { .fd = fd, .events = POLLOUT };
        int ready = wait_ms < 0 ? 1 : poll(&w, 1, wait_ms);
        ssize_t k = ready > 0 ? write(fd, p, wait_ms < 0 || n < PIPE_BUF ? n : PIPE_BUF) : ready;
        if (ready == 0)
            errno = ETIMEDOUT;
        if (k < 0 && errno == EAGAIN)
            poll(&w, 1, wait_ms);
        else if (ready == 0 || (k < 0 && errno != EINTR))
            return false;
        p = (const uint8_t *)p + (k > 0 ? k : 0);
        n -= k > 0 ? (size_t)k : 0;
    }
    return true;
}

/* Closes a descriptor of no use; errno still tells why.  Returns -1. */
static int fd_drop(int fd)
{
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

/* Writes a buffer and frees it.  False: errno tells why. */
static bool buf_write(struct buf *b, int fd)
{
    bool failed = b->failed, ok = !failed && fd_write(fd, b->p, b->len, -1);
    int error = failed ? ENOMEM : errno;
    buf_free(b);
    errno = error;
    return ok;
}

/* What a variadic function has got behind fmt, as text in an array, at whose end it is cut. */
#define TEXT_REST(to, fmt) \
    do { \
        va_list rest; \
        va_start(rest, fmt); \
        text_vprintf(to, sizeof(to), fmt, rest); \
        va_end(rest); \
    } while (0)

/* Sets the text and returns false, so that a function can end with `return err_set(...)`. */
PRINTF_LIKE(2, 3) static bool err_set(struct err *e, const char *fmt, ...)
{
    TEXT_REST(e->text, fmt);
    return false;
}

/* What stands behind the first place of `what`; p is NULL where there is none.  Nothing is found at the start. */
static struct bytes bytes_behind(struct bytes in, struct bytes what)
{
    if (what.n == 0)
        return in.p ? in : BYTES("");
    while (in.n >= what.n) {
        const uint8_t *at = memchr(in.p, what.p[0], in.n - what.n + 1);
        if (!at)
            break;
        in.n -= (size_t)(at + 1 - in.p);
        in.p = at + 1;
        if (memcmp(at, what.p, what.n) == 0)
            return (struct bytes){ at + what.n, in.n - (what.n - 1) };
    }
    return (struct bytes){ 0 };
}

static bool bytes_contain(struct bytes in, const char *what)
{
    return bytes_behind(in, bytes_of(what)).p != NULL;
}

/* The same with * for any run of bytes. */
static bool bytes_match(struct bytes in, const char *what)
{
    for (bool more = true; more; what++) {
        size_t n = strcspn(what, "*");
        in = bytes_behind(in, (struct bytes){ (const uint8_t *)what, n });
        what += n;
        more = *what && in.p;
    }
    return in.p != NULL;
}

/* The row of a table that has this name as its first member; the table's length if none has. */
static size_t row_find(const void *table, size_t n, size_t size, struct bytes name)
{
    size_t i = 0;
    while (i < n && !bytes_eq(name, bytes_of(*(const char *const *)(const void *)((const char *)table + i * size))))
        i++;
    return i;
}
#define ROW_FIND(table, name) row_find(table, PB_COUNT(table), sizeof *(table), name)

/* Milliseconds as seconds, for a printf-like function. */
#define SECONDS "%lld.%03u"
#define SECONDS_OF(ms) (long long)(ms) / 1000, (unsigned)((ms) % 1000)

/* The same of a number of bytes. */
#define BYTES_FMT "%llu byte%s"
#define PLURAL(n) (n) == 1 ? "" : "s"
#define BYTES_OF(n) (unsigned long long)(n), PLURAL(n)
/* At most so many bytes as text, for %.*s. */
#define TEXT_OF(b, max) (int)min_size((b).n, max), (const char *)(b).p

/* Lower-case hex, with its end. */
static void hex_text(char *to, const uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        text_printf(to + 2 * i, 3, "%02x", p[i]);
}

static uint32_t get_be32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static void put_be32(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)(v >> 24);
    p[1] = (uint8_t)(v >> 16);
    p[2] = (uint8_t)(v >> 8);
    p[3] = (uint8_t)v;
}

static bool present(const char *s)
{
    return s && *s;
}

static size_t min_size(size_t a, size_t b)
{
    return a < b ? a : b;
}

static int64_t earlier(int64_t a_ms, int64_t b_ms)
{
    return a_ms < b_ms ? a_ms : b_ms;
}

/* The byte that two hexadecimal digits say; -1 if they are none. */
static int hex_byte(const uint8_t *p)
{
    const char two[3] = { (char)p[0], (char)p[1] };
    return strspn(two, "0123456789abcdefABCDEF") == 2 ? (int)strtoul(two, NULL, 16) : -1;
}

/* Decimal digits only, up to 18 of them; -1 if it is anything else. */
static int64_t parse_decimal(struct bytes b)
{
    uint64_t v;
    size_t n = b.n;
    return n && n <= 18 && pb_digits_take(&b, &v) == n ? (int64_t)v : -1;
}

static bool bytes_printable(struct bytes b)
{
    for (size_t i = 0; i < b.n; i++)
        if (b.p[i] < ' ' || b.p[i] > '~')
            return false;
    return true;
}

static bool bytes_start(struct bytes b, const char *prefix)
{
    size_t n = strlen(prefix);
    return b.n >= n && memcmp(b.p, prefix, n) == 0;
}

static struct bytes bytes_from(struct bytes b, size_t n)
{
    return n ? (struct bytes){ b.p + n, b.n - n } : b;
}

/* put_text without the commands of CI runners. */
static void put_safe(struct buf *out, struct bytes t, const char *indent)
{
    static const char names[] = "\n\r\t", letters[] = "nrt";
    if (indent && t.n && t.p[t.n - 1] == '\n')
        t.n--;
    const uint8_t *p = t.p, *end = t.n ? t.p + t.n : t.p, *plain = p;
    while (p < end) {
        p += pb_plain(p, (size_t)(end - p), false);
        uint32_t c = p < end ? *p : ' ';
        if (c >= ' ' && c <= '~') {
            p += p < end;
            continue;
        }
        size_t n = pb_utf8_char(p, end, &c);
        if (n && !pb_is_unsafe(c)) {
            p += n;
            continue;
        }
        buf_put(out, plain, (size_t)(p - plain));
        const char *name = n && c && c < 0x80 ? strchr(names, (int)c) : NULL;
        if (name && *name == '\n' && indent)
            buf_putc(out, '\n'), buf_puts(out, indent);
        else if (name && *name == '\t' && indent)
            buf_putc(out, '\t');
        else if (name)
            buf_putc(out, '\\'), buf_putc(out, letters[name - names]);
        else
            buf_printf(out, c < 0x80 || n == 0 ? "\\x%02x" : "\\u%04x", n ? (unsigned)c : *p);
        p += n ? n : 1;
        plain = p;
    }
    buf_put(out, plain, (size_t)(p - plain));
}

/* The place of the next "[" that ends ##[, ##vso[ or the like, which CI runners obey wherever they stand; t.n: none. */
static size_t text_command(struct bytes t)
{
    for (size_t at = 0; at < t.n; at++) {
        const uint8_t *found = memchr(t.p + at, '[', t.n - at);
        if (!found)
            break;
        size_t word = at = (size_t)(found - t.p);
        while (word && ((t.p[word - 1] | 0x20) >= 'a' && (t.p[word - 1] | 0x20) <= 'z'))
            word--;
        if (word >= 2 && t.p[word - 1] == '#' && t.p[word - 2] == '#')
            return at;
    }
    return t.n;
}

/* Appends foreign text so that neither a terminal nor a CI runner can be fooled: control characters, escapes,
 * bidirectional overrides and bytes that are not UTF-8 appear as \t, \x1b, \u202e, and ##[ as ##\x5b.  With indent, a
 * newline in the text starts a new line that begins with it, one newline at the very end is dropped, and a tab is a tab;
 * without, they appear as \n and \t. */
static void put_text(struct buf *out, struct bytes t, const char *indent)
{
    for (size_t n; (n = text_command(t)) < t.n; t = (struct bytes){ t.p + n + 1, t.n - n - 1 }) {
        put_safe(out, (struct bytes){ t.p, n }, indent);
        buf_puts(out, "\\x5b");
    }
    put_safe(out, t, indent);
}

/* A copy of at most max bytes, cut between characters, a NUL shown as a blank, to be freed by the caller.  NULL without
 * memory, which all users take for "unknown". */
static char *text_copy(struct bytes b, size_t max)
{
    size_t n = min_size(b.n, max);
    while (n && n < b.n && (b.p[n] & 0xc0) == 0x80)
        n--;
    char *s = malloc(n + 1);
    for (size_t i = 0; s && i < n; i++)
        s[i] = b.p[i] ? (char)b.p[i] : ' ';
    if (s)
        s[n] = 0;
    return s;
}

/* The same, made safe to show. */
static char *text_safe(struct bytes b)
{
    struct buf safe = { 0 };
    put_text(&safe, b, NULL);
    buf_putc(&safe, 0);
    if (safe.failed)
        buf_free(&safe);
    return (char *)safe.p;
}

/* Mistakes of a user, told together before anything starts. */
struct mistakes {
    bool usage, start, warned;
};

/* A mistake in the words, one in what they name, what may go on, what is no mistake. */
enum severity { USAGE, START, WARNING, NOTE };

static void tell_no_memory(void)
{
    static const char line[] = "cvms: out of memory\n";
    fd_write(STDERR_FILENO, line, sizeof line - 1, TOLD_MS);
}

/* One line on stderr; *r remembers a mistake. */
PRINTF_LIKE(3, 4) static void tell(struct mistakes *r, enum severity kind, const char *fmt, ...)
{
    struct buf text = { 0 }, line = { 0 };
    va_list ap;
    va_start(ap, fmt);
    buf_vprintf(&text, fmt, ap);
    va_end(ap);
    buf_puts(&line, kind == WARNING ? "cvms: warning: " : "cvms: ");
    put_text(&line, (struct bytes){ text.p, text.len }, NULL);
    buf_putc(&line, '\n');
    if (text.failed || line.failed)
        tell_no_memory();
    else
        fd_write(STDERR_FILENO, line.p, line.len, TOLD_MS);
    buf_free(&text);
    buf_free(&line);
    if (!r)
        return;
    r->usage |= kind == USAGE;
    r->start |= kind == START;
    r->warned |= kind == WARNING;
}

/* Before or behind the loop. */
#define tell_note(...) tell(NULL, NOTE, __VA_ARGS__)

/* Several mistakes, a line for each. */
static void tell_lines(struct mistakes *r, enum severity kind, const char *text)
{
    for (size_t n; *text; text += n + (text[n] != 0)) {
        n = strcspn(text, "\n");
        tell(r, kind, "%.*s", (int)n, text);
    }
}

/* p, or the end of the program if there is no memory.  Only before the port opens. */
static void *or_exit(void *p)
{
    if (!p) {
        tell_no_memory();
        exit(1);
    }
    return p;
}

enum { FILE_READ = 16384 };

/* Key material does not outlive its use: the compiler may not drop these writes. */
static void wipe(void *p, size_t n)
{
    for (volatile uint8_t *v = p; n; n--)
        *v++ = 0;
}

static void wipe_buf(struct buf *b)
{
    if (b->p)
        wipe(b->p, b->cap);
    buf_free(b);
}

/* Room for a piece more.  What the old place held may be a key: it is wiped.  No key is so long that it moves, for what
 * copies it would leave it in vector registers. */
static bool file_room(struct buf *b)
{
    struct buf more = { 0 };
    if (b->cap - b->len >= FILE_READ)
        return true;
    if (!buf_room(&more, b->len + 2 * FILE_READ))
        return false;
    buf_put(&more, b->p, b->len);
    wipe_buf(b);
    *b = more;
    return true;
}

/* Reads a whole file, FIFO or device of at most max bytes into `out`, which is empty before.  No second copy of a secret
 * is left in freed memory. */
MUST_USE static bool file_load(const char *path, size_t max, struct buf *out, struct err *e)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0)
        return err_set(e, "%s: cannot be read: %s", path, strerror(errno));
    if (fstat(fd, &st) == 0 && S_ISDIR(st.st_mode)) {
        close(fd);
        return err_set(e, "%s: is a directory; name a file in it", path);
    }
    ssize_t n = -1;
    errno = ENOMEM;
    while (out->len <= max && file_room(out)) {
        n = read(fd, out->p + out->len, FILE_READ);
        if (n > 0)
            out->len += (size_t)n;
        else if (n == 0 || errno != EINTR)
            break;
    }
    int why = errno;
    close(fd);
    if (n < 0)
        return err_set(e, "%s: cannot be read: %s", path, strerror(why));
    if (out->len > max)
        return err_set(e, "%s: is larger than %zu KiB: it can't be the right file", path, max / 1024);
    return true;
}

/* Whether a path leads to this file. */
static bool is_file(const char *path, const struct stat *file)
{
    struct stat st;
    return stat(path, &st) == 0 && st.st_dev == file->st_dev && st.st_ino == file->st_ino;
}

/* Whether a path leads to what stdin, stdout or stderr is; returns that descriptor, or -1. */
static int path_is_standard(const char *path)
{
    struct stat own;
    for (int fd = 0; fd < 3; fd++)
        if (fstat(fd, &own) == 0 && is_file(path, &own) && (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY)
            return fd;
    return -1;
}

/* Opens a file for writing, emptied where it is a regular file of its own; what stdout or stderr is already keeps its
 * place and content.  -1 and errno. */
static int output_open(const char *path)
{
    struct stat st;
    int standard = path_is_standard(path), fd;
    if (standard >= 0)
        return fcntl(standard, F_DUPFD_CLOEXEC, 3);
    fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    return fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && ftruncate(fd, 0) != 0 ? fd_drop(fd) : fd;
}

/* What an earlier run has left at a path misleads who waits for it: removed, if it is a regular file of its own. */
static void output_forget(const char *path)
{
    struct stat st;
    if (path && lstat(path, &st) == 0 && S_ISREG(st.st_mode) && path_is_standard(path) < 0)
        unlink(path);
}

/* The name of a file until it is whole, to be freed.  NULL without memory. */
static char *part_path(const char *path)
{
    size_t n = strlen(path);
    char *part = malloc(n + sizeof ".part");
    if (part) {
        memcpy(part, path, n);
        memcpy(part + n, ".part", sizeof ".part");
    }
    return part;
}

/* The folder in which a file is, or will be. */
static void path_folder(char to[PATH_MAX], const char *path)
{
    const char *slash = strrchr(path, '/');
    text_printf(to, PATH_MAX, "%.*s", slash ? (int)(slash - path) + 1 : 1, slash ? path : ".");
}

/* Makes a file of these bytes. */
static bool write_file(const char *path, const uint8_t *p, size_t n, struct err *e)
{
    int fd = output_open(path);
    bool ok = fd >= 0 && fd_write(fd, p, n, -1);
    int error = errno;
    if (fd >= 0 && close(fd) != 0 && ok)
        error = errno, ok = false;
    return ok || err_set(e, "%s: %s", path, strerror(error));
}

/* ==== 3. HPACK (RFC 7541) ==========================================================================================
 * Owns: the static table (appendix A), the Huffman code (appendix B, 5.2), the dynamic table of one direction (2.3, 4),
 * decoding of whole field blocks (3, 6), and an encoder that uses the static table only.
 * Never: judges names or values (RFC 9113 8), allocates by what a peer claims, or keeps more than the dynamic table.
 */

#define HPACK_TABLE_SIZE 4096 /* SETTINGS_HEADER_TABLE_SIZE both ways: the value in force when nobody sends one */
#define HPACK_OVERHEAD 32     /* RFC 7541 4.1 and RFC 9113 6.5.2: what a field counts beyond its bytes */
#define HPACK_FIELDS_MAX 1024 /* fields of a block: twice as many as the header list has room for */
#define HPACK_STATIC 61
#define HUFFMAN_EOS 256
#define HUFFMAN_MIN 5 /* bits of the shortest and of the longest code */
#define HUFFMAN_MAX 30

/* Appendix A.  Name and value stand in `text` one after the other, so a row holds no pointer. */
struct hpack_row {
    uint8_t name_len, value_len;
    char text[30];
};

#define ROW(name, value) { sizeof(name) - 1, sizeof(value) - 1, name value }
static const struct hpack_row hpack_static[HPACK_STATIC] = {
    ROW(":authority", ""), ROW(":method", "GET"), ROW(":method", "POST"), ROW(":path", "/"),
    ROW(":path", "/index.html"), ROW(":scheme", "http"), ROW(":scheme", "https"), ROW(":status", "200"),
    ROW(":status", "204"), ROW(":status", "206"), ROW(":status", "304"), ROW(":status", "400"),
    ROW(":status", "404"), ROW(":status", "500"), ROW("accept-charset", ""), ROW("accept-encoding", "gzip, deflate"),
    ROW("accept-language", ""), ROW("accept-ranges", ""), ROW("accept", ""), ROW("access-control-allow-origin", ""),
    ROW("age", ""), ROW("allow", ""), ROW("authorization", ""), ROW("cache-control", ""),
    ROW("content-disposition", ""), ROW("content-encoding", ""), ROW("content-language", ""), ROW("content-length", ""),
    ROW("content-location", ""), ROW("content-range", ""), ROW("content-type", ""), ROW("cookie", ""),
    ROW("date", ""), ROW("etag", ""), ROW("expect", ""), ROW("expires", ""),
    ROW("from", ""), ROW("host", ""), ROW("if-match", ""), ROW("if-modified-since", ""),
    ROW("if-none-match", ""), ROW("if-range", ""), ROW("if-unmodified-since", ""), ROW("last-modified", ""),
    ROW("link", ""), ROW("location", ""), ROW("max-forwards", ""), ROW("proxy-authenticate", ""),
    ROW("proxy-authorization", ""), ROW("range", ""), ROW("referer", ""), ROW("refresh", ""),
    ROW("retry-after", ""), ROW("server", ""), ROW("set-cookie", ""), ROW("strict-transport-security", ""),
    ROW("transfer-encoding", ""), ROW("user-agent", ""), ROW("vary", ""), ROW("via", ""),
    ROW("www-authenticate", ""),
};
#undef ROW

/* Appendix B.  The code is canonical, so the lengths in bits, by symbol, are the whole of it. */
static const uint8_t huffman_bits[HUFFMAN_EOS + 1] = {
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28,
    28, 28, 28, 6,  10, 10, 12, 13, 6,  8,  11, 10, 10, 8,  11, 8,  6,  6,  6,  5,  5,  5,  6,  6,  6,  6,  6,  6,  6,
    7,  8,  15, 6,  12, 10, 13, 6,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,
    7,  8,  7,  8,  13, 19, 13, 14, 6,  15, 5,  6,  5,  6,  5,  6,  6,  6,  5,  7,  7,  6,  6,  6,  5,  6,  7,  6,  5,
    5,  6,  7,  7,  7,  7,  7,  15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24,
    24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22,
    23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26,
    27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23,
    22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30,
};

/* What decoding needs, by length: the first code, how many there are, and where their symbols start in `symbol`. */
struct huffman {
    struct {
        uint32_t first;
        uint16_t count, index;
    } len[HUFFMAN_MAX + 1];
    uint16_t symbol[HUFFMAN_EOS + 1];
};

/* Derives the tables; one copy serves any number of connections. */
static void huffman_init(struct huffman *h)
{
    uint32_t code = 0;
    uint16_t k = 0, at[HUFFMAN_MAX + 1];
    *h = (struct huffman){ .symbol = { 0 } };
    for (unsigned s = 0; s <= HUFFMAN_EOS; s++)
        h->len[huffman_bits[s]].count++;
    for (unsigned n = 0; n <= HUFFMAN_MAX; n++) {
        h->len[n].first = code <<= 1;
        h->len[n].index = at[n] = k;
        k = (uint16_t)(k + h->len[n].count);
        code += h->len[n].count;
    }
    for (uint16_t s = 0; s <= HUFFMAN_EOS; s++)
        h->symbol[at[huffman_bits[s]]++] = s;
}

/* Decodes a whole string (RFC 7541 5.2).  Stores at most room bytes and sets *len to the full decoded length, which
 * may be more.  False: EOS in the string, or padding that is over 7 bits or not the start of EOS. */
MUST_USE static bool huffman_decode(const struct huffman *h, struct bytes in, uint8_t *out, size_t room, size_t *len)
{
    uint64_t acc = 0; /* the next `bits` bits, at the top */
    unsigned bits = 0;
    for (*len = 0;; ++*len) {
        for (; bits < 32 && in.n > 0; bits += 8, in.n--)
            acc |= (uint64_t)*in.p++ << (56 - bits);
        /* Ones follow the string, so that padding reads as EOS and a code cut short is longer than what is left. */
        uint32_t window = (uint32_t)((acc | UINT64_MAX >> bits) >> 32);
        unsigned n = HUFFMAN_MIN;
        while ((window >> (32 - n)) - h->len[n].first >= h->len[n].count)
            n++; /* ends at 30 at the latest: the code is complete */
        unsigned symbol = h->symbol[h->len[n].index + (window >> (32 - n)) - h->len[n].first];
        if (symbol == HUFFMAN_EOS)
            return bits <= 7;
        if (n > bits)
            return false;
        if (*len < room)
            out[*len] = (uint8_t)symbol;
        acc <<= n;
        bits -= n;
    }
}

/* One direction's dynamic table.  `table` holds the entries, newest first, each as two bytes of name length, two of
 * value length, name, value, and four with the length of all this, so that the oldest is found from the end.  Nothing
 * is allocated before the first entry, and at most HPACK_TABLE_SIZE: an entry takes 24 bytes less than it counts. */
struct hpack {
    uint8_t *table;
    uint32_t len, cap; /* bytes used and allocated */
    uint32_t count;    /* entries */
    uint32_t max;      /* maximum size in force (RFC 7541 4.2) */
};

#define HPACK_SAVED (HPACK_OVERHEAD - 8)

static void hpack_init(struct hpack *h)
{
    *h = (struct hpack){ .max = HPACK_TABLE_SIZE };
}

static void hpack_free(struct hpack *h)
{
    free(h->table);
    hpack_init(h);
}

/* Drops the oldest entries until the size is at most `size` (RFC 7541 4.3). */
static void hpack_evict(struct hpack *h, size_t size)
{
    for (; h->len + h->count * HPACK_SAVED > size; h->count--)
        h->len -= get_be32(h->table + h->len - 4);
}

/* Adds an entry; one that is larger than the table empties it (RFC 7541 4.4).  The strings lie outside the table.
 * False: out of memory. */
MUST_USE static bool hpack_insert(struct hpack *h, struct bytes name, struct bytes value)
{
    size_t size = name.n + value.n + HPACK_OVERHEAD;
    hpack_evict(h, size > h->max ? 0 : h->max - size);
    if (size > h->max)
        return true;
    uint32_t n = (uint32_t)size - HPACK_SAVED;
    if (h->cap - h->len < n) {
        uint32_t cap = (h->len + n + 255) & ~(uint32_t)255; /* small steps: most peers stay under 512 bytes */
        uint8_t *table = realloc(h->table, cap);
        if (!table)
            return false;
        h->table = table;
        h->cap = cap;
    }
    memmove(h->table + n, h->table, h->len);
    put_be32(h->table, (uint32_t)(name.n << 16 | value.n));
    memcpy(h->table + 4, name.p, name.n);
    memcpy(h->table + 4 + name.n, value.p, value.n);
    put_be32(h->table + n - 4, n);
    h->len += n;
    h->count++;
    return true;
}

/* Looks an index up (RFC 7541 2.3.3).  False: there is no such entry. */
MUST_USE static bool hpack_lookup(const struct hpack *h, uint64_t index, struct bytes *name, struct bytes *value)
{
    if (index < 1 || index > HPACK_STATIC + h->count)
        return false;
    if (index <= HPACK_STATIC) {
        const struct hpack_row *row = &hpack_static[index - 1];
        *name = (struct bytes){ (const uint8_t *)row->text, row->name_len };
        *value = (struct bytes){ name->p + name->n, row->value_len };
        return true;
    }
    uint64_t newer = index - HPACK_STATIC - 1, older = h->count - newer;   /* entries before it, and from it on */
    const uint8_t *e = newer < older ? h->table : h->table + h->len;
    if (newer < older)
        for (; newer > 0; newer--)
            e += (get_be32(e) >> 16) + (get_be32(e) & 0xffff) + 8;
    else
        for (; older > 0; older--)
            e -= get_be32(e - 4);
    *name = (struct bytes){ e + 4, get_be32(e) >> 16 };
    *value = (struct bytes){ name->p + name->n, get_be32(e) & 0xffff };
    return true;
}

/* The error code COMPRESSION_ERROR covers every way in which a field block can be wrong. */
enum hpack_error { HPACK_OK, HPACK_COMPRESSION_ERROR, HPACK_NO_MEMORY, HPACK_TOO_MANY };

/* What hpack_decode is lent and asked for.  Everything here may serve all connections in turn. */
struct hpack_reader {
    const struct huffman *huffman;
    uint8_t *scratch;  /* HPACK_SCRATCH(list_limit) bytes for decoded strings */
    size_t list_limit; /* RFC 9113 6.5.2: the bytes of names and values, and 32 for each field */
    void (*field)(void *arg, struct bytes name, struct bytes value); /* the strings are valid during the call only */
    void *arg;
    bool too_large; /* the answer: the list went over the limit, and from there on nothing was delivered */

    struct bytes in; /* private: what remains of the block, of the limit, and of the scratch area for this field */
    size_t left, room;
    uint8_t *free;
};

#define HPACK_SCRATCH(limit) ((limit) > HPACK_TABLE_SIZE ? (limit) : HPACK_TABLE_SIZE)

/* Takes an integer with a prefix of that many bits (RFC 7541 5.1).  Five further bytes are enough for any 32-bit
 * value; more are an error, as is an end within it. */
MUST_USE static bool hpack_int(struct bytes *in, unsigned prefix, uint64_t *v)
{
    uint64_t mask = ((uint64_t)1 << prefix) - 1;
    if (in->n == 0)
        return false;
    *v = *in->p & mask;
    bool more = *v == mask;
    in->p++, in->n--;
    for (unsigned shift = 0; more && shift < 35 && in->n > 0; shift += 7) {
        *v += (uint64_t)(*in->p & 127) << shift;
        more = *in->p & 128;
        in->p++, in->n--;
    }
    return !more;
}

/* Takes a string literal (RFC 7541 5.2); a Huffman-coded one is decoded to the scratch area.  One that does not fit
 * keeps its true length though its bytes are lost: with what else is there it is over the list limit and too large
 * for the table, so nobody will look at them. */
MUST_USE static bool hpack_string(struct hpack_reader *r, struct bytes *s)
{
    bool coded = r->in.n > 0 && *r->in.p & 128;
    uint64_t n;
    if (!hpack_int(&r->in, 7, &n) || n > r->in.n)
        return false;
    *s = (struct bytes){ r->in.p, (size_t)n };
    r->in.p += s->n;
    r->in.n -= s->n;
    if (!coded)
        return true;
    if (!huffman_decode(r->huffman, *s, r->free, r->room, &s->n))
        return false;
    s->p = r->free;
    size_t used = s->n < r->room ? s->n : r->room;
    r->free += used;
    r->room -= used;
    return true;
}

/* Decodes one field: indexed (prefix 7, RFC 7541 6.1), or a literal that enters the table (6, 6.2.1) or does not (4,
 * 6.2.2; 6.2.3 concerns forwarders). */
MUST_USE static enum hpack_error hpack_field(struct hpack *h, struct hpack_reader *r, unsigned prefix)
{
    struct bytes name, value;
    uint64_t index;
    r->free = r->scratch;
    r->room = HPACK_SCRATCH(r->list_limit);
    if (!hpack_int(&r->in, prefix, &index))
        return HPACK_COMPRESSION_ERROR;
    if (r->too_large && prefix == 7)  /* nobody will look at it, and it changes nothing */
        return index < 1 || index > HPACK_STATIC + h->count ? HPACK_COMPRESSION_ERROR : HPACK_OK;
    if (index == 0 && prefix < 7 ? !hpack_string(r, &name) : !hpack_lookup(h, index, &name, &value))
        return HPACK_COMPRESSION_ERROR;
    if (index > HPACK_STATIC && prefix == 6) { /* the entry that lends its name may be evicted: RFC 7541 4.4 */
        memcpy(r->free, name.p, name.n);
        name.p = r->free;
        r->free += name.n;
        r->room -= name.n;
    }
    if (prefix < 7 && !hpack_string(r, &value))
        return HPACK_COMPRESSION_ERROR;
    size_t size = name.n + value.n + HPACK_OVERHEAD;
    r->too_large |= size > r->left;
    if (!r->too_large) {
        r->left -= size;
        r->field(r->arg, name, value);
    }
    return prefix == 6 && !hpack_insert(h, name, value) ? HPACK_NO_MEMORY : HPACK_OK;
}

/* Decodes a complete field block.  A list over the limit is decoded to its end all the same, to keep the dynamic table
 * right.  After an error the table is no longer the peer's: the connection has to go (RFC 9113 4.3). */
MUST_USE static enum hpack_error hpack_decode(struct hpack *h, struct bytes block, struct hpack_reader *r)
{
    enum hpack_error error = HPACK_OK;
    unsigned updates = 2; /* at most two, before the first field: RFC 7541 4.2 */
    unsigned fields = 0;
    r->in = block;
    r->left = r->list_limit;
    r->too_large = false;
    while (r->in.n > 0 && error == HPACK_OK) {
        uint8_t first = *r->in.p;
        if ((first & 0xe0) == 0x20) {
            uint64_t max;
            if (updates-- == 0 || !hpack_int(&r->in, 5, &max) || max > HPACK_TABLE_SIZE)
                return HPACK_COMPRESSION_ERROR;
            h->max = (uint32_t)max;
            hpack_evict(h, h->max);
        } else if (fields++ == HPACK_FIELDS_MAX) {
            return HPACK_TOO_MANY;
        } else {
            updates = 0;
            error = hpack_field(h, r, first & 0x80 ? 7 : first & 0x40 ? 6 : 4);
        }
    }
    return error;
}

/* Appends an integer with an N-bit prefix (RFC 7541 5.1); `pattern` are the bits above the prefix. */
static void hpack_put_int(struct buf *out, unsigned pattern, unsigned prefix, size_t v)
{
    size_t mask = ((size_t)1 << prefix) - 1;
    if (v < mask) {
        buf_putc(out, (int)(pattern | v));
        return;
    }
    buf_putc(out, (int)(pattern | mask));
    for (v -= mask; v >= 128; v >>= 7)
        buf_putc(out, (int)(v & 127) | 128);
    buf_putc(out, (int)v);
}

static void hpack_put_string(struct buf *out, struct bytes s)
{
    hpack_put_int(out, 0, 7, s.n);
    buf_put(out, s.p, s.n);
}

/* Appends one field: indexed if the static table has it, else a literal that leaves the peer's table alone. */
static void hpack_encode_field(struct buf *out, struct bytes name, struct bytes value)
{
    unsigned index = 0; /* the first row with the name */
    for (unsigned i = 1; i <= HPACK_STATIC; i++) {
        const struct hpack_row *row = &hpack_static[i - 1];
        const uint8_t *text = (const uint8_t *)row->text;
        if (!bytes_eq(name, (struct bytes){ text, row->name_len }))
            continue;
        if (bytes_eq(value, (struct bytes){ text + row->name_len, row->value_len })) {
            hpack_put_int(out, 0x80, 7, i);
            return;
        }
        if (index == 0)
            index = i;
    }
    hpack_put_int(out, 0, 4, index);
    if (index == 0)
        hpack_put_string(out, name);
    hpack_put_string(out, value);
}

/* ==== 4. Frames (RFC 9113 4, 6); request heads of HTTP/1 (RFC 9112) =================================================
 * Owns: the nine-byte frame header, what each type must look like, the names and codes of the standard; the form of an
 * HTTP/1 request's head.
 * Never: knows a stream's state; a frame that passes frame_check is well formed, no more.
 */
static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";   /* RFC 9113 3.4 */

enum {
    PREFACE_LEN = sizeof preface - 1,
    FRAME_HEADER_LEN = 9,
    MAX_FRAME_SIZE = 16384,        /* ours to receive, and the most we send: the default of RFC 9113 6.5.2 */
    DEFAULT_WINDOW = 65535,        /* RFC 9113 6.9.2 */
    MAX_WINDOW = 0x7fffffff,
};

enum frame_type {
    FRAME_DATA, FRAME_HEADERS, FRAME_PRIORITY, FRAME_RST_STREAM, FRAME_SETTINGS, FRAME_PUSH_PROMISE, FRAME_PING,
    FRAME_GOAWAY, FRAME_WINDOW_UPDATE, FRAME_CONTINUATION, FRAME_TYPES
};

enum frame_flag { END_STREAM = 0x1, ACK = 0x1, END_HEADERS = 0x4, PADDED = 0x8, PRIORITY = 0x20 };

enum h2_error {
    NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, SETTINGS_TIMEOUT, STREAM_CLOSED, FRAME_SIZE_ERROR,
    REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, CONNECT_ERROR, ENHANCE_YOUR_CALM, INADEQUATE_SECURITY,
    HTTP_1_1_REQUIRED, H2_ERRORS
};

static const char *const h2_error_names[H2_ERRORS] = {
    "NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT", "STREAM_CLOSED",
    "FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR", "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED",
};

static const char *h2_error_name(uint32_t code)
{
    return code < H2_ERRORS ? h2_error_names[code] : "an unknown error";
}

enum setting {
    SETTINGS_HEADER_TABLE_SIZE = 1, SETTINGS_ENABLE_PUSH, SETTINGS_MAX_CONCURRENT_STREAMS,
    SETTINGS_INITIAL_WINDOW_SIZE, SETTINGS_MAX_FRAME_SIZE, SETTINGS_MAX_HEADER_LIST_SIZE, SETTINGS_COUNT
};

/* RFC 9113 6.5.2: the values that a peer may send, where not any, and the error for one outside. */
static const struct {
    uint32_t min, max;
    enum h2_error error;
} setting_rules[SETTINGS_COUNT] = {
    [SETTINGS_ENABLE_PUSH] = { 0, 1, PROTOCOL_ERROR },
    [SETTINGS_INITIAL_WINDOW_SIZE] = { 0, MAX_WINDOW, FLOW_CONTROL_ERROR },
    [SETTINGS_MAX_FRAME_SIZE] = { MAX_FRAME_SIZE, (1 << 24) - 1, PROTOCOL_ERROR },
};

struct frame {
    uint32_t len, stream_id;
    uint8_t type, flags;
};

/* COSTS: one of these is counted by CAP_CONTROL_FRAMES. */
enum { ON_CONNECTION = 1, ON_STREAM = 2, SIZE_ERROR_IS_STREAM = 4, COSTS = 8 };

static const struct {
    const char *name;
    uint32_t min, max;
    unsigned where;
} frame_rules[FRAME_TYPES] = {
    [FRAME_DATA]          = { "DATA",          0, MAX_FRAME_SIZE, ON_STREAM },
    [FRAME_HEADERS]       = { "HEADERS",       0, MAX_FRAME_SIZE, ON_STREAM },
    [FRAME_PRIORITY]      = { "PRIORITY",      5, 5,              ON_STREAM | SIZE_ERROR_IS_STREAM | COSTS },
    [FRAME_RST_STREAM]    = { "RST_STREAM",    4, 4,              ON_STREAM },
    [FRAME_SETTINGS]      = { "SETTINGS",      0, MAX_FRAME_SIZE, ON_CONNECTION | COSTS },
    [FRAME_PUSH_PROMISE]  = { "PUSH_PROMISE",  0, MAX_FRAME_SIZE, 0 },     /* nobody may push here */
    [FRAME_PING]          = { "PING",          8, 8,              ON_CONNECTION | COSTS },
    [FRAME_GOAWAY]        = { "GOAWAY",        8, MAX_FRAME_SIZE, ON_CONNECTION | COSTS },
    [FRAME_WINDOW_UPDATE] = { "WINDOW_UPDATE", 4, 4,              ON_CONNECTION | ON_STREAM },
    [FRAME_CONTINUATION]  = { "CONTINUATION",  0, MAX_FRAME_SIZE, ON_STREAM },
};

/* Reads the nine bytes of a frame header; the reserved bit is ignored (RFC 9113 4.1). */
static struct frame frame_parse(const uint8_t *p)
{
    return (struct frame){
        .len = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 8 | p[2],
        .type = p[3],
        .flags = p[4],
        .stream_id = get_be32(p + 5) & 0x7fffffff,
    };
}

/* The error of a frame header taken alone, NO_ERROR if there is none.  Unknown types pass (RFC 9113 4.1, 5.5);
 * *stream_scope tells that only the frame's stream is to suffer. */
static enum h2_error frame_check(const struct frame *f, bool *stream_scope)
{
    *stream_scope = false;
    if (f->len > MAX_FRAME_SIZE)
        return FRAME_SIZE_ERROR;
    if (f->type >= FRAME_TYPES)
        return NO_ERROR;
    unsigned where = frame_rules[f->type].where;
    if (!(where & (f->stream_id ? ON_STREAM : ON_CONNECTION)))
        return PROTOCOL_ERROR;
    if (f->len < frame_rules[f->type].min || f->len > frame_rules[f->type].max) {
        *stream_scope = where & SIZE_ERROR_IS_STREAM;
        return FRAME_SIZE_ERROR;
    }
    if (f->type == FRAME_SETTINGS && (f->flags & ACK ? f->len != 0 : f->len % 6 != 0))
        return FRAME_SIZE_ERROR;
    return NO_ERROR;
}

/* Appends a frame header; the caller appends the len bytes of payload. */
static void frame_put(struct buf *out, uint32_t len, enum frame_type type, unsigned flags, uint32_t stream_id)
{
    uint8_t h[FRAME_HEADER_LEN] = { (uint8_t)(len >> 16), (uint8_t)(len >> 8), (uint8_t)len, (uint8_t)type,
                                    (uint8_t)flags };
    put_be32(h + 5, stream_id);
    buf_put(out, h, sizeof h);
}

/* Appends a frame whose payload is one 32-bit number: RST_STREAM, WINDOW_UPDATE. */
static void frame_put_u32(struct buf *out, enum frame_type type, uint32_t stream_id, uint32_t value)
{
    uint8_t v[4];
    put_be32(v, value);
    frame_put(out, sizeof v, type, 0, stream_id);
    buf_put(out, v, sizeof v);
}

static void frame_put_setting(struct buf *out, enum setting id, uint32_t value)
{
    uint8_t s[6] = { 0, (uint8_t)id };
    put_be32(s + 2, value);
    buf_put(out, s, sizeof s);
}

static void frame_put_goaway(struct buf *out, uint32_t last_id, enum h2_error code, const char *why)
{
    uint8_t g[8];
    put_be32(g, last_id);
    put_be32(g + 4, code);
    frame_put(out, (uint32_t)(sizeof g + strlen(why)), FRAME_GOAWAY, 0, 0);
    buf_put(out, g, sizeof g);
    buf_puts(out, why);
}

/* ---- Request heads of HTTP/1 ---- */
enum { HTTP1_HEAD_MAX = 8192, HTTP1_FIELDS_MAX = 100, HTTP1_BAD = -1 };

struct http1_head {
    struct bytes method, target;      /* in the head's own bytes; an absolute target without its scheme and authority */
    unsigned fields, hosts, lengths;
    bool http10, keep_alive, close, body; /* body: one follows */
};

/* RFC 9110 5.6.2 */
static bool http1_token(struct bytes t)
{
    for (size_t i = 0; i < t.n; i++)
        if (t.p[i] <= ' ' || t.p[i] >= 0x7f || strchr("\"(),/:;<=>?@[\\]{}", t.p[i]))
            return false;
    return t.n > 0;
}

/* What stands before the byte, which is dropped; all of it if there is none. */
static struct bytes bytes_take(struct bytes *from, uint8_t end)
{
    const uint8_t *at = from->n ? memchr(from->p, end, from->n) : NULL;
    struct bytes word = { from->p, at ? (size_t)(at - from->p) : from->n };
    *from = bytes_from(*from, word.n + (at != NULL));
    return word;
}

static struct bytes bytes_trim(struct bytes b)
{
    while (b.n && (*b.p == ' ' || *b.p == '\t'))
        b = bytes_from(b, 1);
    while (b.n && (b.p[b.n - 1] == ' ' || b.p[b.n - 1] == '\t'))
        b.n--;
    return b;
}

static bool bytes_eq_nocase(struct bytes a, const char *b)
{
    return a.n == strlen(b) && strncasecmp((const char *)a.p, b, a.n) == 0;
}

/* The bytes of the head at the start of `in`, its empty line included; an empty line alone is one of 2 bytes.  0: its
 * end is still to come.  HTTP1_BAD: a line ends without CR. */
static int http1_head_len(struct bytes in)
{
    size_t max = min_size(in.n, HTTP1_HEAD_MAX);
    const uint8_t *lf = in.p;
    for (size_t at = 0; at < max && (lf = memchr(in.p + at, '\n', max - at)) != NULL;) {
        at = (size_t)(lf - in.p) + 1;
        if (at < 2 || lf[-1] != '\r')
            return HTTP1_BAD;
        if (at == 2 || lf[-2] == '\n')
            return (int)at;
    }
    return 0;
}

/* How long the scheme of HTTP is, with its slashes, that a URL begins with; 0: it begins with another, or none. */
static size_t http_scheme(struct bytes url)
{
    return bytes_eq_nocase((struct bytes){ url.p, min_size(url.n, 7) }, "http://") ? 7
         : bytes_eq_nocase((struct bytes){ url.p, min_size(url.n, 8) }, "https://") ? 8 : 0;
}

/* The request line (RFC 9112 3).  Returns the HTTP status of what is wrong, 0 if nothing is. */
static unsigned http1_request_line(struct http1_head *h, struct bytes line)
{
    h->method = bytes_take(&line, ' ');
    h->target = bytes_take(&line, ' ');
    bool version = line.n == 8 && bytes_start(line, "HTTP/") && line.p[5] >= '0' && line.p[5] <= '9' &&
                   line.p[6] == '.' && line.p[7] >= '0' && line.p[7] <= '9';
    for (size_t i = 0; i < h->target.n; i++)
        if (h->target.p[i] <= ' ' || h->target.p[i] >= 0x7f)
            return 400;
    if (!version || !http1_token(h->method) || !h->target.n)
        return 400;
    size_t scheme = http_scheme(h->target);
    if (scheme) {                     /* RFC 9112 3.2.2 */
        struct bytes rest = bytes_from(h->target, scheme);
        const uint8_t *path = rest.n ? memchr(rest.p, '/', rest.n) : NULL;
        h->target = path ? bytes_from(rest, (size_t)(path - rest.p)) : BYTES("/");
    }
    if (*h->target.p != '/' && !bytes_eq(h->target, BYTES("*")) && !bytes_eq(h->method, BYTES("CONNECT")))
        return 400;
    h->http10 = line.p[7] == '0';
    h->keep_alive = !h->http10;       /* RFC 9112 9.3 */
    return line.p[5] == '1' ? 0 : 505;
}

/* One field (RFC 9112 5, 6), its name in lower case by now.  No body is taken, so there is no doubt where the next
 * request begins; Transfer-Encoding and a length that is said twice are refused (RFC 9112 11.2). */
static unsigned http1_field(struct http1_head *h, struct bytes name, struct bytes value)
{
    bool length = bytes_eq(name, BYTES("content-length"));
    h->lengths += length;
    h->hosts += bytes_eq(name, BYTES("host"));
    if (!http1_token(name) || bytes_eq(name, BYTES("transfer-encoding")) || h->hosts > 1 || h->lengths > 1 ||
        (length && parse_decimal(value) < 0))
        return 400;
    for (size_t i = 0; i < value.n; i++)
        if ((value.p[i] < ' ' && value.p[i] != '\t') || value.p[i] == 0x7f)
            return 400;
    h->body |= length && parse_decimal(value) > 0;
    while (bytes_eq(name, BYTES("connection")) && value.n) {
        struct bytes word = bytes_trim(bytes_take(&value, ','));
        h->close |= bytes_eq_nocase(word, "close");
        h->keep_alive |= bytes_eq_nocase(word, "keep-alive");
    }
    return ++h->fields > HTTP1_FIELDS_MAX ? 431 : 0;
}

/* Takes the n bytes of a whole head apart, and calls `field` for each field; names become lower case where they stand.
 * Returns the HTTP status of what is wrong, 0 if nothing is. */
static unsigned http1_parse(uint8_t *p, size_t n, struct http1_head *h,
                            void (*field)(void *, struct bytes name, struct bytes value), void *arg)
{
    struct bytes head = { p, n };
    *h = (struct http1_head){ 0 };
    for (bool first = true;; first = false) {
        struct bytes line = bytes_take(&head, '\n');
        if (line.n < 2)               /* the empty line's CR */
            break;
        line.n--;
        if (memchr(line.p, '\r', line.n))
            return 400;
        struct bytes value = line, name = bytes_take(&value, ':');
        for (uint8_t *c = p + (name.p - p); !first && c < name.p + name.n; c++)
            *c = *c >= 'A' && *c <= 'Z' ? (uint8_t)(*c | 0x20) : *c;
        value = bytes_trim(value);
        unsigned status = first ? http1_request_line(h, line) : name.n == line.n ? 400 : http1_field(h, name, value);
        if (status)
            return status;
        if (!first)
            field(arg, name, value);
    }
    return h->hosts || h->http10 ? 0 : 400;
}

/* ==== 5. PEM and DER ===============================================================================================
 * Owns: PEM blocks (RFC 7468, read laxly), base64 across lines, DER elements (X.690), the outlines of keys.
 * Never: judges a key's strength or asks for a passphrase.
 */

enum {
    PEM_FILE_MAX = 1 << 20, /* a key, a chain or a list of authorities; the system's whole bundle is a quarter of it */
    PEM_LABEL = 64,
};

#define PEM_PUBLIC_KEY "PUBLIC KEY" /* RFC 7468 13 */

/* Takes one line, ended by LF, CRLF, CR or the end of the text, and trims blanks at both its ends. */
static struct bytes pem_line(struct bytes *in)
{
    size_t n = 0;
    while (n < in->n && in->p[n] != '\n' && in->p[n] != '\r')
        n++;
    struct bytes line = { in->p, n };
    *in = bytes_from(*in, n);
    *in = bytes_from(*in, bytes_start(*in, "\r\n") ? 2 : in->n > 0);
    while (line.n && strchr(" \t\v\f", line.p[0]))
        line = bytes_from(line, 1);
    while (line.n && strchr(" \t\v\f", line.p[line.n - 1]))
        line.n--;
    return line;
}

/* True if the line is an encapsulation boundary, e.g. "-----BEGIN X-----" for the prefix "-----BEGIN ": label is then
 * X.  A label that is too long or not printable ASCII makes the line ordinary text. */
static bool pem_boundary(struct bytes line, const char *prefix, char label[PEM_LABEL])
{
    size_t start = strlen(prefix);
    if (!bytes_start(line, prefix) || line.n < start + 5 || line.n - start - 5 >= PEM_LABEL)
        return false;
    size_t n = line.n - start - 5;
    if (memcmp(line.p + start + n, "-----", 5) != 0 || !bytes_printable((struct bytes){ line.p + start, n }))
        return false;
    memcpy(label, line.p + start, n);
    label[n] = '\0';
    return true;
}

/* Base64 (RFC 4648 4) across lines: `count` digits so far, pads included. */
struct base64 {
    uint32_t bits;
    size_t count, pads;
    bool bad;
};

static void base64_line(struct base64 *b, struct bytes line, struct buf *out)
{
    for (size_t i = 0; i < line.n; i++) {
        int c = line.p[i], digit = pb_base64_digit(c);
        if (c == ' ' || c == '\t')
            continue;
        if (c == '=')
            b->pads++;
        else if (digit < 0 || b->pads)
            b->bad = true;
        b->bits = b->bits << 6 | (uint32_t)(digit < 0 ? 0 : digit);
        if (++b->count % 4)
            continue;
        buf_putc(out, (int)(b->bits >> 16 & 255));
        if (b->pads < 2)
            buf_putc(out, (int)(b->bits >> 8 & 255));
        if (b->pads < 1)
            buf_putc(out, (int)(b->bits & 255));
    }
}

/* Moves *in past the next PEM block.  Returns 1 with its label and its bytes in `der` (overwritten, and allocated at
 * most once per call), 0 when no block is left, -1 when the block whose label is given has damaged base64, a wrong
 * END line or none.  Text between blocks is skipped, and so are RFC 1421 headers, except that "Proc-Type:
 * 4,ENCRYPTED" puts "ENCRYPTED " before the label, as the PKCS#8 label has it.  A failed allocation shows in der. */
static int pem_next(struct bytes *in, char label[PEM_LABEL], struct buf *der)
{
    char end[PEM_LABEL];
    struct base64 base64 = { 0 };
    bool encrypted = false;
    do {
        if (in->n == 0)
            return 0;
    } while (!pem_boundary(pem_line(in), "-----BEGIN ", label));
    der->len = 0;
    buf_room(der, in->n / 4 * 3 + 3);
    for (;;) {
        if (in->n == 0)
            return -1;
        struct bytes line = pem_line(in);
        if (pem_boundary(line, "-----END ", end))
            break;
        if (base64.count == 0 && line.n && memchr(line.p, ':', line.n))
            encrypted |= bytes_eq(line, BYTES("Proc-Type: 4,ENCRYPTED"));
        else
            base64_line(&base64, line, der);
    }
    if (strcmp(label, end) != 0 || base64.bad || base64.pads > 2 || base64.count % 4 != 0)
        return -1;
    if (encrypted) {
        memmove(label + 10, label, strnlen(label, PEM_LABEL - 11) + 1);
        memcpy(label, "ENCRYPTED ", 10);
        label[PEM_LABEL - 1] = '\0';
    }
    return 1;
}

/* Appends what a text of base64 says.  False: it is none, or there is no memory. */
static bool base64_decode(struct bytes text, struct buf *out)
{
    struct base64 b = { 0 };
    base64_line(&b, text, out);
    return !b.bad && b.pads <= 2 && b.count % 4 == 0 && !out->failed;
}

enum { /* X.690 8.1.2: the identifier bytes that are looked for here */
    DER_BOOLEAN = 0x01, DER_INTEGER = 0x02, DER_BIT_STRING = 0x03, DER_OCTET_STRING = 0x04, DER_NULL = 0x05,
    DER_OID = 0x06,
    DER_SEQUENCE = 0x30, DER_SET = 0x31
};

/* RFC 8017 A, RFC 5480 2.1.1, RFC 8410 3 */
#define OID_RSA "\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01"
#define OID_EC "\x2a\x86\x48\xce\x3d\x02\x01"
#define OID_ED25519 "\x2b\x65\x70"
#define OID_P256 "\x2a\x86\x48\xce\x3d\x03\x01\x07"
#define OID_P384 "\x2b\x81\x04\x00\x22"
#define OID_P521 "\x2b\x81\x04\x00\x23"

/* Takes one element off the front of *in and returns its identifier byte, with its contents in *value; or -1, with
 * nothing taken, when *in is empty or cut off, or the length is indefinite or longer than it need be (X.690 10.1). */
static int der_next(struct bytes *in, struct bytes *value)
{
    if (in->n < 2 || (in->p[0] & 31) == 31)
        return -1;
    size_t head = 2, n = in->p[1];
    if (n >= 128) {
        size_t more = n - 128;
        if (more < 1 || more > 3 || in->n < 2 + more)
            return -1;
        for (n = 0; head < 2 + more; head++)
            n = n << 8 | in->p[head];
        if (n < 128 || n >> 8 * (more - 1) == 0)
            return -1;
    }
    if (in->n - head < n)
        return -1;
    int tag = in->p[0];
    *value = (struct bytes){ in->p + head, n };
    *in = bytes_from(*in, head + n);
    return tag;
}

/* A public key's parts as they stand in its DER. */
struct der_public {
    struct bytes algorithm, parameters, key;
};

/* SubjectPublicKeyInfo (RFC 5280 4.1): SEQUENCE { SEQUENCE { OID, parameters at most once }, BIT STRING }. */
static bool der_public_key(struct bytes in, struct der_public *k)
{
    struct bytes body, algorithm;
    *k = (struct der_public){ .key = { NULL, 0 } };
    if (der_next(&in, &body) != DER_SEQUENCE || in.n || der_next(&body, &algorithm) != DER_SEQUENCE)
        return false;
    if (der_next(&algorithm, &k->algorithm) != DER_OID || k->algorithm.n == 0)
        return false;
    if (algorithm.n && (der_next(&algorithm, &k->parameters) < 0 || algorithm.n))
        return false;
    if (der_next(&body, &k->key) != DER_BIT_STRING || body.n || k->key.n < 2 || k->key.p[0] >= 8)
        return false;
    k->key = bytes_from(k->key, 1);   /* how many bits of the last byte are unused */
    return true;
}

static bool der_is_spki(struct bytes in)
{
    struct der_public k;
    return der_public_key(in, &k);
}

/* RSAPublicKey (RFC 8017 A.1.1): SEQUENCE { INTEGER, INTEGER }. */
static bool der_is_pkcs1_public(struct bytes in)
{
    struct bytes body, part;
    if (der_next(&in, &body) != DER_SEQUENCE || in.n)
        return false;
    return der_next(&body, &part) == DER_INTEGER && der_next(&body, &part) == DER_INTEGER && body.n == 0;
}

#if CVMS_TLS
/* A private key's numbers as they stand in its DER, without leading zeros; what it has none of is empty. */
struct der_private {
    struct bytes rsa[8];    /* n, e, d, p, q, dP, dQ, qInv (RFC 8017 A.1.2) */
    struct bytes ec;        /* RFC 5915 3 */
    struct bytes algorithm; /* the identifier in PKCS#8 (RFC 5958 2) */
};

/* Takes PKCS#1, SEC1, or PKCS#8 around either; false if the DER is none of them.  An algorithm other than RSA and EC is
 * not looked into. */
static bool der_private_key(struct bytes in, struct der_private *k)
{
    struct bytes body, part;
    *k = (struct der_private){ .ec = { NULL, 0 } };
    for (;;) {
        if (der_next(&in, &body) != DER_SEQUENCE || in.n || der_next(&body, &part) != DER_INTEGER)
            return false;
        int tag = der_next(&body, &part);
        if (tag == DER_OCTET_STRING)
            k->ec = part;
        for (size_t i = 0; i < 8 && tag == DER_INTEGER; i++) {
            while (part.n && part.p[0] == 0)
                part = bytes_from(part, 1);
            k->rsa[i] = part;
            tag = i < 7 ? der_next(&body, &part) : tag;
        }
        if (tag != DER_SEQUENCE || k->algorithm.n)
            return tag == DER_OCTET_STRING || (tag == DER_INTEGER && body.n == 0);
        if (der_next(&part, &k->algorithm) != DER_OID || der_next(&body, &in) != DER_OCTET_STRING)
            return false;
        if (!bytes_eq(k->algorithm, BYTES(OID_RSA)) && !bytes_eq(k->algorithm, BYTES(OID_EC)))
            return true;
    }
}
#endif

/* ==== 6. Streams and flow control (RFC 9113 5, 6.9); what all connections share ====================================
 * Owns: what connections share (time, scratch space, the lines that wait for stdout and stderr), what a connection and
 * its streams are, the queue of what a stream has yet to send, both directions' windows.
 * Never: reads or writes a descriptor, looks at a clock, knows what the bytes mean.
 *
 * The most that one connection can make us hold is the sum of its caps: the longest message, DEFAULT_WINDOW of one for each
 * stream, the streams with their sessions, MAX_QUEUED_BYTES, twice OUT_HIGH, a field block, a frame, a dynamic table,
 * and what TLS needs: -max-message and 7.5 MiB.  The test of the worst connection adds them up.
 */
enum {
    STAMP_LEN = 24,
    LOOK_BRIEF = 1, LOOK_COLOR = 2,   /* of a terminal: the time of day is enough, long names are cut; there are colours */
    NAME_COLUMN = 9, NAME_FULL = 36, NAME_BRIEF = 15,  /* the column of names grows with them, up to the latter */
    KIND_COLUMN = 13, WORD_COLUMN = 11,
    MAX_HEADER_LIST = 16384,          /* bytes as RFC 9113 6.5.2 counts them; more gets 431 */
    NOTES_MAX = 1 << 20,              /* lines waiting for stderr, in bytes, above which new ones are lost; */
    JOINED_MAX = 32 << 20,            /* the same where stdout is the same file: they wait among the messages */
};

/* What a peer can raise (see caps, section 6).  The first ones are counted by a token bucket. */
enum cap {
    CAP_STREAM_ERRORS, CAP_CONTROL_FRAMES, CAP_BUCKETS,
    CAP_STREAMS = CAP_BUCKETS, CAP_HEADER_LIST, CAP_FIELDS, CAP_FIELD_BLOCK, CAP_CONTINUATIONS, CAP_MESSAGE,
    CAP_ANSWERS, CAP_SHARE, CAP_PREFACE, CAP_HEAD, CAP_STUCK, CAP_IDLE, CAP_SILENCE, CAP_CONNECTIONS, CAP_DESCRIPTORS,
    CAP_HOSTS, CAPS
};

struct bucket {
    int32_t used;
    int64_t at_ms;
};

struct core {
    int64_t now_ms;                   /* monotonic; set by the loop before it calls anything here */
    int64_t wall_ms;                  /* Unix time, for what is shown */
    bool backpressure;                /* stdout is behind: no flow-control credit is given back */
    struct buf out, err;              /* lines on their way to stdout and stderr */
    unsigned out_look, err_look;      /* LOOK_... of both; 0: no terminal */
    int name_column;
    const char *role;                 /* what this program is: "agent", "health"; NULL: the server */
    bool joined;                      /* both are one file: all lines go by way of out, in their order */
    unsigned long notes_lost;         /* lines that stderr did not take in time */
    struct bucket strangers;          /* lines of connections that come to nothing, which anybody can make, */
    unsigned long left_out;           /* and those that it left out since the last one */
    bool tls_first;                   /* endpoint.tls_first has been told */
    struct buf spare;                 /* an output buffer for the next connection that needs one */
    bool recording;
    struct buf record;                /* lines on their way to -record's file */
    bool touched;                     /* something was sent outside a connection's own turn */
    void *app;                        /* what the command knows: struct server, agent, replay or health */
    int64_t stamp_ms;                 /* what stamp and, in local time, day say */
    char stamp[STAMP_LEN + 1], day[9], port[KIND_COLUMN + 1];
    int64_t cap_told_ms[CAPS];        /* when the log last told of each cap; 0: never */
    struct pb_arena arena;            /* one decoded message */
    struct huffman huffman;
    uint8_t hpack_scratch[HPACK_SCRATCH(MAX_HEADER_LIST)];
    uint8_t field_bytes[MAX_HEADER_LIST];
};

/* The wall clock as RFC 3339 UTC with milliseconds, STAMP_LEN characters. */
static const char *core_stamp(struct core *core)
{
    if (core->stamp[0] && core->wall_ms == core->stamp_ms)
        return core->stamp;
    int64_t s = core->wall_ms / 1000;
    if (core->stamp[0] == 0 || s != core->stamp_ms / 1000) {
        uint8_t room[64];
        struct buf b = { .p = room, .cap = sizeof room };   /* large enough: nothing is allocated */
        if (pb_timestamp(&b, s, 1000000) && b.len == STAMP_LEN)
            memcpy(core->stamp, b.p, STAMP_LEN);
        struct tm day = { 0 };
        localtime_r(&(time_t){ (time_t)s }, &day);
        text_printf(core->day, sizeof core->day, "%02d:%02d:%02d", day.tm_hour, day.tm_min, day.tm_sec);
    }
    core->stamp_ms = core->wall_ms;
    text_printf(core->stamp + 20, 5, "%03dZ", (int)(core->wall_ms % 1000));
    return core->stamp;
}

/* Whom a line is about: an agent's job-id or host, safe to print, and which of several that share it (0, 1: none do);
 * what it is. */
struct whom {
    struct bytes name;
    const char *kind;
    unsigned number;
    bool dim;                         /* no news: connections come and go */
};

#define COLOR_DIM "\x1b[2m"
#define COLOR_RED "\x1b[31m"
#define COLOR_GREEN "\x1b[32m"
#define COLOR_OFF "\x1b[0m"

/* Fills a column that began at `from` to its width, and at least one blank behind it. */
static void put_blanks(struct buf *out, size_t from, int width)
{
    static const char blanks[] = "                                         ";
    size_t used = out->len - from;
    buf_put(out, blanks, used < (size_t)width ? (size_t)width + 1 - used : 1);
}

/* The first columns of a line: time, name, kind.  A name too long for a terminal loses its middle. */
static void put_whom(struct core *core, struct buf *out, unsigned look, const struct whom *w)
{
    const char *stamp = core_stamp(core);
    struct bytes name = w->name;
    int half = NAME_BRIEF / 2, most = NAME_FULL;
    if (look & LOOK_BRIEF) {
        most = NAME_BRIEF;
        buf_puts(out, core->day);
        buf_put(out, stamp + STAMP_LEN - 5, 4);
    } else {
        buf_put(out, stamp, STAMP_LEN);
    }
    buf_putc(out, ' ');
    size_t from = out->len;
    if (look & LOOK_BRIEF && name.n > NAME_BRIEF && bytes_printable(name)) {
        buf_printf(out, "%.*s~", half, (const char *)name.p);
        name = bytes_from(name, name.n - (size_t)half);
    }
    buf_put(out, name.p, name.n);
    if (w->number > 1)
        buf_printf(out, "/%u", w->number);
    int n = (int)min_size(out->len - from, (size_t)most);
    core->name_column = n > core->name_column ? n : core->name_column;
    put_blanks(out, from, core->name_column < NAME_COLUMN ? NAME_COLUMN : core->name_column < most ? core->name_column : most);
    from = out->len;
    buf_puts(out, w->kind);
    put_blanks(out, from, KIND_COLUMN);
}

/* Of log lines. */
static unsigned core_look(const struct core *core)
{
    return core->joined ? core->out_look : core->err_look;
}

/* One line on stderr, with what a peer or a user has put into it made safe. */
PRINTF_LIKE(3, 4) static void core_tell(struct core *core, struct whom w, const char *fmt, ...)
{
    char text[2000];
    static const struct whom self = { .name = { (const uint8_t *)"cvms", 4 }, .kind = "server" };
    struct buf *out = core->joined ? &core->out : &core->err;
    unsigned look = core_look(core);
    bool dim = look & LOOK_COLOR && w.dim;
    size_t before = out->len;
    if (before > (core->joined ? JOINED_MAX : NOTES_MAX)) {
        core->notes_lost++;
        return;
    }
    if (core->notes_lost) {
        put_whom(core, out, look, &self);
        buf_printf(out, "%lu line%s lost: stderr is not read, or memory is short\n", core->notes_lost, PLURAL(core->notes_lost));
    }
    put_whom(core, out, look, &w);
    buf_puts(out, dim ? COLOR_DIM : "");
    TEXT_REST(text, fmt);
    put_text(out, bytes_of(text), NULL);
    buf_puts(out, dim ? COLOR_OFF "\n" : "\n");
    if (out->failed)                  /* not half a line */
        out->len = before;
    core->notes_lost = out->failed ? core->notes_lost + 1 : 0;
    out->failed = false;
}

/* How long the host is in HOST:PORT. */
static size_t host_len(const char *peer)
{
    const char *colon = strrchr(peer, ':');
    return colon ? (size_t)(colon - peer) : strlen(peer);
}

/* A connection, HOST:PORT, or (NULL) this program itself.  It holds until the next call. */
static struct whom core_whom(struct core *core, const char *peer)
{
    if (!peer)
        return (struct whom){ .name = BYTES("cvms"), .kind = core->role ? core->role : "server" };
    size_t n = host_len(peer);
    text_printf(core->port, sizeof core->port, "port %s", peer[n] ? peer + n + 1 : "-");
    return (struct whom){ .name = { (const uint8_t *)peer, n }, .kind = core->port };
}

#define core_note(core, peer, ...) core_tell(core, core_whom(core, peer), __VA_ARGS__)

enum {
    MAX_CONCURRENT_STREAMS = 100,
    MAX_FIELD_BLOCK = 32768,          /* bytes of HEADERS and its CONTINUATIONs */
    MAX_CONTINUATIONS = 16,
    MAX_QUEUED_ITEMS = 64,            /* responses that wait on one stream; */
    MAX_CLIENT_ITEMS = 4096,          /* of a client, messages: more than one read can ask for */
    MAX_QUEUED_BYTES = 262144,        /* bytes that wait on one connection, without the manifest, which is shared */
    MAX_HOSTS = 1000,                 /* agent hosts that a smoke test's verdict tells apart */
    ANSWERS_PER_FRAME = 10,           /* frames without data that one of ours with data, or a stream's end, may cause */
    OUT_TARGET = 65536,               /* DATA is put into the output up to here: one large write */
    OUT_HIGH = 262144,                /* output waiting on one connection, above which it is not read */
    CREDIT_STEP = DEFAULT_WINDOW / 2, /* flow-control credit is given back in steps of this */
    CLOSED_IDS = 16,                  /* closed streams whose end is remembered */
    PREFACE_MS = 10000,               /* from accept to the client's SETTINGS */
    STUCK_MS = 30000,                 /* output that makes no progress for so long ends the connection */
    SHARE_MS = 10000,                 /* a long message that stands still for so long, while others wait, ends */
    LINGER_MS = 2000,                 /* after a GOAWAY: how long the peer has to read it */
    IDLE_MS = 300000,                 /* a client without an open stream for so long is sent away */
    SILENCE_MS = 300000,              /* a client that has sent nothing for so long gets a PING, */
    ANSWER_MS = 60000,                /* and so long to answer it */
    HEARD_STEP_MS = 1000,             /* how finely the time of a client's last bytes is kept */
};

/* The caps' names and values (of a bucket: so many at once, so many a second; 0: the name says it), and what becomes of
 * a peer that goes over one.  The first stops rapid reset (CVE-2023-44487) and MadeYouReset (CVE-2025-8671), the second
 * floods of frames that carry no data (CVE-2019-9512, 9513, 9515, 9517, 9518). */
static const struct {
    const char *name;
    int32_t max, per_s;
    const char *effect;
} caps[CAPS] = {
    [CAP_STREAM_ERRORS]  = { "stream errors and resets", 200, 50, "the connection ends" },
    [CAP_CONTROL_FRAMES] = { "frames that carry no data", 1000, 100, "the connection ends" },
    [CAP_STREAMS]        = { "streams of a connection", MAX_CONCURRENT_STREAMS, 0, "the new one is refused" },
    [CAP_HEADER_LIST]    = { "bytes of a header list", MAX_HEADER_LIST, 0, "the request is refused" },
    [CAP_FIELDS]         = { "fields of a field block", HPACK_FIELDS_MAX, 0, "the connection ends" },
    [CAP_FIELD_BLOCK]    = { "bytes of a field block", MAX_FIELD_BLOCK, 0, "the connection ends" },
    [CAP_CONTINUATIONS]  = { "CONTINUATION frames of a field block", MAX_CONTINUATIONS, 0, "the connection ends" },
    [CAP_MESSAGE]        = { "bytes of a message (-max-message)", 0, 0, "the stream ends" },
    [CAP_ANSWERS]        = { "answers that wait to be read", 0, 0, "the stream ends" },
    [CAP_SHARE]          = { "seconds in which a long message stands still while others wait", SHARE_MS / 1000, 0,
                             "the stream ends" },
    [CAP_PREFACE]        = { "seconds to the connection preface", PREFACE_MS / 1000, 0, "the connection ends" },
    [CAP_HEAD]           = { "seconds for the head of an HTTP/1 request", PREFACE_MS / 1000, 0, "the connection ends" },
    [CAP_STUCK]          = { "seconds in which no output is taken", STUCK_MS / 1000, 0, "the connection ends" },
    [CAP_IDLE]           = { "seconds without an open stream", IDLE_MS / 1000, 0, "the connection ends" },
    [CAP_SILENCE]        = { "seconds of silence, with no answer to a PING", (SILENCE_MS + ANSWER_MS) / 1000, 0,
                             "the connection ends" },
    [CAP_CONNECTIONS]    = { "connections (-max-connections)", 0, 0, "the new one is turned away" },
    [CAP_DESCRIPTORS]    = { "connections: no descriptor or memory is left", 0, 0, "new ones have to wait" },
    [CAP_HOSTS]          = { "agent hosts that are told apart", MAX_HOSTS, 0, "the verdict passes over the new one" },
};

/* Takes a token of a bucket that holds max and gets per_s of them a second.  False: none is left. */
static bool bucket_take(struct bucket *b, int64_t now_ms, int32_t max, int32_t per_s)
{
    int64_t back = (now_ms - b->at_ms) * per_s / 1000;
    if (back >= b->used) {
        b->used = 0;
        b->at_ms = now_ms;
    } else {
        b->used -= (int32_t)back;
        b->at_ms += back * 1000 / per_s;
    }
    bool taken = b->used < max;
    b->used += taken;
    return taken;
}

enum { STRANGERS_MAX = 20, STRANGERS_PER_S = 5 };

/* Whether there is room for a line that a stranger has caused, or it has to be; what was left out is told first. */
static bool core_strangers(struct core *core, bool end)
{
    if (!bucket_take(&core->strangers, core->now_ms, STRANGERS_MAX, STRANGERS_PER_S) && !end)
        return false;
    if (core->left_out)
        core_note(core, NULL, "%lu more line%s about connections that failed left out", core->left_out, PLURAL(core->left_out));
    core->left_out = 0;
    return true;
}

/* A line about a connection that fails, or a call that is refused, by its peer's fault. */
PRINTF_LIKE(3, 4) static void core_fault(struct core *core, const char *peer, const char *fmt, ...)
{
    char text[600];
    TEXT_REST(text, fmt);
    if (core_strangers(core, false))
        core_note(core, peer, "%s", text);
    else
        core->left_out++;
}

/* A peer (NULL: none in particular) has gone over a cap: one line a second for each cap. */
static void core_cap(struct core *core, const char *peer, enum cap cap)
{
    char value[48] = "";
    if (core->cap_told_ms[cap] && core->now_ms - core->cap_told_ms[cap] < 1000)
        return;
    core->cap_told_ms[cap] = core->now_ms;
    if (caps[cap].per_s)
        text_printf(value, sizeof value, " (%ld, and %ld a second)", (long)caps[cap].max, (long)caps[cap].per_s);
    else if (caps[cap].max)
        text_printf(value, sizeof value, " (%ld)", (long)caps[cap].max);
    core_note(core, peer, "over the cap on %s%s: %s", caps[cap].name, value, caps[cap].effect);
}

/* Bytes that several streams send at once: the manifest, a descriptor.  Freed with its last reference. */
struct blob {
    uint32_t refs;
    size_t n;
    uint8_t p[];
};

enum item_kind { ITEM_DATA, ITEM_LAST_DATA, ITEM_PULLED, ITEM_TRAILERS };

struct item {
    struct item *next;
    struct blob *blob;                /* NULL: the bytes are pulled when they can go out */
    uint64_t left;                    /* bytes still to go out */
    size_t own;                       /* bytes that it alone holds, counted against MAX_QUEUED_BYTES */
    enum item_kind kind;
};

struct conn;
struct h2_handler;
struct fields;
struct stream;

/* One row a method; NULL: nothing to do.  A server's row has open, a client's has status and may have open. */
struct grpc_method {
    const char *path;
    unsigned needs;                   /* of endpoint.offers; 0: it is always there */
    void (*open)(struct stream *, const struct fields *);     /* the fields are good; before any message */
    void (*message)(struct stream *, struct bytes);           /* one whole message; it holds during the call */
    void (*end)(struct stream *);                             /* the client has sent all */
    void (*drained)(struct stream *);                         /* all that was queued is in the output */
    size_t (*pull)(struct stream *, uint8_t *, size_t);       /* n more bytes of a body; fewer: it breaks off */
    void (*status)(struct stream *, unsigned status, struct bytes text);  /* at a client: the call has ended */
    void (*closed)(struct stream *);                          /* last call */
};

/* What the connections of a listener, or of a dial, have in common; it outlives them. */
struct endpoint {
    const struct h2_handler *on;      /* grpc_server or grpc_client */
    bool client;
    const struct grpc_method *methods;    /* a server's: what may be called */
    const struct grpc_method *plain;      /* who gets the requests that are not gRPC; NULL: nobody */
    const char *tls_first;                /* told once, of clients that try TLS on a plain port; NULL: that is a mistake */
    size_t method_count, max_message;
    unsigned offers;                  /* what it has of the methods that are not always there */
};

/* gRPC's state of a stream (section 8). */
struct grpc_stream {
    const struct grpc_method *method;
    bool headers_sent, finishing, no_body, answered, broken, ended;   /* broken: a client's, which got no status; ended: it
                                       * would not wait for one */
    char encoding[16];                /* of messages that are flagged as compressed; empty: none */
    uint8_t prefix[5], prefix_len;
    uint16_t plain;                   /* not gRPC: the HTTP status of the answer, */
    const char *allow;                /* what 405 allows, */
    uint64_t length;                  /* and how long the body of a 200 is, which is pulled, */
    const char *type;                 /* and of what type (NULL: any) */
    uint32_t message_len;
    struct buf message;               /* a message whose bytes came in several pieces */
};

struct stream {
    struct stream *next;
    struct conn *conn;
    struct item *head, *tail;
    uint32_t id, queued;
    int32_t send_window, recv_window;
    uint32_t recv_credit;             /* DATA dealt with and not yet given back by WINDOW_UPDATE */
    bool remote_closed, local_closed, dead, headers_seen, lingers;   /* lingers: what it has yet to send is let come, but dropped */
    size_t long_message, share;       /* bytes that have to be kept at once, if over a window, and those granted */
    uint64_t share_ticket;            /* place among those that wait for a share; 0: it does not */
    int64_t share_ms;                 /* when a stream with a share was last given credit */
    int64_t content_length;           /* -1: not given; else what is still to come */
    int64_t deadline_ms;              /* when the handler's abort is called; INT64_MAX: never */
    struct grpc_stream grpc;
    void *user;                       /* the service's own state */
};

enum conn_phase { CONN_PREFACE, CONN_OPEN, CONN_CLOSING, CONN_DEAD };

struct h2_handler {
    void (*headers)(struct stream *, const struct fields *, bool end);  /* request; at a client response or trailers */
    void (*data)(struct stream *, struct bytes);                        /* DATA, cut anywhere */
    void (*end)(struct stream *);                                       /* the peer sent END_STREAM */
    void (*abort)(struct stream *, unsigned grpc_status, const char *text);
    void (*lost)(struct stream *, const char *how, uint32_t code);      /* a client's: it ends with an HTTP/2 error */
    void (*closed)(struct stream *);                                    /* last call: the stream is freed after it */
};

struct conn {
    struct core *core;
    const struct endpoint *endpoint;
    const struct h2_handler *on;
    enum conn_phase phase;
    bool client, secure, settings_seen, goaway_sent, goaway_seen, reap, size_update_due, eof, write_closed,
        http1, no_h2, below;          /* http1: one request after the other; goaway_sent: it was the last; below: what has
                                       * left the output has not gone out yet */
    /* input */
    uint8_t header[PREFACE_LEN], header_len;   /* the first bytes of a connection, then of a frame */
    uint8_t block_flags, block_frames;    /* of the HEADERS frame whose block is being joined, and how many it has */
    struct frame frame;
    uint32_t block_id, block_dependency;  /* stream of the open field block, 0: none */
    struct buf in, block;             /* a frame's payload, or a head of HTTP/1, in pieces; a field block in pieces */
    struct buf goaway;                /* a client's: what the server's GOAWAY says, with a NUL */
    struct hpack hpack;
    /* output */
    struct buf out;                   /* out.failed: memory was short for something of this connection, which ends it */
    size_t out_sent, queued_bytes;
    uint32_t peer_initial_window, last_id, next_id, stream_count;
    int32_t send_window, recv_window;
    uint32_t recv_credit;
    struct stream *streams, *current, *next_to_send;
    size_t shared;                    /* sum of the streams' shares; at most the longest message */
    uint64_t share_tickets;
    uint32_t share_waiting;
    uint32_t closed[CLOSED_IDS], closed_at;   /* top bit: we reset it, so frames in flight are to be ignored */
    struct bucket bucket[CAP_BUCKETS];
    uint64_t control_credit;                 /* frames of the peer's that our own may still bring about */
    uint64_t discard_window;                  /* DATA that may still come on streams that we have reset */
    int64_t opened_ms, progress_ms, closing_ms;   /* opened_ms: or when a head of HTTP/1 has begun */
    int64_t idle_ms, heard_ms, ping_ms;   /* the last stream's end, the peer's last bytes, our PING (0: none waits) */
    enum h2_error error;
    const char *why;
    char peer[56];
    const char *subject;              /* of the peer's certificate, safe to print; NULL: none */
};

static size_t power_of_two(size_t n)
{
    size_t p = 1;
    while (p < n && p <= SIZE_MAX / 2)
        p *= 2;
    return p;
}

static struct blob *blob_new(size_t n)
{
    struct blob *b = n > SIZE_MAX - sizeof *b ? NULL : malloc(sizeof *b + n);
    if (b)
        *b = (struct blob){ .refs = 1, .n = n };
    return b;
}

static struct blob *blob_copy(struct bytes from)
{
    struct blob *b = blob_new(from.n);
    if (b && from.n)
        memcpy(b->p, from.p, from.n);
    return b;
}

static struct blob *blob_ref(struct blob *b)
{
    b->refs++;
    return b;
}

static void blob_unref(struct blob *b)
{
    if (b && --b->refs == 0)
        free(b);
}

/* Takes the output buffer for appending; an idle connection has none and borrows the core's spare one. */
static struct buf *conn_out(struct conn *c)
{
    if (!c->out.p && c->core->spare.p) {
        c->core->spare.failed = c->out.failed;
        c->out = c->core->spare;
        c->core->spare = (struct buf){ 0 };
    }
    if (c->out.len == c->out_sent)
        c->progress_ms = c->core->now_ms;
    if (c->out_sent >= OUT_TARGET / 2) {   /* a peer that never lets it drain does not make it grow */
        c->out.len -= c->out_sent;
        memmove(c->out.p, c->out.p + c->out_sent, c->out.len);
        c->out_sent = 0;
    }
    return &c->out;
}

/* A stream has ended: frames that were on their way may still come. */
static void conn_remember_closed(struct conn *c, uint32_t id, bool we_reset)
{
    c->control_credit += ANSWERS_PER_FRAME;
    c->discard_window += we_reset ? DEFAULT_WINDOW : 0;
    c->closed[c->closed_at++ % CLOSED_IDS] = id | (we_reset ? 0x80000000 : 0);
}

/* Whether nobody has opened a stream with this id yet (RFC 9113 5.1). */
static bool conn_is_idle(const struct conn *c, uint32_t id)
{
    return c->client ? (id & 1) == 0 || id >= c->next_id : (id & 1) == 0 || id > c->last_id;
}

/* How a stream that is no longer in the list ended: 0 unknown, 1 by the peer or normally, 2 reset by us. */
static int conn_how_closed(const struct conn *c, uint32_t id)
{
    for (unsigned i = 0; i < CLOSED_IDS; i++)
        if ((c->closed[i] & 0x7fffffff) == id)
            return c->closed[i] >> 31 ? 2 : 1;
    return 0;
}

/* The server's first frame. */
static void conn_put_settings(struct conn *c)
{
    frame_put(conn_out(c), 12, FRAME_SETTINGS, 0, 0);
    frame_put_setting(&c->out, SETTINGS_MAX_CONCURRENT_STREAMS, MAX_CONCURRENT_STREAMS);
    frame_put_setting(&c->out, SETTINGS_MAX_HEADER_LIST_SIZE, MAX_HEADER_LIST);
}

/* What it costs to queue a blob: the item, and its bytes if only this reference holds them. */
static size_t item_own(const struct blob *b)
{
    return sizeof(struct item) + (b && b->refs == 1 ? sizeof *b + b->n : 0);
}

static void stream_drop_item(struct stream *s)
{
    struct item *i = s->head;
    s->head = i->next;
    s->tail = s->head ? s->tail : NULL;
    s->queued--;
    s->conn->queued_bytes -= i->own;
    blob_unref(i->blob);
    free(i);
}

static void stream_drop_queue(struct stream *s)
{
    while (s->head)
        stream_drop_item(s);
}

/* Marks a stream that has ended both ways; conn_reap frees it when no caller holds it any more. */
static void stream_done(struct stream *s)
{
    s->dead = true;
    s->conn->reap = true;
    stream_drop_queue(s);
}

/* Closing, in two steps.  Ours have been the last words: what waits still goes out, what comes is read and dropped, so
 * that no reset takes them back, and LINGER_MS later the connection is abandoned. */
static void conn_close(struct conn *c)
{
    if (c->phase >= CONN_CLOSING)
        return;
    c->phase = CONN_CLOSING;
    c->closing_ms = c->core->now_ms;
    for (struct stream *s = c->streams; s; s = s->next)
        stream_done(s);
}

/* Nothing more goes out or is read; the loop closes the descriptor. */
static void conn_abandon(struct conn *c)
{
    c->phase = CONN_DEAD;
}

/* The connection ends: GOAWAY is queued, and no stream says anything behind it. */
static void conn_end(struct conn *c, enum h2_error code, const char *why)
{
    c->error = code;
    c->why = why;
    if (c->phase == CONN_PREFACE)
        conn_put_settings(c);
    if (!c->http1)
        frame_put_goaway(conn_out(c), c->client ? 0 : c->last_id, code, why);
    conn_close(c);
}

/* The same because of what the peer has sent; the first reason is the true one. */
static void conn_fail(struct conn *c, enum h2_error code, const char *why)
{
    if (c->phase >= CONN_CLOSING)
        return;
    if (c->phase == CONN_OPEN && !c->client)   /* a client's calls tell it */
        core_fault(c->core, c->peer, "the connection ends: %s: %s (%s frame on stream %lu)", h2_error_names[code], why,
                  c->frame.type < FRAME_TYPES ? frame_rules[c->frame.type].name : "unknown",
                  (unsigned long)c->frame.stream_id);
    conn_end(c, code, why);
}

/* The connection ends because the peer has gone over a cap. */
static void conn_over_cap(struct conn *c, enum cap cap)
{
    if (c->phase >= CONN_CLOSING)
        return;
    core_cap(c->core, c->peer, cap);
    conn_end(c, ENHANCE_YOUR_CALM, caps[cap].name);
}

/* Takes a token of a cap.  False: none left, and the connection has been ended with ENHANCE_YOUR_CALM. */
static bool conn_spend(struct conn *c, enum cap cap)
{
    if (bucket_take(&c->bucket[cap], c->core->now_ms, caps[cap].max, caps[cap].per_s))
        return true;
    conn_over_cap(c, cap);
    return false;
}

/* Counts a frame that carries no data.  Those that ours may have brought about are free: WINDOW_UPDATE, and the PINGs
 * by which a peer measures the way, for DATA; what was on its way to a stream that has ended. */
static bool conn_spend_control(struct conn *c)
{
    if (c->control_credit == 0)
        return conn_spend(c, CAP_CONTROL_FRAMES);
    c->control_credit--;
    return true;
}

static struct stream *stream_find(struct conn *c, uint32_t id)
{
    if (c->current && c->current->id == id)
        return c->current;
    for (struct stream *s = c->streams; s; s = s->next)
        if (s->id == id)
            return c->current = s;
    return NULL;
}

/* A new open stream, or NULL without memory.  Owned by the connection. */
static struct stream *stream_new(struct conn *c, uint32_t id)
{
    struct stream *s = malloc(sizeof *s);
    if (!s) {
        c->out.failed = true;
        return NULL;
    }
    *s = (struct stream){ .next = c->streams, .conn = c, .id = id, .send_window = (int32_t)c->peer_initial_window,
                          .recv_window = DEFAULT_WINDOW, .content_length = -1, .deadline_ms = INT64_MAX };
    c->streams = c->current = s;
    c->stream_count++;
    return s;
}

/* RST_STREAM (RFC 9113 5.4.2); in HTTP/1 the connection's end behind what is in the output. */
static void stream_reset(struct stream *s, enum h2_error code)
{
    if (s->dead)
        return;
    if (s->conn->http1) {
        s->conn->goaway_sent = true;
        stream_done(s);
        return;
    }
    frame_put_u32(conn_out(s->conn), FRAME_RST_STREAM, s->id, code);
    conn_remember_closed(s->conn, s->id, true);
    stream_done(s);
}

/* A stream error that the peer brought about: RST_STREAM, against the cap on such errors.  On an idle stream, for which
 * there is no RST_STREAM (RFC 9113 6.4), it is the connection's. */
static void conn_stream_error(struct conn *c, uint32_t id, enum h2_error code)
{
    if (conn_is_idle(c, id)) {
        conn_fail(c, code, "a frame that is wrong, on an idle stream");
        return;
    }
    if (!conn_spend(c, CAP_STREAM_ERRORS))
        return;
    struct stream *s = stream_find(c, id);
    if (s && !s->dead) {
        if (c->client)
            c->on->lost(s, "the server's answer breaks HTTP/2", code);
        stream_reset(s, code);
        return;
    }
    frame_put_u32(conn_out(c), FRAME_RST_STREAM, id, code);
    conn_remember_closed(c, id, true);
}

/* Our END_STREAM is in the output.  A server that has said all it has to say stops the client's side too
 * (RFC 9113 8.1). */
static void stream_local_end(struct stream *s)
{
    s->local_closed = true;
    if (s->remote_closed)
        stream_done(s);
    else if (s->lingers)
        s->deadline_ms = s->conn->core->now_ms + LINGER_MS;
    else if (!s->conn->client)
        stream_reset(s, NO_ERROR);
}

/* Queues bytes for the stream and takes over the caller's reference to them, also when it fails (NULL included); a body
 * that is pulled has none.  Behind the last item nothing more is said. */
static void stream_queue(struct stream *s, struct blob *blob, enum item_kind kind)
{
    bool over = s->dead || s->local_closed || (s->tail && s->tail->kind != ITEM_DATA);
    uint64_t n = kind == ITEM_PULLED ? s->grpc.length : blob ? blob->n : 0;
    struct item *i = over || (!blob && kind != ITEM_PULLED) ? NULL : malloc(sizeof *i);
    if (!i) {
        blob_unref(blob);
        s->conn->out.failed |= !over;
        return;
    }
    *i = (struct item){ .blob = blob, .left = n, .own = item_own(blob), .kind = kind };
    s->conn->queued_bytes += i->own;
    if (s->tail)
        s->tail->next = i;
    else
        s->head = i;
    s->tail = i;
    s->queued++;
}

/* As many bytes of DATA as can go out at once: what the windows let out, at most a frame.  HTTP/1 has neither. */
static size_t stream_window(const struct stream *s)
{
    int32_t window = s->send_window < s->conn->send_window ? s->send_window : s->conn->send_window;
    return s->conn->http1 ? OUT_TARGET / 2 : window > 0 ? min_size((size_t)window, MAX_FRAME_SIZE) : 0;
}

/* Puts a whole field block into the output.  The first one after a peer's SETTINGS_HEADER_TABLE_SIZE begins with the
 * update that it asks for, one byte; we add nothing to the table, so nought is always right (RFC 7541 4.2, 6.3). */
static void conn_put_block(struct conn *c, uint32_t id, struct bytes block, unsigned flags)
{
    size_t update = c->size_update_due;
    c->size_update_due = false;
    frame_put(conn_out(c), (uint32_t)(update + block.n), FRAME_HEADERS, END_HEADERS | flags, id);
    buf_put(&c->out, "\x20", update);
    buf_put(&c->out, block.p, block.n);
}

/* Puts n bytes of an item into the output.  False: the body that they belong to breaks off, and the stream is reset. */
static bool stream_put_data(struct stream *s, const struct item *i, size_t n, bool end)
{
    struct conn *c = s->conn;
    size_t head = c->http1 ? 0 : FRAME_HEADER_LEN, at = c->out.len, got = n;
    uint8_t *to = buf_room(&c->out, head + n);
    if (!to)
        return false;
    if (i->blob && n)
        memcpy(to + head, i->blob->p + (i->blob->n - i->left), n);
    else if (!i->blob)
        got = s->grpc.method->pull(s, to + head, n);
    c->control_credit += ANSWERS_PER_FRAME;
    if (head) {
        frame_put(&c->out, (uint32_t)got, FRAME_DATA, end && got == n ? END_STREAM : 0u, s->id);
        s->send_window -= (int32_t)got;
        c->send_window -= (int32_t)got;
    }
    c->out.len = at + head + got;
    if (got < n)
        stream_reset(s, INTERNAL_ERROR);
    return got == n;
}

/* Puts one frame of the stream's queue into the output. */
static void stream_emit(struct stream *s)
{
    struct conn *c = s->conn;
    struct item *i = s->head;
    size_t n = i->left < SIZE_MAX ? (size_t)i->left : SIZE_MAX;
    if (i->kind != ITEM_TRAILERS)
        n = min_size(n, stream_window(s));
    bool end = n == i->left && i->kind != ITEM_DATA;
    if (i->kind == ITEM_TRAILERS)
        conn_put_block(c, s->id, (struct bytes){ i->blob->p, i->blob->n }, END_STREAM);
    else if (!stream_put_data(s, i, n, end))
        return;
    i->left -= n;
    if (i->left)
        return;
    stream_drop_item(s);
    if (end)
        stream_local_end(s);
    else if ((!s->head || s->head->kind == ITEM_TRAILERS) && s->grpc.method && s->grpc.method->drained)
        s->grpc.method->drained(s);
}

/* The next stream, in turn, that can send now. */
static struct stream *conn_next_sendable(struct conn *c)
{
    struct stream *s = c->next_to_send ? c->next_to_send : c->streams;
    for (uint32_t n = c->stream_count; n && s; n--, s = s->next ? s->next : c->streams)
        if (s->head && (s->head->kind == ITEM_TRAILERS || s->head->left == 0 || stream_window(s))) {
            c->next_to_send = s->next;
            return s;
        }
    return NULL;
}

/* A stream in the middle of a message longer than a window keeps it in memory.  Such messages share what the longest
 * one needs: a stream that is not granted its own keeps a window of it and waits, first come, first served.  One that
 * does not move while others wait loses its life (shares_fire), so all go on (RFC 9113 5.2). */
static bool stream_may_go_on(struct stream *s)
{
    struct conn *c = s->conn;
    if (!s->long_message || s->share)
        return true;
    if (!s->share_ticket) {
        s->share_ticket = ++c->share_tickets;
        c->share_waiting++;
    }
    for (struct stream *w = c->streams; w; w = w->next)
        if (w->share_ticket && w->share_ticket < s->share_ticket)
            return false;
    size_t need = power_of_two(s->long_message);
    if (c->shared + need > power_of_two(c->endpoint->max_message))
        return false;
    c->shared += s->share = need;
    s->share_ticket = 0;
    c->share_waiting--;
    return true;
}

/* Gives back what has been dealt with, once it is worth a frame (RFC 9113 6.9.1). */
static void stream_give_credit(struct stream *s)
{
    struct conn *c = s->conn;
    if (s->recv_credit < CREDIT_STEP || s->remote_closed || s->dead || c->core->backpressure || !stream_may_go_on(s))
        return;
    s->share_ms = c->core->now_ms;
    frame_put_u32(conn_out(c), FRAME_WINDOW_UPDATE, s->id, s->recv_credit);
    s->recv_window += (int32_t)s->recv_credit;
    s->recv_credit = 0;
}

static void conn_give_credit(struct conn *c)
{
    if (c->recv_credit < CREDIT_STEP || c->core->backpressure || c->phase != CONN_OPEN)
        return;
    frame_put_u32(conn_out(c), FRAME_WINDOW_UPDATE, 0, c->recv_credit);
    c->recv_window += (int32_t)c->recv_credit;
    c->recv_credit = 0;
}

/* stdout has caught up, or a share is free: gives all credit that was held back. */
static void conn_release(struct conn *c)
{
    conn_give_credit(c);
    for (uint32_t before = c->share_waiting + 1; c->share_waiting < before;) {   /* a grant lets the next one in line */
        before = c->share_waiting;
        for (struct stream *s = c->streams; s; s = s->next)
            stream_give_credit(s);
    }
}

/* The long message is complete or gone: the others may go on. */
static void stream_end_long(struct stream *s)
{
    struct conn *c = s->conn;
    c->share_waiting -= s->share_ticket != 0;
    c->shared -= s->share;
    bool free = s->share || s->share_ticket;
    s->long_message = s->share = 0;
    s->share_ticket = 0;
    if (free && c->share_waiting)
        conn_release(c);
}

/* Frees the streams that are done. */
static void conn_reap(struct conn *c)
{
    if (!c->reap)
        return;
    c->reap = false;
    for (struct stream **at = &c->streams, *s; (s = *at);) {
        if (!s->dead) {
            at = &s->next;
            continue;
        }
        c->on->closed(s);
        stream_end_long(s);
        *at = s->next;
        if (c->next_to_send == s)
            c->next_to_send = s->next;
        c->current = NULL;
        if (!conn_how_closed(c, s->id))
            conn_remember_closed(c, s->id, false);
        stream_drop_queue(s);
        buf_free(&s->grpc.message);
        free(s);
        c->stream_count--;
        c->idle_ms = c->core->now_ms;
    }
}

/* ==== 7. Connections: preface, fields, dispatch, errors (RFC 9113 3.4, 5.4, 6, 8; RFC 9112) =========================
 * Owns: the state machine from bytes to frames, or requests of HTTP/1, to calls of the handler, the rules for fields,
 * GOAWAY and deadlines.
 * Never: holds a descriptor or reads a clock; time is core->now_ms.
 */
/* The fields that we look at; all others are checked for form and passed over. */
enum field_id {
    F_METHOD, F_SCHEME, F_AUTHORITY, F_PATH, F_STATUS, F_PSEUDO_END,
    F_CONTENT_TYPE = F_PSEUDO_END, F_CONTENT_LENGTH, F_TE, F_GRPC_ENCODING, F_GRPC_TIMEOUT, F_GRPC_STATUS,
    F_GRPC_MESSAGE, F_USER_AGENT, F_JOB_ID, F_CONNECTION_TYPE, F_FILE_SIZE, F_AUTHORIZATION, F_SIGNATURE, F_ALGO_TYPE, F_AGENT_PORT,
    F_CVMS_DELIVERS, F_KNOWN,
    F_FORBIDDEN = F_KNOWN, FIELD_RULES = F_FORBIDDEN + 5
};

static const char *const field_names[FIELD_RULES] = {
    [F_METHOD] = ":method", [F_SCHEME] = ":scheme", [F_AUTHORITY] = ":authority", [F_PATH] = ":path",
    [F_STATUS] = ":status", [F_CONTENT_TYPE] = "content-type", [F_CONTENT_LENGTH] = "content-length", [F_TE] = "te",
    [F_GRPC_ENCODING] = "grpc-encoding", [F_GRPC_TIMEOUT] = "grpc-timeout", [F_GRPC_STATUS] = "grpc-status",
    [F_GRPC_MESSAGE] = "grpc-message", [F_USER_AGENT] = "user-agent", [F_JOB_ID] = "job-id",
    [F_CONNECTION_TYPE] = "connection-type", [F_FILE_SIZE] = "file-size", [F_AUTHORIZATION] = "authorization", [F_SIGNATURE] = "signature",
    [F_ALGO_TYPE] = "algo_type", [F_AGENT_PORT] = "agent-port", [F_CVMS_DELIVERS] = "cvms-delivers",
    /* RFC 9113 8.2.2 */
    [F_FORBIDDEN] = "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade",
};

/* A decoded field block.  Values stand in core->field_bytes and hold until the next block is decoded. */
struct fields {
    struct core *core;
    struct bytes value[F_KNOWN];      /* p NULL: not there */
    size_t used;
    unsigned refused;                 /* HTTP/1: the status of what is wrong; 0: nothing */
    bool regular_seen, too_large, two_tokens;
    const char *malformed;            /* RFC 9113 8.1.1; the first reason */
};

static int field_lookup(struct bytes name)
{
    for (int i = 0; i < FIELD_RULES; i++)
        if (bytes_eq(name, bytes_of(field_names[i])))
            return i;
    return FIELD_RULES;
}

/* RFC 9113 8.2.1: a name of lower-case visible characters, a colon only in front. */
static bool field_name_ok(struct bytes name)
{
    for (size_t i = 0; i < name.n; i++) {
        uint8_t ch = name.p[i];
        if (ch <= ' ' || ch >= 0x7f || (ch >= 'A' && ch <= 'Z') || (ch == ':' && i > 0))
            return false;
    }
    return name.n > 0;
}

/* No NUL, CR or LF.  White space around a value is let pass: gRPC lets metadata have it, and clients send it. */
static bool field_value_ok(struct bytes v)
{
    for (size_t i = 0; i < v.n; i++)
        if (v.p[i] == 0 || v.p[i] == '\r' || v.p[i] == '\n')
            return false;
    return true;
}

/* RFC 9113 8.2, 8.3: why this field makes the message malformed, or NULL. */
static const char *field_fault(const struct fields *f, int id, struct bytes name, struct bytes value)
{
    if (!field_name_ok(name))
        return "a field name with a forbidden character";
    if (!field_value_ok(value))
        return "a field value with a forbidden character";
    if (name.p[0] == ':' && id >= F_PSEUDO_END)
        return "an unknown pseudo-header field";
    if (id < F_PSEUDO_END && f->regular_seen)
        return "a pseudo-header field after a regular one";
    if (id < F_PSEUDO_END && f->value[id].p)
        return "a pseudo-header field twice";
    if (id >= F_FORBIDDEN && id < FIELD_RULES)
        return "a connection-specific field";
    if (id == F_TE && !bytes_eq(value, BYTES("trailers")))
        return "a te field other than trailers";
    if (id == F_CONTENT_LENGTH && f->value[id].p && !bytes_eq(f->value[id], value))
        return "two content-length fields that differ";
    return NULL;
}

/* Called by HPACK for each field of a block. */
static void fields_add(void *arg, struct bytes name, struct bytes value)
{
    struct fields *f = arg;
    int id = field_lookup(name);
    const char *fault = field_fault(f, id, name, value);
    if (fault && !f->malformed)
        f->malformed = fault;
    if (name.n && name.p[0] != ':')
        f->regular_seen = true;
    f->two_tokens |= id == F_AUTHORIZATION && f->value[id].p;
    if (id >= F_KNOWN || f->value[id].p || value.n > sizeof f->core->field_bytes - f->used)
        return;
    uint8_t *copy = f->core->field_bytes + f->used;
    if (value.n)
        memcpy(copy, value.p, value.n);
    f->used += value.n;
    f->value[id] = (struct bytes){ copy, value.n };
}

/* RFC 9113 8.3.1, 8.3.2: the pseudo-header fields that a message must and must not have. */
static const char *fields_fault(const struct fields *f, bool response, bool trailers)
{
    const struct bytes *v = f->value;
    if (f->malformed)
        return f->malformed;
    if (trailers || response) {
        for (int i = 0; i < F_PSEUDO_END; i++)
            if (v[i].p && (trailers || i != F_STATUS))
                return "a pseudo-header field that does not belong there";
        return trailers || v[F_STATUS].n == 3 ? NULL : "no :status";
    }
    if (v[F_STATUS].p)
        return ":status in a request";
    if (!v[F_METHOD].n)
        return "no :method";
    if (bytes_eq(v[F_METHOD], BYTES("CONNECT")))
        return v[F_SCHEME].p || v[F_PATH].p || !v[F_AUTHORITY].n ? "CONNECT with the wrong fields" : NULL;
    if (!v[F_SCHEME].n)
        return "no :scheme";
    if (!v[F_PATH].n || (v[F_PATH].p[0] != '/' && !bytes_eq(v[F_PATH], BYTES("*"))))
        return "no :path";
    return NULL;
}

/* Starts a connection.  peer is its name in log lines. */
static void conn_init(struct conn *c, struct core *core, const struct endpoint *e, const char *peer)
{
    *c = (struct conn){
        .core = core, .endpoint = e, .on = e->on, .client = e->client, .peer_initial_window = DEFAULT_WINDOW, .send_window = DEFAULT_WINDOW,
        .recv_window = DEFAULT_WINDOW, .next_id = 1, .opened_ms = core->now_ms, .progress_ms = core->now_ms,
        .idle_ms = core->now_ms, .heard_ms = core->now_ms,
    };
    text_printf(c->peer, sizeof c->peer, "%s", peer);
    hpack_init(&c->hpack);
    if (c->client) {
        buf_put(&c->out, preface, PREFACE_LEN);
        frame_put(&c->out, 6, FRAME_SETTINGS, 0, 0);
        frame_put_setting(&c->out, SETTINGS_ENABLE_PUSH, 0);
        c->phase = CONN_OPEN;
    }
}

static void conn_free(struct conn *c)
{
    for (struct stream *s = c->streams; s; s = s->next)
        stream_done(s);
    conn_reap(c);
    conn_abandon(c);
    buf_free(&c->in);
    buf_free(&c->block);
    buf_free(&c->goaway);
    buf_free(&c->out);
    hpack_free(&c->hpack);
}

/* The peer has sent END_STREAM (RFC 9113 5.1, 8.1.1 for the length). */
static void conn_remote_end(struct stream *s)
{
    if (s->content_length > 0) {
        conn_stream_error(s->conn, s->id, PROTOCOL_ERROR);
        return;
    }
    s->remote_closed = true;
    s->conn->on->end(s);
    if (s->local_closed && !s->dead)
        stream_done(s);
}

static void conn_trailers(struct conn *c, struct stream *s, const struct fields *f, bool end)
{
    bool response = c->client && !s->headers_seen;
    const char *fault = fields_fault(f, response, !response);
    if (s->remote_closed) {
        conn_stream_error(c, s->id, STREAM_CLOSED);
    } else if (fault || f->too_large || (!response && !end)) {
        conn_stream_error(c, s->id, PROTOCOL_ERROR);
    } else if (!response || f->value[F_STATUS].p[0] != '1' || end) {   /* else an interim response (RFC 9110 15.2) */
        if (c->client)
            c->on->headers(s, f, end);
        s->headers_seen = true;
        if (end && !s->dead)
            conn_remote_end(s);
    }
}

/* A request on a new stream (RFC 9113 5.1.1, 5.1.2, 8.3.1). */
static void conn_request(struct conn *c, uint32_t id, const struct fields *f, bool end)
{
    c->last_id = id;
    if (c->goaway_sent || c->stream_count >= MAX_CONCURRENT_STREAMS) {
        if (!c->goaway_sent)
            core_cap(c->core, c->peer, CAP_STREAMS);
        conn_stream_error(c, id, REFUSED_STREAM);
        return;
    }
    if (f->too_large && !conn_spend(c, CAP_STREAM_ERRORS))
        return;
    const char *fault = fields_fault(f, false, false);
    int64_t length = f->value[F_CONTENT_LENGTH].p ? parse_decimal(f->value[F_CONTENT_LENGTH]) : -1;
    if (!f->too_large && (fault || (f->value[F_CONTENT_LENGTH].p && length < 0))) {
        conn_stream_error(c, id, PROTOCOL_ERROR);
        return;
    }
    struct stream *s = stream_new(c, id);
    if (!s)
        return;
    s->content_length = length;
    c->on->headers(s, f, end);
    if (end && !s->dead)
        conn_remote_end(s);
}

/* A complete field block: decoded whatever becomes of its stream, since the table is shared (RFC 9113 4.3). */
static void conn_block(struct conn *c, struct bytes block)
{
    uint32_t id = c->block_id;
    bool end = c->block_flags & END_STREAM;
    struct fields f = { .core = c->core };
    struct hpack_reader reader = { .huffman = &c->core->huffman, .scratch = c->core->hpack_scratch,
                                   .list_limit = MAX_HEADER_LIST, .field = fields_add, .arg = &f };
    enum hpack_error err = hpack_decode(&c->hpack, block, &reader);
    f.too_large = reader.too_large;
    c->block_id = 0;
    if (err == HPACK_TOO_MANY) {
        conn_over_cap(c, CAP_FIELDS);
        return;
    }
    if (err != HPACK_OK) {
        conn_fail(c, err == HPACK_NO_MEMORY ? INTERNAL_ERROR : COMPRESSION_ERROR, "a field block that does not decode");
        return;
    }
    if (f.too_large)
        core_cap(c->core, c->peer, CAP_HEADER_LIST);
    struct stream *s = stream_find(c, id);
    bool opens = conn_is_idle(c, id) && !c->client && (id & 1);
    if (c->block_dependency == id) {  /* RFC 7540 5.3.1: a stream that depends on itself */
        c->last_id = opens ? id : c->last_id;
        conn_stream_error(c, id, PROTOCOL_ERROR);
    } else if (s)
        conn_trailers(c, s, &f, end);
    else if (opens)
        conn_request(c, id, &f, end);
    else if (conn_is_idle(c, id))
        conn_fail(c, PROTOCOL_ERROR, "HEADERS on a stream that nobody may open");
    else if (conn_how_closed(c, id) == 0)
        conn_fail(c, PROTOCOL_ERROR, "a stream identifier that is not above the last one");
    else if (conn_how_closed(c, id) == 1)
        conn_fail(c, STREAM_CLOSED, "HEADERS on a closed stream");
    else
        conn_spend_control(c);
}

/* The next frame of a field block, HEADERS or CONTINUATION. */
static void conn_block_part(struct conn *c, struct bytes part)
{
    bool whole = c->frame.flags & END_HEADERS, many = c->block_frames++ > MAX_CONTINUATIONS;
    if (whole && c->block_frames == 1) {
        conn_block(c, part);
        return;
    }
    if (c->block.len + part.n > MAX_FIELD_BLOCK || many) {
        conn_over_cap(c, many ? CAP_CONTINUATIONS : CAP_FIELD_BLOCK);
        return;
    }
    buf_put(&c->block, part.p, part.n);
    c->out.failed |= c->block.failed;
    if (whole) {
        conn_block(c, (struct bytes){ c->block.p, c->block.len });
        buf_free(&c->block);
    }
}

/* Takes the padding off a payload, and `fixed` bytes before what it holds (RFC 9113 6.1, 6.2).  False: the connection
 * has failed. */
static bool conn_unpad(struct conn *c, struct bytes *p, size_t fixed)
{
    bool padded = c->frame.flags & PADDED;
    size_t head = padded + fixed, pad = padded && p->n ? p->p[0] : 0;
    if (p->n < head + pad) {
        conn_fail(c, p->n < head ? FRAME_SIZE_ERROR : PROTOCOL_ERROR, "a frame shorter than its padding or priority");
        return false;
    }
    *p = (struct bytes){ p->p + head, p->n - head - pad };
    return true;
}

/* The handlers below get a frame that frame_check has passed, with its whole payload. */

static void on_headers(struct conn *c, struct bytes p)
{
    uint8_t flags = c->frame.flags;
    size_t fixed = flags & PRIORITY ? 5 : 0;
    if (!conn_unpad(c, &p, fixed))
        return;
    c->block_dependency = fixed ? get_be32(p.p - fixed) & 0x7fffffff : 0;
    c->block_id = c->frame.stream_id;
    c->block_flags = flags;
    c->block_frames = 0;
    conn_block_part(c, p);
}

static void on_priority(struct conn *c, struct bytes p)
{
    if ((get_be32(p.p) & 0x7fffffff) == c->frame.stream_id)
        conn_stream_error(c, c->frame.stream_id, PROTOCOL_ERROR);
}

static void on_rst_stream(struct conn *c, struct bytes p)
{
    struct stream *s = stream_find(c, c->frame.stream_id);
    if (!s && conn_is_idle(c, c->frame.stream_id)) {
        conn_fail(c, PROTOCOL_ERROR, "RST_STREAM on an idle stream");
    } else if (!s) {
        conn_spend_control(c);
    } else if (conn_spend(c, CAP_STREAM_ERRORS)) {
        conn_remember_closed(c, s->id, false);
        if (c->client)
            c->on->lost(s, "the server has reset the stream", get_be32(p.p));
        stream_done(s);
    }
}

/* SETTINGS_INITIAL_WINDOW_SIZE moves every stream's window, below zero if need be (RFC 9113 6.9.2). */
static bool conn_initial_window(struct conn *c, uint32_t value)
{
    int64_t delta = (int64_t)value - c->peer_initial_window;
    for (struct stream *s = c->streams; s; s = s->next) {
        if (s->send_window + delta > MAX_WINDOW)
            return false;
        s->send_window = (int32_t)(s->send_window + delta);
    }
    c->peer_initial_window = value;
    return true;
}

static void on_settings(struct conn *c, struct bytes p)
{
    if (c->frame.flags & ACK)
        return;
    for (size_t at = 0; at < p.n; at += 6) {
        unsigned id = (unsigned)(p.p[at] << 8 | p.p[at + 1]);
        uint32_t value = get_be32(p.p + at + 2);
        bool ruled = id < SETTINGS_COUNT && setting_rules[id].max;
        if (ruled && (value < setting_rules[id].min || value > setting_rules[id].max)) {
            conn_fail(c, setting_rules[id].error, "a setting outside its range");
            return;
        }
        c->size_update_due |= id == SETTINGS_HEADER_TABLE_SIZE;
        if (id == SETTINGS_INITIAL_WINDOW_SIZE && !conn_initial_window(c, value)) {
            conn_fail(c, FLOW_CONTROL_ERROR, "SETTINGS_INITIAL_WINDOW_SIZE overflows a window");
            return;
        }
    }
    c->settings_seen = true;
    frame_put(conn_out(c), 0, FRAME_SETTINGS, ACK, 0);
}

static void on_ping(struct conn *c, struct bytes p)
{
    if (c->frame.flags & ACK)
        return;
    frame_put(conn_out(c), 8, FRAME_PING, ACK, 0);
    buf_put(&c->out, p.p, 8);
}

static void on_goaway(struct conn *c, struct bytes p)
{
    uint32_t last = get_be32(p.p) & 0x7fffffff;
    c->goaway_seen = true;
    if (!c->client)
        return;
    buf_free(&c->goaway);
    buf_printf(&c->goaway, "GOAWAY, %s%s", h2_error_name(get_be32(p.p + 4)), p.n > 8 ? ": " : "");
    buf_put(&c->goaway, p.p + 8, min_size(p.n - 8, 200));
    buf_putc(&c->goaway, 0);
    c->out.failed |= c->goaway.failed;
    for (struct stream *s = c->streams; s; s = s->next)
        if (s->id > last && !s->dead)
            stream_done(s);           /* the server has not taken it; closed tells */
}

static void on_window_update(struct conn *c, struct bytes p)
{
    uint32_t id = c->frame.stream_id, add = get_be32(p.p) & 0x7fffffff;
    struct stream *s = id ? stream_find(c, id) : NULL;
    if (!conn_spend_control(c))
        return;
    if (id && !s) {
        if (conn_is_idle(c, id))
            conn_fail(c, PROTOCOL_ERROR, "WINDOW_UPDATE on an idle stream");
        return;
    }
    int32_t *window = s ? &s->send_window : &c->send_window;
    enum h2_error err = add == 0 ? PROTOCOL_ERROR : *window > MAX_WINDOW - (int32_t)add ? FLOW_CONTROL_ERROR : NO_ERROR;
    if (err == NO_ERROR)
        *window += (int32_t)add;
    else if (s)
        conn_stream_error(c, id, err);
    else
        conn_fail(c, err, "a WINDOW_UPDATE of nothing or of too much");
}

/* DATA of an open stream: p stood in len bytes of payload. */
static void stream_data(struct stream *s, struct bytes p, uint32_t len)
{
    struct conn *c = s->conn;
    bool early = p.n && c->client && !s->headers_seen, sized = s->content_length >= 0;
    enum h2_error err = s->remote_closed ? STREAM_CLOSED : (int64_t)len > s->recv_window ? FLOW_CONTROL_ERROR
                      : early || (sized && (uint64_t)s->content_length < p.n) ? PROTOCOL_ERROR : NO_ERROR;
    if (err) {
        conn_stream_error(c, s->id, err);
        return;
    }
    s->recv_window -= (int32_t)len;
    s->content_length -= sized ? (int64_t)p.n : 0;
    if (p.n && c->bucket[CAP_CONTROL_FRAMES].used)
        c->bucket[CAP_CONTROL_FRAMES].used--;
    if (p.n)
        c->on->data(s, p);
}

/* The whole length, padding included, counts against the windows (RFC 9113 6.1, 6.9). */
static void on_data(struct conn *c, struct bytes p)
{
    const struct frame *f = &c->frame;
    struct stream *s = stream_find(c, f->stream_id);
    bool end = f->flags & END_STREAM;
    if (f->len > (uint32_t)c->recv_window) {
        conn_fail(c, FLOW_CONTROL_ERROR, "DATA beyond the connection's window");
    } else if (!s && conn_is_idle(c, f->stream_id)) {
        conn_fail(c, PROTOCOL_ERROR, "DATA on an idle stream");
    } else if (!s && conn_how_closed(c, f->stream_id) == 1) {
        conn_fail(c, STREAM_CLOSED, "DATA on a closed stream");
    } else if (!s && f->len > c->discard_window) {
        conn_fail(c, FLOW_CONTROL_ERROR, "DATA beyond the window of a closed stream");
    } else if (conn_unpad(c, &p, 0) && (p.n || (s && end) || conn_spend_control(c))) {
        c->recv_window -= (int32_t)f->len;
        if (!s)
            c->discard_window -= f->len;
        else if (!s->dead)
            stream_data(s, p, f->len);
        c->recv_credit += f->len;
        conn_give_credit(c);
        if (!s || s->dead)
            return;
        s->recv_credit += f->len;
        stream_give_credit(s);
        if (end && !s->remote_closed)
            conn_remote_end(s);
    }
}

static void (*const frame_handlers[FRAME_TYPES])(struct conn *, struct bytes) = {
    [FRAME_DATA] = on_data, [FRAME_HEADERS] = on_headers, [FRAME_PRIORITY] = on_priority,
    [FRAME_RST_STREAM] = on_rst_stream, [FRAME_SETTINGS] = on_settings, [FRAME_PING] = on_ping,
    [FRAME_GOAWAY] = on_goaway, [FRAME_WINDOW_UPDATE] = on_window_update, [FRAME_CONTINUATION] = conn_block_part,
};

/* A frame header is complete: what RFC 9113 4.3, 6.10 and the tables say of it before its payload comes. */
static void conn_frame_begin(struct conn *c)
{
    bool stream_scope;
    const struct frame *f = &c->frame;
    c->frame = frame_parse(c->header);
    enum h2_error err = frame_check(f, &stream_scope);
    if (c->client && !c->settings_seen && memcmp(c->header, "HTTP/1.", 7) == 0)
        conn_fail(c, PROTOCOL_ERROR, "the server answers in HTTP/1.1; a gRPC server speaks HTTP/2");
    else if (err && !stream_scope)
        conn_fail(c, err, "a frame of the wrong size or on the wrong stream");
    else if (!c->settings_seen && (f->type != FRAME_SETTINGS || f->flags & ACK))
        conn_fail(c, PROTOCOL_ERROR, "the first frame is not SETTINGS");
    else if (c->block_id ? f->type != FRAME_CONTINUATION || f->stream_id != c->block_id : f->type == FRAME_CONTINUATION)
        conn_fail(c, PROTOCOL_ERROR, "a field block that is interrupted, or a CONTINUATION of none");
    else if (err)
        conn_stream_error(c, f->stream_id, err);
    else if (f->type >= FRAME_TYPES || frame_rules[f->type].where & COSTS)
        conn_spend_control(c);
    if (err)
        c->frame.type = FRAME_TYPES;  /* as one that is not known: passed over */
}

/* Payload bytes; a frame is dealt with when it is whole.  Returns how many were taken. */
static size_t conn_payload(struct conn *c, struct bytes p)
{
    size_t n = p.n = min_size(p.n, c->frame.len - c->in.len);
    if (n < c->frame.len) {           /* else it is whole where it lies */
        buf_put(&c->in, p.p, n);
        p = (struct bytes){ c->in.p, c->in.len };
        c->out.failed |= c->in.failed;
    }
    if (p.n < c->frame.len)
        return n;
    c->header_len = 0;
    if (c->frame.type < FRAME_TYPES)
        frame_handlers[c->frame.type](c, p);
    buf_free(&c->in);
    conn_reap(c);
    return n;
}

static size_t conn_pending(const struct conn *c)
{
    return c->out.len - c->out_sent;
}

/* ---- HTTP/1 ---- */

/* Keeps a field that we look at, where it stands in the head. */
static void http1_keep(void *arg, struct bytes name, struct bytes value)
{
    struct fields *f = arg;
    int id = field_lookup(name);
    f->two_tokens |= id == F_AUTHORIZATION && f->value[id].p;
    if (id >= F_PSEUDO_END && id < F_KNOWN && !f->value[id].p)
        f->value[id] = value;
}

/* A request whose head has n bytes becomes a stream; status: what is wrong with it already, 0 if nothing is.  Behind one
 * that is wrong or has a body nothing more is read. */
static void conn_http1_request(struct conn *c, size_t n, unsigned status)
{
    struct http1_head h = { 0 };
    struct fields f = { .core = c->core };
    f.refused = status ? status : http1_parse(c->in.p, n, &h, http1_keep, &f);
    f.value[F_METHOD] = h.method;
    f.value[F_PATH] = h.target;
    c->goaway_sent = f.refused || h.body || h.close || !h.keep_alive;
    c->last_id += 2;
    struct stream *s = stream_new(c, c->last_id);
    if (!s)
        return;
    c->on->headers(s, &f, true);
    if (!s->dead)
        conn_remote_end(s);
    c->in.len = c->goaway_sent ? 0 : c->in.len - n;
    memmove(c->in.p, c->in.p + n, c->in.len);
    if (!c->in.len)
        buf_free(&c->in);
    conn_reap(c);
}

/* Takes up the next request, if it is whole and the one before is done.  False: there is none. */
static bool conn_http1_next(struct conn *c)
{
    if (!c->http1 || c->phase != CONN_OPEN || c->streams || c->goaway_sent || c->out.failed || !c->in.len ||
        conn_pending(c))
        return false;
    int n = http1_head_len((struct bytes){ c->in.p, c->in.len });
    if (n == 2) {                     /* RFC 9112 2.2: an empty line before a request is passed over */
        c->in.len -= 2;
        memmove(c->in.p, c->in.p + 2, c->in.len);
    } else if (n > 0) {
        conn_http1_request(c, (size_t)n, 0);
    } else if (n == HTTP1_BAD || c->in.len >= HTTP1_HEAD_MAX) {
        conn_http1_request(c, 0, n == HTTP1_BAD ? 400 : 431);
    } else {
        return false;
    }
    return true;
}

/* What a client is, by its first bytes; PREFACE_LEN of them tell it. */
enum client_kind { CLIENT_UNKNOWN, CLIENT_HTTP2, CLIENT_HTTP1, CLIENT_TLS, CLIENT_OTHER };

static enum client_kind client_kind(struct bytes p)
{
    enum { PREFACE_LINE = 14 };
    size_t word = 0;
    bool begins = p.n < PREFACE_LEN;
    if (memcmp(p.p, preface, p.n) == 0)
        return begins ? CLIENT_UNKNOWN : CLIENT_HTTP2;
    while (bytes_start(p, "\r\n"))    /* RFC 9112 2.2 */
        p = bytes_from(p, 2);
    while (word < p.n && p.p[word] >= 'A' && p.p[word] <= 'Z')
        word++;
    bool method = word >= 3 && word < p.n && p.p[word] == ' ';
    struct bytes target = bytes_from(p, method ? word + 1 : p.n);
    if (p.n >= PREFACE_LINE && memcmp(p.p, preface, PREFACE_LINE) == 0)
        return CLIENT_OTHER;
    bool url = method && strncasecmp("http", (const char *)target.p, min_size(target.n, 4)) == 0;
    if (target.n && (*target.p == '/' || *target.p == '*' || (url && target.n >= 4)))
        return CLIENT_HTTP1;
    if (p.n >= 2 && p.p[0] == 0x16 && p.p[1] == 0x03)
        return CLIENT_TLS;
    bool may_be = word == p.n || url || (p.n == 1 && (p.p[0] == 0x16 || p.p[0] == '\r'));
    return may_be && begins ? CLIENT_UNKNOWN : CLIENT_OTHER;
}

/* Takes what is missing of the `want` bytes that a connection or a frame begins with.  Returns how many were taken. */
static size_t conn_begin(struct conn *c, struct bytes p, size_t want)
{
    size_t n = min_size(p.n, want - c->header_len);
    memcpy(c->header + c->header_len, p.p, n);
    c->header_len = (uint8_t)(c->header_len + n);
    return n;
}

/* More of a client's first bytes have come (RFC 9113 3.4); ours follow them.  What speaks neither HTTP/2 nor HTTP/1 gets
 * a line in the log. */
static void conn_preface(struct conn *c)
{
    enum client_kind kind = client_kind((struct bytes){ c->header, c->header_len });
    if (kind == CLIENT_HTTP2 && c->no_h2) {
        core_fault(c->core, c->peer, "TLS: the client speaks HTTP/2, but did not agree on ALPN h2 (RFC 9113 3.2)");
        conn_fail(c, INADEQUATE_SECURITY, "HTTP/2 over TLS needs ALPN h2");
    } else if (kind == CLIENT_HTTP2) {
        conn_put_settings(c);
    } else if (kind == CLIENT_HTTP1) {
        c->http1 = true;
        buf_put(&c->in, c->header, c->header_len);
        c->out.failed |= c->in.failed;
    } else if (kind == CLIENT_TLS) {
        const char *first = c->endpoint->tls_first;
        if (!first || !c->core->tls_first)
            core_fault(c->core, c->peer, "this port is plaintext; the client sent a TLS ClientHello: %s", first ? first :
                       "set SERVER_CERT and SERVER_KEY, or turn TLS off at the client");
        c->core->tls_first = first != NULL;
        conn_close(c);                /* it would not understand a GOAWAY */
    } else if (kind == CLIENT_OTHER) {
        core_fault(c->core, c->peer, "not an HTTP/2 client: no connection preface");
        conn_fail(c, PROTOCOL_ERROR, "no connection preface");
    }
    if ((kind == CLIENT_HTTP2 || kind == CLIENT_HTTP1) && c->phase == CONN_PREFACE) {
        c->phase = CONN_OPEN;
        c->header_len = 0;
    }
}

/* Takes n bytes from the peer, all of them; what follows the end of the connection is dropped.  The caller asks
 * conn_wants_input first, so that the answers stay bounded. */
static void conn_recv(struct conn *c, const uint8_t *p, size_t n)
{
    c->ping_ms = 0;
    if (c->core->now_ms - c->heard_ms >= HEARD_STEP_MS)
        c->heard_ms = c->core->now_ms;
    while (n && c->phase < CONN_CLOSING && !c->out.failed) {
        struct bytes rest = { p, n };
        size_t taken;
        if (c->phase == CONN_PREFACE) {
            taken = conn_begin(c, rest, PREFACE_LEN);
            conn_preface(c);
        } else if (c->http1) {
            if (!c->in.len)
                c->opened_ms = c->core->now_ms;
            buf_put(&c->in, p, c->goaway_sent ? 0 : n);
            c->out.failed |= c->in.failed;
            taken = n;
        } else if (c->header_len < FRAME_HEADER_LEN) {
            taken = conn_begin(c, rest, FRAME_HEADER_LEN);
            if (c->header_len == FRAME_HEADER_LEN)
                conn_frame_begin(c);
            if (c->header_len == FRAME_HEADER_LEN && c->frame.len == 0 && c->phase == CONN_OPEN)
                conn_payload(c, (struct bytes){ c->header, 0 });
        } else {
            taken = conn_payload(c, rest);
        }
        p += taken;
        n -= taken;
    }
}

/* How many bytes are to be read.  Of HTTP/1, or what may be that, a head: what waits behind it is left to the kernel. */
static size_t conn_wants_input(const struct conn *c)
{
    bool head = c->phase == CONN_PREFACE || (c->http1 && c->phase == CONN_OPEN);
    bool never = c->phase > CONN_CLOSING || conn_pending(c) >= OUT_HIGH;
    return never ? 0 : head ? HTTP1_HEAD_MAX - min_size(c->in.len, HTTP1_HEAD_MAX) : SIZE_MAX;
}

/* Puts more DATA behind what waits, in turn from the streams that may send. */
static void conn_fill(struct conn *c)
{
    if (!c->queued_bytes || c->phase != CONN_OPEN || conn_pending(c) >= OUT_TARGET / 2)
        return;
    struct buf *out = conn_out(c);
    struct stream *s;
    while (conn_pending(c) < OUT_TARGET && !out->failed && (s = conn_next_sendable(c)))
        stream_emit(s);
    conn_reap(c);
}

/* The bytes that wait to go out, and how many; they hold until the next call on this connection. */
static size_t conn_peek(struct conn *c, const uint8_t **p)
{
    conn_reap(c);
    do
        conn_fill(c);
    while (conn_http1_next(c));
    if (c->write_closed)
        c->out.len = c->out_sent = 0;
    if (c->out.failed && c->phase != CONN_DEAD) {
        core_note(c->core, c->peer, "out of memory: the connection is closed");
        c->why = c->why ? c->why : "out of memory";
        conn_abandon(c);
    }
    *p = c->out.p ? c->out.p + c->out_sent : NULL;
    return *p ? conn_pending(c) : 0;
}

/* The first n of them are on their way.  A drained buffer is lent on to the next connection. */
static void conn_sent(struct conn *c, size_t n)
{
    c->out_sent += n;
    c->progress_ms = c->core->now_ms;
    if (c->out_sent < c->out.len)
        return;
    c->out.len = c->out_sent = 0;
    if (!c->core->spare.p && !c->out.failed)
        c->core->spare = c->out;
    else
        free(c->out.p);
    c->out = (struct buf){ .failed = c->out.failed };
}

/* The peer takes no more.  What it has sent before is still read. */
static void conn_unheard(struct conn *c)
{
    c->write_closed = true;
    c->out.len = c->out_sent = 0;
    for (struct stream *s = c->streams; s; s = s->next)
        stream_drop_queue(s);
}

/* The peer will send no more.  Streams that it had ended get their answer all the same. */
static void conn_eof(struct conn *c)
{
    c->eof = true;
    for (struct stream *s = c->streams; s; s = s->next)
        if (!s->remote_closed)
            stream_done(s);
    conn_reap(c);
}

/* The end of TLS: nothing that either side says arrives any more. */
static void conn_cut(struct conn *c)
{
    conn_unheard(c);
    conn_close(c);
    conn_reap(c);
}

/* Ends in good order: every stream gets this status, and then comes GOAWAY (RFC 9113 6.8). */
static void conn_shutdown(struct conn *c, unsigned status, const char *text)
{
    if (c->phase == CONN_PREFACE)
        conn_abandon(c);
    if (c->phase != CONN_OPEN || c->goaway_sent)
        return;
    c->goaway_sent = true;
    for (struct stream *s = c->streams; s; s = s->next)
        c->on->abort(s, status, text);
    struct stream *next;
    for (uint32_t n = c->stream_count; n && (next = conn_next_sendable(c)); n--)   /* so that they are read first */
        stream_emit(next);
    if (!c->http1)
        frame_put_goaway(conn_out(c), c->last_id, NO_ERROR, "");
}

/* Everything has been said, or can't be: the loop closes the connection. */
static bool conn_finished(const struct conn *c)
{
    if (c->phase == CONN_DEAD)
        return true;
    if (conn_pending(c) || c->below)
        return false;
    if (c->eof)                       /* what no window lets out now never will be: the peer can't open one */
        return true;
    return c->phase == CONN_OPEN && (c->goaway_sent || c->goaway_seen) && c->stream_count == 0;
}

/* When each timer of a connection is due; NEVER: it does not run. */
#define NEVER INT64_MAX
enum conn_timer { TIMER_LINGER, TIMER_STUCK, TIMER_PREFACE, TIMER_IDLE, TIMER_SILENCE, TIMER_STREAMS, CONN_TIMERS };

static void conn_timers(const struct conn *c, int64_t at[CONN_TIMERS])
{
    bool live = c->phase < CONN_CLOSING, open = c->phase == CONN_OPEN;
    bool head = c->http1 ? c->in.len && !c->streams && !conn_pending(c) : !c->settings_seen;   /* it has begun, and we listen */
    int64_t from = c->http1 && c->progress_ms > c->opened_ms ? c->progress_ms : c->opened_ms;
    at[TIMER_LINGER] = c->phase == CONN_CLOSING ? c->closing_ms + LINGER_MS : NEVER;
    at[TIMER_STUCK] = live && (conn_pending(c) || c->below) ? c->progress_ms + STUCK_MS : NEVER;
    at[TIMER_PREFACE] = live && head ? from + PREFACE_MS : NEVER;
    at[TIMER_IDLE] = live && !c->client && !c->stream_count ? c->idle_ms + IDLE_MS : NEVER;
    at[TIMER_SILENCE] = !open || !c->settings_seen ? NEVER
                      : c->ping_ms ? c->ping_ms + ANSWER_MS : c->heard_ms + SILENCE_MS;
    at[TIMER_STREAMS] = NEVER;
    for (const struct stream *s = c->streams; s && open; s = s->next) {
        int64_t share = c->share_waiting && s->share ? s->share_ms + SHARE_MS : NEVER;
        at[TIMER_STREAMS] = earlier(at[TIMER_STREAMS], earlier(s->deadline_ms, share));
    }
}

/* The functions of the timers make them later or end the connection. */

static void stuck_fire(struct conn *c)
{
    core_cap(c->core, c->peer, CAP_STUCK);
    conn_abandon(c);
}

static void preface_fire(struct conn *c)
{
    if (!c->client)
        core_cap(c->core, c->peer, c->http1 ? CAP_HEAD : CAP_PREFACE);
    if (c->http1)
        conn_http1_request(c, 0, 408);
    else
        conn_end(c, c->client ? NO_ERROR : PROTOCOL_ERROR,
                 c->client ? "no answer in HTTP/2 in time" : "no preface in time");
}

static void idle_fire(struct conn *c)
{
    core_cap(c->core, c->peer, CAP_IDLE);
    conn_end(c, NO_ERROR, "no open stream");
}

/* A peer that says nothing is asked whether it is there; one that has died without a word is found out so. */
static void silence_fire(struct conn *c)
{
    if (c->core->backpressure || !conn_wants_input(c)) {   /* it is us who do not listen */
        c->heard_ms = c->core->now_ms;
        c->ping_ms = 0;
    } else if (c->ping_ms) {
        if (!c->client)
            core_cap(c->core, c->peer, CAP_SILENCE);
        conn_end(c, NO_ERROR, "no answer to a PING");
    } else {
        c->ping_ms = c->core->now_ms;
        frame_put(conn_out(c), 8, FRAME_PING, 0, 0);
        buf_put(&c->out, (const uint8_t[8]){ 0 }, 8);
    }
}

static void streams_fire(struct conn *c)
{
    int64_t now = c->core->now_ms;
    bool ours = c->core->backpressure || !conn_wants_input(c);   /* it is us who hold messages up */
    for (struct stream *s = c->streams; s; s = s->next) {
        if (now >= s->deadline_ms) {
            s->deadline_ms = NEVER;
            c->on->abort(s, 4, c->client ? "no answer in time (-timeout)" : "the call's deadline has passed");
        }
        if (!c->share_waiting || !s->share || now < s->share_ms + SHARE_MS)
            continue;
        s->share_ms = now;
        if (ours)
            continue;
        core_cap(c->core, c->peer, CAP_SHARE);
        c->on->abort(s, 8, "a message stands still while others wait");
    }
}

static void (*const conn_fire[CONN_TIMERS])(struct conn *) = {
    conn_abandon, stuck_fire, preface_fire, idle_fire, silence_fire, streams_fire,
};

/* When conn_tick has something to do. */
static int64_t conn_deadline(const struct conn *c)
{
    int64_t at[CONN_TIMERS], first = NEVER;
    conn_timers(c, at);
    for (int i = 0; i < CONN_TIMERS; i++)
        first = earlier(first, at[i]);
    return first;
}

static void conn_tick(struct conn *c)
{
    int64_t at[CONN_TIMERS];
    for (int i = 0; i < CONN_TIMERS; i++) {
        conn_timers(c, at);           /* anew: the one before may have ended the connection */
        if (c->core->now_ms >= at[i])
            conn_fire[i](c);
    }
}

/* ==== 8. gRPC over HTTP/2: request check, messages, trailers =======================================================
 * Owns: the rules of gRPC's HTTP/2 protocol, both sides: length-prefixed messages, status, deadlines, metadata.
 * Never: looks into a message.
 */
enum grpc_status {
    GRPC_OK, GRPC_CANCELLED, GRPC_UNKNOWN, GRPC_INVALID_ARGUMENT, GRPC_DEADLINE_EXCEEDED, GRPC_NOT_FOUND,
    GRPC_ALREADY_EXISTS, GRPC_PERMISSION_DENIED, GRPC_RESOURCE_EXHAUSTED, GRPC_FAILED_PRECONDITION, GRPC_ABORTED,
    GRPC_OUT_OF_RANGE, GRPC_UNIMPLEMENTED, GRPC_INTERNAL, GRPC_UNAVAILABLE, GRPC_DATA_LOSS, GRPC_UNAUTHENTICATED,
    GRPC_STATUSES
};

static const char *const grpc_status_names[GRPC_STATUSES] = {
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
};


static void put_field(struct buf *block, const char *name, struct bytes value)
{
    hpack_encode_field(block, bytes_of(name), value);
}

/* A list of name, value, ..., NULL appended to a field block; NULL is an empty list, and a field without a value is left
 * out. */
static void put_fields(struct buf *block, const char *const *list)
{
    for (; list && *list; list += 2)
        if (list[1])
            put_field(block, list[0], bytes_of(list[1]));
}

/* What a request that is not gRPC is answered with. */
static const struct http_answer {
    uint16_t status;
    const char *reason, *text;
} http_answers[] = {
    { 200, "OK", NULL },
    { 400, "Bad Request", "the request is malformed, or has a body in pieces" },
    { 401, "Unauthorized", "the token is not the one that GetToken gives" },
    { 404, "Not Found", "nothing of this name is here" },
    { 405, "Method Not Allowed", "the method is not one for this path" },
    { 408, "Request Timeout", "the request has not come in time" },
    { 410, "Gone", "it has changed since its hash was sent to agents" },
    { 415, "Unsupported Media Type", "POST with content-type application/grpc" },
    { 431, "Request Header Fields Too Large", "the request's fields are too many or too long" },
    { 503, "Service Unavailable", "it can't be read now" },
    { 505, "HTTP Version Not Supported", "gRPC needs HTTP/2, all else HTTP/2, 1.1 or 1.0" },
};

static const struct http_answer *http_answer(const struct stream *s)
{
    const struct http_answer *a = http_answers;
    while (a->status != s->grpc.plain)
        a++;
    return a;
}

/* The head of an answer as HTTP/1 has it (RFC 9112 4); list as below, with the status in front. */
static void http1_put_head(struct stream *s, const char *const *list)
{
    struct buf *out = conn_out(s->conn);
    buf_printf(out, "HTTP/1.1 %s %s\r\n", list[1], http_answer(s)->reason);
    for (list += 2; *list; list += 2)
        if (list[1])
            buf_printf(out, "%s: %s\r\n", list[0], list[1]);
    buf_printf(out, "connection: %s\r\n\r\n", s->conn->goaway_sent ? "close" : "keep-alive");
}

/* Sends such a list, and the metadata behind it, as HEADERS. */
static void stream_put_fields(struct stream *s, const char *const *list, const char *const *metadata, unsigned flags)
{
    struct buf block = { 0 };
    if (s->conn->http1) {
        http1_put_head(s, list);
        return;
    }
    put_fields(&block, list);
    put_fields(&block, metadata);
    s->conn->out.failed |= block.failed;
    conn_put_block(s->conn, s->id, (struct bytes){ block.p, block.len }, flags);
    buf_free(&block);
}

/* Sends the response's HEADERS, once, with a list of metadata. */
static void grpc_send_headers(struct stream *s, const char *const *metadata)
{
    if (s->grpc.headers_sent || s->dead)
        return;
    s->grpc.headers_sent = true;
    stream_put_fields(s, (const char *[]){ ":status", "200", "content-type", "application/grpc", NULL }, metadata,
                      0);
}

/* grpc-message: everything but visible ASCII is percent-encoded. */
static void percent_encode(struct buf *out, const char *text)
{
    for (; *text; text++) {
        unsigned char ch = (unsigned char)*text;
        if (ch >= ' ' && ch < 0x7f && ch != '%')
            buf_putc(out, ch);
        else
            buf_printf(out, "%%%02X", ch);
    }
}

/* Ends the stream with a status: trailers behind what is queued, or alone when nothing has been sent yet. */
static void grpc_finish(struct stream *s, unsigned status, const char *text)
{
    if (s->dead || s->local_closed || s->grpc.finishing)
        return;
    struct buf message = { 0 };
    char number[12];
    bool alone = !s->grpc.headers_sent;
    s->grpc.finishing = s->grpc.headers_sent = true;
    buf_free(&s->grpc.message);
    stream_end_long(s);
    text_printf(number, sizeof number, "%u", status);
    percent_encode(&message, text);
    buf_putc(&message, 0);
    const char *const list[] = {
        ":status", alone ? "200" : NULL, "content-type", alone ? "application/grpc" : NULL, "grpc-status", number,
        "grpc-message", *text && !message.failed ? (const char *)message.p : NULL,
        "grpc-accept-encoding", status == GRPC_UNIMPLEMENTED ? "identity" : NULL, NULL,
    };
    struct buf block = { 0 };
    put_fields(&block, list);
    bool failed = block.failed || message.failed;
    stream_queue(s, failed ? NULL : blob_copy((struct bytes){ block.p, block.len }), ITEM_TRAILERS);
    buf_free(&block);
    buf_free(&message);
}

/* The time as HTTP has it (RFC 9110 5.6.7). */
static void http_date(char to[30], time_t now)
{
    struct tm t = { 0 };
    gmtime_r(&now, &t);
    text_printf(to, 30, "%.3s, %02d %.3s %d %02d:%02d:%02d GMT", &"SunMonTueWedThuFriSat"[3 * t.tm_wday], t.tm_mday,
                &"JanFebMarAprMayJunJulAugSepOctNovDec"[3 * t.tm_mon], t.tm_year + 1900, t.tm_hour, t.tm_min, t.tm_sec);
}

/* Answers a request that is not gRPC in plain HTTP. */
static void plain_answer(struct stream *s)
{
    const struct http_answer *a = http_answer(s);
    struct buf body = { 0 };
    char status[12], length[24], date[30];
    if (s->dead)
        return;
    if (a->text)
        buf_printf(&body, "This port speaks gRPC (cvms, the CVMS server for Cocos agents). %u %s: %s.\n", a->status,
                   a->reason, a->text);
    uint64_t n = a->text ? body.len : s->grpc.length;
    bool empty = s->grpc.no_body || n == 0;
    s->grpc.finishing = s->grpc.headers_sent = s->lingers = true;
    text_printf(status, sizeof status, "%u", a->status);
    text_printf(length, sizeof length, "%llu", (unsigned long long)n);
    http_date(date, (time_t)(s->conn->core->wall_ms / 1000));
    const char *const list[] = {
        ":status", status, "date", date,
        "content-type", a->text ? "text/plain" : s->grpc.type ? s->grpc.type : "application/octet-stream",
        "content-length", length, "allow", a->status == 405 ? s->grpc.allow : NULL,
        "www-authenticate", a->status == 401 ? "Bearer" : NULL, "cache-control", a->text ? NULL : "no-store", NULL,
    };
    stream_put_fields(s, list, NULL, empty ? END_STREAM : 0);
    if (empty)
        stream_local_end(s);
    else if (a->text)
        stream_queue(s, blob_copy((struct bytes){ body.p, body.len }), ITEM_LAST_DATA);
    else
        stream_queue(s, NULL, ITEM_PULLED);
    s->conn->out.failed |= body.failed;
    buf_free(&body);
}

/* Queues one message; takes over the reference to a blob that holds it with its five-byte prefix.  A client's messages
 * are its own affair, but for the answers that a server asks for without reading them. */
static void grpc_send_blob(struct stream *s, struct blob *b)
{
    bool client = s->conn->client;
    if (!client)
        grpc_send_headers(s, NULL);
    if (s->queued >= (client ? MAX_CLIENT_ITEMS : MAX_QUEUED_ITEMS) ||
        (!client && s->conn->queued_bytes + item_own(b) > MAX_QUEUED_BYTES)) {
        blob_unref(b);
        core_cap(s->conn->core, s->conn->peer, CAP_ANSWERS);
        s->conn->on->abort(s, GRPC_RESOURCE_EXHAUSTED, "too many answers are waiting to be read");
        return;
    }
    stream_queue(s, b, ITEM_DATA);
}

static void grpc_put_prefix(uint8_t p[5], size_t n)
{
    p[0] = 0;
    put_be32(p + 1, (uint32_t)n);
}

/* A blob that holds one message with its prefix; NULL without memory. */
static struct blob *grpc_blob(struct bytes wire)
{
    struct blob *blob = blob_new(wire.n + 5);
    if (blob) {
        grpc_put_prefix(blob->p, wire.n);
        if (wire.n)
            memcpy(blob->p + 5, wire.p, wire.n);
    }
    return blob;
}

/* The same of a message that is yet to be encoded. */
static struct blob *grpc_encode(const struct pb_message *type, const void *msg)
{
    struct buf b = { 0 };
    struct bytes wire = pb_encode(&b, type, msg);
    struct blob *blob = b.failed ? NULL : grpc_blob(wire);
    buf_free(&b);
    return blob;
}

/* Encodes a message and queues it. */
static void grpc_send(struct stream *s, const struct pb_message *type, const void *msg)
{
    grpc_send_blob(s, grpc_encode(type, msg));
}

/* grpc-timeout: at most eight digits and a unit.  Milliseconds, rounded up; -1 if it is malformed. */
static int64_t grpc_timeout(struct bytes v)
{
    static const struct {
        char unit;
        int64_t mul, div;
    } units[] = { { 'H', 3600000, 1 }, { 'M', 60000, 1 }, { 'S', 1000, 1 },
                  { 'm', 1, 1 }, { 'u', 1, 1000 }, { 'n', 1, 1000000 } };
    int64_t n = v.n >= 2 && v.n <= 9 ? parse_decimal((struct bytes){ v.p, v.n - 1 }) : -1;
    for (size_t i = 0; n >= 0 && i < sizeof units / sizeof *units; i++)
        if (units[i].unit == v.p[v.n - 1])
            return (n * units[i].mul + units[i].div - 1) / units[i].div;
    return -1;
}

/* The method of this path, or with `service` any of its service; NULL: there is none. */
static const struct grpc_method *grpc_find(const struct endpoint *e, struct bytes path, bool service)
{
    for (const struct grpc_method *m = e->methods; m < e->methods + e->method_count; m++) {
        size_t n = service ? (size_t)(strrchr(m->path, '/') - m->path) + 1 : strlen(m->path);
        if (path.n >= n && (service || path.n == n) && memcmp(path.p, m->path, n) == 0 && !(m->needs & ~e->offers))
            return m;
    }
    return NULL;
}

/* A text of bounded length says what is not known. */
static void grpc_unknown(struct stream *s, struct bytes path)
{
    struct buf text = { 0 };
    buf_printf(&text, "unknown %s ", grpc_find(s->conn->endpoint, path, true) ? "method" : "service");
    put_text(&text, (struct bytes){ path.p, min_size(path.n, 200) }, NULL);
    buf_putc(&text, 0);
    grpc_finish(s, GRPC_UNIMPLEMENTED, text.failed ? "unknown method" : (char *)text.p);
    buf_free(&text);
}

static bool grpc_content_type(struct bytes type)
{
    const struct bytes grpc = BYTES("application/grpc");
    return bytes_start(type, "application/grpc") && (type.n == grpc.n || strchr("+;", type.p[grpc.n]));
}

/* Keeps the name of a message encoding: it is told when a message is flagged as compressed. */
static void grpc_encoding(struct stream *s, struct bytes v)
{
    bool plain = !v.n || bytes_eq(v, BYTES("identity"));
    bool token = v.n < sizeof s->grpc.encoding;
    for (size_t i = 0; i < v.n && token; i++)
        token = (v.p[i] >= 'a' && v.p[i] <= 'z') || (v.p[i] >= '0' && v.p[i] <= '9') || v.p[i] == '-';
    text_printf(s->grpc.encoding, sizeof s->grpc.encoding, "%.*s", plain ? 0 : token ? (int)v.n : 7,
                token && v.n ? (const char *)v.p : "unknown");
}

/* The HTTP status of a request that is not gRPC, 0 if it is. */
static unsigned grpc_http_status(struct stream *s, const struct fields *f)
{
    const struct bytes method = f->value[F_METHOD];
    bool known = grpc_find(s->conn->endpoint, f->value[F_PATH], false);
    s->grpc.no_body = bytes_eq(method, BYTES("HEAD"));
    if (f->refused || f->too_large)
        return f->refused ? f->refused : 431;
    s->grpc.allow = known ? "POST" : "GET, HEAD, POST";
    if (!bytes_eq(method, BYTES("POST")))                       /* 400: RFC 9110 5.3 */
        return known || !(s->grpc.no_body || bytes_eq(method, BYTES("GET"))) ? 405 : f->two_tokens ? 400 : 404;
    return !grpc_content_type(f->value[F_CONTENT_TYPE]) ? 415 : s->conn->http1 ? 505 : 0;
}

/* A request: which method, how long it may take, how it is encoded. */
static void grpc_request(struct stream *s, const struct fields *f, bool end)
{
    struct core *core = s->conn->core;
    const struct endpoint *e = s->conn->endpoint;
    const struct bytes *v = f->value;
    s->grpc.plain = (uint16_t)grpc_http_status(s, f);
    if (s->grpc.plain) {
        s->grpc.method = e->plain;
        if (e->plain)
            e->plain->open(s, f);
        if (!end)                     /* it may wait for us before it ends its side */
            plain_answer(s);
        return;
    }
    grpc_encoding(s, v[F_GRPC_ENCODING]);
    int64_t timeout = v[F_GRPC_TIMEOUT].p ? grpc_timeout(v[F_GRPC_TIMEOUT]) : INT64_MAX - core->now_ms;
    if (timeout < 0) {
        grpc_finish(s, GRPC_INTERNAL, "malformed grpc-timeout");
        return;
    }
    s->deadline_ms = core->now_ms + timeout;
    s->grpc.method = grpc_find(e, v[F_PATH], false);
    if (!s->grpc.method)
        grpc_unknown(s, v[F_PATH]);
    else if (s->grpc.method->open)
        s->grpc.method->open(s, f);
}

/* A message that can't be had ends its stream, and at a server leaves a line. */
static void grpc_refuse(struct stream *s, unsigned status, const char *text)
{
    if (!s->conn->client)
        core_fault(s->conn->core, s->conn->peer, "stream %lu: %s", (unsigned long)s->id, text);
    s->conn->on->abort(s, status, text);
}

/* The five bytes before a message are complete: false, and the stream ends, if the message can't be had. */
static bool grpc_prefix(struct stream *s)
{
    char text[100];
    size_t max = s->conn->endpoint->max_message;
    s->grpc.message_len = get_be32(s->grpc.prefix + 1);
    if (s->grpc.prefix[0] == 1 && *s->grpc.encoding) {
        text_printf(text, sizeof text, "grpc: a message is compressed with %s, which is not supported",
                    s->grpc.encoding);
        grpc_refuse(s, GRPC_UNIMPLEMENTED, text);
    } else if (s->grpc.prefix[0] != 0) {
        grpc_refuse(s, GRPC_INTERNAL, "grpc: a message flagged as compressed without a grpc-encoding");
    } else if (s->grpc.message_len > max) {
        text_printf(text, sizeof text, "grpc: received message larger than max (%lu vs. %zu)",
                    (unsigned long)s->grpc.message_len, max);
        core_cap(s->conn->core, s->conn->peer, CAP_MESSAGE);
        s->conn->on->abort(s, GRPC_RESOURCE_EXHAUSTED, text);
    } else {
        s->long_message = s->grpc.message_len > DEFAULT_WINDOW ? s->grpc.message_len : 0;
        return true;
    }
    return false;
}

/* DATA: length-prefixed messages, cut anywhere; one that lies whole in p is not copied. */
static void grpc_data(struct stream *s, struct bytes p)
{
    struct grpc_stream *g = &s->grpc;
    while (p.n && !s->dead && !g->finishing) {
        size_t prefix = sizeof g->prefix - g->prefix_len;   /* what is missing of it */
        struct bytes part = { p.p, min_size(p.n, prefix ? prefix : g->message_len - g->message.len) };
        p = bytes_from(p, part.n);
        if (prefix) {
            memcpy(g->prefix + g->prefix_len, part.p, part.n);
            g->prefix_len = (uint8_t)(g->prefix_len + part.n);
            if (part.n < prefix || !grpc_prefix(s) || g->message_len)
                continue;
            part.n = 0;
        }
        struct buf whole = { 0 };
        if (part.n < g->message_len) {
            buf_put(&g->message, part.p, part.n);
            s->conn->out.failed |= g->message.failed;
            if (g->message.len < g->message_len)
                continue;
            whole = g->message;
            g->message = (struct buf){ 0 };
            part = (struct bytes){ whole.p, whole.len };
        }
        g->prefix_len = 0;
        if (g->method && g->method->message)
            g->method->message(s, part);
        buf_free(&whole);
        stream_end_long(s);
    }
}

static void grpc_server_end(struct stream *s)
{
    if (s->grpc.finishing)
        return;
    if (s->grpc.plain)
        plain_answer(s);
    else if (s->grpc.prefix_len)
        grpc_finish(s, GRPC_INTERNAL, "grpc: the stream ends inside a message");
    else if (s->grpc.method && s->grpc.method->end)
        s->grpc.method->end(s);
}

static void grpc_closed(struct stream *s)
{
    if (s->grpc.method && s->grpc.method->closed)
        s->grpc.method->closed(s);
    s->grpc.method = NULL;
}

/* Ends a stream early: what waits to be sent is dropped, so that the status is seen. */
static void grpc_abort(struct stream *s, unsigned status, const char *text)
{
    stream_drop_queue(s);
    if (s->grpc.plain) {
        stream_reset(s, s->local_closed ? NO_ERROR : CANCEL);
    } else {
        s->grpc.finishing = false;         /* a status that waited to be sent gives way to this one */
        grpc_finish(s, status, text);
    }
}

static const struct h2_handler grpc_server = {
    .headers = grpc_request, .data = grpc_data, .end = grpc_server_end, .abort = grpc_abort, .closed = grpc_closed,
};

/* ---- The client's side, for `cvms agent` and `cvms health` ---- */

/* Opens a call; metadata is a list of name, value, ..., NULL.  NULL without memory. */
static struct stream *grpc_call(struct conn *c, const struct grpc_method *m, const char *authority,
                                const char *const *metadata)
{
    struct stream *s = stream_new(c, c->next_id);
    const char *const list[] = {
        ":method", "POST", ":scheme", c->secure ? "https" : "http", ":path", m->path, ":authority", authority,
        "content-type", "application/grpc", "te", "trailers", "user-agent", "cvms/" CVMS_VERSION, NULL,
    };
    if (!s)
        return NULL;
    c->next_id += 2;
    s->grpc.method = m;
    stream_put_fields(s, list, metadata, 0);
    return s;
}

/* The client has sent all: an empty DATA frame with END_STREAM behind what is queued. */
static void grpc_half_close(struct stream *s)
{
    stream_queue(s, blob_new(0), ITEM_LAST_DATA);
}

static void grpc_client_status(struct stream *s, unsigned status, struct bytes text)
{
    const struct grpc_method *m = s->grpc.method;
    s->grpc.finishing = true;
    if (m && m->status)
        m->status(s, status, text);
}

/* The status of a call to which the server has given none. */
PRINTF_LIKE(3, 4) static void grpc_client_fail(struct stream *s, unsigned status, const char *fmt, ...)
{
    char text[600];
    TEXT_REST(text, fmt);
    if (!s->grpc.finishing)
        grpc_client_status(s, status, bytes_of(text));
}

/* The text of a grpc-message, which is percent-encoded. */
static void percent_decode(struct buf *out, struct bytes t)
{
    for (size_t i = 0; i < t.n; i++) {
        int c = t.p[i] == '%' && i + 2 < t.n ? hex_byte(t.p + i + 1) : -1;
        buf_putc(out, c >= 0 ? c : t.p[i]);
        i += c >= 0 ? 2 : 0;
    }
}

/* gRPC's http-grpc-status-mapping: what answers in HTTP without a grpc-status is mostly a proxy. */
static void grpc_http_answer(struct stream *s, const struct bytes *v)
{
    static const struct {
        uint16_t http, status;
    } map[] = { { 400, GRPC_INTERNAL }, { 401, GRPC_UNAUTHENTICATED }, { 403, GRPC_PERMISSION_DENIED },
                { 404, GRPC_UNIMPLEMENTED }, { 429, GRPC_UNAVAILABLE }, { 502, GRPC_UNAVAILABLE },
                { 503, GRPC_UNAVAILABLE }, { 504, GRPC_UNAVAILABLE } };
    int64_t http = parse_decimal(v[F_STATUS]);
    unsigned status = GRPC_UNKNOWN;
    struct bytes type = v[F_CONTENT_TYPE];
    for (size_t i = 0; i < sizeof map / sizeof *map; i++)
        if (map[i].http == http)
            status = map[i].status;
    grpc_client_fail(s, status, "HTTP status %lld with content-type \"%.*s\" is no answer of a gRPC server",
                     (long long)http, TEXT_OF(type, 100));
    stream_reset(s, CANCEL);
}

/* Response HEADERS, then trailers; either may carry the status. */
static void grpc_response(struct stream *s, const struct fields *f, bool end)
{
    const struct bytes *v = f->value;
    bool grpc = bytes_eq(v[F_STATUS], BYTES("200")) && grpc_content_type(v[F_CONTENT_TYPE]);
    int64_t status = parse_decimal(v[F_GRPC_STATUS]);
    if (v[F_STATUS].p && !grpc && !(end && v[F_GRPC_STATUS].p)) {
        grpc_http_answer(s, v);
    } else if (!end) {
        grpc_encoding(s, v[F_GRPC_ENCODING]);
        if (s->grpc.method && s->grpc.method->open)
            s->grpc.method->open(s, f);
    } else if (status < 0 || status >= GRPC_STATUSES) {
        grpc_client_fail(s, GRPC_UNKNOWN, "the server ended the stream with %s grpc-status",
                         v[F_GRPC_STATUS].p ? "an unknown" : "no");
    } else if (status == GRPC_OK && s->grpc.prefix_len) {
        grpc_client_fail(s, GRPC_INTERNAL, "the server ended the stream inside a message");
    } else {
        struct buf text = { 0 };
        percent_decode(&text, v[F_GRPC_MESSAGE]);
        grpc_client_status(s, (unsigned)status, (struct bytes){ text.p, text.len });
        buf_free(&text);
    }
}

static void grpc_client_end(struct stream *s)
{
    grpc_client_fail(s, GRPC_INTERNAL, "the server ended the stream without a status");
    if (!s->local_closed && !s->dead)
        stream_reset(s, CANCEL);
}

static void grpc_client_abort(struct stream *s, unsigned status, const char *text)
{
    s->grpc.ended = true;
    grpc_client_fail(s, status, "%s", text);
    stream_reset(s, CANCEL);
}

/* gRPC's table of HTTP/2 error codes. */
static void grpc_client_lost(struct stream *s, const char *how, uint32_t code)
{
    unsigned status = code == REFUSED_STREAM ? GRPC_UNAVAILABLE : code == CANCEL ? GRPC_CANCELLED
                    : code == ENHANCE_YOUR_CALM ? GRPC_RESOURCE_EXHAUSTED
                    : code == INADEQUATE_SECURITY ? GRPC_PERMISSION_DENIED : GRPC_INTERNAL;
    s->grpc.broken |= !s->grpc.finishing;
    grpc_client_fail(s, status, "%s: %s", how, h2_error_name(code));
}

static void grpc_client_closed(struct stream *s)
{
    const struct conn *c = s->conn;
    const char *goaway = c->goaway.len && !c->goaway.failed ? (const char *)c->goaway.p : NULL;
    s->grpc.broken |= !s->grpc.finishing;
    if (c->error && c->error != INADEQUATE_SECURITY)
        grpc_client_fail(s, GRPC_INTERNAL, "%s: %s", h2_error_name(c->error), c->why);
    else
        grpc_client_fail(s, GRPC_UNAVAILABLE, "%s%s%s%s", c->why ? c->why : "the stream was closed by the server",
                         goaway ? " (" : "", goaway ? goaway : "", goaway ? ")" : "");
    grpc_closed(s);
}

static const struct h2_handler grpc_client = {
    .headers = grpc_response, .data = grpc_data, .end = grpc_client_end, .abort = grpc_client_abort,
    .lost = grpc_client_lost, .closed = grpc_client_closed,
};

/* ==== 9. TLS: chain, key, BearSSL pump ============================================================================
 * Owns: certificates, keys and authorities (RFC 5280), TLS 1.2 connections (RFC 5246, RFC 9113 9.2), pooled buffers.
 * BearSSL's engine does the protocol; what it lacks is here: extended key usage, subjects for the log, the alert that
 * goes with each refusal, randomness without /dev.
 * Never: touches a descriptor or reads the clock; the caller passes wall-clock seconds (Unix time).
 */
/* A setting: the name the user knows it by, and a path or PEM text; NULL or "" is not set. */
struct tls_source {
    const char *name, *value;
};

struct tls_options {
    struct tls_source cert, key;
    struct tls_source server_ca, client_ca; /* a client uses server_ca; "" is the system's bundle */
    const char *client_san;                 /* server: the name that a client certificate must carry, or NULL */
    const char *server_name;                /* client: a host name or an IP address */
    bool insecure;                          /* client: believe any server */
    bool allow_no_alpn;                     /* server: a client that offers no ALPN may speak HTTP/2 (RFC 9113 3.2 forbids) */
    bool http1;                             /* server: ALPN http/1.1 and http/1.0 as well, or none */
};

/* TLS_CLOSING and TLS_FAILED: close the socket once tls_send_buf has no more. */
enum tls_state { TLS_HANDSHAKE, TLS_OPEN, TLS_CLOSING, TLS_FAILED };

#if CVMS_TLS
enum {
    TLS_LEAF_MAX = 16 << 10,  /* bytes of a peer's own certificate; they are about 1 KiB */
    TLS_CHAIN_MAX = 10,       /* certificates in a peer's chain; each costs a signature check */
    TLS_NAMES_MAX = 65535,    /* RFC 5246 7.4.4: authorities in a CertificateRequest, in bytes */
    TLS_SUBJECT_MAX = 240,    /* characters of a subject in a log line */
    TLS_RSA_MIN = 2048, TLS_RSA_MAX = 4096,
    TLS_EC_MAX = 66           /* bytes of a number of P-521 */
};

enum { /* our own reasons, beside BearSSL's 0 to 62 */
    TLS_ERR_USAGE = 128, TLS_ERR_NAME, TLS_ERR_NO_NAMES, TLS_ERR_ACCESS, TLS_ERR_CHAIN, TLS_ERR_ALPN, TLS_ERR_PLAINTEXT, TLS_ERR_MEMORY
};

/* What a number means; `alert`: the one that goes with a reason of ours (0: none, or BearSSL sends it). */
struct tls_row {
    int number, alert;
    const char *text, *hint;
};

static const struct tls_row tls_alerts[] = { /* RFC 5246 7.2, RFC 7301 3.2 */
    { 10, 0, "unexpected_message", "" },
    { 20, 0, "bad_record_mac", "" },
    { 22, 0, "record_overflow", "" },
    { 40, 0, "handshake_failure", ": no common cipher suite, curve or signature" },
    { 42, 0, "bad_certificate", ": it does not accept our certificate" },
    { 43, 0, "unsupported_certificate", ": it does not accept our certificate" },
    { 44, 0, "certificate_revoked", ": it does not accept our certificate" },
    { 45, 0, "certificate_expired", ": it does not accept our certificate" },
    { 46, 0, "certificate_unknown", ": it does not accept our certificate" },
    { 47, 0, "illegal_parameter", "" },
    { 48, 0, "unknown_ca", ": it does not know the authority of our certificate" },
    { 49, 0, "access_denied", ": our certificate gives no access" },
    { 50, 0, "decode_error", "" },
    { 51, 0, "decrypt_error", "" },
    { 70, 0, "protocol_version", ": no common TLS version" },
    { 71, 0, "insufficient_security", "" },
    { 80, 0, "internal_error", "" },
    { 86, 0, "inappropriate_fallback", "" },
    { 90, 0, "user_canceled", "" },
    { 100, 0, "no_renegotiation", "" },
    { 110, 0, "unsupported_extension", "" },
    { 112, 0, "unrecognized_name", "" },
    { 116, 0, "certificate_required", ": it wants a client certificate" },
    { 120, 0, "no_application_protocol", ": it does not speak HTTP/2 (ALPN h2)" },
};

/* Reasons, as they stand after "the client ...". */
static const struct tls_row tls_reasons[] = {
    { BR_ERR_UNSUPPORTED_VERSION, 70, "sent something that is no TLS record", "" },
    { BR_ERR_BAD_VERSION, 70, "changed the record version in midstream", "" },
    { BR_ERR_BAD_LENGTH, 22, "sent a record of impossible length", "" },
    { BR_ERR_TOO_LARGE, 22, "sent a record that is too large", "" },
    { BR_ERR_BAD_MAC, 20, "sent a record that does not decrypt", "" },
    { BR_ERR_NO_RANDOM, 80, "is refused: the operating system gives no random numbers", "" },
    { BR_ERR_UNKNOWN_TYPE, 10, "sent a record of unknown type", "" },
    { BR_ERR_UNEXPECTED, 10, "sent a message out of order", "" },
    { BR_ERR_BAD_CIPHER_SUITE, 47, "chose a cipher suite that was not offered", "" },
    { BR_ERR_BAD_SECRENEG, 40, "sent a wrong secure renegotiation extension", "" },
    { BR_ERR_BAD_FINISHED, 51, "sent a wrong Finished message", "" },
    { BR_ERR_INVALID_ALGORITHM, 40, "wants a curve or signature that is not supported", "" },
    { BR_ERR_BAD_SIGNATURE, 51, "does not hold the private key of its certificate", "" },
    { BR_ERR_WRONG_KEY_USAGE, 43, "has a certificate whose key usage forbids signatures", "" },
    { BR_ERR_NO_CLIENT_AUTH, 40, "sent no certificate", "" },
    { BR_ERR_X509_UNSUPPORTED, 43, "uses an algorithm that is not supported (RSA, EC P-256 to P-521, SHA-2 are)", "" },
    { BR_ERR_X509_LIMIT_EXCEEDED, 43, "has a key or a certificate that is too large", "" },
    { BR_ERR_X509_BAD_SIGNATURE, 42, "has a wrong signature in its chain", "" },
    { BR_ERR_X509_EXPIRED, 45, "has a certificate in its chain that is expired or not yet valid", "" },
    { BR_ERR_X509_DN_MISMATCH, 42, "comes in a chain out of order", "" },
    { BR_ERR_X509_BAD_SERVER_NAME, 42, "is not for this server name", "" },
    { BR_ERR_X509_CRITICAL_EXTENSION, 43, "has a critical extension that is not understood", "" },
    { BR_ERR_X509_NOT_CA, 42, "is signed by a certificate that is no authority", "" },
    { BR_ERR_X509_FORBIDDEN_KEY_USAGE, 43, "is signed by a certificate whose key usage forbids that", "" },
    { BR_ERR_X509_WEAK_PUBLIC_KEY, 42, "has an RSA key of less than 2048 bits in its chain", "" },
    { BR_ERR_X509_NOT_TRUSTED, 48, "is not signed by a trusted authority", "" },
    { TLS_ERR_USAGE, 43, "has an extended key usage that does not allow this", "" },
    { TLS_ERR_NAME, 42, "is not for this server address", "" },
    { TLS_ERR_NO_NAMES, 42, "has no subjectAltName: its CN is not looked at", "" },
    { TLS_ERR_ACCESS, 49, "does not carry the name that -client-san asks for", "" },
    { TLS_ERR_CHAIN, 43, "or its chain is too long", "" },
    { TLS_ERR_ALPN, 120, "did not agree on ALPN h2, which HTTP/2 over TLS needs (RFC 9113 3.2)", "" },
    { TLS_ERR_PLAINTEXT, 0, "speaks plaintext HTTP where TLS is spoken: turn TLS on at the client", "" },
    { TLS_ERR_MEMORY, 80, "is refused: no memory", "" },
    { BR_ERR_SEND_FATAL_ALERT + 40, 0, "is refused: no common cipher suite, curve or signature (TLS 1.2 with ECDHE and "
                                       "AES-GCM or ChaCha20-Poly1305 is spoken here)", "" },
    { BR_ERR_SEND_FATAL_ALERT + 70, 0, "is refused: it speaks no TLS 1.2", "" },
    { BR_ERR_SEND_FATAL_ALERT + 120, 0, "is refused: it offers ALPN, but not h2", "" },
};

#define TLS_FIND(table, number) tls_find(table, sizeof table / sizeof table[0], number)
static const struct tls_row *tls_find(const struct tls_row *table, size_t n, int number)
{
    while (n && table->number != number)
        table++, n--;
    return n ? table : NULL;
}

/* The row of a reason; those without one are told by their range alone. */
static const struct tls_row *tls_reason(int err)
{
    static const struct tls_row damaged = { 0, 42, "is damaged", "" },
                                handshake = { 0, 50, "sent a malformed handshake message", "" },
                                ended = { 0, 0, "sent a malformed handshake message", "" };
    const struct tls_row *row = TLS_FIND(tls_reasons, err);
    return row ? row : err >= BR_ERR_X509_OK && err <= BR_ERR_X509_NOT_TRUSTED ? &damaged
           : err < BR_ERR_RECV_FATAL_ALERT ? &handshake : &ended;
}

/* Private keys that stand in argv or the environment themselves; the list ends with NULL. */
static void wipe_inline(char **words)
{
    for (; *words; words++)
        if (strstr(*words, "PRIVATE KEY-----"))
            wipe(*words, strlen(*words));
}

/* ---- Certificates, as far as BearSSL does not read them ---- */

#define OID_SUBJECT_ALT_NAME "\x55\x1d\x11"

struct cert {
    br_x509_decoder_context decoder; /* pkey points into it */
    const br_x509_pkey *pkey;
    struct bytes subject, extensions; /* the Name with its header; what stands inside SEQUENCE OF Extension */
    int64_t not_before, not_after;
};

/* Takes a UTCTime or GeneralizedTime as RFC 5280 4.1.2.5 has them: seconds, in UTC. */
static bool der_time(struct bytes *in, int64_t *seconds)
{
    struct Timestamp t = { 0, 0 };
    struct bytes value;
    char text[32];
    int tag = der_next(in, &value);
    bool short_year = tag == 23;
    if ((!short_year && tag != 24) || value.n != (short_year ? 13 : 15))
        return false;
    const char *v = (const char *)value.p, *century = short_year ? v[0] < '5' ? "20" : "19" : v;
    v += short_year ? 0 : 2;
    text_printf(text, sizeof text, "%.2s%.2s-%.2s-%.2sT%.2s:%.2s:%.3s", century, v, v + 2, v + 4, v + 6, v + 8, v + 10);
    bool ok = pb_timestamp_read(bytes_of(text), &t);
    *seconds = t.seconds;
    return ok;
}

/* RFC 5280 4.1: finds the dates, the subject and the extensions of a certificate. */
static bool cert_walk(struct cert *c, struct bytes der)
{
    struct bytes body, tbs, part;
    c->not_before = c->not_after = 0;
    c->subject = c->extensions = (struct bytes){ NULL, 0 };
    if (der_next(&der, &body) != DER_SEQUENCE || der_next(&body, &tbs) != DER_SEQUENCE)
        return false;
    int tag = der_next(&tbs, &part);
    if (tag == 0xa0)
        tag = der_next(&tbs, &part);
    for (int i = 0; i < 3; i++) /* signature, issuer, validity */
        if (tag != DER_INTEGER || der_next(&tbs, &part) != DER_SEQUENCE)
            return false;
    const uint8_t *start = tbs.p;
    if (!der_time(&part, &c->not_before) || !der_time(&part, &c->not_after) || der_next(&tbs, &part) != DER_SEQUENCE)
        return false;
    c->subject = (struct bytes){ start, (size_t)(part.p + part.n - start) };
    while ((tag = der_next(&tbs, &part)) >= 0)
        if (tag == 0xa3 && der_next(&part, &c->extensions) != DER_SEQUENCE)
            return false;
    return true;
}

/* Decodes a whole certificate; returns 0 or a BearSSL error.  *c points into der. */
static int cert_decode(struct cert *c, struct bytes der)
{
    br_x509_decoder_context *d = &c->decoder;
    br_x509_decoder_init(d, NULL, NULL);
    br_x509_decoder_push(d, der.p, der.n);
    c->pkey = br_x509_decoder_get_pkey(d);
    if (!cert_walk(c, der)) {
        c->pkey = NULL;
        return BR_ERR_X509_UNEXPECTED;
    }
    return c->pkey ? 0 : br_x509_decoder_last_error(d);
}

/* Finds an extension (RFC 5280 4.2); *value is empty when it is damaged. */
static bool cert_extension(struct bytes extensions, struct bytes oid, struct bytes *value)
{
    struct bytes extension, id;
    while (der_next(&extensions, &extension) == DER_SEQUENCE)
        if (der_next(&extension, &id) == DER_OID && bytes_eq(id, oid)) {
            int tag = der_next(&extension, value);
            if (tag == DER_BOOLEAN) /* critical */
                tag = der_next(&extension, value);
            if (tag != DER_OCTET_STRING)
                *value = (struct bytes){ NULL, 0 };
            return true;
        }
    return false;
}

/* True if there is no extended key usage, or it holds that of a server, or of a client, or any (RFC 5280 4.2.1.12). */
static bool cert_allows(struct bytes extensions, bool server)
{
    struct bytes value, list, id, purpose = server ? BYTES("\x2b\x06\x01\x05\x05\x07\x03\x01") /* id-kp-serverAuth */
                                                   : BYTES("\x2b\x06\x01\x05\x05\x07\x03\x02"); /* id-kp-clientAuth */
    if (!cert_extension(extensions, BYTES("\x55\x1d\x25"), &value))
        return true;
    if (der_next(&value, &list) != DER_SEQUENCE)
        return false;
    while (der_next(&list, &id) == DER_OID)
        if (bytes_eq(id, purpose) || bytes_eq(id, BYTES("\x55\x1d\x25\x00")))
            return true;
    return false;
}

/* A certificate without it has its names, if any, in a CN, where agents written in Go do not look. */
static bool cert_has_names(struct bytes extensions)
{
    struct bytes value;
    return cert_extension(extensions, BYTES(OID_SUBJECT_ALT_NAME), &value);
}

/* True if the subject alternative name holds this name as what it looks like: an IP address, a URI (it has a colon), a
 * mail address (an @) or a DNS name (RFC 5280 4.2.1.6, 7).  No wildcards. */
static bool cert_has_name(struct bytes extensions, const char *name)
{
    uint8_t ip[16];
    size_t n = strlen(name), exact = 0; /* bytes in which upper and lower case differ */
    int tag, wanted = 0x82;
    struct bytes value, list, one;
    bool v4 = inet_pton(AF_INET, name, ip) == 1;
    if (v4 || inet_pton(AF_INET6, name, ip) == 1)
        wanted = 0x87, name = (const char *)ip, exact = n = v4 ? 4 : 16;
    else if (strchr(name, ':'))
        wanted = 0x86, exact = n;
    else if (strchr(name, '@'))
        wanted = 0x81, exact = strcspn(name, "@");
    if (!cert_extension(extensions, BYTES(OID_SUBJECT_ALT_NAME), &value) || der_next(&value, &list) != DER_SEQUENCE)
        return false;
    while ((tag = der_next(&list, &one)) >= 0)
        if (tag == wanted && one.n == n && memcmp(one.p, name, exact) == 0 &&
            strncasecmp((const char *)one.p + exact, name + exact, n - exact) == 0)
            return n > 0;
    return false;
}

static const struct {
    const char *oid, *name;
} dn_types[] = { /* RFC 4514 3, and two that are common */
    { "\x55\x04\x03", "CN" }, { "\x55\x04\x07", "L" }, { "\x55\x04\x08", "ST" }, { "\x55\x04\x0a", "O" },
    { "\x55\x04\x0b", "OU" }, { "\x55\x04\x06", "C" }, { "\x55\x04\x09", "STREET" },
    { "\x09\x92\x26\x89\x93\xf2\x2c\x64\x01\x19", "DC" }, { "\x09\x92\x26\x89\x93\xf2\x2c\x64\x01\x01", "UID" },
    { "\x55\x04\x05", "serialNumber" }, { "\x2a\x86\x48\x86\xf7\x0d\x01\x09\x01", "emailAddress" },
};

/* One AttributeTypeAndValue.  The value comes out in printable ASCII whatever it holds (RFC 4514 2.4). */
static void dn_attribute(struct buf *out, struct bytes oid, int tag, struct bytes value)
{
    size_t i = 0, types = sizeof dn_types / sizeof dn_types[0];
    while (i < types && !bytes_eq(oid, bytes_of(dn_types[i].oid)))
        i++;
    buf_puts(out, i < types ? dn_types[i].name : "?");
    buf_putc(out, '=');
    bool text = tag == 12 || tag == 19 || tag == 20 || tag == 22; /* UTF8String and its elders */
    if (!text)
        buf_putc(out, '#');
    for (size_t k = 0; k < value.n && out->len <= TLS_SUBJECT_MAX; k++) {
        int c = value.p[k];
        bool edge = (k == 0 && (c == ' ' || c == '#')) || (k + 1 == value.n && c == ' ');
        if (!text || c < ' ' || c > '~')
            buf_printf(out, text ? "\\%02X" : "%02x", (unsigned)c);
        else
            buf_printf(out, edge || strchr("\"+,;<>\\", c) ? "\\%c" : "%c", c);
    }
}

/* A Name as RFC 4514 writes it, last component first, NUL-terminated; cut at TLS_SUBJECT_MAX.  A Name of more than 16
 * components loses its first ones. */
static void dn_text(struct buf *out, struct bytes name)
{
    struct bytes rdns, rdn[16], pair, oid, value;
    size_t n = 0;
    if (der_next(&name, &rdns) != DER_SEQUENCE)
        buf_puts(out, "(unreadable)");
    else
        while (der_next(&rdns, &rdn[n % 16]) == DER_SET)
            n++;
    for (size_t first = n > 16 ? n - 16 : 0; n-- > first && out->len <= TLS_SUBJECT_MAX;) {
        struct bytes *set = &rdn[n % 16];
        while (der_next(set, &pair) == DER_SEQUENCE && der_next(&pair, &oid) == DER_OID) {
            int tag = der_next(&pair, &value);
            if (tag >= 0)
                dn_attribute(out, oid, tag, value);
            if (set->n)
                buf_putc(out, '+');
        }
        if (n > first)
            buf_putc(out, ',');
    }
    if (out->len > TLS_SUBJECT_MAX) {
        out->len = TLS_SUBJECT_MAX;
        buf_puts(out, "...");
    }
    buf_putc(out, '\0');
}

static void date_text(char to[32], int64_t t)
{
    struct buf b = buf_fixed(to, 32);
    pb_timestamp(&b, t, 0);           /* der_time takes no year that it does not */
    to[b.len] = 0;
}

/* ---- Configuration ---- */

union tls_engine {
    br_ssl_engine_context eng; /* the first member of both */
    br_ssl_server_context server;
    br_ssl_client_context client;
};

/* Made once and never changed; each connection holds a reference, so that a reload leaves live ones alone. */
struct tls_config {
    unsigned refs;
    bool client, verify, insecure, allow_no_alpn, http1;
    char *peer_name; /* the server's name, or what -client-san asks for, or NULL */
    bool peer_is_ip;
    br_x509_certificate *chain;
    size_t chain_len;
    br_skey_decoder_context key;
    br_x509_trust_anchor *anchors;
    size_t anchors_len;
    const char *alpn[3];
    struct err warnings;     /* lines of what may go on */
    union tls_engine base; /* initialised: a connection starts as a copy */
};

/* err_set after "NAME (path): ", or "NAME: " for PEM text. */
PRINTF_LIKE(3, 4) static bool source_bad(const struct tls_source *s, struct err *e, const char *fmt, ...)
{
    char text[400];
    TEXT_REST(text, fmt);
    if (strstr(s->value, "-----BEGIN"))
        return err_set(e, "%s: %s", s->name, text);
    return err_set(e, "%s (%.150s): %s", s->name, s->value, text);
}

/* The PEM text of a setting; wipe_buf it. */
static bool source_load(const struct tls_source *s, struct buf *text, struct err *e)
{
    struct err why = { "" };
    if (strstr(s->value, "-----BEGIN")) {
        buf_puts(text, s->value);
        return !text->failed || err_set(e, "%s: no memory", s->name);
    }
    return file_load(s->value, PEM_FILE_MAX, text, &why) || err_set(e, "%s: %s", s->name, why.text);
}

static bool label_is_private(const char *label)
{
    size_t n = strlen(label);
    return n >= 11 && strcmp(label + n - 11, "PRIVATE KEY") == 0;
}

static void certs_free(br_x509_certificate *list, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(list[i].data);
    free(list);
}

static bool certs_add(br_x509_certificate **list, size_t *n, const struct buf *der)
{
    br_x509_certificate *more = realloc(*list, (*n + 1) * sizeof **list);
    if (!more)
        return false;
    *list = more;
    more[*n] = (br_x509_certificate){ malloc(der->len + 1), der->len };
    if (!more[*n].data)
        return false;
    memcpy(more[(*n)++].data, der->p, der->len);
    return true;
}

/* All CERTIFICATE blocks of a setting; others are passed over.  Free the list with certs_free, also on failure. */
static bool certs_load(const struct tls_source *s, br_x509_certificate **list, size_t *n, struct err *e)
{
    struct buf text = { 0 }, der = { 0 };
    char label[PEM_LABEL];
    bool key = false, ok = source_load(s, &text, e);
    struct bytes in = { text.p, text.len };
    int got = 1;
    while (ok && (got = pem_next(&in, label, &der)) > 0) {
        key |= label_is_private(label);
        if (der.failed || (strcmp(label, "CERTIFICATE") == 0 && !certs_add(list, n, &der)))
            ok = source_bad(s, e, "no memory");
    }
    if (ok && got < 0)
        ok = source_bad(s, e, "the PEM block \"%s\" is damaged or cut off", label);
    else if (ok && *n == 0 && key)
        ok = source_bad(s, e, "holds a private key, not a certificate; are two settings swapped?");
    else if (ok && *n == 0)
        ok = source_bad(s, e, "holds no certificate in PEM (\"BEGIN CERTIFICATE\")");
    wipe_buf(&der);
    wipe_buf(&text);
    return ok;
}

/* Decodes the index-th certificate and checks its dates. */
static bool cert_check(const struct tls_source *s, size_t index, struct cert *c, struct bytes der, int64_t wall_s,
                       struct err *e)
{
    struct buf subject = { 0 };
    char date[32];
    int err = cert_decode(c, der);
    bool early = wall_s < c->not_before, ok = !err && !early && wall_s <= c->not_after;
    dn_text(&subject, c->subject);
    const char *who = subject.failed ? "" : (const char *)subject.p;
    date_text(date, early ? c->not_before : c->not_after);
    if (err)
        source_bad(s, e, "certificate %zu, \"%s\", %s", index + 1, who, tls_reason(err)->text);
    else if (!ok)
        source_bad(s, e, "certificate %zu, \"%s\", %s on %s", index + 1, who,
                   early ? "is not yet valid; it starts" : "expired", date);
    buf_free(&subject);
    return ok;
}

static unsigned bit_length(struct bytes number)
{
    unsigned n = (unsigned)number.n * 8;
    for (unsigned top = number.n ? number.p[0] : 128; top < 128; top <<= 1)
        n--;
    return n;
}

#define KEYS_SUPPORTED "RSA (2048 to 4096 bits) or EC (P-256, P-384, P-521)"

/* Decodes a private key of which every number fits BearSSL's buffers: its decoder of version 0.6 does not look. */
static bool key_decode(br_skey_decoder_context *key, const struct tls_source *s, struct bytes der, struct err *e)
{
    struct der_private k;
    if (!der_private_key(der, &k))
        return source_bad(s, e, "the private key is damaged");
    unsigned bits = bit_length(k.rsa[0]);
    if (bytes_eq(k.algorithm, BYTES(OID_ED25519)))
        return source_bad(s, e, "is an Ed25519 key, which BearSSL does not know; use " KEYS_SUPPORTED);
    if (bits && (bits < TLS_RSA_MIN || bits > TLS_RSA_MAX))
        return source_bad(s, e, "the RSA key has %u bits; use 2048 to 4096", bits);
    bool fits = k.ec.n <= TLS_EC_MAX;
    for (size_t i = 1; i < 8; i++)
        fits &= k.rsa[i].n <= (i < 3 ? TLS_RSA_MAX / 8 : TLS_RSA_MAX / 16);
    br_skey_decoder_init(key);
    if (fits && (bits || k.ec.n))
        br_skey_decoder_push(key, der.p, der.n);
    return br_skey_decoder_key_type(key) != 0 ||
           source_bad(s, e, "this kind of private key is not supported; use " KEYS_SUPPORTED);
}

/* The DER of the first private key of a setting: PKCS#1, SEC1 or PKCS#8.  wipe_buf it. */
static bool key_read(const struct tls_source *s, struct buf *der, struct err *e)
{
    struct buf text = { 0 };
    char label[PEM_LABEL] = "", other[PEM_LABEL] = "";
    bool ok = source_load(s, &text, e);
    struct bytes in = { text.p, text.len };
    int got = ok;
    while (got > 0 && (got = pem_next(&in, label, der)) > 0 && !label_is_private(label))
        memcpy(other, label, sizeof other);
    if (der->failed)
        ok = source_bad(s, e, "no memory");
    else if (got < 0)
        ok = source_bad(s, e, "the PEM block \"%s\" is damaged or cut off", label);
    else if (got > 0 && strncmp(label, "ENCRYPTED ", 10) == 0)
        ok = source_bad(s, e, "the private key is encrypted; decrypt it with: openssl pkey -in KEY -out PLAIN");
    else if (got > 0 && strncmp(label, "OPENSSH ", 8) == 0)
        ok = source_bad(s, e, "is an OpenSSH private key; convert a copy with: ssh-keygen -p -m PKCS8 -f COPY");
    else if (ok && got == 0 && *other)
        ok = source_bad(s, e, "holds a \"%s\", not a private key; are two settings swapped?", other);
    else if (ok && got == 0)
        ok = source_bad(s, e, "holds no private key in PEM (\"BEGIN PRIVATE KEY\")");
    wipe_buf(&text);
    return ok;
}

/* Two things were tried: whether both went well, else the mistakes of either, a line for each. */
static bool err_join(struct err *e, bool ok, bool also, const struct err *more)
{
    size_t n = ok ? 0 : strlen(e->text);
    if (!also)
        text_printf(e->text + n, sizeof e->text - n, "%s%s", n ? "\n" : "", more->text);
    return ok && also;
}

/* True if a signature by the key verifies under the certificate's key. */
static bool key_fits(const br_skey_decoder_context *key, const br_x509_pkey *pk)
{
    static const uint8_t hash[32] = { 1 };
    uint8_t sig[TLS_RSA_MAX / 8], out[32];
    const br_rsa_private_key *rsa = br_skey_decoder_get_rsa(key);
    const br_ec_private_key *ec = br_skey_decoder_get_ec(key);
    if (rsa && pk->key_type == BR_KEYTYPE_RSA)
        return br_rsa_pkcs1_sign_get_default()(BR_HASH_OID_SHA256, hash, sizeof hash, rsa, sig) &&
               br_rsa_pkcs1_vrfy_get_default()(sig, (rsa->n_bitlen + 7) / 8, BR_HASH_OID_SHA256, sizeof hash,
                                               &pk->key.rsa, out) && memcmp(hash, out, sizeof hash) == 0;
    if (!ec || pk->key_type != BR_KEYTYPE_EC || ec->curve != pk->key.ec.curve)
        return false;
    size_t n = br_ecdsa_sign_asn1_get_default()(br_ec_get_default(), &br_sha256_vtable, hash, ec, sig);
    return n && br_ecdsa_vrfy_asn1_get_default()(br_ec_get_default(), hash, sizeof hash, &pk->key.ec, sig, n);
}

static bool identity_load(struct tls_config *c, const struct tls_options *o, int64_t wall_s, struct err *e)
{
    struct cert cert = { .pkey = NULL };
    struct buf der = { 0 };
    struct err more;
    bool has_cert = present(o->cert.value);
    if (!has_cert || !present(o->key.value))
        return err_set(e, "%s is given without %s: TLS needs both", (has_cert ? &o->cert : &o->key)->name,
                       (has_cert ? &o->key : &o->cert)->name);
    bool certs = certs_load(&o->cert, &c->chain, &c->chain_len, e);
    bool key = key_read(&o->key, &der, &more) && key_decode(&c->key, &o->key, (struct bytes){ der.p, der.len }, &more);
    wipe_buf(&der);
    if (!err_join(e, certs, key, &more))
        return false;
    for (size_t i = c->chain_len; i-- > 0;) { /* the first last: it stays in cert */
        if (cert_check(&o->cert, i, &cert, (struct bytes){ c->chain[i].data, c->chain[i].data_len }, wall_s, e))
            continue;
        if (i == 0 || !cert.pkey)
            return false;
        err_join(&c->warnings, false, false, e); /* a peer that trusts one before it does not look at it */
    }
    if (!c->client && !cert_has_names(cert.extensions)) {
        source_bad(&o->cert, e, "the first certificate has no subjectAltName, and agents refuse one that has only a CN");
        err_join(&c->warnings, false, false, e);
    }
    if (!cert_allows(cert.extensions, !c->client)) {
        source_bad(&o->cert, e, "the first certificate has an extended key usage without %s, and %s refuse it",
                   c->client ? "clientAuth" : "serverAuth", c->client ? "servers" : "agents");
        err_join(&c->warnings, false, false, e);
    }
    return key_fits(&c->key, cert.pkey) || source_bad(&o->key, e, "is not the private key of the first certificate in %s",
                                                o->cert.name);
}

/* Copies a certificate's name and key into an anchor, in one allocation. */
static bool anchor_make(br_x509_trust_anchor *a, struct cert *c)
{
    const br_rsa_public_key *rsa = &c->pkey->key.rsa;
    const br_ec_public_key *ec = &c->pkey->key.ec;
    bool is_rsa = c->pkey->key_type == BR_KEYTYPE_RSA;
    size_t n = c->subject.n;
    uint8_t *p = malloc(n + (is_rsa ? rsa->nlen + rsa->elen : ec->qlen));
    if (!p)
        return false;
    *a = (br_x509_trust_anchor){ { p, n }, br_x509_decoder_isCA(&c->decoder) ? BR_X509_TA_CA : 0, *c->pkey };
    memcpy(p, c->subject.p, n);
    if (is_rsa) {
        a->pkey.key.rsa.n = memcpy(p + n, rsa->n, rsa->nlen);
        a->pkey.key.rsa.e = memcpy(p + n + rsa->nlen, rsa->e, rsa->elen);
    } else {
        a->pkey.key.ec.q = memcpy(p + n, ec->q, ec->qlen);
    }
    /* cppcheck-suppress memleak ; the anchor has taken p, in a nested initializer that cppcheck does not follow */
    return true;
}

/* The authorities of a setting.  One that has expired or is not understood is passed over (lists live long); that none
 * is left is an error, which tells about the last. */
static bool anchors_load(struct tls_config *c, const struct tls_source *s, int64_t wall_s, struct err *e)
{
    br_x509_certificate *list = NULL;
    struct cert cert;
    size_t n = 0, names = 0;
    bool ok = certs_load(s, &list, &n, e);
    if (ok && !(c->anchors = calloc(n, sizeof *c->anchors)))
        ok = source_bad(s, e, "no memory");
    for (size_t i = 0; ok && c->anchors && i < n; i++) {
        if (!cert_check(s, i, &cert, (struct bytes){ list[i].data, list[i].data_len }, wall_s, e))
            continue;
        names += 2 + cert.subject.n;
        if (!anchor_make(&c->anchors[c->anchors_len], &cert))
            ok = source_bad(s, e, "no memory");
        else
            c->anchors_len++;
    }
    certs_free(list, n);
    if (ok && !c->client && names > TLS_NAMES_MAX)
        ok = source_bad(s, e, "holds too many authorities to name in a handshake; give only those of the clients");
    return ok && c->anchors_len > 0;
}

/* Drops one reference. */
static void tls_config_free(struct tls_config *c)
{
    if (!c || --c->refs)
        return;
    certs_free(c->chain, c->chain_len);
    for (size_t i = 0; i < c->anchors_len; i++)
        free(c->anchors[i].dn.data);
    free(c->anchors);
    free(c->peer_name);
    wipe(c, sizeof *c);
    free(c);
}

/* AES-GCM first where the processor has AES, else ChaCha20: six from the third on, or from the first. */
static const uint16_t tls_suites[] = {
    BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, BR_TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    BR_TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,       BR_TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    BR_TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,       BR_TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    BR_TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, BR_TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
};

static const struct {
    int id;
    const br_hash_class *class;
} tls_hashes[] = { { br_sha256_ID, &br_sha256_vtable }, { br_sha384_ID, &br_sha384_vtable },
                   { br_sha512_ID, &br_sha512_vtable } };

static void config_engine(struct tls_config *c)
{
    br_ssl_engine_context *eng = &c->base.eng;
    bool aes = br_aes_x86ni_ctr_get_vtable() || br_aes_pwr8_ctr_get_vtable();
    if (c->client)
        br_ssl_client_zero(&c->base.client);
    else
        br_ssl_server_zero(&c->base.server);
    br_ssl_engine_set_versions(eng, BR_TLS12, BR_TLS12);
    br_ssl_engine_set_suites(eng, tls_suites + (aes ? 2 : 0), 6);
    br_ssl_engine_set_default_ec(eng);
    br_ssl_engine_set_default_rsavrfy(eng);
    br_ssl_engine_set_default_ecdsa(eng);
    br_ssl_engine_set_default_aes_gcm(eng);
    br_ssl_engine_set_default_chapol(eng);
    for (size_t i = 0; i < sizeof tls_hashes / sizeof tls_hashes[0]; i++)
        br_ssl_engine_set_hash(eng, tls_hashes[i].id, tls_hashes[i].class);
    br_ssl_engine_set_prf_sha256(eng, &br_tls12_sha256_prf);
    br_ssl_engine_set_prf_sha384(eng, &br_tls12_sha384_prf);
    c->alpn[0] = "h2", c->alpn[1] = "http/1.1", c->alpn[2] = "http/1.0";
    br_ssl_engine_set_protocol_names(eng, c->alpn, c->http1 ? 3 : 1);
    br_ssl_engine_add_flags(eng, BR_OPT_ENFORCE_SERVER_PREFERENCES | BR_OPT_NO_RENEGOTIATION |
                                     BR_OPT_FAIL_ON_ALPN_MISMATCH);
#if CVMS_TLS_POOL
    eng->rng_os_rand_done = 1; /* getentropy is asked, not RDRAND or /dev/urandom as well */
#endif
}

static struct tls_config *config_new(const struct tls_options *o, bool client, struct err *e)
{
    uint8_t probe[16];
    const char *name = client ? o->server_name : o->client_san;
    size_t n = name ? strlen(name) : 0;
    if (!random_fill(probe, sizeof probe)) {
        err_set(e, "TLS: the operating system gives no random numbers: %s", strerror(errno));
        return NULL;
    }
    struct tls_config *c = calloc(1, sizeof *c);
    n -= n > 1 && name[n - 1] == '.'; /* the root's, which no certificate names */
    if (c && n)
        c->peer_name = text_copy((struct bytes){ (const uint8_t *)name, n }, SIZE_MAX);
    if (!c || (n && !c->peer_name)) {
        free(c);
        err_set(e, "TLS: no memory");
        return NULL;
    }
    c->refs = 1;
    c->client = client;
    c->insecure = client && o->insecure;
    c->allow_no_alpn = o->allow_no_alpn;
    c->http1 = o->http1;
    name = c->peer_name;
    c->peer_is_ip = name && (inet_pton(AF_INET, name, probe) == 1 || inet_pton(AF_INET6, name, probe) == 1);
    config_engine(c);
    return c;
}

/* Either list of authorities asks for client certificates.  They are verified against client_ca or, when that is not
 * set, against server_ca; server_ca beside client_ca is only checked for being readable. */
static bool client_ca_load(struct tls_config *c, const struct tls_options *o, int64_t wall_s, struct err *e)
{
    br_x509_certificate *list = NULL;
    size_t n = 0;
    c->verify = present(o->server_ca.value) || present(o->client_ca.value);
    if (!c->verify)
        return !c->peer_name ||
               err_set(e, "-client-san needs %s, which turns client certificates on", o->client_ca.name);
    if (present(o->client_ca.value) && present(o->server_ca.value)) {
        bool ok = certs_load(&o->server_ca, &list, &n, e);
        certs_free(list, n);
        if (!ok)
            return false;
    }
    if (!anchors_load(c, present(o->client_ca.value) ? &o->client_ca : &o->server_ca, wall_s, e))
        return false;
    br_ssl_server_set_trust_anchor_names_alt(&c->base.server, c->anchors, c->anchors_len);
    return true;
}

static bool server_load(struct tls_config *c, const struct tls_options *o, int64_t wall_s, struct err *e)
{
    struct err more;
    bool identity = identity_load(c, o, wall_s, e), ca = client_ca_load(c, o, wall_s, &more);
    return err_join(e, identity, ca, &more);
}

static const char *const tls_bundles[] = {
    "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",            "/etc/ssl/cert.pem",
};

static bool client_load(struct tls_config *c, const struct tls_options *o, int64_t wall_s, struct err *e)
{
    struct tls_source ca = o->server_ca;
    struct err more;
    c->verify = true;
    bool identity = (!present(o->cert.value) && !present(o->key.value)) || identity_load(c, o, wall_s, e);
    if (c->peer_name && strlen(c->peer_name) > 255)
        return err_set(e, "TLS: the server name is longer than 255 characters");
    if (c->insecure)
        return identity;
    if (!c->peer_name)
        return err_set(e, "TLS: no server name to verify; give -server-name");
    for (size_t i = 0; !present(ca.value) && i < sizeof tls_bundles / sizeof tls_bundles[0]; i++)
        if (access(tls_bundles[i], R_OK) == 0)
            ca = (struct tls_source){ "the system's authorities", tls_bundles[i] };
    if (!present(ca.value))
        return err_set(e, "TLS: this system has no list of authorities; give one with %s", ca.name);
    bool anchors = anchors_load(c, &ca, wall_s, &more);
    return err_join(e, identity, anchors, &more);
}

static struct tls_config *config_make(const struct tls_options *o, bool client, int64_t wall_s, struct err *e)
{
    struct tls_config *c = config_new(o, client, e);
    if (c && !(client ? client_load : server_load)(c, o, wall_s, e)) {
        tls_config_free(c);
        return NULL;
    }
    return c;
}

/* Load and check everything that a server, or a client, whose certificate is optional, needs; NULL and *e on failure.
 * The caller holds one reference. */
#define tls_server_config(o, wall_s, e) config_make(o, false, wall_s, e)
#define tls_client_config(o, wall_s, e) config_make(o, true, wall_s, e)
#define tls_config_warnings(c) ((const char *)(c)->warnings.text)

/* ---- Buffers, lent to a connection while bytes live in them ---- */

struct tls_buffers {
    uint8_t in[BR_SSL_BUFSIZE_INPUT], out[BR_SSL_BUFSIZE_OUTPUT];
};

/* All zero is empty.  Outlives its connections. */
struct tls_pool {
    struct tls_buffers *idle;         /* the last that were given back, for the next connection that needs some */
};

static void pool_give(struct tls_pool *pool, struct tls_buffers *b)
{
    if (b) {
        free(pool->idle);
        pool->idle = b;
    }
}

static void tls_pool_free(struct tls_pool *pool)
{
    free(pool->idle);
    pool->idle = NULL;
}

/* ---- A connection ---- */

struct tls {
    union tls_engine u;
    struct tls_config *config;
    struct tls_pool *pool;
    struct tls_buffers *buffers; /* NULL while nothing lives in them */
    struct tls_verify *verify;   /* until the handshake ends */
    struct buf subject, why;     /* NUL-terminated */
    struct bytes last;           /* failed: what still goes out; before that, the same of the step that is under way */
    enum tls_state state;
    bool greeted, secret;        /* the peer has sent something; our records are encrypted */
};

/* Verifies the peer's chain: a br_x509_class around br_x509_minimal that keeps the first certificate. */
struct tls_verify {
    const br_x509_class *vtable;
    br_x509_minimal_context minimal;
    struct tls *tls;
    int64_t wall_s;
    struct buf leaf;
    struct cert cert; /* the leaf, decoded at the chain's end */
    unsigned count;
};

static struct tls_verify *verify_of(const br_x509_class **ctx)
{
    return (struct tls_verify *)(void *)ctx;
}

static void verify_start_chain(const br_x509_class **ctx, const char *server_name)
{
    struct tls_verify *v = verify_of(ctx);
    v->minimal.vtable->start_chain(&v->minimal.vtable, server_name);
}

static void verify_start_cert(const br_x509_class **ctx, uint32_t length)
{
    struct tls_verify *v = verify_of(ctx);
    if (v->count++ < TLS_CHAIN_MAX)
        v->minimal.vtable->start_cert(&v->minimal.vtable, length);
}

static void verify_append(const br_x509_class **ctx, const unsigned char *p, size_t n)
{
    struct tls_verify *v = verify_of(ctx);
    if (v->count == 1 && v->leaf.len + n <= TLS_LEAF_MAX)
        buf_put(&v->leaf, p, n);
    else if (v->count == 1)
        v->leaf.failed = true;
    if (v->count <= TLS_CHAIN_MAX && !v->leaf.failed)
        v->minimal.vtable->append(&v->minimal.vtable, p, n);
}

static void verify_end_cert(const br_x509_class **ctx)
{
    struct tls_verify *v = verify_of(ctx);
    if (v->count <= TLS_CHAIN_MAX)
        v->minimal.vtable->end_cert(&v->minimal.vtable);
}

/* What BearSSL does not check: the purpose, and names that it cannot match. */
static int verify_leaf(const struct tls_verify *v)
{
    const struct tls_config *c = v->tls->config;
    struct bytes ext = v->cert.extensions;
    if (!cert_allows(ext, c->client))
        return TLS_ERR_USAGE;
    if (!c->client && c->peer_name && !cert_has_name(ext, c->peer_name))
        return TLS_ERR_ACCESS;
    if (c->client && !cert_has_names(ext))
        return TLS_ERR_NO_NAMES;
    if (c->client && c->peer_is_ip && !cert_has_name(ext, c->peer_name))
        return TLS_ERR_NAME;
    return 0;
}

/* Says why the chain is refused: the leaf's subject and the reason. */
static void verify_say(struct tls_verify *v, int err)
{
    struct tls *t = v->tls;
    char date[32];
    bool early = v->wall_s < v->cert.not_before, late = v->wall_s > v->cert.not_after;
    buf_printf(&t->why, "%s certificate \"%s\" is refused: it ", t->config->client ? "server" : "client",
               t->subject.failed ? "" : (const char *)t->subject.p);
    date_text(date, early ? v->cert.not_before : v->cert.not_after);
    if (err == BR_ERR_X509_EXPIRED && (early || late))
        buf_printf(&t->why, "%s on %s", early ? "is not yet valid; it starts" : "expired", date);
    else
        buf_puts(&t->why, tls_reason(err)->text);
    if (err == BR_ERR_X509_NOT_TRUSTED && t->config->client)
        buf_puts(&t->why, "; give its authority with -ca");
    buf_putc(&t->why, '\0');
}

static unsigned verify_end_chain(const br_x509_class **ctx)
{
    struct tls_verify *v = verify_of(ctx);
    struct tls *t = v->tls;
    int err = (int)v->minimal.vtable->end_chain(&v->minimal.vtable);
    int damage = cert_decode(&v->cert, (struct bytes){ v->leaf.p, v->leaf.failed ? 0 : v->leaf.len });
    dn_text(&t->subject, v->cert.subject);
    if (t->subject.failed)
        err = TLS_ERR_MEMORY;
    else if (t->config->insecure)
        err = damage;
    else if (v->count > TLS_CHAIN_MAX || v->leaf.failed)
        err = TLS_ERR_CHAIN;
    else if (err == 0)
        err = damage ? damage : verify_leaf(v);
    if (err)
        verify_say(v, err);
    return (unsigned)err;
}

static const br_x509_pkey *verify_get_pkey(const br_x509_class *const *ctx, unsigned *usages)
{
    const struct tls_verify *v = (const struct tls_verify *)(const void *)ctx;
    if (!v->tls->config->insecure)
        return v->minimal.vtable->get_pkey(&v->minimal.vtable, usages);
    if (usages)
        *usages = BR_KEYTYPE_KEYX | BR_KEYTYPE_SIGN;
    return v->cert.pkey;
}

static const br_x509_class tls_verify_class = {
    sizeof(struct tls_verify), verify_start_chain, verify_start_cert, verify_append,
    verify_end_cert, verify_end_chain, verify_get_pkey,
};

static bool verify_new(struct tls *t, int64_t wall_s)
{
    const struct tls_config *c = t->config;
    struct tls_verify *v = t->verify = calloc(1, sizeof *v);
    if (!v)
        return false;
    v->vtable = &tls_verify_class;
    v->tls = t;
    v->wall_s = wall_s;
    br_x509_minimal_init(&v->minimal, &br_sha256_vtable, c->anchors, c->anchors_len);
    br_x509_minimal_set_rsa(&v->minimal, br_ssl_engine_get_rsavrfy(&t->u.eng));
    br_x509_minimal_set_ecdsa(&v->minimal, br_ssl_engine_get_ec(&t->u.eng), br_ssl_engine_get_ecdsa(&t->u.eng));
    for (size_t i = 0; i < sizeof tls_hashes / sizeof tls_hashes[0]; i++)
        br_x509_minimal_set_hash(&v->minimal, tls_hashes[i].id, tls_hashes[i].class);
    br_x509_minimal_set_minrsa(&v->minimal, TLS_RSA_MIN / 8);
    br_x509_minimal_set_time(&v->minimal, (uint32_t)(wall_s / 86400 + 719528), (uint32_t)(wall_s % 86400));
    br_ssl_engine_set_x509(&t->u.eng, &v->vtable);
    return true;
}

static void verify_free(struct tls *t)
{
    if (t->verify)
        buf_free(&t->verify->leaf);
    free(t->verify);
    t->verify = NULL;
    br_ssl_engine_set_x509(&t->u.eng, NULL);
}

/* Lends buffers; false if there is no memory. */
static bool tls_hold(struct tls *t)
{
    if (!t->buffers) {
        t->buffers = t->pool->idle ? t->pool->idle : malloc(sizeof *t->buffers);
        t->pool->idle = NULL;
#if CVMS_TLS_POOL
        t->u.eng.ibuf = t->buffers ? t->buffers->in : NULL;
        t->u.eng.obuf = t->buffers ? t->buffers->out : NULL;
#endif
    }
    return t->buffers != NULL;
}

#if CVMS_TLS_POOL
/* Takes the buffers back when no byte is in either, not even a header's. */
static void tls_unhold(struct tls *t)
{
    br_ssl_engine_context *eng = &t->u.eng;
    if (eng->ixa || eng->ixb || eng->oxa != eng->oxc)
        return;
    pool_give(t->pool, t->buffers);
    t->buffers = NULL;
    eng->ibuf = eng->obuf = NULL;
}
#else
#define tls_unhold(t) ((void)(t))
#endif

/* What a peer's alert means. */
static void alert_say(struct tls *t, int number)
{
    const struct tls_row *row = TLS_FIND(tls_alerts, number);
    bool client = t->config->client, certificate = number == 40 && client && !t->config->chain_len;
    buf_printf(&t->why, "the %s sent alert %s (%d)%s", client ? "server" : "client", row ? row->text : "unknown", number,
               certificate ? ": it may want a client certificate; give -cert and -key" : row ? row->hint : "");
}

/* Ends the connection with a reason; the first reason stays.  The rest of a record on its way still goes out, and
 * after it the alert, while our records are in the clear: later ones only BearSSL can protect, and it has ended. */
static void tls_fail(struct tls *t, int err)
{
    const struct tls_row *reason = tls_reason(err);
    if (t->state == TLS_FAILED)
        return;
    t->state = TLS_FAILED;
    if (t->why.len == 0 && err >= BR_ERR_RECV_FATAL_ALERT && err < BR_ERR_SEND_FATAL_ALERT)
        alert_say(t, err - BR_ERR_RECV_FATAL_ALERT);
    else if (t->why.len == 0)
        buf_printf(&t->why, "the %s %s", t->config->client ? "server" : "client", reason->text);
    buf_putc(&t->why, '\0');
    if (reason->alert == 0 || !t->buffers || t->secret)
        return;
    size_t n = t->last.n, from = n ? (size_t)(t->last.p - t->buffers->out) : 0;
    memcpy(t->buffers->out + from + n, (uint8_t[]){ 21, 3, 3, 0, 2, 2, (uint8_t)reason->alert }, 7); /* RFC 5246 7.2 */
    t->last = (struct bytes){ t->buffers->out + from, n + 7 };
}

/* After each step: notices how far the handshake is, and the end, and gives idle buffers back. */
static void tls_settle(struct tls *t)
{
    br_ssl_engine_context *eng = &t->u.eng;
    size_t n;
    unsigned state = br_ssl_engine_current_state(eng);
    const uint8_t *out = br_ssl_engine_sendrec_buf(eng, &n);
    bool app = state & (BR_SSL_SENDAPP | BR_SSL_RECVAPP), hello = t->greeted && out && out[0] == 22; /* the answer to one */
    if (t->state == TLS_FAILED)
        return;
    if (state == BR_SSL_CLOSED) {
        t->state = TLS_CLOSING;
        if (br_ssl_engine_last_error(eng) != 0)
            tls_fail(t, br_ssl_engine_last_error(eng));
        return;
    }
    t->secret |= out && n == 6 && memcmp(out, "\x14\x03\x03\x00\x01\x01", 6) == 0; /* our ChangeCipherSpec */
    bool begins = t->state == TLS_HANDSHAKE;
    if (begins && (app || hello) && !br_ssl_engine_get_selected_protocol(eng) && !t->config->allow_no_alpn &&
        !t->config->http1) {
        tls_fail(t, TLS_ERR_ALPN);
        return;
    }
    if (begins && app) {
        t->state = TLS_OPEN;
        verify_free(t);
    }
    if (t->state == TLS_OPEN && !(state & (BR_SSL_RECVREC | BR_SSL_RECVAPP)))
        t->state = TLS_CLOSING;  /* close_notify, or renegotiation (RFC 9113 9.2.1) */
    tls_unhold(t);
}

static void tls_free(struct tls *t)
{
    if (!t)
        return;
    verify_free(t);
    pool_give(t->pool, t->buffers);
    buf_free(&t->subject);
    buf_free(&t->why);
    tls_config_free(t->config);
    wipe(t, sizeof *t);
    free(t);
}

/* Points the copied engine at the identity: these setters hold pointers into the context itself. */
static void tls_set_identity(struct tls *t)
{
    const struct tls_config *c = t->config;
    const br_rsa_private_key *rsa = br_skey_decoder_get_rsa(&c->key);
    const br_ec_private_key *ec = br_skey_decoder_get_ec(&c->key);
    const br_ec_impl *curves = br_ssl_engine_get_ec(&t->u.eng);
    br_rsa_pkcs1_sign rsa_sign = br_rsa_pkcs1_sign_get_default();
    br_ecdsa_sign ec_sign = br_ecdsa_sign_asn1_get_default();
    if (c->client && rsa)
        br_ssl_client_set_single_rsa(&t->u.client, c->chain, c->chain_len, rsa, rsa_sign);
    else if (c->client && ec)
        br_ssl_client_set_single_ec(&t->u.client, c->chain, c->chain_len, ec, BR_KEYTYPE_SIGN, 0, curves, ec_sign);
    else if (rsa)
        br_ssl_server_set_single_rsa(&t->u.server, c->chain, c->chain_len, rsa, BR_KEYTYPE_SIGN, NULL, rsa_sign);
    else if (ec)
        br_ssl_server_set_single_ec(&t->u.server, c->chain, c->chain_len, ec, BR_KEYTYPE_SIGN, 0, curves, ec_sign);
}

/* A new connection in the role of its configuration, to which it takes a reference.  NULL without memory or
 * randomness. */
static struct tls *tls_new(struct tls_config *c, struct tls_pool *pool, int64_t wall_s)
{
    uint8_t seed[32];
    struct tls *t = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    c->refs++;
    t->config = c;
    t->pool = pool;
    t->u = c->base;
    tls_set_identity(t);
    if ((c->verify && !verify_new(t, wall_s)) || !tls_hold(t) || !random_fill(seed, sizeof seed)) {
        tls_free(t);
        return NULL;
    }
    br_ssl_engine_inject_entropy(&t->u.eng, seed, sizeof seed);
    wipe(seed, sizeof seed);
    br_ssl_engine_set_buffers_bidi(&t->u.eng, t->buffers->in, sizeof t->buffers->in, t->buffers->out,
                                   sizeof t->buffers->out);
    if (c->client)
        br_ssl_client_reset(&t->u.client, c->peer_is_ip ? NULL : c->peer_name, 0);
    else
        br_ssl_server_reset(&t->u.server);
    tls_settle(t);
    return t;
}

/* Whether HTTP/2 has not been agreed on, and has to be. */
static bool tls_http1(struct tls *t)
{
    const char *alpn = br_ssl_engine_get_selected_protocol(&t->u.eng);
    return t->config->http1 && (alpn ? strcmp(alpn, "h2") != 0 : !t->config->allow_no_alpn);
}

/* One line for the log, or "". */
static const char *tls_why(const struct tls *t)
{
    return t->why.failed ? "no memory" : t->why.len ? (const char *)t->why.p : "";
}

/* The subject of the peer's certificate, in printable ASCII (RFC 4514), or NULL when there is none. */
static const char *tls_peer_subject(const struct tls *t)
{
    return t->subject.failed || t->subject.len < 2 ? NULL : (const char *)t->subject.p;
}

/* Takes ciphertext from the peer, and returns how much: less than n while tls_app_in has bytes, and at the end. */
static size_t tls_take(struct tls *t, const uint8_t *p, size_t n)
{
    size_t room = 0;
    if (t->state != TLS_FAILED && !tls_hold(t))
        tls_fail(t, TLS_ERR_MEMORY);
    if (t->state == TLS_FAILED)
        return 0;
    uint8_t *to = br_ssl_engine_recvrec_buf(&t->u.eng, &room);
    n = to ? min_size(n, room) : 0;
    if (n && !t->greeted && *p >= 'A' && *p <= 'Z') { /* "PRI" or "GET": no record type */
        tls_fail(t, TLS_ERR_PLAINTEXT);
        return n;
    }
    t->greeted |= n > 0;
    t->last.p = br_ssl_engine_sendrec_buf(&t->u.eng, &t->last.n);
    if (n) {
        memcpy(to, p, n);
        br_ssl_engine_recvrec_ack(&t->u.eng, n);
    }
    tls_settle(t);
    if (t->state != TLS_FAILED)
        t->last = (struct bytes){ NULL, 0 };
    return n;
}

/* Ciphertext for the peer; NULL when there is none. */
static const uint8_t *tls_send_buf(struct tls *t, size_t *n)
{
    *n = t->last.n;
    if (t->state == TLS_FAILED)
        return t->last.n ? t->last.p : NULL;
    return t->buffers ? br_ssl_engine_sendrec_buf(&t->u.eng, n) : NULL;
}

static void tls_send_ack(struct tls *t, size_t n)
{
    if (t->state == TLS_FAILED) {
        t->last = bytes_from(t->last, n);
    } else if (n && t->buffers) {
        br_ssl_engine_sendrec_ack(&t->u.eng, n);
        tls_settle(t);
    }
}

/* Plaintext from the peer; NULL when there is none. */
static const uint8_t *tls_app_in(struct tls *t, size_t *n)
{
    *n = 0;
    return t->state == TLS_FAILED || !t->buffers ? NULL : br_ssl_engine_recvapp_buf(&t->u.eng, n);
}

static void tls_app_in_ack(struct tls *t, size_t n)
{
    if (n && t->state != TLS_FAILED) {
        br_ssl_engine_recvapp_ack(&t->u.eng, n);
        tls_settle(t);
    }
}

/* Makes a record of plaintext for the peer, and returns how much it holds: 0 while another waits, outside TLS_OPEN. */
static size_t tls_put(struct tls *t, const uint8_t *p, size_t n)
{
    size_t room = 0;
    if (t->state == TLS_OPEN && !tls_hold(t))
        tls_fail(t, TLS_ERR_MEMORY);
    uint8_t *to = t->state == TLS_OPEN ? br_ssl_engine_sendapp_buf(&t->u.eng, &room) : NULL;
    n = to ? min_size(n, room) : 0;
    if (n) {
        memcpy(to, p, n);
        br_ssl_engine_sendapp_ack(&t->u.eng, n);
        br_ssl_engine_flush(&t->u.eng, 0);
    }
    if (t->buffers)
        tls_settle(t);
    return n;
}

/* Starts the end: flushes, then close_notify (RFC 5246 7.2.1). */
static void tls_close(struct tls *t)
{
    if (t->state >= TLS_CLOSING || !tls_hold(t))
        return;
    t->state = TLS_CLOSING;
    br_ssl_engine_close(&t->u.eng);
    tls_settle(t);
}

#else /* the same calls without TLS: a configuration cannot be made, so the others are never reached */

struct tls_config { int unused; };
struct tls_pool { int unused; };
struct tls { enum tls_state state; };

static struct tls_config *tls_server_config(const struct tls_options *o, int64_t wall_s, struct err *e)
{
    (void)o, (void)wall_s;
    err_set(e, "this cvms was built without TLS (make TLS=0); unset the certificate settings, or build it with TLS");
    return NULL;
}

#define tls_client_config tls_server_config
#define tls_config_free(c) ((void)(c))
#define tls_config_warnings(c) ((void)(c), "")
#define wipe_inline(words) ((void)(words))
#define tls_pool_free(pool) ((void)(pool))
#define tls_new(c, pool, wall_s) ((void)(c), (void)(pool), (void)(wall_s), (struct tls *)NULL)
#define tls_free(t) ((void)(t))
#define tls_http1(t) ((void)(t), false)
#define tls_why(t) ((void)(t), "")
#define tls_peer_subject(t) ((void)(t), (const char *)NULL)
#define tls_take(t, p, n) ((void)(t), (void)(p), (void)(n), (size_t)0)
#define tls_send_buf(t, n) ((void)(t), *(n) = 0, (const uint8_t *)NULL)
#define tls_send_ack(t, n) ((void)(t), (void)(n))
#define tls_app_in(t, n) ((void)(t), *(n) = 0, (const uint8_t *)NULL)
#define tls_app_in_ack(t, n) ((void)(t), (void)(n))
#define tls_put(t, p, n) ((void)(t), (void)(p), (void)(n), (size_t)0)
#define tls_close(t) ((void)(t))
#endif

/* ==== 10. Event loop: descriptors, clocks, signals =================================================================
 * Owns: sockets, stdout, stderr and -record's file while it runs, the clock, the only place that waits (epoll where there
 * is one, poll elsewhere), signals.
 * Never: looks into bytes, waits for a descriptor that takes or gives nothing.
 */
enum {
    READ_LEN = 65536,                 /* one read serves one connection; then it is the others' turn */
    WRITE_TURN = 1 << 20,             /* bytes that one connection may send before it is the others' turn */
    HOLD_BYTES = 1 << 20,             /* output waiting for stdout, above which senders get no more credit, */
    PAUSE_BYTES = 16 << 20,           /* and above which no connection is read */
    MAX_LISTENERS = 8,
    ACCEPT_TURN = 64,
    BACKLOG = 4096,                   /* connections that wait to be accepted; musl has 128 for SOMAXCONN */
    SPARE_DESCRIPTORS = 32,           /* not for connections: stdio, listeners, inputs that are read again */
    STOP_MS = 5000,                   /* from the first signal to the end */
    RETRY_MS = 100,
    CONNECT_MS = 5000,                /* for an address to answer at all */
    PROGRESS_MS = 1000,               /* what takes longer is shown on a terminal, */
    PROGRESS_STEP_MS = 200,           /* so often */
};

struct link;

/* A server to connect to, and what becomes of a try.  It outlives the links to it. */
struct dial {
    struct endpoint endpoint;
    const char *name, *where;         /* of the peer, in log lines; where: of one that may not be there yet */
    struct addrinfo *addresses;       /* tried in turn, then again until give_up_ms */
    int64_t give_up_ms, connect_ms;   /* connect_ms: for an address to answer at all */
    struct tls_config *tls;           /* NULL: plaintext */
    void (*up)(struct link *);        /* a connect has succeeded */
    void (*down)(struct link *, const char *why);   /* none has, in time */
    void (*closed)(struct link *, const char *why); /* a link that was up is over; NULL: nothing to do */
    bool retry_told;                  /* that the first try has failed */
};

/* A socket and its connection. */
struct link {
    struct watch watch;               /* first: a watch of a link is the link */
    struct loop *loop;
    struct link *prev, *next;
    size_t heap_at;                   /* place in the heap of deadlines, from 1; 0: not in it */
    int64_t deadline_ms;
    bool connecting, shut, dead;
    struct tls *tls;                  /* NULL: plaintext */
    struct dial *dial;                /* NULL: it was accepted */
    const struct addrinfo *to;        /* while connecting: the address that is tried */
    void *user;                       /* the dialler's own */
    struct conn conn;
};

/* stdout, stderr or -record: lines wait in the core's buffer until the descriptor takes them. */
struct sink {
    struct watch watch;
    struct buf *lines;
    size_t sent;
    int64_t retry_ms;                 /* when to try again what can't be waited for; INT64_MAX: never */
    bool shared, broken;              /* shared: other programs write through this open file too */
};

struct loop {
    struct core core;
    struct watch signals, listeners[MAX_LISTENERS];
    struct sink out, err, record;
    size_t listener_count, link_count, accepted_count, max_accepted;
    struct link *links, *graveyard;
    struct endpoint serving;          /* of what is accepted, and its TLS (NULL: plaintext) */
    struct tls_config *tls;
    struct tls_pool tls_pool;
    struct link **heap;
    size_t heap_len, heap_cap;
    bool paused, stopping, hurry, reload, nohup;   /* reload: SIGHUP has come; nohup: it was to be ignored */
    int64_t stop_ms, timer_ms;        /* timer_ms: when the application wants its turn; INT64_MAX: never */
    int64_t accept_ms;                /* how long the listeners rest; INT64_MAX: they don't */
    int64_t refuse;                   /* so many connections are closed at once (-fault refuse) */
    int exit_status, signal_number;
    char progress[80], drawn[80];     /* how far what takes long is, and what of it stands on the terminal now */
    const char *stop_why;             /* set: the loop is to end */
    void (*turn)(struct loop *);      /* the application's own work, once a turn; it sets timer_ms */
    struct poller poller;
    uint8_t read_buf[READ_LEN];
};

/* The only global: a signal handler can reach nothing else.  The writing end of the loop's own pipe. */
static volatile sig_atomic_t signal_pipe = -1;

static int64_t clock_ms(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void loop_clock(struct loop *l)
{
    l->core.now_ms = clock_ms(CLOCK_MONOTONIC);
    l->core.wall_ms = clock_ms(CLOCK_REALTIME);
}

/* ---- Deadlines: a binary heap of links, the earliest first ---- */

static void heap_put(struct loop *l, size_t at, struct link *k)
{
    l->heap[at] = k;
    k->heap_at = at;
}

static void heap_sift(struct loop *l, struct link *k, size_t at)
{
    for (; at > 1 && l->heap[at / 2]->deadline_ms > k->deadline_ms; at /= 2)
        heap_put(l, at, l->heap[at / 2]);
    for (size_t child; (child = 2 * at) <= l->heap_len; at = child) {
        if (child < l->heap_len && l->heap[child + 1]->deadline_ms < l->heap[child]->deadline_ms)
            child++;
        if (l->heap[child]->deadline_ms >= k->deadline_ms)
            break;
        heap_put(l, at, l->heap[child]);
    }
    heap_put(l, at, k);
}

/* Room is made when a link is made, so that this can't fail. */
static void heap_set(struct loop *l, struct link *k, int64_t deadline_ms)
{
    bool in = k->heap_at != 0, want = deadline_ms != INT64_MAX;
    if (in && deadline_ms == k->deadline_ms)
        return;
    k->deadline_ms = deadline_ms;
    if (want) {
        heap_sift(l, k, in ? k->heap_at : ++l->heap_len);
    } else if (in) {
        struct link *last = l->heap[l->heap_len--];
        if (last != k)
            heap_sift(l, last, k->heap_at);
        k->heap_at = 0;
    }
}

/* ---- stdout and stderr ---- */

static size_t sink_pending(const struct sink *s)
{
    return s->lines->len - s->sent;
}

/* What waits for the one of stdout and -record that is further behind. */
static size_t loop_backlog(const struct loop *l)
{
    size_t out = sink_pending(&l->out), record = sink_pending(&l->record);
    return out > record ? out : record;
}

/* The loop is to end, once the turn is over; may be called from anywhere.  why is what the peers get to read. */
static void loop_stop(struct loop *l, const char *why)
{
    if (!l->stop_why)
        l->stop_why = why;
}

/* Writing has failed for good: what waits is dropped.  Without stdout the program has no purpose: it ends. */
static void sink_fail(struct loop *l, struct sink *s, int error)
{
    s->broken = true;
    s->lines->len = s->sent = 0;
    poller_set(&l->poller, &s->watch, 0);
    if (s == &l->record) {
        l->core.recording = false;
        core_note(&l->core, NULL, "-record: %s: nothing more is recorded", strerror(error));
    }
    if (s != &l->out)
        return;
    core_note(&l->core, NULL, "stdout: %s: no message can be shown any more, so cvms ends", strerror(error));
    l->exit_status = 1;
    loop_stop(l, "the server ends");
}

/* Writes without blocking.  An open file that others write through too is told not to block for this one call only. */
static ssize_t sink_write(const struct sink *s, const void *p, size_t n)
{
    int fd = s->watch.fd, flags = s->shared ? fcntl(fd, F_GETFL) : O_NONBLOCK;
    if (flags < 0 || flags & O_NONBLOCK)
        return write(fd, p, n);
    if (fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0)
        return -1;
    ssize_t k = write(fd, p, n);
    int error = errno;
    fcntl(fd, F_SETFL, flags);
    errno = error;
    return k;
}

/* The descriptor takes no more now.  Some can't be waited for, and a terminal with room for one byte says that it can be
 * written, though a line's end takes two: they are tried again in a while. */
static void sink_wait(struct loop *l, struct sink *s)
{
    if (s->sent >= HOLD_BYTES / 4) {  /* a long wait does not make the buffer grow without bound */
        s->lines->len -= s->sent;
        memmove(s->lines->p, s->lines->p + s->sent, s->lines->len);
        s->sent = 0;
    }
    bool full = poll(&(struct pollfd){ .fd = s->watch.fd, .events = POLLOUT }, 1, 0) == 0;
    if (full && poller_set(&l->poller, &s->watch, WATCH_OUT))
        return;
    poller_set(&l->poller, &s->watch, 0);
    s->retry_ms = l->core.now_ms + RETRY_MS;
}

/* Draws a line of progress, which never ends, over the one that was drawn before; an empty one leaves nothing. */
static void progress_draw(struct loop *l, const char *text)
{
    char line[sizeof l->drawn + 2];
    size_t n = strlen(text), old = strlen(l->drawn);
    if (strcmp(text, l->drawn) == 0)
        return;
    memset(line, ' ', sizeof line);
    line[0] = '\r';
    memcpy(line + 1, text, n);
    n = n > old ? n : old;
    line[n + 1] = '\r';
    if (sink_write(&l->err, line, n + (*text ? 1 : 2)) > 0)
        text_printf(l->drawn, sizeof l->drawn, "%s", text);
}

/* Writes as much as the descriptor takes without blocking. */
static void sink_flush(struct loop *l, struct sink *s)
{
    if (sink_pending(s) && s != &l->record)
        progress_draw(l, "");
    bool lost = s->lines->failed && s == &l->record;
    s->lines->failed = lost;          /* elsewhere a line that found no memory has been dealt with */
    s->retry_ms = INT64_MAX;
    while (sink_pending(s) && !s->broken) {
        ssize_t k = sink_write(s, s->lines->p + s->sent, sink_pending(s));
        if (k >= 0) {
            s->sent += (size_t)k;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            sink_wait(l, s);
            return;
        } else if (errno != EINTR) {
            sink_fail(l, s, errno);
        }
    }
    poller_set(&l->poller, &s->watch, 0);
    s->lines->len = s->sent = 0;
    if (lost && !s->broken)
        sink_fail(l, s, ENOMEM);
    if (s->broken || s->lines->cap > 4 * READ_LEN)
        buf_free(s->lines);
}

static void sink_ready(struct loop *l, struct watch *w, unsigned events)
{
    (void)events;
    sink_flush(l, (struct sink *)w);
}

/* A terminal or pipe is opened once more where /proc is there, for a description of our own that does not block. */
static void sink_init(struct sink *s, int fd, struct buf *lines)
{
    struct stat st;
    char path[32];
    *s = (struct sink){ .watch = { .fd = fd, .ready = sink_ready }, .lines = lines, .retry_ms = INT64_MAX };
    if (fd < 0 || fstat(fd, &st) != 0 || S_ISREG(st.st_mode))
        return;
    text_printf(path, sizeof path, "/proc/self/fd/%d", fd);
    bool again = (S_ISCHR(st.st_mode) || S_ISFIFO(st.st_mode)) && (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY;
    int own = again ? open(path, O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC) : -1;
    s->shared = own < 0;
    if (own >= 0)
        s->watch.fd = own;
    if (own >= 0 && fd > STDERR_FILENO)
        close(fd);
}

static void sink_close(const struct sink *s)
{
    if (s->watch.fd > STDERR_FILENO)
        close(s->watch.fd);
}

/* ---- Addresses ---- */

struct address {
    char host[256];                   /* without brackets; empty: none was given */
    int port;                         /* -1: none was given */
    bool bare;                        /* IPv6 without brackets */
};

/* HOST, HOST:PORT, [IPv6]:PORT or IPv6 alone, taken apart.  False: it is none of these. */
static bool address_parse(const char *text, struct address *a)
{
    bool brackets = text[0] == '[';
    const char *host = text + brackets, *end = strchr(text, brackets ? ']' : ':');
    a->bare = !brackets && end && strchr(end + 1, ':');
    if ((brackets && !end) || (a->bare && !strchr("%", host[strspn(host, "0123456789abcdefABCDEF:.")])))
        return false;
    size_t n = a->bare || !end ? strlen(host) : (size_t)(end - host);
    const char *port = host + n + brackets;
    int64_t number = *port == ':' ? parse_decimal(bytes_of(port + 1)) : -1;
    if (n >= sizeof a->host || number > 65535 || (*port && number < 0))
        return false;
    text_printf(a->host, sizeof a->host, "%.*s", (int)n, host);
    a->port = (int)number;
    return true;
}

/* HOST:PORT, with brackets around an IPv6 address. */
static void host_port(char *out, size_t cap, const char *host, unsigned port)
{
    text_printf(out, cap, strchr(host, ':') ? "[%s]:%u" : "%s:%u", host, port);
}

/* A name that is this machine's own, whatever a resolver knows (RFC 6761 6.3); a dot at the end is the root's. */
static bool is_localhost(const char *host)
{
    static const char name[] = "localhost";
    size_t n = strlen(host), len = sizeof name - 1;
    n -= n && host[n - 1] == '.';
    return n >= len && strncasecmp(host + n - len, name, len) == 0 && (n == len || host[n - len - 1] == '.');
}

/* NULL is none, which not every C library takes. */
static void addresses_free(struct addrinfo *list)
{
    if (list)
        freeaddrinfo(list);
}

/* The addresses of a host, the caller's; flags: AI_PASSIVE for all interfaces, and host is empty.  NULL: *why tells. */
static struct addrinfo *resolve_host(const char *host, unsigned port, int flags, const char **why)
{
    char number[12];
    struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_family = AF_UNSPEC, .ai_flags = flags }, *list = NULL;
    text_printf(number, sizeof number, "%u", port);
    int error = getaddrinfo(*host && !is_localhost(host) ? host : NULL, number, &hints, &list);
    *why = error == EAI_SYSTEM ? strerror(errno) : gai_strerror(error);
    return error ? NULL : list;
}

/* ---- Links ---- */

/* A link that has no connection yet. */
static struct link *link_new(struct loop *l, int fd)
{
    if (l->link_count + 2 > l->heap_cap) {
        size_t cap = 2 * l->heap_cap + 16;
        struct link **heap = realloc(l->heap, cap * sizeof *heap);
        if (!heap)
            return NULL;
        l->heap = heap;
        l->heap_cap = cap;
    }
    struct link *k = malloc(sizeof *k);
    if (!k)
        return NULL;
    *k = (struct link){ .watch.fd = fd, .loop = l, .next = l->links, .deadline_ms = INT64_MAX, .connecting = true };
    if (l->links)
        l->links->prev = k;
    l->links = k;
    l->link_count++;
    return k;
}

/* Takes the link out; it is freed at the end of the turn, when no event can name it any more, and until then leads who
 * walks the list to the next. */
static void link_close(struct link *k, const char *why)
{
    struct loop *l = k->loop;
    if (k->dead)
        return;
    void (*told)(struct link *, const char *) = !k->dial ? NULL : k->connecting ? k->dial->down : k->dial->closed;
    k->dead = true;
    k->conn.why = k->conn.why ? k->conn.why : why;
    if (told)
        told(k, why);
    heap_set(l, k, INT64_MAX);
    poller_set(&l->poller, &k->watch, 0);
    if (k->watch.fd >= 0)
        close(k->watch.fd);
    *(k->prev ? &k->prev->next : &l->links) = k->next;
    if (k->next)
        k->next->prev = k->prev;
    l->link_count--;
    l->accepted_count -= !k->dial;
    conn_free(&k->conn);
    tls_free(k->tls);
    k->prev = l->graveyard;
    l->graveyard = k;
}

/* Waits for what the connection needs next.  Without that it could only hang, so it is closed. */
static void link_interest(struct link *k, bool blocked)
{
    bool in = !k->conn.eof && !k->loop->paused && conn_wants_input(&k->conn) > 0;
    heap_set(k->loop, k, conn_deadline(&k->conn));
    if (poller_set(&k->loop->poller, &k->watch, (in ? WATCH_IN : 0u) | (blocked ? WATCH_OUT : 0u)))
        return;
    const char *why = strerror(errno);
    core_note(&k->loop->core, k->conn.peer, "the connection can't be waited for, so it is closed: %s", why);
    link_close(k, why);
}

/* The bytes that go out next, and how many: the connection's own, or with TLS the records that hold them. */
static size_t link_peek(struct link *k, const uint8_t **p)
{
    size_t n;
    if (!k->tls)
        return conn_peek(&k->conn, p);
    if ((*p = tls_send_buf(k->tls, &n)) != NULL && n)
        return n;
    if (k->conn.phase == CONN_CLOSING ? !conn_pending(&k->conn) : k->conn.phase != CONN_OPEN && conn_finished(&k->conn))
        tls_close(k->tls);
    while ((n = conn_peek(&k->conn, p)) != 0 && (n = tls_put(k->tls, *p, n)) != 0)
        conn_sent(&k->conn, n);
    *p = tls_send_buf(k->tls, &n);
    return *p ? n : 0;
}

/* Sends what there is.  True: the socket takes no more now. */
static bool link_send(struct link *k)
{
    const uint8_t *p;
    bool blocked = false;
    for (size_t n, turn = 0; (n = link_peek(k, &p)) != 0;) {
        ssize_t sent = turn > WRITE_TURN ? 0 : send(k->watch.fd, p, n, 0);
        blocked = turn > WRITE_TURN || (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK));
        if (blocked)
            break;
        if (sent < 0 && errno != EINTR) {
            shutdown(k->watch.fd, SHUT_WR);   /* should the peer be there after all, it need not wait */
            conn_unheard(&k->conn);
            break;
        }
        n = sent > 0 ? (size_t)sent : 0;
        turn += n;
        if (k->tls)
            tls_send_ack(k->tls, n);
        else
            conn_sent(&k->conn, n);
    }
    k->conn.below = k->tls && blocked;
    return blocked;
}

/* TLS has failed or the peer has closed it: a line for the log, and the connection has nothing more to say. */
static void link_tls_state(struct link *k)
{
    struct core *core = &k->loop->core;
    enum tls_state state = k->tls->state;
    k->conn.subject = state == TLS_OPEN ? tls_peer_subject(k->tls) : k->conn.subject;
    if (state < TLS_CLOSING || k->conn.phase >= CONN_CLOSING)
        return;
    if (state == TLS_FAILED && k->conn.client && !k->conn.why) {
        k->conn.why = tls_why(k->tls);
        k->conn.error = INADEQUATE_SECURITY;
    } else if (state == TLS_FAILED) {
        core_fault(core, k->conn.peer, "TLS: %s", tls_why(k->tls));
    }
    conn_cut(&k->conn);
}

/* Sends what the connection has to say, closes it when all is said. */
static void link_flush(struct link *k)
{
    if (k->dead || k->connecting)
        return;
    bool blocked = link_send(k);
    if (k->conn.phase == CONN_OPEN && !k->conn.client && !k->conn.eof && conn_finished(&k->conn)) {
        conn_close(&k->conn);
        blocked = link_send(k);
    }
    if (k->tls)
        link_tls_state(k);
    if (k->conn.phase == CONN_CLOSING && !k->shut && !blocked && !conn_pending(&k->conn)) {
        shutdown(k->watch.fd, SHUT_WR);
        k->shut = true;
    }
    if (conn_finished(&k->conn))
        link_close(k, k->conn.why ? k->conn.why : "closed");
    else
        link_interest(k, blocked);
}

/* Hands ciphertext on, and what it holds to the connection.  All is taken until the end of TLS, after which the rest is
 * dropped, but while something of ours has to go out first: that is tried at once.  False: the peer sends on and on
 * without reading it. */
static bool link_decrypt(struct link *k, const uint8_t *p, size_t n)
{
    for (bool stuck = false; n && k->tls->state < TLS_CLOSING;) {
        size_t plain, taken = tls_take(k->tls, p, n);
        for (const uint8_t *in; (in = tls_app_in(k->tls, &plain)) != NULL && plain;) {
            k->conn.no_h2 = tls_http1(k->tls);
            conn_recv(&k->conn, in, plain);
            tls_app_in_ack(k->tls, plain);
        }
        if (!taken && stuck)
            return false;
        stuck = !taken && k->tls->state < TLS_CLOSING;
        if (stuck)
            link_send(k);
        p += taken, n -= taken;
    }
    return true;
}

/* The peer will send no more.  Before the handshake or HTTP/2 has begun it never does: a client learns what may be
 * wrong. */
static void link_eof(struct link *k)
{
    bool handshake = k->tls && k->tls->state == TLS_HANDSHAKE;
    if (k->conn.client && !k->conn.why)
        k->conn.why = handshake ? "the server went away during the TLS handshake; does that port speak TLS?"
                    : !k->conn.settings_seen && !k->tls
                        ? "the server closed the connection before HTTP/2 began; if it wants TLS, give -ca"
                        : "the connection was closed by the server";
    else if (handshake)
        core_fault(&k->loop->core, k->conn.peer, "TLS: the peer went away during the handshake");
    conn_eof(&k->conn);
    if (handshake)
        conn_abandon(&k->conn);       /* what waits to be encrypted never will be */
}

static void link_ready(struct loop *l, struct watch *w, unsigned events)
{
    struct link *k = (struct link *)w;
    bool full = !l->paused && loop_backlog(l) > PAUSE_BYTES;    /* others have filled it in this turn */
    size_t most = min_size(conn_wants_input(&k->conn), sizeof l->read_buf);
    if (events & (WATCH_IN | WATCH_ERROR) && !l->paused && !full && most) {
        ssize_t n = read(k->watch.fd, l->read_buf, most);
        if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
            link_close(k, strerror(errno));
            return;
        }
        if (n == 0)
            link_eof(k);
        else if (n > 0 && !k->tls)
            conn_recv(&k->conn, l->read_buf, (size_t)n);
        else if (n > 0 && !link_decrypt(k, l->read_buf, (size_t)n))
            conn_fail(&k->conn, ENHANCE_YOUR_CALM, "TLS: the peer sends on without reading what it has asked for");
    } else if (events & WATCH_ERROR && !full) {
        link_close(k, "the connection was reset");
        return;
    }
    link_flush(k);
    if (loop_backlog(l) > READ_LEN) {
        sink_flush(l, &l->out);
        sink_flush(l, &l->record);
    }
}

/* The socket is connected: its connection begins.  False: there is no memory, and it is closed. */
static bool link_begin(struct link *k, const struct endpoint *e, struct tls_config *tls, const char *name)
{
    struct loop *l = k->loop;
    if (tls && !(k->tls = tls_new(tls, &l->tls_pool, l->core.wall_ms / 1000))) {
        link_close(k, "out of memory");
        return false;
    }
    k->connecting = false;
    k->watch.ready = link_ready;
    conn_init(&k->conn, &l->core, e, name);
    k->conn.secure = tls != NULL;
    return true;
}

/* An IPv6 address as RFC 5952 has it: the longest run of zeros, if of two groups at least, becomes "::".  (inet_ntop
 * would bring all of printf into a static binary.) */
static void ipv6_text(char out[INET6_ADDRSTRLEN], const uint8_t ip[16])
{
    unsigned at = 16, zeros = 2;
    for (unsigned i = 0, n; i < 16; i += n + 2) {
        for (n = 0; i + n < 15 && !ip[i + n] && !ip[i + n + 1];)
            n += 2;
        at = n > zeros ? i : at;
        zeros = n > zeros ? n : zeros;
    }
    for (unsigned i = 0; i < 16; i += i == at ? zeros : 2) {
        const char *form = i == at ? "::" : i == 0 || i == at + zeros ? "%x" : ":%x";
        out += text_printf(out, 6, form, (unsigned)ip[i] << 8 | ip[i + 1]);
    }
}

_Static_assert(offsetof(struct sockaddr_in, sin_port) == offsetof(struct sockaddr_in6, sin6_port), "one place");

/* "1.2.3.4:5" or "[::1]:5"; an IPv4 address in IPv6 form is shown as IPv4. */
static void peer_name(char out[56], const struct sockaddr_storage *sa)
{
    const struct sockaddr_in6 *six = (const void *)sa;
    const struct sockaddr_in *four = (const void *)sa;
    bool is_six = sa->ss_family == AF_INET6, mapped = is_six && IN6_IS_ADDR_V4MAPPED(&six->sin6_addr);
    const uint8_t *ip = is_six ? six->sin6_addr.s6_addr + (mapped ? 12 : 0) : (const uint8_t *)&four->sin_addr;
    char text[INET6_ADDRSTRLEN];
    if (is_six && !mapped)
        ipv6_text(text, ip);
    else
        text_printf(text, sizeof text, "%u.%u.%u.%u", ip[0], ip[1], ip[2], ip[3]);
    host_port(out, 56, text, ntohs(four->sin_port));
}

static bool listeners_watch(struct loop *l, unsigned interest)
{
    bool ok = true;
    for (size_t i = 0; ok && i < l->listener_count; i++)
        ok = poller_set(&l->poller, &l->listeners[i], interest);
    return ok;
}

/* accept's errors: passing ones concern one client; when descriptors or memory are short the listeners rest until a
 * connection has closed or a second has gone by. */
static void accept_error(struct loop *l)
{
    if (errno != EMFILE && errno != ENFILE && errno != ENOBUFS && errno != ENOMEM)
        return;
    core_cap(&l->core, NULL, CAP_DESCRIPTORS);
    l->accept_ms = l->core.now_ms + 1000;
    listeners_watch(l, 0);
}

/* One connection too many: it is told so, as far as it understands, and closed. */
static void accept_refuse(struct loop *l, int fd, const char *name)
{
    struct buf out = { 0 };
    frame_put(&out, 0, FRAME_SETTINGS, 0, 0);
    frame_put_goaway(&out, 0, ENHANCE_YOUR_CALM, "too many connections");
    if (!l->tls && !out.failed && send(fd, out.p, out.len, 0) > 0)
        shutdown(fd, SHUT_WR);
    buf_free(&out);
    close(fd);
    core_cap(&l->core, name, CAP_CONNECTIONS);
}

static void listener_ready(struct loop *l, struct watch *w, unsigned events)
{
    (void)events;
    for (int i = 0; i < ACCEPT_TURN && !l->stopping; i++) {
        struct sockaddr_storage sa;
        socklen_t len = sizeof sa;
        char name[56];
        memset(&sa, 0, sizeof sa);
        int fd = accept_nonblocking(w->fd, &sa, &len);
        if (fd < 0) {
            if (errno == EINTR || errno == ECONNABORTED)
                continue;
            accept_error(l);
            return;
        }
        peer_name(name, &sa);
        if (l->accepted_count >= l->max_accepted) {
            accept_refuse(l, fd, name);
            continue;
        }
        struct link *k = l->refuse > 0 ? NULL : link_new(l, fd);
        l->accepted_count += k != NULL;
        if (k && link_begin(k, &l->serving, l->tls, name)) {
            link_ready(l, &k->watch, WATCH_IN);   /* a client speaks first, and mostly has */
            continue;
        }
        core_note(&l->core, name, l->refuse > 0 ? "refused (-fault refuse)" : "refused: out of memory");
        l->refuse -= l->refuse > 0;
        if (!k)
            close(fd);
    }
}

/* ---- Connecting ---- */

/* Begins to connect to k->to.  False: errno tells why not. */
static bool link_connect(struct link *k)
{
    int on = 1, fd = socket(k->to->ai_family, k->to->ai_socktype, k->to->ai_protocol);
    if (fd < 0)
        return false;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    k->watch.fd = fd;
    if (fd_prepare(fd) && (connect(fd, k->to->ai_addr, k->to->ai_addrlen) == 0 || errno == EINPROGRESS) &&
        poller_set(&k->loop->poller, &k->watch, WATCH_OUT))
        return true;
    k->watch.fd = fd_drop(fd);
    return false;
}

/* Tries the next address, since the last was not to be had; behind them all, the first again in a while, until it is
 * time to give up. */
static void link_dial_on(struct link *k, int error)
{
    struct loop *l = k->loop;
    struct dial *d = k->dial;
    int64_t now = l->core.now_ms, left = d->give_up_ms - now;
    if (k->watch.fd >= 0) {
        poller_set(&l->poller, &k->watch, 0);
        close(k->watch.fd);
        k->watch.fd = -1;
    }
    for (k->to = k->to ? k->to->ai_next : d->addresses; k->to; k->to = k->to->ai_next) {
        if (link_connect(k)) {
            heap_set(l, k, now + (left > 0 && left < d->connect_ms ? left : d->connect_ms));
            return;
        }
        error = errno;
    }
    if (left <= 0) {
        link_close(k, strerror(error));
        return;
    }
    if (!d->retry_told && left > 1000)
        core_note(&l->core, NULL, "no %s at %s yet (%s); trying again for %lld s", d->name, d->where, strerror(error),
                  (long long)left / 1000);
    d->retry_told = true;
    heap_set(l, k, now + RETRY_MS);
}

static void connect_ready(struct loop *l, struct watch *w, unsigned events)
{
    (void)l, (void)events;
    struct link *k = (struct link *)w;
    int error = 0;
    socklen_t len = sizeof error;
    if (getsockopt(w->fd, SOL_SOCKET, SO_ERROR, &error, &len) != 0)
        error = errno;
    if (error) {
        link_dial_on(k, error);
        return;
    }
    if (!link_begin(k, &k->dial->endpoint, k->dial->tls, k->dial->name))
        return;
    k->dial->up(k);
    link_flush(k);
}

/* A link to the server of d, whose `up` or `down` tells what becomes of it.  NULL without memory. */
static struct link *link_dial(struct loop *l, struct dial *d, void *user)
{
    struct link *k = link_new(l, -1);
    if (!k)
        return NULL;
    k->watch.ready = connect_ready;
    k->dial = d;
    k->user = user;
    heap_set(l, k, l->core.now_ms);
    return k;
}

/* ---- Listening ---- */

static int listen_on(const struct addrinfo *a, unsigned port, bool any)
{
    int on = 1, off = 0, fd = socket(a->ai_family, a->ai_socktype, a->ai_protocol);
    if (fd < 0)
        return -1;
    const struct sockaddr_in6 *six = (const void *)a->ai_addr;
    struct sockaddr_in *four = (void *)a->ai_addr;
    bool is_six = a->ai_family == AF_INET6, both = is_six && (any || IN6_IS_ADDR_V4MAPPED(&six->sin6_addr));
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (is_six)                       /* "all interfaces" is one socket for both families; ::1 is itself only */
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, both ? &off : &on, sizeof off);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);   /* inherited by what it accepts, on Linux */
    four->sin_port = htons((uint16_t)port);
    return bind(fd, a->ai_addr, a->ai_addrlen) == 0 && fd_prepare(fd) ? fd : fd_drop(fd);
}

/* Lets clients in. */
static bool listeners_open(struct loop *l)
{
    for (size_t i = 0; i < l->listener_count; i++)
        if (listen(l->listeners[i].fd, BACKLOG) != 0)
            return false;
    return listeners_watch(l, WATCH_IN);
}

static void listeners_close(struct loop *l)
{
    listeners_watch(l, 0);
    while (l->listener_count)
        close(l->listeners[--l->listener_count].fd);
}

/* Listens on every address in the list, on one port; if they are all interfaces on one, IPv6's if possible, which takes
 * IPv4 as well.  Those that this machine does not have are passed over, as long as one is left.  Returns the port, 0 on
 * failure with errno set. */
static unsigned listen_all(struct loop *l, const struct addrinfo *list, unsigned port, bool any)
{
    struct sockaddr_storage sa;
    const struct sockaddr_in *four = (const void *)&sa;
    int error = EADDRNOTAVAIL;
    const size_t max = any ? 1 : MAX_LISTENERS;
    for (int family = AF_INET6; family; family = family == AF_INET6 ? AF_INET : 0)
        for (const struct addrinfo *a = list; a && l->listener_count < max; a = a->ai_next) {
            if (a->ai_family != family)
                continue;
            int fd = listen_on(a, port, any);
            if (fd >= 0) {
                if (getsockname(fd, (struct sockaddr *)&sa, &(socklen_t){ sizeof sa }) == 0)
                    port = ntohs(four->sin_port);
                l->listeners[l->listener_count++] = (struct watch){ .fd = fd, .ready = listener_ready };
            } else if ((error = errno) != EADDRNOTAVAIL && error != EAFNOSUPPORT) {
                listeners_close(l);
                errno = error;
                return 0;
            }
        }
    errno = error;
    return l->listener_count ? port : 0;
}

/* Binds all addresses of a host, all interfaces if it is empty.  Returns the port; 0: *why tells, or errno where that is
 * NULL. */
static unsigned listen_host(struct loop *l, const char *host, unsigned port, const char **why)
{
    struct addrinfo *list = resolve_host(host, 0, *host ? 0 : AI_PASSIVE, why);
    unsigned real = 0;
    if (!list)
        return 0;
    for (int try = 0; !real && try < (port ? 1 : 8); try++)   /* a free port of one family may be taken in the other */
        real = listen_all(l, list, port, !*host);
    int error = errno;
    addresses_free(list);
    errno = error;
    *why = NULL;
    return real;
}

/* ---- Signals and the loop itself ---- */

static void on_signal(int number)
{
    int saved = errno;
    uint8_t byte = (uint8_t)number;
    ssize_t n = write((int)signal_pipe, &byte, 1);
    (void)n;
    errno = saved;
}

/* Says goodbye to every peer; the loop ends when all have gone, at the latest after STOP_MS. */
static void loop_goodbye(struct loop *l)
{
    l->stopping = true;
    l->stop_ms = l->core.now_ms + STOP_MS;
    listeners_close(l);
    for (struct link *k = l->links; k; k = k->next)
        if (k->connecting) {
            link_close(k, l->stop_why);
        } else {
            conn_shutdown(&k->conn, GRPC_UNAVAILABLE, l->stop_why);
            link_flush(k);
        }
}

static void signals_ready(struct loop *l, struct watch *w, unsigned events)
{
    uint8_t number;
    (void)events;
    while (read(w->fd, &number, 1) == 1) {
        if (number == SIGHUP && (!l->core.role || l->nohup)) {   /* a client ends with its terminal */
            l->reload = true;
            continue;
        }
        if (l->stop_why) {
            l->hurry = true;
            l->signal_number = number;
            return;
        }
        core_note(&l->core, NULL, "signal %d (%s): saying goodbye to %zu connection%s", number, strsignal(number),
                  l->link_count, PLURAL(l->link_count));
        l->signal_number = number;
        loop_stop(l, "the server is shutting down");
    }
}

/* Sets what the signals that end the program do; none of them stays blocked, as a parent may have left it. */
static void signals_handle(void (*handler)(int))
{
    static const int stops[] = { SIGINT, SIGTERM, SIGQUIT, SIGABRT };
    struct sigaction sa = { .sa_handler = handler };
    sigset_t set;
    sigemptyset(&sa.sa_mask);
    sigemptyset(&set);
    sigaddset(&set, SIGHUP);
    for (size_t i = 0; i < PB_COUNT(stops); i++) {
        sigaction(stops[i], &sa, NULL);
        sigaddset(&set, stops[i]);
    }
    sigprocmask(SIG_UNBLOCK, &set, NULL);
}

/* Files that are of no use before they are whole; NULL: none. */
static const char *volatile unfinished[2];

/* Outside the loop: as process 1, which signals without a handler don't reach, too. */
static void on_signal_end(int number)
{
    for (size_t i = 0; i < PB_COUNT(unfinished); i++)
        if (unfinished[i])
            unlink(unfinished[i]);
    _exit(128 + number);
}

static bool signals_init(struct loop *l)
{
    int fds[2];
    if (pipe(fds) != 0 || !fd_prepare(fds[0]) || !fd_prepare(fds[1]))
        return false;
    signal_pipe = fds[1];
    l->signals = (struct watch){ .fd = fds[0], .ready = signals_ready };
    struct sigaction before, hup = { .sa_handler = on_signal };   /* signal() may hold for one time only */
    sigemptyset(&hup.sa_mask);
    l->nohup = sigaction(SIGHUP, &hup, &before) == 0 && before.sa_handler == SIG_IGN;
    signals_handle(on_signal);
    signal(SIGPIPE, SIG_IGN);
    return poller_set(&l->poller, &l->signals, WATCH_IN);
}

/* The soft limit of descriptors becomes the hard one.  Returns how many connections that leaves room for. */
static size_t raise_descriptor_limit(void)
{
    struct rlimit r;
    if (getrlimit(RLIMIT_NOFILE, &r) != 0)
        return 1;
    r.rlim_cur = r.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &r) != 0 && getrlimit(RLIMIT_NOFILE, &r) != 0)
        return 1;
    if (r.rlim_cur > INT_MAX)
        return INT_MAX;
    return r.rlim_cur > SPARE_DESCRIPTORS ? (size_t)r.rlim_cur - SPARE_DESCRIPTORS : 1;
}

static unsigned terminal_look(int fd)
{
    const char *term = getenv("TERM");
    bool plain = present(getenv("NO_COLOR")) || (term && strcmp(term, "dumb") == 0);
    return !isatty(fd) ? 0 : plain ? LOOK_BRIEF : LOOK_BRIEF | LOOK_COLOR;
}

/* A loop with nothing in it but stdout, stderr and signals.  Exits the program if the system has nothing to give. */
static struct loop *loop_new(void)
{
    struct loop *l = or_exit(calloc(1, sizeof *l));
    l->stop_ms = l->timer_ms = l->accept_ms = INT64_MAX;
    huffman_init(&l->core.huffman);
    l->core.arena.limit = 64 << 20;
    sink_init(&l->out, STDOUT_FILENO, &l->core.out);
    sink_init(&l->err, STDERR_FILENO, &l->core.err);
    sink_init(&l->record, -1, &l->core.record);
    struct stat out, err;
    l->core.joined = fstat(STDOUT_FILENO, &out) == 0 && fstat(STDERR_FILENO, &err) == 0 && out.st_ino == err.st_ino &&
                     out.st_dev == err.st_dev && !S_ISDIR(out.st_mode);
    l->core.out_look = terminal_look(STDOUT_FILENO);
    l->core.err_look = terminal_look(STDERR_FILENO);
    loop_clock(l);
    if (!poller_init(&l->poller) || !signals_init(l)) {
        tell_note("can't start: %s", strerror(errno));
        exit(1);
    }
    return l;
}

/* stdout is behind, or has caught up: senders are held back, then let go (see HOLD_BYTES). */
static void loop_pressure(struct loop *l)
{
    size_t waiting = loop_backlog(l);
    bool paused = waiting > PAUSE_BYTES, release = l->core.backpressure && waiting < HOLD_BYTES / 4;
    bool touch = paused != l->paused || release;
    l->paused = paused;
    l->core.backpressure = !release && (l->core.backpressure || waiting > HOLD_BYTES);
    for (struct link *k = l->links; touch && k; k = k->next) {
        if (release)
            conn_release(&k->conn);
        link_flush(k);
    }
}

/* Sends what was put on other links than the one whose turn it was. */
static void loop_flush_all(struct loop *l)
{
    l->core.touched = false;
    for (struct link *k = l->links; k; k = k->next)
        link_flush(k);
}

static void loop_bury(struct loop *l)
{
    while (l->graveyard) {
        struct link *k = l->graveyard;
        l->graveyard = k->prev;
        free(k);
        if (l->accept_ms != INT64_MAX)
            l->accept_ms = l->core.now_ms;
    }
}

static void loop_deadlines(struct loop *l)
{
    while (l->heap_len && l->heap[1]->deadline_ms <= l->core.now_ms) {
        struct link *k = l->heap[1];
        if (k->connecting) {
            link_dial_on(k, k->watch.fd >= 0 ? ETIMEDOUT : EADDRNOTAVAIL);
            continue;
        }
        conn_tick(&k->conn);
        link_flush(k);
        if (!k->dead && k->deadline_ms <= l->core.now_ms)
            link_close(k, "timed out");
    }
    if (l->core.now_ms >= l->accept_ms)
        l->accept_ms = l->stopping || listeners_watch(l, WATCH_IN) ? INT64_MAX : l->core.now_ms + 1000;
}

static int loop_timeout(const struct loop *l)
{
    const int64_t due[] = { l->timer_ms, l->stop_ms, l->accept_ms, l->out.retry_ms, l->err.retry_ms,
                            l->record.retry_ms };
    int64_t at = l->heap_len ? l->heap[1]->deadline_ms : INT64_MAX;
    if (l->stop_why && !l->stopping)  /* told so later in the turn than it looks for it */
        return 0;
    for (size_t i = 0; i < PB_COUNT(due); i++)
        at = earlier(at, due[i]);
    int64_t wait = at - l->core.now_ms;
    return at == INT64_MAX ? -1 : wait < 0 ? 0 : wait > 3600000 ? 3600000 : (int)wait;
}

static bool loop_done(const struct loop *l)
{
    if (!l->stopping)
        return false;
    return l->hurry || l->core.now_ms >= l->stop_ms ||
           (l->link_count == 0 && sink_pending(&l->out) == 0 && sink_pending(&l->record) == 0 &&
            sink_pending(&l->err) == 0);
}

/* What a stopped loop could not write in time, or at all, is told, and the exit status is not 0. */
static void sink_end(struct loop *l, const struct sink *s, const char *what)
{
    size_t n = s->broken ? 0 : sink_pending(s);
    if (n)
        tell_note(BYTES_FMT " could not be written to %s in time", BYTES_OF(n), what);
    if ((n || s->broken) && !l->exit_status)
        l->exit_status = 1;
}

/* Runs until it is stopped and all is said.  Returns the exit status. */
static int loop_run(struct loop *l)
{
    while (!loop_done(l)) {
        if (l->turn && !l->stop_why)
            l->turn(l);
        if (l->stop_why && !l->stopping)
            loop_goodbye(l);
        if (l->core.touched)
            loop_flush_all(l);
        if (l->core.left_out)
            core_strangers(&l->core, l->stopping);
        sink_flush(l, &l->out);
        sink_flush(l, &l->record);
        sink_flush(l, &l->err);
        progress_draw(l, l->stopping || sink_pending(&l->out) || sink_pending(&l->err) ? "" : l->progress);
        loop_pressure(l);
        loop_bury(l);
        if (loop_done(l))
            break;
        poller_wait(&l->poller, l, loop_timeout(l));
        loop_deadlines(l);
    }
    signals_handle(on_signal_end);    /* what is told now may wait for its reader */
    sink_end(l, &l->out, "stdout");
    sink_end(l, &l->record, "-record");
    if (l->core.notes_lost && sink_pending(&l->err) == 0)
        tell_note("%lu line%s of the log lost: memory is short", l->core.notes_lost, PLURAL(l->core.notes_lost));
    if (l->hurry)
        return 128 + l->signal_number;
    return l->exit_status;
}

static void loop_free(struct loop *l)
{
    while (l->links)
        link_close(l->links, "the program ends");
    loop_bury(l);
    tls_config_free(l->tls);
    tls_pool_free(&l->tls_pool);
    listeners_close(l);
    poller_free(&l->poller);
    sink_close(&l->out);
    sink_close(&l->err);
    sink_close(&l->record);
    close(l->signals.fd);
    close((int)signal_pipe);
    signal_pipe = -1;
    buf_free(&l->core.out);
    buf_free(&l->core.err);
    buf_free(&l->core.record);
    buf_free(&l->core.spare);
    pb_arena_free(&l->core.arena);
    free(l->heap);
    free(l);
}

/* ==== 11. Message tables: cvms, health, reflection ==================================================================
 * Owns: every message and service on the wire, one row for each field; proto_wire.h does the work from these rows.
 *       agent/cvms/cvms.proto, google/protobuf/timestamp.proto, grpc/health/v1/health.proto and
 *       grpc/reflection/{v1,v1alpha}/reflection.proto.
 * Never: code.  Names are spelled as in the .proto files, their mixed case included.
 */

/* ---- google.protobuf ---- */
PB_DEFINE(Timestamp, PB_TIMESTAMP, NULL,
    PB_ROW(Timestamp, 1, INT64, 0, seconds, NULL),
    PB_ROW(Timestamp, 2, INT32, 0, nanos,   NULL));

/* ---- cvms: from the agent ---- */
struct AgentLog {
    struct bytes message, computation_id, level;
    struct Timestamp *timestamp;
};
PB_DEFINE(AgentLog, PB_PLAIN, NULL,
    PB_ROW(AgentLog, 1, STRING,  0, message,        NULL),
    PB_ROW(AgentLog, 2, STRING,  0, computation_id, NULL),
    PB_ROW(AgentLog, 3, STRING,  0, level,          NULL),
    PB_ROW(AgentLog, 4, MESSAGE, 0, timestamp,      &Timestamp_message));

struct AgentEvent {
    struct bytes event_type, computation_id, details, originator, status;
    struct Timestamp *timestamp;
};
PB_DEFINE(AgentEvent, PB_PLAIN, NULL,
    PB_ROW(AgentEvent, 1, STRING,  0, event_type,     NULL),
    PB_ROW(AgentEvent, 2, MESSAGE, 0, timestamp,      &Timestamp_message),
    PB_ROW(AgentEvent, 3, STRING,  0, computation_id, NULL),
    PB_ROW(AgentEvent, 4, BYTES,   0, details,        NULL),
    PB_ROW(AgentEvent, 5, STRING,  0, originator,     NULL),
    PB_ROW(AgentEvent, 6, STRING,  0, status,         NULL));

struct RunResponse { struct bytes computation_id, error; };
PB_DEFINE(RunResponse, PB_PLAIN, NULL,
    PB_ROW(RunResponse, 1, STRING, 0, computation_id, NULL),
    PB_ROW(RunResponse, 2, STRING, 0, error,          NULL));

struct StopComputationResponse { struct bytes computation_id, message; };
PB_DEFINE(StopComputationResponse, PB_PLAIN, NULL,
    PB_ROW(StopComputationResponse, 1, STRING, 0, computation_id, NULL),
    PB_ROW(StopComputationResponse, 2, STRING, 0, message,        NULL));

struct AgentStateRes { struct bytes id, state; };
PB_DEFINE(AgentStateRes, PB_PLAIN, NULL,
    PB_ROW(AgentStateRes, 1, STRING, 0, id,    NULL),
    PB_ROW(AgentStateRes, 2, STRING, 0, state, NULL));

struct AttestationResponse { struct bytes file, certSerialNumber; };
PB_DEFINE(AttestationResponse, PB_PLAIN, NULL,
    PB_ROW(AttestationResponse, 1, BYTES,  0, file,             NULL),
    PB_ROW(AttestationResponse, 2, STRING, 0, certSerialNumber, NULL));

/* The same two fields under another name. */
static const struct pb_message azureAttestationToken_message = {
    "azureAttestationToken", AttestationResponse_fields, 2, sizeof(struct AttestationResponse), PB_PLAIN, NULL
};

struct ClientStreamMessage {
    struct AgentLog *agent_log;
    struct AgentEvent *agent_event;
    struct RunResponse *run_res;
    struct StopComputationResponse *stopComputationRes;
    struct AgentStateRes *agentStateRes;
    struct AttestationResponse *vTPMattestationReport, *azureAttestationToken;
};
PB_DEFINE(ClientStreamMessage, PB_PLAIN, "message",
    PB_ROW(ClientStreamMessage, 1, MESSAGE, PB_ONEOF, agent_log,             &AgentLog_message),
    PB_ROW(ClientStreamMessage, 2, MESSAGE, PB_ONEOF, agent_event,           &AgentEvent_message),
    PB_ROW(ClientStreamMessage, 3, MESSAGE, PB_ONEOF, run_res,               &RunResponse_message),
    PB_ROW(ClientStreamMessage, 4, MESSAGE, PB_ONEOF, stopComputationRes,    &StopComputationResponse_message),
    PB_ROW(ClientStreamMessage, 5, MESSAGE, PB_ONEOF, agentStateRes,         &AgentStateRes_message),
    PB_ROW(ClientStreamMessage, 6, MESSAGE, PB_ONEOF, vTPMattestationReport, &AttestationResponse_message),
    PB_ROW(ClientStreamMessage, 7, MESSAGE, PB_ONEOF, azureAttestationToken, &azureAttestationToken_message));

/* ---- cvms: to the agent ---- */
struct StopComputation { struct bytes computation_id; };
PB_DEFINE(StopComputation, PB_PLAIN, NULL, PB_ROW(StopComputation, 1, STRING, 0, computation_id, NULL));
struct AgentStateReq { struct bytes id; };
PB_DEFINE(AgentStateReq, PB_PLAIN, NULL, PB_ROW(AgentStateReq, 1, STRING, 0, id, NULL));
struct DisconnectReq { struct bytes id; };
PB_DEFINE(DisconnectReq, PB_PLAIN, NULL, PB_ROW(DisconnectReq, 1, STRING, 0, id, NULL));
struct RunReqChunks { struct bytes data, id; bool is_last; };
PB_DEFINE(RunReqChunks, PB_PLAIN, NULL,
    PB_ROW(RunReqChunks, 1, BYTES,  0, data,    NULL),
    PB_ROW(RunReqChunks, 2, STRING, 0, id,      NULL),
    PB_ROW(RunReqChunks, 3, BOOL,   0, is_last, NULL));

struct ResultConsumer { struct bytes userKey; };
PB_DEFINE(ResultConsumer, PB_PLAIN, NULL, PB_ROW(ResultConsumer, 1, BYTES, 0, userKey, NULL));

struct Source { struct bytes type, url, kbs_resource_path; bool encrypted; };
PB_DEFINE(Source, PB_PLAIN, NULL,
    PB_ROW(Source, 1, STRING, 0, type,              NULL),
    PB_ROW(Source, 2, STRING, 0, url,               NULL),
    PB_ROW(Source, 3, STRING, 0, kbs_resource_path, NULL),
    PB_ROW(Source, 4, BOOL,   0, encrypted,         NULL));

struct KBSConfig { struct bytes url; bool enabled; };
PB_DEFINE(KBSConfig, PB_PLAIN, NULL,
    PB_ROW(KBSConfig, 1, STRING, 0, url,     NULL),
    PB_ROW(KBSConfig, 2, BOOL,   0, enabled, NULL));

struct Dataset {
    struct bytes hash, userKey, filename;
    struct Source *source;
    struct KBSConfig *kbs;
    bool decompress;
};
PB_DEFINE(Dataset, PB_PLAIN, NULL,
    PB_ROW(Dataset, 1, BYTES,   0, hash,       NULL),
    PB_ROW(Dataset, 2, BYTES,   0, userKey,    NULL),
    PB_ROW(Dataset, 3, STRING,  0, filename,   NULL),
    PB_ROW(Dataset, 4, MESSAGE, 0, source,     &Source_message),
    PB_ROW(Dataset, 5, BOOL,    0, decompress, NULL),
    PB_ROW(Dataset, 6, MESSAGE, 0, kbs,        &KBSConfig_message));

struct Algorithm {
    struct bytes hash, userKey, algo_type;
    struct Source *source;
    struct pb_list algo_args;           /* struct bytes */
    struct KBSConfig *kbs;
};
PB_DEFINE(Algorithm, PB_PLAIN, NULL,
    PB_ROW(Algorithm, 1, BYTES,   0,           hash,      NULL),
    PB_ROW(Algorithm, 2, BYTES,   0,           userKey,   NULL),
    PB_ROW(Algorithm, 3, MESSAGE, 0,           source,    &Source_message),
    PB_ROW(Algorithm, 4, STRING,  0,           algo_type, NULL),
    PB_ROW(Algorithm, 5, STRING,  PB_REPEATED, algo_args, NULL),
    PB_ROW(Algorithm, 6, MESSAGE, 0,           kbs,       &KBSConfig_message));

struct AgentConfig {
    struct bytes port, cert_file, key_file, client_ca_file, server_ca_file, log_level;
    bool attested_tls;
};
PB_DEFINE(AgentConfig, PB_PLAIN, NULL,
    PB_ROW(AgentConfig, 1, STRING, 0, port,           NULL),
    PB_ROW(AgentConfig, 2, STRING, 0, cert_file,      NULL),
    PB_ROW(AgentConfig, 3, STRING, 0, key_file,       NULL),
    PB_ROW(AgentConfig, 4, STRING, 0, client_ca_file, NULL),
    PB_ROW(AgentConfig, 5, STRING, 0, server_ca_file, NULL),
    PB_ROW(AgentConfig, 6, STRING, 0, log_level,      NULL),
    PB_ROW(AgentConfig, 7, BOOL,   0, attested_tls,   NULL));

struct ComputationRunReq {
    struct bytes id, name, description;
    struct pb_list datasets;            /* struct Dataset */
    struct Algorithm *algorithm;
    struct pb_list result_consumers;    /* struct ResultConsumer */
    struct AgentConfig *agent_config;
    struct KBSConfig *kbs;
};
PB_DEFINE(ComputationRunReq, PB_PLAIN, NULL,
    PB_ROW(ComputationRunReq, 1, STRING,  0,           id,               NULL),
    PB_ROW(ComputationRunReq, 2, STRING,  0,           name,             NULL),
    PB_ROW(ComputationRunReq, 3, STRING,  0,           description,      NULL),
    PB_ROW(ComputationRunReq, 4, MESSAGE, PB_REPEATED, datasets,         &Dataset_message),
    PB_ROW(ComputationRunReq, 5, MESSAGE, 0,           algorithm,        &Algorithm_message),
    PB_ROW(ComputationRunReq, 6, MESSAGE, PB_REPEATED, result_consumers, &ResultConsumer_message),
    PB_ROW(ComputationRunReq, 7, MESSAGE, 0,           agent_config,     &AgentConfig_message),
    PB_ROW(ComputationRunReq, 8, MESSAGE, 0,           kbs,              &KBSConfig_message));

struct ServerStreamMessage {
    struct RunReqChunks *runReqChunks;
    struct ComputationRunReq *runReq;
    struct StopComputation *stopComputation;
    struct AgentStateReq *agentStateReq;
    struct DisconnectReq *disconnectReq;
};
PB_DEFINE(ServerStreamMessage, PB_PLAIN, "message",
    PB_ROW(ServerStreamMessage, 1, MESSAGE, PB_ONEOF, runReqChunks,    &RunReqChunks_message),
    PB_ROW(ServerStreamMessage, 2, MESSAGE, PB_ONEOF, runReq,          &ComputationRunReq_message),
    PB_ROW(ServerStreamMessage, 3, MESSAGE, PB_ONEOF, stopComputation, &StopComputation_message),
    PB_ROW(ServerStreamMessage, 4, MESSAGE, PB_ONEOF, agentStateReq,   &AgentStateReq_message),
    PB_ROW(ServerStreamMessage, 5, MESSAGE, PB_ONEOF, disconnectReq,   &DisconnectReq_message));

/* ---- agent: what the users of an agent call ---- */
struct AlgoRequest { struct bytes algorithm, requirements; };
PB_DEFINE(AlgoRequest, PB_PLAIN, NULL,
    PB_ROW(AlgoRequest, 1, BYTES, 0, algorithm,    NULL),
    PB_ROW(AlgoRequest, 2, BYTES, 0, requirements, NULL));
struct DataRequest { struct bytes dataset, filename; };
PB_DEFINE(DataRequest, PB_PLAIN, NULL,
    PB_ROW(DataRequest, 1, BYTES,  0, dataset,  NULL),
    PB_ROW(DataRequest, 2, STRING, 0, filename, NULL));
struct ResultRequest { char empty; };
PB_DEFINE_EMPTY(ResultRequest);
struct ResultResponse { struct bytes file; };
PB_DEFINE(ResultResponse, PB_PLAIN, NULL, PB_ROW(ResultResponse, 1, BYTES, 0, file, NULL));

/* ---- attestation_agent: where an agent gets the token that a key broker wants ---- */
struct GetTeeTypeRequest { char empty; };
PB_DEFINE_EMPTY(GetTeeTypeRequest);
struct GetTeeTypeResponse { struct bytes tee; };
PB_DEFINE(GetTeeTypeResponse, PB_PLAIN, NULL, PB_ROW(GetTeeTypeResponse, 1, STRING, 0, tee, NULL));
struct GetTokenRequest { struct bytes TokenType; };
PB_DEFINE(GetTokenRequest, PB_PLAIN, NULL, PB_ROW(GetTokenRequest, 1, STRING, 0, TokenType, NULL));
struct GetTokenResponse { struct bytes Token; };
PB_DEFINE(GetTokenResponse, PB_PLAIN, NULL, PB_ROW(GetTokenResponse, 1, BYTES, 0, Token, NULL));

/* ---- A line of -output json or -record, as -replay reads it ---- */
struct UnknownField { struct bytes field, value; int32_t wire_type; };
PB_DEFINE(UnknownField, PB_PLAIN, NULL,
    PB_ROW(UnknownField, 1, STRING, 0, field,     NULL),
    PB_ROW(UnknownField, 2, INT32,  0, wire_type, NULL),
    PB_ROW(UnknownField, 3, STRING, 0, value,     NULL));
struct Request { struct bytes method, path, what, note; int32_t status, milliseconds; int64_t bytes; };
PB_DEFINE(Request, PB_PLAIN, NULL,
    PB_ROW(Request, 1, STRING, 0, method,       NULL),
    PB_ROW(Request, 2, STRING, 0, path,         NULL),
    PB_ROW(Request, 3, INT32,  0, status,       NULL),
    PB_ROW(Request, 4, INT64,  0, bytes,        NULL),
    PB_ROW(Request, 5, INT32,  0, milliseconds, NULL),
    PB_ROW(Request, 6, STRING, 0, what,         NULL),
    PB_ROW(Request, 7, STRING, 0, note,         NULL));
struct Line {
    struct Timestamp *time;
    struct bytes peer, stream, job_id, subject;
    struct ClientStreamMessage *message;
    struct ServerStreamMessage *sent;
    struct pb_list unknown;
    int64_t unknown_left_out;
    struct Request *request;
};
PB_DEFINE(Line, PB_PLAIN, NULL,
    PB_ROW(Line, 1, MESSAGE, 0, time,    &Timestamp_message),
    PB_ROW(Line, 2, STRING,  0, peer,    NULL),
    PB_ROW(Line, 3, STRING,  0, stream,  NULL),
    PB_ROW(Line, 4, STRING,  0, job_id,  NULL),
    PB_ROW(Line, 5, STRING,  0, subject, NULL),
    PB_ROW(Line, 6, MESSAGE, 0, message, &ClientStreamMessage_message),
    PB_ROW(Line, 7, MESSAGE, 0, sent,    &ServerStreamMessage_message),
    PB_ROW(Line, 8, MESSAGE, PB_REPEATED, unknown, &UnknownField_message),
    PB_ROW(Line, 9, INT64,   0, unknown_left_out, NULL),
    PB_ROW(Line, 10, MESSAGE, 0, request, &Request_message));

/* ---- grpc.health.v1 ---- */
enum ServingStatus { HEALTH_UNKNOWN, HEALTH_SERVING, HEALTH_NOT_SERVING, HEALTH_SERVICE_UNKNOWN };
static const char *const ServingStatus_values[] = { "UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN" };
static const struct pb_enum ServingStatus_enum = {
    "ServingStatus", ServingStatus_values, PB_COUNT(ServingStatus_values)
};

struct HealthCheckRequest { struct bytes service; };
PB_DEFINE(HealthCheckRequest, PB_PLAIN, NULL, PB_ROW(HealthCheckRequest, 1, STRING, 0, service, NULL));

struct HealthCheckResponse { int32_t status; };
PB_DEFINE(HealthCheckResponse, PB_PLAIN, NULL, PB_ROW(HealthCheckResponse, 1, ENUM, 0, status, &ServingStatus_enum));

/* ---- grpc.reflection, v1 and v1alpha: two packages, the same messages ---- */
struct ExtensionRequest { struct bytes containing_type; int32_t extension_number; };
PB_DEFINE(ExtensionRequest, PB_PLAIN, NULL,
    PB_ROW(ExtensionRequest, 1, STRING, 0, containing_type,  NULL),
    PB_ROW(ExtensionRequest, 2, INT32,  0, extension_number, NULL));

struct ServerReflectionRequest {
    struct bytes host, file_by_filename, file_containing_symbol;
    struct ExtensionRequest *file_containing_extension;
    struct bytes all_extension_numbers_of_type, list_services;
};
PB_DEFINE(ServerReflectionRequest, PB_PLAIN, "message_request",
    PB_ROW(ServerReflectionRequest, 1, STRING,  0,        host,                          NULL),
    PB_ROW(ServerReflectionRequest, 3, STRING,  PB_ONEOF, file_by_filename,              NULL),
    PB_ROW(ServerReflectionRequest, 4, STRING,  PB_ONEOF, file_containing_symbol,        NULL),
    PB_ROW(ServerReflectionRequest, 5, MESSAGE, PB_ONEOF, file_containing_extension,     &ExtensionRequest_message),
    PB_ROW(ServerReflectionRequest, 6, STRING,  PB_ONEOF, all_extension_numbers_of_type, NULL),
    PB_ROW(ServerReflectionRequest, 7, STRING,  PB_ONEOF, list_services,                 NULL));

struct FileDescriptorResponse { struct pb_list file_descriptor_proto; };       /* struct bytes */
PB_DEFINE(FileDescriptorResponse, PB_PLAIN, NULL,
    PB_ROW(FileDescriptorResponse, 1, BYTES, PB_REPEATED, file_descriptor_proto, NULL));

struct ExtensionNumberResponse { struct bytes base_type_name; };       /* 2, the numbers: there are no extensions */
PB_DEFINE(ExtensionNumberResponse, PB_PLAIN, NULL, PB_ROW(ExtensionNumberResponse, 1, STRING, 0, base_type_name, NULL));

struct ServiceResponse { struct bytes name; };
PB_DEFINE(ServiceResponse, PB_PLAIN, NULL, PB_ROW(ServiceResponse, 1, STRING, 0, name, NULL));

struct ListServiceResponse { struct pb_list service; };         /* struct ServiceResponse */
PB_DEFINE(ListServiceResponse, PB_PLAIN, NULL,
    PB_ROW(ListServiceResponse, 1, MESSAGE, PB_REPEATED, service, &ServiceResponse_message));

struct ErrorResponse { int32_t error_code; struct bytes error_message; };
PB_DEFINE(ErrorResponse, PB_PLAIN, NULL,
    PB_ROW(ErrorResponse, 1, INT32,  0, error_code,    NULL),
    PB_ROW(ErrorResponse, 2, STRING, 0, error_message, NULL));

struct ServerReflectionResponse {
    struct bytes valid_host;
    struct ServerReflectionRequest *original_request;
    struct FileDescriptorResponse *file_descriptor_response;
    struct ExtensionNumberResponse *all_extension_numbers_response;
    struct ListServiceResponse *list_services_response;
    struct ErrorResponse *error_response;
};
#define REFLECTION_ROW(number, kind, flags, member, sub) \
    PB_ROW(ServerReflectionResponse, number, kind, flags, member, sub)
PB_DEFINE(ServerReflectionResponse, PB_PLAIN, "message_response",
    REFLECTION_ROW(1, STRING,  0,        valid_host,                     NULL),
    REFLECTION_ROW(2, MESSAGE, 0,        original_request,               &ServerReflectionRequest_message),
    REFLECTION_ROW(4, MESSAGE, PB_ONEOF, file_descriptor_response,       &FileDescriptorResponse_message),
    REFLECTION_ROW(5, MESSAGE, PB_ONEOF, all_extension_numbers_response, &ExtensionNumberResponse_message),
    REFLECTION_ROW(6, MESSAGE, PB_ONEOF, list_services_response,         &ListServiceResponse_message),
    REFLECTION_ROW(7, MESSAGE, PB_ONEOF, error_response,                 &ErrorResponse_message));

/* ---- keyprovider (ocicrypt): JSON in an envelope ---- */
struct keyProviderKeyWrapProtocolInput { struct bytes KeyProviderKeyWrapProtocolInput; };
PB_DEFINE(keyProviderKeyWrapProtocolInput, PB_PLAIN, NULL,
    PB_ROW(keyProviderKeyWrapProtocolInput, 1, BYTES, 0, KeyProviderKeyWrapProtocolInput, NULL));
struct keyProviderKeyWrapProtocolOutput { struct bytes KeyProviderKeyWrapProtocolOutput; };
PB_DEFINE(keyProviderKeyWrapProtocolOutput, PB_PLAIN, NULL,
    PB_ROW(keyProviderKeyWrapProtocolOutput, 1, BYTES, 0, KeyProviderKeyWrapProtocolOutput, NULL));

/* ---- Files and services, as reflection lists them ---- */

/* What is offered only while something is delivered that needs it. */
enum { OFFER_TOKENS = 1, OFFER_UNWRAP = 2 };

#define REFLECTION_FILE(version) { \
    .name = "grpc/reflection/" version "/reflection.proto", .package = "grpc.reflection." version, \
    .messages = PB_MESSAGES(&ServerReflectionRequest_message, &ExtensionRequest_message, \
                            &ServerReflectionResponse_message, &FileDescriptorResponse_message, \
                            &ExtensionNumberResponse_message, &ListServiceResponse_message, \
                            &ServiceResponse_message, &ErrorResponse_message), \
    .service = "ServerReflection", .methods = PB_METHODS({ "ServerReflectionInfo", \
        &ServerReflectionRequest_message, &ServerReflectionResponse_message, true, true }) \
}

static const struct pb_file all_files[] = {
    { .name = "agent/cvms/cvms.proto", .package = "cvms", .imported = &all_files[1],
      .messages = PB_MESSAGES(
          &AgentStateReq_message, &AgentStateRes_message, &DisconnectReq_message, &StopComputation_message,
          &StopComputationResponse_message, &RunResponse_message, &AttestationResponse_message,
          &azureAttestationToken_message, &AgentEvent_message, &AgentLog_message, &ClientStreamMessage_message,
          &ServerStreamMessage_message, &RunReqChunks_message, &ComputationRunReq_message, &ResultConsumer_message,
          &Dataset_message, &Algorithm_message, &Source_message, &KBSConfig_message, &AgentConfig_message),
      .service = "Service", .methods = PB_METHODS(
          { "Process", &ClientStreamMessage_message, &ServerStreamMessage_message, true, true }) },
    { .name = "google/protobuf/timestamp.proto", .package = "google.protobuf",
      .messages = PB_MESSAGES(&Timestamp_message) },
    { .name = "grpc/health/v1/health.proto", .package = "grpc.health.v1",
      .messages = PB_MESSAGES(&HealthCheckRequest_message, &HealthCheckResponse_message),
      .service = "Health", .methods = PB_METHODS(
          { "Check", &HealthCheckRequest_message, &HealthCheckResponse_message, false, false },
          { "Watch", &HealthCheckRequest_message, &HealthCheckResponse_message, false, true }) },
    REFLECTION_FILE("v1"),
    REFLECTION_FILE("v1alpha"),
    { .name = "attestation-agent.proto", .package = "attestation_agent", .needs = OFFER_TOKENS,
      .messages = PB_MESSAGES(&GetTeeTypeRequest_message, &GetTeeTypeResponse_message, &GetTokenRequest_message,
                              &GetTokenResponse_message),
      .service = "AttestationAgentService", .methods = PB_METHODS(
          { "GetTeeType", &GetTeeTypeRequest_message, &GetTeeTypeResponse_message, false, false },
          { "GetToken", &GetTokenRequest_message, &GetTokenResponse_message, false, false }) },
    { .name = "utils/keyprovider/keyprovider.proto", .package = "keyprovider", .needs = OFFER_UNWRAP,
      .messages = PB_MESSAGES(&keyProviderKeyWrapProtocolInput_message, &keyProviderKeyWrapProtocolOutput_message),
      .service = "KeyProviderService", .methods = PB_METHODS({ "UnWrapKey",
          &keyProviderKeyWrapProtocolInput_message, &keyProviderKeyWrapProtocolOutput_message, false, false }) },
};

/* ==== 12. Options: one table for every command (Go's flag syntax) ==================================================
 * Owns: names, defaults, help, parsing of values; the mistakes that are told together.
 * Never: opens a file.
 */
enum command {
    CMD_SERVE = 1, CMD_AGENT = 2, CMD_MANIFEST = 4, CMD_CHECKSUM = 8, CMD_HEALTH = 16, CMD_ENCRYPT = 32, CMD_DECRYPT = 64,
    CMD_ALL = 127
};

/* Values of a flag as given: one string a use of it. */
struct values {
    const char **v;
    size_t n;
};

struct options {
    enum command command;
    const char *public_key_path, *attested_tls, *algo_path, *algo_source_url, *algo_kbs_path, *kbs_url, *algo_kbs_url,
        *algo_source_type, *dataset_source_type, *algo_type, *algo_hash, *dataset_hash, *client_ca_file, *compat,
        *output, *ready_file, *fail, *service, *out_file, *job_id, *manifest, *algo_encrypted, *algo_public_key_path,
        *until, *report, *record, *replay, *server_cert, *new_key, *server_key, *client_ca_certs, *client_san, *ca,
        *cert, *key, *server_name, *deliver, *deliver_host, *deliver_key, *private_key_path, *agent_address,
        *algo_requirements, *python_runtime, *results, *agent_port;
    struct values data_paths, dataset_source_urls, dataset_kbs_paths, dataset_kbs_urls, algo_args, dataset_decompress,
        dataset_hashes, dataset_encrypted, dataset_public_key_paths, result_consumer_keys, set, manifest_for, expect,
        reject, fault;
    int64_t max_message, max_connections, wait_ms, repeat, timeout_ms, grace_ms, poll_ms, agents;
    bool once, base64, help, help_short, version, control, skip_forwarder, fast, flagged, allow_no_alpn, insecure,
        fetches, fetches_data;        /* -deliver: agents fetch from here */
    bool *given;                      /* a row of option_table each: whether its flag was there */
    const char **args;
    size_t arg_count;
    struct pb_arena arena;            /* everything that is made of the words, until the end */
};

/* A text or list goes to agents and must be UTF-8; a path is only this machine's. */
enum option_kind { OPT_TEXT, OPT_LIST, OPT_PATH, OPT_PATHS, OPT_FLAG, OPT_COUNT, OPT_DURATION, OPT_IGNORED };

/* A row without a name is the heading of those below it. */
struct option {
    const char *name, *arg, *preset;
    enum option_kind kind;
    unsigned commands;
    size_t offset;
    const char *help;
};

#define AT(member) offsetof(struct options, member)
enum { BOTH = CMD_SERVE | CMD_MANIFEST, CLIENTS = CMD_AGENT | CMD_HEALTH, CRYPT = CMD_ENCRYPT | CMD_DECRYPT };

static const struct option option_table[] = {
    { NULL, NULL, NULL, OPT_IGNORED, 0, 0, "Inputs" },
    { "public-key-path", "FILE", NULL, OPT_PATH, BOTH, AT(public_key_path),
      "public key of the data owners and the result consumer, PEM \"PUBLIC KEY\"; required without -deliver" },
    { "attested-tls-bool", "BOOL", NULL, OPT_TEXT, BOTH, AT(attested_tls),
      "whether the agent is to serve attested TLS: true or false; required without -deliver" },
    { "algo-path", "PATH", NULL, OPT_PATH, BOTH, AT(algo_path),
      "algorithm that is uploaded directly: a file or folder to hash" },
    { "data-paths", "PATH,...", NULL, OPT_PATHS, BOTH, AT(data_paths),
      "datasets that are uploaded directly: files or folders to hash" },
    { "algo-type", "TYPE", NULL, OPT_TEXT, BOTH, AT(algo_type), "bin, python, wasm or docker" },
    { "algo-args", "ARG,...", NULL, OPT_LIST, BOTH, AT(algo_args),
      "arguments of the algorithm; an empty element is an empty argument" },
    { NULL, NULL, NULL, OPT_IGNORED, 0, 0, "Delivery" },
    { "deliver", "WAY[,WAY]", NULL, OPT_TEXT, CMD_SERVE, AT(deliver),
      "how algorithm and datasets reach the agent: cli (somebody else uploads them, the default), upload, http (the "
      "agent fetches them encrypted, and their key), http-plain, oci (as encrypted images, by skopeo) or oci-plain" },
    { "deliver-host", "HOST[:PORT]", NULL, OPT_TEXT, CMD_SERVE, AT(deliver_host),
      "what stands in the URLs of what agents fetch (default: HOST and the port)" },
    { "deliver-key", "FILE", NULL, OPT_PATH, CMD_SERVE, AT(deliver_key),
      "the key that encrypts what agents fetch, 32 raw bytes (default: one is made for the run)" },
    { "private-key-path", "FILE", NULL, OPT_PATH, CMD_SERVE, AT(private_key_path),
      "the users' private key, RSA or EC, PEM (default: a key pair is made for the run)" },
    { "algo-requirements", "FILE", NULL, OPT_PATH, CMD_SERVE, AT(algo_requirements),
      "requirements.txt that is uploaded with a Python algorithm" },
    { "python-runtime", "NAME", "python3", OPT_TEXT, CMD_SERVE, AT(python_runtime),
      "the agent's interpreter for an uploaded Python algorithm" },
    { "results", "FILE", NULL, OPT_PATH, CMD_SERVE, AT(results),
      "fetch the results into FILE; of several agents into one each, their names before the ending" },
    { "agent-address", "HOST:PORT", NULL, OPT_TEXT, CMD_SERVE, AT(agent_address),
      "where the agent takes uploads (default: the address that its stream comes from, at port 7002 or the one that its "
      "metadata agent-port names)" },
    { "algo-source-url", "URL", NULL, OPT_TEXT, BOTH, AT(algo_source_url),
      "where the agent fetches the algorithm; needs -algo-kbs-path" },
    { "algo-kbs-path", "PATH", NULL, OPT_TEXT, BOTH, AT(algo_kbs_path),
      "the algorithm's key at the key broker; needs -algo-source-url" },
    { "algo-hash", "HEX", NULL, OPT_TEXT, BOTH, AT(algo_hash),
      "SHA3-256 of the remote algorithm, 64 hex digits (default: 32 zero bytes)" },
    { "algo-source-type", "TYPE", "oci-image", OPT_TEXT, BOTH, AT(algo_source_type),
      "Source.type of the remote algorithm" },
    { "dataset-source-urls", "URL,...", NULL, OPT_LIST, BOTH, AT(dataset_source_urls),
      "where the agent fetches the datasets; needs -dataset-kbs-paths" },
    { "dataset-kbs-paths", "PATH,...", NULL, OPT_LIST, BOTH, AT(dataset_kbs_paths),
      "the datasets' keys at the key broker, as many as URLs" },
    { "dataset-hash", "HEX", NULL, OPT_TEXT, BOTH, AT(dataset_hash),
      "SHA3-256 of all remote datasets, 64 hex digits (default: 32 zero bytes)" },
    { "dataset-source-type", "TYPE", "oci-image", OPT_TEXT, BOTH, AT(dataset_source_type),
      "Source.type of the remote datasets" },
    { "dataset-decompress", "BOOL,...", NULL, OPT_LIST, BOTH, AT(dataset_decompress),
      "per remote dataset, whether the agent unpacks it (default false)" },
    { "kbs-url", "URL", NULL, OPT_TEXT, BOTH, AT(kbs_url), "key broker of the whole computation" },
    { "algo-kbs-url", "URL", NULL, OPT_TEXT, BOTH, AT(algo_kbs_url),
      "key broker of the algorithm (newer agents; default -kbs-url)" },
    { "dataset-kbs-urls", "URL,...", NULL, OPT_LIST, BOTH, AT(dataset_kbs_urls),
      "key brokers of the datasets, as many as URLs (default -kbs-url)" },
    { NULL, NULL, NULL, OPT_IGNORED, 0, 0, "Manifest" },
    { "client-ca-file", "FILE", NULL, OPT_TEXT, BOTH, AT(client_ca_file),
      "AgentConfig.client_ca_file: a path on the agent's machine" },
    { "algo-encrypted", "BOOL", NULL, OPT_TEXT, BOTH, AT(algo_encrypted),
      "false: the remote algorithm is plain and needs no -algo-kbs-path" },
    { "algo-public-key-path", "FILE", NULL, OPT_PATH, BOTH, AT(algo_public_key_path),
      "the algorithm's own public key (default -public-key-path)" },
    { "dataset-hashes", "HEX,...", NULL, OPT_LIST, BOTH, AT(dataset_hashes), "a hash for each dataset" },
    { "dataset-encrypted", "BOOL,...", NULL, OPT_LIST, BOTH, AT(dataset_encrypted),
      "false: that remote dataset is plain and needs no key" },
    { "dataset-public-key-paths", "FILE,...", NULL, OPT_PATHS, BOTH, AT(dataset_public_key_paths),
      "a public key for each dataset" },
    { "result-consumer-keys", "FILE,...", NULL, OPT_PATHS, BOTH, AT(result_consumer_keys),
      "who may fetch results (default -public-key-path)" },
    { "set", "PATH=VALUE", NULL, OPT_LIST, BOTH, AT(set),
      "a field of the manifest, as agent_config.port=7010 or datasets[1].filename=b.csv; may be repeated" },
    { "manifest", "FILE", NULL, OPT_PATH, BOTH, AT(manifest),
      "the whole manifest as JSON, as cvms manifest prints it; other flags override it" },
    { "manifest-for", "JOBID=FILE", NULL, OPT_PATHS, CMD_SERVE, AT(manifest_for),
      "another manifest for the agents with this job-id; may be repeated" },
    { "compat", "WHICH", "all", OPT_TEXT, BOTH, AT(compat),
      "manifest dialect: all (every agent), or exactly that of seed or head" },
    { NULL, NULL, NULL, OPT_IGNORED, 0, 0, "Output" },
    { "output", "FORM", "text", OPT_TEXT, CMD_SERVE, AT(output),
      "how messages are shown on stdout: text, or json (one object a line)" },
    { "ready-file", "FILE", NULL, OPT_PATH, CMD_SERVE, AT(ready_file), "written with HOST:PORT once the port is open" },
    { NULL, NULL, NULL, OPT_IGNORED, 0, 0, "TLS" },
    { "server-cert", "PEM", NULL, OPT_PATH, CMD_SERVE, AT(server_cert),
      "certificate chain, a path or PEM text: serve with TLS (default $SERVER_CERT)" },
    { "server-key", "PEM", NULL, OPT_PATH, CMD_SERVE, AT(server_key), "its private key (default $SERVER_KEY)" },
    { "client-ca-certs", "PEM", NULL, OPT_PATH, CMD_SERVE, AT(client_ca_certs),
      "authorities: clients must have a certificate of theirs (default $CLIENT_CA_CERTS)" },
    { "client-san", "NAME", NULL, OPT_TEXT, CMD_SERVE, AT(client_san),
      "and it must carry this subject alternative name" },
    { "allow-no-alpn", NULL, NULL, OPT_FLAG, CMD_SERVE, AT(allow_no_alpn),
      "serve TLS clients that offer no ALPN, too" },
    { NULL, NULL, NULL, OPT_IGNORED, 0, 0, "Smoke test" },
    { "until", "STAGE", NULL, OPT_TEXT, CMD_SERVE, AT(until),
      "end with a verdict once an agent is connected, accepted, running, ready or complete" },
    { "timeout", "DURATION", "0", OPT_DURATION, CMD_SERVE, AT(timeout_ms),
      "verdict 4 if that has not happened in time; 0 waits for ever" },
    { "grace", "DURATION", "15s", OPT_DURATION, CMD_SERVE, AT(grace_ms),
      "verdict 5 if a lost agent has not come back in this time" },
    { "poll", "DURATION", "5s", OPT_DURATION, CMD_SERVE, AT(poll_ms),
      "with a verdict wanted: ask agents for their state so often; 0 never does" },
    { "expect", "TYPE/STATUS,...", NULL, OPT_LIST, CMD_SERVE, AT(expect),
      "events that must come, in this order; others may stand between" },
    { "reject", "TEXT", NULL, OPT_LIST, CMD_SERVE, AT(reject),
      "a log line or event in which this text stands is a failure, * for any run; may be repeated" },
    { "agents", "N", "1", OPT_COUNT, CMD_SERVE, AT(agents),
      "so many agents must get there, told apart by job-id or address" },
    { "report", "FILE", NULL, OPT_PATH, CMD_SERVE, AT(report),
      "the verdict as JUnit XML, or as JSON if FILE ends in .json" },
    { "record", "FILE", NULL, OPT_PATH, CMD_SERVE, AT(record),
      "keep every message, both ways, as JSON lines for cvms agent -replay" },
    { NULL, NULL, NULL, OPT_IGNORED, 0, 0, "Advanced" },
    { "control", NULL, NULL, OPT_FLAG, CMD_SERVE, AT(control),
      "lines on stdin are commands, as on a terminal; help lists them" },
    { "skip-forwarder", NULL, NULL, OPT_FLAG, CMD_SERVE, AT(skip_forwarder),
      "send no manifest to a stream that says it is a log-forwarder" },
    { "fault", "NAME[=VALUE]", NULL, OPT_LIST, CMD_SERVE, AT(fault),
      "do something wrong on purpose (see below); may be repeated" },
    { "max-message", "BYTES", "4194304", OPT_COUNT, CMD_SERVE | CMD_AGENT, AT(max_message),
      "longest message that is taken" },
    { "max-connections", "N", NULL, OPT_COUNT, CMD_SERVE, AT(max_connections),
      "connections at a time (default: as many as the limit of descriptors leaves room for)" },
    { "o", "FILE", NULL, OPT_PATH, CMD_MANIFEST, AT(out_file),
      "write the manifest's bytes to FILE instead of printing JSON" },
    { "wait", "DURATION", "10s", OPT_DURATION, CMD_AGENT, AT(wait_ms), "how long to retry until the server is there" },
    { "wait", "DURATION", "0s", OPT_DURATION, CMD_HEALTH, AT(wait_ms), "how long to retry until the server is there" },
    { "timeout", "DURATION", "30s", OPT_DURATION, CMD_AGENT, AT(timeout_ms),
      "how long each step may take: the connect, a piece of the manifest, the end; 0: for ever" },
    { "timeout", "DURATION", "10s", OPT_DURATION, CMD_HEALTH, AT(timeout_ms),
      "how long one try may take, from the connect to the answer; 0: for ever" },
    { "repeat", "N", "1", OPT_COUNT, CMD_AGENT, AT(repeat), "play the run so many times" },
    { "once", NULL, NULL, OPT_FLAG, CMD_AGENT, AT(once), "only connect, report, and fetch the manifest" },
    { "agent-port", "PORT", NULL, OPT_TEXT, CMD_AGENT, AT(agent_port),
      "wait for uploads at this port, as a real agent does at 7002; 0 takes any free one (without it: only for a server that "
      "uploads, at 7002)" },
    { "fail", "HOW", NULL, OPT_TEXT, CMD_AGENT, AT(fail),
      "play a run that fails in the state ReceivingManifest, ReceivingAlgorithm, ReceivingData or Running, or one that refuses "
      "uploads or results: algorithm-hash, algorithm-signature, dataset-hash, dataset-signature, results" },
    { "job-id", "ID", NULL, OPT_TEXT, CMD_AGENT, AT(job_id),
      "send this as the metadata job-id, as the newest agents do" },
    { "replay", "FILE", NULL, OPT_PATH, CMD_AGENT, AT(replay),
      "play the agents' side of a server's -record FILE, at its own pace" },
    { "fast", NULL, NULL, OPT_FLAG, CMD_AGENT, AT(fast), "with -replay: without the pauses" },
    { "ca", "PEM", NULL, OPT_PATH, CLIENTS, AT(ca),
      "use TLS, and believe these authorities (default $AGENT_CVM_GRPC_SERVER_CA_CERTS)" },
    { "cert", "PEM", NULL, OPT_PATH, CLIENTS, AT(cert), "client certificate (default $AGENT_CVM_GRPC_CLIENT_CERT)" },
    { "key", "PEM", NULL, OPT_PATH, CLIENTS, AT(key), "its private key (default $AGENT_CVM_GRPC_CLIENT_KEY)" },
    { "server-name", "NAME", NULL, OPT_TEXT, CLIENTS, AT(server_name),
      "name to look for in the server's certificate (default: ADDR's host)" },
    { "insecure", NULL, NULL, OPT_FLAG, CLIENTS, AT(insecure), "use TLS and believe any server" },
    { "service", "NAME", "", OPT_TEXT, CMD_HEALTH, AT(service), "service to ask for (default: the server as a whole)" },
    { "key", "FILE", NULL, OPT_PATH, CRYPT, AT(key), "the key: 32 raw bytes, not readable by others" },
    { "new-key", "FILE", NULL, OPT_PATH, CMD_ENCRYPT, AT(new_key), "make a key, and keep it in this new file" },
    { "b", NULL, NULL, OPT_FLAG, CMD_CHECKSUM, AT(base64), "print base64 instead of hex" },
    { "help", NULL, NULL, OPT_FLAG, CMD_ALL, AT(help), "show all flags" },
    { "h", NULL, NULL, OPT_FLAG, CMD_ALL, AT(help_short), "show the short help" },
    { "version", NULL, NULL, OPT_FLAG, CMD_ALL, AT(version), "show the version, and how this program was built" },
    { "dataset-type", "TYPE", NULL, OPT_IGNORED, BOTH, 0, "deprecated: without effect" },
    { "ca-url", "URL", NULL, OPT_IGNORED, BOTH, 0, "removed: leave it out; the agent's CA is -client-ca-file" },
    { "cvm-id", "ID", NULL, OPT_IGNORED, BOTH, 0, "removed: leave it out; an agent names itself by its job-id" },
    { "cmv-id", "ID", NULL, OPT_IGNORED, BOTH, 0, "removed: leave it out; an agent names itself by its job-id" },
};
enum { OPTIONS = sizeof option_table / sizeof *option_table };

static const struct {
    const char *name;
    enum command command;
    const char *synopsis, *what;
} command_table[] = {
    { "serve", CMD_SERVE, "cvms [serve] FLAGS", "serve the manifest to agents" },
    { "agent", CMD_AGENT, "cvms agent [FLAGS] [ADDR]", "play an agent and its log-forwarder against a server" },
    { "manifest", CMD_MANIFEST, "cvms manifest FLAGS", "print the manifest that these flags give" },
    { "checksum", CMD_CHECKSUM, "cvms checksum [-b] PATH...", "SHA3-256 of files and folders" },
    { "health", CMD_HEALTH, "cvms health [FLAGS] [ADDR]", "exit 0 only if the server is SERVING" },
    { "encrypt", CMD_ENCRYPT, "cvms encrypt -key FILE|-new-key FILE IN OUT",
      "the blob of a file, of a folder's zip or of stdin (-), as agents fetch it: AES-256-GCM" },
    { "decrypt", CMD_DECRYPT, "cvms decrypt -key FILE IN OUT", "what is in a blob, if it is genuine" },
};
enum { COMMANDS = sizeof command_table / sizeof *command_table };

static const char *const environment_table[][2] = {
    { "HOST", "address to listen on: a name, IPv4 or IPv6 (default localhost; empty: all interfaces)" },
    { "PORT", "port to listen on (default 7001; 0: any free one)" },
    { "SERVER_CERT, SERVER_KEY", "TLS: certificate chain and key, each a path or PEM text" },
    { "SERVER_CA_CERTS, CLIENT_CA_CERTS",
      "either: clients need a certificate, verified against the latter (or the only one)" },
    { "AGENT_CVM_GRPC_URL, ..._SERVER_CA_CERTS, ..._CLIENT_CERT, ..._CLIENT_KEY",
      "agent and health: an agent's own settings" },
    { "NO_COLOR", "if set, no colour, also on a terminal" },
};

/* What -fault can do, to see how an agent takes it. */
enum fault {
    FAULT_DELAY, FAULT_MISSING_CHUNK, FAULT_NO_LAST, FAULT_FLIP, FAULT_SHORT_HASH, FAULT_WRONG_HASH, FAULT_RST,
    FAULT_GOAWAY, FAULT_FREEZE, FAULT_REFUSE, FAULT_PLAIN, FAULT_TWICE,
    FAULT_OF_FETCHES, FAULT_NOT_FOUND = FAULT_OF_FETCHES, FAULT_UNAVAILABLE, FAULT_CUT, FAULT_BLOB, FAULT_KEY,
    FAULT_TOKEN, FAULTS
};
static const struct {
    const char *name, *arg, *help;
} fault_table[FAULTS] = {
    [FAULT_DELAY] = { "delay", "DURATION", "wait so long before the manifest is sent" },
    [FAULT_MISSING_CHUNK] = { "missing-chunk", "N", "leave out chunk N, counted from 0" },
    [FAULT_NO_LAST] = { "no-last", NULL, "never send the last chunk" },
    [FAULT_FLIP] = { "flip", "OFFSET", "flip a bit in this byte of the manifest" },
    [FAULT_SHORT_HASH] = { "short-hash", NULL, "the algorithm's hash has 31 bytes" },
    [FAULT_WRONG_HASH] = { "wrong-hash", NULL, "the algorithm's hash is that of something else" },
    [FAULT_RST] = { "rst", NULL, "RST_STREAM once the manifest is out" },
    [FAULT_GOAWAY] = { "goaway", NULL, "GOAWAY, and the streams' end, once the manifest is out" },
    [FAULT_FREEZE] = { "freeze", "N", "send N chunks, then nothing more" },
    [FAULT_REFUSE] = { "refuse", "N", "close the first N connections at once" },
    [FAULT_PLAIN] = { "plain", NULL, "one plain runReq instead of chunks" },
    [FAULT_TWICE] = { "twice", NULL, "the whole manifest twice" },
    [FAULT_NOT_FOUND] = { "not-found", NULL, "what agents fetch is not there: 404" },
    [FAULT_UNAVAILABLE] = { "unavailable", NULL, "what agents fetch can't be had: 503" },
    [FAULT_CUT] = { "cut", "BYTES", "what agents fetch breaks off after so many bytes" },
    [FAULT_BLOB] = { "flip-blob", "OFFSET", "flip a bit in this byte of what agents fetch" },
    [FAULT_KEY] = { "wrong-key", NULL, "the key broker gives another key" },
    [FAULT_TOKEN] = { "refuse-token", NULL, "the key broker takes no token: 401" },
};

/* The faults that were asked for; -1: not this one. */
struct faults {
    int64_t value[FAULTS];
};

static int64_t fault_value(const struct faults *f, enum fault fault)
{
    return f ? f->value[fault] : -1;
}

/* Go's strconv.ParseBool.  1, 0, or -1. */
static int parse_bool(const char *s)
{
    static const char *const words[] = { "0", "f", "F", "FALSE", "false", "False",
                                         "1", "t", "T", "TRUE", "true", "True" };
    size_t i = ROW_FIND(words, bytes_of(s));
    return i == PB_COUNT(words) ? -1 : i >= PB_COUNT(words) / 2;
}

/* Go's time.ParseDuration without a sign: 90s, 2m30s, 1.5h, 0.  Milliseconds, at least 1 of what is not 0; -1 and *why if
 * it is none. */
static int64_t parse_duration(const char *s, const char **why)
{
    static const struct {
        const char *unit;
        double ms;
    } units[] = { { "ns", 1e-6 }, { "us", 1e-3 }, { "ms", 1 }, { "s", 1e3 }, { "m", 6e4 }, { "h", 3.6e6 } };
    double total = 0;
    *why = *s == '-' ? "is negative" : "is not a duration";
    if (strcmp(s, "0") == 0)
        return 0;
    for (bool any = false; *s || !any; any = true) {
        double v = 0, place = 1;
        size_t digits = strspn(s, "0123456789"), i = 0;
        for (; i < digits; i++)
            v = v * 10 + (*s++ - '0');
        if (*s == '.')
            for (s++; *s >= '0' && *s <= '9'; digits++)
                v += (*s++ - '0') * (place /= 10);
        size_t unit = strcspn(s, "0123456789.");
        i = ROW_FIND(units, ((struct bytes){ (const uint8_t *)s, unit }));
        if (digits && !unit)
            *why = "has no unit";
        if (!digits || i == PB_COUNT(units))
            return -1;
        total += v * units[i].ms;
        s += unit;
    }
    *why = "is longer than ten years";
    return total > 10 * 365.25 * 86400e3 ? -1 : total > 0 && total < 1 ? 1 : (int64_t)total;
}

/* Letters to change, add, drop or swap to make one word of the other; limit + 1 if they are more. */
static unsigned edit_distance(const char *a, const char *b, unsigned limit)
{
    static const uint8_t steps[][2] = { { 1, 1 }, { 1, 0 }, { 0, 1 }, { 2, 2 } };
    while (*a && *a == *b)
        a++, b++;
    if (!limit || (!*a && !*b))
        return *a || *b;
    unsigned best = limit + 1;
    for (size_t i = 0; i < PB_COUNT(steps); i++) {
        bool swap = *a && *b && a[0] == b[1] && a[1] == b[0];
        if ((*a || !steps[i][0]) && (*b || !steps[i][1]) && (i < 3 || swap)) {
            unsigned d = 1 + edit_distance(a + steps[i][0], b + steps[i][1], limit - 1);
            best = d < best ? d : best;
        }
    }
    return best;
}

/* The most letters in which two words of this length may differ and still be neighbours. */
static unsigned edit_limit(size_t len)
{
    return len < 3 ? 0 : len < 5 ? 1 : 2;
}

static const struct option *option_find(const char *name, size_t n, unsigned command)
{
    for (const struct option *o = option_table; o < option_table + OPTIONS; o++)
        if (o->commands & command && bytes_eq(bytes_of(o->name), (struct bytes){ (const uint8_t *)name, n }))
            return o;
    return NULL;
}

static bool option_given(const struct options *o, const char *name)
{
    const struct option *opt = option_find(name, strlen(name), o->command);
    return opt && o->given[opt - option_table];
}

/* An unknown flag: the variable that it may mean, the nearest flag of this command, or that another command knows it. */
static void option_unknown(struct mistakes *r, const char *name, size_t n, unsigned command)
{
    static const struct {
        const char *flag, *variable, *as;
    } variables[] = {
        { "port", "PORT", "PORT=7001" }, { "p", "PORT", "PORT=7001" }, { "host", "HOST", "HOST=127.0.0.1" },
        { "listen", "HOST and PORT", "HOST=127.0.0.1 PORT=7001" },
    };
    char word[40];
    const struct option *near = NULL;
    unsigned best = edit_limit(n) + 1;
    text_printf(word, sizeof word, "%.*s", (int)(n < 39 ? n : 39), name);
    size_t variable = ROW_FIND(variables, bytes_of(word));
    for (const struct option *o = option_table; best && o < option_table + OPTIONS; o++) {
        bool known = o->commands & command, begins = known && n >= 4 && strncmp(o->name, name, n) == 0;
        unsigned d = !known ? best : begins ? best - 1 : edit_distance(word, o->name, best - 1);
        if (d < best)
            best = d, near = o;
    }
    if (near)
        tell(r, USAGE, "unknown flag -%s: did you mean -%s?", word, near->name);
    else if (variable < PB_COUNT(variables) && command == CMD_SERVE)
        tell(r, USAGE, "there is no flag -%s: set %s, as in %s cvms FLAGS", word,
             variables[variable].variable, variables[variable].as);
    else if (option_find(name, n, ~0u))
        tell(r, USAGE, "-%s is not a flag of this command; see cvms -help", word);
    else
        tell(r, USAGE, "unknown flag -%s; see cvms -help", word);
}

/* Zeroed memory that lasts as long as the options. */
static void *option_alloc(struct options *o, size_t n)
{
    return or_exit(pb_arena_alloc(&o->arena, n));
}

/* A copy that lasts as long, with its end. */
static const char *option_text(struct options *o, struct bytes b)
{
    char *s = option_alloc(o, b.n + 1);
    if (b.n)
        memcpy(s, b.p, b.n);
    return s;
}

static void values_add(struct options *o, struct values *list, const char *value)
{
    if ((list->n & (list->n - 1)) == 0) {   /* full at each power of two */
        const char **v = option_alloc(o, (list->n ? 2 * list->n : 1) * sizeof *v);
        if (list->n)
            memcpy(v, list->v, list->n * sizeof *v);
        list->v = v;
    }
    list->v[list->n++] = value;
}

/* Stores one flag's value; NULL for a flag without one. */
static void option_set(struct mistakes *r, struct options *o, const struct option *opt, const char *value)
{
    void *at = (char *)o + opt->offset;
    static const char *const secures[] = { "server-cert", "server-key", "client-ca-certs", "client-san", "ca", "cert", "key",
                                           "server-name" };
    const char *why;
    int64_t n;
    bool secure = ROW_FIND(secures, bytes_of(opt->name)) < PB_COUNT(secures), input = opt->commands & BOTH &&
                  opt->kind >= OPT_LIST && opt->kind <= OPT_PATHS && opt->offset != AT(algo_args);
    if (value && !*value && (secure || input))
        tell(r, secure ? USAGE : WARNING, "-%s is empty, as of a variable that is not set%s", opt->name,
             secure ? "; leave it out if that is meant" : "");
    if ((opt->kind == OPT_TEXT || opt->kind == OPT_LIST) && !pb_utf8_valid(bytes_of(value)))
        tell(r, USAGE, "-%s: \"%s\" is not UTF-8, which all text in a manifest has to be", opt->name, value);
    switch (opt->kind) {
    case OPT_TEXT:
    case OPT_PATH:
        *(const char **)at = value;
        break;
    case OPT_LIST:
    case OPT_PATHS:
        values_add(o, at, value);
        break;
    case OPT_FLAG:
        n = value ? parse_bool(value) : 1;
        if (n < 0)
            tell(r, USAGE, "-%s: \"%s\" is not a boolean; use true or false", opt->name, value);
        *(bool *)at = n > 0;
        break;
    case OPT_COUNT:
    case OPT_DURATION:
        why = "is not a number from 1 to 4294967295";
        *(int64_t *)at = n = opt->kind == OPT_COUNT ? parse_decimal(bytes_of(value)) : parse_duration(value, &why);
        if (n < 0 || (opt->kind == OPT_COUNT && (n == 0 || n > UINT32_MAX)))
            tell(r, USAGE, "-%s: \"%s\" %s%s", opt->name, value, why,
                 opt->kind == OPT_COUNT ? "" : "; write it like 90s or 2m30s");
        break;
    case OPT_IGNORED:
        tell(r, WARNING, "-%s is %s", opt->name, opt->help);
    }
}

/* Takes the value of the flag at words[i]; returns how many words it takes. */
static size_t option_take(struct mistakes *r, struct options *o, char **words, size_t n)
{
    const char *name = words[0] + 1 + (words[0][1] == '-'), *next = n > 1 ? words[1] : NULL;
    size_t len = strcspn(name, "=");
    const struct option *opt = option_find(name, len, o->command);
    const char *value = name[len] ? name + len + 1 : NULL, *word = next && *next == '-' ? next + 1 + (next[1] == '-') : "";
    if (!opt && len == 1 && strchr("vV?", *name)) {   /* what other programs have for these */
        *(*name == '?' ? &o->help_short : &o->version) = true;
        return 1;
    }
    if (!opt) {
        option_unknown(r, name, len, o->command);
        return !value && next && *next != '-' ? 2 : 1;
    }
    o->given[opt - option_table] = true;
    if (opt->kind == OPT_FLAG || value) {
        option_set(r, o, opt, value);
        return 1;
    }
    if (!next) {
        tell(r, USAGE, "-%s needs a value: -%s %s", opt->name, opt->name, opt->arg);
        return 1;
    }
    if (option_find(word, strcspn(word, "="), o->command))
        tell(r, WARNING, "-%s: its value \"%s\" looks like a flag; if it is one, give -%s its value %s", opt->name, next,
             opt->name, opt->arg);
    option_set(r, o, opt, next);
    return 2;
}

/* Parses the words after the command.  Go's rules: one dash or two, -name value or -name=value, a flag without value
 * only as -name or -name=BOOL; the first word that is no flag, or --, ends the flags.  The commands that take paths or an
 * address have flags behind these as well. */
static void options_parse(struct mistakes *r, struct options *o, char **words, size_t n)
{
    bool anywhere = o->command & (CLIENTS | CMD_CHECKSUM | CRYPT), flags = true;
    o->given = option_alloc(o, OPTIONS * sizeof *o->given);
    o->args = option_alloc(o, (n + 1) * sizeof *o->args);
    for (const struct option *opt = option_table; opt < option_table + OPTIONS; opt++)
        if (opt->preset && opt->commands & (unsigned)o->command)
            option_set(r, o, opt, opt->preset);
    for (size_t i = 0; i < n; i++) {
        bool flag = flags && words[i][0] == '-' && words[i][1];
        flags = flags && (flag ? strcmp(words[i], "--") != 0 : anywhere);
        if (!flag)
            o->args[o->arg_count++] = words[i];
        else if (flags)
            i += option_take(r, o, words + i, n - i) - 1;
        o->flagged |= flag && flags;
    }
}

/* -fault NAME[=VALUE], each of them. */
static void faults_parse(struct mistakes *r, const struct options *o, struct faults *f)
{
    for (size_t i = 0; i < FAULTS; i++)
        f->value[i] = -1;
    for (size_t k = 0; k < o->fault.n; k++) {
        const char *given = o->fault.v[k];
        size_t n = strcspn(given, "="), i = ROW_FIND(fault_table, ((struct bytes){ (const uint8_t *)given, n }));
        if (i == FAULTS) {
            tell(r, USAGE, "-fault: \"%s\" is not known; cvms -help lists the faults", given);
            continue;
        }
        const char *value = given[n] ? given + n + 1 : NULL, *why;
        f->value[i] = !value ? 0 : i == FAULT_DELAY ? parse_duration(value, &why) : parse_decimal(bytes_of(value));
        if (!fault_table[i].arg != !value || f->value[i] < 0)
            tell(r, USAGE, "-fault: write %s%s%s", fault_table[i].name, fault_table[i].arg ? "=" : " alone",
                 fault_table[i].arg ? fault_table[i].arg : "");
    }
}

enum { HELP_COLUMN = 30, HELP_WIDTH = 98 };

/* An entry of -help: what is typed, and behind it, from one column on, what it is. */
static void help_entry(struct buf *out, const char *typed, const char *between, const char *arg, const char *text)
{
    size_t start = out->len;
    buf_printf(out, "  %s%s%s", typed, arg ? between : "", arg ? arg : "");
    if (out->len - start >= HELP_COLUMN)
        start = out->len + 1, buf_putc(out, '\n');
    for (size_t n; *text; text += n + (text[n] == ' ')) {
        n = strcspn(text, " ");
        if (out->len - start + 1 + n > HELP_WIDTH)
            start = out->len + 1, buf_putc(out, '\n');
        size_t column = out->len - start, blanks = column < HELP_COLUMN ? HELP_COLUMN - column : 1;
        while (blanks--)
            buf_putc(out, ' ');
        buf_put(out, text, n);
    }
    buf_putc(out, '\n');
}

static void help_flag(struct buf *out, const struct option *o)
{
    char name[40], text[300];
    bool preset = o->preset && *o->preset && strcmp(o->preset, "0") != 0;
    text_printf(name, sizeof name, "-%s", o->name);
    text_printf(text, sizeof text, "%s%s%s", o->help, preset ? "; default " : "", preset ? o->preset : "");
    help_entry(out, name, " ", o->arg, text);
}

/* The flags that a command has, but for those that another has as well, under the headings of the server's. */
static void help_flags(struct buf *out, unsigned command, unsigned without)
{
    const char *heading = NULL;
    for (const struct option *o = option_table; o < option_table + OPTIONS; o++) {
        if (!o->name)
            heading = o->help;
        if (!(o->commands & command) || o->commands & without)
            continue;
        if (heading && command == CMD_SERVE)
            buf_printf(out, "\n%s:\n", heading);
        heading = NULL;
        help_flag(out, o);
    }
}

/* A flag's value, else the variable's. */
static struct tls_source tls_source(const char *flag, const char *value, const char *variable, const char *either)
{
    const char *v = getenv(variable);
    return present(value) ? (struct tls_source){ flag, value }
                          : (struct tls_source){ present(v) ? variable : either, v };
}
#define TLS_SOURCE(flag, value, variable) tls_source(flag, value, variable, flag " (or " variable ")")

static const char help_address[] = "\nADDR is HOST:PORT; default $AGENT_CVM_GRPC_URL, else localhost:7001.\n";

static void help_commands(struct buf *out)
{
    for (size_t c = 0; c < COMMANDS; c++)
        help_entry(out, command_table[c].synopsis, "", NULL, command_table[c].what);
}

/* -h of the server: what it is, and what most users need. */
static void help_short(struct buf *out)
{
    static const char *const flags[] = {
        "algo-path", "data-paths", "algo-type", "deliver", "results", "public-key-path", "attested-tls-bool", "until",
        "timeout", "report",
    };
    buf_puts(out, "cvms " CVMS_VERSION ": a CVMS server for Cocos agents (https://github.com/ultravioletrs/cocos).  "
                  "An agent\nconnects, gets the computation manifest, and what it sends back is shown.\n\nCommands:\n");
    help_commands(out);
    buf_puts(out, "\nThe flags that matter:\n");
    for (size_t i = 0; i < PB_COUNT(flags); i++)
        help_flag(out, option_find(flags[i], strlen(flags[i]), CMD_SERVE));
    buf_puts(out, "\nExamples:\n"
                  "  cvms -algo-path algo.py -algo-type python -deliver upload -results out.zip -until complete\n"
                  "  cvms -algo-path algo.py -public-key-path pub.pem -attested-tls-bool false -until ready\n"
                  "  HOST= PORT=7001 SERVER_CERT=cert.pem SERVER_KEY=key.pem cvms -manifest manifest.json\n"
                  "\nAll flags, faults and variables: cvms -help.  A command's own: cvms COMMAND -h.\n");
}

/* -help: of one command its own flags, of the server everything. */
static void options_help(struct buf *out, enum command command)
{
    size_t c = 0;
    if (command != CMD_SERVE) {
        while (command_table[c].command != command)
            c++;
        help_entry(out, command_table[c].synopsis, "", NULL, command_table[c].what);
        buf_puts(out, "\nFlags:\n");
        help_flags(out, command, 0);
        buf_puts(out, command & CLIENTS ? help_address : "");
        return;
    }
    buf_puts(out, "cvms " CVMS_VERSION ": a CVMS server for Cocos agents\n\nCommands:\n");
    help_commands(out);
    help_flags(out, CMD_SERVE, 0);
    for (c = 0; c < COMMANDS; c++)
        if (command_table[c].command != CMD_SERVE) {
            buf_printf(out, "\ncvms %s%s:\n", command_table[c].name,
                       command_table[c].command == CMD_MANIFEST ? ", those of the manifest above, and" : "");
            help_flags(out, command_table[c].command, CMD_SERVE);
        }
    buf_puts(out, "\nFaults, for -fault:\n");
    for (size_t i = 0; i < FAULTS; i++)
        help_entry(out, fault_table[i].name, "=", fault_table[i].arg, fault_table[i].help);
    buf_puts(out, "\nEnvironment:\n");
    for (size_t i = 0; i < PB_COUNT(environment_table); i++)
        help_entry(out, environment_table[i][0], "", NULL, environment_table[i][1]);
    buf_puts(out, help_address);
    buf_puts(out, "Exit status: 0 good, 1 cannot start or failed, 2 usage;\n"
                  "of a smoke test: 3 the agent failed, 4 timed out, 5 the agent was lost.\n");
}

/* -version: also what a report of a fault needs. */
static void options_version(struct buf *out)
{
#if defined(__clang__)
    const char *compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
    const char *compiler = "gcc " __VERSION__;
#else
    const char *compiler = "unknown";
#endif
    unsigned sha3 = sha3_features();
    size_t n = strlen(compiler);      /* clang's ends in a blank */
    buf_printf(out, "cvms " CVMS_VERSION "\ncompiler: %.*s\n", (int)(n - (compiler[n - 1] == ' ')), compiler);
#if defined(__GLIBC__)
    buf_printf(out, "C library: glibc %d.%d\n", __GLIBC__, __GLIBC_MINOR__);
#else
    buf_puts(out, "C library: not glibc\n");
#endif
    buf_printf(out, "TLS: %s\nSHA3: %s\n", CVMS_TLS ? "BearSSL" : "none (built with TLS=0)",
               sha3 & SHA3_AVX512 ? "AVX-512" : sha3 & SHA3_AVX2 ? "AVX2" : sha3 & SHA3_BMI2 ? "BMI2" : "portable");
}

/* ==== 13. Inputs: files and folders, as they are or sealed; their checksums =========================================
 * Owns: the bytes of a file, or of the zip that Go's archive/zip makes of a folder (PKWARE APPNOTE 4.3; Store, data
 * descriptors, Zip64 where needed), pulled in pieces, encrypted on the way if asked (AES-256-GCM, NIST SP 800-38D); their
 * SHA3-256; the identity that tells whether it still holds.
 * Never: maps a file (it may shrink under us), follows a link to a folder, waits on a pipe or device but on stdin and OUT of
 * cvms encrypt and decrypt.
 */

enum {
    CHECKSUM_READ = 512 * SHA3_256_RATE, /* one read, in bytes: whole blocks and whole pages (17 of 4 KiB) */
    CHECKSUM_LANES = 8,                  /* the most that sha3_256_lanes answers */
    ZIP_NAME_MAX = 0xffff,               /* APPNOTE 4.4.10: a 16-bit length */
    ZIP_VERSION = 20,
    ZIP_VERSION_ZIP64 = 45,
};

#define ZIP_32_MAX UINT32_C(0xffffffff) /* stands in a 32-bit field whose value is in the Zip64 record */

/* What stat tells of a file.  No padding: it counts as bytes. */
struct file_stat {
    uint64_t dev, ino, size, mtime, mtime_ns, ctime, ctime_ns;
};

/* What identifies an unchanged input: a file's stat; of a folder SHA3-256 of the names and stats of its files. */
struct file_id {
    uint8_t bytes[sizeof(struct file_stat)];
};

/* "PATH: reason", with the end of a long path; returns false. */
static bool file_err(struct err *e, const char *path, const char *why)
{
    enum { KEEP = 400 };
    size_t n = strlen(path);
    return err_set(e, "%s%s: %s", n > KEEP ? "..." : "", n > KEEP ? path + n - KEEP : path, why);
}

/* Opens a regular file, without waiting for a pipe's writer.  Returns the descriptor and fills st, or -1: e has the
 * reason. */
static int file_open(const char *path, struct stat *st, struct err *e)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    const char *why = fd < 0 || fstat(fd, st) ? strerror(errno)
                    : S_ISREG(st->st_mode) ? NULL
                    : S_ISDIR(st->st_mode) ? "is a folder now"
                    : "not a regular file or a folder";
    if (!why)
        return fd;
    if (fd >= 0)
        close(fd);
    file_err(e, path, why);
    return -1;
}

/* Reads until p is full or the file ends; only a pipe is waited for.  Returns the bytes read, or -1 and errno. */
static ssize_t file_read(int fd, uint8_t *p, size_t n)
{
    size_t len = 0;
    while (len < n) {
        ssize_t got = read(fd, p + len, n - len);
        if (got == 0)
            break;
        if (got > 0)
            len += (size_t)got;
        else if (errno == EAGAIN)
            poll(&(struct pollfd){ .fd = fd, .events = POLLIN }, 1, -1);
        else if (errno != EINTR)
            return -1;
    }
    return (ssize_t)len;
}

/* ---- The files of a folder ---- */

/* One file of a folder, or a file by itself, whose name is empty. */
struct tree_entry {
    struct file_stat st;
    const char *path, *name; /* name: relative to the folder */
    bool folder;
    uint32_t crc, mode;      /* from here on: what went into the archive */
    uint64_t size, offset;
};

/* All zero but root is a tree before its walk.  After it: `n` files in the order of their names' bytes. */
struct tree {
    const char *root;
    struct pb_arena arena;
    struct pb_list found;
    struct tree_entry *entry; /* in found */
    size_t n;
};

/* Adds what the folder `folder`, open as fd, calls `name`; the root is what "" calls it.  A link counts as the file it
 * leads to, and only the root may be one to a folder. */
static bool tree_add(struct tree *t, const char *folder, int fd, const char *name, struct err *e)
{
    size_t n = strlen(folder), slash = n && folder[n - 1] != '/', len = strlen(name) + 1;
    char *path = pb_arena_alloc(&t->arena, n + slash + len);
    struct tree_entry *entry = path ? pb_list_add(&t->arena, &t->found, sizeof *entry) : NULL;
    struct stat st = { .st_mode = 0 };
    if (!entry)
        return file_err(e, t->root, "out of memory");
    memcpy(path, folder, n);
    path[n] = '/';
    memcpy(path + n + slash, name, len);
    entry->path = path;
    entry->name = path + strlen(t->root);
    entry->name += *entry->name == '/';
    bool link = n && fstatat(fd, name, &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISLNK(st.st_mode);
    if ((link || !n) && fstatat(fd, name, &st, 0))
        st.st_mode = 0;
    const char *why = !st.st_mode ? strerror(errno)
                    : link && n && S_ISDIR(st.st_mode) ? "is a link to a folder"
                    : !S_ISDIR(st.st_mode) && !S_ISREG(st.st_mode) ? "not a regular file or a folder"
                    : strlen(entry->name) > ZIP_NAME_MAX ? "name too long for a zip"
                    : NULL;
    entry->folder = S_ISDIR(st.st_mode);
    entry->st = (struct file_stat){ (uint64_t)st.st_dev, (uint64_t)st.st_ino, (uint64_t)st.st_size,
                                    (uint64_t)st.st_mtim.tv_sec, (uint64_t)st.st_mtim.tv_nsec,
                                    (uint64_t)st.st_ctim.tv_sec, (uint64_t)st.st_ctim.tv_nsec };
    return !why || file_err(e, path, why);
}

/* Adds all that stands in a folder. */
static bool tree_list(struct tree *t, struct tree_entry folder, struct err *e)
{
    int fd = open(folder.path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | (*folder.name ? O_NOFOLLOW : 0));
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    bool ok = d || file_err(e, folder.path, strerror(errno));
    struct dirent *found;
    while (errno = 0, ok && (found = readdir(d)))
        if (strcmp(found->d_name, ".") != 0 && strcmp(found->d_name, "..") != 0)
            ok = tree_add(t, folder.path, fd, found->d_name, e);
    if (ok && errno)
        ok = file_err(e, folder.path, strerror(errno));
    if (d)
        closedir(d);
    else if (fd >= 0)
        close(fd);
    return ok;
}

static int tree_order(const void *a, const void *b)
{
    return strcmp(((const struct tree_entry *)a)->name, ((const struct tree_entry *)b)->name);
}

/* Finds the files under t->root, which may be one itself, and what identifies them.  The entries are their own list of
 * work, so depth costs neither stack nor descriptors.  The caller frees the arena, also after an error. */
static bool tree_walk(struct tree *t, struct file_id *id, struct err *e)
{
    struct sha3_256 h;
    t->arena.limit = SIZE_MAX / 2;
    if (!tree_add(t, "", AT_FDCWD, t->root, e))
        return false;
    for (size_t i = 0; i < t->found.n; i++) {
        const struct tree_entry *entry = (struct tree_entry *)t->found.items + i;
        if (entry->folder && !tree_list(t, *entry, e))
            return false;
    }
    t->entry = t->found.items;
    *id = (struct file_id){ { 0 } };
    if (!t->entry->folder) {          /* thousands of small files: nothing to hash for each */
        t->n = 1;
        memcpy(id->bytes, &t->entry->st, sizeof id->bytes);
        return true;
    }
    for (size_t i = 0; i < t->found.n; i++)
        if (!t->entry[i].folder)
            t->entry[t->n++] = t->entry[i];
    qsort(t->entry, t->n, sizeof *t->entry, tree_order);
    sha3_256_init(&h, 0);
    for (size_t i = 0; i < t->n; i++) {
        sha3_256_update(&h, t->entry[i].name, strlen(t->entry[i].name) + 1);
        sha3_256_update(&h, &t->entry[i].st, sizeof t->entry[i].st);
    }
    sha3_256_final(&h, id->bytes);
    return true;
}

/* ---- Time zones (RFC 8536) ---- */

enum { TZIF_HEADER = 44, TZIF_TYPE = 6 };

/* The local time type before the first of n transitions, which lead to `indices`, chosen as Go does: type 0 if none leads
 * to it, else the standard time before the first summer time, else the first standard time. */
static size_t tzif_first(const uint8_t *indices, size_t n, const uint8_t *types, uint64_t type_count)
{
    const uint8_t *summer = types + 4;
    if (!n || !memchr(indices, 0, n))
        return 0;
    for (size_t i = summer[TZIF_TYPE * indices[0]] ? indices[0] : 0; i > 0; i--)
        if (!summer[TZIF_TYPE * (i - 1)])
            return i - 1;
    for (size_t i = 0; i < type_count; i++)
        if (!summer[TZIF_TYPE * i])
            return i;
    return 0;
}

/* The offset from UTC at Unix time 0, in seconds, by the block that counts: the first, or from version 2 on the second.
 * The footer is not read: it rules the time after the last transition, and says of 1970 what that says.  False: not a
 * file that Go reads. */
static bool tzif_offset(struct bytes in, int32_t *offset)
{
    static const uint8_t zero[8];
    uint64_t count[6], len = 0;       /* indicators, UT and standard; leap seconds, times, types, bytes of names */
    size_t width = 0;                 /* of a time, in bytes */
    bool more;
    do {
        in = bytes_from(in, (size_t)len);
        width += 4;
        if (in.n < TZIF_HEADER || !bytes_start(in, "TZif") || (in.p[4] && in.p[4] != '2' && in.p[4] != '3'))
            return false;
        for (size_t i = 0; i < 6; i++)
            count[i] = get_be32(in.p + 20 + 4 * i);
        len = count[3] * (width + 1) + count[4] * TZIF_TYPE + count[5] + count[2] * (width + 4) + count[1] + count[0];
        more = in.p[4] && width == 4;
        in = bytes_from(in, TZIF_HEADER);
        if (len > in.n)
            return false;
    } while (more);
    const uint8_t *indices = in.p + count[3] * width, *types = indices + count[3];
    bool ok = count[4] > 0;
    for (size_t i = 0; i < count[3]; i++)
        ok = ok && indices[i] < count[4];
    for (size_t i = 0; ok && i < count[4]; i++)
        ok = types[TZIF_TYPE * i + 5] < count[5];
    size_t type = ok ? tzif_first(indices, (size_t)count[3], types, count[4]) : 0;
    for (size_t i = 0; ok && i < count[3]; i++)
        if (in.p[i * width] & 0x80 || memcmp(in.p + i * width, zero, width) == 0) /* big-endian, signed */
            type = indices[i];
    if (ok)
        *offset = (int32_t)get_be32(types + TZIF_TYPE * type);
    return ok;
}

/* The local zone's offset at Unix time 0, which is the agent's only if it is found as Go finds it: the C library takes
 * TZ=JST-9 for a rule, Go for a file that is not there, and then for UTC. */
static int32_t zone_offset(void)
{
    enum { ZONE_FILE_MAX = 10 << 20 };
    static const char *const folders[] = { "", "/usr/share/zoneinfo/", "/usr/share/lib/zoneinfo/", "/usr/lib/locale/TZ/",
                                           "/etc/zoneinfo/" };
    const char *tz = getenv("TZ");
    tz = tz ? tz + (*tz == ':') : "/etc/localtime";
    size_t i = *tz == '/' ? 0 : 1, end = *tz == '/' ? 1 : PB_COUNT(folders);
    int32_t offset = 0;
    for (bool found = !*tz || strcmp(tz, "UTC") == 0; !found && i < end; i++) {
        char path[PATH_MAX];
        struct buf file = { 0 };
        struct err ignored;
        text_printf(path, sizeof path, "%s%s", folders[i], tz);
        found = file_load(path, ZONE_FILE_MAX, &file, &ignored) && tzif_offset((struct bytes){ file.p, file.len }, &offset);
        buf_free(&file);
    }
    return offset;
}

/* ---- The zip of a folder ---- */

/* An archive on its way out. */
struct zip {
    struct buf out;              /* made, not yet taken: all but the files' bytes */
    uint64_t len, start;         /* bytes before `out`; start: where the central directory begins */
    uint16_t dos_time, dos_date;
};

/* [k][b]: the CRC of byte b and k zeros after it; made by the first that needs it. */
static uint32_t crc_table[16][256];

static void crc32_init(void)
{
    if (crc_table[0][1])
        return;
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t crc = b;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? UINT32_C(0xedb88320) : 0);
        crc_table[0][b] = crc;
    }
    for (int k = 1; k < 16; k++)
        for (int b = 0; b < 256; b++)
            crc_table[k][b] = crc_table[k - 1][b] >> 8 ^ crc_table[0][crc_table[k - 1][b] & 0xff];
}

/* The CRC-32 of APPNOTE 4.4.7, sixteen bytes a step; start with crc 0. */
static uint32_t crc32_update(uint32_t crc, const uint8_t *p, size_t n)
{
    crc = ~crc;
    for (; n >= 16; n -= 16, p += 16) {
        uint32_t next = 0;
        for (int k = 0; k < 4; k++)
            next ^= crc_table[15 - k][(crc >> 8 * k & 0xff) ^ p[k]];
        for (int k = 4; k < 16; k++)
            next ^= crc_table[15 - k][p[k]];
        crc = next;
    }
    for (; n; n--)
        crc = crc >> 8 ^ crc_table[0][(crc & 0xff) ^ *p++];
    return ~crc;
}

/* Writes the n low bytes of v, least significant first, and returns the place after them. */
static uint8_t *put_le(uint8_t *p, int n, uint64_t v)
{
    for (; n; n--, v >>= 8)
        *p++ = (uint8_t)v;
    return p;
}

/* A number in a record, in this many bytes, at most 8 of which are not 0; in none behind the last. */
struct le {
    int width;
    uint64_t value;
};

#define ZIP_PUT(z, ...) zip_put(z, (const struct le[]){ __VA_ARGS__, { 0, 0 } })

static void zip_put(struct zip *z, const struct le *fields)
{
    for (; fields->width; fields++) {
        uint8_t *to = buf_room(&z->out, (size_t)fields->width);
        if (to)
            z->out.len += (size_t)(put_le(to, fields->width, fields->value) - to);
    }
}

/* General purpose bits (APPNOTE 4.4.4): 3, a data descriptor follows; 11, the name is UTF-8, set as Go does: if it is
 * valid and has a character that a reader could take for another one in some code page. */
static uint16_t zip_flags(const char *name)
{
    uint16_t flags = 1 << 3;
    uint32_t c;
    size_t n;
    for (const uint8_t *p = (const uint8_t *)name, *end = p + strlen(name); p < end; p += n) {
        n = pb_utf8_char(p, end, &c);
        if (n == 0)
            return 1 << 3;
        if (*p < 0x20 || *p > 0x7d || *p == '\\')
            flags |= 1 << 11;
    }
    return flags;
}

/* What both headers have: flags, method Store, and the modification time, Unix 0, which the extra field has as well. */
#define ZIP_COMMON(z, name) { 2, zip_flags(name) }, { 2, 0 }, { 2, (z)->dos_time }, { 2, (z)->dos_date }
#define ZIP_TIMESTAMP { 2, 0x5455 }, { 2, 5 }, { 1, 1 }, { 4, 0 }
enum { ZIP_TIMESTAMP_LEN = 9, ZIP_64_LEN = 28 };

/* APPNOTE 4.3.7: the local file header, before CRC-32 and sizes are known. */
static void zip_local_header(struct zip *z, const char *name)
{
    ZIP_PUT(z, { 4, 0x04034b50 }, { 2, ZIP_VERSION }, ZIP_COMMON(z, name), { 12, 0 }, { 2, strlen(name) },
            { 2, ZIP_TIMESTAMP_LEN });
    buf_puts(&z->out, name);
    ZIP_PUT(z, ZIP_TIMESTAMP);
}

/* APPNOTE 4.3.9: the data descriptor. */
static void zip_descriptor(struct zip *z, const struct tree_entry *entry)
{
    int width = entry->size >= ZIP_32_MAX ? 8 : 4;
    ZIP_PUT(z, { 4, 0x08074b50 }, { 4, entry->crc }, { width, entry->size }, { width, entry->size });
}

/* APPNOTE 4.3.12: the entry's header in the central directory. */
static void zip_central_header(struct zip *z, const struct tree_entry *entry)
{
    bool big = entry->size >= ZIP_32_MAX, zip64 = big || entry->offset >= ZIP_32_MAX;
    uint64_t size = zip64 ? ZIP_32_MAX : entry->size;
    ZIP_PUT(z, { 4, 0x02014b50 }, { 2, 3 << 8 | ZIP_VERSION },       /* made by: Unix */
            { 2, big ? ZIP_VERSION_ZIP64 : ZIP_VERSION }, ZIP_COMMON(z, entry->name), { 4, entry->crc }, { 4, size },
            { 4, size }, { 2, strlen(entry->name) }, { 2, zip64 ? ZIP_TIMESTAMP_LEN + ZIP_64_LEN : ZIP_TIMESTAMP_LEN },
            { 6, 0 },                                                /* no comment, disk 0, no internal attributes */
            { 2, entry->mode & 0200 ? 0 : 1 }, { 2, 0100000 | entry->mode }, /* MS-DOS read-only, Unix mode */
            { 4, entry->offset < ZIP_32_MAX ? entry->offset : ZIP_32_MAX });
    buf_puts(&z->out, entry->name);
    ZIP_PUT(z, ZIP_TIMESTAMP);
    if (zip64)                        /* APPNOTE 4.5.3; always with all three values */
        ZIP_PUT(z, { 2, 1 }, { 2, 24 }, { 8, entry->size }, { 8, entry->size }, { 8, entry->offset });
}

/* APPNOTE 4.3.14 to 4.3.16: the end of a central directory of n entries that begins at z->start. */
static void zip_end(struct zip *z, uint64_t n)
{
    uint64_t end = z->len + z->out.len, start = z->start, size = end - start;
    if (n >= 0xffff || size >= ZIP_32_MAX || start >= ZIP_32_MAX) {
        ZIP_PUT(z, { 4, 0x06064b50 }, { 8, 56 - 12 }, { 2, ZIP_VERSION_ZIP64 }, { 2, ZIP_VERSION_ZIP64 }, { 8, 0 },
                { 8, n }, { 8, n }, { 8, size }, { 8, start });
        ZIP_PUT(z, { 4, 0x07064b50 }, { 4, 0 }, { 8, end }, { 4, 1 });
        n = 0xffff;
        size = start = ZIP_32_MAX;
    }
    ZIP_PUT(z, { 4, 0x06054b50 }, { 4, 0 }, { 2, n }, { 2, n }, { 4, size }, { 4, start }, { 2, 0 });
}

/* APPNOTE 4.4.6: Unix time 0 as the local clock showed it, which may be in 1969: the year then wraps as Go's does. */
static void zip_init(struct zip *z)
{
    time_t shown = zone_offset();
    struct tm tm = { .tm_year = 70, .tm_mday = 1 };
    gmtime_r(&shown, &tm);
    z->dos_date = (uint16_t)((unsigned)tm.tm_mday + ((unsigned)tm.tm_mon + 1) * 32 + ((unsigned)tm.tm_year - 80) * 512);
    z->dos_time = (uint16_t)((unsigned)tm.tm_sec / 2 + (unsigned)tm.tm_min * 32 + (unsigned)tm.tm_hour * 2048);
    crc32_init();
}

/* ---- The tar of a file or folder (POSIX.1-2008 pax, "pax Interchange Format"): a layer of an image ---- */

enum { TAR_BLOCK = 512, TAR_NAME = 100, TAR_END = 2 * TAR_BLOCK };

#define TAR_OCTAL_MAX ((UINT64_C(1) << 33) - 1) /* the largest size in 11 octal digits */

/* n zeros. */
static void tar_zeros(struct zip *z, uint64_t n)
{
    ZIP_PUT(z, { (int)n, 0 });
}

static uint64_t tar_padding(uint64_t n)
{
    return -n & (TAR_BLOCK - 1);
}

static void put_octal(uint8_t *p, int digits, uint64_t v)
{
    while (digits--)
        p[digits] = (uint8_t)('0' + (v & 7)), v >>= 3;
}

static void tar_put(struct zip *z, int type, struct bytes name, uint64_t size)
{
    uint8_t h[TAR_BLOCK] = { 0 };
    unsigned sum = 0;
    memcpy(h, name.p, min_size(name.n, TAR_NAME));
    put_octal(h + 100, 7, 0755);
    put_octal(h + 108, 7, 0);         /* of nobody in particular, from Unix time 0 */
    put_octal(h + 116, 7, 0);
    put_octal(h + 136, 11, 0);
    if (size <= TAR_OCTAL_MAX)
        put_octal(h + 124, 11, size);
    else                              /* as GNU and Go write it: base 256 */
        put_be32(h + 128, (uint32_t)(size >> 32)), put_be32(h + 132, (uint32_t)size), h[124] = 0x80;
    memset(h + 148, ' ', 8);
    h[156] = (uint8_t)type;
    memcpy(h + 257, "ustar\00000", 8);
    for (size_t i = 0; i < sizeof h; i++)
        sum += h[i];
    put_octal(h + 148, 6, sum);
    h[154] = 0;
    buf_put(&z->out, h, sizeof h);
}

/* A file's header, and before it a pax header with its name if that is long; its record begins with its own length. */
static void tar_header(struct zip *z, struct bytes name, uint64_t size)
{
    char number[24];
    size_t rest = name.n + sizeof " path=", n = rest, more;
    while ((more = rest + text_printf(number, sizeof number, "%zu", n)) != n)
        n = more;
    if (name.n > TAR_NAME) {
        tar_put(z, 'x', name, n);
        buf_printf(&z->out, "%zu path=%.*s\n", n, (int)name.n, (const char *)name.p);
        tar_zeros(z, tar_padding(n));
    }
    tar_put(z, '0', name, size);
}

/* ---- Blobs: a nonce, the ciphertext and its tag (AES-256-GCM, NIST SP 800-38D, no associated data) ---- */

enum { AES_KEY = 32, SHA_256_LEN = 32, SEAL_NONCE = 12, SEAL_TAG = 16, SEAL_EXTRA = SEAL_NONCE + SEAL_TAG,
       LAYER_COUNTER = 2 };

#define SEAL_MAX ((UINT64_C(1) << 36) - 32) /* bytes of plaintext under one nonce (SP 800-38D 5.2.1.1) */

#if CVMS_TLS
static const char seal_too_long[] = "over 64 GiB, the most that AES-GCM encrypts";

struct gcm {
    br_aes_gen_ctr_keys aes;
    br_gcm_context gcm;
    uint64_t len;                    /* bytes that it has gone through */
};

/* Sets a key up in the fastest version that the processor has. */
static void gcm_key(struct gcm *g, const uint8_t key[AES_KEY])
{
    const br_block_ctr_class *ctr[] = { br_aes_x86ni_ctr_get_vtable(), br_aes_pwr8_ctr_get_vtable(),
                                        sizeof(void *) < 8 ? &br_aes_ct_ctr_vtable : &br_aes_ct64_ctr_vtable };
    const br_ghash ghash[] = { br_ghash_pclmul_get(), br_ghash_pwr8_get(),
                               sizeof(void *) < 8 ? br_ghash_ctmul : br_ghash_ctmul64 };
    const br_block_ctr_class *aes = ctr[0] ? ctr[0] : ctr[1] ? ctr[1] : ctr[2];
    aes->init(&g->aes.vtable, key, AES_KEY);
    br_gcm_init(&g->gcm, &g->aes.vtable, ghash[0] ? ghash[0] : ghash[1] ? ghash[1] : ghash[2]);
    g->len = 0;
}

static void gcm_nonce(struct gcm *g, const uint8_t nonce[SEAL_NONCE])
{
    br_gcm_reset(&g->gcm, nonce, SEAL_NONCE);
    br_gcm_flip(&g->gcm);
}

/* En- or decrypts in place.  False: too much for one nonce. */
MUST_USE static bool gcm_run(struct gcm *g, bool encrypt, uint8_t *p, size_t n)
{
    if (n > SEAL_MAX - g->len)
        return false;
    br_gcm_run(&g->gcm, encrypt, p, n);
    g->len += n;
    return true;
}

/* A source that is being sealed, as a blob or as an image's layer. */
struct seal {
    struct gcm g;
    uint8_t edge[SEAL_TAG];          /* bytes around those of the source; edge[at] is the next one */
    size_t at, len;
    bool ended;                      /* behind the edge there is nothing more */
    uint64_t left;                   /* bytes of the source before the next edge */
    bool layer;                      /* the rest is a layer's alone */
    uint64_t rest;                   /* bytes of the source behind `left` */
    uint32_t crc, size;              /* of the tar; size modulo 2^32 */
    br_sha256_context *tar;          /* gets it too; NULL: nobody asks */
};

/* A blob that is being opened, piece by piece. */
struct unseal {
    struct gcm g;
    uint8_t nonce[SEAL_NONCE], last[SEAL_TAG]; /* last: what may be the tag */
    size_t nonce_len, last_len;
    bool damaged;
};

static void unseal_init(struct unseal *u, const uint8_t key[AES_KEY])
{
    *u = (struct unseal){ .nonce_len = 0 };
    gcm_key(&u->g, key);
}

/* Takes the next n bytes of a blob, p, and writes the plaintext of all but the last 16 so far to `out`, which has room
 * for n and is another place.  Returns its length; nobody may act on it before unseal_final has said that it is genuine. */
static size_t unseal_update(struct unseal *u, const uint8_t *p, size_t n, uint8_t *out)
{
    size_t k = min_size(n, SEAL_NONCE - u->nonce_len);
    memcpy(u->nonce + u->nonce_len, p, k);
    u->nonce_len += k;
    if (k && u->nonce_len == SEAL_NONCE)
        gcm_nonce(&u->g, u->nonce);
    p += k;
    n -= k;
    size_t all = u->last_len + n, len = all > SEAL_TAG ? all - SEAL_TAG : 0, old = min_size(len, u->last_len);
    memcpy(out, u->last, old);
    memcpy(out + old, p, len - old);
    memmove(u->last, u->last + old, u->last_len - old);
    memcpy(u->last + u->last_len - old, p + (len - old), n - (len - old));
    u->last_len = all - len;
    u->damaged |= !gcm_run(&u->g, false, out, len);
    return len;
}

/* The blob has ended.  Whether it is what was sealed with this key; the key is wiped. */
MUST_USE static bool unseal_final(struct unseal *u)
{
    bool ok = !u->damaged && u->nonce_len == SEAL_NONCE && u->last_len == SEAL_TAG &&
              br_gcm_check_tag(&u->g.gcm, u->last) == 1;
    wipe(u, sizeof *u);
    return ok;
}

/* Reads a key: 32 raw bytes in a file that is its owner's alone, or from stdin; another pipe may never have a writer. */
MUST_USE static bool seal_key_load(const char *path, uint8_t key[AES_KEY], struct err *e)
{
    struct buf raw = { 0 };
    struct stat st = { .st_mode = S_IFREG }, in;
    bool piped = stat(path, &st) == 0 && fstat(STDIN_FILENO, &in) == 0 && is_file(path, &in);
    if (!S_ISREG(st.st_mode) && !piped)
        return err_set(e, "%s: is not a regular file, nor stdin", path);
    if (S_ISREG(st.st_mode) && st.st_mode & 077)
        return err_set(e, "%s: others may read or write it: chmod 600 it, or make a new key if they have", path);
    bool ok = file_load(path, PEM_FILE_MAX, &raw, e);
    if (ok && raw.len != AES_KEY)
        ok = err_set(e, "%s: has " BYTES_FMT "; a key is 32 raw ones%s", path, BYTES_OF(raw.len),
                     raw.len / 2 == AES_KEY ? ", not hex: xxd -r -p turns it into them"
                     : raw.len == 44 || raw.len == 45 ? ", not base64: base64 -d turns it into them" : "");
    if (ok)
        memcpy(key, raw.p, AES_KEY);
    wipe_buf(&raw);
    return ok;
}
#else
struct unseal { int unused; };
#define unseal_init(u, key) ((void)(u), (void)(key))
#define unseal_update(u, p, n, out) ((void)(u), (void)(p), (void)(n), (void)(out), (size_t)0)
#define unseal_final(u) ((void)(u), false)
#endif

/* ---- Sources ---- */

enum source_form { SOURCE_FILE, SOURCE_ZIP, SOURCE_TAR };

/* The bytes of a file, or of an archive, to be pulled, sealed or not.  size is what was promised at the opening; a file
 * that grows, shrinks or is made up as it is read (/proc) gives another number of bytes.  Steps 0 to n - 1 are the tree's
 * n files; of a zip the next n are their central headers; the last step of an archive is its end. */
struct source {
    const char *path;            /* the caller's */
    int fd;                      /* the file that is being read; -1: none */
    enum source_form form;
    const char *name;            /* of a file in a tar */
    struct tree tree;            /* empty: a pipe, whose size is not known */
    struct zip zip;
    size_t step, at;             /* at: bytes of zip.out that are taken */
    struct seal *seal;           /* NULL: as it is */
    struct file_id id;
    uint64_t size;
};

/* May be called again, and after source_open has failed. */
static void source_close(struct source *s)
{
    if (s->fd >= 0)
        close(s->fd);
    pb_arena_free(&s->tree.arena);
    buf_free(&s->zip.out);
#if CVMS_TLS
    if (s->seal)
        wipe(s->seal, sizeof *s->seal);
#endif
    free(s->seal);
    s->seal = NULL;
    s->fd = -1;
}

/* The file of this step; NULL behind the last one. */
static struct tree_entry *source_entry(const struct source *s)
{
    return s->step < s->tree.n ? &s->tree.entry[s->step] : NULL;
}

static bool source_ended(const struct source *s)
{
    return s->step >= (s->form == SOURCE_ZIP ? 2 * s->tree.n + 1 : s->tree.n + (s->form == SOURCE_TAR));
}

/* What stands before a file of an archive. */
static void source_head(struct source *s, struct tree_entry *entry)
{
    entry->offset = s->zip.len;
    entry->size = entry->crc = 0;
    if (s->form == SOURCE_ZIP)
        zip_local_header(&s->zip, entry->name);
    else if (s->form == SOURCE_TAR)
        tar_header(&s->zip, bytes_of(*entry->name ? entry->name : s->name), entry->st.size);
}

/* Ends a step: what stands behind a file (entry), or behind all of them. */
static void source_tail(struct source *s, const struct tree_entry *entry)
{
    struct zip *z = &s->zip;
    size_t n = s->tree.n;
    if (s->form == SOURCE_TAR)
        tar_zeros(z, entry ? tar_padding(entry->size) : TAR_END);
    else if (s->form == SOURCE_ZIP && entry)
        zip_descriptor(z, entry);
    else if (s->form == SOURCE_ZIP && s->step < 2 * n)
        zip_central_header(z, &s->tree.entry[s->step - n]);
    else if (s->form == SOURCE_ZIP)
        zip_end(z, n);
    s->step++;
    if (s->step == n)
        z->start = z->len + z->out.len;
}

/* What is made counts as taken. */
static void source_taken(struct source *s)
{
    s->zip.len += s->zip.out.len;
    s->zip.out.len = s->at = 0;
}

/* The bytes of all, if every file still has the size that the walk found: all is made once but the files. */
static uint64_t source_measure(struct source *s)
{
    for (struct tree_entry *entry; !source_ended(s); source_taken(s)) {
        entry = source_entry(s);
        if (entry) {
            source_head(s, entry);
            s->zip.len += entry->size = entry->st.size;
        }
        source_tail(s, entry);
    }
    uint64_t len = s->zip.len;
    s->step = 0;
    s->zip.len = 0;
    return len;
}

/* Goes on when all that was made is taken: opens the next file, or ends the step. */
static bool source_next(struct source *s, struct err *e)
{
    struct tree_entry *entry = source_entry(s);
    struct stat st;
    source_taken(s);
    if (entry && s->fd < 0) {
        s->fd = file_open(entry->path, &st, e);
        if (s->fd < 0)
            return false;
        entry->mode = (uint32_t)st.st_mode & 07777;
        source_head(s, entry);
    } else {
        if (s->fd >= 0)
            close(s->fd);
        s->fd = -1;
        if (entry && s->form == SOURCE_TAR && entry->size != entry->st.size)
            return file_err(e, entry->path, "has changed while it was read");
        source_tail(s, entry);
    }
    return !s->zip.out.failed || file_err(e, s->path, "out of memory");
}

/* Opens a file or a folder; false: nothing is open.  A folder is a zip; with a name, which a file has in it, either is a
 * tar.  path and name are kept, not copied. */
MUST_USE static bool source_open_as(struct source *s, const char *path, const char *name, struct err *e)
{
    *s = (struct source){ .path = path, .fd = -1, .name = name, .tree.root = path };
    bool ok = tree_walk(&s->tree, &s->id, e), file = ok && s->tree.n && !*s->tree.entry->name;
    s->form = name ? SOURCE_TAR : file ? SOURCE_FILE : SOURCE_ZIP;
    if (ok && s->form == SOURCE_ZIP)
        zip_init(&s->zip);
    s->size = ok ? source_measure(s) : 0;
    if (file)
        ok = source_next(s, e);
    if (!ok)
        source_close(s);
    return ok;
}

#define source_open(s, path, e) source_open_as(s, path, NULL, e)

/* source_read, before any sealing. */
MUST_USE static ssize_t source_pull(struct source *s, uint8_t *p, size_t n, struct err *e)
{
    struct zip *z = &s->zip;
    for (size_t len = 0;;) {
        struct tree_entry *entry = source_entry(s);
        size_t made = min_size(n - len, z->out.len - s->at), want = n - len - made;
        if (made)
            memcpy(p + len, z->out.p + s->at, made);
        s->at += made;
        len += made;
        if (s->form == SOURCE_TAR && entry && entry->st.size - entry->size < want) /* no more than stands before it */
            want = (size_t)(entry->st.size - entry->size);
        ssize_t got = want && s->fd >= 0 ? file_read(s->fd, p + len, want) : 0;
        if (got < 0) {
            file_err(e, entry ? entry->path : s->path, strerror(errno));
            return -1;
        }
        if (entry && got) {
            if (s->form == SOURCE_ZIP)
                entry->crc = crc32_update(entry->crc, p + len, (size_t)got);
            entry->size += (uint64_t)got;
            z->len += (uint64_t)got;
        }
        len += (size_t)got;
        if (len == n || source_ended(s))
            return (ssize_t)len;
        if (!source_next(s, e))
            return -1;
    }
}

#if CVMS_TLS
/* From now on the source, of which nothing has been read, is the blob of its bytes, and size the blob's.  The caller wipes
 * the key, and uses a nonce once: a random one is.  False: the source is closed. */
MUST_USE static bool source_seal(struct source *s, const uint8_t key[AES_KEY], const uint8_t nonce[SEAL_NONCE],
                                 struct err *e)
{
    s->seal = s->size <= SEAL_MAX ? calloc(1, sizeof *s->seal) : NULL;
    if (!s->seal) {
        file_err(e, s->path, s->size <= SEAL_MAX ? "out of memory" : seal_too_long);
        source_close(s);
        return false;
    }
    gcm_key(&s->seal->g, key);
    gcm_nonce(&s->seal->g, nonce);
    memcpy(s->seal->edge, nonce, SEAL_NONCE);
    s->seal->len = SEAL_NONCE;
    s->seal->left = UINT64_MAX;       /* to its end, wherever that is */
    s->size += SEAL_EXTRA;
    return true;
}

/* What stands between the bytes of a layer's tar: the head of the next stored block (RFC 1951 3.2.4), or gzip's trailer
 * (RFC 1952 2.3.1), behind the n bytes that are in the edge already. */
static void layer_edge(struct seal *l, size_t n)
{
    uint8_t *to = l->edge + n;
    l->ended = l->rest == 0;
    if (l->ended) {
        to = put_le(put_le(to, 4, l->crc), 4, l->size);
    } else {
        l->left = l->rest < 0xffff ? l->rest : 0xffff;
        l->rest -= l->left;
        *to++ = l->rest == 0;
        to = put_le(put_le(to, 2, l->left), 2, ~l->left);
    }
    l->at = 0;
    l->len = (size_t)(to - l->edge);
    br_gcm_run(&l->g.gcm, 1, l->edge, l->len);
}

/* As source_seal, for a tar: it becomes gzip in stored blocks, encrypted, as ocicrypt's AES_256_CTR_HMAC_SHA256 without its
 * MAC.  That is AES-GCM without its tag, whose counter begins at LAYER_COUNTER (SP 800-38D 7.1). */
MUST_USE static bool source_layer(struct source *s, const uint8_t key[AES_KEY], const uint8_t nonce[SEAL_NONCE],
                                  br_sha256_context *tar, struct err *e)
{
    static const uint8_t gzip[] = { 0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff };
    uint64_t size = s->size;
    if (!source_seal(s, key, nonce, e))
        return false;
    s->size = sizeof gzip + size + (size + 0xfffe) / 0xffff * 5 + 8;
    if (s->size > SEAL_MAX) {
        source_close(s);
        return file_err(e, s->path, seal_too_long);
    }
    crc32_init();
    s->seal->layer = true;
    s->seal->rest = size;
    s->seal->size = (uint32_t)size;
    s->seal->tar = tar;
    memcpy(s->seal->edge, gzip, sizeof gzip);
    layer_edge(s->seal, sizeof gzip);
    return true;
}

/* source_read of a sealed source. */
static ssize_t seal_read(struct source *s, uint8_t *p, size_t n, struct err *e)
{
    struct seal *l = s->seal;
    for (size_t len = 0;;) {
        size_t k = min_size(n - len, l->len - l->at);
        memcpy(p + len, l->edge + l->at, k);
        l->at += k;
        len += k;
        if (len == n || l->ended)
            return (ssize_t)len;
        size_t want = l->left < n - len ? (size_t)l->left : n - len;
        ssize_t got = source_pull(s, p + len, want, e);
        if (got < 0)
            return -1;
        bool end = (size_t)got < want, changed = end && l->layer;
        if (l->layer)
            l->crc = crc32_update(l->crc, p + len, (size_t)got);
        if (l->tar)
            br_sha256_update(l->tar, p + len, (size_t)got);
        if (changed || !gcm_run(&l->g, true, p + len, (size_t)got)) {
            file_err(e, s->path, changed ? "has changed while it was read" : seal_too_long);
            return -1;
        }
        len += (size_t)got;
        l->left -= (uint64_t)got;
        if (end) {
            br_gcm_get_tag(&l->g.gcm, l->edge);
            l->at = 0;
            l->len = SEAL_TAG;
            l->ended = true;
        } else if (l->left == 0) {
            layer_edge(l, 0);
        }
    }
}
#else
#define source_seal(s, key, nonce, e) \
    (source_close(s), err_set(e, "this cvms was built without TLS (make TLS=0), and so without AES; build it with TLS"))
#define seal_read source_pull
#endif

/* Fills p; fewer than n bytes, or 0, only at the end.  -1: e has the reason, and the source is of no more use. */
MUST_USE static ssize_t source_read(struct source *s, uint8_t *p, size_t n, struct err *e)
{
    return s->seal ? seal_read(s, p, n, e) : source_pull(s, p, n, e);
}

/* ---- Images: a manifest, a config and one layer (OCI image specification 1.0), the layer encrypted or not ---- */

enum image_part { IMAGE_MANIFEST, IMAGE_CONFIG, IMAGE_LAYER, IMAGE_PARTS };

static const char *const image_types[IMAGE_PARTS] = {
    "application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.config.v1+json",
    "application/vnd.oci.image.layer.v1.tar",
};

/* What one input is as an image.  The first members say how it is to be made, the others what it has become. */
struct image {
    const char *what, *entry;        /* the beginning of its name; a file's name in the layer */
    const uint8_t *key;              /* NULL: plain.  It and the names are the caller's */
    uint8_t nonce[SEAL_NONCE];
    uint64_t size;                   /* of the layer */
    uint8_t mac[SHA_256_LEN];
    char digest[IMAGE_PARTS][sizeof "sha256:" + 2 * SHA_256_LEN];
    struct blob *text[IMAGE_LAYER];  /* manifest and config; NULL: they are not made yet */
    char name[64];                   /* ends in a part of the layer's digest: no other content ever has it */
    bool reading;                    /* source, for the digests */
    struct source source;
#if CVMS_TLS
    struct {                         /* of the layer as it is sent, and of the tar in it */
        br_sha256_context layer, tar;
        br_hmac_context mac;
    } digests;
#endif
};

#if CVMS_TLS
/* Which part of the image this is, behind its name; IMAGE_PARTS: none. */
static enum image_part image_part(const struct image *im, struct bytes path)
{
    static const char *const folders[IMAGE_PARTS] = { "/manifests/", "/blobs/", "/blobs/" };
    for (int part = 0; part < IMAGE_PARTS && im->text[IMAGE_MANIFEST]; part++) {
        struct bytes name = bytes_start(path, folders[part]) ? bytes_from(path, strlen(folders[part])) : BYTES("");
        if (bytes_eq(name, bytes_of(im->digest[part])) || (part == IMAGE_MANIFEST && bytes_eq(name, BYTES("latest"))))
            return (enum image_part)part;
    }
    return im->text[IMAGE_MANIFEST] ? IMAGE_PARTS : IMAGE_LAYER; /* which has changed, whatever it was */
}

/* Undoes what has been made, or begun. */
static void image_free(struct image *im)
{
    if (im->reading)
        source_close(&im->source);
    wipe(&im->digests, sizeof im->digests);
    for (size_t i = 0; i < PB_COUNT(im->text); i++)
        blob_unref(im->text[i]);
    *im = (struct image){ .what = im->what, .entry = im->entry, .key = im->key };
}

/* Opens the layer for one reader, who gets the bytes that the digests are of if the input is what it was. */
MUST_USE static bool image_open(const struct image *im, const char *path, struct source *s, struct err *e)
{
    if (!im->text[IMAGE_MANIFEST])
        return file_err(e, path, "has changed since its digest was made");
    return source_open_as(s, path, im->entry, e) && (!im->key || source_layer(s, im->key, im->nonce, NULL, e));
}

static void digest_text(char to[], const br_sha256_context *h)
{
    uint8_t digest[br_sha256_SIZE];
    br_sha256_out(h, digest);
    memcpy(to, "sha256:", 7);
    hex_text(to + 7, digest, sizeof digest);
}

/* Makes a blob of a text, and its digest. */
static bool image_text(struct image *im, enum image_part part, struct buf *text)
{
    br_sha256_context h;
    struct blob *b = text->failed ? NULL : blob_copy((struct bytes){ text->p, text->len });
    br_sha256_init(&h);
    br_sha256_update(&h, text->p, text->len);
    digest_text(im->digest[part], &h);
    buf_free(text);
    im->text[part] = b;
    return b != NULL;
}

/* Where a layer's MAC and nonce stand in the manifest, as ocicrypt wants them; "x" is the wrapped key, as which the
 * unwrapping one needs nothing. */
static void image_annotations(const struct image *im, struct buf *out)
{
    uint8_t nonce[16] = { [15] = LAYER_COUNTER }, text[200];
    struct buf options = buf_fixed(text, sizeof text);
    memcpy(nonce, im->nonce, sizeof im->nonce);
    buf_puts(&options, "{\"cipher\":\"AES_256_CTR_HMAC_SHA256\",\"hmac\":\"");
    pb_base64(&options, (struct bytes){ im->mac, sizeof im->mac });
    buf_puts(&options, "\",\"cipheroptions\":{\"nonce\":\"");
    pb_base64(&options, (struct bytes){ nonce, sizeof nonce });
    buf_puts(&options, "\"}}");
    buf_puts(out, ",\"annotations\":{\"org.opencontainers.image.enc.keys.provider.attestation-agent\":\"eA==\","
                  "\"org.opencontainers.image.enc.pubopts\":\"");
    pb_base64(out, (struct bytes){ options.p, options.len });
    buf_puts(out, "\"}");
}

/* Config and manifest of a layer whose digest is made; tar is that of what is in it.  False without memory. */
static bool image_describe(struct image *im, const char *tar)
{
    struct buf b = { 0 };
    char path[NAME_MAX + 2];
    size_t n = text_printf(path, sizeof path, "/%s", im->entry);
    buf_puts(&b, "{\"architecture\":\"amd64\",\"os\":\"linux\",\"config\":{\"Entrypoint\":[");
    pb_json_string(&b, (struct bytes){ (uint8_t *)path, n });
    buf_printf(&b, "]},\"rootfs\":{\"type\":\"layers\",\"diff_ids\":[\"%s\"]}}", tar);
    if (!image_text(im, IMAGE_CONFIG, &b))
        return false;
    buf_printf(&b, "{\"schemaVersion\":2,\"mediaType\":\"%s\",\"config\":{\"mediaType\":\"%s\",\"digest\":\"%s\",\"size\":%zu},"
               "\"layers\":[{\"mediaType\":\"%s%s\",\"digest\":\"%s\",\"size\":%llu", image_types[IMAGE_MANIFEST],
               image_types[IMAGE_CONFIG], im->digest[IMAGE_CONFIG], im->text[IMAGE_CONFIG]->n, image_types[IMAGE_LAYER],
               im->key ? "+gzip+encrypted" : "", im->digest[IMAGE_LAYER], (unsigned long long)im->size);
    if (im->key)
        image_annotations(im, &b);
    buf_puts(&b, "}]}");
    text_printf(im->name, sizeof im->name, "%s-%.16s", im->what, im->digest[IMAGE_LAYER] + 7);
    return image_text(im, IMAGE_MANIFEST, &b);
}

/* Begins to read the layer for its digests. */
static bool image_begin(struct image *im, const char *path, struct err *e)
{
    br_hmac_key_context key;
    image_free(im);
    br_sha256_init(&im->digests.layer);
    br_sha256_init(&im->digests.tar);
    im->reading = source_open_as(&im->source, path, im->entry, e);
    if (!im->reading || !im->key)
        return im->reading;
    br_hmac_key_init(&key, &br_sha256_vtable, im->key, AES_KEY);
    br_hmac_init(&im->digests.mac, &key, 0);
    wipe(&key, sizeof key);
    return random_fill(im->nonce, sizeof im->nonce)
               ? source_layer(&im->source, im->key, im->nonce, &im->digests.tar, e)
               : file_err(e, path, "the operating system gives no random numbers");
}

/* The layer has been read. */
static bool image_end(struct image *im, const char *path, struct err *e)
{
    char tar[sizeof im->digest[0]];
    digest_text(im->digest[IMAGE_LAYER], &im->digests.layer);
    digest_text(tar, im->key ? &im->digests.tar : &im->digests.layer);
    if (im->key)
        br_hmac_out(&im->digests.mac, im->mac);
    source_close(&im->source);
    wipe(&im->digests, sizeof im->digests);
    im->reading = false;
    return image_describe(im, tar) || file_err(e, path, "out of memory");
}

/* Reads a piece of an input for its image's digests.  1: there is more; 0: the image is made; -1: e has the reason. */
static int image_step(struct image *im, const char *path, struct err *e)
{
    uint8_t piece[FILE_READ];
    ssize_t n = im->reading || image_begin(im, path, e) ? source_read(&im->source, piece, sizeof piece, e) : -1;
    if (n < 0 || (n == 0 && !image_end(im, path, e))) {
        image_free(im);
        return -1;
    }
    if (n == 0)
        return 0;
    im->size += (uint64_t)n;
    br_sha256_update(&im->digests.layer, piece, (size_t)n);
    if (im->key)
        br_hmac_update(&im->digests.mac, piece, (size_t)n);
    return 1;
}
#else
#define image_free(im) ((void)(im))
#define image_part(im, path) ((void)(im), (void)(path), IMAGE_PARTS)
#define image_open(im, path, s, e) ((void)(im), (void)(path), (void)(s), (void)(e), false)
#define image_step(im, path, e) ((void)(im), (void)(path), (void)(e), 0)
#endif

/* ---- Many paths at once ---- */

/* One path to hash, and the answer: hash, size and id if ok, else why, to be freed (NULL: out of memory). */
struct checksum {
    const char *path;
    const struct part *part;     /* whose it is, in a manifest */
    char *why;
    bool ok;
    uint64_t size;               /* of what is hashed: of a folder, its zip */
    uint8_t hash[32];
    struct file_id id;
    unsigned version;            /* of the first manifest that had this hash */
    struct image *image;         /* to be made as well, by whom it is kept; NULL: none */
};

/* A source on its way into its hash; c is NULL when the lane is free.  data[at] to data[len] waits. */
struct lane {
    struct checksum *c;
    struct source source;
    size_t at, len;
    struct sha3_256 h;
    uint8_t data[CHECKSUM_READ];
};

/* Paths that are being hashed, files several at once where the processor gains by it. */
struct checksums {
    struct checksum *c;
    size_t n, next, imaged;      /* next: the first that no lane has taken up; imaged: whose image is made, or in hand */
    struct lane *lanes;
    unsigned width, features;
    uint64_t done;               /* bytes */
};

/* Sees to it that a whole block waits, of the lane's path or of the next one, which it takes up.  A path that has ended,
 * or can't be read, is done.  False: there is no path left. */
static bool lane_fill(struct checksums *j, struct lane *l)
{
    struct err e;
    for (ssize_t n = 0; l->c || j->next < j->n;) {
        struct checksum *c = l->c ? l->c : &j->c[j->next++];
        if (!l->c && source_open(&l->source, c->path, &e)) {
            l->c = c;
            c->id = l->source.id;
            l->at = l->len = sizeof l->data;
            sha3_256_init(&l->h, j->features);
        } else if (!l->c) {
            c->why = strdup(e.text);
        } else if (l->len - l->at >= SHA3_256_RATE) {
            return true;
        } else if (l->len == sizeof l->data && (n = source_read(&l->source, l->data, sizeof l->data, &e)) >= 0) {
            l->at = 0;
            l->len = (size_t)n;
            c->size += (uint64_t)n;
        } else {
            c->ok = n >= 0;
            c->why = c->ok ? NULL : strdup(e.text);
            sha3_256_update(&l->h, l->data + l->at, l->len - l->at);
            sha3_256_final(&l->h, c->hash);
            source_close(&l->source);
            l->c = NULL;
            n = 0;
        }
    }
    return false;
}

/* Begins with n paths; all members of each but path are set.  False without memory. */
static bool checksums_start(struct checksums *j, struct checksum *c, size_t n)
{
    unsigned features = n > 1 ? sha3_features() : 0, most = sha3_256_lanes(features);
    *j = (struct checksums){ .c = c, .n = n, .features = features, .width = n < most ? (unsigned)n : most };
    for (size_t i = 0; i < n; i++)
        c[i] = (struct checksum){ .path = c[i].path, .part = c[i].part, .image = c[i].image };
    j->lanes = n ? calloc(j->width, sizeof *j->lanes) : NULL;
    return j->lanes || n == 0;
}

/* Reads a piece of the next input that has its checksum and is to be an image.  False: there is none. */
static bool images_step(struct checksums *j)
{
    struct err e;
    for (; j->imaged < j->n; j->imaged++) {
        struct checksum *c = &j->c[j->imaged];
        int more = c->ok && c->image ? image_step(c->image, c->path, &e) : 0;
        if (more > 0)
            return true;
        if (more == 0)
            continue;
        c->ok = false;
        c->why = strdup(e.text);
    }
    return false;
}

/* Hashes a piece of each path in hand, CHECKSUM_READ bytes at most; a lane whose source ends takes up the next path.
 * Images come after all checksums.  False: all is done. */
static bool checksums_step(struct checksums *j)
{
    struct lane *busy[CHECKSUM_LANES];
    struct sha3_256 *h[CHECKSUM_LANES];
    const uint8_t *data[CHECKSUM_LANES];
    size_t step = CHECKSUM_READ;
    unsigned some = 0;
    for (unsigned i = 0; i < j->width; i++) {
        struct lane *l = &j->lanes[i];
        if (!lane_fill(j, l))
            continue;
        step = min_size(step, (l->len - l->at) / SHA3_256_RATE * SHA3_256_RATE);
        busy[some] = l;
        h[some] = &l->h;
        data[some++] = l->data + l->at;
    }
    if (some)
        sha3_256_absorb_lanes(h, data, step / SHA3_256_RATE, some);
    for (unsigned i = 0; i < some; i++)
        busy[i]->at += step;
    j->done += some * step;
    return some || images_step(j);
}

/* Ends the hashing, also before all is done: the rest is not ok and has no reason. */
static void checksums_free(struct checksums *j)
{
    for (unsigned i = 0; j->lanes && i < j->width; i++)
        if (j->lanes[i].c)
            source_close(&j->lanes[i].source);
    free(j->lanes);
    j->lanes = NULL;
}

/* How far the hashing is. */
static size_t checksums_text(const struct checksums *j, char *out, size_t cap)
{
    return text_printf(out, cap, "cvms: hashing: %llu MB, %zu of %zu inputs begun ",
                       (unsigned long long)(j->done / 1000000), j->next, j->n);
}

/* Hashes n paths before the loop runs, and shows on a terminal what takes over a second, each time over what was shown
 * before; at the end nothing stays.  Sets all members but path of each. */
static void checksum_files(struct checksum *c, size_t n)
{
    struct checksums j;
    char line[80] = "\r";
    size_t shown = 0;
    int64_t next = isatty(STDERR_FILENO) ? clock_ms(CLOCK_MONOTONIC) + PROGRESS_MS : INT64_MAX;
    if (checksums_start(&j, c, n))
        while (checksums_step(&j))
            if (next < INT64_MAX && clock_ms(CLOCK_MONOTONIC) >= next) {
                shown = 1 + checksums_text(&j, line + 1, sizeof line - 1);
                fd_write(STDERR_FILENO, line, shown, 0);
                next = clock_ms(CLOCK_MONOTONIC) + PROGRESS_STEP_MS;
            }
    memset(line + 1, ' ', shown);
    line[shown] = '\r';
    fd_write(STDERR_FILENO, line, shown ? shown + 1 : 0, 0);
    checksums_free(&j);
}

/* Why a path has no checksum, until the next call with its checksum. */
static const char *checksum_why(const struct checksum *c)
{
    return c->why ? c->why : "out of memory";
}

/* The identity of what stands at the path now, for which no content is read.  Zeros if it can't be looked at. */
static struct file_id path_id(const char *path)
{
    struct err ignored;
    struct tree t = { .root = path };
    struct file_id id = { { 0 } };
    tree_walk(&t, &id, &ignored);
    pb_arena_free(&t.arena);
    return id;
}

/* Whether the path no longer is what had this identity.  What can't be looked at has one: it changes once. */
static bool checksum_changed(const char *path, const struct file_id *id)
{
    struct file_id now = path_id(path);
    return memcmp(&now, id, sizeof now) != 0;
}

/* ---- cvms checksum ---- */

/* "HASH  PATH", as sha256sum writes it: a path with a newline, carriage return or backslash is escaped, and the line
 * begins with \. */
static void checksum_line(struct buf *b, const struct checksum *c, bool base64)
{
    static const char escaped[] = "\n\r\\", letters[] = "nr\\";
    char hex[2 * sizeof c->hash + 1];
    hex_text(hex, c->hash, sizeof c->hash);
    if (strpbrk(c->path, escaped))
        buf_putc(b, '\\');
    if (base64)
        pb_base64(b, (struct bytes){ c->hash, sizeof c->hash });
    buf_printf(b, "%s  ", base64 ? "" : hex);
    for (const char *p = c->path; *p; p++) {
        const char *at = strchr(escaped, *p);
        if (at)
            buf_putc(b, '\\');
        buf_putc(b, at ? letters[at - escaped] : *p);
    }
    buf_putc(b, '\n');
}

/* Prints the checksum of each path, in order, and says on stderr which failed.  Returns the exit status. */
static int cmd_checksum(struct mistakes *r, bool base64, const char *const *paths, size_t n)
{
    struct checksum *c = or_exit(calloc(n, sizeof *c));
    struct buf lines = { 0 };
    for (size_t i = 0; i < n; i++)
        c[i].path = paths[i];
    checksum_files(c, n);
    for (size_t i = 0; i < n; i++) {
        if (c[i].ok)
            checksum_line(&lines, &c[i], base64);
        else
            tell(r, START, "checksum: %s", checksum_why(&c[i]));
        free(c[i].why);
    }
    if (!buf_write(&lines, STDOUT_FILENO))
        tell(r, START, "checksum: stdout: %s", strerror(errno));
    free(c);
    return r->start;
}

/* ---- cvms encrypt, cvms decrypt ---- */

#if CVMS_TLS
/* What is written: to a file beside `path` that gets its name when all is right, or to what can't be renamed. */
struct output {
    int fd;
    const char *path;
    char *real, *part;           /* of a file: what a link leads to (NULL: not there yet), and its name until it is whole */
};

static bool output_err(const struct output *w, struct err *e)
{
    return err_set(e, "%s: can't be written: %s", w->part ? w->part : w->path, strerror(errno));
}

/* A source of a file or folder, or of stdin ("-"), whose size is not known. */
MUST_USE static bool source_open_any(struct source *s, const char *path, struct err *e)
{
    if (strcmp(path, "-") != 0)
        return source_open(s, path, e);
    *s = (struct source){ .path = "stdin", .fd = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3) };
    return s->fd >= 0 || file_err(e, s->path, strerror(errno));
}

/* Whether a path leads, or would lead, to a place in this folder, at any depth. */
static bool is_within(const char *path, const char *folder)
{
    struct stat st;
    char up[PATH_MAX], *real = realpath(path, NULL), *slash;
    bool there = stat(folder, &st) == 0, within = false;
    path_folder(up, path);
    real = real ? real : realpath(up, NULL);
    while (there && real && !within && (slash = strrchr(real, '/')) != NULL) {
        within = is_file(real, &st);
        *slash = 0;
    }
    free(real);
    return within;
}

/* Opens a file beside the one that is, or will be, at w->path. */
static bool output_part(struct output *w, const struct stat *there, struct err *e)
{
    w->real = there ? realpath(w->path, NULL) : NULL;
    w->part = or_exit(part_path(w->real ? w->real : w->path));
    output_forget(w->part);           /* of a run that was killed */
    w->fd = open(w->part, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, there ? 0600 : 0666);
    if (w->fd < 0)
        return output_err(w, e);
    unfinished[0] = w->part;
    return !there || fchmod(w->fd, there->st_mode & 0777) == 0 || output_err(w, e);
}

/* Opens OUT, which may not be IN or the key; streams: it may be a pipe or stdout ("-"). */
MUST_USE static bool crypt_output(struct output *w, const struct options *o, bool streams, struct err *e)
{
    struct stat st;
    const char *path = o->args[1], *in = o->args[0], *key = o->key ? o->key : o->new_key;
    bool standard = strcmp(path, "-") == 0, there = !standard && stat(path, &st) == 0;
    *w = (struct output){ .fd = -1, .path = path };
    if (there && S_ISDIR(st.st_mode))
        return err_set(e, "%s: is a folder; name a file in it", path);
    if (there && (is_file(in, &st) || is_file(key, &st)))
        return err_set(e, "%s: is the %s as well; name another file", path, is_file(in, &st) ? "input" : "key");
    if (there && access(path, W_OK) != 0)
        return output_err(w, e);
    if (!standard && is_within(path, in))
        return err_set(e, "%s: is in the folder that is packed; name a file elsewhere", path);
    if (!standard && path_is_standard(path) < 0 && (!there || S_ISREG(st.st_mode)))
        return output_part(w, there ? &st : NULL, e);
    if (!streams)
        return err_set(e, "%s: only a file can be written: until its end nothing shows that a blob is genuine", path);
    w->fd = standard ? fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3) : output_open(path);
    return (w->fd >= 0 || output_err(w, e)) &&
           (!isatty(w->fd) || err_set(e, "%s: is a terminal, which a blob does not suit; name a file", path));
}

/* Gives a whole file its name, or leaves none.  Frees w. */
static bool output_end(struct output *w, bool ok, struct err *e)
{
    if (w->fd >= 0 && close(w->fd) != 0 && ok)
        ok = output_err(w, e);
    if (w->part && ok && rename(w->part, w->real ? w->real : w->path) != 0)
        ok = err_set(e, "%s: can't be written: %s", w->path, strerror(errno));
    if (w->part && !ok && unfinished[0])
        unlink(w->part);
    unfinished[0] = NULL;
    free(w->part);
    free(w->real);
    return ok;
}

/* Makes a key in a new file, its owner's alone. */
static bool seal_key_new(const char *path, uint8_t key[AES_KEY], struct err *e)
{
    if (!random_fill(key, AES_KEY))
        return err_set(e, "the operating system gives no random numbers: %s", strerror(errno));
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return err_set(e, "%s: %s", path, errno == EEXIST ? "is there already, and what it has encrypted may need it; "
                       "encrypt with -key, or name a new file" : strerror(errno));
    unfinished[1] = path;
    bool ok = fd_write(fd, key, AES_KEY, -1);
    int error = errno;
    if (close(fd) != 0 && ok)
        error = errno, ok = false;
    return ok || err_set(e, "%s: can't be written: %s", path, strerror(error));
}

enum { CRYPT_PIECE = 1 << 16 };

/* Writes all of a sealed source, whose size must be as it was if it was known, or with a key what is in a blob. */
static bool crypt_copy(struct source *s, const uint8_t *key, const struct output *w, struct err *e)
{
    uint8_t piece[CRYPT_PIECE], plain[CRYPT_PIECE];
    struct unseal u;
    uint64_t len = 0;
    bool ok = true;
    if (key)
        unseal_init(&u, key);
    for (ssize_t n; ok && (n = source_read(s, piece, sizeof piece, e)) != 0; len += (uint64_t)n) {
        size_t made = n > 0 && key ? unseal_update(&u, piece, (size_t)n, plain) : (size_t)n;
        ok = n > 0 && (fd_write(w->fd, key ? plain : piece, made, -1) || output_err(w, e));
    }
    if (key && !unseal_final(&u))
        return ok && file_err(e, s->path, "is no blob that this key has sealed, or is damaged: its tag is wrong; "
                                          "nothing is written");
    return ok && (key || !s->tree.root || len == s->size || file_err(e, s->path, "has changed while it was read"));
}

/* What is to be seen before anything is written. */
static bool crypt_check(const struct source *s, bool encrypt, struct err *e)
{
    if (encrypt || !s->tree.root)
        return true;
    return s->form == SOURCE_ZIP ? file_err(e, s->path, "is a folder; name a blob that cvms encrypt has made")
         : s->size < SEAL_EXTRA ? file_err(e, s->path, "is no blob: it has not even room for a nonce and a tag, 28 bytes")
         : s->size <= SEAL_MAX + SEAL_EXTRA || file_err(e, s->path, seal_too_long);
}

static bool crypt_run(const struct options *o, bool encrypt, uint8_t key[AES_KEY], struct err *e)
{
    struct source s = { .fd = -1 };
    struct output w = { .fd = -1 };
    struct err why;
    uint8_t nonce[SEAL_NONCE];
    bool ok = source_open_any(&s, o->args[0], e) && crypt_check(&s, encrypt, e);
    if (ok && o->key)
        ok = seal_key_load(o->key, key, &why) || err_set(e, "-key: %s", why.text);
    else if (ok)
        ok = seal_key_new(o->new_key, key, &why) || err_set(e, "-new-key: %s", why.text);
    if (ok && encrypt)
        ok = (random_fill(nonce, sizeof nonce) || err_set(e, "no random numbers: %s", strerror(errno))) &&
             source_seal(&s, key, nonce, e);
    ok = ok && crypt_output(&w, o, encrypt, e) && crypt_copy(&s, encrypt ? NULL : key, &w, e);
    bool made = unfinished[1] != NULL;
    if (ok)
        unfinished[1] = NULL;         /* once OUT has its name, the key is needed */
    ok = output_end(&w, ok, e);
    if (made && !ok)
        unlink(o->new_key);
    unfinished[1] = NULL;
    source_close(&s);
    return ok;
}

/* cvms encrypt and cvms decrypt.  Returns the exit status. */
static int cmd_crypt(const struct options *o, struct mistakes *r)
{
    bool encrypt = o->command == CMD_ENCRYPT;
    const char *name = encrypt ? "encrypt" : "decrypt";
    uint8_t key[AES_KEY];
    struct err e;
    if (o->arg_count != 2)
        tell(r, USAGE, "%s: name two files, IN and OUT, not %zu", name, o->arg_count);
    if (!o->key == !o->new_key)
        tell(r, USAGE, encrypt ? "encrypt: give either -key FILE or -new-key FILE" : "decrypt: give -key FILE");
    if (r->usage)
        return 2;
    struct sigaction sa = { .sa_handler = on_signal_end };
    sigemptyset(&sa.sa_mask);
    sigaction(SIGHUP, &sa, NULL);
    sigaction(SIGPIPE, &sa, NULL);
    if (!crypt_run(o, encrypt, key, &e))
        tell(r, START, "%s: %s", name, e.text);
    wipe(key, sizeof key);
    return r->start;
}
#else
static int cmd_crypt(const struct options *o, struct mistakes *r)
{
    struct err e;
    struct source none = { .fd = -1 };
    if (!source_seal(&none, NULL, NULL, &e))
        tell(r, START, "%s: %s", o->command == CMD_ENCRYPT ? "encrypt" : "decrypt", e.text);
    return 1;
}
#endif

/* ==== 14. Public keys ==============================================================================================
 * Owns: the -public-key-path file, and what to do about one that is something else.
 * Never: looks past the first PEM block of the file.
 */

#define KEY_FROM_PRIVATE "openssl pkey -in PRIVATE.pem -pubout"
#define KEY_ANEW "openssl genpkey -algorithm ed25519 -out new.pem && openssl pkey -in new.pem -pubout"

/* What stands where a public key should, and the command that makes one of it; @ is the file.  sign: the end or beginning
 * of a PEM block's label, the type in DER, or the beginning of a text; the first that fits. */
static const struct {
    const char *sign, *what, *make;
} key_mistakes[] = {
    { "RSA PUBLIC KEY", "a PKCS#1 RSA public key", "openssl rsa -RSAPublicKey_in -in @ -pubout" },
    { "OPENSSH ED25519", "an OpenSSH Ed25519 private key, which ssh-keygen cannot turn into PEM", KEY_ANEW },
    { "OPENSSH PRIVATE KEY", "an OpenSSH private key", "ssh-keygen -e -m PKCS8 -f @" },
    { "PRIVATE KEY", "a private key, to be kept to yourself", "openssl pkey -in @ -pubout" },
    { "EC PARAMETERS", "the curve that comes before an EC private key", "openssl pkey -in @ -pubout" },
    { "CERTIFICATE REQUEST", "a certificate request", "openssl req -in @ -pubkey -noout" },
    { "CERTIFICATE", "a certificate", "openssl x509 -in @ -pubkey -noout" },
    { "SubjectPublicKeyInfo", "a public key in binary DER", "openssl pkey -pubin -inform DER -in @" },
    { "RSAPublicKey", "a PKCS#1 RSA public key in binary DER", "openssl rsa -RSAPublicKey_in -inform DER -in @ -pubout" },
    { "ssh-ed25519", "an OpenSSH Ed25519 public key, which ssh-keygen cannot turn into PEM", KEY_ANEW },
    { "ssh-", "an OpenSSH public key", "ssh-keygen -e -m PKCS8 -f @" },
    { "ecdsa-sha2-", "an OpenSSH public key", "ssh-keygen -e -m PKCS8 -f @" },
    { "\xff\xfe", "UTF-16 text", "iconv -f UTF-16 -t ASCII @" },
    { "\xef\xbb\xbf", "text with a byte order mark before it", "tail -c +4 @" },
};
enum { KEY_SIGN = sizeof "ssh-ed25519" - 1 }; /* bytes of a text that are looked at */

/* A command in which @ is a path, as a shell word. */
static void put_command(struct buf *out, const char *command, const char *path)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./+=:,@%";
    size_t n = strcspn(command, "@");
    buf_put(out, command, n);
    if (!command[n])
        return;
    buf_puts(out, *path == '-' ? "./" : "");      /* not to be taken for an option */
    bool quoted = !*path || path[strspn(path, plain)];
    buf_puts(out, quoted ? "'" : "");
    for (; *path; path++)
        buf_puts(out, *path == '\'' ? "'\\''" : (char[]){ *path, 0 });
    buf_printf(out, "%s%s", quoted ? "'" : "", command + n + 1);
}

/* "PATH: WHAT" and the command; false. */
static bool key_err(struct err *e, const char *path, const char *what, const char *command)
{
    struct buf text = buf_fixed(e->text, sizeof e->text - 1);
    buf_printf(&text, "%s: %s with: ", path, what);
    put_command(&text, command, path);
    e->text[text.len] = 0;
    return false;
}

/* True: nothing that is known has this sign. */
static bool key_mistake(const char *path, struct bytes sign, struct err *e)
{
    char what[200];
    for (size_t i = 0; i < PB_COUNT(key_mistakes); i++) {
        struct bytes behind = bytes_behind(sign, bytes_of(key_mistakes[i].sign));
        if (!behind.p || (behind.n && !bytes_start(sign, key_mistakes[i].sign)))
            continue;
        text_printf(what, sizeof what, "is %s, not a public key in PEM (\"BEGIN PUBLIC KEY\"); make one",
                    key_mistakes[i].what);
        return key_err(e, path, what, key_mistakes[i].make);
    }
    return true;
}

/* A file without any PEM block. */
static bool text_mistake(const char *path, struct bytes text, struct err *e)
{
    struct bytes sign = { text.p, min_size(text.n, KEY_SIGN) };
    if (text.n == 0)
        return key_err(e, path, "is empty; make a public key", KEY_FROM_PRIVATE);
    return key_mistake(path, der_is_spki(text)           ? BYTES("SubjectPublicKeyInfo")
                             : der_is_pkcs1_public(text) ? BYTES("RSAPublicKey")
                                                         : sign, e) &&
           key_err(e, path, "has no PEM block (\"-----BEGIN PUBLIC KEY-----\"); make one from the private key",
                   KEY_FROM_PRIVATE);
}

/* Judges a public key file's text; its DER is left in `der`. */
MUST_USE static bool public_key_parse(const char *path, struct bytes text, struct buf *der, struct err *e)
{
    char label[PEM_LABEL];
    struct bytes rest = text;
    int got = pem_next(&rest, label, der);
    struct bytes key = { der->p, der->len };
    if (got == 0)
        return text_mistake(path, text, e);
    if (der->failed)
        return err_set(e, "%s: no memory for the key", path);
    bool ed25519 = strcmp(label, "OPENSSH PRIVATE KEY") == 0 && bytes_contain(key, "ssh-ed25519");
    if (strcmp(label, PEM_PUBLIC_KEY) != 0)
        return key_mistake(path, ed25519 ? BYTES("OPENSSH ED25519") : bytes_of(label), e) &&
               err_set(e, "%s: the first PEM block is \"%s\", not \"PUBLIC KEY\"; make one from the private key with: "
                       KEY_FROM_PRIVATE, path, label);
    if (got < 0 || (!der_is_spki(key) && !der_is_pkcs1_public(key)))
        return key_err(e, path, "its PEM block is damaged or cut off; make it again from the private key",
                       KEY_FROM_PRIVATE);
    return der_is_spki(key) || key_err(e, path, "is labelled PUBLIC KEY but holds a PKCS#1 RSA key; make it right",
                                       "sed 's/PUBLIC KEY/RSA PUBLIC KEY/' @ | openssl rsa -RSAPublicKey_in -pubout");
}

/* Reads the DER inside the first PEM block of the file, which must be a SubjectPublicKeyInfo (anything else makes the
 * agent answer with an error).  `der` is empty before; the caller frees it, on failure too. */
MUST_USE static bool public_key_load(const char *path, struct buf *der, struct err *e)
{
    struct buf text = { 0 };
    bool ok = file_load(path, PEM_FILE_MAX, &text, e) &&
              public_key_parse(path, (struct bytes){ text.p, text.len }, der, e);
    buf_free(&text);
    return ok;
}

/* ---- The users' private key: what it signs is all that an agent knows them by ---- */

#if CVMS_TLS
struct user_key {
    br_skey_decoder_context decoder;  /* of a key that was read */
    br_ec_private_key made;           /* and one that was made, with its number */
    uint8_t x[BR_EC_KBUF_PRIV_MAX_SIZE];
    const br_rsa_private_key *rsa;
    const br_ec_private_key *ec;
    struct buf rsa_public;            /* RSAPublicKey: BearSSL can't tell the exponent of every key */
};

static void user_key_free(struct user_key *k)
{
    if (!k)
        return;
    buf_free(&k->rsa_public);
    wipe(k, sizeof *k);
    free(k);
}

/* Makes what stands in `out` from `from` on the contents of an element (X.690 8.1). */
static void der_wrap(struct buf *out, size_t from, int tag)
{
    size_t n = out->len - from, head = n < 128 ? 2 : n < 256 ? 3 : 4;
    uint8_t *p = buf_room(out, head);
    if (!p)
        return;
    p = memmove(out->p + from + head, out->p + from, n);
    *--p = (uint8_t)n;
    if (n >= 256)
        *--p = (uint8_t)(n >> 8);
    if (n >= 128)
        *--p = n >= 256 ? 0x82 : 0x81;
    *--p = (uint8_t)tag;
    out->len += head;
}

static void der_put(struct buf *out, int tag, struct bytes in)
{
    size_t from = out->len;
    buf_put(out, in.p, in.n);
    der_wrap(out, from, tag);
}

/* RSAPublicKey (RFC 8017 A.1.1), of two numbers without leading zeros. */
static void der_put_rsa(struct buf *out, const struct bytes number[2])
{
    size_t all = out->len;
    for (int i = 0; i < 2; i++) {
        size_t from = out->len;
        if (number[i].n && number[i].p[0] >= 0x80)
            buf_putc(out, 0);         /* it is positive */
        buf_put(out, number[i].p, number[i].n);
        der_wrap(out, from, DER_INTEGER);
    }
    der_wrap(out, all, DER_SEQUENCE);
}

/* RSA or EC, PEM as PKCS#1, SEC1 or PKCS#8.  NULL: e has the reason; else for user_key_free, as user_key_make's. */
static struct user_key *user_key_load(const char *path, struct err *e)
{
    const struct tls_source source = { "-private-key-path", path };
    struct user_key *k = calloc(1, sizeof *k);
    struct buf der = { 0 };
    struct der_private parts;
    bool ok = k ? key_read(&source, &der, e) && key_decode(&k->decoder, &source, (struct bytes){ der.p, der.len }, e)
                : err_set(e, "-private-key-path: out of memory");
    if (ok) {
        k->rsa = br_skey_decoder_get_rsa(&k->decoder);
        k->ec = br_skey_decoder_get_ec(&k->decoder);
    }
    if (ok && k->rsa && der_private_key((struct bytes){ der.p, der.len }, &parts))
        der_put_rsa(&k->rsa_public, parts.rsa);
    wipe_buf(&der);
    if (ok)
        return k;
    user_key_free(k);
    return NULL;
}

/* A P-256 key of the kernel's randomness, for one run. */
static struct user_key *user_key_make(struct err *e)
{
    struct user_key *k = calloc(1, sizeof *k);
    br_hmac_drbg_context rng;
    uint8_t seed[32];
    if (!k || !random_fill(seed, sizeof seed)) {
        err_set(e, "no key can be made for the run: %s", k ? strerror(errno) : "out of memory");
        free(k);
        return NULL;
    }
    br_hmac_drbg_init(&rng, &br_sha256_vtable, seed, sizeof seed);
    br_ec_keygen(&rng.vtable, br_ec_get_default(), &k->made, k->x, BR_EC_secp256r1);
    wipe(seed, sizeof seed);
    wipe(&rng, sizeof rng);
    k->ec = &k->made;
    return k;
}

/* The curves that BearSSL signs with, and their names (RFC 5480 2.1.1.1). */
static const struct {
    int id;
    struct bytes oid;
} curves[] = {
    { BR_EC_secp256r1, { (const uint8_t *)OID_P256, sizeof OID_P256 - 1 } },
    { BR_EC_secp384r1, { (const uint8_t *)OID_P384, sizeof OID_P384 - 1 } },
    { BR_EC_secp521r1, { (const uint8_t *)OID_P521, sizeof OID_P521 - 1 } },
};

/* SubjectPublicKeyInfo (RFC 5280 4.1, RFC 5480 2) of its public half; spki is empty before.  False without memory. */
static bool user_key_public(const struct user_key *k, struct buf *spki)
{
    uint8_t q[BR_EC_KBUF_PUB_MAX_SIZE];
    br_ec_public_key pub = { .qlen = 0 };
    size_t curve = 0;
    if (!k->rsa) {
        br_ec_compute_pub(br_ec_get_default(), &pub, q, k->ec);
        while (curve < PB_COUNT(curves) - 1 && curves[curve].id != k->ec->curve)
            curve++;
    }
    der_put(spki, DER_OID, k->rsa ? BYTES(OID_RSA) : BYTES(OID_EC));
    der_put(spki, k->rsa ? DER_NULL : DER_OID, k->rsa ? BYTES("") : curves[curve].oid);
    der_wrap(spki, 0, DER_SEQUENCE);
    size_t key = spki->len;
    buf_putc(spki, 0);                /* no unused bits */
    buf_put(spki, k->rsa ? k->rsa_public.p : q, k->rsa ? k->rsa_public.len : pub.qlen);
    der_wrap(spki, key, DER_BIT_STRING);
    der_wrap(spki, 0, DER_SEQUENCE);
    spki->failed |= k->rsa_public.failed;
    return !spki->failed;
}

static void sha256(struct bytes text, uint8_t hash[br_sha256_SIZE])
{
    br_sha256_context h;
    br_sha256_init(&h);
    br_sha256_update(&h, text.p, text.n);
    br_sha256_out(&h, hash);
}

/* Appends the signature over the text: RSA PKCS#1 v1.5, or ECDSA in ASN.1 form, over SHA-256. */
static bool user_key_sign(const struct user_key *k, struct bytes text, struct buf *signature)
{
    uint8_t hash[br_sha256_SIZE], out[TLS_RSA_MAX / 8];
    size_t n = 0;
    sha256(text, hash);
    if (!k->rsa)
        n = br_ecdsa_sign_asn1_get_default()(br_ec_get_default(), &br_sha256_vtable, hash, k->ec, out);
    else if (br_rsa_pkcs1_sign_get_default()(BR_HASH_OID_SHA256, hash, sizeof hash, k->rsa, out))
        n = (k->rsa->n_bitlen + 7) / 8;
    buf_put(signature, out, n);
    return n && !signature->failed;
}

/* RSAPublicKey without the zeros in front of its numbers, which point into the key. */
static bool rsa_public_key(struct bytes key, br_rsa_public_key *pk)
{
    struct bytes body, number[2];
    if (der_next(&key, &body) != DER_SEQUENCE)
        return false;
    for (int i = 0; i < 2; i++) {
        if (der_next(&body, &number[i]) != DER_INTEGER)
            return false;
        while (number[i].n && number[i].p[0] == 0)
            number[i] = bytes_from(number[i], 1);
    }
    *pk = (br_rsa_public_key){ .n = (uint8_t *)number[0].p, .nlen = number[0].n, .e = (uint8_t *)number[1].p,
                               .elen = number[1].n };
    return pk->nlen <= TLS_RSA_MAX / 8;
}

/* Whether a signature, as user_key_sign makes it, is over the text and by the key of this SubjectPublicKeyInfo.
 * 1: yes, 0: no, -1: it can't be told here. */
static int signature_check(struct bytes spki, struct bytes text, struct bytes signature)
{
    uint8_t hash[br_sha256_SIZE], out[br_sha256_SIZE];
    struct der_public k;
    br_rsa_public_key rsa;
    size_t i = 0;
    sha256(text, hash);
    if (!der_public_key(spki, &k))
        return 0;
    if (bytes_eq(k.algorithm, BYTES(OID_RSA)) && rsa_public_key(k.key, &rsa))
        return br_rsa_pkcs1_vrfy_get_default()(signature.p, signature.n, BR_HASH_OID_SHA256, sizeof hash, &rsa, out) &&
               memcmp(hash, out, sizeof hash) == 0;
    while (i < PB_COUNT(curves) && !bytes_eq(k.parameters, curves[i].oid))
        i++;
    if (!bytes_eq(k.algorithm, BYTES(OID_EC)) || i == PB_COUNT(curves))
        return -1;
    br_ec_public_key ec = { .curve = curves[i].id, .q = (uint8_t *)k.key.p, .qlen = k.key.n };
    return br_ecdsa_vrfy_asn1_get_default()(br_ec_get_default(), hash, sizeof hash, &ec, signature.p, signature.n) == 1;
}
#else
struct user_key { int unused; };

#define user_key_make(e) \
    (err_set(e, "this cvms was built without TLS (make TLS=0), and so without keys; build it with TLS"), \
     (struct user_key *)NULL)
#define user_key_load(path, e) ((void)(path), user_key_make(e))
#define user_key_free(k) ((void)(k))
#define user_key_public(k, spki) ((void)(k), (void)(spki), false)
#define user_key_sign(k, text, signature) ((void)(k), (void)(text), (void)(signature), false)
#define signature_check(spki, text, signature) ((void)(spki), (void)(text), (void)(signature), -1)
#endif

/* ==== 15. The manifest: from options to finished bytes =============================================================
 * Owns: the ComputationRunReq, its inputs and their hashes, its chunks as gRPC messages, encoded once for all streams.
 * Never: opens a port.
 */
enum {
    CHUNK_LEN = 1 << 20,              /* bytes of the manifest in one RunReqChunks */
    SHA3_256_LEN = 32,
    MANIFEST_FILE_MAX = 512 << 20,    /* bytes of a manifest, too */
    MANIFEST_ID_MAX = 1024,           /* bytes of its id, which stands in every chunk */
};
enum compat { COMPAT_ALL, COMPAT_SEED, COMPAT_HEAD, COMPATS };
static const char *const compat_names[COMPATS] = { "all", "seed", "head" };
static const char *const algo_types[] = { "bin", "python", "wasm", "docker" };
static const char *const source_schemes[] = { "docker://", "oci:", "s3://", "gs://", "https://", "http://" };

/* A manifest and what it was made of.  What req points to lasts as long as the options. */
struct manifest {
    struct manifest *next;            /* those of -manifest-for */
    const char *job_id;               /* whom it is for; NULL: everybody else */
    struct ComputationRunReq req;
    struct bytes key;                 /* -public-key-path; empty: not given */
    struct checksum *inputs;          /* of direct datasets in their order, then of the algorithm */
    struct checksum *fresh;           /* those of them that have changed, while they are hashed again; else NULL */
    struct checksums hashing;         /* of fresh */
    size_t input_count;
    int64_t looked_ms;                /* when the inputs were last looked at, to see whether they have changed */
    bool algo_input;                  /* the last input is the algorithm */
    enum compat compat;
    const struct faults *faults;      /* NULL: none */
    void (*renew)(void *);            /* what hangs on the inputs' hashes is to be made anew; NULL: nothing does */
    void *renew_arg;
    struct blob *stream;              /* all RunReqChunks, each with its gRPC prefix */
    size_t len, chunks;               /* bytes of the manifest itself, and in how many chunks it goes */
    unsigned version;                 /* how often it has been encoded */
    unsigned recorded;                /* the version that -record has; 0: none */
};

/* The flags of the algorithm, and of the datasets: these are lists that go by a dataset's position. */
enum column {
    COL_PATH, COL_URL, COL_KBS_PATH, COL_KBS_URL, COL_ENCRYPTED, COL_UNPACK, COL_HASH, COL_KEY, COLUMNS
};
static const struct part {
    const char *what, *are, *flag[COLUMNS];
} algorithm_part = {
    "algorithm", "algorithm is",
    { "algo-path", "algo-source-url", "algo-kbs-path", "algo-kbs-url", "algo-encrypted", NULL, "algo-hash",
      "algo-public-key-path" },
}, dataset_part = {
    "dataset", "datasets are",
    { "data-paths", "dataset-source-urls", "dataset-kbs-paths", "dataset-kbs-urls", "dataset-encrypted",
      "dataset-decompress", "dataset-hashes", "dataset-public-key-paths" },
};

/* The elements of a list flag: given once it is split at its commas, given several times each is one element; "" is no
 * element at all. */
static struct values list_split(struct options *o, const struct values *given)
{
    struct values list = { 0 };
    const char *s = given->n ? given->v[0] : "";
    if (given->n > 1)
        return *given;
    for (bool more = *s; more;) {
        size_t n = strcspn(s, ",");
        values_add(o, &list, option_text(o, (struct bytes){ (const uint8_t *)s, n }));
        more = s[n];
        s += n + more;
    }
    return list;
}

/* What was given to a flag, split if it takes a list; of others "" is nothing. */
static struct values option_values(struct options *o, const char *flag)
{
    const struct option *opt = option_find(flag, strlen(flag), o->command);
    void *at = (char *)o + opt->offset;
    return opt->kind == OPT_LIST || opt->kind == OPT_PATHS ? list_split(o, at)
                                                           : (struct values){ at, present(*(const char **)at) };
}

static const char *nth(const struct values *v, size_t i)
{
    return i < v->n ? v->v[i] : NULL;
}

/* 64 hex digits.  False: they are not. */
static bool hash_read(uint8_t hash[SHA3_256_LEN], const char *s)
{
    int c = strlen(s) == 2 * SHA3_256_LEN ? 0 : -1;
    for (size_t i = 0; i < SHA3_256_LEN && c >= 0; i++) {
        c = hex_byte((const uint8_t *)s + 2 * i);
        hash[i] = (uint8_t)c;
    }
    return c >= 0;
}

/* The hash of something remote, kept, empty after a mistake: absent it is 32 zero bytes, of which hash_check warns. */
static struct bytes parse_hash(struct options *o, struct mistakes *r, const char *flag, const char *s)
{
    uint8_t *hash = option_alloc(o, SHA3_256_LEN);
    if (!present(s) || hash_read(hash, s))
        return (struct bytes){ hash, SHA3_256_LEN };
    tell(r, USAGE, "-%s: \"%.80s\" is not a SHA3-256 in hex: %zu characters, 64 hex digits wanted; "
                   "cvms checksum FILE prints one", flag, s, strlen(s));
    return (struct bytes){ 0 };
}

/* A boolean that a mistake makes false. */
static bool parse_flag(struct mistakes *r, enum severity severity, const char *flag, const char *s)
{
    int value = parse_bool(s);
    if (value < 0)
        tell(r, severity, "-%s: \"%s\" is not a boolean%s", flag, s,
             severity == WARNING ? " and counts as false" : "; use true or false");
    return value > 0;
}

/* The DER of the key in a PEM file, kept; empty after a mistake. */
static struct bytes load_key(struct options *o, struct mistakes *r, const char *flag, const char *path)
{
    struct buf der = { 0 };
    struct err e;
    struct bytes key = { 0 };
    if (public_key_load(path, &der, &e))
        key = (struct bytes){ (const uint8_t *)option_text(o, (struct bytes){ der.p, der.len }), der.len };
    else
        tell(r, START, "-%s: %s", flag, e.text);
    buf_free(&der);
    return key;
}

static void check_url(struct mistakes *r, const char *flag, const char *url)
{
    for (size_t i = 0; i < PB_COUNT(source_schemes); i++)
        if (strncmp(url, source_schemes[i], strlen(source_schemes[i])) == 0)
            return;
    tell(r, WARNING, "-%s: \"%s\" has a scheme that no agent fetches; they know docker:// oci: s3:// gs:// https:// "
                     "http://", flag, url);
}

/* What the flags say, split.  Whether it is remote: its URL and its key's path are given, or its URL alone if it is said
 * not to be encrypted. */
static bool part_read(struct options *o, struct mistakes *r, const struct part *p, struct values col[COLUMNS])
{
    for (enum column c = 0; c < COLUMNS; c++)
        col[c] = p->flag[c] ? option_values(o, p->flag[c]) : (struct values){ 0 };
    bool url = col[COL_URL].n > 0, path = col[COL_KBS_PATH].n > 0, plain = url;
    for (size_t i = 0; i < col[COL_URL].n; i++)
        plain = plain && nth(&col[COL_ENCRYPTED], i) && parse_bool(nth(&col[COL_ENCRYPTED], i)) == 0;
    if (url && !path && !plain)
        tell(r, USAGE, "-%s is given without -%s: give both for a remote source, or -%s false if it is plain",
             p->flag[COL_URL], p->flag[COL_KBS_PATH], p->flag[COL_ENCRYPTED]);
    if (path && !url)
        tell(r, USAGE, "-%s is given without -%s: give both for a remote source, or neither",
             p->flag[COL_KBS_PATH], p->flag[COL_URL]);
    if (url && (path || plain) && col[COL_PATH].n)
        tell(r, WARNING, "-%s is not used: the %s remote", p->flag[COL_PATH], p->are);
    return url && (path || plain);
}

/* Which of the words it is; the first, and a mistake, if it is none. */
static size_t check_choice(struct mistakes *r, const char *flag, const char *value, const char *const *list, size_t n)
{
    struct buf all = { 0 };
    size_t row = row_find(list, n, sizeof *list, bytes_of(value));
    if (row < n)
        return row;
    for (size_t i = 0; i < n; i++)
        buf_printf(&all, "%s%s", i == 0 ? "" : i + 1 == n ? " or " : ", ", list[i]);
    tell(r, USAGE, "-%s: \"%s\" is not known; use %.*s", flag, value, (int)all.len, (char *)all.p);
    buf_free(&all);
    return 0;
}

/* Whether a file that is written later can be: told together with all other mistakes, not at the end of a long run. */
static void check_output(struct mistakes *r, const char *flag, const char *path)
{
    struct stat st;
    char folder[PATH_MAX];
    const char *slash = path ? strrchr(path, '/') : NULL;
    path_folder(folder, path ? path : "");
    bool there = path && stat(path, &st) == 0;
    bool ok = there ? !S_ISDIR(st.st_mode) : errno == ENOENT && path && *path && !(slash && !slash[1]);
    if (there && !ok)
        errno = EISDIR;
    if (path && (!ok || access(there ? path : folder, there ? W_OK : W_OK | X_OK) != 0))
        tell(r, START, "-%s: \"%s\" can't be written: %s", flag, path, strerror(errno));
}

/* What is written must not be what is read, nor two outputs one: it would be gone. */
static void check_apart(struct mistakes *r, struct options *o)
{
    static const char *const outputs[] = { "report", "record", "ready-file", "results", "o" };
    for (size_t i = 0; i < PB_COUNT(outputs); i++) {
        const struct option *out = option_find(outputs[i], strlen(outputs[i]), o->command);
        const char *path = out ? *(const char **)((char *)o + out->offset) : NULL;
        struct stat st;
        bool there = present(path) && stat(path, &st) == 0, plain = present(path) && (!there || S_ISREG(st.st_mode));
        plain = plain && path_is_standard(path) < 0;
        for (const struct option *opt = option_table; plain && opt < option_table + OPTIONS; opt++) {
            size_t k = opt->name ? ROW_FIND(outputs, bytes_of(opt->name)) : i;
            bool names = o->given[opt - option_table] && (opt->kind == OPT_PATH || opt->kind == OPT_PATHS);
            struct values in = names && (k < i || k == PB_COUNT(outputs)) ? option_values(o, opt->name) : (struct values){ 0 };
            for (size_t n = 0; n < in.n; n++)
                if (there ? is_file(in.v[n], &st) : strcmp(path, in.v[n]) == 0)   /* it leads there, or will */
                    tell(r, USAGE, "-%s: %s is the file of -%s as well, which would be overwritten", out->name, path,
                         opt->name);
        }
    }
}

static struct KBSConfig *new_kbs(struct options *o, const char *url)
{
    if (!present(url))
        return NULL;
    struct KBSConfig *kbs = option_alloc(o, sizeof *kbs);
    *kbs = (struct KBSConfig){ .url = bytes_of(url), .enabled = true };
    return kbs;
}

/* The key broker in a remote resource's own field 6.  NULL: none, with a warning if there is none at all. */
static struct KBSConfig *resource_kbs(struct options *o, struct mistakes *r, enum compat compat, const char *own,
                                      const struct part *p, const char *url)
{
    const char *kbs = compat == COMPAT_SEED ? NULL : present(own) ? own : compat == COMPAT_ALL ? o->kbs_url : NULL;
    if (!present(kbs) && (compat == COMPAT_HEAD || !present(o->kbs_url)))
        tell(r, WARNING, "the remote %s %s has no key broker: give -%s%s", p->what, url, p->flag[COL_KBS_URL],
             compat == COMPAT_HEAD ? "" : " or -kbs-url");
    return new_kbs(o, kbs);
}

static struct Source *new_source(struct options *o, enum compat compat, const char *type, const char *url,
                                 const char *kbs_path)
{
    struct Source *s = option_alloc(o, sizeof *s);
    *s = (struct Source){ .type = compat == COMPAT_SEED ? BYTES("oci-image") : bytes_of(type), .url = bytes_of(url),
                          .kbs_resource_path = bytes_of(kbs_path ? kbs_path : ""), .encrypted = present(kbs_path) };
    return s;
}

/* The last component of a path, as an agent's user will upload it. */
static struct bytes base_name(const char *path)
{
    size_t n = strlen(path), from;
    while (n > 1 && path[n - 1] == '/')
        n--;
    for (from = n; from > 0 && path[from - 1] != '/';)
        from--;
    return (struct bytes){ (const uint8_t *)path + from, n - from };
}

/* Dataset.filename of the i-th dataset that is fetched, as the original server has it; kept. */
static struct bytes fetched_name(struct options *o, size_t i)
{
    char *name = option_alloc(o, 40);
    text_printf(name, 40, "dataset_%lu.csv", (unsigned long)i);
    return bytes_of(name);
}

/* What the flags say of the i-th dataset, wherever it comes from, or of what the algorithm has of it. */
static void set_part(struct manifest *m, struct options *o, struct mistakes *r, const struct part *p,
                     const struct values *col, size_t i, bool remote, struct Dataset *to)
{
    const char *path = remote ? NULL : nth(&col[COL_PATH], i), *url = remote ? nth(&col[COL_URL], i) : NULL;
    const char *hash = nth(&col[COL_HASH], i), *key = nth(&col[COL_KEY], i), *encrypted = nth(&col[COL_ENCRYPTED], i);
    if ((url && !*url) || (path && !*path))
        tell(r, USAGE, "-%s: element %zu is empty; take the extra comma out", p->flag[url ? COL_URL : COL_PATH],
             i + 1);
    if (present(url))
        check_url(r, p->flag[COL_URL], url);
    if (url || path) {
        const char *type = p == &dataset_part ? o->dataset_source_type : o->algo_source_type;
        to->source = url ? new_source(o, m->compat, type, url, nth(&col[COL_KBS_PATH], i)) : NULL;
        to->kbs = url ? resource_kbs(o, r, m->compat, nth(&col[COL_KBS_URL], i), p, url) : NULL;
    }
    struct bytes given = parse_hash(o, r, p->flag[COL_HASH], hash);
    if (path) {
        struct checksum *in = &m->inputs[m->input_count++];
        *in = (struct checksum){ .path = path, .part = p };
        to->hash = (struct bytes){ in->hash, SHA3_256_LEN };
    }
    if (present(hash) ? !path || p == &dataset_part : url && !to->hash.n)
        to->hash = given;
    if (m->key.n)
        to->userKey = m->key;
    if (present(key))
        to->userKey = load_key(o, r, p->flag[COL_KEY], key);
    bool sealed = present(encrypted) && parse_flag(r, USAGE, p->flag[COL_ENCRYPTED], encrypted);
    if (present(encrypted) && to->source)
        to->source->encrypted = sealed;
}

static void set_datasets(struct manifest *m, struct options *o, struct mistakes *r)
{
    struct values col[COLUMNS];
    bool remote = part_read(o, r, &dataset_part, col), direct = !remote && col[COL_PATH].n;
    size_t n = remote ? col[COL_URL].n : direct ? col[COL_PATH].n : m->req.datasets.n;
    struct Dataset *d = option_alloc(o, (n + 1) * sizeof *d);
    m->inputs = option_alloc(o, (col[COL_PATH].n + 2) * sizeof *m->inputs);
    if (remote && n > 1 && present(o->dataset_hash))
        tell(r, WARNING, "one -dataset-hash for %zu remote datasets: an agent accepts only those with that content", n);
    for (enum column c = COL_URL; c < COLUMNS; c++)
        if (col[c].n && (c == COL_UNPACK ? col[c].n > n : col[c].n != n))
            tell(r, c == COL_UNPACK ? WARNING : USAGE, "-%s has %zu element%s for %zu dataset%s: give one for each",
                 dataset_part.flag[c], col[c].n, PLURAL(col[c].n), n, PLURAL(n));
    struct bytes hash = parse_hash(o, r, "dataset-hash", o->dataset_hash);
    for (size_t i = 0; i < n; i++) {
        const char *unpack = nth(&col[COL_UNPACK], i);
        if (remote)
            d[i] = (struct Dataset){ .filename = fetched_name(o, i), .hash = hash };
        else if (!direct)
            d[i] = ((const struct Dataset *)m->req.datasets.items)[i];
        else if (m->compat == COMPAT_ALL && pb_utf8_valid(base_name(col[COL_PATH].v[i])))
            d[i].filename = base_name(col[COL_PATH].v[i]);
        else if (m->compat == COMPAT_ALL && !o->fetches_data)
            tell(r, WARNING, "-data-paths: %s: the file's name is not UTF-8 and is left out of the manifest; the newest "
                             "agents refuse such a dataset", col[COL_PATH].v[i]);
        set_part(m, o, r, &dataset_part, col, i, remote, &d[i]);
        if (unpack)
            d[i].decompress = parse_flag(r, WARNING, "dataset-decompress", unpack);
    }
    m->req.datasets = (struct pb_list){ .items = d, .n = n };
}

static void set_algorithm(struct manifest *m, struct options *o, struct mistakes *r)
{
    struct values col[COLUMNS], args = list_split(o, &o->algo_args);
    struct Algorithm *a = option_alloc(o, sizeof *a);
    if (m->req.algorithm)
        *a = *m->req.algorithm;
    bool remote = part_read(o, r, &algorithm_part, col);
    m->algo_input = !remote && col[COL_PATH].n;
    bool given = col[COL_PATH].n || col[COL_URL].n || col[COL_KBS_PATH].n;
    if (!given && !m->req.algorithm && !(o->manifest && r->start))
        tell(r, USAGE, "no algorithm: give -algo-path, or -algo-source-url and -algo-kbs-path");
    struct Dataset d = { .hash = a->hash, .userKey = a->userKey, .source = a->source, .kbs = a->kbs };
    if (remote)
        d.hash = (struct bytes){ 0 };
    set_part(m, o, r, &algorithm_part, col, 0, remote, &d);
    a->hash = d.hash, a->userKey = d.userKey, a->source = d.source, a->kbs = d.kbs;
    if (present(o->algo_type) && ROW_FIND(algo_types, bytes_of(o->algo_type)) == PB_COUNT(algo_types))
        tell(r, WARNING, "-algo-type %s: agents run bin, python, wasm and docker only", o->algo_type);
    if (o->algo_type)
        a->algo_type = bytes_of(o->algo_type);
    if (o->algo_args.n) {
        struct bytes *arg = option_alloc(o, (args.n + 1) * sizeof *arg);
        for (size_t i = 0; i < args.n; i++)
            arg[i] = bytes_of(args.v[i]);
        a->algo_args = (struct pb_list){ .items = arg, .n = args.n };
    }
    m->req.algorithm = a;
}

/* Who may fetch the results: the keys of -result-consumer-keys, else that of -public-key-path. */
static void set_consumers(struct manifest *m, struct options *o, struct mistakes *r)
{
    struct values keys = list_split(o, &o->result_consumer_keys);
    size_t n = keys.n ? keys.n : m->key.n ? 1 : 0;
    if (n == 0)
        return;
    struct ResultConsumer *c = option_alloc(o, n * sizeof *c);
    for (size_t i = 0; i < n; i++)
        c[i].userKey = keys.n ? load_key(o, r, "result-consumer-keys", keys.v[i]) : m->key;
    m->req.result_consumers = (struct pb_list){ .items = c, .n = n };
}

/* Field 8, for the oldest agents: -kbs-url, and for `all` whatever broker the flags name. */
static void set_computation_kbs(struct manifest *m, struct options *o, struct mistakes *r)
{
    if (m->compat == COMPAT_SEED && (o->algo_kbs_url || o->dataset_kbs_urls.n))
        tell(r, WARNING, "-compat seed has no key broker of a resource's own: -algo-kbs-url and -dataset-kbs-urls are "
                         "not used");
    if (m->compat == COMPAT_HEAD && present(o->kbs_url))
        tell(r, WARNING, "-compat head has no key broker of the whole computation: -kbs-url is not used");
    if (m->compat == COMPAT_HEAD)
        return;
    const struct Dataset *d = m->req.datasets.items;
    struct KBSConfig *kbs = present(o->kbs_url) ? new_kbs(o, o->kbs_url) : m->req.kbs;
    if (!kbs && m->compat == COMPAT_ALL)
        kbs = m->req.algorithm->kbs;
    for (size_t i = 0; !kbs && m->compat == COMPAT_ALL && i < m->req.datasets.n; i++)
        kbs = d[i].kbs;
    if (kbs)                          /* its own: -set changes one of them */
        m->req.kbs = memcpy(option_alloc(o, sizeof *kbs), kbs, sizeof *kbs);
}

static void set_agent_config(struct manifest *m, struct options *o, struct mistakes *r)
{
    struct AgentConfig *config = option_alloc(o, sizeof *config);
    if (m->req.agent_config)
        *config = *m->req.agent_config;
    m->req.agent_config = config;
    if (o->client_ca_file)
        config->client_ca_file = bytes_of(o->client_ca_file);
    if (o->attested_tls)
        config->attested_tls = parse_flag(r, USAGE, "attested-tls-bool", o->attested_tls);
    else if (!o->manifest && !option_given(o, "attested-tls-bool"))
        tell(r, USAGE, "-attested-tls-bool is missing: give true if agents are to serve attested TLS, else false");
}

/* -set: fields by their path, over all that other flags say. */
static void set_fields(struct manifest *m, struct options *o, struct mistakes *r)
{
    for (size_t i = 0; i < o->set.n; i++) {
        const char *given = o->set.v[i], *eq = strchr(given, '=');
        char why[300];
        struct bytes path = { (const uint8_t *)given, eq ? (size_t)(eq - given) : 0 };
        if (!path.n)
            tell(r, USAGE, "-set: \"%s\" is not PATH=VALUE", given);
        else if (!pb_set_path(&ComputationRunReq_message, &m->req, path, bytes_of(eq + 1), &o->arena, why, sizeof why))
            tell(r, USAGE, "-set %s: %s", given, why);
    }
    struct bytes port = m->req.agent_config ? m->req.agent_config->port : (struct bytes){ 0 };
    if (o->set.n && port.n && (parse_decimal(port) < 1 || parse_decimal(port) > 65535))
        tell(r, USAGE, "-set agent_config.port: \"%.*s\" is not a port; use 1 to 65535", (int)port.n,
             (const char *)port.p);
}

/* A hash is what it was meant to be: 32 bytes, which JSON and -set have in base64, and not of zeros, which is told once. */
static void hash_check(struct mistakes *r, const char *of, const char *what, struct bytes hash, const char **flag)
{
    static const uint8_t zeros[SHA3_256_LEN];
    uint8_t meant[SHA3_256_LEN];
    struct buf text = { 0 };
    pb_base64(&text, hash);
    buf_putc(&text, 0);
    if (hash.n == 48 && !text.failed && hash_read(meant, (const char *)text.p)) {
        text.len = 0;
        pb_base64(&text, (struct bytes){ meant, sizeof meant });
        tell(r, START, "%s: %s has its hash in hex; bytes are written in base64 there: %.*s", of, what, (int)text.len,
             (const char *)text.p);
    } else if (hash.n != SHA3_256_LEN) {
        tell(r, WARNING, "%s: %s has a hash of " BYTES_FMT ": an agent panics on it", of, what, BYTES_OF(hash.n));
    } else if (*flag && memcmp(hash.p, zeros, sizeof zeros) == 0) {
        tell(r, WARNING, "%s: %s has 32 zero bytes for a hash, and an agent will refuse what it gets: give -%s", of, what,
             *flag);
        *flag = NULL;
    }
    buf_free(&text);
}

static void kbs_check(struct mistakes *r, const char *what, const struct KBSConfig *kbs, const struct KBSConfig *other)
{
    struct bytes url = kbs ? kbs->url : (struct bytes){ 0 };
    size_t scheme = http_scheme(url);
    if (url.n && (!scheme || url.n == scheme) && !(other && bytes_eq(url, other->url)))
        tell(r, WARNING, "the key broker of %s, \"%.*s\", is no URL that an agent can reach: it lacks http:// or "
             "https://", what, TEXT_OF(url, 200));
}

static int dataset_order(const void *a, const void *b)
{
    const struct Dataset *x = *(const struct Dataset *const *)a, *y = *(const struct Dataset *const *)b;
    const struct bytes p = x->filename, q = y->filename;
    int order = memcmp(p.p, q.p, min_size(p.n, q.n));
    return order ? order : p.n != q.n ? (p.n < q.n ? -1 : 1) : x < y ? -1 : 1;
}

/* Datasets of one name, in which an agent would write one over the other. */
static void names_check(struct mistakes *r, const struct Dataset *d, size_t n)
{
    const struct Dataset **named = or_exit(calloc(n + 1, sizeof *named)), *first = NULL;
    size_t count = 0;
    for (size_t i = 0; i < n; i++)
        if (d[i].filename.n)
            named[count++] = &d[i];
    qsort(named, count, sizeof *named, dataset_order);
    for (size_t i = 0; i < count; i++)
        if (!first || !bytes_eq(first->filename, named[i]->filename))
            first = named[i];
        else if (!named[i]->decompress)
            tell(r, WARNING, "datasets %zu and %zu are both called %.*s: an agent keeps the last one only",
                 (size_t)(first - d), (size_t)(named[i] - d), TEXT_OF(first->filename, 200));
    free(named);
}

/* What a manifest must not have, wherever it comes from.  Files are yet to be hashed. */
static void manifest_check(struct mistakes *r, const struct manifest *m)
{
    char what[40], of[100];
    const char *algo = "algo-hash", *data = "dataset-hash";
    const struct ComputationRunReq *req = &m->req;
    text_printf(of, sizeof of, "%s%s", m->job_id ? "-manifest-for " : "the manifest", m->job_id ? m->job_id : "");
    kbs_check(r, "the computation", req->kbs, NULL);
    if (req->algorithm && !m->algo_input)
        hash_check(r, of, "the algorithm", req->algorithm->hash, &algo);
    if (req->algorithm)
        kbs_check(r, "the algorithm", req->algorithm->kbs, req->kbs);
    for (size_t i = 0; i < req->datasets.n && !r->start; i++) {
        const struct Dataset *d = (const struct Dataset *)req->datasets.items + i;
        text_printf(what, sizeof what, "dataset %zu", i);
        if (i >= m->input_count - m->algo_input)
            hash_check(r, of, what, d->hash, &data);
        kbs_check(r, what, d->kbs, req->kbs);
    }
    if (!r->start)
        names_check(r, req->datasets.items, req->datasets.n);
}

/* Whether the ids are of a sensible length, and every file and folder is there, before any is hashed. */
static void check_inputs(const struct manifest *m, struct mistakes *r)
{
    for (const struct manifest *of = m; of; of = of->next)
        if (of->req.id.n > MANIFEST_ID_MAX)
            tell(r, USAGE, "the manifest's id has %zu bytes; every chunk of it repeats the id: use at most %d", of->req.id.n,
                 MANIFEST_ID_MAX);
    for (size_t i = 0; i < m->input_count; i++) {
        struct source s;
        struct err e;
        const char *path = m->inputs[i].path;
        if (*path && source_open(&s, path, &e))
            source_close(&s);
        else if (*path)
            tell(r, START, "-%s: %s%s", m->inputs[i].part->flag[COL_PATH], e.text,
                 *path == ' ' ? " (it begins with a blank)" : "");
    }
}

/* Hashes every file and folder; each gets its mistake or its line. */
static void hash_inputs(struct manifest *m, struct mistakes *r)
{
    bool all = true;                  /* else the mistakes alone are told */
    const struct Dataset *data = m->req.datasets.items;
    checksum_files(m->inputs, m->input_count);
    for (size_t i = 0; i < m->input_count; i++)
        all &= m->inputs[i].ok;
    for (size_t i = 0; i < m->input_count; i++) {
        struct checksum *in = &m->inputs[i];
        const char *flag = in->part->flag[COL_PATH];
        char hex[2 * SHA3_256_LEN + 1];
        hex_text(hex, in->hash, SHA3_256_LEN);
        if (!in->ok)
            tell(r, START, "-%s: %s", flag, checksum_why(in));
        else if (all)
            tell_note("%s %s, " BYTES_FMT ", %s", in->part->what, in->path, BYTES_OF(in->size), hex);
        if (all && in->size == 0)
            tell(r, WARNING, "-%s: %s is empty%s", flag, in->path,
                 (in->part == &dataset_part ? data[i].source : m->req.algorithm->source) ? "" :
                 ": agents refuse an upload without a byte");
        free(in->why);
        in->why = NULL;
    }
}

/* Appends one message with its gRPC prefix to a blob with room for it; b->n is what stands there.  False without
 * memory for the scratch buffer. */
static bool blob_append(struct blob *b, struct buf *scratch, const struct ServerStreamMessage *msg)
{
    struct bytes wire = pb_encode(scratch, &ServerStreamMessage_message, msg);
    if (scratch->failed)
        return false;
    grpc_put_prefix(b->p + b->n, wire.n);
    if (wire.n)
        memcpy(b->p + b->n + 5, wire.p, wire.n);
    b->n += 5 + wire.n;
    return true;
}

/* Cuts the encoded manifest into RunReqChunks of CHUNK_LEN and an empty last one (NULL without memory); faults may be
 * NULL. */
static struct blob *manifest_chunks(const struct ComputationRunReq *req, struct bytes manifest,
                                    const struct faults *faults)
{
    if (manifest.n > MANIFEST_FILE_MAX || req->id.n > MANIFEST_ID_MAX)
        return NULL;                  /* so that no size below wraps, with 32 bits either */
    bool plain = fault_value(faults, FAULT_PLAIN) >= 0;
    int64_t leave_out = fault_value(faults, FAULT_MISSING_CHUNK), freeze = fault_value(faults, FAULT_FREEZE);
    size_t pieces = (manifest.n + CHUNK_LEN - 1) / CHUNK_LEN, times = fault_value(faults, FAULT_TWICE) >= 0 ? 2 : 1;
    size_t end = freeze >= 0 ? (size_t)freeze : fault_value(faults, FAULT_NO_LAST) >= 0 ? pieces : pieces + 1;
    struct blob *b = blob_new(times * (manifest.n + (pieces + 1) * (64 + req->id.n)));
    struct ComputationRunReq copy = *req;
    struct buf scratch = { 0 };
    bool ok = b != NULL;
    if (ok)
        b->n = 0;
    for (; ok && times > 0; times--) {
        if (plain)
            ok = blob_append(b, &scratch, &(struct ServerStreamMessage){ .runReq = &copy });
        for (size_t i = 0; ok && !plain && i <= pieces && i < end; i++) {
            size_t from = min_size(i * CHUNK_LEN, manifest.n), n = min_size(CHUNK_LEN, manifest.n - from);
            struct RunReqChunks chunk = { .id = req->id, .data = { n ? manifest.p + from : NULL, n },
                                          .is_last = i == pieces };
            struct ServerStreamMessage message = { .runReqChunks = &chunk };
            ok = (int64_t)i == leave_out || blob_append(b, &scratch, &message);
        }
    }
    buf_free(&scratch);
    if (ok)
        return b;
    blob_unref(b);
    return NULL;
}

/* Encodes req anew, after inputs have changed, with the faults that are in the manifest itself.  False without memory:
 * the old bytes stay. */
static bool manifest_encode(struct manifest *m)
{
    struct buf b = { 0 };
    uint8_t spoilt[SHA3_256_LEN];
    struct bytes none = { 0 }, *hash = m->req.algorithm ? &m->req.algorithm->hash : &none, real = *hash;
    uint64_t flip = (uint64_t)fault_value(m->faults, FAULT_FLIP);
    if (m->renew)
        m->renew(m->renew_arg);
    if (fault_value(m->faults, FAULT_WRONG_HASH) >= 0 && hash->n == SHA3_256_LEN) {
        for (size_t i = 0; i < SHA3_256_LEN; i++)
            spoilt[i] = (uint8_t)~hash->p[i];
        hash->p = spoilt;
    }
    if (fault_value(m->faults, FAULT_SHORT_HASH) >= 0 && hash->n)
        hash->n--;
    struct bytes wire = pb_encode(&b, &ComputationRunReq_message, &m->req);
    if (!b.failed && flip < wire.n)
        b.p[(size_t)(wire.p - b.p) + (size_t)flip] ^= 1;
    struct blob *stream = b.failed ? NULL : manifest_chunks(&m->req, wire, m->faults);
    *hash = real;
    buf_free(&b);
    if (!stream)
        return false;
    blob_unref(m->stream);
    m->stream = stream;
    m->version++;
    m->len = wire.n;
    m->chunks = (wire.n + CHUNK_LEN - 1) / CHUNK_LEN + 1;
    return true;
}

/* Reads a manifest in protobuf's JSON, as `cvms manifest` prints it. */
static void manifest_read(struct manifest *m, struct options *o, struct mistakes *r, const char *flag, const char *path)
{
    struct buf text = { 0 };
    struct err e;
    bool ok = file_load(path, MANIFEST_FILE_MAX, &text, &e);
    struct bytes json = { ok ? (const uint8_t *)option_text(o, (struct bytes){ text.p, text.len }) : NULL, text.len };
    buf_free(&text);
    if (!ok)
        tell(r, START, "-%s: %s", flag, e.text);
    else if (!pb_json_parse(&ComputationRunReq_message, &m->req, json, &o->arena, e.text, sizeof e.text))
        tell(r, START, "-%s: %s: %s", flag, path, e.text);
}

/* The manifests of -manifest-for: each as its file has it. */
static void manifests_by_job(struct manifest *m, struct options *o, struct mistakes *r)
{
    for (size_t i = 0; i < o->manifest_for.n; i++) {
        const char *given = o->manifest_for.v[i], *eq = strchr(given, '=');
        if (!eq || eq == given || !eq[1]) {
            tell(r, USAGE, "-manifest-for: \"%s\" is not JOBID=FILE", given);
            continue;
        }
        struct manifest *of = option_alloc(o, sizeof *of);
        of->job_id = option_text(o, (struct bytes){ (const uint8_t *)given, (size_t)(eq - given) });
        of->faults = m->faults;
        of->next = m->next;
        m->next = of;
        manifest_read(of, o, r, "manifest-for", eq + 1);
    }
}

/* Reads and checks everything that the flags name.  What is wrong has been told when it returns. */
static void manifest_build(struct manifest *m, struct options *o, struct mistakes *r)
{
    m->compat = (enum compat)check_choice(r, "compat", o->compat, compat_names, COMPATS);
    m->req.id = BYTES("1");
    m->req.name = BYTES("sample computation");
    m->req.description = BYTES("sample descrption");
    struct AgentConfig config = { .port = BYTES("7002") };
    m->req.agent_config = &config;
    if (o->manifest) {
        m->req = (struct ComputationRunReq){ 0 };
        manifest_read(m, o, r, "manifest", o->manifest);
    }
    if (present(o->public_key_path))
        m->key = load_key(o, r, "public-key-path", o->public_key_path);
    else if (!o->manifest && !m->key.n && !r->start && !r->usage)
        tell(r, USAGE, "-public-key-path is missing: give the PEM file with the public key of the users, or -deliver upload, "
             "which makes a key");
    set_datasets(m, o, r);
    set_algorithm(m, o, r);
    set_consumers(m, o, r);
    set_computation_kbs(m, o, r);
    set_agent_config(m, o, r);
    set_fields(m, o, r);
    manifests_by_job(m, o, r);
    for (const struct manifest *of = m; of && !r->start && !r->usage; of = of->next)
        manifest_check(r, of);
    check_inputs(m, r);
}

/* Hashes the inputs and makes the bytes that agents get: what may take long, when nothing else is wrong. */
static bool manifest_finish(struct manifest *m, struct mistakes *r)
{
    if (r->usage || r->start)
        return false;
    hash_inputs(m, r);
    for (struct manifest *of = m; of && !r->start; of = of->next)
        if (!manifest_encode(of))
            tell(r, START, "the manifest%s%s: out of memory, or larger than %d MiB", of->job_id ? " for " : "",
                 of->job_id ? of->job_id : "", MANIFEST_FILE_MAX >> 20);
    return !r->start;
}

/* The manifest of an agent with this job-id ("" for none). */
static struct manifest *manifest_for(struct manifest *m, struct bytes job)
{
    for (struct manifest *of = m->next; of; of = of->next)
        if (bytes_eq(job, bytes_of(of->job_id)))
            return of;
    return m;
}

/* Ends the hashing of what has changed, if there is any. */
static void manifest_settle(struct manifest *m)
{
    checksums_free(&m->hashing);
    for (size_t i = 0; m->fresh && i < m->hashing.n; i++)
        free(m->fresh[i].why);
    free(m->fresh);
    m->fresh = NULL;
}

/* What is not the options' own. */
static void manifest_free(struct manifest *m)
{
    for (; m; m = m->next) {
        manifest_settle(m);
        for (size_t i = 0; i < m->input_count; i++)
            if (m->inputs[i].image)
                image_free(m->inputs[i].image);
        blob_unref(m->stream);
        m->stream = NULL;
    }
}

/* Looks whether inputs have changed since they were hashed.  True: some have, and manifest_step is to hash them.  Streams
 * that open in the same millisecond look once. */
static bool manifest_look(struct manifest *m, struct core *core)
{
    size_t n = 0;
    if (m->fresh || m->looked_ms == core->now_ms)
        return m->fresh != NULL;
    m->looked_ms = core->now_ms;
    for (size_t i = 0; i < m->input_count; i++)
        if (checksum_changed(m->inputs[i].path, &m->inputs[i].id) &&
            (m->fresh || (m->fresh = calloc(m->input_count, sizeof *m->fresh))))
            m->fresh[n++] = m->inputs[i];
    if (!m->fresh || checksums_start(&m->hashing, m->fresh, n))
        return m->fresh != NULL;
    core_note(core, NULL, "out of memory: agents get the manifest with the old hashes");
    manifest_settle(m);
    return false;
}

/* Takes over what an input is now, with a note on the log.  Returns whether its hash is another. */
static bool manifest_take(struct manifest *m, struct checksum *in, struct checksum *fresh, struct core *core)
{
    char hex[2 * SHA3_256_LEN + 1];
    if (!fresh->ok) {
        core_note(core, NULL, "%s has changed and can't be read; the manifest keeps its old hash", in->path);
        in->id = path_id(in->path);
        return false;
    }
    hex_text(hex, fresh->hash, SHA3_256_LEN);
    core_note(core, NULL, "%s has changed: hashed again, now %s", in->path, hex);
    bool differs = in->image || memcmp(in->hash, fresh->hash, SHA3_256_LEN) != 0; /* an image may have a new name */
    fresh->version = differs ? m->version + 1 : in->version;
    *in = *fresh;
    return differs;
}

/* Hashes a slice of what has changed.  False: all is hashed, and the manifest has been made anew. */
static bool manifest_step(struct manifest *m, struct core *core)
{
    bool changed = false;
    if (checksums_step(&m->hashing))
        return true;
    for (size_t i = 0, k = 0; i < m->input_count && k < m->hashing.n; i++)
        if (m->inputs[i].path == m->fresh[k].path)
            changed |= manifest_take(m, &m->inputs[i], &m->fresh[k++], core);
    if (changed && !manifest_encode(m))
        core_note(core, NULL, "out of memory: agents get the manifest with the old hashes");
    manifest_settle(m);
    return false;
}

/* ==== 16. The verdict: a smoke test's stages, failures and summary ==================================================
 * Owns: what an agent's messages mean for the question "did it work?", the texts of -reject, summary and report.
 * Never: sends, reads a clock, or fails a run for what is normal in a healthy one.
 */

enum stage { STAGE_NONE, STAGE_CONNECTED, STAGE_ACCEPTED, STAGE_RUNNING, STAGE_READY, STAGE_COMPLETE, STAGES };
static const char *const stage_names[STAGES] = { "none", "connected", "accepted", "running", "ready", "complete" };

enum {
    VERDICT_REACHED = 0, VERDICT_BROKEN = 1, VERDICT_FAILED = 3, VERDICT_TIMEOUT = 4, VERDICT_LOST = 5,
    CONTEXT_LINES = 8,                /* of a host's log, kept for the summary of a failure */
    CONTEXT_BYTES = 300,
    CONTEXT_MS = 500,                 /* from a failure to the end: the other stream may still tell why */
};

/* What an event (status NULL: any) says, and a state, where it says the same.  Failures come before this table. */
static const struct {
    const char *type, *status;
    enum stage stage;
    bool state;
} stands[] = {
    { "Running", "Completed", STAGE_READY, false },
    { "ConsumingResults", "Ready", STAGE_READY, true },
    { "Complete", "Completed", STAGE_COMPLETE, true },
    { "Running", NULL, STAGE_RUNNING, true },
};

/* What an agent that stands in a state waits for, and what brings it on. */
static const struct awaited {      /* macOS has a union wait */
    const char *state, *what, *cure;
} waits[] = {
    { "ReceivingAlgorithm", "algorithm", "no algorithm was uploaded: -deliver upload, or cocos-cli algo FILE KEY" },
    { "ReceivingData", "dataset", "a dataset was not uploaded: -deliver upload, or cocos-cli data FILE KEY" },
    { "ConsumingResults", "results", "its results were not fetched: -results FILE, or cocos-cli result KEY" },
};

/* Log lines of level WARN or ERROR that mean a failure which no event tells. */
static const char *const silent_failures[] = {
    "hash does not match manifest", "not declared in computation manifest", "failed to start ingress proxy",
};

/* What is carried between the users and an agent host: a file that is uploaded or fetched, or the results. */
struct parcel {
    const char *what, *name;          /* "algorithm", "dataset" or "results", and the file */
    const char *where;                /* the agent's service, once it is called; NULL: it is not */
    enum stage stage;                 /* which is not reached without it; STAGES: it is not known who fetches what */
    bool begun, done, sealed;         /* sealed: done when its key has been fetched, too */
    unsigned fetched, keys;           /* how often an agent has */
    uint64_t bytes;
    uint8_t hash[32];                 /* of results: SHA3-256 */
};

/* One agent host: an agent and its log-forwarder, told from others by job-id, else by address. */
struct host {
    struct host *next;
    char *name, *failure;             /* failure: why it has failed; NULL: it has not */
    char at[56];                      /* the address that its last stream came from */
    enum stage stage;
    int64_t reached_ms[STAGES], lost_ms;  /* since the start; lost_ms: when its last agent stream ended */
    unsigned agents;                  /* streams of its agent that are open */
    bool had_agent, had_forwarder;
    const struct awaited *wait;       /* what it waits for; NULL: nothing from outside */
    size_t expected;                  /* of -expect, as many have been seen */
    uint64_t messages, bytes;
    char *context[CONTEXT_LINES];     /* its last lines */
    size_t context_count;
    struct courier *courier;          /* section 17: what is done for it; NULL: nothing */
    struct parcel *parcels;
    size_t parcel_count;
    char *trouble;                    /* what keeps its uploads from it; NULL: nothing */
};

struct verdict {
    bool wanted, over, control;       /* control: hosts are remembered for those who ask for them by name */
    enum stage until;
    int status;
    unsigned agents;                  /* as many must get there */
    int64_t start_ms, timeout_ms, grace_ms, poll_ms, end_ms, next_poll_ms;   /* INT64_MAX: never */
    struct values expect;             /* TYPE/STATUS, in this order */
    struct values reject;             /* texts, * for any run of bytes */
    struct host *hosts;
    size_t host_count;
    struct buf why;                   /* one line: the reason of the end */
};

static char unexplained[] = "out of memory for the reason";    /* of a host's failure */

static void verdict_free(struct verdict *v)
{
    while (v->hosts) {
        struct host *h = v->hosts;
        v->hosts = h->next;
        for (size_t i = 0; i < h->context_count; i++)
            free(h->context[i]);
        free(h->name);
        if (h->failure != unexplained)
            free(h->failure);
        free(h->parcels);
        free(h->trouble);
        free(h);
    }
    buf_free(&v->why);
}

/* The host of a stream: its job-id, or the peer's address without the port.  NULL: no verdict wanted, or too many. */
static struct host *verdict_host(struct verdict *v, const char *job_id, const char *peer)
{
    struct bytes name = job_id ? bytes_of(job_id) : (struct bytes){ (const uint8_t *)peer, host_len(peer) };
    if (!v->wanted && !v->control)
        return NULL;
    struct host **at = &v->hosts;
    for (; *at; at = &(*at)->next)
        if (bytes_eq(bytes_of((*at)->name), name))
            return *at;
    struct host *h = v->host_count < MAX_HOSTS ? calloc(1, sizeof *h) : NULL;
    if (!h || !(h->name = text_copy(name, SIZE_MAX))) {
        free(h);
        return NULL;
    }
    h->lost_ms = INT64_MAX;
    v->host_count++;
    return *at = h;
}

/* Whether all is carried that a stage needs. */
static bool host_has(const struct host *h, enum stage stage)
{
    for (size_t i = 0; i < h->parcel_count; i++)
        if (h->parcels[i].stage <= stage && !h->parcels[i].done)
            return false;
    return true;
}

static bool host_is_done(const struct verdict *v, const struct host *h)
{
    return !h->failure && host_has(h, v->until) && h->stage >= v->until && h->expected == v->expect.n && (v->until || v->expect.n);
}

/* Stages are counted until the host is where it should be. */
static void host_reach(const struct verdict *v, struct host *h, enum stage stage, int64_t now_ms)
{
    if (host_is_done(v, h))
        return;
    for (; h->stage < stage; h->stage++)
        h->reached_ms[h->stage + 1] = now_ms - v->start_ms;
}

PRINTF_LIKE(2, 3) static void host_fail(struct host *h, const char *fmt, ...)
{
    char text[CONTEXT_BYTES];
    if (h->failure)
        return;
    TEXT_REST(text, fmt);
    h->failure = text_safe(bytes_of(text));
    if (!h->failure)
        h->failure = unexplained;
}

/* What keeps uploads from a host, for the reason of a time-out; NULL: nothing. */
static void host_trouble(struct host *h, const char *text)
{
    free(h->trouble);
    h->trouble = text ? text_safe(bytes_of(text)) : NULL;
}

/* Keeps a line of the host's log, made safe; the oldest gives way. */
static void host_context(struct host *h, struct bytes head, struct bytes text)
{
    struct buf line = { 0 };
    while (text.n && (text.p[text.n - 1] == '\n' || text.p[text.n - 1] == '\r'))
        text.n--;
    put_text(&line, head, NULL);
    buf_putc(&line, ' ');
    put_text(&line, (struct bytes){ text.p, min_size(text.n, CONTEXT_BYTES) }, NULL);
    char *copy = text_copy((struct bytes){ line.p, line.len }, CONTEXT_BYTES);
    buf_free(&line);
    if (copy && h->context_count == CONTEXT_LINES) {
        free(h->context[0]);
        memmove(h->context, h->context + 1, (size_t)--h->context_count * sizeof *h->context);
    }
    if (copy)
        h->context[h->context_count++] = copy;
}

/* -reject: a line in which one of the texts stands is a failure. */
static void verdict_reject(const struct verdict *v, struct host *h, struct bytes text)
{
    while (text.n && v->reject.n && !h->failure) {
        struct bytes line = bytes_take(&text, '\n');
        for (size_t i = 0; i < v->reject.n; i++)
            if (bytes_match(line, v->reject.v[i]))
                host_fail(h, "-reject %s: %.*s", v->reject.v[i], TEXT_OF(line, CONTEXT_BYTES));
    }
}

static void verdict_log(const struct verdict *v, struct host *h, const struct AgentLog *log)
{
    host_context(h, (struct bytes){ log->level.p, min_size(log->level.n, 8) }, log->message);
    bool serious = bytes_eq(log->level, BYTES("WARN")) || bytes_eq(log->level, BYTES("ERROR"));
    for (size_t i = 0; serious && i < PB_COUNT(silent_failures); i++)
        if (bytes_contain(log->message, silent_failures[i]))
            host_fail(h, "log: %.*s", TEXT_OF(log->message, 200));
    verdict_reject(v, h, log->message);
}

/* The host says where it stands: by an event, or (status NULL) by its state. */
static void host_stands(const struct verdict *v, struct host *h, struct bytes type, const struct bytes *status,
                        int64_t now_ms)
{
    size_t row = ROW_FIND(waits, type);
    h->wait = row < PB_COUNT(waits) ? &waits[row] : NULL;
    for (size_t i = 0; !h->failure && i < PB_COUNT(stands); i++)
        if (bytes_eq(type, bytes_of(stands[i].type)) &&
            (!stands[i].status || (status ? bytes_eq(*status, bytes_of(stands[i].status)) : stands[i].state)))
            host_reach(v, h, stands[i].stage, now_ms);
}

static void verdict_event(const struct verdict *v, struct host *h, const struct AgentEvent *event, int64_t now_ms)
{
    struct buf name = { 0 };
    buf_put(&name, event->event_type.p, event->event_type.n);
    buf_putc(&name, '/');
    buf_put(&name, event->status.p, event->status.n);
    struct bytes told = { name.p, name.failed ? 0 : name.len };
    host_context(h, BYTES("event"), told);
    if (h->expected < v->expect.n && bytes_eq(told, bytes_of(v->expect.v[h->expected])))
        h->expected++;
    if (bytes_eq(event->status, BYTES("Failed")) || name.failed)
        host_fail(h, "event %.*s", TEXT_OF(told, 200));
    host_stands(v, h, event->event_type, &event->status, now_ms);
    verdict_reject(v, h, told);
    verdict_reject(v, h, event->details);
    buf_free(&name);
}

/* A message of the host has come. */
static void verdict_message(struct verdict *v, struct host *h, const struct ClientStreamMessage *msg, size_t n,
                            int64_t now_ms)
{
    h->messages++;
    h->bytes += n;
    if (msg->agent_log)
        verdict_log(v, h, msg->agent_log);
    else if (msg->agent_event)
        verdict_event(v, h, msg->agent_event, now_ms);
    else if (msg->agentStateRes && bytes_eq(msg->agentStateRes->state, BYTES("Failed")))
        host_fail(h, "state Failed");
    else if (msg->agentStateRes)
        host_stands(v, h, msg->agentStateRes->state, NULL, now_ms);
    else if (msg->run_res && msg->run_res->error.n)
        host_fail(h, "run_res: %.*s", TEXT_OF(msg->run_res->error, 200));
    else if (msg->run_res)
        host_reach(v, h, STAGE_ACCEPTED, now_ms);
}

/* A stream of the host has shown its kind (by = 1), or has ended (by = -1). */
static void verdict_stream(struct verdict *v, struct host *h, bool agent, int by, int64_t now_ms)
{
    h->had_agent |= agent;
    h->had_forwarder |= !agent;
    if (!agent)
        return;
    h->agents += (unsigned)by;
    h->lost_ms = h->agents ? INT64_MAX : now_ms;
    host_reach(v, h, STAGE_CONNECTED, now_ms);
}

static void verdict_end(struct verdict *v, int status)
{
    v->over = true;
    v->status = status;
}

/* What a host has not sent when it has not reached a stage. */
static const char *const stage_signs[STAGES] = {
    [STAGE_ACCEPTED] = "it has not answered the manifest (no run_res)",
    [STAGE_RUNNING] = "no event or state Running has come",
    [STAGE_READY] = "no event ConsumingResults/Ready has come",
    [STAGE_COMPLETE] = "no event Complete/Completed has come",
};

/* What a time-out was waiting for, for one host. */
static void put_missing(struct buf *out, const struct verdict *v, const struct host *h)
{
    const struct parcel *cut = NULL, *unasked = NULL;
    bool served = false, lacking = false;     /* of what the host says it waits for */
    for (size_t i = h->parcel_count; i-- > 0;) {
        const struct parcel *p = &h->parcels[i];
        bool awaited = h->wait && strcmp(p->what, h->wait->what) == 0;
        cut = p->begun && !p->done ? p : cut;
        unasked = p->stage == STAGES && !p->begun ? p : unasked;
        served |= awaited && p->done;
        lacking |= awaited && !p->done;
    }
    buf_printf(out, "%s stood at %s", h->name, stage_names[h->stage]);
    if (!h->had_agent)
        buf_puts(out, "; only its log-forwarder connected: is the agent running? Its AGENT_CVM_GRPC_URL must be this server");
    else if (h->trouble)
        buf_printf(out, "; %s", h->trouble);
    else if (cut && cut->fetched)
        buf_printf(out, "; the agent fetched the %s, but never asked for its key", cut->what);
    else if (cut)
        buf_printf(out, "; the %s ", cut->what), put_text(out, bytes_of(cut->name), NULL),
            buf_printf(out, " stood at " BYTES_FMT "%s%s", BYTES_OF(cut->bytes), !cut->where ? "" :
                       cut->stage == STAGE_COMPLETE ? " on their way from " : " on its way to ", cut->where ? cut->where : "");
    else if (!h->had_forwarder && h->stage >= STAGE_ACCEPTED)
        buf_printf(out, "; no events, because no log-forwarder connected%s",
                   v->poll_ms == INT64_MAX ? ", and -poll is off" : "");
    else if (h->expected < v->expect.n)
        buf_puts(out, "; event "), put_text(out, bytes_of(v->expect.v[h->expected]), NULL),
            buf_puts(out, " was not seen");
    else if (unasked)
        buf_printf(out, "; the agent never asked for the %s", unasked->what);
    else if (h->stage < v->until && served && !lacking)
        buf_printf(out, "; the delivery of the %s is complete, but %s", h->wait->what, stage_signs[h->stage + 1]);
    else if (h->stage < v->until)
        buf_printf(out, "; %s", h->wait ? h->wait->cure : stage_signs[h->stage + 1]);
}

static void verdict_timeout(struct verdict *v, unsigned done)
{
    unsigned reached = 0;
    for (const struct host *h = v->hosts; h; h = h->next)
        reached += h->stage >= v->until;
    bool stage = v->until && reached < v->agents;
    buf_printf(&v->why, "%s%s after " SECONDS " s", stage ? stage_names[v->until] : "not all expected events seen",
               stage ? " not reached" : "", SECONDS_OF(v->timeout_ms - v->start_ms));
    if (!v->hosts)
        buf_puts(&v->why, ": no agent connected: is one running, with this server in its AGENT_CVM_GRPC_URL?");
    else if (v->agents > 1)
        buf_printf(&v->why, ": %u of %u agents got there", done, v->agents);
    for (const struct host *h = v->hosts; h; h = h->next)
        if (!host_is_done(v, h)) {
            buf_puts(&v->why, ": ");
            put_missing(&v->why, v, h);
        }
    verdict_end(v, VERDICT_TIMEOUT);
}

/* Looks at where everybody stands.  Called after every turn of the loop; returns when it has something to do of itself. */
static int64_t verdict_tick(struct verdict *v, int64_t now_ms)
{
    unsigned done = 0;
    if (!v->wanted || v->over)
        return INT64_MAX;
    for (const struct host *h = v->hosts; h; h = h->next) {
        done += host_is_done(v, h);
        if (h->failure && v->end_ms == INT64_MAX) {
            v->end_ms = now_ms + CONTEXT_MS;
            buf_printf(&v->why, "the agent %s failed: %s", h->name, h->failure);
        }
    }
    int64_t at = earlier(v->end_ms, earlier(v->timeout_ms, v->next_poll_ms));
    if (v->end_ms != INT64_MAX) {
        if (now_ms >= v->end_ms)
            verdict_end(v, VERDICT_FAILED);
        return at;
    }
    if (done && done >= v->agents) {
        buf_printf(&v->why, "%s%s after " SECONDS " s", v->until ? stage_names[v->until] : "all expected events",
                   v->until ? " reached" : " seen", SECONDS_OF(now_ms - v->start_ms));
        verdict_end(v, VERDICT_REACHED);
        return at;
    }
    for (const struct host *h = v->hosts; h && !v->over; h = h->next) {
        int64_t due = h->lost_ms == INT64_MAX || host_is_done(v, h) ? INT64_MAX : h->lost_ms + v->grace_ms;
        at = earlier(at, due);
        if (now_ms < due)
            continue;
        buf_printf(&v->why, "the agent %s was lost at %s: its stream ended and it did not come back within "
                   SECONDS " s", h->name, stage_names[h->stage], SECONDS_OF(v->grace_ms));
        verdict_end(v, VERDICT_LOST);
    }
    if (!v->over && now_ms >= v->timeout_ms)
        verdict_timeout(v, done);
    return at;
}

static const char *verdict_word(int status)
{
    return status == VERDICT_REACHED ? "PASSED" : status == VERDICT_FAILED ? "FAILED"
         : status == VERDICT_TIMEOUT ? "TIMED OUT" : status == VERDICT_LOST ? "LOST"
         : status == VERDICT_BROKEN ? "FAILED" : "INTERRUPTED";
}

/* What has been carried; for people, and as JSON. */
static void put_parcel(struct buf *out, const struct parcel *p)
{
    char hex[65];
    if (!p->done && !p->fetched)
        return;
    bool results = p->stage == STAGE_COMPLETE;
    buf_printf(out, results ? "cvms:      %s in " : "cvms:      %s ", p->what);
    put_text(out, bytes_of(p->name), NULL);
    buf_puts(out, results ? "" : p->fetched ? " fetched" : p->begun ? " uploaded" : " was there already");
    if (p->begun)
        buf_printf(out, ", " BYTES_FMT, BYTES_OF(p->bytes));
    if (p->sealed)
        buf_puts(out, p->keys ? ", and its key" : ", but not its key");
    if (p->fetched > 1)
        buf_printf(out, ", %u times", p->fetched);
    hex_text(hex, p->hash, sizeof p->hash);
    buf_printf(out, results && p->begun ? "\ncvms:      SHA3-256 %s\n" : "\n", hex);
}

static void put_parcel_json(struct buf *out, const struct parcel *p, bool first)
{
    char hex[65];
    hex_text(hex, p->hash, sizeof p->hash);
    buf_printf(out, "%s{\"what\":\"%s\",\"file\":", first ? "" : ",", p->what);
    pb_json_string(out, bytes_of(p->name));
    buf_printf(out, ",\"done\":%s,\"bytes\":%llu", p->done ? "true" : "false", (unsigned long long)p->bytes);
    if (p->stage == STAGES)
        buf_printf(out, ",\"fetched\":%u,\"keys\":%u", p->fetched, p->keys);
    buf_printf(out, p->done && p->stage == STAGE_COMPLETE ? ",\"sha3_256\":\"%s\"}" : "}", hex);
}

/* The summary for people.  color: of the verdict's word, or "". */
static void verdict_summary(const struct verdict *v, struct buf *out, const char *color)
{
    buf_printf(out, "cvms: %s%s%s: %.*s (exit status %d)\n", color, verdict_word(v->status), *color ? COLOR_OFF : "",
               (int)v->why.len, (const char *)v->why.p, v->status);
    for (const struct host *h = v->hosts; h; h = h->next) {
        buf_printf(out, "cvms:   %s:", h->name);
        for (int i = STAGE_CONNECTED; i <= (int)h->stage; i++)
            buf_printf(out, " %s " SECONDS "%s", stage_names[i], SECONDS_OF(h->reached_ms[i]),
                       i < (int)h->stage ? "," : " s\ncvms:     ");
        buf_printf(out, " %llu message%s, " BYTES_FMT "\n", (unsigned long long)h->messages, PLURAL(h->messages),
                   BYTES_OF(h->bytes));
        for (size_t i = 0; i < h->parcel_count; i++)
            put_parcel(out, &h->parcels[i]);
        if (!h->failure)
            continue;
        buf_printf(out, "cvms:      failed: %s\n", h->failure);
        if (h->context_count)
            buf_printf(out, "cvms:   the last lines of %s:\n", h->name);
        for (size_t i = 0; i < h->context_count; i++)
            buf_printf(out, "cvms:     | %s\n", h->context[i]);
    }
}

/* XML text: the five characters, and nothing that XML 1.0 forbids (put_text has escaped control characters). */
static void put_xml(struct buf *out, struct bytes t)
{
    static const char *const names[256] = {
        ['<'] = "&lt;", ['>'] = "&gt;", ['&'] = "&amp;", ['"'] = "&quot;", ['\''] = "&apos;",
    };
    for (size_t i = 0; i < t.n; i++)
        if (names[t.p[i]])
            buf_puts(out, names[t.p[i]]);
        else
            buf_putc(out, t.p[i]);
}

/* JUnit XML: the verdict is one test case, the summary its output. */
static void verdict_junit(const struct verdict *v, struct buf *out, int64_t ms)
{
    struct buf summary = { 0 };
    verdict_summary(v, &summary, "");
    buf_printf(out, "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"cvms\" tests=\"1\" failures=\"%d\" "
               "errors=\"0\" time=\"" SECONDS "\">\n  <testcase classname=\"cvms\" name=\"%s\" time=\"" SECONDS "\">\n",
               v->status != 0, SECONDS_OF(ms), v->until ? stage_names[v->until] : "expect", SECONDS_OF(ms));
    if (v->status) {
        buf_puts(out, "    <failure message=\"");
        put_xml(out, (struct bytes){ v->why.p, v->why.len });
        buf_printf(out, "\" type=\"%s\"/>\n", verdict_word(v->status));
    }
    buf_puts(out, "    <system-out>");
    put_xml(out, (struct bytes){ summary.p, summary.len });
    buf_puts(out, "</system-out>\n  </testcase>\n</testsuite>\n");
    out->failed |= summary.failed;
    buf_free(&summary);
}

static void verdict_json(const struct verdict *v, struct buf *out, int64_t ms)
{
    buf_printf(out, "{\"verdict\":\"%s\",\"status\":%d,\"seconds\":" SECONDS ",\"why\":", verdict_word(v->status),
               v->status, SECONDS_OF(ms));
    pb_json_string(out, (struct bytes){ v->why.p, v->why.len });
    buf_puts(out, ",\"agents\":[");
    for (const struct host *h = v->hosts; h; h = h->next) {
        buf_puts(out, "{\"name\":");
        pb_json_string(out, bytes_of(h->name));
        buf_printf(out, ",\"stage\":\"%s\",\"stages\":{", stage_names[h->stage]);
        for (int i = STAGE_CONNECTED; i <= (int)h->stage; i++)
            buf_printf(out, "%s\"%s\":" SECONDS, i > STAGE_CONNECTED ? "," : "", stage_names[i],
                       SECONDS_OF(h->reached_ms[i]));
        buf_printf(out, "},\"messages\":%llu,\"bytes\":%llu,\"failure\":", (unsigned long long)h->messages,
                   (unsigned long long)h->bytes);
        if (h->failure)
            pb_json_string(out, bytes_of(h->failure));
        else
            buf_puts(out, "null");
        buf_puts(out, h->parcel_count ? ",\"deliveries\":[" : "");
        for (size_t i = 0; i < h->parcel_count; i++)
            put_parcel_json(out, &h->parcels[i], i == 0);
        buf_puts(out, h->parcel_count ? "],\"lines\":[" : ",\"lines\":[");
        for (size_t i = 0; h->failure && i < h->context_count; i++) {
            buf_puts(out, i ? "," : "");
            pb_json_string(out, bytes_of(h->context[i]));
        }
        buf_puts(out, h->next ? "]}," : "]}");
    }
    buf_puts(out, "]}\n");
}

/* The flags that ask for a verdict. */
static void verdict_setup(struct verdict *v, struct options *o, struct mistakes *r)
{
    *v = (struct verdict){ .timeout_ms = INT64_MAX, .end_ms = INT64_MAX, .next_poll_ms = INT64_MAX,
                           .grace_ms = o->grace_ms, .poll_ms = o->poll_ms > 0 ? o->poll_ms : INT64_MAX,
                           .agents = (unsigned)o->agents };
    if (o->until)
        v->until = (enum stage)(STAGE_CONNECTED + check_choice(r, "until", o->until, stage_names + STAGE_CONNECTED,
                                                               STAGES - STAGE_CONNECTED));
    v->expect = list_split(o, &o->expect);
    for (size_t i = 0; i < v->expect.n; i++)
        if (!strchr(v->expect.v[i], '/'))
            tell(r, USAGE, "-expect: \"%s\" is not TYPE/STATUS", v->expect.v[i]);
    v->reject = o->reject;
    for (size_t i = 0; i < v->reject.n; i++)
        if (!v->reject.v[i][strspn(v->reject.v[i], "*")])
            tell(r, USAGE, "-reject: \"%s\" stands in every line; give a part of the lines that are failures",
                 v->reject.v[i]);
    if (o->agents > MAX_HOSTS)
        tell(r, USAGE, "-agents: a verdict tells at most %d agents apart", MAX_HOSTS);
    v->wanted = o->until || v->expect.n || o->reject.n;
    or_exit(buf_room(&v->why, 1024));    /* so that the end has its reason, however short memory is then */
    static const char *const of_verdict[] = { "report", "grace", "poll" };
    for (size_t i = 0; i < PB_COUNT(of_verdict); i++)
        if (option_given(o, of_verdict[i]) && !v->wanted)
            tell(r, USAGE, "-%s: there is no verdict; add -until STAGE", of_verdict[i]);
    if ((o->timeout_ms || o->agents > 1) && !o->until && !v->expect.n)
        tell(r, USAGE, "-%s: there is nothing to wait for; add -until STAGE or -expect TYPE/STATUS",
             o->timeout_ms ? "timeout" : "agents");
}

/* The clock of the verdict starts when the port is open. */
static void verdict_start(struct verdict *v, const struct options *o, int64_t now_ms)
{
    v->start_ms = now_ms;
    if (o->timeout_ms)
        v->timeout_ms = now_ms + o->timeout_ms;
    if ((v->wanted || v->control) && o->poll_ms)
        v->next_poll_ms = now_ms + o->poll_ms;
}

/* ==== 17. Delivery: uploads, results, what agents fetch =============================================================
 * Owns: the users' side of a direct run: their key, and the calls of agent.AgentService by which algorithm and datasets
 * reach each agent host and its results come back; of a remote run the resources, their key broker and attestation agent.
 * Never: guesses where an agent stands; it acts on what the agent has said.  Serves nothing but the resources.
 */
enum way { WAY_CLI, WAY_UPLOAD, WAY_HTTP, WAY_HTTP_PLAIN, WAY_OCI, WAY_OCI_PLAIN, WAYS };
static const char *const way_names[WAYS] = { "cli", "upload", "http", "http-plain", "oci", "oci-plain" };

static bool way_fetches(enum way way)
{
    return way >= WAY_HTTP;
}

static bool way_image(enum way way)
{
    return way >= WAY_OCI;
}

static bool way_sealed(enum way way)
{
    return way == WAY_HTTP || way == WAY_OCI;
}

enum {
    FETCHES_MAX = 1000,               /* under way at a time: each has a descriptor */
    STILL_MS = 300000,                /* one over HTTP/2 whose window stays shut for so long ends, and a call that stands still */
    RESULTS_NAME = 100,               /* bytes of a host's name in that of its results */
    PIECE_LEN = 1 << 20,              /* bytes of a file in one message */
    SERVICE_PORT = 7002,              /* of an agent, whatever the manifest says */
    SERVICE_CONNECTIONS = 100,        /* at a time, to a stand-in */
    REDIAL_MS = 500,
    UNREACHABLE_MS = 2000,            /* before it is told that a port is not open yet */
    BACKOFF_MAX = 5,                  /* doublings of REDIAL_MS between calls that break off */
    ARGS_MAX = 8192,                  /* bytes of arguments in a call's metadata: one frame, and most servers' limit */
};

/* The states of an agent, which its events carry as well, in the order in which a run goes through them. */
enum agent_state {
    AGENT_UNKNOWN, AGENT_IDLE, AGENT_MANIFEST, AGENT_ALGORITHM, AGENT_DATA, AGENT_RUNNING, AGENT_RESULTS,
    AGENT_COMPLETE, AGENT_STATES
};
static const char *const agent_states[AGENT_STATES] = {
    "", "Idle", "ReceivingManifest", "ReceivingAlgorithm", "ReceivingData", "Running", "ConsumingResults", "Complete",
};

/* What the users of an agent do: who they are to it, and in which states it listens to them. */
enum user_role { ROLE_ALGORITHM, ROLE_DATA, ROLE_RESULT, ROLES };
static const struct {
    const char *what, *user_id;
    enum agent_state from, until;
} roles[ROLES] = {
    { "algorithm", "algorithm-provider", AGENT_ALGORITHM, AGENT_ALGORITHM },
    { "dataset", "data-provider", AGENT_DATA, AGENT_DATA },
    { "results", "consumer", AGENT_RESULTS, AGENT_COMPLETE },
};

/* Words of a status by which an agent says "not now"; all else is a refusal. */
static const char *const not_yet[] = { "not expecting this operation", "results are not yet ready" };

/* One call, the same for every agent. */
struct errand {
    enum user_role role;
    const struct checksum *input;     /* NULL: the results */
    const char *filename;
    const char **metadata;            /* name, value, ..., NULL */
};

/* A file or folder that agents fetch, as it is or sealed.  Its name and nonce are made anew with its hash. */
struct resource {
    enum user_role role;
    const struct checksum *input;
    const char *name;                 /* of the file */
    struct Source *source;            /* in the manifest */
    struct KBSConfig *kbs;
    bool sealed;
    struct image *image;              /* NULL: it is not an image; else path is that of all its parts */
    uint8_t hash[SHA3_256_LEN], nonce[SEAL_NONCE];
    size_t stem;                      /* as much of the path does not change */
    char path[48], url[400];          /* path: empty until it can be fetched */
    char key_path[40];                /* REPO/TYPE/TAG at the key broker */
};

/* What all agents have in common. */
struct delivery {
    struct loop *loop;
    struct verdict *verdict;
    const struct options *o;
    struct manifest *manifest;
    struct ComputationRunReq *req;    /* of the manifest */
    struct KBSConfig *kbs;            /* its own, if we have made it */
    enum way algorithm, data;
    bool wanted, signs, asks;         /* signs: there are uploads or results; asks: an agent is to be asked for its state */
    bool sealed, secure;              /* something encrypted is fetched; over TLS */
    struct resource *resources;
    size_t resource_count;
    uint8_t seal_key[AES_KEY];
    char token[40], base[320];        /* what GetToken gives; the URLs' beginning */
    unsigned fetches;                 /* that are under way */
    struct user_key *key;
    struct bytes public_key;          /* its public half, once it has been asked for, */
    const char *signature[ROLES];     /* and what it signs */
    struct errand *errands;
    size_t count;
    struct address at;                /* -agent-address, if it is given */
    struct addrinfo *addresses;
    struct courier *couriers;
    char announced[40];               /* the roles that it plays, for a stand-in to know what to wait for */
    uint8_t *piece;                   /* PIECE_LEN bytes on their way from a file into a message */
};

/* What is done for one agent host.  The errands before `next` are done. */
struct courier {
    struct courier *after;
    struct delivery *delivery;
    struct host *host;
    struct dial dial;
    struct addrinfo *own;             /* the addresses of `where`; NULL: not looked up, or those of -agent-address */
    struct link *link;                /* of the call that is made now; NULL: none */
    char where[300];                  /* its service, HOST:PORT */
    enum agent_state state;
    unsigned version, runs, broken;   /* of the manifest that it has; results' names used; calls that broke off in a row */
    size_t next;
    bool ask, over, job_id;           /* ask it for its state; the call has ended */
    bool told, dropped;               /* that the port is shut; it took the last connection, but never spoke HTTP/2 */
    int64_t begin_ms, redial_ms, unreachable_ms;  /* unreachable_ms: the first try that failed; INT64_MAX: none */
    struct source source;
    bool open, extra, whole;          /* source is open, and is -algo-requirements; all has been handed to gRPC */
    uint64_t pieces, expected;        /* messages of this source; the results' size (UINT64_MAX: not known) */
    int fd;                           /* of the results' file, -1: none */
    char *path, *part;                /* its name, and the one that it has until it is complete */
    struct sha3_256 hash;
};

static struct parcel *courier_parcel(const struct courier *c)
{
    return &c->host->parcels[c->next];
}

static const struct errand *courier_errand(const struct courier *c)
{
    return &c->delivery->errands[c->next];
}

/* A line about what is delivered to a host. */
#define delivery_note(d, h, ...) \
    core_tell(&(d)->loop->core, (struct whom){ .name = bytes_of((h)->name), .kind = "delivery" }, __VA_ARGS__)
#define courier_note(c, ...) delivery_note((c)->delivery, (c)->host, __VA_ARGS__)

/* Nothing more is done for this agent until its next run.  The verdict, if one is wanted, is its failure. */
PRINTF_LIKE(2, 3) static void courier_fail(struct courier *c, const char *fmt, ...)
{
    char text[800];
    TEXT_REST(text, fmt);
    courier_note(c, "%s", text);
    host_fail(c->host, "%s", text);
    c->over = true;
    c->next = c->delivery->count;
}

/* The agent is to say where it stands, now or when it is back. */
static void courier_ask(struct courier *c)
{
    c->ask = c->delivery->asks = true;
}

/* Lets go of the files of a call. */
static void courier_close(struct courier *c)
{
    if (c->open)
        source_close(&c->source);
    if (c->fd >= 0)
        close(c->fd);
    if (c->part)
        unlink(c->part);
    free(c->part);
    c->part = NULL;
    c->fd = -1;
    c->open = false;
}

/* The call is over; what comes next waits for the agent to say where it stands, or for the time. */
static void courier_end(struct courier *c)
{
    c->over = true;
    courier_close(c);
}

/* "12.345 s, 67.8 MB/s" of what has taken its time. */
static void put_rate(char out[64], uint64_t bytes, int64_t ms)
{
    uint64_t tenths = bytes / 100 / (uint64_t)(ms > 0 ? ms : 1) ;
    text_printf(out, 64, SECONDS " s, %llu.%u MB/s", SECONDS_OF(ms), (unsigned long long)tenths / 10,
                (unsigned)(tenths % 10));
}

static void courier_done(struct courier *c)
{
    const struct errand *e = courier_errand(c);
    struct parcel *p = courier_parcel(c);
    char rate[64];
    put_rate(rate, p->bytes, c->delivery->loop->core.now_ms - c->begin_ms);
    p->done = true;
    c->broken = 0;
    if (e->role == ROLE_RESULT) {
        char hex[2 * SHA3_256_LEN + 1];
        hex_text(hex, p->hash, SHA3_256_LEN);
        courier_note(c, "results in %s: " BYTES_FMT ", %s", p->name, BYTES_OF(p->bytes), rate);
        courier_note(c, "SHA3-256 %s", hex);
        c->runs++;
        courier_ask(c);
    } else {
        courier_note(c, "%s %s is uploaded: " BYTES_FMT ", %s", roles[e->role].what, p->name, BYTES_OF(p->bytes), rate);
    }
    c->next++;
    if (c->next < c->delivery->count && courier_errand(c)->role == ROLE_DATA && c->state < AGENT_DATA)
        c->state = AGENT_DATA;        /* it says so itself, but later */
}

/* A call, or a body over HTTP/2, has moved: the time that it may stand still begins anew.  Over HTTP/1 the connection
 * itself would be stuck. */
static void stream_moves(struct stream *s)
{
    if (!s->conn->http1)
        s->deadline_ms = s->conn->core->now_ms + STILL_MS;
}

/* ---- Uploads ---- */

/* Queues the next piece, or the end of the file.  Called whenever all that was queued is on its way. */
static void courier_pull(struct stream *s)
{
    struct courier *c = s->user;
    struct delivery *d = c->delivery;
    const struct errand *errand = courier_errand(c);
    struct err e;
    stream_moves(s);
    if (c->whole || c->over)
        return;
    ssize_t n = source_read(&c->source, d->piece, PIECE_LEN, &e);
    if (n == 0 && c->extra) {
        source_close(&c->source);
        c->extra = false;
        c->open = source_open(&c->source, errand->input->path, &e);
        n = c->open ? source_read(&c->source, d->piece, PIECE_LEN, &e) : -1;
    }
    if (n < 0) {
        courier_fail(c, "the upload of %s is given up: %s", errand->filename, e.text);
        return;
    }
    struct bytes piece = { d->piece, (size_t)n };
    if (n == 0 && c->pieces) {
        c->whole = true;
        grpc_half_close(s);
        return;
    }
    c->pieces += !c->extra;
    courier_parcel(c)->bytes += c->extra ? 0 : (uint64_t)n;
    if (errand->role == ROLE_DATA)
        grpc_send(s, &DataRequest_message,
                  &(struct DataRequest){ .dataset = piece, .filename = bytes_of(errand->filename) });
    else if (c->extra)
        grpc_send(s, &AlgoRequest_message, &(struct AlgoRequest){ .requirements = piece });
    else
        grpc_send(s, &AlgoRequest_message, &(struct AlgoRequest){ .algorithm = piece });
    s->conn->core->touched = true;
}

/* Opens what is to be uploaded.  False: told, and nothing will be. */
static bool courier_open(struct courier *c)
{
    const struct errand *errand = courier_errand(c);
    const struct checksum *in = errand->input;
    const char *extra = errand->role == ROLE_ALGORITHM ? c->delivery->o->algo_requirements : NULL;
    struct err e;
    if (in->version > c->version || checksum_changed(in->path, &in->id)) {
        courier_fail(c, "%s has changed since its hash was sent to the agent, so it is not uploaded", in->path);
        return false;
    }
    c->extra = present(extra);
    c->open = source_open(&c->source, c->extra ? extra : in->path, &e);
    if (!c->open)
        courier_fail(c, "%s can't be uploaded: %s", errand->filename, e.text);
    return c->open;
}

/* ---- Results ---- */

/* The results' name for this agent: that of -results, with the host's before its ending where there are several, and a
 * number from the second run on. */
static char *results_path(const struct courier *c)
{
    const char *path = c->delivery->o->results, *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    const char *dot = strrchr(name, '.');
    struct buf b = { 0 };
    if (!dot || dot == name)
        dot = name + strlen(name);
    buf_put(&b, path, (size_t)(dot - path));
    if (c->job_id || c->delivery->o->agents > 1 || c->after) {
        buf_putc(&b, '-');
        const char *h = c->host->name;
        for (size_t n = strnlen(h, RESULTS_NAME); n; n--, h++)
            buf_putc(&b, *h == '/' || *h == ':' || (unsigned char)*h < ' ' ? '_' : *h);
    }
    if (c->runs)
        buf_printf(&b, "-%u", c->runs + 1);
    buf_put(&b, dot, strlen(dot) + 1);
    return (char *)b.p;
}

/* Whether the file is that of another agent: names of hosts may differ only in what a file's name can't have, or end in
 * a number. */
static bool results_taken(const struct courier *c, const char *path)
{
    const struct courier *other = c->delivery->couriers;
    while (other && (other == c || !other->path || strcmp(other->path, path) != 0))
        other = other->after;
    return other != NULL;
}

static bool results_open(struct courier *c)
{
    free(c->path);
    while ((c->path = results_path(c)) && results_taken(c, c->path)) {
        free(c->path);
        c->runs++;
    }
    char *real = c->path ? realpath(c->path, NULL) : NULL;   /* a link stays one */
    c->part = c->path ? part_path(real ? real : c->path) : NULL;
    free(real);
    if (c->part) {
        output_forget(c->part);       /* of a run that was killed */
        c->fd = open(c->part, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    }
    if (c->fd < 0) {
        courier_fail(c, "-results: %s: %s", c->part ? c->part : c->delivery->o->results, strerror(errno));
        free(c->part);
        c->part = NULL;               /* what is there is not ours */
        return false;
    }
    courier_parcel(c)->name = c->path;
    c->expected = UINT64_MAX;
    sha3_256_init(&c->hash, sha3_features());
    return true;
}

static void results_headers(struct stream *s, const struct fields *f)
{
    struct courier *c = s->user;
    int64_t size = parse_decimal(f->value[F_FILE_SIZE]);
    c->expected = size >= 0 ? (uint64_t)size : UINT64_MAX;
}

static void results_message(struct stream *s, struct bytes wire)
{
    struct courier *c = s->user;
    struct core *core = s->conn->core;
    struct ResultResponse res = { 0 };
    bool unknown;
    stream_moves(s);
    if (c->over)
        return;
    pb_arena_reset(&core->arena);
    enum pb_error err = pb_decode(&ResultResponse_message, &res, wire, &core->arena, &unknown);
    if (err != PB_OK) {
        courier_fail(c, "a message of " BYTES_FMT " among the results is not an agent.ResultResponse: %s", BYTES_OF(wire.n),
                     pb_error_text[err]);
        return;
    }
    if (res.file.n > c->expected - courier_parcel(c)->bytes) {
        courier_fail(c, "the results go on after the " BYTES_FMT " that they should have", BYTES_OF(c->expected));
        return;
    }
    if (!fd_write(c->fd, res.file.p, res.file.n, -1)) {
        courier_fail(c, "-results: %s: %s after " BYTES_FMT "; what there is of it is removed", c->part, strerror(errno),
                     BYTES_OF(courier_parcel(c)->bytes));
        courier_close(c);
        return;
    }
    sha3_256_update(&c->hash, res.file.p, res.file.n);
    courier_parcel(c)->bytes += res.file.n;
}

/* All results are here: their file gets its name.  False: told. */
static bool results_finish(struct courier *c)
{
    struct parcel *p = courier_parcel(c);
    if (c->expected != UINT64_MAX && c->expected != p->bytes) {
        courier_fail(c, "the results end after " BYTES_FMT " of %llu", BYTES_OF(p->bytes), (unsigned long long)c->expected);
        return false;
    }
    char *real = text_copy((struct bytes){ (uint8_t *)c->part, strlen(c->part) - strlen(".part") }, SIZE_MAX);
    bool ok = close(c->fd) == 0 && real && rename(c->part, real) == 0;
    free(real);
    c->fd = -1;
    if (!ok) {
        courier_fail(c, "-results: %s: %s", c->path, strerror(errno));
        return false;
    }
    free(c->part);
    c->part = NULL;
    sha3_256_final(&c->hash, p->hash);
    return true;
}

/* ---- A call ---- */

/* The call broke off, or came too early: the agent is asked where it stands, and all goes on from there. */
static void courier_again(struct courier *c)
{
    struct parcel *p = courier_parcel(c);
    courier_ask(c);
    c->state = AGENT_UNKNOWN;
    c->redial_ms = c->delivery->loop->core.now_ms + ((int64_t)REDIAL_MS << c->broken);
    c->broken += c->broken < BACKOFF_MAX;
    p->begun = false;
    p->bytes = 0;
}

/* Its service can't be reached: the agent knows of no call, so the next try does not wait for its word. */
static void courier_unreachable(struct courier *c, const char *why)
{
    int64_t now = c->delivery->loop->core.now_ms;
    char text[500];
    c->redial_ms = now + REDIAL_MS;
    c->unreachable_ms = c->unreachable_ms < now ? c->unreachable_ms : now;
    text_printf(text, sizeof text, "its service at %s can't be reached: %s; if it is reached by another address, as behind "
                "a forwarded port, give -agent-address HOST:PORT", c->where, why);
    host_trouble(c->host, text);
    if (!c->told && now - c->unreachable_ms >= UNREACHABLE_MS) {
        c->told = true;
        courier_note(c, "%s; trying on", text);
    }
}

static void courier_status(struct stream *s, unsigned status, struct bytes words)
{
    struct courier *c = s->user;
    const struct errand *errand = courier_errand(c);
    bool early = false;
    if (c->over || c->delivery->loop->stop_why)
        return;
    for (size_t i = 0; i < PB_COUNT(not_yet); i++)
        early |= bytes_contain(words, not_yet[i]);
    bool results = errand->role == ROLE_RESULT;
    c->dropped = !s->conn->settings_seen;
    if (c->dropped) {
        char why[300];
        text_printf(why, sizeof why, "%.*s", (int)words.n, words.n ? (const char *)words.p : "");
        why[strcspn(why, ";")] = 0;   /* what follows is advice for a client command */
        courier_parcel(c)->begun = false;
        courier_unreachable(c, why);
    } else if (status == GRPC_OK && !results && !c->whole) {
        courier_fail(c, "the agent ended the upload of the %s before it had all of it", roles[errand->role].what);
    } else if (status == GRPC_OK) {
        if (!results || results_finish(c))
            courier_done(c);
    } else if (s->grpc.ended && status != GRPC_DEADLINE_EXCEEDED) {
        courier_fail(c, "the %s can't be taken: %.*s", roles[errand->role].what, (int)words.n, (const char *)words.p);
    } else if (status == GRPC_UNAVAILABLE || s->grpc.broken || s->grpc.ended) {
        char broke[600];
        words = s->grpc.ended ? BYTES("nothing has moved for 300 s") : words;
        text_printf(broke, sizeof broke, "the %s of %s %s %s broke off after " BYTES_FMT ": %.*s",
                    results ? "transfer" : "upload", courier_parcel(c)->name, results ? "from" : "to", c->where,
                    BYTES_OF(courier_parcel(c)->bytes), TEXT_OF(words, 300));
        courier_note(c, "%s", broke);
        host_trouble(c->host, broke);
        courier_again(c);
    } else if (early) {
        courier_again(c);
    } else {
        words = words.n ? words : bytes_of(grpc_status_names[status]);
        courier_fail(c, "the agent refused the %s: %.*s", roles[errand->role].what, (int)words.n, (const char *)words.p);
    }
    courier_end(c);
}

static void courier_closed(struct stream *s)
{
    s->user = NULL;
}

static const struct grpc_method courier_methods[ROLES] = {
    { .path = "/agent.AgentService/Algo", .drained = courier_pull, .status = courier_status, .closed = courier_closed },
    { .path = "/agent.AgentService/Data", .drained = courier_pull, .status = courier_status, .closed = courier_closed },
    { .path = "/agent.AgentService/Result", .open = results_headers, .message = results_message,
      .status = courier_status, .closed = courier_closed },
};

/* The agent's service has been reached. */
static void courier_up(struct link *k)
{
    struct courier *c = k->user;
    if (c->over)
        return;                       /* another run has begun meanwhile */
    const struct errand *errand = courier_errand(c);
    bool results = errand->role == ROLE_RESULT;
    c->unreachable_ms = c->dropped ? c->unreachable_ms : INT64_MAX;
    c->told &= c->dropped;
    c->whole = false;
    c->pieces = 0;
    c->begin_ms = k->loop->core.now_ms;
    courier_parcel(c)->bytes = 0;
    if (!c->dropped)
        host_trouble(c->host, NULL);
    if (results ? !results_open(c) : !courier_open(c))
        return;
    struct stream *s = grpc_call(&k->conn, &courier_methods[errand->role], c->where, errand->metadata);
    if (!s) {
        courier_fail(c, "out of memory for a call");
        return;
    }
    courier_parcel(c)->begun = true;
    courier_parcel(c)->where = c->where;
    s->user = c;
    if (!c->dropped)
        courier_note(c, results ? "fetching the %s%s from %s" : "uploading the %s %s to %s", roles[errand->role].what,
                     results ? "" : errand->filename, c->where);
    if (results) {
        stream_moves(s);
        grpc_send(s, &ResultRequest_message, &(struct ResultRequest){ 0 });
        grpc_half_close(s);
        return;
    }
    courier_pull(s);
}

/* It could not be reached, or the call's connection has ended. */
static void courier_down(struct link *k, const char *why)
{
    struct courier *c = k->user;
    c->link = NULL;
    if (!k->connecting)
        return;
    c->dropped = false;
    courier_unreachable(c, why);
}

static void courier_dial(struct courier *c)
{
    struct delivery *d = c->delivery;
    const char *why = "out of memory";
    struct address at;
    if (!d->addresses && !c->own && address_parse(c->where, &at))
        c->own = resolve_host(at.host, (unsigned)at.port, AI_NUMERICHOST, &why);
    c->dial = (struct dial){ .endpoint = { .on = &grpc_client, .client = true, .max_message = (size_t)d->o->max_message },
                             .name = "agent", .addresses = d->addresses ? d->addresses : c->own,
                             .connect_ms = CONNECT_MS, .up = courier_up, .down = courier_down, .closed = courier_down };
    c->over = false;
    c->link = c->dial.addresses ? link_dial(d->loop, &c->dial, c) : NULL;
    if (!c->link)
        courier_fail(c, "can't connect to the agent's service at %s: %s", c->where, why);
}

/* ---- What the agents say ---- */

/* Nothing of what calls carry is there yet. */
static void host_calls(const struct delivery *d, struct host *h)
{
    for (size_t i = 0; i < d->count; i++)
        h->parcels[i] = (struct parcel){ .what = roles[d->errands[i].role].what, .name = d->errands[i].filename,
                                         .stage = d->errands[i].role == ROLE_RESULT ? STAGE_COMPLETE : STAGE_RUNNING };
}

/* What is carried for a host: as many as there are calls, then as many as there are resources.  False without memory. */
static bool host_parcels(struct delivery *d, struct host *h)
{
    size_t n = d->count + d->resource_count;
    if (h->parcels || !n || !(h->parcels = calloc(n, sizeof *h->parcels)))
        return h->parcels;
    h->parcel_count = n;
    host_calls(d, h);
    for (size_t i = 0; i < d->resource_count; i++)
        h->parcels[d->count + i] = (struct parcel){ .what = roles[d->resources[i].role].what, .stage = STAGES,
                                                    .name = d->resources[i].name, .sealed = d->resources[i].sealed };
    return true;
}

static struct courier *courier_of(struct delivery *d, struct host *h)
{
    if (h->courier)
        return h->courier;
    struct courier *c = calloc(1, sizeof *c);
    if (!c || !host_parcels(d, h)) {
        free(c);
        delivery_note(d, h, "out of memory: nothing is delivered to this agent");
        return NULL;
    }
    *c = (struct courier){ .delivery = d, .host = h, .next = d->count, .unreachable_ms = INT64_MAX, .fd = -1,
                           .after = d->couriers };
    d->couriers = c;
    h->courier = c;
    return c;
}

/* A run begins: whatever was under way is of the past. */
static void courier_start(struct courier *c, enum agent_state state, unsigned version)
{
    struct delivery *d = c->delivery;
    if (c->link)
        c->over = true;
    courier_close(c);
    c->next = 0;
    c->state = state;
    c->version = version;
    c->broken = 0;
    c->dropped = false;
    c->redial_ms = d->loop->core.now_ms;
    host_calls(d, c->host);
}

static enum agent_state agent_state_of(struct bytes name)
{
    enum agent_state state = AGENT_COMPLETE;
    while (state && !bytes_eq(name, bytes_of(agent_states[state])))
        state--;
    return state;
}

/* An agent has connected: one that was here before is asked where it stands.  A call to it may be lost without a word,
 * so a PING asks there too. */
static void delivery_back(const struct host *h)
{
    struct courier *c = h->courier;
    if (!c || !c->version)
        return;
    courier_ask(c);
    if (c->link && !c->link->connecting) {
        c->link->conn.heard_ms = c->delivery->loop->core.now_ms - SILENCE_MS;
        heap_set(c->delivery->loop, c->link, conn_deadline(&c->link->conn));
    }
}

/* A message of an agent host has come; peer is the address of its stream, port that of its service, version that of the
 * manifest on the stream. */
static void delivery_message(struct delivery *d, struct host *h, const struct ClientStreamMessage *msg,
                             const char *peer, unsigned port, bool job_id, unsigned version)
{
    struct courier *c = d->count && h ? courier_of(d, h) : NULL;
    struct address at;
    if (h)
        host_parcels(d, h);
    if (!c)
        return;
    c->job_id = job_id;
    if ((msg->run_res || msg->agentStateRes) && !c->link && address_parse(peer, &at)) {
        addresses_free(c->own);
        c->own = NULL;
        host_port(c->where, sizeof c->where, d->addresses ? d->at.host : at.host,
                  d->addresses ? (unsigned)d->at.port : port);
    }
    if (msg->run_res && !msg->run_res->error.n) {
        courier_start(c, AGENT_ALGORITHM, version);
    } else if (msg->agentStateRes && !c->link) {
        enum agent_state state = agent_state_of(msg->agentStateRes->state);
        if (c->version == 0 && state >= AGENT_ALGORITHM && state < AGENT_COMPLETE)
            courier_start(c, state, version);
        c->state = state;
    } else if (msg->agent_event && !bytes_eq(msg->agent_event->status, BYTES("Failed")) && c->version) {
        enum agent_state state = agent_state_of(msg->agent_event->event_type);
        if (state > c->state && c->state)
            c->state = state;
    }
}

/* Whether the host is to be asked for its state; it is asked once. */
static bool delivery_asks(const struct host *h)
{
    bool ask = h && h->courier && h->courier->ask;
    if (ask)
        h->courier->ask = false;
    return ask;
}

/* Shows on a terminal how far a transfer of over a second is.  Returns when to do so again. */
static int64_t courier_show(const struct courier *c, int64_t now_ms)
{
    struct loop *l = c->delivery->loop;
    const struct parcel *p = courier_parcel(c);
    uint64_t total = courier_errand(c)->role == ROLE_RESULT ? c->expected : c->source.size;
    char rate[64], of[32] = "", text[160];
    struct bytes name = base_name(p->name);
    struct buf safe = { 0 };
    if (!l->core.err_look || !p->begun)
        return INT64_MAX;
    if (now_ms - c->begin_ms < PROGRESS_MS)
        return c->begin_ms + PROGRESS_MS;
    put_rate(rate, p->bytes, now_ms - c->begin_ms);
    if (total != UINT64_MAX)
        text_printf(of, sizeof of, " of %llu", (unsigned long long)(total / 1000000));
    text_printf(text, sizeof text, "cvms: %.16s: %s %.*s, %llu%s MB, %s ", c->host->name, p->what, (int)min_size(name.n, 16),
                (const char *)name.p, (unsigned long long)(p->bytes / 1000000), of, rate);
    put_text(&safe, bytes_of(text), NULL);
    text_printf(l->progress, sizeof l->progress, "%.*s", (int)safe.len, safe.len ? (const char *)safe.p : "");
    buf_free(&safe);
    return now_ms + PROGRESS_STEP_MS;
}

/* Once a turn of the loop: calls that are over end, those that are due begin.  Returns when it wants its next turn. */
static int64_t delivery_tick(struct delivery *d, int64_t now_ms)
{
    int64_t at = INT64_MAX, show;
    for (struct courier *c = d->couriers; c; c = c->after) {
        if (c->link && c->over) {
            link_close(c->link, "the call is over");
            courier_close(c);
        }
        while (c->next < d->count && c->state > roles[courier_errand(c)->role].until && !c->link) {
            courier_note(c, "the agent has the %s %s already", courier_parcel(c)->what, courier_parcel(c)->name);
            courier_parcel(c)->done = true;
            c->next++;
        }
        show = c->link && !c->over && c->next < d->count ? courier_show(c, now_ms) : INT64_MAX;
        at = show < at ? show : at;
        if (c->link || c->next == d->count || c->state < roles[courier_errand(c)->role].from)
            continue;
        if (now_ms >= c->redial_ms)
            courier_dial(c);
        else if (c->redial_ms < at)
            at = c->redial_ms;
    }
    return at;
}

static void delivery_free(struct delivery *d)
{
    while (d->couriers) {
        struct courier *c = d->couriers;
        d->couriers = c->after;
        courier_close(c);
        addresses_free(c->own);
        free(c->path);
        free(c);
    }
    addresses_free(d->addresses);
    free(d->piece);
    wipe(d->seal_key, sizeof d->seal_key);
}

/* ---- What agents fetch ---- */

/* Called before the manifest is encoded, when hashes are known or have changed: a nonce is of one content only, and a
 * name shows which it is. */
static void resources_renew(void *arg)
{
    struct delivery *d = arg;
    if (d->kbs && !d->kbs->url.p)
        d->kbs->url = bytes_of(d->base);
    for (size_t i = 0; i < d->resource_count; i++) {
        struct resource *x = &d->resources[i];
        bool ours = !x->source->url.p || x->source->url.p == (uint8_t *)x->url;   /* else -set has another */
        char hex[17];
        if (x->image && !*x->image->name)
            continue;                 /* it could not be made anew: it keeps its old name */
        if (x->image) {
            text_printf(x->path, sizeof x->path, "/v2/%s", x->image->name);
            text_printf(x->url, sizeof x->url, "docker://%s/%s:latest", strstr(d->base, "//") + 2, x->image->name);
        } else if (x->path[x->stem] && memcmp(x->hash, x->input->hash, sizeof x->hash) == 0)
            continue;
        memcpy(x->hash, x->input->hash, sizeof x->hash);
        hex_text(hex, x->hash, sizeof hex / 2);
        bool whole = x->image || !x->sealed || random_fill(x->nonce, sizeof x->nonce);
        if (!x->image) {
            text_printf(x->path + x->stem, sizeof x->path - x->stem, "%s", whole ? hex : "");
            text_printf(x->url, sizeof x->url, "%s%s", d->base, x->path);
        }
        if (!whole)
            core_note(&d->loop->core, NULL, "%s can't be encrypted, so it is not served: no random numbers: %s", x->name,
                      strerror(errno));
        if (ours)
            x->source->url = bytes_of(x->url);
        if (!x->kbs->url.p)
            x->kbs->url = bytes_of(d->base);
    }
}

/* ---- What the flags ask for ---- */

static enum way way_parse(struct mistakes *r, const char *word, size_t n)
{
    for (int i = 0; i < WAYS; i++)
        if (strlen(way_names[i]) == n && strncmp(way_names[i], word, n) == 0)
            return (enum way)i;
    tell(r, USAGE, "-deliver: \"%.*s\" is no way to deliver; use cli, upload, http, http-plain, oci or oci-plain", (int)n,
         word);
    return WAY_UPLOAD;                /* which misses the fewest of the other flags */
}

/* The services that are there for what is delivered. */
static unsigned delivery_offers(const struct delivery *d)
{
    return (d->algorithm == WAY_HTTP || d->data == WAY_HTTP ? OFFER_TOKENS : 0) |
           (d->algorithm == WAY_OCI || d->data == WAY_OCI ? OFFER_UNWRAP : 0);
}

/* The key that encrypts what agents fetch, and the token of its broker. */
static void delivery_secrets(struct delivery *d, const struct options *o, struct mistakes *r)
{
    uint8_t token[16];
    struct err e;
    if (!d->sealed)
        return;
#if CVMS_TLS
    if (present(o->deliver_key) && !seal_key_load(o->deliver_key, d->seal_key, &e))
        tell(r, START, "-deliver-key: %s", e.text);
#else
    (void)o, (void)e;
    tell(r, USAGE, "-deliver http: this cvms was built without TLS (make TLS=0), and so without AES; use http-plain, or "
                   "build it with TLS");
#endif
    if (!random_fill(token, sizeof token) || (!present(o->deliver_key) && !random_fill(d->seal_key, sizeof d->seal_key)))
        tell(r, START, "-deliver http: the operating system gives no random numbers: %s", strerror(errno));
    memcpy(d->token, "cvms-", 5);
    hex_text(d->token + 5, token, sizeof token);
}

/* Where agents fetch from: -deliver-host, else where the port is open. */
static void delivery_base(struct delivery *d, const char *where)
{
    const char *given = d->o->deliver_host;
    struct address at, real;
    char host[300];
    text_printf(host, sizeof host, "%s", where);
    if (given && address_parse(given, &at) && address_parse(where, &real))
        host_port(host, sizeof host, at.host, (unsigned)(at.port < 0 ? real.port : at.port));
    text_printf(d->base, sizeof d->base, "%s://%s", d->secure ? "https" : "http", host);
}

/* Before the manifest is made: the ways, and the users' key, whose public half goes into it. */
static void delivery_setup(struct delivery *d, struct options *o, struct mistakes *r)
{
    const char *ways = o->deliver ? o->deliver : "cli", *comma = strchr(ways, ',');
    struct err e = { "" };
    d->o = o;
    d->algorithm = way_parse(r, ways, comma ? (size_t)(comma - ways) : strlen(ways));
    d->data = comma ? way_parse(r, comma + 1, strlen(comma + 1)) : d->algorithm;
    o->fetches_data = way_fetches(d->data);
    o->fetches = way_fetches(d->algorithm) || o->fetches_data;
    d->sealed = way_sealed(d->algorithm) || way_sealed(d->data);
    d->signs = d->algorithm == WAY_UPLOAD || d->data == WAY_UPLOAD || o->results;
    d->wanted = d->signs || o->fetches;
    const struct { const char *flag; bool used; const char *cure; } of_delivery[] = {
        { "private-key-path", d->wanted, "-deliver upload or -results FILE" },
        { "agent-address", d->signs, "-deliver upload or -results FILE" },
        { "deliver-host", o->fetches, "-deliver http" }, { "deliver-key", d->sealed, "-deliver http" },
    };
    for (size_t i = 0; i < PB_COUNT(of_delivery); i++)
        if (!of_delivery[i].used && option_given(o, of_delivery[i].flag))
            tell(r, USAGE, "-%s: nothing is delivered so; add %s", of_delivery[i].flag, of_delivery[i].cure);
    static const char *const of_algorithm[] = { "algo-requirements", "python-runtime" };
    for (size_t i = 0; i < PB_COUNT(of_algorithm); i++)
        if (d->algorithm != WAY_UPLOAD && option_given(o, of_algorithm[i]))
            tell(r, USAGE, "-%s: the algorithm is not uploaded from here; add -deliver upload", of_algorithm[i]);
    if (!d->wanted)
        return;
    if (!o->attested_tls && !o->manifest)
        o->attested_tls = "false";
    delivery_secrets(d, o, r);
    if (present(o->public_key_path) && !present(o->private_key_path) && !d->signs)
        return;
    if (present(o->public_key_path) && !present(o->private_key_path)) {
        tell(r, USAGE, "-private-key-path is missing: uploads and results are signed with the private half of "
                       "-public-key-path; without both, a key pair is made for the run");
        return;
    }
    d->key = present(o->private_key_path) ? user_key_load(o->private_key_path, &e) : user_key_make(&e);
    if (!d->key && present(o->private_key_path))
        tell(r, START, "%s; without -private-key-path and -public-key-path a key pair is made for the run; openssl ecparam "
                       "-name prime256v1 -genkey -noout makes one to keep", e.text);
    else if (!d->key)
        tell(r, START, "-deliver: %s", e.text);
}

/* The public half of the users' key, kept; empty without one. */
static struct bytes delivery_public(struct delivery *d, struct options *o)
{
    struct buf b = { 0 };
    if (d->key && !d->public_key.n) {
        or_exit(user_key_public(d->key, &b) ? b.p : NULL);
        d->public_key = (struct bytes){ memcpy(option_alloc(o, b.len), b.p, b.len), b.len };
    }
    buf_free(&b);
    return d->public_key;
}

/* base64 of the signature over the role's own word: what the agent knows a user by. */
static const char *delivery_signature(struct delivery *d, struct options *o, enum user_role role)
{
    struct buf b = { 0 }, text = { 0 };
    if (d->key && !d->signature[role]) {
        or_exit(user_key_sign(d->key, bytes_of(roles[role].user_id), &b) ? b.p : NULL);
        pb_base64(&text, (struct bytes){ b.p, b.len });
        buf_putc(&text, 0);
        d->signature[role] = memcpy(option_alloc(o, text.len), or_exit(text.failed ? NULL : text.p), text.len);
    }
    buf_free(&b);
    buf_free(&text);
    return d->key ? d->signature[role] : "";
}

/* A value that gRPC's metadata can carry: printable ASCII, without blanks at its ends. */
static void check_metadata(struct mistakes *r, const char *flag, struct bytes value)
{
    if (!bytes_printable(value) || (value.n && (value.p[0] == ' ' || value.p[value.n - 1] == ' ')))
        tell(r, USAGE, "-%s: \"%.*s\" can't be uploaded: gRPC carries it as metadata, which is printable ASCII without "
             "blanks at its ends", flag, TEXT_OF(value, 80));
}

/* Adds a call; key is the public half that its resource has in the manifest. */
static struct errand *delivery_add(struct delivery *d, struct options *o, struct mistakes *r, enum user_role role,
                                   const struct checksum *input, struct bytes key, struct bytes name)
{
    struct errand *errand = &d->errands[d->count++];
    struct bytes ours = delivery_public(d, o);
    size_t args = role == ROLE_ALGORITHM ? d->manifest->req.algorithm->algo_args.n : 0;
    errand->role = role;
    errand->input = input;
    errand->filename = option_text(o, name);
    errand->metadata = option_alloc(o, 2 * (args + 6) * sizeof *errand->metadata);
    errand->metadata[0] = "user-id", errand->metadata[1] = roles[role].user_id;
    errand->metadata[2] = "signature", errand->metadata[3] = delivery_signature(d, o, role);
    if (d->key && !bytes_eq(ours, key))
        tell(r, START, "-private-key-path: %s is not the other half of the public key that the manifest has for the %s%s%s: "
             "the agent would refuse it; leave the public keys out and the private one's own is used",
             present(o->private_key_path) ? o->private_key_path : "the key made for the run", roles[role].what,
             input ? " " : "", input ? errand->filename : "");
    return errand;
}

static void delivery_add_algorithm(struct delivery *d, struct options *o, struct mistakes *r)
{
    const struct manifest *m = d->manifest;
    const struct Algorithm *a = m->req.algorithm;
    if (!m->algo_input) {
        if (!a || !a->source)
            tell(r, USAGE, "-deliver upload: there is no algorithm to upload; give -algo-path");
        return;
    }
    const struct checksum *in = &m->inputs[m->input_count - 1];
    struct errand *errand = delivery_add(d, o, r, ROLE_ALGORITHM, in, a->userKey, base_name(in->path));
    const char **to = errand->metadata + 4;
    const struct bytes *arg = a->algo_args.items;
    if (!a->algo_type.n)
        tell(r, USAGE, "-algo-type is missing: an agent has to know how to run what is uploaded: bin, python, wasm or "
                       "docker");
    check_metadata(r, "algo-type", a->algo_type);
    *to++ = "algo_type", *to++ = option_text(o, a->algo_type);
    size_t len = 0;
    for (size_t i = 0; i < a->algo_args.n; i++) {
        check_metadata(r, "algo-args", arg[i]);
        len += arg[i].n + sizeof "algo_args" + 8;
        *to++ = "algo_args", *to++ = option_text(o, arg[i]);
    }
    if (len > ARGS_MAX)
        tell(r, USAGE, "-algo-args: %zu bytes are too long for the metadata of an upload, which takes %d", len, ARGS_MAX);
    check_metadata(r, "python-runtime", bytes_of(o->python_runtime));
    *to++ = "python_runtime", *to++ = o->python_runtime;
    struct stat st;
    struct err e;
    int fd = o->algo_requirements ? file_open(o->algo_requirements, &st, &e) : -1;
    if (o->algo_requirements && fd < 0)
        tell(r, START, "-algo-requirements: %s", e.text);
    if (fd >= 0)
        close(fd);
}

static void delivery_add_data(struct delivery *d, struct options *o, struct mistakes *r)
{
    const struct manifest *m = d->manifest;
    const struct Dataset *data = m->req.datasets.items;
    for (size_t i = 0; i < m->input_count - m->algo_input; i++) {
        const struct checksum *in = &m->inputs[i];
        struct bytes name = data[i].filename.n ? data[i].filename : base_name(in->path);
        struct errand *errand = delivery_add(d, o, r, ROLE_DATA, in, data[i].userKey, name);
        errand->metadata[4] = "decompress", errand->metadata[5] = data[i].decompress ? "true" : "false";
        if (!pb_utf8_valid(name))
            tell(r, USAGE, "-data-paths: %s: its name is not UTF-8 and can't be uploaded", in->path);
    }
}

static void delivery_add_results(struct delivery *d, struct options *o, struct mistakes *r)
{
    const struct pb_list *list = &d->manifest->req.result_consumers;
    const struct ResultConsumer *consumer = list->items;
    struct bytes key = delivery_public(d, o);
    size_t i = 0;
    while (i < list->n && !bytes_eq(consumer[i].userKey, key))
        i++;
    delivery_add(d, o, r, ROLE_RESULT, NULL, i < list->n ? key : (struct bytes){ 0 }, bytes_of(o->results));
    struct stat st;
    if (stat(o->results, &st) == 0 && (!S_ISREG(st.st_mode) || path_is_standard(o->results) >= 0))
        tell(r, USAGE, "-results: \"%s\" is not a regular file of its own; the results become one", o->results);
    char part[PATH_MAX];              /* the file that is written; a longer name is told by its opening */
    text_printf(part, sizeof part, *o->results ? "%s.part" : "%s", o->results);
    check_output(r, "results", part);
    if (d->verdict->until && d->verdict->until < STAGE_COMPLETE)
        tell(r, USAGE, "-results: with -until %s the run ends before they are there; use -until complete",
             stage_names[d->verdict->until]);
}

/* The endings of the files that an agent takes out of an image, by what it is to do with them; !: all but these. */
static const struct {
    const char *type, *endings;
} image_files[] = {
    { "python", ".py" },
    { "wasm", ".wasm .wat" },
    { "bin", "! .py .wasm .wat .js .sh .csv .json .txt .md" },
    { "", ".csv .json .txt .parquet .arrow .dat .zip .tar .gz .tgz" },
};

/* Whether the name ends in one of the words. */
static bool name_ends(struct bytes name, const char *words)
{
    for (size_t n; *words; words += n + (words[n] == ' ')) {
        n = strcspn(words, " ");
        if (name.n > n && memcmp(name.p + name.n - n, words, n) == 0 && *words != '!')
            return true;
    }
    return false;
}

/* type: the algorithm's, empty for a dataset. */
static void check_image(struct mistakes *r, const char *flag, struct bytes type, const char *path)
{
    struct stat st;
    size_t row = ROW_FIND(image_files, type);
    bool there = stat(path, &st) == 0, folder = there && S_ISDIR(st.st_mode);
    const char *endings = row < PB_COUNT(image_files) && there && !folder ? image_files[row].endings : "";
    if (!CVMS_TLS)
        tell(r, USAGE, "-deliver oci: this cvms was built without TLS (make TLS=0), and so without images; build it with TLS");
    else if (folder && type.n)
        tell(r, USAGE, "-%s: %s is a folder; an agent takes one file out of an image", flag, path);
    else if (*endings && name_ends(base_name(path), endings) == (*endings == '!'))
        tell(r, USAGE, "-%s: %s: agents take no file of this name out of an image; they want %s%s", flag, path,
             *endings == '!' ? "any ending but" : "", endings + (*endings == '!'));
    if (!pb_utf8_valid(base_name(path)))
        tell(r, USAGE, "-%s: %s: its name is not UTF-8 and can't stand in an image", flag, path);
}

/* Adds a resource: its place in the manifest, whose URL follows when the port is open and the hash is known. */
static void delivery_add_resource(struct delivery *d, struct options *o, enum user_role role, size_t i,
                                  struct checksum *input, enum way way)
{
    bool sealed = way_sealed(way);
    struct resource *x = &d->resources[d->resource_count++];
    struct ComputationRunReq *req = d->req;
    struct Dataset *data = role == ROLE_DATA ? (struct Dataset *)req->datasets.items + i : NULL;
    struct KBSConfig *kbs = option_alloc(o, sizeof *kbs);
    char part[32];
    text_printf(part, sizeof part, data ? "dataset-%lu" : "algorithm", (unsigned long)i);
    *x = (struct resource){ .role = role, .input = input, .name = option_text(o, base_name(input->path)), .sealed = sealed,
                            .source = new_source(o, d->manifest->compat, data ? o->dataset_source_type
                                                                             : o->algo_source_type, "", NULL) };
    x->stem = text_printf(x->path, sizeof x->path, way_image(way) ? "/v2/%s-" : "/blobs/%s-", part);
    if (way_image(way)) {
        x->image = input->image = option_alloc(o, sizeof *x->image);
        *x->image = (struct image){ .what = option_text(o, bytes_of(part)), .entry = x->name,
                                    .key = sealed ? d->seal_key : NULL };
    }
    text_printf(x->key_path, sizeof x->key_path, "cvms/key/%s", part);
    x->source->url = (struct bytes){ 0 };
    x->source->encrypted = sealed;
    x->source->kbs_resource_path = bytes_of(sealed ? x->key_path : "");
    kbs->enabled = true;              /* agents want one, also for what is plain */
    x->kbs = kbs;
    *(data ? &data->source : &req->algorithm->source) = x->source;
    if (d->manifest->compat != COMPAT_SEED)
        *(data ? &data->kbs : &req->algorithm->kbs) = kbs;
    if (d->manifest->compat != COMPAT_HEAD && !req->kbs)
        req->kbs = d->kbs = memcpy(option_alloc(o, sizeof *kbs), kbs, sizeof *kbs);
}

/* What agents fetch: whatever of it stands here. */
static void delivery_add_resources(struct delivery *d, struct options *o, struct mistakes *r)
{
    struct manifest *m = d->manifest;
    struct values unpack = list_split(o, &o->dataset_decompress);
    struct Dataset *data = d->req->datasets.items;
    size_t n = m->input_count - m->algo_input;
    struct stat st;
    d->resources = option_alloc(o, (m->input_count + 1) * sizeof *d->resources);
    if (m->compat == COMPAT_SEED && !(way_image(d->algorithm) && way_image(d->data)))
        tell(r, USAGE, "-compat seed: agents of that time fetch images only: use -deliver oci or oci-plain");
    if (way_fetches(d->algorithm) && m->algo_input) {
        struct checksum *in = &m->inputs[n];
        delivery_add_resource(d, o, ROLE_ALGORITHM, 0, in, d->algorithm);
        if (way_image(d->algorithm))
            check_image(r, "algo-path", d->req->algorithm->algo_type, in->path);
        else if (stat(in->path, &st) == 0 && S_ISDIR(st.st_mode))
            tell(r, WARNING, "-algo-path: %s is a folder; an agent runs a fetched algorithm as it is, which is its zip",
                 in->path);
    } else if (way_fetches(d->algorithm) && !d->req->algorithm->source) {
        tell(r, USAGE, "-deliver %s: there is no algorithm to serve; give -algo-path", way_names[d->algorithm]);
    }
    for (size_t i = 0; way_fetches(d->data) && i < n; i++) {
        delivery_add_resource(d, o, ROLE_DATA, i, &m->inputs[i], d->data);
        if (way_image(d->data))
            check_image(r, "data-paths", BYTES(""), m->inputs[i].path);
        data[i].filename = fetched_name(o, i);
        if (!nth(&unpack, i))
            data[i].decompress = stat(m->inputs[i].path, &st) == 0 && S_ISDIR(st.st_mode);
    }
}

/* All interfaces: what a server listens at, but no client connects to. */
static bool is_wildcard(const char *host)
{
    return !*host || strcmp(host, "0.0.0.0") == 0 || strcmp(host, "::") == 0;
}

/* A host as it may stand in a URL (RFC 3986 3.2.2), and in an image's name: IPv6, IPv4 or a name of DNS. */
static bool host_in_url(const char *host, bool brackets)
{
    static const char dns[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._";
    struct in6_addr ip;
    return brackets || strchr(host, ':') ? inet_pton(AF_INET6, host, &ip) == 1 : !host[strspn(host, dns)];
}

/* -deliver-host, and who can read what is served. */
static void delivery_host(const struct delivery *d, const struct options *o, struct mistakes *r)
{
    const char *env = getenv("HOST"), *host = env ? env : "localhost", *given = o->deliver_host;
    struct address at = { .port = -1 }, own = { .port = -1 };
    if (!o->fetches || !address_parse(host, &own))
        return;
    bool loopback = is_localhost(own.host) || strncmp(own.host, "127.", 4) == 0 || strcmp(own.host, "::1") == 0;
    if (given && (!address_parse(given, &at) || is_wildcard(at.host) || !host_in_url(at.host, *given == '[') || !at.port))
        tell(r, USAGE, "-deliver-host: \"%s\" is no address to fetch from; write it like cvms.example, 10.0.0.1:7001 or "
                       "[::1]", given);
    else if (is_wildcard(own.host) && !given)
        tell(r, USAGE, "HOST is all interfaces, which agents can't fetch from: give -deliver-host HOST, as they reach this "
                       "machine");
    if (d->sealed && !loopback && !d->secure)
        tell(r, WARNING, "-deliver http gives its keys in the clear to all who reach the port: set SERVER_CERT and "
                         "SERVER_KEY for TLS");
}

/* -agent-address, looked up before anything starts: the loop can't wait for a resolver. */
static void delivery_address(struct delivery *d, const struct options *o, struct mistakes *r)
{
    const char *why;
    if (!o->agent_address)
        return;
    bool good = address_parse(o->agent_address, &d->at) && d->at.port && !d->at.bare && *d->at.host;
    if (!good || d->at.port < 0)
        tell(r, USAGE, "-agent-address: \"%s\" %s; write it like localhost:7002 or [::1]:7002", o->agent_address,
             good ? "lacks the port" : "is not an address");
    else if (!(d->addresses = resolve_host(d->at.host, (unsigned)d->at.port, 0, &why)))
        tell(r, START, "-agent-address: can't resolve \"%s\": %s", d->at.host, why);
    if (o->agents > 1)
        tell(r, USAGE, "-agent-address is that of one agent, but -agents says %lld", (long long)o->agents);
}

/* After the manifest is made: the calls, and whether an agent can take them.  The key is needed no longer. */
static void delivery_check(struct delivery *d, struct manifest *m, struct options *o, struct mistakes *r)
{
    d->manifest = m;
    d->req = &m->req;
    for (int i = FAULT_OF_FETCHES; m->faults && i < FAULTS; i++)
        if (m->faults->value[i] >= 0 && !(i < FAULT_KEY ? o->fetches : d->sealed))
            tell(r, USAGE, "-fault %s does nothing: agents fetch nothing like that from here; add -deliver http",
                 fault_table[i].name);
    if (!d->wanted)
        return;
    d->errands = option_alloc(o, (m->input_count + 1) * sizeof *d->errands);
    if (d->signs && m->req.agent_config && m->req.agent_config->attested_tls)
        tell(r, USAGE, "-attested-tls-bool true: agents then serve their users over attested TLS, which uploads from here "
                       "do not speak; say false, or use -deliver cli");
    if (d->algorithm == WAY_UPLOAD)
        delivery_add_algorithm(d, o, r);
    if (d->data == WAY_UPLOAD)
        delivery_add_data(d, o, r);
    if (o->fetches)
        delivery_add_resources(d, o, r);
    if (d->resource_count) {
        m->renew = resources_renew;
        m->renew_arg = d;
        set_fields(m, o, r);
    }
    delivery_host(d, o, r);
    if (!d->count && !d->resource_count && !o->results && !r->usage)
        tell(r, USAGE, "-deliver %s: there is nothing to %s: both algorithm and datasets are remote",
             way_names[d->algorithm], o->fetches ? "serve" : "upload");
    if (o->results)
        delivery_add_results(d, o, r);
    else if (d->verdict->until == STAGE_COMPLETE)
        tell(r, WARNING, "-until complete comes about only when somebody fetches the results: add -results FILE, or use "
                         "-until ready");
    unsigned played = 0;
    for (size_t i = 0; i < d->count; i++)
        played |= 1u << d->errands[i].role;
    for (size_t i = 0; i < d->resource_count; i++)
        played |= 1u << d->resources[i].role;
    for (size_t i = 0, n = 0; i < ROLES; i++)
        if (played & 1u << i)
            n += (size_t)text_printf(d->announced + n, sizeof d->announced - n, n ? ",%s" : "%s", roles[i].what);
    delivery_address(d, o, r);
    user_key_free(d->key);
    d->key = NULL;
    d->piece = or_exit(malloc(PIECE_LEN));
}

/* ==== 18. Services: Process, Health, Reflection; how messages are shown ============================================
 * Owns: what each method answers, and the lines on stdout that an agent's messages become.
 * Never: touches frames; it sends messages and a status.
 */
enum {
    COMMAND_LINE = 1024, LINE_MAX_BYTES = 1 << 20,   /* more than that between two line ends is no text */
    NAMED = 1024, NAMED_LOOK = 64,    /* chains by name; as many of a chain are looked at */
};

/* All that the server command knows. */
struct server {
    struct loop *loop;
    const struct options *o;
    struct manifest manifest;         /* what Process serves */
    struct verdict verdict;
    struct delivery delivery;
    struct faults faults;
    struct session *sessions;         /* open Process streams */
    struct session *named[NAMED];     /* the same by name and kind, the newest first */
    bool json;                        /* how messages are shown on stdout */
    struct watch input;               /* stdin, when its lines are commands */
    bool input_always;                /* it can't be waited for: a piece is read in each turn */
    struct tls_config *tls;           /* on its way to the loop */
    char line[COMMAND_LINE];
    size_t line_len;
};

static struct server *server_of(const struct stream *s)
{
    return s->conn->core->app;
}

enum stream_kind { KIND_UNKNOWN, KIND_AGENT, KIND_FORWARDER };
static const char *const kind_names[] = { "unknown", "agent", "log-forwarder" };

/* One Process stream.  It is named when its kind is known: by metadata, or by its first message. */
struct session {
    struct session *prev, *next, *same, **same_at;   /* same: of its chain in `named` */
    struct stream *stream;
    struct manifest *manifest;
    struct host *host;                /* NULL: no verdict is wanted */
    enum stream_kind kind;
    unsigned number;                  /* of those with its name and kind; 0: the kind has not shown */
    uint64_t messages, bytes;
    unsigned port;                    /* of the agent's service */
    unsigned version;                 /* of the manifest that was sent; 0: none, or not the one that is delivered for */
    int64_t send_ms;                  /* when the manifest is due; INT64_MAX: it has been sent */
    unsigned waits;                   /* how often changed inputs are to be hashed before that */
    bool announced;                   /* it has been logged that the manifest is out */
    char *job_id;                     /* safe to print; NULL: none was sent */
};

/* How one kind of message is headed in text: LEVEL or WORD, up to two fields joined by a slash, then the text. */
static const struct shown {
    enum stream_kind kind;            /* the stream that sends it */
    const char *word;
    uint32_t head, head2, text;       /* field numbers; 0: none */
} shown[] = {
    [1] = { KIND_FORWARDER, "",            3, 0, 1 },
    [2] = { KIND_FORWARDER, "EVENT",       1, 6, 0 },
    [3] = { KIND_AGENT,     "RUN_RES",     0, 0, 2 },
    [4] = { KIND_AGENT,     "STOP_RES",    0, 0, 2 },
    [5] = { KIND_AGENT,     "STATE",       2, 0, 0 },
    [6] = { KIND_AGENT,     "ATTESTATION", 0, 0, 1 },
    [7] = { KIND_AGENT,     "AZURE_TOKEN", 0, 0, 1 },
};

enum {
    TEXT_BYTES = 48, REPORT_BYTES = 16,   /* of a bytes field, and of a report, as many are shown in text */
    UNKNOWN_MAX = 100,                /* unknown fields of one message: each may show as many times its size */
};
static const struct {
    const char *word, *color;
} colors[] = {
    { "ERROR", COLOR_RED }, { "Failed", COLOR_RED }, { "WARN", "\x1b[33m" }, { "Warning", "\x1b[33m" },
    { "Completed", COLOR_GREEN }, { "Ready", COLOR_GREEN },
};

static void put_as_hex(struct buf *out, struct bytes b)
{
    for (size_t i = 0; i < b.n; i++)
        buf_printf(out, "%02x", b.p[i]);
}

/* A bytes field: as text if it is printable ASCII (an event's details are JSON) and no report, else its length and first
 * bytes. */
static void put_bytes_field(struct buf *out, struct bytes b, bool report)
{
    bool text = !report && bytes_printable(b);
    struct bytes first = { b.p, text ? b.n : min_size(b.n, report ? REPORT_BYTES : TEXT_BYTES) };
    if (!text)
        buf_printf(out, BYTES_FMT " ", BYTES_OF(b.n));
    if (bytes_printable(first))
        put_text(out, first, NULL);
    else
        put_as_hex(out, first);
    buf_puts(out, first.n < b.n ? "..." : "");
}

/* Whether a time is more than a second off the line's own. */
static bool time_is_off(const struct core *core, const struct Timestamp *t)
{
    double off_ms = (double)t->seconds * 1000 + t->nanos / 1000000 - (double)core->wall_ms;
    return off_ms < -1000 || off_ms > 1000;
}

/* Whether a field says something: what every message of a run repeats does not. */
static bool field_tells(const struct stream *s, const struct pb_field *f, const void *at)
{
    const struct session *session = s->user;
    if (!pb_is_set(f, at))
        return false;
    if (f->kind == PB_MESSAGE)
        return time_is_off(s->conn->core, pb_pointer(at));
    struct bytes usual = { 0 };
    if (strcmp(f->name, "originator") == 0)
        usual = BYTES("agent");
    else if (strcmp(f->name, "details") == 0)
        usual = BYTES("{}");
    else if (strcmp(f->name, "computation_id") == 0)
        usual = session->manifest->req.id;
    return !bytes_eq(*(const struct bytes *)at, usual);
}

/* name=value of a field that is not in the head. */
static void put_field_text(struct buf *out, const struct pb_field *f, const void *at, bool first)
{
    buf_printf(out, "%s%s=", first ? "  (" : " ", f->name);
    if (f->kind == PB_STRING) {
        put_text(out, *(const struct bytes *)at, NULL);
    } else if (f->kind == PB_BYTES) {
        put_bytes_field(out, *(const struct bytes *)at, false);
    } else {
        const struct Timestamp *t = pb_pointer(at);
        if (!pb_timestamp(out, t->seconds, t->nanos))
            buf_printf(out, "%lld s, %d ns", (long long)t->seconds, t->nanos);
    }
}

static struct bytes string_field(const struct pb_message *m, const void *msg, uint32_t number)
{
    size_t row = pb_row(m, number);
    return row < m->n ? *(const struct bytes *)(const void *)((const char *)msg + m->fields[row].offset) : BYTES("");
}

/* Unknown fields on their way out: of one message UNKNOWN_MAX are shown, the others counted. */
struct unknowns {
    struct buf *out;
    bool json;
    unsigned long count;
};

static void put_unknown(void *arg, const char *path, unsigned wire, uint64_t number, struct bytes value)
{
    struct unknowns *u = arg;
    if (u->count++ >= UNKNOWN_MAX)
        return;
    if (u->json)
        buf_printf(u->out, "%s{\"field\":\"%s\",\"wire_type\":%u,\"value\":\"", u->count == 1 ? "" : ",", path, wire);
    else
        buf_printf(u->out, "  (unknown field %s: ", path);
    if (wire != PB_LEN && wire != PB_SGROUP)
        buf_printf(u->out, "%llu", (unsigned long long)number);
    else if (u->json)
        pb_base64(u->out, value);
    else
        put_bytes_field(u->out, value, false);
    buf_puts(u->out, u->json ? "\"}" : ")");
}

/* Shows what the tables don't know of a message. */
static void put_unknowns(struct buf *out, struct bytes wire, bool json)
{
    struct unknowns u = { .out = out, .json = json };
    buf_puts(out, json ? ",\"unknown\":[" : "");
    pb_unknown(&ClientStreamMessage_message, wire, put_unknown, &u);
    buf_puts(out, json ? "]" : "");
    if (u.count > UNKNOWN_MAX)
        buf_printf(out, json ? ",\"unknown_left_out\":%lu" : "  (unknown fields left out: %lu)", u.count - UNKNOWN_MAX);
}

/* The word in front of an entry, and what it names; coloured by what they say. */
static void put_head(struct core *core, const struct shown *how, struct bytes head, struct bytes head2)
{
    struct buf *out = &core->out;
    size_t row = core->out_look & LOOK_COLOR ? ROW_FIND(colors, head2.n ? head2 : head) : PB_COUNT(colors);
    bool color = row < PB_COUNT(colors);
    buf_puts(out, color ? colors[row].color : "");
    size_t from = out->len;
    put_text(out, *how->word ? bytes_of(how->word) : head.n ? head : BYTES("-"), NULL);
    put_blanks(out, from, WORD_COLUMN);
    put_text(out, *how->word ? head : BYTES(""), NULL);
    if (how->head2)
        buf_putc(out, '/'), put_text(out, head2, NULL);
    buf_puts(out, color ? COLOR_OFF : "");
}

/* Whose lines they are: a job-id, or the host without its port.  dim: they tell that it comes or goes, as usual. */
static struct whom session_whom(const struct session *session, bool dim)
{
    const char *peer = session->stream->conn->peer;
    struct bytes host = { (const uint8_t *)peer, host_len(peer) };
    return (struct whom){ .name = session->job_id ? bytes_of(session->job_id) : host, .number = session->number,
                          .kind = session->kind ? kind_names[session->kind] : "stream", .dim = dim };
}

/* The text of a message behind its head. */
static void put_entry(struct buf *out, uint32_t member, struct bytes text, bool unknown)
{
    bool report = member == 6 || member == 7;
    if (member == 3)
        buf_puts(out, text.n ? "error: " : "accepted");
    if (!report)
        put_text(out, text, "    | ");  /* a mark that is seen: runners trim blanks before they look for commands */
    else if (text.n)
        put_bytes_field(out, text, true);
    else
        buf_puts(out, unknown ? "" : "empty: no TEE");
}

/* One entry a message: whose, head, text; every other field that says something follows in brackets.  member NULL: it is
 * empty, but for fields that the tables don't know. */
static void show_text(struct stream *s, const struct pb_field *member, const void *msg, struct bytes wire)
{
    struct core *core = s->conn->core;
    struct buf *out = &core->out;
    const struct pb_message *m = member ? member->sub : NULL;
    const struct shown *how = &shown[member ? member->number : 0];
    const struct whom whom = session_whom(s->user, false);
    bool first = true, color = core->out_look & LOOK_COLOR;
    put_whom(core, out, core->out_look, &whom);
    if (m) {
        put_head(core, how, string_field(m, msg, how->head), string_field(m, msg, how->head2));
        put_entry(out, member->number, string_field(m, msg, how->text), wire.n);
    } else {
        buf_puts(out, "an empty message");
    }
    size_t plain = out->len;
    buf_puts(out, color ? COLOR_DIM : "");
    size_t dim = out->len;
    for (size_t i = 0; m && i < m->n; i++) {
        const struct pb_field *f = &m->fields[i];
        const void *at = (const char *)msg + f->offset;
        if (f->number == how->head || f->number == how->head2 || f->number == how->text || !field_tells(s, f, at))
            continue;
        put_field_text(out, f, at, first);
        first = false;
    }
    buf_puts(out, first ? "" : ")");
    put_unknowns(out, wire, false);
    if (out->len == dim)
        out->len = plain;
    else
        buf_puts(out, color ? COLOR_OFF : "");
    buf_putc(out, '\n');
}

/* Writes the JSON from `start` on anew, without the commands of CI runners. */
static void json_defuse(struct buf *out, size_t start)
{
    struct buf whole = { 0 };
    struct bytes line = out->failed ? BYTES("") : bytes_from((struct bytes){ out->p, out->len }, start);
    size_t n = text_command(line);
    if (n == line.n)
        return;
    buf_put(&whole, line.p, line.n);
    out->len = start;
    for (line = (struct bytes){ whole.p, whole.len }; (n = text_command(line)) < line.n; line = bytes_from(line, n + 1)) {
        buf_put(out, line.p, n);
        buf_puts(out, "\\u005b");
    }
    buf_put(out, line.p, line.n);
    out->failed |= whole.failed;
    buf_free(&whole);
}

/* One JSON object a line, with msg as canonical JSON; wire: where its unknown fields stand, if it has any. */
static void put_json_line(struct buf *out, const struct conn *c, const char *stream, const char *job_id,
                          const struct pb_message *type, const void *msg, struct bytes wire)
{
    const char *const names[][2] = { { "job_id", job_id }, { "subject", c->subject } };
    size_t start = out->len;
    buf_puts(out, "{\"time\":\"");
    buf_put(out, core_stamp(c->core), STAMP_LEN);
    buf_printf(out, "\",\"peer\":\"%s\",\"stream\":\"%s\"", c->peer, stream);
    for (size_t i = 0; i < PB_COUNT(names); i++)
        if (names[i][1]) {
            buf_printf(out, ",\"%s\":", names[i][0]);
            pb_json_string(out, bytes_of(names[i][1]));
        }
    buf_puts(out, type == &ClientStreamMessage_message ? ",\"message\":"
                  : type == &ServerStreamMessage_message ? ",\"sent\":" : ",\"request\":");
    pb_json(out, type, msg, 0);
    if (wire.n)
        put_unknowns(out, wire, true);
    buf_puts(out, "}\n");
    json_defuse(out, start);
}

/* The oneof member that is set; NULL for an empty message, or one whose only field we don't know. */
static const struct pb_field *message_member(const struct ClientStreamMessage *msg)
{
    for (size_t i = 0; i < PB_COUNT(ClientStreamMessage_fields); i++)
        if (pb_is_set(&ClientStreamMessage_fields[i], (const char *)msg + ClientStreamMessage_fields[i].offset))
            return &ClientStreamMessage_fields[i];
    return NULL;
}

/* wire: where unknown fields stand, if there are any. */
static void show_message(struct stream *s, const struct ClientStreamMessage *msg, struct bytes wire)
{
    const struct session *session = s->user;
    const struct pb_field *member = message_member(msg);
    if (server_of(s)->json)
        put_json_line(&s->conn->core->out, s->conn, kind_names[session->kind], session->job_id,
                      &ClientStreamMessage_message, msg, wire);
    else
        show_text(s, member, member ? pb_pointer((const char *)msg + member->offset) : NULL, wire);
}

/* ---- cvms.Service/Process ---- */

/* A line of -record.  Without memory there is not half of one, and the record ends. */
static void record_line(struct stream *s, const struct pb_message *type, const void *msg, struct bytes wire)
{
    const struct session *session = s->user;
    struct buf *record = &s->conn->core->record;
    size_t before = record->len;
    put_json_line(record, s->conn, kind_names[session->kind], session->job_id, type, msg, wire);
    if (record->failed)
        record->len = before;
}

/* Records what a blob of prefixed messages sends. */
static void record_sent(struct stream *s, const struct blob *b)
{
    struct core *core = s->conn->core;
    for (size_t at = 0, n; core->recording && at < b->n; at += 5 + n) {
        struct ServerStreamMessage msg = { 0 };
        n = get_be32(b->p + at + 1);
        struct bytes wire = { b->p + at + 5, n };
        pb_arena_reset(&core->arena);
        enum pb_error err = pb_decode(&ServerStreamMessage_message, &msg, wire, &core->arena, NULL);
        if (err == PB_OK)
            record_line(s, &ServerStreamMessage_message, &msg, BYTES(""));
        core->record.failed |= err == PB_LIMIT;
    }
}

/* Whether the connection's bound leaves room for what the server asks of its own accord; if not, that is told. */
static bool session_room(struct session *session, const struct blob *b)
{
    struct stream *s = session->stream;
    bool room = s->conn->queued_bytes + item_own(b) <= MAX_QUEUED_BYTES;
    if (!room)
        core_tell(s->conn->core, session_whom(session, false), "too much waits to be read by this agent: it is not asked");
    return room;
}

/* The members of a ServerStreamMessage that ask for something, each by an id and nothing else. */
enum {
    ASK_STATE = offsetof(struct ServerStreamMessage, agentStateReq),
    ASK_STOP = offsetof(struct ServerStreamMessage, stopComputation),
    ASK_DISCONNECT = offsetof(struct ServerStreamMessage, disconnectReq),
};

/* Queues what the server asks of its own accord, outside the connection's turn.  It waits until the agent reads; what
 * would go over the connection's bound is not asked. */
static void session_ask(struct session *session, size_t member)
{
    struct stream *s = session->stream;
    struct ServerStreamMessage msg = { 0 };
    void *req = &(struct AgentStateReq){ .id = session->manifest->req.id };
    memcpy((char *)&msg + member, &req, sizeof req);
    struct blob *b = grpc_encode(&ServerStreamMessage_message, &msg);
    if (b && !session_room(session, b)) {
        blob_unref(b);
        return;
    }
    if (b)
        record_sent(s, b);
    grpc_send_headers(s, NULL);
    stream_queue(s, b, ITEM_DATA);
    s->conn->core->touched = true;
}

static void session_send_manifest(struct session *session)
{
    struct stream *s = session->stream;
    session->send_ms = INT64_MAX;
    if (session->manifest == &server_of(s)->manifest)
        session->version = session->manifest->version;
    if (session->manifest->recorded != session->manifest->version)
        record_sent(s, session->manifest->stream);
    session->manifest->recorded = session->manifest->version;
    grpc_send_blob(s, blob_ref(session->manifest->stream));
    if (s->remote_closed)
        grpc_finish(s, GRPC_OK, "");
}

/* The manifest is due in delay_ms, but not before inputs that have changed by now are hashed.  A hashing that goes on
 * already may be past what has changed since. */
static void session_offer(struct session *session, int64_t delay_ms)
{
    struct core *core = session->stream->conn->core;
    session->send_ms = core->now_ms + delay_ms;
    session->waits = session->manifest->fresh ? 2 : manifest_look(session->manifest, core) ? 1 : 0;
    if (!session->waits && delay_ms <= 0)
        session_send_manifest(session);
}

/* Sends the manifest once more. */
static void session_repeat(struct session *s)
{
    if (!session_room(s, NULL))
        return;
    session_offer(s, 0);
    s->stream->conn->core->touched = true;
}

/* Numbers the streams that share a name and a kind, as long as they are open. */
static void session_number(struct server *v, struct session *session)
{
    struct whom whom = session_whom(session, false);
    uint32_t hash = 2166136261u ^ (uint32_t)session->kind;   /* FNV-1a */
    for (size_t i = 0; i < whom.name.n; i++)
        hash = (hash ^ whom.name.p[i]) * 16777619u;
    struct session **at = &v->named[hash % NAMED], *of = *at;
    for (int i = 0; i < NAMED_LOOK && of; i++, of = of->same)
        if (of->kind == session->kind && bytes_eq(session_whom(of, false).name, whom.name))
            break;
    session->number = of ? of->number + 1 : 1;
    session->same = *at;
    session->same_at = at;
    if (*at)
        (*at)->same_at = &session->same;
    *at = session;
}

/* The stream has shown what it is. */
static void session_kind(struct session *session, enum stream_kind kind)
{
    struct core *core = session->stream->conn->core;
    struct server *server = core->app;
    const char *peer = session->stream->conn->peer;
    session->kind = kind;
    session_number(server, session);
    struct host *h = session->host = verdict_host(&server->verdict, session->job_id, peer);
    if (h) {
        text_printf(h->at, sizeof h->at, "%.*s", (int)host_len(peer), peer);
        verdict_stream(&server->verdict, h, kind == KIND_AGENT, 1, core->now_ms);
    }
    if (h && kind == KIND_AGENT)
        delivery_back(h);
    else if (server->verdict.host_count == MAX_HOSTS)
        core_cap(core, peer, CAP_HOSTS);
}

static void process_open(struct stream *s, const struct fields *f)
{
    struct core *core = s->conn->core;
    struct server *server = core->app;
    struct bytes job_id = f->value[F_JOB_ID];
    int64_t port = parse_decimal(f->value[F_AGENT_PORT]);
    char *name = job_id.n ? text_safe((struct bytes){ job_id.p, min_size(job_id.n, 200) }) : NULL;
    struct session *session = job_id.n && !name ? NULL : calloc(1, sizeof *session);
    if (!session) {
        free(name);
        core_note(core, s->conn->peer, "out of memory: stream %lu is ended", (unsigned long)s->id);
        grpc_finish(s, GRPC_RESOURCE_EXHAUSTED, "out of memory");
        return;
    }
    *session = (struct session){ .stream = s, .next = server->sessions, .send_ms = INT64_MAX,
                                 .manifest = manifest_for(&server->manifest, job_id), .job_id = name,
                                 .port = port > 0 && port <= 65535 ? (unsigned)port : SERVICE_PORT };
    if (server->sessions)
        server->sessions->prev = session;
    server->sessions = session;
    s->user = session;
    enum stream_kind kind = name ? KIND_AGENT : KIND_UNKNOWN;
    if (bytes_eq(f->value[F_CONNECTION_TYPE], BYTES("log-forwarder")))
        kind = KIND_FORWARDER;
    if (kind)
        session_kind(session, kind);
    const char *subject = s->conn->subject;
    bool cut = core_look(core) & LOOK_BRIEF && name && strlen(name) > NAME_BRIEF;
    core_tell(core, session_whom(session, true), "connected from %s%s%s%s%s", s->conn->peer, subject ? " as " : "",
              subject ? subject : "", cut ? ", job-id " : "", cut ? name : "");
    if (session->manifest == &server->manifest && *server->delivery.announced)   /* `cvms agent` looks for it, no other */
        grpc_send_headers(s, (const char *[]){ "cvms-delivers", server->delivery.announced, NULL });
    if (kind == KIND_FORWARDER && server->o->skip_forwarder)
        grpc_send_headers(s, NULL);
    else
        session_offer(session, server->manifest.faults ? server->faults.value[FAULT_DELAY] : 0);
}

static void process_message(struct stream *s, struct bytes wire)
{
    struct core *core = s->conn->core;
    struct session *session = s->user;
    struct ClientStreamMessage msg = { 0 };
    bool unknown = false;
    pb_arena_reset(&core->arena);
    enum pb_error err = pb_decode(&ClientStreamMessage_message, &msg, wire, &core->arena, &unknown);
    if (err != PB_OK) {
        char text[160];
        text_printf(text, sizeof text, "message %llu of " BYTES_FMT " is not a cvms.ClientStreamMessage: %s",
                    (unsigned long long)session->messages + 1, BYTES_OF(wire.n), pb_error_text[err]);
        core_tell(core, session_whom(session, false), "%s", text);
        grpc_abort(s, GRPC_INTERNAL, text);
        return;
    }
    const struct pb_field *member = message_member(&msg);
    struct bytes more = unknown ? wire : BYTES("");
    if (session->kind == KIND_UNKNOWN && member)
        session_kind(session, shown[member->number].kind);
    session->messages++;
    session->bytes += wire.n;
    size_t shown_before = core->out.len;
    show_message(s, &msg, more);
    if (core->out.failed) {           /* not half a line: the agent learns that it was not taken */
        core->out.len = shown_before;
        core->out.failed = false;
        core_tell(core, session_whom(session, false), "out of memory: a message was not taken");
        grpc_abort(s, GRPC_RESOURCE_EXHAUSTED, "out of memory");
        return;
    }
    if (session->host)
        verdict_message(&server_of(s)->verdict, session->host, &msg, wire.n, core->now_ms);
    if (session->host && session->version)
        delivery_message(&server_of(s)->delivery, session->host, &msg, s->conn->peer, session->port,
                         session->job_id, session->version);
    if (core->recording)
        record_line(s, &ClientStreamMessage_message, &msg, more);
}

static void process_drained(struct stream *s)
{
    const struct faults *faults = server_of(s)->manifest.faults;
    struct session *session = s->user;
    if (!session || session->announced)
        return;
    session->announced = true;
    core_tell(s->conn->core, session_whom(session, true), "manifest sent: " BYTES_FMT,
              BYTES_OF(session->manifest->len));
    if (faults && faults->value[FAULT_RST] >= 0)
        stream_reset(s, INTERNAL_ERROR);
    if (faults && faults->value[FAULT_GOAWAY] >= 0)
        conn_shutdown(s->conn, GRPC_UNAVAILABLE, "fault injected: goaway");
}

static void process_end(struct stream *s)
{
    const struct session *session = s->user;
    if (session->send_ms == INT64_MAX)
        grpc_finish(s, GRPC_OK, "");
}

static void reflection_end(struct stream *s)
{
    grpc_finish(s, GRPC_OK, "");
}

static void process_closed(struct stream *s)
{
    struct session *session = s->user;
    if (!session)
        return;
    core_tell(s->conn->core, session_whom(session, true), "stream ended after %llu message%s, " BYTES_FMT,
              (unsigned long long)session->messages, PLURAL(session->messages), BYTES_OF(session->bytes));
    if (session->host)
        verdict_stream(&server_of(s)->verdict, session->host, session->kind == KIND_AGENT, -1, s->conn->core->now_ms);
    *(session->prev ? &session->prev->next : &server_of(s)->sessions) = session->next;
    if (session->next)
        session->next->prev = session->prev;
    if (session->same_at)
        *session->same_at = session->same;
    if (session->same)
        session->same->same_at = session->same_at;
    free(session->job_id);
    free(session);
    s->user = NULL;
}

/* ---- grpc.health.v1.Health ---- */
static const char *const healthy_services[] = { "", "cvms_test_server" };

static bool message_decode(struct stream *s, const struct pb_message *type, void *msg, struct bytes wire)
{
    struct core *core = s->conn->core;
    pb_arena_reset(&core->arena);
    enum pb_error err = pb_decode(type, msg, wire, &core->arena, NULL);
    if (err != PB_OK)
        s->conn->on->abort(s, GRPC_INTERNAL, pb_error_text[err]);
    return err == PB_OK;
}

/* A unary call takes one message; its answer waits for the client's END_STREAM. */
static bool unary_first(struct stream *s)
{
    bool first = !s->grpc.answered;
    if (!first)
        grpc_finish(s, GRPC_UNIMPLEMENTED, "a unary call with more than one message");
    s->grpc.answered = true;
    return first;
}

static void unary_end(struct stream *s)
{
    if (s->grpc.answered)
        grpc_finish(s, GRPC_OK, "");
    else
        grpc_finish(s, GRPC_UNIMPLEMENTED, "a unary call without a message");
}

/* Check and Watch, which knows of unknown services. */
static void health_message(struct stream *s, struct bytes wire)
{
    struct HealthCheckRequest req = { 0 };
    if (!unary_first(s) || !message_decode(s, &HealthCheckRequest_message, &req, wire))
        return;
    bool known = ROW_FIND(healthy_services, req.service) < PB_COUNT(healthy_services);
    struct HealthCheckResponse res = { .status = known ? HEALTH_SERVING : HEALTH_SERVICE_UNKNOWN };
    if (known || s->grpc.method->end != unary_end)
        grpc_send(s, &HealthCheckResponse_message, &res);
    else
        grpc_finish(s, GRPC_NOT_FOUND, "unknown service");
}

static void health_watch_end(struct stream *s)
{
    if (!s->grpc.answered)
        unary_end(s);                 /* else the stream stays open: the status may change */
}

/* ---- grpc.reflection ---- */

/* Whether a symbol is PACKAGE.name.member, or, without a member, PACKAGE.name. */
static bool symbol_is(struct bytes symbol, const struct pb_file *f, const char *name, const char *member)
{
    char full[256];
    size_t n = text_printf(full, sizeof full, "%s.%s%s%s", f->package, name, member ? "." : "", member ? member : "");
    return bytes_eq(symbol, (struct bytes){ (uint8_t *)full, n });
}

/* Whether the file defines the symbol: a message, service, or what is named inside one. */
static bool file_has(const struct pb_file *f, struct bytes symbol)
{
    bool found = f->service && symbol_is(symbol, f, f->service, NULL);
    for (const struct pb_message *const *at = f->messages; *at && !found; at++) {
        const struct pb_message *m = *at;
        found = symbol_is(symbol, f, m->name, NULL) || (m->oneof && symbol_is(symbol, f, m->name, m->oneof));
        for (size_t j = 0; j < m->n && !found; j++) {
            const struct pb_enum *values = m->fields[j].kind == PB_ENUM ? m->fields[j].sub : NULL;
            found = symbol_is(symbol, f, m->name, m->fields[j].name) || (values && symbol_is(symbol, f, m->name, values->name));
        }
    }
    for (const struct pb_method *m = f->methods; m && m->name && !found; m++)
        found = symbol_is(symbol, f, f->service, m->name);
    return found;
}

/* Whether the server has what the file describes. */
static bool file_offered(const struct stream *s, const struct pb_file *f)
{
    return !(f->needs & ~s->conn->endpoint->offers);
}

/* The file of this name, or that defines a symbol; of those that the server has.  NULL: none. */
static const struct pb_file *reflection_file(const struct stream *s, struct bytes name, struct bytes symbol)
{
    for (const struct pb_file *f = all_files; f < all_files + PB_COUNT(all_files); f++)
        if (file_offered(s, f) && (name.p ? bytes_eq(name, bytes_of(f->name)) : symbol.p && file_has(f, symbol)))
            return f;
    return NULL;
}

static void reflection_message(struct stream *s, struct bytes wire)
{
    struct ServerReflectionRequest req = { 0 };
    if (!message_decode(s, &ServerReflectionRequest_message, &req, wire))
        return;
    struct ServerReflectionResponse res = { .valid_host = req.host, .original_request = &req };
    struct ErrorResponse error = { .error_code = GRPC_NOT_FOUND, .error_message = BYTES("not found") };
    struct ExtensionNumberResponse numbers = { .base_type_name = req.all_extension_numbers_of_type };
    struct buf made[2] = { { 0 } };   /* a file, and what it imports */
    struct bytes files[2];
    char names[PB_COUNT(all_files)][64];
    struct ServiceResponse services[PB_COUNT(all_files)];
    struct FileDescriptorResponse described = { .file_descriptor_proto.items = files };
    struct ListServiceResponse list = { .service.items = services };
    size_t n = 0;
    const struct pb_file *f = reflection_file(s, req.file_by_filename, req.file_containing_symbol);
    for (; f; f = f->imported, n++)
        files[n] = pb_file_descriptor(&made[n], f);
    if ((described.file_descriptor_proto.n = n) > 0) {
        res.file_descriptor_response = &described;
    } else if (req.list_services.p) {
        for (f = all_files; f < all_files + PB_COUNT(all_files); f++)
            if (f->service && file_offered(s, f)) {
                text_printf(names[n], sizeof names[n], "%s.%s", f->package, f->service);
                services[n].name = bytes_of(names[n]);
                n++;
            }
        list.service.n = n;
        res.list_services_response = &list;
    } else if (reflection_file(s, (struct bytes){ 0 }, req.all_extension_numbers_of_type)) {
        res.all_extension_numbers_response = &numbers;
    } else {
        res.error_response = &error;
    }
    grpc_send(s, &ServerReflectionResponse_message, &res);
    for (size_t i = 0; i < PB_COUNT(made); i++)
        buf_free(&made[i]);
}

/* ---- What agents fetch ---- */

/* A request that is not gRPC. */
struct fetch {
    struct delivery *d;
    struct resource *resource;        /* NULL: none of this name */
    struct host *host;                /* NULL: it is not known whose request it is */
    bool key, open;                   /* key: of the resource; open: source is, and so it is among those under way */
    enum image_part part;             /* of an image; else IMAGE_LAYER, which is what counts */
    struct blob *body;                /* of one that is not its layer, or NULL */
    struct source source;
    const char *note;                 /* what else is to be shown; NULL: nothing */
    uint64_t bytes;
    int64_t begin_ms;
    struct bytes method, path;        /* in text, cut */
    uint8_t text[256];
};

static const char *const fetch_parts[IMAGE_PARTS + 1] = { "manifest of the ", "config of the ", "", "" };

static struct parcel *fetch_parcel(const struct fetch *t)
{
    bool counts = t->host && t->resource && host_parcels(t->d, t->host);
    return counts ? &t->host->parcels[t->d->count + (size_t)(t->resource - t->d->resources)] : NULL;
}

/* The agent has it, or its key. */
static void parcel_fetched(struct parcel *p, bool key)
{
    *(key ? &p->keys : &p->fetched) += 1;
    p->done = p->fetched && (p->keys || !p->sealed);
}

/* Whose request it is: of the hosts at its address, the first that lacks what it asks for; the only host there is. */
static void fetch_host(struct fetch *t, const char *peer)
{
    struct host *all = t->d->verdict->hosts, *first = NULL;
    for (struct host *h = t->resource ? all : NULL; h; h = h->next) {
        if (!bytes_eq(bytes_of(h->at), (struct bytes){ (const uint8_t *)peer, host_len(peer) }))
            continue;
        first = first ? first : h;
        t->host = h;
        const struct parcel *p = fetch_parcel(t);
        if (p && !(t->key ? p->keys : p->fetched))
            return;
    }
    t->host = first ? first : all && !all->next ? all : NULL;
}

/* The same of an image: /v2/NAME/manifests/... or /v2/NAME/blobs/... (OCI distribution specification 1.0). */
static unsigned fetch_image(struct fetch *t, const struct resource *x, struct bytes path)
{
    size_t n = strlen(x->path);
    bool named = path.n > n && path.p[n] == '/';
    if (!named || memcmp(path.p, x->path, n) != 0)
        return named ? 410 : 404;
    t->part = image_part(x->image, bytes_from(path, n));
    return t->part < IMAGE_PARTS ? 200 : 404;
}

/* What the path names.  Returns the status of the answer. */
static unsigned fetch_find(struct fetch *t, struct bytes path)
{
    static const char broker[] = "/kbs/v0/resource/";
    path = bytes_take(&path, '?');
    for (size_t i = 0; i < t->d->resource_count; i++) {
        struct resource *x = &t->d->resources[i];
        bool ours = x->path[x->stem] && path.n > x->stem && memcmp(path.p, x->path, x->stem) == 0;
        t->key = x->sealed && bytes_start(path, broker) &&
                 bytes_eq(bytes_from(path, sizeof broker - 1), bytes_of(x->key_path));
        if (!ours && !t->key)
            continue;
        t->resource = x;
        if (x->image && !t->key)
            return fetch_image(t, x, path);
        return t->key || bytes_eq(path, bytes_of(x->path)) ? 200 : path.n == strlen(x->path) ? 410 : 404;
    }
    t->part = IMAGE_PARTS;
    return bytes_eq(path, BYTES("/v2/")) && (way_image(t->d->algorithm) || way_image(t->d->data)) ? 200 : 404;
}

/* Opens the source of a resource that is fetched.  Returns the status of the answer. */
static unsigned fetch_source(struct fetch *t, struct core *core)
{
    const struct faults *faults = t->d->manifest->faults;
    const struct resource *x = t->resource;
    struct err e;
    if (faults && (faults->value[FAULT_NOT_FOUND] >= 0 || faults->value[FAULT_UNAVAILABLE] >= 0))
        return faults->value[FAULT_NOT_FOUND] >= 0 ? 404 : 503;
    if (t->part == IMAGE_PARTS)       /* /v2/ alone: this is a registry */
        return 200;
    if (x->image && t->part != IMAGE_LAYER) {
        t->body = blob_ref(x->image->text[t->part]);
        t->source.size = t->body->n;
        return 200;
    }
    if (t->d->fetches >= FETCHES_MAX)
        return 503;
    t->open = x->image ? image_open(x->image, x->input->path, &t->source, &e)
                       : source_open(&t->source, x->input->path, &e);
    t->d->fetches += t->open;
    if (t->open ? memcmp(&t->source.id, &x->input->id, sizeof x->input->id) != 0
                : checksum_changed(x->input->path, &x->input->id) || access(x->input->path, F_OK) != 0) {
        core_note(core, NULL, "%s has changed since its hash was sent to agents: it is not served", x->input->path);
        return 410;
    }
    if (t->open && (!x->sealed || x->image || source_seal(&t->source, t->d->seal_key, x->nonce, &e)))
        return 200;
    core_note(core, NULL, "not served: %s", e.text);
    return 503;
}

/* A token that is sent must be ours; real agents without an attestation agent send none (RFC 6750 2.1). */
static unsigned fetch_authorize(struct fetch *t, struct bytes authorization)
{
    const struct faults *faults = t->d->manifest->faults;
    bool refuse = faults && faults->value[FAULT_TOKEN] >= 0;
    struct bytes scheme = bytes_take(&authorization, ' ');
    if (!scheme.n)
        t->note = "without a token";
    else if (!bytes_eq_nocase(scheme, "Bearer") || !bytes_eq(bytes_trim(authorization), bytes_of(t->d->token)))
        t->note = "with a wrong token";
    return refuse || (scheme.n && t->note) ? 401 : 200;
}

static void fetch_open(struct stream *s, const struct fields *f)
{
    struct fetch *t = calloc(1, sizeof *t);
    struct conn *c = s->conn;
    const struct bytes *v = f->value;
    if (!t) {
        c->out.failed = true;
        return;
    }
    *t = (struct fetch){ .d = &server_of(s)->delivery, .part = IMAGE_LAYER, .begin_ms = c->core->now_ms };
    struct buf text = buf_fixed(t->text, sizeof t->text);
    put_text(&text, (struct bytes){ v[F_METHOD].p, min_size(v[F_METHOD].n, 20) }, NULL);
    t->method = (struct bytes){ t->text, text.len };
    put_text(&text, (struct bytes){ v[F_PATH].p, min_size(v[F_PATH].n, 100) }, NULL);
    t->path = bytes_from((struct bytes){ t->text, text.len }, t->method.n);
    s->user = t;
    unsigned status = s->grpc.plain == 404 ? fetch_find(t, v[F_PATH]) : s->grpc.plain;
    fetch_host(t, c->peer);
    if (status == 200)
        status = t->key ? fetch_authorize(t, v[F_AUTHORIZATION]) : fetch_source(t, c->core);
    stream_moves(s);
    s->grpc.plain = (uint16_t)status;
    s->grpc.length = t->key ? sizeof t->d->seal_key : t->source.size;
    if (t->body)
        s->grpc.type = image_types[t->part];
    struct parcel *p = fetch_parcel(t);
    if (p && !t->key && status == 200 && t->part == IMAGE_LAYER) {
        p->begun = true;
        p->bytes = 0;
    }
}

/* The next n bytes of a body, with the faults that were asked for.  Fewer: the file has shrunk, or can't be read. */
static size_t fetch_pull(struct stream *s, uint8_t *to, size_t n)
{
    struct fetch *t = s->user;
    const struct faults *faults = t->d->manifest->faults;
    struct parcel *p = t->key || t->part != IMAGE_LAYER ? NULL : fetch_parcel(t);
    struct err e;
    ssize_t got = (ssize_t)n;
    stream_moves(s);
    if (t->key)
        memcpy(to, t->d->seal_key + t->bytes, n);
    else if (t->body)
        memcpy(to, t->body->p + t->bytes, n);
    else
        got = source_read(&t->source, to, n, &e);
    if (got >= 0 && got < (ssize_t)n)
        file_err(&e, t->resource->input->path, "has shrunk");
    if (got < (ssize_t)n)
        core_note(s->conn->core, NULL, "breaks off: %s", e.text);
    uint64_t from = t->bytes, len = got > 0 ? (uint64_t)got : 0;
    uint64_t flip = faults && !t->key ? (uint64_t)faults->value[FAULT_BLOB] : UINT64_MAX;
    uint64_t cut = faults && !t->key ? (uint64_t)faults->value[FAULT_CUT] : UINT64_MAX;
    if (faults && t->key && faults->value[FAULT_KEY] >= 0)
        to[0] ^= 1;
    if (flip >= from && flip - from < len)
        to[flip - from] ^= 1;
    if (len > cut - from)
        len = cut - from;
    t->bytes += len;
    if (p)
        p->bytes = t->bytes;
    return (size_t)len;
}

/* A line for a request that is not of a stream: an object, or text, where what is asked for stands in place of its path. */
static void show_request(struct conn *c, const struct host *host, const struct Request *r)
{
    struct core *core = c->core;
    struct server *server = core->app;
    struct buf *out = &core->out;
    size_t from = out->len;
    struct whom whom = { .name = host ? bytes_of(host->name) : (struct bytes){ (uint8_t *)c->peer, host_len(c->peer) },
                         .kind = "http" };
    if (server->json) {
        put_json_line(out, c, "http", NULL, &Request_message, r, BYTES(""));
    } else {
        put_whom(core, out, core->out_look, &whom);
        size_t head = out->len;
        put_text(out, r->method, NULL);
        put_blanks(out, head, WORD_COLUMN);
        put_text(out, r->what.n ? r->what : r->path, NULL);
        buf_printf(out, ": %d, " BYTES_FMT ", " SECONDS " s", (int)r->status, BYTES_OF(r->bytes), SECONDS_OF(r->milliseconds));
        buf_puts(out, r->note.n ? ", " : "");
        put_text(out, r->note, NULL);
        buf_putc(out, '\n');
    }
    if (out->failed)                  /* not half a line */
        out->len = from;
    out->failed = false;
}

/* The answer is out, or broke off: its line, and what it means for the verdict. */
static void fetch_closed(struct stream *s)
{
    struct fetch *t = s->user;
    if (!t)
        return;
    struct parcel *p = fetch_parcel(t);
    bool whole = s->local_closed, fetched = whole && s->grpc.plain == 200 && !s->grpc.no_body;
    t->d->fetches -= t->open;
    if (t->open)
        source_close(&t->source);
    blob_unref(t->body);
    if (p && fetched && t->part == IMAGE_LAYER)
        parcel_fetched(p, t->key);
    const struct checksum *in = fetched && t->open ? t->resource->input : NULL;
    if (in && checksum_changed(in->path, &in->id))
        t->note = "changed while it was sent";
    char what[300] = "", note[80] = "";
    if (t->resource)
        text_printf(what, sizeof what, "%s%s %s", t->key ? "key of the " : fetch_parts[t->part],
                    roles[t->resource->role].what, t->resource->name);
    text_printf(note, sizeof note, "%s%s%s", t->note ? t->note : "", t->note && !whole ? ", " : "",
                whole ? "" : "broken off");
    show_request(s->conn, t->host, &(struct Request){
        .method = t->method, .path = t->path, .status = s->grpc.plain, .bytes = (int64_t)t->bytes, .what = bytes_of(what),
        .milliseconds = (int32_t)(s->conn->core->now_ms - t->begin_ms), .note = bytes_of(note) });
    free(t);
    s->user = NULL;
}

static const struct grpc_method fetch_method = { .open = fetch_open, .pull = fetch_pull, .closed = fetch_closed };

/* The same of a call that has been answered with n bytes. */
static void show_call(const struct stream *s, const struct host *host, size_t n, const char *what)
{
    show_request(s->conn, host, &(struct Request){ .method = BYTES("POST"), .path = bytes_of(s->grpc.method->path),
                                                   .status = 200, .bytes = (int64_t)n, .what = bytes_of(what) });
}

/* attestation_agent.AttestationAgentService: a machine without a TEE, and a token that is none of JSON.  Both answers have
 * one field. */
static void attestation_message(struct stream *s, struct bytes wire)
{
    const char *name = strrchr(s->grpc.method->path, '/') + 1;
    bool token = strcmp(name, "GetToken") == 0;
    struct fetch t = { .d = &server_of(s)->delivery };
    struct GetTokenRequest req = { 0 };
    struct GetTokenResponse res = { token ? bytes_of(t.d->token) : BYTES("sample") };
    if (!unary_first(s) || !message_decode(s, token ? &GetTokenRequest_message : &GetTeeTypeRequest_message, &req, wire))
        return;
    struct blob *b = grpc_encode(&GetTokenResponse_message, &res);
    size_t n = b ? b->n : 0;
    grpc_send_blob(s, b);
    fetch_host(&t, s->conn->peer);
    show_call(s, t.host, n, name);
}

/* ---- keyprovider.KeyProviderService ---- */

/* The key has been given: to whoever fetches images from that address. */
static void unwrap_seen(struct stream *s, size_t n)
{
    struct delivery *d = &server_of(s)->delivery;
    struct fetch t = { .d = d, .key = true, .part = IMAGE_LAYER };
    for (size_t i = 0; i < d->resource_count; i++) {
        t.resource = &d->resources[i];
        fetch_host(&t, s->conn->peer);
        struct parcel *p = t.resource->image && t.resource->sealed ? fetch_parcel(&t) : NULL;
        if (p)
            parcel_fetched(p, true);
    }
    show_call(s, t.host, n, "key of the images");
}

/* The key of all images, in the form of ocicrypt; a layer's own is its nonce. */
static void unwrap_key(struct stream *s, struct bytes wire)
{
    struct keyProviderKeyWrapProtocolInput req = { .KeyProviderKeyWrapProtocolInput = { 0 } };
    struct buf key = { 0 }, answer = { 0 };
    if (!unary_first(s) || !message_decode(s, &keyProviderKeyWrapProtocolInput_message, &req, wire))
        return;
    if (!bytes_contain(req.KeyProviderKeyWrapProtocolInput, "\"keyunwrap\"")) {
        grpc_finish(s, GRPC_INVALID_ARGUMENT, "not ocicrypt's JSON with \"op\":\"keyunwrap\"");
        return;
    }
    buf_puts(&key, "{\"symkey\":\"");
    pb_base64(&key, (struct bytes){ server_of(s)->delivery.seal_key, AES_KEY });
    buf_puts(&key, "\"}");
    buf_puts(&answer, "{\"keyunwrapresults\":{\"optsdata\":\"");
    pb_base64(&answer, (struct bytes){ key.p, key.len });
    buf_puts(&answer, "\"}}");
    answer.failed |= key.failed;
    struct keyProviderKeyWrapProtocolOutput res = { { answer.p, answer.len } };
    if (answer.failed)
        grpc_finish(s, GRPC_RESOURCE_EXHAUSTED, "out of memory");
    else
        grpc_send(s, &keyProviderKeyWrapProtocolOutput_message, &res);
    unwrap_seen(s, wire.n);
    wipe_buf(&key);
    wipe_buf(&answer);
}

static const struct grpc_method server_methods[] = {
    { .path = "/cvms.Service/Process", .open = process_open, .message = process_message, .end = process_end,
      .drained = process_drained, .closed = process_closed },
    { .path = "/grpc.health.v1.Health/Check", .message = health_message, .end = unary_end },
    { .path = "/grpc.health.v1.Health/Watch", .message = health_message, .end = health_watch_end },
    { .path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", .message = reflection_message,
      .end = reflection_end },
    { .path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", .message = reflection_message,
      .end = reflection_end },
    { .path = "/attestation_agent.AttestationAgentService/GetTeeType", .needs = OFFER_TOKENS,
      .message = attestation_message, .end = unary_end },
    { .path = "/attestation_agent.AttestationAgentService/GetToken", .needs = OFFER_TOKENS,
      .message = attestation_message, .end = unary_end },
    { .path = "/keyprovider.KeyProviderService/UnWrapKey", .needs = OFFER_UNWRAP, .message = unwrap_key, .end = unary_end },
};

/* ==== 19. Control: commands on stdin ===============================================================================
 * Owns: what a line on stdin may ask of agents and of the server.
 * Never: waits for a line.
 */
static void control_help(struct server *v);

static void control_quit(struct server *v)
{
    if (v->verdict.wanted && !v->verdict.over) {
        buf_puts(&v->verdict.why, "ended by the command quit");
        verdict_end(&v->verdict, VERDICT_TIMEOUT);
    }
    loop_stop(v->loop, "the server was told to quit");
}

static void control_agents(struct server *v)
{
    struct core *core = &v->loop->core;
    size_t n = 0;
    for (const struct session *s = v->sessions; s; s = s->next, n++)
        core_tell(core, session_whom(s, false), "%s%sfrom %s, %llu message%s", s->job_id ? s->job_id : "",
                  s->job_id ? " " : "", s->stream->conn->peer, (unsigned long long)s->messages, PLURAL(s->messages));
    if (n == 0)
        core_note(core, NULL, "no agent is connected");
}

/* What a line on stdin may be: a question to the agents, each or the one that is named, or something for the server. */
static const struct {
    const char *name, *help;
    size_t ask;
    void (*run)(struct server *);     /* NULL: the agents are asked */
} controls[] = {
    { "state", "[AGENT]       ask for the state", ASK_STATE, NULL },
    { "stop", "[AGENT]        stop the computation", ASK_STOP, NULL },
    { "disconnect", "[AGENT]  make the agent leave; it comes back by itself", ASK_DISCONNECT, NULL },
    { "run", "[AGENT]         send the manifest again", 0, NULL },
    { "agents", "             list the open streams", 0, control_agents },
    { "quit", "               end the server", 0, control_quit },
    { "help", "               this list; AGENT is a job-id or an address", 0, control_help },
};

static void control_help(struct server *v)
{
    for (size_t i = 0; i < PB_COUNT(controls); i++)
        core_note(&v->loop->core, NULL, "%s %s", controls[i].name, controls[i].help);
}

/* Whether the session is meant by this name: its job-id, its address with or without the port, or "" for all. */
static bool session_is(const struct session *s, const char *name)
{
    const char *peer = s->stream->conn->peer;
    size_t n = strlen(name);
    return n == 0 || (s->job_id && strcmp(s->job_id, name) == 0) || strcmp(peer, name) == 0 ||
           (strncmp(peer, name, n) == 0 && peer[n] == ':' && !strchr(peer + n + 1, ':'));
}

/* Asks every agent's stream that is meant; member 0: to take the manifest again. */
static void control_ask(struct server *v, size_t member, const char *name)
{
    struct core *core = &v->loop->core;
    size_t n = 0;
    bool gone = false;
    for (struct session *s = v->sessions; s; s = s->next)
        if (s->kind != KIND_FORWARDER && !s->stream->remote_closed && session_is(s, name)) {
            if (member)
                session_ask(s, member);
            else
                session_repeat(s);
            n++;
        }
    for (const struct host *h = v->verdict.hosts; h; h = h->next)
        gone |= *name && strcmp(h->name, name) == 0;
    if (n == 0 && *name)
        core_note(core, NULL, "the agent %.200s %s", name, gone ? "has gone" : "is not connected");
    else if (n == 0)
        core_note(core, NULL, "no agent is connected");
}

static void control_line(struct server *v, char *line)
{
    static const char blank[] = " \t\r";
    char *name = line + strspn(line, blank), *agent = name + strcspn(name, blank);
    if (*agent)
        *agent++ = 0;
    agent += strspn(agent, blank);
    for (size_t n = strlen(agent); n && strchr(blank, agent[n - 1]);)
        agent[--n] = 0;
    size_t row = ROW_FIND(controls, bytes_of(name));
    if (row < PB_COUNT(controls) && controls[row].run)
        controls[row].run(v);
    else if (row < PB_COUNT(controls))
        control_ask(v, controls[row].ask, agent);
    else if (*name)
        core_note(&v->loop->core, NULL, "there is no command %.200s; help lists them", name);
}

/* Bytes of commands: whole lines are done, the rest is kept; a line that is too long is dropped. */
static void control_bytes(struct server *v, const char *p, size_t n)
{
    for (; n; p++, n--) {
        if (*p == '\n') {
            v->line[v->line_len < COMMAND_LINE ? v->line_len : 0] = 0;
            v->line_len = 0;
            control_line(v, v->line);
        } else if (v->line_len++ < COMMAND_LINE) {
            v->line[v->line_len - 1] = *p;
        }
    }
}

/* stdin has something, or has ended; a background job that may not read its terminal has no commands. */
static void control_ready(struct loop *l, struct watch *w, unsigned events)
{
    struct server *v = l->core.app;
    char p[512];
    (void)events;
    ssize_t n = read(w->fd, p, sizeof p);
    if (n > 0)
        control_bytes(v, p, (size_t)n);
    bool endless = v->line_len > LINE_MAX_BYTES;
    if (endless)
        core_note(&l->core, NULL, "stdin holds no lines: it gives no more commands");
    else if (n == 0 || (n < 0 && errno != EINTR && errno != EAGAIN))
        control_bytes(v, "\n", 1);
    else
        return;
    poller_set(&l->poller, w, 0);
    v->input_always = false;
}

static void control_start(struct server *v)
{
    v->verdict.control = true;
    v->input = (struct watch){ .fd = STDIN_FILENO, .ready = control_ready };
    signal(SIGTTIN, SIG_IGN);
    bool watched = poller_set(&v->loop->poller, &v->input, WATCH_IN);
    v->input_always = !watched && errno == EPERM;
    if (!watched && !v->input_always)
        core_note(&v->loop->core, NULL, "stdin can't be waited for, so it gives no commands: %s", strerror(errno));
}

/* ==== 20. The client commands: a stand-in agent, and health ========================================================
 * Owns: what a real agent host sends, in its order and on its two streams; the check of the manifest that it gets.
 * Never: runs a computation.
 */

/* What every client command begins with. */
struct client {
    struct loop *loop;
    struct dial dial;                 /* to the server; `where` is also the authority of calls */
    const struct options *o;
    bool again;                       /* the same is to be tried once more: the server was not ready */
};

/* A line about what is wrong, and the end of the command. */
PRINTF_LIKE(2, 3) static void client_fail(struct client *c, const char *fmt, ...)
{
    char text[900];
    TEXT_REST(text, fmt);
    core_note(&c->loop->core, NULL, "FAILED: %s", text);
    c->loop->exit_status = 1;
    loop_stop(c->loop, "the client ends");
}

/* The server has -timeout for its next step on the stream. */
static void client_step(struct stream *s)
{
    const struct client *c = s->conn->core->app;
    s->deadline_ms = c->o->timeout_ms ? s->conn->core->now_ms + c->o->timeout_ms : INT64_MAX;
}

static struct link *client_dial(struct client *c, void *user)
{
    struct link *k = link_dial(c->loop, &c->dial, user);
    if (!k)
        client_fail(c, "out of memory");
    return k;
}

static void client_down(struct link *k, const char *why)
{
    struct client *c = k->loop->core.app;
    if (!c->loop->stop_why && !c->again)
        client_fail(c, "can't connect to %s: %s", c->dial.where, why);
}

/* A stream's user is the place that holds it. */
static void client_stream_closed(struct stream *s)
{
    *(struct stream **)s->user = NULL;
}

/* Whether a call that has ended with this status, before the server had taken it, is worth another try, and -wait leaves
 * time for it; the first time it is told.  What we don't believe or understand, as a certificate, does not get better. */
static bool client_again(struct client *c, const struct stream *s, unsigned status, struct bytes why)
{
    struct core *core = s->conn->core;
    int64_t left = c->dial.give_up_ms - core->now_ms;
    if ((status != GRPC_UNAVAILABLE && status != GRPC_DEADLINE_EXCEEDED) || s->conn->error || left <= 0)
        return false;
    if (!c->dial.retry_told && left > 1000)
        core_note(core, NULL, "the %s is not ready yet (%s: %.*s); trying again for %lld s", c->dial.name,
                  grpc_status_names[status], TEXT_OF(why, 300), (long long)left / 1000);
    c->dial.retry_told = c->again = true;
    return true;
}

/* Closes all that was dialled and dials anew, in a while if it is the same once more. */
static void client_redial(struct client *c, void *user)
{
    for (struct link *k = c->loop->links; k; k = k->next)
        if (k->dial)
            link_close(k, "the connection is over");
    struct link *k = client_dial(c, user);
    if (k && c->again)
        heap_set(c->loop, k, c->loop->core.now_ms + RETRY_MS);
    c->again = false;
}

enum { AGENT, FORWARDER, STREAMS };

/* The log-forwarder's lines of a run, in the reference's order.  Either event or level is set. */
struct step {
    const char *event, *status, *originator;
    const char *level, *text;
    unsigned gate;                    /* 1 + the role that a real agent waits for behind it; 0: none */
};

static const struct step run_steps[] = {
    { .level = "INFO", .text = "stand-in agent: manifest received" },
    { .level = "WARN", .text = "No Confidential Computing platform detected" },
    { .event = "ReceivingAlgorithm", .status = "InProgress", .gate = 1 + ROLE_ALGORITHM },
    { .event = "ReceivingData", .status = "InProgress", .gate = 1 + ROLE_DATA },
    { .event = "Running", .status = "Starting" },
    { .event = "Running", .status = "InProgress" },
    { .level = "DEBUG",
      .text = "the algorithm's output comes as it was written:\n\tepoch 1  loss 0.53\n\tepoch 2  loss 0.21" },
    { .event = "AlgorithmRun", .status = "Warning", .originator = "computation-runner" },
    { .level = "ERROR", .text = "UserWarning: what an algorithm writes to stderr is logged as an error\n" },
    { .event = "Running", .status = "Completed" },
    { .event = "ConsumingResults", .status = "Ready", .gate = 1 + ROLE_RESULT },
    { .event = "Complete", .status = "Completed" },
};

/* What a real agent says by the status of a call that it refuses. */
#define NOT_NOW "agent not expecting this operation in the current state"
#define NO_RESULTS_YET "computation results are not yet ready"
#define WRONG_HASH "malformed data, hash does not match manifest"
#define WRONG_NAME "malformed data, filename does not match manifest"
#define UNDECLARED "dataset not declared in computation manifest"
#define WRONG_SIGNATURE "signature verification failed"

/* -fail HOW: the run goes as far as an event, then fails; or it refuses what one role calls. */
static const struct failure {
    const char *name, *event, *status;
    bool own_failure;                 /* STATE/Failed comes before Failed/Failed */
    enum user_role role;
    const char *words;                /* of a refusal; NULL: none */
    bool signature;                   /* it comes before anything is read */
} failures[] = {
    { "ReceivingManifest", .event = "" },
    { "ReceivingAlgorithm", .event = "ReceivingAlgorithm", .status = "InProgress" },
    { "ReceivingData", .event = "ReceivingData", .status = "InProgress" },
    { "Running", .event = "Running", .status = "InProgress", .own_failure = true },
    { "algorithm-hash", .role = ROLE_ALGORITHM, .words = WRONG_HASH },
    { "algorithm-signature", .role = ROLE_ALGORITHM, .words = WRONG_SIGNATURE, .signature = true },
    { "dataset-hash", .role = ROLE_DATA, .words = WRONG_HASH },
    { "dataset-signature", .role = ROLE_DATA, .words = WRONG_SIGNATURE, .signature = true },
    { "results", .role = ROLE_RESULT, .words = "all results have been consumed by declared consumers" },
};

/* What a server with a verdict tells its agents when it ends. */
#define VERDICT_OVER "the smoke test is over"

/* What the manifest names: the algorithm, each dataset, each of those who may fetch the results. */
struct need {
    enum user_role role;
    struct bytes key, hash, name;     /* key: of whoever brings it; no hash: results; no name: any */
    const struct Source *source;      /* NULL: it is brought, not fetched */
    const struct KBSConfig *kbs;      /* NULL: none */
    bool decompress, fetch, there;    /* fetch: from here, in earnest; what others would fetch counts as there */
};

/* One of these on its way here: its bytes, then a token and a key if it is encrypted. */
enum download_phase { DOWNLOAD_NONE, DOWNLOAD_BLOB, DOWNLOAD_TOKEN, DOWNLOAD_KEY };
struct download {
    enum download_phase phase;
    bool over;                        /* the phase has ended, for what stands in why */
    struct need *need;
    struct dial dial;
    struct addrinfo *own;             /* addresses that are not the server's */
    struct link *link;
    char where[300], path[1024], why[300];
    struct buf blob, token, key;      /* blob: of what is encrypted, until its key is there */
    struct sha3_256 sha3;             /* of the bytes as they are; how many, and the first ones */
    uint64_t bytes;
    uint8_t head[2];
};

struct agent {
    struct client c;
    struct download download;
    struct stream *stream[STREAMS];
    int64_t run;
    int ended;                        /* streams that have ended well */
    size_t chunks, step;              /* step: row of run_steps that comes next */
    bool whole, begun, over, next_run;
    struct buf manifest, id;
    struct pb_arena arena;            /* of the manifest, once it is whole */
    struct ComputationRunReq req;
    struct need *needs;
    size_t need_count;
    const char *state;
    const struct failure *fail;       /* NULL: none */
    unsigned port, announced;         /* of its service, 0: none is open; roles that the server plays, a bit each */
    bool unchecked;                   /* it has been told that a signature can't be checked */
};

static void agent_send(struct agent *a, int which, const struct ClientStreamMessage *msg)
{
    if (a->stream[which])
        grpc_send(a->stream[which], &ClientStreamMessage_message, msg);
}

/* The words by which it is to refuse what a role calls; NULL: it is not. */
static const char *agent_refusal(const struct agent *a, enum user_role role)
{
    return a->fail && a->fail->role == role ? a->fail->words : NULL;
}

/* The first of a role that is not there yet, or NULL; fetch: of those that are fetched. */
static struct need *agent_lacks(const struct agent *a, enum user_role role, bool fetch)
{
    for (size_t i = 0; i < a->need_count; i++)
        if (a->needs[i].role == role && !a->needs[i].there && (a->needs[i].fetch || !fetch))
            return &a->needs[i];
    return NULL;
}

/* Whether it waits for somebody in this role: whoever the server has said that it plays, or, with -agent-port, all that a
 * real agent waits for. */
static bool agent_awaits(const struct agent *a, enum user_role role)
{
    return a->announced & 1u << role || a->c.o->agent_port || agent_refusal(a, role);
}

/* A line of the log-forwarder's. */
static void agent_tell(struct agent *a, const struct step *step)
{
    int64_t ms = a->c.loop->core.wall_ms;
    struct Timestamp t = { .seconds = ms / 1000, .nanos = (int32_t)(ms % 1000 * 1000000) };
    struct bytes id = { a->id.p, a->id.len };
    if (step->level) {
        agent_send(a, FORWARDER, &(struct ClientStreamMessage){ .agent_log = &(struct AgentLog){
            .message = bytes_of(step->text), .computation_id = id, .level = bytes_of(step->level), .timestamp = &t } });
        return;
    }
    agent_send(a, FORWARDER, &(struct ClientStreamMessage){ .agent_event = &(struct AgentEvent){
        .event_type = bytes_of(step->event), .status = bytes_of(step->status), .timestamp = &t, .computation_id = id,
        .details = BYTES("{}"), .originator = bytes_of(step->originator ? step->originator : "agent") } });
    if (!step->originator)
        a->state = step->event;
}

/* The end of a run that has failed, behind a line of the log; state: what fails by itself before, or NULL. */
static void agent_end(struct agent *a, const char *why, const char *state)
{
    agent_tell(a, &(struct step){ .level = "ERROR", .text = why });
    if (state)
        agent_tell(a, &(struct step){ .event = state, .status = "Failed" });
    agent_tell(a, &(struct step){ .event = "Failed", .status = "Failed" });
    a->step = PB_COUNT(run_steps);
}

static void put_members(struct buf *out, const struct pb_message *m, const void *msg, int level);

/* A field for people: hashes in hex, keys by their last bytes, in which they differ. */
static void put_member(struct buf *out, const struct pb_field *f, const void *item, int level)
{
    for (int i = 0; i < level; i++)
        buf_puts(out, "  ");
    buf_printf(out, f->kind == PB_MESSAGE ? "%s\n" : "%s: ", f->name);
    if (f->kind == PB_MESSAGE) {
        put_members(out, f->sub, f->flags & PB_REPEATED ? item : pb_pointer(item), level + 1);
        return;
    }
    struct bytes b = f->kind == PB_BOOL ? BYTES("true") : *(const struct bytes *)item;
    if (f->kind != PB_BYTES) {
        put_text(out, b, NULL);
    } else {
        if (b.n != SHA3_256_LEN)
            buf_printf(out, BYTES_FMT "%s", BYTES_OF(b.n), b.n > REPORT_BYTES ? " ..." : " ");
        put_as_hex(out, b.n == SHA3_256_LEN || b.n < REPORT_BYTES ? b : bytes_from(b, b.n - REPORT_BYTES));
    }
    buf_putc(out, '\n');
}

/* A message's fields that are set, a line each; of a manifest these are text, bytes, booleans and messages. */
static void put_members(struct buf *out, const struct pb_message *m, const void *msg, int level)
{
    for (const struct pb_field *f = m->fields; f < m->fields + m->n; f++) {
        const void *at = (const char *)msg + f->offset;
        const struct pb_list *list = f->flags & PB_REPEATED ? at : NULL;
        for (size_t i = 0; i < (list ? list->n : pb_is_set(f, at)); i++)
            put_member(out, f, list ? (const char *)list->items + i * pb_item_size(f) : at, level);
    }
}

/* Adds the i-th need of a role, which must have what a real agent can't do without: with another hash it panics. */
static struct need *need_add(struct agent *a, enum user_role role, size_t i, struct bytes key, struct bytes hash,
                             const struct Source *source, const struct KBSConfig *kbs)
{
    static const char *const names[ROLES] = { "algorithm", "dataset", "result consumer" };
    struct need *n = &a->needs[a->need_count++];
    bool remote = source && source->url.n;
    *n = (struct need){ .role = role, .key = key, .hash = hash, .source = remote ? source : NULL,
                        .kbs = kbs ? kbs : a->req.kbs,
                        .fetch = remote && a->announced & 1u << role && http_scheme(source->url) };
    n->there = remote && !n->fetch;
    if (role != ROLE_RESULT && hash.n != SHA3_256_LEN)
        client_fail(&a->c, "%s %zu: its hash has " BYTES_FMT ", not %d", names[role], i, BYTES_OF(hash.n), SHA3_256_LEN);
    if (!der_is_spki(key))
        client_fail(&a->c, "%s %zu: its userKey is not a SubjectPublicKeyInfo", names[role], i);
    return n;
}

static void agent_needs(struct agent *a)
{
    const struct ComputationRunReq *req = &a->req;
    const struct Algorithm *algorithm = req->algorithm;
    const struct Dataset *d = req->datasets.items;
    const struct ResultConsumer *r = req->result_consumers.items;
    a->needs = pb_arena_alloc(&a->arena, (1 + req->datasets.n + req->result_consumers.n) * sizeof *a->needs);
    if (!a->needs) {
        client_fail(&a->c, "out of memory for the manifest");
        return;
    }
    for (size_t i = 0; i < req->datasets.n; i++) {
        struct need *n = need_add(a, ROLE_DATA, i, d[i].userKey, d[i].hash, d[i].source, d[i].kbs);
        n->name = d[i].filename;
        n->decompress = d[i].decompress;
    }
    for (size_t i = 0; i < req->result_consumers.n; i++)
        need_add(a, ROLE_RESULT, i, r[i].userKey, BYTES(""), NULL, NULL);
    if (algorithm)
        need_add(a, ROLE_ALGORITHM, 0, algorithm->userKey, algorithm->hash, algorithm->source, algorithm->kbs);
}

/* The joined chunks: shown, and held to what a real agent needs of them. */
static void agent_check_manifest(struct agent *a)
{
    size_t len = a->manifest.len;
    const struct ComputationRunReq *req = &a->req;
    struct buf *out = &a->c.loop->core.out;
    pb_arena_free(&a->arena);
    a->arena = (struct pb_arena){ .limit = (64 << 20) + 8 * (len < SIZE_MAX / 16 ? len : SIZE_MAX / 16) };
    a->req = (struct ComputationRunReq){ .algorithm = NULL };
    a->need_count = 0;
    enum pb_error err = pb_decode(&ComputationRunReq_message, &a->req, (struct bytes){ a->manifest.p, len }, &a->arena,
                                  NULL);
    if (err != PB_OK) {
        client_fail(&a->c, "the manifest of " BYTES_FMT " does not parse: %s", BYTES_OF(len), pb_error_text[err]);
        return;
    }
    core_note(&a->c.loop->core, NULL, "manifest received: " BYTES_FMT " in %zu chunk%s, %zu dataset%s", BYTES_OF(len),
              a->chunks, PLURAL(a->chunks), req->datasets.n, PLURAL(req->datasets.n));
    size_t before = out->len;
    if (a->c.o->once)
        pb_json(out, &ComputationRunReq_message, req, 2), json_defuse(out, before), buf_putc(out, '\n');
    else
        put_members(out, &ComputationRunReq_message, req, 0);
    if (out->failed) {                /* not half of it */
        out->len = before;
        client_fail(&a->c, "out of memory to show the manifest");
    }
    if (!bytes_eq(req->id, (struct bytes){ a->id.p, a->id.len }))
        client_fail(&a->c, "the chunks and the manifest name different computations");
    if (!req->algorithm)
        client_fail(&a->c, "the manifest has no algorithm");
    agent_needs(a);
}

/* ---- Its run ---- */

static void agent_bind(struct agent *a, unsigned port);
static void download_next(struct agent *a, enum user_role role);

/* From now on it can be called, if it waits for anybody to call. */
static void agent_await(struct agent *a)
{
    bool called = false;
    for (size_t i = 0; i < a->need_count; i++)
        called |= !a->needs[i].there && !a->needs[i].fetch && agent_awaits(a, a->needs[i].role);
    if (called && !a->port)
        agent_bind(a, SERVICE_PORT);
    if (a->port && !a->c.loop->stop_why && !listeners_open(a->c.loop))
        client_fail(&a->c, "can't take uploads at port %u: %s; -agent-port 0 takes any free one", a->port, strerror(errno));
}

/* Whether it waits, at a gate, for something that is not there yet. */
static bool agent_waits(const struct agent *a)
{
    unsigned gate = a->step ? run_steps[a->step - 1].gate : 0;
    return gate && agent_awaits(a, (enum user_role)(gate - 1)) && agent_lacks(a, (enum user_role)(gate - 1), false);
}

/* The run, from where it stands to where somebody is waited for. */
static void agent_play(struct agent *a)
{
    static const char told[] = "stand-in agent: told to fail";
    const struct failure *f = a->fail;
    if (!a->begun) {
        bool refused = f && f->event && !*f->event;
        struct RunResponse res = { .computation_id = { a->id.p, a->id.len }, .error = bytes_of(refused ? told : "") };
        agent_send(a, AGENT, &(struct ClientStreamMessage){ .run_res = &res });
        a->begun = true;
        if (refused)
            a->step = PB_COUNT(run_steps);
    }
    while (a->step < PB_COUNT(run_steps) && !agent_waits(a)) {
        const struct step *step = &run_steps[a->step++];
        if (step->gate != 1 + ROLE_DATA || a->req.datasets.n)
            agent_tell(a, step);
        if (f && f->event && step->event && strcmp(f->event, step->event) == 0 && strcmp(f->status, step->status) == 0)
            agent_end(a, told, f->own_failure ? f->event : NULL);
    }
    if (agent_waits(a))
        download_next(a, (enum user_role)(run_steps[a->step - 1].gate - 1));
}

/* Goes on once the manifest is whole and both streams are up, and each time that somebody has called. */
static void agent_go(struct agent *a)
{
    bool once = a->c.o->once;
    if (!a->whole || a->c.loop->stop_why || a->over || (!once && !a->stream[FORWARDER]))
        return;
    if (!once)
        agent_play(a);
    a->c.loop->core.touched = true;
    a->over = once || a->step == PB_COUNT(run_steps);
    if (a->stream[AGENT])
        a->stream[AGENT]->deadline_ms = INT64_MAX;   /* what it waits for now is uploads */
    for (int i = 0; i < STREAMS && a->over; i++)
        if (a->stream[i]) {
            grpc_half_close(a->stream[i]);
            client_step(a->stream[i]);
        }
}

/* A chunk of the manifest, of any length. */
static void agent_chunk(struct agent *a, const struct RunReqChunks *c)
{
    const char *const *stop = &a->c.loop->stop_why;
    if (a->whole || *stop)
        return;
    if (a->chunks++ == 0)
        buf_put(&a->id, c->id.p, c->id.n);
    buf_put(&a->manifest, c->data.p, c->data.n);
    if (a->id.failed || a->manifest.failed)
        client_fail(&a->c, "out of memory for the manifest");
    else if (!bytes_eq(c->id, (struct bytes){ a->id.p, a->id.len }))
        client_fail(&a->c, "chunk %zu belongs to another computation", a->chunks);
    else if (a->manifest.len > MANIFEST_FILE_MAX)
        client_fail(&a->c, "the manifest has more than %d MiB", MANIFEST_FILE_MAX >> 20);
    if (!c->is_last || *stop)
        return;
    agent_check_manifest(a);
    if (!*stop && !a->c.o->once)
        agent_await(a);
    a->whole = !*stop;
    agent_go(a);
}

/* Chunks of the manifest, or what a server may ask of a running agent. */
static void agent_message(struct stream *s, struct bytes wire)
{
    struct core *core = s->conn->core;
    struct agent *a = core->app;
    struct ServerStreamMessage msg = { 0 };
    if (s->user != &a->stream[AGENT] || a->c.again)
        return;                       /* a log-forwarder takes no notice of what it gets; nor who is about to try again */
    pb_arena_reset(&core->arena);
    enum pb_error err = pb_decode(&ServerStreamMessage_message, &msg, wire, &core->arena, NULL);
    if (msg.runReqChunks && !a->whole)
        client_step(s);
    if (err != PB_OK) {
        client_fail(&a->c, "a message of " BYTES_FMT " does not parse: %s", BYTES_OF(wire.n), pb_error_text[err]);
    } else if (msg.runReqChunks) {
        agent_chunk(a, msg.runReqChunks);
    } else if (msg.runReq) {
        client_fail(&a->c, "the server sent a plain runReq: real agents take chunks only");
    } else if (msg.agentStateReq) {
        struct AgentStateRes res = { .id = msg.agentStateReq->id, .state = bytes_of(a->state) };
        agent_send(a, AGENT, &(struct ClientStreamMessage){ .agentStateRes = &res });
    } else if (msg.stopComputation) {
        struct StopComputationResponse res = { .computation_id = msg.stopComputation->computation_id };
        agent_tell(a, &(struct step){ .event = "Stopped", .status = "Stopped" });
        core->touched = true;         /* the event is on the other connection */
        agent_send(a, AGENT, &(struct ClientStreamMessage){ .stopComputationRes = &res });
        a->step = PB_COUNT(run_steps);
        agent_go(a);
    }
}

static void agent_status(struct stream *s, unsigned status, struct bytes text)
{
    struct agent *a = s->conn->core->app;
    bool verdict = a->whole && status == GRPC_UNAVAILABLE && bytes_eq(text, BYTES(VERDICT_OVER));
    bool early = status == GRPC_OK && !s->local_closed;   /* it has not heard our end */
    if (a->c.loop->stop_why || a->c.again || a->next_run || (!a->chunks && client_again(&a->c, s, status, text)))
        return;
    if (!verdict && (status != GRPC_OK || !a->over || early)) {
        client_fail(&a->c, "the %s's stream ended%s: %s: %.*s", s->user == &a->stream[AGENT] ? "agent" : "log-forwarder",
                    early ? " before the server had taken everything" : "", grpc_status_names[status], TEXT_OF(text, 300));
        return;
    }
    if (++a->ended < (a->c.o->once ? 1 : STREAMS))
        return;
    core_note(&a->c.loop->core, NULL, "run %lld of %lld is over: the server has %s", (long long)a->run,
              (long long)a->c.o->repeat, verdict ? "its verdict" : "taken everything");
    a->next_run = a->run < a->c.o->repeat && !verdict;
    if (!a->next_run)
        loop_stop(a->c.loop, "done");
}

/* The server's answer begins: it may say what it does besides. */
static void agent_headers(struct stream *s, const struct fields *f)
{
    struct agent *a = s->conn->core->app;
    for (unsigned i = 0; i < ROLES && s->user == &a->stream[AGENT]; i++)
        a->announced |= bytes_contain(f->value[F_CVMS_DELIVERS], roles[i].what) ? 1u << i : 0;
}

static const struct grpc_method agent_method = {
    .path = "/cvms.Service/Process", .open = agent_headers, .message = agent_message, .status = agent_status,
    .closed = client_stream_closed,
};

/* ---- Its own service: agent.AgentService ---- */

/* One upload on its way. */
struct upload {
    struct sha3_256 hash;
    uint64_t bytes;
    struct buf name;
};

static const struct grpc_method service_methods[ROLES];

static enum user_role service_role(const struct stream *s)
{
    return (enum user_role)(s->grpc.method - service_methods);
}

/* Takes the port of the service, on loopback where the server is; a client gets in once the manifest is there. */
static void agent_bind(struct agent *a, unsigned port)
{
    const struct sockaddr_in *four = (const struct sockaddr_in *)(const void *)a->c.dial.addresses->ai_addr;
    const struct sockaddr_in6 *six = (const struct sockaddr_in6 *)(const void *)four;
    bool is_six = four->sin_family == AF_INET6;
    bool local = is_six ? IN6_IS_ADDR_LOOPBACK(&six->sin6_addr) : ntohl(four->sin_addr.s_addr) >> 24 == 127;
    const char *why;
    a->port = listen_host(a->c.loop, local ? "localhost" : "", port, &why);
    if (!a->port)
        client_fail(&a->c, "can't take uploads at port %u: %s; -agent-port 0 takes any free one", port,
                    why ? why : strerror(errno));
    else
        core_note(&a->c.loop->core, NULL, "uploads are taken at %s%u", local ? "localhost:" : "all interfaces, port ",
                  a->port);
}

/* Refuses a call with a real agent's words. */
static void service_refuse(struct stream *s, unsigned status, const char *words)
{
    struct agent *a = s->conn->core->app;
    enum user_role role = service_role(s);
    char line[200];
    bool planned = agent_refusal(a, role);
    core_note(s->conn->core, NULL, "refuses the %s%s: %s", roles[role].what, planned ? ", as told" : "", words);
    a->c.loop->exit_status |= !planned && strcmp(words, NOT_NOW) != 0 && strcmp(words, NO_RESULTS_YET) != 0;
    text_printf(line, sizeof line, "Method %s took 0s to complete with error: %s",
                strrchr(s->grpc.method->path, '/') + 1, words);
    if (status == GRPC_UNKNOWN)
        agent_tell(a, &(struct step){ .level = "WARN", .text = line });
    s->conn->core->touched = true;
    grpc_finish(s, status, words);
}

/* Whether the caller holds a private key of this role: its signature is over the role's own word. */
static bool service_knows(struct agent *a, enum user_role role, struct bytes signature)
{
    struct buf raw = { 0 };
    int known = 0;
    bool good = base64_decode(signature, &raw);
    struct bytes last = { 0 };
    for (size_t i = 0; good && i < a->need_count && known < 1; i++) {
        struct bytes key = a->needs[i].key;
        if (a->needs[i].role != role || bytes_eq(key, last))
            continue;
        int now = signature_check(key, bytes_of(roles[role].user_id), ((struct bytes){ raw.p, raw.len }));
        known = now ? now : known;
        last = key;
    }
    buf_free(&raw);
    if (known < 0 && !a->unchecked)
        core_note(&a->c.loop->core, NULL, "signatures are not checked: this cvms %s",
                  CVMS_TLS ? "can't with a key of this kind" : "was built without TLS (make TLS=0)");
    a->unchecked |= known < 0;
    return known != 0;
}

static void service_open(struct stream *s, const struct fields *f)
{
    struct agent *a = s->conn->core->app;
    enum user_role role = service_role(s);
    bool planned = a->fail && a->fail->signature && a->fail->role == role;
    if (!a->whole)
        service_refuse(s, GRPC_UNKNOWN, role == ROLE_RESULT ? NO_RESULTS_YET : NOT_NOW);
    else if (!f->value[F_SIGNATURE].p)
        service_refuse(s, GRPC_UNAUTHENTICATED, "invalid metadata");
    else if (planned || !service_knows(a, role, f->value[F_SIGNATURE]))
        service_refuse(s, GRPC_UNAUTHENTICATED, WRONG_SIGNATURE);
    else if (role == ROLE_ALGORITHM && !f->value[F_ALGO_TYPE].p)
        client_fail(&a->c, "an algorithm came without the metadata algo_type: a real agent panics of that");
    else if (!(s->user = calloc(1, sizeof(struct upload))))
        service_refuse(s, GRPC_RESOURCE_EXHAUSTED, "out of memory");
    else
        sha3_256_init(&((struct upload *)s->user)->hash, sha3_features());
}

static void service_closed(struct stream *s)
{
    struct upload *u = s->user;
    if (u)
        buf_free(&u->name);
    free(u);
    s->user = NULL;
}

/* AlgoRequest and DataRequest have the same two fields: a piece, and the requirements, or a name in each. */
static void upload_message(struct stream *s, struct bytes wire)
{
    struct upload *u = s->user;
    struct AlgoRequest req = { .algorithm = { NULL, 0 } };
    if (!u || !message_decode(s, &AlgoRequest_message, &req, wire))
        return;
    sha3_256_update(&u->hash, req.algorithm.p, req.algorithm.n);
    u->bytes += req.algorithm.n;
    if (service_role(s) == ROLE_DATA && req.requirements.n) {
        u->name.len = 0;
        buf_put(&u->name, req.requirements.p, req.requirements.n);
    }
}

/* The need that an upload fulfils, by its name; where the manifest has none, by its hash.  NULL: *why tells. */
static struct need *upload_need(struct agent *a, enum user_role role, struct bytes name, const uint8_t *hash,
                                const char **why)
{
    *why = UNDECLARED;
    for (size_t i = 0; i < a->need_count; i++) {
        struct need *n = &a->needs[i];
        bool open = n->role == role && !n->there, named = open && bytes_eq(n->name, name);
        bool same = open && memcmp(n->hash.p, hash, SHA3_256_LEN) == 0;
        if (same && (named || !n->name.n))
            return n;
        if (named || (same && strcmp(*why, WRONG_HASH) != 0))
            *why = named ? WRONG_HASH : WRONG_NAME;
    }
    return NULL;
}

/* Takes an upload that is whole, or refuses it. */
static void upload_end(struct stream *s)
{
    struct agent *a = s->conn->core->app;
    struct upload *u = s->user;
    enum user_role role = service_role(s);
    uint8_t hash[SHA3_256_LEN];
    const char *why = agent_refusal(a, role);
    struct need *n = NULL;
    if (!u)
        return;
    sha3_256_final(&u->hash, hash);
    if (u->bytes == 0)
        why = role == ROLE_DATA ? "dataset is required" : "algorithm binary is required";
    else if (agent_state_of(bytes_of(a->state)) != roles[role].from)
        why = NOT_NOW;
    else if (!why)
        n = upload_need(a, role, (struct bytes){ u->name.p, u->name.len }, hash, &why);
    if (!n) {
        service_refuse(s, GRPC_UNKNOWN, why);
        return;
    }
    n->there = true;
    core_note(s->conn->core, NULL, "the %s is there: " BYTES_FMT " with the manifest's hash", roles[role].what,
              BYTES_OF(u->bytes));
    grpc_send(s, &ResultRequest_message, &(struct ResultRequest){ 0 });     /* as empty as AlgoResponse and DataResponse */
    grpc_finish(s, GRPC_OK, "");
    agent_go(a);
}

/* ---- What it fetches ---- */

PRINTF_LIKE(2, 3) static void download_end(struct download *l, const char *fmt, ...)
{
    if (l->over)
        return;
    TEXT_REST(l->why, fmt);
    l->over = true;
}

static struct download *download_of(const struct stream *s)
{
    return &((struct agent *)s->conn->core->app)->download;
}

/* A request is over.  A server without the service for tokens is one for agents that do without. */
static void download_status(struct stream *s, unsigned status, struct bytes text)
{
    struct download *l = download_of(s);
    bool token = l->phase == DOWNLOAD_TOKEN, good = status == GRPC_OK || (token && status == GRPC_UNIMPLEMENTED);
    if (good && (l->blob.failed || l->key.failed))
        download_end(l, "out of memory");
    else if (good && l->phase == DOWNLOAD_KEY && l->key.len != AES_KEY)
        download_end(l, "the key has " BYTES_FMT ", not %d", BYTES_OF(l->key.len), AES_KEY);
    else if (good)
        download_end(l, "%s", "");
    else
        download_end(l, "%s%s%.*s", token ? grpc_status_names[status] : "", token ? ": " : "", TEXT_OF(text, 300));
}

static void token_message(struct stream *s, struct bytes wire)
{
    struct GetTokenResponse res = { .Token = { NULL, 0 } };
    if (message_decode(s, &GetTokenResponse_message, &res, wire))
        buf_put(&download_of(s)->token, res.Token.p, res.Token.n);
}

static const struct grpc_method download_method = {
    .path = "/attestation_agent.AttestationAgentService/GetToken", .message = token_message, .status = download_status,
};

static void http_headers(struct stream *s, const struct fields *f, bool end)
{
    struct bytes status = f->value[F_STATUS];
    (void)end;
    if (status.p && !bytes_eq(status, BYTES("200")))
        grpc_client_fail(s, GRPC_UNKNOWN, "HTTP status %.*s", TEXT_OF(status, 3));
}

/* What is in the clear is looked at as it comes, and not kept: it may be larger than memory. */
static void download_take(struct download *l, const uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n && l->bytes + i < sizeof l->head; i++)
        l->head[l->bytes + i] = p[i];
    sha3_256_update(&l->sha3, p, n);
    l->bytes += n;
}

static void http_data(struct stream *s, struct bytes p)
{
    struct download *l = download_of(s);
    struct buf *to = l->phase == DOWNLOAD_KEY ? &l->key : &l->blob;
    client_step(s);
    if (to == &l->key && l->key.len + p.n > AES_KEY)
        download_end(l, "the key has more than %d bytes", AES_KEY);
    if (!l->over && l->need->source->encrypted)
        buf_put(to, p.p, p.n);
    else if (!l->over)
        download_take(l, p.p, p.n);
    if (to->failed)
        download_end(l, "out of memory");
}

static void http_end(struct stream *s)
{
    grpc_client_status(s, GRPC_OK, BYTES(""));
}

/* A GET, which ends as a call does that gets no status. */
static const struct h2_handler http_client = {
    .headers = http_headers, .data = http_data, .end = http_end, .abort = grpc_client_abort, .lost = grpc_client_lost,
    .closed = grpc_client_closed,
};

static void download_up(struct link *k)
{
    struct download *l = k->user;
    struct conn *c = &k->conn;
    bool call = l->phase == DOWNLOAD_TOKEN, bears = l->phase == DOWNLOAD_KEY && l->token.len;
    struct stream *s = call ? grpc_call(c, &download_method, l->where, NULL) : stream_new(c, c->next_id);
    struct buf bearer = { 0 };
    buf_printf(&bearer, "Bearer %.*s", (int)l->token.len, (const char *)l->token.p);
    buf_putc(&bearer, 0);
    if (s)
        client_step(s);
    if (!s || bearer.failed || l->token.failed) {
        download_end(l, "out of memory");
    } else if (call) {
        grpc_send(s, &GetTokenRequest_message, &(struct GetTokenRequest){ .TokenType = BYTES("kbs") });
        grpc_half_close(s);
    } else {
        c->next_id += 2;
        s->grpc.method = &download_method;
        stream_put_fields(s, (const char *[]){ ":method", "GET", ":scheme", c->secure ? "https" : "http", ":path", l->path,
                                               ":authority", l->where, "user-agent", "cvms/" CVMS_VERSION, "authorization",
                                               bears ? (const char *)bearer.p : NULL, NULL }, NULL, END_STREAM);
        stream_local_end(s);
    }
    buf_free(&bearer);
}

static void download_down(struct link *k, const char *why)
{
    struct download *l = k->user;
    l->link = NULL;
    download_end(l, "%s", why);
}

/* Ends what is under way; a key is wiped. */
static void download_free(struct agent *a)
{
    struct download *l = &a->download;
    addresses_free(l->own);
    wipe_buf(&l->key);
    buf_free(&l->token);
    buf_free(&l->blob);
    wipe(l, sizeof *l);
}

/* Where the resource, or its key at its broker, is to be had.  False: told why not. */
static bool download_url(struct download *l)
{
    const struct need *n = l->need;
    bool key = l->phase == DOWNLOAD_KEY;
    struct bytes url = !key ? n->source->url : n->kbs ? n->kbs->url : BYTES("");
    struct bytes rest = bytes_from(url, http_scheme(url)), host = bytes_take(&rest, '/');
    struct address at;
    const char *why;
    rest.n -= key && rest.n && rest.p[rest.n - 1] == '/';
    text_printf(l->where, sizeof l->where, "%.*s", TEXT_OF(host, sizeof l->where));
    text_printf(l->path, sizeof l->path, "/%.*s%s%s%.*s", TEXT_OF(rest, sizeof l->path), rest.n && key ? "/" : "",
                key ? "kbs/v0/resource/" : "", TEXT_OF(n->source->kbs_resource_path, key ? sizeof l->path : 0));
    if (http_scheme(url) != 8)
        l->dial.tls = NULL;
    signals_handle(on_signal_end);    /* a resolver may take long */
    if (!address_parse(l->where, &at))
        download_end(l, "%s is no address", l->where);
    else if (!(l->own = resolve_host(at.host, at.port >= 0 ? (unsigned)at.port : l->dial.tls ? 443 : 80, 0, &why)))
        download_end(l, "can't resolve %s: %s", at.host, why);
    signals_handle(on_signal);
    l->dial.addresses = l->own;
    return l->own;
}

/* Begins a phase: a request on a link of its own.  A name is looked up at once: a stand-in has nothing else to do. */
static void download_phase(struct agent *a, enum download_phase phase)
{
    struct download *l = &a->download;
    bool token = phase == DOWNLOAD_TOKEN;
    addresses_free(l->own);
    l->own = NULL;
    l->phase = phase;
    l->over = false;
    l->dial = (struct dial){ .endpoint = { .on = token ? &grpc_client : &http_client, .client = true,
                                           .max_message = CLIENT_MAX_MESSAGE },
                             .name = "resource", .addresses = a->c.dial.addresses, .connect_ms = CONNECT_MS,
                             .tls = a->c.dial.tls, .up = download_up, .down = download_down, .closed = download_down };
    text_printf(l->where, sizeof l->where, "%s", a->c.dial.where);
    if (!token && !download_url(l))
        return;
    l->link = link_dial(a->c.loop, &l->dial, l);
    if (!l->link)
        download_end(l, "out of memory");
}

/* Fetches the first resource of a role that is not there yet, unless one is on its way. */
static void download_next(struct agent *a, enum user_role role)
{
    struct download *l = &a->download;
    struct need *n = agent_lacks(a, role, true);
    if (l->phase || !n)
        return;
    l->need = n;
    sha3_256_init(&l->sha3, sha3_features());
    download_phase(a, DOWNLOAD_BLOB);
    if (n->source->encrypted && !CVMS_TLS)
        download_end(l, "this cvms was built without TLS (make TLS=0), and so without ciphers");
}

/* What is wrong with the whole resource, as a real agent says it, in l->why; nothing: "". */
static void download_check(struct download *l)
{
    uint8_t piece[FILE_READ], hash[SHA3_256_LEN];
    char hex[2][2 * SHA3_256_LEN + 1];
    bool sealed = l->need->source->encrypted;
    struct unseal u = { 0 };
    if (sealed)
        unseal_init(&u, l->key.p);
    for (size_t at = 0, n; at < l->blob.len; at += n) {
        n = min_size(l->blob.len - at, sizeof piece);
        download_take(l, piece, unseal_update(&u, l->blob.p + at, n, piece));
    }
    sha3_256_final(&l->sha3, hash);
    hex_text(hex[0], l->need->hash.p, SHA3_256_LEN);
    hex_text(hex[1], hash, SHA3_256_LEN);
    l->over = false;
    if (sealed && !unseal_final(&u))
        download_end(l, "failed to decrypt resource: cipher: message authentication failed");
    else if (strcmp(hex[0], hex[1]) != 0)
        download_end(l, "hash mismatch: expected %s, got %s", hex[0], hex[1]);
    else if (l->need->decompress && memcmp(l->head, "PK", 2) != 0)
        download_end(l, "failed to unzip: zip: not a valid zip file");
}

/* It is there; or it has failed, which is said as a real agent says it, and the run is over. */
static void download_finish(struct agent *a, const char *before)
{
    const struct download *l = &a->download;
    struct need *n = l->need;
    char line[700];
    if (!*l->why) {
        core_note(&a->c.loop->core, NULL, "the %s is fetched: " BYTES_FMT " with the manifest's hash", roles[n->role].what,
                  BYTES_OF(l->bytes));
        n->there = true;
        return;
    }
    text_printf(line, sizeof line, "failed to download and decrypt %s%s%.*s: %s%s", roles[n->role].what,
                n->name.n ? " " : "", TEXT_OF(n->name, 100), before, l->why);
    core_note(&a->c.loop->core, NULL, "%s", line);
    a->c.loop->exit_status = 1;
    agent_end(a, line, NULL);
}

/* A phase is over: the next one begins, or it was the last. */
static void download_turn(struct agent *a)
{
    static const char *const of_phase[] = { "", "failed to download resource: ",
                                            "failed to retrieve token from attestation service: ",
                                            "failed to retrieve decryption key from KBS: " };
    struct download *l = &a->download;
    if (!l->phase || !l->over)
        return;
    if (l->link)
        link_close(l->link, "the request is over");
    bool good = !*l->why && !a->over; /* a->over: it has been stopped */
    if (good && l->need->source->encrypted && l->phase != DOWNLOAD_KEY) {
        download_phase(a, (enum download_phase)(l->phase + 1));
        return;
    }
    if (good)
        download_check(l);
    if (!a->over)
        download_finish(a, good ? "" : of_phase[l->phase]);
    download_free(a);
    agent_go(a);
}

/* A zip of one file, as a real agent's results are: its header and descriptor, the directory and its end. */
static const char results_zip[] =
    "PK\3\4\24\0\10\0\0\0\0\0!\354\0\0\0\0\0\0\0\0\0\0\0\0\13\0\11\0" "results.txtUT\5\0\1\0\0\0\0"
    "cvms agent has run nothing: these are a stand-in's results.\n"
    "PK\7\10\36\33\331\332<\0\0\0<\0\0\0"
    "PK\1\2\24\3\24\0\10\0\0\0\0\0!\354\36\33\331\332<\0\0\0<\0\0\0\13\0\11\0\0\0\0\0\0\0\0\0\244\201\0\0\0\0"
    "results.txtUT\5\0\1\0\0\0\0" "PK\5\6\0\0\0\0\1\0\1\0B\0\0\0~\0\0\0\0\0";

static void result_end(struct stream *s)
{
    struct agent *a = s->conn->core->app;
    char size[24];
    bool early = agent_state_of(bytes_of(a->state)) < roles[ROLE_RESULT].from;
    const char *refusal = early ? NO_RESULTS_YET : agent_refusal(a, ROLE_RESULT);
    if (refusal) {
        service_refuse(s, GRPC_UNKNOWN, refusal);
        return;
    }
    text_printf(size, sizeof size, "%zu", sizeof results_zip - 1);
    grpc_send_headers(s, (const char *[]){ "file-size", size, NULL });
    grpc_send(s, &ResultResponse_message, &(struct ResultResponse){ .file = BYTES(results_zip) });
    grpc_finish(s, GRPC_OK, "");
    core_note(s->conn->core, NULL, "the results are fetched: " BYTES_FMT, BYTES_OF(sizeof results_zip - 1));
    for (struct need *n; (n = agent_lacks(a, ROLE_RESULT, false)) != NULL;)
        n->there = true;
    agent_go(a);
}

static const struct grpc_method service_methods[ROLES] = {
    { .path = "/agent.AgentService/Algo", .open = service_open, .message = upload_message, .end = upload_end,
      .closed = service_closed },
    { .path = "/agent.AgentService/Data", .open = service_open, .message = upload_message, .end = upload_end,
      .closed = service_closed },
    { .path = "/agent.AgentService/Result", .open = service_open, .end = result_end, .closed = service_closed },
};

static const char *addr_text(const struct options *o)
{
    const char *url = getenv("AGENT_CVM_GRPC_URL");
    return o->arg_count ? o->args[0] : present(url) ? url : "localhost:7001";
}

/* A connection is up: opens its Process stream.  The attestation report is the agent's first message. */
static void agent_up(struct link *k)
{
    struct agent *a = k->loop->core.app;
    struct stream **at = k->user;
    bool agent = at == &a->stream[AGENT], job = present(a->c.o->job_id);
    char port[8];
    text_printf(port, sizeof port, "%u", a->port);
    *at = grpc_call(&k->conn, &agent_method, a->c.dial.where, (const char *[]){
        "job-id", job ? a->c.o->job_id : NULL, "connection-type", job && !agent ? "log-forwarder" : NULL,
        "agent-port", agent && a->port && a->port != SERVICE_PORT ? port : NULL, NULL });
    if (!*at) {
        client_fail(&a->c, "out of memory");
        return;
    }
    (*at)->user = at;
    if (!agent) {
        agent_go(a);
        return;
    }
    client_step(*at);
    if (!a->c.o->once)
        client_dial(&a->c, &a->stream[FORWARDER]);     /* as an agent host does: two connections */
    struct AttestationResponse report = { .certSerialNumber = BYTES("") };
    agent_send(a, AGENT, &(struct ClientStreamMessage){ .vTPMattestationReport = &report });
}

/* The next run begins, or the same once more, on new connections. */
static void agent_turn(struct loop *l)
{
    struct agent *a = l->core.app;
    download_turn(a);
    if (!a->next_run && !a->c.again)
        return;
    client_redial(&a->c, &a->stream[AGENT]);
    download_free(a);
    a->run += a->next_run;
    a->chunks = a->step = a->announced = 0;
    a->ended = 0;
    a->next_run = a->whole = a->begun = a->over = false;
    a->state = "ReceivingManifest";
    buf_free(&a->manifest);
    buf_free(&a->id);
}

/* The address of the command line or the environment, taken apart. */
static void client_address(const struct options *o, struct mistakes *r, struct address *at)
{
    const char *text = addr_text(o);
    bool good = address_parse(text, at) && at->port && !at->bare && *text;
    if (o->arg_count > 1)
        tell(r, USAGE, "one address at most; \"%s\" is one too many", o->args[1]);
    if (!good)
        tell(r, USAGE, "%s\"%s\" is not an address; %swrite it like localhost:7001 or [::1]:7001",
             o->arg_count ? "" : "AGENT_CVM_GRPC_URL: ", text,
             strstr(text, "://") ? "it is no URL here: leave out what comes before the host, and " : "");
    if (good && !*at->host)
        text_printf(at->host, sizeof at->host, "localhost");
    if (good && at->port < 0)
        at->port = 7001;
}

/* Resolves it, again and again while -wait lasts; the list is the caller's.  NULL: told why not. */
static struct addrinfo *client_resolve(const struct options *o, struct mistakes *r, const struct address *at)
{
    const char *why;
    struct addrinfo *list;
    int64_t end = clock_ms(CLOCK_MONOTONIC) + o->wait_ms, left = o->wait_ms;
    while (!(list = resolve_host(at->host, (unsigned)at->port, 0, &why)) && left > 0) {
        if (left == o->wait_ms && left > 1000)
            tell_note("can't resolve \"%s\" yet (%s); trying again for %lld s", at->host, why, (long long)left / 1000);
        poll(NULL, 0, left < RETRY_MS ? (int)left : RETRY_MS);
        left = end - clock_ms(CLOCK_MONOTONIC);
    }
    if (!list)
        tell(r, START, "can't resolve \"%s\": %s", at->host, why);
    return list;
}

/* The client's TLS as flags or an agent's own variables ask for it; *config stays NULL for plaintext.  False: told. */
static bool client_tls(const struct options *o, struct mistakes *r, const char *host, struct tls_config **config)
{
    struct err e;
    struct tls_options t = {
        .server_ca = TLS_SOURCE("-ca", o->ca, "AGENT_CVM_GRPC_SERVER_CA_CERTS"),
        .cert = TLS_SOURCE("-cert", o->cert, "AGENT_CVM_GRPC_CLIENT_CERT"),
        .key = TLS_SOURCE("-key", o->key, "AGENT_CVM_GRPC_CLIENT_KEY"),
        .server_name = present(o->server_name) ? o->server_name : host, .insecure = o->insecure,
    };
    if (!present(t.server_ca.value) && !present(t.cert.value) && !present(t.key.value) && !o->insecure) {
        if (present(o->server_name))
            tell(r, USAGE, "-server-name needs TLS: give -ca FILE");
        return !r->usage;
    }
    if (o->insecure)
        tell(r, WARNING, "-insecure: any server is believed");
    *config = tls_client_config(&t, (int64_t)time(NULL), &e);
    tell_lines(r, *config ? WARNING : START, *config ? tls_config_warnings(*config) : e.text);
    return *config != NULL;
}

/* Gives a client its loop, for links to the server that the options name.  False: told why not. */
static bool client_open(struct client *c, struct mistakes *r, void (*turn)(struct loop *))
{
    const struct options *o = c->o;
    struct dial *d = &c->dial;
    struct address at;
    client_address(o, r, &at);
    if (r->usage || !client_tls(o, r, at.host, &d->tls))
        return false;
    d->addresses = client_resolve(o, r, &at);
    if (!d->addresses)
        return false;
    struct loop *l = c->loop = loop_new();
    l->core.app = c;
    l->core.role = o->command == CMD_HEALTH ? "health" : "agent";
    l->turn = turn;
    d->endpoint = (struct endpoint){ .on = &grpc_client, .client = true, .max_message =
                                     o->command == CMD_AGENT ? (size_t)o->max_message : CLIENT_MAX_MESSAGE };
    d->name = "server";
    d->where = addr_text(o);
    d->give_up_ms = l->core.now_ms + o->wait_ms;
    d->connect_ms = o->timeout_ms && o->timeout_ms < CONNECT_MS ? o->timeout_ms : CONNECT_MS;
    return true;
}

/* Runs a client, if it has been opened, and frees what it has.  Returns the exit status, which is never 0 when a signal
 * has cut it short. */
static int client_run(struct client *c, const struct mistakes *r)
{
    struct loop *l = c->loop;
    int status = l ? loop_run(l) : r->usage ? 2 : 1;
    if (l && l->signal_number && !status)
        status = 128 + l->signal_number;
    if (l)
        loop_free(l);
    tls_config_free(c->dial.tls);
    addresses_free(c->dial.addresses);
    return status;
}

/* ---- cvms agent -replay ---- */
enum { REPLAY_FILE_MAX = 1 << 30, REPLAY_PARTS = 1000, REPLAY_AHEAD = MAX_QUEUED_ITEMS / 2 };

/* One recorded stream, played on a connection of its own. */
struct replay_part {
    struct stream *stream;            /* first: see client_stream_closed */
    struct bytes peer, job_id;
    bool named, forwarder;            /* named: it is known whether it is the latter */
};

struct replay_line {
    int64_t at_ms;
    struct replay_part *part;
    struct bytes raw;
};

struct replay {
    struct client c;
    struct replay_part *parts;
    struct replay_line *lines;
    size_t part_count, line_count, next, up, done;
    int64_t start_ms;
    bool half_closed;
    struct pb_arena arena;            /* one line */
};

static struct bytes keep_bytes(struct options *o, struct bytes b)
{
    return (struct bytes){ b.n ? memcpy(option_alloc(o, b.n), b.p, b.n) : NULL, b.n };
}

/* The part that a line belongs to, made if need be; NULL: too many.  Who sends it may show in a later message only. */
static struct replay_part *replay_part(struct replay *r, struct options *o, const struct Line *line)
{
    bool forwarder = bytes_eq(line->stream, bytes_of(kind_names[KIND_FORWARDER]));
    bool named = !bytes_eq(line->stream, bytes_of(kind_names[KIND_UNKNOWN]));
    struct replay_part *p = r->parts, *end = r->parts + r->part_count;
    while (p < end && !(bytes_eq(p->peer, line->peer) && bytes_eq(p->job_id, line->job_id) &&
                        (!named || !p->named || p->forwarder == forwarder)))
        p++;
    if (p == r->parts + REPLAY_PARTS)
        return NULL;
    if (p == end) {
        *p = (struct replay_part){ .peer = keep_bytes(o, line->peer), .job_id = keep_bytes(o, line->job_id) };
        r->part_count++;
    }
    p->named |= named;
    p->forwarder |= forwarder;
    return p;
}

/* The row of a message's field by its name in a path, else its number; 0: neither. */
static uint32_t path_number(const struct pb_message **m, struct bytes name)
{
    const struct pb_field *f = *m ? (*m)->fields : NULL, *end = f ? f + (*m)->n : NULL;
    while (f < end && !bytes_eq(bytes_of(f->name), name))
        f++;
    int64_t number = f < end ? (int64_t)f->number : parse_decimal(name);
    *m = f < end && f->kind == PB_MESSAGE ? f->sub : NULL;
    return number > 0 && number < 1 << 29 ? (uint32_t)number : 0;
}

/* Writes a field that the tables don't know, inside of the messages of its path: what stands twice is merged. */
static bool replay_unknown(struct buf *b, const struct UnknownField *u, struct err *e)
{
    const struct pb_message *m = &ClientStreamMessage_message;
    uint32_t number[PB_MAX_DEPTH + 1] = { 0 };
    uint8_t fixed[8];
    size_t depth = 0, mark = b->len;
    uint64_t v = 0;
    struct buf raw = { 0 };
    struct bytes digits = u->value;
    int32_t wire = u->wire_type;
    bool is_number = wire == PB_VARINT || wire == PB_FIXED64 || wire == PB_FIXED32;
    for (struct bytes path = u->field; path.n && depth < PB_COUNT(number); depth++)
        number[depth] = path_number(&m, bytes_take(&path, '.'));
    if (!depth || !number[depth - 1] || !(is_number || wire == PB_LEN || wire == PB_SGROUP) ||
        !(is_number ? pb_digits_take(&digits, &v) && !digits.n : base64_decode(u->value, &raw))) {
        buf_free(&raw);
        return err_set(e, "an unknown field can't be read");
    }
    put_le(fixed, sizeof fixed, v);
    if (wire == PB_VARINT)
        pb_before_varint(b, v);
    else
        pb_before_bytes(b, is_number ? (struct bytes){ fixed, wire == PB_FIXED64 ? 8 : 4 }
                                     : (struct bytes){ raw.p, raw.len });
    if (wire == PB_LEN)
        pb_before_varint(b, raw.len);
    pb_before_varint(b, (uint64_t)number[--depth] << 3 | (unsigned)wire);
    while (depth--)
        pb_close(b, number[depth], mark);
    buf_free(&raw);
    return true;
}

/* One line of the file.  What the server sent is passed over.  False: e tells why. */
static bool replay_line(struct replay *r, struct options *o, struct bytes text, struct err *e)
{
    struct Line line = { 0 };
    pb_arena_reset(&r->arena);
    if (!pb_json_parse(&Line_message, &line, text, &r->arena, e->text, sizeof e->text))
        return false;
    if (!line.message)
        return true;
    if (!line.time || !pb_timestamp_valid(line.time))
        return err_set(e, "its time is not in the years 1 to 9999");
    struct replay_part *part = replay_part(r, o, &line);
    if (!part)
        return err_set(e, "more than %d streams", REPLAY_PARTS);
    const struct UnknownField *unknown = line.unknown.items;
    struct buf wire = { 0 };
    bool ok = true;
    for (size_t i = line.unknown.n; ok && i-- > 0;)
        ok = replay_unknown(&wire, &unknown[i], e);
    pb_encode_message(&wire, &ClientStreamMessage_message, line.message);
    struct bytes all = pb_written(&wire);
    if (wire.failed)
        ok = err_set(e, "%s", strerror(ENOMEM));
    if (ok)
        r->lines[r->line_count++] = (struct replay_line){
            .at_ms = line.time->seconds * 1000 + line.time->nanos / 1000000, .part = part, .raw = keep_bytes(o, all) };
    buf_free(&wire);
    return ok;
}

/* Reads the lines that a server received.  False: told. */
static bool replay_load(struct replay *r, struct options *o, struct mistakes *report)
{
    struct buf text = { 0 };
    struct err e;
    size_t lines = 1, number = 1;
    bool ok = file_load(o->replay, REPLAY_FILE_MAX, &text, &e);
    if (!ok)
        tell(report, START, "-replay: %s", e.text);
    for (size_t i = 0; i < text.len; i++)
        lines += text.p[i] == '\n';
    r->lines = option_alloc(o, lines < SIZE_MAX / sizeof *r->lines ? lines * sizeof *r->lines : SIZE_MAX);
    r->parts = option_alloc(o, REPLAY_PARTS * sizeof *r->parts);
    r->arena.limit = SIZE_MAX / 2;
    for (struct bytes rest = { text.p, text.len }; ok && rest.n; number++) {
        ok = replay_line(r, o, bytes_take(&rest, '\n'), &e);
        if (!ok && number == lines && r->line_count) {   /* its server did not come to its end */
            tell(report, WARNING, "-replay: %s: the last line is cut, and left out", o->replay);
            ok = true;
        } else if (!ok) {
            tell(report, START, "-replay: %s: record %zu: %s", o->replay, number, e.text);
        }
    }
    buf_free(&text);
    pb_arena_free(&r->arena);
    if (ok && r->line_count == 0)
        tell(report, START, "-replay: %s: no message that a server has received stands in it", o->replay);
    return ok && r->line_count != 0;
}

static void replay_status(struct stream *s, unsigned status, struct bytes text)
{
    struct replay *r = s->conn->core->app;
    if (r->c.loop->stop_why)
        return;
    if (status != GRPC_OK || !s->local_closed) {
        client_fail(&r->c, "%s %.*s", status == GRPC_OK ? "the server ended a stream too early" : grpc_status_names[status],
                    TEXT_OF(text, 300));
    } else if (++r->done == r->part_count) {
        core_note(&r->c.loop->core, NULL, "%zu message%s replayed on %zu stream%s: the server has taken "
                  "everything", r->line_count, PLURAL(r->line_count), r->part_count, PLURAL(r->part_count));
        loop_stop(r->c.loop, "done");
    }
}

static const struct grpc_method replay_method = {
    .path = "/cvms.Service/Process", .status = replay_status, .closed = client_stream_closed,
};

static void replay_up(struct link *k)
{
    struct replay *r = k->loop->core.app;
    struct replay_part *p = k->user;
    char job[201];
    text_printf(job, sizeof job, "%.*s", TEXT_OF(p->job_id, 200));
    p->stream = grpc_call(&k->conn, &replay_method, r->c.dial.where, (const char *[]){
        "job-id", *job ? job : NULL, "connection-type", *job && p->forwarder ? kind_names[KIND_FORWARDER] : NULL, NULL });
    if (!p->stream)
        client_fail(&r->c, "out of memory");
    else
        p->stream->user = p;
    if (++r->up == r->part_count)
        r->start_ms = r->c.loop->core.now_ms;
}

/* Sends what is due; a stream whose queue is full waits until it has drained. */
static void replay_turn(struct loop *l)
{
    struct replay *r = l->core.app;
    if (r->up < r->part_count)
        return;
    l->timer_ms = INT64_MAX;
    for (size_t n = 0; r->next < r->line_count; r->next++, n++) {
        const struct replay_line *line = &r->lines[r->next];
        int64_t due = r->start_ms + (r->c.o->fast ? 0 : line->at_ms - r->lines[0].at_ms);
        struct stream *s = line->part->stream;
        bool full = s && s->queued >= REPLAY_AHEAD;
        if (full && s->deadline_ms == INT64_MAX)
            client_step(s);           /* it is for the server to take some */
        else if (s && !full)
            s->deadline_ms = INT64_MAX;
        if (due > l->core.now_ms || !s || full) {
            l->timer_ms = due > l->core.now_ms ? due : n ? l->core.now_ms : INT64_MAX;
            return;
        }
        grpc_send_blob(s, grpc_blob(line->raw));
        l->core.touched = true;
    }
    for (size_t i = 0; i < r->part_count && !r->half_closed; i++)
        if (r->parts[i].stream) {
            grpc_half_close(r->parts[i].stream);
            client_step(r->parts[i].stream);
        }
    r->half_closed = l->core.touched = true;
}

static int cmd_replay(struct options *o, struct mistakes *report)
{
    struct replay r = { .c = { .o = o, .dial = { .up = replay_up, .down = client_down } } };
    bool open = !report->usage && replay_load(&r, o, report) && client_open(&r.c, report, replay_turn);
    for (size_t i = 0; open && i < r.part_count; i++)
        client_dial(&r.c, &r.parts[i]);
    return client_run(&r.c, report);
}

static int cmd_agent(struct options *o, struct mistakes *r)
{
    struct agent a = { .c = { .o = o, .dial = { .up = agent_up, .down = client_down } }, .run = 1,
                       .state = "ReceivingManifest" };
    size_t row = ROW_FIND(failures, bytes_of(o->fail ? o->fail : ""));
    int64_t port = o->agent_port ? parse_decimal(bytes_of(o->agent_port)) : 0;
    a.fail = row < PB_COUNT(failures) ? &failures[row] : NULL;
    if (o->fast && !o->replay)
        tell(r, USAGE, "-fast goes with -replay FILE");
    if (o->replay && (o->once || o->fail || o->job_id || o->repeat != 1))
        tell(r, USAGE, "-replay plays what was recorded: it goes without -once, -fail, -job-id and -repeat");
    if (o->agent_port && (o->once || o->replay))
        tell(r, USAGE, "-agent-port: with -once and -replay nothing is waited for");
    if (port < 0 || port > 65535)
        tell(r, USAGE, "-agent-port: \"%s\" is not a port; use 0 to 65535 (0: any free one)", o->agent_port);
    if (o->fail && !a.fail)
        tell(r, USAGE, "-fail: \"%s\" is no way to fail; use ReceivingManifest, ReceivingAlgorithm, ReceivingData, Running, "
                       "algorithm-hash, algorithm-signature, dataset-hash, dataset-signature or results", o->fail);
    if (o->replay)
        return cmd_replay(o, r);
    if (client_open(&a.c, r, agent_turn)) {
        a.c.loop->serving = (struct endpoint){ .on = &grpc_server, .methods = service_methods, .method_count = ROLES,
                                               .max_message = (size_t)o->max_message };
        a.c.loop->max_accepted = SERVICE_CONNECTIONS;
        if (o->agent_port)
            agent_bind(&a, (unsigned)port);
        if (!a.c.loop->stop_why)
            client_dial(&a.c, &a.stream[AGENT]);
    }
    int status = client_run(&a.c, r);
    download_free(&a);
    pb_arena_free(&a.arena);
    buf_free(&a.manifest);
    buf_free(&a.id);
    return status;
}

/* ---- cvms health ---- */
struct health {
    struct client c;
    int32_t answer;                   /* a ServingStatus, which counts once the call has ended with OK; -1: none */
};

static void health_answer(struct stream *s, struct bytes wire)
{
    struct health *h = s->conn->core->app;
    struct HealthCheckResponse res = { 0 };
    if (message_decode(s, &HealthCheckResponse_message, &res, wire) &&
        res.status >= 0 && (size_t)res.status < PB_COUNT(ServingStatus_values))
        h->answer = res.status;
}

static void health_status_end(struct stream *s, unsigned status, struct bytes text)
{
    struct health *h = s->conn->core->app;
    struct loop *l = h->c.loop;
    bool good = status == GRPC_OK, known = h->answer >= 0;
    if (l->stop_why || client_again(&h->c, s, status, text))
        return;
    core_note(&l->core, NULL, "%s: %s%s%.*s", h->c.dial.where, !good ? grpc_status_names[status]
              : known ? ServingStatus_values[h->answer] : "no status", good ? "" : ": ", TEXT_OF(text, good ? 0 : 300));
    l->exit_status = !good || h->answer != HEALTH_SERVING;
    loop_stop(l, "done");
}

static const struct grpc_method health_method = {
    .path = "/grpc.health.v1.Health/Check", .message = health_answer, .status = health_status_end,
};

static void health_up(struct link *k)
{
    struct health *h = k->loop->core.app;
    struct HealthCheckRequest req = { .service = bytes_of(h->c.o->service) };
    struct stream *s = grpc_call(&k->conn, &health_method, h->c.dial.where, NULL);
    if (!s) {
        client_fail(&h->c, "out of memory");
        return;
    }
    h->answer = -1;
    client_step(s);
    grpc_send(s, &HealthCheckRequest_message, &req);
    grpc_half_close(s);
}

static void health_down(struct link *k, const char *why)
{
    if (k->loop->stop_why)
        return;
    core_note(&k->loop->core, NULL, "%s: %s", k->dial->where, why);
    k->loop->exit_status = 1;
    loop_stop(k->loop, "done");
}

static void health_turn(struct loop *l)
{
    struct health *h = l->core.app;
    if (h->c.again)
        client_redial(&h->c, NULL);
}

static int cmd_health(struct options *o, struct mistakes *r)
{
    struct health h = { .c = { .o = o, .dial = { .up = health_up, .down = health_down } } };
    if (client_open(&h.c, r, health_turn))
        client_dial(&h.c, NULL);
    return client_run(&h.c, r);
}

/* ==== 21. The server command, and main =========================================================================== */

/* Opens the port that HOST and PORT name.  False: told. */
static bool serve_listen(struct loop *l, struct mistakes *r, char *where, size_t cap)
{
    const char *env_host = getenv("HOST"), *env_port = getenv("PORT"), *host = env_host ? env_host : "localhost";
    const char *why = "it is no host";
    int64_t port = present(env_port) ? parse_decimal(bytes_of(env_port)) : 7001;
    struct address at = { .port = -1 };
    unsigned real = address_parse(host, &at) ? listen_host(l, at.host, (unsigned)port, &why) : 0;
    if (!real && why)
        tell(r, START, "HOST: can't resolve \"%s\": %s", host, why);
    else if (!real)
        tell(r, START, "HOST, PORT: can't listen at %s port %lld: %s%s", *host ? host : "all interfaces",
             (long long)port, strerror(errno),
             errno == EADDRINUSE ? "; another program has it: set PORT to a free one, or to 0 for any"
             : errno == EACCES ? "; set PORT to one above 1023"
             : errno == EADDRNOTAVAIL ? "; set HOST to an address of this machine" : "");
    host_port(where, cap, at.host, real);
    return real != 0;
}

/* HOST and PORT are checked with all the rest; a socket is opened only when nothing is wrong. */
static void check_environment(struct mistakes *r)
{
    const char *host = getenv("HOST"), *port = getenv("PORT");
    struct address at;
    if (host && strstr(host, "://"))
        tell(r, USAGE, "HOST: \"%s\" is a URL; leave out what comes before the host", host);
    else if (host && !address_parse(host, &at))
        tell(r, USAGE, "HOST: \"%s\" is not a host; use a name or an IP address", host);
    else if (host && at.port >= 0)
        tell(r, USAGE, "HOST: \"%s\" has a port, which goes into PORT: set HOST=%s PORT=%d", host, at.host, at.port);
    int64_t n = present(port) ? parse_decimal(bytes_of(port)) : 0;
    if (n < 0 || n > 65535)
        tell(r, USAGE, "PORT: \"%s\" is not a port; use 0 to 65535 (0: any free one)", port);
}

/* The words that are not flags: the older form ALGO PUBKEY BOOL [DATA...], or a mistake.  False: what is meant can't be
 * told, and there is no more to say. */
static bool positional_form(struct options *o, struct mistakes *r, bool any_flag)
{
    const char *word = o->arg_count ? o->args[0] : "";
    unsigned limit = edit_limit(strlen(word));
    size_t near = COMMANDS;
    if (!o->arg_count)
        return true;
    if (any_flag) {
        tell(r, USAGE, "\"%s\" is not a flag (flags end at the first word without a dash); see cvms -help", word);
        return true;
    }
    for (size_t c = 0; c < COMMANDS; c++)
        if (edit_distance(word, command_table[c].name, limit) <= limit)
            near = c;
    if (o->arg_count < 3 || o->args[1][0] == '-') {
        if (near < COMMANDS && command_table[near].command != CMD_SERVE)
            tell(r, USAGE, "\"%s\" is no command: did you mean %s?", word, command_table[near].name);
        else
            tell(r, USAGE, near < COMMANDS
                 ? "\"%s\" is no command: the server needs no word, only its flags; see cvms -help"
                 : "\"%s\" is neither a command (agent, manifest, checksum, health, encrypt, decrypt) nor a flag; see "
                   "cvms -help", word);
        return false;
    }
    tell(r, WARNING, "the positional form is old: use -algo-path %s -public-key-path %s -attested-tls-bool %s%s", word,
         o->args[1], o->args[2], o->arg_count > 3 ? " -data-paths ..." : "");
    o->algo_path = word;
    o->public_key_path = o->args[1];
    o->attested_tls = o->args[2];
    for (size_t i = 3; i < o->arg_count; i++)
        values_add(o, &o->data_paths, o->args[i]);
    return true;
}

static int cmd_manifest(struct options *o, struct mistakes *r)
{
    struct manifest m = { 0 };
    struct err e;
    struct buf out = { 0 };
    check_output(r, "o", o->out_file);
    check_apart(r, o);
    manifest_build(&m, o, r);
    if (!manifest_finish(&m, r))
        return r->usage ? 2 : 1;
    if (o->out_file) {
        struct bytes wire = pb_encode(&out, &ComputationRunReq_message, &m.req);
        if (out.failed || !write_file(o->out_file, wire.p, wire.n, &e))
            tell(r, START, "-o: %s", out.failed ? strerror(ENOMEM) : e.text);
        buf_free(&out);
    } else {
        pb_json(&out, &ComputationRunReq_message, &m.req, 2);
        json_defuse(&out, 0);
        buf_putc(&out, '\n');
        if (!buf_write(&out, STDOUT_FILENO))
            tell(r, START, "stdout: %s", strerror(errno));
    }
    manifest_free(&m);
    return r->start;
}

/* The server's TLS as flags and variables ask for it, made anew; *config stays as it is for plaintext. */
static bool server_tls(const struct options *o, struct tls_config **config, struct err *e)
{
    struct tls_options t = {
        .cert = TLS_SOURCE("-server-cert", o->server_cert, "SERVER_CERT"),
        .key = TLS_SOURCE("-server-key", o->server_key, "SERVER_KEY"),
        .client_ca = TLS_SOURCE("-client-ca-certs", o->client_ca_certs, "CLIENT_CA_CERTS"),
        .server_ca = { "SERVER_CA_CERTS", getenv("SERVER_CA_CERTS") },
        .client_san = o->client_san, .allow_no_alpn = o->allow_no_alpn, .http1 = o->fetches,
    };
    if (!present(t.cert.value) && !present(t.key.value)) {
        const char *of_tls = present(o->client_san)        ? "-client-san"
                             : present(o->client_ca_certs) ? "-client-ca-certs"
                             : o->allow_no_alpn            ? "-allow-no-alpn"
                                                           : NULL;
        return !of_tls || err_set(e, "%s needs TLS: give -server-cert and -server-key", of_tls);
    }
    const struct tls_source *files[] = { &t.cert, &t.key, &t.client_ca, &t.server_ca };
    struct stat st;
    for (size_t i = 0; *config && i < PB_COUNT(files); i++)   /* while the loop runs nothing may wait for a FIFO's writer */
        if (present(files[i]->value) && stat(files[i]->value, &st) == 0 && !S_ISREG(st.st_mode))
            return err_set(e, "%s: %s is no plain file, which could be read again", files[i]->name, files[i]->value);
    struct tls_config *made = tls_server_config(&t, (int64_t)time(NULL), e);
    if (!made)
        return false;
    tls_config_free(*config);
    *config = made;
    return true;
}

/* SIGHUP: the certificate files are read again; what is wrong with them changes nothing. */
static void server_reload(struct server *v)
{
    struct core *core = &v->loop->core;
    struct err e;
    v->loop->reload = false;
    if (!v->loop->tls) {
        core_note(core, NULL, "SIGHUP: there is no TLS to load anew");
        return;
    }
    bool loaded = server_tls(v->o, &v->loop->tls, &e);
    const char *text = loaded ? tls_config_warnings(v->loop->tls) : e.text;
    if (loaded)
        core_note(core, NULL, "SIGHUP: certificates loaded anew; open connections keep theirs");
    for (size_t n; *text; text += n + (text[n] != 0)) {
        n = strcspn(text, "\n");
        core_note(core, NULL, "SIGHUP: %.*s%s", (int)n, text, loaded ? " (a warning)" : "; the old certificates stay");
    }
}

/* Sends the manifests that are due; hashed: changed inputs have been.  Returns when the next is due. */
static int64_t sessions_send(struct server *v, bool hashed)
{
    struct core *core = &v->loop->core;
    int64_t next = INT64_MAX;
    bool wait = false;
    for (struct session *s = v->sessions; s; s = s->next) {
        s->waits -= hashed && s->waits;
        wait |= s->waits > 0;
        if (!s->waits && s->send_ms <= core->now_ms) {
            session_send_manifest(s);
            core->touched = true;
        } else if (!s->waits) {
            next = earlier(next, s->send_ms);
        }
    }
    return hashed && wait && !manifest_look(&v->manifest, core) ? sessions_send(v, true) : next;
}

/* Once a turn of the loop: manifests that are due, questions that are due, the verdict. */
static void server_turn(struct loop *l)
{
    struct server *v = l->core.app;
    int64_t now = l->core.now_ms, next = INT64_MAX;
    if (l->reload)
        server_reload(v);
    if (v->input_always)
        control_ready(l, &v->input, WATCH_IN);
    bool hashed = v->manifest.fresh && !manifest_step(&v->manifest, &l->core);
    if (hashed || v->faults.value[FAULT_DELAY] > 0)
        next = sessions_send(v, hashed);
    l->progress[0] = 0;
    if (v->manifest.fresh && l->core.err_look && now - v->manifest.looked_ms >= PROGRESS_MS)
        checksums_text(&v->manifest.hashing, l->progress, sizeof l->progress);
    if (v->manifest.fresh || v->input_always)
        next = now;
    bool poll_due = now >= v->verdict.next_poll_ms;
    next = earlier(next, delivery_tick(&v->delivery, now));
    for (struct session *s = poll_due || v->delivery.asks ? v->sessions : NULL; s; s = s->next)
        if (s->kind == KIND_AGENT && !s->stream->remote_closed &&
            (delivery_asks(s->host) || (poll_due && !s->stream->head)))
            session_ask(s, ASK_STATE);
    v->delivery.asks = false;
    if (poll_due)
        v->verdict.next_poll_ms = now + v->verdict.poll_ms;
    l->timer_ms = earlier(next, verdict_tick(&v->verdict, now));
    if (v->verdict.over) {
        l->exit_status = v->verdict.status;
        loop_stop(l, VERDICT_OVER);
    }
}

/* Writes -report.  False: told. */
static bool verdict_report(const struct server *v, int64_t ms)
{
    struct buf text = { 0 };
    struct err e;
    size_t n = strlen(v->o->report);
    bool json = n > 5 && strcmp(v->o->report + n - 5, ".json") == 0;
    (json ? verdict_json : verdict_junit)(&v->verdict, &text, ms);
    bool ok = !text.failed && write_file(v->o->report, text.p, text.len, &e);
    if (!ok)
        tell_note("-report: %s", text.failed ? strerror(ENOMEM) : e.text);
    buf_free(&text);
    return ok;
}

/* What was good is so no longer: not all could be written. */
static void verdict_broken(struct verdict *v, const char *what)
{
    if (v->status == VERDICT_REACHED)
        buf_printf(&v->why, ", but %s could not be written", what), v->status = VERDICT_BROKEN;
}

/* The end of a smoke test: the report in its file, the summary on stderr.  Returns the exit status, which both name. */
static int verdict_finish(struct server *v, int status)
{
    struct buf text = { 0 };
    int number = v->loop->signal_number;
    if (!v->verdict.over) {
        buf_printf(&v->verdict.why, number ? "signal %d" : "the server ended before", number);
        v->verdict.status = number ? 128 + number : status ? status : VERDICT_BROKEN;
    }
    if (status)
        verdict_broken(&v->verdict, "all output");
    if (v->o->report && !verdict_report(v, v->loop->core.now_ms - v->verdict.start_ms))
        verdict_broken(&v->verdict, "the report");
    verdict_summary(&v->verdict, &text, !(v->loop->core.err_look & LOOK_COLOR) ? "" : v->verdict.status ? COLOR_RED : COLOR_GREEN);
    if (text.failed)
        tell_no_memory();
    else
        fd_write(v->loop->err.watch.fd, text.p, text.len, TOLD_MS);
    buf_free(&text);
    return v->verdict.status;
}

/* A fault that the manifest is too small for would do nothing. */
static void check_faults(const struct manifest *m, const struct faults *f, struct mistakes *r)
{
    const struct { enum fault fault; size_t n; const char *what; } rows[] = {
        { FAULT_FLIP, m->len, "bytes" }, { FAULT_MISSING_CHUNK, m->chunks, "chunks" },
        { FAULT_FREEZE, m->chunks, "chunks" },
    };
    for (size_t i = 0; m->stream && i < PB_COUNT(rows); i++)
        if (f->value[rows[i].fault] >= (int64_t)rows[i].n)
            tell(r, USAGE, "-fault %s=%lld does nothing: the manifest has %zu %s", fault_table[rows[i].fault].name,
                 (long long)f->value[rows[i].fault], rows[i].n, rows[i].what);
}

/* Everything that the flags ask for, checked.  False: it has been told what is wrong. */
static bool server_check(struct server *v, struct options *o, struct mistakes *r)
{
    static const char *const outputs[] = { "text", "json" };
    v->json = check_choice(r, "output", o->output, outputs, PB_COUNT(outputs)) == 1;
    check_environment(r);
    check_output(r, "report", o->report);
    check_output(r, "record", o->record);
    check_output(r, "ready-file", o->ready_file);
    check_apart(r, o);
    faults_parse(r, o, &v->faults);
    verdict_setup(&v->verdict, o, r);
    int64_t room = (int64_t)raise_descriptor_limit();
    if (o->max_connections > room)
        tell(r, USAGE, "-max-connections: %lld is more than the limit of descriptors leaves room for, which is %lld; "
             "raise it (ulimit -Hn) or ask for fewer", (long long)o->max_connections, (long long)room);
    o->max_connections = o->max_connections ? o->max_connections : room;
    v->manifest.faults = o->fault.n ? &v->faults : NULL;
    struct err e;
    v->delivery.verdict = &v->verdict;
    delivery_setup(&v->delivery, o, r);
    if (!server_tls(o, &v->tls, &e))
        tell_lines(r, START, e.text);
    else if (!v->tls && (present(getenv("CLIENT_CA_CERTS")) || present(getenv("SERVER_CA_CERTS"))))
        tell(r, WARNING, "%s does nothing without SERVER_CERT and SERVER_KEY: there is no TLS",
             present(getenv("CLIENT_CA_CERTS")) ? "CLIENT_CA_CERTS" : "SERVER_CA_CERTS");
    if (v->tls)
        tell_lines(r, WARNING, tls_config_warnings(v->tls));
    v->delivery.secure = v->tls;
    v->manifest.key = delivery_public(&v->delivery, o);
    manifest_build(&v->manifest, o, r);
    delivery_check(&v->delivery, &v->manifest, o, r);
    v->verdict.control |= v->delivery.wanted;
    if (!r->usage) {
        output_forget(o->ready_file);
        output_forget(o->report);
    }
    return !r->usage && !r->start;
}

/* Takes the port, makes the manifest, opens what is written to, and lets agents in.  False: told. */
static bool server_open(struct server *v, struct mistakes *r, char *where, size_t cap)
{
    const struct options *o = v->o;
    struct loop *l = v->loop = v->delivery.loop = loop_new();
    struct err e;
    l->tls = v->tls;
    l->serving = (struct endpoint){ .on = &grpc_server, .methods = server_methods,
                                    .method_count = PB_COUNT(server_methods), .offers = delivery_offers(&v->delivery),
                                    .plain = &fetch_method, .max_message = (size_t)o->max_message };
    if (way_image(v->delivery.algorithm) || way_image(v->delivery.data))
        l->serving.tls_first = "skopeo tries that first, and goes on in the clear if it has --src-tls-verify=false; others "
                               "want SERVER_CERT and SERVER_KEY to be set";
    l->max_accepted = (size_t)o->max_connections;
    l->core.app = v;
    l->turn = server_turn;
    l->refuse = v->faults.value[FAULT_REFUSE];
    if (!serve_listen(l, r, where, cap))
        return false;
    delivery_base(&v->delivery, where);
    signals_handle(on_signal_end);    /* hashing may take long, and the loop does not run yet */
    bool whole = manifest_finish(&v->manifest, r);
    signals_handle(on_signal);
    if (whole)
        check_faults(&v->manifest, &v->faults, r);
    if (!whole || r->usage)
        return false;
    char line[302];
    text_printf(line, sizeof line, "%s\n", where);
    int record = o->record ? output_open(o->record) : -1;
    if (record >= 0)
        sink_init(&l->record, record, &l->core.record);
    l->core.recording = record >= 0;
    if (o->record && record < 0)
        tell(r, START, "-record: %s: %s", o->record, strerror(errno));
    else if (!listeners_open(l))
        tell(r, START, "HOST, PORT: can't listen at %s: %s", where, strerror(errno));
    else if (o->ready_file && !write_file(o->ready_file, (uint8_t *)line, strlen(line), &e))
        tell(r, START, "-ready-file: %s", e.text);
    return !r->start;
}

/* The server can't start: who waits at a FIFO for its address must not wait for ever. */
static void ready_release(const struct options *o)
{
    struct stat st;
    int fd = -1;
    bool fifo = o->ready_file && stat(o->ready_file, &st) == 0 && S_ISFIFO(st.st_mode);
    for (int try = 0; fifo && fd < 0 && try < 100; try++) {   /* the reader may come a little later than the mistake */
        fd = open(o->ready_file, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
        if (fd < 0)
            poll(NULL, 0, 10);
    }
    if (fd >= 0)
        close(fd);
}

static int cmd_serve(struct options *o, struct mistakes *r)
{
    char where[300];
    struct server v = { .o = o };
    int status;
    if (server_check(&v, o, r) && server_open(&v, r, where, sizeof where)) {
        struct loop *l = v.loop;
        core_note(&l->core, NULL, "cvms_test_server service gRPC server listening at %s %s", where,
                  l->tls ? "with TLS" : "without TLS");
        loop_clock(l);
        verdict_start(&v.verdict, o, l->core.now_ms);
        if (o->control || isatty(STDIN_FILENO))
            control_start(&v);
        status = loop_run(l);
        if (v.verdict.wanted)
            status = verdict_finish(&v, status);
    } else {
        ready_release(o);
        status = r->usage ? 2 : 1;
    }
    if (v.loop)
        loop_free(v.loop);
    else
        tls_config_free(v.tls);
    delivery_free(&v.delivery);
    manifest_free(&v.manifest);
    verdict_free(&v.verdict);
    return status;
}

static int run(struct options *o, struct mistakes *r)
{
    if (o->command == CMD_CHECKSUM && !o->arg_count && !r->usage)
        tell(r, USAGE, "checksum: name at least one file or folder");
    return o->command == CMD_SERVE      ? cmd_serve(o, r)
           : o->command == CMD_AGENT    ? cmd_agent(o, r)
           : o->command == CMD_HEALTH   ? cmd_health(o, r)
           : o->command == CMD_MANIFEST ? cmd_manifest(o, r)
           : o->command & CRYPT         ? cmd_crypt(o, r)
           : r->usage                   ? 2
                                        : cmd_checksum(r, o->base64, o->args, o->arg_count);
}

int main(int argc, char **argv)
{
    struct options o = { .command = CMD_SERVE, .arena.limit = SIZE_MAX / 2 };
    for (int fd = 0; fd < 3; fd++)    /* no socket may come to stand where stdout was: a folder can't be written */
        if (fcntl(fd, F_GETFD) < 0 && open("/", O_RDONLY) < 0)
            return 1;
    struct mistakes r = { 0 };
    signals_handle(on_signal_end);
    signal(SIGXFSZ, SIG_IGN);         /* a file that may grow no more is an error of its write (EFBIG) */
    o.help = argc > 1 && strcmp(argv[1], "help") == 0;
    int at = o.help ? 2 : 1;
    size_t command = argc > at ? ROW_FIND(command_table, bytes_of(argv[at])) : COMMANDS;
    if (command < COMMANDS)
        o.command = command_table[command].command, at++;
    if (argc < 2) {
        tell(&r, USAGE, "no flags: cvms -h shows which are needed, with examples");
        return 2;
    }
    options_parse(&r, &o, argv + at, (size_t)(argc > at ? argc - at : 0));
    if (o.help || o.help_short || o.version) {
        struct buf out = { 0 };
        if (o.version)
            options_version(&out);
        else if (o.help || o.command != CMD_SERVE)
            options_help(&out, o.command);
        else
            help_short(&out);
        pb_arena_free(&o.arena);
        if (!buf_write(&out, STDOUT_FILENO))
            tell(&r, START, "stdout: %s", strerror(errno));
        return r.start;
    }
    int status = !(o.command & BOTH) || positional_form(&o, &r, o.flagged) ? run(&o, &r) : 2;
    pb_arena_free(&o.arena);
    wipe_inline(argv);
    wipe_inline(environ);
    return status;
}
