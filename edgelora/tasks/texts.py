"""What tasks on an encoder of texts share: its graph inputs, its batches, and how a text is cut."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgelora.tasks.base import Example, GraphTensor, Row, Task
from edgelora.tasks.rows import text_problems
from edgelora.tokenizer import Tokenizer

AXES = ("batch_size", "sequence_length")


def text_inputs(config: Mapping[str, Any], accepted: Collection[str]) -> tuple[GraphTensor, ...]:
    """Return input_ids and attention_mask; token_type_ids where there is more than one type: BERT's, not RoBERTa's."""
    has_types = int(config.get("type_vocab_size") or 0) > 1 and "token_type_ids" in accepted
    names = ("input_ids", "attention_mask", "token_type_ids")[: 3 if has_types else 2]
    return tuple(GraphTensor(name, "int64", AXES) for name in names)


def padded(examples: Sequence[Example], pad_token_id: int) -> dict[str, NDArray[Any]]:
    """Return input_ids and attention_mask [B, S] int64, padded on the right, and token_type_ids where examples have `types`."""
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
    return batch


def cut_before_last(example: Example, max_length: int) -> Example:
    """Return the example cut to `max_length` tokens, its last one kept, which closes it ([SEP])."""
    if len(example) <= max_length:
        return example
    kept = [*range(max_length - 1), len(example) - 1]
    arrays = example.arrays.items()
    return Example({name: array[kept] if array.ndim and len(array) == len(example) else array for name, array in arrays})


class Texts(Task):
    """A task on a text or a pair of texts; what is wanted of a row is its array `label`, of the same shape for all rows."""

    auto_class = "AutoModelForSequenceClassification"
    asked = ("text", "text_pair")
    families = "BERT, RoBERTa, DistilBERT, MiniLM, DeBERTa, ModernBERT"
    target_modules = "all-linear"
    learning_rate = 2e-3
    batch_size = 32  # rows are short: fewer would leave the matrix products small
    label_dtype: ClassVar[type[np.generic]] = np.int64  # in a batch

    @abstractmethod
    def target(self, row: Row, labels: Sequence[str]) -> NDArray[Any]:
        """Return what is wanted of a row."""

    @abstractmethod
    def target_text(self, target: NDArray[Any], labels: Sequence[str]) -> str:
        """Return what is wanted for people, "?" where nothing is."""

    def asked_problems(self, row: Row) -> list[str]:
        return text_problems(row, ("text", "text_pair") if "text_pair" in row else ("text",))

    def inputs(self, config: Mapping[str, Any], accepted: Collection[str]) -> tuple[GraphTensor, ...]:
        return text_inputs(config, accepted)

    def encode(self, row: Row, processor: Tokenizer, labels: Sequence[str]) -> Example:
        """Return ids int32 [T], label, and for pairs types uint8 [T]."""
        ids, types = processor.encode_pair(row["text"], row.get("text_pair"))
        arrays: dict[str, NDArray[Any]] = {"ids": np.array(ids, dtype=np.int32), "label": self.target(row, labels)}
        if "text_pair" in row:
            arrays["types"] = np.array(types, dtype=np.uint8)
        return Example(arrays)

    def truncate(self, example: Example, max_length: int) -> Example:
        return cut_before_last(example, max_length)

    def collate(self, examples: Sequence[Example], processor: Tokenizer) -> dict[str, NDArray[Any]]:
        labels = [example.arrays["label"].reshape(example.arrays["label"].shape[1:]) for example in examples]
        return padded(examples, processor.pad_token_id or 0) | {"labels": np.stack(labels).astype(self.label_dtype)}

    def show(self, example: Example, processor: Tokenizer, labels: Sequence[str] = ()) -> str:
        from rich.markup import escape

        text = escape(processor.decode(example.arrays["ids"].tolist(), skip_special_tokens=False))
        return f"{text} → [bold green]⟦{escape(self.target_text(example.arrays['label'], labels))}⟧[/bold green]"
