"""The decoder against transformers' own modelling code, on tiny random models of every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from tolerances import GRADIENT_RELATIVE, LOGITS_FP32

from edgelora.models.load import load_decoder
from edgelora.models.recompute import Keeping
from edgelora.models.source import open_model

DOCUMENTS = [[5, 9, 200, 31, 7, 7, 90, 14, 3, 250, 11], [1], [77, 78, 79, 80, 81, 2]]


def packed(documents: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.tensor([0, *(len(document) for document in documents)]).cumsum(0)
    return torch.tensor([token for document in documents for token in document]), starts


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny.save_decoder(tmp_path / family, family)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_decoder(open_model(str(folder)), base_bits=32)
    ids, starts = packed(DOCUMENTS)
    with torch.no_grad():
        wanted = torch.cat([reference(torch.tensor([document])).logits[0] for document in DOCUMENTS])
        found = ours.logits(ours.hidden(ids, starts))
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, **LOGITS_FP32)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt2", "olmo2", "phi3"])
def test_gradient_equals_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny.save_decoder(tmp_path / family, family, attn_implementation="eager")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ours = load_decoder(open_model(str(folder)), base_bits=32)
    ids, starts = packed(DOCUMENTS[:1])
    scale = ours.spec.embedding_scale
    # both models get the same rows as embeddings, and the gradient comes back to these
    rows = ours.embed(ids).clone().requires_grad_()
    ours.embed.forward = lambda _: rows
    ours.keeping = Keeping(0)
    ours.nll(ours.hidden(ids, starts)[:-1], ids[1:]).backward()
    given = rows.detach().clone().requires_grad_()
    by_itself = family.startswith("gemma") and "Scaled" in type(reference.get_input_embeddings()).__name__
    logits = reference(inputs_embeds=(given * scale if by_itself else given)[None]).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
    assert (rows.grad - given.grad).abs().max() <= GRADIENT_RELATIVE * given.grad.abs().max()
