/* Driver for test_pem.py: prints the key of a file as hex, or why it has none; with `blocks FILE`, what pem_next finds. */
#include "../harness.h"

static int blocks(const char *path)
{
    struct buf der = { 0 }, text = { 0 };
    struct err e = { "" };
    char label[PEM_LABEL];
    int r;
    if (!file_load(path, PEM_FILE_MAX, &text, &e))
        return puts(e.text), 1;
    struct bytes in = whole(&text);
    while ((r = pem_next(&in, label, &der)) != 0) {
        printf("%d %s ", r, label);
        print_hex(r > 0 ? whole(&der) : (struct bytes){ NULL, 0 });
    }
    buf_free(&text), buf_free(&der);
    return 0;
}

int main(int argc, char **argv)
{
    struct buf der = { 0 };
    struct err e = { "" };
    if (argc == 3 && strcmp(argv[1], "blocks") == 0)
        return blocks(argv[2]);
    bool ok = public_key_load(argv[1], &der, &e);
    if (ok)
        print_hex(whole(&der));
    else
        puts(e.text);
    buf_free(&der);
    return !ok;
}
