"""speech-recognition-ctc: wav2vec2 and its kind spell what is said, a letter or a blank for each frame of 20 ms.

Columns: `audio` (the path of a sound file), `text`, as of automatic-speech-recognition, which becomes this for such a model.
Example: the arrays of `sound_arrays`, target int32 [T]. Batch: input_values fp32 [B, samples] (the graph's input),
attention_mask int64 [B, samples], labels int64 [B, T], -1 where a text has ended.
Graph output: logits fp32 [B, frames, letters].
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import DataError
from edgelora.spelling import Spelling, ctc_loss, greedy
from edgelora.tasks.base import Column, Example, GraphTensor, Metrics, Predictor, Row, Task
from edgelora.tasks.rows import text_problems
from edgelora.tasks.sounds import (
    TENTHS,
    UNIT,
    length_problems,
    sound_arrays,
    sound_inputs,
    sound_problems,
    sound_shown,
    trial_waves,
)  # fmt: skip
from edgelora.tasks.transcripts import error_rates

if TYPE_CHECKING:
    import torch

PADDING = -1


class SpeechRecognitionCTC(Task):
    name = "speech-recognition-ctc"
    help = "wav2vec2, HuBERT and their kind, which spell what is said; with the times of words."
    columns = (
        Column("audio", "the path of a sound file (wav, flac, ogg, mp3), relative to the file that names it", required=True),
        Column("text", "what is said in it", required=True),
    )
    shapes = (("audio", "text"),)
    file_columns = ("audio",)
    auto_class = "AutoModelForCTC"
    unit = UNIT
    answered = "audio"
    outputs = (GraphTensor("logits", "float32", ("batch_size", "frames", "vocab_size")),)
    families = "wav2vec2, HuBERT, UniSpeech, data2vec"
    metric = "loss"
    metrics = ("loss", "wer", "cer")
    higher_is_better = False
    target_modules = "q_proj,k_proj,v_proj"
    learning_rate = 1e-3

    def open_processor(self, folder: Path) -> Spelling:
        return Spelling.from_folder(folder)

    def normalize(self, row: Row) -> Row:
        return {column.name: row[column.name] for column in self.columns if row.get(column.name) is not None}

    def problems(self, row: Row) -> list[str]:
        return sound_problems(row) + text_problems(row, ("text",))

    def inputs(self, config: Mapping[str, Any], accepted: Collection[str]) -> tuple[GraphTensor, ...]:
        return sound_inputs(config, accepted)

    def encode(self, row: Row, processor: Spelling, labels: Sequence[str]) -> Example:
        """Raises DataError for what is no sound, a text with other letters, or one too long for its sound."""
        found = sound_arrays(processor.audio.read(row["audio"]), processor.audio)
        if "text" not in row:
            return Example(found)
        target, frames = processor.encode(row["text"]), processor.frames(len(found["wave"]))
        needed = len(target) + int((target[1:] == target[:-1]).sum())  # a blank parts two of the same letter
        if needed > frames:
            raise DataError(f"a text of {len(target)} letters for {sound_shown(Example(found))}: {frames} frames hold no more")
        return Example({**found, "target": target})

    def truncate(self, example: Example, max_length: int) -> Example:
        """A sound is refused rather than cut: what is said at its end would be lost."""
        return example

    def pieces(self, row: Row, processor: Spelling, labels: Sequence[str], max_length: int) -> list[Example]:
        example = self.encode({"audio": row["audio"]}, processor, labels)
        if problems := length_problems(example, max_length):
            raise DataError(problems[0], hint=f"cut it into parts of at most {max_length // TENTHS} seconds")
        return [example]

    def example_problems(self, example: Example, max_length: int) -> list[str]:
        return length_problems(example, max_length)

    def trial_examples(self, processor: Spelling) -> list[Example]:
        return [Example(sound_arrays(wave, processor.audio)) for wave in trial_waves(processor.audio)]

    def collate(self, examples: Sequence[Example], processor: Spelling) -> dict[str, NDArray[Any]]:
        batch = processor.audio.batch([example.arrays["wave"] for example in examples])
        if "target" not in examples[0].arrays:
            return batch
        targets = [example.arrays["target"] for example in examples]
        labels = np.full((len(targets), max(map(len, targets))), PADDING, dtype=np.int64)
        for row, target in enumerate(targets):
            labels[row, : len(target)] = target
        return {**batch, "labels": labels}

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Return the negative log-likelihood of the texts, over all ways to place their letters in the frames."""
        import torch

        network, labels_BT = model.network, batch["labels"]
        logits_BFV = model.outputs(**model.inputs_of(batch))["logits"].float()
        frames = network._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1))
        there = labels_BT != PADDING
        loss = torch.nn.functional.ctc_loss(
            logits_BFV.log_softmax(-1).transpose(0, 1), labels_BT[there], frames, there.sum(-1),
            blank=network.config.pad_token_id, reduction="sum", zero_infinity=True,
        )  # fmt: skip
        return loss, int(there.sum())

    def evaluate(
        self, predictor: Predictor, rows: Sequence[Row], examples: Sequence[Example], processor: Spelling,
        labels: Sequence[str], *, generate: bool,
    ) -> Metrics:  # fmt: skip
        """Return loss (nats per letter), and word and character error rates of the likeliest paths."""
        found = [said["logits"] for said in predictor.outputs(examples)]
        targets = [example.arrays["target"] for example in examples]
        losses = [ctc_loss(logits, target, processor.blank) for logits, target in zip(found, targets, strict=True)]
        spelt = [processor.spell(greedy(logits, processor.blank)) for logits in found]
        return {"loss": sum(losses) / sum(map(len, targets)), **error_rates(spelt, [row["text"] for row in rows])}

    def decode(
        self, outputs: Mapping[str, NDArray[Any]], row: Row, example: Example, processor: Spelling, labels: Sequence[str]
    ) -> dict[str, Any]:
        """Return {"text", "words": [{"word", "start", "end"}]}, seconds."""
        logits = outputs["logits"]
        return {"text": processor.spell(greedy(logits, processor.blank)), "words": processor.words(logits)}

    def answer_text(self, answer: Any) -> str:
        times = (f"{word['start']:6.2f} – {word['end']:.2f} s  {word['word']}" for word in answer["words"])
        return "\n".join([answer["text"], *times])

    def show(self, example: Example, processor: Spelling, labels: Sequence[str] = ()) -> str:
        from rich.markup import escape

        text = escape(processor.spell(example.arrays["target"].tolist()))
        return f"{sound_shown(example)} → [bold green]⟦{text}⟧[/bold green]"
