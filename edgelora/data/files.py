"""Which files DATA means: a file, a folder with train, valid and test, or a data set on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from edgelora.data.parallel import languages_of, parallel_files
from edgelora.data.pictures import has_pictures
from edgelora.data.read import READERS
from edgelora.errors import DataError, MachineError

SPLITS = {"train": ("train", "training"), "valid": ("valid", "validation", "dev", "val", "eval"), "test": ("test", "testing")}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Files = dict[str, list[Path]]
"""Split name → its files."""


def find_files(data: str, *, trains: bool = True) -> Files:
    """Return the files of DATA by split; "train" is among them, unless nothing is to be trained and there are others.

    Raises DataError when there are none; a hub id is fetched (or found in the cache).
    """
    path = Path(data).expanduser()
    if path.is_file():
        if path.suffix.lower() not in READERS and not languages_of(path):
            raise DataError(f"{data} is not a data file; allowed: {', '.join(READERS)}")
        if not os.access(path, os.R_OK):
            raise DataError(f"{data} cannot be read: no permission")
        return {"train": [path]}
    if path.is_dir():
        return folder_files(path, data, trains=trains)
    if HUB_ID.fullmatch(data) and path.suffix.lower() not in READERS:
        return folder_files(fetch(data), data, trains=trains)
    raise DataError(f"no such file or folder: {data}", hint="give a .jsonl, .csv or .parquet file, a folder or a hub id")


def folder_files(folder: Path, name: str, *, trains: bool = True) -> Files:
    """Return the files of a folder: train.jsonl, valid.csv, data/train-00000-of-00002.parquet, train/0.parquet …"""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in READERS and not hidden(p.relative_to(folder)))
    if not found and (labelled := labelled_folders(folder)):
        return labelled
    found = found or parallel_files(folder)
    files: Files = {}
    for path in found:
        relative = path.relative_to(folder)
        words = re.split(r"[-_.\\/]|(?<=[a-z])(?=\d)", relative.as_posix().lower())
        for split, names in SPLITS.items():
            if set(words).intersection(names):
                files.setdefault(split, []).append(path)
                break
    if "train" not in files and not files and len(found) == 1:
        return {"train": found}
    if "train" not in files and (trains or not files):
        listed = ", ".join(p.relative_to(folder).as_posix() for p in found[:10]) or "no data file"
        raise DataError(
            f"{name} has no train file; found: {listed}", hint="name the files train.jsonl, valid.jsonl and test.jsonl"
        )
    return files


def labelled_folders(folder: Path) -> Files:
    """Return FOLDER/{train,valid,test} where these hold pictures, or sounds by label, else FOLDER as train, or {}."""
    inside = [path for path in folder.iterdir() if path.is_dir() and not hidden(path.relative_to(folder))]
    named = {split: [path for path in inside if path.name.lower() in names] for split, names in SPLITS.items()}
    files = {split: paths for split, paths in named.items() if any(map(has_pictures, paths))}
    if "train" in files:
        return files
    return {"train": [folder]} if has_pictures(folder) else {}


def hidden(relative: Path) -> bool:
    return any(part.startswith((".", "_")) for part in relative.parts)


def fetch(name: str) -> Path:
    """Return the folder of a hub data set's files, fetched once; without a network what was fetched before is used."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise MachineError("data sets of the hub need huggingface_hub", hint='pip install "edgelora[train]"') from None
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=[f"*{suffix}" for suffix in READERS]))
    except LocalEntryNotFoundError:
        raise DataError(
            f'"{name}" is no file or folder here, and the hub cannot be reached', hint="give the path of a file or folder"
        ) from None
    except (HfHubHTTPError, ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f'"{name}" is no file or folder here, and the hub gives no such data set: {first}') from None
