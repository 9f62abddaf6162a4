"""A bundle as a Predictor, so that tasks score ONNX models with the code that scores torch models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgelora.config import GenerateConfig
from edgelora.run.decoder import DecoderSession
from edgelora.run.generate import Answer
from edgelora.run.model import Model
from edgelora.search import Search
from edgelora.tasks import get_task
from edgelora.tasks.base import Example


class OnnxPredictor:
    """Scores examples with a loaded bundle, one sequence at a time for decoders."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.task = get_task(model.task)
        self.watch: Callable[[int, NDArray[np.float32]], None] | None = None  # sees the logits that `losses` goes by, in slices

    def losses(self, examples: Sequence[Example]) -> list[tuple[float, int]]:
        """Return summed negative log-likelihood (nats) and number of supervised tokens of each example."""
        if self.task.writes:
            return self.model.writer.losses(examples, self.watch)
        decoder = self.model.generator.decoder
        self.model.generator.forget()
        found = []
        for number, example in enumerate(examples):
            watch = None if self.watch is None else functools.partial(self.watch, number)
            found.append(example_loss(decoder, example.arrays["ids"], example.arrays["supervised"], watch))
        return found

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int]) -> list[list[int]]:
        """Continue each prompt greedily, up to a stop token (not returned) or the bundle's length."""
        config = GenerateConfig(max_new_tokens=max_new_tokens)
        return [Answer(self.model.generator, list(prompt), config, stop=stop).finished().tokens for prompt in prompts]

    def write(self, examples: Sequence[Example], search: Search) -> list[list[int]]:
        """Return what the decoder writes about each example, without the token that ends it."""
        return self.model.writer.write(examples, search)

    def outputs(self, examples: Sequence[Example]) -> list[dict[str, NDArray[np.float32]]]:
        """Return the graph's outputs of each example by name."""
        return self.model.classifier.outputs(examples)

    def logits(self, examples: Sequence[Example]) -> NDArray[np.float32]:
        """Return logits `[n, labels]`."""
        return self.model.classifier.logits(examples)


def example_loss(
    decoder: DecoderSession,
    ids: NDArray[np.int32],
    supervised: NDArray[np.uint8],
    watch: Callable[[NDArray[np.float32]], None] | None = None,
) -> tuple[float, int]:
    """Return (summed loss, count) of one sequence; `supervised[t]`: token t is a target, predicted by the position before.

    Positions that predict no target run without logits, the others in slices: never `[tokens, vocabulary]` at once.
    """
    decoder.rewind(0)
    predicts = np.append(supervised[1:], 0).astype(bool)  # position t predicts token t + 1
    total, position, end = 0.0, 0, int(np.flatnonzero(predicts)[-1]) + 1 if predicts.any() else 0
    while position < end:
        ahead = np.flatnonzero(predicts[position:end] != predicts[position])
        size = int(ahead[0]) if len(ahead) else end - position
        if predicts[position]:
            size = min(size, decoder.score_limit)
            logits = decoder.score(ids[position : position + size].tolist())
            if watch is not None:
                watch(logits)
            total += token_losses(logits, ids[position + 1 : position + size + 1])
        else:
            decoder.prefill(ids[position : position + size].tolist())
        position += size
    return total, int(predicts.sum())


def token_losses(logits: NDArray[np.float32], targets: NDArray[np.int32]) -> float:
    """Return the summed negative log-likelihood of targets `[t]` under logits `[t, vocabulary]`; overwrites the logits."""
    chosen = logits[np.arange(len(targets)), targets].astype(np.float64)
    largest = logits.max(-1, keepdims=True)
    np.subtract(logits, largest, out=logits)
    np.exp(logits, out=logits)
    normalizers = np.log(logits.sum(-1, dtype=np.float64)) + largest[:, 0]
    return float((normalizers - chosen).sum())
