"""What tasks on an encoder of texts share: its graph inputs, its batches, and how a text is cut."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.tasks.base import Example, GraphTensor

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
    return Example({name: array[kept] if array.ndim else array for name, array in example.arrays.items()})
