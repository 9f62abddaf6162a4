/* What stands between the products of a decoder layer: norm, rotary positions, attention over the cache, gated activation. */

#define QUERIES 4  /* tokens that `attend_many` takes at once */
#define STRIP 64   /* positions that it keeps the sums of in registers, for each of them */

/* e^x from -87 to 88, by range reduction and the Taylor series of e^r, |r| <= ln 2 / 2, which is cut off below 3e-7. */
static TARGET inline __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
    const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), nearest);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x); /* ln 2 in two parts: n times the first is exact */
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    const float series[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (int i = 0; i < 6; i++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(series[i]));
    return _mm512_scalef_ps(p, n);
}

/* SimplifiedLayerNormalization: x / sqrt(mean(x^2) + epsilon) * weight. */
static TARGET void normalize(const float *x, int width, float epsilon, const float *weight, float *out) {
    float squares = 0;
    for (int i = 0; i < width; i++) squares += x[i] * x[i];
    float factor = 1.0f / sqrtf(squares / (float)width + epsilon);
    for (int i = 0; i < width; i++) out[i] = x[i] * factor * weight[i];
}

/* Rotate a head: its first and second half are the two coordinates. cosine and sine are [dim / 2]. */
static TARGET void rotate(const float *x, int dim, const float *cosine, const float *sine, float *out) {
    int half = dim / 2;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[half + i];
        out[i] = a * cosine[i] - b * sine[i];
        out[half + i] = b * cosine[i] + a * sine[i];
    }
}

/* Turn `count` scores, times `scale`, into e^(score - largest); return their sum. Room is read up to a multiple of 16. */
static TARGET float weigh(float *scores, int count, float scale) {
    __m512 largest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps(), factor = _mm512_set1_ps(scale);
    for (int p = 0; p < count; p += LANES) {
        __mmask16 some = count - p < LANES ? (__mmask16)((1u << (count - p)) - 1) : 0xffff;
        largest = _mm512_mask_max_ps(largest, some, largest, _mm512_maskz_loadu_ps(some, scores + p));
    }
    __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(largest) * scale);
    for (int p = 0; p < count; p += LANES) {
        __mmask16 some = count - p < LANES ? (__mmask16)((1u << (count - p)) - 1) : 0xffff;
        __m512 x = _mm512_maskz_loadu_ps(some, scores + p);
        x = _mm512_maskz_mov_ps(some, exponential(_mm512_fmsub_ps(x, factor, most)));
        _mm512_mask_storeu_ps(scores + p, some, x);
        total = _mm512_add_ps(total, x);
    }
    return _mm512_reduce_add_ps(total);
}

static TARGET inline __m512 load_half(const Half *x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x)); }

/* Keep `count` numbers, a multiple of 16, in the cache. */
static TARGET void store_halves(const float *x, int count, Half *out) {
    for (int i = 0; i < count; i += LANES)
        _mm256_storeu_si256((__m256i *)(out + i), _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
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

/* Attention of one head of one token over `count` positions; keys and values [count, dim], scores is room for `count` and 15
 * more. Sums are in the order of `attend_many`, a lane for each position: the same bits. What comes next is asked for ahead. */
static TARGET void attend(const float *query, const Half *keys, const Half *values, int count, int dim, float scale,
                          float *scores, float *out) {
    for (int p = 0; p < count; p += LANES) {
        __m512 sum = _mm512_setzero_ps();
        for (int i = 0; i < dim; i += LANES) {
            __m512i x[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) {
                size_t at = (size_t)(p + r < count ? p + r : count - 1) * dim + i;
                _mm_prefetch((const char *)(keys + at + LANES * dim), _MM_HINT_T1);
                _mm_prefetch((const char *)(values + at), _MM_HINT_T1);
                x[r] = _mm512_castps_si512(load_half(keys + at));
            }
            transpose(x);
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) sum = _mm512_fmadd_ps(_mm512_set1_ps(query[i + r]), _mm512_castsi512_ps(x[r]), sum);
        }
        _mm512_storeu_ps(scores + p, sum);
    }
    __m512 inverse = _mm512_set1_ps(1.0f / weigh(scores, count, scale));
    for (int first = 0; first < dim; first += 4 * LANES) { /* four registers: a head of 64 in one pass */
        __m512 sum[4];
        int some = dim - first < 4 * LANES ? (dim - first) / LANES : 4;
        for (int i = 0; i < 4; i++) sum[i] = _mm512_setzero_ps();
        for (int p = 0; p < count; p++) {
            const Half *value = values + (size_t)p * dim + first;
            __m512 weight = _mm512_set1_ps(scores[p]);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                if (i < some) sum[i] = _mm512_fmadd_ps(weight, load_half(value + i * LANES), sum[i]);
        }
        for (int i = 0; i < some; i++) _mm512_storeu_ps(out + first + i * LANES, _mm512_mul_ps(sum[i], inverse));
    }
}

/* Lay keys [count, dim] as columns: [dim, stride]. What is past the last is of no use. */
static TARGET void turn_keys(const Half *keys, int count, int dim, int stride, float *out) {
    for (int p = 0; p < count; p += LANES)
        for (int i = 0; i < dim; i += LANES) {
            __m512i x[LANES];
            for (int r = 0; r < LANES; r++) {
                int at = p + r < count ? p + r : count - 1;
                x[r] = _mm512_castps_si512(load_half(keys + (size_t)at * dim + i));
            }
            transpose(x);
            for (int r = 0; r < LANES; r++) _mm512_storeu_si512(out + (size_t)(i + r) * stride + p, x[r]);
        }
}

static TARGET void widen(const Half *x, size_t count, float *out) {
    for (size_t i = 0; i < count; i += LANES) _mm512_storeu_ps(out + i, load_half(x + i));
}

/* Scores of QUERIES tokens with all of `count` keys, which lie in columns; scores [QUERIES, stride]. */
static TARGET void score_many(const float *const queries[QUERIES], const float *columns, int count, int dim, int stride,
                              float *scores) {
    for (int p = 0; p < count; p += STRIP) {
        __m512 sum[QUERIES][STRIP / LANES];
#pragma GCC unroll 4
        for (int t = 0; t < QUERIES; t++)
#pragma GCC unroll 4
            for (int c = 0; c < STRIP / LANES; c++) sum[t][c] = _mm512_setzero_ps();
        for (int i = 0; i < dim; i++) {
            const float *column = columns + (size_t)i * stride + p;
            __m512 keys[STRIP / LANES];
#pragma GCC unroll 4
            for (int c = 0; c < STRIP / LANES; c++) keys[c] = _mm512_loadu_ps(column + c * LANES);
#pragma GCC unroll 4
            for (int t = 0; t < QUERIES; t++) {
                __m512 query = _mm512_set1_ps(queries[t][i]);
#pragma GCC unroll 4
                for (int c = 0; c < STRIP / LANES; c++) sum[t][c] = _mm512_fmadd_ps(query, keys[c], sum[t][c]);
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < QUERIES; t++)
#pragma GCC unroll 4
            for (int c = 0; c < STRIP / LANES; c++) _mm512_storeu_ps(scores + (size_t)t * stride + p + c * LANES, sum[t][c]);
    }
}

/* Sums of values [count, dim] by the weights of QUERIES tokens; a multiple of 64 of a head's numbers. */
static TARGET void mix_many(const float *weights, int stride, const float *values, int count, int dim,
                            float *const out[QUERIES], const float inverse[QUERIES]) {
    for (int first = 0; first < dim; first += 4 * LANES) {
        __m512 sum[QUERIES][4];
#pragma GCC unroll 4
        for (int t = 0; t < QUERIES; t++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) sum[t][c] = _mm512_setzero_ps();
        for (int p = 0; p < count; p++) {
            const float *row = values + (size_t)p * dim + first;
            __m512 value[4];
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) value[c] = _mm512_loadu_ps(row + c * LANES);
#pragma GCC unroll 4
            for (int t = 0; t < QUERIES; t++) {
                __m512 weight = _mm512_set1_ps(weights[(size_t)t * stride + p]);
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) sum[t][c] = _mm512_fmadd_ps(weight, value[c], sum[t][c]);
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < QUERIES; t++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++)
                _mm512_storeu_ps(out[t] + first + c * LANES, _mm512_mul_ps(sum[t][c], _mm512_set1_ps(inverse[t])));
    }
}

/* SiLU(gate) * up, for a multiple of 16. */
static TARGET void gated(const float *gate, const float *up, int count, float *out) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int i = 0; i < count; i += LANES) {
        __m512 x = _mm512_loadu_ps(gate + i);
        __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
        _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_div_ps(x, below), _mm512_loadu_ps(up + i)));
    }
}
