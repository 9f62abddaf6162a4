"""`edgelora bench`: how fast a bundle is here and what it needs, each figure measured in a process of its own.

Decoders: a prompt of 256 tokens and 128 tokens after it, greedy, without speculation or a prefix cache. Classifiers: ms for
one input of 32 tokens, one at a time. Speed is set against what reading the weights once per token would take.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import edgelora
from edgelora.errors import EdgeLoRAError, MachineError

PROMPT_TOKENS = 256
NEW_TOKENS = 128
CLASSIFIER_TOKENS = 32
CLASSIFIER_RUNS = 50
REPEATS = 3


def bench(bundle: str | Path, *, threads: int | None = None, repeats: int = REPEATS) -> dict[str, Any]:
    """Return medians over `repeats` child processes.

    Keys: load_s (imports, tokenizer and session, in a fresh process), peak_rss_mb (of that process after its work),
    prefill_tokens_per_s and decode_tokens_per_s, or ms_per_input; read_gb_s (this machine's memory, measured here),
    bandwidth_percent (weights read per second of decoding against it); size_mb, threads, `table` for people.
    """
    from edgelora.bundle import open_bundle
    from edgelora.hardware import available_memory, physical_cores
    from edgelora.rates import read_bandwidth

    opened = open_bundle(bundle)
    threads = threads or physical_cores()
    runs = [in_child(opened.folder, threads) for _ in range(repeats)]
    result: dict[str, Any] = {"bundle": str(bundle), "task": opened.task, "precision": opened.precision, "threads": threads}
    result |= {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
    weights = sum(path.stat().st_size for path in opened.model_path.parent.iterdir() if path.is_file())
    result["size_mb"] = round(weights / (1 << 20), 1)
    result["read_gb_s"] = round(read_bandwidth(threads, available_memory()), 1)
    per_second = result.get("decode_tokens_per_s") or 1000 / result["ms_per_input"]
    result["bandwidth_percent"] = round(100 * per_second * weights / 1e9 / result["read_gb_s"], 1)
    return result | {"table": table(result)}


def in_child(bundle: Path, threads: int) -> dict[str, float]:
    """Measure once in a fresh process. Raises MachineError when it dies."""
    package = str(Path(edgelora.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", "edgelora.bench", str(bundle.resolve()), str(threads)]
    child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    if child.returncode:
        killed = f"exit code {child.returncode}" + (", not enough memory" if child.returncode == -9 else "")
        raise MachineError(f"measuring {bundle} failed: {child.stderr.strip() or killed}")
    figures: dict[str, float] = json.loads(child.stdout)
    return figures


def measure(bundle: Path, threads: int) -> dict[str, float]:
    """The child: load, run, and return the figures of one process."""
    started = time.perf_counter()
    from edgelora.run.model import load

    model = load(bundle, threads=threads)
    figures = {"load_s": time.perf_counter() - started}
    figures |= time_decoder(model) if model.task == "text-generation" else time_classifier(model)
    from edgelora.hardware import peak_rss_mb

    return figures | {"peak_rss_mb": peak_rss_mb()}


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
    return {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}


def time_classifier(model: Any) -> dict[str, float]:
    """Return the median ms of one input of CLASSIFIER_TOKENS tokens."""
    import numpy as np

    from edgelora.tasks.base import Example

    classifier = model.classifier
    length = min(CLASSIFIER_TOKENS, classifier.max_length)
    ids = np.arange(length, dtype=np.int32) % classifier.tokenizer.vocab_size
    example = Example({"ids": ids, "label": np.array(-1, np.int32)})
    times = []
    for _ in range(CLASSIFIER_RUNS):
        started = time.perf_counter()
        classifier.logits([example])
        times.append(1000 * (time.perf_counter() - started))
    return {"ms_per_input": statistics.median(times[1:])}


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the figures as rows for people."""
    names = {
        "load_s": "load, s",
        "peak_rss_mb": "peak RAM, MB",
        "prefill_tokens_per_s": f"prompt of {PROMPT_TOKENS}, tokens/s",
        "decode_tokens_per_s": f"{NEW_TOKENS} tokens after it, tokens/s",
        "ms_per_input": f"input of {CLASSIFIER_TOKENS} tokens, ms",
        "size_mb": "weights on disk, MB",
        "read_gb_s": "memory here, GB/s",
        "bandwidth_percent": "of that used, %",
    }
    return [{"measured": text, "value": result[name]} for name, text in names.items() if name in result]


def main(bundle: str, threads: str) -> int:
    """The child's end: figures as JSON on stdout, or a message on stderr."""
    try:
        print(json.dumps(measure(Path(bundle), int(threads))))
    except EdgeLoRAError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
