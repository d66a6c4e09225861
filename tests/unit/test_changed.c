/* Tests of checksum_changed, of checksum_files against checksum_path, and of sources: each change to a file or tree is
 * noticed, and nothing else is; a source gives the same bytes in any pieces.  Works in a new folder under $TMPDIR or /tmp. */
#include "../harness.h"

static bool checksum_path(const char *path, uint8_t hash[32], struct file_id *id, struct err *e)
{
    struct checksum c = { .path = path };
    checksum_files(&c, 1);
    memcpy(hash, c.hash, sizeof c.hash);
    *id = c.id;
    err_set(e, "%s", c.ok ? "" : checksum_why(&c));
    free(c.why);
    return c.ok;
}

static void put_file(const char *name, const char *text)
{
    FILE *f = fopen(name, "w");
    NEED(f && fputs(text, f) >= 0 && fclose(f) == 0);
}

/* Sets the modification time, in ns; a change within the clock's tick would otherwise go unseen. */
static void set_time(const char *name, long ns)
{
    struct timespec t[2] = { { 1000, 0 }, { 1000, ns } };
    NEED(utimensat(AT_FDCWD, name, t, 0) == 0);
}

static struct file_id id_of(const char *path)
{
    uint8_t hash[32];
    struct file_id id = { { 0 } };
    struct err e = { "" };
    if (!checksum_path(path, hash, &id, &e))
        CHECK_STR(e.text, "no error");
    return id;
}

static const char *changed(const char *path, const struct file_id *id)
{
    return checksum_changed(path, id) ? "changed" : "same";
}

static void test_file(void)
{
    put_file("f", "one");
    set_time("f", 1);
    struct file_id id = id_of("f");
    CHECK_STR(changed("f", &id), "same");
    set_time("f", 2);
    CHECK_STR(changed("f", &id), "changed");
    id = id_of("f");
    put_file("f", "longer");
    CHECK_STR(changed("f", &id), "changed");
    id = id_of("f");
    put_file("g", "longer");
    NEED(rename("g", "f") == 0);
    CHECK_STR(changed("f", &id), "changed");
    id = id_of("f");
    NEED(unlink("f") == 0);
    CHECK_STR(changed("f", &id), "changed");
    NEED(mkdir("f", 0777) == 0);
    CHECK_STR(changed("f", &id), "changed");
    NEED(rmdir("f") == 0);
}

static void test_folder(void)
{
    NEED(mkdir("d", 0777) == 0 && mkdir("d/sub", 0777) == 0);
    put_file("d/a", "a");
    put_file("d/sub/b", "b");
    set_time("d/sub/b", 1);
    struct file_id id = id_of("d");
    CHECK_STR(changed("d", &id), "same");
    CHECK_STR(changed("d/", &id), "same");
    NEED(mkdir("d/empty", 0777) == 0);
    CHECK_STR(changed("d", &id), "same"); /* an empty folder is not in the zip */
    put_file("d/c", "c");
    CHECK_STR(changed("d", &id), "changed");
    NEED(unlink("d/c") == 0);
    CHECK_STR(changed("d", &id), "same");
    set_time("d/sub/b", 2);
    CHECK_STR(changed("d", &id), "changed");
    id = id_of("d");
    NEED(rename("d/sub/b", "d/sub/c") == 0);
    CHECK_STR(changed("d", &id), "changed");
    id = id_of("d");
    NEED(unlink("d/a") == 0);
    CHECK_STR(changed("d", &id), "changed");
    id = id_of("d");
    NEED(symlink("..", "d/link") == 0);
    CHECK_STR(changed("d", &id), "changed"); /* no longer a tree with a checksum */
    NEED(!unlink("d/link") && !unlink("d/sub/c") && !rmdir("d/sub") && !rmdir("d/empty") && !rmdir("d"));
}

/* Every number of paths up to 20, of lengths that differ: the same hash and identity as one by one. */
static void test_files(void)
{
    struct checksum c[20];
    char names[20][8];
    for (size_t i = 0; i < 20; i++) {
        snprintf(names[i], sizeof names[i], "n%zu", i);
        FILE *f = fopen(names[i], "w");
        NEED(f != NULL);
        for (size_t k = 0; k < i * i * i * 71; k++)
            putc((int)(k * 7 + i), f);
        NEED(fclose(f) == 0);
    }
    for (size_t n = 0; n <= 20; n++) {
        for (size_t i = 0; i < n; i++)
            c[i].path = i % 7 == 3 ? "missing" : names[i];
        checksum_files(c, n);
        for (size_t i = 0; i < n; i++) {
            uint8_t hash[32];
            struct file_id id;
            struct err e;
            bool ok = checksum_path(c[i].path, hash, &id, &e);
            CHECK_STR(c[i].ok ? "ok" : checksum_why(&c[i]), ok ? "ok" : e.text);
            CHECK_STR(memcmp(hash, c[i].hash, 32) ? "other hash" : "same", "same");
            CHECK_STR(memcmp(&id, &c[i].id, sizeof id) ? "other identity" : "same", "same");
            free(c[i].why);
        }
    }
    for (size_t i = 0; i < 20; i++)
        NEED(unlink(names[i]) == 0);
}

/* All bytes of a source, pulled in pieces of n; "" after an error, which e has. */
static struct buf pulled(const char *path, size_t n, struct err *e)
{
    struct source s;
    struct buf all = { 0 };
    *e = (struct err){ "" };
    if (!source_open(&s, path, e))
        return all;
    CHECK_STR(changed(path, &s.id), "same");
    ssize_t got;
    do {
        NEED(buf_room(&all, n) != NULL);
        got = source_read(&s, all.p + all.len, n, e);
        all.len += got > 0 ? (size_t)got : 0;
    } while (got == (ssize_t)n);
    if (got >= 0) {
        CHECK(all.len, s.size);
        CHECK(source_read(&s, (uint8_t[1]){ 0 }, 1, e), 0);
    }
    source_close(&s);
    source_close(&s);
    return all;
}

/* A file and a folder give the same bytes in pieces of any size: those that their checksum is made of. */
static void test_source(void)
{
    NEED(mkdir("s", 0777) == 0 && mkdir("s/sub", 0777) == 0 && mkdir("none", 0777) == 0);
    put_file("s/a", "some text");
    put_file("s/empty", "");
    put_file("s/sub/\xc3\xa4", "more");
    static const char *const paths[] = { "s/a", "s/empty", "s", "none" };
    for (size_t i = 0; i < 4; i++) {
        uint8_t hash[32];
        struct err e;
        struct file_id id;
        NEED(checksum_path(paths[i], hash, &id, &e));
        for (size_t n = 1; n < 700; n++) {
            uint8_t got[32];
            struct sha3_256 h;
            struct buf all = pulled(paths[i], n, &e);
            sha3_256_init(&h, 0);
            sha3_256_update(&h, all.p, all.len);
            sha3_256_final(&h, got);
            CHECK_STR(memcmp(hash, got, 32) ? "other bytes" : "same", "same");
            buf_free(&all);
        }
    }
    struct source s;
    struct err e = { "" };
    uint8_t piece[8];
    NEED(source_open(&s, "s", &e) && unlink("s/empty") == 0 && mkdir("s/empty", 0777) == 0);
    ssize_t got;
    while ((got = source_read(&s, piece, sizeof piece, &e)) == sizeof piece)
        ;
    CHECK(got, -1);
    CHECK_STR(e.text, "s/empty: is a folder now");
    source_close(&s);
    CHECK(source_open(&s, "s/nothing", &e), false);
    CHECK_STR(e.text, "s/nothing: No such file or directory");
    source_close(&s);
    NEED(!unlink("s/a") && !rmdir("s/empty") && !unlink("s/sub/\xc3\xa4") && !rmdir("s/sub") && !rmdir("s") && !rmdir("none"));
}

/* An image that could not be made anew has no name: its old address stays in the manifest. */
static void test_image_without_name(void)
{
    struct checksum input = { .ok = true };
    struct image image = { .name = "algorithm-1" };
    struct Source source = { .url = { NULL, 0 } };
    struct KBSConfig kbs = { .url = { NULL, 0 } };
    struct resource x = { .input = &input, .image = &image, .source = &source, .kbs = &kbs };
    struct delivery d = { .base = "http://h:1", .resources = &x, .resource_count = 1 };
    resources_renew(&d);
    CHECK_STR(x.url, "docker://h:1/algorithm-1:latest");
    *image.name = 0;
    resources_renew(&d);
    CHECK_STR(x.url, "docker://h:1/algorithm-1:latest");
    CHECK_STR(x.path, "/v2/algorithm-1");
}

int main(void)
{
    char folder[300];
    const char *tmp = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%.200s/cvms-test-XXXXXX", tmp ? tmp : "/tmp");
    NEED(mkdtemp(folder) && chdir(folder) == 0);
    test_file();
    test_folder();
    test_files();
    test_source();
    test_image_without_name();
    NEED(chdir("/") == 0 && rmdir(folder) == 0);
    return closing();
}
