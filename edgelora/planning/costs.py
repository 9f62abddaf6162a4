"""What training a model costs in memory: the bytes of each part of the process at its peak, from shapes and settings alone.

The formulas follow what the engine keeps (models/linear_group.py, models/recompute.py, models/head.py, adapters/lora.py); the
few constants were fitted to measured runs, and a probe of the loaded model corrects them (train/probe.py).
T tokens, S supervised ones, H hidden, Q and KV widths of queries and keys, I inner width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgelora.planning.shape import ModelShape

FP32 = 4
HALF = 2
BLOCK_SIZE = 32
TILE_ROWS, TILE_LOGITS = 2048, 1 << 20  # models/head.py
TILE = 1 << 23  # models/linear_group.py: elements unpacked at once
ROWS_AT_ONCE = 1 << 20  # models/scale_gradient.py: elements of a weight's gradient at once
LARGEST_SHARE = 0.1  # quant/bits.py: of the weights that get 8 bits
MOMENT_BYTES = {32: 4.0, 8: 1.03}  # AdamW's two moments: 8 bits have one fp32 scale in 128 values or more
STREAMED_BLOCKS = 3  # the one in use, the one read ahead, and the one that is being dropped

# Fitted to runs of SmolLM2 and MiniLM: what torch's kernels, threads and allocator take beyond the tensors themselves.
WARM_KERNELS = 75 << 20
# What freed blocks leave between those in use, in the C allocator's heap; what is kept in bf16 is apart (models/slab.py).
# SmolLM2 in 13 settings took 0.9 to 1.1 times what kept_values says: more only with rows of many lengths, which HOLES are for.
ALLOCATOR = {32: 1.1, 16: 1.1}
ENCODER_ALLOCATOR = 1.2  # fitted to four settings of MiniLM, GROWTH counted apart
ROUNDING = 32 << 20  # what the temporaries of rounding leave in the heap where training is on the grid
GROWTH, GROWTH_SHARE = 10 << 20, 0.04  # of the heap over the first steps: a share of what is kept in it
ROUNDING_SHARE = 0.04  # more of it where rounding and block scales' gradients come between
HOLES, HOLES_SHARE = 40 << 20, 0.04  # pieces of other lengths leave other holes: a share of what is kept in the heap, in fp32
# Fitted to nine runs of MiniLM, ResNet, U-Net and Whisper, which took 3 to 10% more than was said without holes and growth.
ENCODER_HOLES_SHARE = 0.03
WAVES_SHARE = 1.0  # HuBERT, 16 recordings of 0.2 to 0.8 s: 47 MB were kept, and 49 MB more than the probe had seen were taken
GROWING = "growth of the heap"  # the part that a probe cannot see
ENCODER_MODULES = 150 << 20  # transformers' modelling code, imported for encoders only


@dataclass(frozen=True)
class Settings:
    """What the planner may change, and the adapters."""

    base_bits: int
    micro_batch: int
    kept_blocks: int  # the last ones keep what their backward needs; those before are computed again from their input
    keep_bits: int = 32  # of what is kept
    keep_in_file: bool = False  # inputs of recomputed blocks go to a scratch file
    stream: bool = False  # base blocks are dropped from memory after use
    optimizer_bits: int = 32
    targets: tuple[tuple[str, int], ...] = ()  # paths of the adapted layers, and their ranks; 0: their block scales are trained
    grid_bits: int | None = None  # bits of their rounded weights, kept between steps where training is on the grid
    grid_start: bool = False  # what is rounded has a start of its own, in 8 bits beside the frozen weight
    grid_scales: bool = False  # block scales are learned beside the adapters
    from_weight: bool = False  # adapters begin with a part of the weight, of which they keep a copy (PiSSA, OLoRA)
    half: bool = False  # products with frozen weights take bf16 operands

    @property
    def scales(self) -> bool:
        """Whether block scales are trained."""
        return any(rank == 0 for _, rank in self.targets)

    @property
    def loaded(self) -> tuple[int, bool, bool, bool]:
        """What a loaded model with its adapters is made for; the rest may change."""
        return self.base_bits, self.stream, self.grid_start, self.grid_scales


@dataclass(frozen=True)
class Piece:
    """The largest rows computed at once, and how attention lays them out (models/attention.py)."""

    tokens: int
    supervised: int
    padding: int = 0  # places of documents that are computed together with longer ones
    longest: int = 0  # tokens of the longest row, as many as each padded one has
    joined: bool = False  # what attention gives is put together anew: from runs of other lengths, or without padding


@dataclass(frozen=True)
class Correction:
    """What a probe found beside the formulas: bytes that do not depend on the settings, and a factor on activations."""

    fixed: int = 0
    activations: float = 1.0


def adapter_weights(shape: ModelShape, settings: Settings) -> int:
    """Return the number of trained weights: A [r, K] and B [N, r] of each adapted layer, or its block scales."""
    ranks = dict(settings.targets)
    if settings.scales:
        return sum(outputs * -(-inputs // BLOCK_SIZE) for path, outputs, inputs in shape.linears if path in ranks)
    return sum(ranks.get(path, 0) * (outputs + inputs) for path, outputs, inputs in shape.linears)


def adapted_weights(shape: ModelShape, settings: Settings) -> int:
    """Return the number of frozen weights in the adapted layers."""
    ranks = dict(settings.targets)
    return sum(outputs * inputs for path, outputs, inputs in shape.linears if path in ranks)


def memory_parts(
    shape: ModelShape, settings: Settings, piece: Piece, process: int, correction: Correction | None = None
) -> dict[str, int]:
    """Return the bytes of each part of the process at its peak, which is in the backward pass of the largest piece.

    `process` is the resident memory before the model is read.
    """
    found = correction or Correction()
    trained = trained_bytes(shape, settings)
    kept = round(found.activations * heap_factor(shape, settings) * activation_bytes(shape, settings, piece))
    share = ENCODER_HOLES_SHARE if shape.encoder else HOLES_SHARE * (settings.keep_bits == 32)
    share = WAVES_SHARE if shape.waves else share
    holes = HOLES + round(share * kept) if piece.joined or shape.encoder else 0
    parts = {
        "interpreter and libraries": process + WARM_KERNELS + (ENCODER_MODULES if shape.encoder else 0) + found.fixed,
        "base weights": resident_base_bytes(shape, settings),
        "adapters and optimizer": trained,
        "rounded weights": rounded_bytes(shape, settings),
        "activations": kept,
        "unpacking buffer": unpack_bytes(shape, settings),
    }
    growing = GROWTH_SHARE + (ROUNDING_SHARE if settings.grid_bits else 0.0)
    return {**parts, GROWING: GROWTH + round(growing * kept) + holes}


def heap_factor(shape: ModelShape, settings: Settings) -> float:
    """Return how many times the bytes of activations they take in the C allocator's heap."""
    return ENCODER_ALLOCATOR if shape.encoder else ALLOCATOR[settings.keep_bits]


def trained_bytes(shape: ModelShape, settings: Settings) -> int:
    """Return the bytes of the adapters: weight, gradient, AdamW's two moments, and what they began with if that acts."""
    copies = 2 + settings.from_weight
    return round(adapter_weights(shape, settings) * (copies * FP32 + 2 * MOMENT_BYTES[settings.optimizer_bits]))


def later_bytes(shape: ModelShape, settings: Settings) -> int:
    """Return the bytes of what a probe of the model does not meet: AdamW's two moments, which exist from the first step on, and
    a start of its own, which comes before it."""
    adapted = adapted_weights(shape, settings)
    moments = (adapter_weights(shape, settings) + settings.grid_scales * adapted / BLOCK_SIZE) * 2
    start = adapted * bytes_per_weight(8) if settings.grid_bits and settings.grid_start else 0.0
    return round(moments * MOMENT_BYTES[settings.optimizer_bits] + start)


def rounded_bytes(shape: ModelShape, settings: Settings) -> int:
    """Return the bytes of the adapted layers' rounded weights, of what they began with, and of scales that are learned: their
    logarithms, gradients and AdamW's moments."""
    if settings.grid_bits is None:
        return 0
    per_weight = bytes_per_weight(settings.grid_bits) + settings.grid_start * bytes_per_weight(8)
    per_weight += settings.grid_scales * (2 * FP32 + 2 * MOMENT_BYTES[settings.optimizer_bits]) / BLOCK_SIZE
    return round(adapted_weights(shape, settings) * per_weight) + ROUNDING


def base_bytes(shape: ModelShape, bits: int) -> int:
    """Return the bytes of the frozen weights; tables keep at least 8 bits."""
    if shape.merged_bytes is not None:
        return shape.merged_bytes
    return round(shape.linear_weights * bytes_per_weight(bits)) + table_bytes(shape, bits)


def table_bytes(shape: ModelShape, bits: int) -> int:
    """Return the bytes of embeddings and LM head."""
    return round(shape.table_weights * (FP32 if shape.encoder else bytes_per_weight(max(bits, 8))))


def resident_base_bytes(shape: ModelShape, settings: Settings) -> int:
    """Return the bytes of the frozen weights that are in memory at once; with streaming a few blocks and the tables."""
    whole = base_bytes(shape, settings.base_bits)
    if settings.scales and settings.base_bits == 4:  # the layers that get 8 bits where the others get 4
        whole += round(LARGEST_SHARE * shape.linear_weights * (bytes_per_weight(8) - bytes_per_weight(4)))
    if not settings.stream:
        return whole
    blocks = round(shape.linear_weights / max(1, shape.layers) * STREAMED_BLOCKS * bytes_per_weight(settings.base_bits))
    return min(whole, blocks + table_bytes(shape, settings.base_bits))


def bytes_per_weight(bits: int) -> float:
    """Return the bytes of a weight: on the grid, one fp32 scale per block comes on top."""
    return bits / 8 + (FP32 / BLOCK_SIZE if bits <= 8 else 0)


def trained_blocks(shape: ModelShape, settings: Settings) -> int:
    """Return how many blocks backward reaches: those from the lowest adapter on."""
    return shape.layers - shape.lowest([path for path, _ in settings.targets])


def recomputed_blocks(shape: ModelShape, settings: Settings) -> int:
    """Return how many blocks are computed again in backward."""
    return max(0, trained_blocks(shape, settings) - settings.kept_blocks)


def activation_bytes(shape: ModelShape, settings: Settings, piece: Piece) -> int:
    """Return what forward keeps for backward, and what backward needs beside it: in the loss, or in one block.

    The kept blocks come first in backward and are gone when the first recomputed one is whole in memory.
    """
    hidden, inner, value = shape.hidden, shape.inner, settings.keep_bits // 8
    values = kept_values(shape, piece)
    low = FP32 * piece.tokens * low_per_token(shape, settings)
    whole = FP32 * values + low
    recomputed = recomputed_blocks(shape, settings)
    inputs = 0 if settings.keep_in_file else piece.tokens * recomputed * hidden * value
    kept = min(settings.kept_blocks, trained_blocks(shape, settings)) * (values * value + low)
    restored = whole if settings.keep_bits < 32 else 0  # one kept block in fp32 beside its bf16
    # Backward of the MLP: gradients of its inner tensors (of gate and up, of their product, one temporary) and two of [T, H].
    mlp, attention = 2 * (1 + shape.gated) * inner + 2 * hidden, score_values(shape, piece) + 4 * hidden
    if settings.half:  # both operands and the result of the largest product once more, in half the bytes
        mlp += ((1 + shape.gated) * inner + hidden) // 2
    gradients = FP32 * piece.tokens * (max(mlp, attention) if shape.encoder else mlp)
    backward = inputs + max(kept + restored, whole if recomputed else 0) + gradients
    loss = 0 if shape.encoder else inputs + kept + FP32 * 2 * hidden * piece.tokens + loss_bytes(shape, piece)
    return round(max(backward, loss))


def kept_values(shape: ModelShape, piece: Piece) -> int:
    """Return the fp32 values that one kept block has for a piece."""
    if shape.encoder:
        return piece.tokens * (kept_per_token(shape) + score_values(shape, piece))
    if shape.whole_documents:
        return piece.tokens * kept_per_token(shape)
    # Queries, keys, values and the heads' outputs have padding; what is put together from these outputs comes on top.
    padding = piece.padding * 2 * (shape.queries + shape.keys)
    return piece.tokens * (kept_per_token(shape) + piece.joined * shape.queries) + padding


def score_values(shape: ModelShape, piece: Piece) -> int:
    """Return the fp32 values per token of an encoder's attention with dropout, for which torch has no fused kernel: shares,
    the mask, and what is left of them."""
    return 3 * shape.scored_heads * piece.longest


def low_per_token(shape: ModelShape, settings: Settings) -> float:
    """Return the fp32 values x Aᵀ of one token in a block: as many as all its adapters have rows, twice where A0 acts too."""
    ranks = (1 + settings.from_weight) * sum(rank for _, rank in settings.targets)
    return ranks / max(1, trained_blocks(shape, settings))


def kept_per_token(shape: ModelShape) -> int:
    """Return the fp32 values that one kept block has for one token, adapters and padding apart."""
    hidden, inner, queries, keys = shape.hidden, shape.inner, shape.queries, shape.keys
    if shape.encoder:
        # q, k, v; inputs of q, k, v, of o and of the MLP; what two norms are given; masks; inner before and after GELU
        return 3 * queries + (5 + 2 * shape.dropout) * hidden + 2 * inner
    # Norms keep their input: q and k lie in one tensor with v there, which is then no other one.
    norms = shape.head_norms * (queries + (2 - shape.whole_documents) * keys) + shape.output_norms * hidden
    # the block's input; q, k, v; attention's output; the residual in the middle; gate and up
    return 2 * hidden + 2 * queries + 2 * keys + (1 + shape.gated) * inner + norms


def loss_bytes(shape: ModelShape, piece: Piece) -> int:
    """Return what the tiled loss holds: states, target rows and gradient [S, H], and one tile of logits."""
    return FP32 * (3 * piece.supervised * shape.hidden + min(TILE_LOGITS, piece.supervised * TILE_ROWS))


def unpack_bytes(shape: ModelShape, settings: Settings) -> int:
    """Return the one buffer that a group of layers, or a tile of the head, is unpacked into, and its codes' copies.

    It is in fp32 at least while rows are scored.
    """
    group, tile = min(shape.largest_group, TILE), 0 if shape.encoder else min(TILE_ROWS, shape.vocab) * shape.hidden
    whole = settings.base_bits == 32 and shape.merged_bytes is None
    # Of 32-bit weights nothing is unpacked; codes become bytes first (quant/grid.py): two buffers of them for 4 bits.
    bits = settings.grid_bits or settings.base_bits
    codes = {8: 1, 4: 2, 2: 2}.get(bits, 0) * group
    part = FP32 * min(group, ROWS_AT_ONCE) if settings.scales else 0  # of a weight's own gradient
    if whole and not settings.grid_bits:
        return part + (HALF * group if settings.half else 0)
    return FP32 * max(group, tile) + codes + part
