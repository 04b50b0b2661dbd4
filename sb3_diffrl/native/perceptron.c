/* DDIM chains on a perceptron. Rows are independent of each other, so a block of them goes through every step while its activations
 * stay in the cache. */
#include "kernels.h"

/* A batch of chains and the perceptron that denoises them; diffusion/native.py mirrors this struct. */
struct perceptron {
    long x_dim, n_hidden, n_steps, batch;
    int activation;
    float clip;                /* x0 is held in [-clip, clip] */
    const long *widths;        /* n_hidden: of the hidden layers */
    const float *packed;       /* perceptron_pack(): weights and biases */
    const float *base;         /* (batch, widths[0]): what the condition adds to the first layer, bias included */
    const float *time_terms;   /* (n_steps, widths[0]): what the time adds to it */
    const float *coefficients; /* (n_steps, 4): x0 = c0 x + c1 output, next x = c2 x + c3 x0 */
    float *x;                  /* (batch, x_dim): the start, then the result */
};

static long layer_in(const struct perceptron *p, long i) { return i ? p->widths[i - 1] : p->x_dim; }
static long layer_out(const struct perceptron *p, long i) { return i < p->n_hidden ? p->widths[i] : p->x_dim; }
static long layer_floats(const struct perceptron *p, long i) { return (layer_in(p, i) + 1) * padded(layer_out(p, i)); }

long perceptron_packed_floats(const struct perceptron *p) {
    long total = 0;
    for (long i = 0; i <= p->n_hidden; i++) total += layer_floats(p, i);
    return total;
}

/* weights: of each layer, (out, in), of the first the columns of x alone; biases: (out), not used in the first */
void perceptron_pack(const struct perceptron *p, const float *const *weights, const float *const *biases, float *packed) {
    for (long i = 0; i <= p->n_hidden; i++) {
        long in = layer_in(p, i), out = layer_out(p, i);
        pack(weights[i], in, out, 1, in, packed);
        pad(biases[i], 1, out, packed + in * padded(out));
        packed += layer_floats(p, i);
    }
}

static long row_length(const struct perceptron *p) {
    long widest = padded(p->x_dim);
    for (long i = 0; i < p->n_hidden; i++)
        if (padded(p->widths[i]) > widest) widest = padded(p->widths[i]);
    return widest;
}

struct scratch {
    float *x, *base, *times, *values, *next;
};

/* Every step of the chains of a block. */
static void run_block(const struct perceptron *p, long rows, struct scratch s) {
    long ld = row_length(p), first_width = padded(p->widths[0]);
    for (long step = 0; step < p->n_steps; step++) {
        const float *packed = p->packed, *from = s.x;
        long lda = p->x_dim;
        for (long i = 0; i <= p->n_hidden; i++) {
            long in = layer_in(p, i), out = padded(layer_out(p, i));
            struct epilogue e = {.bias = packed + in * out, .value = s.values};
            if (i == 0) e.add = s.base, e.bias = s.times + step * first_width;
            layer_function *apply = i < p->n_hidden ? ACTIVATED[p->activation] : linear_layer;
            apply(rows, in, out, from, lda, packed, ld, e);
            packed += layer_floats(p, i);
            from = s.values, lda = ld;
            s.values = s.next, s.next = (float *)from;
        }
        for (long r = 0; r < rows; r++)
            for (long j = 0; j < p->x_dim; j++) {
                float *x = s.x + r * p->x_dim + j;
                *x = ddim_step(*x, from[r * ld + j], p->coefficients + 4 * step, p->clip);
            }
    }
}

static long scratch_floats(const struct perceptron *p) {
    return BLOCK_ROWS * (p->x_dim + 3 * row_length(p)) + p->n_steps * padded(p->widths[0]);
}

/* Floats that perceptron_run() needs to work in. */
long perceptron_memory_floats(const struct perceptron *p, long n_threads) { return n_threads * scratch_floats(p); }

static void run_part(const struct perceptron *p, long begin, long end, float *memory) {
    long ld = row_length(p), width = p->widths[0];
    struct scratch s;
    /* Rows beyond the block's own are computed and not used: they must be numbers. */
    memset(memory, 0, sizeof(float) * scratch_floats(p));
    s.x = take(&memory, BLOCK_ROWS * p->x_dim);
    s.base = take(&memory, BLOCK_ROWS * ld);
    s.values = take(&memory, BLOCK_ROWS * ld);
    s.next = take(&memory, BLOCK_ROWS * ld);
    s.times = memory;
    pad(p->time_terms, p->n_steps, width, s.times);
    for (long i = begin; i < end; i += BLOCK_ROWS) {
        long n = end - i < BLOCK_ROWS ? end - i : BLOCK_ROWS;
        memcpy(s.x, p->x + i * p->x_dim, sizeof(float) * n * p->x_dim);
        for (long r = 0; r < n; r++) memcpy(s.base + r * ld, p->base + (i + r) * width, sizeof(float) * width);
        run_block(p, n, s);
        memcpy(p->x + i * p->x_dim, s.x, sizeof(float) * n * p->x_dim);
    }
}

/* Denoise a batch. `memory` holds perceptron_memory_floats(), its contents do not matter. */
void perceptron_run(const struct perceptron *p, float *memory, long n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(static, 1)
    for (long i = 0; i < n_threads; i++)
        run_part(p, p->batch * i / n_threads, p->batch * (i + 1) / n_threads, memory + i * scratch_floats(p));
}
