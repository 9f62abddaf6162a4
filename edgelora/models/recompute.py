"""What forward keeps for backward, block by block: all that a block needs, or its input alone, from which it is computed again
(gradient checkpointing, arXiv 1604.06174).

The last blocks keep everything: their backward comes first, so that what they kept is gone when the others are computed again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from edgelora.errors import MachineError
from edgelora.models import slab
from edgelora.models.slab import Slab

ALL = 1 << 30
MOST_HEADS = 64  # a tensor with so few numbers a token, attention's log-sum-exp among them, is not worth rounding


class Stream(Protocol):
    """Told which block is computed next, so that its weights are read ahead, and dropped behind."""

    def enter(self, block: int) -> None: ...
    def leave(self, block: int) -> None: ...
    def drop_table(self) -> None: ...


@dataclass(frozen=True)
class Keeping:
    """kept_blocks: so many of the last blocks keep what they need, the others their input.

    bits: 32, or 16 for bf16: half the memory, and gradients within 1e-2. file: where inputs go instead of memory.
    """

    kept_blocks: int = ALL
    bits: int = 32
    file: Path | None = None

    def run(
        self, blocks: Sequence[nn.Module], hidden: Tensor, *rest: Any, stream: Stream | None = None, first: int = 0
    ) -> Tensor:
        """Return the hidden states after all blocks from `first` on, each called with the hidden states and `rest`."""
        shelf = self.shelf(hidden)
        for i, block in enumerate(blocks[first:], first):
            calls = Calls(_with(block, rest), _with(getattr(block, "recall", block), rest))
            hidden = self.block(block, calls, hidden, i, len(blocks), shelf, stream)
        return hidden

    def shelf(self, hidden: Tensor) -> Shelf | None:
        """Return where the inputs of one forward pass go; None where there will be no backward."""
        if torch.is_grad_enabled():
            return Shelf(self.bits, self.file, hidden.shape)
        slab.release()
        return None

    def block(
        self, block: nn.Module, calls: Calls, hidden: Tensor, index: int, count: int, shelf: Shelf | None,
        stream: Stream | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the output of block `index` of `count`.

        Blocks below the lowest adapter keep nothing, and backward does not reach them.
        """
        trained = [p for p in block.parameters() if p.requires_grad] if shelf is not None else []
        if stream is not None:
            stream.enter(index)
        if shelf is None or not (trained or hidden.requires_grad):
            with torch.no_grad():
                out = calls.forward(hidden)
        elif index >= count - self.kept_blocks:
            with nullcontext() if self.bits == 32 else _Bf16(shelf.slab, hidden.numel() // hidden.shape[-1] * MOST_HEADS):
                out = calls.forward(hidden)
        else:
            recall = _Recall(calls, shelf, index, block.training and _draws(block), stream)
            out = _Recompute.apply(hidden, recall, *trained)  # type: ignore[no-untyped-call]
        if stream is not None:
            stream.leave(index)
        return out


@dataclass(frozen=True)
class Calls:
    """How a block is computed. `again` need only have the right gradients: its output is not looked at."""

    forward: Callable[[Tensor], Tensor]
    again: Callable[[Tensor], Tensor]


def _with(call: Callable[..., Tensor], rest: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    return lambda hidden: call(hidden, *rest)


def _draws(block: nn.Module) -> bool:
    """Tell whether a block draws random numbers while training: by a module, or by a number such as attention_dropout."""
    rates = [module.p if isinstance(module, nn.Dropout) else _rates(module) for module in block.modules()]
    return any(rates)


def _rates(module: nn.Module) -> float:
    """Return the largest attribute of a module that is a rate of dropout."""
    named = [value for name, value in vars(module).items() if "drop" in name and isinstance(value, int | float)]
    return max(named, default=0.0)


class Shelf:
    """Where blocks' inputs wait for backward: in memory as they are or in bf16, or in a file."""

    def __init__(self, bits: int, file: Path | None, shape: torch.Size) -> None:
        self.dtype = torch.float32 if bits == 32 else torch.bfloat16
        self.shape = shape
        self.slab = Slab()
        self.file = None if file is None else file.open("w+b", buffering=0)
        if self.file is not None:
            weakref.finalize(self, self.file.close)

    def put(self, place: int, x: Tensor) -> Tensor | int:
        if self.file is None:
            return self.slab.put(x, self.dtype)
        stored = x.to(self.dtype)
        self.file.seek(place * stored.nbytes)
        left = memoryview(_bytes(stored))
        while len(left):  # a disk that is almost full, or a system with a limit, writes a part; a full one raises
            left = left[self.file.write(left) :]
        return place

    def take(self, ticket: Tensor | int) -> Tensor:
        if isinstance(ticket, Tensor):
            return ticket.float()
        assert self.file is not None
        stored = torch.empty(self.shape, dtype=self.dtype)
        self.file.seek(ticket * stored.nbytes)
        left = memoryview(_bytes(stored))
        while len(left):
            left = left[self._read(left) :]
        return stored.float()

    def _read(self, into: memoryview) -> int:
        assert self.file is not None
        count = self.file.readinto(into)
        if not count:
            raise MachineError(f"{self.file.name} is shorter than what was written to it", hint="is its disk full?")
        return count


def _bytes(x: Tensor) -> Any:
    return x.contiguous().view(torch.uint8).numpy().reshape(-1).data


@dataclass
class _Recall:
    """How one block is computed again; `draws` tells whether it draws random numbers."""

    calls: Calls
    shelf: Shelf
    place: int
    draws: bool
    stream: Stream | None


class _Recompute(torch.autograd.Function):
    """A block that keeps its input only. Its parameters are inputs here: with frozen inputs alone the output would need no
    gradient, and adapters would silently get none (peft #1142)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recall: _Recall, *parameters: Tensor) -> Tensor:
        ctx.recall, ctx.parameters, ctx.wants_x = recall, parameters, x.requires_grad
        ctx.random = torch.get_rng_state() if recall.draws else None
        ctx.ticket = recall.shelf.put(recall.place, x)
        return recall.calls.forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recall, ctx.recall = ctx.recall, None  # its shelf is free for the next pass as soon as this one is done
        if recall.stream is not None:
            recall.stream.enter(recall.place)
        x = recall.shelf.take(ctx.ticket).detach().requires_grad_(ctx.wants_x)
        ctx.ticket = None
        now = torch.get_rng_state() if ctx.random is not None else None
        if ctx.random is not None:
            torch.set_rng_state(ctx.random)
        with torch.enable_grad():
            y = recall.calls.again(x)
        if now is not None:
            torch.set_rng_state(now)
        wanted = [*([x] if ctx.wants_x else []), *ctx.parameters]
        found = torch.autograd.grad(y, wanted, grads[0], allow_unused=True)
        if recall.stream is not None:
            recall.stream.leave(recall.place)
        return (found[0] if ctx.wants_x else None, None, *found[len(found) - len(ctx.parameters) :])


class _Bf16(saved_tensors_hooks):
    """Keeps what forward saves in bf16: every tensor of more than `most` numbers.

    Smaller ones stay: the norms' scales and attention's log-sum-exp, whose rounding would be an exponent's. What two
    functions save, they share here too.
    """

    def __init__(self, slab: Slab, most: int) -> None:
        kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

        def pack(x: Tensor) -> Any:
            if x.dtype != torch.float32 or not _dense(x):
                return x
            flat = x.detach().as_strided((x.numel(),), (1,))
            key = x.data_ptr(), x.numel()
            if key not in kept:
                kept[key] = flat, slab.put(flat, torch.float32 if x.numel() <= most else torch.bfloat16)
            return kept[key][1], x.shape, x.stride(), slab

        def unpack(stored: Any) -> Tensor:
            if isinstance(stored, Tensor):
                return stored
            values, shape, strides, _ = stored
            whole: Tensor = values.float()
            return whole.as_strided(shape, strides)

        super().__init__(pack, unpack)
        self._kept = kept

    def __exit__(self, *arguments: object) -> None:
        super().__exit__(*arguments)
        self._kept.clear()


def _dense(x: Tensor) -> bool:
    """Tell whether a tensor's numbers fill a piece of memory without gaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
