"""What a task is: everything that differs between tasks and nothing else. numpy only: a device encodes and decodes too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from edgelora.tokenizer import Tokenizer

Row = dict[str, Any]
"""One row of data, its columns already mapped to our names."""

Metrics = dict[str, Any]
"""Metric name → float; `report` → {label: {precision, recall, f1-score, support}}."""


@dataclass(frozen=True)
class Column:
    name: str
    help: str
    required: bool = False


@dataclass(frozen=True)
class Example:
    """One encoded row: what the store holds. Arrays are scalars or one-dimensional."""

    arrays: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.arrays["ids"])


class Predictor(Protocol):
    """A model that can be scored: torch and ONNX Runtime both have one."""

    def losses(self, examples: Sequence[Example]) -> list[tuple[float, int]]:
        """Return the summed negative log-likelihood and the number of supervised tokens of each example."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int]) -> list[list[int]]:
        """Continue each prompt greedily, up to a stop token (not returned)."""
        ...

    def logits(self, examples: Sequence[Example]) -> NDArray[np.float32]:
        """Return the logits [examples, labels]."""
        ...


class Task(ABC):
    name: ClassVar[str]
    help: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]
    shapes: ClassVar[tuple[tuple[str, ...], ...]]
    """The sets of columns that a row may have; the first that fits is the one."""
    auto_class: ClassVar[str]
    families: ClassVar[str]
    """Model families, for people."""
    metric: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    higher_is_better: ClassVar[bool]
    target_modules: ClassVar[str]
    learning_rate: ClassVar[float]
    batch_size: ClassVar[int] = 8
    epochs: ClassVar[float] = 3.0
    has_labels: ClassVar[bool] = False

    def matches(self, columns: set[str]) -> bool:
        """Tell whether rows with these columns can be this task's."""
        return any(columns.issuperset(shape) for shape in self.shapes)

    @abstractmethod
    def normalize(self, row: Row) -> Row:
        """Return the row with this task's columns only, JSON in cells parsed. Never fails: `problems` says what is wrong."""

    @abstractmethod
    def problems(self, row: Row) -> list[str]:
        """Return what is wrong with a normalized row, [] when nothing is."""

    @abstractmethod
    def encode(self, row: Row, tokenizer: Tokenizer, labels: Sequence[str]) -> Example:
        """Return the arrays of a row without problems. Raises DataError when the tokenizer's template refuses it."""

    def truncate(self, example: Example, max_length: int) -> Example:
        """Return the example cut to `max_length` tokens."""
        return Example({name: array[:max_length] if array.ndim else array for name, array in example.arrays.items()})

    def example_problems(self, example: Example, max_length: int) -> list[str]:
        """Return what is wrong with an encoded row."""
        if len(example) > max_length:
            return [f"{len(example)} tokens, over the limit of {max_length}"]
        return []

    def labels(self, rows: Iterable[Row]) -> list[str]:
        """Return the labels of the rows in their one order; [] where the task has none."""
        return []

    def label(self, row: Row) -> str | None:
        """Return the label of a row, which stratifies the validation split; None where the task has none."""
        return None

    @abstractmethod
    def collate(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, NDArray[Any]]:
        """Return the arrays of one batch."""

    @abstractmethod
    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Return the summed loss (a scalar with a gradient) and the number of supervised items that it sums."""

    @abstractmethod
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
        """Return the task's metrics on rows and their examples; `generate` adds those that need generated text."""

    def baseline(self, examples: Sequence[Example], labels: Sequence[str]) -> Metrics:
        """Return the metrics of the majority answer; {} where there is none."""
        return {}

    @abstractmethod
    def show(self, example: Example, tokenizer: Tokenizer, labels: Sequence[str] = ()) -> str:
        """Return rich markup of the row as the model sees it, what is trained on marked (in ⟦ ⟧ too, without colours)."""
