/* Stacked multilayer perceptrons: values, and gradients with respect to weights, biases and inputs. A thread takes whole models. */
#include "kernels.h"

/* lql/native.py mirrors this struct. Hidden layers are activated, the last layer is linear. */
struct mlp {
    long n_models, batch, n_layers;
    int activation, shared_inputs;
    const long *widths;           /* n_layers + 1: of the inputs, then of each layer */
    const float *const *weights;  /* n_layers arrays (n_models, in, out) */
    const float *const *biases;   /* n_layers arrays (n_models, out) */
    const float *inputs;          /* (n_models, batch, in), or (batch, in) if shared */
    float *saved;                 /* mlp_saved_floats(): values and slopes of the hidden layers, from forwards to backwards, or NULL */
    float *outputs;               /* (n_models, batch, out) */
    const float *output_gradient; /* same shape */
    float *const *weight_gradients, *const *bias_gradients; /* of the shapes of weights and biases */
    float *input_gradient;                                  /* (n_models, batch, in), or NULL */
};

/* Distance between rows. Not a power of two, so that a column's entries do not compete for one place in the cache. */
static long row_length(const struct mlp *m) {
    long widest = 0;
    for (long i = 0; i <= m->n_layers; i++)
        if (padded(m->widths[i]) > widest) widest = padded(m->widths[i]);
    return widest + PANEL;
}

static long saved_of_layer(const struct mlp *m) { return whole_tiles(m->batch) * row_length(m); }

long mlp_saved_floats(const struct mlp *m) { return m->n_models * (m->n_layers - 1) * 2 * saved_of_layer(m); }

static float *saved_value(const struct mlp *m, long q, long layer) {
    return m->saved + (q * (m->n_layers - 1) + layer) * 2 * saved_of_layer(m);
}

static void load_rows(const float *rows, long n_rows, long n, long ld, float *block) {
    for (long r = 0; r < n_rows; r++) memcpy(block + r * ld, rows + r * n, sizeof(float) * n);
}

static const float *inputs_of(const struct mlp *m, long q) { return m->inputs + (m->shared_inputs ? 0 : q * m->batch * m->widths[0]); }

static long forward_floats(const struct mlp *m) {
    long total = 4 * BLOCK_ROWS * row_length(m);
    for (long i = 0; i < m->n_layers; i++) total += (m->widths[i] + 1) * padded(m->widths[i + 1]);
    return total;
}

static void forward(const struct mlp *m, long q, float *memory) {
    long ld = row_length(m), last = m->n_layers - 1;
    float *next = memory, *packed[MAX_HIDDEN + 1], *bias[MAX_HIDDEN + 1];
    float *block = take_zeros(&next, BLOCK_ROWS * ld), *result = take(&next, BLOCK_ROWS * ld);
    float *unsaved[2] = {take(&next, BLOCK_ROWS * ld), take(&next, BLOCK_ROWS * ld)};
    for (long i = 0; i <= last; i++) {
        long in = m->widths[i], out = m->widths[i + 1];
        packed[i] = take(&next, in * padded(out));
        bias[i] = take(&next, padded(out));
        pack(m->weights[i] + q * in * out, in, out, out, 1, packed[i]);
        pad(m->biases[i] + q * out, 1, out, bias[i]);
    }
    for (long begin = 0; begin < m->batch; begin += BLOCK_ROWS) {
        long rows = m->batch - begin < BLOCK_ROWS ? m->batch - begin : BLOCK_ROWS, out = m->widths[last + 1];
        load_rows(inputs_of(m, q) + begin * m->widths[0], rows, m->widths[0], ld, block);
        const float *from = block;
        for (long i = 0; i < last; i++) {
            float *value = m->saved ? saved_value(m, q, i) + begin * ld : unsaved[i % 2];
            struct epilogue e = {.bias = bias[i], .value = value, .slope = m->saved ? value + saved_of_layer(m) : NULL};
            ACTIVATED[m->activation](rows, m->widths[i], padded(m->widths[i + 1]), from, ld, packed[i], ld, e);
            from = value;
        }
        layer_function *output_layer = out <= LANES ? narrow_layer : linear_layer;
        output_layer(rows, m->widths[last], padded(out), from, ld, packed[last], ld, (struct epilogue){.bias = bias[last], .value = result});
        float *outputs = m->outputs + (q * m->batch + begin) * out;
        for (long r = 0; r < rows; r++) memcpy(outputs + r * out, result + r * ld, sizeof(float) * out);
    }
}

/* sums (in x n) += a^T (rows x in) * d (rows x n) */
static void add_outer(long rows, long in, long n, const float *a, const float *d, long ld, float *sums) {
    for (long column = 0; column < n; column += PANEL)
        for (long k = 0; k < in; k += TILE_ROWS) {
            vec tile[TILE_ROWS][2];
#pragma GCC unroll 12
            for (int r = 0; r < TILE_ROWS; r++) {
                tile[r][0] = *(const vec *)(sums + (k + r) * n + column);
                tile[r][1] = *(const vec *)(sums + (k + r) * n + column + LANES);
            }
            for (long i = 0; i < rows; i++) {
                vec left = *(const vec *)(d + i * ld + column), right = *(const vec *)(d + i * ld + column + LANES);
#pragma GCC unroll 12
                for (int r = 0; r < TILE_ROWS; r++) {
                    float x = a[i * ld + k + r];
                    tile[r][0] += x * left;
                    tile[r][1] += x * right;
                }
            }
#pragma GCC unroll 12
            for (int r = 0; r < TILE_ROWS; r++) {
                *(vec *)(sums + (k + r) * n + column) = tile[r][0];
                *(vec *)(sums + (k + r) * n + column + LANES) = tile[r][1];
            }
        }
}

static long backward_floats(const struct mlp *m) {
    long total = 4 * BLOCK_ROWS * row_length(m);
    for (long i = 0; i < m->n_layers; i++) {
        long in = m->widths[i], out = padded(m->widths[i + 1]);
        total += padded(in) * m->widths[i + 1] + (in + TILE_ROWS + 1) * out;
    }
    return total;
}

static void backward(const struct mlp *m, long q, float *memory) {
    long ld = row_length(m), last = m->n_layers - 1;
    float *next = memory, *packed[MAX_HIDDEN + 1], *weight_sums[MAX_HIDDEN + 1], *bias_sums[MAX_HIDDEN + 1];
    float *block = take_zeros(&next, BLOCK_ROWS * ld);
    float *delta[2] = {take_zeros(&next, BLOCK_ROWS * ld), take_zeros(&next, BLOCK_ROWS * ld)};
    float *inputs_delta = take(&next, BLOCK_ROWS * ld);
    for (long i = 0; i <= last; i++) {
        long in = m->widths[i], out = m->widths[i + 1];
        packed[i] = take(&next, padded(in) * out);
        weight_sums[i] = take_zeros(&next, (in + TILE_ROWS) * padded(out));
        bias_sums[i] = take_zeros(&next, padded(out));
        if (i > 0 || m->input_gradient) pack(m->weights[i] + q * in * out, out, in, 1, out, packed[i]);
    }
    for (long begin = 0; begin < m->batch; begin += BLOCK_ROWS) {
        long rows = m->batch - begin < BLOCK_ROWS ? m->batch - begin : BLOCK_ROWS, out = m->widths[last + 1], in = m->widths[0];
        load_rows(inputs_of(m, q) + begin * in, rows, in, ld, block);
        load_rows(m->output_gradient + (q * m->batch + begin) * out, rows, out, ld, delta[0]);
        for (long r = 0; r < rows; r++) memset(delta[0] + r * ld + out, 0, sizeof(float) * (padded(out) - out));
        float *here = delta[0];
        for (long i = last; i >= 0; i--) {
            const float *from = i ? saved_value(m, q, i - 1) + begin * ld : block;
            long n = padded(m->widths[i + 1]);
            add_outer(rows, m->widths[i], n, from, here, ld, weight_sums[i]);
            for (long r = 0; r < rows; r++)
                for (long j = 0; j < n; j++) bias_sums[i][j] += here[r * ld + j];
            if (i == 0 && !m->input_gradient) break;
            float *to = i ? delta[here == delta[0]] : inputs_delta;
            struct epilogue e = {.times = i ? from + saved_of_layer(m) : NULL, .value = to};
            linear_layer(rows, m->widths[i + 1], padded(m->widths[i]), here, ld, packed[i], ld, e);
            here = to;
        }
        if (m->input_gradient)
            for (long r = 0; r < rows; r++)
                memcpy(m->input_gradient + (q * m->batch + begin + r) * in, inputs_delta + r * ld, sizeof(float) * in);
    }
    for (long i = 0; i <= last; i++) {
        long in = m->widths[i], out = m->widths[i + 1];
        for (long k = 0; k < in; k++)
            memcpy(m->weight_gradients[i] + (q * in + k) * out, weight_sums[i] + k * padded(out), sizeof(float) * out);
        memcpy(m->bias_gradients[i] + q * out, bias_sums[i], sizeof(float) * out);
    }
}

/* Floats that mlp_forward() and mlp_backward() need to work in. */
long mlp_memory_floats(const struct mlp *m) {
    long most = forward_floats(m) > backward_floats(m) ? forward_floats(m) : backward_floats(m);
    return m->n_models * most;
}

void mlp_forward(const struct mlp *m, float *memory, long n_threads) {
    long each = forward_floats(m);
#pragma omp parallel for num_threads(n_threads) schedule(static)
    for (long q = 0; q < m->n_models; q++) forward(m, q, memory + q * each);
}

void mlp_backward(const struct mlp *m, float *memory, long n_threads) {
    long each = backward_floats(m);
#pragma omp parallel for num_threads(n_threads) schedule(static)
    for (long q = 0; q < m->n_models; q++) backward(m, q, memory + q * each);
}
