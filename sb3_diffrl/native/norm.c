/* Length of a gradient that is spread over several arrays. */
#include "kernels.h"

#define BLOCK 4096 /* numbers whose squares are added in single precision, lane by lane */
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

/* Not finite if a number is not, or if the squares of a block add up to more than single precision holds. */
float total_norm(const float *const *arrays, const long *sizes, long n_arrays) {
    double total = 0.0;
    for (long a = 0; a < n_arrays; a++)
        for (long begin = 0; begin < sizes[a]; begin += BLOCK)
            total += sum_of_squares(arrays[a] + begin, sizes[a] - begin < BLOCK ? sizes[a] - begin : BLOCK);
    return (float)sqrt(total);
}
