"""Spectrograms in numpy, as transformers' feature extractors compute them (transformers.audio_utils)."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

Wave = NDArray[np.float32]
Filters = NDArray[np.float64]

FRAME, HOP, KALDI_BINS = 400, 160, 257  # samples of 25 and 10 ms at 16 kHz; bins of a transform of 512
KALDI_FLOOR = 1.192092955078125e-07  # the smallest energy, Kaldi's epsilon of fp32
PREEMPHASIS = 0.97
WHISPER_FLOOR, WHISPER_RANGE = 1e-10, 8.0  # powers of ten below the loudest that are kept


def whisper_features(wave: Wave, *, samples: int, bins: int, rate: int, frame: int = FRAME, hop: int = HOP) -> Wave:
    """Return the log-mel spectrogram [bins, samples / hop] of a waveform padded with silence to `samples`.

    Source: WhisperFeatureExtractor. Frames of silence are not transformed: their energy is the floor.
    """
    padded = np.zeros(samples, np.float64)
    padded[: len(wave)] = wave[:samples]
    around = np.pad(padded, frame // 2, mode="reflect")
    count = samples // hop
    heard = min(count, -(-(len(wave) + frame // 2) // hop) + 1)
    if len(wave) > samples - frame:  # the end is reflected into the last frames
        heard = count
    window = np.hanning(frame + 1)[:-1]
    power = np.abs(np.fft.rfft(frames(around, frame, hop)[:heard] * window)) ** 2
    mel = np.full((bins, count), WHISPER_FLOOR)
    mel[:, :heard] = np.maximum(slaney_filters(bins, frame // 2 + 1, rate).T @ power.T, WHISPER_FLOOR)
    logarithm = np.log10(mel)
    return np.asarray((np.maximum(logarithm, logarithm.max() - WHISPER_RANGE) + 4.0) / 4.0, np.float32)


def kaldi_features(wave: Wave, *, bins: int, rate: int, window: NDArray[np.float64]) -> Wave:
    """Return the log-mel filter bank [frames, bins] as Kaldi computes it: without the mean, pre-emphasized, floored.

    Source: ASTFeatureExtractor and SeamlessM4TFeatureExtractor. What is shorter than a frame is padded with silence.
    """
    wave = np.pad(wave, (0, max(0, FRAME - len(wave))))
    cut = frames(wave.astype(np.float64), FRAME, HOP)
    cut = cut - cut.mean(axis=1, keepdims=True)
    emphasized = np.concatenate([cut[:, :1] * (1 - PREEMPHASIS), cut[:, 1:] - PREEMPHASIS * cut[:, :-1]], axis=1)
    power = np.abs(np.fft.rfft(emphasized * window, n=2 * (KALDI_BINS - 1))) ** 2
    return np.log(np.maximum(power @ kaldi_filters(bins, rate), KALDI_FLOOR)).astype(np.float32)


def hann() -> NDArray[np.float64]:
    return np.hanning(FRAME)


def povey() -> NDArray[np.float64]:
    """Return Kaldi's own window."""
    return np.asarray(np.hanning(FRAME) ** 0.85)


def frames(wave: NDArray[np.float64], size: int, hop: int) -> NDArray[np.float64]:
    """Return the overlapping pieces [frames, size] of a waveform that fit into it whole, as a view."""
    return np.lib.stride_tricks.sliding_window_view(wave, size)[::hop]


@functools.cache
def slaney_filters(bins: int, frequencies: int, rate: int) -> Filters:
    """Return triangular filters [frequencies, bins] up to 8 kHz on Slaney's scale (linear below 1 kHz, logarithmic above), of
    equal energy."""
    step = np.log(6.4) / 27.0
    top = 15.0 + np.log(8000.0 / 1000.0) / step
    mels = np.linspace(0.0, top, bins + 2)
    centers = np.where(mels >= 15.0, 1000.0 * np.exp(step * (mels - 15.0)), 200.0 * mels / 3.0)
    filters = triangles(np.linspace(0, rate // 2, frequencies), centers)
    return filters * (2.0 / (centers[2:] - centers[:-2]))


@functools.cache
def kaldi_filters(bins: int, rate: int) -> Filters:
    """Return triangular filters [257, bins] from 20 Hz to half the rate, triangles on Kaldi's mel scale."""

    def mel(frequency: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(1127.0 * np.log(1.0 + frequency / 700.0))

    low, high = mel(np.array([20.0, rate // 2])).tolist()
    corners = np.asarray(np.linspace(low, high, bins + 2), np.float64)
    places = np.asarray(rate / (2 * (KALDI_BINS - 1)) * np.arange(KALDI_BINS), np.float64)
    return triangles(mel(places), corners)


def triangles(points: NDArray[np.float64], corners: NDArray[np.float64]) -> Filters:
    """Return for each three neighbouring corners the triangle over them, at the points: [points, corners - 2]."""
    widths = np.diff(corners)
    slopes = corners[None, :] - points[:, None]
    return np.asarray(np.maximum(0.0, np.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:])))
