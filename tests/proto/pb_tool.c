/* Driver for test_pb.py.  Commands come on stdin, one a line; each answer is one line on stdout.
 *     json  TYPE INDENT HEX  ->  hex of our JSON, or "error: ..."
 *     wire  TYPE HEXJSON     ->  hex of the wire form, or "error: ..."
 *     again TYPE HEX         ->  decode and encode: hex, or "error: ..."
 *     file  NAME             ->  hex of the FileDescriptorProto
 * `pb_tool bench` measures instead. */
#include "../harness.h"

static const struct pb_message *find_message(const char *full)
{
    for (size_t i = 0; i < PB_COUNT(all_files); i++) {
        size_t n = strlen(all_files[i].package);
        if (strncmp(full, all_files[i].package, n) != 0 || full[n] != '.')
            continue;
        for (size_t k = 0; all_files[i].messages[k]; k++)
            if (strcmp(all_files[i].messages[k]->name, full + n + 1) == 0)
                return all_files[i].messages[k];
    }
    fprintf(stderr, "no message %s\n", full);
    exit(2);
}

static void command(const char *verb, const char *name, int indent, struct bytes in)
{
    struct pb_arena a;
    struct buf out = { 0 };
    char err[300] = "";
    bool unknown;
    a = (struct pb_arena){ .limit = (size_t)64 << 20 };
    if (strcmp(verb, "file") == 0) {
        for (size_t i = 0; i < PB_COUNT(all_files); i++)
            if (strcmp(all_files[i].name, name) == 0)
                print_hex(pb_file_descriptor(&out, &all_files[i]));
        buf_free(&out);
        return;
    }
    const struct pb_message *m = find_message(name);
    void *msg = calloc(1, m->size);
    enum pb_error e = PB_OK;
    if (strcmp(verb, "wire") == 0 ? !pb_json_parse(m, msg, in, &a, err, sizeof err)
                                  : (e = pb_decode(m, msg, in, &a, &unknown)) != PB_OK)
        printf("error: %s\n", *err ? err : pb_error_text[e]);
    else if (strcmp(verb, "json") == 0) {
        pb_json(&out, m, msg, indent);
        print_hex(whole(&out));
    } else
        print_hex(pb_encode(&out, m, msg));
    buf_free(&out);
    pb_arena_free(&a);
    free(msg);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* A ClientStreamMessage with a log whose text brings the whole to `size` bytes. */
static struct bytes sample(struct buf *b, size_t size)
{
    static char text[1 << 16];
    struct Timestamp t = { 1735689600, 123456000 };
    struct AgentLog log = { .computation_id = BYTES("1"), .level = BYTES("DEBUG"), .timestamp = &t };
    struct ClientStreamMessage m = { .agent_log = &log };
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = "time=2025 msg=ok "[i % 17];
    for (size_t n = 1;; n++) {
        log.message = (struct bytes){ (uint8_t *)text, n };
        struct bytes s = pb_encode(b, &ClientStreamMessage_message, &m);
        if (s.n >= size)
            return s;
    }
}

static void bench(size_t size)
{
    enum { ROUNDS = 2000000 };
    struct buf b = { 0 }, out = { 0 }, again = { 0 };
    struct pb_arena a;
    double best[4] = { 1e18, 1e18, 1e18, 1e18 };
    bool unknown;
    size_t sum = 0;
    struct bytes s = sample(&b, size), inner = { s.p + (size > 130 ? 3 : 2), s.n - (size > 130 ? 3 : 2) };
    a = (struct pb_arena){ .limit = 65536 };
    for (int run = 0; run < 7; run++) {
        double t0 = now();
        for (int i = 0; i < ROUNDS; i++) {
            struct ClientStreamMessage m = { 0 };
            pb_arena_reset(&a);
            sum += (size_t)pb_decode(&ClientStreamMessage_message, &m, s, &a, &unknown) + m.agent_log->message.n;
        }
        double t1 = now();
        for (int i = 0; i < ROUNDS; i++) {
            struct AgentLog m = { 0 };
            pb_arena_reset(&a);
            sum += (size_t)pb_decode(&AgentLog_message, &m, inner, &a, &unknown) + m.message.n;
        }
        double t2 = now();
        struct ClientStreamMessage m = { 0 };
        pb_arena_reset(&a);
        sum += (size_t)pb_decode(&ClientStreamMessage_message, &m, s, &a, &unknown);
        for (int i = 0; i < ROUNDS; i++) {
            out.len = 0;
            pb_json(&out, &ClientStreamMessage_message, &m, 0);
        }
        double t3 = now();
        for (int i = 0; i < ROUNDS; i++)
            sum += pb_encode(&again, &ClientStreamMessage_message, &m).n;
        double t[4] = { t1 - t0, t2 - t1, t3 - t2, now() - t3 };
        for (int i = 0; i < 4; i++)
            best[i] = t[i] < best[i] ? t[i] : best[i];
    }
    printf("%4zu bytes: decode ClientStreamMessage %.1f ns, AgentLog alone %.1f ns; JSON %.1f ns; encode %.1f ns (%zu)\n",
           s.n, best[0] / ROUNDS, best[1] / ROUNDS, best[2] / ROUNDS, best[3] / ROUNDS, sum & 1);
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "bench") == 0) {
        bench(100);
        bench(1000);
        return 0;
    }
    static char line[1 << 23], verb[16], name[100];
    while (fgets(line, sizeof line, stdin)) {
        int indent = 0, at = 0;
        line[strcspn(line, "\n")] = '\0';
        if (sscanf(line, "%15s %99s%n", verb, name, &at) != 2)
            return 2;
        if (strcmp(verb, "json") == 0) {
            int more = 0;
            sscanf(line + at, "%d%n", &indent, &more);
            at += more;
        }
        struct buf in = { 0 };
        put_unhex(&in, line + at);
        command(verb, name, indent, whole(&in));
        buf_free(&in);
        fflush(stdout);
    }
    return 0;
}
