/* Driver for test_crypt.py and test_image.py, whose keys, nonces and pieces are given.  Keys and nonces are hex.
 *   seal KEY NONCE PIECE PATH        the blob of a file or folder
 *   unseal KEY PIECE                 what is in the blob on stdin
 *   image KEY|- PIECE PATH FOLDER    PATH as an image, -: a plain one, in an OCI layout; prints its name, and the manifest's
 *                                    digest and size
 *   header PATH                      the first 512 bytes of a plain image's layer */
#include "../harness.h"

static uint8_t key[AES_KEY], piece[1 << 16], plain[1 << 16];
static struct err e;

static void from_hex(uint8_t *to, size_t n, const char *hex)
{
    for (size_t i = 0; i < n; i++)
        sscanf(hex + 2 * i, "%2hhx", &to[i]);
}

/* Writes all of a source, which is of this size.  Returns the exit status. */
static int copy(struct source *s, size_t n, uint64_t size, FILE *to)
{
    uint64_t len = 0;
    ssize_t got;
    for (; (got = source_read(s, piece, n, &e)) > 0; len += (uint64_t)got)
        fwrite(piece, 1, (size_t)got, to);
    source_close(s);
    return got < 0 || len != size || size != s->size;
}

static int seal(char **arg)
{
    struct source s;
    uint8_t nonce[SEAL_NONCE];
    from_hex(nonce, sizeof nonce, arg[1]);
    if (!source_open(&s, arg[3], &e) || !source_seal(&s, key, nonce, &e))
        return puts(e.text), 1;
    return copy(&s, (size_t)atoi(arg[2]), s.size, stdout);
}

static int unseal(char **arg)
{
    struct unseal u;
    unseal_init(&u, key);
    for (ssize_t n; (n = file_read(STDIN_FILENO, piece, (size_t)atoi(arg[1]))) > 0;)
        fwrite(plain, 1, unseal_update(&u, piece, (size_t)n, plain), stdout);
    return !unseal_final(&u);
}

static FILE *part(const struct image *im, enum image_part which, const char *folder)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/blobs/sha256/%s", folder, im->digest[which] + 7);
    return or_exit(fopen(path, "w"));
}

static int image(char **arg)
{
    struct image im = { .what = "algorithm", .entry = (const char *)base_name(arg[2]).p, .key = *arg[0] == '-' ? NULL : key };
    struct checksum c = { .path = arg[2], .image = &im };
    struct source s = { .fd = -1 };
    checksum_files(&c, 1);
    if (!c.ok || !image_open(&im, arg[2], &s, &e))
        return puts(c.ok ? e.text : checksum_why(&c)), free(c.why), image_free(&im), 1;
    for (int i = 0; i < IMAGE_LAYER; i++) {
        FILE *f = part(&im, (enum image_part)i, arg[3]);
        fwrite(im.text[i]->p, 1, im.text[i]->n, f);
        fclose(f);
    }
    FILE *f = part(&im, IMAGE_LAYER, arg[3]);
    int status = copy(&s, (size_t)atoi(arg[1]), im.size, f);
    fclose(f);
    printf("%s %s %zu\n", im.name, im.digest[IMAGE_MANIFEST], im.text[IMAGE_MANIFEST]->n);
    image_free(&im);
    return status;
}

static int header(char **arg)
{
    struct source s = { .fd = -1 };
    bool ok = source_open_as(&s, arg[0], "name", &e) && source_read(&s, piece, TAR_BLOCK, &e) == TAR_BLOCK;
    source_close(&s);
    return !ok || fwrite(piece, 1, TAR_BLOCK, stdout) != TAR_BLOCK;
}

int main(int argc, char **argv)
{
    static const struct { const char *name; int args, (*run)(char **); } commands[] = {
        { "seal", 4, seal }, { "unseal", 2, unseal }, { "image", 4, image }, { "header", 1, header },
    };
    size_t i = argc > 2 ? ROW_FIND(commands, bytes_of(argv[1])) : PB_COUNT(commands);
    if (i == PB_COUNT(commands) || argc != commands[i].args + 2)
        return 3;
    from_hex(key, sizeof key, argv[2]);
    return commands[i].run(argv + 2);
}
