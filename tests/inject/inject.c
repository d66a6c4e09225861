/* The program with calls that fail on demand.  cvms.o's calls of the functions below are renamed to these (by objcopy,
 * see inject.py), so all of the program is as it ships; libc's and BearSSL's own calls are not touched.
 *
 *   INJECT=KIND:ERROR:WHICH  the call to fail.  KIND as in the log; ERROR a number (errno, or EAI_...), or "short" for
 *                            a read or write of one byte; WHICH nN (the N-th call of that kind, from 1), or pHASH (the
 *                            first by that path of callers), with a + behind it: and every call of that kind from then
 *   INJECT_LOG=FILE          gets one line a call: KIND HASH, in order, and "fired" where the failure was
 *   INJECT_TRAP=1            the call does not fail: the program ends there, and the sanitizer shows where
 *
 * A path of callers is the chain of return addresses inside the program, so it is the same in every run.  When main
 * returns, what it has allocated and opened must be freed and closed: else exit status 97 and a line. */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { KINDS = 64, LEAKED = 97 };

int cvms_main(int argc, char **argv);

extern char __executable_start, etext;

static struct {
    int log;
    char kind[24];
    int error;
    bool given, is_short, by_path, on, fired;
    unsigned long which;
    struct {
        char name[24];
        unsigned long calls;
    } kinds[KINDS];
    long blocks;
} state = { .log = -1 };

/* The chain of callers, from the frame of the wrapper on, as far as it stays inside the program. */
__attribute__((no_sanitize("address", "undefined"))) static unsigned long path_hash(void *const *frame)
{
    unsigned long hash = 14695981039346656037u;
    for (int depth = 0; depth < 40; depth++) {
        char *to = frame[1];
        void *const *next = frame[0];
        if (to < &__executable_start || to >= &etext)
            break;
        hash = (hash ^ (unsigned long)(to - &__executable_start)) * 1099511628211u;
        if (next <= frame)
            break;
        frame = next;
    }
    return hash;
}

static unsigned long count(const char *kind)
{
    int i = 0;
    while (state.kinds[i].name[0] && strcmp(state.kinds[i].name, kind) != 0)
        if (++i == KINDS)
            abort();
    strcpy(state.kinds[i].name, kind);
    return ++state.kinds[i].calls;
}

/* Notes a call.  0: it goes ahead; -1: shortened; else the error that it is to fail with. */
static int fault(const char *kind, void *const *frame)
{
    unsigned long hash = path_hash(frame), n = count(kind);
    bool is = state.given && strcmp(kind, state.kind) == 0;
    bool hit = is && (!state.fired || state.on) && (state.fired || (state.by_path ? hash : n) == state.which);
    if (state.log >= 0)
        dprintf(state.log, "%s %016lx%s\n", kind, hash, hit ? " fired" : "");
    if (hit && getenv("INJECT_TRAP"))
        raise(SIGSEGV);
    state.fired |= hit;
    return !hit ? 0 : state.is_short ? -1 : state.error;
}

#define FAULT(kind) fault(kind, __builtin_frame_address(0))
#define FAIL(kind, value) \
    do { \
        int error_ = FAULT(kind); \
        if (error_) { \
            errno = error_; \
            return value; \
        } \
    } while (0)

/* ---- Memory ---- */

void *inject_malloc(size_t n);
void *inject_malloc(size_t n)
{
    FAIL("alloc", NULL);
    state.blocks++;
    return malloc(n);
}

void *inject_calloc(size_t n, size_t size);
void *inject_calloc(size_t n, size_t size)
{
    FAIL("alloc", NULL);
    state.blocks++;
    return calloc(n, size);
}

void *inject_realloc(void *p, size_t n);
void *inject_realloc(void *p, size_t n)
{
    FAIL("alloc", NULL);
    state.blocks += !p;
    return realloc(p, n);
}

char *inject_strdup(const char *s);
char *inject_strdup(const char *s)
{
    FAIL("alloc", NULL);
    state.blocks++;
    return strdup(s);
}

char *inject_realpath(const char *path, char *resolved);
char *inject_realpath(const char *path, char *resolved)
{
    FAIL("alloc", NULL);
    char *real = realpath(path, resolved);
    state.blocks += real && !resolved;
    return real;
}

void inject_free(void *p);
void inject_free(void *p)
{
    state.blocks -= p != NULL;
    free(p);
}

/* ---- Descriptors ---- */

/* "read.socket" and so on; what is open twice has the name of its lowest descriptor. */
static const char *about(char kind[24], const char *call, int fd)
{
    static const char *const standard[] = { "stdin", "stdout", "stderr" };
    struct stat st = { .st_mode = 0 }, first;
    bool known = fstat(fd, &st) == 0;
    int n = 0;
    while (n < 3 && n != fd && !(known && fstat(n, &first) == 0 && first.st_dev == st.st_dev && first.st_ino == st.st_ino))
        n++;
    const char *what = n < 3 ? standard[n] : !known ? "other" : S_ISREG(st.st_mode) ? "file" : S_ISSOCK(st.st_mode) ? "socket"
                     : S_ISFIFO(st.st_mode) ? "pipe" : "other";
    snprintf(kind, 24, "%s.%s", call, what);
    return kind;
}

ssize_t inject_read(int fd, void *p, size_t n);
ssize_t inject_read(int fd, void *p, size_t n)
{
    char kind[24];
    int error = FAULT(about(kind, "read", fd));
    if (error > 0) {
        errno = error;
        return -1;
    }
    return read(fd, p, error ? n > 0 : n);
}

ssize_t inject_write(int fd, const void *p, size_t n);
ssize_t inject_write(int fd, const void *p, size_t n)
{
    char kind[24];
    /* One byte: a signal's number into the program's own pipe, which takes it. */
    int error = n == 1 ? 0 : FAULT(about(kind, "write", fd));
    if (error > 0) {
        errno = error;
        return -1;
    }
    return write(fd, p, error ? n > 0 : n);
}

ssize_t inject_send(int fd, const void *p, size_t n, int flags);
ssize_t inject_send(int fd, const void *p, size_t n, int flags)
{
    int error = FAULT("send");
    if (error == ECONNRESET || error == EPIPE)      /* then it is so for all to see: the peer gets an RST too */
        connect(fd, &(struct sockaddr){ .sa_family = AF_UNSPEC }, sizeof(struct sockaddr));
    if (error > 0) {
        errno = error;
        return -1;
    }
    return send(fd, p, error ? n > 0 : n, flags);
}

int inject_open(const char *path, int flags, ...);
int inject_open(const char *path, int flags, ...)
{
    va_list ap;
    va_start(ap, flags);
    mode_t mode = flags & O_CREAT ? va_arg(ap, mode_t) : 0;
    va_end(ap);
    FAIL("open", -1);
    return open(path, flags, mode);
}

int inject_close(int fd);
int inject_close(int fd)
{
    int error = FAULT("close");
    int result = close(fd);
    if (error)
        errno = error;
    return error ? -1 : result;
}

int inject_fcntl(int fd, int command, ...);
int inject_fcntl(int fd, int command, ...)
{
    va_list ap;
    va_start(ap, command);
    int value = command == F_SETFL || command == F_SETFD ? va_arg(ap, int) : 0;
    va_end(ap);
    if (command != F_GETFD)           /* which asks only whether there is such a descriptor */
        FAIL("fcntl", -1);
    return fcntl(fd, command, value);
}

int inject_pipe(int fds[2]);
int inject_pipe(int fds[2])
{
    FAIL("pipe", -1);
    return pipe(fds);
}

int inject_fstat(int fd, struct stat *st);
int inject_fstat(int fd, struct stat *st)
{
    FAIL("stat", -1);
    return fstat(fd, st);
}

int inject_stat(const char *path, struct stat *st);
int inject_stat(const char *path, struct stat *st)
{
    FAIL("stat", -1);
    return stat(path, st);
}

int inject_fstatat(int fd, const char *path, struct stat *st, int flags);
int inject_fstatat(int fd, const char *path, struct stat *st, int flags)
{
    FAIL("stat", -1);
    return fstatat(fd, path, st, flags);
}

int inject_access(const char *path, int mode);
int inject_access(const char *path, int mode)
{
    FAIL("access", -1);
    return access(path, mode);
}

DIR *inject_fdopendir(int fd);
DIR *inject_fdopendir(int fd)
{
    FAIL("opendir", NULL);
    return fdopendir(fd);
}

struct dirent *inject_readdir(DIR *d);
struct dirent *inject_readdir(DIR *d)
{
    FAIL("readdir", NULL);
    return readdir(d);
}

/* ---- Sockets and waiting ---- */

int inject_accept4(int fd, struct sockaddr *a, socklen_t *n, int flags);
int inject_accept4(int fd, struct sockaddr *a, socklen_t *n, int flags)
{
    FAIL("accept", -1);
    return accept4(fd, a, n, flags);
}

int inject_socket(int family, int type, int protocol);
int inject_socket(int family, int type, int protocol)
{
    FAIL("socket", -1);
    return socket(family, type, protocol);
}

int inject_bind(int fd, const struct sockaddr *a, socklen_t n);
int inject_bind(int fd, const struct sockaddr *a, socklen_t n)
{
    FAIL("bind", -1);
    return bind(fd, a, n);
}

int inject_listen(int fd, int backlog);
int inject_listen(int fd, int backlog)
{
    FAIL("listen", -1);
    return listen(fd, backlog);
}

int inject_connect(int fd, const struct sockaddr *a, socklen_t n);
int inject_connect(int fd, const struct sockaddr *a, socklen_t n)
{
    FAIL("connect", -1);
    return connect(fd, a, n);
}

int inject_shutdown(int fd, int how);
int inject_shutdown(int fd, int how)
{
    FAIL("shutdown", -1);
    return shutdown(fd, how);
}

int inject_getsockname(int fd, struct sockaddr *a, socklen_t *n);
int inject_getsockname(int fd, struct sockaddr *a, socklen_t *n)
{
    FAIL("getsockname", -1);
    return getsockname(fd, a, n);
}

int inject_getsockopt(int fd, int level, int name, void *value, socklen_t *n);
int inject_getsockopt(int fd, int level, int name, void *value, socklen_t *n)
{
    FAIL("getsockopt", -1);
    return getsockopt(fd, level, name, value, n);
}

int inject_setsockopt(int fd, int level, int name, const void *value, socklen_t n);
int inject_setsockopt(int fd, int level, int name, const void *value, socklen_t n)
{
    FAIL("setsockopt", -1);
    return setsockopt(fd, level, name, value, n);
}

int inject_getaddrinfo(const char *host, const char *port, const struct addrinfo *hints, struct addrinfo **list);
int inject_getaddrinfo(const char *host, const char *port, const struct addrinfo *hints, struct addrinfo **list)
{
    int error = FAULT("getaddrinfo");
    if (error == -EAI_SYSTEM)
        errno = EMFILE;
    return error ? -error : getaddrinfo(host, port, hints, list);
}

int inject_epoll_create1(int flags);
int inject_epoll_create1(int flags)
{
    FAIL("epoll_create", -1);
    return epoll_create1(flags);
}

int inject_epoll_ctl(int epoll, int op, int fd, struct epoll_event *e);
int inject_epoll_ctl(int epoll, int op, int fd, struct epoll_event *e)
{
    char kind[24];
    FAIL(about(kind, op == EPOLL_CTL_ADD ? "epoll_add" : op == EPOLL_CTL_MOD ? "epoll_mod" : "epoll_del", fd), -1);
    return epoll_ctl(epoll, op, fd, e);
}

int inject_epoll_wait(int epoll, struct epoll_event *e, int n, int ms);
int inject_epoll_wait(int epoll, struct epoll_event *e, int n, int ms)
{
    FAIL("epoll_wait", -1);
    return epoll_wait(epoll, e, n, ms);
}

int inject_poll(struct pollfd *p, nfds_t n, int ms);
int inject_poll(struct pollfd *p, nfds_t n, int ms)
{
    FAIL("poll", -1);
    return poll(p, n, ms);
}

/* ---- The rest ---- */

int inject_getrlimit(__rlimit_resource_t what, struct rlimit *r);
int inject_getrlimit(__rlimit_resource_t what, struct rlimit *r)
{
    FAIL("getrlimit", -1);
    return getrlimit(what, r);
}

int inject_setrlimit(__rlimit_resource_t what, const struct rlimit *r);
int inject_setrlimit(__rlimit_resource_t what, const struct rlimit *r)
{
    FAIL("setrlimit", -1);
    return setrlimit(what, r);
}

int inject_getentropy(void *p, size_t n);
int inject_getentropy(void *p, size_t n)
{
    FAIL("getentropy", -1);
    return getentropy(p, n);
}

static int descriptors(void)
{
    int n = 0;
    DIR *d = opendir("/proc/self/fd");
    while (d && readdir(d))
        n++;
    if (d)
        closedir(d);
    return n;
}

static void read_environment(void)
{
    char error[16], which[24];
    const char *spec = getenv("INJECT"), *log = getenv("INJECT_LOG");
    if (log)
        state.log = open(log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_APPEND, 0600);
    if (!spec || !*spec)
        return;
    if (sscanf(spec, "%23[^:]:%15[^:]:%23s", state.kind, error, which) != 3)
        abort();
    state.given = true;
    state.is_short = strcmp(error, "short") == 0;
    state.error = atoi(error);
    state.by_path = which[0] == 'p';
    char *end;
    state.which = strtoul(which + 1, &end, state.by_path ? 16 : 10);
    state.on = *end == '+';
}

int main(int argc, char **argv)
{
    read_environment();
    int before = descriptors();
    int status = cvms_main(argc, argv);
    int left = descriptors() - before;
    if (state.blocks == 0 && left == 0)
        return status;
    dprintf(STDERR_FILENO, "INJECT: %ld blocks and %d descriptors are left\n", state.blocks, left);
    return LEAKED;
}
