"""token-classification: the words of a text are tagged: names, slots, parts of speech. The answer is labelled spans.

An encoder sees all of the text, a decoder what comes before a word.
Columns: `tokens` and `tags` (CoNLL files have both), or `text` and `spans`.
Batch and graph inputs: input_ids, attention_mask [B, S] int64; labels [B, S] int64 in training: of each word's first token,
-100 elsewhere.
Graph output: logits [B, S, labels] fp32; labels are O, and B- and I- of each label of a span.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.tasks.base import Column, Example, GraphTensor, Metrics, Predictor, Row, Task
from edgelora.tasks.rows import parse_json_cells, text_problems
from edgelora.tasks.spans import marked, span_problems, spans_of, text_of, token_problems
from edgelora.tasks.tagged import first_tokens, found_spans, tags_of_spans, word_scores
from edgelora.tasks.texts import cut_before_last, padded, text_inputs
from edgelora.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

IGNORED = -100


class TokenClassification(Task):
    name = "token-classification"
    help = "An encoder that finds and labels spans: names, slots, dates, parts of speech."
    columns = (
        Column("tokens", "the words: a list of texts"),
        Column("tags", "the tag of each: B-name, I-name, O (or BIOES), or any name for each word"),
        Column("text", "the text"),
        Column("spans", "its labelled spans: a list of {start, end, label}, in characters"),
    )
    shapes = (("tokens", "tags"), ("text", "spans"))
    auto_class = "AutoModelForTokenClassification"
    outputs = (GraphTensor("logits", "float32", ("batch_size", "sequence_length", "num_labels")),)
    families = "BERT, RoBERTa, DistilBERT, MiniLM, DeBERTa, ModernBERT, Llama, Mistral, Qwen2/3"
    asked = ("text", "tokens")
    metric = "f1"
    metrics = ("loss", "micro_precision", "micro_recall", "f1", "accuracy")
    higher_is_better = True
    has_labels = True
    target_modules = "all-linear"
    learning_rate = 2e-3
    batch_size = 16

    def normalize(self, row: Row) -> Row:
        names = ("tokens", "tags") if row.get("tokens") is not None else ("text", "spans")
        kept = {name: row[name] for name in names if row.get(name) is not None}
        return parse_json_cells(kept, ("tokens", "tags", "spans"))

    def problems(self, row: Row) -> list[str]:
        if "tokens" in row:
            return token_problems(row)
        return text_problems(row, ("text",)) or span_problems(row)

    def asked_problems(self, row: Row) -> list[str]:
        return token_problems(row, ("tokens",)) if "tokens" in row else text_problems(row, ("text",))

    def labels(self, names: Iterable[str]) -> list[str]:
        kinds = sorted({name.removeprefix("B-") for name in names})
        return ["O", *(prefix + name for name in kinds for prefix in ("B-", "I-"))]

    def label_names(self, row: Row) -> list[str]:
        """Return the tag that each span begins with."""
        return [f"B-{label}" for _, _, label in spans_of(row)]

    def inputs(self, config: Mapping[str, Any], accepted: Collection[str]) -> tuple[GraphTensor, ...]:
        return text_inputs(config, accepted)

    def encode(self, row: Row, processor: Tokenizer, labels: Sequence[str]) -> Example:
        """Return ids int32 [T], tags int32 [T], those of words at their first token and -1 elsewhere (and of rows without), and
        places int32 [T, 2]: the characters of the word that begins there, or -1."""
        text, words = text_of(row)
        encoding = processor.encode_offsets(text)
        numbers = {label: number for number, label in enumerate(labels)}
        known = [numbers.get(tag, -1) for tag in tags_of_spans(spans_of(row), words)]
        tags = np.full(len(encoding.ids), -1, dtype=np.int32)
        places = np.full((len(encoding.ids), 2), -1, dtype=np.int32)
        for place, number in first_tokens(text, words, encoding.offsets, encoding.sequence_ids):
            tags[place] = known[number] if "tags" in row or "spans" in row else -1
            places[place] = words[number]
        return Example({"ids": np.array(encoding.ids, dtype=np.int32), "tags": tags, "places": places})

    def truncate(self, example: Example, max_length: int) -> Example:
        return cut_before_last(example, max_length)

    def example_problems(self, example: Example, max_length: int) -> list[str]:
        found = super().example_problems(example, max_length)
        return found or ([] if (example.arrays["places"] >= 0).any() else ["the tokenizer finds no word in it"])

    def collate(self, examples: Sequence[Example], processor: Tokenizer) -> dict[str, NDArray[Any]]:
        batch = padded(examples, processor.pad_token_id or 0)
        labels = np.full(batch["input_ids"].shape, IGNORED, dtype=np.int64)
        for row, example in enumerate(examples):
            tags = example.arrays["tags"]
            labels[row, : len(example)] = np.where(tags >= 0, tags, IGNORED)
        return batch | {"labels": labels}

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        import torch

        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits_NL, labels = model.logits(**inputs).float().flatten(0, 1), batch["labels"].flatten()
        loss = torch.nn.functional.cross_entropy(logits_NL, labels, ignore_index=IGNORED, reduction="sum")
        return loss, int((labels != IGNORED).sum())

    def evaluate(
        self, predictor: Predictor, rows: Sequence[Row], examples: Sequence[Example], processor: Tokenizer,
        labels: Sequence[str], *, generate: bool,
    ) -> Metrics:  # fmt: skip
        """Return loss (nats per word), and what seqeval says of the words' tags; `report` is per label of a span."""
        return word_scores(predictor.outputs(examples), examples, labels)

    def baseline(self, examples: Sequence[Example], labels: Sequence[str]) -> Metrics:
        """Return the metrics of finding no span."""
        tags = np.concatenate([example.arrays["tags"][example.arrays["tags"] >= 0] for example in examples])
        return {"micro_precision": 0.0, "micro_recall": 0.0, "f1": 0.0, "accuracy": float((tags == 0).mean())}

    def decode(
        self, outputs: Mapping[str, NDArray[Any]], row: Row, example: Example, processor: Tokenizer, labels: Sequence[str]
    ) -> dict[str, Any]:
        """Return {"text", "spans": [{"label", "start", "end", "text", "probability"}]}, the mean probability of the words."""
        text = text_of(row)[0]
        return {"text": text, "spans": found_spans(outputs["logits"], example.arrays["places"], text, labels)}

    def answer_text(self, answer: Any) -> str:
        notes = [(span["start"], span["end"], f"{span['label']} {span['probability']:.0%}") for span in answer["spans"]]
        return marked(answer["text"], notes)

    def show(self, example: Example, processor: Tokenizer, labels: Sequence[str] = ()) -> str:
        from rich.markup import escape

        parts = []
        for token, tag in zip(example.arrays["ids"].tolist(), example.arrays["tags"].tolist(), strict=True):
            piece = escape(processor.decode([token], skip_special_tokens=False))
            parts.append(f"[bold green]⟦{piece} {escape(labels[tag])}⟧[/bold green]" if tag > 0 else piece)
        return " ".join(parts)
