"""Which tensors a decoder's checkpoint holds, and their shapes, from its description."""

from __future__ import annotations

from edgelora.models.spec import DecoderSpec

Shape = tuple[int, ...]


def decoder_shapes(spec: DecoderSpec) -> dict[str, Shape]:
    """Return every tensor of the decoder by its checkpoint name, in model order, with the shape it has in the file."""
    shapes: dict[str, Shape] = {f"{spec.weight('embed')}.weight": (spec.vocab_size, spec.hidden_size)}
    if spec.has("positions"):
        shapes[f"{spec.weight('positions')}.weight"] = (spec.max_positions, spec.hidden_size)
    for layer in range(spec.num_layers):
        for role in spec.norm_roles:
            shapes |= _norm(spec, role, layer)
        for role in spec.linear_roles:
            shapes |= _linear(spec, role, layer)
    shapes |= _norm(spec, "final_norm", None)
    if not spec.tied:
        shapes[f"{spec.weight('head')}.weight"] = spec.linear_shape("head")
    return shapes


def norm_size(spec: DecoderSpec, role: str) -> int:
    """Return the number of channels that a norm role normalizes."""
    if role not in ("q_norm", "k_norm"):
        return spec.hidden_size
    heads = spec.num_heads if role == "q_norm" else spec.num_kv_heads
    return spec.head_dim * (heads if spec.qk_norm == "full" else 1)


def _norm(spec: DecoderSpec, role: str, layer: int | None) -> dict[str, Shape]:
    path = spec.weight(role, layer)
    shape: Shape = (norm_size(spec, role),)
    return {f"{path}.weight": shape} | ({f"{path}.bias": shape} if spec.norm.kind == "layer" else {})


def _linear(spec: DecoderSpec, role: str, layer: int) -> dict[str, Shape]:
    path, (outputs, inputs) = spec.weight(role, layer), spec.linear_shape(role)
    weight: dict[str, Shape] = {f"{path}.weight": (inputs, outputs) if spec.transposed else (outputs, inputs)}
    return weight | ({f"{path}.bias": (outputs,)} if role in spec.biases else {})
