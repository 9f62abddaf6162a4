"""text-classification: an encoder with a classification head puts a text, or a pair of texts, into one of several labels.

Columns: `text`, `label`, and `text_pair` for pairs.
Batch and graph inputs: input_ids, attention_mask [B, S] int64 (token_type_ids too for pairs), labels [B] int64 in training.
Graph output: logits [B, labels] fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from edgelora.tasks.base import Column, Row
from edgelora.tasks.classified import Classification
from edgelora.tasks.texts import Texts


class TextClassification(Texts, Classification):
    name = "text-classification"
    help = "An encoder that puts texts, or pairs of texts, into labels: intents, topics, sentiment."
    columns = (
        Column("text", "the text", required=True),
        Column("label", "its label: a name or a whole number", required=True),
        Column("text_pair", "a second text, for pairs"),
    )
    shapes = (("text", "text_pair", "label"), ("text", "label"))
    metric = "accuracy"
    metrics = ("loss", "accuracy", "macro_f1", "mcc")

    def input_problems(self, row: Row) -> list[str]:
        return self.asked_problems(row)

    def other_task(self, row: Row) -> str:
        if isinstance(row["label"], list):
            return ": several labels are --task multi-label-classification --columns labels=label"
        return ": numbers are --task text-regression --columns score=label" if isinstance(row["label"], float) else ""

    def target(self, row: Row, labels: Sequence[str]) -> NDArray[Any]:
        """Return int32 []: -1 where the row has no label, or an unknown one."""
        return self.label_index(row, labels)

    def target_text(self, target: NDArray[Any], labels: Sequence[str]) -> str:
        return labels[int(target)] if int(target) >= 0 else "?"
