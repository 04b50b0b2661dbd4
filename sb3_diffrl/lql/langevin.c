/* Langevin chains on stacked multilayer perceptrons, for CPUs.
 *
 * Chains are independent of each other, so a block of them goes through every step while its activations stay in the cache; a
 * layer is one blocked matrix product with bias and activation (forwards) or slope (backwards) applied to each tile as it leaves
 * the registers. Each number is summed in one fixed order, so that a chain does not depend on the others in its batch.
 *
 * Plain C with GCC's and Clang's vector extensions; see native.py for how it is compiled and called. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#define TILE_ROWS 12
#else
#define LANES 8
#define TILE_ROWS 6
#endif
#define ROW_PANELS 4               /* panels that a single row takes at once; at most TILE_ROWS */
#define PANEL (2 * LANES)          /* columns of a tile */
#define MAX_HIDDEN 16
#define GRADIENT_EPS 1e-8f
#define BLOCK_ROWS (TILE_ROWS * 8) /* chains that go through the network together */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int veci __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))

enum { RELU, TANH, SILU, MISH };

/* Columns rounded up to whole panels; the rest is zero. */
static long padded(long n) { return (n + PANEL - 1) / PANEL * PANEL; }

INLINE vec choose(veci mask, vec a, vec b) { return (vec)((mask & (veci)a) | (~mask & (veci)b)); }

/* exp for x <= 80: 2^n * p(r), within 2 units in the last place; NaN stays NaN. */
INLINE vec exponential(vec x) {
    const vec zero = {0};
    x = choose(x < zero - 87.0f, zero - 87.0f, x);
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
}

INLINE void activate(int kind, vec z, vec *value, vec *slope) {
    const vec zero = {0};
    if (kind == RELU) {
        *value = choose(z < zero, zero, z);
        *slope = choose(z > zero, zero + 1.0f, zero);
    } else if (kind == TANH) {
        vec e = exponential(choose(z > zero + 40.0f, zero + 80.0f, z + z));
        vec t = 1.0f - 2.0f / (e + 1.0f);
        *value = t;
        *slope = 1.0f - t * t;
    } else if (kind == SILU) {
        vec e = exponential(choose(z < zero - 80.0f, zero + 80.0f, -z));
        vec s = 1.0f / (e + 1.0f);
        *value = z * s;
        *slope = s * (1.0f + z * (1.0f - s));
    } else {
        /* u = exp(z), m = 1 + u, r = 2 / (1 + m^2): tanh(softplus(z)) = 1 - r, of derivative u m r^2 */
        vec u = exponential(choose(z > zero + 20.0f, zero + 20.0f, z));
        vec m = 1.0f + u;
        vec r = 2.0f / (1.0f + m * m);
        vec t = 1.0f - r;
        *value = z * t;
        *slope = t + z * (u * m * r * r);
    }
}

/* One tile of `rows` x `panels` panels: sums += a (rows x k, row-major) * panel (k x PANEL each). */
INLINE void multiply(int rows, int panels, long k, const float *a, long lda, const float *panel, vec sums[][2]) {
    for (long i = 0; i < k; i++)
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) {
            const float *here = panel + (p * k + i) * PANEL;
            vec left = *(const vec *)here, right = *(const vec *)(here + LANES);
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                float x = a[r * lda + i];
                sums[p * rows + r][0] += x * left;
                sums[p * rows + r][1] += x * right;
            }
        }
}

/* What happens to a tile when its sums are there. */
struct epilogue {
    const float *add;   /* per row and column, or NULL */
    const float *bias;  /* per column, or NULL */
    const float *times; /* per row and column (backwards: the slope), or NULL */
    const float *last;  /* per column: multiplies the slope of the last hidden layer, or NULL */
    float *value;       /* or NULL */
    float *slope;       /* or NULL */
    int accumulate;     /* add to what `value` holds */
};

INLINE void tile(int rows, int panels, long k, const float *a, long lda, const float *panel, long column, long ld,
                 const struct epilogue *e, int activation) {
    vec sums[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < rows * panels; i++) sums[i][0] = sums[i][1] = (vec){0};
    multiply(rows, panels, k, a, lda, panel, sums);
#pragma GCC unroll 12
    for (int i = 0; i < rows * panels; i++)
        for (int half = 0; half < 2; half++) {
            long j = column + i / rows * PANEL + half * LANES, at = i % rows * ld + j;
            vec z = sums[i][half];
            if (e->add) z += *(const vec *)(e->add + at);
            if (e->bias) z += *(const vec *)(e->bias + j);
            if (activation >= 0) {
                vec value, slope;
                activate(activation, z, &value, &slope);
                if (e->last) slope *= *(const vec *)(e->last + j);
                if (e->value) *(vec *)(e->value + at) = value;
                *(vec *)(e->slope + at) = slope;
            } else {
                if (e->times) z *= *(const vec *)(e->times + at);
                if (e->accumulate) z += *(const vec *)(e->value + at);
                *(vec *)(e->value + at) = z;
            }
        }
}

/* rows x n product: a (rows x k) * panels (n / PANEL panels of k x PANEL). */
INLINE void layer(long rows, long k, long n, const float *a, long lda, const float *panels, long ld, struct epilogue e, int activation) {
    /* One row alone: several panels at once keep the arithmetic units busy. */
    if (rows == 1) {
        long column = 0;
        for (; column + ROW_PANELS * PANEL <= n; column += ROW_PANELS * PANEL)
            tile(1, ROW_PANELS, k, a, lda, panels + column * k, column, ld, &e, activation);
        for (; column < n; column += PANEL) tile(1, 1, k, a, lda, panels + column * k, column, ld, &e, activation);
        return;
    }
    /* The last tile may write rows past the end: buffers hold whole tiles. */
    for (long column = 0; column < n; column += PANEL)
        for (long row = 0; row < rows; row += TILE_ROWS) {
            struct epilogue here = e;
            if (e.add) here.add += row * ld;
            if (e.times) here.times += row * ld;
            if (e.value) here.value += row * ld;
            if (e.slope) here.slope += row * ld;
            tile(TILE_ROWS, 1, k, a + row * lda, lda, panels + column * k, column, ld, &here, activation);
        }
}

#define LAYER(NAME, KIND)                                                                                                    \
    static __attribute__((noinline)) void NAME(long rows, long k, long n, const float *a, long lda, const float *panels,     \
                                               long ld, struct epilogue e) {                                                 \
        layer(rows, k, n, a, lda, panels, ld, e, KIND);                                                                      \
    }
LAYER(linear_layer, -1)
LAYER(relu_layer, RELU)
LAYER(tanh_layer, TANH)
LAYER(silu_layer, SILU)
LAYER(mish_layer, MISH)
typedef void layer_function(long, long, long, const float *, long, const float *, long, struct epilogue);
static layer_function *const ACTIVATED[] = {relu_layer, tanh_layer, silu_layer, mish_layer};

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

static void pad(const float *rows, long n_rows, long n, float *to) {
    for (long i = 0; i < n_rows; i++)
        for (long j = 0; j < padded(n); j++) to[i * padded(n) + j] = j < n ? rows[i * n + j] : 0.0f;
}

struct buffers {
    long rows, ld;
    float *value[2], *slope, *from_features, *actions, *drift, *features;
};

/* A batch of chains and the critics that drive them; native.py mirrors this struct. */
struct chain {
    long n_critics, features_dim, action_dim, first_rows, n_hidden, n_levels, n_steps, batch;
    int activation, normalize;
    const long *widths;                       /* of the hidden layers */
    const float *const *weights;              /* n_hidden + 1 arrays (n_critics, in, out); rows of the first: features, action, rest */
    const float *const *biases;               /* n_hidden arrays (n_critics, out) */
    const float *level_terms;                 /* what the level adds to the first layer, (n_critics, n_levels, widths[0]), or NULL */
    const float *drift_scales, *noise_scales; /* (n_levels) */
    const float *features;                    /* (batch, features_dim) */
    const float *noise;                       /* (n_levels, n_steps, batch, action_dim) */
    float *actions;                           /* (batch, action_dim): the start, then the result */
};

/* One critic's weights in panels, columns padded with zeros. `backward` holds transposes. */
struct critic {
    float *from_features, *from_action, *to_action, *output, *level_terms;
    float *forward[MAX_HIDDEN], *backward[MAX_HIDDEN], *bias[MAX_HIDDEN];
};

/* Place a critic in memory; returns how many floats it takes. */
static long lay_out(const struct chain *c, float *memory, struct critic *critic) {
    long used = 0, first = padded(c->widths[0]), last = c->n_hidden - 1;
#define TAKE(field, n) (critic->field = memory + used, used += (n))
    TAKE(from_features, c->features_dim * first);
    TAKE(from_action, c->action_dim * first);
    TAKE(to_action, c->widths[0] * padded(c->action_dim));
    TAKE(output, padded(c->widths[last]));
    TAKE(level_terms, c->n_levels * first);
    for (long i = 0; i <= last; i++) {
        TAKE(bias[i], padded(c->widths[i]));
        if (i == 0) continue;
        TAKE(forward[i], c->widths[i - 1] * padded(c->widths[i]));
        TAKE(backward[i], c->widths[i] * padded(c->widths[i - 1]));
    }
#undef TAKE
    return used;
}

long langevin_packed_floats(const struct chain *c) {
    struct critic critic;
    return c->n_critics * lay_out(c, NULL, &critic);
}

/* Copy the critics' weights into `memory`, of langevin_packed_floats() floats. */
void langevin_pack(const struct chain *c, float *memory) {
    long depth = c->n_hidden, n_features = c->features_dim, n_actions = c->action_dim, width = c->widths[0];
    for (long q = 0; q < c->n_critics; q++) {
        struct critic critic;
        memory += lay_out(c, memory, &critic);
        const float *first = c->weights[0] + q * c->first_rows * width;
        pack(first, n_features, width, width, 1, critic.from_features);
        pack(first + n_features * width, n_actions, width, width, 1, critic.from_action);
        pack(first + n_features * width, width, n_actions, 1, width, critic.to_action);
        pad(c->weights[depth] + q * c->widths[depth - 1], 1, c->widths[depth - 1], critic.output);
        if (c->level_terms)
            pad(c->level_terms + q * c->n_levels * width, c->n_levels, width, critic.level_terms);
        else
            memset(critic.level_terms, 0, sizeof(float) * c->n_levels * padded(width));
        for (long i = 0; i < depth; i++) {
            long out = c->widths[i];
            pad(c->biases[i] + q * out, 1, out, critic.bias[i]);
            if (i == 0) continue;
            long in = c->widths[i - 1];
            pack(c->weights[i] + q * in * out, in, out, out, 1, critic.forward[i]);
            pack(c->weights[i] + q * in * out, out, in, 1, out, critic.backward[i]);
        }
    }
}

/* One step's drift: the gradient of the critics' sum, (rows, padded action_dim), into `drift`. */
static void add_gradient(const struct chain *c, const struct critic *critic, long level, long rows, const float *actions,
                         const struct buffers *b, const float *from_features) {
    long depth = c->n_hidden, ld = b->ld;
    layer_function *activated = ACTIVATED[c->activation];
    const float *inputs = actions;
    for (long i = 0; i < depth; i++) {
        struct epilogue e = {.add = i ? NULL : from_features,
                             .bias = i ? critic->bias[i] : critic->level_terms + level * padded(c->widths[0]),
                             .value = i < depth - 1 ? b->value[i % 2] : NULL,
                             .last = i < depth - 1 ? NULL : critic->output,
                             .slope = b->slope + i * b->rows * ld};
        activated(rows, i ? c->widths[i - 1] : c->action_dim, padded(c->widths[i]), inputs, i ? ld : padded(c->action_dim),
                  i ? critic->forward[i] : critic->from_action, ld, e);
        inputs = b->value[i % 2];
    }
    const float *gradient = b->slope + (depth - 1) * b->rows * ld;
    for (long i = depth - 1; i > 0; i--) {
        struct epilogue e = {.times = b->slope + (i - 1) * b->rows * ld, .value = b->value[i % 2]};
        linear_layer(rows, c->widths[i], padded(c->widths[i - 1]), gradient, ld, critic->backward[i], ld, e);
        gradient = b->value[i % 2];
    }
    struct epilogue e = {.value = b->drift, .accumulate = 1};
    linear_layer(rows, c->widths[0], padded(c->action_dim), gradient, ld, critic->to_action, padded(c->action_dim), e);
}

/* One Langevin step of a block of chains, see LangevinSampler. */
static void step(const struct chain *c, long level, long rows, const float *noise, const float *drift, float *actions) {
    long ld = padded(c->action_dim);
    for (long r = 0; r < rows; r++) {
        float scale = c->drift_scales[level];
        if (c->normalize) {
            float square = 0.0f;
            for (long j = 0; j < c->action_dim; j++) square += drift[r * ld + j] * drift[r * ld + j];
            scale = scale / (sqrtf(square) + GRADIENT_EPS);
        }
        for (long j = 0; j < c->action_dim; j++) {
            float a = actions[r * ld + j] + drift[r * ld + j] * scale + noise[r * c->action_dim + j] * c->noise_scales[level];
            actions[r * ld + j] = a > 1.0f ? 1.0f : a < -1.0f ? -1.0f : a;
        }
    }
}

static void run_block(const struct chain *c, const struct critic *critics, long begin, long rows, const struct buffers *b) {
    long ld = padded(c->action_dim), n = c->action_dim;
    memset(b->actions, 0, sizeof(float) * b->rows * ld);
    for (long r = 0; r < rows; r++) memcpy(b->actions + r * ld, c->actions + (begin + r) * n, sizeof(float) * n);
    for (long q = 0; q < c->n_critics; q++) {
        /* The observations' part of the first layer, once for the chain */
        memcpy(b->features, c->features + begin * c->features_dim, sizeof(float) * rows * c->features_dim);
        struct epilogue e = {.bias = critics[q].bias[0], .value = b->from_features + q * b->rows * b->ld};
        linear_layer(rows, c->features_dim, padded(c->widths[0]), b->features, c->features_dim, critics[q].from_features, b->ld, e);
    }
    for (long level = 0; level < c->n_levels; level++)
        for (long t = 0; t < c->n_steps; t++) {
            memset(b->drift, 0, sizeof(float) * b->rows * ld);
            for (long q = 0; q < c->n_critics; q++)
                add_gradient(c, &critics[q], level, rows, b->actions, b, b->from_features + q * b->rows * b->ld);
            step(c, level, rows, c->noise + ((level * c->n_steps + t) * c->batch + begin) * n, b->drift, b->actions);
        }
    for (long r = 0; r < rows; r++) memcpy(c->actions + (begin + r) * n, b->actions + r * ld, sizeof(float) * n);
}

/* Run chains `begin` to `end`; several threads may each run their own. Returns 0, or 1 if there is no memory. */
int langevin_run(const struct chain *c, float *packed, long begin, long end) {
    struct critic *critics = malloc(sizeof(struct critic) * c->n_critics);
    long rows = end - begin < BLOCK_ROWS ? (end - begin + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS : BLOCK_ROWS;
    long ld = padded(c->action_dim);
    struct buffers b = {.rows = rows};
    for (long i = 0; i < c->n_hidden; i++)
        if (padded(c->widths[i]) > b.ld) b.ld = padded(c->widths[i]);
    long wide = rows * b.ld, total = wide * (2 + c->n_hidden + c->n_critics) + rows * (2 * ld + c->features_dim);
    void *memory = NULL;
    if (!critics || posix_memalign(&memory, 64, sizeof(float) * total)) {
        free(critics);
        return 1;
    }
    memset(memory, 0, sizeof(float) * total);
    float *next = memory;
    b.value[0] = next;
    b.value[1] = next + wide;
    b.slope = next + 2 * wide;
    b.from_features = b.slope + c->n_hidden * wide;
    b.actions = b.from_features + c->n_critics * wide;
    b.drift = b.actions + rows * ld;
    b.features = b.drift + rows * ld;
    for (long q = 0; q < c->n_critics; q++) packed += lay_out(c, packed, &critics[q]);
    for (long row = begin; row < end; row += rows) run_block(c, critics, row, end - row < rows ? end - row : rows, &b);
    free(memory);
    free(critics);
    return 0;
}
