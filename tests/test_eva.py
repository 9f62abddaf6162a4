"""EVA: the directions of the layers' inputs, against a whole decomposition and PEFT's incremental one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import EVA_COSINE, INITIAL_FACTORS
from torch import Tensor

from edgelora.adapters import inject
from edgelora.adapters.eva import Directions, eva
from edgelora.adapters.lora import LoRASettings
from edgelora.errors import DataError
from tests.test_lora import DOCUMENTS, decoder_loss, encoder_batch, load_tiny


def cloud(count: int, *, strong: int = 5, seed: int = 0) -> Tensor:
    """Return rows `[count, 40]` around a mean far from 0, with `strong` directions that stand out."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(9)))[0]
    sizes = torch.cat([torch.linspace(9, 5, strong), torch.full((40 - strong,), 0.05)])
    return torch.randn(count, 40, generator=generator) * sizes @ axes + 20


def cosines(found: Tensor, wanted: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(found, wanted).abs()


def test_directions_batch_by_batch_are_those_of_the_whole() -> None:
    x = cloud(700)
    found = Directions(10)
    for part in x.split([256, 256, 100, 88]):
        found.add(part)
        converged = found.converged()
    _, s, vt = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    leading = found.leading(5)
    torch.testing.assert_close(leading @ leading.t(), torch.eye(5), **INITIAL_FACTORS)
    assert float(cosines(leading, vt[:5]).min()) > EVA_COSINE
    torch.testing.assert_close(found.scaled_MK[:5].norm(dim=1).float(), s[:5], rtol=1e-3, atol=0.0)
    torch.testing.assert_close(found.mean_K.float(), x.mean(0))
    assert found.num_rows == 700
    assert converged >= 5


def test_directions_are_those_of_peft() -> None:
    from peft.utils.incremental_pca import IncrementalPCA

    found, theirs = Directions(10), IncrementalPCA(n_components=10, copy=True)
    for seed in range(4):
        part = cloud(60, seed=seed)
        found.add(part)
        theirs.partial_fit(part)
    assert float(cosines(found.leading(5), theirs.components_[:5].float()).min()) > EVA_COSINE
    torch.testing.assert_close(found.scaled_MK[:5].norm(dim=1), theirs.singular_values_[:5].double(), rtol=1e-3, atol=0.0)


def test_few_batches_have_not_converged() -> None:
    found = Directions(10)
    found.add(cloud(100))
    assert found.converged() == 0
    turned = cloud(100, seed=1)[:, torch.randperm(40, generator=torch.Generator().manual_seed(0))] * 5
    found.add(turned)
    assert found.converged() < 5
    assert found.converged() == 10  # nothing came in between


def decoder_batches(count: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield {"ids": torch.randint(0, 6, (96,), generator=generator), "starts": torch.tensor([0, 50, 96])}


def inputs_of(model: Any, path: str, batches: list[dict[str, Tensor]], compute: Any) -> Tensor:
    """Return all that a layer is given, each token a row; the layer's adapter is there already."""
    seen = []
    model.eval()
    handle = inject.adapters(model)[path].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    with torch.no_grad():
        for batch in batches:
            compute(batch)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("bits", [32, 4])
def test_every_adapter_of_a_decoder_begins_with_its_inputs_directions(bits: int, tmp_path: Path) -> None:
    model = load_tiny(tmp_path, "llama", bits)
    base = decoder_loss(model)
    inject.attach(model, LoRASettings(rank=3, rank_pattern={"down_proj": 5}), "all-linear")

    def compute(batch: dict[str, Tensor]) -> None:
        model.hidden(batch["ids"], batch["starts"])

    batches = list(decoder_batches(40))
    count = eva(model, iter(batches), compute)
    assert 2 <= count < 40  # converged before they ended
    assert not any(adapter._forward_pre_hooks for adapter in inject.adapters(model).values())
    torch.testing.assert_close(decoder_loss(model), base)
    for path, adapter in inject.adapters(model).items():
        x = inputs_of(model, path, batches[:count], compute)
        s = torch.linalg.svdvals(x - x.mean(0))
        rank = 5 if path.endswith("down_proj") else 3
        a = adapter.lora_A.detach()
        assert a.shape == (rank, x.shape[1])
        torch.testing.assert_close(a @ a.t(), torch.eye(rank), **INITIAL_FACTORS)
        # Neighbouring directions of a random model are about as strong: what A explains together is compared.
        explained = float(((x - x.mean(0)) @ a.t()).square().sum() / s[:rank].square().sum())
        assert explained > 0.97, path
        assert not bool(adapter.lora_B.any())
    shared = [inject.adapters(model)[f"model.layers.0.self_attn.{name}_proj"].lora_A for name in "qkv"]
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(shared[0], shared[2])


def test_padding_is_no_input(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, "bert", 32)
    inject.attach(model, LoRASettings(rank=2), "query,value")
    batch = encoder_batch()
    eva(model, [batch], lambda batch: model.logits(**batch))
    layer = "bert.encoder.layer.0.attention.self.query"
    whole = inputs_of(model, layer, [batch], lambda batch: model.logits(**batch))
    x = whole[batch["attention_mask"].bool()]
    assert len(x) == sum(len(document) for document in DOCUMENTS) < whole.shape[0] * whole.shape[1]
    _, _, vt = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert float(cosines(inject.adapters(model)[layer].lora_A.detach(), vt[:2]).min()) > EVA_COSINE


def test_too_few_tokens_are_refused(tmp_path: Path) -> None:
    model = load_tiny(tmp_path, "llama", 32)
    inject.attach(model, LoRASettings(rank=8), "q_proj")
    batch = {"ids": torch.tensor([1, 2, 3]), "starts": torch.tensor([0, 3])}
    with pytest.raises(DataError) as caught:
        eva(model, [batch], lambda batch: model.hidden(batch["ids"], batch["starts"]))
    assert caught.value.message == (
        "EVA needs more tokens than the rank: model.layers.0.self_attn.q_proj has rank 8 and was given 3"
    )
    assert caught.value.hint == 'give more rows, or init = "kaiming"'
