"""The KV cache of how prompts begin, kept in a file: a system prompt or an instruction is computed once, not for each process.

    prefix.safetensors   `past_key_values.N.key` and `.value` fp32 [1, kv_heads, tokens, head_dim], as the bundle's graph
                         computed them, without an adapter beside it
    manifest             `prefix`: file, tokens, token_ids, size_mb

What a position holds depends on the tokens before it alone, so any beginning of the file serves a prompt that begins with the
same tokens. Tokens are compared, never text: "Say:" and "Say: yes" may differ in their last common piece. The rest of a prompt
is computed in another chunk than without the file: measured on SmolLM2 in int4, to the same bits for two tokens and more; ONNX
Runtime does not promise it, and other kernels may change the last bits of logits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgelora import console
from edgelora.errors import FolderError
from edgelora.folder import inside
from edgelora.run.bound import Cache
from edgelora.tensor_file import read_array, read_header, write_tensors

if TYPE_CHECKING:
    from edgelora.bundle import Bundle

FILE = "prefix.safetensors"
FORMAT, VERSION = "edgelora-prefix", "1"
UNUSABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what a damaged file can raise
LEAST = 8  # tokens: fewer are computed sooner than copied


@dataclass
class Prefix:
    """A file and the tokens that it is of. It is read when a prompt begins with them, and stays in memory."""

    path: Path
    ids: list[int]
    cache: Cache | None = None

    def read(self, shapes: Mapping[str, tuple[int, int]]) -> Cache | None:
        """Return keys and values for a decoder whose caches are (kv_heads, head_dim) by name; None, and a warning, where the
        file is missing, damaged or another model's."""
        if self.cache is None:
            try:
                self.cache = read_prefix(self.path, self.ids, shapes)
            except UNUSABLE as error:
                console.warn(f"{self.path} is not used, the beginning of prompts is computed anew: {error}")
        return self.cache


def shipped(bundle: Bundle) -> Prefix | None:
    """Return the prefix that a bundle ships, if it does. Raises FolderError where its entry in the manifest is damaged."""
    entry = bundle.manifest.get("prefix")
    if entry is None:
        return None
    try:
        path, ids = inside(bundle.folder, entry["file"]), entry["token_ids"]
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise TypeError("token_ids is no list of numbers")
    except (KeyError, TypeError) as error:
        hint = f"edgelora export RUN -o {bundle.folder} --prefix --overwrite"
        raise FolderError(f"{bundle.folder} is damaged: the entry of its prefix ({error})", hint=hint) from None
    return Prefix(path, ids)


def write_prefix(path: Path, ids: Sequence[int], cache: Cache, *, private: bool = False) -> None:
    """Write keys and values atomically, with their sha256 where no manifest has it: in a `private` file."""
    facts = {"format": FORMAT, "version": VERSION, "token_ids": json.dumps(list(ids))}
    if private:
        facts["sha256"] = digest(cache)
    write_tensors(path, {name: ("F32", array) for name, array in cache.items()}, facts, private=private)


def read_prefix(path: Path, ids: Sequence[int], shapes: Mapping[str, tuple[int, int]], *, private: bool = False) -> Cache:
    """Return views of a file's keys and values, of a `private` file compared with their sha256.

    Raises one of UNUSABLE.
    """
    data = path.read_bytes()
    header, start = read_header(data)
    facts = header.pop("__metadata__")
    if facts["format"] != FORMAT or facts["version"] != VERSION:
        raise ValueError(f'format "{facts["format"]}" {facts["version"]}; "{FORMAT}" {VERSION} is wanted')
    if json.loads(facts["token_ids"]) != list(ids):
        raise ValueError("it is of other tokens")
    cache = {name: read_array(data, start, entry) for name, entry in header.items()}
    if {name: array.shape for name, array in cache.items()} != {
        name: (1, heads, len(ids), dim) for name, (heads, dim) in shapes.items()
    }:
        raise ValueError("its keys and values are not those of this model")
    if not all(np.isfinite(array).all() for array in cache.values()):
        raise ValueError("it has values that are not finite")
    if private and facts["sha256"] != digest(cache):
        raise ValueError("its numbers have changed")
    return cache


def digest(cache: Cache) -> str:
    """Return the sha256 of names, keys and values."""
    found = hashlib.sha256()
    for name in sorted(cache):
        found.update(name.encode() + b"\0")
        found.update(np.ascontiguousarray(cache[name]).data)
    return found.hexdigest()
