"""sentence-similarity: an encoder gives texts embeddings in which queries are close to the items that fit them.

Columns: `query`, `item`. The items of a batch's other rows are what does not fit (InfoNCE, 1807.03748 and 1705.00652).
Batch and graph inputs: input_ids, attention_mask [B, S] int64; in training the queries, then the items, and labels_query,
labels_item [B / 2] int64, which tell texts apart.
Graph outputs: last_hidden_state [B, S, H], sentence_embedding [B, H] fp32, of length 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.tasks.base import TRIAL_TEXTS, Column, Example, GraphTensor, Metrics, Predictor, Row, Task
from edgelora.tasks.classified import log_softmax
from edgelora.tasks.contrast import fitting, mark, outputs_of, own_pairs_loss, relevance
from edgelora.tasks.ranked import ASKED, asked_rankings, ranking, ranking_problems, ranking_text, retrieval_scores
from edgelora.tasks.rows import json_row, text_problems
from edgelora.tasks.texts import AXES, cut_before_last, padded, text_inputs
from edgelora.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

TEMPERATURE = 0.05
PAIR = ("query", "item")


class SentenceSimilarity(Task):
    name = "sentence-similarity"
    help = "An encoder that gives embeddings: search, recommendation, duplicates; items are ranked for a query."
    columns = (
        Column("query", "what is searched with", required=True),
        Column("item", "a text that fits it", required=True),
    )
    shapes = (PAIR,)
    auto_class = "AutoModel"
    outputs = (
        GraphTensor("last_hidden_state", "float32", (*AXES, "hidden_size")),
        GraphTensor("sentence_embedding", "float32", ("batch_size", "hidden_size")),
    )
    asked = (*ASKED, "text")
    families = "BERT, RoBERTa, DistilBERT, MiniLM, DeBERTa, ModernBERT"
    metric = "mrr"
    metrics = ("loss", "mrr", "recall@1", "recall@5", "recall@10")
    higher_is_better = True
    target_modules = "all-linear"
    learning_rate = 5e-4
    batch_size = 32

    def normalize(self, row: Row) -> Row:
        return {name: row[name] for name in (*PAIR, *self.asked) if row.get(name) is not None}

    def problems(self, row: Row) -> list[str]:
        return text_problems(row, PAIR)

    def asked_rows(self, inputs: Sequence[str]) -> list[Row]:
        """Several INPUTs are a query and the items to rank; one is a text to embed. A row may be written as JSON."""
        alone = len(inputs) == 1 and json_row(inputs[0], self.asked) is None
        return [{"text": inputs[0]}] if alone else asked_rankings(inputs, self.asked)

    def asked_problems(self, row: Row) -> list[str]:
        return text_problems(row, ("text",)) if "text" in row else ranking_problems(row)

    def inputs(self, config: Mapping[str, Any], accepted: Collection[str]) -> tuple[GraphTensor, ...]:
        return text_inputs(config, accepted)

    def encode(self, row: Row, processor: Tokenizer, labels: Sequence[str]) -> Example:
        """Return query and item int32 [T] and their length together int32 []; of a row {"text"} ids int32 [T]."""
        if "text" in row:
            return single(np.array(processor.encode(row["text"], add_special_tokens=True), dtype=np.int32))
        pair = {name: np.array(processor.encode(row[name], add_special_tokens=True), dtype=np.int32) for name in PAIR}
        return Example({**pair, "length": np.array(sum(map(len, pair.values())), dtype=np.int32)})

    def truncate(self, example: Example, max_length: int) -> Example:
        if "ids" in example.arrays:
            return cut_before_last(example, max_length)
        pair = {name: cut_before_last(single(example.arrays[name]), max_length).arrays["ids"] for name in PAIR}
        return Example({**pair, "length": np.array(sum(map(len, pair.values())), dtype=np.int32)})

    def example_problems(self, example: Example, max_length: int) -> list[str]:
        over = ((name, size) for name in PAIR if (size := len(example.arrays[name])) > max_length)
        return [f'"{name}" has {size} tokens, over the limit of {max_length}' for name, size in over]

    def pieces(self, row: Row, processor: Tokenizer, labels: Sequence[str], max_length: int) -> list[Example]:
        texts = [row["text"]] if "text" in row else [row["query"], *row["items"]]
        return [self.truncate(self.encode({"text": text}, processor, labels), max_length) for text in texts]

    def trial_examples(self, processor: Tokenizer) -> list[Example]:
        texts = [text for whole in TRIAL_TEXTS for text in (whole, whole[: len(whole) // 2])]
        return [self.encode({"text": text}, processor, []) for text in texts]

    def collate(self, examples: Sequence[Example], processor: Tokenizer) -> dict[str, NDArray[Any]]:
        pad = processor.pad_token_id or 0
        if "ids" in examples[0].arrays:
            return padded(examples, pad)
        texts = {name: [example.arrays[name] for example in examples] for name in PAIR}
        batch = padded([single(ids) for name in PAIR for ids in texts[name]], pad)
        return batch | {f"labels_{name}": mark(found) for name, found in texts.items()}

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Return the cross-entropy of each query's own item among those of the batch that do not fit it too."""
        queries_BH, items_BH = model.outputs(**model.inputs_of(batch))["sentence_embedding"].float().chunk(2)
        fits_BB = fitting(batch, ("labels_query", "labels_item"))
        return own_pairs_loss(queries_BH @ items_BH.T / TEMPERATURE, fits_BB, both=False), len(queries_BH)

    def evaluate(
        self, predictor: Predictor, rows: Sequence[Row], examples: Sequence[Example], processor: Tokenizer,
        labels: Sequence[str], *, generate: bool,
    ) -> Metrics:  # fmt: skip
        """Return what ranking the distinct items of all these rows gives for each query; loss in nats per query."""
        queries, items = ([example.arrays[name].tobytes() for example in examples] for name in PAIR)
        texts = {text: number for number, text in enumerate(dict.fromkeys([*queries, *items]))}
        vectors = np.stack(outputs_of(predictor, [single(np.frombuffer(t, np.int32)) for t in texts], "sentence_embedding"))
        asked, ranked, relevant = relevance(queries, items)
        scores = vectors[[texts[queries[row]] for row in asked]] @ vectors[[texts[items[row]] for row in ranked]].T
        losses = -np.where(relevant, log_softmax(scores / TEMPERATURE), -np.inf).max(axis=1)
        return {"loss": float(losses.mean()), **retrieval_scores(scores, relevant)}

    def compared(self, outputs: Mapping[str, NDArray[np.float32]], example: Example) -> NDArray[np.float32]:
        return outputs["sentence_embedding"][None]

    def join(
        self, outputs: Sequence[Mapping[str, NDArray[Any]]], row: Row, examples: Sequence[Example], processor: Tokenizer,
        labels: Sequence[str],
    ) -> Any:  # fmt: skip
        """Return {"embedding"} of a text, or the items as [{"item", "score"}], the closest first; scores are cosines."""
        vectors = np.stack([said["sentence_embedding"] for said in outputs])
        if "text" in row:
            return {"embedding": [float(value) for value in vectors[0]]}
        return ranking(row["items"], (vectors[1:] @ vectors[0]).tolist())

    def answer_text(self, answer: Any) -> str:
        if isinstance(answer, list):
            return ranking_text(answer)
        first = ", ".join(f"{value:.4f}" for value in answer["embedding"][:6])
        return f"[{first}, …] ({len(answer['embedding'])} numbers; --json has all)"

    def show(self, example: Example, processor: Tokenizer, labels: Sequence[str] = ()) -> str:
        from rich.markup import escape

        query, item = (escape(processor.decode(example.arrays[name].tolist(), skip_special_tokens=False)) for name in PAIR)
        return f"{query} → [bold green]⟦{item}⟧[/bold green]"


def single(ids: NDArray[np.int32]) -> Example:
    return Example({"ids": ids})
