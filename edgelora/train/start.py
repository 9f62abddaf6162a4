"""Where on-grid training begins: weights that make up for the errors of their rounding on training rows (quant/compensate.py).

Layer by layer, each seeing what the rounded ones before it make of the rows. The weights are kept in 8 bits, a resolution of
1/16 of a 4-bit step, in a file of the run's checkpoint: a resumed run begins with the same, and memory maps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgelora import console, memory
from edgelora.adapters.inject import adapters
from edgelora.merging import calibration
from edgelora.models.walk import same_inputs, see_inputs, walk_through
from edgelora.models.weights import file_entries, read_entry
from edgelora.planning import costs
from edgelora.quant.calibrate import Moments
from edgelora.quant.checkpoint import StreamedSafetensors
from edgelora.quant.compensate import compensated
from edgelora.quant.grid import QuantizedTensor, quantize
from edgelora.train import checkpoint

if TYPE_CHECKING:
    from edgelora.models.decoder import Decoder
    from edgelora.models.network import Network
    from edgelora.train.run import Run

    Model = Decoder | Network

FILE = "start.safetensors"
CALIBRATED = "calibrated"
START_BITS = 8
MOST_TOKENS = 6144  # with as many, SmolLM2 untrained loses nothing by rounding on held-out rows; more take longer
HESSIANS = 4  # of a layer's size in memory at once: the sums, the damped ones, two factors


def start_on_grid(model: Model, run: Run, out: Path) -> None:
    """Let a run that begins with calibrated weights do so: on its own training rows, in memory that training takes later."""
    if run.grid.get("start") != CALIBRATED:
        return

    def rows() -> Sequence[dict[str, Tensor]]:
        found = calibration.from_run(out, run.task, run.labels, {})
        return few(found.batches()) if found is not None else []

    room = round(sum(run.plan.parts.get(name, 0.0) for name in ("activations", costs.GROWING)) * (1 << 20))
    begin(model, run.grid, out / checkpoint.FOLDER, rows, room)


def few(batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return every n-th batch, so that there are about MOST_TOKENS: rows of all lengths, for batches are in their order."""
    tokens = sum(
        max((batch[name].numel() for name in ("ids", "input_ids") if name in batch), default=len(next(iter(batch.values()))))
        for batch in batches
    )
    return list(batches[:: max(1, round(tokens / MOST_TOKENS))])


def begin(model: Model, grid: dict[str, Any], folder: Path, rows: Callable[[], Sequence[dict[str, Tensor]]], room: int) -> None:
    """Let the adapters of a run round weights that make up for errors: those in `folder`, or new ones from `rows`.

    rows: batches without padding. room: bytes for second moments; layers too wide for it begin as they are.
    """
    if not below(model, grid):
        return
    path = folder / FILE
    if not path.is_file():
        folder.mkdir(exist_ok=True)
        partial = folder / f".{FILE}.partial"
        write(partial, dict(compensate(model, grid, rows(), room)))
        partial.replace(path)
    entries = file_entries(path)
    for layer, adapter in adapters(model).items():
        if f"{layer}.codes" in entries:
            codes, scales = (read_entry(entries[f"{layer}.{part}"]) for part in ("codes", "scales"))
            adapter.begin_with(QuantizedTensor(codes, scales, START_BITS, int(grid["block_size"]), adapter.in_features))
    memory.trim()  # what it was computed with, and the copies that were written, leave holes in the heap


def below(model: Model, grid: dict[str, Any]) -> set[str]:
    """Return the paths of the adapted layers that are rounded to less than 8 bits."""
    return {path for path in adapters(model) if int(grid["bits"].get(path, START_BITS)) < START_BITS}


@torch.no_grad()
def compensate(
    model: Model, grid: dict[str, Any], batches: Sequence[dict[str, Tensor]], room: int
) -> Iterator[tuple[str, QuantizedTensor]]:
    """Yield (path, weight in 8 bits) of each adapted layer on the grid with fewer bits; the model goes on with it."""
    found, block_size, wanted = adapters(model), int(grid["block_size"]), below(model, grid)
    walk = walk_through(model, batches)
    with console.progress(f"rounding on {len(batches)} batches of rows", total=len(wanted)) as bar:
        for index, block in enumerate(walk.blocks):
            inside = {id(module) for module in block.modules()}
            layers = {path: module for path, module in model.linears().items() if id(module) in inside and path in wanted}
            if not layers:
                continue
            calls = walk.calls(index)
            for group in same_inputs(block, calls[0], layers):
                moments = Moments(found[group[0]].in_features)
                if HESSIANS * 4 * moments.num_inputs**2 <= room and moments.whole:
                    see_inputs(block, calls, layers[group[0]], moments.add)
                factor = moments.factor() if moments.tokens >= moments.num_inputs else None
                for bits in sorted({int(grid["bits"][path]) for path in group}):
                    if factor is None:
                        break
                    # Side by side: the passes over the inputs, which come one after the other, are the same for all.
                    paths = [path for path in group if int(grid["bits"][path]) == bits]
                    weights = [found[path].base.weight_fp32() for path in paths]
                    joint = compensated(torch.cat(weights), factor, bits, block_size)
                    for path, weight in zip(paths, torch.split(joint, [len(weight) for weight in weights]), strict=True):
                        tensor = quantize(weight, START_BITS, block_size)
                        found[path].begin_with(tensor)
                        yield path, tensor
                bar.update(len(group))
            wanted -= set(layers)


def write(path: Path, tensors: dict[str, QuantizedTensor]) -> None:
    """Write layers on the grid as `<path>.codes` and `<path>.scales`."""
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for layer, tensor in tensors.items():
        shapes[f"{layer}.codes"] = torch.uint8, tuple(tensor.codes.shape)
        shapes[f"{layer}.scales"] = torch.float32, tuple(tensor.scales.shape)
    with StreamedSafetensors(path, shapes) as file:
        for layer, tensor in tensors.items():
            file.write(f"{layer}.codes", tensor.codes)
            file.write(f"{layer}.scales", tensor.scales)
