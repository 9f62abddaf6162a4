"""audio-classification: a network with a classification head puts a sound into one of several labels.

Columns: `audio` (the path of a sound file), `label`. A folder of sounds in folders named like their label has both.
Batch and graph input, by the model's feature extractor: input_values fp32 [B, samples] (wav2vec2, HuBERT) or
[B, frames, bins] (AST), input_features fp32 [B, bins, frames] (Whisper's encoder); attention_mask [B, samples] and labels [B]
int64 in training. Graph output: logits [B, labels] fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.audio import AudioProcessor
from edgelora.tasks.base import Column, Example, GraphTensor, Row
from edgelora.tasks.classified import Classification, probability_table
from edgelora.tasks.sounds import (
    UNIT,
    cut_sound,
    length_problems,
    sound_arrays,
    sound_inputs,
    sound_problems,
    sound_shown,
    trial_waves,
)  # fmt: skip


class AudioClassification(Classification):
    name = "audio-classification"
    help = "A speech or sound network that puts sound files into labels: commands, speakers, events."
    columns = (
        Column("audio", "the path of a sound file (wav, flac, ogg, mp3), relative to the file that names it", required=True),
        Column("label", "its label: a name or a whole number", required=True),
    )
    shapes = (("audio", "label"),)
    file_columns = ("audio",)
    auto_class = "AutoModelForAudioClassification"
    head_parts = ("projector", "classifier")  # of Whisper's class, whose base is no module of its own
    unit = UNIT
    answered = "audio"
    families = "wav2vec2, HuBERT, AST"
    metric = "accuracy"
    metrics = ("loss", "accuracy", "macro_f1")
    target_modules = "all-linear"
    learning_rate = 2e-3
    batch_size = 16

    def input_problems(self, row: Row) -> list[str]:
        return sound_problems(row)

    def open_processor(self, folder: Path) -> AudioProcessor:
        return AudioProcessor.from_folder(folder)

    def inputs(self, config: Mapping[str, Any], accepted: Collection[str]) -> tuple[GraphTensor, ...]:
        return sound_inputs(config, accepted)

    def encode(self, row: Row, processor: AudioProcessor, labels: Sequence[str]) -> Example:
        """Return what `sound_arrays` makes of the file, and label int32 []. Raises DataError for what is no sound."""
        return self.example(processor.read(row["audio"]), processor, self.label_index(row, labels))

    def example(self, wave: NDArray[np.float32], processor: AudioProcessor, label: NDArray[np.int32]) -> Example:
        return Example({**sound_arrays(wave, processor), "label": label})

    def truncate(self, example: Example, max_length: int) -> Example:
        return cut_sound(example, max_length)

    def example_problems(self, example: Example, max_length: int) -> list[str]:
        return length_problems(example, max_length)

    def trial_examples(self, processor: AudioProcessor) -> list[Example]:
        return [self.example(wave, processor, np.array(-1, np.int32)) for wave in trial_waves(processor)]

    def collate(self, examples: Sequence[Example], processor: AudioProcessor) -> dict[str, NDArray[Any]]:
        labels = np.array([example.arrays["label"] for example in examples], dtype=np.int64)
        return {**processor.batch([example.arrays["wave"] for example in examples]), "labels": labels}

    def answer_text(self, answer: Any) -> str:
        return probability_table(answer)

    def show(self, example: Example, processor: AudioProcessor, labels: Sequence[str] = ()) -> str:
        from rich.markup import escape

        label = int(example.arrays["label"])
        return f"{sound_shown(example)} → [bold green]⟦{escape(labels[label]) if label >= 0 else '?'}⟧[/bold green]"
