"""A bundle whose graph computes a whole answer at once: classifiers of texts and images, and whatever a task names outputs for.

Graph inputs and outputs are those of the task (tasks/base.py), batch first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import DataError, FolderError, UserError
from edgelora.run.adapters import Adapter, initializers
from edgelora.run.session import open_session
from edgelora.tasks import get_task
from edgelora.tasks.base import Example, Row
from edgelora.tasks.classified import Classification

if TYPE_CHECKING:
    from edgelora.bundle import Bundle

Labelled = list[tuple[str, float]]  # (label, probability), the most probable first
Outputs = dict[str, NDArray[np.float32]]


class Classifier:
    """A traced network, what encodes its rows, and its labels."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, adapter: Adapter | None = None) -> None:
        self.bundle, self.threads = bundle, threads
        self.task = get_task(bundle.task)
        self.processor = self.task.open_processor(bundle.folder)
        self.labels = list(bundle.labels)
        self.max_length = bundle.max_length
        self.use(adapter)
        self.input_names = {value.name for value in self.session.get_inputs()}
        self.output_names = [output.name for output in self.task.outputs]
        accepted = {"token_type_ids", *self.input_names}
        known = {value.name for value in self.task.inputs({**bundle.config, "type_vocab_size": 2}, accepted)}
        if unknown := self.input_names - known:
            raise FolderError(f"{bundle.model_path} is not for {self.task.name}: it asks for {', '.join(sorted(unknown))}")
        width = self.session.get_outputs()[0].shape[-1]
        if isinstance(self.task, Classification) and isinstance(width, int) and width != len(self.labels):
            raise FolderError(f"{bundle.folder} lists {len(self.labels)} labels, but its model has {width} outputs")

    def use(self, adapter: Adapter | None) -> None:
        """Let an adapter act from now on, or the base alone: in a new session."""
        self.adapter = adapter
        self.initializers = initializers(self.bundle, adapter)  # the session reads from their memory
        self.session = open_session(self.bundle.model_path, threads=self.threads, initializers=self.initializers)

    def answers(self, rows: Sequence[Row], *, batch_size: int = 16) -> list[Any]:
        """Return the task's answer to each row, as JSON has it. Raises DataError for a row that cannot be read."""
        pieces = [self.pieces(row) for row in rows]
        outputs = iter(self.outputs([example for part in pieces for example in part], batch_size=batch_size))
        found = [(row, part, list(islice(outputs, len(part)))) for row, part in zip(rows, pieces, strict=True)]
        return [self.task.join(said, row, part, self.processor, self.labels) for row, part, said in found]

    def classify(self, inputs: Sequence[str | tuple[str, str]], *, batch_size: int = 16) -> list[Labelled]:
        """Return for each text, pair or path all labels with their probability; what exceeds the model's length is cut."""
        if not isinstance(self.task, Classification):
            raise UserError(f"{self.bundle.folder} is a {self.task.name} bundle: it has no labels for a whole input")
        names = (self.task.answered, f"{self.task.answered}_pair")
        rows = [dict(zip(names, [given] if isinstance(given, str) else given, strict=False)) for given in inputs]
        answers = self.answers(rows, batch_size=batch_size)
        return [[(entry["label"], entry["probability"]) for entry in answer] for answer in answers]

    def encode(self, given: str | tuple[str, str]) -> Example:
        """Return a text, a pair or a path as the model reads it."""
        names = (self.task.answered, f"{self.task.answered}_pair")
        return self.encode_row(dict(zip(names, [given] if isinstance(given, str) else given, strict=False)))

    def encode_row(self, row: Row) -> Example:
        """Return a row as the model reads it; too long ones are cut."""
        return self.pieces(row)[0]

    def pieces(self, row: Row) -> list[Example]:
        """Return the examples that a row is computed as. Raises DataError for a row that cannot be read."""
        if problems := self.task.asked_problems(row):
            raise DataError("; ".join(problems))
        return self.task.pieces(row, self.processor, self.labels, self.max_length)

    def logits(self, examples: Sequence[Example], *, batch_size: int = 16) -> NDArray[np.float32]:
        """Return logits `[n, labels]`."""
        return np.stack([outputs["logits"] for outputs in self.outputs(examples, batch_size=batch_size)])

    def outputs(self, examples: Sequence[Example], *, batch_size: int = 16) -> list[Outputs]:
        """Return the outputs of each example by name. Examples of like length share a batch, so that little is padded."""
        found: list[Outputs] = [{} for _ in examples]
        order = sorted(range(len(examples)), key=lambda index: len(examples[index]))
        batch_size = 1 if any(example.alone for example in examples) else batch_size
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            arrays = self.session.run(self.output_names, self._feeds([examples[row] for row in rows]))
            for place, row in enumerate(rows):
                found[row] = {name: array[place] for name, array in zip(self.output_names, arrays, strict=True)}
        return found

    def _feeds(self, examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
        batch = self.task.collate(examples, self.processor)
        if "token_type_ids" in self.input_names and "token_type_ids" not in batch:
            batch["token_type_ids"] = np.zeros_like(batch["input_ids"])
        return {name: batch[name] for name in self.input_names}
