"""A base model with its adapter in it, tensor by tensor and apart from any module: what `merge` reads."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgelora.adapters.peft_format import AdapterFile
from edgelora.errors import FolderError, ModelError
from edgelora.models.tensors import Layout
from edgelora.quant.grid import QuantizedTensor, dequantize

if TYPE_CHECKING:
    from edgelora.adapters.combine import Combination
    from edgelora.models.source import ModelSource

    Update = AdapterFile | Combination


@dataclass(frozen=True)
class Adapted:
    """`layout` names what ships; `aliases` has the name in the source of each of these that it has."""

    source: ModelSource
    adapter: Update | None
    layout: Layout
    aliases: dict[str, str] = field(default_factory=dict)

    @classmethod
    def build(cls, source: ModelSource, adapter: Update | None, layout: Layout) -> Adapted:
        """Fit the three together. Raises FolderError if the adapter names what the model does not have, or was made for other
        shapes; ModelError if a tensor that must ship is neither in the model nor in the adapter."""
        source = source if layout.renamings is None else layout.renamings.fit(source)
        available = set(source.names())
        aliases = {name: name for name in layout.names() if name in available}
        if adapter is not None and parts_head(adapter, layout):
            # PEFT trains the one and leaves the other as it was, so that they are not one tensor any more.
            aliases[f"{layout.tied_head}.weight"] = aliases[f"{layout.embeddings[0]}.weight"]
            layout = dataclasses.replace(layout, embeddings=(*layout.embeddings, str(layout.tied_head)), tied_head=None)
        if adapter is not None:
            refuse_unknown(adapter, layout)
            layout = keep_whole(adapter, layout)
        missing = [name for name in layout.names() if name not in aliases and not (adapter and name in adapter.saved_modules)]
        if missing:
            listed = "\n  ".join([f"{source.reference} has no", *missing[:10]])
            raise ModelError(listed, hint="edgelora finetune trains what is missing: a new classification head")
        adapted = cls(source, adapter, layout, aliases)
        adapted._refuse_misfits()
        return adapted

    def weight(self, path: str) -> tuple[Tensor, Tensor | None]:
        """Return the base weight [N, K] of a layer, and the adapted one in fp32, or None if no adapter changes it.

        Where the model has no such layer, or one of another size (a vocabulary that grew), the adapted one is base too.
        """
        name = f"{path}.weight"
        saved = self.adapter.saved_modules.get(name) if self.adapter else None
        if saved is not None:
            saved = saved.t().float() if self._turned(path) else saved.float()
        base = self._base(path) if name in self.aliases else None
        start = base if saved is None else saved
        assert start is not None, "build refuses a tensor that neither has"
        # PEFT stores a targeted embedding's base beside its factors, since its vocabulary may have grown.
        changed = self.adapter is not None and path in self.adapter.paths
        merged = self.adapter.merged_weight(path, start) if self.adapter is not None and changed else saved
        if base is None or base.shape != start.shape:
            return start, merged if changed else None
        return base, merged

    def plain(self, name: str) -> Tensor:
        """Return a tensor that is not a layer on the grid, fp32."""
        if self.adapter is None:
            return self.source.read(self.aliases[name]).float()
        saved = self.adapter.saved_modules.get(name)
        tensor = (self.source.read(self.aliases[name]) if saved is None else saved).float()
        path = name.removesuffix(".weight")
        if path != name and path in self.adapter.paths:  # a small embedding, a convolution
            tensor = self.adapter.merged_weight(path, tensor.flatten(1)).view_as(tensor)
        return tensor + self.adapter.shifts[name] if name in self.adapter.shifts else tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor as it ships: [N, K] for every layer."""
        turned = name.endswith(".weight") and self._turned(name.removesuffix(".weight"))
        if self.adapter is not None and name in self.adapter.saved_modules:
            shape = tuple(self.adapter.saved_modules[name].shape)
        else:
            shape = tuple(self.source.shape(self.aliases[name]))
            turned = turned and self.source.kind != "merged"
        return shape[::-1] if turned else shape

    def _refuse_misfits(self) -> None:
        """Raise FolderError that lists every tensor of the adapter that was made for another shape.

        A classification head may have any number of labels, and a vocabulary may have grown or shrunk if all of it has.
        """
        if self.adapter is None:
            return
        layout, problems = self.layout, []
        vocabulary = {self.shape(f"{path}.weight")[0] for path in layout.embeddings}
        resized = {f"{path}.weight" for path in layout.embeddings} if len(vocabulary) == 1 else set()
        for name, tensor in self.adapter.saved_modules.items():
            if name not in self.aliases or layout.in_head(name):
                continue
            found, own = tuple(tensor.shape), tuple(self.source.shape(self.aliases[name]))
            if self.source.kind == "merged" and name.endswith(".weight") and self._turned(name.removesuffix(".weight")):
                found = found[::-1]
            if found != own and not (name in resized and found[1:] == own[1:]):
                problems.append(f"{name} is {list(found)}, the model's is {list(own)}")
        singles = (self.adapter,) if isinstance(self.adapter, AdapterFile) else self.adapter.adapters
        for path, factors in (item for single in singles for item in single.factors.items() if item[0] != layout.tied_head):
            found, own = (factors.b.shape[0], factors.a.shape[1]), self.shape(f"{path}.weight")
            if found != (own[0], math.prod(own[1:])):
                problems.append(f"{path} is adapted as {list(found)}, the model's is {list(own)}")
        problems += [
            f"{name} is {list(tensor.shape)}, the model's is {list(self.shape(name))}"
            for name, tensor in self.adapter.shifts.items()
            if tuple(tensor.shape) != self.shape(name)
        ]
        if problems:
            more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
            raise FolderError("\n  ".join(["the adapter was made for tensors of other shapes:", *problems[:10], *more]))

    def _base(self, path: str) -> Tensor:
        stored = self.aliases[f"{path}.weight"].removesuffix(".weight")
        weight = self.source.read_linear(stored, transposed=self._turned(path))
        return dequantize(weight) if isinstance(weight, QuantizedTensor) else weight

    def _turned(self, path: str) -> bool:
        """Whether transformers' class, and so a checkpoint or an adapter of it, keeps this weight as [K, N]."""
        return self.layout.transposed and path in self.layout.linears


def parts_head(adapter: Update, layout: Layout) -> bool:
    """Whether a tied LM head and its embedding differ with the adapter: PEFT trains what it was told to, the one or the other,
    but ties single tokens by itself, and stores both where it was told to tie them or has stored a resized vocabulary."""
    if layout.tied_head is None:
        return False
    singles = (adapter,) if isinstance(adapter, AdapterFile) else adapter.adapters
    return not all(same_change(single, layout.embeddings[0], layout.tied_head) for single in singles)


def same_change(adapter: AdapterFile, embedding: str, head: str) -> bool:
    """Whether an adapter makes the same of both; not at all is the same too."""
    saved = tuple(adapter.saved_modules.get(f"{path}.weight") for path in (embedding, head))
    found = tuple(adapter.factors.get(path) for path in (embedding, head))
    pairs = [saved, *(tuple(None if factors is None else getattr(factors, name) for factors in found) for name in "ab")]
    equal = all(
        first is second or (first is not None and second is not None and torch.equal(first, second)) for first, second in pairs
    )
    dora = any(factors is not None and factors.magnitude is not None for factors in found)
    return equal and not dora and head not in adapter.tokens


def keep_whole(adapter: Update, layout: Layout) -> Layout:
    """Let an encoder's linear layers that were trained whole (a new pooler) stay fp32, like its head."""
    whole = {path for path in layout.linears if layout.parts and f"{path}.weight" in adapter.saved_modules}
    linears = tuple(path for path in layout.linears if path not in whole)
    return dataclasses.replace(layout, linears=linears, plain=(*layout.plain, *(f"{path}.weight" for path in sorted(whole))))


def refuse_unknown(adapter: Update, layout: Layout) -> None:
    """Raise FolderError naming every part of the adapter that has no place in the model."""
    names = {*layout.names(), *([f"{layout.tied_head}.weight"] if layout.tied_head else [])}
    unknown = sorted(path for path in adapter.paths if f"{path}.weight" not in names)
    unknown += [name for name in (*adapter.saved_modules, *adapter.shifts) if name not in names]
    if unknown:
        shown = [*unknown[:10], *([f"and {len(unknown) - 10} more"] if len(unknown) > 10 else [])]
        raise FolderError(
            "\n  ".join(["the adapter changes what this model does not have:", *shown]), hint="name its own base with --model"
        )
    if adapter.parameters and layout.transposed:
        raise FolderError(
            "the adapter was trained with target_parameters, which sees this model's weights turned",
            hint="train it again with target_modules",
        )


def num_labels(adapted: Adapted) -> int:
    """Return the number of labels: the outputs of the last matrix of the classification head."""
    matrices = [name for name in adapted.layout.plain if name.endswith(".weight") and adapted.layout.in_head(name)]
    return [shape[0] for name in matrices if len(shape := adapted.shape(name)) == 2][-1]


def merged_config(adapted: Adapted, labels: list[str]) -> dict[str, Any]:
    """Return the config.json of what ships."""
    config = {key: value for key, value in adapted.source.config.items() if key != "quantization_config"}
    if adapted.layout.architecture:
        config["architectures"] = [adapted.layout.architecture]
    words = [f"{path}.weight" for path in adapted.layout.embeddings[:1]]
    if adapted.adapter is not None and words and words[0] in adapted.adapter.saved_modules:
        config["vocab_size"] = adapted.shape(words[0])[0]
    if len(adapted.layout.embeddings) > 1:
        config["tie_word_embeddings"] = False
    if labels:
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    return config
