"""zero-shot-image-classification: CLIP and SigLIP, which tell how well pictures and texts fit each other.

Columns: `image` (the path of a picture), `text` (a text that fits it: a caption, or the name of a class). What does not fit are
the other rows of a batch.
Batch and graph inputs: pixel_values fp32 [I, 3, H, W]; input_ids int64 [T, S], and of CLIP attention_mask. In training I = T,
and labels_text, labels_image int64 [I] tell texts and pictures apart.
Graph outputs, fp32: logits_per_image [I, T], logits_per_text [T, I], text_embeds [T, D], image_embeds [I, D], of length 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import DataError
from edgelora.image_text import SIGMOID, ImageText
from edgelora.tasks import image_texts
from edgelora.tasks.base import TRIAL_TEXTS, Column, Example, GraphTensor, Metrics, Predictor, Row
from edgelora.tasks.classified import probability_table
from edgelora.tasks.pictures import Pictures, trial_pictures
from edgelora.tasks.rows import parse_json_cells, text_problems

if TYPE_CHECKING:
    import torch

PAIR = ("image", "text")
MOST_TEXTS = 1000  # that a bundle lists, to rank where none are given


class ZeroShotImageClassification(Pictures):
    name = "zero-shot-image-classification"
    help = "CLIP or SigLIP: texts are ranked for a picture, with classes in words, and pictures found by text."
    columns = (
        Column("image", "the path of a picture, relative to the file that names it", required=True),
        Column("text", "a text that fits it: a caption or a class in words", required=True),
    )
    shapes = (PAIR,)
    asked = ("image", "labels")
    auto_class = "AutoModelForZeroShotImageClassification"
    unit = "patches and tokens"
    outputs = (
        GraphTensor("logits_per_image", "float32", ("image_batch_size", "text_batch_size")),
        GraphTensor("logits_per_text", "float32", ("text_batch_size", "image_batch_size")),
        GraphTensor("text_embeds", "float32", ("text_batch_size", "projection_dim")),
        GraphTensor("image_embeds", "float32", ("image_batch_size", "projection_dim")),
    )
    families = "CLIP, SigLIP"
    metric = "accuracy"
    metrics = ("loss", "accuracy", "mrr", "recall@5", "recall@10", "image_recall@1", "image_recall@5", "image_recall@10")
    higher_is_better = True
    target_modules = "q_proj,k_proj,v_proj"
    learning_rate = 1e-3
    batch_size = 32
    keeps_labels = True

    def open_processor(self, folder: Path) -> Any:
        return ImageText.from_folder(folder)

    def inputs(self, config: Mapping[str, Any], accepted: Collection[str]) -> tuple[GraphTensor, ...]:
        return image_texts.pair_inputs(config)

    def normalize(self, row: Row) -> Row:
        names = PAIR if row.get("text") is not None else self.asked
        return parse_json_cells({name: row[name] for name in names if row.get(name) is not None}, ("labels",))

    def problems(self, row: Row) -> list[str]:
        return self.file_problems(row) + text_problems(row, ("text",))

    def asked_problems(self, row: Row) -> list[str]:
        texts = row.get("labels", ["a text"])
        good = isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
        return self.file_problems(row) + ([] if good else ['"labels" must be a list of texts, none of them empty'])

    def label(self, row: Row) -> str | None:
        return row.get("text")

    def labels(self, names: Iterable[str]) -> list[str]:
        """Return the distinct texts, which a bundle ranks where it is given none; of too many none."""
        found = sorted(set(names))
        return found if len(found) <= MOST_TEXTS else []

    def unknown(self, names: Iterable[str], labels: Collection[str]) -> list[str]:
        return []

    def encode(self, row: Row, processor: ImageText, labels: Sequence[str]) -> Example:
        """Return pixels uint8 [H, W, 3] and the arrays of `text_arrays`. Raises DataError for what is no picture."""
        texts = row.get("labels") or [row["text"]]
        return self.example(processor.images.read(row["image"]), [processor.encode(text) for text in texts])

    def example(self, pixels: NDArray[np.uint8], texts: Sequence[NDArray[np.int32]]) -> Example:
        arrays = {**self.picture_arrays(pixels), **image_texts.text_arrays(texts)}
        return Example({**arrays, "length": np.array(arrays["length"] + len(arrays["tokens"]), np.int32)})

    def truncate(self, example: Example, max_length: int) -> Example:
        return image_texts.cut_texts(example, max_length)

    def example_problems(self, example: Example, max_length: int) -> list[str]:
        longest = int(example.arrays["sizes"].max())
        return [f"a text of {longest} tokens, over the limit of {max_length}"] if longest > max_length else []

    def pieces(self, row: Row, processor: ImageText, labels: Sequence[str], max_length: int) -> list[Example]:
        if not (texts := row.get("labels") or list(labels)):
            raise DataError("there are no texts to rank for the picture", hint='--labels "a cat,a dog"')
        return [self.truncate(self.encode({**row, "labels": texts}, processor, labels), max_length)]

    def trial_examples(self, processor: ImageText) -> list[Example]:
        texts = [text for whole in TRIAL_TEXTS for text in (whole, whole[:9])]
        pairs = zip(trial_pictures(), texts, strict=False)
        found = [self.example(processor.images.pixels(picture), [processor.encode(text)]) for picture, text in pairs]
        return [self.truncate(example, processor.positions) for example in found]

    def collate(self, examples: Sequence[Example], processor: ImageText) -> dict[str, NDArray[Any]]:
        pixels = processor.images.normalize(np.stack([example.arrays["pixels"] for example in examples]))
        texts = [tokens for example in examples for tokens in image_texts.texts_of(example)]
        return {**processor.batch(texts), "pixel_values": pixels, **image_texts.marks(examples)}

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        logits_BB = model.outputs(**model.inputs_of(batch))["logits_per_image"].float()
        loss = image_texts.pairwise if model.network.config.model_type == SIGMOID else image_texts.contrastive
        return loss(logits_BB, batch), len(logits_BB)

    def evaluate(
        self, predictor: Predictor, rows: Sequence[Row], examples: Sequence[Example], processor: ImageText,
        labels: Sequence[str], *, generate: bool,
    ) -> Metrics:  # fmt: skip
        return image_texts.retrieval(predictor, examples, [row["image"] for row in rows], processor)

    def compared(self, outputs: Mapping[str, NDArray[np.float32]], example: Example) -> NDArray[np.float32]:
        return np.stack([outputs["image_embeds"], outputs["text_embeds"]])

    def decode(
        self, outputs: Mapping[str, NDArray[Any]], row: Row, example: Example, processor: ImageText, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return [{"label", "probability"}], the best first: of CLIP they come to 1, of SigLIP each text is judged alone."""
        found = image_texts.judged(outputs["logits_per_image"], row.get("labels") or labels, sigmoid=processor.sigmoid)
        return [{"label": label, "probability": probability} for label, probability in found]

    def answer_text(self, answer: Any) -> str:
        return probability_table(answer)

    def show(self, example: Example, processor: ImageText, labels: Sequence[str] = ()) -> str:
        from rich.markup import escape

        height, width = example.arrays["pixels"].shape[:2]
        text = processor.tokenizer.decode(example.arrays["tokens"].tolist(), skip_special_tokens=False)
        return f"{width} × {height} pixels ↔ [bold green]⟦{escape(text)}⟧[/bold green]"
