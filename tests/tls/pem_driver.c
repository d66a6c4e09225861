#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#define main cvms_main
#include <stdio.h>
#include "../../cvms.c"
#undef main
int main(int argc, char **argv)
{
    struct buf der = { 0 };
    struct err e = { "" };
    (void)hex_text; (void)get_be32; (void)put_be32; (void)buf_printf; (void)bytes_of;
    if (argc == 3 && !strcmp(argv[1], "blocks")) {          /* lists what pem_next finds */
        struct buf t = { 0 };
        if (!file_load(argv[2], PEM_FILE_MAX, &t, &e)) return puts(e.text), 1;
        struct bytes in = { t.p, t.len };
        char label[PEM_LABEL];
        int r;
        while ((r = pem_next(&in, label, &der)) != 0) {
            printf("%d %s ", r, label);
            if (r > 0) for (size_t i = 0; i < der.len; i++) printf("%02x", der.p[i]);
            puts("");
        }
        buf_free(&t), buf_free(&der);
        return 0;
    }
    bool ok = public_key_load(argv[1], &der, &e);
    if (ok) for (size_t i = 0; i < der.len; i++) printf("%02x", der.p[i]);
    else printf("%s", e.text);
    puts("");
    buf_free(&der);
    return !ok;
}
