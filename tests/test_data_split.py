"""The validation split and the store."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edgelora.data.split import choose_valid, parse_share, row_hash
from edgelora.data.store import Store, StoreWriter
from edgelora.errors import FolderError, SettingsError
from edgelora.tasks.base import Example


def hashes(count: int) -> list[int]:
    return [row_hash({"text": str(number)}) for number in range(count)]


@pytest.mark.parametrize(
    ("rows", "share", "wanted"),
    [(2, None, 1), (10, None, 1), (200, None, 20), (9000, None, 500), (9000, 0.1, 900), (4, 0.5, 2)],
)
def test_a_tenth_validates_at_most_500_at_least_one(rows: int, share: float | None, wanted: int) -> None:
    assert len(choose_valid(hashes(rows), [None] * rows, share)) == wanted


def test_the_split_depends_on_the_rows_alone() -> None:
    values = hashes(300)
    assert choose_valid(values, [None] * 300) == choose_valid(values[::-1], [None] * 300)
    assert row_hash({"a": 1, "b": "é"}) == row_hash({"b": "é", "a": 1}) == 18088570444961153222


def test_identical_rows_stay_together() -> None:
    values = hashes(20) * 5
    chosen = choose_valid(values, [None] * 100)
    assert sum(value in chosen for value in values) == 10
    assert choose_valid(hashes(1) * 9, [None] * 9) == set()


def test_labels_keep_their_shares_and_rare_ones_their_training_row() -> None:
    values, labels = hashes(331), ["a"] * 200 + ["b"] * 100 + ["c"] * 30 + ["rare"]
    chosen = choose_valid(values, labels)
    assert Counter(label for value, label in zip(values, labels, strict=True) if value in chosen) == {"a": 20, "b": 10, "c": 3}


def test_shares_and_files() -> None:
    assert [parse_share(text) for text in (None, "0.25", "valid.jsonl")] == [None, 0.25, None]
    for text in ("0", "1", "-0.1", "nan", "20"):
        with pytest.raises(SettingsError) as caught:
            parse_share(text)
        assert caught.value.message == f"--valid is {text}; allowed: a file, or a share between 0 and 1"


def example(length: int, label: int) -> Example:
    return Example({"ids": np.arange(length, dtype=np.int32), "label": np.array(label, dtype=np.int32)})


def test_a_store_gives_back_its_examples(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store")
    for length in (3, 1, 5):
        writer.add(example(length, length * 10))
    writer.close()
    store = Store.open(tmp_path / "store")
    assert store.lengths.tolist() == [3, 1, 5]
    assert [int(e.arrays["label"]) for e in store] == [30, 10, 50]
    assert [len(e) for e in store[1:]] == [1, 5]
    assert store[-1].arrays["ids"].tolist() == [0, 1, 2, 3, 4]
    assert store[0].arrays["ids"].dtype == np.int32
    assert not store[0].arrays["ids"].flags.owndata  # mapped, not read
    with pytest.raises(IndexError, match="row 3 of 3"):
        store[3]


def test_a_damaged_store_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store")
    writer.add(example(3, 1))
    writer.close()
    with pytest.raises(FolderError, match=r"is not a store: store\.json is missing"):
        Store.open(tmp_path)
    (tmp_path / "store" / "ids.bin").write_bytes(b"\0" * 8)
    with pytest.raises(FolderError, match="is damaged: ids does not have the values of 1 rows"):
        Store.open(tmp_path / "store")
    (tmp_path / "store" / "ids.bin").write_bytes(b"")
    with pytest.raises(FolderError, match="is damaged: "):
        Store.open(tmp_path / "store")
    for arrays, said in (("[]", "is damaged: "), ('{"../../x": {"dtype": "int32", "shape": null}}', "points outside of")):
        (tmp_path / "store" / "store.json").write_text(f'{{"rows": 1, "arrays": {arrays}}}')
        with pytest.raises(FolderError, match=said):
            Store.open(tmp_path / "store")
