"""image-to-text: an encoder reads a picture, a decoder writes what is on it: captions, or the text in it.

Columns: `image` (the path of a picture), `caption`.
Example: pixels uint8 [H, W, 3], target int32 [T]. Batch, and input of the encoder's graph: pixel_values fp32 [B, 3, H, W]; the
decoder's side is that of tasks/sequences.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.captioning import Captioning, pair
from edgelora.tasks.base import TRIAL_TEXTS, Column, Example, GraphTensor, Metrics, Row
from edgelora.tasks.pictures import trial_pictures
from edgelora.tasks.rows import path_problems, text_problems
from edgelora.tasks.sequences import Written
from edgelora.tasks.translation import bleu_and_chrf
from edgelora.writing import Writing


class ImageToText(Written):
    name = "image-to-text"
    help = "An encoder of pictures with a decoder that writes captions, or the text in them."
    columns = (
        Column("image", "the path of a picture, relative to the file that names it", required=True),
        Column("caption", "what is to be written about it", required=True),
    )
    shapes = (("image", "caption"),)
    file_columns = ("image",)
    auto_class = "AutoModelForImageTextToText"
    unit = "positions"
    answered = "image"
    answer_column = "caption"
    families = "ViT or DeiT with the decoder of BERT, RoBERTa or TrOCR"
    metrics = ("loss", "bleu", "chrf")
    written_metric = "bleu"

    def open_processor(self, folder: Path) -> Captioning:
        return Captioning.from_folder(folder)

    def writing(self, processor: Captioning) -> Writing:
        return processor.writing

    def problems(self, row: Row) -> list[str]:
        return path_problems(row, self.file_columns) + text_problems(row, ("caption",))

    def inputs(self, config: Mapping[str, Any], accepted: Collection[str]) -> tuple[GraphTensor, ...]:
        size = pair(config["encoder"]["image_size"])
        return (GraphTensor("pixel_values", "float32", ("batch_size", 3, *size)),)

    def source(self, row: Row, processor: Captioning) -> tuple[dict[str, NDArray[Any]], int]:
        """Raises DataError for what is no picture."""
        return {"pixels": processor.images.read(row["image"])}, processor.positions

    def sources(self, examples: Sequence[Example], processor: Captioning) -> dict[str, NDArray[Any]]:
        return {"pixel_values": processor.images.normalize(np.stack([example.arrays["pixels"] for example in examples]))}

    def truncate(self, example: Example, max_length: int) -> Example:
        """A text that is too long is cut, its last token kept, which ends it."""
        target = example.arrays.get("target")
        if target is None or len(target) <= max_length:
            return example
        cut = np.concatenate([target[: max_length - 1], target[-1:]])
        length = example.arrays["length"] - np.int32(len(target) - len(cut))
        return Example({**example.arrays, "target": cut, "length": np.array(length, np.int32)})

    def example_problems(self, example: Example, max_length: int) -> list[str]:
        length = len(example.arrays["target"])
        return [f"a text of {length} tokens, over the limit of {max_length}"] if length > max_length else []

    def trial_examples(self, processor: Captioning) -> list[Example]:
        examples = []
        for picture, text in zip(trial_pictures(), [*TRIAL_TEXTS, "yes"], strict=True):
            target = np.array(processor.writing.encode_target(text), np.int32)
            length = np.array(processor.positions + len(target), np.int32)
            example = Example({"pixels": processor.images.pixels(picture), "target": target, "length": length})
            examples.append(self.truncate(example, processor.writing.places))
        return examples

    def score(self, outputs: Sequence[str], references: Sequence[str]) -> Metrics:
        return bleu_and_chrf(outputs, references)

    def show(self, example: Example, processor: Captioning, labels: Sequence[str] = ()) -> str:
        from rich.markup import escape

        height, width = example.arrays["pixels"].shape[:2]
        text = escape(processor.writing.target.decode(example.arrays["target"].tolist(), skip_special_tokens=False))
        return f"{width} × {height} pixels → [bold green]⟦{text}⟧[/bold green]"
