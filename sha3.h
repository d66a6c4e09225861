/* SHA3-256 (FIPS 202): one stream, or several streams of equal pace side by side.
 *
 *     struct sha3_256 h;
 *     sha3_256_init(&h, 0);                     or sha3_features(), once asked for many hashes
 *     sha3_256_update(&h, data, len);           any number of times; whole blocks are absorbed from the caller's memory
 *     sha3_256_final(&h, out);                  32 bytes; init again before the next use
 *
 * The rounds are written once, as macros over a lane type T.  T is uint64_t for one stream, and a vector of 4 or 8
 * such lanes for as many streams; the compiler does the rest.  The processor is asked at run time, but not for a few
 * blocks: CPUID costs a virtual machine as much as some hundred of them.
 */
#ifndef SHA3_X86
#if defined(__x86_64__) && defined(__GNUC__)
#define SHA3_X86 1
#else
#define SHA3_X86 0
#endif
#endif
#if SHA3_X86
#include <cpuid.h>
#endif
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { SHA3_256_RATE = 136, SHA3_256_RATE_LANES = SHA3_256_RATE / 8 }; /* FIPS 202 6.1: r = 1600 - 2 * 256 bits */

/* What the processor has for the permutation; SHA3_ASKED alone: nothing. */
enum { SHA3_ASKED = 1, SHA3_BMI2 = 2, SHA3_AVX2 = 4, SHA3_AVX512 = 8 };
#ifndef SHA3_ALLOWED
#define SHA3_ALLOWED (~0u)       /* fewer of them, for builds that compare */
#endif

enum { SHA3_ASK_BLOCKS = 256 };  /* so much at once, and asking pays */

/* Lane (x, y) of the state stands in a[x + 5y].  pos: bytes absorbed into the current block, < 136.  features: 0 if the
 * processor has not been asked. */
struct sha3_256 {
    uint64_t a[25];
    unsigned pos, features;
};

static const uint64_t sha3_RC[24] = { /* FIPS 202 3.2.5, the constants of iota */
    0x0000000000000001, 0x0000000000008082, 0x800000000000808a, 0x8000000080008000, 0x000000000000808b,
    0x0000000080000001, 0x8000000080008081, 0x8000000000008009, 0x000000000000008a, 0x0000000000000088,
    0x0000000080008009, 0x000000008000000a, 0x000000008000808b, 0x800000000000008b, 0x8000000000008089,
    0x8000000000008003, 0x8000000000008002, 0x8000000000000080, 0x000000000000800a, 0x800000008000000a,
    0x8000000080008081, 0x8000000000008080, 0x0000000080000001, 0x8000000080008008,
};

/* ---- The round: E = iota(chi(pi(rho(theta(A))))), A and E being arrays of 25 lanes of type T ---- */

#define SHA3_ROL(v, n) ((v) << (n) | (v) >> (64 - (n)))
#define SHA3_PARITY(A, x) ((A)[x] ^ (A)[(x) + 5] ^ (A)[(x) + 10] ^ (A)[(x) + 15] ^ (A)[(x) + 20])

/* One lane after theta, before rho. */
#define SHA3_THETA(A, i) ((A)[i] ^ d[(i) % 5])

/* Row y of E, its five lanes b0..b4 given after pi. */
#define SHA3_CHI(E, y, b0, b1, b2, b3, b4) do { \
        const T p0 = b0, p1 = b1, p2 = b2, p3 = b3, p4 = b4; \
        (E)[5 * (y) + 0] = p0 ^ (~p1 & p2); \
        (E)[5 * (y) + 1] = p1 ^ (~p2 & p3); \
        (E)[5 * (y) + 2] = p2 ^ (~p3 & p4); \
        (E)[5 * (y) + 3] = p3 ^ (~p4 & p0); \
        (E)[5 * (y) + 4] = p4 ^ (~p0 & p1); \
    } while (0)

/* Lane i of A after theta, rotated by rho's offset n. */
#define SHA3_RHO(A, i, n) SHA3_ROL(SHA3_THETA(A, i), n)

#define SHA3_ROUND(A, E, rc) do { \
        const T c0 = SHA3_PARITY(A, 0), c1 = SHA3_PARITY(A, 1), c2 = SHA3_PARITY(A, 2), \
                c3 = SHA3_PARITY(A, 3), c4 = SHA3_PARITY(A, 4); \
        const T d[5] = { c4 ^ SHA3_ROL(c1, 1), c0 ^ SHA3_ROL(c2, 1), c1 ^ SHA3_ROL(c3, 1), \
                         c2 ^ SHA3_ROL(c4, 1), c3 ^ SHA3_ROL(c0, 1) }; \
        SHA3_CHI(E, 0, SHA3_THETA(A, 0), SHA3_RHO(A, 6, 44), SHA3_RHO(A, 12, 43), SHA3_RHO(A, 18, 21), \
                 SHA3_RHO(A, 24, 14)); \
        SHA3_CHI(E, 1, SHA3_RHO(A, 3, 28), SHA3_RHO(A, 9, 20), SHA3_RHO(A, 10, 3), SHA3_RHO(A, 16, 45), \
                 SHA3_RHO(A, 22, 61)); \
        SHA3_CHI(E, 2, SHA3_RHO(A, 1, 1), SHA3_RHO(A, 7, 6), SHA3_RHO(A, 13, 25), SHA3_RHO(A, 19, 8), \
                 SHA3_RHO(A, 20, 18)); \
        SHA3_CHI(E, 3, SHA3_RHO(A, 4, 27), SHA3_RHO(A, 5, 36), SHA3_RHO(A, 11, 10), SHA3_RHO(A, 17, 15), \
                 SHA3_RHO(A, 23, 56)); \
        SHA3_CHI(E, 4, SHA3_RHO(A, 2, 62), SHA3_RHO(A, 8, 55), SHA3_RHO(A, 14, 39), SHA3_RHO(A, 15, 41), \
                 SHA3_RHO(A, 21, 2)); \
        (E)[0] ^= (rc); /* iota */ \
    } while (0)

/* Keccak-f[1600] of a; e is room for every other round. */
#define SHA3_KECCAK_F(a, e) do { \
        for (int round = 0; round < 24; round += 2) { \
            SHA3_ROUND(a, e, sha3_RC[round]); \
            SHA3_ROUND(e, a, sha3_RC[round + 1]); \
        } \
    } while (0)

/* ---- One stream ---- */

#if defined(__GNUC__)
#define SHA3_INLINE inline __attribute__((always_inline)) /* into callers of another target, to be compiled for it */
#else
#define SHA3_INLINE inline
#endif

/* The lane in eight bytes of any alignment, least significant first (FIPS 202 B.1). */
static SHA3_INLINE uint64_t sha3_lane(const uint8_t *p)
{
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
#else
    uint64_t v = 0;
    for (int i = 7; i >= 0; i--)
        v = v << 8 | p[i];
    return v;
#endif
}

static SHA3_INLINE void sha3_absorb_body(struct sha3_256 *h, const uint8_t *p, size_t blocks)
{
    typedef uint64_t T;
    T a[25], e[25];
    memcpy(a, h->a, sizeof a);
    for (; blocks; blocks--, p += SHA3_256_RATE) {
        for (int i = 0; i < SHA3_256_RATE_LANES; i++)
            a[i] ^= sha3_lane(p + 8 * i);
        SHA3_KECCAK_F(a, e);
    }
    memcpy(h->a, a, sizeof a);
}

static void sha3_absorb_portable(struct sha3_256 *h, const uint8_t *p, size_t blocks)
{
    sha3_absorb_body(h, p, blocks);
}

#if SHA3_X86
/* ANDN saves chi a copy per lane, RORX saves rho one. */
__attribute__((target("bmi,bmi2"))) static void sha3_absorb_bmi2(struct sha3_256 *h, const uint8_t *p, size_t blocks)
{
    sha3_absorb_body(h, p, blocks);
}

/* ---- Several streams ---- */

#define SHA3_2(f) f(0), f(1)
#define SHA3_4(f) SHA3_2(f), f(2), f(3)
#define SHA3_8(f) SHA3_4(f), f(4), f(5), f(6), f(7)
#define SHA3_STATE_LANE(j) h[j]->a[i]
#define SHA3_INPUT_LANE(j) sha3_lane(p[j] + 8 * i)

/* Absorbs `blocks` blocks into each of n <= N states.  Places past n repeat the last stream, which does no harm. */
#define SHA3_ABSORB_N(name, N, each, features) \
    __attribute__((target(features))) static void name(struct sha3_256 *const ctx[], const uint8_t *const data[], \
                                                       size_t blocks, unsigned n) \
    { \
        typedef uint64_t T __attribute__((vector_size(8 * (N)))); \
        T a[25], e[25]; \
        struct sha3_256 *h[N]; \
        const uint8_t *p[N]; \
        for (unsigned j = 0; j < (N); j++) { \
            h[j] = ctx[j < n ? j : n - 1]; \
            p[j] = data[j < n ? j : n - 1]; \
        } \
        for (int i = 0; i < 25; i++) \
            a[i] = (T){ each(SHA3_STATE_LANE) }; \
        for (; blocks; blocks--) { \
            for (int i = 0; i < SHA3_256_RATE_LANES; i++) \
                a[i] ^= (T){ each(SHA3_INPUT_LANE) }; \
            for (unsigned j = 0; j < (N); j++) \
                p[j] += SHA3_256_RATE; \
            SHA3_KECCAK_F(a, e); \
        } \
        for (int i = 0; i < 25; i++) \
            for (unsigned j = 0; j < (N); j++) \
                h[j]->a[i] = a[i][j]; \
    }

SHA3_ABSORB_N(sha3_absorb_4_avx2, 4, SHA3_4, "avx2")
/* AVX-512 has rotation and three-operand logic: even one stream alone, in both halves, beats the way of BMI2. */
SHA3_ABSORB_N(sha3_absorb_2_avx512, 2, SHA3_2, "avx512f,avx512vl")
SHA3_ABSORB_N(sha3_absorb_4_avx512, 4, SHA3_4, "avx512f,avx512vl")
SHA3_ABSORB_N(sha3_absorb_8_avx512, 8, SHA3_8, "avx512f,avx512vl")
#endif

/* Asks the processor, and whether the system keeps the wide registers (Intel SDM volume 1, 14.3 and 15.2). */
static unsigned sha3_features(void)
{
    unsigned found = SHA3_ASKED;
#if SHA3_X86
    unsigned a, b, c, d, kept = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return found;
    found |= (b & bit_BMI) && (b & bit_BMI2) ? SHA3_BMI2 : 0u;
    __cpuid(1, a, d, c, d);
    if (c & bit_OSXSAVE)
        __asm__("xgetbv" : "=a"(kept), "=d"(d) : "c"(0));
    found |= (kept & 0x06) == 0x06 && (b & bit_AVX2) ? SHA3_AVX2 : 0u;
    found |= (kept & 0xe6) == 0xe6 && (b & bit_AVX512F) && (b & bit_AVX512VL) ? SHA3_AVX512 : 0u;
#endif
    return found & (SHA3_ALLOWED | SHA3_ASKED);
}

/* How many streams are best absorbed at once with these features. */
static unsigned sha3_256_lanes(unsigned features)
{
    return features & SHA3_AVX512 ? 8 : features & SHA3_AVX2 ? 4 : 1;
}

/* Absorbs whole blocks of one stream with the fastest permutation that the features give. */
static void sha3_absorb(struct sha3_256 *h, const uint8_t *p, size_t blocks)
{
    if (!h->features && blocks >= SHA3_ASK_BLOCKS)
        h->features = sha3_features();
#if SHA3_X86
    if (h->features & SHA3_AVX512) {
        sha3_absorb_2_avx512(&h, &p, blocks, 1);
        return;
    }
    if (h->features & SHA3_BMI2) {
        sha3_absorb_bmi2(h, p, blocks);
        return;
    }
#endif
    sha3_absorb_portable(h, p, blocks);
}

/* Absorbs `blocks` whole blocks of data[i] into ctx[i] for each i < n.  Every state stands at pos 0 and has the same
 * features, and none is given twice.  One stream alone, and any number where lanes() is 1, take the way of
 * sha3_256_update. */
static void sha3_256_absorb_lanes(struct sha3_256 *const ctx[], const uint8_t *const data[], size_t blocks, unsigned n)
{
    unsigned width = n ? sha3_256_lanes(ctx[0]->features) : 1;
    for (unsigned i = 0, some; i < n; i += some) {
        some = n - i < width ? n - i : width;
        if (some == 1)
            sha3_absorb(ctx[i], data[i], blocks);
#if SHA3_X86
        else if (width == 4)
            sha3_absorb_4_avx2(ctx + i, data + i, blocks, some);
        else if (some == 2)
            sha3_absorb_2_avx512(ctx + i, data + i, blocks, some);
        else if (some <= 4)
            sha3_absorb_4_avx512(ctx + i, data + i, blocks, some);
        else
            sha3_absorb_8_avx512(ctx + i, data + i, blocks, some);
#endif
    }
}

/* ---- The hash ---- */

/* features: those of the processor, or 0, to ask when much comes at once. */
static void sha3_256_init(struct sha3_256 *h, unsigned features)
{
    *h = (struct sha3_256){ .features = features };
}

/* Adds one byte at pos, without a permutation. */
static void sha3_add_byte(struct sha3_256 *h, unsigned pos, uint8_t byte)
{
    h->a[pos / 8] ^= (uint64_t)byte << 8 * (pos % 8);
}

/* The permutation alone is the absorption of a block of zeros. */
static void sha3_permute(struct sha3_256 *h)
{
    static const uint8_t zeros[SHA3_256_RATE];
    sha3_absorb(h, zeros, 1);
    h->pos = 0;
}

/* Absorbs n bytes; data may be NULL when n is 0. */
static void sha3_256_update(struct sha3_256 *h, const void *data, size_t n)
{
    const uint8_t *p = data;
    while (n) {
        if (h->pos == 0 && n >= SHA3_256_RATE) {
            size_t blocks = n / SHA3_256_RATE;
            sha3_absorb(h, p, blocks);
            p += blocks * SHA3_256_RATE;
            n -= blocks * SHA3_256_RATE;
            continue;
        }
        for (; n && h->pos < SHA3_256_RATE; n--)
            sha3_add_byte(h, h->pos++, *p++);
        if (h->pos == SHA3_256_RATE)
            sha3_permute(h);
    }
}

/* Pads with the suffix 01 and pad10*1 (FIPS 202 6.1, 5.1) and squeezes the 32 bytes.  h is used up. */
static void sha3_256_final(struct sha3_256 *h, uint8_t out[32])
{
    sha3_add_byte(h, h->pos, 0x06);
    sha3_add_byte(h, SHA3_256_RATE - 1, 0x80);
    sha3_permute(h);
    for (unsigned i = 0; i < 32; i++)
        out[i] = (uint8_t)(h->a[i / 8] >> 8 * (i % 8));
}
