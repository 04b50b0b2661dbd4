/* Attention of a batch of sequences, and its gradient. */
#include "attention.h"

/* diffusion/attention.py mirrors this struct; all arrays are contiguous */
struct attention {
    long batch, n_queries, length, d_model, head_dim;
    const float *query;     /* (batch, n_queries, d_model) */
    const float *key_value; /* (batch, length, 2 d_model) */
    float *weights;         /* (batch, n_heads, n_queries, whole_vectors(length)): results forwards */
    float *result;          /* (batch, n_queries, d_model) */
    const float *gradient;  /* of the result */
    float *query_gradient, *key_value_gradient;
};

static struct heads heads_of(const struct attention *a) {
    return (struct heads){a->n_queries, a->length, a->d_model, a->head_dim, a->d_model, 2 * a->d_model};
}

static long weights_floats(const struct attention *a) { return a->d_model / a->head_dim * a->n_queries * whole_vectors(a->length); }

long attention_weights_floats(const struct attention *a) { return a->batch * weights_floats(a); }

/* Floats that attention_forward() and attention_backward() need to work in. */
long attention_memory_floats(const struct attention *a, long n_threads) {
    struct heads s = heads_of(a);
    return n_threads * attend_floats(&s);
}

void attention_forward(const struct attention *a, float *memory, long n_threads) {
    const struct heads s = heads_of(a);
    const long d = s.d_model, room = attend_floats(&s);
#pragma omp parallel for num_threads(n_threads) schedule(static, 1)
    for (long t = 0; t < n_threads; t++)
        for (long b = a->batch * t / n_threads; b < a->batch * (t + 1) / n_threads; b++)
            attend(&s, a->query + b * s.n_queries * d, a->key_value + b * s.length * 2 * d, memory + t * room,
                   a->weights + b * weights_floats(a), a->result + b * s.n_queries * d);
}

/* Of the weights' gradients, those of the scores before softmax, and the factor */
static void softmax_backward(long n, float factor, const float *weights, float *gradients) {
    vec products = {0};
    for (long k = 0; k < n; k += LANES) products += *(const vec *)(weights + k) * *(vec *)(gradients + k);
    float mean = sum_of_lanes(products);
    for (long k = 0; k < n; k += LANES) *(vec *)(gradients + k) = *(const vec *)(weights + k) * (*(vec *)(gradients + k) - mean) * factor;
}

/* One sequence's. room: attend_floats() */
static void attend_backward(const struct heads *s, const float *query, const float *key_value, const float *weights,
                            const float *gradient, float *room, float *query_gradient, float *key_value_gradient) {
    long h = s->head_dim, d = s->d_model, n = s->length, whole = whole_vectors(n);
    float *scores = room + h * whole; /* their gradients */
    for (long head = 0; head < d; head += h, weights += s->n_queries * whole) {
        const float *keys = key_value + head, *results = gradient + head;
        turn(s, keys + d, room);
        score(s, results, room, scores);
        for (long i = 0; i < s->n_queries; i++) {
            softmax_backward(n, 1.0f / sqrtf(h), weights + i * whole, scores + i * whole);
            mix_rows(h, n, scores + i * whole, 1, keys, s->ld_key_value, query_gradient + i * s->ld_query + head);
        }
        for (long k = 0; k < n; k++) {
            float *of_key = key_value_gradient + k * s->ld_key_value + head;
            mix_rows(h, s->n_queries, scores + k, whole, query + head, s->ld_query, of_key);
            mix_rows(h, s->n_queries, weights + k, whole, results, s->ld_query, of_key + d);
        }
    }
}

void attention_backward(const struct attention *a, float *memory, long n_threads) {
    const struct heads s = heads_of(a);
    const long d = s.d_model, room = attend_floats(&s);
#pragma omp parallel for num_threads(n_threads) schedule(static, 1)
    for (long t = 0; t < n_threads; t++)
        for (long b = a->batch * t / n_threads; b < a->batch * (t + 1) / n_threads; b++) {
            long queries = b * s.n_queries * d, keys = b * s.length * 2 * d;
            attend_backward(&s, a->query + queries, a->key_value + keys, a->weights + b * weights_floats(a), a->gradient + queries,
                            memory + t * room, a->query_gradient + queries, a->key_value_gradient + keys);
        }
}
