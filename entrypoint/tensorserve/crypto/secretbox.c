/* XSalsa20-Poly1305 (libsodium's secretbox) for processors with AVX-512 IFMA.
 *
 * With libsodium, decryption is most of the processor time of an encrypted load. Here Salsa20 and Poly1305
 * each process 16 blocks at once. A whole chunk (box) is opened in two passes: the tag is compared before
 * anything is written. A chunk can also be opened in strips, in any order, each as soon as it has arrived and
 * while it is in the processor's cache; box_check then validates the tag of all strips together. On other
 * processors box_supported() returns 0, and the caller uses libsodium.
 *
 * Sources: Bernstein, "The Salsa20 family of stream ciphers", "Extending the Salsa20 nonce", and "The
 * Poly1305-AES message-authentication code"; radix 2^44 for IFMA after Gueron and Krasnov,
 * "Fast prime field elliptic-curve cryptography with 256-bit primes" (vectorised multiply-add of 52 bits).
 * No branch and no address depends on a secret.
 */

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef unsigned __int128 u128;

#define EXPORTED __attribute__((visibility("default")))
#define VECTOR __attribute__((target("avx512f,avx512ifma,bmi2")))
#define LANES 16 /* blocks at once, of either primitive */
#define CACHED 16384 /* bytes of a strip that are hashed and then decrypted; a multiple of 1,024 */
#define SALSA_BLOCK 64
#define POLY_BLOCK 16

static const uint32_t SIGMA[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574}; /* "expand 32-byte k" */

EXPORTED int box_supported(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512ifma") &&
           __builtin_cpu_supports("bmi2");
}

/* Salsa20 ------------------------------------------------------------------------------------------ */

static uint32_t load32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

static uint64_t load64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

/* Salsa20's initial matrix from a key and 16 bytes (nonce and counter, or HSalsa20's input). */
static void salsa_matrix(uint32_t x[16], const uint8_t key[32], const uint8_t in[16])
{
    for (int i = 0; i < 4; i++) {
        x[5 * i] = SIGMA[i];
        x[1 + i] = load32(key + 4 * i);
        x[6 + i] = load32(in + 4 * i);
        x[11 + i] = load32(key + 16 + 4 * i);
    }
}

#define QUARTER(a, b, c, d)                                                                              \
    b = XOR(b, ROTATE(ADD(a, d), 7));                                                                    \
    c = XOR(c, ROTATE(ADD(b, a), 9));                                                                    \
    d = XOR(d, ROTATE(ADD(c, b), 13));                                                                   \
    a = XOR(a, ROTATE(ADD(d, c), 18))

#define DOUBLE_ROUND(x)                                                                                  \
    QUARTER(x[0], x[4], x[8], x[12]);                                                                    \
    QUARTER(x[5], x[9], x[13], x[1]);                                                                    \
    QUARTER(x[10], x[14], x[2], x[6]);                                                                   \
    QUARTER(x[15], x[3], x[7], x[11]);                                                                   \
    QUARTER(x[0], x[1], x[2], x[3]);                                                                     \
    QUARTER(x[5], x[6], x[7], x[4]);                                                                     \
    QUARTER(x[10], x[11], x[8], x[9]);                                                                   \
    QUARTER(x[15], x[12], x[13], x[14])

#define XOR(a, b) ((a) ^ (b))
#define ADD(a, b) ((a) + (b))
#define ROTATE(a, n) (((a) << (n)) | ((a) >> (32 - (n))))

static void salsa_rounds(uint32_t x[16])
{
    for (int i = 0; i < 10; i++) {
        DOUBLE_ROUND(x);
    }
}

#undef XOR
#undef ADD
#undef ROTATE

static void hsalsa20(uint8_t subkey[32], const uint8_t key[32], const uint8_t in[16])
{
    static const int taken[8] = {0, 5, 10, 15, 6, 7, 8, 9};
    uint32_t x[16];
    salsa_matrix(x, key, in);
    salsa_rounds(x);
    for (int i = 0; i < 8; i++) {
        memcpy(subkey + 4 * i, &x[taken[i]], 4);
    }
}

static void salsa_block_at(uint8_t out[SALSA_BLOCK], const uint32_t matrix[16], uint64_t counter)
{
    uint32_t start[16], x[16];
    memcpy(start, matrix, sizeof start);
    start[8] = (uint32_t)counter;
    start[9] = (uint32_t)(counter >> 32);
    memcpy(x, start, sizeof x);
    salsa_rounds(x);
    for (int i = 0; i < 16; i++) {
        x[i] += start[i];
    }
    memcpy(out, x, SALSA_BLOCK);
}

#define XOR _mm512_xor_si512
#define ADD _mm512_add_epi32
#define ROTATE _mm512_rol_epi32

/* XORs `in` with 16 blocks of key stream, from `counter` on. Each register holds one word of the matrix for
 * all 16 blocks; a transposition turns them into blocks. */
VECTOR static inline void salsa_xor_16(uint8_t *out, const uint8_t *in, const uint32_t matrix[16],
                                       uint64_t counter)
{
    __m512i x[16], start[16], t[16];
    for (int i = 0; i < 16; i++) {
        start[i] = _mm512_set1_epi32((int)matrix[i]);
    }
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    start[8] = ADD(_mm512_set1_epi32((int)(uint32_t)counter), lane);
    const __mmask16 carried = _mm512_cmplt_epu32_mask(start[8], lane);
    start[9] = _mm512_set1_epi32((int)(uint32_t)(counter >> 32));
    start[9] = _mm512_mask_add_epi32(start[9], carried, start[9], _mm512_set1_epi32(1));
    for (int i = 0; i < 16; i++) {
        x[i] = start[i];
    }
    for (int i = 0; i < 10; i++) {
        DOUBLE_ROUND(x);
    }
    for (int i = 0; i < 16; i++) {
        x[i] = ADD(x[i], start[i]);
    }
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    /* x[4 q + b] holds words 4 q to 4 q + 3 of blocks b, b + 4, b + 8, b + 12. */
    for (int b = 0; b < 4; b++) {
        const __m512i low = _mm512_shuffle_i32x4(x[b], x[b + 4], 0x88);   /* blocks b, b + 8 */
        const __m512i high = _mm512_shuffle_i32x4(x[b], x[b + 4], 0xdd);  /* blocks b + 4, b + 12 */
        const __m512i low2 = _mm512_shuffle_i32x4(x[b + 8], x[b + 12], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(x[b + 8], x[b + 12], 0xdd);
        t[b] = _mm512_shuffle_i32x4(low, low2, 0x88);
        t[b + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        t[b + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
        t[b + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
    for (int i = 0; i < 16; i++) {
        const __m512i data = _mm512_loadu_si512(in + SALSA_BLOCK * i);
        _mm512_storeu_si512(out + SALSA_BLOCK * i, XOR(data, t[i]));
    }
}

#undef XOR
#undef ADD
#undef ROTATE

VECTOR static void salsa_xor(uint8_t *out, const uint8_t *in, size_t length, const uint32_t matrix[16],
                             uint64_t counter)
{
    const size_t step = LANES * SALSA_BLOCK;
    for (; length >= step; length -= step, in += step, out += step, counter += LANES) {
        salsa_xor_16(out, in, matrix, counter);
    }
    if (length) {
        uint8_t last[LANES * SALSA_BLOCK];
        memcpy(last, in, length);
        salsa_xor_16(last, last, matrix, counter);
        memcpy(out, last, length);
    }
}

/* Poly1305: numbers below 2^132 or so in three limbs of 44 bits; 2^132 = 20 (mod 2^130 - 5). ------------ */

#define MASK44 0xfffffffffffull
#define WRAP 20

typedef struct {
    uint64_t v[3];
} number;

static number carried(u128 d0, u128 d1, u128 d2)
{
    number n;
    uint64_t carry = (uint64_t)(d0 >> 44);
    n.v[0] = (uint64_t)d0 & MASK44;
    d1 += carry;
    carry = (uint64_t)(d1 >> 44);
    n.v[1] = (uint64_t)d1 & MASK44;
    d2 += carry;
    carry = (uint64_t)(d2 >> 44);
    n.v[2] = (uint64_t)d2 & MASK44;
    n.v[0] += carry * WRAP;
    n.v[1] += n.v[0] >> 44;
    n.v[0] &= MASK44;
    return n;
}

static number multiply(number a, number b)
{
    const uint64_t wrapped1 = b.v[1] * WRAP, wrapped2 = b.v[2] * WRAP;
    return carried((u128)a.v[0] * b.v[0] + (u128)a.v[1] * wrapped2 + (u128)a.v[2] * wrapped1,
                   (u128)a.v[0] * b.v[1] + (u128)a.v[1] * b.v[0] + (u128)a.v[2] * wrapped2,
                   (u128)a.v[0] * b.v[2] + (u128)a.v[1] * b.v[1] + (u128)a.v[2] * b.v[0]);
}

/* h + the block as a number; `top` is its bit 128. */
static number plus_block(number h, const uint8_t block[POLY_BLOCK], uint64_t top)
{
    const uint64_t low = load64(block), high = load64(block + 8);
    h.v[0] += low & MASK44;
    h.v[1] += ((low >> 44) | (high << 20)) & MASK44;
    h.v[2] += (high >> 24) | (top << 40);
    return h;
}

VECTOR static inline void limbs_of_8(__m512i m[3], const uint8_t *in)
{
    const __m512i mask = _mm512_set1_epi64((long long)MASK44);
    const __m512i a = _mm512_loadu_si512(in), b = _mm512_loadu_si512(in + 64);
    /* Blocks 0 4 1 5 2 6 3 7. */
    const __m512i low = _mm512_unpacklo_epi64(a, b), high = _mm512_unpackhi_epi64(a, b);
    m[0] = _mm512_and_si512(low, mask);
    m[1] = _mm512_and_si512(
        _mm512_or_si512(_mm512_srli_epi64(low, 44), _mm512_slli_epi64(high, 20)), mask);
    m[2] = _mm512_or_si512(_mm512_srli_epi64(high, 24), _mm512_set1_epi64(1ll << 40));
}

/* h = h r in each lane. The limbs of h are below 2^47 before and below 2^45 after, so that every factor fits
 * the 52 bits that the instruction reads. */
VECTOR static inline void multiply_8(__m512i h[3], const __m512i r[3], const __m512i wrapped[3])
{
    const __m512i zero = _mm512_setzero_si512(), mask = _mm512_set1_epi64((long long)MASK44);
    __m512i low[3], high[3];
#define LOW(s, a, b) _mm512_madd52lo_epu64(s, a, b)
#define HIGH(s, a, b) _mm512_madd52hi_epu64(s, a, b)
    low[0] = LOW(LOW(LOW(zero, h[0], r[0]), h[1], wrapped[2]), h[2], wrapped[1]);
    high[0] = HIGH(HIGH(HIGH(zero, h[0], r[0]), h[1], wrapped[2]), h[2], wrapped[1]);
    low[1] = LOW(LOW(LOW(zero, h[0], r[1]), h[1], r[0]), h[2], wrapped[2]);
    high[1] = HIGH(HIGH(HIGH(zero, h[0], r[1]), h[1], r[0]), h[2], wrapped[2]);
    low[2] = LOW(LOW(LOW(zero, h[0], r[2]), h[1], r[1]), h[2], r[0]);
    high[2] = HIGH(HIGH(HIGH(zero, h[0], r[2]), h[1], r[1]), h[2], r[0]);
#undef LOW
#undef HIGH
    /* A high half has the weight 2^52, which is 2^8 in the next limb; from the last limb, it is 20 * 2^8 in
     * the first. */
    low[1] = _mm512_add_epi64(low[1], _mm512_slli_epi64(high[0], 8));
    low[2] = _mm512_add_epi64(low[2], _mm512_slli_epi64(high[1], 8));
    low[0] = _mm512_add_epi64(
        low[0], _mm512_add_epi64(_mm512_slli_epi64(high[2], 12), _mm512_slli_epi64(high[2], 10)));
    const __m512i c0 = _mm512_srli_epi64(low[0], 44), c1 = _mm512_srli_epi64(low[1], 44),
                  c2 = _mm512_srli_epi64(low[2], 44);
    const __m512i wrapped_c2 = _mm512_add_epi64(_mm512_slli_epi64(c2, 4), _mm512_slli_epi64(c2, 2));
    h[0] = _mm512_add_epi64(_mm512_and_si512(low[0], mask), wrapped_c2);
    h[1] = _mm512_add_epi64(_mm512_and_si512(low[1], mask), c0);
    h[2] = _mm512_add_epi64(_mm512_and_si512(low[2], mask), c1);
}

/* The hash of `length` bytes, a multiple of 256, as a number: 16 parallel sums, each of every 16th block,
 * multiplied by r^16 at each step. */
VECTOR static number poly_bulk(const uint8_t *in, size_t length, const number power[LANES + 1])
{
    __m512i a[3], b[3], m[3], r[3], wrapped[3];
    for (int i = 0; i < 3; i++) {
        r[i] = _mm512_set1_epi64((long long)power[LANES].v[i]);
        wrapped[i] = _mm512_set1_epi64((long long)(power[LANES].v[i] * WRAP));
        a[i] = b[i] = _mm512_setzero_si512();
    }
    for (; length; length -= LANES * POLY_BLOCK, in += LANES * POLY_BLOCK) {
        multiply_8(a, r, wrapped);
        multiply_8(b, r, wrapped);
        limbs_of_8(m, in);
        for (int i = 0; i < 3; i++) {
            a[i] = _mm512_add_epi64(a[i], m[i]);
        }
        limbs_of_8(m, in + 8 * POLY_BLOCK);
        for (int i = 0; i < 3; i++) {
            b[i] = _mm512_add_epi64(b[i], m[i]);
        }
    }
    /* Block k of the last 16 has the factor r^(16 - k). */
    static const int block[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    number sum = {{0, 0, 0}};
    for (int half = 0; half < 2; half++) {
        uint64_t limb[3][8];
        for (int i = 0; i < 3; i++) {
            _mm512_storeu_si512(limb[i], half ? b[i] : a[i]);
        }
        for (int lane = 0; lane < 8; lane++) {
            const number h = {{limb[0][lane], limb[1][lane], limb[2][lane]}};
            const number part = multiply(h, power[LANES - 8 * half - block[lane]]);
            for (int i = 0; i < 3; i++) {
                sum.v[i] += part.v[i];
            }
        }
    }
    return carried(sum.v[0], sum.v[1], sum.v[2]);
}

/* r^1 to r^16. */
static void poly_powers(number power[LANES + 1], const uint8_t key[32])
{
    const uint64_t r_low = load64(key) & 0x0ffffffc0fffffffull, r_high = load64(key + 8) & 0x0ffffffc0ffffffcull;
    power[1].v[0] = r_low & MASK44;
    power[1].v[1] = ((r_low >> 44) | (r_high << 20)) & MASK44;
    power[1].v[2] = r_high >> 24;
    for (int i = 2; i <= LANES; i++) {
        power[i] = multiply(power[i - 1], power[1]);
    }
}

/* h r^n + tail: the hash `h` continued over n blocks, whose own hash from zero is `tail`. */
static number advanced(number h, number r, uint64_t n, number tail)
{
    for (; n; n >>= 1, r = multiply(r, r)) {
        if (n & 1) {
            h = multiply(h, r);
        }
    }
    return carried((u128)h.v[0] + tail.v[0], (u128)h.v[1] + tail.v[1], (u128)h.v[2] + tail.v[2]);
}

/* Continues the hash `h` over `in`: a multiple of 16 bytes, or the end of the box. */
static number poly_update(number h, const uint8_t *in, size_t length, const number power[LANES + 1])
{
    const size_t bulk = length - length % (LANES * POLY_BLOCK);
    if (bulk) {
        h = advanced(h, power[LANES], bulk / (LANES * POLY_BLOCK), poly_bulk(in, bulk, power));
        in += bulk;
        length -= bulk;
    }
    for (; length >= POLY_BLOCK; length -= POLY_BLOCK, in += POLY_BLOCK) {
        h = multiply(plus_block(h, in, 1), power[1]);
    }
    if (length) {
        uint8_t last[POLY_BLOCK] = {0};
        memcpy(last, in, length);
        last[length] = 1;
        h = multiply(plus_block(h, last, 0), power[1]);
    }
    return h;
}

/* The tag from a hash and the one-time key. */
static void poly_finish(uint8_t tag[16], number h, const uint8_t key[32])
{
    /* Below 2^132, then below 2^130 + a little, then mod p. */
    h = carried(h.v[0], h.v[1], h.v[2]);
    h = carried(h.v[0] + 5 * (h.v[2] >> 42), h.v[1], h.v[2] & (MASK44 >> 2));
    h = carried(h.v[0] + 5 * (h.v[2] >> 42), h.v[1], h.v[2] & (MASK44 >> 2));
    /* h - p = h + 5 - 2^130, taken where it is not negative. */
    const uint64_t g0 = h.v[0] + 5, g1 = h.v[1] + (g0 >> 44), g2 = h.v[2] + (g1 >> 44);
    const uint64_t taken = 0 - (g2 >> 42);
    h.v[0] = (h.v[0] & ~taken) | (g0 & MASK44 & taken);
    h.v[1] = (h.v[1] & ~taken) | (g1 & MASK44 & taken);
    h.v[2] = (h.v[2] & ~taken) | (g2 & (MASK44 >> 2) & taken);
    u128 sum = (u128)(h.v[0] | (h.v[1] << 44)) + load64(key + 16);
    const uint64_t low = (uint64_t)sum;
    const uint64_t high =
        ((h.v[1] >> 20) | (h.v[2] << 24)) + load64(key + 24) + (uint64_t)(sum >> 64);
    memcpy(tag, &low, 8);
    memcpy(tag + 8, &high, 8);
}

/* secretbox ---------------------------------------------------------------------------------------- */

typedef struct {
    uint32_t matrix[16];
    uint8_t first[SALSA_BLOCK]; /* 32 bytes of Poly1305's key, 32 bytes of key stream */
} box;

EXPORTED void box_begin(box *b, const uint8_t nonce[24], const uint8_t key[32])
{
    uint8_t subkey[32], in[16] = {0};
    hsalsa20(subkey, key, nonce);
    memcpy(in, nonce + 16, 8);
    salsa_matrix(b->matrix, subkey, in);
    salsa_block_at(b->first, b->matrix, 0);
}

/* XORs bytes of the box from `offset` on, a multiple of 64. The first 32 bytes of the key stream are
 * Poly1305's key, so that the data begins in the middle of a block. */
static void box_xor(const box *b, uint8_t *out, const uint8_t *in, uint64_t offset, size_t length)
{
    const size_t head = length < 32 ? length : 32;
    const uint64_t counter = offset / SALSA_BLOCK;
    uint8_t block[SALSA_BLOCK];
    salsa_block_at(block, b->matrix, counter);
    for (size_t i = 0; i < head; i++) {
        out[i] = in[i] ^ block[32 + i];
    }
    salsa_xor(out + head, in + head, length - head, b->matrix, counter + 1);
}

static void box_tag(const box *b, uint8_t tag[16], const uint8_t *in, size_t length)
{
    number power[LANES + 1], h = {{0, 0, 0}};
    poly_powers(power, b->first);
    poly_finish(tag, poly_update(h, in, length, power), b->first);
}

static int differ(const uint8_t a[16], const uint8_t b[16])
{
    uint8_t bits = 0;
    for (int i = 0; i < 16; i++) {
        bits |= a[i] ^ b[i];
    }
    return bits ? -1 : 0;
}

/* Returns 0, or -1 if the tag is not valid; `out` is unchanged then. `out` may be `in`. */
EXPORTED int box_open(uint8_t *out, const uint8_t *in, const uint8_t tag[16], uint64_t length,
             const uint8_t nonce[24], const uint8_t key[32])
{
    box b;
    uint8_t found[16];
    box_begin(&b, nonce, key);
    box_tag(&b, found, in, length);
    if (differ(found, tag)) {
        return -1;
    }
    box_xor(&b, out, in, 0, length);
    return 0;
}

/* `out` may be `in`. */
EXPORTED void box_seal(uint8_t *out, uint8_t tag[16], const uint8_t *in, uint64_t length, const uint8_t nonce[24],
              const uint8_t key[32])
{
    box b;
    box_begin(&b, nonce, key);
    box_xor(&b, out, in, 0, length);
    box_tag(&b, tag, out, length);
}

/* Opens `length` bytes of the box from `offset` on. Both are multiples of 64, except for `length` at the box's
 * end. `hash` is an input of box_check; `out` must not be used before box_check returned 0. `out` may be `in`. */
EXPORTED void box_open_strip(const box *b, uint64_t hash[3], uint8_t *out, const uint8_t *in, uint64_t offset,
                             uint64_t length)
{
    number power[LANES + 1], h = {{0, 0, 0}};
    poly_powers(power, b->first);
    while (length) {
        /* The hashed bytes are still in the first-level cache when they are decrypted. */
        const size_t step = length < CACHED ? length : CACHED;
        h = poly_update(h, in, step, power);
        box_xor(b, out, in, offset, step);
        in += step;
        out += step;
        offset += step;
        length -= step;
    }
    memcpy(hash, h.v, sizeof h.v);
}

/* Returns 0 if the tag is valid for the `count` strips, given in the order of the box. */
EXPORTED int box_check(const box *b, const uint64_t (*hashes)[3], const uint64_t *lengths, uint64_t count,
                       const uint8_t tag[16])
{
    number power[LANES + 1], h = {{0, 0, 0}};
    uint8_t found[16];
    poly_powers(power, b->first);
    for (uint64_t i = 0; i < count; i++) {
        const number strip = {{hashes[i][0], hashes[i][1], hashes[i][2]}};
        h = advanced(h, power[1], (lengths[i] + POLY_BLOCK - 1) / POLY_BLOCK, strip);
    }
    poly_finish(found, h, b->first);
    return differ(found, tag);
}
