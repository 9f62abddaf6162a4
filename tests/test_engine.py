"""The engine's gradients against plain fp32 autograd through transformers' own class, for every way of computing them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import gradients, loss_of, reference
from tiny import save_decoder, save_encoder
from tolerances import GRADIENT_BF16, GRADIENT_RELATIVE, PEFT_LOGITS
from torch import Tensor

from edgelora.adapters import inject
from edgelora.adapters.lora import LoRASettings
from edgelora.models import gemm, recompute
from edgelora.models.load import load_model
from edgelora.models.recompute import ALL, Keeping
from edgelora.models.source import open_model

FAMILIES = ("llama", "qwen2", "gpt2", "bert", "gemma2", "olmo2")
BLOCK = r"(layers|layer|h)\.{}\..*"
PATTERNS = {"rank_pattern": {BLOCK.format(0): 2}, "alpha_pattern": {BLOCK.format(1): 3.0}}
ATTENTION = {"gpt2": "c_attn", "bert": "query,value"}
MOVED = 0.1  # how far the adapters are from where they begin
FILE = Path("a file")  # stands for one in the test's own folder


@dataclass(frozen=True)
class Case:
    """One way of computing. Together, the cases have every value of every field; each family passes through all."""

    bits: int
    library: str
    keeping: Keeping
    targets: str = "all-linear"
    options: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, int] | None = None


CASES = {
    "kept": Case(32, "blas", Keeping(ALL, 32)),
    "recomputed on grid": Case(32, "onednn", Keeping(0, 32), grid=(4, 32)),
    "recomputed from bf16": Case(16, "blas", Keeping(0, 16), "attention", PATTERNS),
    "half kept, last block": Case(8, "onednn", Keeping(1, 32), "last", {"init": "pissa"}),
    "kept in bf16": Case(4, "blas", Keeping(ALL, 16)),
    "from a file, on grid": Case(4, "onednn", Keeping(0, 32, FILE), "all-linear", PATTERNS, grid=(8, 16)),
    "half kept, bf16 in a file": Case(16, "onednn", Keeping(1, 16, FILE), options={"init": "pissa"}),
    "last block alone is kept": Case(4, "blas", Keeping(ALL, 32), "last"),
    "dora, recomputed": Case(8, "blas", Keeping(0, 32), options={"dora": True, "rslora": True}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    save = {family: save_encoder if family == "bert" else save_decoder for family in FAMILIES}
    return {family: save[family](root / family, family) for family in FAMILIES}


@pytest.fixture(autouse=True)
def library_as_before() -> Iterator[None]:
    before = gemm.library()
    yield
    gemm.use(before)


def load(folder: Path, family: str, bits: int) -> Any:
    torch.manual_seed(0)
    task = "text-classification" if family == "bert" else "text-generation"
    labels = [f"LABEL_{i}" for i in range(3)] if family == "bert" else []
    return load_model(open_model(str(folder)), task, base_bits=bits, labels=labels).eval()


def adapted(folder: Path, family: str, case: Case) -> Any:
    """Return the model of a case, its adapters away from where they begin."""
    model = load(folder, family, case.bits)
    last = ",".join(path for path in model.linears() if ".1." in path)
    targets = {"last": last, "attention": ATTENTION.get(family, "q_proj,v_proj")}.get(case.targets, case.targets)
    generator = torch.Generator().manual_seed(4)
    for layer in inject.attach(model, LoRASettings(**{"rank": 4, "alpha": 6.0, **case.options}), targets).values():
        for parameter in layer.parameters():
            parameter.data += MOVED * torch.randn(parameter.shape, generator=generator)
        layer.grid = case.grid
    return model


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def whole(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_plain_autograd(
    name: str, family: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    case = CASES[name]
    monkeypatch.setattr(recompute, "MOST_HEADS", 4)  # so that bf16 is used in a model as narrow as this
    if case.library == gemm.ONEDNN and not gemm.has_onednn():
        pytest.skip("torch has no oneDNN here")
    gemm.use(case.library)
    model = adapted(folders[family], family, case)
    keeping = case.keeping
    model.keeping = Keeping(keeping.kept_blocks, keeping.bits, tmp_path / "inputs" if keeping.file else None)
    expected = reference(folders[family], model)
    wanted, found = expected.gradients(), gradients(model)
    torch.testing.assert_close(loss_of(model), expected.loss(), **PEFT_LOGITS)
    assert found.keys() == wanted.keys()
    if keeping.bits == 16:  # the gradient as one; a tensor of it that is small by cancellation is hit harder
        assert relative(whole(found), whole(wanted)) < GRADIENT_BF16
    limit = GRADIENT_RELATIVE if keeping.bits == 32 else 3 * GRADIENT_BF16
    errors = {path: relative(found[path], wanted[path]) for path in wanted}
    assert max(errors.values()) < limit, max(errors, key=lambda path: errors[path])
