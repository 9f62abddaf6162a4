/* Causal attention inside packed documents, forward and backward, fp32 with AVX-512. Rotary positions (Su et al. 2021, eq. 34)
 * are applied on the way in and taken back on the way out. A task is one head of one document: nothing is padded but to whole
 * registers, no two tasks write the same place, and so the sums are the same with any number of threads. Softmax keeps its
 * log-sum-exp for the backward pass, which computes the probabilities again (Dao et al. 2022, algorithm 4). */

#include <immintrin.h>
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define FAST static __attribute__((target("avx512f,fma")))
#define INLINE static inline __attribute__((always_inline, target("avx512f,fma")))
#define LANES 16
#define ROWS 6    /* of a tile of a product: 6 by 4 registers of sums, 4 of the right side, one of the left */
#define VECTORS 4
#define QUERIES 24 /* computed at once: more of them compute more that the mask then drops */

typedef struct {
    const float *q, *k, *v;             /* [tokens, heads, dim], [tokens, kv_heads, dim]; a token's row is contiguous */
    int64_t q_row, k_row, v_row;        /* floats from one token to the next */
    const float *cos, *sin;             /* [tokens, half], NULL without rotation */
    const int64_t *starts;              /* of documents, [documents + 1] */
    int64_t documents, heads, kv_heads, dim, half, window; /* window: tokens that are seen at most, 0: all */
    float scale;
    float *out, *lse;                   /* [tokens, heads, dim], [tokens, heads] */
    const float *d_out;                 /* [tokens, heads, dim]; NULL: forward */
    float *dq, *dk, *dv;                /* [tokens, heads, dim]: those of k and v not yet summed over a group's heads */
    float *scratch;                     /* `floats` for each thread */
    int64_t floats;
    atomic_llong entered, next;         /* threads, tasks */
} Job;

typedef struct {
    float *keys, *values, *keys_t, *values_t, *query, *d_out, *scores, *d_scores, *dk, *dv, *rows;
} Space;

static inline int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* Lay out a thread's scratch for documents of up to `longest` tokens; return the floats it takes. */
static int64_t lay_out(Space *s, float *base, int64_t longest, int64_t dim, int backward) {
    int64_t wide = whole(dim), keys = whole(longest) + LANES * VECTORS, used = 0;
    float **parts[] = {&s->values, &s->keys_t, &s->query, &s->scores, &s->rows,
                       &s->keys, &s->values_t, &s->d_out, &s->d_scores, &s->dk, &s->dv};
    int64_t sizes[] = {keys * wide, wide * keys, QUERIES * wide, QUERIES * keys, QUERIES * wide,
                       keys * wide, wide * keys, QUERIES * wide, QUERIES * keys, keys * wide, keys * wide};
    for (int i = 0; i < (backward ? 11 : 5); i++) {
        *parts[i] = base ? base + used : NULL;
        used += whole(sizes[i]);
    }
    return used;
}

INLINE void tile(const int rows, const int vectors, int64_t depth, const float *a, int64_t a_row, int64_t a_step,
                 const float *b, int64_t b_row, float *c, int64_t c_row, int add) {
    __m512 sum[ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sum[r][v] = add ? _mm512_loadu_ps(c + r * c_row + v * LANES) : _mm512_setzero_ps();
    for (int64_t p = 0; p < depth; p++, a += a_step, b += b_row) {
        __m512 right[VECTORS];
        for (int v = 0; v < vectors; v++) right[v] = _mm512_loadu_ps(b + v * LANES);
        for (int r = 0; r < rows; r++) {
            __m512 left = _mm512_set1_ps(a[r * a_row]);
            for (int v = 0; v < vectors; v++) sum[r][v] = _mm512_fmadd_ps(left, right[v], sum[r][v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(c + r * c_row + v * LANES, sum[r][v]);
}

#define TILE(r, v) case (r) * 8 + (v): tile(r, v, depth, a, a_row, a_step, b, b_row, c, c_row, add); break;
#define TILES(r) TILE(r, 1) TILE(r, 2) TILE(r, 3) TILE(r, 4)

FAST void one_tile(int rows, int vectors, int64_t depth, const float *a, int64_t a_row, int64_t a_step, const float *b,
                   int64_t b_row, float *c, int64_t c_row, int add) {
    switch (rows * 8 + vectors) { TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6) }
}

/* c [m, n] = a · b, or += with `add`; a's elements are a[i * a_row + p * a_step], b is [depth, n]; n is whole registers. */
FAST void product(int64_t m, int64_t n, int64_t depth, const float *a, int64_t a_row, int64_t a_step, const float *b,
                  int64_t b_row, float *c, int64_t c_row, int add) {
    for (int64_t j = 0; j < n; j += LANES * VECTORS) {
        int vectors = (int)((n - j) / LANES < VECTORS ? (n - j) / LANES : VECTORS);
        for (int64_t i = 0; i < m; i += ROWS) {
            int rows = (int)(m - i < ROWS ? m - i : ROWS);
            one_tile(rows, vectors, depth, a + i * a_row, a_row, a_step, b + j, b_row, c + i * c_row + j, c_row, add);
        }
    }
}

/* e^x to about one unit in the last place, 0 below -87.3: 2^n times a polynomial of what is left. */
INLINE __m512 exponential(__m512 x) {
    __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3f), _CMP_GT_OQ);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    const float terms[] = {1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
    __m512 sum = _mm512_set1_ps(terms[0]);
    for (int i = 1; i < 8; i++) sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(terms[i]));
    return _mm512_maskz_scalef_ps(some, sum, n);
}

/* Copy a row of `dim` floats into `out`, zeros behind it, turned by `sign` times the token's angles and scaled. */
INLINE void turned(const Job *j, const float *row, int64_t token, float sign, float scale, float *out) {
    int64_t half = j->cos ? j->half : 0, wide = whole(j->dim);
    for (int64_t i = 2 * half; i < j->dim; i++) out[i] = scale * row[i];
    for (int64_t i = j->dim; i < wide; i++) out[i] = 0;
    const float *cosine = j->cos + token * half, *sine = j->sin + token * half;
    for (int64_t i = 0; i < half; i++) {
        float left = row[i], right = row[half + i], c = cosine[i] * scale, s = sign * sine[i] * scale;
        out[i] = left * c - right * s;
        out[half + i] = right * c + left * s;
    }
}

INLINE void plain(const float *row, int64_t dim, float *out) {
    int64_t wide = whole(dim);
    memcpy(out, row, (size_t)dim * sizeof(float));
    for (int64_t i = dim; i < wide; i++) out[i] = 0;
}

/* out [wide, columns] = rows [count, wide] transposed; zeros behind the last row. */
FAST void transpose(const float *rows, int64_t count, int64_t wide, float *out, int64_t columns) {
    for (int64_t d = 0; d < wide; d++) memset(out + d * columns + count, 0, (size_t)(columns - count) * sizeof(float));
    for (int64_t first = 0; first < count; first += LANES)
        for (int64_t d = 0; d < wide; d++)
            for (int64_t t = first; t < count && t < first + LANES; t++) out[d * columns + t] = rows[t * wide + d];
}

/* What a block of queries sees: keys from `from`, whole registers before the first of its window, up to `upto`. */
typedef struct { int64_t first, count, from, upto, width; } Block;

INLINE Block block_of(const Job *j, int64_t first, int64_t length) {
    Block b = {first, length - first < QUERIES ? length - first : QUERIES, 0, 0, 0};
    b.upto = first + b.count;
    if (j->window && first >= j->window) b.from = (first - j->window + 1) / LANES * LANES;
    b.width = whole(b.upto - b.from);
    return b;
}

/* The mask of LANES keys from `key` on that the query at `position` sees. */
INLINE __mmask16 seen(const Job *j, int64_t position, int64_t key) {
    int64_t last = position - key + 1, skipped = j->window ? position - j->window + 1 - key : 0;
    uint32_t mask = last >= LANES ? 0xffffu : last <= 0 ? 0 : (1u << last) - 1;
    if (skipped > 0) mask &= skipped >= LANES ? 0 : ~((1u << skipped) - 1);
    return (__mmask16)mask;
}

FAST void softmax(const Job *j, const Block *b, int64_t r, float *scores, float *lse) {
    int64_t position = b->first + r;
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < b->width; i += LANES)
        most = _mm512_mask_max_ps(most, seen(j, position, b->from + i), most, _mm512_loadu_ps(scores + i));
    __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t i = 0; i < b->width; i += LANES) {
        __m512 x = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), largest));
        x = _mm512_maskz_mov_ps(seen(j, position, b->from + i), x);
        sum = _mm512_add_ps(sum, x);
        _mm512_storeu_ps(scores + i, x);
    }
    float whole_sum = _mm512_reduce_add_ps(sum);
    __m512 share = _mm512_set1_ps(1 / whole_sum);
    for (int64_t i = 0; i < b->width; i += LANES)
        _mm512_storeu_ps(scores + i, _mm512_mul_ps(share, _mm512_loadu_ps(scores + i)));
    *lse = _mm512_cvtss_f32(largest) + logf(whole_sum);
}

FAST void forward(const Job *j, Space *s, int64_t head, int64_t start, int64_t length) {
    int64_t dim = j->dim, wide = whole(dim), columns = whole(length) + LANES * VECTORS;
    int64_t kv = head / (j->heads / j->kv_heads);
    for (int64_t t = 0; t < length; t++) {
        turned(j, j->k + (start + t) * j->k_row + kv * dim, start + t, 1, 1, s->values + t * wide);
    }
    transpose(s->values, length, wide, s->keys_t, columns);
    for (int64_t t = 0; t < length; t++) plain(j->v + (start + t) * j->v_row + kv * dim, dim, s->values + t * wide);
    for (int64_t first = 0; first < length; first += QUERIES) {
        Block b = block_of(j, first, length);
        for (int64_t r = 0; r < b.count; r++) {
            int64_t token = start + first + r;
            turned(j, j->q + token * j->q_row + head * dim, token, 1, j->scale, s->query + r * wide);
        }
        product(b.count, b.width, wide, s->query, wide, 1, s->keys_t + b.from, columns, s->scores, b.width, 0);
        for (int64_t r = 0; r < b.count; r++)
            softmax(j, &b, r, s->scores + r * b.width, j->lse + (start + first + r) * j->heads + head);
        product(b.count, wide, b.upto - b.from, s->scores, b.width, 1, s->values + b.from * wide, wide, s->rows, wide, 0);
        for (int64_t r = 0; r < b.count; r++)
            memcpy(j->out + ((start + first + r) * j->heads + head) * dim, s->rows + r * wide, (size_t)dim * sizeof(float));
    }
}

/* scores → probabilities; d_scores, gradients of the probabilities → of the scores. */
FAST void softmax_back(const Job *j, const Block *b, int64_t r, float *scores, float *d_scores, float lse, float delta) {
    int64_t position = b->first + r;
    __m512 less = _mm512_set1_ps(lse), mean = _mm512_set1_ps(delta);
    for (int64_t i = 0; i < b->width; i += LANES) {
        __m512 p = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), less));
        p = _mm512_maskz_mov_ps(seen(j, position, b->from + i), p);
        _mm512_storeu_ps(scores + i, p);
        _mm512_storeu_ps(d_scores + i, _mm512_mul_ps(p, _mm512_sub_ps(_mm512_loadu_ps(d_scores + i), mean)));
    }
}

FAST float dot(const float *a, const float *b, int64_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += LANES) {
        __mmask16 mask = n - i >= LANES ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
        sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, a + i), _mm512_maskz_loadu_ps(mask, b + i), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

FAST void back_block(const Job *j, Space *s, Block b, int64_t head, int64_t start, int64_t columns) {
    int64_t dim = j->dim, wide = whole(dim);
    for (int64_t r = 0; r < b.count; r++) {
        int64_t token = start + b.first + r;
        turned(j, j->q + token * j->q_row + head * dim, token, 1, j->scale, s->query + r * wide);
        plain(j->d_out + (token * j->heads + head) * dim, dim, s->d_out + r * wide);
    }
    product(b.count, b.width, wide, s->query, wide, 1, s->keys_t + b.from, columns, s->scores, b.width, 0);
    product(b.count, b.width, wide, s->d_out, wide, 1, s->values_t + b.from, columns, s->d_scores, b.width, 0);
    for (int64_t r = 0; r < b.count; r++) {
        int64_t place = (start + b.first + r) * j->heads + head;
        float delta = dot(j->d_out + place * dim, j->out + place * dim, dim);
        softmax_back(j, &b, r, s->scores + r * b.width, s->d_scores + r * b.width, j->lse[place], delta);
    }
    int64_t keys = b.upto - b.from;
    product(keys, wide, b.count, s->scores, 1, b.width, s->d_out, wide, s->dv + b.from * wide, wide, 1);
    product(keys, wide, b.count, s->d_scores, 1, b.width, s->query, wide, s->dk + b.from * wide, wide, 1);
    product(b.count, wide, keys, s->d_scores, b.width, 1, s->keys + b.from * wide, wide, s->rows, wide, 0);
    for (int64_t r = 0; r < b.count; r++) {
        int64_t token = start + b.first + r;
        turned(j, s->rows + r * wide, token, -1, j->scale, s->query + r * wide);
        memcpy(j->dq + (token * j->heads + head) * dim, s->query + r * wide, (size_t)dim * sizeof(float));
    }
}

FAST void backward(const Job *j, Space *s, int64_t head, int64_t start, int64_t length) {
    int64_t dim = j->dim, wide = whole(dim), columns = whole(length) + LANES * VECTORS;
    int64_t kv = head / (j->heads / j->kv_heads);
    for (int64_t t = 0; t < length; t++) {
        turned(j, j->k + (start + t) * j->k_row + kv * dim, start + t, 1, 1, s->keys + t * wide);
        plain(j->v + (start + t) * j->v_row + kv * dim, dim, s->values + t * wide);
    }
    transpose(s->keys, length, wide, s->keys_t, columns);
    transpose(s->values, length, wide, s->values_t, columns);
    memset(s->dk, 0, (size_t)(length * wide) * sizeof(float));
    memset(s->dv, 0, (size_t)(length * wide) * sizeof(float));
    for (int64_t first = 0; first < length; first += QUERIES)
        back_block(j, s, block_of(j, first, length), head, start, columns);
    for (int64_t t = 0; t < length; t++) {
        int64_t place = ((start + t) * j->heads + head) * dim;
        turned(j, s->dk + t * wide, start + t, -1, 1, s->rows);
        memcpy(j->dk + place, s->rows, (size_t)dim * sizeof(float));
        memcpy(j->dv + place, s->dv + t * wide, (size_t)dim * sizeof(float));
    }
}

EXPORT int edgelora_attention_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f");
}

/* Floats of scratch that a thread needs for documents of up to `longest` tokens. */
EXPORT int64_t edgelora_attention_floats(int64_t longest, int64_t dim, int backward) {
    Space none;
    return lay_out(&none, NULL, longest, dim, backward);
}

/* What every thread of a parallel region calls with the same Job: tasks are taken until there are none. */
EXPORT void edgelora_attention(void *given) {
    Job *j = given;
    Space s;
    int64_t longest = 0;
    for (int64_t d = 0; d < j->documents; d++)
        longest = j->starts[d + 1] - j->starts[d] > longest ? j->starts[d + 1] - j->starts[d] : longest;
    lay_out(&s, j->scratch + atomic_fetch_add(&j->entered, 1) * j->floats, longest, j->dim, j->d_out != NULL);
    for (int64_t task; (task = atomic_fetch_add(&j->next, 1)) < j->documents * j->heads;) {
        int64_t d = task / j->heads, start = j->starts[d];
        (j->d_out ? backward : forward)(j, &s, task % j->heads, start, j->starts[d + 1] - start);
    }
}
