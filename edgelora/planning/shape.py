"""What a model's costs depend on, read from its config and the shapes of its tensors; no weight is read."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelora.tasks import get_task

if TYPE_CHECKING:
    from edgelora.models.source import ModelSource
    from edgelora.models.spec import DecoderSpec


@dataclass(frozen=True)
class ModelShape:
    """Widths, layers and matrices of a decoder or an encoder."""

    encoder: bool
    layers: int
    hidden: int
    inner: int
    queries: int  # width of all query heads together
    keys: int  # width of all key heads together
    vocab: int
    gated: bool  # the MLP has a gate beside its upward projection
    linears: tuple[tuple[str, int, int], ...]  # path, outputs N, inputs K
    tables: tuple[tuple[int, int], ...]  # embeddings, and the LM head where it is not tied: rows, width
    merged_bytes: int | None = None  # bytes of the weights where they are on the grid already
    head_norms: bool = False  # queries and keys are normed
    output_norms: int = 0  # norms of the outputs of attention and MLP
    dropout: bool = False  # an encoder's own, of hidden states
    whole_documents: bool = False  # attention takes packed rows as they are (models/attention_kernel.py), without padding
    scored_heads: int = 0  # heads of an encoder whose attention has dropout: torch keeps their scores then

    convolutions: frozenset[str] = frozenset()  # those of `linears` that are some, as matrices
    waves: bool = False  # takes samples of sound as they are: few tensors, large, and of other sizes in each piece

    @classmethod
    def of(cls, source: ModelSource, task: str) -> ModelShape:
        """Read the shape of an opened model. Raises ModelError for a decoder that is not known."""
        if task == "text-generation":
            from edgelora.models.families import decoder_spec

            return cls._decoder(source, decoder_spec(source.config))
        wanted = get_task(task)
        if wanted.writes:
            from edgelora.planning.sequences import seq2seq_shape

            return seq2seq_shape(source, wanted)
        if wanted.unit != "tokens":
            from edgelora.planning.pictures import network_shape

            return network_shape(source, wanted)
        return cls._encoder(source)

    @classmethod
    def _decoder(cls, source: ModelSource, spec: DecoderSpec) -> ModelShape:
        from edgelora.models import attention_kernel

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
            gated=spec.gated,
            linears=linears,
            tables=tuple(tables),
            merged_bytes=_merged_bytes(source),
            head_norms=spec.qk_norm is not None,
            output_norms=spec.has("attn_out") + spec.has("mlp_out"),
            whole_documents=not spec.attention_softcap and attention_kernel.library() is not None,
        )

    @classmethod
    def _encoder(cls, source: ModelSource) -> ModelShape:
        matrices = [(name.removesuffix(".weight"), source.shape(name)) for name in source.names() if name.endswith(".weight")]
        matrices = [(path, shape) for path, shape in matrices if len(shape) == 2]
        tables = tuple((shape[0], shape[1]) for path, shape in matrices if "embedding" in path)
        linears = tuple((path, shape[0], shape[1]) for path, shape in matrices if layer_of(path) is not None)
        config = source.config
        hidden = next(int(config[key]) for key in ("hidden_size", "dim", "d_model") if key in config)
        heads = next((int(config[key]) for key in ("num_attention_heads", "n_heads") if key in config), 0)
        return cls(
            encoder=True,
            layers=len({layer_of(path) for path, _, _ in linears}),
            hidden=hidden,
            inner=max((outputs for _, outputs, _ in linears), default=4 * hidden),
            queries=hidden,
            keys=hidden,
            vocab=max((rows for rows, _ in tables), default=0),
            gated=False,
            linears=linears,
            tables=tables,
            merged_bytes=_merged_bytes(source),
            dropout=_rate(config, "hidden_dropout_prob", "dropout") > 0,
            scored_heads=heads if _rate(config, "attention_probs_dropout_prob", "attention_dropout") > 0 else 0,
        )

    @property
    def linear_weights(self) -> int:
        return sum(outputs * inputs for _, outputs, inputs in self.linears)

    @property
    def table_weights(self) -> int:
        return sum(rows * width for rows, width in self.tables)

    @property
    def largest_group(self) -> int:
        """Weights of the largest layers that are unpacked together: q, k, v of one input, or gate and up."""
        single = max((outputs * inputs for _, outputs, inputs in self.linears), default=0)
        if self.encoder:
            return single
        return max(single, (self.queries + 2 * self.keys) * self.hidden, (1 + self.gated) * self.inner * self.hidden)

    def lowest(self, targets: Sequence[str]) -> int:
        """Return the first layer that has an adapter; below it nothing is kept and nothing computed in backward."""
        if not targets:  # the head alone
            return self.layers
        layers = [layer_of(path) for path in targets]
        return min((layer for layer in layers if layer is not None and layer < self.layers), default=0)


@functools.cache  # the planner asks for the same paths again and again
def layer_of(path: str) -> int | None:
    """Return the number of the layer that a module path names: 3 of "model.layers.3.mlp.up_proj"."""
    found = re.search(r"\.(\d+)\.", path)
    return None if found is None else int(found[1])


def targeted(shape: ModelShape, wanted: str, rank: int, ranks: Mapping[str, int] | None = None) -> tuple[tuple[str, int], ...]:
    """Return (path, rank) of the layers that target modules name; `ranks` are those of layers with their own, by pattern.

    Raises SettingsError for names that match nothing.
    """
    from edgelora.adapters.initialize import from_pattern
    from edgelora.adapters.inject import choose_targets

    paths = choose_targets([path for path, _, _ in shape.linears], wanted, shape.convolutions)
    return tuple((path, from_pattern(ranks or {}, path, rank)) for path in paths)


def _rate(config: Mapping[str, Any], *names: str) -> float:
    """Return the first of some rates that a config names; without one, what BERT's classes take."""
    return next((float(config[name]) for name in names if config.get(name) is not None), 0.1)


def _merged_bytes(source: ModelSource) -> int | None:
    if source.merged is None:
        return None
    return sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))
