"""summarization: an encoder-decoder writes a short text about a long one.

Columns: `text`, `summary`.
Batch and graphs: tasks/text_to_text.py, tasks/sequences.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgelora.errors import MachineError
from edgelora.tasks.base import Column, Metrics
from edgelora.tasks.text_to_text import TextToText
from edgelora.writing import Writing

KINDS = ("rouge1", "rouge2", "rougeL")


class Summarization(TextToText):
    name = "summarization"
    help = "An encoder-decoder that sums up."
    columns = (
        Column("text", "the text", required=True),
        Column("summary", "what it says, in short", required=True),
    )
    shapes = (("text", "summary"),)
    answered = "text"
    answer_column = "summary"
    families = "BART, Pegasus, T5, mT5, mBART, BERT2BERT"
    metrics = ("loss", *KINDS)
    written_metric = "rougeL"

    def prefix(self, processor: Writing) -> str:
        """Return T5's "summarize: ", where config.json names it."""
        own = processor.settings.get("task_specific_params")
        found = own.get("summarization", {}).get("prefix") if isinstance(own, dict) else None
        return found if isinstance(found, str) else ""

    def score(self, outputs: Sequence[str], references: Sequence[str]) -> Metrics:
        """Return the F measures of ROUGE-1, -2 and -L, 0 to 100, stemmed, as rouge-score computes them (Lin 2004)."""
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError:
            raise MachineError("ROUGE needs rouge-score", hint='pip install "edgelora[train]"') from None
        scorer = RougeScorer(list(KINDS), use_stemmer=True)
        found = [scorer.score(reference, output) for output, reference in zip(outputs, references, strict=True)]
        return {kind: 100.0 * sum(row[kind].fmeasure for row in found) / len(found) for kind in KINDS}
