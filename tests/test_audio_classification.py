"""Sounds through the whole line: read, trained, merged, exported, run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import tiny_whisper
import torch
from tolerances import LOGITS_FP32, LOSS_INT8_ACTIVATIONS

from edgelora.config import FinetuneConfig
from edgelora.data.check import scan
from edgelora.errors import DataError, ModelError
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.models.load import load_model
from edgelora.models.predictor import to_tensors
from edgelora.models.source import open_model
from edgelora.run.answer import run
from edgelora.tasks import get_task
from edgelora.train.finetune import finetune

pytest.importorskip("soundfile")
TASK = "audio-classification"


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sounds(tmp_path_factory.mktemp("sounds") / "rows", rows=30)


@pytest.mark.parametrize("family", tiny.SPEECH)
def test_networks_equal_transformers(family: str, tmp_path: Path) -> None:
    import transformers

    folder = tiny.save_speech(tmp_path, family)
    theirs = transformers.AutoModelForAudioClassification.from_pretrained(folder).eval()
    network = load_model(open_model(str(folder)), TASK, base_bits=32).eval()
    task = get_task(TASK)
    processor = task.open_processor(folder)
    for example in task.trial_examples(processor):
        batch = to_tensors(task.collate([example], processor))
        del batch["labels"]
        with torch.no_grad():
            wanted = theirs(batch[processor.input_name]).logits
            torch.testing.assert_close(network.logits(**batch), wanted, **LOGITS_FP32)


def test_weights_as_direction_and_length_have_two_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny.save_speech(tmp_path, "wav2vec2")
    tensors = load_file(folder / "model.safetensors")
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): t
        for name, t in tensors.items()
    }
    assert old.keys() != tensors.keys()
    wanted = load_model(open_model(str(folder)), TASK, base_bits=32).state_dict()
    save_file(old, folder / "model.safetensors")
    found = load_model(open_model(str(folder)), TASK, base_bits=32).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(("family", "precision", "layers"), [("wav2vec2_layer", "int4", 13), ("ast", "int4", 12)])
def test_the_whole_line(family: str, precision: str, layers: int, sounds: Path, tmp_path: Path) -> None:
    model = tiny.save_speech(tmp_path / "model", family, labels=7)
    config = FinetuneConfig(precision=precision, max_steps=8, batch_size=8, rank=4, learning_rate=1e-2, threads=1)
    figures = finetune(str(model), str(sounds), tmp_path / "run", config)
    assert figures["valid"]["accuracy"] > 0.6
    exported = export(str(tmp_path / "run"), tmp_path / "bundle", precision=precision, force=True)
    assert exported["verify"]["passed"]
    assert exported["nodes"] == layers
    assert not exported["verify"]["problems"]
    adapter = evaluate(tmp_path / "run")["metrics"]
    bundle = evaluate(tmp_path / "bundle", str(sounds))["metrics"]
    assert adapter["accuracy"] == figures["valid"]["accuracy"]
    assert bundle["accuracy"] > 0.6
    shown: list[str] = []
    answer = run(tmp_path / "bundle", [str(sorted((sounds / "low").iterdir())[0])], write=shown.append)["output"]
    assert sorted(entry["label"] for entry in answer) == ["high", "hiss", "low"]
    assert "".join(shown).splitlines()[0].startswith(answer[0]["label"])
    (tmp_path / "cut.wav").write_bytes(b"RIFF")
    for name, words in (("none.wav", "does not exist"), ("cut.wav", "cannot be read as sound")):
        with pytest.raises(DataError, match=words):
            run(tmp_path / "bundle", [str(tmp_path / name)])


def test_a_checkpoint_that_transcribes_gives_its_encoder(sounds: Path, tmp_path: Path) -> None:
    """Whisper's class with a classification head names the encoder's weights without the `model.` of a checkpoint."""
    import transformers
    from safetensors.torch import load_file

    model = tiny_whisper.save_whisper(tmp_path / "model")
    theirs = transformers.WhisperForAudioClassification.from_pretrained(model, num_labels=3)
    source, labels = open_model(str(model)), ["high", "hiss", "low"]
    ours = load_model(source, TASK, base_bits=32, labels=labels)
    assert ours.head_names == ("projector", "classifier")
    stored = load_file(model / "model.safetensors")
    for name, tensor in theirs.encoder.state_dict().items():
        torch.testing.assert_close(tensor, stored[f"model.encoder.{name}"], rtol=0, atol=0)
    task = get_task(TASK)
    processor = task.open_processor(model)
    for name, head in ours.head_parameters().items():
        theirs.get_parameter(name).data.copy_(head)
    for example in task.trial_examples(processor):
        batch = to_tensors(task.collate([example], processor))
        del batch["labels"]
        with torch.no_grad():
            torch.testing.assert_close(ours.logits(**batch), theirs.eval()(**batch).logits, **LOGITS_FP32)
    config = FinetuneConfig(precision="int4", max_steps=4, batch_size=8, rank=4, learning_rate=1e-2, threads=1)
    finetune(str(model), str(sounds), tmp_path / "run", config)
    assert export(str(tmp_path / "run"), tmp_path / "bundle", precision="int4", force=True)["verify"]["passed"]
    adapter, bundle = (evaluate(tmp_path / name, str(sounds))["metrics"]["loss"] for name in ("run", "bundle"))
    assert bundle == pytest.approx(adapter, **LOSS_INT8_ACTIVATIONS)


def test_rows_of_folders_and_manifests_are_the_same(sounds: Path) -> None:
    found = scan(str(sounds), task=None, columns=None, valid=None)
    assert (found.task.name, found.labels) == (TASK, ["high", "hiss", "low"])
    rows = [found.located(path, row) for path, _, row in found.rows("train")]
    manifest = sounds.parent / "manifest.jsonl"
    lines = [
        {"audio_filepath": f"rows/{path.parent.name}/{path.name}", "duration": 0.4, "label": path.parent.name}
        for path in sorted(sounds.glob("*/*.wav"))
    ]
    manifest.write_text("\n".join(map(json.dumps, lines)))
    listed = scan(str(manifest), task=None, columns=None, valid=None)
    assert [listed.located(path, row) for path, _, row in listed.rows("train")] == rows


def test_long_sounds_are_refused_or_cut(sounds: Path, tmp_path: Path) -> None:
    import numpy as np

    task = get_task(TASK)
    processor = task.open_processor(tiny.save_speech(tmp_path, "wav2vec2"))
    example = task.encode({"audio": str(sorted((sounds / "low").iterdir())[0])}, processor, [])  # 0.33 to 0.5 s
    assert task.example_problems(example, 3)[0].endswith("seconds of sound, over the limit of 0.3")
    cut = task.truncate(example, 3)
    assert (len(cut), len(cut.arrays["wave"])) == (3, 4800)
    np.testing.assert_array_equal(cut.arrays["wave"], example.arrays["wave"][:4800])


def test_a_family_that_cannot_be_adapted_is_refused() -> None:
    from edgelora.models.build import build_network

    with pytest.raises(ModelError, match=r"wavlm.*cannot be adapted"):
        build_network({"model_type": "wavlm"}, "AutoModelForAudioClassification")
