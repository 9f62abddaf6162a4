"""What training a model costs: bytes of each part of the process, and arithmetic operations, from shapes alone.

The formulas follow what models/decoder.py, models/encoder.py and adapters/lora.py keep for backward; the constants were
fitted to measured runs (tests/test_plan.py holds the predictions against runs). T tokens, H hidden, I inner width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgelora.models.source import ModelSource
    from edgelora.models.spec import DecoderSpec

FP32 = 4
TILE_ROWS, TILE_LOGITS = 8192, 1 << 21  # models/head.py
OPTIMIZER_COPIES = 4  # weight, gradient, and AdamW's two moments
BLOCK_SIZE = 32

# Fitted to runs of SmolLM2 and MiniLM: what torch's kernels, threads and allocator take beyond the tensors themselves.
WARM_KERNELS = 45 << 20
ALLOCATOR = 1.15  # freed blocks that the C allocator keeps
LOADING_COPIES = 2.2  # fp32 copies of the largest tensor that exist while it is quantized
ENCODER_MODULES = 150 << 20  # transformers' modelling code, imported for encoders only


@dataclass(frozen=True)
class ModelShape:
    """What a model's costs depend on."""

    encoder: bool
    layers: int
    hidden: int
    inner: int
    queries: int  # width of all query heads together
    keys: int  # width of all key heads together
    vocab: int
    linears: tuple[tuple[str, int, int], ...]  # path, outputs N, inputs K
    tables: tuple[tuple[int, int], ...]  # embeddings, and the LM head where it is not tied: rows, width
    merged_bytes: int | None = None  # bytes of the weights where they are on the grid already

    @classmethod
    def of(cls, source: ModelSource, task: str) -> ModelShape:
        """Read the shape of an opened model. Raises ModelError for a decoder that is not known."""
        if task == "text-generation":
            from edgelora.models.families import decoder_spec

            return cls._decoder(source, decoder_spec(source.config))
        return cls._encoder(source)

    @classmethod
    def _decoder(cls, source: ModelSource, spec: DecoderSpec) -> ModelShape:
        linears = tuple(
            (spec.weight(role, layer), *spec.linear_shape(role))
            for layer in range(spec.num_layers)
            for role in spec.linear_roles
        )
        tables = [(spec.vocab_size, spec.hidden_size)] * (1 if spec.tied else 2)
        if spec.has("positions"):
            tables.append((spec.max_positions, spec.hidden_size))
        return cls(
            encoder=False,
            layers=spec.num_layers,
            hidden=spec.hidden_size,
            inner=spec.intermediate_size,
            queries=spec.num_heads * spec.head_dim,
            keys=spec.num_kv_heads * spec.head_dim,
            vocab=spec.vocab_size,
            linears=linears,
            tables=tuple(tables),
            merged_bytes=_merged_bytes(source),
        )

    @classmethod
    def _encoder(cls, source: ModelSource) -> ModelShape:
        matrices = [(name.removesuffix(".weight"), source.shape(name)) for name in source.names() if name.endswith(".weight")]
        matrices = [(path, shape) for path, shape in matrices if len(shape) == 2]
        tables = tuple((shape[0], shape[1]) for path, shape in matrices if "embedding" in path)
        linears = tuple((path, shape[0], shape[1]) for path, shape in matrices if re.search(r"\.\d+\.", path))
        config = source.config
        hidden = next(int(config[key]) for key in ("hidden_size", "dim", "d_model") if key in config)
        return cls(
            encoder=True,
            layers=len({re.search(r"\.(\d+)\.", path)[1] for path, _, _ in linears}),  # type: ignore[index]
            hidden=hidden,
            inner=max((outputs for _, outputs, _ in linears), default=4 * hidden),
            queries=hidden,
            keys=hidden,
            vocab=max((rows for rows, _ in tables), default=0),
            linears=linears,
            tables=tables,
            merged_bytes=_merged_bytes(source),
        )

    @property
    def linear_weights(self) -> int:
        return sum(outputs * inputs for _, outputs, inputs in self.linears)

    @property
    def table_weights(self) -> int:
        return sum(rows * width for rows, width in self.tables)


@dataclass(frozen=True)
class Settings:
    """What the planner may change, and the adapters."""

    base_bits: int
    micro_batch: int
    gradient_checkpointing: bool
    rank: int
    targets: tuple[str, ...]  # paths of the adapted layers
    grid_bits: int | None = None  # bits of their rounded weights, kept between steps where training is on the grid


def adapter_weights(shape: ModelShape, settings: Settings) -> int:
    """Return the number of trained weights: A [r, K] and B [N, r] of each adapted layer."""
    wanted = set(settings.targets)
    return sum(settings.rank * (outputs + inputs) for path, outputs, inputs in shape.linears if path in wanted)


def memory_parts(shape: ModelShape, settings: Settings, tokens: int, process: int) -> dict[str, int]:
    """Return the bytes of each part of the process at its peak; `tokens` are those of the largest micro-batch.

    `process` is the resident memory before the model is read.
    """
    weights = base_bytes(shape, settings.base_bits)
    trained = OPTIMIZER_COPIES * FP32 * adapter_weights(shape, settings)
    kept = activation_bytes(shape, settings, tokens)
    loss = 0 if shape.encoder else loss_bytes(shape, tokens)
    buffer = unpack_bytes(shape, settings.base_bits)
    parts = {
        "interpreter and libraries": process + WARM_KERNELS + (ENCODER_MODULES if shape.encoder else 0),
        "base weights": weights,
        "adapters and optimizer": trained,
        "rounded weights": rounded_bytes(shape, settings),
        "activations": round(ALLOCATOR * kept),
        "loss": loss,
        "unpacking buffer": buffer,
    }
    # While a tensor is quantized nothing of a training step exists yet: only what is above it counts.
    loading = largest_tensor(shape) * (LOADING_COPIES if settings.base_bits < 32 else 1.0)
    later = trained + parts["activations"] + loss + buffer
    parts["loading, above that"] = max(0, round(loading) - later)
    return parts


# What rounding's temporaries leave behind in the C allocator: SmolLM2 at 8 bits peaked 140 MB higher on the grid than off it,
# of which the rounded weights themselves are 63.
ROUNDING = 80 << 20


def rounded_bytes(shape: ModelShape, settings: Settings) -> int:
    """Return the bytes of the adapted layers' rounded weights."""
    if settings.grid_bits is None:
        return 0
    wanted = set(settings.targets)
    weights = sum(outputs * inputs for path, outputs, inputs in shape.linears if path in wanted)
    return round(weights * bytes_per_weight(settings.grid_bits)) + ROUNDING


def base_bytes(shape: ModelShape, bits: int) -> int:
    """Return the bytes of the frozen weights; tables keep at least 8 bits."""
    if shape.merged_bytes is not None:
        return shape.merged_bytes
    tables = FP32 if shape.encoder else bytes_per_weight(max(bits, 8))
    return round(shape.linear_weights * bytes_per_weight(bits) + shape.table_weights * tables)


def bytes_per_weight(bits: int) -> float:
    """Return the bytes of a weight: on the grid, one fp32 scale per block comes on top."""
    return bits / 8 + (FP32 / BLOCK_SIZE if bits in (4, 8) else 0)


def activation_bytes(shape: ModelShape, settings: Settings, tokens: int) -> int:
    """Return what forward keeps for backward, and what backward needs in one block."""
    block = kept_per_token(shape)
    # Backward of the MLP holds the gradients of its inner tensors beside what was kept.
    passing = 4 * shape.inner + 2 * shape.hidden
    if settings.gradient_checkpointing:
        return FP32 * tokens * (shape.layers * shape.hidden + block + passing)
    return FP32 * tokens * (shape.layers * block + passing)


def kept_per_token(shape: ModelShape) -> int:
    """Return the fp32 values that one block keeps for one token."""
    hidden, inner, queries, keys = shape.hidden, shape.inner, shape.queries, shape.keys
    if shape.encoder:
        # queries, keys, values, attention twice, input and output of two norms, residuals, inner before and after GELU
        return 5 * queries + 6 * hidden + 2 * inner
    # the block's input and the normed one; q, k, v; attention's output twice; middle and its norm; gate, up, product
    return 2 * hidden + queries + 2 * keys + 2 * queries + 2 * hidden + 3 * inner


def loss_bytes(shape: ModelShape, tokens: int) -> int:
    """Return what the tiled loss holds: four [S, H] tensors and one tile of logits with its exponentials."""
    return FP32 * (4 * tokens * shape.hidden + min(TILE_LOGITS, tokens * TILE_ROWS))


def unpack_bytes(shape: ModelShape, bits: int) -> int:
    """Return the one fp32 buffer that a layer, or a tile of the head, is unpacked into, and the bytes of its codes."""
    if bits == 32 and shape.merged_bytes is None:
        return 0
    layer = max((outputs * inputs for _, outputs, inputs in shape.linears), default=0)
    tile = 0 if shape.encoder else min(TILE_ROWS, shape.vocab) * shape.hidden
    return max(layer, tile) * (FP32 + 1)


def largest_tensor(shape: ModelShape) -> int:
    """Return the bytes of the largest tensor in fp32."""
    sizes = [outputs * inputs for _, outputs, inputs in shape.linears]
    return FP32 * max([*sizes, *(rows * width for rows, width in shape.tables)])


def training_operations(shape: ModelShape, settings: Settings, tokens: int, supervised: int) -> float:
    """Return the floating-point operations of training on `tokens` tokens, two for a multiplication and addition.

    Forward 2·N, backward for activations 2·N, recomputation 2·N; the adapters' three products; the head
    4·V·H at supervised positions.
    """
    passes = 6 if settings.gradient_checkpointing else 4
    head = 0 if shape.encoder else 4 * shape.vocab * shape.hidden
    return float(tokens * (passes * shape.linear_weights + 6 * adapter_weights(shape, settings)) + supervised * head)


def scoring_operations(shape: ModelShape, tokens: int, supervised: int) -> float:
    """Return the operations of a forward pass with its loss."""
    head = 0 if shape.encoder else 2 * shape.vocab * shape.hidden
    return float(2 * tokens * shape.linear_weights + supervised * head)


def _merged_bytes(source: ModelSource) -> int | None:
    if source.merged is None:
        return None
    return sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))


def targeted(paths: Sequence[str], wanted: str) -> tuple[str, ...]:
    """Return the paths that target modules name. Raises SettingsError for names that match nothing."""
    from edgelora.adapters.inject import choose_targets

    return tuple(choose_targets(paths, wanted))
