"""Stages meet only in folders: written to a temporary sibling and renamed when complete, each with a manifest.

manifest (edgelora.json): {"format": 1, "kind": "run"|"merged"|"bundle"|"store", "tool_version": …, "complete": bool,
"files": {relative path: sha256}, "settings": {…}, and what the stage adds}
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgelora import __version__
from edgelora.errors import FolderError, MachineError

MANIFEST = "edgelora.json"
FORMAT_VERSION = 1
MAKERS = {
    "run": "edgelora finetune MODEL DATA -o RUN",
    "merged": "edgelora merge RUN -o MERGED",
    "bundle": "edgelora export RUN_OR_MODEL -o BUNDLE",
}

# What readers take for granted: the kind of each part that a manifest has, and the parts that every trained run has.
PARTS: dict[str, type] = {
    "complete": bool, "files": dict, "task": str, "labels": list, "model": dict, "settings": dict, "plan": dict, "grid": dict,
    "results": list, "layers": dict,
}  # fmt: skip
RUN = {"task": (), "labels": (), "model": ("reference", "fingerprint"), "settings": (), "plan": ("base_bits",), "grid": ()}


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that becomes `path` when the block ends well and is removed when it does not."""
    restore_old(path)
    refuse_existing(path, overwrite=overwrite)
    make_parents(path)
    with lock(path), disk_errors(path):
        staging = path.with_name(f".{path.name}.partial")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
            swap_in(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def make_parents(path: Path) -> None:
    """Make the folder around `path`. Raises FolderError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise FolderError(f"{path.parent} cannot be made: {error.strerror}", hint="choose another folder with -o") from None


def swap_in(staging: Path, path: Path) -> None:
    """Put `staging` in the place of `path`; whatever happens, one of the two complete folders stays there."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    staging.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def restore_old(path: Path) -> None:
    """Put back the folder that a process killed in the middle of `swap_in` had moved aside."""
    old = path.with_name(f".{path.name}.old")
    if old.is_dir() and not path.exists():
        with lock(path):
            old.rename(path)


def refuse_existing(path: Path, *, overwrite: bool, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raise FolderError where `path` must not be written: it is there already, is not ours, or holds one of the `inputs`."""
    if overwrite and path.is_dir():
        for read in inputs:
            if (
                read is not None
                and (found := Path(read).expanduser()).exists()
                and found.resolve().is_relative_to(path.resolve())
            ):
                raise FolderError(
                    f"{path} holds {read}, which is read: it is not overwritten", hint="choose another folder with -o"
                )
    foreign = path.is_file() or (path.is_dir() and not is_ours(path) and any(path.iterdir()))
    if overwrite and foreign:
        raise FolderError(f"{path} was not written by EdgeLoRA and is not overwritten", hint="choose another folder with -o")
    if path.exists() and not overwrite:
        raise FolderError(f"{path} exists already", hint="add --overwrite, or choose another folder with -o")


def is_ours(path: Path) -> bool:
    return (path / MANIFEST).is_file()


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Let one process at a time write to `path`; the lock file beside it is free again when the process ends."""
    import filelock

    lock_file = path.with_name(f".{path.name}.lock")
    held = filelock.FileLock(lock_file)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise FolderError(f"another process is writing to {path}", hint="wait for it to end") from None
    try:
        yield
    finally:
        if os.name != "nt":  # Windows removes no open file; there filelock removes it after the release
            lock_file.unlink(missing_ok=True)  # before the release: after it, the file may be the next process's
        held.release()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into a message; what may not be read elsewhere is another matter."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free >> 20
            raise MachineError(f"the disk is full: writing {path} failed with {free} MB left", hint="free some space") from None
        elsewhere = error.filename and not Path(error.filename).resolve().is_relative_to(path.parent.resolve())
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and not elsewhere:
            raise FolderError(f"{path} cannot be written: {error.strerror}", hint="choose another folder with -o") from None
        raise


def write_manifest(folder: Path, kind: str, *, complete: bool = True, **content: Any) -> None:
    """Write the manifest of a folder, with the sha256 of each of its files, atomically."""
    files = {
        p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST
    }
    head = {"format": FORMAT_VERSION, "kind": kind, "tool_version": __version__, "complete": complete}
    write_json(folder / MANIFEST, {**head, **content, "files": files if complete else {}})


def read_manifest(folder: Path, *kinds: str) -> dict[str, Any]:
    """Return the manifest of a folder of one of the `kinds`; raises FolderError where there is none or it is newer."""
    wanted = " or ".join(kinds)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        kind, version = manifest["kind"], int(manifest["format"])
    except FileNotFoundError:
        found = "it does not exist" if not folder.exists() else f"it has no {MANIFEST}"
        raise FolderError(f"{folder} is not a {wanted} folder: {found}", hint=MAKERS.get(kinds[0])) from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, NotADirectoryError):
        raise FolderError(f"{folder / MANIFEST} is damaged") from None
    if version > FORMAT_VERSION:
        raise FolderError(
            f"{folder} has format {version}, written by EdgeLoRA {manifest.get('tool_version')}; "
            f"this one reads up to {FORMAT_VERSION}",
            hint="pip install --upgrade edgelora",
        )
    if wrong := wrong_parts(manifest):
        raise FolderError(f"{folder / MANIFEST} is damaged: {', '.join(wrong)}", hint="make it again with --overwrite")
    if kind not in kinds:
        raise FolderError(f"{folder} is a {kind} folder; a {wanted} folder is wanted", hint=MAKERS.get(kinds[0]))
    return dict(manifest)


def wrong_parts(manifest: dict[str, Any]) -> list[str]:
    """Return the parts of a manifest that no reader could use, by name."""
    wrong = [name for name, kind in PARTS.items() if name in manifest and not isinstance(manifest[name], kind)]
    if manifest["kind"] == "run" and "complete" not in manifest:
        wrong.append("complete")
    if wrong or manifest["kind"] != "run" or not manifest["complete"]:
        return wrong
    missing = [name for name in RUN if name not in manifest]
    return missing or [f"{name}.{key}" for name, keys in RUN.items() for key in keys if key not in manifest[name]]


def check_files(folder: Path, manifest: dict[str, Any], known: Container[Path] = ()) -> None:
    """Compare the files of a folder with the sha256 that its manifest lists; raises FolderError naming every bad one.

    Those that are `known` to be as they were when they were checked before must only be there.
    """
    bad = []
    for name, digest in manifest["files"].items():
        path = inside(folder, name)
        if not path.is_file():
            bad.append(f"{name}: missing")
        elif path not in known and sha256(path) != digest:
            bad.append(f"{name}: changed")
    if bad:
        raise FolderError("\n  ".join([f"{folder} is damaged:", *bad]), hint="make it again with --overwrite")


def inside(folder: Path, name: str) -> Path:
    """Return `folder / name`; raises FolderError if that leads outside of the folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise FolderError(f'"{name}" points outside of {folder}')
    return path


def inside_or_cached(folder: Path, name: str) -> Path:
    """Return the same; a link of huggingface_hub's cache, snapshots/COMMIT/name → blobs/HASH, may lead out of the folder."""
    path = folder / name
    snapshot = next((p for p in (folder.resolve(), *folder.resolve().parents) if p.parent.name == "snapshots"), None)
    if snapshot is not None and ".." not in Path(name).parts and path.resolve().parent == snapshot.parent.parent / "blobs":
        return path
    return inside(folder, name)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one."""
    text = json.dumps(content, indent=2, ensure_ascii=False)  # what JSON cannot hold is told before a file is touched
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
