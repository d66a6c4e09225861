/* Tests of sha3.h: known answers, every split point, every implementation, input that ends at an unreadable page.
 * Build: cc -std=c11 -D_DEFAULT_SOURCE test_sha3.c && ./a.out */
#define HARNESS_ALONE
#include "../harness.h"
#if defined(__x86_64__)
#include <cpuid.h>
/* A processor that lacks what is hidden: bits of leaf 7's EBX, of leaf 1's ECX; or leaf 7 as a whole. */
static unsigned hidden_7_b, hidden_1_c;
static bool no_leaf_7;

static int test_cpuid_7(unsigned *a, unsigned *b, unsigned *c, unsigned *d)
{
    int known = !no_leaf_7 && __get_cpuid_count(7, 0, a, b, c, d);
    *b = known ? *b & ~hidden_7_b : 0;
    return known;
}

static unsigned test_cpuid_1(void)
{
    unsigned a, b, c, d;
    __cpuid(1, a, b, c, d);
    return c & ~hidden_1_c;
}
#define __get_cpuid_count(leaf, sub, a, b, c, d) test_cpuid_7(a, b, c, d)
#undef __cpuid
#define __cpuid(leaf, a, b, c, d) ((a) = 0, (b) = 0, (c) = test_cpuid_1(), (d) = 0)
#endif
#include "../../sha3.h"

static unsigned features;            /* of the processor that the states are to be absorbed by; 0: unasked */

static const char *hex(const uint8_t *p, size_t n, char *text)
{
    for (size_t i = 0; i < n; i++)
        sprintf(text + 2 * i, "%02x", p[i]);
    return text;
}

static void pattern(uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)((i % 251 * 131 + 7) % 251);
}

/* The hash of n bytes given `step` at a time, as hex in static memory. */
static const char *hash_by(const void *data, size_t n, size_t step)
{
    static char text[65];
    struct sha3_256 h;
    uint8_t out[32];
    sha3_256_init(&h, features);
    for (size_t i = 0; i < n; i += step)
        sha3_256_update(&h, (const uint8_t *)data + i, n - i < step ? n - i : step);
    sha3_256_final(&h, out);
    return hex(out, 32, text);
}

/* NIST's examples for SHA3-256 (0 and 1600 bits), CAVP SHA3_256ShortMsg (8 bits), "abc" and a million "a". */
static void test_standard(void)
{
    uint8_t *a = malloc(1000000);
    if (!a)
        abort();
    memset(a, 0xa3, 200);
    CHECK_STR(hash_by("", 0, 1), "a7ffc6f8bf1ed76651c14756a061d662f580ff4de43b49fa82d80a4b80f8434a");
    CHECK_STR(hash_by("\xe9", 1, 1), "f0d04dd1e6cfc29a4460d521796852f25d9ef8d28b44ee91ff5b759d72c1e6d6");
    CHECK_STR(hash_by("abc", 3, 3), "3a985da74fe225b2045c172d6bd390bd855f086e3e9d525b46bfe24511431532");
    CHECK_STR(hash_by(a, 200, 200), "79f38adec5c20307a98ef76e8324afbfd46cfd81b22e3973c65fa1bd9de31787");
    memset(a, 'a', 1000000);
    CHECK_STR(hash_by(a, 1000000, 1000000), "5c8875ae474a3634ba4fd55ec85bffd661f32aca75c6d699d0cdcb6c115891c1");
    CHECK_STR(hash_by(a, 1000000, 999), "5c8875ae474a3634ba4fd55ec85bffd661f32aca75c6d699d0cdcb6c115891c1");
    free(a);
}

/* Lengths about the block's, bytes from pattern(); the answers are OpenSSL's and Python's, which agree. */
static const struct { size_t n; const char *hash; } lengths[] = {
    { 1,       "5223f7670b3b9ba04f57d477478ae77a58190d89f21da0b0be774735e23f9c96" },
    { 135,     "b61c23cde575909cddd3897298ce7b15cb1f94cefe02a19188e08a1f16102aa8" },
    { 136,     "881d3d744d975e8539fed79137c1f3307df419d61df084e63ba392b184bb5d36" },
    { 137,     "45987eb2c9fdd5eb061bb01647fa87b3ca21b26c60a30d903fb432b63280bee5" },
    { 271,     "6afc8c9bbaa92276689591f6e04a4332c117104bc701256c7b78577799ef3df1" },
    { 272,     "5ea2df80886aa602465209ccb2ec219d6f13b6e05c2d823e3bdb0c3530fb3a46" },
    { 273,     "65624233a3d53c95280bb860147e1c50027ab4dfe7c583178c6f38aeacb95533" },
    { 1000003, "ee3461f2f7598e0ad78e8b9b47d7857af57c9d42dc8922edbb29ce7c9163f1b0" },
};

static void test_lengths(void)
{
    uint8_t *p = malloc(1000004);
    if (!p)
        abort();
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        for (size_t off = 0; off < 2; off++) { /* aligned and not */
            pattern(p + off, lengths[i].n);
            CHECK_STR(hash_by(p + off, lengths[i].n, lengths[i].n), lengths[i].hash);
        }
    free(p);
}

/* Three blocks and a bit: byte by byte, in every step, and cut in two and in three at every offset. */
static void test_splits(void)
{
    uint8_t p[411];
    char whole[65];
    pattern(p, sizeof p);
    strcpy(whole, hash_by(p, sizeof p, sizeof p));
    for (size_t step = 1; step < sizeof p; step++)
        CHECK_STR(hash_by(p, sizeof p, step), whole);
    for (size_t cut = 0; cut <= sizeof p; cut++) {
        struct sha3_256 h;
        uint8_t out[32];
        char text[65];
        size_t second = (sizeof p - cut) / 2;
        sha3_256_init(&h, features);
        sha3_256_update(&h, p, cut);
        sha3_256_update(&h, NULL, 0);
        sha3_256_update(&h, p + cut, second);
        sha3_256_update(&h, p + cut + second, sizeof p - cut - second);
        sha3_256_final(&h, out);
        CHECK_STR(hex(out, 32, text), whole);
    }
}

static const char *state_hex(const uint64_t a[25], char *text)
{
    for (int i = 0; i < 25; i++)
        sprintf(text + 16 * i, "%016llx", (unsigned long long)a[i]);
    return text;
}

typedef void absorb_n(struct sha3_256 *const ctx[], const uint8_t *const data[], size_t blocks, unsigned n);

/* n states and inputs that differ, misaligned: each must end as the portable code leaves it. */
static void check_lanes(absorb_n *absorb, unsigned n, size_t blocks)
{
    enum { MOST = 17 };
    static uint8_t input[MOST][5 * SHA3_256_RATE + MOST];
    static struct sha3_256 got[MOST], wanted[MOST];
    struct sha3_256 *ctx[MOST] = { NULL };
    const uint8_t *data[MOST] = { NULL };
    char a[401], b[401];
    for (unsigned i = 0; i < n; i++) {
        pattern(input[i], sizeof input[i]);
        input[i][i] ^= 0x55;
        for (unsigned k = 0; k < 25; k++)
            got[i].a[k] = UINT64_C(0x9e3779b97f4a7c15) * (i * 25 + k + 1);
        got[i].features = features;
        wanted[i] = got[i];
        ctx[i] = &got[i];
        data[i] = input[i] + i;
        sha3_absorb_portable(&wanted[i], data[i], blocks);
    }
    absorb(ctx, data, blocks, n);
    for (unsigned i = 0; i < n; i++)
        CHECK_STR(state_hex(got[i].a, a), state_hex(wanted[i].a, b));
}

static void test_lanes(void)
{
    for (size_t blocks = 0; blocks <= 5; blocks++) {
        for (unsigned n = 0; n <= 17; n++)
            check_lanes(sha3_256_absorb_lanes, n, blocks);
#if defined(__x86_64__)
        for (unsigned n = 1; n <= 8; n++) {
            if (n <= 4 && features & SHA3_AVX2)
                check_lanes(sha3_absorb_4_avx2, n, blocks);
            if (n <= 2 && sha3_256_lanes(features) == 8)
                check_lanes(sha3_absorb_2_avx512, n, blocks);
            if (n <= 4 && sha3_256_lanes(features) == 8)
                check_lanes(sha3_absorb_4_avx512, n, blocks);
            if (sha3_256_lanes(features) == 8)
                check_lanes(sha3_absorb_8_avx512, n, blocks);
        }
#endif
    }
}

#if defined(__x86_64__)
static void absorb_bmi2(struct sha3_256 *const ctx[], const uint8_t *const data[], size_t blocks, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        sha3_absorb_bmi2(ctx[i], data[i], blocks);
}
#endif

static void absorb_best(struct sha3_256 *const ctx[], const uint8_t *const data[], size_t blocks, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        sha3_absorb(ctx[i], data[i], blocks);
}

#if defined(__x86_64__)
/* The same processor with fewer features: each way is taken, and gives the same. */
static void test_lesser_processors(void)
{
    static const struct {
        unsigned hidden, lanes;
    } v[] = { { 0, 8 }, { SHA3_AVX512, 4 }, { SHA3_AVX512 | SHA3_AVX2, 1 }, { SHA3_AVX512 | SHA3_BMI2, 4 },
              { SHA3_AVX512 | SHA3_AVX2 | SHA3_BMI2, 1 } };
    unsigned all = features, most = sha3_256_lanes(features);
    for (size_t i = 0; i < sizeof v / sizeof *v; i++) {
        features = all & ~v[i].hidden;
        CHECK(sha3_256_lanes(features), v[i].lanes < most ? v[i].lanes : most);
        for (size_t blocks = 0; blocks <= 2; blocks++) {
            check_lanes(absorb_best, 1, blocks);
            for (unsigned n = 0; n <= 17; n++)
                check_lanes(sha3_256_absorb_lanes, n, blocks);
        }
    }
    features = all;
}

/* What is not there is not found, and nothing else goes with it. */
static void test_cpuid(void)
{
    static const struct {
        unsigned hidden_7_b, hidden_1_c, gone;
    } v[] = {
        { 0, 0, 0 }, { bit_BMI, 0, SHA3_BMI2 }, { bit_BMI2, 0, SHA3_BMI2 }, { bit_AVX2, 0, SHA3_AVX2 },
        { bit_AVX512F, 0, SHA3_AVX512 }, { bit_AVX512VL, 0, SHA3_AVX512 },
        { 0, bit_OSXSAVE, SHA3_AVX2 | SHA3_AVX512 },
    };
    unsigned all = sha3_features();
    for (size_t i = 0; i < sizeof v / sizeof *v; i++) {
        hidden_7_b = v[i].hidden_7_b;
        hidden_1_c = v[i].hidden_1_c;
        CHECK(sha3_features(), all & ~v[i].gone);
    }
    hidden_7_b = hidden_1_c = 0;
    no_leaf_7 = true;
    CHECK(sha3_features(), SHA3_ASKED);
    no_leaf_7 = false;
}

/* The processor is asked once much comes at once; what it says is what the compiler's runtime says. */
static void test_features(void)
{
    static uint8_t data[SHA3_ASK_BLOCKS * SHA3_256_RATE];
    struct sha3_256 h;
    char got[40], wanted[40];
    sha3_256_init(&h, 0);
    sha3_256_update(&h, data, sizeof data - 1);
    unsigned before = h.features;
    sha3_256_init(&h, 0);
    sha3_256_update(&h, data, sizeof data);
    snprintf(got, sizeof got, "%u %u", before, h.features);
    snprintf(wanted, sizeof wanted, "0 %u", SHA3_ASKED |
             (__builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") ? SHA3_BMI2 : 0u) |
             (__builtin_cpu_supports("avx2") ? SHA3_AVX2 : 0u) |
             (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") ? SHA3_AVX512 : 0u));
    CHECK_STR(got, wanted);
}
#endif

static void test_single(void)
{
    for (size_t blocks = 0; blocks <= 5; blocks++) {
        check_lanes(absorb_best, 17, blocks);
#if defined(__x86_64__)
        if (features & SHA3_BMI2)
            check_lanes(absorb_bmi2, 17, blocks);
#endif
    }
}

/* A byte read past the input is a fault here. */
static void test_last_page(void)
{
    uint8_t *end = guarded_end(), copy[600];
    char wanted[65];
    for (size_t n = 0; n <= sizeof copy; n++) {
        pattern(copy, n);
        pattern(end - n, n);
        strcpy(wanted, hash_by(copy, n, 1));
        CHECK_STR(hash_by(end - n, n, 600), wanted);
    }
    struct sha3_256 h[8], *ctx[8];
    const uint8_t *data[8];
    for (unsigned n = 1; n <= 8; n++) {
        for (unsigned i = 0; i < n; i++) {
            sha3_256_init(&h[i], features);
            ctx[i] = &h[i];
            data[i] = end - 2 * SHA3_256_RATE;
        }
        sha3_256_absorb_lanes(ctx, data, 2, n);
        CHECK_STR(memcmp(h[0].a, h[n - 1].a, sizeof h[0].a) ? "differ" : "same", "same");
    }
}

int main(void)
{
    test_standard();
    features = sha3_features();
    test_standard();
    test_lengths();
    test_splits();
    test_single();
    test_lanes();
#if defined(__x86_64__)
    test_lesser_processors();
    test_features();
    test_cpuid();
#endif
    test_last_page();
#if defined(__x86_64__)
    if (sha3_256_lanes(features) < 8)
        printf("skipped: no AVX-512 here%s\n", sha3_256_lanes(features) < 4 ? ", nor AVX2" : "");
#endif
    return closing();
}
