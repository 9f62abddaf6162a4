"""Packed documents do not see each other, however they are laid out, and each computes as it does alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from reference import packed
from tiny import save_decoder
from tolerances import GRADIENT_RELATIVE, LOGITS_FP32
from torch import Tensor

from edgelora.adapters import inject
from edgelora.adapters.lora import LoRASettings
from edgelora.models.attention import LONGEST_PADDING, lay_out
from edgelora.models.load import load_decoder
from edgelora.models.recompute import Keeping
from edgelora.models.source import open_model

LAYOUTS = {
    "equal": (7, 7, 7),
    "padded": (11, 9, 10),
    "one long, three short": (100, 3, 3, 3),
    "runs of which one is padded": (40, 38, 3, 1, 12, 11),
    "one token each": (1, 1, 1, 1),
}
FAMILIES = ("llama", "mistral", "gemma2", "gpt2", "smollm3", "qwen3")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tiny models at 4 bits with adapters that act; Mistral and Gemma 2 have windows of 5, Gemma 2 caps its scores too."""
    root, found = tmp_path_factory.mktemp("models"), {}
    torch.manual_seed(0)
    for family in FAMILIES:
        model = load_decoder(open_model(str(save_decoder(root / family, family))), base_bits=4)
        for layer in inject.attach(model, LoRASettings(rank=2), "all-linear").values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
        found[family] = model
    return found


def documents(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(1, 250, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def states(model: Any, pages: list[list[int]]) -> list[Tensor]:
    ids, starts = packed(pages)
    return list(model.hidden(ids, starts).split([len(page) for page in pages]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_document_sees_another(layout: str, family: str, models: dict[str, Any]) -> None:
    model, pages = models[family], documents(LAYOUTS[layout])
    before = states(model, pages)
    for changed, page in enumerate(pages):
        other = [*pages]
        other[changed] = [(token + 17) % 250 for token in page]
        after = states(model, other)
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i != changed for i in range(len(pages))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_token_sees_a_later_one(layout: str, family: str, models: dict[str, Any]) -> None:
    model, pages = models[family], documents(LAYOUTS[layout])
    before, last = states(model, pages), [[*page[:-1], (page[-1] + 17) % 250] for page in pages]
    for a, b in zip(before, states(model, last), strict=True):
        assert torch.equal(a[:-1], b[:-1])
        assert not torch.equal(a[-1], b[-1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_document_computes_as_it_does_alone(layout: str, family: str, models: dict[str, Any]) -> None:
    model, pages = models[family], documents(LAYOUTS[layout])
    for page, found in zip(pages, states(model, pages), strict=True):
        torch.testing.assert_close(found, states(model, [page])[0], **LOGITS_FP32)


def backward(model: Any, pages: list[list[int]], weights: list[Tensor], monkeypatch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the gradients of the embeddings' rows and of the adapters, for a weighted sum of the states."""
    ids, starts = packed(pages)
    rows = model.embed.weight.rows(ids).requires_grad_()
    model.zero_grad()
    with monkeypatch.context() as patched:
        patched.setitem(model.embed.__dict__, "forward", lambda _: rows)
        (model.hidden(ids, starts) * torch.cat(weights)).sum().backward()
    assert rows.grad is not None
    return rows.grad, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_stay_in_their_document(layout: str, family: str, models: dict[str, Any], monkeypatch: Any) -> None:
    model, pages = models[family], documents(LAYOUTS[layout])
    model.keeping = Keeping(len(pages) % 2)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(len(page), model.spec.hidden_size, generator=generator) for page in pages]
    alone = [backward(model, [page], [weight], monkeypatch) for page, weight in zip(pages, weights, strict=True)]
    rows, adapters = backward(model, pages, weights, monkeypatch)
    assert relative(rows, torch.cat([one for one, _ in alone])) < GRADIENT_RELATIVE
    wanted = {name: torch.stack([gradients[name] for _, gradients in alone]).sum(0) for name in adapters}
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, found in adapters.items():  # those of q and k are zero where a document has one token
        close = GRADIENT_RELATIVE * max(float(wanted[name].abs().max()), 1e-2 * largest)
        assert float((found - wanted[name]).abs().max()) < close, name
    only = [weight * (i == 1) for i, weight in enumerate(weights)]
    rows, _ = backward(model, pages, only, monkeypatch)
    assert [bool(part.any()) for part in rows.split([len(page) for page in pages])] == [i == 1 for i in range(len(pages))]


@pytest.mark.parametrize("lengths", [*LAYOUTS.values(), (5,), (9, 1, 9, 1), (3, 4, 5, 6, 7, 8, 9), (64, 60, 33, 32, 31, 8)])
def test_layout_holds_every_token_once_and_pads_little(lengths: tuple[int, ...]) -> None:
    starts = [0, *itertools.accumulate(lengths)]
    layout = lay_out(starts)
    assert sum(documents for documents, _ in layout.runs) == len(lengths)
    places = sum(documents * length for documents, length in layout.runs)
    assert places <= LONGEST_PADDING * starts[-1]
    if layout.gather is None or layout.back is None:
        assert (layout.gather, layout.back, places) == (None, None, starts[-1])
        return
    assert len(layout.gather) == places > starts[-1]
    assert torch.equal(layout.gather[layout.back], torch.arange(starts[-1]))
    document_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    padded_lengths = [length for documents, length in layout.runs for _ in range(documents)]
    wanted = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(padded_lengths))
    assert torch.equal(document_of[layout.gather], wanted)
