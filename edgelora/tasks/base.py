"""What a task is: everything that differs between tasks and nothing else. numpy only: a device encodes and decodes too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import SettingsError
from edgelora.search import Search
from edgelora.tasks.rows import json_row, text_problems
from edgelora.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]
"""One row of data, its columns already mapped to our names."""

Metrics = dict[str, Any]
"""Metric name → float; `report` → {label: {precision, recall, f1-score, support}}."""


TRIAL_TEXTS = (
    "The quick brown fox jumps over the lazy dog. 1, 2, 3: what comes next?",
    "Turn the lights in the kitchen to 40 percent and wake me at half past six.",
    '{"name": "Loch Fyne", "food": "Japanese", "family friendly": true}',
)


@dataclass(frozen=True)
class Column:
    name: str
    help: str
    required: bool = False


@dataclass(frozen=True)
class GraphTensor:
    """An input or output of the ONNX graph. shape: sizes, and names of axes that may have any size; smallest: the sizes that
    named axes are traced with, where 2 is too small for the network."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[str | int, ...]
    smallest: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """One encoded row: what the store holds. An array has the type, rank and all sizes but the first of the other rows'.

    The length, which batches and the planner go by, is that of "ids", else the number in "length", else 1. "alone" is 1 where
    padding would change the outputs: such a row is scored in a batch of its own.
    """

    arrays: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        if "ids" in self.arrays:
            return len(self.arrays["ids"])
        return int(self.arrays.get("length", 1))

    @property
    def alone(self) -> bool:
        return bool(self.arrays.get("alone", False))

    @property
    def answer_length(self) -> int | None:
        """The tokens of an answer that is trained on: "target", or the supervised ones; None where it is no text."""
        if "target" in self.arrays:
            return len(self.arrays["target"])
        return int(self.arrays["supervised"].sum()) if "supervised" in self.arrays else None


class Predictor(Protocol):
    """A model that can be scored: torch and ONNX Runtime both have one."""

    def losses(self, examples: Sequence[Example]) -> list[tuple[float, int]]:
        """Return the summed negative log-likelihood and the number of supervised tokens of each example."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int]) -> list[list[int]]:
        """Continue each prompt greedily, up to a stop token (not returned)."""
        ...

    def write(self, examples: Sequence[Example], search: Search) -> list[list[int]]:
        """Return what a decoder writes about each encoded example, without the token that ends it."""
        ...

    def outputs(self, examples: Sequence[Example]) -> list[dict[str, NDArray[np.float32]]]:
        """Return the outputs that the task names, of each example by name; those of padding come last."""
        ...

    def logits(self, examples: Sequence[Example]) -> NDArray[np.float32]:
        """Return the logits [examples, labels] of a task that puts each example into one of several labels."""
        ...


class Task(ABC):
    """What a row is, how it is encoded, what is learned from it and how well, and how an answer is read off the outputs.

    `processor` is what `open_processor` returns. Keys of a batch that begin with "labels" are for the loss alone; the others
    are the network's inputs.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]
    shapes: ClassVar[tuple[tuple[str, ...], ...]]
    """The sets of columns that a row may have; the first that fits is the one."""
    file_columns: ClassVar[tuple[str, ...]] = ()
    """Those that hold a path, relative to the file or folder that the rows come from."""
    auto_class: ClassVar[str]
    """The class of transformers that the network is; "AutoModelForCausalLM" is built by models/decoder.py instead."""
    unit: ClassVar[str] = "tokens"
    """What an example's length counts."""
    answered: ClassVar[str] = "text"
    """The column that an INPUT of `edgelora run` is."""
    asked: ClassVar[tuple[str, ...]] = ()
    """The columns of a row that is answered; where there are none, `answered` alone."""
    outputs: ClassVar[tuple[GraphTensor, ...]] = ()
    """The graph's outputs, by the names that transformers' class gives them."""
    writes: ClassVar[bool] = False
    """Whether a decoder writes the answer about what an encoder has read (tasks/sequences.py)."""
    written_metric: ClassVar[str] = "exact_match"
    """A metric that takes generated answers, where the task has such."""
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
    keeps_labels: ClassVar[bool] = False
    """Whether labels of training rows are kept for answers by a network that has none of its own."""
    config: ClassVar[Mapping[str, Any]] = {}
    """What config.json says of the task beside its labels."""
    fewest_labels: ClassVar[int] = 2
    head_parts: ClassVar[tuple[str, ...]] = ()
    """Names of modules inside of a network's base that are trained whole, as the head beside it is."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Ends of the paths of layers that get no adapter: what they put out is not read, or what they are given is nothing."""

    def matches(self, columns: set[str]) -> bool:
        """Tell whether rows with these columns can be this task's."""
        return any(columns.issuperset(shape) for shape in self.shapes)

    def for_model(self, config: Mapping[str, Any]) -> str:
        """Return the task that rows of this one are with the model of a config.json: itself, or one with the same columns."""
        return self.name

    @abstractmethod
    def normalize(self, row: Row) -> Row:
        """Return the row with this task's columns only, JSON in cells parsed. Never fails: `problems` says what is wrong."""

    @abstractmethod
    def problems(self, row: Row) -> list[str]:
        """Return what is wrong with a normalized row, [] when nothing is."""

    def open_processor(self, folder: Path) -> Any:
        """Return what turns rows into arrays, from a model, run, merged or bundle folder."""
        return Tokenizer.from_folder(folder)

    def inputs(self, config: Mapping[str, Any], accepted: Collection[str]) -> tuple[GraphTensor, ...]:
        """Return the graph's inputs for a network of this config.json whose forward takes the parameters `accepted`."""
        raise AssertionError(f"{self.name} has no traced graph")

    @abstractmethod
    def encode(self, row: Row, processor: Any, labels: Sequence[str]) -> Example:
        """Return the arrays of a row without problems. Raises DataError for a row that the processor refuses."""

    def truncate(self, example: Example, max_length: int) -> Example:
        """Return the example cut to `max_length` tokens."""
        return Example({name: array[:max_length] if array.ndim else array for name, array in example.arrays.items()})

    def windows(self, example: Example, max_length: int) -> list[Example]:
        """Return what a row of training is trained as, each of at most `max_length` tokens: itself, or parts of a long one."""
        return [example]

    def asked_rows(self, inputs: Sequence[str]) -> list[Row]:
        """Return the rows that the INPUTs of `edgelora run` are: one each, which may be written as JSON."""
        columns = self.asked or (self.answered,)
        return [json_row(text, columns) or {self.answered: text} for text in inputs]

    def asked_problems(self, row: Row) -> list[str]:
        """Return what is wrong with a row that is to be answered."""
        return text_problems(row, (self.answered,))

    def pieces(self, row: Row, processor: Any, labels: Sequence[str], max_length: int) -> list[Example]:
        """Return what a row is computed as when it is answered: one example, cut, or several."""
        return [self.truncate(self.encode(row, processor, labels), max_length)]

    def join(
        self, outputs: Sequence[Mapping[str, NDArray[Any]]], row: Row, examples: Sequence[Example], processor: Any,
        labels: Sequence[str],
    ) -> Any:  # fmt: skip
        """Return the answer to a row from the outputs of its pieces."""
        return self.decode(outputs[0], row, examples[0], processor, labels)

    def example_problems(self, example: Example, max_length: int) -> list[str]:
        """Return what is wrong with an encoded row."""
        if len(example) > max_length:
            return [f"{len(example)} tokens, over the limit of {max_length}"]
        return []

    def labels(self, names: Iterable[str]) -> list[str]:
        """Return the labels that occur in training rows in their one order; [] where the task has none."""
        return []

    def label(self, row: Row) -> str | None:
        """Return the one label of a row; None where it has none, or the task another number of them."""
        return None

    def group(self, row: Row) -> str | None:
        """Return what rows share that stay together, in training or in validation; None where each stands alone."""
        return None

    def label_names(self, row: Row) -> Iterable[str]:
        """Return the labels that occur in a row without problems: one, or those of its tokens, objects or areas.

        The validation split is stratified by the label of rows that have one.
        """
        label = self.label(row)
        return () if label is None else (label,)

    def unknown(self, names: Iterable[str], labels: Collection[str]) -> list[str]:
        """Return those of a row's label names that are none of the labels."""
        return sorted(set(names) - set(labels))

    def trial_examples(self, processor: Any) -> list[Example]:
        """Return examples of several lengths, without labels, that an exported graph is compared with torch on."""
        texts = [part for text in TRIAL_TEXTS for part in (text, text[: len(text) // 2], text[len(text) // 2 :])]
        return [self.encode({self.answered: text}, processor, []) for text in texts]

    @abstractmethod
    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, NDArray[Any]]:
        """Return the arrays of one batch, [examples, …] each but those of a decoder."""

    @abstractmethod
    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Return the summed loss (a scalar with a gradient) and the number of supervised items that it sums."""

    @abstractmethod
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
        """Return the task's metrics on rows and their examples; `generate` adds those that need generated text."""

    def baseline(self, examples: Sequence[Example], labels: Sequence[str]) -> Metrics:
        """Return the metrics of the majority answer; {} where there is none."""
        return {}

    def compared(self, outputs: Mapping[str, NDArray[np.float32]], example: Example) -> NDArray[np.float32]:
        """Return what two models' outputs of an example are compared by, logits [positions, classes]: its first output, of one
        per token those of real ones."""
        array = next(iter(outputs.values()))
        if array.ndim > 1 and "ids" in example.arrays:
            array = array[: len(example)]
        return np.ascontiguousarray(array).reshape(-1, array.shape[-1])

    def decode(
        self, outputs: Mapping[str, NDArray[Any]], row: Row, example: Example, processor: Any, labels: Sequence[str]
    ) -> Any:
        """Return the answer to a row as JSON has it, from its outputs of one example (without padding cut off)."""
        raise AssertionError(f"{self.name} has no outputs to decode")

    def answer_text(self, answer: Any) -> str:
        """Return what people see of an answer that `decode` gave, without a line's end."""
        return str(answer)

    def draw(self, picture: Any, answer: Any) -> Any:
        """Return a Pillow image: the picture with an answer that `decode` gave drawn on it."""
        raise SettingsError(f"--save is for tasks whose answers can be drawn; this bundle is for {self.name}")

    @abstractmethod
    def show(self, example: Example, processor: Any, labels: Sequence[str] = ()) -> str:
        """Return rich markup of the row as the model sees it, what is trained on marked (in ⟦ ⟧ too, without colours)."""
