/* Products of weights in blocks of 2, 4 or 8 bits with activations in blocks of 8 bits, for AVX512-VNNI.
 *
 * The weights are those of ONNX Runtime's MatMulNBits (operator specification of com.microsoft.MatMulNBits): codes
 * [N, blocks, block * bits / 8], low bits first, scales fp32 [N, blocks], w = (code - zero) * scale. Activations are rounded as
 * its accuracy_level 4 has it: a block's largest magnitude becomes 127. Sums over a block are exact (int32); sums over blocks
 * are in the blocks' order, for each output alone: a token has the same bits whatever stands beside it.
 *
 * Packed, 16 outputs are side by side, a lane of a register for each. Two blocks follow each other, then their scales in bf16:
 * what a product reads is one stream. A register of codes holds 4 inputs of the 16 outputs for every 8 bits of a code: with
 * bits b, input 4 (i * 8 / b + s) + j of lane l has bits b s to b s + b of byte 4 l + j of register i.
 */

typedef struct {
    int n, k, bits, block;
    const uint8_t *packed;
} Weights;

/* Rows of activations: q int8 [rows, k]; of each block, [rows, blocks]: its scale, and -8 times its sum. */
typedef struct {
    int k, blocks;
    int8_t *q;
    float *scale;
    int32_t *less;
} Rounded;

#define LANES 16    /* fp32 numbers of a register: outputs of a panel */
#define TILE 10     /* tokens whose sums `panel` holds in registers */
#define FEWER 3     /* of those that are left */
#define UNPACK 20   /* tokens from which a panel is unpacked once for all */
#define AHEAD 4096  /* bytes of weights that are asked for before they are used */

/* Round a block of `block` numbers, a multiple of 16. */
static TARGET void round_block(const float *x, int block, int8_t *q, float *scale, int32_t *less) {
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
    *less = -8 * _mm512_reduce_add_epi32(total);
}

/* Bytes of the codes of a block of 16 outputs, of two blocks with their scales, and of a panel. */
static inline size_t block_bytes(int block, int bits) { return (size_t)LANES * (size_t)block * (size_t)bits / 8; }

static inline size_t pair_bytes(int block, int bits) { return 2 * block_bytes(block, bits) + 2 * LANES * sizeof(uint16_t); }

static inline size_t panel_bytes(int k, int block, int bits) { return (size_t)(k / block + 1) / 2 * pair_bytes(block, bits); }

/* Where the codes of block `b` of a panel begin, and its scales. */
static inline size_t codes_at(int b, int block, int bits) {
    return (size_t)(b / 2) * pair_bytes(block, bits) + (size_t)(b % 2) * block_bytes(block, bits);
}

static inline size_t scales_at(int b, int block, int bits) {
    size_t pair = (size_t)(b / 2) * pair_bytes(block, bits);
    return pair + 2 * block_bytes(block, bits) + (size_t)(b % 2) * LANES * sizeof(uint16_t);
}

/* Pack one panel, outputs `row` to `row` + 15; those from n on are zeros. `out` is zeros. */
static void pack_panel(const uint8_t *codes, const float *scales, int n, int k, int bits, int block, int row, uint8_t *out) {
    int blocks = k / block, shares = 8 / bits, mask = (1 << bits) - 1;
    for (int r = 0; r < LANES && row + r < n; r++) {
        const uint8_t *from = codes + (size_t)(row + r) * k * bits / 8;
        for (int b = 0; b < blocks; b++) {
            uint8_t *to = out + codes_at(b, block, bits);
            for (int i = 0; i < block; i++) {
                int at = b * block + i, code = from[at / shares] >> (at % shares * bits) & mask, step = i / 4;
                to[(size_t)(step / shares) * 4 * LANES + (size_t)r * 4 + i % 4] |= (uint8_t)(code << (step % shares * bits));
            }
            uint32_t word;
            memcpy(&word, &scales[(size_t)(row + r) * blocks + b], sizeof word);
            uint16_t high = (uint16_t)(word >> 16); /* all of a bf16 number */
            memcpy(out + scales_at(b, block, bits) + (size_t)r * sizeof high, &high, sizeof high);
        }
    }
}

/* Unpack the weights of one output of a panel. */
static void unpack_output(const uint8_t *packed, int lane, int k, int block, int bits, float *out) {
    int shares = 8 / bits, mask = (1 << bits) - 1;
    for (int i = 0; i < k; i++) {
        int b = i / block, step = i % block / 4;
        const uint8_t *code = packed + codes_at(b, block, bits) + (step / shares * LANES + lane) * 4 + i % 4;
        uint16_t high;
        memcpy(&high, packed + scales_at(b, block, bits) + (size_t)lane * sizeof high, sizeof high);
        uint32_t word = (uint32_t)high << 16;
        float scale;
        memcpy(&scale, &word, sizeof scale);
        out[i] = (float)((*code >> (step % shares * bits) & mask) - (1 << (bits - 1))) * scale;
    }
}

/* Products of `tokens` tokens, at most TILE, with a panel of 16 outputs. */
static TARGET inline __attribute__((always_inline)) void panel(
    int bits, int tokens, int block, int zero_bits, const uint8_t *packed, const Rounded *x, int token, __m512 total[TILE]) {
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    const int shares = 8 / bits, bytes = (int)block_bytes(block, bits);
    const int8_t *q = x->q + (size_t)token * x->k;
    const float *scale = x->scale + (size_t)token * x->blocks;
    const int32_t *less = x->less + (size_t)token * x->blocks;
#pragma GCC unroll 10
    for (int t = 0; t < tokens; t++) total[t] = _mm512_setzero_ps();
    for (int b = 0; b < x->blocks; b++) {
        const uint8_t *codes = packed + codes_at(b, block, bits);
        __m512i dots[TILE];
#pragma GCC unroll 10
        for (int t = 0; t < tokens; t++) {
            dots[t] = _mm512_set1_epi32(less[(size_t)t * x->blocks + b]);
            if (zero_bits == 8) dots[t] = _mm512_slli_epi32(dots[t], 4);
            if (zero_bits == 2) dots[t] = _mm512_srai_epi32(dots[t], 2);
        }
        const int8_t *four = q + (size_t)b * block;
        for (int i = 0; i < bytes; i += 4 * LANES) {
            __m512i word = _mm512_loadu_si512(codes + i);
            _mm_prefetch((const char *)codes + i + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
            for (int s = 0; s < shares; s++, four += 4) {
                __m512i w = bits == 8 ? word : _mm512_and_si512(s ? _mm512_srli_epi16(word, s * bits) : word, mask);
#pragma GCC unroll 10
                for (int t = 0; t < tokens; t++) {
                    int32_t inputs;
                    memcpy(&inputs, four + (size_t)t * x->k, sizeof inputs);
                    dots[t] = _mm512_dpbusd_epi32(dots[t], w, _mm512_set1_epi32(inputs));
                }
            }
        }
        __m256i halves = _mm256_loadu_si256((const __m256i *)(packed + scales_at(b, block, bits)));
        __m512 ws = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#pragma GCC unroll 10
        for (int t = 0; t < tokens; t++) {
            __m512 both = _mm512_mul_ps(ws, _mm512_set1_ps(scale[(size_t)t * x->blocks + b]));
            total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t]), both, total[t]);
        }
    }
}

/* Unpack a panel to 8 bits a code; the zero stays that of its own bits. */
static TARGET void unpack_panel(const uint8_t *packed, int k, int block, int bits, uint8_t *out) {
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    for (int b = 0; b < (k / block + 1) / 2 * 2; b++) {
        const uint8_t *codes = packed + codes_at(b, block, bits);
        uint8_t *to = out + codes_at(b, block, 8);
        for (int i = 0; i < block / 4; i++) {
            __m512i word = _mm512_loadu_si512(codes + (size_t)(i * bits / 8) * 4 * LANES);
            word = _mm512_and_si512(_mm512_srl_epi16(word, _mm_cvtsi32_si128(i * bits % 8)), mask);
            _mm512_storeu_si512(to + (size_t)i * 4 * LANES, word);
        }
        memcpy(out + scales_at(b, block, 8), packed + scales_at(b, block, bits), LANES * sizeof(uint16_t));
    }
}

static TARGET inline __attribute__((always_inline)) void tile(
    int bits, int tokens, int zero_bits, const Weights *w, const uint8_t *packed, const Rounded *x, int token, int row,
    float *out) {
    __m512 total[TILE];
    int some = w->n - row < LANES ? w->n - row : LANES;
    if (w->block == 32) panel(bits, tokens, 32, zero_bits, packed, x, token, total);
    else panel(bits, tokens, w->block, zero_bits, packed, x, token, total);
#pragma GCC unroll 10
    for (int t = 0; t < tokens; t++)
        _mm512_mask_storeu_ps(out + (size_t)(token + t) * w->n + row, (__mmask16)((1u << some) - 1), total[t]);
}

/* Products of all tokens with a panel whose codes have `bits`; `zero` are the bits that say what code means 0. */
static TARGET void tiles(int bits, int zero, const Weights *w, const uint8_t *p, const Rounded *x, int tokens, int row,
                         float *out) {
    for (int t = 0, some; t < tokens; t += some) {
        some = tokens - t >= TILE ? TILE : tokens - t >= FEWER ? FEWER : 1;
        switch (some * 16 + bits) {
        case TILE * 16 + 2: tile(2, TILE, 2, w, p, x, t, row, out); break;
        case TILE * 16 + 4: tile(4, TILE, 4, w, p, x, t, row, out); break;
        case TILE * 16 + 8: tile(8, TILE, zero, w, p, x, t, row, out); break;
        case FEWER * 16 + 2: tile(2, FEWER, 2, w, p, x, t, row, out); break;
        case FEWER * 16 + 4: tile(4, FEWER, 4, w, p, x, t, row, out); break;
        case FEWER * 16 + 8: tile(8, FEWER, zero, w, p, x, t, row, out); break;
        case 16 + 2: tile(2, 1, 2, w, p, x, t, row, out); break;
        case 16 + 4: tile(4, 1, 4, w, p, x, t, row, out); break;
        default: tile(8, 1, zero, w, p, x, t, row, out);
        }
    }
}

/* Products of tokens with outputs `first` to `stop`, multiples of 16 but for the end. */
static TARGET void multiply(const Weights *w, const Rounded *x, int tokens, int first, int stop, uint8_t *scratch, float *out) {
    size_t bytes = panel_bytes(w->k, w->block, w->bits);
    for (int row = first; row < stop; row += LANES) {
        const uint8_t *packed = w->packed + (size_t)(row / LANES) * bytes;
        if (tokens >= UNPACK && w->bits != 8) {
            unpack_panel(packed, w->k, w->block, w->bits, scratch);
            tiles(8, w->bits, w, scratch, x, tokens, row, out);
        } else
            tiles(w->bits, w->bits, w, packed, x, tokens, row, out);
    }
}
