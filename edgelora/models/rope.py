"""Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34) with the scalings of config.json's `rope_parameters`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from edgelora.errors import ModelError


@dataclass(frozen=True)
class Rope:
    """Half-split (not interleaved) rotary embedding of the first `2 * len(inverse_frequencies)` channels of a head."""

    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0  # multiplies cos and sin

    @property
    def dim(self) -> int:
        return 2 * len(self.inverse_frequencies)


def rope_from_parameters(parameters: dict[str, Any], head_dim: int, max_positions: int) -> Rope:
    """Build a Rope from transformers' `rope_parameters` (theta, type and the type's own keys)."""
    dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    theta = float(parameters.get("rope_theta", 10000.0))
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return Rope(tuple(plain))
    if kind == "linear":
        return Rope(tuple(f / parameters["factor"] for f in plain))
    if kind == "llama3":
        return Rope(tuple(_llama3(f, parameters) for f in plain))
    if kind == "longrope":
        return _longrope(plain, parameters, max_positions)
    if kind == "yarn":
        return _yarn(plain, parameters, dim, theta)
    raise ModelError(f'rope type "{kind}" is not known; known are default, linear, llama3, longrope, yarn')


def _llama3(frequency: float, parameters: dict[str, Any]) -> float:
    """Llama 3.1's scaling: long waves are divided by `factor`, short ones kept, those between interpolated."""
    original = float(parameters["original_max_position_embeddings"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    factor = float(parameters["factor"])
    wavelength = 2 * math.pi / frequency
    if wavelength > original / low:
        return frequency / factor
    if wavelength < original / high:
        return frequency
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _longrope(plain: list[float], parameters: dict[str, Any], max_positions: int) -> Rope:
    """LongRoPE (arXiv 2402.13753) with its short factors: EdgeLoRA's sequences stay below the original length."""
    original = parameters["original_max_position_embeddings"]
    scale = max_positions / original
    factor = parameters.get("attention_factor")
    if factor is None:
        factor = 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
    return Rope(tuple(f / s for f, s in zip(plain, parameters["short_factor"], strict=True)), float(factor))


def _yarn(plain: list[float], parameters: dict[str, Any], dim: int, theta: float) -> Rope:
    """YaRN (arXiv 2309.00071, eq. 19 to 23): a ramp between interpolated and plain frequencies."""
    original, factor = parameters["original_max_position_embeddings"], parameters["factor"]

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = correction(parameters.get("beta_fast", 32)), correction(parameters.get("beta_slow", 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = [min(max((i - low) / max(high - low, 0.001), 0.0), 1.0) for i in range(dim // 2)]
    scaled = tuple(f / factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True))
    attention = parameters.get("attention_factor")
    return Rope(scaled, float(attention if attention is not None else 0.1 * math.log(factor) + 1.0))
