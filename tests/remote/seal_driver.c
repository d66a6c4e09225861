/* Driver for test_crypt.py, whose nonces and pieces are given: `seal KEY NONCE PIECE PATH` writes the blob of a file or
 * folder, `unseal KEY PIECE` what is in the blob on stdin.  Keys and nonces are hex. */
#include "../harness.h"

static void from_hex(uint8_t *to, size_t n, const char *hex)
{
    for (size_t i = 0; i < n; i++)
        sscanf(hex + 2 * i, "%2hhx", &to[i]);
}

int main(int argc, char **argv)
{
    uint8_t key[AES_KEY], nonce[SEAL_NONCE], in[1 << 16], out[1 << 16];
    size_t piece = (size_t)atoi(argv[argc == 6 ? 4 : 3]);
    struct err e = { "" };
    struct source s;
    struct unseal u;
    uint64_t len = 0;
    ssize_t n;
    from_hex(key, sizeof key, argv[2]);
    if (argc == 6) {
        from_hex(nonce, sizeof nonce, argv[3]);
        if (!source_open(&s, argv[5], &e) || !source_seal(&s, key, nonce, &e))
            return puts(e.text), 1;
        for (; (n = source_read(&s, in, piece, &e)) > 0; len += (uint64_t)n)
            fwrite(in, 1, (size_t)n, stdout);
        bool whole = n == 0 && len == s.size;
        source_close(&s);
        return !whole;
    }
    unseal_init(&u, key);
    while ((n = file_read(STDIN_FILENO, in, piece)) > 0)
        fwrite(out, 1, unseal_update(&u, in, (size_t)n, out), stdout);
    return !unseal_final(&u);
}
