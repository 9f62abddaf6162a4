"""A model that no run adapted ships as what its class is for, with the labels that transformers would give it."""

from __future__ import annotations

import json
from pathlib import Path

import tiny
import tiny_scenes
import tiny_sequences

from edgelora.export.export import export
from edgelora.run.model import load


def test_a_captioner_with_an_exact_table(tmp_path: Path) -> None:
    """BERT's head shares its bias with the module around it; the tensor that no checkpoint has stayed without a value."""
    model = tiny_sequences.save_captioner(tmp_path / "model", "bert")
    assert export(str(model), tmp_path / "bundle", precision="fp32")["verify"]["passed"]


def test_speech_for_classes(tmp_path: Path) -> None:
    model = tiny.save_speech(tmp_path / "model", "wav2vec2")
    exported = export(str(model), tmp_path / "bundle", precision="fp32")
    assert exported["verify"]["passed"]
    assert load(tmp_path / "bundle").bundle.task == "audio-classification"


def test_a_detector_without_names(tmp_path: Path) -> None:
    """A config.json of two labels names none: transformers leaves out what is its default."""
    model = tiny_scenes.save_detector(tmp_path / "model", "yolos", labels=2)
    assert "id2label" not in json.loads((model / "config.json").read_text())
    export(str(model), tmp_path / "bundle", precision="fp32")
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
