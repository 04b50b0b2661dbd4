/* DDIM chains on a diffusion transformer. Trajectories are independent of each other, so a block of them goes through every step
 * while its activations stay in the cache. */
#include "attention.h"

#define NORM_EPS 1e-6f
#define BLOCK_VECTORS 6 /* shift, scale and gate of the attention, then of the perceptron */

/* A batch of chains and the transformer that denoises them; diffusion/native.py mirrors this struct. */
struct transformer {
    long in_dim, length, d_model, head_dim, depth, n_steps, batch; /* d_model: whole vectors */
    long n_given;              /* leading steps for which the output is zero */
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
        float mean = sum_of_lanes(sum) / d;
        for (long j = 0; j < d; j += LANES) {
            vec off = *(const vec *)(from + j) - mean;
            squares += off * off;
        }
        float factor = 1.0f / sqrtf(sum_of_lanes(squares) / d + NORM_EPS);
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

static struct heads heads_of(const struct transformer *t, long n_queries) {
    return (struct heads){n_queries, t->length, t->d_model, t->head_dim, padded(t->d_model), padded(2 * t->d_model)};
}

static long attention_floats(const struct transformer *t) {
    struct heads all = heads_of(t, t->length);
    return attend_floats(&all);
}

struct scratch {
    float *x, *normed, *wide, *query, *result, *attention;
};

static void apply(struct linear l, long rows, const float *a, long lda, float *value) {
    linear_layer(rows, l.in, padded(l.out), a, lda, l.panels, padded(l.out), (struct epilogue){.bias = l.bias, .value = value});
}

/* Of rows of whole plans, those from the step `first` on, one after the other */
static void keep_steps(long n_plans, long length, long first, long ld, float *rows) {
    long kept = (length - first) * ld;
    for (long p = 0; p < n_plans; p++) memmove(rows + p * kept, rows + (p * length + first) * ld, sizeof(float) * kept);
}

/* Of each plan, s->x has all steps before, and those from `skipped` on after. */
static void apply_block(const struct transformer *t, long block, long n_plans, long skipped, const float *vectors, const struct scratch *s) {
    long d = t->d_model, ld = padded(d), kept = t->length - skipped, rows = n_plans * kept, first = 1 + LINEARS * block;
    struct heads heads = heads_of(t, kept);
    modulated_norm(n_plans * t->length, d, s->x, vectors, vectors + d, s->normed);
    apply(linear_at(t, first + KEY_VALUE), n_plans * t->length, s->normed, ld, s->wide);
    if (skipped) {
        keep_steps(n_plans, t->length, skipped, ld, s->x);
        keep_steps(n_plans, t->length, skipped, ld, s->normed);
    }
    apply(linear_at(t, first + QUERY), rows, s->normed, ld, s->query);
    for (long p = 0; p < n_plans; p++)
        attend(&heads, s->query + p * kept * ld, s->wide + p * t->length * padded(2 * d), s->attention, NULL, s->normed + p * kept * ld);
    apply(linear_at(t, first + ATTENTION_OUT), rows, s->normed, ld, s->result);
    add_gated(rows, d, vectors + 2 * d, s->result, s->x);
    modulated_norm(rows, d, s->x, vectors + 3 * d, vectors + 4 * d, s->normed);
    struct linear expand = linear_at(t, first + EXPAND);
    gelu_layer(rows, d, padded(4 * d), s->normed, ld, expand.panels, padded(4 * d), (struct epilogue){.bias = expand.bias, .value = s->wide});
    apply(linear_at(t, first + CONTRACT), rows, s->wide, padded(4 * d), s->result);
    add_gated(rows, d, vectors + 5 * d, s->result, s->x);
}

static void run_block(const struct transformer *t, float *plans, long n_plans, const struct scratch *s) {
    long d = t->d_model, n = t->in_dim, length = t->length, rows = n_plans * length, n_vectors = BLOCK_VECTORS * t->depth + 2;
    long ld = padded(n), skipped = t->n_given, kept = length - skipped;
    for (long step = 0; step < t->n_steps; step++) {
        const float *vectors = t->vectors + step * n_vectors * d, *c = t->coefficients + 4 * step;
        apply(linear_at(t, 0), rows, plans, n, s->x);
        for (long r = 0; r < rows; r++)
            for (long j = 0; j < d; j += LANES) *(vec *)(s->x + r * padded(d) + j) += *(const vec *)(t->positions + r % length * d + j);
        for (long block = 0; block < t->depth; block++)
            apply_block(t, block, n_plans, block == t->depth - 1 ? skipped : 0, vectors + BLOCK_VECTORS * block * d, s);
        vectors += BLOCK_VECTORS * t->depth * d;
        modulated_norm(n_plans * kept, d, s->x, vectors, vectors + d, s->normed);
        apply(linear_at(t, LINEARS * t->depth + 1), n_plans * kept, s->normed, padded(d), s->result);
        for (long r = 0; r < rows; r++) {
            long of_plan = r % length;
            const float *output = of_plan < skipped ? NULL : s->result + (r / length * kept + of_plan - skipped) * ld;
            for (long j = 0; j < n; j++) {
                if (t->is_fixed[of_plan * n + j]) continue;
                float *x = plans + r * n + j;
                *x = ddim_step(*x, output ? output[j] : 0.0f, c, t->clip);
            }
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
    return rows * (t->in_dim + 3 * padded(t->d_model) + wide + widest) + attention_floats(t);
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
    s.attention = take(&memory, attention_floats(t));
    s.result = memory;
    long count = end - begin, n_blocks = (count + per_block - 1) / per_block;
    for (long b = 0; b < n_blocks; b++) { /* as even as can be */
        long first = begin + count * b / n_blocks, n = begin + count * (b + 1) / n_blocks - first;
        memcpy(plans, t->plans + first * plan, sizeof(float) * n * plan);
        run_block(t, plans, n, &s);
        memcpy(t->plans + first * plan, plans, sizeof(float) * n * plan);
    }
}

/* Denoise a batch. `memory` holds transformer_memory_floats(), its contents do not matter. */
void transformer_run(const struct transformer *t, float *memory, long n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(static, 1)
    for (long i = 0; i < n_threads; i++)
        run_part(t, t->batch * i / n_threads, t->batch * (i + 1) / n_threads, memory + i * scratch_floats(t));
}
