"""Every side in turn, each time in a fresh process, on the same tokens; then medians and what ours is to the better peer."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_bench import environments
from training_bench import models
from training_bench.processes import run
from training_bench.results import Record, Results

from device_bench import files
from edgelora import console

OURS = "EdgeLoRA"
PROMPTS = 3  # the first of them warms up
FASTER = {"prefill_tokens_per_s": "prefill, tok/s", "decode_tokens_per_s": "decode, tok/s"}
TEXT_TOKENS = 384  # of README.md, as many as a prompt and its answer: more would raise the peak
SMALLER = {"load_s": "load, s", "first_token_s": "and 1st prompt", "peak_rss_mb": "peak, MB",
           "peak_anonymous_mb": "anonymous, MB", "loss": "loss"}  # fmt: skip


@dataclass(frozen=True)
class Side:
    """One contestant: a module of `sides`, the environment it runs in (None: this one), and its model."""

    name: str
    module: str
    environment: str | None
    model: Path
    native: bool = True  # whether our kernels may run it

    def command(self, request: Path, work: Path) -> list[str]:
        import sys

        interpreter = environments.interpreter(self.environment, work) if self.environment else sys.executable
        return [interpreter, "-P", "-m", f"device_bench.sides.{self.module}", str(request)]


def sides(model: str, work: Path, bundles: Sequence[Path]) -> list[Side]:
    """Return the contestants of a model; `bundles` of the user's take the place of those that are exported here."""
    given = bundles or [files.bundle(model, work)]
    found = [Side(OURS if len(given) < 2 else f"{OURS} {path.name}", "edgelora", None, path) for path in given]
    found.append(Side(f"{found[0].name}, in ONNX Runtime", "edgelora", None, given[0], native=False))
    packaged = files.q4_1(model, work)
    if packaged is not None:
        found.append(Side("llama.cpp Q4_1", "llama", "llama", packaged))
    found.append(Side("llama.cpp Q4_0", "llama", "llama", files.q4_0(model, work)))
    return [*found, Side("onnxruntime-genai", "genai", "onnx", files.genai(model, work))]


def trimmed_to(side: Side) -> int | None:
    """Return how many tokens a bundle's vocabulary was trimmed to; None for all others."""
    manifest = side.model / "edgelora.json"
    content = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    return int(content["decoder"]["vocab_size"]) if content.get("vocabulary") else None


def passage(work: Path) -> list[int]:
    """Return the tokens of the beginning of this project's README.md, which no model has learned by heart."""
    from edgelora.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(models.folder_of(models.SMOLLM2, work))
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    ids: list[int] = tokenizer.native.encode(text).ids
    return ids[:TEXT_TOKENS]


def prompts(work: Path, length: int) -> list[list[int]]:
    """Return the tokens of passages of this project's license, by SmolLM2's tokenizer; every model's vocabulary has them."""
    from edgelora.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(models.folder_of(models.SMOLLM2, work))
    ids = tokenizer.native.encode((Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")).ids
    return [(ids * (1 + PROMPTS * length // len(ids)))[place * length :][:length] for place in range(PROMPTS)]


def measure(
    model: str, results: Results, work: Path, *, bundles: Sequence[Path], rounds: int, threads: int, lengths: tuple[int, int]
) -> list[dict[str, Any]]:
    """Measure a model's contestants in alternation and return the table's rows."""
    tokens, new_tokens = lengths
    contestants = sides(model, work, bundles)
    for side in contestants:
        if side.environment:
            environments.interpreter(side.environment, work)
    asked, text = prompts(work, tokens), passage(work)
    records: dict[str, list[Record]] = {side.name: [] for side in contestants}
    for turn in range(rounds):
        # In another order each time: what starts after a large process finds its caches and free pages used up.
        for side in random.Random(turn).sample(contestants, len(contestants)):
            request = work / "device" / f"request-{side.module}.json"
            content = {"model": str(side.model), "prompts": asked, "new_tokens": new_tokens, "threads": threads}
            content["native"] = side.native
            content["text"] = text if turn == 0 else []  # the same every time
            if (size := trimmed_to(side)) is not None:  # any tokens will do for speed, none for a loss
                content |= {"prompts": [[token % size for token in ids] for ids in asked], "text": []}
            request.write_text(json.dumps(content), encoding="utf-8")

            def once(side: Side = side, request: Path = request) -> Record:
                measured = run(side.command(request, work), timeout=900).record()
                figures = measured.pop("result")
                figures.pop("answers", None)
                return {**figures, **measured}

            record = results.run(f"{model}/{tokens}+{new_tokens}/{threads}/{side.name}/{turn}", once)
            if record["outcome"] != "done":
                raise SystemExit(f"error: {side.name} {record['outcome']}: {record['message']}")
            records[side.name].append(record)
    rows = table(records)
    results.part(f"speed/{model}", rows)
    console.table(f"{model}: {tokens} tokens of prompt and {new_tokens} after it, medians of {rounds} processes each", rows)
    return rows


def table(records: dict[str, list[Record]]) -> list[dict[str, Any]]:
    """Return a row of medians for each side, and for each of ours what it is to the better peer in the same rounds."""
    named = {**FASTER, **SMALLER}
    middle = {name: {key: median(turns, key) for key in named} for name, turns in records.items()}
    rows = [{"side": name, **{named[key]: rounded(value) for key, value in row.items()}} for name, row in middle.items()]
    peers = [name for name in records if not name.startswith(OURS)]
    for name in (name for name in records if peers and name.startswith(OURS)):
        ratios = {}
        for key, title in named.items():
            better: Callable[..., str] = max if key in FASTER else min
            peer = better(peers, key=lambda other: middle[other][key] or 0.0)
            pairs = zip(records[name], records[peer], strict=True)
            shares = [a[key] / b[key] for a, b in pairs if a.get(key) and b.get(key)]
            ratios[title] = round(statistics.median(shares), 2) if shares else None
        rows.append({"side": f"{name} / better peer", **ratios})
    return rows


def median(turns: Sequence[Record], key: str) -> float | None:
    values = [turn[key] for turn in turns if turn.get(key) is not None]
    return statistics.median(values) if values else None


def rounded(value: float | None) -> float | None:
    return value if value is None else round(value, 2 if value < 10 else 1 if value < 100 else 0)
