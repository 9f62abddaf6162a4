"""What of the rows is computed: no token that nothing learns from, and pieces of about equal tokens."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_decoder
from tolerances import SAME_STEP

from edgelora.adapters import inject
from edgelora.adapters.lora import LoRASettings
from edgelora.models.load import load_model
from edgelora.models.predictor import TorchPredictor, to_tensors
from edgelora.models.source import open_model
from edgelora.tasks.base import Example
from edgelora.tasks.text_generation import TextGeneration
from edgelora.train.batches import split
from edgelora.train.optimizer import trainable

TASK = TextGeneration()


def example(length: int, targets: list[int]) -> Example:
    mask = np.zeros(length, dtype=np.uint8)
    mask[targets] = 1
    return Example({"ids": np.arange(40, 40 + length, dtype=np.int32), "supervised": mask})


EXAMPLES = [example(9, [4, 5, 8]), example(2, [1]), example(6, [1, 2, 3, 4, 5])]


def test_dropped_tokens_change_neither_loss_nor_gradients(tmp_path: Path) -> None:
    """Against every row whole, with tokens behind its last target: attention looks back only."""
    torch.manual_seed(0)
    model = load_model(open_model(str(save_decoder(tmp_path / "model"))), TASK.name, base_bits=32)
    inject.attach(model, LoRASettings(rank=4, alpha=8.0), "all-linear")
    parameters = trainable(model)
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter.data, std=0.1)

    batch = to_tensors(TASK.collate(EXAMPLES, 0))
    assert int(batch["starts"][-1]) == sum(len(e) - 1 for e in EXAMPLES)
    loss, count = TASK.loss(model, batch)
    loss.backward()
    found = {name: parameter.grad for name, parameter in parameters.items()}

    model.zero_grad()
    rows = [np.append(e.arrays["ids"], [7, 8, 9]) for e in EXAMPLES]
    starts = np.cumsum([0, *map(len, rows)])
    targets = torch.tensor(
        [int(s) + t for s, e in zip(starts, EXAMPLES, strict=False) for t in e.arrays["supervised"].nonzero()[0]]
    )
    ids = torch.tensor(np.concatenate(rows), dtype=torch.int64)
    wanted = model.nll(model.hidden(ids, torch.tensor(starts))[targets - 1], ids[targets])
    wanted.backward()

    assert count == 9
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=SAME_STEP)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, rtol=SAME_STEP, atol=SAME_STEP * scale)

    losses = TorchPredictor(model, lambda examples: TASK.collate(examples, 0)).losses(EXAMPLES)
    assert [number for _, number in losses] == [3, 1, 5]
    assert sum(total for total, _ in losses) == pytest.approx(float(wanted.detach()), rel=SAME_STEP)


def test_a_truncated_row_ends_with_its_last_target() -> None:
    assert len(TASK.truncate(example(9, [4, 5, 8]), 8)) == 6
    assert len(TASK.truncate(example(9, [4, 5, 8]), 9)) == 9
    assert len(TASK.truncate(example(9, [8]), 5)) == 5  # without a target it is refused, by its length


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 8])
def test_the_largest_piece_is_the_least_possible(count: int, micro_batch: int) -> None:
    """Against every way to cut, on lengths that are nearly equal, far apart, and all the same."""
    random = np.random.default_rng([count, micro_batch])
    for lengths in (random.integers(40, 60, count), (10 ** (3 * random.random(count))).astype(np.int64), np.full(count, 9)):
        rows = sorted(range(count), key=lambda row: -int(lengths[row]))
        pieces = split(lengths, rows, micro_batch)
        number = -(-count // micro_batch)
        assert [row for piece in pieces for row in piece] == rows
        assert len(pieces) == number
        assert all(pieces)
        ways = (np.split(lengths[rows], list(at)) for at in combinations(range(1, count), number - 1))
        assert max(int(lengths[piece].sum()) for piece in pieces) == min(max(int(part.sum()) for part in way) for way in ways)
    assert split(np.array([90, 20, 20, 20, 20, 20]), [0, 1, 2, 3, 4, 5], 3) == [[0], [1, 2, 3, 4, 5]]
