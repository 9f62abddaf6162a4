"""The tiled loss and its gradient against plain cross entropy, and that no `[tokens, vocabulary]` tensor is ever made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import GRADIENT_RELATIVE, HEAD_LOSS
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from edgelora.models import head, linear
from edgelora.models.head import Head
from edgelora.models.linear import FrozenWeight

HIDDEN, VOCABULARY = 40, 203  # neither is a multiple of a block or of a tile
FORMS = {"plain": {}, "scaled": {"scale": 0.3}, "capped": {"softcap": 3.0}, "both": {"scale": 2.5, "softcap": 1.5}}


pytestmark = pytest.mark.usefixtures("product_library")


def make(bits: int, tokens: int, spread: float = 1.0, **form: float) -> tuple[Head, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    hidden = spread * torch.randn(tokens, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    return Head(FrozenWeight.store(weight, bits, 32), **form), hidden.requires_grad_(), targets


def plain(made: Head, hidden_SH: Tensor, targets_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient in fp64, all logits at once."""
    wide = hidden_SH.detach().double().requires_grad_()
    logits = made.scale * wide @ made.weight.fp32().double().t()
    if made.softcap:
        logits = made.softcap * torch.tanh(logits / made.softcap)
    loss = cross_entropy(logits, targets_S, reduction="sum")
    loss.backward()
    assert wide.grad is not None
    return loss.detach(), wide.grad


def check(made: Head, hidden_SH: Tensor, targets_S: Tensor) -> None:
    wanted, gradient = plain(made, hidden_SH, targets_S)
    with torch.no_grad():
        assert float(made.nll(hidden_SH, targets_S)) == pytest.approx(float(wanted), **HEAD_LOSS)
    loss = made.nll(hidden_SH, targets_S)
    assert float(loss.detach()) == pytest.approx(float(wanted), **HEAD_LOSS)
    (loss * 0.5).backward()
    assert hidden_SH.grad is not None
    error = (hidden_SH.grad - 0.5 * gradient).abs().max() / (0.5 * gradient).abs().max()
    assert float(error) < GRADIENT_RELATIVE


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "logits"), [(16, 48), (64, 64), (203, 203 * 5), (7, 7), (2048, 1 << 20)])
@pytest.mark.parametrize("tokens", [1, 13])
def test_loss_and_gradient_whatever_the_tiles(form: str, rows: int, logits: int, tokens: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(head, "TILE_ROWS", rows)
    monkeypatch.setattr(head, "TILE_LOGITS", logits)
    for bits in (32, 16, 8, 4):
        check(*make(bits, tokens, **FORMS[form]))


def test_large_logits_neither_overflow_nor_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "TILE_ROWS", 16)
    made, hidden, targets = make(32, 9, spread=40.0)
    assert float((hidden.detach() @ made.weight.fp32().t()).max()) > 500
    check(made, hidden, targets)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_no_supervised_token_costs_nothing(bits: int) -> None:
    made, hidden, targets = make(bits, 0)
    loss = made.nll(hidden, targets)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, HIDDEN)


def test_argmax_is_that_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "TILE_ROWS", 16)
    made, hidden, _ = make(8, 30, softcap=30.0)
    with torch.no_grad():
        assert torch.equal(made.argmax(hidden), made.logits(hidden).argmax(-1))


class Largest(TorchDispatchMode):
    """Remembers the most elements that an operation returned."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self.most = max([self.most, *sizes])
        return out


@pytest.mark.parametrize("bits", [32, 4])
def test_no_tensor_has_all_logits(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "TILE_ROWS", 16)
    monkeypatch.setattr(head, "TILE_LOGITS", 16 * 8)
    monkeypatch.setattr(linear, "_scratch", torch.empty(0))  # other tests have made it larger
    made, hidden, targets = make(bits, 70, softcap=5.0)
    with Largest() as seen:
        made.nll(hidden, targets).backward()
        with torch.no_grad():
            made.nll(hidden, targets)
            made.argmax(hidden)
    assert hidden.numel() <= seen.most < 70 * VOCABULARY
    with Largest() as seen, torch.no_grad():
        made.logits(hidden)
    assert seen.most == 70 * VOCABULARY
