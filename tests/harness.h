/* What the C tests share: checks that are counted, memory whose end can't be passed, hex, and cvms.c with its main renamed.
 * To be defined before it: HARNESS_ALLOC for an allocator that counts and can fail, HARNESS_ALONE to do without cvms.c. */
#ifndef HARNESS_H
#define HARNESS_H
#define _FILE_OFFSET_BITS 64          /* as cvms.c does, before the first header */
#define _TIME_BITS 64
#include <errno.h>
#include <malloc.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifdef HARNESS_ALLOC
static long alloc_count, alloc_fail;  /* the alloc_fail-th allocation fails; 0: none does */
static long long alloc_live;          /* bytes allocated, with 16 each for the allocator's own */
enum { ALLOC_OWN = 16 };

static bool alloc_denied(void)
{
    return ++alloc_count == alloc_fail;
}

static void *alloc_counted(void *p)
{
    alloc_live += p ? (long long)malloc_usable_size(p) + ALLOC_OWN : 0;
    return p;
}

static void *test_malloc(size_t n)
{
    return alloc_denied() ? NULL : alloc_counted(malloc(n));
}

static void *test_calloc(size_t n, size_t size)
{
    return alloc_denied() ? NULL : alloc_counted(calloc(n, size));
}

static void test_free(void *p)
{
    alloc_live -= p ? (long long)malloc_usable_size(p) + ALLOC_OWN : 0;
    free(p);
}

static void *test_realloc(void *p, size_t n)
{
    long long before = p ? (long long)malloc_usable_size(p) + ALLOC_OWN : 0;
    void *to = alloc_denied() ? NULL : realloc(p, n);
    alloc_live -= to ? before : 0;
    return alloc_counted(to);
}
#define malloc test_malloc
#define calloc test_calloc
#define realloc test_realloc
#define free test_free
#endif

#ifndef HARNESS_ALONE
#define main cvms_main
__attribute__((unused)) static int main(int argc, char **argv); /* what a test does not reach is then not compiled */
#include "../cvms.c"
#undef main
#endif

static long passed, failed;

/* Numbers, and strings that are fit to print. */
#define CHECK(got, wanted) check_number(__FILE__, __LINE__, #got, (long long)(got), (long long)(wanted))
#define CHECK_STR(got, wanted) check_str(__FILE__, __LINE__, got, wanted)

static inline bool check_number(const char *file, int line, const char *what, long long got, long long wanted)
{
    *(got == wanted ? &passed : &failed) += 1;
    if (got != wanted)
        printf("%s:%d: %s: got %lld, wanted %lld\n", file, line, what, got, wanted);
    return got == wanted;
}

static inline bool check_str(const char *file, int line, const char *got, const char *wanted)
{
    bool same = strcmp(got, wanted) == 0;
    *(same ? &passed : &failed) += 1;
    if (!same)
        printf("%s:%d: got [%s], wanted [%s]\n", file, line, got, wanted);
    return same;
}

/* The line that check.py counts; main's value. */
static inline int closing(void)
{
    printf("%ld passed, %ld failed\n", passed, failed);
    return failed != 0 || passed == 0;
}

/* What a test can do without: it stops. */
static inline void stop(const char *file, int line, const char *why, const char *at)
{
    printf("%s:%d: the test itself is wrong: %s: %.60s\n", file, line, why, at);
    exit(2);
}

#define NEED(good) ((good) ? (void)0 : stop(__FILE__, __LINE__, strerror(errno), #good))

enum { AREA = 1 << 17 };              /* bytes; a multiple of any page size */

/* The end of AREA bytes that can be read and written; what follows it can be neither. */
static inline uint8_t *guarded_end(void)
{
    uint8_t *p = mmap(NULL, 2 * AREA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    NEED(p != MAP_FAILED && mprotect(p + AREA, AREA, PROT_NONE) == 0);
    return p + AREA;
}

#ifndef HARNESS_ALONE
/* Bytes against a string, and against bytes. */
#define CHECK_TEXT(got, wanted) check_bytes(__FILE__, __LINE__, got, bytes_of(wanted))
#define CHECK_BYTES(got, wanted) check_bytes(__FILE__, __LINE__, got, wanted)

static inline bool check_bytes(const char *file, int line, struct bytes got, struct bytes wanted)
{
    bool same = bytes_eq(got, wanted);
    *(same ? &passed : &failed) += 1;
    if (!same)
        printf("%s:%d: got [%.*s], wanted [%.*s]\n", file, line, (int)got.n, (const char *)got.p, (int)wanted.n,
               (const char *)wanted.p);
    return same;
}

static inline struct bytes whole(const struct buf *b)
{
    return (struct bytes){ b->p, b->len };
}

/* A copy of the bytes that ends where memory can no longer be read; until the next call. */
static inline struct bytes at_edge(struct bytes s)
{
    static uint8_t *edge;
    edge = edge ? edge : guarded_end();
    if (s.n)
        memcpy(edge - s.n, s.p, s.n);
    return (struct bytes){ edge - s.n, s.n };
}

/* Appends the bytes of a hex text; blanks and bars are for the reader. */
static inline void put_unhex(struct buf *b, const char *hex)
{
    for (; *hex; hex++) {
        char pair[3] = { hex[0], hex[1], 0 };
        if (*hex == ' ' || *hex == '|')
            continue;
        buf_putc(b, (int)strtol(pair, NULL, 16));
        hex++;
    }
}

static inline void print_hex(struct bytes s)
{
    for (size_t i = 0; i < s.n; i++)
        printf("%02x", s.p[i]);
    puts("");
}
#endif
#endif
