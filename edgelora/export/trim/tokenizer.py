"""A tokenizer.json with fewer tokens: the text that it is kept for gives the same pieces, other text is spelt in smaller ones.

Why the pieces stay the same: byte-pair encoding takes the best-ranked merge that there is, so every merge made on the way to
a kept token must stay, and the others may go; WordPiece takes the longest piece that fits, Unigram the path of the highest
score: with fewer pieces to choose from, a choice that is still there is still the best. `trim.py` proves it on the text.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from edgelora.errors import ModelError

Content = dict[str, Any]  # of a tokenizer.json

KINDS = ("BPE", "WordPiece", "Unigram")
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
RESERVED = re.compile(r"\[.+\]|<.+>")  # [unused7], <pad>: no piece of text
WORD_START = "▁"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer.json, and which of them need which others."""

    content: Content

    def __post_init__(self) -> None:
        kind = self.content.get("model", {}).get("type")
        if kind not in KINDS:
            raise ModelError(f"a {kind} tokenizer cannot be trimmed; allowed: {', '.join(KINDS)}")
        if self.model.get("continuing_subword_prefix") and kind == "BPE":
            raise ModelError("a byte-pair tokenizer that marks the middle of words cannot be trimmed")

    @property
    def model(self) -> dict[str, Any]:
        return dict(self.content["model"])

    @cached_property
    def pieces(self) -> dict[str, int]:
        """The model's own tokens and their ids; those that were added beside it are not among them."""
        found = self.model["vocab"]
        return dict(found) if isinstance(found, dict) else {piece: index for index, (piece, _) in enumerate(found)}

    @cached_property
    def added(self) -> dict[str, int]:
        return {entry["content"]: int(entry["id"]) for entry in self.content.get("added_tokens") or []}

    @cached_property
    def texts(self) -> dict[int, str]:
        return {index: text for text, index in {**self.pieces, **self.added}.items()}

    @cached_property
    def ranks(self) -> dict[tuple[str, str], int]:
        """The merges of byte-pair encoding, each with its place; files have them as "a b" or as ["a", "b"]."""
        merges = self.model.get("merges") or []
        pairs = (tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges)
        return {(pair[0], pair[1]): rank for rank, pair in enumerate(pairs)}

    def always(self) -> set[str]:
        """Return the tokens that every text may need: special ones, bytes, and single characters where bytes do not do."""
        kept = {text for text in (*self.added, self.model.get("unk_token"), WORD_START) if text in self.pieces}
        spelt = bool(self.model.get("byte_fallback"))
        for text in self.pieces:
            letter = self.bare(text)
            if BYTE_TOKEN.fullmatch(text) or (len(letter) == 1 and (letter.isascii() or not spelt)):
                kept.add(text)
        if self.model["type"] == "Unigram":
            scores = self.model["vocab"]
            kept.add(min(scores, key=lambda entry: entry[1])[0])  # the score of unknown characters is reckoned from the lowest
            if self.model.get("unk_id") is not None:
                kept.add(scores[self.model["unk_id"]][0])
        return kept

    def bare(self, text: str) -> str:
        """Return a token without what marks the middle or the end of a word."""
        middle, end = (self.model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix"))
        stripped = text.removeprefix(middle) if text != middle else text
        return stripped.removesuffix(end) if stripped != end else stripped

    def closed(self, tokens: Iterable[str]) -> set[str]:
        """Return the tokens and all that byte-pair encoding makes on the way to them."""
        kept = set(tokens)
        if self.model["type"] == "BPE":
            for token in list(kept):
                kept.update(part for part in self.steps(token) if part in self.pieces)
        return kept

    def steps(self, token: str) -> set[str]:
        """Return what byte-pair encoding makes of a token's characters, from these to the token."""
        if token in self.added or BYTE_TOKEN.fullmatch(token):
            return {token}
        end = self.model.get("end_of_word_suffix") or ""
        symbols = list(token)
        if end and token.endswith(end) and token != end:
            symbols = list(token.removesuffix(end))
            symbols[-1] += end
        made = set(symbols)
        while pairs := [(self.ranks[pair], pair) for pair in itertools.pairwise(symbols) if pair in self.ranks]:
            symbols = joined(symbols, min(pairs)[1])
            made.update(symbols)
        return made

    def common(self) -> Iterator[str]:
        """Yield the pieces of text that are most common, first: those that were merged first, or come first."""
        if self.model["type"] == "BPE":
            yield from (left + right for left, right in self.ranks)
        else:
            yield from (text for text in self.pieces if not RESERVED.fullmatch(text))

    def keep(self, ids: Collection[int], num_common: int, multiple: int = 1) -> list[int]:
        """Return the ids to keep, in the order of their new ones: those named, what these need, and the most common, of which
        a few more are taken to make it a multiple where the vocabulary has them.

        The model's own tokens come first, as the format wants it. Special tokens keep their ids where they can: padding in
        RoBERTa says where positions begin.
        """
        kept = self.closed({*self.always(), *(self.texts[index] for index in ids if index in self.texts)})
        beside = sorted(index for text, index in self.added.items() if text not in self.pieces)
        for count, text in enumerate(self.common()):
            if count >= num_common and (len(kept & self.pieces.keys()) + len(beside)) % multiple == 0:
                break
            if text in self.pieces and (self.model["type"] != "BPE" or self.steps(text) <= kept | {text}):
                kept.add(text)
        own = sorted(self.pieces[text] for text in kept if text in self.pieces)
        fixed = {index for index in self.added.values() if index < len(own)} & set(own)
        others = iter([index for index in own if index not in fixed])
        return [*(place if place in fixed else next(others) for place in range(len(own))), *beside]

    def with_ids(self, new: Mapping[int, int]) -> Content:
        """Return the tokenizer.json of the tokens in `new`, old id → new id."""
        content = copy.deepcopy(self.content)
        model = content["model"]
        kept = {text: new[index] for text, index in self.pieces.items() if index in new}
        kept = dict(sorted(kept.items(), key=lambda item: item[1]))
        if model["type"] == "Unigram":
            scores = dict(map(tuple, model["vocab"]))
            model["vocab"] = [[text, scores[text]] for text in kept]
            if model.get("unk_id") is not None:
                model["unk_id"] = new[model["unk_id"]]
        else:
            model["vocab"] = kept
        if model["type"] == "BPE":
            whole = zip(model["merges"], self.ranks, strict=True)
            model["merges"] = [merge for merge, (a, b) in whole if {a, b, a + b} <= kept.keys()]
        content["added_tokens"] = sorted(
            ({**entry, "id": new[entry["id"]]} for entry in content.get("added_tokens") or []), key=lambda entry: entry["id"]
        )
        if isinstance(content.get("padding"), dict):
            content["padding"]["pad_id"] = new.get(content["padding"]["pad_id"], 0)
        content["post_processor"] = renumbered(content.get("post_processor"), new)
        return content


def joined(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Return the symbols with every such pair made one, from the left."""
    found: list[str] = []
    index = 0
    while index < len(symbols):
        whole = tuple(symbols[index : index + 2]) == pair
        found.append("".join(symbols[index : index + 1 + whole]))
        index += 1 + whole
    return found


def renumbered(processor: Any, new: Mapping[int, int]) -> Any:
    """Return a post-processor of tokenizer.json (TemplateProcessing, BertProcessing, …) with the new ids."""
    if not isinstance(processor, dict):
        return processor
    found = dict(processor)
    if "processors" in found:
        found["processors"] = [renumbered(part, new) for part in found["processors"]]
    for name in ("cls", "sep"):
        if name in found:
            found[name] = [found[name][0], new[found[name][1]]]
    if found.get("type") == "TemplateProcessing":
        found["special_tokens"] = {
            text: {**entry, "ids": [new[index] for index in entry["ids"]]} for text, entry in found["special_tokens"].items()
        }
    return found


def processor_ids(processor: Any) -> set[int]:
    """Return the ids that a post-processor adds."""
    if not isinstance(processor, dict):
        return set()
    found = {index for part in processor.get("processors", []) for index in processor_ids(part)}
    found |= {processor[name][1] for name in ("cls", "sep") if name in processor}
    entries = processor.get("special_tokens", {}) if processor.get("type") == "TemplateProcessing" else {}
    return found | {index for entry in entries.values() for index in entry["ids"]}
