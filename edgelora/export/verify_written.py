"""Do the two graphs of an encoder-decoder compute what the merged weights say? Targets token by token, from the cache."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgelora.export.graph import Array
from edgelora.export.reference import rounded_activations
from edgelora.export.verify import Comparison
from edgelora.models.predictor import to_tensors
from edgelora.quant.grid import QuantizedTensor, round_to_int8

if TYPE_CHECKING:
    from edgelora.models.seq2seq import Seq2Seq
    from edgelora.run.seq2seq import Writer
    from edgelora.tasks.base import Example

LONGEST = 24  # tokens of a target


def verify_written(writer: Writer, model: Seq2Seq, *, quantized: bool) -> dict[str, Any]:
    """Compare the logits at every token of the task's trial examples: one batch in ONNX Runtime, one by one in torch."""
    task, processor = writer.task, writer.processor
    examples = [task.truncate(example, min(LONGEST, writer.max_length)) for example in task.trial_examples(processor)]
    found = np.concatenate(cached_logits(writer, examples))
    exact = reference(model, writer, examples, int8=False)
    return Comparison(found, exact, reference(model, writer, examples, int8=True) if quantized else None).report()


def cached_logits(writer: Writer, examples: list[Example]) -> list[Array]:
    """Return the logits `[T, vocabulary]` of each example's target, fed one token at a time."""
    targets = [example.arrays["target"] for example in examples]
    inputs = writer.writing.batch(targets)["decoder_input_ids"]
    steps = writer.read(examples)
    rows = np.concatenate([steps.feed(inputs[:, i : i + 1]) for i in range(inputs.shape[1])], axis=1)
    return [row[: len(target)] for row, target in zip(rows, targets, strict=True)]


@torch.no_grad()
def reference(model: Seq2Seq, writer: Writer, examples: list[Example], *, int8: bool) -> Array:
    """Return what torch computes, with float activations or with the int8 ones of the kernels."""
    found = []
    with rounded_activations(model) if int8 else nullcontext():
        for example in examples:
            batch = to_tensors(writer.task.collate([example], writer.processor))
            states = model.states(batch)
            weight = model.head.weight.data
            if int8 and isinstance(weight, QuantizedTensor):
                states = round_to_int8(states, weight.block_size)
            found.append(model.head.logits(states).numpy())
    return np.concatenate(found)
