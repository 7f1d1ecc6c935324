/* Weights -> blocks of ggml: the searches of its reference (quantize_row_*_ref in ggml-quants.c of ggml) with its bytes.
 * Compiled at run time by wan/quant/native.py and checked against libgguf before it is used.
 *
 * The reference looks for the scale of one group of 16 or 32 weights after another, by sums whose order decides the last
 * bit. Here as many groups as a vector has lanes go through the same steps side by side, so that every sum has the order
 * it has there. `x[i]` holds weight i of all these groups. No contraction: products and sums are rounded one by one.
 */
#if defined(__GNUC__) && !defined(__clang__) /* -O3 unrolls all searches, which takes three times as long to compile */
#pragma GCC optimize("O2", "tree-vectorize", "vect-cost-model=dynamic")
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define EACH(count) for (int j = 0; j < count; j++)

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t codes __attribute__((vector_size(4 * LANES))); /* and masks: all ones, or zero */

enum { FP32 = 0, BF16 = 1, FP16 = 2 };
static const float TINY = 1e-15f; /* a group of no larger weights is one of zeros */
static const lanes ZERO = {0};

INLINE lanes same(float value) { return value - ZERO; }
INLINE codes bits(lanes v) { return (codes)v; }
INLINE codes choose(codes mask, codes a, codes b) { return (mask & a) | (~mask & b); }
INLINE lanes pick(codes mask, lanes a, lanes b) { return (lanes)choose(mask, bits(a), bits(b)); }
INLINE lanes magnitude(lanes v) { return (lanes)(bits(v) & 0x7fffffff); }
INLINE lanes number(codes v) { return __builtin_convertvector(v, lanes); }
INLINE codes clamp(codes v, int low, int high) {
    v = choose(v < low, low - (codes){0}, v);
    return choose(v > high, high - (codes){0}, v);
}
INLINE codes nearest(lanes v) { return (bits(v + 12582912.f) & 0x7fffff) - 0x400000; } /* ties to even */
INLINE int nearest_one(float v) {
    int32_t found;
    v += 12582912.f;
    memcpy(&found, &v, 4);
    return (found & 0x7fffff) - 0x400000;
}

/* `v`, at most 65504, as fp16 at `out`; its value after that. */
INLINE float put_half(float v, uint8_t *out) {
    uint32_t u, half, sign;
    memcpy(&u, &v, 4);
    sign = u & 0x80000000;
    u ^= sign;
    if (u < 113u << 23) { /* below 2^-14 the steps are even */
        memcpy(&v, &u, 4);
        half = (uint32_t)nearest_one(v * 0x1p24f);
        v = (float)half * 0x1p-24f;
        memcpy(&u, &v, 4);
    } else {
        u = (u + 0xfff + (u >> 13 & 1)) & ~0x1fffu;
        half = (u >> 13) - (112 << 10);
    }
    half |= sign >> 16;
    out[0] = (uint8_t)half, out[1] = (uint8_t)(half >> 8);
    u |= sign;
    memcpy(&v, &u, 4);
    return v;
}

/* The value of the largest magnitude of each group, the first of several; its magnitude goes to `size`. */
INLINE lanes extreme(const lanes *x, int n, lanes *size) {
    lanes value = ZERO, most = ZERO;
    for (int i = 0; i < n; i++) {
        lanes a = magnitude(x[i]);
        codes more = a > most;
        most = pick(more, a, most), value = pick(more, x[i], value);
    }
    *size = most;
    return value;
}

/* Codes 0 to `top` for scale * code - minimum, the weighted error the least of those tried. w: importance; steps: how many
 * scales after `first` are tried, a tenth of a code apart; absolute: errors count as they are, else squared. */
INLINE lanes search_affine(
    const lanes *x, const lanes *w, int n, int top, float first, int steps, int absolute, codes *code, lanes *minimum) {
    lanes low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    for (int i = 1; i < n; i++) {
        low = pick(x[i] < low, x[i], low), high = pick(x[i] > high, x[i], high);
        sum_w += w[i], sum_x += w[i] * x[i];
    }
    low = pick(low > 0, ZERO, low);
    codes flat = high == low;
    lanes inverse = (float)top / (high - low), scale = 1 / inverse, best = ZERO;
    for (int i = 0; i < n; i++) {
        code[i] = clamp(nearest(inverse * (x[i] - low)), 0, top);
        lanes off = scale * number(code[i]) + low - x[i];
        best += w[i] * (absolute ? magnitude(off) : off * off);
    }
    for (int step = 0; step <= steps; step++) {
        lanes sum_l = ZERO, sum_l2 = ZERO, sum_xl = ZERO, error = ZERO, tried[32];
        inverse = (first + 0.1f * step + (float)top) / (high - low); /* of the best so far */
        for (int i = 0; i < n; i++) {
            lanes l = number(clamp(nearest(inverse * (x[i] - low)), 0, top)), weighted = w[i] * l;
            tried[i] = l;
            sum_l += weighted, sum_l2 += weighted * l, sum_xl += weighted * x[i];
        }
        lanes divisor = sum_w * sum_l2 - sum_l * sum_l;
        lanes new_scale = (sum_w * sum_xl - sum_x * sum_l) / divisor;
        lanes new_low = (sum_l2 * sum_x - sum_l * sum_xl) / divisor;
        codes above = new_low > 0;
        new_low = pick(above, ZERO, new_low), new_scale = pick(above, sum_xl / sum_l2, new_scale);
        for (int i = 0; i < n; i++) {
            lanes off = new_scale * tried[i] + new_low - x[i];
            error += w[i] * (absolute ? magnitude(off) : off * off);
        }
        codes better = (divisor > 0) & (error < best) & ~flat;
        for (int i = 0; i < n; i++) code[i] = choose(better, __builtin_convertvector(tried[i], codes), code[i]);
        best = pick(better, error, best), scale = pick(better, new_scale, scale), low = pick(better, new_low, low);
    }
    for (int i = 0; i < n; i++) code[i] &= ~flat;
    *minimum = -low;
    return pick(flat, ZERO, scale);
}

/* Codes 0 to 2 * top - 1 for scale * (code - top): a scale at which one weight is at the end, or one near it. */
INLINE lanes search_signed(const lanes *x, int n, int top, codes *code) {
    lanes size, extremum = extreme(x, n, &size), inverse, scale = ZERO, best = ZERO;
    codes none = size < TINY;
    for (int step = -10; step <= 9; step++) { /* first the one at the end itself */
        if (step == 0) continue;
        inverse = step == -10 ? (float)-top / extremum : -((float)top + 0.1f * step) / extremum;
        lanes sum_lx = ZERO, sum_l2 = ZERO;
        codes tried[16];
        for (int i = 0; i < n; i++) {
            tried[i] = clamp(nearest(inverse * x[i]), -top, top - 1);
            lanes l = number(tried[i]), w = x[i] * x[i];
            sum_lx += w * x[i] * l, sum_l2 += w * l * l;
        }
        codes better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2);
        if (step == -10) better = ~(codes){0};
        lanes found = pick(sum_l2 == 0, ZERO, sum_lx / sum_l2);
        scale = pick(better, found, scale), best = pick(better, found * sum_lx, best);
        for (int i = 0; i < n; i++) code[i] = choose(better, tried[i] + top, code[i]);
    }
    for (int i = 0; i < n; i++) code[i] &= ~none;
    return pick(none, ZERO, scale);
}

/* The same with codes that are moved one by one while the error falls. */
INLINE lanes search_moving(const lanes *x, int n, int top, codes *code) {
    lanes size, extremum = extreme(x, n, &size), inverse = (float)-top / extremum, sum_lx = ZERO, sum_l2 = ZERO;
    codes none = size < TINY;
    for (int i = 0; i < n; i++) {
        code[i] = clamp(nearest(inverse * x[i]), -top, top - 1);
        lanes l = number(code[i]), w = x[i] * x[i];
        sum_lx += w * x[i] * l, sum_l2 += w * l * l;
    }
    for (int pass = 0; pass < 5; pass++)
        for (int i = 0; i < n; i++) {
            lanes w = x[i] * x[i], l = number(code[i]);
            lanes lx = sum_lx - w * x[i] * l, l2 = sum_l2 - w * l * l;
            codes moved = clamp(nearest(x[i] * l2 / lx), -top, top - 1);
            codes better = (lx > 0) & (moved != code[i]);
            lanes m = number(moved);
            lx += w * x[i] * m, l2 += w * m * m;
            better &= (l2 > 0) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2);
            code[i] = choose(better, moved, code[i]);
            sum_lx = pick(better, lx, sum_lx), sum_l2 = pick(better, l2, sum_l2);
        }
    for (int i = 0; i < n; i++) code[i] = (code[i] + top) & ~none;
    return pick(none | (sum_l2 <= 0), ZERO, sum_lx / sum_l2);
}

static const float IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* The nearest of the values, and its place. */
INLINE lanes look_up(lanes v, codes *place) {
    lanes below = same(IQ4_VALUES[0]), above = same(IQ4_VALUES[1]);
    codes count = {0};
#pragma GCC unroll 14
    for (int k = 1; k < 15; k++) {
        codes past = v >= IQ4_VALUES[k];
        below += (lanes)(past & bits(same(IQ4_VALUES[k] - IQ4_VALUES[k - 1])));
        above += (lanes)(past & bits(same(IQ4_VALUES[k + 1] - IQ4_VALUES[k])));
        count -= past;
    }
    codes is_below = v - below < above - v;
    *place = count + 1 + is_below;
    return pick(is_below, below, above);
}

INLINE lanes search_values(const lanes *x) {
    lanes size, extremum = extreme(x, 32, &size), scale = ZERO, best = ZERO;
    for (int step = -8; step <= 7; step++) { /* first the one at the end itself */
        lanes inverse = step == -8 ? 1 / (-extremum / IQ4_VALUES[0]) : (step + IQ4_VALUES[0]) / extremum;
        lanes sum_qx = ZERO, sum_q2 = ZERO;
        codes place;
        for (int i = 0; i < 32; i++) {
            lanes q = look_up(inverse * x[i], &place), w = x[i] * x[i];
            sum_qx += w * q * x[i], sum_q2 += w * q * q;
        }
        codes some = sum_q2 > 0, better = some & (sum_qx * sum_qx > best * sum_q2);
        if (step == -8) better = ~(codes){0};
        lanes found = pick(some, sum_qx / sum_q2, ZERO);
        scale = pick(better, found, scale), best = pick(better, found * sum_qx, best);
    }
    return pick(size < TINY, ZERO, scale);
}

/* Groups of n weights one after the other -> lanes; and codes back. */
INLINE void to_lanes(const float *w, int n, lanes *x) {
    for (int i = 0; i < n; i++) EACH(LANES) x[i][j] = w[j * n + i];
}
INLINE void from_lanes(const codes *code, int n, uint8_t *out) {
    for (int i = 0; i < n; i++) EACH(LANES) out[j * n + i] = (uint8_t)code[i][j];
}
INLINE lanes load(const float *from) {
    lanes v;
    memcpy(&v, from, sizeof v);
    return v;
}
INLINE void store(lanes v, float *to) { memcpy(to, &v, sizeof v); }

/* What follows makes blocks of sixteen groups, `PARTS` vectors of them; p is the place of the first of a vector. */
#define EACH_PART for (int p = 0; p < 16; p += LANES)
#define PARTS (16 / LANES)

/* Codes of two, four or six bits of 128 weights each are packed as ggml has them: bits of weight j beside those of j + 32. */
INLINE void pack_pairs(const uint8_t *code, uint8_t *out) {
    for (int half = 0; half < 2; half++, code += 128, out += 32)
        EACH(32) out[j] = (uint8_t)(code[j] | code[j + 32] << 2 | code[j + 64] << 4 | code[j + 96] << 6);
}

/* Scales and minima of affine codes of sixteen groups of n; then the codes at the scales d and minima dm that were kept. */
INLINE void affine(const float *w, int n, int top, float first, int steps, int absolute, lanes x[][32], codes code[][32],
                   float *scales, float *minima) {
    EACH_PART {
        lanes *v = x[p / LANES], importance[32], mean = ZERO, minimum;
        to_lanes(w + p * n, n, v);
        if (!absolute) {
            for (int i = 0; i < n; i++) mean += v[i] * v[i];
            mean = mean / (float)n;
            EACH(LANES) mean[j] = sqrtf(mean[j]);
        }
        for (int i = 0; i < n; i++) importance[i] = mean + magnitude(v[i]);
        store(search_affine(v, importance, n, top, first, steps, absolute, code[p / LANES], &minimum), scales + p);
        store(minimum, minima + p);
    }
}
INLINE void settle(lanes x[][32], codes code[][32], int n, const float *d, const float *dm, int low, int high, int zero,
                   uint8_t *packed) { /* a scale of zero leaves the codes that were found */
    EACH_PART {
        lanes *v = x[p / LANES], scale = load(d + p), minimum = dm ? load(dm + p) : ZERO;
        codes *c = code[p / LANES];
        for (int i = 0; i < n; i++)
            c[i] = choose(scale == 0, c[i], clamp(nearest((v[i] + minimum) / scale), low, high) + zero);
        from_lanes(c, n, packed + p * n);
    }
}

INLINE float highest(const float *values, int count) {
    float found = 0;
    EACH(count) found = values[j] > found ? values[j] : found;
    return found;
}

/* Q4_K (top 15) and Q5_K (top 31): two blocks of eight groups of 32. `b`: `size` bytes each. */
INLINE void affine_k(const float *w, uint8_t *b, int size, int top, float first, int steps) {
    lanes x[PARTS][32];
    codes code[PARTS][32];
    float scales[16], minima[16], d[16], dm[16];
    uint8_t packed[512];
    affine(w, 32, top, first, steps, 0, x, code, scales, minima);
    for (int block = 0; block < 2; block++) {
        float scale = highest(scales + 8 * block, 8), minimum = highest(minima + 8 * block, 8);
        uint8_t *at = b + block * size, *s = at + 4;
        float one = put_half(scale / 63.f, at), other = put_half(minimum / 63.f, at + 2);
        float by_scale = scale > 0 ? 63.f / scale : 0, by_minimum = minimum > 0 ? 63.f / minimum : 0;
        for (int k = 0; k < 8; k++) {
            int ls = (uint8_t)nearest_one(by_scale * scales[8 * block + k]);
            int lm = (uint8_t)nearest_one(by_minimum * minima[8 * block + k]);
            ls = ls < 63 ? ls : 63, lm = lm < 63 ? lm : 63;
            if (k < 4) {
                s[k] = (uint8_t)ls, s[k + 4] = (uint8_t)lm;
            } else {
                s[k + 4] = (uint8_t)((ls & 15) | (lm & 15) << 4);
                s[k - 4] |= (uint8_t)(ls >> 4 << 6), s[k] |= (uint8_t)(lm >> 4 << 6);
            }
            d[8 * block + k] = one * (float)ls, dm[8 * block + k] = other * (float)lm;
        }
    }
    settle(x, code, 32, d, dm, 0, top, 0, packed);
    for (int block = 0; block < 2; block++) {
        uint8_t *c = packed + 256 * block, *q = b + block * size + 16;
        if (top == 31) {
            memset(q, 0, 32);
            for (int k = 0; k < 8; k++) EACH(32) q[j] |= (uint8_t)(c[32 * k + j] >> 4 << k);
            q += 32;
        }
        for (int k = 0; k < 4; k++) EACH(32) q[32 * k + j] = (uint8_t)((c[64 * k + j] & 15) | c[64 * k + 32 + j] << 4);
    }
}

INLINE void q4_k(const float *w, uint8_t *b) { affine_k(w, b, 144, 15, -1.f, 20); }
INLINE void q5_k(const float *w, uint8_t *b) { affine_k(w, b, 176, 31, -0.5f, 15); }

INLINE void q2_k(const float *w, uint8_t *b) {
    lanes x[PARTS][32];
    codes code[PARTS][32];
    float scales[16], minima[16], d[16], dm[16];
    uint8_t packed[256];
    affine(w, 16, 3, -0.5f, 15, 1, x, code, scales, minima);
    float scale = highest(scales, 16), minimum = highest(minima, 16);
    float one = put_half(scale / 15.f, b + 80), other = put_half(minimum / 15.f, b + 82);
    float by_scale = scale > 0 ? 15.f / scale : 0, by_minimum = minimum > 0 ? 15.f / minimum : 0;
    EACH(16) {
        b[j] = (uint8_t)(nearest_one(by_scale * scales[j]) | nearest_one(by_minimum * minima[j]) << 4);
        d[j] = one * (float)(b[j] & 15), dm[j] = other * (float)(b[j] >> 4);
    }
    settle(x, code, 16, d, dm, 0, 3, 0, packed);
    pack_pairs(packed, b + 16);
}

/* The scale of the largest magnitude, the first of several. */
INLINE float largest(const float *scales, int count) {
    float found = 0;
    EACH(count) found = fabsf(scales[j]) > fabsf(found) ? scales[j] : found;
    return found;
}

INLINE void q3_k(const float *w, uint8_t *b) {
    lanes x[PARTS][32];
    codes code[PARTS][32];
    float scales[16], d[16];
    uint8_t packed[256];
    EACH_PART {
        to_lanes(w + 16 * p, 16, x[p / LANES]);
        store(search_moving(x[p / LANES], 16, 4, code[p / LANES]), scales + p);
    }
    float scale = largest(scales, 16), inverse = scale ? -32.f / scale : 0;
    memset(b + 96, 0, 12);
    float one = put_half(scale ? 1 / inverse : 0, b + 108);
    EACH(16) {
        int l = (int8_t)nearest_one(inverse * scales[j]);
        l = scale ? (l < -32 ? -32 : l > 31 ? 31 : l) + 32 : 0;
        b[96 + j % 8] |= (uint8_t)(j < 8 ? l & 15 : (l & 15) << 4);
        b[104 + j % 4] |= (uint8_t)(l >> 4 << 2 * (j / 4));
        d[j] = one * (float)(l - 32);
    }
    settle(x, code, 16, d, 0, -4, 3, 4, packed);
    memset(b, 0, 32);
    for (int k = 0; k < 8; k++) EACH(32) b[j] |= (uint8_t)(packed[32 * k + j] >> 2 << k);
    EACH(256) packed[j] &= 3;
    pack_pairs(packed, b + 32);
}

INLINE void q6_k(const float *w, uint8_t *b) {
    lanes x[PARTS][32];
    codes code[PARTS][32];
    float scales[16], d[16];
    uint8_t packed[256], low[256], high[256];
    EACH_PART {
        to_lanes(w + 16 * p, 16, x[p / LANES]);
        store(search_signed(x[p / LANES], 16, 32, code[p / LANES]), scales + p);
    }
    float scale = largest(scales, 16), inverse = -128.f / scale;
    if (fabsf(scale) < TINY) {
        memset(b, 0, 210);
        return;
    }
    float one = put_half(1 / inverse, b + 208);
    EACH(16) {
        int l = nearest_one(inverse * scales[j]);
        b[192 + j] = (uint8_t)(int8_t)(l < 127 ? l : 127);
        d[j] = one * (float)(int8_t)b[192 + j];
    }
    settle(x, code, 16, d, 0, -32, 31, 32, packed);
    EACH(256) low[j] = packed[j] & 15, high[j] = packed[j] >> 4;
    for (int half = 0; half < 2; half++)
        EACH(64) b[64 * half + j] = (uint8_t)(low[128 * half + j] | low[128 * half + 64 + j] << 4);
    pack_pairs(high, b + 128);
}

INLINE void values_of(const float *w, lanes x[][32], float *scales) { /* of sixteen groups of 32 */
    EACH_PART {
        to_lanes(w + 32 * p, 32, x[p / LANES]);
        store(search_values(x[p / LANES]), scales + p);
    }
}
INLINE void place_values(lanes x[][32], const float *d, uint8_t *packed) {
    EACH_PART {
        codes code[32];
        lanes scale = load(d + p), inverse = pick(scale == 0, ZERO, 1 / scale);
        for (int i = 0; i < 32; i++) look_up(inverse * x[p / LANES][i], &code[i]);
        from_lanes(code, 32, packed + 32 * p);
    }
}
INLINE void pack_nibbles(const uint8_t *code, uint8_t *out) { EACH(16) out[j] = (uint8_t)(code[j] | code[j + 16] << 4); }

INLINE void iq4_nl(const float *w, uint8_t *b) { /* sixteen blocks of 32 */
    lanes x[PARTS][32];
    float scales[16];
    uint8_t packed[512];
    values_of(w, x, scales);
    place_values(x, scales, packed);
    for (int k = 0; k < 16; k++, b += 18) {
        put_half(scales[k], b);
        pack_nibbles(packed + 32 * k, b + 2);
    }
}

INLINE void iq4_xs(const float *w, uint8_t *b) { /* two blocks of eight groups of 32 */
    lanes x[PARTS][32];
    float scales[16], d[16];
    uint8_t packed[512];
    values_of(w, x, scales);
    for (int block = 0; block < 2; block++) {
        uint8_t *at = b + 136 * block;
        float one = -largest(scales + 8 * block, 8) / 32, by = one ? 1 / one : 0;
        put_half(one, at);
        memset(at + 2, 0, 6);
        for (int k = 0; k < 8; k++) {
            int l = nearest_one(by * scales[8 * block + k]);
            l = l < -32 ? -32 : l > 31 ? 31 : l;
            d[8 * block + k] = one * (float)l;
            l += 32;
            at[4 + k / 2] |= (uint8_t)((l & 15) << 4 * (k % 2));
            at[2 + k / 4] |= (uint8_t)(l >> 4 << 2 * (k % 4));
        }
    }
    place_values(x, d, packed);
    for (int k = 0; k < 16; k++) pack_nibbles(packed + 32 * k, b + 136 * (k / 8) + 8 + 16 * (k % 8));
}

INLINE void q8_0(const float *restrict w, uint8_t *restrict b) { /* sixteen blocks */
    for (int k = 0; k < 16; k++, w += 32, b += 34) {
        float most = 0;
        EACH(32) most = fabsf(w[j]) > most ? fabsf(w[j]) : most;
        float d = most / 127, inverse = d < 0x1p-126f ? 0 : 1.f / d;
        put_half(d, b);
        int32_t code[32];
        EACH(32) {
            float v = w[j] * inverse, off = v - (float)(int)v; /* halves go away from zero */
            code[j] = (int)v + (off >= 0.5f) - (off <= -0.5f);
        }
        EACH(32) b[2 + j] = (uint8_t)code[j];
    }
}

/* `count` weights from `from` on, as fp32; the bits of the largest magnitude, where NaN is more than infinity. */
INLINE uint32_t read_weights(const void *in, int format, int64_t from, int count, float *w) {
    uint32_t most = 0, u[512];
    if (format == FP32) memcpy(u, (const float *)in + from, 4 * count);
    if (format == BF16) EACH(count) u[j] = (uint32_t)((const uint16_t *)in)[from + j] << 16;
    if (format == FP16) /* 2^112 moves the exponent, which is exact for subnormals too; infinity and NaN keep theirs */
        EACH(count) {
            uint32_t h = ((const uint16_t *)in)[from + j], out = (h & 0x7fff) << 13;
            float v;
            memcpy(&v, &out, 4);
            v *= 0x1p112f;
            memcpy(&out, &v, 4);
            u[j] = ((h & 0x7c00) == 0x7c00 ? 0x7f800000 | (h & 0x3ff) << 13 : out) | (h & 0x8000) << 16;
        }
    EACH(count) most = (u[j] & 0x7fffffff) > most ? u[j] & 0x7fffffff : most;
    memcpy(w, u, 4 * count);
    return most;
}

/* Of `at_once` weights that make `bytes`; a rest is filled up with zeros, whose blocks are left out. */
#define CASE(encode, id, at_once, bytes)                                                                               \
    case id:                                                                                                           \
        for (int64_t i = 0; i < weights; i += at_once, out += bytes) {                                                 \
            int64_t rest = weights - i;                                                                                \
            uint32_t seen = read_weights(in, format, i, rest < at_once ? (int)rest : at_once, w);                      \
            most = seen > most ? seen : most;                                                                          \
            if (most >= 0x7f800000) return most;                                                                       \
            if (rest >= at_once) {                                                                                     \
                encode(w, out);                                                                                        \
            } else {                                                                                                   \
                uint8_t last[bytes];                                                                                   \
                memset(w + rest, 0, sizeof(float) * (at_once - rest));                                                 \
                encode(w, last);                                                                                       \
                memcpy(out, last, bytes * rest / at_once);                                                             \
            }                                                                                                          \
        }                                                                                                              \
        return most;

/* `type`: ggml's number. in: `weights` of them in `format`, whole blocks. Returns the bits of the largest magnitude, as
 * fp32; where that is not finite nothing that was written means anything. */
uint32_t encode(int type, const void *in, int format, int64_t weights, uint8_t *out) {
    float w[512];
    uint32_t most = 0;
    switch (type) {
        CASE(q8_0, 8, 512, 544)
        CASE(q2_k, 10, 256, 84)
        CASE(q3_k, 11, 256, 110)
        CASE(q4_k, 12, 512, 288)
        CASE(q5_k, 13, 512, 352)
        CASE(q6_k, 14, 256, 210)
        CASE(iq4_nl, 20, 512, 288)
        CASE(iq4_xs, 23, 512, 272)
    }
    return most;
}
