"""Token ids in the files beside a model: config.json, generation_config.json, tokenizer_config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgelora.errors import ModelError
from edgelora.folder import write_json

LISTS = ("suppress_tokens", "begin_suppress_tokens")
COPIED = ("special_tokens_map.json", "chat_template.jinja", "preprocessor_config.json", "processor_config.json")
POSITIONS_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")

Change = Callable[[int], int]


def special_ids(folder: Path) -> set[int]:
    """Return every token that config.json or generation_config.json names."""
    found: set[int] = set()

    def note(index: int) -> int:
        found.add(index)
        return index

    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            replaced(json.loads((folder / name).read_text(encoding="utf-8")), note)
    return {index for index in found if index >= 0}


def replaced(config: Any, change: Change) -> Any:
    """Return a config with every token id in it changed."""
    if isinstance(config, list):
        return [replaced(entry, change) for entry in config]
    if not isinstance(config, dict):
        return config
    found = {}
    for key, value in config.items():
        named = key.endswith(("_token_id", "_token_ids")) or key in LISTS
        found[key] = changed(value, change) if named else replaced(value, change)
    return found


def changed(value: Any, change: Change) -> Any:
    """Return a token id, or lists of them, changed."""
    if isinstance(value, list):
        return [changed(entry, change) for entry in value]
    return change(value) if isinstance(value, int) and not isinstance(value, bool) else value


def refuse_moved_padding(config: Mapping[str, Any], new: Mapping[int, int]) -> None:
    pad = config.get("pad_token_id")
    if config.get("model_type") in POSITIONS_FROM_PADDING and pad is not None and new.get(pad) != pad:
        raise ModelError(
            f"{config['model_type']} counts positions from the id of its padding, {pad}, which does not fit {len(new)} tokens"
        )


def write_companions(source: Path, out: Path, new: Mapping[int, int]) -> None:
    """Write the other files: what names ids with the new ones, slow tokenizers' vocabularies not at all."""

    def change(index: int) -> int:
        return new.get(index, index)

    for name in COPIED:
        if (source / name).is_file():
            (out / name).write_bytes((source / name).read_bytes())
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if not (source / name).is_file():
            continue
        config = replaced(json.loads((source / name).read_text(encoding="utf-8")), change)
        if name == "config.json":
            config["vocab_size"] = len(new)
        if "added_tokens_decoder" in config:
            entries = config["added_tokens_decoder"].items()
            config["added_tokens_decoder"] = {str(new[int(old)]): entry for old, entry in entries if int(old) in new}
        write_json(out / name, config)
