/* Scaled dot-product attention of one sequence: what queries make of the keys and values of all its steps. */
#pragma once
#include "kernels.h"

#define QUERIES 4 /* that are scored at once */
#define MIXED 4   /* vectors of a value that are mixed at once */

/* Rows of queries are ld_query apart. Rows of keys, ld_key_value apart, have their values d_model behind them. */
struct heads {
    long n_queries, length, d_model, head_dim, ld_query, ld_key_value;
};

static inline long whole_vectors(long n) { return (n + LANES - 1) / LANES * LANES; }

INLINE float sum_of_lanes(vec v) {
    float sums[LANES];
    memcpy(sums, &v, sizeof sums);
    for (int width = LANES / 2; width; width /= 2)
        for (int l = 0; l < width; l++) sums[l] += sums[l + width];
    return sums[0];
}

/* A head's rows, (length, head_dim), with the steps in columns: (head_dim, whole_vectors(length)), zero beyond the last. */
INLINE void turn(const struct heads *s, const float *rows, float *turned) {
    long whole = whole_vectors(s->length);
    for (long j = 0; j < s->head_dim; j++) {
        *(vec *)(turned + (j + 1) * whole - LANES) = (vec){0};
        for (long k = 0; k < s->length; k++) turned[j * whole + k] = rows[k * s->ld_key_value + j];
    }
}

/* Products of `count` rows with all steps: (count, whole_vectors(length)) */
INLINE void score_rows(const struct heads *s, int count, const float *rows, const float *turned, float *scores) {
    long whole = whole_vectors(s->length);
    for (long k = 0; k < whole; k += LANES) {
        vec sums[QUERIES] = {{0}};
        for (long j = 0; j < s->head_dim; j++) {
            vec steps = *(const vec *)(turned + j * whole + k);
            for (int i = 0; i < count; i++) sums[i] += rows[i * s->ld_query + j] * steps;
        }
        for (int i = 0; i < count; i++) *(vec *)(scores + i * whole + k) = sums[i];
    }
}

/* The same of all queries' rows: (n_queries, whole_vectors(length)) */
INLINE void score(const struct heads *s, const float *rows, const float *turned, float *scores) {
    long whole = whole_vectors(s->length), i = 0;
    for (; i + QUERIES <= s->n_queries; i += QUERIES) score_rows(s, QUERIES, rows + i * s->ld_query, turned, scores + i * whole);
    for (; i < s->n_queries; i++) score_rows(s, 1, rows + i * s->ld_query, turned, scores + i * whole);
}

INLINE float largest_of_lanes(vec v) {
    float values[LANES];
    memcpy(values, &v, sizeof values);
    for (int width = LANES / 2; width; width /= 2)
        for (int l = 0; l < width; l++) values[l] = values[l] > values[l + width] ? values[l] : values[l + width];
    return values[0];
}

static const int LANE[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* Of n scores; zero beyond them, up to a whole vector */
INLINE void softmax(long n, float factor, float *scores) {
    const vec zero = {0};
    vec most = zero - INFINITY, sums = zero;
    for (long k = 0; k < n; k += LANES) {
        vec here = choose(*(const veci *)LANE < (int)(n - k), *(const vec *)(scores + k), zero - INFINITY);
        most = choose(here > most, here, most);
    }
    float largest = largest_of_lanes(most);
    for (long k = 0; k < n; k += LANES) {
        vec here = exponential(factor * (*(const vec *)(scores + k) - largest));
        sums += *(vec *)(scores + k) = choose(*(const veci *)LANE < (int)(n - k), here, zero);
    }
    float total = sum_of_lanes(sums);
    for (long k = 0; k < n; k += LANES) *(vec *)(scores + k) /= total;
}

/* The sum of n rows of `count` whole vectors, ld apart, times weights that are `stride` apart */
INLINE void mix(int count, long n, const float *weights, long stride, const float *rows, long ld, float *to) {
    vec sums[MIXED] = {{0}};
    for (long k = 0; k < n; k++)
        for (int v = 0; v < count; v++) sums[v] += weights[k * stride] * *(const vec *)(rows + k * ld + v * LANES);
    for (int v = 0; v < count; v++) *(vec *)(to + v * LANES) = sums[v];
}

/* The same of rows of h numbers */
INLINE void mix_rows(long h, long n, const float *weights, long stride, const float *rows, long ld, float *to) {
    long j = 0;
    for (; j + MIXED * LANES <= h; j += MIXED * LANES) mix(MIXED, n, weights, stride, rows + j, ld, to + j);
    for (; j + LANES <= h; j += LANES) mix(1, n, weights, stride, rows + j, ld, to + j);
    if (j < h && h >= LANES) { /* the last vector begins within the one before */
        mix(1, n, weights, stride, rows + h - LANES, ld, to + h - LANES);
        return;
    }
    for (; j < h; j++) {
        float sum = 0;
        for (long k = 0; k < n; k++) sum += weights[k * stride] * rows[k * ld + j];
        to[j] = sum;
    }
}

static inline long attend_floats(const struct heads *s) { return (s->head_dim + s->n_queries) * whole_vectors(s->length); }

/* All heads. room: attend_floats(); weights: (n_heads, n_queries, whole_vectors(length)), each query's of the steps, or NULL */
static inline void attend(const struct heads *s, const float *query, const float *key_value, float *room, float *weights, float *to) {
    long h = s->head_dim, whole = whole_vectors(s->length);
    for (long head = 0; head < s->d_model; head += h) {
        float *scores = weights ? weights + head / h * s->n_queries * whole : room + h * whole;
        turn(s, key_value + head, room);
        score(s, query + head, room, scores);
        for (long i = 0; i < s->n_queries; i++) {
            softmax(s->length, 1.0f / sqrtf(h), scores + i * whole);
            mix_rows(h, s->length, scores + i * whole, 1, key_value + s->d_model + head, s->ld_key_value, to + i * s->ld_query + head);
        }
    }
}
