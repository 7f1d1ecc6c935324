/* Attention of heads in bf16 on CPUs with AVX512-BF16, compiled at run time by wan/models/attention_native.py.
 *
 * FlashAttention's order (arXiv 2205.14135): a block of queries goes over the keys, 256 at a time, with a running
 * maximum and sum. Scores and sums are fp32, weights are rounded to bf16 for their product with the values, as in
 * torch's kernel. Here sums stay in registers for 6 queries and 64 keys, or numbers, and exponentials are polynomials,
 * 16 at a time. Keys and values of a head are packed first, in pairs, as VDPBF16PS takes them.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define VECTORS
#endif

typedef struct {
    int64_t batch, queries, keys, heads, width;
    int64_t q[3], k[3], v[3], out[3]; /* strides of batch, token and head, in numbers; a head is contiguous */
    float scale;
} shape;

#ifdef VECTORS
#define INLINE static inline __attribute__((always_inline))
#define LOWEST (-3.0e38f)
enum { LANES = 16, ROWS = 6, KEYS = 256, BLOCK = 48, MOST = 256 /* numbers of a head */ };

/* 2 ^ x for x <= 0: of the fraction by a polynomial, relative error 2e-7. */
INLINE __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x); /* the second one, if it is no number */
    __m512 n = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.33335581e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.61812910e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55041087e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40226507e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147182e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* Pairs of a key's numbers, of 16 keys side by side: [keys / 16][width / 2][16] of 32 bits. */
static void pack_keys(const uint16_t *k, int64_t stride, int64_t keys, int64_t width, int64_t block, uint32_t *out) {
    uint32_t *to = out + block * LANES * (width / 2);
    for (int64_t j = 0; j < LANES; j++) {
        int64_t key = block * LANES + j;
        const uint16_t *from = k + key * stride;
        for (int64_t d = 0; d < width / 2; d++) {
            uint32_t pair = 0;
            if (key < keys) memcpy(&pair, from + 2 * d, 4);
            to[d * LANES + j] = pair;
        }
    }
}

/* Pairs of keys, of each number: [keys / 2][width] of 32 bits. */
static void pack_values(const uint16_t *v, int64_t stride, int64_t keys, int64_t width, int64_t block, uint32_t *out) {
    for (int64_t j = block * LANES / 2; j < (block + 1) * LANES / 2; j++) {
        const uint16_t *one = v + 2 * j * stride, *two = one + stride;
        uint32_t *to = out + j * width;
        for (int64_t d = 0; d < width; d++) {
            uint32_t low = 2 * j < keys ? one[d] : 0, high = 2 * j + 1 < keys ? two[d] : 0;
            to[d] = low | high << 16;
        }
    }
}

/* Scores of ROWS queries with `groups` times 16 keys. q: pairs, [ROWS][width / 2]; scores [ROWS][KEYS]. */
INLINE void scores_of(const uint32_t *q, const uint32_t *k, int64_t pairs, int groups, float *scores) {
    for (int g = 0; g < groups; g += 4) {
        __m512 sum[ROWS][4];
        for (int i = 0; i < ROWS; i++)
            for (int c = 0; c < 4; c++) sum[i][c] = _mm512_setzero_ps();
        const uint32_t *at = k + (int64_t)g * LANES * pairs;
        for (int64_t d = 0; d < pairs; d++) {
            __m512bh keys[4];
            for (int c = 0; c < 4; c++) keys[c] = (__m512bh)_mm512_loadu_si512(at + (c * pairs + d) * LANES);
            for (int i = 0; i < ROWS; i++) {
                __m512bh one = (__m512bh)_mm512_set1_epi32((int)q[i * pairs + d]);
                for (int c = 0; c < 4; c++) sum[i][c] = _mm512_dpbf16_ps(sum[i][c], one, keys[c]);
            }
        }
        for (int i = 0; i < ROWS; i++)
            for (int c = 0; c < 4; c++) _mm512_storeu_ps(scores + i * KEYS + (g + c) * LANES, sum[i][c]);
    }
}

/* out [ROWS][width] = out * keep + weights [ROWS][KEYS] (bf16, in pairs of keys) times values. */
INLINE void add_values(const uint32_t *weights, const uint32_t *v, int64_t width, int pairs, const float *keep,
                       float *out) {
    for (int64_t d = 0; d < width; d += 4 * LANES) {
        __m512 sum[ROWS][4];
        for (int i = 0; i < ROWS; i++)
            for (int c = 0; c < 4; c++)
                sum[i][c] = _mm512_mul_ps(_mm512_set1_ps(keep[i]), _mm512_loadu_ps(out + i * width + d + c * LANES));
        for (int j = 0; j < pairs; j++) {
            __m512bh values[4];
            for (int c = 0; c < 4; c++) values[c] = (__m512bh)_mm512_loadu_si512(v + j * width + d + c * LANES);
            for (int i = 0; i < ROWS; i++) {
                __m512bh one = (__m512bh)_mm512_set1_epi32((int)weights[i * (KEYS / 2) + j]);
                for (int c = 0; c < 4; c++) sum[i][c] = _mm512_dpbf16_ps(sum[i][c], one, values[c]);
            }
        }
        for (int i = 0; i < ROWS; i++)
            for (int c = 0; c < 4; c++) _mm512_storeu_ps(out + i * width + d + c * LANES, sum[i][c]);
    }
}

INLINE __mmask16 first_of(int count) {
    return count >= LANES ? 0xffff : count > 0 ? (__mmask16)((1 << count) - 1) : 0;
}

/* The softmax of one row goes on: `count` scores times `factor` -> weights; the largest so far and the sum of powers of
 * two below it. Returns what those of before are to be multiplied by. */
INLINE float weigh(const float *scores, int count, int groups, float factor, float *most, float *sum,
                   uint32_t *weights) {
    __m512 top = _mm512_set1_ps(LOWEST), total = _mm512_setzero_ps(), times = _mm512_set1_ps(factor);
    __m512 found[KEYS / LANES];
    for (int g = 0; g < groups; g++) {
        __mmask16 mask = first_of(count - g * LANES);
        found[g] = _mm512_mask_mul_ps(_mm512_set1_ps(LOWEST), mask, _mm512_loadu_ps(scores + g * LANES), times);
        top = _mm512_max_ps(top, found[g]);
    }
    float before = *most, now = _mm512_reduce_max_ps(top);
    now = now > before ? now : before;
    __m512 shift = _mm512_set1_ps(now);
    for (int g = 0; g < groups; g++) {
        __m512 one = _mm512_maskz_mov_ps(first_of(count - g * LANES), exp2_of(_mm512_sub_ps(found[g], shift)));
        total = _mm512_add_ps(total, one);
        _mm256_storeu_si256((__m256i *)(weights + g * LANES / 2), (__m256i)_mm512_cvtneps_pbh(one));
    }
    float keep = before == LOWEST ? 0.0f : _mm512_cvtss_f32(exp2_of(_mm512_set1_ps(before - now)));
    *sum = *sum * keep + _mm512_reduce_add_ps(total);
    *most = now;
    return keep;
}

/* `count` queries from `first` on, at most BLOCK, of one head. */
static void some_queries(const shape *s, const uint16_t *q, const uint32_t *k, const uint32_t *v, uint16_t *out,
                         float *most_of, float *sum_of, int64_t first, int64_t count) {
    int64_t width = s->width, pairs = width / 2;
    uint32_t rows[BLOCK * MOST / 2];
    float sums[BLOCK * MOST], most[BLOCK], total[BLOCK];
    memset(rows, 0, sizeof rows);
    for (int64_t i = 0; i < count; i++) memcpy(rows + i * pairs, q + (first + i) * s->q[1], 2 * (size_t)width);
    for (int64_t i = 0; i < BLOCK; i++) most[i] = LOWEST, total[i] = 0;
    memset(sums, 0, sizeof(float) * (size_t)(BLOCK * width));
    float factor = s->scale * 1.44269504f;
    for (int64_t start = 0; start < s->keys; start += KEYS) {
        int there = (int)(s->keys - start < KEYS ? s->keys - start : KEYS);
        int groups = (there + 4 * LANES - 1) / (4 * LANES) * 4;
        for (int64_t i = 0; i < count; i += ROWS) {
            float scores[ROWS * KEYS], keep[ROWS];
            uint32_t weights[ROWS * KEYS / 2];
            scores_of(rows + i * pairs, k + start * pairs, pairs, groups, scores);
            for (int r = 0; r < ROWS; r++)
                keep[r] = weigh(scores + r * KEYS, there, groups, factor, most + i + r, total + i + r,
                                weights + r * KEYS / 2);
            add_values(weights, v + start / 2 * width, width, groups * LANES / 2, keep, sums + i * width);
        }
    }
    for (int64_t i = 0; i < count; i++) {
        __m512 by = _mm512_set1_ps(1.0f / total[i]);
        uint16_t *to = out + (first + i) * s->out[1];
        for (int64_t d = 0; d < width; d += LANES) {
            __m512 mean = _mm512_mul_ps(by, _mm512_loadu_ps(sums + i * width + d));
            _mm256_storeu_si256((__m256i *)(to + d), (__m256i)_mm512_cvtneps_pbh(mean));
        }
        most_of[(first + i) * s->heads] = most[i];
        sum_of[(first + i) * s->heads] = total[i];
    }
}

/* Returns 0 where there is no memory. most, sum: [batch, queries, heads]. */
int attend(const shape *s, const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *out, float *most,
           float *sum) {
    int64_t blocks = (s->keys + 4 * LANES - 1) / (4 * LANES) * 4; /* of 16 keys, four at a time */
    size_t size = (size_t)(blocks * LANES * s->width) * 2;
    uint32_t *keys = aligned_alloc(64, size), *values = aligned_alloc(64, size);
    int there = keys && values;
    for (int64_t one = 0; there && one < s->batch * s->heads; one++) {
        int64_t b = one / s->heads, h = one % s->heads, at = b * s->queries * s->heads + h;
        const uint16_t *query = q + b * s->q[0] + h * s->q[2], *key = k + b * s->k[0] + h * s->k[2];
        const uint16_t *value = v + b * s->v[0] + h * s->v[2];
        uint16_t *to = out + b * s->out[0] + h * s->out[2];
        _Pragma("omp parallel") {
            _Pragma("omp for schedule(static)") for (int64_t i = 0; i < blocks; i++) {
                pack_keys(key, s->k[1], s->keys, s->width, i, keys);
                pack_values(value, s->v[1], s->keys, s->width, i, values);
            }
            _Pragma("omp for schedule(dynamic)") for (int64_t i = 0; i < s->queries; i += BLOCK) {
                int64_t count = s->queries - i < BLOCK ? s->queries - i : BLOCK;
                some_queries(s, query, keys, values, to, most + at, sum + at, i, count);
            }
        }
    }
    free(keys);
    free(values);
    return there;
}
#else
int attend(const shape *s, const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *out, float *most,
           float *sum) {
    return 0;
}
#endif
