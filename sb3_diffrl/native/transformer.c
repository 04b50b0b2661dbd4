/* DDIM chains on a diffusion transformer. Trajectories are independent of each other, so a block of them goes through every step
 * while its activations stay in the cache. */
#include "kernels.h"

#define NORM_EPS 1e-6f
#define BLOCK_VECTORS 6 /* shift, scale and gate of the attention, then of the perceptron */

/* A batch of chains and the transformer that denoises them; diffusion/native.py mirrors this struct. */
struct transformer {
    long in_dim, length, d_model, head_dim, depth, n_steps, batch; /* d_model: whole vectors */
    float clip;                /* x0 is held in [-clip, clip] */
    const float *packed;       /* transformer_pack(): all weights and biases */
    const float *positions;    /* (length, d_model) */
    const float *vectors;      /* (n_steps, 6 depth + 2, d_model): what sets the layer norms and gates */
    const float *coefficients; /* (n_steps, 4): x0 = c0 x + c1 output, next x = c2 x + c3 x0 */
    const float *is_fixed;     /* (length, in_dim): 1 where `plans` is held as it is, 0 elsewhere */
    float *plans;              /* (batch, length, in_dim): the start, then the result */
};

/* Weights of a linear layer in panels, and its bias, padded. */
struct linear {
    long in, out;
    const float *panels, *bias;
};

enum { QUERY, KEY_VALUE, ATTENTION_OUT, EXPAND, CONTRACT, LINEARS };

static long linear_floats(long in, long out) { return (in + 1) * padded(out); }

static void sizes(const struct transformer *t, long layer, long *in, long *out) {
    long d = t->d_model, of_block[LINEARS][2] = {{d, d}, {d, 2 * d}, {d, d}, {d, 4 * d}, {4 * d, d}};
    if (layer == 0 || layer == LINEARS * t->depth + 1) {
        *in = layer ? d : t->in_dim;
        *out = layer ? t->in_dim : d;
    } else {
        *in = of_block[(layer - 1) % LINEARS][0];
        *out = of_block[(layer - 1) % LINEARS][1];
    }
}

/* Layer 0 embeds, then LINEARS layers a block, then the output. */
static struct linear linear_at(const struct transformer *t, long layer) {
    const float *memory = t->packed;
    struct linear l;
    for (long i = 0;; i++) {
        sizes(t, i, &l.in, &l.out);
        if (i == layer) break;
        memory += linear_floats(l.in, l.out);
    }
    l.panels = memory;
    l.bias = memory + l.in * padded(l.out);
    return l;
}

long transformer_packed_floats(const struct transformer *t) {
    long total = 0, in, out;
    for (long i = 0; i < LINEARS * t->depth + 2; i++) {
        sizes(t, i, &in, &out);
        total += linear_floats(in, out);
    }
    return total;
}

/* weights: of each layer, (out, in); biases: (out) */
void transformer_pack(const struct transformer *t, const float *const *weights, const float *const *biases, float *packed) {
    for (long i = 0; i < LINEARS * t->depth + 2; i++) {
        long in, out;
        sizes(t, i, &in, &out);
        pack(weights[i], in, out, 1, in, packed);
        pad(biases[i], 1, out, packed + in * padded(out));
        packed += linear_floats(in, out);
    }
}

/* Rows of d numbers, padded(d) apart, to rows of mean 0 and variance 1, then times 1 + scale, plus shift. */
static void modulated_norm(long rows, long d, const float *x, const float *shift, const float *scale, float *to) {
    for (long r = 0; r < rows; r++) {
        const float *from = x + r * padded(d);
        vec sum = {0}, squares = {0};
        for (long j = 0; j < d; j += LANES) sum += *(const vec *)(from + j);
        float mean = 0, variance = 0;
        for (int l = 0; l < LANES; l++) mean += sum[l];
        mean /= d;
        for (long j = 0; j < d; j += LANES) {
            vec off = *(const vec *)(from + j) - mean;
            squares += off * off;
        }
        for (int l = 0; l < LANES; l++) variance += squares[l];
        float factor = 1.0f / sqrtf(variance / d + NORM_EPS);
        for (long j = 0; j < d; j += LANES) {
            vec normed = (*(const vec *)(from + j) - mean) * factor;
            *(vec *)(to + r * padded(d) + j) = normed * (1.0f + *(const vec *)(scale + j)) + *(const vec *)(shift + j);
        }
    }
}

static void add_gated(long rows, long d, const float *gate, const float *from, float *x) {
    for (long r = 0; r < rows; r++)
        for (long j = 0; j < d; j += LANES) *(vec *)(x + r * padded(d) + j) += *(const vec *)(gate + j) * *(const vec *)(from + r * padded(d) + j);
}

INLINE float dot(long n, const float *a, const float *b) {
    vec sum = {0};
    long j = 0;
    for (; j + LANES <= n; j += LANES) sum += *(const vec *)(a + j) * *(const vec *)(b + j);
    float total = 0;
    for (; j < n; j++) total += a[j] * b[j];
    for (int l = 0; l < LANES; l++) total += sum[l];
    return total;
}

INLINE void add_scaled(long n, float factor, const float *from, float *to) {
    long j = 0;
    for (; j + LANES <= n; j += LANES) *(vec *)(to + j) += factor * *(const vec *)(from + j);
    for (; j < n; j++) to[j] += factor * from[j];
}

/* One trajectory's attention: every step sees every other. scores: room for padded(length). */
static void attend(const struct transformer *t, const float *query, const float *key_value, float *scores, float *to) {
    long d = t->d_model, h = t->head_dim, n = t->length, whole = padded(n), ld = padded(d), ld_key_value = padded(2 * d);
    float factor = 1.0f / sqrtf(h);
    for (long head = 0; head < d; head += h)
        for (long i = 0; i < n; i++) {
            float largest = -INFINITY, total = 0;
            for (long k = 0; k < n; k++) {
                scores[k] = factor * dot(h, query + i * ld + head, key_value + k * ld_key_value + head);
                largest = scores[k] > largest ? scores[k] : largest;
            }
            for (long k = n; k < whole; k++) scores[k] = largest;
            for (long k = 0; k < whole; k += LANES) *(vec *)(scores + k) = exponential(*(vec *)(scores + k) - largest);
            for (long k = 0; k < n; k++) total += scores[k];
            float *out = to + i * ld + head;
            memset(out, 0, sizeof(float) * h);
            for (long k = 0; k < n; k++) add_scaled(h, scores[k] / total, key_value + k * ld_key_value + d + head, out);
        }
}

struct scratch {
    float *x, *normed, *wide, *query, *result, *scores;
};

static void apply(struct linear l, long rows, const float *a, long lda, float *value) {
    linear_layer(rows, l.in, padded(l.out), a, lda, l.panels, padded(l.out), (struct epilogue){.bias = l.bias, .value = value});
}

static void apply_block(const struct transformer *t, long block, long n_plans, const float *vectors, const struct scratch *s) {
    long d = t->d_model, ld = padded(d), rows = n_plans * t->length, first = 1 + LINEARS * block;
    modulated_norm(rows, d, s->x, vectors, vectors + d, s->normed);
    apply(linear_at(t, first + QUERY), rows, s->normed, ld, s->query);
    apply(linear_at(t, first + KEY_VALUE), rows, s->normed, ld, s->wide);
    for (long p = 0; p < n_plans; p++)
        attend(t, s->query + p * t->length * ld, s->wide + p * t->length * padded(2 * d), s->scores, s->normed + p * t->length * ld);
    apply(linear_at(t, first + ATTENTION_OUT), rows, s->normed, ld, s->result);
    add_gated(rows, d, vectors + 2 * d, s->result, s->x);
    modulated_norm(rows, d, s->x, vectors + 3 * d, vectors + 4 * d, s->normed);
    struct linear expand = linear_at(t, first + EXPAND);
    gelu_layer(rows, d, padded(4 * d), s->normed, ld, expand.panels, padded(4 * d), (struct epilogue){.bias = expand.bias, .value = s->wide});
    apply(linear_at(t, first + CONTRACT), rows, s->wide, padded(4 * d), s->result);
    add_gated(rows, d, vectors + 5 * d, s->result, s->x);
}

static void run_block(const struct transformer *t, float *plans, long n_plans, const struct scratch *s) {
    long d = t->d_model, n = t->in_dim, rows = n_plans * t->length, n_vectors = BLOCK_VECTORS * t->depth + 2, ld = padded(n);
    for (long step = 0; step < t->n_steps; step++) {
        const float *vectors = t->vectors + step * n_vectors * d, *c = t->coefficients + 4 * step;
        apply(linear_at(t, 0), rows, plans, n, s->x);
        for (long r = 0; r < rows; r++)
            for (long j = 0; j < d; j += LANES) *(vec *)(s->x + r * padded(d) + j) += *(const vec *)(t->positions + r % t->length * d + j);
        for (long block = 0; block < t->depth; block++) apply_block(t, block, n_plans, vectors + BLOCK_VECTORS * block * d, s);
        vectors += BLOCK_VECTORS * t->depth * d;
        modulated_norm(rows, d, s->x, vectors, vectors + d, s->normed);
        apply(linear_at(t, LINEARS * t->depth + 1), rows, s->normed, padded(d), s->result);
        for (long r = 0; r < rows; r++)
            for (long j = 0; j < n; j++) {
                if (t->is_fixed[r % t->length * n + j]) continue;
                float *x = plans + r * n + j;
                *x = ddim_step(*x, s->result[r * ld + j], c, t->clip);
            }
    }
}

static long plans_of_block(const struct transformer *t) {
    long n = BLOCK_ROWS / t->length;
    return n < 1 ? 1 : n < t->batch ? n : t->batch;
}

static long scratch_floats(const struct transformer *t) {
    long rows = whole_tiles(plans_of_block(t) * t->length), wide = padded(4 * t->d_model);
    long widest = padded(t->in_dim) > padded(t->d_model) ? padded(t->in_dim) : padded(t->d_model);
    return rows * (t->in_dim + 3 * padded(t->d_model) + wide + widest) + padded(t->length);
}

/* Floats that transformer_run() needs to work in. */
long transformer_memory_floats(const struct transformer *t, long n_threads) { return n_threads * scratch_floats(t); }

static void run_part(const struct transformer *t, long begin, long end, float *memory) {
    long per_block = plans_of_block(t), rows = whole_tiles(per_block * t->length), d = padded(t->d_model), plan = t->length * t->in_dim;
    /* Rows beyond the block's own are computed and not used: they must be numbers. */
    memset(memory, 0, sizeof(float) * scratch_floats(t));
    float *plans = take(&memory, rows * t->in_dim);
    struct scratch s;
    s.x = take(&memory, rows * d);
    s.normed = take(&memory, rows * d);
    s.query = take(&memory, rows * d);
    s.wide = take(&memory, rows * padded(4 * t->d_model));
    s.scores = take(&memory, padded(t->length));
    s.result = memory;
    for (long i = begin; i < end; i += per_block) {
        long n = end - i < per_block ? end - i : per_block;
        memcpy(plans, t->plans + i * plan, sizeof(float) * n * plan);
        run_block(t, plans, n, &s);
        memcpy(t->plans + i * plan, plans, sizeof(float) * n * plan);
    }
}

/* Denoise a batch. `memory` holds transformer_memory_floats(), its contents do not matter. */
void transformer_run(const struct transformer *t, float *memory, long n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(static, 1)
    for (long i = 0; i < n_threads; i++)
        run_part(t, t->batch * i / n_threads, t->batch * (i + 1) / n_threads, memory + i * scratch_floats(t));
}
