"""How well areas are found: counts of pixels by true and predicted class, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgelora.masks import UNSCORED, bilinear
from edgelora.tasks.base import Example, Metrics, Predictor
from edgelora.tasks.classified import log_softmax, sorted_labels

AT_ONCE = 8  # rows whose logits are in memory together


def scores(predictor: Predictor, examples: Sequence[Example], labels: Sequence[str]) -> Metrics:
    """Return loss (nats per pixel) and `overlap` of examples with a mask, their logits enlarged to it."""
    total, counts = 0.0, np.zeros((len(labels), len(labels)), np.int64)
    for start in range(0, len(examples), AT_ONCE):
        part = examples[start : start + AT_ONCE]
        for example, outputs in zip(part, predictor.outputs(part), strict=True):
            mask = example.arrays["mask"]
            height, width = mask.shape
            scored, logits = mask != UNSCORED, bilinear(outputs["logits"], (height, width))
            logits_PL, truth_P = logits[:, scored].T.astype(np.float64), mask[scored].astype(np.int64)
            total -= float(log_softmax(logits_PL)[np.arange(len(truth_P)), truth_P].sum())
            pairs = truth_P * len(labels) + logits_PL.argmax(1)
            counts += np.bincount(pairs, minlength=len(labels) ** 2).reshape(counts.shape)
    return {"loss": total / max(1, int(counts.sum())), **overlap(counts, labels)}


def scored_labels(names: set[str]) -> list[str]:
    """Return classes in order; of the values of masks 255 is left out, unless there are 0 and 255 alone."""
    values = all(name.isdecimal() for name in names)
    return sorted_labels(names - {str(UNSCORED)} if values and not names <= {"0", str(UNSCORED)} else names)


def majority(examples: Sequence[Example], labels: Sequence[str]) -> Metrics:
    """Return the metrics of the most frequent class everywhere."""
    masks = [example.arrays["mask"].ravel() for example in examples]
    pixels = np.bincount(np.concatenate(masks), minlength=UNSCORED + 1)[: len(labels)]
    counts = np.zeros((len(labels), len(labels)), np.int64)
    counts[:, pixels.argmax()] = pixels
    return {name: value for name, value in overlap(counts, labels).items() if name != "report"}


def overlap(counts: NDArray[np.int64], labels: Sequence[str]) -> Metrics:
    """Return mean IoU, Dice (each over the classes that occur) and pixel accuracy of pixels counted by [truth, prediction]."""
    same, truth, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    either = truth + predicted - same
    iou, dice = same / np.maximum(either, 1), 2 * same / np.maximum(truth + predicted, 1)
    occurs = either > 0
    rows = zip(labels, iou, dice, truth, strict=True)
    return {
        "mean_iou": float(iou[occurs].mean()),
        "dice": float(dice[occurs].mean()),
        "pixel_accuracy": float(same.sum() / max(1, counts.sum())),
        "report": {label: {"iou": float(i), "dice": float(d), "pixels": float(n)} for label, i, d, n in rows},
    }
