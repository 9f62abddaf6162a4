"""Whisper: features, prompt and search against transformers, the whole line, a shorter window, wrong sounds."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_whisper
import torch
from tolerances import LOGITS_FP32

from edgelora.config import FinetuneConfig
from edgelora.errors import DataError, ModelError, SettingsError
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.models.load import load_model
from edgelora.models.predictor import TorchPredictor, to_tensors
from edgelora.models.source import open_model
from edgelora.models.window import shorten
from edgelora.run.answer import run
from edgelora.tasks import get_task
from edgelora.tasks.transcripts import plain
from edgelora.train.finetune import finetune

soundfile = pytest.importorskip("soundfile")
TASK: Any = get_task("automatic-speech-recognition")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_whisper.save_whisper(tmp_path_factory.mktemp("whisper") / "model")


def test_logits_and_answers_are_those_of_the_class(folder: Path) -> None:
    import transformers

    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    model: Any = load_model(open_model(str(folder)), TASK.name, base_bits=32).eval()
    processor = TASK.open_processor(folder)
    examples = TASK.trial_examples(processor)
    batch = to_tensors(TASK.collate(examples, processor))
    with torch.no_grad():
        wanted = theirs(**model.inputs_of(batch)).logits
        found = model.head.logits(model.states(batch)).view_as(wanted)
    torch.testing.assert_close(found, wanted, **LOGITS_FP32)
    prompt = [tiny_whisper.START, tiny_whisper.NO_TIMES]
    assert processor.writing.search.prompt == tuple(prompt)
    assert batch["decoder_input_ids"][0, :2].tolist() == prompt
    predictor = TorchPredictor(model, functools.partial(TASK.collate, processor=processor))
    written = predictor.write(examples, processor.writing.search.limited(8))
    for row, tokens in enumerate(written):
        ids = torch.tensor([prompt])
        for _ in range(8):  # transformers' own generate for Whisper adds rules about times
            with torch.no_grad():
                logits = theirs(input_features=batch["input_features"][row : row + 1], decoder_input_ids=ids).logits[0, -1]
            if ids.shape[1] == len(prompt):
                logits[256] = -torch.inf
            ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
        answer = ids[0, 2:].tolist()
        assert tokens == (answer[: answer.index(256)] if 256 in answer else answer)


def test_error_rates_do_not_see_case_and_punctuation() -> None:
    assert plain(" It's  SEVEN, o'clock!") == "it's seven o'clock"
    found = TASK.score([" Seven. ", "one two", ""], ["seven", "one", "three"])
    assert found["wer"] == pytest.approx(2 / 3)
    assert TASK.score(["?"], ["nine"])["wer"] == 1.0


def test_the_whole_line(folder: Path, tmp_path: Path) -> None:
    rows = tiny_whisper.save_rows(tmp_path)
    config = FinetuneConfig(precision="int4", max_steps=8, batch_size=8, rank=4, learning_rate=1e-2, threads=1)
    figures = finetune(str(folder), str(rows), tmp_path / "run", config)
    assert figures["valid"]["loss"] < figures["table"][0]["loss"]
    exported = export(str(tmp_path / "run"), tmp_path / "bundle", precision="int4", force=True)
    assert not exported["verify"]["problems"]
    names = sorted(path.name for path in (tmp_path / "bundle" / "onnx").glob("*.onnx"))
    assert names == ["decoder_model_merged_q4.onnx", "encoder_model_q4.onnx"]
    metrics = evaluate(tmp_path / "bundle", str(rows))["metrics"]
    assert metrics["loss"] == pytest.approx(figures["valid"]["loss"], rel=0.5)
    assert metrics["wer"] >= 0
    sound = sorted((tmp_path / "sounds" / "low").iterdir())[0]
    assert isinstance(run(tmp_path / "bundle", [str(sound)])["output"], str)
    soundfile.write(tmp_path / "long.wav", np.zeros((44100 * 2, 2)), 44100)
    with pytest.raises(DataError, match=r"2\.0 seconds of sound; the model's window has 1"):
        run(tmp_path / "bundle", [str(tmp_path / "long.wav")])
    (tmp_path / "cut.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError, match="cannot be read as sound"):
        run(tmp_path / "bundle", [str(tmp_path / "cut.wav")])


def test_a_window_can_be_shortened(tmp_path: Path) -> None:
    import transformers

    model = tiny_whisper.save_whisper(tmp_path / "model", seconds=3)
    shorten(str(model), 1, tmp_path / "short")
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "short")
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(tmp_path / "short")
    assert extractor(np.zeros(1000, np.float32), sampling_rate=16000)["input_features"][0].shape == (16, 100)
    whole = transformers.WhisperForConditionalGeneration.from_pretrained(model)
    for name, tensor in theirs.state_dict().items():
        wanted = whole.state_dict()[name]
        assert torch.equal(tensor, wanted[: len(tensor)] if "encoder.embed_positions" in name else wanted), name
    with pytest.raises(SettingsError, match="a window of 4 seconds"):
        shorten(str(model), 4, tmp_path / "long")


def test_a_model_without_a_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="speech recognition is with Whisper"):
        TASK.open_processor(tiny.save_speech(tmp_path))
