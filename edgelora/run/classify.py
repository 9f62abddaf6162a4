"""Labels and their probabilities from a classifier bundle.

Graph inputs: input_ids, attention_mask (token_type_ids where the family has them) int64 [batch, sequence]; output: logits
fp32 [batch, labels].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import FolderError
from edgelora.run.adapters import Adapter, initializers
from edgelora.run.session import open_session
from edgelora.tasks.base import Example
from edgelora.tasks.text_classification import TextClassification
from edgelora.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgelora.bundle import Bundle

Labelled = list[tuple[str, float]]  # (label, probability), the most probable first


class Classifier:
    """An encoder with a classification head, its tokenizer and its labels."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, adapter: Adapter | None = None) -> None:
        self.bundle, self.threads = bundle, threads
        self.task = TextClassification()
        self.tokenizer = Tokenizer.from_folder(bundle.folder)
        self.labels = list(bundle.labels)
        self.max_length = bundle.max_length
        self.pad_token_id = bundle.pad_token_id or self.tokenizer.pad_token_id or 0
        self.use(adapter)
        self.input_names = {value.name for value in self.session.get_inputs()}
        if unknown := self.input_names - {"input_ids", "attention_mask", "token_type_ids"}:
            raise FolderError(f"{bundle.model_path} is not a text classifier: it asks for {', '.join(sorted(unknown))}")
        width = self.session.get_outputs()[0].shape[-1]
        if isinstance(width, int) and width != len(self.labels):
            raise FolderError(f"{bundle.folder} lists {len(self.labels)} labels, but its model has {width} outputs")

    def use(self, adapter: Adapter | None) -> None:
        """Let an adapter act from now on, or the base alone: in a new session."""
        self.adapter = adapter
        self.initializers = initializers(self.bundle, adapter)  # the session reads from their memory
        self.session = open_session(self.bundle.model_path, threads=self.threads, initializers=self.initializers)

    def classify(self, texts: Sequence[str | tuple[str, str]], *, batch_size: int = 16) -> list[Labelled]:
        """Return for each text, or pair, all labels with their probability; what exceeds the model's length is cut."""
        logits = self.logits([self.encode(text) for text in texts], batch_size=batch_size)
        return [self.task.decode(row, self.labels) for row in logits]

    def encode(self, text: str | tuple[str, str]) -> Example:
        """Return a text or a pair as the model reads it; too long ones keep their last token, which closes them."""
        row = {"text": text} if isinstance(text, str) else {"text": text[0], "text_pair": text[1]}
        return self.task.truncate(self.task.encode(row, self.tokenizer, self.labels), self.max_length)

    def logits(self, examples: Sequence[Example], *, batch_size: int = 16) -> NDArray[np.float32]:
        """Return logits `[n, labels]`. Texts of like length share a batch, so that little is padded."""
        result = np.zeros((len(examples), len(self.labels)), np.float32)
        order = sorted(range(len(examples)), key=lambda index: len(examples[index]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            result[rows] = self.session.run(["logits"], self._feeds([examples[row] for row in rows]))[0]
        return result

    def _feeds(self, examples: Sequence[Example]) -> dict[str, NDArray[np.int64]]:
        batch = self.task.collate(examples, self.pad_token_id)
        if "token_type_ids" in self.input_names and "token_type_ids" not in batch:
            batch["token_type_ids"] = np.zeros_like(batch["input_ids"])
        return {name: batch[name] for name in self.input_names}
