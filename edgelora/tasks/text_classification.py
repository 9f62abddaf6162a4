"""text-classification: an encoder with a classification head puts a text, or a pair of texts, into one of several labels.

Columns: `text`, `label`, and `text_pair` for pairs.
Batch and graph inputs: input_ids, attention_mask [B, S] int64 (token_type_ids too for pairs), labels [B] int64 in training.
Graph output: logits [B, labels] fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.tasks.base import Column, Example, GraphTensor, Row
from edgelora.tasks.classified import Classification
from edgelora.tasks.rows import text_problems
from edgelora.tasks.texts import cut_before_last, padded, text_inputs
from edgelora.tokenizer import Tokenizer


class TextClassification(Classification):
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
    target_modules = "all-linear"
    learning_rate = 2e-3
    batch_size = 32  # rows are short: fewer would leave the matrix products small

    def input_problems(self, row: Row) -> list[str]:
        return text_problems(row, ("text", "text_pair") if "text_pair" in row else ("text",))

    def inputs(self, config: Mapping[str, Any], accepted: Collection[str]) -> tuple[GraphTensor, ...]:
        return text_inputs(config, accepted)

    def encode(self, row: Row, processor: Tokenizer, labels: Sequence[str]) -> Example:
        """Return ids int32 [T], label int32 [] (-1 where the row has none, or an unknown one) and for pairs types uint8 [T]."""
        ids, types = processor.encode_pair(row["text"], row.get("text_pair"))
        arrays: dict[str, NDArray[Any]] = {"ids": np.array(ids, dtype=np.int32), "label": self.label_index(row, labels)}
        if "text_pair" in row:
            arrays["types"] = np.array(types, dtype=np.uint8)
        return Example(arrays)

    def truncate(self, example: Example, max_length: int) -> Example:
        return cut_before_last(example, max_length)

    def collate(self, examples: Sequence[Example], processor: Tokenizer) -> dict[str, NDArray[Any]]:
        labels = np.array([example.arrays["label"] for example in examples], dtype=np.int64)
        return padded(examples, processor.pad_token_id or 0) | {"labels": labels}

    def show(self, example: Example, processor: Tokenizer, labels: Sequence[str] = ()) -> str:
        from rich.markup import escape

        text = escape(processor.decode(example.arrays["ids"].tolist(), skip_special_tokens=False))
        label = int(example.arrays["label"])
        return f"{text} → [bold green]⟦{escape(labels[label]) if label >= 0 else '?'}⟧[/bold green]"
