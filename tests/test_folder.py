"""Folders: complete or not there, one writer at a time, damage and newer formats told."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import tiny

from edgelora import folder
from edgelora.errors import FolderError, MachineError


def make(path: Path, *, overwrite: bool = False, text: str = "content") -> None:
    with folder.new_folder(path, overwrite=overwrite) as staging:
        (staging / "file.txt").write_text(text)
        folder.write_manifest(staging, "merged", task="t")


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(TypeError), folder.new_folder(tmp_path / "deep" / "out") as staging:
        folder.write_json(staging / "half", object())
    assert list((tmp_path / "deep").iterdir()) == []
    make(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["edgelora.json", "file.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "out"]


def test_a_failed_overwrite_keeps_the_old(tmp_path: Path) -> None:
    make(tmp_path / "out", text="old")
    with pytest.raises(RuntimeError), folder.new_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "out" / "file.txt").read_text() == "old"
    make(tmp_path / "out", overwrite=True, text="new")
    assert (tmp_path / "out" / "file.txt").read_text() == "new"


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    make(tmp_path / "out", text="old")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(FolderError, match="exists already"):
        make(tmp_path / "out", text="new")
    assert (tmp_path / "out" / "file.txt").read_text() == "old"


def test_what_exists_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(FolderError) as caught:
        make(tmp_path / "out")
    assert caught.value.message == f"{tmp_path / 'out'} exists already"
    assert caught.value.hint == "add --overwrite, or choose another folder with -o"


@pytest.mark.parametrize("foreign", ["folder", "file"])
def test_what_is_not_ours_is_never_overwritten(tmp_path: Path, foreign: str) -> None:
    target = tmp_path / "theirs"
    if foreign == "folder":
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")
    else:
        target.write_text("years of work")
    with pytest.raises(FolderError, match="was not written by EdgeLoRA and is not overwritten"):
        make(target, overwrite=True)
    assert target.exists()
    assert not (target / "edgelora.json").exists()


def test_what_is_read_is_never_overwritten(tmp_path: Path) -> None:
    from edgelora.config import FinetuneConfig
    from edgelora.export.export import export
    from edgelora.merging.merge import merge
    from edgelora.train.finetune import finetune

    model, run = tiny.save_decoder(tmp_path / "model"), tmp_path / "run"
    make(run)
    rows = run / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": "b"}\n')
    for attempt in (
        lambda: merge(run, run, overwrite=True),
        lambda: merge(None, run, adapter=run, model=str(model), overwrite=True),
        lambda: merge(None, run, model=str(model), calibrate=str(rows), overwrite=True),
        lambda: export(str(run), tmp_path / "model" / ".." / "run", overwrite=True),
        lambda: finetune(str(model), str(rows), run, FinetuneConfig(), overwrite=True),
    ):
        with pytest.raises(FolderError, match="which is read: it is not overwritten"):
            attempt()
    assert rows.is_file()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with folder.lock(tmp_path / "out"), pytest.raises(FolderError, match="another process is writing to"):
        make(tmp_path / "out")
    make(tmp_path / "out")


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        (errno.ENOSPC, MachineError, "the disk is full: writing .* failed with .* MB left"),
        (errno.EROFS, FolderError, "cannot be written"),
    ],
)
def test_a_full_or_closed_disk(tmp_path: Path, code: int, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text), folder.new_folder(tmp_path / "out"):
        raise OSError(code, "as the system says it")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_may_not_be_read_is_no_matter_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), folder.new_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path.parent / "rows.jsonl"))
    with pytest.raises(FolderError, match="cannot be written"), folder.new_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".out.partial" / "file"))


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="file cannot be made: File exists"):
        make(tmp_path / "file" / "out")
    with pytest.raises(FolderError, match="cannot be made: Not a directory"):
        make(tmp_path / "file" / "deep" / "out")


def test_manifests_are_read_back(tmp_path: Path) -> None:
    make(tmp_path / "out")
    manifest = folder.read_manifest(tmp_path / "out", "run", "merged")
    assert manifest["task"] == "t"
    assert manifest["files"].keys() == {"file.txt"}
    folder.check_files(tmp_path / "out", manifest)
    (tmp_path / "out" / "file.txt").write_text("spoiled")
    with pytest.raises(FolderError, match=r"file\.txt: changed"):
        folder.check_files(tmp_path / "out", manifest)
    (tmp_path / "out" / "file.txt").unlink()
    with pytest.raises(FolderError, match=r"file\.txt: missing"):
        folder.check_files(tmp_path / "out", manifest)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("not json", "is damaged"),
        ("[]", "is damaged"),
        ("[" * 200_000, "is damaged"),
        ('{"kind": "run", "format": 1e999}', "is damaged"),
        ('{"kind": "run", "format": null}', "is damaged"),
        ('{"kind": "run", "format": 1, "complete": true, "labels": 3}', r"is damaged: labels"),
        ('{"kind": "run", "format": 1, "complete": true, "labels": []}', r"is damaged: task, model, settings, plan, grid"),
        ('{"kind": "run", "format": 1}', r"is damaged: complete"),
        ('{"kind": "store", "format": 1}', "is a store folder; a run folder is wanted"),
        ('{"kind": "run", "format": 99, "tool_version": "9.0"}', r"has format 99, written by EdgeLoRA 9\.0; this one reads up"),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path: Path, content: str, text: str) -> None:
    (tmp_path / "edgelora.json").write_text(content)
    with pytest.raises(FolderError, match=text):
        folder.read_manifest(tmp_path, "run")


def test_names_may_not_lead_outside(tmp_path: Path) -> None:
    make(tmp_path / "out")
    manifest = {"files": {"../secret": "0"}}
    with pytest.raises(FolderError, match="points outside of"):
        folder.check_files(tmp_path / "out", manifest)


def test_json_is_replaced_in_one_move(tmp_path: Path) -> None:
    folder.write_json(tmp_path / "a.json", {"ä": 1})
    with pytest.raises(TypeError):
        folder.write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ä": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
