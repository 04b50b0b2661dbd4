/* What torch does to long arrays of floats, in fewer operations: a norm, and GELU. */
#include "kernels.h"

#define BLOCK 4096 /* numbers that a thread takes at once, and whose squares are added in single precision, lane by lane */
#define SUMS 4

static double sum_of_squares(const float *x, long n) {
    vec sums[SUMS] = {{0}};
    long i = 0;
    for (; i + SUMS * LANES <= n; i += SUMS * LANES)
        for (int s = 0; s < SUMS; s++) {
            vec here = *(const vec *)(x + i + s * LANES);
            sums[s] += here * here;
        }
    float total = 0.0f;
    for (; i < n; i++) total += x[i] * x[i];
    for (int s = 0; s < SUMS; s++)
        for (int lane = 0; lane < LANES; lane++) total += sums[s][lane];
    return total;
}

/* sums: room for n_arrays. Not finite if a number is not, or if the squares of a block add up to more than single precision holds. */
float total_norm(const float *const *arrays, const long *sizes, double *sums, long n_arrays, long n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(dynamic)
    for (long a = 0; a < n_arrays; a++) {
        sums[a] = 0.0;
        for (long begin = 0; begin < sizes[a]; begin += BLOCK)
            sums[a] += sum_of_squares(arrays[a] + begin, sizes[a] - begin < BLOCK ? sizes[a] - begin : BLOCK);
    }
    double total = 0.0; /* in one order, whoever summed what */
    for (long a = 0; a < n_arrays; a++) total += sums[a];
    return (float)sqrt(total);
}

/* y = gelu(x), or, if there are `gradients`, y = gelu'(x) * gradients */
INLINE void gelu_block(const float *x, const float *gradients, float *y, long n) {
    for (long i = 0; i < n; i += LANES) {
        long bytes = sizeof(float) * (n - i < LANES ? n - i : LANES);
        vec z = {0}, g = {0}, value, slope;
        memcpy(&z, x + i, bytes);
        activate(GELU, z, &value, &slope);
        if (gradients) {
            memcpy(&g, gradients + i, bytes);
            value = slope * g;
        }
        memcpy(y + i, &value, bytes);
    }
}

static void gelu_blocks(const float *x, const float *gradients, float *y, long n, long n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(static)
    for (long begin = 0; begin < n; begin += BLOCK) {
        long here = n - begin < BLOCK ? n - begin : BLOCK;
        if (here == BLOCK) /* of a length that the compiler knows */
            gelu_block(x + begin, gradients ? gradients + begin : NULL, y + begin, BLOCK);
        else
            gelu_block(x + begin, gradients ? gradients + begin : NULL, y + begin, here);
    }
}

void gelu(const float *x, float *y, long n, long n_threads) { gelu_blocks(x, NULL, y, n, n_threads); }

void gelu_backward(const float *x, const float *gradients, float *y, long n, long n_threads) {
    gelu_blocks(x, gradients, y, n, n_threads);
}
