"""Sounds as networks read them, against transformers' feature extractors and scipy's resampling; wrong and unusual files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tolerances import FEATURES, RESAMPLED

from edgelora.audio import AudioProcessor, open_sound, resample
from edgelora.errors import DataError, ModelError

soundfile = pytest.importorskip("soundfile")
EXTRACTORS: dict[str, dict[str, Any]] = {
    "Wav2Vec2FeatureExtractor": {},
    "WhisperFeatureExtractor": {"chunk_length": 2},
    "ASTFeatureExtractor": {"max_length": 100, "num_mel_bins": 64},
    "SeamlessM4TFeatureExtractor": {},
}


@pytest.mark.parametrize("name", EXTRACTORS)
@pytest.mark.parametrize("samples", [5001, 31950, 32000])
def test_features_equal_transformers(name: str, samples: int, tmp_path: Path) -> None:
    import transformers

    theirs = getattr(transformers, name)(**EXTRACTORS[name])
    theirs.save_pretrained(tmp_path)
    ours = AudioProcessor.from_folder(tmp_path)
    wave = (np.random.default_rng(samples).standard_normal(samples) * 0.1).astype(np.float32)
    wanted = np.asarray(theirs(wave, sampling_rate=16000, return_tensors="np")[ours.input_name][0])
    np.testing.assert_allclose(ours.features(wave), wanted, **FEATURES)


def test_silence_has_features() -> None:
    silence = np.zeros(1000, np.float32)
    for name, settings in EXTRACTORS.items():
        ours = AudioProcessor.from_config({"feature_extractor_type": name, **settings})
        assert np.isfinite(ours.features(silence)).all(), name


def test_waveforms_of_a_batch_are_padded_and_masked() -> None:
    ours = AudioProcessor.from_config({"do_normalize": False})
    waves = [np.full(samples, 0.5, np.float32) for samples in (3, 5)]
    batch = ours.batch(waves)
    assert batch["input_values"].tolist() == [[0.5] * 3 + [0.0] * 2, [0.5] * 5]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_equals_scipy(rate: int) -> None:
    signal = pytest.importorskip("scipy.signal")
    wave = np.random.default_rng(rate).standard_normal(rate // 3 + 7).astype(np.float32)
    divisor = math.gcd(rate, 16000)
    wanted = signal.resample_poly(wave.astype(np.float64), 16000 // divisor, rate // divisor)
    np.testing.assert_allclose(resample(wave, rate, 16000), wanted, **RESAMPLED)


def test_stereo_at_another_rate_becomes_one_channel(tmp_path: Path) -> None:
    time = np.arange(44100) / 44100
    tone = np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "x.flac", np.stack([tone * 0.5, tone * 0.3], axis=1), 44100)
    wave = AudioProcessor.from_config({}).read(tmp_path / "x.flac")
    assert wave.dtype == np.float32
    assert len(wave) == 16000
    wanted = 0.4 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(wave - wanted)[200:-200].max() < 1e-3  # the filter's reach at the ends apart


def test_files_that_are_no_sounds_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.wav").write_text("hello")
    (tmp_path / "nothing.wav").write_bytes(b"")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8000)
    soundfile.write(tmp_path / "broken.wav", np.full(10, np.nan), 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "long.wav", np.zeros(100), 8000)
    monkeypatch.setattr("edgelora.audio.MOST_SECONDS", 0.001)
    for name, words in {
        "text.wav": "text.wav cannot be read as sound: ",
        "nothing.wav": "nothing.wav cannot be read as sound: ",
        "empty.wav": "empty.wav has no sound in it: 0 samples",
        "long.wav": "long.wav has 0 seconds; at most 0.001 are read",
        "none.wav": "does not exist",
    }.items():
        with pytest.raises(DataError, match=words):
            open_sound(tmp_path / name)
    monkeypatch.setattr("edgelora.audio.MOST_SECONDS", 1)
    with pytest.raises(DataError, match=r"broken.wav has samples that are no numbers"):
        open_sound(tmp_path / "broken.wav")


def test_a_folder_without_a_usable_extractor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no preprocessor_config.json"):
        AudioProcessor.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"feature_extractor_type": "ClapFeatureExtractor"}))
    with pytest.raises(ModelError, match="ClapFeatureExtractor is not known"):
        AudioProcessor.from_folder(tmp_path)
