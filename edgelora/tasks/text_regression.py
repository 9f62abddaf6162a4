"""text-regression: an encoder gives a text, or a pair of texts, a number: ratings, similarity, prices.

Columns: `text`, `score`, and `text_pair` for pairs.
Batch and graph inputs: input_ids, attention_mask [B, S] int64 (token_type_ids too for pairs), labels [B] fp32 in training.
Graph output: logits [B, 1] fp32, the number.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import MachineError
from edgelora.tasks.base import Column, Example, GraphTensor, Metrics, Predictor, Row
from edgelora.tasks.rows import kind
from edgelora.tasks.texts import Texts

if TYPE_CHECKING:
    import torch

LARGEST = 100.0  # beyond it the head would be learning the numbers' size for most of a run


class TextRegression(Texts):
    name = "text-regression"
    help = "An encoder that gives texts, or pairs of texts, a number: ratings, similarity."
    columns = (
        Column("text", "the text", required=True),
        Column("score", "its number", required=True),
        Column("text_pair", "a second text, for pairs"),
    )
    shapes = (("text", "text_pair", "score"), ("text", "score"))
    config = {"problem_type": "regression"}  # noqa: RUF012  # nobody writes to it
    outputs = (GraphTensor("logits", "float32", ("batch_size", 1)),)
    has_labels = True  # one: the head's only output
    fewest_labels = 1
    metric = "pearson"
    metrics = ("loss", "pearson", "spearman", "mae")
    higher_is_better = True
    label_dtype = np.float32

    def normalize(self, row: Row) -> Row:
        found = {column.name: row[column.name] for column in self.columns if row.get(column.name) is not None}
        if isinstance(found.get("score"), str):  # of a CSV cell
            with contextlib.suppress(ValueError):
                found["score"] = float(found["score"])
        return found

    def problems(self, row: Row) -> list[str]:
        problems, score = self.asked_problems(row), row.get("score")
        if not isinstance(score, int | float) or isinstance(score, bool):
            found = "missing" if score is None else f"a {kind(score)}"
            problems.append(f'"score" is {found}; a number is wanted')
        elif not math.isfinite(score):
            problems.append(f'"score" is {score}; a finite number is wanted')
        elif abs(score) > LARGEST:
            problems.append(f'"score" is {score}; divide all of them so that they are within -{LARGEST:g} and {LARGEST:g}')
        return problems

    def labels(self, names: Iterable[str]) -> list[str]:
        return ["LABEL_0"]  # transformers' own name, so that a trained head is known

    def target(self, row: Row, labels: Sequence[str]) -> NDArray[Any]:
        """Return fp32 []."""
        return np.array(row.get("score", math.nan), dtype=np.float32)

    def target_text(self, target: NDArray[Any], labels: Sequence[str]) -> str:
        return "?" if math.isnan(float(target)) else f"{float(target):g}"

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        found_B = model.logits(**inputs).float().squeeze(-1)
        return (found_B - batch["labels"]).square().sum(), len(found_B)

    def evaluate(
        self, predictor: Predictor, rows: Sequence[Row], examples: Sequence[Example], processor: Any, labels: Sequence[str],
        *, generate: bool,
    ) -> Metrics:  # fmt: skip
        """Return loss (mean squared error), Pearson's and Spearman's correlation, and the mean absolute error."""
        return numbers(predictor.logits(examples)[:, 0], truth_of(examples))

    def baseline(self, examples: Sequence[Example], labels: Sequence[str]) -> Metrics:
        """Return the errors of always answering the mean."""
        truth = truth_of(examples)
        return {name: value for name, value in numbers(np.full_like(truth, truth.mean()), truth).items() if name != "loss"}

    def decode(
        self, outputs: Mapping[str, NDArray[Any]], row: Row, example: Example, processor: Any, labels: Sequence[str]
    ) -> dict[str, float]:
        """Return {"score"}."""
        return {"score": float(outputs["logits"][0])}

    def answer_text(self, answer: Any) -> str:
        return f"{answer['score']:.4g}"


def truth_of(examples: Sequence[Example]) -> NDArray[np.float64]:
    return np.array([float(example.arrays["label"]) for example in examples])


def numbers(found: NDArray[Any], truth: NDArray[np.float64]) -> Metrics:
    """Return the errors and correlations of numbers [N]; those of a constant are 0. Raises MachineError without scipy."""
    try:
        from scipy.stats import pearsonr, spearmanr
    except ImportError:
        raise MachineError("these metrics need scipy", hint='pip install "edgelora[train]"') from None
    found = found.astype(np.float64)
    varied = len(truth) > 1 and np.ptp(found) > 0 and np.ptp(truth) > 0
    return {
        "loss": float(np.square(found - truth).mean()),
        "pearson": float(pearsonr(found, truth).statistic) if varied else 0.0,
        "spearman": float(spearmanr(found, truth).statistic) if varied else 0.0,
        "mae": float(np.abs(found - truth).mean()),
    }
