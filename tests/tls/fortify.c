/* What Debian's libbearssl.a, built with FORTIFY for glibc, asks of libc by these names: links it with musl. */
#include <string.h>

void *__memcpy_chk(void *to, const void *from, size_t n, size_t cap);
void *__memmove_chk(void *to, const void *from, size_t n, size_t cap);
void *__memset_chk(void *to, int c, size_t n, size_t cap);

void *__memcpy_chk(void *to, const void *from, size_t n, size_t cap)
{
    return n <= cap ? memcpy(to, from, n) : NULL;
}

void *__memmove_chk(void *to, const void *from, size_t n, size_t cap)
{
    return n <= cap ? memmove(to, from, n) : NULL;
}

void *__memset_chk(void *to, int c, size_t n, size_t cap)
{
    return n <= cap ? memset(to, c, n) : NULL;
}
