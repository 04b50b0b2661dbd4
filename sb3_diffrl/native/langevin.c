/* Langevin chains on stacked critics. Chains are independent of each other, so a block of them goes through every step while its
 * activations stay in the cache. With factors of bfloat16, what multiplies hidden layers is rounded: values, gradients and weights. */
#include "kernels.h"

LAYER(bf16_linear_layer, -1, BF16, 2)
LAYER(bf16_relu_layer, RELU, BF16, 2)
LAYER(bf16_tanh_layer, TANH, BF16, 2)
LAYER(bf16_silu_layer, SILU, BF16, 2)
LAYER(bf16_mish_layer, MISH, BF16, 2)
LAYER(bf16_narrow_layer, -1, BF16, 1)
static layer_function *const ACTIVATED_BF16[] = {bf16_relu_layer, bf16_tanh_layer, bf16_silu_layer, bf16_mish_layer};

#define GRADIENT_EPS 1e-8f
#define MAX_CRITICS 64

struct buffers {
    long rows, ld;
    void *value[2]; /* of the type of the factors */
    float *slope, *from_features, *actions, *drift, *features;
};

/* A batch of chains and the critics that drive them; lql/native.py mirrors this struct. */
struct chain {
    long n_critics, features_dim, action_dim, first_rows, n_hidden, n_levels, n_steps, batch;
    int activation, normalize, factors;       /* factors: SINGLE or BF16 */
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
    float *from_features, *from_action, *output, *level_terms, *bias[MAX_HIDDEN];
    void *to_action, *forward[MAX_HIDDEN], *backward[MAX_HIDDEN]; /* of the type of the factors */
};

/* Rows of a panel, or columns of what it multiplies: pairs are whole. */
static long depth_of(const struct chain *c, long width) { return c->factors == BF16 ? width + width % 2 : width; }

/* Floats that a product's panels take. */
static long panel_floats(const struct chain *c, long k, long n) {
    return depth_of(c, k) * padded(n) / (c->factors == BF16 ? 2 : 1);
}

/* Place a critic in memory; returns how many floats it takes. */
static long lay_out(const struct chain *c, float *memory, struct critic *critic) {
    long used = 0, first = padded(c->widths[0]), last = c->n_hidden - 1;
#define TAKE(field, n) (critic->field = memory + used, used += (n))
    TAKE(from_features, c->features_dim * first);
    TAKE(from_action, c->action_dim * first);
    TAKE(to_action, panel_floats(c, c->widths[0], c->action_dim));
    TAKE(output, padded(c->widths[last]));
    TAKE(level_terms, c->n_levels * first);
    for (long i = 0; i <= last; i++) {
        TAKE(bias[i], padded(c->widths[i]));
        if (i == 0) continue;
        TAKE(forward[i], panel_floats(c, c->widths[i - 1], c->widths[i]));
        TAKE(backward[i], panel_floats(c, c->widths[i], c->widths[i - 1]));
    }
#undef TAKE
    return used;
}

/* Pack in the type of the factors. */
static void pack_factor(const struct chain *c, const float *w, long k, long n, long stride_k, long stride_n, void *panels) {
    if (c->factors == BF16)
        pack_bf16(w, k, n, stride_k, stride_n, panels);
    else
        pack(w, k, n, stride_k, stride_n, panels);
}

static void pack_critic(const struct chain *c, long q, const struct critic *critic) {
    long depth = c->n_hidden, n_features = c->features_dim, n_actions = c->action_dim, width = c->widths[0];
    const float *first = c->weights[0] + q * c->first_rows * width;
    pack(first, n_features, width, width, 1, critic->from_features);
    pack(first + n_features * width, n_actions, width, width, 1, critic->from_action);
    pack_factor(c, first + n_features * width, width, n_actions, 1, width, critic->to_action);
    pad(c->weights[depth] + q * c->widths[depth - 1], 1, c->widths[depth - 1], critic->output);
    if (c->level_terms)
        pad(c->level_terms + q * c->n_levels * width, c->n_levels, width, critic->level_terms);
    else
        memset(critic->level_terms, 0, sizeof(float) * c->n_levels * padded(width));
    for (long i = 0; i < depth; i++) {
        long out = c->widths[i];
        pad(c->biases[i] + q * out, 1, out, critic->bias[i]);
        if (i == 0) continue;
        long in = c->widths[i - 1];
        pack_factor(c, c->weights[i] + q * in * out, in, out, out, 1, critic->forward[i]);
        pack_factor(c, c->weights[i] + q * in * out, out, in, 1, out, critic->backward[i]);
    }
}

/* Where an epilogue puts its value: in the type of the factors. */
static void put_value(const struct chain *c, struct epilogue *e, void *value) {
    if (c->factors == BF16)
        e->bf16_value = value;
    else
        e->value = value;
}

/* One step's drift: the gradient of the critics' sum, (rows, padded action_dim), into `drift`. */
static void add_gradient(const struct chain *c, const struct critic *critic, long level, long rows, const float *actions,
                         const struct buffers *b, const float *from_features) {
    long last = c->n_hidden - 1, ld = b->ld, slopes = b->rows * ld, action_ld = padded(c->action_dim);
    layer_function *activated = (c->factors == BF16 ? ACTIVATED_BF16 : ACTIVATED)[c->activation];
    layer_function *linear = c->factors == BF16 ? bf16_linear_layer : linear_layer;
    for (long i = 0; i <= last; i++) {
        struct epilogue e = {.slope = b->slope + i * slopes};
        if (i < last) put_value(c, &e, b->value[i % 2]);
        if (i == 0) {
            e.add = from_features;
            e.bias = critic->level_terms + level * padded(c->widths[0]);
        } else {
            e.bias = critic->bias[i];
        }
        if (i == last) {
            /* The slope of the last hidden layer, times the weights of the output, is the gradient there. */
            e.last = critic->output;
            if (c->factors == BF16) e.slope = NULL, e.bf16_slope = b->value[last % 2];
        }
        if (i == 0)
            ACTIVATED[c->activation](rows, c->action_dim, padded(c->widths[0]), actions, action_ld, critic->from_action, ld, e);
        else
            activated(rows, depth_of(c, c->widths[i - 1]), padded(c->widths[i]), b->value[(i - 1) % 2], ld, critic->forward[i], ld, e);
    }
    const void *gradient = c->factors == BF16 ? b->value[last % 2] : b->slope + last * slopes;
    for (long i = last; i > 0; i--) {
        struct epilogue e = {.times = b->slope + (i - 1) * slopes};
        put_value(c, &e, b->value[(i + 1) % 2]);
        linear(rows, depth_of(c, c->widths[i]), padded(c->widths[i - 1]), gradient, ld, critic->backward[i], ld, e);
        gradient = b->value[(i + 1) % 2];
    }
    struct epilogue e = {.value = b->drift, .accumulate = 1};
    if (c->action_dim <= LANES) linear = c->factors == BF16 ? bf16_narrow_layer : narrow_layer;
    linear(rows, depth_of(c, c->widths[0]), action_ld, gradient, ld, critic->to_action, action_ld, e);
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

static long rows_of_block(const struct chain *c) { return c->batch < BLOCK_ROWS ? whole_tiles(c->batch) : BLOCK_ROWS; }

static long row_length(const struct chain *c) {
    long widest = 0;
    for (long i = 0; i < c->n_hidden; i++)
        if (padded(c->widths[i]) > widest) widest = padded(c->widths[i]);
    return widest;
}

static long scratch_floats(const struct chain *c) {
    long wide = row_length(c) * (2 + c->n_hidden + c->n_critics);
    return rows_of_block(c) * (wide + 2 * padded(c->action_dim) + c->features_dim);
}

/* Whether factors may be BF16: where the processor multiplies them. */
int has_bf16_products(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

/* Floats that langevin_run() needs to work in. */
long langevin_memory_floats(const struct chain *c, long n_threads) {
    struct critic critic;
    return c->n_critics * lay_out(c, NULL, &critic) + n_threads * scratch_floats(c);
}

static void run_part(const struct chain *c, const struct critic *critics, long begin, long end, float *memory) {
    long rows = rows_of_block(c), ld = padded(c->action_dim);
    struct buffers b = {.rows = rows, .ld = row_length(c)};
    long wide = rows * b.ld;
    b.value[0] = take(&memory, wide);
    b.value[1] = take(&memory, wide);
    b.slope = take(&memory, c->n_hidden * wide);
    b.from_features = take(&memory, c->n_critics * wide);
    b.actions = take(&memory, rows * ld);
    b.drift = take(&memory, rows * ld);
    b.features = take_zeros(&memory, rows * c->features_dim);
    for (long row = begin; row < end; row += rows) run_block(c, critics, row, end - row < rows ? end - row : rows, &b);
}

/* Run the chains of a batch. `memory` holds langevin_memory_floats(), its contents do not matter. */
void langevin_run(const struct chain *c, float *memory, long n_threads) {
    struct critic critics[MAX_CRITICS];
    for (long q = 0; q < c->n_critics; q++) {
        memory += lay_out(c, memory, &critics[q]);
        pack_critic(c, q, &critics[q]);
    }
    long scratch = scratch_floats(c);
#pragma omp parallel for num_threads(n_threads) schedule(static, 1)
    for (long i = 0; i < n_threads; i++)
        run_part(c, critics, c->batch * i / n_threads, c->batch * (i + 1) / n_threads, memory + i * scratch);
}
