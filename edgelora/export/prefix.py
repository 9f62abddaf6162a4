"""`edgelora export --prefix`: the KV cache of how all prompts begin, computed by the graph that ships (run/prefix.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelora import console
from edgelora.config import GenerateConfig
from edgelora.data.prepare import PREPARED, Prepared
from edgelora.errors import SettingsError
from edgelora.export.work import Work
from edgelora.run.decoder import DecoderSession
from edgelora.run.generate import common_prefix, prompt_ids
from edgelora.run.prefix import FILE, LEAST, write_prefix
from edgelora.tokenizer import Tokenizer

WORTH_TELLING = 32  # tokens that all prompts of a run begin with; a chat template's own are about as many
# What may follow a prefix: its last piece of text can be another one before each of these.
CONTINUATIONS = ("a", " a", "A", "1", " 1", ".", "\n", "\n\n", "<", '"', "é", "好")


@dataclass(frozen=True)
class Beginning:
    """How all prompts begin. prefix: a text, or a file of it; "" for what the run's do. system: their system turn, likewise."""

    prefix: str | None = None
    system: str | None = None

    @property
    def wanted(self) -> bool:
        return self.prefix is not None or self.system is not None

    def refuse(self, adapters: str) -> None:
        """Raise SettingsError where bundles with such adapters cannot have one."""
        if self.wanted and adapters == "swap":
            raise SettingsError("--prefix is for one model; with --adapters swap each adapter has its own keys and values")


ANY_BEGINNING = Beginning()


def add_prefix(work: Work, beginning: Beginning) -> None:
    """Write the prefix's file and its entry in the manifest. Where none is wanted, tell of what all prompts of a run share."""
    if work.spec is None:
        if beginning.wanted:
            raise SettingsError("--prefix and --system are for models that write text after a prompt (text-generation)")
        return
    if not beginning.wanted:
        tell(work)
        return
    prefix, system = beginning.prefix, beginning.system
    tokenizer = work.processor
    ids = run_prefix(work) if prefix == "" and system is None else given_prefix(tokenizer, text_of(prefix), text_of(system))
    longest = int(work.manifest["max_length"])
    if len(ids) < LEAST:
        message = f"all prompts begin with the same {len(ids)} tokens; from {LEAST} on, keeping their cache pays"
        raise SettingsError(message, hint='--prefix "the instruction that prompts begin with"')
    if len(ids) >= longest:
        hint = f"--max-length {len(ids) + 512}"
        raise SettingsError(f"the prefix has {len(ids)} tokens; this bundle takes {longest} in all", hint=hint)
    decoder = DecoderSession(work.model_path, max_length=longest)
    decoder.prefill(ids)
    path = work.staging / FILE
    write_prefix(path, ids, decoder.saved())
    size = round(path.stat().st_size / 2**20, 2)
    work.manifest["prefix"] = {"file": FILE, "tokens": len(ids), "size_mb": size, "token_ids": ids}
    console.say(f"prefix: {len(ids)} tokens, {size} MB: prompts that begin with them start from there")


def text_of(given: str | None) -> str | None:
    """Return a text, or that of the file it names, without the line break at its end. Raises SettingsError."""
    if not given:
        return given
    try:
        path = Path(given).expanduser()
        return path.read_text(encoding="utf-8").rstrip("\n") if path.is_file() else given
    except UnicodeDecodeError:
        raise SettingsError(f"{given} is no text in UTF-8", hint="--prefix TEXT, or a text file") from None
    except (OSError, RuntimeError):  # too long for a name; no such home
        return given


def given_prefix(tokenizer: Tokenizer, prefix: str | None, system: str | None) -> list[int]:
    """Return the tokens that prompts have in common which begin with `prefix`, after the system turn `system`."""
    config = GenerateConfig(system=system)
    found = [prompt_ids(tokenizer, (prefix or "") + text, config) for text in CONTINUATIONS]
    return shared(found)


def run_prefix(work: Work) -> list[int]:
    """Return the tokens that all prompts of the run begin with, as this bundle's tokenizer has them.

    Raises SettingsError where the bundle is of no run, or the run has not kept its rows.
    """
    hint = '--prefix "the instruction that prompts begin with"'
    if work.run is None or not (work.run / "data" / PREPARED).is_file():
        raise SettingsError("--prefix without a text takes what all rows of a run begin with, and there are none", hint=hint)
    found = shared_in_rows(work.run)
    if "vocabulary" not in work.manifest:
        return found
    text = Tokenizer.from_folder(work.run).decode(found, skip_special_tokens=False)  # other ids, the same pieces
    anew: list[int] = work.processor.encode(text, add_special_tokens=False)
    return anew


def shared_in_rows(run: Path) -> list[int]:
    """Return the tokens that all prompts of a run's training rows begin with."""
    store = Prepared.open(run / "data").store("train")
    found: Any = None
    for example in store:
        ids, supervised = example.arrays["ids"], example.arrays["supervised"]
        prompt = ids[: int(supervised.argmax())] if supervised.any() else ids
        if found is None:
            found = prompt
        size = min(len(found), len(prompt))
        differs = np.flatnonzero(found[:size] != prompt[:size])
        found = found[: int(differs[0]) if len(differs) else size]
        if len(found) < LEAST:
            break
    return [] if found is None else [int(token) for token in found]


def shared(prompts: Sequence[list[int]]) -> list[int]:
    """Return what all token lists begin with."""
    first = prompts[0]
    return first[: min(common_prefix(first, other) for other in prompts)]


def tell(work: Work) -> None:
    """Say that all prompts of a run begin alike, where they do."""
    if work.run is None or work.manifest.get("adapters") or not (work.run / "data" / PREPARED).is_file():
        return
    count = len(shared_in_rows(work.run))
    if count >= WORTH_TELLING:
        console.say(f"all prompts of {work.run} begin with the same {count} tokens; --prefix ships their KV cache")
