"""`edgelora export --fast-prompts`: a second graph that fills the cache from a prompt, its products in 8 bits (int8_linear.py).

    onnx/prefill.pb, onnx/prefill.pb_data     inputs input_ids, attention_mask, past_key_values.*; outputs present.*
    manifest                                  `prefill`: file, size_mb, and what it changes in answers: rows, tokens, loss,
                                              loss_without, kl

The name does not end in .onnx: loaders that take the one .onnx file of a folder go on finding it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgelora import console
from edgelora.errors import ModelError, SettingsError
from edgelora.export.decoder import DecoderBuilder
from edgelora.export.graph import Array, save
from edgelora.export.int8_linear import Int8Layers
from edgelora.export.work import Work
from edgelora.run.decoder import DecoderSession
from edgelora.run.prefill import LEAST, PromptGraph
from edgelora.tasks.base import TRIAL_TEXTS

FILE = "prefill.pb"
ROWS = 32  # of a run's held-out ones, to see what the graph changes
MOST_KL = 0.05  # nats a token, between answers after a prompt computed either way: a guard against models that it breaks


class Answered(NamedTuple):
    """Tokens; those from `start` on are an answer."""

    ids: list[int]
    start: int


def refuse_prefill(wanted: bool, adapters: str, device: str) -> None:
    """Raise SettingsError where a graph for prompts is wanted and the bundle cannot have one."""
    if not wanted:
        return
    if adapters != "merged":
        raise SettingsError(f"--fast-prompts is for merged bundles, not for --adapters {adapters}")
    if device != "cpu":
        raise SettingsError(
            f"--fast-prompts is for PCs: edgelora run reads its graph, and what runs bundles on {device} does not"
        )


def add_prefill(work: Work, wanted: bool, *, force: bool) -> None:
    """Write the graph and its entry in the manifest, where it is wanted.

    Raises SettingsError for what is no decoder in 4 or 8 bits, ModelError where answers after it are others, unless `force`.
    """
    if not wanted:
        return
    if work.spec is None:
        raise SettingsError("--fast-prompts is for models that write text after a prompt (text-generation)")
    if work.precision == "fp32":
        raise SettingsError("--fast-prompts rounds to 8 bits, which an fp32 bundle does not", hint="--precision int4")
    path = work.model_path.with_name(FILE)
    levels = work.checkpoint.manifest.get("accuracy_levels") or {}
    positions = int(work.manifest["decoder"]["max_positions"])
    save(DecoderBuilder(work.checkpoint, work.spec, positions, levels, kind=Int8Layers).build_without_logits(), path)
    size = sum(file.stat().st_size for file in path.parent.glob(f"{FILE}*"))
    found = effect(work, path)
    work.manifest["prefill"] = {"file": f"{path.parent.name}/{FILE}", "size_mb": round(size / 2**20, 2), **found}
    message = f"answers after prompts in 8 bits differ from the others by {found['kl']:.3g} nats a token"
    if found["kl"] > MOST_KL:
        message = f"{message}; {MOST_KL} are allowed"
        if not force:
            raise ModelError(message, hint="export without --fast-prompts, or use --force")
    console.say(message)


def effect(work: Work, path: Path) -> dict[str, float]:
    """Return what answers lose after prompts that went through the graph, on held-out rows or, without a run, a short text."""
    decoder = DecoderSession(work.model_path, max_length=int(work.manifest["max_length"]))
    graph = PromptGraph(path, keep=False)
    rows = tokens = 0
    sums = np.zeros(3)
    for row in sequences(work, decoder.max_length):
        targets = np.array(row.ids[row.start :])[:, None]
        without, fast = (answer_logits(decoder, row, prompts) for prompts in (None, graph))
        losses = [-np.take_along_axis(found, targets, 1).sum() for found in (fast, without)]
        sums += [*losses, (np.exp(without) * (without - fast)).sum()]
        rows, tokens = rows + 1, tokens + len(targets)
    loss, plain, kl = (sums / max(tokens, 1)).tolist()
    return {"rows": rows, "tokens": tokens, "loss": round(loss, 5), "loss_without": round(plain, 5), "kl": round(kl, 6)}


def sequences(work: Work, longest: int) -> Iterator[Answered]:
    """Yield rows of the run with prompts that are long enough, else a text of which the second half is the answer."""
    from edgelora.export.results import held_out_of

    held = held_out_of(work)
    found = []
    for example in held.examples if held is not None else ():
        ids, supervised = example.arrays["ids"], example.arrays["supervised"]
        start = int(supervised.argmax())
        if start > LEAST + 1 and len(ids) <= longest:
            found.append(Answered(ids.tolist(), start))
    if found:
        yield from found[:ROWS]
        return
    ids = work.processor.encode(" ".join(TRIAL_TEXTS), add_special_tokens=False)
    ids = (ids * -(-4 * LEAST // len(ids)))[: min(4 * LEAST, longest)]
    yield Answered(ids, len(ids) // 2)


def answer_logits(decoder: DecoderSession, row: Answered, prompts: PromptGraph | None) -> Array:
    """Return the log-probabilities `[len(answer), V]` before each token of the answer."""
    decoder.prompts = prompts
    decoder.rewind(0)
    logits = [decoder.prefill(row.ids[: row.start])[None].copy()]
    rest = row.ids[row.start : -1]
    for at in range(0, len(rest), decoder.score_limit):
        logits.append(decoder.score(rest[at : at + decoder.score_limit]).copy())
    found: Array = np.concatenate(logits).astype(np.float64)
    found -= found.max(-1, keepdims=True)
    found -= np.log(np.exp(found).sum(-1, keepdims=True))
    return found
