"""What tasks on sound share: graph inputs, examples of waveforms, how they are cut, and trial examples.

The length of an example is in tenths of a second, rounded up: what batches and the planner's memory go by. Of models that pad
everything to a window (Whisper, AST) it is the window's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.audio import AudioProcessor
from edgelora.tasks.base import Example, GraphTensor, Row
from edgelora.tasks.rows import path_problems

TENTHS = 10  # of a second
UNIT = "tenths of a second"
SHORTEST = 400  # samples: what a convolutional feature encoder makes one frame of
TRACED = 4000  # samples, or frames of a spectrogram, of the inputs that a graph is traced with


def sound_problems(row: Row) -> list[str]:
    """Return what is wrong with a row's `audio`."""
    return path_problems(row, ("audio",))


def sound_inputs(config: Mapping[str, Any], accepted: Collection[str]) -> tuple[GraphTensor, ...]:
    """Return the graph's one input: waveforms [B, samples] or spectrograms. Those of free length are computed one at a time."""
    if "input_features" in accepted and "max_source_positions" in config:  # Whisper
        return (GraphTensor("input_features", "float32", ("batch_size", config["num_mel_bins"], frames_of(config))),)
    if "input_features" in accepted:  # Wav2Vec2-BERT
        width = int(config["feature_projection_input_dim"])
        return (GraphTensor("input_features", "float32", ("batch_size", "frames", width), {"frames": SHORTEST}),)
    if "num_mel_bins" in config and "max_length" in config:  # AST
        return (GraphTensor("input_values", "float32", ("batch_size", config["max_length"], config["num_mel_bins"])),)
    return (GraphTensor("input_values", "float32", ("batch_size", "samples"), {"samples": TRACED}),)


def frames_of(config: Mapping[str, Any]) -> int:
    """Return the frames of Whisper's window: its second convolution leaves every other one."""
    return 2 * int(config["max_source_positions"])


def sound_arrays(wave: NDArray[np.float32], processor: AudioProcessor) -> dict[str, NDArray[Any]]:
    """Return wave fp32 [samples], rate, length and alone of a waveform; one that is too short for a frame gets silence."""
    wave = np.pad(wave, (0, max(0, SHORTEST - len(wave))))
    samples = max(len(wave), processor.window or 0)
    return {
        "wave": wave,
        "rate": np.array(processor.rate, np.int32),
        "length": np.array(-(-samples * TENTHS // processor.rate), np.int32),
        "alone": np.array(processor.window is None, np.uint8),
    }


def cut_sound(example: Example, max_length: int) -> Example:
    """Return the example with at most so many tenths of a second."""
    arrays = dict(example.arrays)
    arrays["wave"] = arrays["wave"][: max_length * int(arrays["rate"]) // TENTHS]
    arrays["length"] = np.minimum(arrays["length"], np.int32(max_length)).astype(np.int32)
    return Example(arrays)


def length_problems(example: Example, max_length: int) -> list[str]:
    if len(example) > max_length:
        seconds = len(example.arrays["wave"]) / int(example.arrays["rate"])
        return [f"{seconds:.1f} seconds of sound, over the limit of {max_length / TENTHS:g}"]
    return []


def sound_shown(example: Example) -> str:
    return f"{len(example.arrays['wave']) / int(example.arrays['rate']):.2f} s of sound"


def trial_waves(processor: AudioProcessor) -> list[NDArray[np.float32]]:
    """Return noise of two lengths, a tone that rises, and near silence."""
    random, rate = np.random.default_rng(0), processor.rate
    time = np.arange(rate // 2) / rate
    rising = np.sin(2 * np.pi * (200 * time + 800 * time**2))
    noises = [random.standard_normal(samples) * 0.1 for samples in (rate, rate // 3)]
    return [wave.astype(np.float32) for wave in (*noises, rising * 0.3, random.standard_normal(rate // 4) * 1e-3)]
