"""What training a model costs in time: a model of one machine, with constants, so that the planner's choice never varies.

`plan` turns its seconds into those of this machine: by the rate of matrix products measured here, or better by a probe of the
loaded model (train/probe.py).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from edgelora.planning import costs
from edgelora.planning.costs import Settings
from edgelora.planning.shape import ModelShape

# Two cores with AVX-512 and oneDNN; what the constants were measured beside.
REFERENCE_RATE = 430e9  # fp32 operations a second in large products
HALF_GAIN = 1.85  # times that with bf16 operands, the passes that round x and y counted
FULL_SPEED = ((64, 0.65), (128, 0.8), (256, 1.0))  # tokens of a product, share of the rate it reaches
COPYING = {32: 0.02e-9, 16: 0.035e-9, 8: 0.08e-9, 4: 0.12e-9, 2: 0.4e-9}  # seconds per weight and unpacking
COPYING_HALF = {32: 0.06e-9, 16: 0.0, 8: 0.07e-9, 4: 0.11e-9, 2: 0.4e-9}  # the same to bf16
ROUNDING = 2e-9  # seconds per weight and step of rounding to the grid
BLOCK_SECONDS = 0.5e-3  # Python and small kernels per block and pass of a piece
ELEMENT_SECONDS = 0.25e-9  # per value that a block keeps and pass: norms, activations, attention
SLOW_PRODUCTS = 0.3  # share of the rate that products with the few columns of an adapter reach
SUMMING = 0.3e-9  # per weight and piece: its gradient's part in that of a block scale
TOKENS_PER_SCALE = 4  # adapters/lora.py
OPTIMIZER = {32: 1.5e-9, 8: 20e-9}  # seconds per trained weight and step, clipping counted
TENSOR_SECONDS = 35e-6  # of them for each trained tensor, however small it is
FILE_BYTES = 1.5e9  # bytes a second of writing and reading kept activations
STREAM_BYTES = 2.0e9  # bytes a second of weights that are read again after they were dropped


@dataclass(frozen=True)
class Load:
    """The work of a run with so many rows at once: what the schedule cuts the rows into."""

    steps: int
    pieces: int  # of all steps
    tokens: float  # of all pieces, padding counted
    supervised: float
    later: int = 0  # steps after the first epoch: what a decoder's frozen blocks give is read for them (train/prefix.py)


def share_of_rate(tokens: float) -> float:
    """Return the share of the machine's rate that a product of so many tokens reaches."""
    if tokens <= FULL_SPEED[0][0]:
        return FULL_SPEED[0][1] * max(tokens, 1.0) / FULL_SPEED[0][0]
    for (low, below), (high, above) in itertools.pairwise(FULL_SPEED):
        if tokens <= high:
            return below + (above - below) * math.log2(tokens / low) / math.log2(high / low)
    return FULL_SPEED[-1][1]


def piece_seconds(shape: ModelShape, settings: Settings, tokens: float, supervised: float, *, prefixed: bool = False) -> float:
    """Return the seconds of forward and backward of one piece; `prefixed`: without the blocks below the lowest adapter.

    Necessary operations: 2·N forward, 2·N backward above the lowest adapter, 2·N for each block computed again, 4·V·H at
    supervised positions; an adapter of rank r costs 2·r·N for each unpacking and six products of [T, r].
    """
    layers = max(1, shape.layers)
    trained = costs.trained_blocks(shape, settings)
    passes = ((trained if prefixed else layers) + trained + costs.recomputed_blocks(shape, settings)) / layers
    rate = REFERENCE_RATE * share_of_rate(tokens)
    head = 0 if shape.encoder else shape.vocab * shape.hidden
    share = 1.0 if settings.scales else settings.grid_scales / TOKENS_PER_SCALE  # of the tokens, for their own gradients
    weights = 2 * share * tokens * costs.adapted_weights(shape, settings)
    gain, copying = (HALF_GAIN, COPYING_HALF) if settings.half else (1.0, COPYING)
    products = (2 * passes * tokens * shape.linear_weights / gain + weights + 4 * supervised * head) / rate
    bits = settings.grid_bits or settings.base_bits
    unpacking = copying[bits] * passes * shape.linear_weights + COPYING[max(bits, 8)] * head
    adapted, rank = costs.adapted_weights(shape, settings), max((rank for _, rank in settings.targets), default=0)
    in_weights = 0.0 if settings.grid_bits else 2 * rank * passes * adapted / REFERENCE_RATE / SLOW_PRODUCTS
    factors = 0 if settings.scales else costs.adapter_weights(shape, settings)
    low_rank = 6 * tokens * factors / rate / SLOW_PRODUCTS
    elements = ELEMENT_SECONDS * passes * layers * tokens * costs.kept_per_token(shape)
    moved = 2 * tokens * costs.recomputed_blocks(shape, settings) * shape.hidden * settings.keep_bits / 8
    filed = moved / FILE_BYTES if settings.keep_in_file else 0.0
    filed += costs.FP32 * tokens * shape.hidden / FILE_BYTES if prefixed else 0.0
    read = passes * costs.bytes_per_weight(settings.base_bits) * shape.linear_weights
    streamed = read / STREAM_BYTES if settings.stream else 0.0
    summed = SUMMING * costs.adapted_weights(shape, settings) if share else 0.0
    return summed + products + unpacking + in_weights + low_rank + elements + filed + streamed + BLOCK_SECONDS * passes * layers


def step_seconds(shape: ModelShape, settings: Settings) -> float:
    """Return the seconds of a step that do not depend on its rows: the update, and rounding where training is on the grid."""
    rounding = ROUNDING * costs.adapted_weights(shape, settings) if settings.grid_bits else 0.0
    return rounding + update_seconds(shape, settings)


def update_seconds(shape: ModelShape, settings: Settings) -> float:
    """Return the seconds of clipping and the optimizer's step."""
    scales = settings.grid_scales * costs.adapted_weights(shape, settings) / costs.BLOCK_SIZE
    tensors = len(settings.targets) * (1 if settings.scales else 2 + settings.grid_scales)
    return OPTIMIZER[settings.optimizer_bits] * (costs.adapter_weights(shape, settings) + scales) + TENSOR_SECONDS * tensors


def training_seconds(shape: ModelShape, settings: Settings, load: Load) -> float:
    """Return the seconds of all steps on the reference machine."""
    pieces = max(1, load.pieces)
    tokens, supervised = load.tokens / pieces, load.supervised / pieces
    later = load.later / max(1, load.steps) if has_prefix(shape, settings) else 0.0
    piece = (1.0 - later) * piece_seconds(shape, settings, tokens, supervised)
    if later:
        piece += later * piece_seconds(shape, settings, tokens, supervised, prefixed=True)
    return pieces * piece + load.steps * step_seconds(shape, settings)


def has_prefix(shape: ModelShape, settings: Settings) -> bool:
    """Tell whether what the blocks below the lowest adapter give is computed once and kept."""
    return not shape.encoder and costs.trained_blocks(shape, settings) < shape.layers


def scoring_seconds(
    shape: ModelShape, settings: Settings, tokens: float, supervised: float, *, prefixed: bool = False
) -> float:
    """Return the seconds of scoring rows: forward passes of 512 tokens and the head at supervised positions."""
    part = costs.trained_blocks(shape, settings) / max(1, shape.layers) if prefixed else 1.0
    head = 0 if shape.encoder else shape.vocab * shape.hidden
    operations = 2 * tokens * part * shape.linear_weights + 2 * supervised * head
    passes = math.ceil(tokens / 512)
    elements = ELEMENT_SECONDS * part * shape.layers * tokens * costs.kept_per_token(shape)
    once = part * (reading_seconds(shape, settings) + BLOCK_SECONDS * shape.layers)
    return operations / REFERENCE_RATE + elements + once * passes


def reading_seconds(shape: ModelShape, settings: Settings) -> float:
    """Return the seconds of having all frozen weights in fp32 once: unpacked, and with streaming read from the disk."""
    bits = min(settings.base_bits, settings.grid_bits or settings.base_bits)
    read = costs.bytes_per_weight(settings.base_bits) / STREAM_BYTES if settings.stream else 0.0
    return (COPYING[bits] + read) * shape.linear_weights


def writing_seconds(shape: ModelShape, settings: Settings, answers: int, prompt: float, length: float, at_once: int) -> float:
    """Return the seconds of writing answers of `length` tokens to prompts of `prompt` tokens, so many at once.

    Each token of theirs takes all weights and the whole head.
    """
    steps = math.ceil(answers / max(1, at_once)) * length
    head = shape.vocab * shape.hidden
    unpacking = reading_seconds(shape, settings) + COPYING[max(settings.base_bits, 8)] * head
    product = 2 * at_once * (shape.linear_weights + head) / (REFERENCE_RATE * share_of_rate(at_once))
    step = unpacking + product + BLOCK_SECONDS * shape.layers
    return scoring_seconds(shape, settings, answers * prompt, answers) + steps * step
