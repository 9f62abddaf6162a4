"""Weights in the order that this machine's kernels read them, in the user's cache: mapped from there, not packed anew.

ONNX Runtime packs quantized weights whenever a session opens: a second copy in memory that no file backs. Here a bundle is
opened once to write that copy down beside the optimized graph, and from then on it is mapped: the same numbers in a third of
the anonymous memory. What depends on a processor never goes into a bundle.

The folder is EDGELORA_PACKED_CACHE, or "packed" in the user's cache folder. Its entries stay below EDGELORA_PACKED_CACHE_GB
together (default 4; 0 keeps none): the least recently used go first. All of it may be deleted at any time.
Source: ONNX Runtime's session options "session.save_external_prepacked_constant_initializers" and "session.optimized_model_…".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import EdgeLoRAError, SettingsError
from edgelora.run.session import open_session

if TYPE_CHECKING:
    import onnxruntime as ort

CACHE_GB = 4.0
LEAST_BYTES = 32 << 20  # of weights: smaller ones are packed sooner than found
GROWTH = 2.5  # bytes of an entry for each byte of weights: as they are in the bundle, and packed
ABANDONED_SECONDS = 24 * 3600.0  # after which an entry that was never finished goes
GRAPH, WEIGHTS = "model.onnx", "model.data"
CHECKED = ".checked"
NATIVE = ".native2"  # and the version of what is in such a file: its form is decoder.c's


def open_packed(model: Path, *, threads: int | None = None) -> ort.InferenceSession:
    """Return a session as `open_session` does, from the cache where it has the model, else one that fills it."""
    weights = weights_of(model)
    limit = cache_bytes()
    size = weights.stat().st_size if weights.is_file() else 0
    if size < LEAST_BYTES or GROWTH * size > limit:
        return open_session(model, threads=threads)
    entry = cache_folder() / key(model, weights)
    found = open_entry(entry, threads)
    if found is not None:
        return found
    if entry.is_dir():  # what was written did not give the same numbers
        return open_session(model, threads=threads)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(entry.parent).free < 2 * GROWTH * size:
            return open_session(model, threads=threads)
        make_room(entry.parent, limit - int(GROWTH * size))
        write_entry(entry, model, threads)
    except (OSError, EdgeLoRAError):  # nothing is lost but memory; what is wrong with a model is said when it opens
        return open_session(model, threads=threads)
    return open_entry(entry, threads) or open_session(model, threads=threads)


def packed_from(model: Path) -> tuple[Path, ...]:
    """Return the files of a model that are as they were when the cache packed them, after they had been checked: all, or none.

    Reading weights to compare them with their sha256 takes longer than opening them packed.
    """
    weights = weights_of(model)
    if not model.is_file() or not weights.is_file() or weights.stat().st_size < LEAST_BYTES:
        return ()
    if native_mark(model, weights).is_file() or (cache_folder() / key(model, weights) / GRAPH).is_file():
        return model, weights
    return ()


def native_file(model: Path, size: int) -> Path | None:
    """Return the file for `size` bytes of a model's weights as our own kernels read them; None where they are too few to be
    kept, or there is no room for them."""
    weights = weights_of(model)
    if size < LEAST_BYTES or size > (limit := cache_bytes()) or not weights.is_file():
        return None
    path = cache_folder() / f"{native_key(model, weights)}{NATIVE}"
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < 2 * size:
            return None
        make_room(path.parent, limit - size)
    except OSError:
        return None
    return path


def mark_checked(model: Path) -> None:
    """Note that a model's files have been compared with their sha256, where nothing is packed: until they change."""
    weights = weights_of(model)
    if weights.is_file() and weights.stat().st_size >= LEAST_BYTES and cache_bytes() > 0:
        with contextlib.suppress(OSError):
            mark = native_mark(model, weights)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def native_mark(model: Path, weights: Path) -> Path:
    return cache_folder() / f"{native_key(model, weights)}{CHECKED}"


def weights_of(model: Path) -> Path:
    return model.with_name(f"{model.name}_data")


def open_entry(entry: Path, threads: int | None) -> ort.InferenceSession | None:
    """Return a session of an entry; None where there is none. A damaged one is removed."""
    if not (entry / GRAPH).is_file():
        return None
    try:
        session = open_session(entry / GRAPH, threads=threads, optimize=False)
    except EdgeLoRAError:
        shutil.rmtree(entry, ignore_errors=True)
        return None
    with contextlib.suppress(OSError):
        os.utime(entry)  # the least recently used goes first
    return session


def write_entry(entry: Path, model: Path, threads: int | None) -> None:
    """Write the weights of a model to `entry` as this machine packs them; an empty entry where that changes a number.

    The session that writes is of no other use: it may compute zeros.
    """
    import tempfile

    staging = Path(tempfile.mkdtemp(prefix=".", dir=entry.parent))
    try:
        open_session(model, threads=threads, entries=ENTRIES, write=staging / GRAPH)
        packed = open_session(staging / GRAPH, threads=threads, optimize=False)
        if not np.array_equal(probe(packed), probe(open_session(model, threads=threads))):
            (staging / GRAPH).unlink()
            (staging / WEIGHTS).unlink()
        with contextlib.suppress(OSError):  # another process was sooner
            staging.rename(entry)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def probe(session: ort.InferenceSession) -> NDArray[np.float32]:
    """Return what a decoder makes of a few tokens: all outputs, one after the other."""
    count = 4
    feeds: dict[str, NDArray[Any]] = {"input_ids": np.arange(count)[None], "attention_mask": np.ones((1, count), np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past_key"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    return np.concatenate([output.ravel() for output in session.run(None, feeds)])


# Scales that stay inside the .onnx file would be left out of the packed weights: all but the tiniest go beside it.
ENTRIES = {
    "session.optimized_model_external_initializers_file_name": WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "64",
    "session.save_external_prepacked_constant_initializers": "1",
}


def key(model: Path, weights: Path) -> str:
    """Return the name of a model's entry: its files as they are now, the runtime, and the processor."""
    import importlib.metadata

    from edgelora.hardware import instruction_sets, processor_name

    parts = [native_key(model, weights), importlib.metadata.version("onnxruntime"), processor_name(), instruction_sets()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def native_key(model: Path, weights: Path) -> str:
    """The same for our own kernels, for which packed weights are the same everywhere."""
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in (model, weights)]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:40]


def make_room(folder: Path, limit: int) -> None:
    """Remove the least recently used entries until at most `limit` bytes are left, and what was never finished."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.suffix == CHECKED:
                continue
            files = list(path.iterdir()) if path.is_dir() else [path]
            age, size = time.time() - path.stat().st_mtime, sum(file.stat().st_size for file in files)
            if not path.name.startswith("."):
                found.append((age, size, path))
            elif age > ABANDONED_SECONDS:
                remove(path)
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found, reverse=True):
        if total <= limit:
            return
        remove(path)
        total -= size


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def cache_folder() -> Path:
    import platformdirs

    named = os.environ.get("EDGELORA_PACKED_CACHE")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("edgelora")) / "packed"


def cache_bytes(variable: str = "EDGELORA_PACKED_CACHE_GB", default: float = CACHE_GB) -> int:
    """Return the bytes that all entries may take together. Raises SettingsError if the variable is no number."""
    text = os.environ.get(variable, str(default))
    try:
        return int(float(text) * (1 << 30))
    except (ValueError, OverflowError):
        raise SettingsError(f'{variable} is "{text}"; a number of gigabytes is wanted') from None
