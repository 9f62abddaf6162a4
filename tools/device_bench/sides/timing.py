"""How every side is timed, in its own process and environment: the standard library alone.

    python -m device_bench.sides.NAME REQUEST.json

REQUEST is {"model", "prompts": [[token id, …], …], "new_tokens", "threads", "text": [token id, …]}. The first prompt warms up
and is not timed but with all before it. Prints one JSON object: load_s (imports included), first_token_s (load and the first
prompt: what a side leaves to its first use is in it), medians over the other prompts of prefill and decode in
tokens/s, and where there is a text its loss, in nats a token: what the rounding of a side's weights costs.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

STARTED = time.perf_counter()  # a side imports this first, then its runtime


class Runner(Protocol):
    """One sequence, greedy."""

    def prefill(self, ids: list[int]) -> int:
        """Forget everything, run a prompt and return the token after it."""
        ...

    def step(self, token: int) -> int:
        """Append a token and return the next one, whether or not it would end an answer."""
        ...

    def logits(self, ids: list[int], *, fresh: bool) -> Any:
        """Append tokens, after forgetting everything if `fresh`, and return the logits `[vocabulary]` after them, numpy."""
        ...


def main(load: Callable[[dict[str, Any]], Runner]) -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    runner = load(request)
    figures: dict[str, Any] = {"load_s": time.perf_counter() - STARTED, "loaded_mb": memory()}
    count, speeds, answers = request["new_tokens"], [], []
    for ids in request["prompts"]:
        started = time.perf_counter()
        token = runner.prefill(ids)
        prefilled = time.perf_counter()
        figures.setdefault("first_token_s", prefilled - STARTED)
        answer = [token]
        for _ in range(count):
            token = runner.step(token)
            answer.append(token)
        speeds.append((len(ids) / (prefilled - started), count / (time.perf_counter() - prefilled)))
        answers.append(answer)
    figures["prefill_tokens_per_s"], figures["decode_tokens_per_s"] = (
        statistics.median(values) for values in zip(*speeds[1:], strict=True)
    )
    if request.get("text"):
        figures["loss"] = loss(runner, request["text"])
    print(json.dumps({**figures, "answers": answers}))


def loss(runner: Runner, ids: list[int]) -> float:
    """Return the mean negative log-likelihood of all tokens of a text but the first, each fed on its own."""
    total = 0.0
    for place, target in enumerate(ids[1:]):
        logits = runner.logits([ids[place]], fresh=place == 0).astype("float64")
        total += math.log(float(_exp(logits - logits.max()).sum())) + float(logits.max() - logits[target])
    return total / (len(ids) - 1)


def _exp(values: Any) -> Any:
    import numpy as np  # every side has it

    return np.exp(values)


def memory() -> float | None:
    """Return the resident MB of this process where the system tells them."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            values = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    return int(values["VmRSS"].split()[0]) / 1024
