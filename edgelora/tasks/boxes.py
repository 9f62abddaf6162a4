"""Boxes: from what detectors put out to corners in pixels, and how well they are found."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import MachineError
from edgelora.tasks.base import Example, Metrics, Predictor
from edgelora.tasks.classified import log_softmax

Found = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]
"""Scores [N], label numbers [N], boxes [N, 4]."""

AT_ONCE = 16  # rows whose outputs are in memory together
L1_WEIGHT, GIOU_WEIGHT = 5.0, 2.0  # of DETR's loss (arXiv 2005.12872, appendix A.4)


def corners(boxes: NDArray[Any]) -> NDArray[Any]:
    """Return [left, top, right, bottom] of [centre x, centre y, width, height], [N, 4] each."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([centre - half, centre + half], axis=1)


def centres(boxes: NDArray[Any]) -> NDArray[Any]:
    """Return [centre x, centre y, width, height] of [left, top, right, bottom], [N, 4] each."""
    return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)


def log_scores(logits: NDArray[np.float32], num_labels: int) -> NDArray[np.float64]:
    """Return the log probabilities of the labels [queries, labels]: of a softmax with one more output for no object (DETR,
    YOLOS), else of a sigmoid for each label (RT-DETR, D-FINE)."""
    wide = logits.astype(np.float64)
    if wide.shape[1] == num_labels + 1:
        return log_softmax(wide)[:, :-1]
    return -np.logaddexp(0, -wide)


def detections(logits: NDArray[np.float32], boxes: NDArray[np.float32], num_labels: int, size: NDArray[Any]) -> Found:
    """Return what was found in a picture of `size` (height, width), the best first, boxes as corners in pixels.

    As transformers' post_process_object_detection: of a softmax the best label of each query, of sigmoids as many pairs of
    query and label as there are queries.
    """
    scores = np.exp(log_scores(logits, num_labels)).astype(np.float32)
    if logits.shape[1] == num_labels + 1:
        labels = scores.argmax(1)
        best, queries = scores.max(1), np.arange(len(scores))
    else:
        chosen = np.argsort(-scores.ravel(), kind="stable")[: len(scores)]
        queries, labels = np.divmod(chosen, num_labels)
        best = scores.ravel()[chosen]
    order = np.argsort(-best, kind="stable")
    height, width = size
    scaled = corners(boxes) * np.array([width, height, width, height], np.float32)
    return best[order], labels[order], scaled[queries[order]]


def generalized_iou(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """Return the generalized IoU [N, M] of corners [N, 4] and [M, 4] (arXiv 1902.09630)."""
    a, b = first[:, None], second[None]
    inner = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(-1)
    outer = (np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner
    tiny = np.finfo(np.float64).tiny
    return np.asarray(inner / np.maximum(union, tiny) - (outer - union) / np.maximum(outer, tiny))


def matched_loss(logits: NDArray[np.float32], boxes: NDArray[np.float32], example: Example, num_labels: int) -> float:
    """Return the summed loss of an example's objects, each with the query that is matched to it at the least total.

    An object's loss is DETR's without the term for queries of no object: -log p(label) + 5 · L1 + 2 · (1 - GIoU).
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MachineError("this metric needs SciPy", hint='pip install "edgelora[train]"') from None
    truth, labels = example.arrays["boxes"].astype(np.float64), example.arrays["classes"]
    found = boxes.astype(np.float64)
    distance = np.abs(found[:, None] - truth[None]).sum(-1)
    overlap = generalized_iou(corners(found), corners(truth))
    costs = -log_scores(logits, num_labels)[:, labels] + L1_WEIGHT * distance + GIOU_WEIGHT * (1 - overlap)
    return float(costs[linear_sum_assignment(costs)].sum())


def scores(predictor: Predictor, examples: Sequence[Example], labels: Sequence[str]) -> Metrics:
    """Return the loss per object and COCO's average precision of examples."""
    total, count, found = 0.0, 0, []
    for start in range(0, len(examples), AT_ONCE):
        part = examples[start : start + AT_ONCE]
        for example, outputs in zip(part, predictor.outputs(part), strict=True):
            given = outputs["logits"], outputs["pred_boxes"]
            found.append(detections(*given, len(labels), example.arrays["size"]))
            total += matched_loss(*given, example, len(labels))
            count += len(example.arrays["classes"])
    return {"loss": total / max(1, count), **average_precision(found, examples, labels)}


def average_precision(found: Sequence[Found], examples: Sequence[Example], labels: Sequence[str]) -> Metrics:
    """Return COCO's mean average precision as pycocotools has it: over IoU 0.50 to 0.95, at 0.50 and at 0.75."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise MachineError("this metric needs pycocotools", hint='pip install "edgelora[train]"') from None
    truth: list[dict[str, Any]] = []
    for number, example in enumerate(examples):
        height, width = example.arrays["size"]
        scaled = corners(example.arrays["boxes"]) * np.array([width, height, width, height], np.float32)
        for label, box in zip(example.arrays["classes"], scaled, strict=True):
            truth.append({**entry(number, int(label), box), "id": len(truth) + 1, "iscrowd": 0})
    guesses = [
        {**entry(number, int(label), box), "score": float(score)}
        for number, parts in enumerate(found)
        for score, label, box in zip(*parts, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        known = COCO()
        known.dataset = {
            "images": [{"id": number} for number in range(len(examples))],
            "categories": [{"id": number, "name": label} for number, label in enumerate(labels)],
            "annotations": truth,
        }
        known.createIndex()
        scored = COCOeval(known, known.loadRes(guesses) if guesses else COCO(), "bbox")
        if not guesses:
            return {"map": 0.0, "map_50": 0.0, "map_75": 0.0}
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    precision = scored.eval["precision"][..., 0, -1]  # [IoU, recall, label], boxes of every size, the best 100
    per_label = {
        label: {
            "map": mean(precision[..., number]),
            "map_50": mean(precision[0, :, number]),
            "objects": float(sum(entry["category_id"] == number for entry in truth)),
        }
        for number, label in enumerate(labels)
    }
    names = zip(("map", "map_50", "map_75"), scored.stats[:3], strict=True)
    return {**{name: max(0.0, float(value)) for name, value in names}, "report": per_label}


def mean(precision: NDArray[Any]) -> float:
    """Return the mean of precisions, of which -1 stands for a label that does not occur."""
    real = precision[precision > -1]
    return float(real.mean()) if real.size else 0.0


def entry(image: int, label: int, box: NDArray[Any]) -> dict[str, Any]:
    """Return an object as COCO writes it: left, top, width, height."""
    left, top, right, bottom = (float(side) for side in box)
    width, height = right - left, bottom - top
    return {"image_id": image, "category_id": label, "bbox": [left, top, width, height], "area": width * height}
