/* Blocks of ggml -> weights, in one pass over memory. Compiled at run time by wan/quant/native.py; blocks.py says the
 * same in torch and is what this file is checked against.
 *
 * Every weight is computed as scale * q + offset in fp32, each step rounded (no contraction), so that the result is bit
 * for bit that of the `gguf` package. Layout of the blocks: ggml-common.h of ggml. The inner loops
 * have constant lengths and one output, of which compilers make vector code.
 */
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define EACH(count) for (int j = 0; j < count; j++)

typedef const uint8_t *restrict bytes;
typedef float *restrict weights;
enum { FP32 = 0, BF16 = 1 };

#ifdef __AVX512BF16__
/* `past`: past the caches, as the product that reads the weights runs on all cores, and what another core has just
 * written comes slower than from memory. */
INLINE void store_32(__m512i rounded, uint16_t *restrict out, int past) {
    if (past)
        _mm512_stream_si512((__m512i *)out, rounded);
    else
        _mm512_storeu_si512(out, rounded);
}

/* To nearest even; subnormal weights would become zero, but no product with an fp16 scale is one. */
INLINE void round_32(__m512 low, __m512 high, uint16_t *restrict out, int past) {
    store_32((__m512i)_mm512_cvtne2ps_pbh(high, low), out, past);
}
#endif

INLINE void round_all(const float *restrict w, int count, uint16_t *restrict out, int past) { /* finite numbers */
#ifdef __AVX512BF16__
    for (int j = 0; j < count; j += 32)
        round_32(_mm512_loadu_ps(w + j), _mm512_loadu_ps(w + j + 16), out + j, past);
#else
    (void)past;
    EACH(count) {
        uint32_t bits;
        memcpy(&bits, w + j, 4);
        out[j] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
#endif
}

INLINE float half(bytes b) { /* finite fp16; 2^112 moves the exponent, which is exact for subnormals too */
    uint32_t h = b[0] | (uint32_t)b[1] << 8;
#ifdef __F16C__
    return _cvtsh_ss(h);
#else
    uint32_t bits = (h & 0x7fff) << 13;
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude *= 0x1p112f;
    return h & 0x8000 ? -magnitude : magnitude;
#endif
}

/* Blocks of 32. In a byte, the low four bits belong to weight j, the high four to weight j + 16. */

INLINE void q4_0(bytes b, weights w) {
    float d = half(b);
    EACH(16) w[j] = d * (float)((b[2 + j] & 15) - 8);
    EACH(16) w[j + 16] = d * (float)((b[2 + j] >> 4) - 8);
}

INLINE void q4_1(bytes b, weights w) {
    float d = half(b), m = half(b + 2);
    EACH(16) w[j] = d * (float)(b[4 + j] & 15) + m;
    EACH(16) w[j + 16] = d * (float)(b[4 + j] >> 4) + m;
}

INLINE uint32_t word(bytes b) {
    uint32_t value;
    memcpy(&value, b, 4);
    return value;
}

INLINE void q5_0(bytes b, weights w) { /* bit j of a word is the fifth bit of weight j */
    float d = half(b);
    uint32_t high = word(b + 2);
    EACH(16) w[j] = d * (float)(((b[6 + j] & 15) | (int)(high >> j & 1) << 4) - 16);
    EACH(16) w[j + 16] = d * (float)(((b[6 + j] >> 4) | (int)(high >> 16 >> j & 1) << 4) - 16);
}

INLINE void q5_1(bytes b, weights w) {
    float d = half(b), m = half(b + 2);
    uint32_t high = word(b + 4);
    EACH(16) w[j] = d * (float)((b[8 + j] & 15) | (int)(high >> j & 1) << 4) + m;
    EACH(16) w[j + 16] = d * (float)((b[8 + j] >> 4) | (int)(high >> 16 >> j & 1) << 4) + m;
}

INLINE void q8_0(bytes b, weights w) {
    float d = half(b);
    EACH(32) w[j] = d * (float)(int8_t)b[2 + j];
}

#ifdef __AVX512BF16__
INLINE void q8_0_bf16(bytes b, uint16_t *restrict out, int past) { /* the same without a detour over memory */
    __m512 d = _mm512_set1_ps(half(b));
    __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(b + 2)));
    __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(b + 18)));
    round_32(_mm512_mul_ps(d, _mm512_cvtepi32_ps(low)), _mm512_mul_ps(d, _mm512_cvtepi32_ps(high)), out, past);
}
#endif

static const int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

INLINE void iq4(bytes b, weights w, float d) { /* codes are places in a table */
    EACH(16) w[j] = d * (float)IQ4_VALUES[b[j] & 15];
    EACH(16) w[j + 16] = d * (float)IQ4_VALUES[b[j] >> 4];
}

INLINE void iq4_nl(bytes b, weights w) { iq4(b + 2, w, half(b)); }

/* Blocks of 256, in groups of 16 or 32 weights with a scale each. */

INLINE void q2_k(bytes b, weights w) {
    float d = half(b + 80), dmin = half(b + 82);
    for (int k = 0; k < 16; k++) {
        bytes q = b + 16 + k / 8 * 32 + k % 2 * 16;
        float scale = d * (float)(b[k] & 15), offset = dmin * (float)(b[k] >> 4);
        EACH(16) w[16 * k + j] = scale * (float)(q[j] >> (k / 2 % 4 * 2) & 3) - offset;
    }
}

INLINE void q3_k(bytes b, weights w) {
    float d = half(b + 108);
    bytes s = b + 96;
    for (int k = 0; k < 16; k++) {
        int low = (k < 8 ? s[k] : s[k - 8] >> 4) & 15, high = s[8 + k % 4] >> (2 * (k / 4)) & 3;
        bytes q = b + 32 + k / 8 * 32 + k % 2 * 16, top = b + k % 2 * 16;
        float scale = d * (float)((low | high << 4) - 32);
        EACH(16) w[16 * k + j] = scale * (float)(((q[j] >> (k / 2 % 4 * 2) & 3) | (top[j] >> (k / 2) & 1) << 2) - 4);
    }
}

/* Scale and minimum of six bits of group k, of Q4_K and Q5_K. */
INLINE void six_bits(bytes s, int k, int *scale, int *minimum) {
    *scale = k < 4 ? s[k] & 63 : (s[k + 4] & 15) | s[k - 4] >> 6 << 4;
    *minimum = k < 4 ? s[k + 4] & 63 : s[k + 4] >> 4 | s[k] >> 6 << 4;
}

INLINE void q4_k(bytes b, weights w) {
    float d = half(b), dmin = half(b + 2);
    for (int k = 0; k < 8; k++) {
        int s, m;
        six_bits(b + 4, k, &s, &m);
        bytes q = b + 16 + k / 2 * 32;
        float scale = d * (float)s, offset = dmin * (float)m;
        EACH(32) w[32 * k + j] = scale * (float)(q[j] >> (k % 2 * 4) & 15) - offset;
    }
}

#ifdef __AVX512BF16__
/* 32 weights of one scale: of 16 values, each computed and rounded once. */
INLINE void four_bits(__m256i codes, float scale, float offset, uint16_t *restrict out, int past) {
    __m512 code = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 values = _mm512_sub_ps(_mm512_mul_ps(_mm512_set1_ps(scale), code), _mm512_set1_ps(offset));
    __m512i table = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(values));
    store_32(_mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), table), out, past);
}

INLINE void q4_k_bf16(bytes b, uint16_t *restrict out, int past) {
    float d = half(b), dmin = half(b + 2);
    __m256i mask = _mm256_set1_epi8(15);
    for (int k = 0; k < 8; k += 2) {
        int s[2], m[2];
        six_bits(b + 4, k, s, m);
        six_bits(b + 4, k + 1, s + 1, m + 1);
        __m256i q = _mm256_loadu_si256((const __m256i *)(b + 16 + k / 2 * 32));
        __m256i low = _mm256_and_si256(q, mask), high = _mm256_and_si256(_mm256_srli_epi16(q, 4), mask);
        four_bits(low, d * (float)s[0], dmin * (float)m[0], out + 32 * k, past);
        four_bits(high, d * (float)s[1], dmin * (float)m[1], out + 32 * k + 32, past);
    }
}
#endif

INLINE void q5_k(bytes b, weights w) {
    float d = half(b), dmin = half(b + 2);
    for (int k = 0; k < 8; k++) {
        int s, m;
        six_bits(b + 4, k, &s, &m);
        bytes q = b + 48 + k / 2 * 32, top = b + 16;
        float scale = d * (float)s, offset = dmin * (float)m;
        EACH(32) w[32 * k + j] = scale * (float)((q[j] >> (k % 2 * 4) & 15) | (top[j] >> k & 1) << 4) - offset;
    }
}

INLINE void q6_k(bytes b, weights w) {
    float d = half(b + 208);
    for (int k = 0; k < 16; k++) {
        bytes low = b + k / 8 * 64 + k / 2 % 2 * 32 + k % 2 * 16, high = b + 128 + k / 8 * 32 + k % 2 * 16;
        float scale = d * (float)(int8_t)b[192 + k];
        EACH(16) {
            int code = (low[j] >> (k / 4 % 2 * 4) & 15) | (high[j] >> (k / 2 % 4 * 2) & 3) << 4;
            w[16 * k + j] = scale * (float)(code - 32);
        }
    }
}

INLINE void iq4_xs(bytes b, weights w) {
    float d = half(b);
    for (int k = 0; k < 8; k++) {
        int low = b[4 + k / 2] >> (k % 2 * 4) & 15, high = b[2 + k / 4] >> (k % 4 * 2) & 3;
        iq4(b + 8 + 16 * k, w + 32 * k, d * (float)((low | high << 4) - 32));
    }
}

#ifdef __SSE2__
#define FETCH(address) _mm_prefetch((const char *)(address), _MM_HINT_T0)
#define FENCE() _mm_sfence()
#else
#define FETCH(address) (void)0
#define FENCE() (void)0
#endif
enum { AHEAD = 4096, LINE = 64, LARGE = 1 << 20 }; /* bytes; the processor itself does not fetch beyond a page of 4 KB */

/* `body` for each block i, shared by the threads. */
#define FOR_BLOCKS(block_weights, block_bytes, body)                                                                   \
    _Pragma("omp parallel") {                                                                                          \
        int past = is_aligned && blocks * block_weights * 2 >= LARGE;                                                  \
        _Pragma("omp for schedule(static)") for (int64_t i = 0; i < blocks; i++) {                                     \
            for (int line = 0; line < block_bytes; line += LINE) FETCH(in + i * block_bytes + AHEAD + line);           \
            body                                                                                                       \
        }                                                                                                              \
        FENCE();                                                                                                       \
    }

#define CASE(decode, id, block_weights, block_bytes)                                                                   \
    case id:                                                                                                           \
        FOR_BLOCKS(block_weights, block_bytes, {                                                                       \
            if (format == FP32) {                                                                                      \
                decode(in + i * block_bytes, (float *)out + i * block_weights);                                        \
            } else {                                                                                                   \
                float w[block_weights];                                                                                \
                decode(in + i * block_bytes, w);                                                                       \
                round_all(w, block_weights, (uint16_t *)out + i * block_weights, past);                                \
            }                                                                                                          \
        })                                                                                                             \
        return 1;

/* `type`: ggml's number. `format` of `out`: FP32 or BF16. Returns 0 for a type that is not here. */
int dequantize(int type, bytes in, int64_t blocks, void *out, int format) {
    int is_aligned = (uintptr_t)out % LINE == 0;
#ifdef __AVX512BF16__
    if (type == 8 && format == BF16) {
        FOR_BLOCKS(32, 34, { q8_0_bf16(in + i * 34, (uint16_t *)out + i * 32, past); })
        return 1;
    }
    if (type == 12 && format == BF16) {
        FOR_BLOCKS(256, 144, { q4_k_bf16(in + i * 144, (uint16_t *)out + i * 256, past); })
        return 1;
    }
#endif
    switch (type) {
        CASE(q4_0, 2, 32, 18)
        CASE(q4_1, 3, 32, 20)
        CASE(q5_0, 6, 32, 22)
        CASE(q5_1, 7, 32, 24)
        CASE(q8_0, 8, 32, 34)
        CASE(q2_k, 10, 256, 84)
        CASE(q3_k, 11, 256, 110)
        CASE(q4_k, 12, 256, 144)
        CASE(q5_k, 13, 256, 176)
        CASE(q6_k, 14, 256, 210)
        CASE(iq4_nl, 20, 32, 18)
        CASE(iq4_xs, 23, 256, 136)
    }
    return 0;
}
