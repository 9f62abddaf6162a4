"""What tasks share whose source is a text.

Example: source int32 [S]. Batch, and inputs of the encoder's graph: input_ids, attention_mask [B, S] int64.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.tasks.base import TRIAL_TEXTS, Example, GraphTensor, Row
from edgelora.tasks.sequences import Written
from edgelora.tasks.texts import AXES
from edgelora.writing import Writing


class TextToText(Written):
    """A task from text to text. `prefix` is put before every source."""

    def open_processor(self, folder: Path) -> Writing:
        return Writing.from_folder(folder)

    def inputs(self, config: Mapping[str, Any], accepted: Collection[str]) -> tuple[GraphTensor, ...]:
        return tuple(GraphTensor(name, "int64", AXES) for name in ("input_ids", "attention_mask"))

    def prefix(self, processor: Writing) -> str:
        """Return what the model wants in front of a source."""
        return ""

    def source(self, row: Row, processor: Writing) -> tuple[dict[str, NDArray[Any]], int]:
        ids = processor.tokenizer.encode(self.prefix(processor) + row[self.answered], add_special_tokens=True)
        return {"source": np.array(ids, dtype=np.int32)}, len(ids)

    def sources(self, examples: Sequence[Example], processor: Writing) -> dict[str, NDArray[Any]]:
        sources = [example.arrays["source"] for example in examples]
        shape = len(sources), max(map(len, sources))
        batch = {
            "input_ids": np.full(shape, processor.pad, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
        }
        for row, source in enumerate(sources):
            batch["input_ids"][row, : len(source)] = source
            batch["attention_mask"][row, : len(source)] = 1
        return batch

    def truncate(self, example: Example, max_length: int) -> Example:
        """Return the example with source and target cut to `max_length` tokens each, their last one kept, which ends them."""
        kept = {name: cut(array, max_length) for name, array in example.arrays.items() if array.ndim}
        return Example({**kept, "length": np.array(sum(map(len, kept.values())), dtype=np.int32)})

    def example_problems(self, example: Example, max_length: int) -> list[str]:
        lengths = {name: len(array) for name, array in example.arrays.items() if array.ndim}
        over = {name: length for name, length in lengths.items() if length > max_length}
        return [f"{length} tokens of {name}, over the limit of {max_length}" for name, length in over.items()]

    def trial_examples(self, processor: Writing) -> list[Example]:
        """Return examples with the texts as their own targets."""
        texts = [part for text in TRIAL_TEXTS for part in (text, text[: len(text) // 2])]
        return [self.encode({self.answered: text, self.answer_column: text[::-1]}, processor, []) for text in texts]

    def show(self, example: Example, processor: Writing, labels: Sequence[str] = ()) -> str:
        from rich.markup import escape

        source = escape(processor.tokenizer.decode(example.arrays["source"].tolist(), skip_special_tokens=False))
        target = escape(processor.target.decode(example.arrays["target"].tolist(), skip_special_tokens=False))
        return f"{source} → [bold green]⟦{target}⟧[/bold green]"


def cut(ids: NDArray[np.int32], max_length: int) -> NDArray[np.int32]:
    return ids if len(ids) <= max_length else np.concatenate([ids[: max_length - 1], ids[-1:]])
