"""multi-label-classification: an encoder gives a text, or a pair of texts, any number of several labels.

Columns: `text`, `labels` (a list, which may be empty), and `text_pair` for pairs.
Batch and graph inputs: input_ids, attention_mask [B, S] int64 (token_type_ids too for pairs), labels [B, L] fp32 in training.
Graph output: logits [B, L] fp32; a label is given where its sigmoid is over one half.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import MachineError
from edgelora.tasks.base import Column, Example, Metrics, Predictor, Row
from edgelora.tasks.classified import Classification
from edgelora.tasks.rows import kind, parse_json_cells
from edgelora.tasks.texts import Texts

if TYPE_CHECKING:
    import torch


class MultiLabelClassification(Texts, Classification):
    name = "multi-label-classification"
    help = "An encoder that gives texts, or pairs of texts, any number of labels: topics, tags, faults."
    columns = (
        Column("text", "the text", required=True),
        Column("labels", "its labels: a list of names, which may be empty", required=True),
        Column("text_pair", "a second text, for pairs"),
    )
    shapes = (("text", "text_pair", "labels"), ("text", "labels"))
    config = {"problem_type": "multi_label_classification"}  # noqa: RUF012  # nobody writes to it
    metric = "micro_f1"
    metrics = ("loss", "micro_f1", "macro_f1", "subset_accuracy")
    fewest_labels = 1
    label_dtype = np.float32

    def normalize(self, row: Row) -> Row:
        return parse_json_cells(super().normalize(row), ("labels",))

    def problems(self, row: Row) -> list[str]:
        problems, given = self.asked_problems(row), row.get("labels")
        if not isinstance(given, list):
            found = "missing" if given is None else f"a {kind(given)}"
            return [*problems, f'"labels" is {found}; a list of names is wanted, as JSON where the file is CSV']
        wrong = [value for value in given if not isinstance(value, str | int) or not str(value).strip()]
        return problems + [f'"labels" has a {kind(value)} in it; names are wanted' for value in wrong[:1]]

    def input_problems(self, row: Row) -> list[str]:
        return self.asked_problems(row)

    def label_names(self, row: Row) -> Iterable[str]:
        return dict.fromkeys(str(label) for label in row.get("labels") or ())

    def target(self, row: Row, labels: Sequence[str]) -> NDArray[Any]:
        """Return uint8 [1, L]: 1 where the row has the label."""
        given = set(self.label_names(row))
        return np.array([[label in given for label in labels]], dtype=np.uint8)

    def target_text(self, target: NDArray[Any], labels: Sequence[str]) -> str:
        return ", ".join(label for label, wanted in zip(labels, target[0], strict=True) if wanted) or "none"

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Return the cross-entropy of each label, the mean of a row's summed over rows."""
        import torch

        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits_BL = model.logits(**inputs).float()
        losses_BL = torch.nn.functional.binary_cross_entropy_with_logits(logits_BL, batch["labels"], reduction="none")
        return losses_BL.mean(dim=1).sum(), len(logits_BL)

    def evaluate(
        self, predictor: Predictor, rows: Sequence[Row], examples: Sequence[Example], processor: Any, labels: Sequence[str],
        *, generate: bool,
    ) -> Metrics:  # fmt: skip
        """Return loss (nats per label and row), F1 of all labels together and on average, and the share of rows all right."""
        logits = predictor.logits(examples).astype(np.float64)
        truth = np.concatenate([example.arrays["label"] for example in examples])
        loss = np.logaddexp(0, logits) - truth * logits
        return {"loss": float(loss.mean()), **scores(truth, logits > 0, labels)}

    def baseline(self, examples: Sequence[Example], labels: Sequence[str]) -> Metrics:
        """Return the metrics of giving the labels that most rows have."""
        truth = np.concatenate([example.arrays["label"] for example in examples])
        metrics = scores(truth, np.broadcast_to(truth.mean(axis=0) > 0.5, truth.shape), labels)
        return {name: metrics[name] for name in self.metrics if name in metrics}

    def decode(
        self, outputs: Mapping[str, NDArray[Any]], row: Row, example: Example, processor: Any, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return [{"label", "probability"}], the most probable first; each probability is that label's own."""
        probabilities = 1 / (1 + np.exp(-outputs["logits"].astype(np.float64)))
        order = np.argsort(-probabilities, kind="stable")
        return [{"label": labels[index], "probability": float(probabilities[index])} for index in order]

    def answer_text(self, answer: Any) -> str:
        given = [entry for entry in answer if entry["probability"] > 0.5]
        return super().answer_text(answer) if given else f"(none; likeliest {super().answer_text(answer[:1])})"


def scores(truth: NDArray[Any], given: NDArray[Any], labels: Sequence[str]) -> Metrics:
    """Return scikit-learn's scores of labels [N, L] that are given against those that are true."""
    try:
        from sklearn.metrics import classification_report, f1_score
    except ImportError:
        raise MachineError("these metrics need scikit-learn", hint='pip install "edgelora[train]"') from None
    wanted, found = truth.astype(int), given.astype(int)
    indices = list(range(len(labels)))
    full = classification_report(wanted, found, labels=indices, target_names=list(labels), output_dict=True, zero_division=0)
    return {
        **{f"{kind}_f1": float(f1_score(wanted, found, average=kind, zero_division=0)) for kind in ("micro", "macro")},
        "subset_accuracy": float((wanted == found).all(axis=1).mean()),
        "report": {label: {name: float(value) for name, value in full[label].items()} for label in labels},
    }
