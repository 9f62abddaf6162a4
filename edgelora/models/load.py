"""Build a model from a source: tensors are read one at a time and quantized as they arrive, once, into a mapped file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from edgelora.errors import ModelError
from edgelora.models.base_file import BaseWeights, open_base
from edgelora.models.base_layout import Section
from edgelora.models.decoder import Block, Decoder
from edgelora.models.elementwise import FrozenNorm
from edgelora.models.families import decoder_spec
from edgelora.models.layout import decoder_shapes
from edgelora.models.linear import FrozenEmbedding, FrozenLinear, FrozenWeight
from edgelora.models.source import ModelSource
from edgelora.models.spec import DecoderSpec
from edgelora.tasks import get_task

if TYPE_CHECKING:
    from edgelora.models.network import Network

# Layers of a block by their input: they lie side by side, so that they can be one product.
SAME_INPUT = (("q", "k", "v"), ("qkv",), ("o",), ("gate", "up"), ("gate_up",), ("down",))


def load_model(
    source: ModelSource, task: str, *, base_bits: int, block_size: int = 32, labels: Sequence[str] = (), streamed: bool = False,
    bits: Mapping[str, int] | None = None,
) -> Decoder | Network:  # fmt: skip
    """Return the model of a task with its frozen weights in `base_bits` (32, 16, 8, 4).

    streamed: a decoder's blocks are read from their file when they are computed and dropped after it; bits: 4 or 8 of the
    linear layers that have their own, by path.
    Raises ModelError for a model that the task has no use for, and for missing or misshapen tensors, all at once.
    """
    if task == "text-generation":
        return load_decoder(source, base_bits=base_bits, block_size=block_size, streamed=streamed, bits=bits)
    wanted = get_task(task)
    if wanted.writes:
        from edgelora.models.seq2seq import load_seq2seq

        return load_seq2seq(source, wanted, base_bits=base_bits, block_size=block_size, layer_bits=bits)
    from edgelora.models.network import load_network

    return load_network(source, wanted, base_bits=base_bits, block_size=block_size, labels=labels, layer_bits=bits)


def load_decoder(
    source: ModelSource, *, base_bits: int, block_size: int = 32, streamed: bool = False, bits: Mapping[str, int] | None = None
) -> Decoder:
    """Return the decoder of a source. The embedding and the LM head keep at least 8 bits: at 4 they cost most of the loss."""
    spec = decoder_spec(source.config)
    check_shapes(source, decoder_shapes(spec))
    sections = decoder_sections(spec, bits)
    weights = open_base(source, sections, base_bits, block_size, streamed=streamed)

    def table(role: str) -> FrozenEmbedding:
        weight = weights.read_linear(spec.weight(role))
        return FrozenEmbedding(spec.weight(role), FrozenWeight.store(weight, max(base_bits, 8), block_size))

    embed = table("embed")
    blocks = [_block(weights, spec, layer, base_bits, block_size) for layer in range(spec.num_layers)]
    decoder = Decoder(
        spec,
        embed,
        blocks,
        _norm(weights, spec, "final_norm", None),
        embed if spec.tied else table("head"),
        table("positions") if spec.has("positions") else None,
    )
    if streamed and isinstance(weights, BaseWeights):
        decoder.stream = weights.stream(sections)
    return decoder


def decoder_sections(spec: DecoderSpec, bits: Mapping[str, int] | None = None) -> list[Section]:
    """Return a decoder's tensors in the order in which they are computed."""
    kinds = ("weight", "bias") if spec.norm.kind == "layer" else ("weight",)

    def norms(roles: Sequence[str], layer: int | None) -> list[str]:
        return [f"{spec.weight(role, layer)}.{kind}" for role in roles for kind in kinds]

    sections = [Section(tables=tuple(spec.weight(role) for role in ("embed", "positions") if spec.has(role)))]
    for layer in range(spec.num_layers):
        groups = [[role for role in roles if spec.has(role)] for roles in SAME_INPUT]
        paths = tuple(tuple(spec.weight(role, layer) for role in group) for group in groups if group)
        biases = [f"{spec.weight(role, layer)}.bias" for role in spec.linear_roles if role in spec.biases]
        plain = tuple(norms(spec.norm_roles, layer) + biases)
        own = {path: bits[path] for group in paths for path in group if path in bits} if bits else {}
        sections.append(Section(groups=paths, plain=plain, block=True, transposed=spec.transposed, bits=own))
    heads = () if spec.tied else (spec.weight("head"),)
    return [*sections, Section(tables=heads, plain=tuple(norms(["final_norm"], None)))]


def _block(weights: ModelSource | BaseWeights, spec: DecoderSpec, layer: int, base_bits: int, block_size: int) -> Block:
    linears: dict[str, torch.nn.Module] = {}
    for role in spec.linear_roles:
        path = spec.weight(role, layer)
        weight = weights.read_linear(path, transposed=spec.transposed)
        bias = weights.read(f"{path}.bias") if role in spec.biases else None
        linears[role] = FrozenLinear.from_weight(path, weight, bias, base_bits, block_size)
    norms: dict[str, torch.nn.Module] = {role: _norm(weights, spec, role, layer) for role in spec.norm_roles}
    return Block(spec, layer, linears, norms)


def _norm(weights: ModelSource | BaseWeights, spec: DecoderSpec, role: str, layer: int | None) -> FrozenNorm:
    path, norm = spec.weight(role, layer), spec.norm
    weight = weights.read(f"{path}.weight").float() + norm.offset
    bias = weights.read(f"{path}.bias").float().clone() if norm.kind == "layer" else None
    return FrozenNorm(path, norm.kind, norm.eps, weight, bias)


def check_shapes(source: ModelSource, wanted: dict[str, tuple[int, ...]]) -> None:
    """Compare a source with the tensors that its config asks for. Raises ModelError that lists all that are not right."""
    if source.merged is not None:
        return
    problems = []
    names = set(source.names())
    for name, shape in wanted.items():
        if name not in names:
            problems.append(f"{name}: missing")
        elif source.shape(name) != shape:
            problems.append(f"{name}: shape {list(source.shape(name))}, config.json asks for {list(shape)}")
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise ModelError("\n  ".join([f"{source.reference} does not hold the model of its config.json:", *shown]))
