"""What scoring the validation rows takes: for each evaluation, and for the closing table with its generated answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgelora.planning import speed
from edgelora.planning.costs import FP32, Settings
from edgelora.planning.shape import ModelShape

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgelora.config import FinetuneConfig
    from edgelora.data.prepare import Prepared
    from edgelora.tasks.base import Example

SHORT_ANSWER = 64  # supervised tokens up to which answers are generated for the closing table
SPARE_TOKENS = 16  # that are generated beyond the longest answer (tasks/text_generation.py)
ALL_ROWS = 500  # where all validation rows are asked for and none are there yet


@dataclass(frozen=True)
class Closing:
    """The validation rows: how many, their tokens, and of the longest their whole length and its answer's."""

    rows: int
    tokens: float
    supervised: float
    longest: int
    longest_answer: int

    def seconds(self, shape: ModelShape, settings: Settings, cache: int) -> tuple[float, float, float]:
        """Return the reference machine's seconds of scoring the rows for the first time, of scoring them again, and of writing
        their answers once, with so many bytes for keys and values."""
        again = speed.has_prefix(shape, settings)
        first, later = (
            speed.scoring_seconds(shape, settings, self.tokens, self.supervised, prefixed=prefixed)
            for prefixed in (False, again)
        )
        if shape.encoder or self.longest_answer > SHORT_ANSWER:
            return first, later, 0.0
        from edgelora.models.predictor import MOST_PROMPTS

        length = self.longest_answer + SPARE_TOKENS
        one = 2 * FP32 * shape.layers * shape.keys * (self.longest + SPARE_TOKENS)
        at_once = max(1, min(MOST_PROMPTS, self.rows, cache // one))
        prompt = max(0.0, self.tokens - self.supervised) / max(1, self.rows)
        return first, later, speed.writing_seconds(shape, settings, self.rows, prompt, length, at_once)


def short_answers(examples: Sequence[Example]) -> bool:
    """Tell whether the answers of rows, if these have such, are short enough to be generated."""
    return all(example.answer_length is not None and example.answer_length <= SHORT_ANSWER for example in examples)


def measured(prepared: Prepared, config: FinetuneConfig) -> Closing:
    """Return the rows that a run will be scored on, as finetune.py takes them."""
    from edgelora.data.prepare import sample

    store = prepared.store("valid")
    examples, _ = sample(store, [{}] * len(store), config.valid_rows)
    answers = [1 if example.answer_length is None else example.answer_length for example in examples]
    lengths = [len(example) for example in examples]
    return Closing(len(examples), sum(lengths), sum(answers), max(lengths), max(answers))


def guessed(lengths: NDArray[np.int64], supervised: float, config: FinetuneConfig) -> Closing:
    """Return rows as those of training, of which the share `supervised` is trained on."""
    rows, mean = config.valid_rows or ALL_ROWS, float(np.mean(lengths))
    longest = int(np.max(lengths))
    return Closing(rows, rows * mean, rows * supervised * mean, longest, round(supervised * longest))
