"""image-classification: a network with a classification head puts a picture into one of several labels.

Columns: `image` (the path of a picture), `label`. A folder of pictures in folders named like their label has both.
Batch and graph input: pixel_values fp32 [B, 3, H, W]; labels [B] int64 in training.
Graph output: logits [B, labels] fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.images import ImageProcessor
from edgelora.tasks.base import Column, Example, Metrics, Row
from edgelora.tasks.classified import BEST, Classification, probability_table, report
from edgelora.tasks.pictures import Pictures, trial_pictures


class ImageClassification(Pictures, Classification):
    name = "image-classification"
    help = "A convolutional network or vision transformer that puts pictures into labels."
    columns = (
        Column("image", "the path of a picture, relative to the file that names it", required=True),
        Column("label", "its label: a name or a whole number", required=True),
    )
    shapes = (("image", "label"),)
    auto_class = "AutoModelForImageClassification"
    families = "ViT, DeiT, Swin, MobileViT, ResNet, MobileNetV2, EfficientNet, ConvNeXt"
    metric = "accuracy"
    metrics = ("loss", "accuracy", "top_5", "macro_f1", "mcc")
    target_modules = "all-linear"
    learning_rate = 2e-3
    batch_size = 32

    def input_problems(self, row: Row) -> list[str]:
        return self.file_problems(row)

    def encode(self, row: Row, processor: ImageProcessor, labels: Sequence[str]) -> Example:
        """Return pixels uint8 [H, W, 3], label int32 [] and length int32 []. Raises DataError for what is no picture."""
        return self.example(processor.read(row["image"]), self.label_index(row, labels))

    def example(self, pixels: NDArray[np.uint8], label: NDArray[np.int32]) -> Example:
        return Example({**self.picture_arrays(pixels), "label": label})

    def trial_examples(self, processor: ImageProcessor) -> list[Example]:
        return [self.example(processor.pixels(picture), np.array(-1, np.int32)) for picture in trial_pictures()]

    def collate(self, examples: Sequence[Example], processor: ImageProcessor) -> dict[str, NDArray[Any]]:
        pixels = np.stack([example.arrays["pixels"] for example in examples])
        labels = np.array([example.arrays["label"] for example in examples], dtype=np.int64)
        return {"pixel_values": processor.normalize(pixels), "labels": labels}

    def scores(self, logits: NDArray[np.float64], truth: NDArray[Any], labels: Sequence[str]) -> Metrics:
        """Return accuracy (top 1), the share of rows whose label is among the five best, macro F1 and the report."""
        found = report(truth, logits.argmax(axis=1), labels)
        if len(labels) > BEST:
            best = np.argsort(-logits, axis=1, kind="stable")[:, :BEST]
            found["top_5"] = float((best == truth[:, None]).any(axis=1).mean())
        return found

    def answer_text(self, answer: Any) -> str:
        return probability_table(answer)

    def show(self, example: Example, processor: ImageProcessor, labels: Sequence[str] = ()) -> str:
        from rich.markup import escape

        height, width = example.arrays["pixels"].shape[:2]
        label = int(example.arrays["label"])
        return f"{width} × {height} pixels → [bold green]⟦{escape(labels[label]) if label >= 0 else '?'}⟧[/bold green]"
