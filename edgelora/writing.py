"""The decoder's side of a sequence-to-sequence model's folder: how targets are tokens, and how they are searched for.

Source: config.json, generation_config.json and the tokenizer's files. tokenizers and numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import ModelError
from edgelora.search import Search
from edgelora.tokenizer import Tokenizer, read_config

TARGET_FILE = "target_tokenizer.json"  # beside tokenizer.json where targets are other tokens than sources (Marian)
WRAPPED = ("mbart",)  # whose decoder begins with the last token of the target: the language's, or EOS


@dataclass(frozen=True)
class Writing:
    """swap: source tokens that are others in a target: the language's."""

    tokenizer: Tokenizer
    target: Tokenizer
    settings: Mapping[str, Any]  # config.json, the decoder's own config, and generation_config.json over them
    swap: Mapping[int, int]

    @classmethod
    def from_folder(cls, folder: Path) -> Writing:
        """Raises ModelError for a folder without a tokenizer.json, or that does not say what the decoder begins with."""
        tokenizer = Tokenizer.from_folder(folder)
        target = Tokenizer.from_folder(folder, TARGET_FILE) if (folder / TARGET_FILE).is_file() else tokenizer
        config = read_config(folder / "config.json")
        generation = {key: value for key, value in read_config(folder / "generation_config.json").items() if value is not None}
        settings = {**(config.get("decoder") or {}), **{k: v for k, v in config.items() if v is not None}, **generation}
        return cls(tokenizer, target, settings, languages(tokenizer, read_config(folder / "tokenizer_config.json")))

    @cached_property
    def eos(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        found = self.settings.get("eos_token_id", self.target.eos_token_id)
        return tuple(found) if isinstance(found, list) else () if found is None else (int(found),)

    @cached_property
    def pad(self) -> int:
        found = self.settings.get("pad_token_id", self.target.pad_token_id)
        return int(found or 0)

    @property
    def wrapped(self) -> bool:
        return self.settings.get("model_type") in WRAPPED

    @cached_property
    def start(self) -> int:
        """The token that the decoder begins with."""
        if self.settings.get("decoder_start_token_id") is not None:
            return int(self.settings["decoder_start_token_id"])
        if self.wrapped and self.swap:
            return next(iter(self.swap.values()))
        found = self.settings.get("bos_token_id", self.target.bos_token_id)
        if found is None:
            raise ModelError('config.json names no "decoder_start_token_id"', hint="the model's own files name it")
        return int(found)

    @cached_property
    def prompt(self) -> tuple[int, ...]:
        """The tokens that the decoder is given before it writes: the first and what the tokenizer puts after it (Whisper's)."""
        ids = self.target.encode("", add_special_tokens=True)
        end = next((place for place, token in enumerate(ids) if token in self.eos), len(ids))
        given = tuple(ids[:end])  # none where the only token is the one that ends: Marian's, which may begin with it too
        return given if given[:1] == (self.start,) and not self.wrapped else (self.start,)

    @cached_property
    def search(self) -> Search:
        """How this model's answers are searched for unless told otherwise."""
        return Search.from_settings(self.settings, self.prompt, self.eos)

    def encode_target(self, text: str) -> list[int]:
        """Return the tokens of a target as a decoder is to write them, with what ends it, without what it begins with."""
        ids = [self.swap.get(token, token) for token in self.target.encode(text, add_special_tokens=True)]
        if ids[:1] == [self.start] and not self.wrapped:
            ids = ids[1:]
        ends = bool(ids) and ids[-1] in self.eos
        return ids if ends or self.wrapped or not self.eos else [*ids, self.eos[0]]

    def decode(self, ids: Sequence[int]) -> str:
        return self.target.decode(ids).strip()

    def batch(self, targets: Sequence[NDArray[np.int32]]) -> dict[str, NDArray[Any]]:
        """Return decoder_input_ids [B, T], and of the B·T places in it those with a target: positions [S] and targets [S],
        both int64; starts [B + 1] is where rows begin.

        Inputs are the targets one place later, after the start token: what the models' classes make of labels.
        """
        longest = max(map(len, targets))
        inputs = np.full((len(targets), longest), self.pad, dtype=np.int64)
        for row, target in enumerate(targets):
            inputs[row, 0] = target[-1] if self.wrapped else self.start
            inputs[row, 1 : len(target)] = target[:-1]
        positions = [row * longest + np.arange(len(target), dtype=np.int64) for row, target in enumerate(targets)]
        return {
            "decoder_input_ids": inputs,
            "starts": np.arange(len(targets) + 1, dtype=np.int64) * longest,
            "positions": np.concatenate(positions),
            "targets": np.concatenate(targets).astype(np.int64),
        }


def languages(tokenizer: Tokenizer, config: Mapping[str, Any]) -> dict[int, int]:
    """Return {the source language's token: the target language's} of a tokenizer that has both."""
    names = (config.get("src_lang"), config.get("tgt_lang"))
    found = [tokenizer.native.token_to_id(name) if isinstance(name, str) else None for name in names]
    return {} if found[0] is None or found[1] is None else {int(found[0]): int(found[1])}
