"""What tasks with one label of several share: labels, the loss, metrics by scikit-learn, and answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import MachineError
from edgelora.tasks.base import Example, GraphTensor, Metrics, Predictor, Row, Task
from edgelora.tasks.rows import kind

if TYPE_CHECKING:
    import torch

TOP = 3  # labels shown to people; JSON has all of them
BEST = 5  # those in a table


class Classification(Task):
    """A task whose examples have a `label`, int32 [], and whose network gives logits [B, labels]."""

    outputs = (GraphTensor("logits", "float32", ("batch_size", "num_labels")),)
    has_labels = True
    config = {"problem_type": "single_label_classification"}  # noqa: RUF012  # nobody writes to it
    higher_is_better = True

    def normalize(self, row: Row) -> Row:
        return {column.name: row[column.name] for column in self.columns if row.get(column.name) is not None}

    def problems(self, row: Row) -> list[str]:
        problems = self.input_problems(row)
        if "label" not in row:
            problems.append('"label" is missing')
        elif not isinstance(row["label"], str | int):  # bool is an int, and a fine label
            problems.append(f'"label" is a {kind(row["label"])}; a name or a whole number is wanted{self.other_task(row)}')
        elif isinstance(row["label"], str) and not row["label"].strip():
            problems.append('"label" is empty')
        return problems

    @abstractmethod
    def input_problems(self, row: Row) -> list[str]:
        """Return what is wrong with a row apart from its label."""

    def other_task(self, row: Row) -> str:
        """Return which task takes a label of this kind, for a message; "" where none does."""
        return ""

    def label(self, row: Row) -> str | None:
        value = row.get("label")
        return str(value).lower() if isinstance(value, bool) else None if value is None else str(value)

    def labels(self, names: Iterable[str]) -> list[str]:
        return sorted_labels(set(names))

    def label_index(self, row: Row, labels: Sequence[str]) -> NDArray[np.int32]:
        """Return the number of a row's label, int32 []: -1 where the row has none, or an unknown one."""
        label = self.label(row)
        return np.array(list(labels).index(label) if label is not None and label in labels else -1, dtype=np.int32)

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        import torch

        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits_BL = model.logits(**inputs)
        return torch.nn.functional.cross_entropy(logits_BL.float(), batch["labels"], reduction="sum"), len(batch["labels"])

    def evaluate(
        self,
        predictor: Predictor,
        rows: Sequence[Row],
        examples: Sequence[Example],
        processor: Any,
        labels: Sequence[str],
        *,
        generate: bool,
    ) -> Metrics:
        """Return loss (nats per row), accuracy, macro F1 and scikit-learn's report per label."""
        logits = predictor.logits(examples).astype(np.float64)
        truth = np.array([int(example.arrays["label"]) for example in examples])
        chosen = log_softmax(logits)[np.arange(len(truth)), truth]
        return {"loss": float(-chosen.mean()), **self.scores(logits, truth, labels)}

    def scores(self, logits: NDArray[np.float64], truth: NDArray[Any], labels: Sequence[str]) -> Metrics:
        """Return what logits [N, L] are worth against label numbers [N]."""
        return report(truth, logits.argmax(axis=1), labels)

    def baseline(self, examples: Sequence[Example], labels: Sequence[str]) -> Metrics:
        """Return the metrics of always answering the most frequent label of these examples."""
        truth = np.array([int(example.arrays["label"]) for example in examples])
        metrics = report(truth, np.full_like(truth, np.bincount(truth).argmax()), labels)
        return {name: metrics[name] for name in ("accuracy", "macro_f1", "mcc")}

    def decode(
        self, outputs: Mapping[str, NDArray[Any]], row: Row, example: Example, processor: Any, labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return [{"label", "probability"}], the most probable first."""
        return [{"label": label, "probability": probability} for label, probability in ranked(outputs["logits"], labels)]

    def answer_text(self, answer: Any) -> str:
        return "  ".join(f"{entry['label']} {entry['probability']:.1%}" for entry in answer[:TOP])


def sorted_labels(names: Collection[str]) -> list[str]:
    """Return the labels, sorted: as numbers where all are whole numbers, else as text."""
    numbers = all(label.removeprefix("-").isdecimal() for label in names)
    return sorted(names, key=lambda label: (int(label) if numbers else 0, label))


def ranked(logits: NDArray[Any], labels: Sequence[str]) -> list[tuple[str, float]]:
    """Return (label, probability) of one example's logits [labels], the most probable first."""
    probabilities = np.exp(log_softmax(logits.astype(np.float64)[None])[0])
    return [(labels[index], float(probabilities[index])) for index in np.argsort(-probabilities, kind="stable")]


def probability_table(answer: Sequence[Mapping[str, Any]]) -> str:
    """Return the best of [{"label", "probability"}], one on a line."""
    width = max(len(entry["label"]) for entry in answer[:BEST])
    return "\n".join(f"{entry['label']:<{width}}  {entry['probability']:6.1%}" for entry in answer[:BEST])


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log probabilities over the last axis, [N, L] → [N, L]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def report(truth: NDArray[Any], predicted: NDArray[Any], labels: Sequence[str]) -> Metrics:
    """Return accuracy, macro F1 and the report per label of indices [N]. Raises MachineError without scikit-learn.

    Macro F1 is over the labels that occur, as scikit-learn's default is: a sample of 64 rows has few of 77 labels.
    """
    try:
        from sklearn.metrics import classification_report, f1_score, matthews_corrcoef
    except ImportError:
        raise MachineError("these metrics need scikit-learn", hint='pip install "edgelora[train]"') from None
    indices = list(range(len(labels)))
    full = classification_report(truth, predicted, labels=indices, target_names=list(labels), output_dict=True, zero_division=0)
    return {
        "accuracy": float((truth == predicted).mean()),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
        "mcc": float(matthews_corrcoef(truth, predicted)),
        "report": {label: {name: float(value) for name, value in full[label].items()} for label in labels},
    }
