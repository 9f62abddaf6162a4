"""`edgelora export --trim-vocabulary`: a merged folder with the tokens that the user's rows and a fallback alphabet need.

The rows of the embedding and of the LM head stay as they are, code for code; fewer of them ship. Ids change in every file
that has some. Both tokenizers must then give the same pieces on every text that the vocabulary is kept for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edgelora.errors import ModelError, SettingsError
from edgelora.export.trim.ids import refuse_moved_padding, special_ids, write_companions
from edgelora.export.trim.passages import Heard, Passages, Source
from edgelora.export.trim.tokenizer import Vocabulary, processor_ids
from edgelora.folder import write_json, write_manifest
from edgelora.models.tensors import model_layout
from edgelora.quant.checkpoint import WEIGHTS, MergedCheckpoint, StreamedSafetensors
from edgelora.quant.digest import digest, refuse_different
from edgelora.quant.grid import QuantizedTensor
from edgelora.tasks import get_task
from edgelora.tasks.base import TRIAL_TEXTS
from edgelora.tokenizer import Tokenizer

NUM_COMMON = 4096  # of the most common pieces, kept whether the rows have them or not: 2.5 MB of SmolLM2's 30 MB
# Of tokens: ONNX Runtime maps packed weights rightly where the bytes of each are a multiple of 64 (run/packed.py).
MULTIPLE = 64
HEADS = ("lm_head.weight", "lm_head.bias", "final_logits_bias")  # tensors with a place for each token, beside the tables


def trim(merged: Path, out: Path, source: Source) -> Path:
    """Write the merged folder `out` from `merged` with fewer tokens, and return it.

    Its manifest's `vocabulary`: tokens "before" and "after", the number of "texts" that both tokenizers were compared on,
    "tables" and "table_mb" [before, after].
    Raises SettingsError where no rows are named or the model reads no text, ModelError where its tokenizer cannot be trimmed
    or a text would be encoded otherwise.
    """
    checkpoint = MergedCheckpoint.open(merged)
    task = get_task(checkpoint.task)
    if not isinstance(task.open_processor(merged), Tokenizer):
        raise SettingsError(f"--trim-vocabulary is for models of text; this one is for {task.name}", hint="leave it out")
    if checkpoint.config.get("is_encoder_decoder"):
        raise SettingsError("--trim-vocabulary is for encoders and decoders; this model is both", hint="leave it out")
    tokenizer = Heard.from_folder(merged)
    assert isinstance(tokenizer, Heard)
    tokenizer.passages = []
    vocabulary = Vocabulary(json.loads((merged / "tokenizer.json").read_text(encoding="utf-8")))
    passages = Passages(tokenizer, checkpoint, source)
    needed = passages.ids() | special_ids(merged) | processor_ids(vocabulary.content.get("post_processor"))
    size = int(checkpoint.config["vocab_size"])
    order = vocabulary.keep(needed, NUM_COMMON, MULTIPLE)
    if max(order) >= size:
        raise ModelError(f"the tokenizer has {max(order) + 1} tokens, the model {size}")
    new = {old: index for index, old in enumerate(order)}
    refuse_moved_padding(checkpoint.config, new)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_json(out / "tokenizer.json", vocabulary.with_ids(new))
    write_companions(merged, out, new)
    texts = prove(passages, Tokenizer.from_folder(out), new)
    facts = write_weights(checkpoint, out / WEIGHTS, order, size)
    facts = {"before": size, "after": len(order), "texts": texts, **facts}
    write_trimmed_manifest(checkpoint, out, facts)
    check_rows(checkpoint, MergedCheckpoint.open(out), facts["tables"], order)
    return out


def prove(passages: Passages, trimmed: Tokenizer, new: Mapping[int, int]) -> int:
    """Compare both tokenizers on every passage, pieces and decoded text; return the number of passages.

    Raises ModelError for the first that differs, and where other text has become unknown.
    """
    whole, count = passages.tokenizer, 0
    for text, pair, special in passages:
        wanted = [new.get(index) for index in Tokenizer._encode(whole, text, pair, special).ids]
        found = trimmed._encode(text, pair, special).ids
        if wanted != found or trimmed.decode(found) != whole.decode([*Tokenizer._encode(whole, text, pair, special).ids]):
            raise ModelError(f'the trimmed tokenizer encodes "{text[:60]}" otherwise', hint="leave --trim-vocabulary out")
        count += 1
    for text in TRIAL_TEXTS:
        unknown = [unknown_tokens(tokenizer, text) for tokenizer in (whole, trimmed)]
        if unknown[0] != unknown[1]:
            raise ModelError(f'the trimmed tokenizer cannot spell "{text}"', hint="leave --trim-vocabulary out")
    return count


def unknown_tokens(tokenizer: Tokenizer, text: str) -> int:
    unknown = tokenizer.token_id("unk_token")
    return list(tokenizer.native.encode(text, add_special_tokens=False).ids).count(-1 if unknown is None else unknown)


def tables_of(checkpoint: MergedCheckpoint, size: int) -> list[str]:
    """Return the names of the tensors that have a row, or a place, for each of `size` tokens."""
    layout = model_layout(checkpoint.config, checkpoint.task)
    names = [f"{path}.weight" for path in layout.embeddings]
    names += [name for name in layout.plain if name.endswith(HEADS)]
    return [name for name in dict.fromkeys(names) if checkpoint.has(name) and size in checkpoint.shape(name)]


def write_weights(checkpoint: MergedCheckpoint, path: Path, order: Sequence[int], size: int) -> dict[str, Any]:
    """Write the weights with the rows `order` of each table; return {"tables", "table_mb": [before, after]}.

    Raises ModelError where a table is not the one that was trained or merged.
    """
    tables, rows = tables_of(checkpoint, size), torch.tensor(order)
    wanted = checkpoint.manifest.get("digests") or {}
    parts: dict[str, torch.Tensor] = {}
    before = after = 0
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in checkpoint.names():
        layer, table = name.removesuffix(".weight"), name in tables
        found = stored(checkpoint, name)
        if table and layer in checkpoint.layers:
            refuse_different({layer: digest(quantized(checkpoint, layer))}, {k: v for k, v in wanted.items() if k == layer})
        for part, tensor in found.items():
            kept = tensor.index_select(tensor.shape.index(size), rows) if table else tensor
            before, after = before + tensor.nbytes * table, after + kept.nbytes * table
            tensors[part] = kept.dtype, tuple(kept.shape)
            if table:
                parts[part] = kept
    with StreamedSafetensors(path, tensors) as file:
        for name in checkpoint.names():
            for part, tensor in stored(checkpoint, name).items():
                file.write(part, parts.get(part, tensor))
    return {"tables": tables, "table_mb": [round(before / 2**20, 1), round(after / 2**20, 1)]}


def stored(checkpoint: MergedCheckpoint, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors that a merged folder stores for one of a model's: itself, or codes and scales."""
    path = name.removesuffix(".weight")
    if path in checkpoint.layers and path != name:
        layer = quantized(checkpoint, path)
        return {f"{path}.codes": layer.codes, f"{path}.scales": layer.scales}
    return {name: checkpoint.read(name)}


def quantized(checkpoint: MergedCheckpoint, path: str) -> QuantizedTensor:
    layer = checkpoint.read_linear(path)
    assert isinstance(layer, QuantizedTensor)
    return layer


def write_trimmed_manifest(checkpoint: MergedCheckpoint, out: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest: that of the whole folder, with the new shapes and digests of the tables."""
    known = ("format", "kind", "tool_version", "complete", "files")
    manifest = {key: value for key, value in checkpoint.manifest.items() if key not in known}
    paths = {name.removesuffix(".weight") for name in facts["tables"]} & checkpoint.layers.keys()
    layers = {
        path: {**layer, "shape": [facts["after"], layer["shape"][1]]} if path in paths else layer
        for path, layer in checkpoint.layers.items()
    }
    manifest |= {"layers": layers, "vocabulary": dict(facts)}
    manifest["as_trained"] = [path for path in manifest.get("as_trained", ()) if path not in paths]
    write_manifest(out, "merged", **manifest)
    written = MergedCheckpoint.open(out)
    manifest["digests"] = {**manifest.get("digests", {}), **{path: digest(quantized(written, path)) for path in paths}}
    write_manifest(out, "merged", **manifest)


def check_rows(whole: MergedCheckpoint, trimmed: MergedCheckpoint, tables: Sequence[str], order: Sequence[int]) -> None:
    """Compare the rows of each table in the new file with the old one's, bit for bit."""
    for name in tables:
        for part, tensor in stored(whole, name).items():
            kept = tensor.index_select(tensor.shape.index(int(whole.config["vocab_size"])), torch.tensor(order))
            if not torch.equal(kept, stored(trimmed, name)[part]):
                raise ModelError(f"{part}: the rows that were kept are not the table's", hint="please report this")
