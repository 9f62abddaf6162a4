"""translation: an encoder-decoder writes a text in another language.

Columns: `source`, `target`; or `translation`, {"en": …, "de": …}, the first of which is the source. Parallel text files and
`.po` catalogues have the first two (data/parallel.py).
Batch and graphs: tasks/text_to_text.py, tasks/sequences.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgelora.errors import MachineError
from edgelora.tasks.base import Column, Metrics, Row
from edgelora.tasks.text_to_text import TextToText


class Translation(TextToText):
    name = "translation"
    help = "An encoder-decoder that translates."
    columns = (
        Column("source", "the text", required=True),
        Column("target", "its translation", required=True),
        Column("translation", 'both in one: {"en": …, "de": …}, the source first'),
    )
    shapes = (("source", "target"), ("translation",))
    answered = "source"
    answer_column = "target"
    families = "T5, mT5, BART, mBART, Marian, Pegasus, BERT2BERT"
    metrics = ("loss", "bleu", "chrf")
    written_metric = "bleu"

    def normalize(self, row: Row) -> Row:
        pair = row.get("translation")
        if isinstance(pair, dict) and len(pair) == 2:
            row = dict(zip(("source", "target"), pair.values(), strict=True))
        return super().normalize(row)

    def score(self, outputs: Sequence[str], references: Sequence[str]) -> Metrics:
        return bleu_and_chrf(outputs, references)


def bleu_and_chrf(outputs: Sequence[str], references: Sequence[str]) -> Metrics:
    """Return BLEU and chrF, 0 to 100, as sacrebleu computes them by default (arXiv 1804.08771; chrF2).

    Raises MachineError without it.
    """
    try:
        import sacrebleu
    except ImportError:
        raise MachineError("BLEU and chrF need sacrebleu", hint='pip install "edgelora[train]"') from None
    return {
        "bleu": float(sacrebleu.corpus_bleu(list(outputs), [list(references)]).score),
        "chrf": float(sacrebleu.corpus_chrf(list(outputs), [list(references)]).score),
    }
