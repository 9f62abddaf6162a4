"""Packed weights in the user's cache: the same numbers; entries that are damaged, old, too many, or cannot be written."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import edgelora
from edgelora.bundle import open_bundle
from edgelora.errors import FolderError, SettingsError
from edgelora.run import packed
from edgelora.run.decoder import DecoderSession

IDS = np.random.default_rng(0).integers(0, 250, 40).tolist()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELORA_PACKED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed, "LEAST_BYTES", 1)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, decoder_model: Path) -> Path:
    """The .onnx file of an int4 bundle."""
    from edgelora.export.export import export

    folder = tmp_path_factory.mktemp("packed") / "bundle"
    export(str(decoder_model), folder, precision="int4")
    return open_bundle(folder).model_path


def logits(model: Path, *, use: bool = True) -> np.ndarray:
    session = DecoderSession(model, max_length=64, threads=1, packed=use)
    return np.stack([session.prefill(IDS).copy(), *(session.step(token).copy() for token in IDS[:5])])


def entries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir()) if cache.exists() else []


def test_what_is_mapped_gives_the_same_numbers(model: Path, cache: Path) -> None:
    plain, written, mapped = logits(model, use=False), logits(model), logits(model)
    assert [len(entries(cache)), len(list(entries(cache)[0].iterdir()))] == [1, 2]
    np.testing.assert_array_equal(written, plain)
    np.testing.assert_array_equal(mapped, plain)


def test_the_second_session_opens_the_entry_and_can_select_and_score(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = DecoderSession(model, max_length=64, threads=1, packed=True)
    opened = []
    real = packed.open_session
    monkeypatch.setattr(packed, "open_session", lambda path, **given: opened.append(path) or real(path, **given))
    second = DecoderSession(model, max_length=64, threads=1, packed=True)
    assert opened == [entries(cache)[0] / packed.GRAPH]
    assert second.engine.selects
    assert (second.vocab_size, second.cache_shapes) == (first.vocab_size, first.cache_shapes)
    np.testing.assert_array_equal(second.score(IDS), first.score(IDS))


def test_packed_weights_are_not_read_to_be_checked_until_they_change(model: Path, cache: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(model.parents[1], tmp_path / "bundle")
    copy = open_bundle(bundle).model_path
    assert packed.packed_from(copy) == ()
    answer = edgelora.load(bundle, threads=1).generate("a b", max_new_tokens=4)
    weights = copy.with_name(f"{copy.name}_data")
    assert packed.packed_from(copy) == (copy, weights)
    assert edgelora.load(bundle, threads=1).generate("a b", max_new_tokens=4) == answer
    before = weights.stat()
    changed = bytearray(weights.read_bytes())
    changed[7] ^= 1
    weights.write_bytes(changed)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(FolderError, match=r"model_q4\.onnx_data: changed"):
        edgelora.load(bundle, threads=1)


def test_a_damaged_entry_is_replaced(model: Path, cache: Path) -> None:
    wanted = logits(model)
    (entries(cache)[0] / packed.GRAPH).write_bytes(b"nonsense")
    np.testing.assert_array_equal(logits(model), wanted)
    assert (entries(cache)[0] / packed.GRAPH).stat().st_size > 1000
    (entries(cache)[0] / packed.WEIGHTS).unlink()
    np.testing.assert_array_equal(logits(model), wanted)


def test_a_model_that_changed_has_another_entry(model: Path, cache: Path) -> None:
    logits(model)
    os.utime(model, ns=(1, 1))
    logits(model)
    assert len(entries(cache)) == 2


def test_the_least_recently_used_goes_first(cache: Path) -> None:
    for age, name in enumerate(("new", "old", "oldest")):
        (cache / name).mkdir(parents=True)
        (cache / name / packed.WEIGHTS).write_bytes(bytes(100))
        os.utime(cache / name, (1e9 - age, 1e9 - age))
    (cache / ".left").mkdir()
    os.utime(cache / ".left", (1e9, 1e9))
    (cache / ".being-written").mkdir()
    packed.make_room(cache, 250)
    assert [path.name for path in entries(cache)] == [".being-written", "new", "old"]


def test_nothing_is_written_where_it_may_not_or_need_not(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = logits(model, use=False)
    monkeypatch.setenv("EDGELORA_PACKED_CACHE_GB", "0")
    np.testing.assert_array_equal(logits(model), wanted)
    monkeypatch.delenv("EDGELORA_PACKED_CACHE_GB")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(logits(model), wanted)
    assert entries(cache) == []
    monkeypatch.setattr(packed, "LEAST_BYTES", 1 << 30)
    np.testing.assert_array_equal(logits(model), wanted)
    assert entries(cache) == []
    monkeypatch.setattr(packed, "LEAST_BYTES", 1)
    shutil.rmtree(cache, ignore_errors=True)
    cache.write_text("a file in its place", encoding="utf-8")
    np.testing.assert_array_equal(logits(model), wanted)


def test_what_changes_a_number_is_never_used(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = logits(model, use=False)
    found = itertools.count()
    monkeypatch.setattr(packed, "probe", lambda session: np.array([next(found)]))  # no session gives another's numbers
    for _ in range(2):
        np.testing.assert_array_equal(logits(model), wanted)
    assert [list(entry.iterdir()) for entry in entries(cache)] == [[]]


def test_a_limit_that_is_no_number_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELORA_PACKED_CACHE_GB", "many")
    with pytest.raises(SettingsError, match='EDGELORA_PACKED_CACHE_GB is "many"'):
        packed.cache_bytes()


def test_answers_are_the_same(model: Path, cache: Path) -> None:
    bundle = model.parents[1]
    texts = [edgelora.load(bundle, threads=1).generate("abc", raw=True, max_new_tokens=20) for _ in range(2)]
    assert len(entries(cache)) == 1
    assert texts[0] == texts[1]
