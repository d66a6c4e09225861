/* Driver for test_tls.py: check | ccheck | server | client | split | walk.  Echoes application data. */
#include "../harness.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>

static struct tls_options o = { .cert = { "SERVER_CERT", 0 }, .key = { "SERVER_KEY", 0 },
                                .server_ca = { "SERVER_CA_CERTS", 0 }, .client_ca = { "CLIENT_CA_CERTS", 0 } };
static struct tls_options co = { .cert = { "-cert", 0 }, .key = { "-key", 0 }, .server_ca = { "-ca", 0 },
                                 .client_ca = { "-", 0 } };
static size_t chunk = 1 << 16, total = 100;
static int64_t wall;
static volatile sig_atomic_t hup, term;
static void on_hup(int s) { if (s == SIGHUP) hup = 1; else term = 1; }

static const char *subject_of(const struct tls *t)
{
    return tls_peer_subject(t) ? tls_peer_subject(t) : "";
}

struct echo_conn { int fd; struct tls *t; bool eof, open; };

/* What a connection has given back to the pool is no longer its own. */
static void poison(struct tls_pool *pool, int with)
{
    if (CVMS_TLS_POOL && pool->idle)
        memset(pool->idle, with, sizeof *pool->idle);
}

/* moves app data in -> out; true if anything moved */
static bool echo(struct tls *t)
{
    size_t n;
    const uint8_t *in = tls_app_in(t, &n);
    n = in ? tls_put(t, in, n) : 0;
    tls_app_in_ack(t, n);
    return n;
}

/* what the socket has, as far as TLS takes it: how much that was; 0 at its end, -1 if there was nothing */
static ssize_t take(struct tls *t, int fd)
{
    uint8_t b[1 << 16];
    ssize_t r = recv(fd, b, chunk < sizeof b ? chunk : sizeof b, MSG_PEEK);
    size_t n = tls_take(t, b, r > 0 ? (size_t)r : 0);
    return r == 0 ? 0 : n ? recv(fd, b, n, 0) : -1;
}

static bool step(struct echo_conn *c)      /* false: finished */
{
    struct tls *t = c->t;
    bool moved;
    do {
        size_t n;
        moved = false;
        while (echo(t)) moved = true;
        const uint8_t *out;
        while ((out = tls_send_buf(t, &n)) != NULL) {
            ssize_t w = send(c->fd, out, n < chunk ? n : chunk, MSG_NOSIGNAL);
            if (w <= 0) break;
            tls_send_ack(t, (size_t)w);
            moved = true;
        }
        if (out && errno != EAGAIN) return false;
        if (t->state == TLS_FAILED || t->state == TLS_CLOSING) {
            if (!out) return false;
            break;
        }
        ssize_t r = take(t, c->fd);
        if (r == 0) { c->eof = true; return false; }
        if (r > 0) moved = true;
    } while (moved);
    if (!c->open && t->state == TLS_OPEN) {
        c->open = true;
        printf("open %s\n", subject_of(t));
    }
    return true;
}

static int server(void)
{
    struct err e = { "" };
    struct tls_pool pool = { 0 };
    struct echo_conn cs[64];
    struct pollfd ps[65];
    int nc = 0, one = 1;
    struct tls_config *cfg = tls_server_config(&o, wall, &e);
    if (!cfg) return puts(e.text), 1;
    int l = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in sa = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t sl = sizeof sa;
    setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(l, (void *)&sa, sl) || listen(l, 64)) return perror("bind"), 1;
    getsockname(l, (void *)&sa, &sl);
    signal(SIGTERM, on_hup);
    signal(SIGHUP, on_hup);
    printf("ready %d\n", ntohs(sa.sin_port));
    while (!term) {
        fflush(stdout);
        if (hup) {
            hup = 0;
            struct tls_config *n = tls_server_config(&o, wall, &e);
            if (n) { tls_config_free(cfg); cfg = n; puts("reloaded"); } else printf("reload %s\n", e.text);
            fflush(stdout);
        }
        ps[0] = (struct pollfd){ l, nc < 64 ? POLLIN : 0, 0 };
        for (int i = 0; i < nc; i++) {
            size_t n;
            bool out = tls_send_buf(cs[i].t, &n) != NULL;
            ps[i + 1] = (struct pollfd){ cs[i].fd, (short)(POLLIN | (out ? POLLOUT : 0)), 0 };
        }
        if (poll(ps, (nfds_t)nc + 1, -1) < 0) continue;
        for (int i = nc; i-- > 0;)
            if (ps[i + 1].revents && !step(&cs[i])) {
                printf("end %d %s\n", cs[i].t->state, tls_why(cs[i].t));
                shutdown(cs[i].fd, SHUT_WR);
                { char junk[4096]; struct pollfd d = { cs[i].fd, POLLIN, 0 }; /* let the alert arrive */
                  while (!cs[i].eof && poll(&d, 1, 300) > 0 && recv(cs[i].fd, junk, sizeof junk, 0) > 0) ; }
                close(cs[i].fd);
                tls_free(cs[i].t);
                cs[i] = cs[--nc];
            }
        if (ps[0].revents) {
            int fd = accept(l, NULL, NULL);
            fcntl(fd, F_SETFL, O_NONBLOCK);
            cs[nc] = (struct echo_conn){ .fd = fd, .t = tls_new(cfg, &pool, wall) };
            nc++;
        }
        poison(&pool, 0xA5);
    }
    for (int i = 0; i < nc; i++) { printf("held %d\n", cs[i].t->buffers != NULL); close(cs[i].fd); tls_free(cs[i].t); }
    printf("bytes per idle connection %zu\n", sizeof(struct tls));
    close(l);
    tls_config_free(cfg);
    tls_pool_free(&pool);
    return 0;
}

static int client(const char *port)
{
    struct err e = { "" };
    struct tls_pool pool = { 0 };
    struct tls_config *cfg = tls_client_config(&co, wall, &e);
    if (!cfg) return puts(e.text), 1;
    int fd = socket(AF_INET, SOCK_STREAM, 0), rc = 0;
    struct sockaddr_in sa = { .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port)), .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    if (connect(fd, (void *)&sa, sizeof sa)) return perror("connect"), 1;
    fcntl(fd, F_SETFL, O_NONBLOCK);
    struct tls *t = tls_new(cfg, &pool, wall);
    size_t sent = 0, got = 0, n;
    bool bad = false, eof = false;
    while (!eof) {
        const uint8_t *p;
        uint8_t q[1 << 14];
        while ((p = tls_app_in(t, &n)) != NULL) {
            for (size_t i = 0; i < n; i++) bad |= p[i] != (uint8_t)((got + i) * 131 >> 3);
            got += n;
            tls_app_in_ack(t, n);
        }
        if (got == total && t->state == TLS_OPEN) tls_close(t);
        n = sizeof q < total - sent ? sizeof q : total - sent;
        for (size_t i = 0; i < n; i++) q[i] = (uint8_t)((sent + i) * 131 >> 3);
        if (n) sent += tls_put(t, q, n);
        while ((p = tls_send_buf(t, &n)) != NULL) {
            ssize_t w = send(fd, p, n < chunk ? n : chunk, MSG_NOSIGNAL);
            if (w <= 0) break;
            tls_send_ack(t, (size_t)w);
        }
        if (!p && t->state >= TLS_CLOSING) break;
        ssize_t r = take(t, fd);
        eof = r == 0;
        if (r < 0) {
            struct pollfd pf = { fd, (short)(POLLIN | (tls_send_buf(t, &n) ? POLLOUT : 0)), 0 };
            if (poll(&pf, 1, 20000) <= 0) break;
        }
        poison(&pool, 0x5A);
    }
    rc = bad || got != total;
    printf("state %d sent %zu got %zu bad %d peer %s why %s\n", t->state, sent, got, bad, subject_of(t), tls_why(t));
    close(fd);
    tls_free(t);
    tls_config_free(cfg);
    tls_pool_free(&pool);
    return rc;
}

/* copies everything from one end to the other, cutting at `cut` bytes of the whole stream, or every byte if cut == 0 */
static bool carry(struct tls *from, struct tls *to, size_t *at, size_t cut, struct tls_pool *pool)
{
    size_t n;
    const uint8_t *p = tls_send_buf(from, &n);
    if (!p) return false;
    if (cut == 0) n = 1;
    else if (*at < cut && n > cut - *at) n = cut - *at;
    if (!(n = tls_take(to, p, n))) return false;
    tls_send_ack(from, n);
    *at += n;
    tls_take(to, NULL, 0);      /* an empty read, as at EAGAIN */
    poison(pool, 0xC3);
    return true;
}

static const char *pair(struct tls_config *s, struct tls_config *c, size_t cut, size_t *len)
{
    struct tls_pool pool = { 0 };
    struct tls *a = tls_new(s, &pool, wall), *b = tls_new(c, &pool, wall);
    size_t sent = 0, got = 0, n, up = 0, down = 0, want = 40;
    const char *bad = NULL;
    for (int rounds = 0; got < want && rounds < 200000; rounds++) {
        while (carry(b, a, &up, cut, &pool) || carry(a, b, &down, cut, &pool)) ;
        echo(a);
        const uint8_t *p;
        if (sent < want && b->state == TLS_OPEN) { sent += tls_put(b, &(uint8_t){ (uint8_t)sent }, 1); }
        while ((p = tls_app_in(b, &n)) != NULL) { if (*p != (uint8_t)got++) bad = "data"; tls_app_in_ack(b, 1); }
        if (a->state >= TLS_CLOSING || b->state >= TLS_CLOSING) break;
    }
    if (got != want && !bad) { bad = "stuck"; printf("cut %zu: a %d %s, b %d %s\n", cut, a->state, tls_why(a), b->state, tls_why(b)); }
    if (CVMS_TLS_POOL && !bad && (a->buffers || b->buffers)) bad = "idle connection holds buffers";
    tls_close(b);
    while (carry(b, a, &up, cut, &pool) || carry(a, b, &down, cut, &pool)) ;
    if (!bad && (a->state != TLS_CLOSING || b->state != TLS_CLOSING)) bad = "close";
    *len = up > down ? up : down;
    tls_free(a), tls_free(b);
    tls_pool_free(&pool);
    return bad;
}

static int split(void)
{
    struct err e = { "" };
    struct tls_config *s = tls_server_config(&o, wall, &e), *c = s ? tls_client_config(&co, wall, &e) : NULL;
    if (!c) return puts(e.text), 1;
    size_t len = 0, max, runs = 0;
    const char *bad = pair(s, c, 0, &max);
    for (size_t cut = 1; !bad && cut <= max; cut++, runs++) {
        bad = pair(s, c, cut, &len);
        if (bad) printf("cut %zu of %zu: ", cut, max);
    }
    printf("%s %zu cuts\n", bad ? bad : "ok", runs);
    tls_config_free(s), tls_config_free(c);
    return bad != NULL;
}

/* every truncation and every one-byte damage of a certificate, through the walkers */
static int walk(const char *path)
{
    struct buf t = { 0 }, der = { 0 };
    struct err e = { "" };
    char label[PEM_LABEL];
    if (!file_load(path, PEM_FILE_MAX, &t, &e)) return puts(e.text), 1;
    struct bytes in = { t.p, t.len };
    if (pem_next(&in, label, &der) != 1) return 1;
    static struct cert c;
    size_t runs = 0;
    for (size_t i = 0; i < der.len * 5; i++, runs++) {
        size_t n = i < der.len ? i : der.len, at = i % der.len;
        uint8_t *copy = malloc(n ? n : 1);
        static const uint8_t flip[] = { 0, 1, 0x80, 0xff, 0x7f };
        memcpy(copy, der.p, n);
        if (n == der.len) copy[at] ^= flip[i / der.len];
        cert_decode(&c, (struct bytes){ copy, n });
        struct buf s = { 0 };
        dn_text(&s, c.subject);
        for (size_t k = 0; k + 1 < s.len; k++) if (s.p[k] < ' ' || s.p[k] > '~') return puts("unprintable"), 1;
        cert_allows(c.extensions, false);
        cert_has_name(c.extensions, "agent.example");
        buf_free(&s);
        free(copy);
    }
    cert_decode(&c, (struct bytes){ der.p, der.len });
    struct buf s = { 0 };
    dn_text(&s, c.subject);
    printf("%s\n", s.p);
    buf_free(&s), buf_free(&der), buf_free(&t);
    return 0;
}

int main(int argc, char **argv)
{
    wall = time(NULL);
    const char *mode = argc > 1 ? argv[1] : "", *arg = argc > 2 ? argv[2] : "";
    setvbuf(stdout, NULL, _IOLBF, 0);
    struct { const char *name; const char **to; } opts[] = {
        { "-cert", &o.cert.value }, { "-key", &o.key.value }, { "-sca", &o.server_ca.value }, { "-cca", &o.client_ca.value },
        { "-san", &o.client_san }, { "-ca", &co.server_ca.value }, { "-ccert", &co.cert.value }, { "-ckey", &co.key.value },
        { "-name", &co.server_name } };
    for (int i = 3; i < argc; i++) {
        if (!strcmp(argv[i], "-noalpn")) o.allow_no_alpn = true;
        else if (!strcmp(argv[i], "-insecure")) co.insecure = true;
        else if (i + 1 < argc && !strcmp(argv[i], "-chunk")) chunk = (size_t)atol(argv[++i]);
        else if (i + 1 < argc && !strcmp(argv[i], "-total")) total = (size_t)atol(argv[++i]);
        else if (i + 1 < argc && !strcmp(argv[i], "-wall")) wall = atoll(argv[++i]);
        else {
            size_t k = 0;
            while (k < sizeof opts / sizeof opts[0] && strcmp(argv[i], opts[k].name)) k++;
            if (k == sizeof opts / sizeof opts[0] || i + 1 == argc) return fprintf(stderr, "bad %s\n", argv[i]), 2;
            *opts[k].to = argv[++i];
        }
    }
    if (!strcmp(mode, "check") || !strcmp(mode, "ccheck")) {
        struct err e = { "" };
        struct tls_config *c = *mode == 'c' && mode[1] == 'c' ? tls_client_config(&co, wall, &e) : tls_server_config(&o, wall, &e);
        printf("%s%s%s\n", c ? "ok" : e.text, c && *tls_config_warnings(c) ? ", warning: " : "", c ? tls_config_warnings(c) : "");
        tls_config_free(c);
        return !c;
    }
    return !strcmp(mode, "server") ? server() : !strcmp(mode, "client") ? client(arg) : !strcmp(mode, "split") ? split() :
           !strcmp(mode, "walk") ? walk(arg) : 2;
}
