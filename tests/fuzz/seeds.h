/* Included by fuzz.c for its replay build: `seeds DIR` writes DIR/TARGET/NAME for every target, from the exchanges and
 * HPACK cases of tests/unit, the keys of tests/vectors, the message tables and the lines below; run from the top of the
 * tree.  `dict TARGET` prints a dictionary, from the program's own tables. */

static const char *seed_folder;

static void seed_write(const char *t, const char *name, struct bytes b)
{
    char path[600];
    snprintf(path, sizeof path, "%s/%s", seed_folder, t);
    mkdir(path, 0777);
    snprintf(path, sizeof path, "%s/%s/%s", seed_folder, t, name);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(b.p, 1, b.n, f) != b.n || fclose(f) != 0)
        stop(path, 0, "can't be written", "");
}

static void put_op(struct buf *b, char letter, unsigned a, unsigned c, unsigned d, struct bytes payload)
{
    const uint8_t head[OP_HEAD] = { (uint8_t)letter, (uint8_t)a, (uint8_t)c, (uint8_t)d, (uint8_t)(payload.n >> 8),
                                    (uint8_t)payload.n };
    buf_put(b, head, sizeof head);
    buf_put(b, payload.p, payload.n);
}

static void put_op_n(struct buf *b, char letter, size_t n)
{
    put_op(b, letter, (unsigned)(n >> 8 & 255), (unsigned)(n & 255), 0, (struct bytes){ NULL, 0 });
}

static void put_op_time(struct buf *b, uint32_t ms)
{
    put_op(b, 'T', ms >> 16 & 255, ms >> 8 & 255, ms & 255, (struct bytes){ NULL, 0 });
}

/* Frames as operations, what repeats as one; bytes that are no frames as they are. */
static void put_input_ops(struct buf *b, struct bytes in)
{
    struct bytes last = { NULL, 0 };
    size_t times = 0;
    for (size_t n; in.n; in = bytes_from(in, n)) {
        struct frame f = in.n >= FRAME_HEADER_LEN ? frame_parse(in.p) : (struct frame){ .len = 1 << 24 };
        n = FRAME_HEADER_LEN + (size_t)f.len;
        bool fits = n <= in.n && f.len <= 0xffff && f.stream_id < 256 && !(in.p[5] & 0x80);
        if (bytes_start(in, preface))
            fits = false, n = PREFACE_LEN;
        n = fits ? n : min_size(n, min_size(in.n, 0xffff));
        if (fits && bytes_eq(last, (struct bytes){ in.p, n })) {
            times++;
            continue;
        }
        if (times)
            put_op_n(b, 'O', times);
        times = 0;
        last = (struct bytes){ in.p, n };
        if (fits)
            put_op(b, 'F', f.type, f.flags, f.stream_id, (struct bytes){ in.p + FRAME_HEADER_LEN, f.len });
        else
            put_op(b, 'R', 0, 0, 0, last);
    }
    if (times)
        put_op_n(b, 'O', times);
}

static void seed_exchange(const char *name)
{
    static struct script t;
    char path[400], as[300];
    struct buf b = { 0 }, block = { 0 };
    uint8_t how = 0;
    snprintf(path, sizeof path, "tests/unit/exchanges/%s", name);
    script_read(&t, path);
    for (size_t i = 0; i < t.n; i++)
        how |= (uint8_t)((t.op[i].kind == OP_JSON) | (t.op[i].kind == OP_COLOR) << 1 | (t.op[i].kind == OP_MAX_MESSAGE) << 5);
    buf_put(&b, (uint8_t[]){ t.client ? 4 : how, 0, 0, 0 }, 4);
    for (size_t i = 0; i < t.n; i++) {
        const struct op *op = &t.op[i];
        if (op->kind == OP_IN)
            put_input_ops(&b, whole(&op->text));
        else if (op->kind == OP_TICK)
            put_op_time(&b, (uint32_t)op->n);
        else if (op->kind == OP_HELD || op->kind == OP_RELEASE)
            put_op(&b, 'W', op->kind == OP_HELD, 0, 0, (struct bytes){ NULL, 0 });
        else if (op->kind == OP_EOF || op->kind == OP_SHUTDOWN)
            put_op_n(&b, op->kind == OP_EOF ? 'E' : 'S', 0);
    }
    snprintf(as, sizeof as, "%.*s", (int)strlen(name) - 4, name);
    seed_write(t.client ? "client" : "server", as, whole(&b));
    for (size_t i = 0; i < t.n; i++)  /* the field blocks, for HPACK */
        for (struct bytes in = t.op[i].kind == OP_IN ? whole(&t.op[i].text) : (struct bytes){ NULL, 0 }; in.n > 9;) {
            struct frame f = frame_parse(in.p);
            size_t n = bytes_start(in, preface) ? PREFACE_LEN : FRAME_HEADER_LEN + (size_t)f.len;
            if (f.type == FRAME_HEADERS && n <= in.n && f.len < 1000 && !(f.flags & (PADDED | PRIORITY))) {
                buf_put(&block, (uint8_t[]){ 0, (uint8_t)(f.len >> 8), (uint8_t)f.len }, block.len ? 2 : 3);
                block.p[block.len - 2] = (uint8_t)(f.len >> 8), block.p[block.len - 1] = (uint8_t)f.len;
                buf_put(&block, in.p + FRAME_HEADER_LEN, f.len);
            }
            in = bytes_from(in, min_size(n, in.n));
        }
    if (block.len)
        seed_write("hpack", as, whole(&block));
    buf_free(&block);
    buf_free(&b);
    script_free(&t);
}

/* Operations of a whole life: the manifest of an agent that plays to the end, questions, trailers, on both streams. */
static void seed_links(void)
{
    struct buf b = { 0 };
    struct manifest *m = manifest_made(0);
    const struct bytes none = { NULL, 0 };
    MUST(manifest_encode(m));
    for (unsigned how = 0; how < 12; how++) {
        b.len = 0;
        buf_put(&b, (uint8_t[]){ (uint8_t)(how < 8 ? (how & 1) << 2 | (how >> 1) << 5 : how == 8 ? 1 : how == 9 ? 2 : how == 10 ? 2 | 8 : 16),
                                 0, 0, 0 }, 4);
        for (unsigned wire = 0; wire < 2; wire++) {
            put_op(&b, 'L', wire, 0, 0, none);
            put_op(&b, 'F', FRAME_SETTINGS, 0, 0, none);
            put_op(&b, 'Q', 0, 0, 1, none);
            for (struct input in = { m->stream->p, m->stream->n }; in.n && how != 8;) {
                uint32_t n = get_be32(in.p + 1);
                take(&in, 5);
                put_op(&b, 'M', 0, 0, 1, take(&in, n));
            }
            if (how == 8)
                put_op(&b, 'M', 0, 0, 1, BYTES("\x08\x01"));
            put_op(&b, 'M', 0, 0, 1, BYTES("\x22\x03\x0a\x01" "1"));
            put_op(&b, 'M', 0, 0, 1, BYTES("\x1a\x03\x0a\x01" "1"));
            if (how == 4)
                put_op(&b, 'M', 0, 0, 1, BYTES("\x12\x00"));
            if (how == 5)
                put_op(&b, 'M', 0, 0, 1, BYTES("\xff"));
        }
        for (unsigned wire = 0; wire < 2; wire++) {
            put_op(&b, 'L', wire, 0, 0, none);
            put_op(&b, 'Q', how == 6 ? 3 | 14 << 2 : 3, END_STREAM, 1, none);
        }
        char name[30];
        snprintf(name, sizeof name, "life-%u", how);
        seed_write("client", name, whole(&b));
        for (unsigned tls = 0; tls < 4; tls++) {
            b.p[3] = (uint8_t)(tls & 1);
            snprintf(name, sizeof name, "life-%u-%u", how, tls);
            if (how % 4 == 0 && tls < 2)
                seed_write("tls-client", name, whole(&b));
        }
    }
    blob_unref(m->stream);
    m->stream = NULL;
    for (unsigned i = 0; i < 48; i++) {
        static const uint8_t garbage[] = "\x16\x03\x01\0\5\1\0\0\1\0 GET / HTTP/1.1\r\n\r\n";
        char name[40];
        b.len = 0;
        buf_put(&b, (uint8_t[]){ (uint8_t)(i * 37), (uint8_t)(i * 11), (uint8_t)i, 0 }, 4);
        put_op(&b, 'R', 0, 0, 0, BYTES(preface));
        put_op(&b, 'f', FRAME_SETTINGS, 0, 0, none);
        if (i % 5 == 1)
            put_op_n(&b, 'C', i);
        put_op(&b, 'Q', i % 10, 0, 1, none);
        put_op(&b, 'M', i % 7 == 6, 0, 1, BYTES("\x0a\x05\x0a\x03" "abc"));
        put_op(&b, 'M', 0, 0, 1, BYTES("\x12\x0b\x0a\x07Running\x12\x00"));
        put_op(&b, 'L', 1, 0, 0, none);
        put_op(&b, 'r', 0, 0, 0, BYTES(preface));
        put_op(&b, 'F', FRAME_SETTINGS, 0, 0, none);
        put_op(&b, 'Q', 0, i & 1, 1, none);
        if (i % 3 == 0)
            put_op_n(&b, 'D', i * 10);
        put_op(&b, 'M', 0, 0, 1, BYTES("\x1a\x02\x12\x00"));
        put_op(&b, 'X', 0, 0, 0, BYTES("state"));
        put_op(&b, 'X', 0, 0, 0, i & 2 ? BYTES("stop\nrun") : BYTES("agents\nhelp\ndisconnect 127.0.0.1\nnone"));
        put_op_time(&b, 5000 * i);
        if (i % 4 == 3)
            put_op_n(&b, 'N', i);
        put_op(&b, 'Q', i % 10, 1, 3, none);
        put_op(&b, 'M', 0, 1, 1, BYTES("\x2a\x08\x12\x06" "Failed"));
        put_op(&b, "EZPSWXO"[i % 7], i % 5, 0, 0, none);
        put_op_n(&b, 'D', 0xffff);
        snprintf(name, sizeof name, "life-%u", i);
        seed_write("server", name, whole(&b));
        if (i % 4)
            continue;
        seed_write("tls-server", name, whole(&b));
        b.p[3] = 1;
        struct buf bad = { 0 };
        buf_put(&bad, b.p, 4);
        if (i % 8)
            put_op(&bad, 'y', i, 1 + i, 0, none);
        else
            put_op(&bad, 'R', 1, 0, 0, (struct bytes){ garbage + i % 10, 16 });
        buf_put(&bad, b.p + 4, b.len - 4);
        put_op_n(&bad, 'V', 0);
        snprintf(name, sizeof name, "bad-%u", i);
        seed_write("tls-server", name, whole(&bad));
        bad.p[3] = 3;
        snprintf(name, sizeof name, "raw-%u", i);
        seed_write("tls-server", name, whole(&bad));
        buf_free(&bad);
    }
    buf_free(&b);
}

/* A message with every field set, of a oneof the k-th. */
static void fill_message(const struct pb_message *m, void *msg, struct pb_arena *a, unsigned k, unsigned depth)
{
    unsigned one = 0, members = 0;
    for (size_t i = 0; i < m->n; i++)
        members += m->fields[i].flags & PB_ONEOF;
    for (size_t i = 0; i < m->n; i++) {
        const struct pb_field *f = &m->fields[i];
        void *at = (uint8_t *)msg + f->offset;
        if (f->flags & PB_ONEOF && one++ != k % members)
            continue;
        for (unsigned n = 0; n < (f->flags & PB_REPEATED ? 2u : 1u); n++) {
            void *item = f->flags & PB_REPEATED ? pb_list_add(a, at, pb_item_size(f)) : at;
            if (f->kind == PB_MESSAGE && depth < 4)
                fill_message(f->sub, f->flags & PB_REPEATED ? item : pb_make(a, f, at), a, k, depth + 1);
            else if (f->kind == PB_STRING)
                *(struct bytes *)item = k & 1 ? BYTES("a\xc3\xa9\x1b\xe2\x80\xae\"\\") : BYTES("text");
            else if (f->kind == PB_BYTES)
                *(struct bytes *)item = BYTES("\xff\0k");
            else if (f->kind != PB_MESSAGE)
                pb_store(f, item, k & 2 ? (uint64_t)-7 : 1 + n);
        }
    }
}

static void seed_messages(void)
{
    const struct { unsigned table; const char *name; struct bytes wire; } odd[] = {
        { 0, "truncated", BYTES("\x0a\x05\x0a") }, { 1, "field-0", BYTES("\x00\x01") }, { 1, "overlong", BYTES("\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01") },
        { 1, "end-group", BYTES("\x14") }, { 2, "group", BYTES("\x4b\x53\x54\x08\x01\x4c") }, { 2, "wire-types", BYTES("\x0d\1\2\3\4\x11\1\2\3\4\5\6\7\x08\x18\5\x22\0") },
        { 9, "utf8", BYTES("\x0a\x02\xc0\x80") }, { 16, "oneof-twice", BYTES("\x0a\x03\x0a\x01" "a\x12\x00\x0a\x03\x12\x01" "b") },
    };
    struct buf b = { 0 }, wire = { 0 };
    char name[120];
    for (unsigned t = 0; t < 64; t++) {
        const struct pb_message *m = table_of(t);
        for (unsigned k = 0; k < 8; k++) {
            struct pb_arena a = { .limit = 1 << 20 };
            void *msg = pb_arena_alloc(&a, m->size);
            fill_message(m, msg, &a, k, 0);
            struct bytes w = pb_encode(&wire, m, msg);
            b.len = 0;
            buf_putc(&b, (int)t);
            buf_put(&b, w.p, w.n);
            snprintf(name, sizeof name, "%s-%u-%u", m->name, t, k);
            seed_write("protobuf", name, whole(&b));
            if (m == &ServerReflectionRequest_message) {
                uint8_t head[] = { (uint8_t)(k & 1), (uint8_t)(w.n >> 8), (uint8_t)w.n };
                b.len = 0;
                buf_put(&b, head, 3);
                buf_put(&b, w.p, w.n);
                seed_write("reflection", name, whole(&b));
            }
            b.len = 0;
            buf_putc(&b, (int)t);
            pb_json(&b, m, msg, k & 4 ? 2 : 0);
            seed_write("json", name, whole(&b));
            if (m == &ComputationRunReq_message || m == &Line_message)
                seed_write("manifest", name, (struct bytes){ b.p + 1, b.len - 1 });
            pb_arena_free(&a);
        }
    }
    for (size_t i = 0; i < PB_COUNT(odd); i++)
        for (unsigned t = 0; t < 64; t += 9) {
            b.len = 0;
            buf_putc(&b, (int)(odd[i].table + t));
            buf_put(&b, odd[i].wire.p, odd[i].wire.n);
            snprintf(name, sizeof name, "%s-%u", odd[i].name, t);
            seed_write("protobuf", name, whole(&b));
        }
    b.len = 0;                        /* nested too deep, and too much memory */
    for (unsigned i = 0; i < 102; i++)
        buf_putc(&b, 0x4b);
    seed_write("protobuf", "groups", whole(&b));
    unsigned run_req = 0;
    while (table_of(run_req) != &ComputationRunReq_message)
        run_req++;
    b.len = 0;
    buf_putc(&b, (int)run_req);
    for (unsigned i = 0; i < 4000; i++)
        buf_put(&b, "\x22\0", 2);
    seed_write("protobuf", "many", whole(&b));
    static const char *const asked[] = {
        "\0\0\0", "\1\0\7\x1a\5cvms.", "\0\0\2\x3a\0", "\0\0\x0e\x22\x0c" "cvms.Service", "\0\0\x18\x22\x16" "cvms.AgentLog.message",
        "\0\0\x1b\x1a\x19" "grpc/health/v1/health.proto", "\0\0\4\x2a\2\x10\5", "\0\0\x0f\x32\x0dcvms.AgentLog",
    };
    for (size_t i = 0; i < PB_COUNT(asked); i++) {
        snprintf(name, sizeof name, "asked-%zu", i);
        seed_write("reflection", name, (struct bytes){ (const uint8_t *)asked[i], i ? 3 + (size_t)asked[i][2] : 3 });
    }
    buf_free(&b);
    buf_free(&wire);
}

static const char *const command_lines[] = {
    "-algo-path\ndata\n-public-key-path\nkey.pem\n-attested-tls-bool\nfalse",
    "-algo-path\ndata\n-data-paths\ndata,in.json\n-algo-type\npython\n-algo-args\n--epochs,10\n-public-key-path\nkey.pem\n-attested-tls-bool\ntrue\n-client-ca-file\n/ca.pem",
    "-algo-source-url\nhttps://e/a\n-algo-kbs-path\nd/k/a\n-algo-hash\na7ffc6f8bf1ed76651c14756a061d662f580ff4de43b49fa82d80a4b80f8434a\n-kbs-url\nhttp://l\n-public-key-path\nkey.pem\n-attested-tls-bool\nfalse",
    "-algo-source-url\ndocker://e/a\n-algo-encrypted=false\n-dataset-source-urls\ns3://a,gs://b\n-dataset-kbs-paths\na,b\n-dataset-hashes\nx,\n-dataset-kbs-urls\nu,v\n-dataset-decompress\ntrue\n-compat\nhead\n-public-key-path\nkey.pem\n-attested-tls-bool\nf",
    "-compat\nseed\n-manifest\nin.json\n-algo-path\ndata\n-manifest-for\nj=in.json\n-set\ndatasets[0].filename=a\n-dataset-encrypted\nmaybe\n-set\nalgorithm.source.type=q",
    "data\nkey.pem\nfalse\ndata\nin.json", "data\nkey.pem", "-until\nready\n-timeout\n2m30s\n-grace=1.5h\n-poll\n0\n-expect\nA/B,C/D\n-reject\nerror\n-agents\n2\n-report\nr.xml",
    "-output\nxml\n-max-message\n1\n-max-connections\n5\n-fault\ndelay=1s\n-fault\nflip=7\n-fault\ntwice\n-fault\nnone=\n-fault\nwrong-hash\n-algo-path\ndata\n-public-key-path\nkey.pem\n-attested-tls-bool\n0",
    "-server-cert\ndata\n-server-key\nkey.pem\n-client-san\nx\n-algo-pth\nx\n--help=maybe\n-unknown\n-", "@PORT=70000\n@SERVER_CERT=key.pem\n@SERVER_KEY=data\n@CLIENT_CA_CERTS=x\n-control",
    "agent\nlocalhost:7001\n-once\n-repeat\n3\n-wait\n10s\n-fail\nRunning\n-job-id\nj\n-ca\nkey.pem", "agent\n[::1]:99999\n-insecure\n-server-name\nx", "health\n-service\ncvms\n-wait\n1us\n@AGENT_CVM_GRPC_URL=h:1",
    "manifest\n-o\nout\n-algo-path\ndata\n-public-key-path\nkey.pem\n-attested-tls-bool\nT", "manifest\n-algo-path\nnone\n-public-key-path\ndata\n-attested-tls-bool\nmaybe", "checksum\n-b\ndata\nnone", "checksum",
    "-cvm-id\nx\n-ca-url\ny\n-algo-source-url\nftp://x\n-dataset-source-urls\na,b\n-data-paths\n,data,\n-algo-public-key-path\nkey.pem\n-dataset-public-key-paths\nkey.pem,\n-result-consumer-keys\nkey.pem\n-computation-id\n\xff",
};

static struct buf seed_file(const char *path)
{
    return file_read_whole(path);
}

static void seed_texts(void)
{
    static const char *const pem_files[] = { "crlf", "ed25519", "p256", "preamble", "rsa4096" };
    const char *const pems[] = { ca_pem, server_pem, server_key, client_pem, client_key, public_key };
    struct buf b = { 0 }, der = { 0 };
    char name[60], path[200], label[PEM_LABEL];
    for (size_t i = 0; i < PB_COUNT(command_lines); i++) {
        snprintf(name, sizeof name, "line-%zu", i);
        seed_write("cli", name, bytes_of(command_lines[i]));
    }
    for (size_t i = 0; i < PB_COUNT(pem_files) + PB_COUNT(pems); i++) {
        snprintf(path, sizeof path, "tests/vectors/keys/%s.pem", i < PB_COUNT(pem_files) ? pem_files[i] : "");
        struct buf text = { 0 };
        if (i < PB_COUNT(pem_files))
            text = seed_file(path);
        else
            buf_puts(&text, pems[i - PB_COUNT(pem_files)]);
        for (unsigned part = 0; part < 3; part++) {
            b.len = 0;
            buf_put(&b, "\0\0", part);
            buf_put(&b, text.p, text.len);
            snprintf(name, sizeof name, "text-%zu-%u", i, part);
            seed_write("pem", name, whole(&b));
        }
        struct bytes in = whole(&text);
        snprintf(name, sizeof name, "der-%zu", i);
        if (pem_next(&in, label, &der) == 1)
            seed_write("der", name, whole(&der));
        buf_free(&text);
    }
    static const char *const labels[] = { "RSA PUBLIC KEY", "OPENSSH PRIVATE KEY", "CERTIFICATE REQUEST", "EC PARAMETERS", "X", "" };
    for (size_t i = 0; i < PB_COUNT(labels); i++) {
        b.len = 0;
        buf_printf(&b, "text\n-----BEGIN %s-----\r\nProc-Type: 4,ENCRYPTED\n\nQUJD\nQUI=\n-----END %s-----\n", labels[i], labels[i]);
        snprintf(name, sizeof name, "label-%zu", i);
        seed_write("pem", name, whole(&b));
    }
    buf_free(&b);
    buf_free(&der);
}

/* The blocks of each connection of hpack_cases.txt. */
static void seed_hpack_cases(void)
{
    FILE *f = fopen("tests/unit/hpack_cases.txt", "r");
    static char line[20000];
    struct buf b = { 0 };
    unsigned n = 0;
    char name[40];
    MUST(f != NULL);
    for (bool more = true; more;) {
        more = fgets(line, sizeof line, f) != NULL;
        if ((!more || *line == 'N') && b.len) {
            snprintf(name, sizeof name, "case-%u", n++);
            seed_write("hpack", name, whole(&b));
            b.len = 0;
        }
        if (!more || *line != 'B')
            continue;
        size_t len = (strlen(line) - 3) / 2;
        buf_put(&b, (uint8_t[]){ 0, (uint8_t)(len >> 8), (uint8_t)len } + (b.len ? 1 : 0), b.len ? 2 : 3);
        for (const char *s = line + 2; hex_digit(s[0]) >= 0; s += 2)
            buf_putc(&b, hex_digit(s[0]) << 4 | hex_digit(s[1]));
        if (b.len > 1000) {
            snprintf(name, sizeof name, "case-%u", n++);
            seed_write("hpack", name, whole(&b));
            b.len = 0;
        }
    }
    fclose(f);
    buf_free(&b);
}

static int write_seeds(const char *folder)
{
    struct dirent **list = NULL;
    seed_folder = folder;
    mkdir(folder, 0777);
    int n = scandir("tests/unit/exchanges", &list, is_exchange, alphasort);
    if (n <= 0)
        stop("seeds", 0, "run from the top of the tree", "");
    for (int i = 0; i < n; i++) {
        seed_exchange(list[i]->d_name);
        (free)(list[i]);
    }
    (free)(list);
    seed_links();
    seed_messages();
    seed_texts();
    seed_write("http1", "get", BYTES("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"));
    seed_hpack_cases();
    return 0;
}

/* ---- Dictionaries ---- */
static void dict_word(struct bytes w)
{
    if (!w.n || w.n > 60)
        return;
    putchar('"');
    for (size_t i = 0; i < w.n; i++)
        printf("\\x%02X", w.p[i]);
    printf("\"\n");
}

static int write_dictionary(const char *name)
{
    static const char *const pem_words[] = {
        "-----BEGIN ", "-----END ", "-----\n", "PUBLIC KEY", "PRIVATE KEY", "CERTIFICATE", "EC ", "RSA ", "ENCRYPTED ", "OPENSSH ",
        "Proc-Type: 4,ENCRYPTED", "ssh-rsa ",
    };
    static const char *const values[] = { "true", "false", "key.pem", "in.json", "data", "agent", "manifest", "health", "checksum", "1s",
                                          "https://", "docker://", "seed", "head", "json", "@PORT=", "@HOST=", "\n", "," };
    if (!target_named(name))
        return 2;
    bool cli = strcmp(name, "cli") == 0, json = strcmp(name, "json") == 0 || strcmp(name, "manifest") == 0;
    bool pem = strcmp(name, "pem") == 0, wire = strcmp(name, "der") == 0 || strcmp(name, "protobuf") == 0;
    for (size_t i = 0; cli && i < OPTIONS; i++) {
        char flag[60];
        snprintf(flag, sizeof flag, "-%s\n", option_table[i].name);
        dict_word(bytes_of(flag));
    }
    for (size_t i = 0; cli && i < PB_COUNT(values); i++)
        dict_word(bytes_of(values[i]));
    for (unsigned t = 0; json && t < 64; t++)
        for (size_t i = 0; i < table_of(t)->n; i++) {
            char key[PB_NAME_MAX + 4];
            snprintf(key, sizeof key, "\"%s\":", table_of(t)->fields[i].name);
            dict_word(bytes_of(key));
        }
    for (size_t i = 0; json && i < 12; i++)
        dict_word(bytes_of(((const char *[]){ "9223372036854775807", "-9223372036854775808", "2147483647", "null", "{}", "[]", "\\u", "\"SERVING\"", "1e3", "2006-01-02T15:04:05Z", "true", "\\ud83d\\ude00" })[i]));
    for (size_t i = 0; pem && i < PB_COUNT(pem_words); i++)
        dict_word(bytes_of(pem_words[i]));
    for (size_t i = 0; wire && i < 8; i++)
        dict_word(((struct bytes[]){ BYTES("\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"), BYTES("\x0a\x00"), BYTES("\x0b\x0c"), BYTES("\x30\x82"),
                                     BYTES("\x06\x03\x55\x1d\x11"), BYTES("\x30\x80"), BYTES("\x84\xff\xff\xff\xff"), BYTES("\xc0\x80") })[i]);
    if (cli || json || pem || wire)
        return 0;
    for (size_t i = 0; i < PB_COUNT(paths); i++)
        dict_word(bytes_of(paths[i]));
    for (size_t i = 0; i < FIELD_RULES; i++)
        dict_word(bytes_of(field_names[i]));
    dict_word(BYTES(preface));
    for (size_t f = 0; f < PB_COUNT(all_files); f++) {
        dict_word(bytes_of(all_files[f].name));
        dict_word(bytes_of(all_files[f].package));
        for (size_t k = 0; all_files[f].messages[k]; k++)
            dict_word(bytes_of(all_files[f].messages[k]->name));
    }
    for (size_t i = 0; i < PB_COUNT(controls); i++)
        dict_word(bytes_of(controls[i].name));
    return 0;
}
