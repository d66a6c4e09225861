/* Tests of checksum_changed, and of checksum_files against checksum_path: each change to a file or tree is noticed,
 * and nothing else is.  Works in a new folder under $TMPDIR or /tmp. */
#include "../harness.h"

static bool checksum_path(const char *path, uint8_t hash[32], struct file_id *id, struct err *e)
{
    struct checksum c = { .path = path };
    checksum_files(&c, 1);
    memcpy(hash, c.hash, sizeof c.hash);
    *id = c.id;
    *e = c.e;
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
    struct file_id id = { .st = { 0 } };
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
            CHECK_STR(c[i].ok ? "ok" : c[i].e.text, ok ? "ok" : e.text);
            CHECK_STR(memcmp(hash, c[i].hash, 32) ? "other hash" : "same", "same");
            CHECK_STR(memcmp(&id, &c[i].id, sizeof id) ? "other identity" : "same", "same");
        }
    }
    for (size_t i = 0; i < 20; i++)
        NEED(unlink(names[i]) == 0);
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
    NEED(chdir("/") == 0 && rmdir(folder) == 0);
    return closing();
}
