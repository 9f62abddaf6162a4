"""question-answering: an encoder finds the part of a context that answers a question, or that nothing there does.

Columns: `question`, `context`, `answers` (SQuAD's JSON files have them nested). A long context is cut into overlapping windows.
Batch and graph inputs: input_ids, attention_mask [B, S] int64 (token_type_ids too); labels_start, labels_end [B] int64 in
training: the first and last token of the answer, 0 where there is none.
Graph outputs: start_logits, end_logits [B, S] fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import DataError
from edgelora.tasks import contexts
from edgelora.tasks.answers import answer_problems, answer_scores, answers_of
from edgelora.tasks.base import TRIAL_TEXTS, Column, Example, GraphTensor, Metrics, Predictor, Row, Task
from edgelora.tasks.generated import marked as targets_marked
from edgelora.tasks.rows import parse_json_cells, text_problems
from edgelora.tasks.spans import marked
from edgelora.tasks.texts import AXES, padded, text_inputs
from edgelora.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

WINDOW = 384  # tokens, as BERT's own run on SQuAD
OVERLAP = 128


class QuestionAnswering(Task):
    name = "question-answering"
    help = "An encoder that finds the answer to a question in a text, or that there is none."
    columns = (
        Column("question", "what is asked", required=True),
        Column("context", "the text that may hold the answer", required=True),
        Column("answers", "a list of {text, answer_start}: what is right, [] where nothing is", required=True),
    )
    shapes = (("question", "context", "answers"),)
    auto_class = "AutoModelForQuestionAnswering"
    outputs = (GraphTensor("start_logits", "float32", AXES), GraphTensor("end_logits", "float32", AXES))
    asked = ("question", "context")
    families = "BERT, RoBERTa, DistilBERT, MiniLM, DeBERTa, ModernBERT"
    metric = "f1"
    metrics = ("loss", "exact_match", "f1", "has_answer_f1", "no_answer_accuracy")
    higher_is_better = True
    has_labels = True  # the head's two outputs
    target_modules = "all-linear"
    learning_rate = 2e-3
    batch_size = 16

    def normalize(self, row: Row) -> Row:
        kept = {column.name: row[column.name] for column in self.columns if row.get(column.name) is not None}
        if row.get("is_impossible") is True:  # SQuAD 2.0 lists what only seems to answer
            kept["answers"] = []
        return parse_json_cells(kept, ("answers",))

    def problems(self, row: Row) -> list[str]:
        return self.asked_problems(row) or answer_problems(row)

    def asked_problems(self, row: Row) -> list[str]:
        return text_problems(row, self.asked)

    def labels(self, names: Iterable[str]) -> list[str]:
        return ["LABEL_0", "LABEL_1"]  # transformers' own names, so that a trained head is known

    def asked_rows(self, inputs: Sequence[str]) -> list[Row]:
        """Each INPUT is a row as JSON, or two are a question and its context."""
        rows = super().asked_rows(inputs)
        if all("text" not in row for row in rows):
            return rows
        if len(inputs) % 2:
            raise DataError("a question and its context are wanted", hint='edgelora run BUNDLE "question" "context"')
        return [dict(zip(self.asked, pair, strict=True)) for pair in zip(inputs[::2], inputs[1::2], strict=True)]

    def inputs(self, config: Mapping[str, Any], accepted: Collection[str]) -> tuple[GraphTensor, ...]:
        return text_inputs(config, accepted)

    def encode(self, row: Row, processor: Tokenizer, labels: Sequence[str]) -> Example:
        """Return what `context_arrays` has of the first answer."""
        encoding = processor.encode_offsets(row["question"], row["context"])
        answer = next(iter(answers_of(row)), None) if "answers" in row else None
        return Example(contexts.context_arrays(encoding, row["context"], answer))

    def truncate(self, example: Example, max_length: int) -> Example:
        return example

    def example_problems(self, example: Example, max_length: int) -> list[str]:
        return contexts.context_problems(example, max_length)

    def windows(self, example: Example, max_length: int) -> list[Example]:
        return contexts.cut(example, min(WINDOW, max_length), OVERLAP)

    def pieces(self, row: Row, processor: Tokenizer, labels: Sequence[str], max_length: int) -> list[Example]:
        example = self.encode({name: row[name] for name in self.asked}, processor, labels)
        if problems := self.example_problems(example, max_length):
            raise DataError(problems[0])
        return self.windows(example, max_length)

    def trial_examples(self, processor: Tokenizer) -> list[Example]:
        return [self.encode({"question": "What comes next?", "context": text}, processor, []) for text in TRIAL_TEXTS]

    def collate(self, examples: Sequence[Example], processor: Tokenizer) -> dict[str, NDArray[Any]]:
        batch = padded(examples, processor.pad_token_id or 0)
        for name in ("start", "end"):
            # What is cut to be probed may end before its answer
            places = [min(int(example.arrays[name]), len(example) - 1) for example in examples]
            batch[f"labels_{name}"] = np.array(places, dtype=np.int64)
        return batch

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        inputs = {name: tensor for name, tensor in batch.items() if not name.startswith("labels")}
        return contexts.ends_nll(model.outputs(**inputs), batch), len(batch["input_ids"])

    def evaluate(
        self, predictor: Predictor, rows: Sequence[Row], examples: Sequence[Example], processor: Tokenizer,
        labels: Sequence[str], *, generate: bool,
    ) -> Metrics:  # fmt: skip
        """Return loss (nats per window), and SQuAD's scores where rows have their text."""
        parts = [self.windows(example, processor.positions or WINDOW) for example in examples]
        flat = [window for windows in parts for window in windows]
        said = predictor.outputs(flat)
        loss = {"loss": contexts.ends_loss(said, flat)}
        if not all("context" in row for row in rows):
            return loss
        found = contexts.written_answers(said, parts, [row["context"] for row in rows])
        return loss | answer_scores(found, [[text for _, text in answers_of(row)] for row in rows])

    def compared(self, outputs: Mapping[str, NDArray[np.float32]], example: Example) -> NDArray[np.float32]:
        """Return for each token the logits that the answer begins there and that it ends there."""
        return np.stack([outputs[tensor.name][: len(example)] for tensor in self.outputs], axis=-1)

    def join(
        self, outputs: Sequence[Mapping[str, NDArray[Any]]], row: Row, examples: Sequence[Example], processor: Tokenizer,
        labels: Sequence[str],
    ) -> dict[str, Any]:  # fmt: skip
        """Return {"answer", "start", "end", "probability", "context"}: "" and null where there is no answer."""
        return contexts.answer_of(contexts.answer_in(outputs, examples), row["context"])

    def answer_text(self, answer: Any) -> str:
        if answer["start"] is None:
            return f"(no answer) {answer['probability']:.0%}"
        place = (answer["start"], answer["end"], f"{answer['probability']:.0%}")
        return f"{answer['answer']}\n  {marked(answer['context'], [place])}"

    def show(self, example: Example, processor: Tokenizer, labels: Sequence[str] = ()) -> str:
        return targets_marked(example.arrays["ids"], contexts.answer_mask(example), processor)
