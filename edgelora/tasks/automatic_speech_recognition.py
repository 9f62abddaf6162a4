"""automatic-speech-recognition: Whisper writes down what is said in a sound.

Columns: `audio` (the path of a sound file), `text`. A manifest with `audio_filepath` is read too.
Example: wave fp32 [samples], target int32 [T]. Batch, and input of the encoder's graph: input_features fp32 [B, bins, frames];
the decoder's side is that of tasks/sequences.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import DataError
from edgelora.listening import Listening
from edgelora.search import Search
from edgelora.tasks.base import TRIAL_TEXTS, Column, Example, GraphTensor, Metrics, Row
from edgelora.tasks.rows import text_problems
from edgelora.tasks.sequences import Written
from edgelora.tasks.sounds import sound_inputs, sound_problems, sound_shown, trial_waves
from edgelora.tasks.transcripts import error_rates
from edgelora.writing import Writing

POSITION = 320  # samples of one of the encoder's positions: two frames of 10 ms


class SpeechRecognition(Written):
    name = "automatic-speech-recognition"
    help = "Whisper, which writes down what is said."
    columns = (
        Column("audio", "the path of a sound file (wav, flac, ogg, mp3), relative to the file that names it", required=True),
        Column("text", "what is said in it", required=True),
    )
    shapes = (("audio", "text"),)
    file_columns = ("audio",)
    auto_class = "AutoModelForSpeechSeq2Seq"
    unit = "positions"
    answered = "audio"
    answer_column = "text"
    families = "Whisper"
    metrics = ("loss", "wer", "cer")
    written_metric = "wer"

    def for_model(self, config: Mapping[str, Any]) -> str:
        """Networks on waveforms have a CTC head; Whisper reads spectrograms."""
        return "speech-recognition-ctc" if "conv_kernel" in config else self.name

    def open_processor(self, folder: Path) -> Listening:
        return Listening.from_folder(folder)

    def writing(self, processor: Listening) -> Writing:
        return processor.writing

    def inputs(self, config: Mapping[str, Any], accepted: Collection[str]) -> tuple[GraphTensor, ...]:
        return sound_inputs(config, accepted)

    def problems(self, row: Row) -> list[str]:
        return sound_problems(row) + text_problems(row, ("text",))

    def source(self, row: Row, processor: Listening) -> tuple[dict[str, NDArray[Any]], int]:
        """Raises DataError for what is no sound, or longer than the model's window."""
        return self.heard(processor.audio.read(row["audio"]), processor)

    def heard(self, wave: NDArray[np.float32], processor: Listening) -> tuple[dict[str, NDArray[Any]], int]:
        window, rate = int(processor.audio.window or 0), processor.audio.rate
        if len(wave) > window:
            raise DataError(f"{len(wave) / rate:.1f} seconds of sound; the model's window has {window / rate:g}")
        return {"wave": wave, "rate": np.array(rate, np.int32)}, window // POSITION

    def sources(self, examples: Sequence[Example], processor: Listening) -> dict[str, NDArray[Any]]:
        return processor.audio.batch([example.arrays["wave"] for example in examples])

    def truncate(self, example: Example, max_length: int) -> Example:
        """Sounds are refused when they are read; a text is as long as what is said."""
        return example

    def example_problems(self, example: Example, max_length: int) -> list[str]:
        length = len(example.arrays["target"])
        return [f"a text of {length} tokens, over the limit of {max_length}"] if length > max_length else []

    def trial_examples(self, processor: Listening) -> list[Example]:
        examples = []
        for wave, text in zip(trial_waves(processor.audio), [*TRIAL_TEXTS, "yes"], strict=True):
            arrays, length = self.heard(wave[: processor.audio.window], processor)
            target = np.array(processor.writing.encode_target(text), np.int32)
            examples.append(Example({**arrays, "target": target, "length": np.array(length + len(target), np.int32)}))
        return examples

    def timed(self, search: Search, processor: Listening) -> Search:
        """Raises ModelError for a model without tokens of time."""
        return dataclasses.replace(search, prompt=processor.writing.prompt[:-1], times=processor.times)

    def decode(
        self, outputs: Mapping[str, NDArray[Any]], row: Row, example: Example, processor: Any, labels: Sequence[str]
    ) -> Any:
        """Return the text; where it is "timed" {"text", "parts": [{"text", "start", "end"}]}, seconds."""
        tokens, writing = outputs["tokens"].tolist(), processor.writing
        if "timed" not in outputs:
            return writing.decode(tokens)
        parts = processor.times.parts(tokens)
        said = [{"text": writing.decode(part.tokens), "start": part.start, "end": part.end} for part in parts]
        return {"text": writing.decode([token for part in parts for token in part.tokens]), "parts": said}

    def answer_text(self, answer: Any) -> str:
        if isinstance(answer, str):
            return answer
        ends = ("" if part["end"] is None else f"{part['end']:.2f}" for part in answer["parts"])
        return "\n".join(f"{p['start']:6.2f} – {end} s  {p['text']}" for p, end in zip(answer["parts"], ends, strict=True))

    def score(self, outputs: Sequence[str], references: Sequence[str]) -> Metrics:
        return error_rates(outputs, references)

    def show(self, example: Example, processor: Listening, labels: Sequence[str] = ()) -> str:
        from rich.markup import escape

        target = escape(processor.writing.target.decode(example.arrays["target"].tolist(), skip_special_tokens=False))
        return f"{sound_shown(example)} → [bold green]⟦{target}⟧[/bold green]"
