"""What a row of the table is: how its data and model are made, and what is asked of the commands."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEED = 0


class Missing(Exception):
    """Something that a row needs is not on this machine; the row is left out, and the table says why."""


@dataclass(frozen=True)
class Places:
    """data: the folder of data sets. models: pretrained folders. work: what is made here. extra: other data, by name."""

    data: Path
    models: Path
    work: Path
    extra: dict[str, Path] = field(default_factory=dict)

    def source(self, name: str) -> Path:
        """Return a file or folder of the data. Raises Missing."""
        return there(self.extra.get(name) or self.data / name, f"give it with --extra {name}=PATH, or in --data")

    def model(self, name: str) -> Path:
        """Return the folder of a pretrained model. Raises Missing."""
        return there(self.models / name, "give the folder of models with --models")


def there(path: Path, hint: str) -> Path:
    if not path.exists():
        raise Missing(f"no {path}: {hint}")
    return path


@dataclass(frozen=True)
class Prepared:
    """What the commands are given: MODEL, DATA (train and valid), the held-out rows, and --columns.

    base: the model as it comes, where MODEL was made from it.
    """

    model: str
    data: Path
    test: Path
    columns: str = ""
    note: str = ""
    base: str = ""


@dataclass(frozen=True)
class Entry:
    """One row. `options` are flags of `finetune`, `export` those of `export`; `rows` is how many test rows are scored.

    has_head: a head is drawn for these rows' labels, and can be trained alone; the base is then what the closing table of the
    run says on its validation rows, since a model without a head cannot be scored.
    """

    name: str
    task: str
    model: str
    data: str
    metric: str
    prepare: Callable[[Places], Prepared]
    options: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    has_head: bool = True
    rows: int | None = None
    generate: bool = True


def shuffled(items: Sequence[Any]) -> list[Any]:
    """Return the items in an order of their own, always the same."""
    return random.Random(SEED).sample(list(items), len(items))


def split(items: Sequence[Any], **counts: int) -> dict[str, list[Any]]:
    """Share shuffled items out: each named split its count, in order; a count of -1 takes what is left."""
    order, found, start = shuffled(items), {}, 0
    for name, count in counts.items():
        stop = len(order) if count < 0 else start + count
        found[name], start = order[start:stop], stop
    return found


def new_folder(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path
