"""object-detection: a network that finds objects of several labels in a picture, each with its box.

Columns: `image` (the path of a picture), `objects`: [{"label": "cat", "box": [left, top, right, bottom]}, …] in pixels, or as
the datasets library has it {"bbox": [[left, top, width, height], …], "category": [ … ]}. COCO, VOC and YOLO files have both.
Batch and graph input: pixel_values fp32 [B, 3, H, W], and for DETR pixel_mask int64 [B, H, W], 0 where a batch is padded.
In training: labels int64 [B, M], -1 where there are fewer; labels_boxes fp32 [B, M, 4], centre, width and height in shares.
Graph outputs: logits fp32 [B, queries, labels (+ 1 for none)]; pred_boxes fp32 [B, queries, 4], as labels_boxes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora import drawing
from edgelora.images import ImageProcessor, open_picture
from edgelora.tasks import boxes
from edgelora.tasks.base import Column, Example, GraphTensor, Metrics, Predictor, Row
from edgelora.tasks.classified import sorted_labels
from edgelora.tasks.object_rows import as_objects, box_shares, object_problems, padded_pictures
from edgelora.tasks.pictures import TRACED, Pictures, trial_pictures
from edgelora.tasks.rows import parse_json_cells

if TYPE_CHECKING:
    import torch

SURE = 0.5  # score from which an object counts as found


class ObjectDetection(Pictures):
    name = "object-detection"
    help = "A network that finds objects in pictures: a label, a score and a box for each."
    columns = (
        Column("image", "the path of a picture, relative to the file that names it", required=True),
        Column("objects", 'its objects: [{"label": "cat", "box": [left, top, right, bottom]}], in pixels', required=True),
    )
    shapes = (("image", "objects"),)
    auto_class = "AutoModelForObjectDetection"
    outputs = (
        GraphTensor("logits", "float32", ("batch_size", "num_queries", "num_labels")),
        GraphTensor("pred_boxes", "float32", ("batch_size", "num_queries", 4)),
    )
    head_parts = ("class_embed", "bbox_embed", "enc_score_head", "enc_bbox_head", "denoising_class_embed")
    # DETR's queries begin as zero, so that all that its first layer attends to is the same.
    unused = tuple(f"decoder.layers.0.self_attn.{name}_proj" for name in "qkvo")
    families = "YOLOS, DETR, RT-DETR"
    metric = "map"
    metrics = ("loss", "map", "map_50", "map_75")
    higher_is_better = True
    has_labels = True
    fewest_labels = 1
    target_modules = "all-linear"
    learning_rate = 5e-4
    batch_size = 4
    epochs = 20.0

    def normalize(self, row: Row) -> Row:
        found = {column.name: row[column.name] for column in self.columns if row.get(column.name) is not None}
        return as_objects(parse_json_cells(found, ("objects",)))

    def problems(self, row: Row) -> list[str]:
        return self.file_problems(row) + object_problems(row)

    def label_names(self, row: Row) -> Iterable[str]:
        return dict.fromkeys(str(entry["label"]) for entry in row["objects"])

    def labels(self, names: Iterable[str]) -> list[str]:
        return sorted_labels(set(names))

    def inputs(self, config: Mapping[str, Any], accepted: Collection[str]) -> tuple[GraphTensor, ...]:
        """The side lengths are those that the processor gives, where it gives all pictures the same. The mask's are its own:
        DETR resizes it to its features, and transformers.js gives 64 × 64 for whole pictures."""
        height, width = config.get("input_size") or ("height", "width")
        pixels = GraphTensor("pixel_values", "float32", ("batch_size", 3, height, width), TRACED)
        if "pixel_mask" not in accepted or "position_embedding_type" not in config:
            return (pixels,)
        own = {"mask_height": 48, "mask_width": 48}
        return pixels, GraphTensor("pixel_mask", "int64", ("batch_size", *own), own)

    def encode(self, row: Row, processor: ImageProcessor, labels: Sequence[str]) -> Example:
        """Return pixels uint8 [H · W, 3] and their shape int32 [2], classes int32 [M], boxes fp32 [M, 4] and the picture's size
        int32 [2]. Raises DataError for a box that leaves the picture."""
        picture, objects = open_picture(row["image"]), [e for e in row.get("objects", []) if str(e["label"]) in labels]
        classes = np.array([labels.index(str(entry["label"])) for entry in objects], np.int32)
        return self.example(processor, picture, classes, box_shares(objects, *picture.size))

    def example(
        self, processor: ImageProcessor, picture: Any, classes: NDArray[np.int32], shares: NDArray[np.float32]
    ) -> Example:
        pixels = processor.pixels(picture)
        arrays = {"shape": np.array(pixels.shape[:2], np.int32), "size": np.array(picture.size[::-1], np.int32)}
        flat = {**self.picture_arrays(pixels), "pixels": pixels.reshape(-1, 3)}
        return Example({**flat, **arrays, "classes": classes, "boxes": shares})

    def trial_examples(self, processor: ImageProcessor) -> list[Example]:
        nothing = np.zeros(0, np.int32), np.zeros((0, 4), np.float32)
        return [self.example(processor, picture, *nothing) for picture in trial_pictures()]

    def collate(self, examples: Sequence[Example], processor: ImageProcessor) -> dict[str, NDArray[Any]]:
        return padded_pictures(examples, processor)

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Return transformers' own loss of the class, which is one per object, and the number of objects."""
        inputs = {name: tensor for name, tensor in batch.items() if not name.startswith("labels")}
        pairs = zip(batch["labels"], batch["labels_boxes"], strict=True)
        truth = [{"class_labels": classes[classes >= 0], "boxes": shares[classes >= 0]} for classes, shares in pairs]
        count = max(1, sum(len(entry["class_labels"]) for entry in truth))
        return model.outputs(**inputs, labels=truth)["loss"] * count, count

    def evaluate(
        self, predictor: Predictor, rows: Sequence[Row], examples: Sequence[Example], processor: Any, labels: Sequence[str],
        *, generate: bool,
    ) -> Metrics:  # fmt: skip
        return boxes.scores(predictor, examples, labels)

    def compared(self, outputs: Mapping[str, NDArray[np.float32]], example: Example) -> NDArray[np.float32]:
        """Return the logits of the queries, which are a set, in the order of their best score."""
        logits = outputs["logits"]
        return np.ascontiguousarray(logits[np.argsort(-logits.max(1), kind="stable")])

    def decode(
        self, outputs: Mapping[str, NDArray[Any]], row: Row, example: Example, processor: Any, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return [{"label", "score", "box": [left, top, right, bottom]}] in pixels, the surest first."""
        found = boxes.detections(outputs["logits"], outputs["pred_boxes"], len(labels), example.arrays["size"])
        return [
            {"label": labels[int(label)], "score": float(score), "box": [round(float(side), 2) for side in box]}
            for score, label, box in zip(*found, strict=True)
            if score > SURE
        ]

    def answer_text(self, answer: Any) -> str:
        width = max((len(entry["label"]) for entry in answer), default=0)
        shown = "\n".join(f"{e['label']:<{width}}  {e['score']:6.1%}  {[round(side) for side in e['box']]}" for e in answer)
        return shown or "nothing found"

    def draw(self, picture: Any, answer: Any) -> Any:
        return drawing.with_boxes(picture, [(e["label"], f"{e['label']} {e['score']:.0%}", e["box"]) for e in answer])

    def show(self, example: Example, processor: Any, labels: Sequence[str] = ()) -> str:
        from rich.markup import escape

        counts = np.bincount(example.arrays["classes"], minlength=len(labels))
        height, width = example.arrays["size"]
        listed = ", ".join(f"{count} {escape(label)}" for count, label in zip(counts, labels, strict=False) if count)
        return f"{width} × {height} pixels → [bold green]⟦{listed}⟧[/bold green]"
