"""Matrix products: which library is taken, and what bf16 operands change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tolerances import BF16_OUTPUT, BF16_PRODUCT
from torch import Tensor

from edgelora.adapters.lora import LoRA, LoRASettings
from edgelora.models import gemm
from edgelora.models.linear import FrozenLinear
from edgelora.models.linear_group import LinearGroup, linears

needs_onednn = pytest.mark.skipif(not gemm.has_onednn(), reason="this build of torch has no oneDNN")


@pytest.fixture
def bf16() -> Iterator[None]:
    before = gemm.library()
    gemm.use(gemm.BF16)
    yield
    gemm.use(before)


@pytest.mark.parametrize(
    ("rates", "compute", "wanted"),
    [
        ({"blas": 100.0}, None, "blas"),
        ({"blas": 100.0, "onednn": 105.0, "onednn-bf16": 50.0}, None, "blas"),
        ({"blas": 100.0, "onednn": 200.0, "onednn-bf16": 220.0}, None, "onednn"),
        ({"blas": 100.0, "onednn": 200.0, "onednn-bf16": 390.0}, None, "onednn-bf16"),
        ({"blas": 100.0, "onednn": 200.0, "onednn-bf16": 390.0}, "fp32", "onednn"),
        ({"blas": 100.0, "onednn": 200.0, "onednn-bf16": 20.0}, "bf16", "onednn-bf16"),
        ({"blas": 100.0}, "bf16", "blas"),
    ],
)
def test_the_fastest_library_is_taken_and_bf16_only_where_it_wins(
    monkeypatch: pytest.MonkeyPatch, rates: dict[str, float], compute: str | None, wanted: str
) -> None:
    monkeypatch.setattr(gemm, "PREFERRED_BY", 1.1)  # conftest.py keeps tests from both
    monkeypatch.setattr(gemm, "BF16_PREFERRED_BY", 1.3)
    assert gemm.preferred(rates, compute) == wanted


def test_rates_leaves_the_library_as_it_was() -> None:
    before = gemm.library()
    rates = gemm.rates(1, seconds=0.02)
    assert gemm.library() == before
    assert all(rate > 0 for rate in rates.values())
    assert set(rates) <= {gemm.BLAS, gemm.ONEDNN, gemm.BF16}


@needs_onednn
@pytest.mark.usefixtures("bf16")
def test_scoring_is_exact_and_training_goes_on_as_before() -> None:
    x, w = torch.randn(3, 64), torch.randn(5, 64)
    with gemm.exact():
        torch.testing.assert_close(gemm.product(x, w), x @ w.t())
        assert gemm.weight_dtype() == torch.float32
    assert gemm.library() == gemm.BF16


@needs_onednn
@pytest.mark.usefixtures("bf16")
def test_operands_and_result_are_rounded_and_sums_are_not() -> None:
    x, w = torch.randn(33, 200), torch.randn(17, 200)
    exact = x.bfloat16().double() @ w.bfloat16().double().t()
    torch.testing.assert_close(gemm.product(x, w).double(), exact, rtol=BF16_OUTPUT, atol=BF16_OUTPUT)
    torch.testing.assert_close(gemm.linear(x, w), x @ w.t())  # what adapters and the loss take stays fp32


@needs_onednn
@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_weights_are_unpacked_to_what_rounding_them_once_gives(bits: int) -> None:
    layers = [FrozenLinear.from_weight(f"layer{i}", torch.randn(24, 48), None, bits, 32) for i in range(2)]
    unpacked = torch.cat([weight.clone() for _, weight in LinearGroup(layers).tiles()])
    assert unpacked.dtype == torch.bfloat16
    assert torch.equal(unpacked, torch.cat([layer.weight_fp32() for layer in layers]).bfloat16())


@needs_onednn
def test_a_group_in_bf16_differs_by_its_rounding_alone() -> None:
    def gradients(library: str) -> list[Tensor]:
        gemm.use(library)
        torch.manual_seed(0)
        layers = [LoRA.from_base(FrozenLinear.from_weight(f"layer{i}", torch.randn(64, 96), None, 4, 32), LoRASettings())
                  for i in range(2)]  # fmt: skip
        for layer in layers:
            layer.lora_B.data.normal_(0, 0.1)
        x = torch.randn(50, 96, requires_grad=True)
        linears(x, LinearGroup(layers)).square().sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        return [x.grad, *(grad for layer in layers for p in (layer.lora_A, layer.lora_B) if (grad := p.grad) is not None)]

    before = gemm.library()
    try:
        exact, rounded = gradients(gemm.ONEDNN), gradients(gemm.BF16)
    finally:
        gemm.use(before)
    assert len(exact) == 5
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(exact, rounded, strict=True)]
    assert 0 < max(errors) < BF16_PRODUCT
