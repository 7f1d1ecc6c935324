/* Blocks of ggml, and rows of codes and scales, -> weights, in one pass over memory. Compiled at run time by
 * wan/quant/native.py; blocks.py and schemes.py say the same in torch and are what this file is checked against.
 *
 * Every weight is computed as scale * q + offset in fp32, each step rounded (no contraction), so that the result is bit
 * for bit that of the `gguf` package. Layout of the blocks: ggml-common.h of ggml. The inner loops have constant lengths
 * and one output, of which compilers make vector code. To bf16 it is written out for AVX-512, several times as fast.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define VECTORS
#endif

#define INLINE static inline __attribute__((always_inline))
#define EACH(count) for (int j = 0; j < count; j++)

typedef const uint8_t *restrict bytes;
typedef float *restrict weights;
enum { FP32 = 0, BF16 = 1 };

INLINE void round_all(const float *restrict w, int count, uint16_t *restrict out) { /* finite numbers, to nearest even */
    EACH(count) {
        uint32_t bits;
        memcpy(&bits, w + j, 4);
        out[j] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
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

INLINE float q3_k_scale(bytes b, int k) {
    bytes s = b + 96;
    int low = (k < 8 ? s[k] : s[k - 8] >> 4) & 15, high = s[8 + k % 4] >> (2 * (k / 4)) & 3;
    return half(b + 108) * (float)((low | high << 4) - 32);
}

INLINE void q3_k(bytes b, weights w) {
    for (int k = 0; k < 16; k++) {
        bytes q = b + 32 + k / 8 * 32 + k % 2 * 16, top = b + k % 2 * 16;
        float scale = q3_k_scale(b, k);
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

INLINE float iq4_xs_scale(bytes b, int k) {
    int low = b[4 + k / 2] >> (k % 2 * 4) & 15, high = b[2 + k / 4] >> (k % 4 * 2) & 3;
    return half(b) * (float)((low | high << 4) - 32);
}

INLINE void iq4_xs(bytes b, weights w) {
    for (int k = 0; k < 8; k++) iq4(b + 8 + 16 * k, w + 32 * k, iq4_xs_scale(b, k));
}

#ifdef VECTORS
/* The same to bf16, 32 weights at a time and without a detour over memory. Shifts of bytes are shifts of pairs of bytes,
 * and a mask that takes away what came from the neighbour. */

/* `past`: past the caches, as the product that reads the weights runs on all cores, and what another core has just
 * written comes slower than from memory. */
INLINE void store_32(__m512i rounded, uint16_t *restrict out, int past) {
    if (past)
        _mm512_stream_si512((__m512i *)out, rounded);
    else
        _mm512_storeu_si512(out, rounded);
}

/* To nearest even; subnormal weights would become zero, but no product with an fp16 scale is one. */
INLINE __m512i round_32(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

INLINE __m256i load_32(bytes b) { return _mm256_loadu_si256((const __m256i *)b); }

INLINE __m256i bits_of(__m256i b, int shift, int mask) {
    return _mm256_and_si256(_mm256_srl_epi16(b, _mm_cvtsi32_si128(shift)), _mm256_set1_epi8((char)mask));
}

INLINE __m256i nibbles(bytes b) { /* 16 bytes: all the low four bits, then all the high ones */
    __m128i q = _mm_loadu_si128((const __m128i *)b);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(q, 4), q), _mm256_set1_epi8(15));
}

INLINE __m256i put(__m256i codes, __mmask32 where, int bit) {
    return _mm256_or_si256(codes, _mm256_maskz_set1_epi8(where, (char)bit));
}

INLINE __mmask32 has(__m256i b, int bit) { return _mm256_test_epi8_mask(b, _mm256_set1_epi8((char)bit)); }

INLINE __m256i less(__m256i codes, int zero) { return _mm256_sub_epi8(codes, _mm256_set1_epi8((char)zero)); }

/* Signed codes; a scale for the first 16 and one for the last 16. */
INLINE void scaled(__m256i codes, float first, float last, uint16_t *restrict out, int past) {
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
    low = _mm512_mul_ps(_mm512_set1_ps(first), low);
    high = _mm512_mul_ps(_mm512_set1_ps(last), high);
    store_32(round_32(low, high), out, past);
}

/* Of 16 codes in a row. */
INLINE __m512 values(float scale, float offset, float first) {
    __m512 code = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    code = _mm512_add_ps(code, _mm512_set1_ps(first));
    return _mm512_sub_ps(_mm512_mul_ps(_mm512_set1_ps(scale), code), _mm512_set1_ps(offset));
}

/* Codes below 32, of which each stands for one value: these are rounded once. */
INLINE void looked_up(__m256i codes, __m512 low, __m512 high, uint16_t *restrict out, int past) {
    __m512i place = _mm512_cvtepu8_epi16(codes);
    store_32(_mm512_permutexvar_epi16(place, round_32(low, high)), out, past);
}

INLINE void looked_up_32(__m256i codes, float scale, float offset, uint16_t *restrict out, int past) {
    looked_up(codes, values(scale, offset, 0), values(scale, offset, 16), out, past);
}

INLINE void q4_0_bf16(bytes b, uint16_t *restrict out, int past) {
    float d = half(b);
    scaled(less(nibbles(b + 2), 8), d, d, out, past);
}

INLINE void q4_1_bf16(bytes b, uint16_t *restrict out, int past) {
    looked_up_32(nibbles(b + 4), half(b), -half(b + 2), out, past);
}

INLINE void q5_0_bf16(bytes b, uint16_t *restrict out, int past) {
    float d = half(b);
    scaled(less(put(nibbles(b + 6), word(b + 2), 16), 16), d, d, out, past);
}

INLINE void q5_1_bf16(bytes b, uint16_t *restrict out, int past) {
    looked_up_32(put(nibbles(b + 8), word(b + 4), 16), half(b), -half(b + 2), out, past);
}

INLINE void q8_0_bf16(bytes b, uint16_t *restrict out, int past) {
    float d = half(b);
    scaled(load_32(b + 2), d, d, out, past);
}

INLINE void iq4_bf16(bytes b, float d, uint16_t *restrict out, int past) {
    __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)IQ4_VALUES));
    scaled(_mm256_shuffle_epi8(values, nibbles(b)), d, d, out, past);
}

INLINE void iq4_nl_bf16(bytes b, uint16_t *restrict out, int past) { iq4_bf16(b + 2, half(b), out, past); }

INLINE void iq4_xs_bf16(bytes b, uint16_t *restrict out, int past) {
    for (int k = 0; k < 8; k++) iq4_bf16(b + 8 + 16 * k, iq4_xs_scale(b, k), out + 32 * k, past);
}

INLINE void q2_k_bf16(bytes b, uint16_t *restrict out, int past) {
    float d = half(b + 80), dmin = half(b + 82);
    for (int k = 0; k < 16; k += 2) {
        __m512 first = values(d * (float)(b[k] & 15), dmin * (float)(b[k] >> 4), 0);
        __m512 last = values(d * (float)(b[k + 1] & 15), dmin * (float)(b[k + 1] >> 4), 0);
        __m256i codes = bits_of(load_32(b + 16 + k / 8 * 32), k / 2 % 4 * 2, 3);
        looked_up(put(codes, 0xffff0000, 16), first, last, out + 16 * k, past);
    }
}

INLINE void q3_k_bf16(bytes b, uint16_t *restrict out, int past) {
    __m256i top = load_32(b);
    for (int k = 0; k < 16; k += 2) {
        __m256i codes = bits_of(load_32(b + 32 + k / 8 * 32), k / 2 % 4 * 2, 3);
        codes = less(put(codes, has(top, 1 << k / 2), 4), 4);
        scaled(codes, q3_k_scale(b, k), q3_k_scale(b, k + 1), out + 16 * k, past);
    }
}

INLINE void q4_k_bf16(bytes b, uint16_t *restrict out, int past) {
    float d = half(b), dmin = half(b + 2);
    for (int k = 0; k < 8; k++) {
        int s, m;
        six_bits(b + 4, k, &s, &m);
        __m256i codes = bits_of(load_32(b + 16 + k / 2 * 32), k % 2 * 4, 15);
        looked_up_32(codes, d * (float)s, dmin * (float)m, out + 32 * k, past);
    }
}

INLINE void q5_k_bf16(bytes b, uint16_t *restrict out, int past) {
    float d = half(b), dmin = half(b + 2);
    __m256i top = load_32(b + 16);
    for (int k = 0; k < 8; k++) {
        int s, m;
        six_bits(b + 4, k, &s, &m);
        __m256i codes = put(bits_of(load_32(b + 48 + k / 2 * 32), k % 2 * 4, 15), has(top, 1 << k), 16);
        looked_up_32(codes, d * (float)s, dmin * (float)m, out + 32 * k, past);
    }
}

INLINE void q6_k_bf16(bytes b, uint16_t *restrict out, int past) {
    float d = half(b + 208);
    const int8_t *scales = (const int8_t *)b + 192;
    for (int k = 0; k < 16; k += 2) {
        __m256i low = bits_of(load_32(b + k / 8 * 64 + k / 2 % 2 * 32), k / 4 % 2 * 4, 15);
        __m256i high = bits_of(load_32(b + 128 + k / 8 * 32), k / 2 % 4 * 2, 3);
        __m256i codes = less(_mm256_or_si256(low, _mm256_slli_epi16(high, 4)), 32);
        scaled(codes, d * (float)scales[k], d * (float)scales[k + 1], out + 16 * k, past);
    }
}
#endif

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

#ifdef VECTORS
#define TO_BF16(decode, block_weights, from, to) decode##_bf16(from, to, past)
#else
#define TO_BF16(decode, block_weights, from, to)                                                                       \
    (void)past;                                                                                                        \
    float w[block_weights];                                                                                            \
    decode(from, w);                                                                                                   \
    round_all(w, block_weights, to)
#endif

#define CASE(decode, id, block_weights, block_bytes)                                                                   \
    case id:                                                                                                           \
        FOR_BLOCKS(block_weights, block_bytes, {                                                                       \
            if (format == FP32) {                                                                                      \
                decode(in + i * block_bytes, (float *)out + i * block_weights);                                        \
            } else {                                                                                                   \
                TO_BF16(decode, block_weights, in + i * block_bytes, (uint16_t *)out + i * block_weights);             \
            }                                                                                                          \
        })                                                                                                             \
        return 1;

/* `type`: ggml's number. `format` of `out`: FP32 or BF16. Returns 0 for a type that is not here. */
int dequantize(int type, bytes in, int64_t blocks, void *out, int format) {
    int is_aligned = (uintptr_t)out % LINE == 0;
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

/* Whether in one of the blocks the bits of a mask are all ones, in one byte and in another. masks: byte, bits, other
 * byte, its bits, for each scale. */
int bad_scales(bytes in, int64_t blocks, int64_t block_bytes, const uint8_t *restrict masks, int count) {
    int found = 0;
    for (int64_t i = 0; i < blocks; i++, in += block_bytes)
        for (int j = 0; j < count; j++) {
            const uint8_t *mask = masks + 4 * j;
            found |= (in[mask[0]] & mask[1]) == mask[1] && (in[mask[2]] & mask[3]) == mask[3];
        }
    return found;
}

/* Rows of codes and scales: weight = code * scale (* row scale) (+ offset), see schemes.py. Where the parts of a row
 * begin, in bytes, or -1 for one that it does not have. `codes` and `scales`: the number that each byte, or code of
 * fewer bits, stands for. */
enum { LOOKED_UP = 0, SIGNED = 1, UNSIGNED = 2 };            /* codes of 8 bits */
enum { SCALE_LOOKED_UP = 0, SCALE_FP32, SCALE_BF16, SCALE_FP16 }; /* scales and offsets */
typedef struct {
    int64_t columns, row_bytes, bits, code_kind, group, scale_kind, scales_at, offsets_at, row_scale_at, rotation;
    const float *codes, *scales;
} layout;
enum { CHUNK = 256, MOST = 4096 }; /* columns that are computed at a time; that may be rotated together */

INLINE void round_any(const float *restrict w, int count, uint16_t *restrict out) { /* NaN stays one */
    EACH(count) {
        uint32_t bits;
        memcpy(&bits, w + j, 4);
        uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        out[j] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}

INLINE void numbers(const layout *f, bytes row, int64_t first, int count, weights w) {
    const float *restrict codes = f->codes;
    bytes b = row + first * f->bits / 8;
    if (f->bits == 4) {
        EACH(count / 2) {
            w[2 * j] = codes[b[j] & 15];
            w[2 * j + 1] = codes[b[j] >> 4];
        }
    } else if (f->bits == 6) {
        EACH(count / 4) {
            uint32_t four = b[3 * j] | (uint32_t)b[3 * j + 1] << 8 | (uint32_t)b[3 * j + 2] << 16;
            for (int k = 0; k < 4; k++) w[4 * j + k] = codes[four >> (6 * k) & 63];
        }
    } else if (f->code_kind == SIGNED) {
        EACH(count) w[j] = (float)(int8_t)b[j];
    } else if (f->code_kind == UNSIGNED) {
        EACH(count) w[j] = (float)b[j];
    } else {
        EACH(count) w[j] = codes[b[j]];
    }
}

INLINE float scale_of(const layout *f, bytes part, int64_t group) {
    float value;
    uint32_t bits;
    switch (f->scale_kind) {
        case SCALE_FP32: memcpy(&value, part + 4 * group, 4); return value;
        case SCALE_FP16: return half(part + 2 * group);
        case SCALE_BF16:
            bits = (uint32_t)part[2 * group] << 16 | (uint32_t)part[2 * group + 1] << 24;
            memcpy(&value, &bits, 4);
            return value;
    }
    return f->scales[part[group]];
}

/* `body` for the columns of each group that lie in the chunk; `value` is its number in `part`. */
#define EACH_GROUP(part, body)                                                                                         \
    for (int at = 0, end; at < count; at = end) {                                                                      \
        int64_t group = (first + at) / f->group, stop = (group + 1) * f->group - first;                                \
        float value = scale_of(f, part, group);                                                                        \
        end = stop < count ? (int)stop : count;                                                                        \
        for (int j = at; j < end; j++) body;                                                                           \
    }

INLINE void unrotate(weights w, int count, int64_t rotation) {
    for (int step = 1; step < rotation; step *= 4)
        for (int start = 0; start < count; start += 4 * step)
            for (int j = start; j < start + step; j++) {
                float a = w[j], b = w[j + step], c = w[j + 2 * step], d = w[j + 3 * step];
                float mean = ((a + b) + (c + d)) * 0.5f;
                w[j] = mean - d;
                w[j + step] = mean - c;
                w[j + 2 * step] = mean - b;
                w[j + 3 * step] = mean - a;
            }
}

INLINE void chunk_of(const layout *f, bytes row, int64_t first, int count, weights w) {
    numbers(f, row, first, count, w);
    EACH_GROUP(row + f->scales_at, w[j] *= value)
    if (f->row_scale_at >= 0) {
        float value;
        memcpy(&value, row + f->row_scale_at, 4);
        EACH(count) w[j] *= value;
    }
    if (f->offsets_at >= 0) EACH_GROUP(row + f->offsets_at, w[j] += value)
    if (f->rotation) unrotate(w, count, f->rotation);
}

/* Returns 0 for a layout that this cannot read. */
int dequantize_rows(const layout *f, bytes in, int64_t rows, void *out, int format) {
    int64_t size = f->rotation > CHUNK ? f->rotation : CHUNK;
    if (size > MOST || (f->bits != 4 && f->bits != 6 && f->bits != 8)) return 0;
    _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < rows; i++) {
        float w[MOST];
        for (int64_t first = 0; first < f->columns; first += size) {
            int count = (int)(f->columns - first < size ? f->columns - first : size);
            chunk_of(f, in + i * f->row_bytes, first, count, w);
            if (format == FP32)
                memcpy((float *)out + i * f->columns + first, w, 4 * (size_t)count);
            else
                round_any(w, count, (uint16_t *)out + i * f->columns + first);
        }
    }
    return 1;
}

/* RMS norm over the channels of each row, times `gamma`, and with `silu` x / (1 + exp(-x)): bf16 to bf16, computed in
 * fp32 and rounded once. The sum is taken in another order than torch's, and exp is exact to 2^-22 or so, so that one
 * number in some thousands rounds to the neighbour. See rms_norm in wan/models/ops/sliced.py. */

enum { LANES = 16 };

INLINE float from_bf16(uint16_t b) {
    uint32_t bits = (uint32_t)b << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float silu_of(float x) { /* 2^t by its whole part, to the exponent, and a polynomial for the rest in [-1/2, 1/2] */
    float t = x * -1.44269504f;
    t = t > 126.0f ? 126.0f : t < -126.0f ? -126.0f : t; /* NaN stays one */
    float whole = (t + 12582912.0f) - 12582912.0f, f = t - whole; /* 1.5 * 2^23 rounds to whole numbers */
    float p = 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    int32_t bits;
    memcpy(&bits, &p, 4);
    bits += (int32_t)whole * (1 << 23);
    memcpy(&p, &bits, 4);
    return x / (1.0f + p);
}

void norm_silu(const uint16_t *restrict x, const float *restrict gamma, int64_t rows, int64_t channels,
               uint16_t *restrict out, int silu) {
    _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < rows; i++) {
        const uint16_t *restrict row = x + i * channels;
        float sums[LANES] = {0}, sum = 0, w[CHUNK];
        int64_t whole = channels / LANES * LANES;
        for (int64_t first = 0; first < whole; first += LANES) EACH(LANES) {
                float value = from_bf16(row[first + j]);
                sums[j] += value * value;
            }
        for (int64_t j = whole; j < channels; j++) sum += from_bf16(row[j]) * from_bf16(row[j]);
        EACH(LANES) sum += sums[j];
        float norm = sqrtf(sum), scale = 1.0f / (norm < 1e-12f ? 1e-12f : norm);
        for (int64_t first = 0; first < channels; first += CHUNK) {
            int count = (int)(channels - first < CHUNK ? channels - first : CHUNK);
            EACH(count) w[j] = from_bf16(row[first + j]) * scale * gamma[first + j];
            if (silu) EACH(count) w[j] = silu_of(w[j]);
            round_any(w, count, out + i * channels + first);
        }
    }
}
