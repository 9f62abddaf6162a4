"""Tokenizer files and config.json of a GGUF file, or the tokenizer.json that a Hugging Face folder lacks.

Made once, in a child process (transformers' tokenizer code stays out of the training process), into the user's cache:
`python -m edgelora.models.convert SOURCE FOLDER`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgelora.errors import EdgeLoRAError, ModelError
from edgelora.folder import swap_in, write_json
from edgelora.models.convert_marian import convert_marian, is_marian

CONVERSION = 1  # raise it when the files come out differently: old ones in the cache are then made again
# Digits one by one, then GPT-2's splitting: what llama.cpp calls these, and transformers' GGUF reader forgets
DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_SPLIT = WORDS + r"\p{N}{1,3}" + REST
SPLITS = {"llama-bpe": LLAMA_SPLIT, "dbrx": LLAMA_SPLIT, "smaug-bpe": LLAMA_SPLIT, "qwen2": WORDS + r"\p{N}" + REST}


def cached_folder(fingerprint: str) -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("edgelora")) / "models" / f"{fingerprint[:32]}-{CONVERSION}"


def converted(source: Path, fingerprint: str) -> Path:
    """Return the cache folder with the converted files of a GGUF file or of a folder without tokenizer.json.

    Raises ModelError with the converter's message.
    """
    folder = cached_folder(fingerprint)
    if (folder / "tokenizer.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        _convert_in_child(source, staging)
        if not (folder / "tokenizer.json").is_file():
            swap_in(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _convert_in_child(source: Path, staging: Path) -> None:
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "edgelora.models.convert", str(source), str(staging)]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, env={**os.environ, **quiet})
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        if result.returncode == ModelError.exit_code:
            message, hint = json.loads(last)
            raise ModelError(message, hint=hint)
        raise ModelError(f"{source}: the tokenizer could not be converted: {last}")


def convert_gguf(path: Path, folder: Path) -> None:
    """Write config.json, tensors.json and the tokenizer's files of a GGUF file."""
    from edgelora.models.gguf_file import read_index

    config, tensors, fields = read_index(path)
    write_json(folder / "config.json", config)
    write_json(folder / "tensors.json", tensors)
    save_tokenizer(path.parent, folder, gguf_file=path.name)
    _restore_splitting(folder / "tokenizer.json", str(fields.get("tokenizer.ggml.pre")))
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    write_json(folder / "generation_config.json", special)


def save_tokenizer(source: Path, folder: Path, **options: str) -> None:
    """Write tokenizer.json and a tokenizer_config.json that transformers 4.57, 5 and transformers.js read alike."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source), **options)
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {source} has no fast form")
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    dropped = ("backend", "is_local", "local_files_only", "name_or_path")
    kept: dict[str, Any] = {key: value for key, value in written.items() if key not in dropped}
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    kept["model_input_names"] = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    if isinstance(tokenizer.chat_template, str):
        kept["chat_template"] = tokenizer.chat_template
    write_json(path, kept)


def _restore_splitting(path: Path, kind: str) -> None:
    """Give tokenizer.json the pre-tokenizer that the GGUF file names (`tokenizer.ggml.pre`)."""
    content = json.loads(path.read_text(encoding="utf-8"))
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if kind in DIGITS:
        parts = [{"type": "Digits", "individual_digits": True}, {**bytes_only, "use_regex": True}]
    elif kind in SPLITS:
        split = {"type": "Split", "pattern": {"Regex": SPLITS[kind]}, "behavior": "Isolated", "invert": False}
        parts = [split, {**bytes_only, "use_regex": False}]
    else:
        return
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    write_json(path, content)


def main(source: Path, folder: Path) -> int:
    folder.mkdir(parents=True)
    try:
        if source.is_dir() and is_marian(source):
            convert_marian(source, folder)
        elif source.is_dir():
            save_tokenizer(source, folder)
        else:
            convert_gguf(source, folder)
    except ModelError as error:
        print(json.dumps([error.message, error.hint]), file=sys.stderr)
        return error.exit_code
    except (EdgeLoRAError, OSError, ValueError, KeyError, TypeError, ImportError) as error:
        print(" ".join(str(error).split())[:400], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
