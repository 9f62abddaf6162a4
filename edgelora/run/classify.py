"""Labels and their probabilities from a classifier bundle.

Graph inputs: input_ids, attention_mask (token_type_ids where the family has them) int64 [batch, sequence]; output: logits
fp32 [batch, labels].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import FolderError
from edgelora.run.session import open_session
from edgelora.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgelora.bundle import Bundle

Labelled = list[tuple[str, float]]  # (label, probability), the most probable first


class Classifier:
    """An encoder with a classification head, its tokenizer and its labels."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self.tokenizer = Tokenizer.from_folder(bundle.folder)
        self.labels = list(bundle.labels)
        self.max_length = bundle.max_length
        self.session = open_session(bundle.model_path, threads=threads)
        self.input_names = {value.name for value in self.session.get_inputs()}
        if unknown := self.input_names - {"input_ids", "attention_mask", "token_type_ids"}:
            raise FolderError(f"{bundle.model_path} is not a text classifier: it asks for {', '.join(sorted(unknown))}")
        width = self.session.get_outputs()[0].shape[-1]
        if isinstance(width, int) and width != len(self.labels):
            raise FolderError(f"{bundle.folder} lists {len(self.labels)} labels, but its model has {width} outputs")

    def classify(self, texts: Sequence[str], *, batch_size: int = 16) -> list[Labelled]:
        """Return for each text all labels with their probability; texts over the model's length are cut at the end."""
        ids = [self.encode(text) for text in texts]
        return [self._sorted(row) for row in softmax_rows(self.logits(ids, batch_size=batch_size))]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with the encoder's special tokens, the last of which survives a cut."""
        ids = self.tokenizer.encode(text, add_special_tokens=True)
        return ids if len(ids) <= self.max_length else [*ids[: self.max_length - 1], ids[-1]]

    def logits(self, ids: Sequence[Sequence[int]], *, batch_size: int = 16) -> NDArray[np.float32]:
        """Return logits `[n, labels]` of encoded texts. Texts of like length share a batch, so that little is padded."""
        result = np.zeros((len(ids), len(self.labels)), np.float32)
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            result[rows] = self.session.run(["logits"], self._batch([ids[row] for row in rows]))[0]
        return result

    def _batch(self, ids: Sequence[Sequence[int]]) -> dict[str, NDArray[np.int64]]:
        longest = max(len(row) for row in ids)
        feeds = {name: np.zeros((len(ids), longest), np.int64) for name in self.input_names}
        feeds["input_ids"][:] = self.tokenizer.pad_token_id or 0
        for index, row in enumerate(ids):
            feeds["input_ids"][index, : len(row)] = row
            feeds["attention_mask"][index, : len(row)] = 1
        return feeds

    def _sorted(self, probabilities: NDArray[Any]) -> Labelled:
        return [(self.labels[index], float(probabilities[index])) for index in np.argsort(-probabilities, kind="stable")]


def softmax_rows(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return probabilities `[n, labels]`."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    probabilities: NDArray[np.float64] = exponentials / exponentials.sum(-1, keepdims=True)
    return probabilities
