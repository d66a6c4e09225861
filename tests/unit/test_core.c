/* Exchanges: what a peer sends and what must come back, one text file for each rule, in exchanges/.
 *
 *   # text                         a comment; the first says which rule the file is about
 *   OPEN                           preface and SETTINGS both ways
 *   C HEADERS stream=1 END_STREAM | :method=GET +name=value #62 ~0 !ff x=*500 @/path
 *                                  a frame of the client's; + enters the table, #N is an index, ~N a table size, ! raw
 *                                  bytes, *N so many letters, @/path a whole gRPC request.  Options: pad=, dep=, len=
 *                                  (a length that lies), flags=; NO_END_HEADERS, PADDED and PRIORITY (flag alone)
 *   C DATA stream=1 | [ 1:{ 1:"text" } ]     payload: hex, "text", zero*N, [ message ], z[ compressed message ], fields
 *   C*100 PING                     so many times; stream=1+2 counts up
 *   C RAW | "GET / HTTP/1.1\r\n"   bytes without a frame
 *   S RAW HTTP/1.1 404             an answer of HTTP/1, as a line of its own; its line ends are blanks
 *   S RST_STREAM stream=1 CANCEL   what the server must answer, in order.  Words may be left out, but not END_STREAM,
 *                                  ACK, size-update= and grpc-status=.  Nothing else may come.
 *   OUT "line", LOG "part"         the next line on stdout; text that the log must hold by now
 *   T +1000, EOF, SHUTDOWN         the clock, the end of input, our own end
 *   HELD, RELEASE                  stdout is behind, has caught up
 *   MANIFEST | payload, MAX-MESSAGE n, JSON, COLOR     before OPEN
 *   OPEN-STREAMS n, ENDED, GOES-ON the state that must be: so many streams, connection finished or not
 *   CLIENT, CALL, SEND | payload, HALF-CLOSE, GOT | payload, STATUS n "part", NO-STATUS    the client's side; then C
 *                                  lines are wanted and S lines are sent
 *
 * Each exchange is run with every run of input whole, byte by byte, and in two pieces cut at each place; every piece
 * ends where its memory does.
 */
#include "core_test.h"

enum op_kind {
    OP_IN, OP_WANT, OP_TICK, OP_EOF, OP_SHUTDOWN, OP_HELD, OP_RELEASE, OP_MANIFEST, OP_MAX_MESSAGE, OP_JSON, OP_COLOR,
    OP_LOG, OP_OUT, OP_STREAMS, OP_ENDED, OP_GOES_ON, OP_CLIENT, OP_CALL, OP_SEND, OP_HALF_CLOSE, OP_GOT, OP_STATUS,
    OP_NO_STATUS
};

struct op {
    enum op_kind kind;
    int line;
    long n;
    struct buf text;                  /* input; a wanted line; bytes */
};

enum { MAX_OPS = 200, ALL_CUTS = 1500, SOME_CUTS = 150 };

struct script {
    const char *file;
    int line;
    bool client;
    struct op op[MAX_OPS];
    size_t n, bytes;
};

/* ---- Reading a file ---- */
static struct op *script_op(struct script *t, enum op_kind kind)
{
    if (t->n == MAX_OPS)
        stop(t->file, t->line, "too many lines", "");
    t->op[t->n] = (struct op){ .kind = kind, .line = t->line };
    return &t->op[t->n++];
}

/* The next word of a line, up to a blank outside quotes. */
static bool word_next(const char **s, char word[512])
{
    size_t n = 0;
    skip_blanks(s);
    for (bool quoted = false; **s && (quoted || (**s != ' ' && **s != '\t')) && n < 511; ++*s) {
        if (**s == '"' && (n == 0 || word[n - 1] != '\\'))
            quoted = !quoted;
        word[n++] = **s;
    }
    word[n] = 0;
    return n > 0;
}

static int name_index(const char *name, const char *const *names, int n)
{
    for (int i = 0; i < n; i++)
        if (names[i] && strcmp(names[i], name) == 0)
            return i;
    return -1;
}

static void put_literal(struct buf *b, unsigned pattern, unsigned prefix, struct bytes name, struct bytes value)
{
    hpack_put_int(b, pattern, prefix, 0);
    hpack_put_string(b, name);
    hpack_put_string(b, value);
}

static void put_request(struct buf *b, const char *path)
{
    static const char *const fields[] = {
        ":method", "POST", ":scheme", "http", ":authority", "localhost", ":path", NULL, "content-type",
        "application/grpc", "te", "trailers",
    };
    for (size_t i = 0; i < PB_COUNT(fields); i += 2)
        put_literal(b, 0, 4, bytes_of(fields[i]), bytes_of(fields[i + 1] ? fields[i + 1] : path));
}

/* One word of a field block. */
static void put_field_word(struct buf *b, const char *word)
{
    bool enter = *word == '+';
    const char *raw = word + 1, *name = word + enter, *is = strchr(*name ? name + 1 : name, '=');
    struct buf value = { 0 };
    if (*word == '@') {
        put_request(b, word + 1);
    } else if (*word == '#') {
        hpack_put_int(b, 0x80, 7, strtoul(word + 1, NULL, 10));
    } else if (*word == '~') {
        hpack_put_int(b, 0x20, 5, strtoul(word + 1, NULL, 10));
    } else if (*word == '!') {
        put_payload(b, &raw, 0);
    } else if (is) {
        const char *at = is + 1;
        if (*at == '"')
            put_quoted(&value, &at);
        else if (*at == '*' && at[1])
            for (unsigned long n = strtoul(at + 1, NULL, 10); n; n--)
                buf_putc(&value, 'a');
        else
            buf_puts(&value, at);
        put_literal(b, enter ? 0x40 : 0, enter ? 6 : 4, (struct bytes){ (const uint8_t *)name, (size_t)(is - name) },
                    whole(&value));
        buf_free(&value);
    } else {
        stop(__FILE__, __LINE__, "no field", word);
    }
}

/* What stands before the bar: how the frame differs from a plain one. */
struct frame_words {
    unsigned long stream, step, flags, pad, dep, add, len, last;
    bool padded, priority, len_lies, no_end_headers;
    struct buf payload;
};

static void frame_word(struct frame_words *w, const char *word)
{
    static const char *const named[] = { "stream", "flags", "pad", "dep", "add", "len", "last", "type" };
    unsigned long *const to[] = { &w->stream, &w->flags, &w->pad, &w->dep, &w->add, &w->len, &w->last, NULL };
    static const char *const flags[] = { "END_STREAM", "ACK", "END_HEADERS", "PADDED", "PRIORITY" };
    static const unsigned bits[] = { END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY };
    const char *is = strchr(word, '=');
    char name[40];
    int i = name_index(word, flags, 5);
    snprintf(name, sizeof name, "%.*s", is ? (int)(is - word) : 39, word);
    if (i >= 0) {
        w->flags |= bits[i];
    } else if (strcmp(word, "NO_END_HEADERS") == 0) {
        w->no_end_headers = true;
    } else if (!is && (i = name_index(word, h2_error_names, H2_ERRORS)) >= 0) {
        uint8_t code[4];
        put_be32(code, (uint32_t)i);
        buf_put(&w->payload, code, 4);
    } else if (is && (i = name_index(name, named, 8)) >= 0) {
        if (to[i])
            *to[i] = strtoul(is + 1, NULL, 0);
        if (i == 0 && strchr(is, '+'))
            w->step = strtoul(strchr(is, '+') + 1, NULL, 0);
        w->padded |= i == 2;
        w->priority |= i == 3;
        w->len_lies |= i == 5;
    } else if (is) {
        i = name_index(name, setting_names, SETTINGS_COUNT);
        frame_put_setting(&w->payload, i < 0 ? (enum setting)strtoul(name, NULL, 0) : (enum setting)i,
                          (uint32_t)strtoul(is + 1, NULL, 0));
    } else {
        stop(__FILE__, __LINE__, "no such word", word);
    }
}

static void put_frame(struct buf *b, unsigned type, struct frame_words *w, unsigned long stream)
{
    uint8_t number[4];
    struct buf p = { 0 };
    bool block = type == FRAME_HEADERS || type == FRAME_CONTINUATION;
    unsigned long flags = w->flags | (block && !w->no_end_headers ? (unsigned)END_HEADERS : 0u);
    if (w->padded) {
        flags |= PADDED;
        buf_putc(&p, (int)w->pad);
    }
    if (w->priority) {
        flags |= type == FRAME_HEADERS ? (unsigned)PRIORITY : 0u;
        put_be32(number, (uint32_t)w->dep);
        buf_put(&p, number, 4);
        buf_putc(&p, 15);
    }
    if (type == FRAME_WINDOW_UPDATE || type == FRAME_GOAWAY) {
        put_be32(number, (uint32_t)(type == FRAME_GOAWAY ? w->last : w->add));
        buf_put(&p, number, 4);
    }
    buf_put(&p, w->payload.p, w->payload.len);
    for (unsigned long i = 0; i < w->pad; i++)
        buf_putc(&p, 0);
    frame_put(b, (uint32_t)(w->len_lies ? w->len : p.len), FRAME_DATA, (unsigned)flags, (uint32_t)stream);
    b->p[b->len - 6] = (uint8_t)type;
    buf_put(b, p.p, p.len);
    buf_free(&p);
}

/* A line of the peer's: "C*2 DATA stream=1 | ..." behind its first letter. */
static void put_frames(struct script *t, struct buf *b, const char *s)
{
    char word[512];
    struct frame_words w = { 0 };
    unsigned long times = *s == '*' ? strtoul(s + 1, (char **)&s, 10) : 1;
    word_next(&s, word);
    int type = -1;
    for (int i = 0; i < FRAME_TYPES; i++)
        if (strcmp(frame_rules[i].name, word) == 0)
            type = i;
    bool raw = strcmp(word, "RAW") == 0, block = type == FRAME_HEADERS || type == FRAME_CONTINUATION;
    if (strcmp(word, "PREFACE") == 0) {
        buf_put(b, preface, PREFACE_LEN);
        return;
    }
    if (strcmp(word, "FRAME") == 0) {
        skip_blanks(&s);
        type = (int)strtoul(s + 5, NULL, 0);
    } else if (type < 0 && !raw) {
        stop(t->file, t->line, "no such frame", word);
    }
    bool bar = false;
    while (!bar && word_next(&s, word)) {
        bar = strcmp(word, "|") == 0;
        if (!bar)
            frame_word(&w, word);
    }
    while (bar && block && word_next(&s, word))
        put_field_word(&w.payload, word);
    if (bar && !block)
        put_payload(&w.payload, &s, 0);
    if (type == FRAME_PING && !bar)
        buf_puts(&w.payload, "pingpong");
    for (unsigned long i = 0; i < times; i++) {
        if (raw)
            buf_put(b, w.payload.p, w.payload.len);
        else
            put_frame(b, (unsigned)type, &w, w.stream + i * w.step);
    }
    buf_free(&w.payload);
}

static void script_input(struct script *t, const char *s)
{
    struct op *op = t->n && t->op[t->n - 1].kind == OP_IN ? &t->op[t->n - 1] : script_op(t, OP_IN);
    size_t before = op->text.len;
    put_frames(t, &op->text, s);
    t->bytes += op->text.len - before;
}

/* A wanted line in the form that peer_frame gives, its payload as length and hex. */
static void script_wanted(struct script *t, char who, const char *s)
{
    struct buf p = { 0 };
    char word[512];
    bool block = strstr(s, " HEADERS") != NULL, bar = false;
    unsigned long times = *s == '*' ? strtoul(s + 1, (char **)&s, 10) : 1;
    struct op *op = script_op(t, OP_WANT);
    op->n = (long)times;
    buf_putc(&op->text, who);
    while (!bar && word_next(&s, word)) {
        bar = strcmp(word, "|") == 0;
        if (!bar)
            buf_printf(&op->text, " %s", word);
    }
    if (bar && block)
        buf_printf(&op->text, " %s", s);
    if (bar && !block) {
        put_payload(&p, &s, 0);
        buf_printf(&op->text, " len=%zu hex=", p.len);
        put_hex_text(&op->text, whole(&p));
        buf_free(&p);
    }
}

static void script_open(struct script *t)
{
    if (t->client) {
        script_wanted(t, 'C', " PREFACE");
        script_wanted(t, 'C', " SETTINGS ENABLE_PUSH=0");
        script_input(t, " SETTINGS");
        script_wanted(t, 'C', " SETTINGS ACK");
        return;
    }
    script_input(t, " PREFACE");
    script_input(t, " SETTINGS");
    script_wanted(t, 'S', " SETTINGS MAX_CONCURRENT_STREAMS=100 MAX_HEADER_LIST_SIZE=16384");
    script_wanted(t, 'S', " SETTINGS ACK");
}

static const struct {
    const char *word;
    enum op_kind kind;
    char argument;                    /* 'n' number, 's' text, 'p' payload, 'b' number and text */
} directives[] = {
    { "T", OP_TICK, 'n' }, { "EOF", OP_EOF, 0 }, { "SHUTDOWN", OP_SHUTDOWN, 0 }, { "HELD", OP_HELD, 0 },
    { "RELEASE", OP_RELEASE, 0 }, { "MANIFEST", OP_MANIFEST, 'p' }, { "MAX-MESSAGE", OP_MAX_MESSAGE, 'n' },
    { "JSON", OP_JSON, 0 }, { "COLOR", OP_COLOR, 0 }, { "LOG", OP_LOG, 's' }, { "OUT", OP_OUT, 's' },
    { "OPEN-STREAMS", OP_STREAMS, 'n' }, { "ENDED", OP_ENDED, 0 }, { "GOES-ON", OP_GOES_ON, 0 },
    { "CLIENT", OP_CLIENT, 0 }, { "CALL", OP_CALL, 0 }, { "SEND", OP_SEND, 'p' }, { "HALF-CLOSE", OP_HALF_CLOSE, 0 },
    { "GOT", OP_GOT, 'p' }, { "STATUS", OP_STATUS, 'b' }, { "NO-STATUS", OP_NO_STATUS, 0 },
};

static void script_directive(struct script *t, const char *s)
{
    char word[512];
    word_next(&s, word);
    size_t i = 0;
    while (i < PB_COUNT(directives) && strcmp(directives[i].word, word) != 0)
        i++;
    if (i == PB_COUNT(directives))
        stop(t->file, t->line, "no such directive", word);
    struct op *op = script_op(t, directives[i].kind);
    char argument = directives[i].argument;
    skip_blanks(&s);
    if (argument == 'n' || argument == 'b')
        op->n = strtol(s, (char **)&s, 10);
    skip_blanks(&s);
    if ((argument == 's' || argument == 'b') && *s == '"')
        put_quoted(&op->text, &s);
    if (argument == 'p' && *s == '|') {
        s++;
        put_payload(&op->text, &s, 0);
    }
    t->client |= op->kind == OP_CLIENT;
}

static void script_read(struct script *t, const char *path)
{
    static char line[65536];
    FILE *f = fopen(path, "r");
    if (!f)
        stop(path, 0, "can't be read", "");
    *t = (struct script){ .file = path };
    while (fgets(line, sizeof line, f)) {
        t->line++;
        line[strcspn(line, "\n")] = 0;
        if (*line == '#' || *line == 0)
            continue;
        char sender = t->client ? 'S' : 'C', other = t->client ? 'C' : 'S';
        if (strcmp(line, "OPEN") == 0)
            script_open(t);
        else if (*line == sender && (line[1] == ' ' || line[1] == '*'))
            script_input(t, line + 1);
        else if (*line == other && (line[1] == ' ' || line[1] == '*'))
            script_wanted(t, other, line + 1);
        else
            script_directive(t, line);
    }
    fclose(f);
}

static void script_free(struct script *t)
{
    for (size_t i = 0; i < t->n; i++)
        buf_free(&t->op[i].text);
}

/* ---- Running it ---- */
struct run {
    const struct script *script;
    struct conn conn;
    struct peer peer;
    struct buf out, lines;            /* our bytes, not yet a whole frame; frames not yet wanted */
    struct buf got;                   /* messages that came at a client */
    size_t got_at, out_at, line_at;
    size_t cut, at;                   /* input is cut in two here; 0: not; SIZE_MAX: after every octet */
    long status;
    char status_text[200];
    struct stream *call;
    bool ok, preface_seen;
};

PRINTF_LIKE(3, 4) static void run_fault(struct run *r, int line, const char *fmt, ...)
{
    va_list ap;
    if (!r->ok)
        return;
    r->ok = false;
    printf("%s:%d: ", r->script->file, line);
    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
    if (r->cut == SIZE_MAX)
        printf(" (byte by byte)\n");
    else if (r->cut)
        printf(" (cut at octet %zu)\n", r->cut);
    else
        printf("\n");
}

/* One piece of input, in memory that ends where it does. */
static void run_piece(struct run *r, const uint8_t *p, size_t n)
{
    uint8_t *copy = (malloc)(n);
    memcpy(copy, p, n);
    if (conn_wants_input(&r->conn))
        conn_recv(&r->conn, copy, n);
    (free)(copy);
}

static void run_input(struct run *r, struct bytes in)
{
    while (in.n) {
        size_t n = in.n;
        if (r->cut == SIZE_MAX)
            n = 1;
        else if (r->cut > r->at && r->cut < r->at + n)
            n = r->cut - r->at;
        run_piece(r, in.p, n);
        r->at += n;
        in.p += n;
        in.n -= n;
    }
}

/* Moves what waits into lines of text. */
static void run_collect(struct run *r)
{
    const uint8_t *p;
    for (size_t n; (n = conn_peek(&r->conn, &p)) != 0; conn_sent(&r->conn, n))
        buf_put(&r->out, p, n);
    size_t at = 0;
    if (r->script->client && !r->preface_seen && r->out.len >= PREFACE_LEN) {
        buf_puts(&r->lines, memcmp(r->out.p, preface, PREFACE_LEN) == 0 ? "C PREFACE\n" : "C no preface\n");
        r->preface_seen = true;
        at = PREFACE_LEN;
    }
    if (bytes_start(bytes_from(whole(&r->out), at), "HTTP/1.1 ")) {
        for (; at < r->out.len; at++) {
            if (bytes_start(bytes_from(whole(&r->out), at), "HTTP/1.1 "))
                buf_puts(&r->lines, at ? "\nS RAW " : "S RAW ");
            buf_putc(&r->lines, r->out.p[at] > ' ' ? r->out.p[at] : ' ');
        }
        buf_putc(&r->lines, '\n');
    }
    for (size_t n; r->out.p && (n = peer_frame(&r->peer, (struct bytes){ r->out.p + at, r->out.len - at }, &r->lines)) != 0;)
        at += n;
    if (at < r->out.len && !r->peer.fault)
        r->peer.fault = "bytes that are no frame";
    r->out.len = 0;
}

/* Takes a line of b. */
static bool line_next(const struct buf *b, size_t *at, char *to, size_t room)
{
    if (*at >= b->len)
        return false;
    const uint8_t *end = memchr(b->p + *at, '\n', b->len - *at);
    size_t n = end ? (size_t)(end - b->p) - *at : b->len - *at;
    snprintf(to, room, "%.*s", (int)n, (const char *)b->p + *at);
    *at += n + 1;
    return true;
}

static bool word_is_vital(const char *word)
{
    return strcmp(word, "END_STREAM") == 0 || strcmp(word, "ACK") == 0 || strncmp(word, "grpc-status=", 12) == 0 ||
           strncmp(word, "size-update=", 12) == 0 || strncmp(word, "flags=", 6) == 0;
}

/* Whether the wanted words stand in the line in this order, and no vital one has been left out. */
static bool line_matches(const char *got, const char *wanted)
{
    char a[512], b[512];
    bool more = word_next(&wanted, b);
    while (word_next(&got, a)) {
        if (more && strcmp(a, b) == 0)
            more = word_next(&wanted, b);
        else if (word_is_vital(a))
            return false;
    }
    return !more;
}

static void run_want(struct run *r, const struct op *op)
{
    static char got[70000];
    char wanted[6000];
    snprintf(wanted, sizeof wanted, "%.*s", (int)op->text.len, (const char *)op->text.p);
    run_collect(r);
    for (long i = 0; i < op->n && r->ok; i++) {
        if (!line_next(&r->lines, &r->line_at, got, sizeof got))
            run_fault(r, op->line, "got nothing, wanted [%s]", wanted);
        else if (!line_matches(got, wanted))
            run_fault(r, op->line, "got [%.400s], wanted [%s]", got, wanted);
    }
}

/* Nothing may have come that no line wanted. */
static void run_quiet(struct run *r, int line)
{
    static char got[70000];
    run_collect(r);
    if (line_next(&r->lines, &r->line_at, got, sizeof got))
        run_fault(r, line, "got [%.400s], wanted nothing more before this line", got);
    if (r->peer.fault)
        run_fault(r, line, "got %s", r->peer.fault);
}

static const struct endpoint calling = { .on = &grpc_client, .client = true, .max_message = CLIENT_MAX_MESSAGE };

static void call_message(struct stream *s, struct bytes m)
{
    struct run *r = s->user;
    buf_put(&r->got, m.p, m.n);
}

static void call_status(struct stream *s, unsigned status, struct bytes text)
{
    struct run *r = s->user;
    if (r->status >= 0)
        run_fault(r, 0, "got two statuses, wanted one");
    r->status = (long)status;
    snprintf(r->status_text, sizeof r->status_text, "%.*s", (int)text.n, text.n ? (const char *)text.p : "");
}

static void call_closed(struct stream *s)
{
    struct run *r = s->user;
    r->call = NULL;
}

static const struct grpc_method call_method = {
    .path = "/cvms.Service/Process", .message = call_message, .status = call_status, .closed = call_closed,
};

static void run_client_op(struct run *r, const struct op *op)
{
    char text[200];
    snprintf(text, sizeof text, "%.*s", (int)op->text.len, op->text.len ? (const char *)op->text.p : "");
    if (op->kind == OP_CALL) {
        r->status = -1;
        r->call = grpc_call(&r->conn, &call_method, "localhost", NULL);
        if (r->call)
            r->call->user = r;
    } else if (op->kind == OP_GOT) {
        struct bytes got = { r->got.p ? r->got.p + r->got_at : NULL, r->got.len - r->got_at };
        if (!bytes_eq(got, whole(&op->text)))
            run_fault(r, op->line, "got %zu bytes, wanted other %zu", got.n, op->text.len);
        r->got_at = r->got.len;
    } else if (op->kind == OP_STATUS) {
        if (r->status != op->n || !strstr(r->status_text, text))
            run_fault(r, op->line, "got status %ld [%s], wanted %ld [%s]", r->status, r->status_text, op->n, text);
    } else if (op->kind == OP_NO_STATUS) {
        if (r->status != -1)
            run_fault(r, op->line, "got status %ld, wanted none yet", r->status);
    } else if (!r->call) {
        run_fault(r, op->line, "the call has ended already");
    } else if (op->kind == OP_SEND) {
        stream_queue(r->call, blob_copy(whole(&op->text)), ITEM_DATA);
    } else {
        grpc_half_close(r->call);
    }
}

static void run_check_op(struct run *r, const struct op *op)
{
    static char text[6000], got[70000];
    snprintf(text, sizeof text, "%.*s", (int)op->text.len, op->text.len ? (const char *)op->text.p : "");
    if (op->kind == OP_OUT) {
        if (!line_next(&core.out, &r->out_at, got, sizeof got))
            run_fault(r, op->line, "got no line on stdout, wanted [%s]", text);
        else if (strcmp(got, text) != 0)
            run_fault(r, op->line, "got [%s], wanted [%s]", got, text);
    } else if (op->kind == OP_LOG) {
        buf_putc(&core.err, 0);
        core.err.len--;
        if (!strstr((char *)core.err.p, text))
            run_fault(r, op->line, "got the log [%s], wanted [%s] in it", (char *)core.err.p, text);
    } else if (op->kind == OP_STREAMS) {
        if (r->conn.stream_count != (uint32_t)op->n)
            run_fault(r, op->line, "got %lu streams, wanted %ld", (unsigned long)r->conn.stream_count, op->n);
    } else {
        bool ended = r->conn.phase >= CONN_CLOSING || conn_finished(&r->conn);
        if (ended != (op->kind == OP_ENDED))
            run_fault(r, op->line, "got a connection that %s", ended ? "has ended" : "goes on");
    }
}

static void run_op(struct run *r, const struct op *op)
{
    if (op->kind >= OP_LOG && op->kind <= OP_GOES_ON)
        run_collect(r);
    else if (op->kind != OP_WANT && op->kind != OP_CLIENT)
        run_quiet(r, op->line);
    switch (op->kind) {
    case OP_IN:
        run_input(r, whole(&op->text));
        break;
    case OP_WANT:
        run_want(r, op);
        break;
    case OP_TICK:
        core.now_ms += op->n;
        conn_tick(&r->conn);
        break;
    case OP_EOF:
        conn_eof(&r->conn);
        break;
    case OP_SHUTDOWN:
        conn_shutdown(&r->conn, GRPC_UNAVAILABLE, "the server is shutting down");
        break;
    case OP_RELEASE:
    case OP_HELD:
        core.backpressure = op->kind == OP_HELD;
        if (!core.backpressure)
            conn_release(&r->conn);
        break;
    case OP_MANIFEST:
        set_manifest(whole(&op->text));
        break;
    case OP_MAX_MESSAGE:
        serving.max_message = (size_t)op->n;
        break;
    case OP_JSON:
        server.json = true;
        break;
    case OP_COLOR:
        core.out_look = LOOK_COLOR;
        break;
    case OP_LOG: case OP_OUT: case OP_STREAMS: case OP_ENDED: case OP_GOES_ON:
        run_check_op(r, op);
        break;
    case OP_CLIENT:
        break;
    default:
        run_client_op(r, op);
    }
}

/* Runs an exchange once; true if all was as wanted. */
static bool script_run(const struct script *t, size_t cut)
{
    static struct run r;
    r = (struct run){ .script = t, .cut = cut, .status = -1, .ok = true, .peer.who = t->client ? 'C' : 'S' };
    core_reset();
    set_manifest(BYTES("\0\0\0\0\2hi"));
    hpack_init(&r.peer.hpack);
    conn_init(&r.conn, &core, t->client ? &calling : &serving, "peer");
    for (size_t i = 0; i < t->n && r.ok; i++)
        run_op(&r, &t->op[i]);
    if (r.ok)
        run_quiet(&r, t->line + 1);
    conn_free(&r.conn);
    hpack_free(&r.peer.hpack);
    buf_free(&r.out);
    buf_free(&r.lines);
    buf_free(&r.got);
    return r.ok;
}

static void count_result(bool ok)
{
    *(ok ? &passed : &failed) += 1;
}

static void script_all_cuts(const struct script *t)
{
    size_t step = t->bytes > ALL_CUTS ? t->bytes / SOME_CUTS + 1 : 1;
    bool ok = script_run(t, 0);
    count_result(ok);
    if (!ok)
        return;
    count_result(script_run(t, SIZE_MAX));
    for (size_t cut = 1; cut < t->bytes && ok; cut += cut < SOME_CUTS ? 1 : step)
        ok = script_run(t, cut);
    count_result(ok);
}

static int is_exchange(const struct dirent *e)
{
    size_t n = strlen(e->d_name);
    return n > 4 && strcmp(e->d_name + n - 4, ".txt") == 0;
}

/* test_core [FILE...]: these exchanges only. */
int main(int argc, char **argv)
{
    static struct script t;
    struct dirent **list = NULL;
    int n = argc > 1 ? argc - 1 : scandir("exchanges", &list, is_exchange, alphasort);
    for (int i = 0; i < n; i++) {
        char path[400];
        snprintf(path, sizeof path, "%s%s", argc > 1 ? "" : "exchanges/", argc > 1 ? argv[i + 1] : list[i]->d_name);
        script_read(&t, path);
        script_all_cuts(&t);
        script_free(&t);
        if (list)
            (free)(list[i]);
    }
    (free)(list);
    core_drop();
    if (n < 80 && argc == 1) {
        failed++;
        printf("exchanges: got %d files, wanted at least 80\n", n);
    }
    return closing();
}
