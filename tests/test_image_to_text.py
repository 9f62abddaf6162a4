"""Captions through the whole line: what is written equals transformers', trained, merged, exported, run."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_image_text
import tiny_sequences
import torch
from tolerances import LOGITS_FP32

from edgelora.config import FinetuneConfig
from edgelora.data.check import scan
from edgelora.errors import DataError, ModelError
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.models.load import load_model
from edgelora.models.predictor import TorchPredictor, to_tensors
from edgelora.models.source import open_model
from edgelora.run.answer import run
from edgelora.tasks import get_task
from edgelora.train.finetune import finetune

TASK: Any = get_task("image-to-text")


@pytest.mark.parametrize("decoder", ["bert", "trocr"])
def test_logits_and_captions_are_those_of_transformers(decoder: str, tmp_path: Path) -> None:
    import transformers

    folder = tiny_sequences.save_captioner(tmp_path / "model", decoder)
    theirs = transformers.VisionEncoderDecoderModel.from_pretrained(folder).eval()
    model: Any = load_model(open_model(str(folder)), TASK.name, base_bits=32).eval()
    processor = TASK.open_processor(folder)
    examples = TASK.trial_examples(processor)
    assert len(examples[0]) == 17 + len(examples[0].arrays["target"])
    batch = to_tensors(TASK.collate(examples, processor))
    with torch.no_grad():
        wanted = theirs(**model.inputs_of(batch)).logits
        found = model.head.logits(model.states(batch)).view_as(wanted)
        written = theirs.generate(pixel_values=batch["pixel_values"], max_new_tokens=12, num_beams=2)
    torch.testing.assert_close(found, wanted, **LOGITS_FP32)
    predictor = TorchPredictor(model, functools.partial(TASK.collate, processor=processor))
    import dataclasses

    search = dataclasses.replace(processor.writing.search.limited(12), num_beams=2)
    for ours, theirs_ids in zip(predictor.write(examples, search), written.tolist(), strict=True):
        answer = theirs_ids[1:]
        assert ours == (answer[: answer.index(256)] if 256 in answer else [token for token in answer if token != 260])


@pytest.mark.parametrize(("decoder", "precision"), [("bert", "int8"), ("trocr", "int4")])
def test_the_whole_line(decoder: str, precision: str, tmp_path: Path) -> None:
    model = tiny_sequences.save_captioner(tmp_path / "model", decoder)
    rows = tiny_image_text.save_captions(tmp_path / "rows", column="caption")
    assert scan(str(rows), task=None, columns=None, valid=None).task.name == TASK.name
    config = FinetuneConfig(precision=precision, epochs=8.0, batch_size=12, rank=8, learning_rate=1e-2, threads=1)
    figures = finetune(str(model), str(rows), tmp_path / "run", config)
    before = next(row["loss"] for row in figures["table"] if row["what"] == "base")
    assert figures["valid"]["loss"] < 0.8 * before
    exported = export(str(tmp_path / "run"), tmp_path / "bundle", precision=precision, force=True)
    assert exported["verify"]["passed"]
    assert not exported["verify"]["problems"]
    suffix = {"int8": "_quantized", "int4": "_q4"}[precision]
    names = sorted(path.name for path in (tmp_path / "bundle" / "onnx").glob("*.onnx"))
    assert names == [f"decoder_model_merged{suffix}.onnx", f"encoder_model{suffix}.onnx"]
    metrics = evaluate(tmp_path / "bundle", str(rows))["metrics"]
    assert metrics["loss"] == pytest.approx(figures["valid"]["loss"], rel=0.5)
    assert 0 <= metrics["bleu"] <= 100
    picture = sorted((tmp_path / "rows" / "pictures" / "dark").iterdir())[0]
    answer = run(tmp_path / "bundle", [str(picture)])["output"]
    assert isinstance(answer, str)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"broken\.png cannot be read"):
        run(tmp_path / "bundle", [str(tmp_path / "broken.png")])


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match='described by an encoder of patches and a decoder; this model is "resnet"'):
        TASK.open_processor(tiny.save_vision(tmp_path / "resnet", "resnet"))
    folder = tiny_sequences.save_captioner(tmp_path / "model")
    rows = tiny_image_text.save_captions(tmp_path / "rows", 3, "caption")
    line = {**json.loads(rows.read_text().splitlines()[0]), "caption": "x" * 80}
    example = TASK.encode({**line, "image": str(rows.parent / line["image"])}, TASK.open_processor(folder), [])
    assert TASK.example_problems(example, 66) == ["a text of 81 tokens, over the limit of 66"]
    cut = TASK.truncate(example, 66)
    assert (len(cut.arrays["target"]), int(cut.arrays["target"][-1]), len(example) - len(cut)) == (66, 256, 15)
    assert TASK.problems(TASK.normalize({"image": "none.png"})) == ["none.png does not exist", '"caption" is missing']
