"""The start of on-grid training: weights that round to codes with less error on the rows, and the same ones after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_decoder
from torch import Tensor

from edgelora.adapters import inject
from edgelora.adapters.lora import LoRASettings
from edgelora.models.load import load_model
from edgelora.models.source import open_model
from edgelora.quant.compensate import compensated
from edgelora.quant.gptq import inverse_factor
from edgelora.quant.grid import dequantize, quantize, unpack
from edgelora.train import start


def tied_inputs(tokens: int, width: int) -> Tensor:
    """Return inputs that depend on each other, as a layer's do."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, width // 4, generator=generator) @ torch.randn(width // 4, width, generator=generator)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("width", [96, 80])
def test_rounding_it_errs_less_on_the_rows_than_rounding_the_weight(bits: int, width: int) -> None:
    weight, x = torch.randn(24, width, generator=torch.Generator().manual_seed(1)), tied_inputs(400, width)
    found = compensated(weight, inverse_factor(x.t() @ x / 400), bits, 32)
    plain, ours = (dequantize(quantize(tensor, bits, 32)) for tensor in (weight, found))
    assert ((ours - weight) @ x.t()).norm() < 0.5 * ((plain - weight) @ x.t()).norm()


def test_stored_in_8_bits_it_rounds_to_the_same_codes() -> None:
    weight, x = torch.randn(24, 96, generator=torch.Generator().manual_seed(2)), tied_inputs(400, 96)
    found = compensated(weight, inverse_factor(x.t() @ x / 400), 4, 32)
    stored = dequantize(quantize(found, 8, 32))
    ours, again = quantize(found, 4, 32), quantize(stored, 4, 32)
    assert torch.equal(ours.scales, again.scales)
    assert torch.equal(ours.codes, again.codes)
    # every block has its extreme, so that the scale follows from the weight
    assert bool((unpack(ours.codes, 4) == 0).any(-1).all())


def test_blocks_of_zeros_stay() -> None:
    weight, x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)), tied_inputs(200, 64)
    weight[:, :32] = 0.0
    found = compensated(weight, inverse_factor(x.t() @ x / 200), 4, 32)
    assert not found[:, :32].any()
    assert found[:, 32:].any()


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Any, dict[str, Any], list[dict[str, Tensor]]]:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    model = load_model(open_model(str(save_decoder(tmp_path / "model", **sizes))), "text-generation", base_bits=32)
    added = inject.attach(model, LoRASettings(rank=2), "all-linear")
    grid = {"block_size": 32, "bits": dict.fromkeys(added, 4)}
    inject.put_on_grid(model, grid)
    ids = torch.randint(0, 256, (120,), generator=torch.Generator().manual_seed(0))
    return model, grid, [{"ids": ids, "starts": torch.tensor([0, 70, 120]), "positions": torch.arange(10)}]


def test_every_layer_begins_with_what_makes_up_for_errors(begun: Any, tmp_path: Path) -> None:
    model, grid, rows = begun
    start.begin(model, grid, tmp_path / "checkpoint", lambda: rows, 1 << 20)
    found = inject.adapters(model)
    before = {path: adapter.rounded().codes.clone() for path, adapter in found.items()}
    assert all(adapter.start is not None for adapter in found.values())
    assert all(not torch.equal(adapter.rounded().codes, quantize(adapter.merge(), 4, 32).codes) for adapter in found.values())
    for adapter in found.values():
        adapter.begin_with(quantize(adapter.merge(), 8, 32))
    start.begin(model, grid, tmp_path / "checkpoint", lambda: pytest.fail("the rows are not needed again"), 1 << 20)
    assert all(torch.equal(adapter.rounded().codes, before[path]) for path, adapter in found.items())


def test_layers_too_wide_for_the_memory_begin_as_they_are(begun: Any, tmp_path: Path) -> None:
    model, grid, rows = begun
    start.begin(model, grid, tmp_path / "checkpoint", lambda: rows, 4 * 4 * 32 * 32)
    wide = {path: adapter for path, adapter in inject.adapters(model).items() if adapter.in_features > 32}
    assert wide
    assert all((adapter.start is None) == (path in wide) for path, adapter in inject.adapters(model).items())
