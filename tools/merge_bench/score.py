"""One evaluator for every side: token-weighted loss of held-out rows of token ids, from whatever computes logits.

    python score.py torch FOLDER heldout.jsonl --threads 2        # a Hugging Face folder, fp32, with transformers
    python score.py onnx model.onnx heldout.jsonl --threads 2     # a decoder with or without a cache, with ONNX Runtime

A line of heldout.jsonl is one row: {"ids": […], "supervised": [0, 1, …]}, supervised[t] saying that token t is a target.
Prints one JSON object: loss (nats per target), tokens, rows, seconds. Runs in the peers' environments too: numpy, and what
computes the logits.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = Callable[[list[int]], NDArray[np.float32]]  # token ids [t] → logits [t, vocabulary]
SELECTORS = ("num_logits_to_keep",)  # scalar inputs that say how many of the last positions get logits
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def read_rows(path: Path, limit: int | None = None) -> list[dict[str, list[int]]]:
    """Return the first `limit` rows of a file of token ids and targets."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(limit or sys.maxsize), strict=False)]


def mean_loss(logits: Logits, rows: Iterable[dict[str, list[int]]]) -> dict[str, Any]:
    """Return the mean negative log-likelihood over all targets of all rows: a long row counts more than a short one."""
    total, tokens, count, started = 0.0, 0, 0, time.perf_counter()
    for row in rows:
        loss, targets = row_loss(logits(row["ids"]), row["ids"], row["supervised"])
        total, tokens, count = total + loss, tokens + targets, count + 1
    if not tokens:
        raise SystemExit("error: no row has a target")
    return {"loss": total / tokens, "tokens": tokens, "rows": count, "seconds": time.perf_counter() - started}


def row_loss(logits: NDArray[np.float32], ids: list[int], supervised: list[int]) -> tuple[float, int]:
    """Return (summed loss in nats, targets) of one row; the logits [t, vocabulary] of position t - 1 predict token t."""
    if logits.shape[0] != len(ids):
        raise SystemExit(f"error: {logits.shape[0]} positions have logits, {len(ids)} tokens were given")
    targets = np.flatnonzero(supervised[1:]) + 1
    chosen = logits[targets - 1].astype(np.float64)
    largest = chosen.max(-1)
    normalizers = np.log(np.exp(chosen - largest[:, None]).sum(-1)) + largest
    return float((normalizers - chosen[np.arange(len(targets)), np.asarray(ids)[targets]]).sum()), len(targets)


def torch_logits(folder: Path, threads: int) -> Logits:
    """Return what computes logits with transformers, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(ids: list[int]) -> NDArray[np.float32]:
        with torch.inference_mode():
            found: NDArray[np.float32] = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        return found

    return logits


def onnx_logits(path: Path, threads: int) -> Logits:
    """Return what computes logits with ONNX Runtime: the whole row at once, behind an empty cache."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {value.name: value for value in session.get_inputs()}
    optional = {value.name for value in session.get_overridable_initializers()}

    def feeds(ids: list[int]) -> Iterator[tuple[str, Any]]:
        count = len(ids)
        for name in SELECTORS:
            if name in inputs or name in optional:
                yield name, np.array(count, np.int64)
        given = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": np.arange(count, dtype=np.int64)[None],
        }
        for name, value in inputs.items():
            if name in given:
                yield name, given[name]
            elif name.startswith("past_key_values"):
                heads, size = cache_shape(path, value.shape)
                yield name, np.zeros((1, heads, 0, size), FLOATS[value.type])
            elif name not in SELECTORS:
                raise SystemExit(f"error: {path} has an input that is not known here: {name}")

    def logits(ids: list[int]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = session.run(["logits"], dict(feeds(ids)))[0][0]
        return found

    return logits


def cache_shape(path: Path, shape: list[int | str]) -> tuple[int, int]:
    """Return heads and size of a cache's input [batch, heads, past, size]; onnxruntime-genai names them in its config alone."""
    heads, size = shape[1], shape[3]
    if isinstance(heads, int) and isinstance(size, int):
        return heads, size
    decoder = json.loads((path.parent / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    return int(decoder["num_key_value_heads"]), int(decoder["head_size"])


KINDS: dict[str, Callable[[Path, int], Logits]] = {"torch": torch_logits, "onnx": onnx_logits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    print(json.dumps(mean_loss(KINDS[given.kind](given.model, given.threads), read_rows(given.rows))))


if __name__ == "__main__":
    main()
