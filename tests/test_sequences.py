"""Encoder-decoders: torch against transformers' classes, greedy and beam search against their generate, and the gradients."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sequences
import torch
from tolerances import HEAD_LOSS, LOGITS_FP32

from edgelora.models.load import load_model
from edgelora.models.predictor import TorchPredictor, to_tensors
from edgelora.models.source import open_model
from edgelora.search import Search
from edgelora.tasks import get_task
from edgelora.writing import Writing

TASK = get_task("translation")
SEARCHES: list[dict[str, Any]] = [
    {"num_beams": 1, "no_repeat_ngram_size": 2, "min_length": 4, "repetition_penalty": 1.3},
    {"num_beams": 4},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 3, "length_penalty": 0.5, "early_stopping": "never", "no_repeat_ngram_size": 2},
    {"num_beams": 2, "length_penalty": -1.0, "min_length": 6, "forced_bos_token_id": 70, "forced_eos_token_id": 256},
]


@pytest.fixture(scope="module", params=[*tiny_sequences.FAMILIES, "bert2bert"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("seq2seq") / request.param
    return (
        tiny_sequences.save_bert2bert(out) if request.param == "bert2bert" else tiny_sequences.save_seq2seq(out, request.param)
    )


def reference(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def test_loss_logits_and_shift_are_those_of_the_class(folder: Path) -> None:
    processor = TASK.open_processor(folder)
    model: Any = load_model(open_model(str(folder)), TASK.name, base_bits=32).eval()
    theirs, examples = reference(folder), TASK.trial_examples(processor)
    batch = to_tensors(TASK.collate(examples, processor))
    labels = torch.full(batch["decoder_input_ids"].shape, -100)
    for row, example in enumerate(examples):
        target = torch.from_numpy(example.arrays["target"].astype(np.int64))
        labels[row, : len(target)] = target
    kept = labels >= 0
    if folder.name == "mbart":  # wraps the last token of each row around, padding or not
        shifted = torch.stack([theirs.prepare_decoder_input_ids_from_labels(row[row >= 0][None])[0] for row in labels[:1]])
        assert shifted.tolist() == batch["decoder_input_ids"][:1, : shifted.shape[1]].tolist()
    else:
        shifted = theirs.prepare_decoder_input_ids_from_labels(labels)
        assert torch.equal(shifted[kept], batch["decoder_input_ids"][kept])
    with torch.no_grad():
        wanted = theirs(**model.inputs_of(batch)).logits
        states = model.states(batch)
        torch.testing.assert_close(model.head.logits(states).view_as(wanted), wanted, **LOGITS_FP32)
        loss, count = TASK.loss(model, batch)
    nll = torch.nn.functional.cross_entropy(wanted[kept], labels[kept], reduction="sum")
    assert (float(loss), count) == (pytest.approx(float(nll), **HEAD_LOSS), int(kept.sum()))
    predictor = TorchPredictor(model, functools.partial(TASK.collate, processor=processor))
    assert sum(total for total, _ in predictor.losses(examples)) == pytest.approx(float(nll), **HEAD_LOSS)


def test_searches_are_those_of_generate(folder: Path) -> None:
    processor: Any = TASK.open_processor(folder)
    model: Any = load_model(open_model(str(folder)), TASK.name, base_bits=32).eval()
    head = model.head.bias if model.head.bias is not None else torch.zeros(model.head.weight.shape[0])
    theirs, examples = reference(folder), TASK.trial_examples(processor)[1::2]
    raised = raise_eos(theirs, head)
    model.head = dataclasses.replace(model.head, bias=raised)
    predictor = TorchPredictor(model, functools.partial(TASK.collate, processor=processor))
    lengths = set()
    for settings in SEARCHES if folder.name in ("t5", "bart") else SEARCHES[1:3]:
        prompt = [processor.start]
        search = Search.from_settings({**settings, "max_new_tokens": 12}, prompt, processor.eos)
        found = predictor.write(examples, search)
        for example, tokens in zip(examples, found, strict=True):
            ids = torch.from_numpy(example.arrays["source"].astype(np.int64))[None]
            mask = torch.ones_like(ids)
            wanted = theirs.generate(
                ids, attention_mask=mask, max_new_tokens=12, do_sample=False, decoder_start_token_id=processor.start,
                **{"forced_eos_token_id": None, **settings},
            )[0].tolist()  # fmt: skip
            assert tokens == before_eos(wanted[1:], processor.eos), settings
            lengths.add(len(tokens))
    assert lengths <= set(range(13))
    assert len(lengths) > 1 or folder.name not in ("t5", "bart")  # answers that end, and answers that are cut


def raise_eos(theirs: Any, bias: torch.Tensor) -> torch.Tensor:
    """Let the class make EOS likelier, by a hook on its logits; return the bias that does the same."""
    raised = bias.clone()
    raised[256] += 2.0

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        output.logits[..., 256] += 2.0
        return output

    theirs.register_forward_hook(hook)
    return raised


def before_eos(tokens: list[int], eos: tuple[int, ...]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in eos), len(tokens))
    return tokens[:end]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_gradients_are_the_same_when_layers_are_computed_again(family: str, tmp_path: Path) -> None:
    from edgelora.adapters.inject import attach
    from edgelora.adapters.lora import LoRASettings
    from edgelora.models.recompute import Keeping

    folder = tiny_sequences.save_seq2seq(tmp_path / "model", family, dropout_rate=0.0, dropout=0.0, attention_dropout=0.0)
    processor = TASK.open_processor(folder)
    batch = to_tensors(TASK.collate(TASK.trial_examples(processor), processor))
    found = []
    for kept in (99, 1, 0):
        torch.manual_seed(0)
        model: Any = load_model(open_model(str(folder)), TASK.name, base_bits=32)
        attach(model, LoRASettings(rank=4), "all-linear")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.keeping = Keeping(kept_blocks=kept)
        model.train()
        TASK.loss(model, batch)[0].backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert gradient is not None, name
            torch.testing.assert_close(other[name], gradient, **LOGITS_FP32)
    assert any("encoder" in name and bool(gradient.any()) for name, gradient in found[2].items())


def test_a_token_that_ends_may_also_be_the_first(tmp_path: Path) -> None:
    folder = tiny_sequences.save_seq2seq(tmp_path / "model", "bart")  # its decoder begins with the token that ends
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    end = next(token["content"] for token in content["added_tokens"] if token["id"] == 256)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {end: {"id": end, "ids": [256], "tokens": [end]}},
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    writing = Writing.from_folder(folder)
    assert (writing.prompt, writing.encode_target("a")) == (
        (256,),
        [*writing.target.encode("a", add_special_tokens=False), 256],
    )
