/* Layers of multilayer perceptrons on a block of rows, for CPUs.
 *
 * A layer is one blocked matrix product with bias and activation (forwards) or slope (backwards) applied to each tile as it leaves
 * the registers. Each number is summed in one fixed order, so that a row's result does not depend on the others in its batch.
 *
 * Plain C with GCC's and Clang's vector extensions; see library.py for how it is compiled. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#define TILE_ROWS 12
#else
#define LANES 8
#define TILE_ROWS 6
#endif
#define THIRD (TILE_ROWS / 3)      /* a last tile may have one or two thirds of the rows */
#define ROW_PANELS 4               /* panels that a single row takes at once; at most TILE_ROWS */
#define PANEL (2 * LANES)          /* columns of a tile */
#define MAX_HIDDEN 16
#define BLOCK_ROWS (TILE_ROWS * 8) /* chains that go through the network together */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int veci __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t bf16; /* the upper half of a float: bfloat16 */
#define INLINE static inline __attribute__((always_inline))

/* What a product multiplies; sums are float32. Rows and panels of BF16 hold pairs: k is even. */
enum { SINGLE, BF16 };

enum { RELU, TANH, SILU, MISH, GELU };

/* Columns rounded up to whole panels; the rest is zero. */
static inline long padded(long n) { return (n + PANEL - 1) / PANEL * PANEL; }

INLINE vec choose(veci mask, vec a, vec b) { return (vec)((mask & (veci)a) | (~mask & (veci)b)); }

/* Bounds; NaN stays NaN. */
INLINE vec at_most(vec x, float bound) {
    const vec limit = bound + (vec){0};
#ifdef __AVX512F__
    return (vec)_mm512_min_ps((__m512)limit, (__m512)x);
#else
    return choose(x > limit, limit, x);
#endif
}

INLINE vec at_least(vec x, float bound) {
    const vec limit = bound + (vec){0};
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)limit, (__m512)x);
#else
    return choose(x < limit, limit, x);
#endif
}

/* exp for x <= 80, within 2 units in the last place; NaN stays NaN. */
INLINE vec exponential(vec x) {
    const vec zero = {0};
#ifdef __AVX512F__
    /* 2^n * p(f) with n + f = x / log 2, n whole and f in [-1/2, 1/2] */
    x = at_least(x, -87.0f);
    vec n = (vec)_mm512_roundscale_ps((__m512)(x * 1.44269502f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* Fused, so that nothing is lost of the product; then what the constant leaves out */
    vec f = (vec)_mm512_fmsub_ps((__m512)x, _mm512_set1_ps(1.44269502f), (__m512)n);
    f = f + x * 1.92596303e-8f;
    vec p = zero + 1.535336188e-4f;
    p = p * f + 1.339887440e-3f;
    p = p * f + 9.618437357e-3f;
    p = p * f + 5.550332471e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472028e-1f;
    p = p * f + 1.0f;
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    /* 2^n * p(r) with x = n log 2 + r */
    x = at_least(x, -87.0f);
    vec shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to the nearest integer, found in the last bits */
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (vec)((veci)p + ((veci)shifted << 23));
#endif
}

INLINE void activate(int kind, vec z, vec *value, vec *slope) {
    const vec zero = {0};
    if (kind == RELU) {
        *value = at_least(z, 0.0f);
        *slope = choose(z > zero, zero + 1.0f, zero);
    } else if (kind == TANH) {
        vec e = exponential(at_most(z + z, 80.0f));
        vec t = 1.0f - 2.0f / (e + 1.0f);
        *value = t;
        *slope = 1.0f - t * t;
    } else if (kind == SILU) {
        vec e = exponential(at_most(-z, 80.0f));
        vec s = 1.0f / (e + 1.0f);
        *value = z * s;
        *slope = s * (1.0f + z * (1.0f - s));
    } else if (kind == GELU) {
        /* the tanh approximation, z / (1 + exp(-2 u)), u = sqrt(2 / pi) (z + 0.044715 z^3) */
        vec u = 1.59576912f * (z + 0.044715f * z * z * z);
        vec e = exponential(at_most(-u, 80.0f));
        vec s = 1.0f / (1.0f + e);
        *value = z * s;
        *slope = s + z * s * (e * s) * (1.59576912f + 0.21406444f * z * z);
    } else {
        /* u = exp(z), m = 1 + u, r = 2 / (1 + m^2): tanh(softplus(z)) = 1 - r, of derivative u m r^2 */
        vec u = exponential(at_most(z, 20.0f));
        vec m = 1.0f + u;
        vec r = 2.0f / (1.0f + m * m);
        vec t = 1.0f - r;
        *value = z * t;
        *slope = t + z * (u * m * r * r);
    }
}

/* One tile of `rows` x `panels` panels: sums += a (rows x k, row-major) * panel (k x PANEL each), of whose columns the first
 * `halves` vectors count. */
INLINE void multiply(int rows, int panels, int halves, long k, const float *a, long lda, const float *panel, vec sums[][2]) {
    for (long i = 0; i < k; i++)
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) {
            const float *here = panel + (p * k + i) * PANEL;
            vec left = *(const vec *)here, right = *(const vec *)(here + LANES);
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                float x = a[r * lda + i];
                sums[p * rows + r][0] += x * left;
                if (halves == 2) sums[p * rows + r][1] += x * right;
            }
        }
}

/* The same on pairs of bfloat16: a (rows x k), panel (k / 2 x PANEL pairs). */
INLINE void multiply_bf16(int rows, int panels, int halves, long k, const bf16 *a, long lda, const bf16 *panel, vec sums[][2]) {
#ifdef __AVX512BF16__
    for (long i = 0; i < k; i += 2)
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) {
            const bf16 *here = panel + (p * k + i) * PANEL;
            __m512bh left = (__m512bh)_mm512_loadu_si512(here), right = (__m512bh)_mm512_loadu_si512(here + 2 * LANES);
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                int pair;
                memcpy(&pair, a + r * lda + i, sizeof pair);
                __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
                sums[p * rows + r][0] = (vec)_mm512_dpbf16_ps((__m512)sums[p * rows + r][0], x, left);
                if (halves == 2) sums[p * rows + r][1] = (vec)_mm512_dpbf16_ps((__m512)sums[p * rows + r][1], x, right);
            }
        }
#else
    (void)rows, (void)panels, (void)halves, (void)k, (void)a, (void)lda, (void)panel, (void)sums;
    abort(); /* callers ask has_bf16_products() */
#endif
}

/* The nearest bfloat16, ties to even, in the upper half; NaN stays NaN. */
INLINE uint32_t nearest_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x != x ? bits | 0x400000 : bits + 0x7FFF + (bits >> 16 & 1);
}

INLINE void store_bf16(bf16 *to, vec x) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    for (int i = 0; i < LANES; i++) to[i] = nearest_bf16(x[i]) >> 16;
#endif
}

/* What happens to a tile when its sums are there. */
struct epilogue {
    const float *add;   /* per row and column, or NULL */
    const float *bias;  /* per column, or NULL */
    const float *times; /* per row and column (backwards: the slope), or NULL */
    const float *last;  /* per column: multiplies the slope of the last hidden layer, or NULL */
    float *value;       /* or NULL */
    bf16 *bf16_value; /* the value in bfloat16, or NULL */
    float *slope;       /* or NULL */
    bf16 *bf16_slope; /* the slope in bfloat16, or NULL */
    int accumulate;     /* add to what `value` holds */
};

INLINE void tile(int rows, int panels, int halves, long k, const void *a, long lda, const void *panel, long column, long ld,
                 const struct epilogue *e, int activation, int factors) {
    vec sums[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < rows * panels; i++) sums[i][0] = sums[i][1] = (vec){0};
    if (factors == BF16)
        multiply_bf16(rows, panels, halves, k, a, lda, panel, sums);
    else
        multiply(rows, panels, halves, k, a, lda, panel, sums);
#pragma GCC unroll 12
    for (int i = 0; i < rows * panels; i++)
        for (int half = 0; half < halves; half++) {
            long j = column + i / rows * PANEL + half * LANES, at = i % rows * ld + j;
            vec z = sums[i][half];
            if (e->add) z += *(const vec *)(e->add + at);
            if (e->bias) z += *(const vec *)(e->bias + j);
            if (activation >= 0) {
                vec value, slope;
                activate(activation, z, &value, &slope);
                if (e->last) slope *= *(const vec *)(e->last + j);
                if (e->value) *(vec *)(e->value + at) = value;
                if (e->bf16_value) store_bf16(e->bf16_value + at, value);
                if (e->slope) *(vec *)(e->slope + at) = slope;
                if (e->bf16_slope) store_bf16(e->bf16_slope + at, slope);
            } else {
                if (e->times) z *= *(const vec *)(e->times + at);
                if (e->accumulate) z += *(const vec *)(e->value + at);
                if (e->bf16_value)
                    store_bf16(e->bf16_value + at, z);
                else
                    *(vec *)(e->value + at) = z;
            }
        }
}

INLINE struct epilogue below(struct epilogue e, long offset) {
    if (e.add) e.add += offset;
    if (e.times) e.times += offset;
    if (e.value) e.value += offset;
    if (e.bf16_value) e.bf16_value += offset;
    if (e.slope) e.slope += offset;
    if (e.bf16_slope) e.bf16_slope += offset;
    return e;
}

/* rows x n product: a (rows x k) * panels (n / PANEL panels of k x PANEL), both of the type `factors`; with `halves` = 1 only the
 * first half of each panel. */
INLINE void layer(long rows, long k, long n, const void *a, long lda, const void *panels, long ld, struct epilogue e, int activation,
                  int factors, int halves) {
    const long size = factors == BF16 ? sizeof(bf16) : sizeof(float);
#define AT(matrix, offset) ((const char *)(matrix) + size * (offset))
    /* One row alone: several panels at once keep the arithmetic units busy. */
    if (rows == 1) {
        long column = 0;
        for (; column + ROW_PANELS * PANEL <= n; column += ROW_PANELS * PANEL)
            tile(1, ROW_PANELS, halves, k, a, lda, AT(panels, column * k), column, ld, &e, activation, factors);
        for (; column < n; column += PANEL) tile(1, 1, halves, k, a, lda, AT(panels, column * k), column, ld, &e, activation, factors);
        return;
    }
    /* The last tile may write rows past the end: buffers hold whole tiles. */
    for (long column = 0; column < n; column += PANEL)
        for (long row = 0; row < rows; row += TILE_ROWS) {
            struct epilogue here = below(e, row * ld);
            const void *rows_a = AT(a, row * lda), *panel = AT(panels, column * k);
            if (rows - row <= THIRD)
                tile(THIRD, 1, halves, k, rows_a, lda, panel, column, ld, &here, activation, factors);
            else if (rows - row <= 2 * THIRD)
                tile(2 * THIRD, 1, halves, k, rows_a, lda, panel, column, ld, &here, activation, factors);
            else
                tile(TILE_ROWS, 1, halves, k, rows_a, lda, panel, column, ld, &here, activation, factors);
        }
#undef AT
}

#define LAYER(NAME, KIND, FACTORS, HALVES)                                                                                   \
    static __attribute__((noinline, unused)) void NAME(long rows, long k, long n, const void *a, long lda, const void *panels, \
                                                       long ld, struct epilogue e) {                                         \
        layer(rows, k, n, a, lda, panels, ld, e, KIND, FACTORS, HALVES);                                                     \
    }
LAYER(linear_layer, -1, SINGLE, 2)
LAYER(relu_layer, RELU, SINGLE, 2)
LAYER(tanh_layer, TANH, SINGLE, 2)
LAYER(silu_layer, SILU, SINGLE, 2)
LAYER(mish_layer, MISH, SINGLE, 2)
LAYER(gelu_layer, GELU, SINGLE, 2)
/* For results of at most LANES columns */
LAYER(narrow_layer, -1, SINGLE, 1)
typedef void layer_function(long, long, long, const void *, long, const void *, long, struct epilogue);
static layer_function *const ACTIVATED[] __attribute__((unused)) = {relu_layer, tanh_layer, silu_layer, mish_layer};

INLINE void pack_panel(const float *w, long k, int count, long stride_k, long stride_n, float *panel) {
    for (long i = 0; i < k; i++)
        for (int j = 0; j < count; j++) panel[i * PANEL + j] = w[i * stride_k + j * stride_n];
}

/* weight (k x n, element (i, j) at i * stride_k + j * stride_n) into panels of k x PANEL, zero beyond n */
INLINE void pack(const float *w, long k, long n, long stride_k, long stride_n, float *panels) {
    long column = 0;
    for (; column + PANEL <= n; column += PANEL) pack_panel(w + column * stride_n, k, PANEL, stride_k, stride_n, panels + column * k);
    if (column == n) return;
    memset(panels + column * k, 0, sizeof(float) * k * PANEL);
    pack_panel(w + column * stride_n, k, n - column, stride_k, stride_n, panels + column * k);
}

INLINE uint32_t bf16_pair(float first, float second) { return nearest_bf16(first) >> 16 | (nearest_bf16(second) & 0xFFFF0000); }

INLINE void pack_bf16_panel(const float *w, long k, int count, long stride_k, long stride_n, uint32_t *panel) {
    for (long i = 0; i < k / 2; i++)
        for (int j = 0; j < count; j++) {
            const float *first = w + 2 * i * stride_k + j * stride_n;
            panel[i * PANEL + j] = bf16_pair(first[0], first[stride_k]);
        }
    if (k % 2)
        for (int j = 0; j < count; j++) panel[k / 2 * PANEL + j] = bf16_pair(w[(k - 1) * stride_k + j * stride_n], 0.0f);
}

/* The same in bfloat16: panels of PANEL pairs for every two rows; an odd last row has zeros beside it. */
INLINE void pack_bf16(const float *w, long k, long n, long stride_k, long stride_n, void *panels) {
    long rows = (k + 1) / 2, column = 0;
    for (; column + PANEL <= n; column += PANEL)
        pack_bf16_panel(w + column * stride_n, k, PANEL, stride_k, stride_n, (uint32_t *)panels + column * rows);
    if (column == n) return;
    memset((uint32_t *)panels + column * rows, 0, sizeof(uint32_t) * rows * PANEL);
    pack_bf16_panel(w + column * stride_n, k, n - column, stride_k, stride_n, (uint32_t *)panels + column * rows);
}

static inline void pad(const float *rows, long n_rows, long n, float *to) {
    for (long i = 0; i < n_rows; i++)
        for (long j = 0; j < padded(n); j++) to[i * padded(n) + j] = j < n ? rows[i * n + j] : 0.0f;
}

static inline long whole_tiles(long rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS; }

/* One step of DDIM on one number: x0 = c0 x + c1 output, within the bounds, then c2 x + c3 x0. */
INLINE float ddim_step(float x, float output, const float *c, float bound) {
    float x0 = c[0] * x + c[1] * output;
    x0 = x0 > bound ? bound : x0 < -bound ? -bound : x0;
    return c[2] * x + c[3] * x0;
}

static inline float *take(float **memory, long n) {
    float *here = *memory;
    *memory += n;
    return here;
}

static inline float *take_zeros(float **memory, long n) { return memset(take(memory, n), 0, sizeof(float) * n); }
