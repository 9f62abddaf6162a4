"""image-segmentation: a network that puts each pixel of a picture into one of several classes.

Columns: `image`, `mask` (the paths of a picture and of its mask, grey or indexed, of the same size), `values` (what the mask's
values mean: {"0": "background", "1": "cell", "2": null}; null is not scored). Without `values` the classes are the values, 255
is not scored, and 0 and 255 alone are two classes. A folder with images/ and masks/ has both, with classes.txt `values` too.
Batch and graph input: pixel_values fp32 [B, 3, H, W]; labels [B, H, W] int64 in training, 255 where nothing is scored.
Graph output: logits [B, labels, h, w] fp32, made as large as the picture by bilinear interpolation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora import drawing
from edgelora.errors import DataError
from edgelora.images import ImageProcessor, open_picture
from edgelora.masks import UNSCORED, class_map, classes, read_mask, resize_mask
from edgelora.tasks import areas
from edgelora.tasks.base import Column, Example, GraphTensor, Metrics, Predictor, Row
from edgelora.tasks.pictures import Pictures, trial_pictures
from edgelora.tasks.rows import kind, parse_json_cells

if TYPE_CHECKING:
    import torch

COMPARED = 256  # pixels of an example


class ImageSegmentation(Pictures):
    name = "image-segmentation"
    help = "A network that puts each pixel of a picture into a class: areas, masks."
    columns = (
        Column("image", "the path of a picture, relative to the file that names it", required=True),
        Column("mask", "the path of its mask: a grey or indexed picture of the same size", required=True),
        Column("values", 'what the mask\'s values mean: {"0": "background", "1": "cell"}; null is not scored'),
    )
    shapes = (("image", "mask"),)
    file_columns = ("image", "mask")
    auto_class = "AutoModelForSemanticSegmentation"
    outputs = (GraphTensor("logits", "float32", ("batch_size", "num_labels", "logits_height", "logits_width")),)
    families = "SegFormer, U-Net, MobileNetV2 and MobileViT with DeepLabV3"
    metric = "mean_iou"
    metrics = ("loss", "mean_iou", "dice", "pixel_accuracy")
    higher_is_better = True
    has_labels = True
    unused = ("mobilenet_v2.conv_1x1.convolution",)  # of the classifier alone
    target_modules = "all-linear"
    learning_rate = 2e-3
    batch_size = 4
    epochs = 10.0

    def normalize(self, row: Row) -> Row:
        found = {column.name: row[column.name] for column in self.columns if row.get(column.name) not in (None, "")}
        return parse_json_cells(found, ("values",))

    def problems(self, row: Row) -> list[str]:
        problems = self.file_problems(row)
        if not isinstance(row.get("values", {}), dict):
            problems.append(f'"values" is a {kind(row["values"])}; an object like {{"0": "background"}} is wanted')
        if not problems:
            try:
                self.label_names(row)
            except DataError as error:
                problems.append(error.message)
        return problems

    def label_names(self, row: Row) -> Iterable[str]:
        """Return the classes of `values`, else the mask's values. Raises DataError for what is no mask."""
        if "values" in row:
            return [str(name) for name in dict.fromkeys(row["values"].values()) if name is not None]
        return [str(value) for value in np.unique(read_mask(row["mask"]))]

    def labels(self, names: Iterable[str]) -> list[str]:
        return areas.scored_labels(set(names))

    def unknown(self, names: Iterable[str], labels: Collection[str]) -> list[str]:
        return sorted(set(names) - {*labels, str(UNSCORED)})

    def encode(self, row: Row, processor: ImageProcessor, labels: Sequence[str]) -> Example:
        """Return pixels, mask uint8 [H, W] (numbers of labels, or 255) and size int32 [2], height and width of the picture.

        Raises DataError for a mask of another size, or with a value that is no class.
        """
        picture = open_picture(row["image"])
        mask = np.full(picture.size[::-1], UNSCORED, np.uint8)
        if "mask" in row:
            values = row.get("values") or {label: label for label in labels}
            mask = class_map(read_mask(row["mask"]), mask.shape, values, labels)
        return self.example(processor, picture, mask)

    def example(self, processor: ImageProcessor, picture: Any, mask: NDArray[np.uint8]) -> Example:
        pixels = self.picture_arrays(processor.pixels(picture))
        return Example({**pixels, "mask": resize_mask(processor, mask), "size": np.array(picture.size[::-1], np.int32)})

    def trial_examples(self, processor: ImageProcessor) -> list[Example]:
        return [self.example(processor, p, np.full(p.size[::-1], UNSCORED, np.uint8)) for p in trial_pictures()]

    def collate(self, examples: Sequence[Example], processor: ImageProcessor) -> dict[str, NDArray[Any]]:
        pixels = np.stack([example.arrays["pixels"] for example in examples])
        masks = np.stack([example.arrays["mask"] for example in examples]).astype(np.int64)
        return {"pixel_values": processor.normalize(pixels), "labels": masks}

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        from torch.nn.functional import cross_entropy, interpolate

        labels_BHW = batch["labels"]
        logits = interpolate(model.logits(pixel_values=batch["pixel_values"]), size=labels_BHW.shape[-2:], mode="bilinear")
        return cross_entropy(logits, labels_BHW, ignore_index=UNSCORED, reduction="sum"), int((labels_BHW != UNSCORED).sum())

    def evaluate(
        self, predictor: Predictor, rows: Sequence[Row], examples: Sequence[Example], processor: Any, labels: Sequence[str],
        *, generate: bool,
    ) -> Metrics:  # fmt: skip
        return areas.scores(predictor, examples, labels)

    def baseline(self, examples: Sequence[Example], labels: Sequence[str]) -> Metrics:
        return areas.majority(examples, labels)

    def compared(self, outputs: Mapping[str, NDArray[np.float32]], example: Example) -> NDArray[np.float32]:
        """Return the logits of some pixels, evenly spread."""
        logits_LP = outputs["logits"].reshape(len(outputs["logits"]), -1)
        return np.ascontiguousarray(logits_LP[:, :: max(1, logits_LP.shape[1] // COMPARED)].T)

    def decode(
        self, outputs: Mapping[str, NDArray[Any]], row: Row, example: Example, processor: Any, labels: Sequence[str]
    ) -> dict[str, Any]:
        """Return {"size": [height, width], "areas": [{"label", "share", "counts" (drawing.run_lengths)}]}, largest first."""
        height, width = (int(side) for side in example.arrays["size"])
        found = classes(processor, outputs["logits"], (height, width))
        masks = sorted(((found == number, label) for number, label in enumerate(labels)), key=lambda entry: -entry[0].sum())
        listed = [{"label": label, "share": float(m.mean()), "counts": drawing.run_lengths(m)} for m, label in masks if m.any()]
        return {"size": [height, width], "areas": listed}

    def answer_text(self, answer: Any) -> str:
        return "\n".join(f"{area['share']:6.1%} of the picture: {area['label']}" for area in answer["areas"])

    def draw(self, picture: Any, answer: Any) -> Any:
        masks = {area["label"]: drawing.from_run_lengths(area["counts"], answer["size"]) for area in answer["areas"]}
        return drawing.with_masks(picture, masks)

    def show(self, example: Example, processor: Any, labels: Sequence[str] = ()) -> str:
        from rich.markup import escape

        mask = example.arrays["mask"]
        shares = [f"{escape(label)} {(mask == number).mean():.0%}" for number, label in enumerate(labels)]
        return f"{mask.shape[1]} × {mask.shape[0]} pixels → [bold green]⟦{', '.join(shares)}⟧[/bold green]"
