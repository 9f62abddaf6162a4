"""A torch model as the tasks score it: batches that bound the memory, and no gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgelora.models import gemm
from edgelora.models.head import TILE_ROWS

if TYPE_CHECKING:
    from edgelora.models.decoder import Decoder
    from edgelora.models.network import Network
    from edgelora.models.spec import DecoderSpec
    from edgelora.search import Search
    from edgelora.tasks.base import Example

Collate = Callable[[Sequence["Example"]], dict[str, NDArray[Any]]]

BATCH_TOKENS = 512  # tokens computed at once, padding counted
CACHE_BYTES = 64 << 20  # keys and values of the prompts that are continued together
MOST_PROMPTS = 16  # that are continued together: more are hardly faster
FP32 = 4


def to_tensors(batch: dict[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def cache_bytes(spec: DecoderSpec, prompts: int, longest: int) -> int:
    """Return the bytes of keys and values of so many prompts; `longest`: tokens of the longest one and its answer."""
    return 2 * FP32 * spec.num_layers * spec.num_kv_heads * spec.head_dim * prompts * longest


def prompts_at_once(spec: DecoderSpec, longest: int, budget: int = CACHE_BYTES) -> int:
    """Return how many prompts are continued together within a budget in bytes for their keys and values; at least one."""
    return max(1, min(MOST_PROMPTS, budget // cache_bytes(spec, 1, longest)))


def generation_bytes(
    spec: DecoderSpec, prompts: int, longest: int, *, batch_tokens: int = BATCH_TOKENS, tile_rows: int = TILE_ROWS
) -> int:
    """Return the bytes that continuing `prompts` prompts together takes beside the weights and a layer's scratch buffer.

    The cache, with the larger of what a block computes for a piece of the prompts and what one step takes: the keys and
    values of a layer once more, repeated for all query heads, and a tile of logits.
    """
    tokens = min(max(batch_tokens, longest), prompts * longest)
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    block = 3 * spec.hidden_size + 2 * queries + 4 * keys + (3 if spec.gated else 2) * spec.intermediate_size
    step = prompts * (2 * longest * queries + tile_rows)
    return cache_bytes(spec, prompts, longest) + FP32 * max(tokens * block, step)


class TorchPredictor:
    """The Predictor (tasks/base.py) of a Decoder or a Network. `collate` is the task's, its padding token filled in.

    batch_tokens: tokens computed at once (at least one row); cache_bytes: for keys and values while text is generated.
    """

    def __init__(
        self, model: Decoder | Network, collate: Collate, *, batch_tokens: int = BATCH_TOKENS, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.model: Any = model
        self.collate = collate
        self.batch_tokens = batch_tokens
        self.cache_bytes = cache_bytes
        self.watch: Callable[[int, torch.Tensor], None] | None = None  # sees each example's states as `losses` computes them

    @gemm.exact()
    @torch.no_grad()
    def losses(self, examples: Sequence[Example]) -> list[tuple[float, int]]:
        """Return the summed negative log-likelihood and the number of supervised tokens of each example."""
        self.model.eval()
        found: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
        for numbers in self._batches(examples):
            batch = to_tensors(self.collate([examples[i] for i in numbers]))
            hidden_TH = self.hidden(numbers, batch)
            # The targets of one document after the other, each cut where the next document's first position comes.
            cuts = torch.searchsorted(batch["positions"], batch["starts"]).tolist()
            for number, start, stop in zip(numbers, cuts, cuts[1:], strict=False):
                states_SH, targets = hidden_TH[batch["positions"][start:stop]], batch["targets"][start:stop]
                if self.watch is not None:
                    self.watch(number, states_SH)
                found[number] = (float(self.model.nll(states_SH, targets)), len(targets))
        return found

    def hidden(self, numbers: list[int], batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the last hidden states `[T, H]` of a batch of the examples `numbers`."""
        states: torch.Tensor = self.model.states(batch)
        return states

    @gemm.exact()
    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int]) -> list[list[int]]:
        """Continue each prompt greedily; prompts of like length share a cache."""
        self.model.eval()
        answers: list[list[int]] = [[] for _ in prompts]
        waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        while waiting:
            # The longest come first: what they leave in the allocator is enough for the others.
            longest = len(prompts[waiting[-1]]) + max_new_tokens
            taken = waiting[-prompts_at_once(self.model.spec, longest, self.cache_bytes) :]
            del waiting[-len(taken) :]
            together = [list(prompts[i]) for i in taken]
            found = self.model.generate(together, max_new_tokens, stop, at_once=self.batch_tokens)
            for number, answer in zip(taken, found, strict=True):
                answers[number] = answer
        return answers

    @gemm.exact()
    @torch.no_grad()
    def write(self, examples: Sequence[Example], search: Search) -> list[list[int]]:
        """Return what the decoder writes about each example; those of like length are searched together."""
        self.model.eval()
        written: list[list[int]] = [[] for _ in examples]
        for numbers in self._batches(examples):
            batch = to_tensors(self.collate([examples[i] for i in numbers]))
            for number, tokens in zip(numbers, self.model.write(batch, search), strict=True):
                written[number] = tokens
        return written

    @gemm.exact()
    @torch.no_grad()
    def logits(self, examples: Sequence[Example]) -> NDArray[np.float32]:
        """Return the logits `[examples, labels]`."""
        return np.stack([found["logits"] for found in self.outputs(examples, ("logits",))])

    @gemm.exact()
    @torch.no_grad()
    def outputs(self, examples: Sequence[Example], names: Sequence[str] = ()) -> list[dict[str, NDArray[np.float32]]]:
        """Return the network's outputs of those names (default: the model's) of each example; padding's come last."""
        self.model.eval()
        rows: list[dict[str, NDArray[np.float32]]] = [{} for _ in examples]
        for numbers in self._batches(examples):
            batch = to_tensors(self.collate([examples[i] for i in numbers]))
            found = self.model.outputs(**self.model.inputs_of(batch))
            for name in names or self.model.output_names:
                # An example alone may have more of one output than of another: several texts and one picture
                for number, array in zip(numbers, found[name].float().numpy(), strict=False):
                    rows[number][name] = array
        return rows

    def _batches(self, examples: Sequence[Example]) -> Iterator[list[int]]:
        """Yield the numbers of examples of like length, longest first, at most `batch_tokens` (or one example) at once."""
        order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
        start = 0
        while start < len(order):
            longest = examples[order[start]]
            size = 1 if longest.alone else max(1, self.batch_tokens // max(1, len(longest)))
            yield order[start : start + size]
            start += size
