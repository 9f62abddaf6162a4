"""System turns in the user's cache folder: the same tokens from the next process, private, bounded, and never trusted."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edgelora
from edgelora.errors import SettingsError
from edgelora.run.decoder import Cache
from edgelora.run.model import Model
from edgelora.run.stored import Store, find_store

SYSTEM = "You are the assistant of a home, and you answer in few words. Turn what people say into one call of a function."
SETTINGS = {"system": SYSTEM, "max_new_tokens": 8}
posix = pytest.mark.skipif(sys.platform == "win32", reason="modes of files are POSIX's")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELORA_PREFIX_CACHE", str(tmp_path / "prefixes"))
    monkeypatch.setenv("EDGELORA_PREFIX_CACHE_GB", "0.1")
    return tmp_path / "prefixes"


def ask(bundle: Path, text: str = "light on") -> tuple[list[int], int]:
    """Return the tokens that a model opened anew writes, and how many of the prompt's it had."""
    answer = edgelora.load(bundle, threads=1).answer(text, **SETTINGS)
    return answer.tokens, answer.reused


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def test_nothing_is_written_unless_asked_for(decoder_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (None, "0"):
        monkeypatch.delenv("EDGELORA_PREFIX_CACHE_GB", raising=False)
        if limit is not None:
            monkeypatch.setenv("EDGELORA_PREFIX_CACHE_GB", limit)
        assert ask(decoder_bundle)[1] == 0
    assert not folder.exists()
    monkeypatch.setenv("EDGELORA_PREFIX_CACHE_GB", "much")
    with pytest.raises(SettingsError, match='EDGELORA_PREFIX_CACHE_GB is "much"'):
        edgelora.load(decoder_bundle)


def test_the_next_process_starts_from_the_turn_and_writes_the_same(
    decoder_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again, other = ask(decoder_bundle), ask(decoder_bundle), ask(decoder_bundle, "something else")
    assert first[1] == 0
    assert again[1] == other[1] == len(SYSTEM) + 3
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "light on"}]
    assert edgelora.load(decoder_bundle, threads=1).answer(chat).reused == again[1], "given as a chat it is the same turn"
    assert len(entries(folder)) == 1
    assert edgelora.load(decoder_bundle, threads=1).answer("light on", system="Be short.").reused == 0
    assert len(entries(folder)) == 1, "a short one is not kept"
    monkeypatch.delenv("EDGELORA_PREFIX_CACHE_GB")
    assert [ask(decoder_bundle)[0], ask(decoder_bundle, "something else")[0]] == [first[0], other[0]]
    assert first[0] == again[0]


@posix
def test_files_are_the_users_alone(
    decoder_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = os.umask(0)
    try:
        ask(decoder_bundle)
    finally:
        os.umask(old)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, *entries(folder))] == [0o700, 0o600]
    folder.chmod(0o750)
    assert ask(decoder_bundle)[1] == 0, "others could have put something there"
    assert "chmod 700" in capsys.readouterr().err
    folder.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert ask(decoder_bundle)[1] == 0, "somebody else's folder"


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-100],
    "empty": lambda data: b"",
    "one bit": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "no digest": lambda data: data.replace(b'"sha256"', b'"sha257"'),
    "noise": lambda data: bytes(reversed(data)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_file_is_computed_anew(decoder_bundle: Path, folder: Path, change: str) -> None:
    wanted = ask(decoder_bundle)[0]
    (entry,) = entries(folder)
    data = entry.read_bytes()
    entry.write_bytes(CHANGES[change](data))
    assert ask(decoder_bundle) == (wanted, 0)
    assert [path.read_bytes() for path in entries(folder)] == [data]


def test_another_bundles_or_turns_entry_is_not_taken(decoder_bundle: Path, folder: Path) -> None:
    ask(decoder_bundle)
    model = edgelora.load(decoder_bundle, threads=1)
    store = model.generator.store
    assert store is not None
    (entry,) = entries(folder)
    ids = [*range(70)]
    entry.rename(store.path(ids))
    assert store.find(ids, model.generator.decoder.cache_shapes) is None, "a file under another turn's name"
    assert entries(folder) == []
    changed = {**model.bundle.manifest, "files": {**model.bundle.manifest["files"], "onnx/model.onnx": "0"}}
    object.__setattr__(model.bundle, "manifest", changed)
    other = find_store(model.bundle)
    assert other is not None
    assert other.path(ids) != store.path(ids)


def cache(count: int) -> Cache:
    return {"past_key_values.0.key": np.ones((1, 1, count, 8), np.float32)}


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    store, shapes = Store(tmp_path / "kept", 3 * 80 * 32 + 2500, "bundle"), {"past_key_values.0.key": (1, 8)}
    for number in range(3):
        store.add([number] * 80, cache(80))
        os.utime(store.path([number] * 80), (number + 1, number + 1))
    assert store.find([0] * 80, shapes) is not None, "now it is the most recently used"
    store.add([3] * 80, cache(80))
    assert [store.find([number] * 80, shapes) is not None for number in range(4)] == [True, False, True, True]
    store.add([4] * 4000, cache(4000))
    assert len(entries(store.folder)) == 3, "what is larger than all may be is not kept"


def test_a_folder_that_cannot_be_written_costs_a_warning_alone(
    decoder_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("EDGELORA_PREFIX_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("EDGELORA_PREFIX_CACHE_GB", "1")
    model: Model = edgelora.load(decoder_bundle, threads=1)
    for text in ("a", "b"):
        model.generator.kept.entries.clear()
        model.generator.forget()
        assert model.answer(text, **SETTINGS).tokens
    assert capsys.readouterr().err.count("not kept on disk") == 1
