"""The KV caches of system turns, in the user's cache folder: the next process need not compute them. Off unless asked for.

An entry has the tokens of a system turn, so it is as private as that: nobody but the user may read the files (0600) or enter
their folder (0700), and nothing is written unless EDGELORA_PREFIX_CACHE_GB is above 0: the gigabytes that all entries may take
together. The least recently used go first. The folder is EDGELORA_PREFIX_CACHE, or "prefixes" in the user's cache folder; all
of it may be deleted at any time. An entry's name is a digest of the bundle's files, the tokens, the runtime and the processor;
what it holds is compared with its own sha256, and one that is damaged is removed and computed anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora import console
from edgelora.errors import EdgeLoRAError
from edgelora.run.bound import Cache
from edgelora.run.packed import ABANDONED_SECONDS, cache_bytes
from edgelora.run.prefix import UNUSABLE, read_prefix, write_prefix

if TYPE_CHECKING:
    from edgelora.bundle import Bundle

LEAST_STORED = 64  # tokens: fewer take little longer to compute than a file to read and compare
SUFFIX = ".safetensors"


@dataclass
class Store:
    """The entries of one bundle. `limit`: bytes of all bundles' entries together."""

    folder: Path
    limit: int
    bundle: str  # a digest of its files, the runtime and the processor

    def find(self, ids: Sequence[int], shapes: Mapping[str, tuple[int, int]]) -> Cache | None:
        """Return the keys and values of exactly these tokens; None where they are not there."""
        path = self.path(ids)
        try:
            if not private(self.folder) or not path.is_file() or path.is_symlink():
                return None
            cache = read_prefix(path, ids, shapes, private=True)
        except UNUSABLE:
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the least recently used goes first
        return cache

    def add(self, ids: Sequence[int], cache: Cache) -> None:
        """Write an entry, where it is worth it and there is room. What cannot be written is told of, once."""
        size = sum(array.nbytes for array in cache.values())
        if len(ids) < LEAST_STORED or size > self.limit:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not private(self.folder):
                raise PermissionError(
                    f"others may read {self.folder}: chmod 700 it, or name another one in EDGELORA_PREFIX_CACHE"
                )
            make_room(self.folder, self.limit - size)
            write_prefix(self.path(ids), ids, cache, private=True)
        except (OSError, EdgeLoRAError) as error:
            console.warn(f"caches of system turns are not kept on disk: {error}")
            self.limit = 0

    def path(self, ids: Sequence[int]) -> Path:
        return self.folder / (hashlib.sha256(json.dumps([self.bundle, list(ids)]).encode()).hexdigest()[:40] + SUFFIX)


def find_store(bundle: Bundle) -> Store | None:
    """Return the store for a bundle, None where the user asked for none. Raises SettingsError if the variable is no number."""
    limit = cache_bytes("EDGELORA_PREFIX_CACHE_GB", 0)
    if limit <= 0:
        return None
    import onnxruntime as ort
    import platformdirs

    from edgelora.hardware import instruction_sets, processor_name

    named = os.environ.get("EDGELORA_PREFIX_CACHE")
    folder = Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("edgelora")) / "prefixes"
    parts = [bundle.manifest["files"], ort.__version__, processor_name(), instruction_sets()]
    return Store(folder, limit, hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest())


def private(folder: Path) -> bool:
    """Whether a folder is there and is the user's alone; where a system has no such modes, whether it is there."""
    if not folder.is_dir():
        return False
    if os.name != "posix":
        return True
    found = folder.stat()
    return found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077


def make_room(folder: Path, limit: int) -> None:
    """Remove the least recently used entries until at most `limit` bytes are left, and what was never finished."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            entry = path.stat()
            if path.name.startswith(".") and path.name.endswith(".partial"):
                if time.time() - entry.st_mtime > ABANDONED_SECONDS:
                    path.unlink()
            elif path.suffix == SUFFIX:
                found.append((entry.st_mtime_ns, entry.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size
