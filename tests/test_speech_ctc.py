"""wav2vec2 and its kind through the whole line: letters, the loss, times of words, the graph."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_whisper
import torch
from tolerances import LOGITS_FP32, METRIC

from edgelora.config import FinetuneConfig
from edgelora.errors import DataError, ModelError
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.models.load import load_model
from edgelora.models.predictor import to_tensors
from edgelora.models.source import open_model
from edgelora.run.answer import run
from edgelora.spelling import ctc_loss, greedy
from edgelora.tasks import get_task
from edgelora.train.finetune import finetune

soundfile = pytest.importorskip("soundfile")
TASK: Any = get_task("speech-recognition-ctc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_speller(tmp_path_factory.mktemp("speller") / "model")


def test_letters_are_those_of_transformers(folder: Path) -> None:
    import transformers

    theirs = transformers.Wav2Vec2CTCTokenizer.from_pretrained(folder)
    ours = TASK.open_processor(folder)
    for text in ("hiss", "low's it", "Hi, ss: 'tis"):
        wanted = theirs("".join(letter for letter in text.upper() if letter not in ",:"))["input_ids"]
        assert ours.encode(text).tolist() == wanted
    path = np.random.default_rng(0).choice([0, 0, 4, *range(5, len(tiny.LETTERS))], 60)
    logits = np.eye(len(tiny.LETTERS), dtype=np.float32)[path]
    found = theirs.decode(path, output_word_offsets=True)
    assert ours.spell(greedy(logits, ours.blank)) == found.text
    words = ours.words(logits)
    assert [word["word"] for word in words] == [entry["word"] for entry in found.word_offsets]
    frame = 80 / 16000  # the strides of tiny's convolutions
    assert [word["start"] for word in words] == [round(float(entry["start_offset"] * frame), 2) for entry in found.word_offsets]
    assert [word["end"] for word in words] == [round(float(entry["end_offset"] * frame), 2) for entry in found.word_offsets]


@pytest.mark.parametrize(
    ("text", "message"),
    [("7 o'clock", 'the text has "7CK"'), ("tür", 'the text has "RÜ", which is not among'), ("?!", "the text has no letter")],
)
def test_texts_that_cannot_be_spelt(text: str, message: str, folder: Path) -> None:
    with pytest.raises(DataError, match=message):
        TASK.open_processor(folder).encode(text)


@pytest.mark.parametrize("family", ["wav2vec2", "wav2vec2_layer", "hubert"])
def test_logits_and_loss_equal_transformers(family: str, tmp_path: Path) -> None:
    import transformers

    folder = tiny.save_speller(tmp_path / "model", family, ctc_loss_reduction="sum")
    theirs = transformers.AutoModelForCTC.from_pretrained(folder).eval()
    model = load_model(open_model(str(folder)), TASK.name, base_bits=32).eval()
    processor = TASK.open_processor(folder)
    examples = TASK.trial_examples(processor)
    for example, text in zip(examples, ("hiss", "low slow", "i", "'"), strict=True):
        example.arrays["target"] = processor.encode(text)
    batch = to_tensors(TASK.collate(examples, processor))
    labels = batch["labels"].masked_fill(batch["labels"] < 0, -100)
    with torch.no_grad():
        wanted = theirs(**model.inputs_of(batch), labels=labels)
        loss, letters = TASK.loss(model, batch)
    torch.testing.assert_close(loss, wanted.loss, **LOGITS_FP32)
    assert letters == sum(len(example.arrays["target"]) for example in examples)
    by_hand = [
        ctc_loss(logits[: processor.frames(len(example.arrays["wave"]))], example.arrays["target"], processor.blank)
        for logits, example in zip(wanted.logits.numpy(), examples, strict=True)
    ]
    assert sum(by_hand) == pytest.approx(float(wanted.loss), rel=1e-5)
    assert ctc_loss(np.zeros((2, 3), np.float32), np.array([1, 1]), 0) == np.inf
    assert ctc_loss(np.zeros((2, 3), np.float32), np.array([1]), 0) == pytest.approx(-np.log(3 / 9), **METRIC)


@pytest.mark.parametrize(("family", "precision"), [("wav2vec2", "int4"), ("hubert", "int8")])
def test_the_whole_line(family: str, precision: str, tmp_path: Path) -> None:
    model = tiny.save_speller(tmp_path / "model", family)
    rows = tiny_whisper.save_rows(tmp_path, rows=36)
    config = FinetuneConfig(precision=precision, epochs=10.0, batch_size=8, rank=4, learning_rate=1e-2, threads=1)
    figures = finetune(str(model), str(rows), tmp_path / "run", config)
    assert json.loads((tmp_path / "run" / "edgelora.json").read_text())["task"] == TASK.name
    before = next(row for row in figures["table"] if row["what"] == "base")
    assert figures["valid"]["loss"] < 0.7 * before["loss"]
    assert figures["valid"]["cer"] < before["cer"]
    exported = export(str(tmp_path / "run"), tmp_path / "bundle", precision=precision, force=True)
    assert exported["verify"]["passed"]
    assert exported["verify"]["passed"]
    metrics = evaluate(tmp_path / "bundle", str(rows))["metrics"]
    assert metrics["loss"] == pytest.approx(figures["valid"]["loss"], rel=0.5)
    assert 0 <= metrics["wer"] <= 1.5
    sound = sorted((tmp_path / "sounds" / "low").iterdir())[0]
    shown: list[str] = []
    answer = run(tmp_path / "bundle", [str(sound)], write=shown.append)["output"]
    assert " ".join(word["word"] for word in answer["words"]) == answer["text"]
    assert "".join(shown).startswith(answer["text"])
    soundfile.write(tmp_path / "long.wav", np.zeros((8000 * 110, 2), np.float32), 8000)
    with pytest.raises(DataError, match=r"110\.0 seconds of sound, over the limit of 102"):
        run(tmp_path / "bundle", [str(tmp_path / "long.wav")])


def test_a_text_longer_than_its_sound_is_refused(folder: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(800, np.float32), 8000)
    with pytest.raises(DataError, match=r"a text of 40 letters for 0\.10 s of sound: 19 frames hold no more"):
        TASK.encode({"audio": str(tmp_path / "a.wav"), "text": "is" * 20}, TASK.open_processor(folder), [])


def test_folders_without_letters_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no vocab\.json"):
        TASK.open_processor(tiny.save_speech(tmp_path / "plain"))
    with pytest.raises(ModelError, match='this model is "audio-spectrogram-transformer"'):
        TASK.open_processor(tiny.save_speech(tmp_path / "ast", "ast"))
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "pad_token_id": 3}))
    with pytest.raises(ModelError, match=r"which output is the blank is not clear: pad_token_id in config.json has 3"):
        TASK.open_processor(other)
