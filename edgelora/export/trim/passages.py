"""The text that a vocabulary is kept for: the rows of a run, those of a file, and what the chat template itself writes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.data.check import Problems, check_columns, map_columns, peek_columns
from edgelora.data.files import find_files
from edgelora.data.prepare import PREPARED, Prepared
from edgelora.data.read import iterate_file
from edgelora.errors import DataError, SettingsError
from edgelora.quant.checkpoint import MergedCheckpoint
from edgelora.tasks import get_task
from edgelora.tokenizer import Tokenizer

CHATS = (("user",), ("system", "user"), ("user", "assistant", "user"))

Passage = tuple[str, str | None, bool]  # text, second text or None, whether with special tokens: an `encode`


@dataclass(frozen=True)
class Source:
    """Where the text comes from that the vocabulary is kept for; either may be None."""

    run: Path | None
    data: str | None
    columns: Mapping[str, str] = field(default_factory=dict)


class Heard(Tokenizer):
    """A tokenizer that remembers what it was asked to encode."""

    passages: list[Passage]

    def _encode(self, text: str, pair: str | None, add_special_tokens: bool) -> Any:
        self.passages.append((text, pair, add_special_tokens))
        return super()._encode(text, pair, add_special_tokens)


@dataclass
class Passages:
    """The text that the vocabulary is kept for, as often as it is asked for: files are read again, nothing is kept."""

    tokenizer: Heard
    checkpoint: MergedCheckpoint
    source: Source

    def __post_init__(self) -> None:
        run = self.source.run
        self.prepared = Prepared.open(run / "data") if run is not None and (run / "data" / PREPARED).is_file() else None
        if self.prepared is None and self.source.data is None:
            raise SettingsError(
                "--trim-vocabulary keeps the tokens of rows, and here are none: no run, or one whose rows are gone",
                hint="--trim-vocabulary rows.jsonl",
            )

    def ids(self) -> set[int]:
        """Return the ids of all of it; of a run's rows, those that it was trained with."""
        found: set[int] = set()
        for text, pair, special in self:
            found.update(Tokenizer._encode(self.tokenizer, text, pair, special).ids)
        for values in self._stored():
            found.update(np.unique(values).tolist())
        return found

    def __iter__(self) -> Iterator[Passage]:
        yield from self._chats()
        for split, rows in self._rows():
            if self.prepared is not None and split == "train":
                yield from ((self.tokenizer.decode(row.tolist(), skip_special_tokens=False), None, False) for row in rows)
            else:
                for row in rows:
                    yield from self._heard(row)

    def _stored(self) -> Iterator[Any]:
        if self.prepared is not None:
            for split in self.prepared.rows:
                yield self.prepared.store(split).values["ids"]

    def _rows(self) -> Iterator[tuple[str, Any]]:
        if self.prepared is not None:
            yield "train", (example.arrays["ids"] for example in self.prepared.store("train"))
            for split in ("valid", "test"):
                if split in self.prepared.rows:
                    yield split, self.prepared.texts(split)
        if self.source.data is not None:
            yield "given", self._read(self.source.data)

    def _read(self, data: str) -> Iterator[Any]:
        """Yield the rows of the user's file, of all its splits. Raises DataError for rows that cannot be read."""
        task, problems = get_task(self.checkpoint.task), Problems()
        for paths in find_files(data).values():
            check_columns(task, self.source.columns, peek_columns(paths[0], self.source.columns), data)
            for path in paths:
                for line, row in iterate_file(path, functools.partial(problems.add, path)):
                    taken = task.normalize(map_columns(row, self.source.columns))
                    for text in (problem for problem in task.problems(taken) if '"label"' not in problem):
                        problems.add(path, line, text)
                    if not problems.found:
                        yield taken
        problems.refuse(data)

    def _heard(self, row: Any) -> Iterator[Passage]:
        self.tokenizer.passages.clear()
        get_task(self.checkpoint.task).encode(row, self.tokenizer, self.checkpoint.labels)
        yield from list(self.tokenizer.passages)

    def _chats(self) -> Iterator[Passage]:
        """Yield what the chat template itself writes."""
        for roles in CHATS if self.tokenizer.chat_template is not None else ():
            messages = [{"role": role, "content": "a"} for role in roles]
            try:
                yield self.tokenizer.render_chat(messages, add_generation_prompt=True), None, False
            except DataError:  # a template that knows no system messages says so
                continue
