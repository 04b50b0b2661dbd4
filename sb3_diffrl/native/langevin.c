/* Langevin chains on stacked critics. Chains are independent of each other, so a block of them goes through every step while its
 * activations stay in the cache. */
#include "kernels.h"

#define GRADIENT_EPS 1e-8f
#define MAX_CRITICS 64

struct buffers {
    long rows, ld;
    float *value[2], *slope, *from_features, *actions, *drift, *features;
};

/* A batch of chains and the critics that drive them; lql/native.py mirrors this struct. */
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

static void pack_critic(const struct chain *c, long q, const struct critic *critic) {
    long depth = c->n_hidden, n_features = c->features_dim, n_actions = c->action_dim, width = c->widths[0];
    const float *first = c->weights[0] + q * c->first_rows * width;
    pack(first, n_features, width, width, 1, critic->from_features);
    pack(first + n_features * width, n_actions, width, width, 1, critic->from_action);
    pack(first + n_features * width, width, n_actions, 1, width, critic->to_action);
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
        pack(c->weights[i] + q * in * out, in, out, out, 1, critic->forward[i]);
        pack(c->weights[i] + q * in * out, out, in, 1, out, critic->backward[i]);
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
