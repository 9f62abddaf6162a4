"""transformers' attention and mask interfaces as functions that emit one node of ONNX Runtime's contrib operators.

Source: ContribOperators.md, com.microsoft.MultiHeadAttention: keys and values [B, S, H·D], or [B, H, T, D] as a cache has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgelora.errors import ModelError

ATTENTION = "edgelora_onnx"  # the name of our attention function among transformers' implementations
CACHED_ATTENTION = "edgelora_onnx_cached"
LARGE = 1e38  # below zero: what is added to the score of a key that is padding


def emit(
    operator: str, inputs: list[Tensor | None], attributes: dict[str, Any], shape: Any, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Put one ONNX node into the trace."""
    node: Tensor = torch.onnx.ops.symbolic(operator, inputs, attributes, dtype=dtype, shape=shape)
    return node


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: query `[B, H, S, D]` to `[B, S, H, D]`, as one MultiHeadAttention node.

    attention_mask comes from `mask`: int32 `[B, S]`, 1 for real keys, or fp32 `[B, 1, S, S]` that is added to the scores.
    """
    key, value = (of_all_heads(x, query.shape[1]) for x in (key, value))
    return attend(query, [in_rows(key), in_rows(value)], attention_mask, options)


def cached_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The same with keys and values `[B, H, T, D]` as they lie in a cache: the operator takes them so."""
    refuse_groups(module, query, key)
    return attend(query, [key, value], attention_mask, options)


def refuse_groups(module: nn.Module, query: Tensor, key: Tensor) -> None:
    if key.shape[1] != query.shape[1]:
        raise ModelError(f"the grouped attention of {type(module).__name__} is not known to the export")


def of_all_heads(x: Tensor, heads: int) -> Tensor:
    """Return keys or values `[B, groups, S, D]` with those of a group for each of its query heads, `[B, heads, S, D]`."""
    batch, groups, length, head_dim = x.shape
    if groups == heads:
        return x
    return x[:, :, None].expand(batch, groups, heads // groups, length, head_dim).reshape(batch, heads, length, head_dim)


def in_rows(x: Tensor) -> Tensor:
    """Return `[B, H, S, D]` as `[B, S, H·D]`."""
    return x.transpose(1, 2).reshape(x.shape[0], -1, x.shape[1] * x.shape[3])


def attend(
    query: Tensor, keys_values: list[Tensor], attention_mask: Tensor | None, options: Mapping[str, Any]
) -> tuple[Tensor, None]:
    batch, heads, length, head_dim = query.shape
    scale, bias = options.get("scaling"), options.get("position_bias")
    attributes = {"num_heads": heads, "scale": float(head_dim**-0.5 if scale is None else scale)}
    if attention_mask is not None and bias is not None and attention_mask.ndim == 2:
        attention_mask = ((attention_mask.float() - 1.0) * LARGE)[:, None, None, :]
    if attention_mask is not None and attention_mask.ndim == 4:
        bias = attention_mask if bias is None else bias + attention_mask
        attention_mask = None
    inputs = [in_rows(query), *keys_values, None, attention_mask, bias]
    while inputs[-1] is None:
        inputs.pop()
    output = emit("com.microsoft::MultiHeadAttention", inputs, attributes, (batch, length, heads * head_dim))
    return output.view(batch, length, heads, head_dim), None


def mask(*, attention_mask: Tensor | None = None, mask_function: Any = None, **options: Any) -> Tensor | None:
    """transformers' mask interface: MultiHeadAttention takes a padding mask `[B, S]` as it is, in int32.

    Where tokens see a window only (ModernBERT) it is transformers' own additive mask.
    """
    from transformers.masking_utils import bidirectional_mask_function, eager_mask

    if mask_function is not bidirectional_mask_function:
        additive: Tensor | None = eager_mask(attention_mask=attention_mask, mask_function=mask_function, **options)
        return additive
    return None if attention_mask is None else attention_mask.to(torch.int32)


def register_attention() -> None:
    """Let transformers' models know both attentions and their masks by name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for name, function in ((ATTENTION, attention), (CACHED_ATTENTION, cached_attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask)
