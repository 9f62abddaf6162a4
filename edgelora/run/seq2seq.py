"""Answers from an encoder-decoder bundle: the encoder once, then the decoder token by token, its keys and values cached.

Graphs: export/seq2seq.py describes them. Keys and values of what the encoder read are computed in the first step and fed again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.config import GenerateConfig
from edgelora.errors import DataError, FolderError
from edgelora.folder import inside
from edgelora.run.session import open_session
from edgelora.search import Scores, Search, search
from edgelora.tasks import get_task
from edgelora.tasks.base import Example, Row

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora.bundle import Bundle
    from edgelora.run.adapters import Adapter
    from edgelora.tasks.sequences import Written

PAST, PRESENT = "past_key_values", "present"
READ = ".encoder."
HIDDEN = "encoder_hidden_states"
SCORED_FLOATS = 4 << 20  # logits that scoring holds at once: 16 MB


class Writer:
    """An encoder-decoder, what encodes its rows, and how its answers are searched for."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, adapter: Adapter | None = None) -> None:
        self.bundle, self.adapter = bundle, adapter
        task: Any = get_task(bundle.task)
        self.task: Written = task
        self.processor = self.task.open_processor(bundle.folder)
        self.writing = self.task.writing(self.processor)
        self.labels: list[str] = []
        self.max_length = bundle.max_length
        self.encoder = open_session(encoder_path(bundle), threads=threads)
        self.decoder = open_session(bundle.model_path, threads=threads)
        self.encoder_names = [value.name for value in self.encoder.get_inputs()]
        self.decoder_names = {value.name for value in self.decoder.get_inputs()}
        if missing := {"input_ids", HIDDEN} - self.decoder_names:
            raise FolderError(f"{bundle.model_path} is no decoder of this kind: it lacks {', '.join(sorted(missing))}")

    def use(self, adapter: Adapter | None) -> None:
        """Adapters ship merged here: there is none to change."""
        self.adapter = adapter

    def answers(self, rows: Sequence[Row], *, batch_size: int = 16, config: GenerateConfig | None = None) -> list[Any]:
        """Return the text written about each row. Raises DataError for a row that cannot be read."""
        examples = [self.encode_row(row) for row in rows]
        written = self.write(examples, self.settings(config), batch_size=batch_size)
        timed = {"timed": np.array(True)} if config is not None and config.times else {}
        outputs = [{"tokens": np.array(tokens, np.int64), **timed} for tokens in written]
        found = zip(outputs, rows, examples, strict=True)
        return [self.task.decode(output, row, example, self.processor, ()) for output, row, example in found]

    def settings(self, config: GenerateConfig | None) -> Search:
        """Return the bundle's search, with what the user asks for in its place."""
        own: Search = self.writing.search
        if config is None:
            return own
        asked: dict[str, Any] = {
            "num_beams": config.num_beams,
            "length_penalty": config.length_penalty,
            "no_repeat_ngram_size": config.no_repeat_ngram_size,
        }
        if config.times:
            own = self.task.timed(own, self.processor)
        return dataclasses.replace(own.limited(config.max_new_tokens), **{k: v for k, v in asked.items() if v is not None})

    def encode_row(self, row: Row) -> Example:
        """Return a row as the model reads it, cut to its length; an answer that is there already does not count."""
        source = {name: value for name, value in self.task.normalize(row).items() if name != self.task.answer_column}
        if self.task.answered not in source:
            raise DataError(f'the row has no "{self.task.answered}"')
        return self.task.truncate(self.task.encode(source, self.processor, ()), self.max_length)

    def write(self, examples: Sequence[Example], settings: Search, *, batch_size: int = 16) -> list[list[int]]:
        """Return the tokens written about each example. Those of like length are searched together."""
        written: list[list[int]] = [[] for _ in examples]
        order = sorted(range(len(examples)), key=lambda index: -len(examples[index]))
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            steps = self.read([examples[number] for number in numbers])
            for number, tokens in zip(numbers, search(steps, len(numbers), settings), strict=True):
                written[number] = tokens
        return written

    def losses(
        self, examples: Sequence[Example], watch: Callable[[int, NDArray[np.float32]], None] | None = None
    ) -> list[tuple[float, int]]:
        """Return summed negative log-likelihood (nats) and number of target tokens of each example."""
        from edgelora.run.predictor import token_losses

        found = []
        for number, example in enumerate(examples):
            steps, target, total = self.read([example]), example.arrays["target"], 0.0
            inputs = self.writing.batch([target])["decoder_input_ids"]
            size = max(1, SCORED_FLOATS // self.vocab_size)
            for start in range(0, len(target), size):
                logits = steps.feed(inputs[:, start : start + size])[0]
                if watch is not None:
                    watch(number, logits)
                total += token_losses(logits, target[start : start + size])
            found.append((total, len(target)))
        return found

    @property
    def vocab_size(self) -> int:
        return int(self.decoder.get_outputs()[0].shape[-1])

    def read(self, examples: Sequence[Example]) -> OnnxSteps:
        """Return the decoder at its beginning, over what the encoder makes of examples."""
        batch = self.task.sources(examples, self.processor)
        (hidden,) = self.encoder.run(["last_hidden_state"], {name: batch[name] for name in self.encoder_names})
        mask = batch.get("attention_mask") if "encoder_attention_mask" in self.decoder_names else None
        return OnnxSteps(self.decoder, hidden, mask)


class OnnxSteps:
    """The decoder step by step (search.Steps), one row of its cache for each example."""

    def __init__(self, session: Any, hidden: NDArray[np.float32], mask: NDArray[np.int64] | None) -> None:
        self.session, self.hidden, self.mask = session, hidden, mask
        self.sources = np.arange(len(hidden))  # of each row of the cache
        self.outputs = [value.name for value in session.get_outputs()]
        shapes = {value.name: value.shape for value in session.get_inputs() if value.name.startswith(PAST)}
        self.past: Mapping[str, NDArray[np.float32]] = {
            name: np.zeros((len(hidden), shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()
        }

    def start(self, prompt: Sequence[int]) -> Scores:
        return last(self.feed(np.array([list(prompt)] * len(self.hidden), np.int64)))

    def step(self, tokens: NDArray[np.int64], rows: NDArray[np.int64]) -> Scores:
        if not np.array_equal(rows, np.arange(len(self.sources))):
            # What was read is the same for all beams of a source.
            moved = len(rows) != len(self.sources) or not np.array_equal(self.sources[rows], self.sources)
            self.past = {n: array[rows] if moved or READ not in n else array for n, array in self.past.items()}
            if moved:
                self.mask = None if self.mask is None else self.mask[rows]
                self.hidden = self.hidden[rows]
            self.sources = self.sources[rows]
        return last(self.feed(tokens[:, None].astype(np.int64)))

    def feed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append tokens `[rows, n]`; return the logits `[rows, n, vocabulary]`."""
        feeds: dict[str, NDArray[Any]] = {"input_ids": ids, HIDDEN: self.hidden, **self.past}
        if self.mask is not None:
            feeds["encoder_attention_mask"] = self.mask
        found = dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))
        self.past = {name: found[PRESENT + name.removeprefix(PAST)] for name in self.past}
        self.hidden = self.hidden[:, :0]  # it is in the cache now
        logits: NDArray[np.float32] = found["logits"]
        return logits


def last(logits: NDArray[np.float32]) -> Scores:
    row: Scores = logits[:, -1]
    return row


def encoder_path(bundle: Bundle) -> Path:
    try:
        return inside(bundle.folder, bundle.manifest["encoder_file"])
    except (KeyError, TypeError) as error:
        raise FolderError(f"{bundle.folder} is damaged: its manifest names no encoder ({error})") from None
