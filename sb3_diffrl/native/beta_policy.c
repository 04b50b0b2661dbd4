/* Times for a minibatch from a Beta policy over the mass of a swept density: its network, the draws, and the weights of their losses.
 * A draw is a few dozen operations on one number: in C it costs less than one call from Python. */
#ifndef _REENTRANT
#define _REENTRANT /* declares lgamma_r on macOS */
#endif
#include "kernels.h"

/* Added to the masses on both sides of a draw; as EDGE of timesteps/adaptive.py */
#define EDGE 1e-4
/* A position stays this much of the whole below its end */
#define BELOW_END 0x1p-20

/* timesteps/native.py mirrors this struct */
struct beta_policy {
    long batch, n_layers, n_cells;
    unsigned long seed;
    float low, span, uniform_floor, importance; /* concentrations are exp(low + span sigmoid(output)) */
    const long *widths;                         /* n_layers + 1: of the data, of the hidden layers, and 2 */
    const float *const *weights;                /* n_layers, each (out, in) */
    const float *const *biases;                 /* n_layers, each (out) */
    const float *x0;                            /* (batch, widths[0]) */
    const float *cumulative;                    /* n_cells + 1: mass of the density up to the edge of each cell */
    float *concentrations;                      /* result, (batch, 2) */
    float *position, *weight;                   /* results, (batch); positions in cells */
};

static long widest(const struct beta_policy *p) {
    long width = 0;
    for (long i = 0; i <= p->n_layers; i++)
        if (padded(p->widths[i]) > width) width = padded(p->widths[i]);
    return width;
}

/* Floats that beta_policy_run() needs to work in. */
long beta_policy_memory_floats(const struct beta_policy *p) {
    long total = 2 * BLOCK_ROWS * widest(p);
    for (long i = 0; i < p->n_layers; i++) total += (p->widths[i] + 1) * padded(p->widths[i + 1]);
    return total;
}

static uint64_t splitmix(uint64_t *state) {
    uint64_t z = (*state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* In (0, 1) */
static double uniform(uint64_t *state) { return ((splitmix(state) >> 11) + 0.5) * 0x1p-53; }

static double normal(uint64_t *state) {
    double radius = sqrt(-2 * log(uniform(state)));
    return radius * cos(2 * M_PI * uniform(state));
}

/* Logarithm of a Gamma(shape, 1) variable, by Marsaglia and Tsang's method (2000); a logarithm does not underflow for small shapes. */
static double log_gamma_variable(double shape, uint64_t *state) {
    double boost = 0;
    if (!(shape > 0 && isfinite(shape))) return NAN;
    if (shape < 1) boost = log(uniform(state)) / shape, shape += 1;
    double d = shape - 1.0 / 3, c = 1 / sqrt(9 * d);
    for (;;) {
        double x = normal(state), v = 1 + c * x;
        if (v <= 0) continue;
        v = v * v * v;
        if (log(uniform(state)) < 0.5 * x * x + d - d * v + d * log(v)) return log(d * v) + boost;
    }
}

static double log_gamma_function(double x) {
    int sign;
    return lgamma_r(x, &sign);
}

/* Cell of a mass: how many inner edges are not above it. */
static long cell_of(const float *cumulative, long n_cells, double mass) {
    long low = 0, high = n_cells - 1;
    while (low < high) {
        long middle = (low + high) / 2;
        if (cumulative[middle + 1] <= mass) low = middle + 1;
        else high = middle;
    }
    return low;
}

static void draw(const struct beta_policy *p, long row, uint64_t *state) {
    const float *cumulative = p->cumulative;
    double a = p->concentrations[2 * row], b = p->concentrations[2 * row + 1], n = p->n_cells;
    double log_a = log_gamma_variable(a, state), log_b = log_gamma_variable(b, state), u = uniform(state);
    double mass = 1 / (1 + exp(log_b - log_a));
    long cell = cell_of(cumulative, p->n_cells, mass);
    double position = cell + (mass - cumulative[cell]) / (cumulative[cell + 1] - cumulative[cell]);
    /* One uniform number says whether the floor draws, and what. */
    if (u < p->uniform_floor) position = u * n / p->uniform_floor;
    position = position < 0 ? 0 : position > n * (1 - BELOW_END) ? n * (1 - BELOW_END) : position;
    p->position[row] = position;
    p->weight[row] = isnan(position) ? NAN : 1;
    if (p->importance == 0 || isnan(position)) return;
    cell = p->position[row];
    double base = (double)cumulative[cell + 1] - cumulative[cell];
    mass = cumulative[cell] + (p->position[row] - cell) * base;
    double log_density = (a - 1) * log(mass + EDGE) + (b - 1) * log(1 + EDGE - mass) + log(n * base) + log_gamma_function(a + b) -
                         log_gamma_function(a) - log_gamma_function(b);
    if (p->uniform_floor > 0) log_density = log((1 - p->uniform_floor) * exp(log_density) + p->uniform_floor);
    p->weight[row] = exp(-p->importance * log_density);
}

/* Draw for a minibatch. `memory` holds beta_policy_memory_floats(), its contents do not matter. */
void beta_policy_run(const struct beta_policy *p, float *memory) {
    long ld = widest(p), n_in = p->widths[0];
    uint64_t state = p->seed;
    /* Rows beyond the block's own are computed and not used: they must be numbers. */
    float *values = take_zeros(&memory, BLOCK_ROWS * ld), *next = take_zeros(&memory, BLOCK_ROWS * ld), *packed = memory;
    for (long i = 0; i < p->n_layers; i++) {
        long in = p->widths[i], out = p->widths[i + 1];
        pack(p->weights[i], in, out, 1, in, memory);
        pad(p->biases[i], 1, out, memory + in * padded(out));
        memory += (in + 1) * padded(out);
    }
    for (long begin = 0; begin < p->batch; begin += BLOCK_ROWS) {
        long rows = p->batch - begin < BLOCK_ROWS ? p->batch - begin : BLOCK_ROWS;
        const float *layer = packed;
        for (long r = 0; r < rows; r++) memcpy(values + r * ld, p->x0 + (begin + r) * n_in, sizeof(float) * n_in);
        for (long i = 0; i < p->n_layers; i++) {
            long in = p->widths[i], out = padded(p->widths[i + 1]);
            struct epilogue e = {.bias = layer + in * out, .value = next};
            (i + 1 < p->n_layers ? relu_layer : linear_layer)(rows, in, out, values, ld, layer, ld, e);
            layer += (in + 1) * out;
            float *swapped = values;
            values = next, next = swapped;
        }
        for (long r = 0; r < rows; r++) {
            for (int j = 0; j < 2; j++)
                p->concentrations[2 * (begin + r) + j] = exp(p->low + p->span / (1 + exp(-(double)values[r * ld + j])));
            draw(p, begin + r, &state);
        }
    }
}
