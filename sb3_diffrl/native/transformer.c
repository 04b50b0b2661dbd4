/* DDIM chains on a diffusion transformer. Trajectories are independent of each other, so a block of them goes through every step
 * while its activations stay in the cache. */
#include "kernels.h"

#define NORM_EPS 1e-6f
#define QUERIES 4       /* that are scored at once */
#define MIXED 4         /* vectors of a value that are mixed at once */
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

INLINE float sum_of_lanes(vec v) {
    float sums[LANES];
    memcpy(sums, &v, sizeof sums);
    for (int width = LANES / 2; width; width /= 2)
        for (int l = 0; l < width; l++) sums[l] += sums[l + width];
    return sums[0];
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

static long whole_vectors(long n) { return (n + LANES - 1) / LANES * LANES; }

/* Keys of a head, (length, head_dim), with the steps in rows: (head_dim, whole_vectors(length)), zero beyond the last. */
static void turn_keys(const struct transformer *t, const float *keys, float *turned) {
    long whole = whole_vectors(t->length), ld = padded(2 * t->d_model);
    for (long j = 0; j < t->head_dim; j++) {
        *(vec *)(turned + (j + 1) * whole - LANES) = (vec){0};
        for (long k = 0; k < t->length; k++) turned[j * whole + k] = keys[k * ld + j];
    }
}

/* scores (count x whole_vectors(length)) of as many queries */
INLINE void score(const struct transformer *t, int count, const float *query, const float *turned, float *scores) {
    long whole = whole_vectors(t->length), ld = padded(t->d_model);
    for (long k = 0; k < whole; k += LANES) {
        vec sums[QUERIES] = {{0}};
        for (long j = 0; j < t->head_dim; j++) {
            vec keys = *(const vec *)(turned + j * whole + k);
            for (int i = 0; i < count; i++) sums[i] += query[i * ld + j] * keys;
        }
        for (int i = 0; i < count; i++) *(vec *)(scores + i * whole + k) = sums[i];
    }
}

static void softmax(long n, float factor, float *scores) {
    float largest = -INFINITY, total = 0;
    for (long k = 0; k < n; k++) largest = scores[k] > largest ? scores[k] : largest;
    for (long k = n; k < whole_vectors(n); k++) scores[k] = largest;
    for (long k = 0; k < whole_vectors(n); k += LANES) *(vec *)(scores + k) = exponential(factor * (*(vec *)(scores + k) - largest));
    for (long k = 0; k < n; k++) total += scores[k];
    for (long k = 0; k < whole_vectors(n); k += LANES) *(vec *)(scores + k) /= total;
}

/* The values' mean with weights; of `count` whole vectors from `values` on, the rows ld apart */
INLINE void mix(int count, long n, const float *weights, const float *values, long ld, float *to) {
    vec sums[MIXED] = {{0}};
    for (long k = 0; k < n; k++)
        for (int v = 0; v < count; v++) sums[v] += weights[k] * *(const vec *)(values + k * ld + v * LANES);
    for (int v = 0; v < count; v++) *(vec *)(to + v * LANES) = sums[v];
}

static void mix_head(long h, long n, const float *weights, const float *values, long ld, float *to) {
    long j = 0;
    for (; j + MIXED * LANES <= h; j += MIXED * LANES) mix(MIXED, n, weights, values + j, ld, to + j);
    for (; j + LANES <= h; j += LANES) mix(1, n, weights, values + j, ld, to + j);
    if (j < h && h >= LANES) { /* the last vector begins within the one before */
        mix(1, n, weights, values + h - LANES, ld, to + h - LANES);
        return;
    }
    for (; j < h; j++) {
        float sum = 0;
        for (long k = 0; k < n; k++) sum += weights[k] * values[k * ld + j];
        to[j] = sum;
    }
}

/* One trajectory's attention: every step sees every other. room: attention_floats(). */
static void attend(const struct transformer *t, const float *query, const float *key_value, float *room, float *to) {
    long d = t->d_model, h = t->head_dim, n = t->length, whole = whole_vectors(n), ld = padded(d), ld_key_value = padded(2 * d);
    float *turned = room, *scores = room + h * whole;
    for (long head = 0; head < d; head += h) {
        turn_keys(t, key_value + head, turned);
        for (long i = 0; i < n; i += QUERIES) {
            const float *from = query + i * ld + head;
            if (i + QUERIES <= n)
                score(t, QUERIES, from, turned, scores);
            else
                for (long r = 0; i + r < n; r++) score(t, 1, from + r * ld, turned, scores + r * whole);
            for (long r = 0; r < QUERIES && i + r < n; r++) {
                softmax(n, 1.0f / sqrtf(h), scores + r * whole);
                mix_head(h, n, scores + r * whole, key_value + d + head, ld_key_value, to + (i + r) * ld + head);
            }
        }
    }
}

static long attention_floats(const struct transformer *t) { return (t->head_dim + QUERIES) * whole_vectors(t->length); }

struct scratch {
    float *x, *normed, *wide, *query, *result, *attention;
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
        attend(t, s->query + p * t->length * ld, s->wide + p * t->length * padded(2 * d), s->attention, s->normed + p * t->length * ld);
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
