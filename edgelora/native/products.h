/* Products of weights in blocks of 2, 4 or 8 bits with activations in blocks of 8 bits, for AVX512-VNNI with VBMI.
 *
 * The weights are those of ONNX Runtime's MatMulNBits, read as they lie in the file (operator specification of
 * com.microsoft.MatMulNBits): codes [N, blocks, block * bits / 8], low bits first, scales fp32 [N, blocks], and
 * w = (code - zero) * scale. Activations are rounded as its accuracy_level 4 has it: a block's largest magnitude becomes 127.
 *
 * Sums over a block are exact (int32); only the sum over blocks rounds. `dot_rows` gives the same bits for a token whatever
 * stands beside it; `panel` sums in another order.
 */

typedef struct {
    int n, k, bits, block, blocks; /* outputs, inputs, bits of a code, inputs of a block, blocks of a row */
    const uint8_t *codes;
    const float *scales;
    const float *bias; /* [n] or NULL */
} Weights;

/* Rows of activations: q int8 [rows, k], scale and its product with the block's sum fp32 [rows, padded], the sum int32. */
typedef struct {
    int k, padded; /* padded: blocks rounded up to 16; what is beyond them is zero */
    int8_t *q;
    float *scale, *scaled_sum;
    int32_t *sum;
} Rounded;

#define TILE 6    /* tokens whose sums `panel` holds in registers, for two panels of 16 outputs */
#define LANES 16  /* fp32 numbers of a register */
#ifndef AHEAD
#define AHEAD 4096 /* bytes of codes that are asked for before they are used */
#endif
#define GROUP 4   /* rows of weights that `dot_rows` reads side by side */

static inline int zero_point(int bits) { return 1 << (bits - 1); }

/* Round a block of `block` numbers, a multiple of 16. */
static TARGET void round_block(const float *x, int block, int8_t *q, float *scale, float *scaled_sum, int32_t *sum) {
    __m512 largest = _mm512_setzero_ps();
    for (int i = 0; i < block; i += LANES) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
    float magnitude = _mm512_reduce_max_ps(largest);
    __m512 inverse = _mm512_set1_ps(magnitude > 0 ? 127.0f / magnitude : 0);
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < block; i += LANES) { /* to the nearest, ties to even */
        __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
        _mm_storeu_si128((__m128i *)(q + i), _mm512_cvtepi32_epi8(codes));
        total = _mm512_add_epi32(total, codes);
    }
    *scale = magnitude / 127.0f;
    *sum = _mm512_reduce_add_epi32(total);
    *scaled_sum = *scale * (float)*sum;
}

/* Return 64 codes as bytes, in order. */
static TARGET inline __m512i load_codes(const uint8_t *codes, int bits) {
    const __m512i four = _mm512_set1_epi64(0x1c1814100c080400), two = _mm512_set1_epi64(0x0e0c0a0806040200);
    if (bits == 8) return _mm512_loadu_si512(codes);
    if (bits == 4) {
        __m512i words = _mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i *)codes));
        return _mm512_and_si512(_mm512_multishift_epi64_epi8(four, words), _mm512_set1_epi8(15));
    }
    __m512i words = _mm512_cvtepu16_epi64(_mm_loadu_si128((const __m128i *)codes));
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(two, words), _mm512_set1_epi8(3));
}

/* Write the products of one token with `rows` rows of weights. A register holds 64 codes: the blocks they belong to give each
 * of its lanes a scale, by a permutation of the scales of 16 blocks. */
static TARGET inline __attribute__((always_inline)) void dot_rows(
    int rows, int bits, int zero, const Weights *w, const uint8_t *codes, size_t stride, const float *scales,
    const int8_t *q, const float *x_scale, const float *x_sum, float *out) {
    const __m512i lane = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
    const __m128i shift = _mm_cvtsi32_si128(__builtin_ctz(w->block));
    const __m512 minus = _mm512_set1_ps((float)-zero);
    __m512 sum[GROUP], scale[GROUP];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) sum[r] = _mm512_setzero_ps();
    for (int first = 0; first < w->blocks; first += LANES) {
        int count = w->blocks - first < LANES ? w->blocks - first : LANES;
        __mmask16 some = (__mmask16)((1u << count) - 1);
        __m512 xs = _mm512_loadu_ps(x_scale + first);
        __m512 less = _mm512_mul_ps(_mm512_loadu_ps(x_sum + first), minus);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const float *from = scales + (size_t)r * w->blocks + first;
            _mm_prefetch((const char *)from + AHEAD / 4, _MM_HINT_T1);
            __m512 ws = _mm512_maskz_loadu_ps(some, from);
            sum[r] = _mm512_fmadd_ps(ws, less, sum[r]);
            scale[r] = _mm512_mul_ps(ws, xs);
        }
        for (int at = 0; at < count * w->block; at += 64) {
            __m512i x = _mm512_loadu_si512(q + first * w->block + at);
            __m512i block = _mm512_srl_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(at)), shift);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                size_t byte = (size_t)(first * w->block + at) * bits / 8;
                _mm_prefetch((const char *)(codes + r * stride + byte + AHEAD), _MM_HINT_T1);
                __m512i codes_r = load_codes(codes + r * stride + byte, bits);
                __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes_r, x);
                sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_permutexvar_ps(block, scale[r]), sum[r]);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) out[r] = _mm512_reduce_add_ps(sum[r]);
}

static TARGET void dot(int rows, int bits, int zero, const Weights *w, const uint8_t *codes, size_t stride, const float *scales,
                       const Rounded *x, int token, float *out) {
    const int8_t *q = x->q + (size_t)token * x->k;
    const float *xs = x->scale + (size_t)token * x->padded, *sum = x->scaled_sum + (size_t)token * x->padded;
    if (rows == GROUP) {
        if (bits == 4) dot_rows(GROUP, 4, zero, w, codes, stride, scales, q, xs, sum, out);
        else if (bits == 8) dot_rows(GROUP, 8, zero, w, codes, stride, scales, q, xs, sum, out);
        else dot_rows(GROUP, 2, zero, w, codes, stride, scales, q, xs, sum, out);
        return;
    }
    for (int r = 0; r < rows; r++) {
        const uint8_t *row = codes + r * stride;
        const float *row_scales = scales + (size_t)r * w->blocks;
        if (bits == 4) dot_rows(1, 4, zero, w, row, stride, row_scales, q, xs, sum, out + r);
        else if (bits == 8) dot_rows(1, 8, zero, w, row, stride, row_scales, q, xs, sum, out + r);
        else dot_rows(1, 2, zero, w, row, stride, row_scales, q, xs, sum, out + r);
    }
}

/* Unpack `count` codes of a row to bytes. */
static TARGET void unpack_row(const uint8_t *codes, int bits, int count, uint8_t *out) {
    for (int at = 0; at < count; at += 64)
        _mm512_storeu_si512(out + at, load_codes(codes + (size_t)at * bits / 8, bits));
}

/* Products of a few tokens with the rows from `first` to `stop`: codes are unpacked once; the same bits as for each alone. */
static TARGET void product_few(const Weights *w, const Rounded *x, int tokens, int first, int stop, uint8_t *scratch, float *out) {
    size_t stride = (size_t)w->k * w->bits / 8;
    for (int row = first; row < stop; row += GROUP) {
        int rows = stop - row < GROUP ? stop - row : GROUP;
        const uint8_t *codes = w->codes + (size_t)row * stride;
        const float *scales = w->scales + (size_t)row * w->blocks;
        if (tokens == 1) {
            dot(rows, w->bits, zero_point(w->bits), w, codes, stride, scales, x, 0, out + row);
            continue;
        }
        for (int r = 0; r < rows; r++) unpack_row(codes + r * stride, w->bits, w->k, scratch + (size_t)r * w->k);
        for (int t = 0; t < tokens; t++)
            dot(rows, 8, zero_point(w->bits), w, scratch, (size_t)w->k, scales, x, t, out + (size_t)t * w->n + row);
    }
}

/* Turn 16 registers of 16 words each into those of their columns. */
static TARGET inline void transpose(__m512i x[LANES]) {
    __m512i y[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) { /* now x[i + c] has column c of each quarter, of rows i to i + 3 */
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        y[c] = _mm512_shuffle_i32x4(x[c], x[c + 4], 0x88);
        y[c + 4] = _mm512_shuffle_i32x4(x[c], x[c + 4], 0xdd);
        y[c + 8] = _mm512_shuffle_i32x4(x[c + 8], x[c + 12], 0x88);
        y[c + 12] = _mm512_shuffle_i32x4(x[c + 8], x[c + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        x[c] = _mm512_shuffle_i32x4(y[c], y[c + 8], 0x88);
        x[c + 8] = _mm512_shuffle_i32x4(y[c], y[c + 8], 0xdd);
        x[c + 4] = _mm512_shuffle_i32x4(y[c + 4], y[c + 12], 0x88);
        x[c + 12] = _mm512_shuffle_i32x4(y[c + 4], y[c + 12], 0xdd);
    }
}

/* Lay 16 rows side by side: codes [k / 4][16][4] bytes, scales [blocks][16]. */
static TARGET void pack_panel(const Weights *w, int row, uint8_t *codes, float *scales) {
    size_t stride = (size_t)w->k * w->bits / 8;
    const uint8_t *from = w->codes + row * stride;
    for (int at = 0; at < w->k; at += 64) {
        __m512i words[LANES];
        for (int r = 0; r < LANES; r++) {
            _mm_prefetch((const char *)(from + (r + LANES) * stride + (size_t)at * w->bits / 8), _MM_HINT_T1);
            words[r] = load_codes(from + r * stride + (size_t)at * w->bits / 8, w->bits);
        }
        transpose(words);
        for (int r = 0; r < LANES; r++) _mm512_storeu_si512(codes + ((size_t)at / 4 + r) * LANES * 4, words[r]);
    }
    for (int r = 0; r < LANES; r++)
        for (int b = 0; b < w->blocks; b++) scales[b * LANES + r] = w->scales[(size_t)(row + r) * w->blocks + b];
}

/* Products of up to TILE tokens with 16 * `panels` outputs, a lane for each output. */
static TARGET inline __attribute__((always_inline)) void panel(
    int panels, const Weights *w, const uint8_t *codes, const float *scales, const Rounded *x, int token, int tokens, int row,
    float *out) {
    const int zero = zero_point(w->bits);
    const int8_t *q[TILE];
    const float *xs[TILE];
    const int32_t *sums[TILE];
    __m512 total[2][TILE];
#pragma GCC unroll 6
    for (int t = 0; t < TILE; t++) { /* past the last token: the last one again, whose result is not kept */
        size_t at = (size_t)(token + (t < tokens ? t : tokens - 1));
        q[t] = x->q + at * x->k, xs[t] = x->scale + at * x->padded, sums[t] = x->sum + at * x->padded;
        for (int p = 0; p < panels; p++) total[p][t] = _mm512_setzero_ps();
    }
    for (int b = 0; b < w->blocks; b++) {
        __m512i dots[2][TILE];
#pragma GCC unroll 6
        for (int t = 0; t < TILE; t++) {
            dots[0][t] = _mm512_set1_epi32(-zero * sums[t][b]);
            if (panels == 2) dots[1][t] = dots[0][t];
        }
        for (int at = b * w->block; at < (b + 1) * w->block; at += 4) {
            __m512i first = _mm512_loadu_si512(codes + (size_t)at * LANES), second = first;
            if (panels == 2) second = _mm512_loadu_si512(codes + (size_t)(w->k + at) * LANES);
#pragma GCC unroll 6
            for (int t = 0; t < TILE; t++) {
                int32_t four;
                memcpy(&four, q[t] + at, 4);
                __m512i same = _mm512_set1_epi32(four);
                dots[0][t] = _mm512_dpbusd_epi32(dots[0][t], first, same);
                if (panels == 2) dots[1][t] = _mm512_dpbusd_epi32(dots[1][t], second, same);
            }
        }
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++) {
            __m512 ws = _mm512_loadu_ps(scales + ((size_t)p * w->blocks + b) * LANES);
#pragma GCC unroll 6
            for (int t = 0; t < TILE; t++)
                total[p][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[p][t]), _mm512_mul_ps(ws, _mm512_set1_ps(xs[t][b])), total[p][t]);
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < TILE; t++)
        for (int p = 0; p < panels; p++)
            if (t < tokens) _mm512_storeu_ps(out + (size_t)(token + t) * w->n + row + p * LANES, total[p][t]);
}

/* Products of many tokens with the rows from `first` to `stop`, multiples of 16. */
static TARGET void product_many(const Weights *w, const Rounded *x, int tokens, int first, int stop, uint8_t *scratch, float *out) {
    float *scales = (float *)(scratch + 2 * (size_t)LANES * w->k);
    for (int row = first; row < stop; row += 2 * LANES) {
        int panels = stop - row >= 2 * LANES ? 2 : 1;
        for (int p = 0; p < panels; p++)
            pack_panel(w, row + p * LANES, scratch + (size_t)p * LANES * w->k, scales + (size_t)p * LANES * w->blocks);
        for (int token = 0; token < tokens; token += TILE) {
            int some = tokens - token < TILE ? tokens - token : TILE;
            if (panels == 2) panel(2, w, scratch, scales, x, token, some, row, out);
            else panel(1, w, scratch, scales, x, token, some, row, out);
        }
    }
}
