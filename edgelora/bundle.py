"""The bundle: one folder for `edgelora run`, onnxruntime-genai, optimum and transformers.js. Opening it needs no torch or onnx.

    config.json  generation_config.json  tokenizer.json  tokenizer_config.json  chat_template.jinja  genai_config.json
    edgelora.json  onnx/model_q4.onnx  onnx/model_q4.onnx_data  adapters/NAME.onnx_adapter  adapters/NAME.safetensors

Manifest entries of what was learned: `branch` where an adapter is in the graph beside the weights; `products` where the graph
has optional inputs for one; `adapters`, {name: kind, file, rank, settings, results …} of what was added (run/adapters.py).

Logits of a decoder: the graph has an overridable initializer `num_logits_to_keep` (int64, no dimensions). It is not among
`session.get_inputs()` but among `session.get_overridable_initializers()`, and is fed like an input when wanted:

    not fed (1)   logits [batch, 1, vocabulary]: of each row's last real token, also where a batch is padded on the right
    fed with k    of the last k tokens; with 0, of every token [batch, sequence, vocabulary] (loss, speculation)

The declared shape is [batch, 1, vocabulary], from which onnxruntime-genai knows that prompts give one row. Without I/O binding,
or with an output bound without memory, onnxruntime gives as many rows as were asked for; bound memory must be for one row.

onnxruntime warns at load that an initializer is among the inputs; that is how it is overridden: set log_severity_level 3.
`total_sequence_length` (the attention mask's length) is what has been fed so far plus what is fed now; with a shared cache
buffer it is shorter than the buffer. Rows of a batch are padded on the right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelora.errors import FolderError
from edgelora.folder import check_files, inside, read_manifest

SELECTOR = "num_logits_to_keep"


@dataclass(frozen=True)
class DecoderFigures:
    """The cache is `num_layers` × (key, value) fp32 [batch, kv_heads, length, head_dim]."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int  # the longest sequence that the graph's rotary tables reach


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; `folder` also holds its tokenizer."""

    folder: Path
    manifest: dict[str, Any]
    model_path: Path
    task: str
    labels: list[str]
    precision: str
    max_length: int  # tokens of prompt and answer together that the bundle was made for
    decoder: DecoderFigures | None  # None for encoders
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    config: dict[str, Any] = field(repr=False)  # config.json


def open_bundle(path: str | Path, *, verify: bool = True, known: Callable[[Path], Collection[Path]] | None = None) -> Bundle:
    """Open a bundle folder.

    Raises FolderError where it is no bundle, a newer one, or damaged: each file is compared with the manifest's sha256
    (`verify=False` skips that for a bundle that was checked before; `known`, given the graph's path, names files that were).
    """
    folder = Path(path)
    manifest = read_manifest(folder, "bundle")
    try:
        if verify:
            check_files(folder, manifest, known(inside(folder, manifest["model_file"])) if known is not None else ())
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_path = inside(folder, manifest["model_file"])
        tokens = manifest["tokens"]
        figures = manifest.get("decoder")
        bundle = Bundle(
            folder=folder,
            manifest=manifest,
            model_path=model_path,
            task=str(manifest["task"]),
            labels=[str(label) for label in manifest["labels"]],
            precision=str(manifest["precision"]),
            max_length=int(manifest["max_length"]),
            decoder=None if figures is None else DecoderFigures(**{key: int(value) for key, value in figures.items()}),
            eos_token_ids=tuple(int(token) for token in tokens["eos"]),
            bos_token_id=tokens["bos"],
            pad_token_id=tokens["pad"],
            config=config,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, FileNotFoundError) as error:
        raise FolderError(
            f"{folder} is damaged: its manifest or config.json cannot be used ({type(error).__name__}: {error})",
            hint=f"edgelora export RUN -o {folder} --overwrite",
        ) from None
    if not bundle.model_path.is_file():
        raise FolderError(f"{folder} is damaged: {manifest['model_file']} is missing", hint="make it again with --overwrite")
    return bundle
