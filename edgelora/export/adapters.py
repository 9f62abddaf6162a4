"""Adapters that stay beside the weights of a graph: y = MatMulNBits(x) + (x Aᵀ)(sB)ᵀ, in fp32.

The layers of one product (q, k and v; gate and up) share their branch: their A are stacked, and their s·B lie on the diagonal
of one matrix, so that it is three small nodes whatever the number of layers.

    static   A `[K, R]` and s·B `[R, N]` are constants of the graph
    swap     they are optional inputs, `<product>.lora_A` and `.lora_B`, of rank 0 unless fed: the base

A graph input with an initializer is an overridable initializer: onnxruntime-genai, optimum and transformers.js, which ask for
`session.get_inputs()`, see nothing of it and run the base.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import onnx_ir as ir

from edgelora.adapters.lora import Factors
from edgelora.adapters.peft_format import AdapterFile
from edgelora.errors import SettingsError
from edgelora.export.graph import Array, GraphBuilder

Rows = Mapping[str, Sequence[int]]  # layer path → [first, last + 1] of a product's outputs


class Branches(Protocol):
    """What a graph's linear layers ask for: the two factors of the branch of a product, or None where it has none."""

    def factors(self, g: GraphBuilder, name: str, num_inputs: int, rows: Rows) -> tuple[ir.Value, ir.Value] | None: ...


@dataclass(frozen=True)
class StaticBranches:
    """Constants: the factors of one adapter by layer path."""

    adapter: Mapping[str, Factors]

    def factors(self, g: GraphBuilder, name: str, num_inputs: int, rows: Rows) -> tuple[ir.Value, ir.Value] | None:
        stacked = stack(self.adapter, rows)
        if stacked is None:
            return None
        a, b = stacked
        return g.weight(f"{name}.lora_A", a), g.weight(f"{name}.lora_B", b)


@dataclass(frozen=True)
class SwapBranches:
    """Optional inputs for every product that has a layer of `paths`; `products` notes them for the manifest."""

    paths: Collection[str]
    products: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    def factors(self, g: GraphBuilder, name: str, num_inputs: int, rows: Rows) -> tuple[ir.Value, ir.Value] | None:
        if not set(rows) & set(self.paths):
            return None
        self.products[name] = {path: list(span) for path, span in rows.items()}
        num_outputs, rank = max(stop for _, stop in rows.values()), f"{name}.rank"
        a = g.input(f"{name}.lora_A", ir.DataType.FLOAT, (num_inputs, rank), default=np.zeros((num_inputs, 0), np.float32))
        b = g.input(f"{name}.lora_B", ir.DataType.FLOAT, (rank, num_outputs), default=np.zeros((0, num_outputs), np.float32))
        return a, b


def add_branch(
    g: GraphBuilder, branches: Branches, name: str, x: ir.Value, y: ir.Value, num_inputs: int, rows: Rows
) -> ir.Value:
    """Return y `[…, N]`, the product `name` of x `[…, K]`, plus its adapters' part."""
    found = branches.factors(g, name, num_inputs, rows)
    if found is None:
        return y
    low = g.op("MatMul", [x, found[0]], f"{name}/lora_A")
    return g.op("Add", [y, g.op("MatMul", [low, found[1]], f"{name}/lora_B")], f"{name}/adapted")


def stack(adapter: Mapping[str, Factors], rows: Rows) -> tuple[Array, Array] | None:
    """Return A `[K, R]` and s·B `[R, N]` of the layers of one product, fp32; None if no adapter is on them."""
    own = {path: adapter[path] for path in rows if path in adapter}
    if not own:
        return None
    a = np.concatenate([factors.a.float().numpy() for factors in own.values()]).T
    b = np.zeros((a.shape[1], max(stop for _, stop in rows.values())), np.float32)
    start = 0
    for path, factors in own.items():
        first, last = rows[path]
        b[start : start + factors.rank, first:last] = (factors.b.float() * factors.scale).t().numpy()
        start += factors.rank
    return np.ascontiguousarray(a), b


def tensors(adapter: AdapterFile, products: Mapping[str, Rows]) -> dict[str, Array]:
    """Return what is fed to a swap graph, by input name; a product without an adapter keeps its default."""
    found: dict[str, Array] = {}
    for name, rows in products.items():
        stacked = stack(adapter.factors, rows)
        if stacked is not None:
            found[f"{name}.lora_A"], found[f"{name}.lora_B"] = stacked
    return found


def refuse_unbranched(adapter: AdapterFile, paths: Collection[str], what: str) -> None:
    """Raise SettingsError for what an adapter has that no branch can hold: merging can."""
    problems = []
    if adapter.dora:
        problems.append("DoRA rescales the weight itself")
    if adapter.scales.logs:
        problems.append('learned block scales rescale the weight itself; a run with grid_scales = "max" has none')
    if adapter.saved_modules:
        problems.append(f"tensors that were trained whole: {', '.join(sorted(adapter.saved_modules)[:3])}")
    unknown = sorted(set(adapter.factors) - set(paths))
    if unknown:
        problems.append(f"adapters on {', '.join(unknown[:3])}, which no product of the graph's blocks is")
    if problems:
        message = "\n  ".join([f"the adapter of {what} cannot stay beside the weights:", *problems])
        raise SettingsError(message, hint=f"edgelora export {what} -o BUNDLE merges it")
