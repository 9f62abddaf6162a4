"""text-ranking: an encoder reads a query and an item together and says how well they fit (a cross-encoder, 1901.04085).

Columns: `query`, `item`, `relevance` from 0 to 1; the rows of a query are its candidates, and stay together.
Batch and graph inputs: input_ids, attention_mask, token_type_ids [B, S] int64, labels [B] fp32 in training.
Graph output: logits [B, 1] fp32, whose sigmoid is the relevance.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.tasks.base import TRIAL_TEXTS, Column, Example, GraphTensor, Metrics, Predictor, Row
from edgelora.tasks.ranked import ASKED, asked_rankings, candidate_scores, ranking, ranking_problems, ranking_text
from edgelora.tasks.rows import kind, text_problems
from edgelora.tasks.texts import Texts

if TYPE_CHECKING:
    import torch

PAIR = ("query", "item")


class TextRanking(Texts):
    name = "text-ranking"
    help = "An encoder that reads a query and an item together: reranking of what a search or recommendation found."
    columns = (
        Column("query", "what is searched with, or who it is for", required=True),
        Column("item", "a candidate", required=True),
        Column("relevance", "how well it fits: 0 not at all, 1 wholly", required=True),
    )
    shapes = (("query", "item", "relevance"),)
    asked = ASKED
    config = {"problem_type": "multi_label_classification"}  # noqa: RUF012  # to other loaders: one label, its sigmoid
    outputs = (GraphTensor("logits", "float32", ("batch_size", 1)),)
    has_labels = True  # one: the head's only output
    fewest_labels = 1
    metric = "ndcg@10"
    metrics = ("loss", "ndcg@10", "mrr", "recall@1", "recall@5", "recall@10")
    higher_is_better = True
    label_dtype = np.float32

    def normalize(self, row: Row) -> Row:
        found = {name: row[name] for name in ("relevance", *PAIR, "items") if row.get(name) is not None}
        if isinstance(found.get("relevance"), str):  # of a CSV cell
            with contextlib.suppress(ValueError):
                found["relevance"] = float(found["relevance"])
        return found

    def problems(self, row: Row) -> list[str]:
        problems, relevance = text_problems(row, PAIR), row.get("relevance")
        if not isinstance(relevance, int | float):  # true and false are 1 and 0
            found = "missing" if relevance is None else f"a {kind(relevance)}"
            problems.append(f'"relevance" is {found}; a number from 0 to 1 is wanted')
        elif not 0 <= relevance <= 1:
            problems.append(f'"relevance" is {relevance}; divide all of them by the largest: 0 to 1 is wanted')
        return problems

    def group(self, row: Row) -> str:
        return str(row["query"])

    def asked_rows(self, inputs: Sequence[str]) -> list[Row]:
        return asked_rankings(inputs)

    def asked_problems(self, row: Row) -> list[str]:
        return ranking_problems(row)

    def labels(self, names: Iterable[str]) -> list[str]:
        return ["LABEL_0"]  # transformers' own name, so that a trained head is known

    def target(self, row: Row, labels: Sequence[str]) -> NDArray[Any]:
        """Return fp32 []."""
        return np.array(row.get("relevance", 0.0), dtype=np.float32)

    def target_text(self, target: NDArray[Any], labels: Sequence[str]) -> str:
        return f"{float(target):g}"

    def encode(self, row: Row, processor: Any, labels: Sequence[str]) -> Example:
        """Return ids int32 [T], types uint8 [T], label, and group int64 [], which the candidates of a query share."""
        found = super().encode({**row, "text": row["query"], "text_pair": row["item"]}, processor, labels)
        return Example({**found.arrays, "group": np.array(zlib.crc32(row["query"].encode()), dtype=np.int64)})

    def pieces(self, row: Row, processor: Any, labels: Sequence[str], max_length: int) -> list[Example]:
        pairs = ({"query": row["query"], "item": item} for item in row["items"])
        return [self.truncate(self.encode(pair, processor, labels), max_length) for pair in pairs]

    def trial_examples(self, processor: Any) -> list[Example]:
        pairs = [(whole, whole[: len(whole) // 2]) for whole in TRIAL_TEXTS] + [(TRIAL_TEXTS[0][:20], TRIAL_TEXTS[1])]
        return [self.encode({"query": query, "item": item}, processor, []) for query, item in pairs]

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Return the cross-entropy of each pair: so each learns by itself, whatever else a query is offered."""
        import torch

        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits_B = model.logits(**inputs).float().squeeze(-1)
        return torch.nn.functional.binary_cross_entropy_with_logits(logits_B, batch["labels"], reduction="sum"), len(logits_B)

    def evaluate(
        self, predictor: Predictor, rows: Sequence[Row], examples: Sequence[Example], processor: Any, labels: Sequence[str],
        *, generate: bool,
    ) -> Metrics:  # fmt: skip
        """Return loss (nats per pair), and the mean over queries of how well their candidates are ranked."""
        logits = predictor.logits(examples)[:, 0].astype(np.float64)
        truth = truth_of(examples)
        loss = np.logaddexp(0, logits) - truth * logits
        return {"loss": float(loss.mean()), **candidate_scores([row["query"] for row in rows], logits, truth)}

    def compared(self, outputs: Mapping[str, NDArray[np.float32]], example: Example) -> NDArray[np.float32]:
        """Return logits [1, 2] of the two answers that one logit tells apart."""
        return np.array([[0.0, outputs["logits"][0]]], dtype=np.float32)

    def join(
        self, outputs: Sequence[Mapping[str, NDArray[Any]]], row: Row, examples: Sequence[Example], processor: Any,
        labels: Sequence[str],
    ) -> Any:  # fmt: skip
        """Return the items as [{"item", "score"}], the best first; scores are relevances."""
        logits = np.array([float(said["logits"][0]) for said in outputs])
        return ranking(row["items"], (1 / (1 + np.exp(-logits))).tolist())

    def answer_text(self, answer: Any) -> str:
        return ranking_text(answer)


def truth_of(examples: Sequence[Example]) -> NDArray[np.float64]:
    return np.array([float(example.arrays["label"]) for example in examples])
