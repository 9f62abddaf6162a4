"""`edgelora bench`: how fast a bundle is here and what it needs, each figure measured in a process of its own.

Decoders: a prompt of 256 tokens and 128 tokens after it, greedy, without speculation or a prefix cache. Classifiers: ms for
one input of 32 tokens, one at a time. Speed is set against what reading the weights once per token would take.

The adapters of a bundle, and other bundles, are measured in turn with it, so that what slows the machine slows all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edgelora
from edgelora.errors import EdgeLoRAError, MachineError

if TYPE_CHECKING:
    from edgelora.bundle import Bundle

PROMPT_TOKENS = 256
NEW_TOKENS = 128
AFTER_PREFIX = 16  # tokens of a prompt behind the bundle's prefix
CLASSIFIER_TOKENS = 32
CLASSIFIER_RUNS = 50
WRITTEN_TOKENS = 32
WRITER_RUNS = 6
REPEATS = 3
SPEEDS = {"prefill_tokens_per_s": "prefill_percent", "decode_tokens_per_s": "decode_percent", "ms_per_input": "speed_percent"}


@dataclass(frozen=True)
class Way:
    """What one process measures: a bundle, with one of its adapters or without."""

    bundle: Bundle
    adapter: str | None = None

    @property
    def name(self) -> str:
        """Return how what was learned ships: merged, static (a branch of the graph), swap or scales; or "base"."""
        manifest = self.bundle.manifest
        if self.adapter is not None:
            return {"lora": "swap"}.get(kind := str(manifest["adapters"][self.adapter]["kind"]), kind)
        if "branch" in manifest:
            return "static"
        return "merged" if manifest.get("settings") else "base"


def bench(
    bundle: str | Path, *, others: Sequence[str | Path] = (), threads: int | None = None, repeats: int = REPEATS
) -> dict[str, Any]:
    """Return medians over `repeats` child processes.

    Keys: engine ("native": kernels of our own, or "onnxruntime") and engine_reason (why not the former); load_s (imports,
    tokenizer and session, in a fresh process), peak_rss_mb (of that process after its work), prefill_tokens_per_s and
    decode_tokens_per_s, or ms_per_input; read_gb_s (this machine's memory, measured here), bandwidth_percent (weights read per
    second of decoding against it); of a bundle with a prefix, first_token_prefix_ms and first_token_ms; size_mb, threads,
    `table` for people. Where the bundle has adapters, or there are `others`, `ways` has a row for each: its figures, and its
    speed in percent of the first's.
    """
    from edgelora.bundle import open_bundle
    from edgelora.hardware import available_memory, physical_cores
    from edgelora.native.library import reason_of
    from edgelora.rates import read_bandwidth

    opened = open_bundle(bundle)
    threads = threads or physical_cores()
    ways = [way for place in (opened, *map(open_bundle, others)) for way in ways_of(place)]
    rounds = [[in_child(way.bundle.folder, threads, way.adapter) for way in ways] for _ in range(repeats)]
    runs = [figures[0] for figures in rounds]
    result: dict[str, Any] = {"bundle": str(bundle), "task": opened.task, "precision": opened.precision, "threads": threads}
    result |= {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
    left = reason_of(opened.model_path) if opened.decoder is not None else "no decoder"
    result["engine"] = "native" if left is None else "onnxruntime"
    result["engine_reason"] = left
    weights = sum(path.stat().st_size for path in opened.model_path.parent.glob("*.onnx*"))  # not what prompts alone read
    result["size_mb"] = round(weights / (1 << 20), 1)
    result["read_gb_s"] = round(read_bandwidth(threads, available_memory()), 1)
    per_second = result.get("decode_tokens_per_s") or 1000 / result["ms_per_input"]
    result["bandwidth_percent"] = round(100 * per_second * weights / 1e9 / result["read_gb_s"], 1)
    if len(ways) > 1:
        result["ways"] = compared(ways, rounds)
    return result | {"table": table(result)}


def ways_of(bundle: Bundle) -> list[Way]:
    return [Way(bundle), *(Way(bundle, name) for name in bundle.manifest.get("adapters") or {})]


def compared(ways: Sequence[Way], rounds: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Return a row for each way: medians of its figures, and of its speed in percent of the first's in the same round."""
    rows: list[dict[str, Any]] = []
    for index, way in enumerate(ways):
        figures = {name: round(statistics.median(run[index][name] for run in rounds), 3) for name in rounds[0][index]}
        for name, title in SPEEDS.items():
            if name in figures:
                shares = [run[index][name] / run[0][name] for run in rounds if name in run[0]]
                inverse = name == "ms_per_input"
                figures[title] = round(100 * statistics.median(1 / share if inverse else share for share in shares), 1)
        rows.append({"way": way.name, "bundle": way.bundle.folder.name, "adapter": way.adapter, **figures})
    return rows


def in_child(bundle: Path, threads: int, adapter: str | None = None, *, module: str = "edgelora.bench") -> dict[str, Any]:
    """Measure once in a fresh process, that of a module. Raises MachineError when it dies."""
    package = str(Path(edgelora.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", module, str(bundle.resolve()), str(threads), *filter(None, [adapter])]
    child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    if child.returncode:
        killed = f"exit code {child.returncode}" + (", not enough memory" if child.returncode == -9 else "")
        raise MachineError(f"measuring {bundle} failed: {child.stderr.strip() or killed}")
    figures: dict[str, Any] = json.loads(child.stdout)
    return figures


def measure(bundle: Path, threads: int, adapter: str | None = None) -> dict[str, float]:
    """The child: load, run, and return the figures of one process."""
    started = time.perf_counter()
    from edgelora.run.model import load

    model = load(bundle, threads=threads, adapter=adapter)
    figures = {"load_s": time.perf_counter() - started}
    figures |= timer_of(model)(model)
    from edgelora.hardware import peak_rss_mb

    return figures | {"peak_rss_mb": peak_rss_mb()}


def timer_of(model: Any) -> Callable[[Any], dict[str, float]]:
    return time_decoder if model.task == "text-generation" else time_writer if model.writes else time_classifier


def time_decoder(model: Any) -> dict[str, float]:
    """Return tokens/s of a prompt and of the tokens after it, the first run of each left out: it touches fresh memory."""
    decoder = model.generator.decoder
    room = decoder.max_length - NEW_TOKENS
    prompt = [token % decoder.vocab_size for token in range(100, 100 + max(1, min(PROMPT_TOKENS, room)))]
    times = []
    for _ in range(2):
        decoder.rewind(0)
        started = time.perf_counter()
        logits = decoder.prefill(prompt)
        prefilled = time.perf_counter()
        count = min(NEW_TOKENS, decoder.max_length - len(prompt))
        for _ in range(count):
            logits = decoder.step(int(logits.argmax()))
        times.append((len(prompt) / (prefilled - started), count / (time.perf_counter() - prefilled)))
    prefill, decode = times[-1]
    return {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode, **time_prefix(model.generator)}


def time_prefix(generator: Any) -> dict[str, float]:
    """Return the ms to the first logits of a prompt that begins with the bundle's prefix, from its file (the first time, when
    it is read too) and computed; {} where there is none."""
    prefix = generator.prefix
    if prefix is None or generator.adapter is not None:
        return {}
    room = generator.decoder.max_length - len(prefix.ids)
    prompt, times = [*prefix.ids, *range(100, 100 + min(AFTER_PREFIX, room))], []
    for used in (prefix, None):
        generator.prefix = used
        generator.forget()
        started = time.perf_counter()
        generator.feed(prompt)
        times.append(1000 * (time.perf_counter() - started))
    generator.prefix = prefix
    return {"first_token_prefix_ms": times[0], "first_token_ms": times[1]}


def time_classifier(model: Any) -> dict[str, float]:
    """Return the median ms of one input: of CLASSIFIER_TOKENS tokens, or one of the task's trial examples."""
    import numpy as np

    from edgelora.tasks.base import Example

    classifier = model.classifier
    example = classifier.task.trial_examples(classifier.processor)[0]
    if "ids" in example.arrays:
        length = min(CLASSIFIER_TOKENS, classifier.max_length)
        ids, whole = np.arange(length, dtype=np.int32) % classifier.processor.vocab_size, len(example)
        arrays = {
            n: np.resize(a, (length, *a.shape[1:])) if a.ndim and len(a) == whole else a for n, a in example.arrays.items()
        }
        example = Example({**arrays, "ids": ids})
    times = []
    for _ in range(CLASSIFIER_RUNS):
        started = time.perf_counter()
        classifier.outputs([example])
        times.append(1000 * (time.perf_counter() - started))
    return {"ms_per_input": statistics.median(times[1:])}


def time_writer(model: Any) -> dict[str, float]:
    """Return the median ms of reading one of the task's trial examples and writing WRITTEN_TOKENS tokens about it, greedily."""
    import dataclasses

    writer = model.writer
    example = writer.task.trial_examples(writer.processor)[0]
    search = dataclasses.replace(writer.writing.search, num_beams=1, eos=(), max_new_tokens=WRITTEN_TOKENS)
    times = []
    for _ in range(WRITER_RUNS):
        started = time.perf_counter()
        writer.write([example], search)
        times.append(1000 * (time.perf_counter() - started))
    return {"ms_per_input": statistics.median(times[1:])}


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the figures as rows for people."""
    names = {
        "load_s": "load, s",
        "peak_rss_mb": "peak RAM, MB",
        "prefill_tokens_per_s": f"prompt of {PROMPT_TOKENS}, tokens/s",
        "decode_tokens_per_s": f"{NEW_TOKENS} tokens after it, tokens/s",
        "ms_per_input": f"input of {CLASSIFIER_TOKENS} tokens, ms"
        if result["task"] == "text-classification"
        else "one input, ms",
        "first_token_prefix_ms": "first token after the prefix from its file, ms",
        "first_token_ms": "the same, the prefix computed, ms",
        "size_mb": "weights on disk, MB",
        "read_gb_s": "memory here, GB/s",
        "bandwidth_percent": "of that used, %",
    }
    rows = [{"measured": text, "value": result[name]} for name, text in names.items() if name in result]
    if result["engine"] == "native":
        return [*rows, {"measured": "run by", "value": "EdgeLoRA's kernels"}]
    return rows


def shown_ways(ways: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of `ways` for people."""
    names = {
        "load_s": "load, s", "peak_rss_mb": "peak, MB", "prefill_tokens_per_s": "prompt, tok/s", "prefill_percent": "%",
        "decode_tokens_per_s": "decode, tok/s", "decode_percent": "% ", "ms_per_input": "ms", "speed_percent": "%",
    }  # fmt: skip
    rows = []
    for way in ways:
        what = f"{way['way']}: {way['adapter']}" if way["adapter"] else f"{way['way']} ({way['bundle']})"
        rows.append({"way": what, **{title: way[name] for name, title in names.items() if name in way}})
    return rows


def main(figures: Callable[..., Mapping[str, Any]], bundle: str, threads: str, *adapter: str) -> int:
    """The child's end: figures as JSON on stdout, or a message on stderr."""
    try:
        print(json.dumps(figures(Path(bundle), int(threads), *adapter)))
    except EdgeLoRAError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(measure, *sys.argv[1:]))
