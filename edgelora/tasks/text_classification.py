"""text-classification: an encoder with a classification head puts a text, or a pair of texts, into one of several labels.

Columns: `text`, `label`, and `text_pair` for pairs.
Batch and graph inputs: input_ids, attention_mask [B, S] int64 (token_type_ids too for pairs), labels [B] int64 in training.
Graph output: logits [B, labels] fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.tasks.base import Column, Example, Metrics, Predictor, Row, Task
from edgelora.tasks.classified import log_softmax, report
from edgelora.tasks.rows import kind, text_problems

if TYPE_CHECKING:
    import torch

    from edgelora.tokenizer import Tokenizer


class TextClassification(Task):
    name = "text-classification"
    help = "An encoder that puts texts, or pairs of texts, into labels: intents, topics, sentiment."
    columns = (
        Column("text", "the text", required=True),
        Column("label", "its label: a name or a whole number", required=True),
        Column("text_pair", "a second text, for pairs"),
    )
    shapes = (("text", "text_pair", "label"), ("text", "label"))
    auto_class = "AutoModelForSequenceClassification"
    families = "BERT, RoBERTa, DistilBERT, MiniLM, DeBERTa"
    metric = "accuracy"
    metrics = ("loss", "accuracy", "macro_f1")
    higher_is_better = True
    target_modules = "all-linear"
    learning_rate = 2e-3
    batch_size = 32  # rows are short: fewer would leave the matrix products small
    has_labels = True

    def normalize(self, row: Row) -> Row:
        return {column.name: row[column.name] for column in self.columns if row.get(column.name) is not None}

    def problems(self, row: Row) -> list[str]:
        problems = text_problems(row, ("text", "text_pair") if "text_pair" in row else ("text",))
        if "label" not in row:
            problems.append('"label" is missing')
        elif not isinstance(row["label"], str | int):  # bool is an int, and a fine label
            problems.append(f'"label" is a {kind(row["label"])}; a name or a whole number is wanted')
        elif isinstance(row["label"], str) and not row["label"].strip():
            problems.append('"label" is empty')
        return problems

    def label(self, row: Row) -> str | None:
        value = row.get("label")
        return str(value).lower() if isinstance(value, bool) else None if value is None else str(value)

    def labels(self, rows: Iterable[Row]) -> list[str]:
        """Return the labels, sorted: as numbers where all are whole numbers, else as text."""
        found = {label for row in rows if (label := self.label(row)) is not None}
        numbers = all(label.removeprefix("-").isdecimal() for label in found)
        return sorted(found, key=lambda label: (int(label) if numbers else 0, label))

    def encode(self, row: Row, tokenizer: Tokenizer, labels: Sequence[str]) -> Example:
        """Return ids int32 [T], label int32 [] (-1 where the row has none, or an unknown one) and for pairs types uint8 [T]."""
        ids, types = tokenizer.encode_pair(row["text"], row.get("text_pair"))
        label = self.label(row)
        index = list(labels).index(label) if label is not None and label in labels else -1
        arrays: dict[str, NDArray[Any]] = {"ids": np.array(ids, dtype=np.int32), "label": np.array(index, dtype=np.int32)}
        if "text_pair" in row:
            arrays["types"] = np.array(types, dtype=np.uint8)
        return Example(arrays)

    def truncate(self, example: Example, max_length: int) -> Example:
        """Cut the text and keep the last token, which closes it ([SEP])."""
        if len(example) <= max_length:
            return example
        kept = [*range(max_length - 1), len(example) - 1]
        return Example({name: array[kept] if array.ndim else array for name, array in example.arrays.items()})

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, NDArray[Any]]:
        shape = len(examples), max(map(len, examples))
        names = {"input_ids": pad_token_id, "attention_mask": 0}
        if "types" in examples[0].arrays:
            names["token_type_ids"] = 0
        batch = {name: np.full(shape, fill, dtype=np.int64) for name, fill in names.items()}
        for row, example in enumerate(examples):
            batch["input_ids"][row, : len(example)] = example.arrays["ids"]
            batch["attention_mask"][row, : len(example)] = 1
            if "token_type_ids" in batch:
                batch["token_type_ids"][row, : len(example)] = example.arrays["types"]
        return batch | {"labels": np.array([example.arrays["label"] for example in examples], dtype=np.int64)}

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
        tokenizer: Tokenizer,
        labels: Sequence[str],
        *,
        generate: bool,
    ) -> Metrics:
        """Return loss (nats per row), accuracy, macro F1 and scikit-learn's report per label."""
        logits = predictor.logits(examples).astype(np.float64)
        truth = np.array([int(example.arrays["label"]) for example in examples])
        chosen = log_softmax(logits)[np.arange(len(truth)), truth]
        return {"loss": float(-chosen.mean()), **report(truth, logits.argmax(axis=1), labels)}

    def baseline(self, examples: Sequence[Example], labels: Sequence[str]) -> Metrics:
        """Return the metrics of always answering the most frequent label of these examples."""
        truth = np.array([int(example.arrays["label"]) for example in examples])
        metrics = report(truth, np.full_like(truth, np.bincount(truth).argmax()), labels)
        return {name: metrics[name] for name in ("accuracy", "macro_f1")}

    def decode(self, logits: NDArray[Any], labels: Sequence[str]) -> list[tuple[str, float]]:
        """Return (label, probability) of one row's logits [labels], the most probable first."""
        probabilities = np.exp(log_softmax(logits.astype(np.float64)[None])[0])
        return [(labels[index], float(probabilities[index])) for index in np.argsort(-probabilities, kind="stable")]

    def show(self, example: Example, tokenizer: Tokenizer, labels: Sequence[str] = ()) -> str:
        from rich.markup import escape

        text = escape(tokenizer.decode(example.arrays["ids"].tolist(), skip_special_tokens=False))
        label = int(example.arrays["label"])
        return f"{text} → [bold green]⟦{escape(labels[label]) if label >= 0 else '?'}⟧[/bold green]"
