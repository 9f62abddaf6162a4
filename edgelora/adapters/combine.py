"""Several adapters in one weight, by their changes D_t `[N, K]` of it (task vectors) and weights w_t:

    W = W0 + combine(D_1 … D_n)

Exact in weight space, one layer at a time: PEFT's add_weighted_adapter combines the factors, or cuts the sum to a rank. Every
change is computed when it is needed and, where a rule looks at all of them first, again: memory holds two of them, however
many adapters there are. Ranks, target modules and kinds (DoRA, PiSSA …) may differ.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgelora.adapters.peft_format import AdapterFile, load
from edgelora.adapters.weight_space import delta, with_tokens
from edgelora.errors import FolderError, SettingsError, did_you_mean

METHODS = ("linear", "ties", "dare_linear", "dare_ties")
ONE = "a merge takes at most one adapter that replaces tensors (a head, biases, norms, tokens)"

Change = tuple[int, Callable[[], Tensor]]  # which adapter's, and what computes it


@dataclass(frozen=True)
class Recipe:
    """How adapters are combined; `problems` says what is wrong with it.

    weights: one for each adapter; empty: 1/n where the rule adds up, 1 where it takes a mean.
    density: the share of a change's values that TIES and DARE keep. seed: of what DARE drops.
    """

    folders: tuple[Path, ...]
    weights: tuple[float, ...] = ()
    method: str = "linear"
    density: float = 0.5
    seed: int = 0

    def check(self) -> None:
        """Raise SettingsError that lists everything wrong."""
        problems, count = [], len(self.folders)
        if self.method not in METHODS:
            close = did_you_mean(self.method, METHODS)
            problems.append(f'"{self.method}" is no way to combine adapters; allowed: {", ".join(METHODS)}.{close}')
        if self.weights and len(self.weights) != count:
            problems.append(f"{len(self.weights)} weights for {count} adapters")
        if not all(abs(weight) < float("inf") for weight in self.weights) or (self.weights and not any(self.weights)):
            problems.append(f"weights are {', '.join(f'{weight:g}' for weight in self.weights)}; numbers are wanted, not all 0")
        if not 0 < self.density <= 1:
            problems.append(f"density is {self.density:g}; above 0 and at most 1 is allowed")
        if len(set(self.folders)) < count:
            problems.append("an adapter is named twice")
        if problems:
            raise SettingsError(
                "\n  ".join(["the adapters cannot be combined so:", *problems]),
                hint="--adapter A --adapter B --weights 0.7,0.3 --combine linear",
            )

    @property
    def shares(self) -> tuple[float, ...]:
        mean = self.method in ("ties", "dare_ties")
        return self.weights or (1.0 if mean else 1.0 / len(self.folders),) * len(self.folders)

    @property
    def plain(self) -> bool:
        """Whether this is one adapter as it is."""
        return len(self.folders) == 1 and self.shares == (1.0,) and self.method == "linear"


@dataclass(frozen=True)
class Combination:
    """Adapters that act together; to `Adapted` it is as one."""

    adapters: tuple[AdapterFile, ...]
    recipe: Recipe

    @property
    def paths(self) -> set[str]:
        return {path for adapter in self.adapters for path in adapter.paths}

    @property
    def saved_modules(self) -> dict[str, Tensor]:
        """What replaces the base's tensors: `open_adapters` has made sure that it is of one adapter."""
        return {name: tensor for adapter in self.adapters for name, tensor in adapter.saved_modules.items()}

    @property
    def shifts(self) -> dict[str, Tensor]:
        names = {name for adapter in self.adapters for name in adapter.shifts}
        return {name: self._combine_shifts(name) for name in names}

    @property
    def parameters(self) -> bool:
        return any(adapter.parameters for adapter in self.adapters)

    @property
    def task_type(self) -> str | None:
        return next((adapter.task_type for adapter in self.adapters if adapter.task_type), None)

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(note for adapter in self.adapters for note in adapter.notes))

    def merged_weight(self, path: str, weight_NK: Tensor) -> Tensor:
        """Return fp32 `[N, K]`. Raises FolderError if an adapter was made for another shape."""
        changes: list[Change] = [
            (index, functools.partial(delta, adapter, path, weight_NK))
            for index, adapter in enumerate(self.adapters)
            if path in adapter.factors
        ]
        merged = self._combined(path, changes, tuple(weight_NK.shape)).add_(weight_NK)
        for adapter in self.adapters:
            merged = with_tokens(adapter, path, merged)
        return merged

    def _combine_shifts(self, name: str) -> Tensor:
        found = [(index, adapter.shifts[name]) for index, adapter in enumerate(self.adapters) if name in adapter.shifts]
        return self._combined(name, [(i, tensor.clone) for i, tensor in found], tuple(found[0][1].shape))

    def _combined(self, path: str, changes: Sequence[Change], shape: tuple[int, ...]) -> Tensor:
        recipe = self.recipe
        kept = [(recipe.shares[index], self._keeper(path, index, compute)) for index, compute in changes]
        return disjoint_mean(kept, shape) if recipe.method.endswith("ties") else weighted_sum(kept, shape)

    def _keeper(self, path: str, index: int, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return the function that computes a change with what the rule does to each alone."""
        recipe = self.recipe
        if recipe.density == 1 or recipe.method == "linear":
            return compute
        if recipe.method == "ties":
            return lambda: trim(compute(), recipe.density)
        seed = zlib.crc32(f"{recipe.seed} {index} {path}".encode())
        return lambda: drop(compute(), recipe.density, seed)


def weighted_sum(changes: Sequence[tuple[float, Callable[[], Tensor]]], shape: tuple[int, ...]) -> Tensor:
    """Return Σ_t w_t D_t (task arithmetic, arXiv 2212.04089, section 2)."""
    total = torch.zeros(shape)
    for weight, compute in changes:
        total.add_(compute(), alpha=weight)
    return total


def disjoint_mean(changes: Sequence[tuple[float, Callable[[], Tensor]]], shape: tuple[int, ...]) -> Tensor:
    """Elect signs and merge (TIES, arXiv 2306.01708, algorithm 1, steps 2 and 3), of changes that were trimmed already:

        γ = sgn(Σ_t D_t)        merged = (1 / |A|) Σ_{t in A} w_t D_t,  A = {t: sgn(D_t) = γ}

    element by element. The paper's λ is one w for all; as in PEFT the weights do not vote, and a sum of 0 elects +1.
    """
    elected = weighted_sum([(1.0, compute) for _, compute in changes], shape).ge_(0).mul_(2).sub_(1)
    total, members = torch.zeros(shape), torch.zeros(shape)
    for weight, compute in changes:
        change = compute()
        agrees = change.sign() == elected
        total.add_(change.mul_(agrees), alpha=weight)
        members.add_(agrees)
    return total.div_(members.clamp_(min=1))


def trim(change: Tensor, density: float) -> Tensor:
    """Keep the share `density` of the values that are largest by magnitude (TIES, algorithm 1, step 1), of this layer."""
    count = int(density * change.numel())
    if count == 0:
        return change.zero_()
    sizes = change.abs()
    threshold = sizes.flatten().kthvalue(change.numel() - count + 1).values
    return change.mul_(sizes >= threshold)


def drop(change: Tensor, density: float, seed: int) -> Tensor:
    """Keep each value with the probability `density` and divide it by it (DARE, arXiv 2311.03099, eq. 3: p = 1 - density)."""
    kept = torch.rand(change.shape, generator=torch.Generator().manual_seed(seed)) < density
    return change.mul_(kept).div_(density)


def open_adapters(recipe: Recipe) -> AdapterFile | Combination:
    """Load the adapters of a recipe. Raises UserError for a recipe or folder that is wrong, and where several adapters
    replace tensors: there is no sum of two heads."""
    recipe.check()
    adapters = tuple(load(folder) for folder in recipe.folders)
    if recipe.plain:
        return adapters[0]
    replacing = {
        folder: names for folder, adapter in zip(recipe.folders, adapters, strict=True) if (names := replaced(adapter))
    }
    if len(replacing) > 1:
        lines = [f"{folder}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}" for folder, names in replacing.items()]
        raise FolderError("\n  ".join([f"{ONE}; found:", *lines]))
    kinds = {adapter.task_type for adapter in adapters if adapter.task_type}
    if len(kinds) > 1:
        raise FolderError(f"the adapters are for different tasks: {', '.join(sorted(kinds))}")
    return Combination(adapters, recipe)


def replaced(adapter: AdapterFile) -> list[str]:
    """Return what an adapter replaces whole. PEFT stores a targeted embedding's base too, which is the base's own."""
    own = [name for name in adapter.saved_modules if name.removesuffix(".weight") not in adapter.factors]
    return [*own, *(f"{path} (single tokens)" for path in adapter.tokens)]
