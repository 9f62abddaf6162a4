"""Sound files to arrays as a model's preprocessor_config.json says, on numpy and soundfile: the same on laptop and device.

Source: the feature extractors of transformers. Channels are averaged, other rates are resampled (scipy.signal.resample_poly's
filter: a sinc of ten zero crossings under a Kaiser window).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import DataError, MachineError
from edgelora.preprocessor import read_preprocessor
from edgelora.spectrogram import Wave, hann, kaldi_features, povey, whisper_features

KINDS = {
    "Wav2Vec2FeatureExtractor": "wave",
    "WhisperFeatureExtractor": "whisper",
    "ASTFeatureExtractor": "ast",
    "SeamlessM4TFeatureExtractor": "seamless",
}
MOST_SECONDS = 3600
VARIANCE = 1e-7  # added where a waveform is divided by its deviation
ZERO_CROSSINGS, KAISER_BETA = 10, 5.0  # of the resampling filter
AT_ONCE = 1 << 16  # samples resampled at once


@dataclass(frozen=True)
class AudioProcessor:
    """What preprocessor_config.json says. kind: a value of KINDS; rate: samples per second; window: samples that every
    input is padded to, None where its length is free; mean, std: of the whole training data, for AST."""

    kind: str
    rate: int
    normalize: bool = True
    bins: int = 80
    window: int | None = None
    mean: float = 0.0
    std: float = 0.5
    masks: bool = False

    @classmethod
    def from_folder(cls, folder: Path) -> AudioProcessor:
        """Read a folder in Hugging Face layout. Raises ModelError where there is no usable preprocessor_config.json."""
        return read_preprocessor(folder, "feature_extractor", cls.from_config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AudioProcessor:
        """Raises KeyError, TypeError or ValueError for what cannot be read."""
        name = config.get("feature_extractor_type", "Wav2Vec2FeatureExtractor")
        if name not in KINDS:
            raise ValueError(f"{name} is not known; {', '.join(KINDS)} are")
        kind, rate = KINDS[name], int(config.get("sampling_rate", 16000))
        normalize = bool(config.get("do_normalize", True))
        if kind == "whisper":
            seconds = float(config.get("chunk_length", 30))
            return cls(kind, rate, bins=int(config.get("feature_size", 80)), window=round(seconds * rate))
        if kind == "ast":
            bins, length = int(config.get("num_mel_bins", 128)), int(config.get("max_length", 1024))
            mean, std = float(config.get("mean", -4.2677393)), float(config.get("std", 4.5689974))
            return cls(kind, rate, normalize, bins, 160 * (length - 1) + 400, mean, std)
        if kind == "seamless":
            return cls(kind, rate, bins=int(config.get("num_mel_bins", 80)), masks=True)
        return cls(kind, rate, normalize, masks=bool(config.get("return_attention_mask")))

    @property
    def input_name(self) -> str:
        """The name of the network's input."""
        return "input_features" if self.kind in ("whisper", "seamless") else "input_values"

    def read(self, path: str | Path) -> Wave:
        """Return a sound file as one channel at the model's rate, fp32 [samples] in -1 … 1. Raises DataError where it is none,
        damaged, empty or too long."""
        wave, rate = open_sound(Path(path))
        return resample(wave, rate, self.rate)

    def features(self, wave: Wave) -> Wave:
        """Return what the network reads of a waveform: itself [S], or a spectrogram, padded to the window if there is one."""
        if self.kind == "whisper":
            assert self.window is not None
            return whisper_features(wave, samples=self.window, bins=self.bins, rate=self.rate)
        if self.kind == "ast":
            return self._ast(wave)
        if self.kind == "seamless":
            return self._seamless(wave)
        return (wave - wave.mean()) / np.sqrt(wave.var() + np.float32(VARIANCE)) if self.normalize else wave

    def _ast(self, wave: Wave) -> Wave:
        """Return [frames of the window, bins]; padding is zero before it is normalized."""
        assert self.window is not None
        length = (self.window - 400) // 160 + 1
        found = kaldi_features(wave[: self.window], bins=self.bins, rate=self.rate, window=hann())
        found = np.pad(found, ((0, length - len(found)), (0, 0)))
        return ((found - self.mean) / (self.std * 2)).astype(np.float32) if self.normalize else found

    def _seamless(self, wave: Wave) -> Wave:
        """Return [frames / 2, 2 · bins]: two frames side by side, bins without mean and deviation; the last may be zeros."""
        found = kaldi_features(wave * np.float32(2**15), bins=self.bins, rate=self.rate, window=povey())
        deviation = np.sqrt(found.var(0, ddof=1 if len(found) > 1 else 0) + VARIANCE)
        found = ((found - found.mean(0)) / deviation).astype(np.float32)
        return np.pad(found, ((0, len(found) % 2), (0, 0))).reshape(-1, 2 * self.bins)

    def batch(self, waves: Sequence[Wave]) -> dict[str, NDArray[Any]]:
        """Return the network's inputs [B, …] of waveforms: shorter ones padded with zeros, attention_mask int64 [B, S] where
        lengths are free."""
        found = [self.features(wave) for wave in waves]
        if self.window is not None:
            return {self.input_name: np.stack(found)}
        longest = max(map(len, found))
        values = np.zeros((len(found), longest, *found[0].shape[1:]), np.float32)
        mask = np.zeros((len(found), longest), np.int64)
        for row, array in enumerate(found):
            values[row, : len(array)], mask[row, : len(array)] = array, 1
        return {self.input_name: values, "attention_mask": mask}


def open_sound(path: Path) -> tuple[Wave, int]:
    """Return the average of a sound file's channels, fp32 [samples], and its rate. Raises DataError for what cannot be read."""
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: without libsndfile
        raise MachineError("sound needs soundfile", hint='pip install "edgelora[audio]"') from None
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    try:
        with soundfile.SoundFile(path) as file:
            rate, seconds = int(file.samplerate), file.frames / file.samplerate
            if seconds > MOST_SECONDS:
                raise DataError(f"{path.name} has {seconds:.0f} seconds; at most {MOST_SECONDS} are read")
            channels = file.read(dtype="float32", always_2d=True)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise DataError(f"{shown(path)} cannot be read as sound: {reason(error)}") from None
    if not len(channels):
        raise DataError(f"{shown(path)} has no sound in it: 0 samples")
    if not np.isfinite(channels).all():
        raise DataError(f"{path.name} has samples that are no numbers")
    return np.ascontiguousarray(channels.mean(axis=1)), rate


def shown(path: Path) -> str:
    """Return a file's name with its folder's: names such as 1.wav stand in the folder of every label."""
    return "/".join(path.parts[-2:])


def reason(error: Exception) -> str:
    """Return what libsndfile says, without the path."""
    return str(getattr(error, "error_string", error)).strip().rstrip(".") or type(error).__name__


def resample(wave: Wave, rate: int, wanted: int) -> Wave:
    """Return a waveform at another rate: ceil(samples · wanted / rate) of them."""
    if rate == wanted:
        return wave
    divisor = math.gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    filters = polyphase(up, down)
    reach = filters.shape[1]
    half = ZERO_CROSSINGS * max(up, down) // up  # input samples before the one that an output lies at
    padded = np.pad(wave, (reach, reach))
    pieces = np.lib.stride_tricks.sliding_window_view(padded, reach)
    places = np.arange(-(-len(wave) * up // down), dtype=np.int64) * down
    found = np.empty(len(places), np.float32)
    for start in range(0, len(places), AT_ONCE):
        part = places[start : start + AT_ONCE]
        rows = pieces[part // up + reach - half]
        found[start : start + AT_ONCE] = np.einsum("nk,nk->n", rows, filters[part % up])
    return found


@functools.lru_cache(maxsize=8)
def polyphase(up: int, down: int) -> Wave:
    """Return the low-pass filter of resampling by up / down, one row [taps] for each place between two input samples.

    Row p weighs input samples around an output that lies p / up after one of them. Cut-off: half the lower of the two rates.
    """
    widest = max(up, down)
    half = ZERO_CROSSINGS * widest
    reach = half // up
    taps = np.arange(-reach, reach + 2)
    distance = np.arange(up)[:, None] - taps[None, :] * up  # from each tap to the output, in steps of the common rate
    filters = low_pass(distance, widest) / low_pass(np.arange(-half, half + 1), widest).sum()  # a constant stays what it is
    return np.asarray(filters * up, dtype=np.float32)


def low_pass(steps: NDArray[Any], widest: int) -> NDArray[np.float64]:
    """Return a sinc of cut-off 1 / widest under a Kaiser window, at whole steps from its middle."""
    half = ZERO_CROSSINGS * widest
    window = np.i0(KAISER_BETA * np.sqrt(np.maximum(0.0, 1.0 - (steps / half) ** 2)))
    return np.asarray(np.where(np.abs(steps) <= half, np.sinc(steps / widest) * window, 0.0))
