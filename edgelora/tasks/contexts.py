"""A question and its context as tokens: their places in the text, and windows over a long one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.tasks.answers import Found, best_span, choose
from edgelora.tasks.base import Example
from edgelora.tasks.classified import log_softmax

if TYPE_CHECKING:
    import tokenizers
    import torch


def places_of(encoding: tokenizers.Encoding, context: str) -> NDArray[np.int32]:
    """Return the characters of the context that each token is, int32 [T, 2], without the space that byte-level tokens begin
    with; -1 for those of the question."""
    inside = np.array([sequence == 1 for sequence in encoding.sequence_ids])
    offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
    for number in inside.nonzero()[0]:
        piece = context[offsets[number, 0] : offsets[number, 1]]
        offsets[number, 0] += len(piece) - len(piece.lstrip()) if piece.strip() else 0
    return np.where(inside[:, None], offsets, -1).astype(np.int32)


def covered(places: NDArray[np.int32], start: int, end: int) -> tuple[int, int]:
    """Return the first and the last token that have a part of these characters; (0, 0) where none has."""
    tokens = ((places[:, 1] > start) & (places[:, 0] < end) & (places[:, 0] >= 0)).nonzero()[0]
    return (int(tokens[0]), int(tokens[-1])) if len(tokens) else (0, 0)


def context_arrays(encoding: tokenizers.Encoding, context: str, answer: tuple[int, str] | None) -> dict[str, NDArray[Any]]:
    """Return ids int32 [T], types uint8 [T], places int32 [T, 2] (a token's characters of the context, or -1), and start and
    end int32 []: the tokens of the answer, 0 without one."""
    places = places_of(encoding, context)
    start, end = covered(places, answer[0], answer[0] + len(answer[1])) if answer else (0, 0)
    numbers = {name: np.array(value, np.int32) for name, value in (("start", start), ("end", end))}
    types = np.array(encoding.type_ids, dtype=np.uint8)
    return {"ids": np.array(encoding.ids, dtype=np.int32), "types": types, "places": places, **numbers}


def cut(example: Example, length: int, overlap: int) -> list[Example]:
    """Return the windows of an example, each the question with a part of the context and of at most `length` tokens; parts
    overlap by so many tokens. A window that lacks a part of the answer has none: both its ends are 0."""
    places, size = example.arrays["places"][:, 0], len(example)
    inside = (places >= 0).nonzero()[0]
    first, last = int(inside[0]), int(inside[-1]) + 1
    width = max(1, length - first - (size - last))
    if last - first <= width:
        return [example]
    begin, end = int(example.arrays["start"]), int(example.arrays["end"])
    windows = []
    for start in range(first, last, width - min(overlap, width // 2)):
        stop = min(start + width, last)
        kept = [*range(first), *range(start, stop), *range(last, size)]
        arrays = {name: array[kept] if array.ndim else array for name, array in example.arrays.items()}
        shift = start - first if begin and start <= begin and end < stop else None
        for name, place in (("start", begin), ("end", end)):
            arrays[name] = np.array(0 if shift is None else place - shift, np.int32)
        windows.append(Example(arrays))
        if stop == last:
            break
    return windows


def log_ends(outputs: Mapping[str, NDArray[Any]], window: Example) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the log probabilities [T] of each token to begin and to end the answer."""
    start, end = (log_softmax(outputs[f"{name}_logits"][: len(window)].astype(np.float64)) for name in ("start", "end"))
    return start, end


def answer_in(outputs: Sequence[Mapping[str, NDArray[Any]]], windows: Sequence[Example]) -> Found:
    """Return the answer to a question from the outputs of its windows."""
    pairs = zip(outputs, windows, strict=True)
    return choose([best_span(*log_ends(said, window), window.arrays["places"]) for said, window in pairs])


def ends_loss(outputs: Sequence[Mapping[str, NDArray[Any]]], windows: Sequence[Example]) -> float:
    """Return the mean cross-entropy of the answers' ends, nats per window."""
    losses = []
    for said, window in zip(outputs, windows, strict=True):
        start, end = log_ends(said, window)
        losses.append(-(start[int(window.arrays["start"])] + end[int(window.arrays["end"])]) / 2)
    return float(np.mean(losses))


def ends_nll(outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean of both ends' cross-entropies, summed over windows, over the tokens that are no padding."""
    import torch

    total = torch.zeros(())
    for name in ("start", "end"):
        logits_BS = outputs[f"{name}_logits"].float().masked_fill(batch["attention_mask"] == 0, float("-inf"))
        total = total + torch.nn.functional.cross_entropy(logits_BS, batch[f"labels_{name}"], reduction="sum") / 2
    return total


def context_problems(example: Example, max_length: int) -> list[str]:
    """Return what is wrong with a question and its context as tokens."""
    places = example.arrays["places"][:, 0]
    if not (places >= 0).any():
        return ["the tokenizer finds nothing in the context"]
    around = int((places < 0).sum())
    return [f"the question has {around} tokens, which leaves none of {max_length} to the context"] * (around >= max_length)


def written_answers(
    outputs: Sequence[Mapping[str, NDArray[Any]]], parts: Sequence[Sequence[Example]], contexts: Sequence[str]
) -> list[str]:
    """Return the answer to each question from the outputs of all their windows, in order: "" where there is none."""
    left = iter(outputs)
    chosen = [answer_in(list(islice(left, len(windows))), windows).place for windows in parts]
    return [context[slice(*place)] if place else "" for context, place in zip(contexts, chosen, strict=True)]


def answer_of(found: Found, context: str) -> dict[str, Any]:
    """Return {"answer", "start", "end", "probability", "context"}: "" and None where there is no answer."""
    start, end = found.place or (None, None)
    text = context[start:end] if found.place else ""
    return {"answer": text, "start": start, "end": end, "probability": found.probability, "context": context}


def answer_mask(example: Example) -> NDArray[np.uint8]:
    """Return 1 for the tokens [T] of the answer, or for the first where there is none."""
    mask = np.zeros(len(example), dtype=np.uint8)
    mask[int(example.arrays["start"]) : int(example.arrays["end"]) + 1] = 1
    return mask
