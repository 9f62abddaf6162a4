/* What is called from Python: open, run, close. */

#define EXPORT __attribute__((visibility("default")))

EXPORT int edgelora_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq");
}

/* Bytes of a product's weights when they are packed. */
EXPORT size_t edgelora_packed_bytes(int n, int k, int bits, int block) {
    return (size_t)(n + LANES - 1) / LANES * panel_bytes(k, block, bits);
}

/* Pack the weights of a product into `out`, which is zeros. */
EXPORT void edgelora_pack(const uint8_t *codes, const float *scales, int n, int k, int bits, int block, uint8_t *out) {
    for (int row = 0; row < n; row += LANES)
        pack_panel(codes, scales, n, k, bits, block, row, out + (size_t)(row / LANES) * panel_bytes(k, block, bits));
}

/* Give `bytes` of the memory that begins at `base`, on a line of its own; with base NULL only count. */
static void *take(uint8_t *base, size_t *used, size_t bytes) {
    uint8_t *found = base ? base + *used : NULL;
    *used += (bytes + 127) / 64 * 64; /* a register's worth more: what is read past the end is not used */
    return found;
}

/* Lay out buffers and scratch from `base`; return the bytes they take. */
static size_t lay_out(Decoder *d, uint8_t *base, int positions) {
    size_t used = 0, scratch = 0, chunk = (size_t)d->chunk, reach = (size_t)(positions + STRIP);
    for (int i = 0; i < d->buffers; i++) {
        Buffer *b = &d->buffer[i];
        Rounded *r = &b->rounded;
        b->data = take(base, &used, chunk * (size_t)b->width * sizeof(float));
        if (!b->block) continue;
        r->k = b->width, r->blocks = b->width / b->block;
        r->q = take(base, &used, chunk * (size_t)r->k);
        r->scale = take(base, &used, chunk * (size_t)r->blocks * sizeof(float));
        r->less = take(base, &used, chunk * (size_t)r->blocks * sizeof(int32_t));
    }
    for (int i = 0; i < d->count; i++) {
        const Operation *o = &d->operations[i];
        size_t bytes = 0;
        if (o->kind == PRODUCT) bytes = panel_bytes(o->k, o->block, 8);
        if (o->kind == ATTEND) bytes = reach * (size_t)(2 * o->dim + QUERIES) * sizeof(float);
        scratch = bytes > scratch ? bytes : scratch;
    }
    for (int i = 0; i < d->threads; i++) d->scratch[i] = take(base, &used, scratch);
    return used;
}

EXPORT void edgelora_close(Decoder *d) {
    if (!d) return;
    end_threads(d);
    free(d->memory), free(d->scratch), free(d->buffer), free(d->operations), free(d->workers), free(d);
}

/* Return a decoder, NULL without memory. `widths` and `blocks` are of the buffers; `chunk` tokens at most are run at once,
 * over `positions` at most. The weights must stay where they are until it is closed. */
EXPORT Decoder *edgelora_open(const Operation *operations, int count, const int32_t *widths, const int32_t *blocks, int buffers,
                              int threads, int chunk, int positions) {
    Decoder *d = calloc(1, sizeof *d);
    if (!d) return NULL;
    d->count = count, d->buffers = buffers, d->threads = threads, d->chunk = chunk;
    d->operations = calloc((size_t)count, sizeof *operations);
    d->buffer = calloc((size_t)buffers, sizeof *d->buffer);
    d->scratch = calloc((size_t)threads, sizeof *d->scratch);
    int good = d->operations && d->buffer && d->scratch;
    if (good) {
        memcpy(d->operations, operations, (size_t)count * sizeof *operations);
        for (int i = count - 1, next = 0; i >= 0; i--) {
            d->operations[i].next = next ? next - i : 0;
            if (operations[i].kind == PRODUCT) next = i;
        }
        for (int i = 0; i < buffers; i++) d->buffer[i].width = widths[i], d->buffer[i].block = blocks[i];
        d->memory = calloc(lay_out(d, NULL, positions) + 64, 1);
    }
    if (d->memory) lay_out(d, (uint8_t *)(((uintptr_t)d->memory + 63) / 64 * 64), positions);
    if (d->memory && start_threads(d)) return d;
    edgelora_close(d);
    return NULL;
}

/* Add what each operation takes from now on to `seconds` [operations]; NULL: no longer. */
EXPORT void edgelora_clock(Decoder *d, double *seconds) { d->seconds = seconds; }

/* Run `tokens` ids after `past` positions. `cache` has key and value of each layer, fp16 [kv_heads, capacity, dim];
 * logits [kept, vocabulary] are those of the last `kept` tokens. */
EXPORT void edgelora_run(Decoder *d, const int64_t *ids, int tokens, int past, int kept, int capacity, Half **cache,
                         float *logits) {
    d->ids = ids, d->tokens = d->rows = tokens, d->past = past, d->kept = kept, d->capacity = capacity;
    d->cache = cache, d->logits = logits;
    if (d->threads > 1) begin(d);
    work(d, 0);
}
