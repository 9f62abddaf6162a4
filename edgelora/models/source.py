"""Where a model comes from: hub id, Hugging Face folder, `.gguf` file, `package:NAME`, merged folder, or a run (its base).

A source gives tensors one at a time by their Hugging Face names; nothing else of the project reads weight files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgelora.errors import ModelError
from edgelora.folder import MANIFEST, read_manifest
from edgelora.models.convert import converted
from edgelora.models.names import canonical_names
from edgelora.models.weights import folder_entries, read_entry, read_entry_rows

if TYPE_CHECKING:
    from edgelora.quant.checkpoint import MergedCheckpoint
    from edgelora.quant.grid import QuantizedTensor

PACKED = (torch.uint8, torch.int8, torch.int32)
VOCABULARIES = (".json", ".txt", ".model", ".spm", ".jinja")  # and what else decides how a tokenizer is made
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class ModelSource:
    """An opened model. Its weights are still on disk.

    folder: has config.json and the tokenizer's files (for GGUF and for folders without tokenizer.json: in the user's cache)
    fingerprint: names the weights' content, wherever they lie
    tensors: Hugging Face name → (shape, function that reads it)
    rows: name → function that reads the rows [start:stop]; only of tensors that can be read in parts
    modified: when each weight file was last written, in ns: with the fingerprint it tells a file that was changed in place
    """

    reference: str
    kind: str  # "folder" | "gguf" | "merged"
    folder: Path
    config: dict[str, Any]
    license: str | None
    fingerprint: str
    tensors: Mapping[str, tuple[tuple[int, ...], Callable[[], Tensor]]]
    merged: MergedCheckpoint | None = None
    rows: Mapping[str, Callable[[int, int], Tensor]] = field(default_factory=dict)
    modified: tuple[int, ...] = ()

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name)[0]

    def read(self, name: str) -> Tensor:
        """Return a tensor in its Hugging Face orientation, dtype as stored or fp32; mapped from the file where possible."""
        return self._tensor(name)[1]()

    def read_in_parts(self, name: str, num_rows: int) -> Iterator[Tensor]:
        """Yield a tensor, at most `num_rows` rows at a time: a large one is never whole in memory where it can be read so."""
        starts = range(0, self.shape(name)[0], num_rows)
        read_rows = self.rows.get(name)
        if read_rows is not None:
            yield from (read_rows(start, min(start + num_rows, starts.stop)) for start in starts)
        else:
            whole = self.read(name)
            yield from (whole[start : start + num_rows] for start in starts)

    def read_linear(self, path: str, *, transposed: bool = False) -> Tensor | QuantizedTensor:
        """Return the weight `[N, K]` of the layer at `path`: on the grid when the source is a merged folder.

        transposed: the file holds `[K, N]`, as GPT-2's do (`DecoderSpec.transposed`).
        """
        if self.merged is not None:
            return self.merged.read_linear(path)
        weight = self.read(f"{path}.weight")
        return weight.T.contiguous() if transposed else weight

    def _tensor(self, name: str) -> tuple[tuple[int, ...], Callable[[], Tensor]]:
        if name not in self.tensors:
            raise ModelError(f"{self.reference} has no tensor {name}")
        return self.tensors[name]


def open_model(reference: str, *, trust_remote_code: bool = False) -> ModelSource:
    """Open a model by hub id, folder, `.gguf` file, `package:NAME`, merged folder or run folder.

    Raises ModelError when there is no such model, its files are damaged, or it wants to run its own code.
    """
    if reference.startswith("package:"):
        from edgelora.models.package import package_path

        path, license_name = package_path(reference.removeprefix("package:"))
        return _open_path(path, reference, license_name, trust_remote_code)
    path = Path(reference).expanduser()
    if path.exists():
        return _open_path(path, reference, None, trust_remote_code)
    from edgelora.models.hub import fetch, looks_like_hub_id

    if looks_like_hub_id(reference):
        return _open_path(fetch(reference), reference, None, trust_remote_code)
    raise ModelError(
        f"there is no model {reference}",
        hint="give a folder, a .gguf file, package:NAME, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct",
    )


def _open_path(path: Path, reference: str, license_name: str | None, trust_remote_code: bool) -> ModelSource:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is not a model: a file must be .gguf, other models are folders")
        return _open_gguf(path, reference, license_name)
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path, "merged", "run")
        if manifest["kind"] == "merged":
            return _open_merged(path, reference, manifest)
        return open_model(str(manifest["model"]["reference"]), trust_remote_code=trust_remote_code)
    return _open_folder(path, reference, license_name, trust_remote_code)


def _open_gguf(path: Path, reference: str, license_name: str | None) -> ModelSource:
    from edgelora.models.gguf_file import read_tensor

    mark = fingerprint([path])
    folder = converted(path, mark)
    entries = json.loads((folder / "tensors.json").read_text(encoding="utf-8"))
    config = read_config(folder)
    tensors = {name: (tuple(entry["shape"]), _reader(read_tensor, path, entry)) for name, entry in entries.items()}
    in_order = {name: entry for name, entry in entries.items() if entry["form"] not in ("permuted", "transposed")}
    rows = {name: _reader(_gguf_rows, path, entry) for name, entry in in_order.items()}
    known = license_name or config.get("license")
    return ModelSource(reference, "gguf", folder, config, known, mark, tensors, rows=rows, modified=_modified([path]))


def _gguf_rows(path: Path, entry: dict[str, Any], start: int, stop: int) -> Tensor:
    from edgelora.models.gguf_file import read_tensor

    row = entry["bytes"] // entry["shape"][0]  # a row is whole blocks of every type
    shape = [stop - start, *entry["shape"][1:]]
    return read_tensor(path, {**entry, "shape": shape, "offset": entry["offset"] + start * row, "bytes": (stop - start) * row})


def _reader(read: Callable[..., Tensor], *arguments: Any) -> Callable[..., Tensor]:
    return lambda *rows: read(*arguments, *rows)


def _modified(paths: list[Path]) -> tuple[int, ...]:
    return tuple(path.stat().st_mtime_ns for path in paths)


def _open_folder(path: Path, reference: str, license_name: str | None, trust_remote_code: bool) -> ModelSource:
    config = read_config(path)
    if "auto_map" in config and not trust_remote_code:
        from edgelora.models.families import FAMILIES

        if config.get("model_type") not in FAMILIES:
            raise ModelError(
                f"{reference} brings Python code of its own (auto_map in config.json), which is not run unless you say so",
                hint="add --trust-remote-code if you trust where it comes from",
            )
    _refuse_pickles(path)
    entries = canonical_names(folder_entries(path), config)
    if any(entry.dtype in PACKED for entry in entries.values()):
        _refuse_packed(reference, config)
    files = sorted({entry.path for entry in entries.values()})
    mark = fingerprint([path / "config.json", *files])
    folder = path if (path / "tokenizer.json").is_file() or reads_no_text(path) else _with_tokenizer(path)
    tensors = {name: (entry.shape, _reader(read_entry, entry)) for name, entry in entries.items()}
    rows = {name: _reader(read_entry_rows, entry) for name, entry in entries.items() if entry.shape and entry.shape[0]}
    known = card_license(path) or license_name
    return ModelSource(reference, "folder", folder, config, known, mark, tensors, rows=rows, modified=_modified(files))


def reads_no_text(path: Path) -> bool:
    """Tell whether a model's folder has a preprocessor of pictures or sound and no tokenizer but single letters."""
    if (path / "vocab.json").is_file() and not (path / "merges.txt").is_file():
        return any((path / name).is_file() for name in PREPROCESSORS)
    vocabularies = ("tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
    return any((path / name).is_file() for name in PREPROCESSORS) and not any((path / name).is_file() for name in vocabularies)


def _with_tokenizer(path: Path) -> Path:
    """Return the cache's folder with the tokenizer that is made of a model's files; another one when these change."""
    import shutil

    folder = converted(path, fingerprint(sorted(p for p in path.iterdir() if p.suffix in VOCABULARIES and p.is_file())))
    for name in ("config.json", "generation_config.json"):
        if (path / name).is_file() and not (folder / name).is_file():
            shutil.copyfile(path / name, folder / name)
    return folder


def _open_merged(path: Path, reference: str, manifest: dict[str, Any]) -> ModelSource:
    from edgelora.quant.checkpoint import WEIGHTS, MergedCheckpoint

    checkpoint = MergedCheckpoint.open(path)
    tensors = {name: (checkpoint.shape(name), _reader(checkpoint.read, name)) for name in checkpoint.names()}
    model = manifest.get("model") or {}
    weights, known = path / WEIGHTS, model.get("license")
    mark, modified = fingerprint([weights]), _modified([weights])
    return ModelSource(reference, "merged", path, read_config(path), known, mark, tensors, checkpoint, modified=modified)


def _refuse_packed(reference: str, config: dict[str, Any]) -> None:
    """Raise ModelError for weights that bitsandbytes, GPTQ, AWQ and the like have packed into integers of their own."""
    form = config.get("quantization_config")
    if isinstance(form, dict) and form.get("quant_method"):
        kind = form.get("bnb_4bit_quant_type") if form.get("load_in_4bit") else None
        raise ModelError(
            f"{reference} holds weights packed by {form['quant_method']}{f' ({kind})' if kind else ''}; "
            "16 or 32 bits, GGUF and merged folders are read",
            hint="name the model that it was made from: an adapter that was trained over it fits that one",
        )


def _refuse_pickles(path: Path) -> None:
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file():
        return
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise ModelError(
            f"{path} holds its weights as pickles (.bin, .pt), which can run code and are not read",
            hint=f"convert them: AutoModel.from_pretrained({str(path)!r}).save_pretrained(FOLDER) writes safetensors",
        )
    raise ModelError(f"{path} has no weights: model.safetensors or its shards are wanted")


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json. Raises ModelError when it is missing, not JSON, or names no model type."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{folder} is not a model folder: it has no config.json") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not JSON", hint="download the model again") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} names no model_type")
    return config


def card_license(folder: Path) -> str | None:
    """Return the `license:` of the model card's front matter, if there is one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    front = lines[1] if len(lines) == 3 and not lines[0].strip() else ""
    found = [line.split(":", 1)[1].strip().strip("\"'") for line in front.splitlines() if line.startswith("license:")]
    return found[0] or None if found else None


def fingerprint(paths: list[Path]) -> str:
    """Return a sha256 of the files' sizes, heads, tails and 64 samples between: enough to tell models apart, at any size."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size};".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            for i in range(1, 65):
                file.seek(size * i // 65)
                digest.update(file.read(1 << 12))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read(1 << 20))
    return digest.hexdigest()
