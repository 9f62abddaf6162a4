"""What tasks share whose answer a decoder writes about an encoded input: targets, their batches, the loss, searching, metrics.

Example: target int32 [T] beside the arrays of the source; length int32 [], T and the source's together.
Batch: the encoder's inputs; decoder_input_ids [B, T]; and as in text-generation, over the B·T places of these, starts [B + 1],
positions [S] and targets [S], all int64.
Graphs: encoder_model, the encoder's inputs → last_hidden_state fp32 [B, S, H]; decoder_model_merged, input_ids [B, T] int64,
encoder_hidden_states, encoder_attention_mask where there is one, past_key_values.N.{decoder,encoder}.{key,value} → logits fp32
[B, T, vocabulary], present.N.…
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import SettingsError
from edgelora.tasks.base import Example, GraphTensor, Metrics, Predictor, Row, Task
from edgelora.tasks.generated import perplexity
from edgelora.tasks.rows import text_problems
from edgelora.writing import Writing

if TYPE_CHECKING:
    import torch

    from edgelora.search import Search

SPARE = 16  # tokens that an answer may have beyond the longest reference while it is scored


class Written(Task):
    """A task with an encoder and a decoder. `answer_column` holds the target."""

    outputs = (GraphTensor("last_hidden_state", "float32", ("batch_size", "sequence_length", "hidden_size")),)
    writes = True
    auto_class = "AutoModelForSeq2SeqLM"
    metric = "loss"
    higher_is_better = False
    target_modules = "all-linear"
    learning_rate = 1e-3
    answer_column: ClassVar[str]

    def writing(self, processor: Any) -> Writing:
        """Return the decoder's side of what `open_processor` gave."""
        found: Writing = processor
        return found

    def timed(self, search: Search, processor: Any) -> Search:
        """Return the search with which answers have times. Raises SettingsError where they have none."""
        raise SettingsError(f"times are of speech; this bundle is for {self.name}", hint="leave --times out")

    @abstractmethod
    def source(self, row: Row, processor: Any) -> tuple[dict[str, NDArray[Any]], int]:
        """Return the arrays of a row's source, and its length."""

    @abstractmethod
    def sources(self, examples: Sequence[Example], processor: Any) -> dict[str, NDArray[Any]]:
        """Return the encoder's inputs of one batch."""

    @abstractmethod
    def score(self, outputs: Sequence[str], references: Sequence[str]) -> Metrics:
        """Return the metrics of written texts."""

    def normalize(self, row: Row) -> Row:
        return {column.name: row[column.name] for column in self.columns if row.get(column.name) is not None}

    def problems(self, row: Row) -> list[str]:
        return text_problems(row, (self.answered, self.answer_column))

    def encode(self, row: Row, processor: Any, labels: Sequence[str]) -> Example:
        arrays, length = self.source(row, processor)
        if self.answer_column in row:
            ids = self.writing(processor).encode_target(row[self.answer_column])
            arrays, length = {**arrays, "target": np.array(ids, dtype=np.int32)}, length + len(ids)
        return Example({**arrays, "length": np.array(length, dtype=np.int32)})

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, NDArray[Any]]:
        batch = self.sources(examples, processor)
        if "target" in examples[0].arrays:
            batch |= self.writing(processor).batch([example.arrays["target"] for example in examples])
        return batch

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        return model.nll(model.states(batch)[batch["positions"]], batch["targets"]), len(batch["targets"])

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
        """Return loss (nats per target token) and perplexity; with `generate` those of texts searched as when run."""
        losses = predictor.losses(examples)
        loss = sum(total for total, _ in losses) / sum(count for _, count in losses)
        metrics: Metrics = {"loss": loss, "perplexity": perplexity(loss)}
        if generate:
            writing = self.writing(processor)
            longest = max(len(example.arrays["target"]) for example in examples)
            outputs = predictor.write(examples, writing.search.limited(2 * longest + SPARE))
            metrics |= self.score([writing.decode(ids) for ids in outputs], [row[self.answer_column] for row in rows])
        return metrics

    def decode(
        self, outputs: Mapping[str, NDArray[Any]], row: Row, example: Example, processor: Any, labels: Sequence[str]
    ) -> str:
        """Return the text of the tokens in outputs["tokens"]."""
        return self.writing(processor).decode(outputs["tokens"].tolist())
