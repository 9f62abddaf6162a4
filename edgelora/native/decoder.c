/* A decoder's graph as a list of operations over rows of activations, on threads of its own; program.py makes the list.
 *
 * ONNX Runtime starts its threads for each of 330 nodes of a token and stops them again, which takes longer than the work
 * of most nodes. Here threads stay for a whole token and meet between operations. One call at a time for each decoder.
 */

#if defined(__x86_64__) && defined(__GNUC__) && (defined(__linux__) || defined(__APPLE__))

#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,tune=generic")))

typedef uint16_t Half; /* fp16: what the cache holds, half the memory to read for each token */

#include "products.h"
#include "layers.h"

enum { EMBED, NORM, PRODUCT, ROTATE, ATTEND, GATE, SELECT, ROUND };

#define FEW 9        /* tokens up to which each goes through attention alone: as many as a draft and one */
#define SPINS 20000  /* looks at a flag before a thread gives its processor away, or sleeps until the next call */

typedef struct { /* mirrored in program.py: keep the order */
    int32_t kind, input, skip, output, sum; /* buffers; skip and sum are -1 where there is none */
    int32_t n, k, bits, block;              /* of a product or of the embedding; width k of a norm or a gate */
    int32_t heads, kv_heads, dim, layer;    /* of attention */
    int32_t next;                           /* operations to the next product, 0 after the last */
    float number;                           /* epsilon of a norm, scale of attention's scores */
    const uint8_t *codes;                   /* of the embedding as in the file; of a product packed */
    const float *scales, *weight; /* scales, or cosines [positions, dim / 2]; bias, norm's weight, or sines */
} Operation;

typedef struct {
    int32_t width, block; /* block: rounded to 8 bits in blocks of that size when written; 0: not */
    float *data;
    Rounded rounded;
} Buffer;

typedef struct {
    int count, buffers, threads, chunk, scratch_bytes;
    Operation *operations;
    Buffer *buffer;
    pthread_t *workers;
    uint8_t **scratch;
    void *memory; /* of buffers and scratch, zeros until written: pages that are never used cost nothing */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    atomic_int waiting, phase, call; /* threads at the meeting point, meetings so far, calls so far */
    int sleeping, ending;
    /* of the call */
    const int64_t *ids;
    int tokens, past, kept, capacity, rows;
    Half **cache; /* key, value of each layer, [kv_heads, capacity, dim] */
    float *logits;
    double *seconds; /* what each operation took, added up; NULL: not wanted */
} Decoder;

/* Wait until all threads are here. */
static void meet(Decoder *d) {
    int phase = atomic_load_explicit(&d->phase, memory_order_acquire);
    if (atomic_fetch_add(&d->waiting, 1) + 1 == d->threads) {
        atomic_store(&d->waiting, 0);
        atomic_fetch_add(&d->phase, 1);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&d->phase, memory_order_acquire) == phase; spins++) {
        _mm_pause();
        if (spins > SPINS) sched_yield();
    }
}

/* The share of `units` of a thread: from *first to *stop, in multiples of `step`. */
static void share(int units, int step, int thread, int threads, int *first, int *stop) {
    int steps = (units + step - 1) / step;
    *first = (int)((int64_t)steps * thread / threads) * step;
    *stop = (int)((int64_t)steps * (thread + 1) / threads) * step;
    if (*first > units) *first = units;
    if (*stop > units) *stop = units;
}

static void round_part(Buffer *b, int token, int first, int stop) {
    Rounded *r = &b->rounded;
    for (int i = first; i < stop; i += b->block) {
        size_t at = (size_t)token * r->blocks + i / b->block;
        const float *x = b->data + (size_t)token * b->width + i;
        round_block(x, b->block, r->q + (size_t)token * r->k + i, r->scale + at, r->less + at);
    }
}

/* A row of the table; without scales it is that of the head, packed. */
static void embed(Decoder *d, const Operation *o, int thread) {
    Buffer *out = &d->buffer[o->output];
    int first, stop, zero = 1 << (o->bits - 1);
    share(d->tokens, 1, thread, d->threads, &first, &stop);
    for (int t = first; t < stop; t++) {
        float *row = out->data + (size_t)t * o->k;
        size_t id = (size_t)d->ids[t];
        if (!o->scales) {
            const uint8_t *packed = o->codes + id / LANES * panel_bytes(o->k, o->block, o->bits);
            unpack_output(packed, (int)(id % LANES), o->k, o->block, o->bits, row);
            continue;
        }
        const uint8_t *codes = o->codes + id * (size_t)o->k * o->bits / 8;
        const float *scales = o->scales + id * (size_t)(o->k / o->block);
        for (int i = 0; i < o->k; i++) {
            int code = o->bits == 8 ? codes[i] : (codes[i / 2] >> (i % 2 * 4)) & 15;
            row[i] = (float)(code - zero) * scales[i / o->block];
        }
    }
}

static void norm(Decoder *d, const Operation *o, int thread) {
    Buffer *in = &d->buffer[o->input], *out = &d->buffer[o->output];
    int first, stop;
    share(d->rows, 1, thread, d->threads, &first, &stop);
    for (int t = first; t < stop; t++) {
        const float *x = in->data + (size_t)t * o->k;
        if (o->skip >= 0) {
            const float *skip = d->buffer[o->skip].data + (size_t)t * o->k;
            float *sum = d->buffer[o->sum].data + (size_t)t * o->k;
            for (int i = 0; i < o->k; i++) sum[i] = x[i] + skip[i];
            x = sum;
        }
        normalize(x, o->k, o->number, o->weight, out->data + (size_t)t * o->k);
        if (out->block) round_part(out, t, 0, o->k);
    }
}

/* Ask memory for the beginning of a thread's share of a later product, while others finish this one. */
static void ask_ahead(const Operation *o, int thread, int threads) {
    int first, stop;
    if (o->kind != PRODUCT) return;
    share(o->n, LANES, thread, threads, &first, &stop);
    const char *packed = (const char *)o->codes + (size_t)(first / LANES) * panel_bytes(o->k, o->block, o->bits);
    for (int i = 0; i < AHEAD; i += 64) _mm_prefetch(packed + i, _MM_HINT_T0);
}

static void product(Decoder *d, const Operation *o, int thread) {
    Weights w = {o->n, o->k, o->bits, o->block, o->codes};
    float *out = o->output < 0 ? d->logits : d->buffer[o->output].data;
    int first, stop;
    share(o->n, LANES, thread, d->threads, &first, &stop);
    multiply(&w, &d->buffer[o->input].rounded, d->rows, first, stop, d->scratch[thread], out);
    if (d->rows <= FEW) ask_ahead(o + o->next, thread, d->threads);
    if (o->weight)
        for (int t = 0; t < d->rows; t++)
            for (int i = first; i < stop; i++) out[(size_t)t * o->n + i] += o->weight[i];
}

/* Rotate queries in place and keys into the cache, copy values there. The input is [tokens, (heads + 2 kv_heads) * dim]. */
static void positions(Decoder *d, const Operation *o, int thread) {
    int width = (o->heads + 2 * o->kv_heads) * o->dim, all = o->heads + 2 * o->kv_heads, first, stop;
    share(d->tokens * all, 1, thread, d->threads, &first, &stop);
    for (int unit = first; unit < stop; unit++) {
        int t = unit / all, head = unit % all, position = d->past + t;
        float *x = d->buffer[o->input].data + (size_t)t * width + (size_t)head * o->dim, turned[o->dim];
        const float *cosine = o->scales + (size_t)position * (o->dim / 2), *sine = o->weight + (size_t)position * (o->dim / 2);
        int of_values = head >= o->heads + o->kv_heads;
        if (!of_values) rotate(x, o->dim, cosine, sine, turned);
        if (head < o->heads) memcpy(x, turned, sizeof turned);
        else {
            int kv = head - o->heads - (of_values ? o->kv_heads : 0);
            store_halves(of_values ? x : turned, o->dim,
                         d->cache[2 * o->layer + of_values] + ((size_t)kv * d->capacity + position) * o->dim);
        }
    }
}

/* A few tokens: each head of each alone. Heads of a group, which read the same keys and values, go to one thread as far as that
 * is even. */
static void attend_few(Decoder *d, const Operation *o, int thread) {
    Buffer *out = &d->buffer[o->output];
    int width = (o->heads + 2 * o->kv_heads) * o->dim, first, stop;
    share(o->heads, 1, thread, d->threads, &first, &stop);
    for (int head = first; head < stop; head++)
        for (int t = 0; t < d->tokens; t++) {
            size_t at = (size_t)(head / (o->heads / o->kv_heads)) * d->capacity * o->dim;
            attend(d->buffer[o->input].data + (size_t)t * width + (size_t)head * o->dim, d->cache[2 * o->layer] + at,
                   d->cache[2 * o->layer + 1] + at, d->past + t + 1, o->dim, o->number, (float *)d->scratch[thread],
                   out->data + ((size_t)t * o->heads + head) * o->dim);
        }
}

/* Many tokens: QUERIES at once over all positions that the last of them sees. Thread by thread heads of a group are shared by
 * tokens, so that each turns the keys of a group once. */
static void attend_many(Decoder *d, const Operation *o, int thread) {
    Buffer *in = &d->buffer[o->input], *out = &d->buffer[o->output];
    int width = (o->heads + 2 * o->kv_heads) * o->dim, group = o->heads / o->kv_heads;
    int count = d->past + d->tokens, stride = (count + STRIP - 1) / STRIP * STRIP, tiles = (d->tokens + QUERIES - 1) / QUERIES;
    float *columns = (float *)d->scratch[thread], *values = columns + (size_t)o->dim * stride;
    float *scores = values + (size_t)o->dim * stride;
    for (int kv = 0; kv < o->kv_heads; kv++) {
        size_t at = (size_t)kv * d->capacity * o->dim;
        turn_keys(d->cache[2 * o->layer] + at, count, o->dim, stride, columns);
        widen(d->cache[2 * o->layer + 1] + at, (size_t)count * o->dim, values);
        for (int unit = thread; unit < tiles * group; unit += d->threads) { /* in turn: later tokens see more */
            int token = unit / group * QUERIES, head = kv * group + unit % group;
            const float *queries[QUERIES];
            float *to[QUERIES], inverse[QUERIES];
            int last = token + QUERIES < d->tokens ? token + QUERIES : d->tokens, seen = d->past + last;
            for (int t = 0; t < QUERIES; t++) { /* past the last token: the last one again */
                int at = token + t < last ? token + t : last - 1;
                queries[t] = in->data + (size_t)at * width + (size_t)head * o->dim;
                to[t] = out->data + ((size_t)at * o->heads + head) * o->dim;
            }
            score_many(queries, columns, seen, o->dim, stride, scores);
            for (int t = 0; t < QUERIES; t++) {
                int own = token + t < last ? d->past + token + t + 1 : seen;
                inverse[t] = 1.0f / weigh(scores + (size_t)t * stride, own, o->number);
                for (int p = own; p < seen; p++) scores[(size_t)t * stride + p] = 0;
            }
            mix_many(scores, stride, values, seen, o->dim, to, inverse);
        }
    }
}

static void attention(Decoder *d, const Operation *o, int thread) {
    if (d->tokens > FEW && o->dim % STRIP == 0) attend_many(d, o, thread);
    else attend_few(d, o, thread);
}

/* Round a buffer that was written by all. */
static void round_all(Decoder *d, const Operation *o, int thread) {
    Buffer *b = &d->buffer[o->input];
    int blocks = b->width / b->block, first, stop;
    share(d->rows * blocks, 1, thread, d->threads, &first, &stop);
    for (int unit = first; unit < stop; unit++)
        round_part(b, unit / blocks, unit % blocks * b->block, (unit % blocks + 1) * b->block);
}

static void gate(Decoder *d, const Operation *o, int thread) {
    Buffer *in = &d->buffer[o->input], *out = &d->buffer[o->output];
    int blocks = o->k / out->block, first, stop;
    share(d->rows * blocks, 1, thread, d->threads, &first, &stop);
    for (int unit = first; unit < stop; unit++) {
        int t = unit / blocks, i = unit % blocks * out->block;
        const float *x = in->data + (size_t)t * 2 * o->k;
        gated(x + i, x + o->k + i, out->block, out->data + (size_t)t * o->k + i);
        round_part(out, t, i, i + out->block);
    }
}

/* Keep the last `kept` tokens' rows of a buffer; from here on there are as many. All threads pass, one works. */
static void keep_last(Decoder *d, const Operation *o, int thread) {
    if (thread) return;
    Buffer *b = &d->buffer[o->input];
    int from = d->tokens - d->kept;
    memmove(b->data, b->data + (size_t)from * b->width, (size_t)d->kept * b->width * sizeof *b->data);
    d->rows = d->kept;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void work(Decoder *d, int thread) {
    static void (*const kinds[])(Decoder *, const Operation *, int) = {
        embed, norm, product, positions, attention, gate, keep_last, round_all,
    };
    unsigned int control = _mm_getcsr();
    _mm_setcsr(control | 0x8040); /* denormals are zero */
    double *seconds = thread ? NULL : d->seconds, before = seconds ? now() : 0;
    for (int i = 0; i < d->count; i++) {
        kinds[d->operations[i].kind](d, &d->operations[i], thread);
        meet(d);
        if (!seconds) continue;
        double after = now();
        seconds[i] += after - before;
        before = after;
    }
    _mm_setcsr(control);
}

#include "threads.h"
#include "memory.h"

#endif
