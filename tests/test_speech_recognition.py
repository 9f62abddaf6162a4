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

from edgelora.config import FinetuneConfig, GenerateConfig
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
from edgelora.times import Times
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
    assert exported["verify"]["passed"]
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


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_whisper.save_whisper(tmp_path_factory.mktemp("whisper") / "timed", times=True)


def test_times_follow_the_rules_of_the_class(timed: Path) -> None:
    from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

    theirs = transformers_generation_config(timed)
    times = TASK.open_processor(timed).times
    assert (times.first, times.last) == (266, 316)
    rules = WhisperTimeStampLogitsProcessor(theirs, begin_index=1)
    random = np.random.default_rng(0)
    for length in (0, 1, 1, 2, 3, 5, 8) * 6:
        written: list[list[int]] = [[] for _ in range(6)]
        for _ in range(length):  # only what the rules allow comes before
            scores = spread(random, times)
            times.limit(scores, written)
            for tokens, row in zip(written, scores, strict=True):
                tokens.append(int(row.argmax()))
        scores = spread(random, times)
        ids = torch.tensor([[tiny_whisper.START, *tokens] for tokens in written])
        wanted = rules(ids, torch.tensor(scores)).numpy()
        times.limit(scores, written)
        np.testing.assert_array_equal(scores, wanted)


def transformers_generation_config(folder: Path) -> Any:
    import transformers

    config = transformers.GenerationConfig.from_pretrained(folder)
    config.no_timestamps_token_id, config.max_initial_timestamp_index = tiny_whisper.NO_TIMES, 50
    return config


def spread(random: np.random.Generator, times: Times) -> Any:
    """Return random scores, in half of the rows such that times are likelier than the rest."""
    scores = random.normal(size=(6, times.last + 1)).astype(np.float32) * 2
    scores[:3, times.first :] += 3
    return scores


def test_what_is_said_has_its_times(timed: Path, tmp_path: Path) -> None:
    sound = sorted(tiny.save_sounds(tmp_path / "sounds", 3).glob("*/*.wav"))[0]
    export(str(timed), tmp_path / "bundle", precision="fp32")
    shown: list[str] = []
    answer = run(tmp_path / "bundle", [str(sound)], GenerateConfig(times=True, max_new_tokens=40), write=shown.append)["output"]
    assert answer["parts"]
    assert answer["parts"][0]["start"] <= 1.0
    for part in answer["parts"][:-1]:
        assert 0 <= part["start"] < part["end"] <= 1.0
    assert len("".join(shown).splitlines()) >= len(answer["parts"])
    assert "".join(shown).startswith(f"{answer['parts'][0]['start']:6.2f} – ")
    without = run(tmp_path / "bundle", [str(sound)], GenerateConfig(max_new_tokens=5))["output"]
    assert isinstance(without, str)


def test_parts_lie_between_times() -> None:
    times = Times(first=10, last=60, none=9, end=0)
    parts = times.parts([10, 1, 2, 15, 15, 3, 20, 25, 4])
    assert [(part.tokens, part.start, part.end) for part in parts] == [([1, 2], 0.0, 0.1), ([3], 0.1, 0.2), ([4], 0.3, None)]
    said = {"text": "a b", "parts": [{"text": "a", "start": 0.0, "end": 0.1}, {"text": "b", "start": 0.3, "end": None}]}
    assert TASK.answer_text(said) == "  0.00 – 0.10 s  a\n  0.30 –  s  b"


def test_times_are_for_speech_alone(folder: Path, tmp_path: Path) -> None:
    export(str(folder), tmp_path / "bundle", precision="fp32")
    sound = sorted(tiny.save_sounds(tmp_path / "sounds", 3).glob("*/*.wav"))[0]
    with pytest.raises(ModelError, match="the model has no tokens of time"):
        run(tmp_path / "bundle", [str(sound)], GenerateConfig(times=True))
    tiny.save_encoder(tmp_path / "texts", labels=3)
    export(str(tmp_path / "texts"), tmp_path / "texts-bundle", precision="fp32")
    with pytest.raises(SettingsError, match="--times is for speech recognition; this bundle is for text-classification"):
        run(tmp_path / "texts-bundle", ["a"], GenerateConfig(times=True))


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
