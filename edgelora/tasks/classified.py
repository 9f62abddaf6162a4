"""Metrics of labels against the truth, by scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import MachineError
from edgelora.tasks.base import Metrics


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log probabilities over the last axis, [N, L] → [N, L]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def report(truth: NDArray[Any], predicted: NDArray[Any], labels: Sequence[str]) -> Metrics:
    """Return accuracy, macro F1 and the report per label of indices [N]. Raises MachineError without scikit-learn.

    Macro F1 is over the labels that occur, as scikit-learn's default is: a sample of 64 rows has few of 77 labels.
    """
    try:
        from sklearn.metrics import classification_report, f1_score
    except ImportError:
        raise MachineError("these metrics need scikit-learn", hint='pip install "edgelora[train]"') from None
    indices = list(range(len(labels)))
    full = classification_report(truth, predicted, labels=indices, target_names=list(labels), output_dict=True, zero_division=0)
    return {
        "accuracy": float((truth == predicted).mean()),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
        "report": {label: {name: float(value) for name, value in full[label].items()} for label in labels},
    }
