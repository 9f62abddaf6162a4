"""A base model with its adapter in it, tensor by tensor and apart from any module: what `merge` reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from edgelora.adapters.peft_format import AdapterFile, merged_weight
from edgelora.errors import FolderError, ModelError
from edgelora.models.tensors import Layout
from edgelora.quant.grid import QuantizedTensor, dequantize

if TYPE_CHECKING:
    from edgelora.models.source import ModelSource


@dataclass(frozen=True)
class Adapted:
    """`layout` names what ships; `aliases` has the name in the source of each of these that it has."""

    source: ModelSource
    adapter: AdapterFile | None
    layout: Layout
    aliases: dict[str, str] = field(default_factory=dict)

    @classmethod
    def build(cls, source: ModelSource, adapter: AdapterFile | None, layout: Layout) -> Adapted:
        """Fit the three together. Raises FolderError if the adapter names what the model does not have, ModelError if a
        tensor that must ship is neither in the model nor in the adapter."""
        available = set(source.names())
        aliases = {name: name for name in layout.names() if name in available}
        if adapter is not None and layout.tied_head and changes(adapter, (layout.tied_head, layout.embeddings[0])):
            # PEFT trains the one and leaves the other as it was, so that they are not one tensor any more.
            aliases[f"{layout.tied_head}.weight"] = aliases[f"{layout.embeddings[0]}.weight"]
            layout = dataclasses.replace(layout, embeddings=(*layout.embeddings, layout.tied_head), tied_head=None)
        if adapter is not None:
            refuse_unknown(adapter, layout)
            layout = keep_whole(adapter, layout)
            refuse_reshaped(adapter, source, aliases, layout)
        missing = [name for name in layout.names() if name not in aliases and not (adapter and name in adapter.saved_modules)]
        if missing:
            listed = "\n  ".join([f"{source.reference} has no", *missing[:10]])
            raise ModelError(listed, hint="edgelora finetune trains what is missing: a new classification head")
        return cls(source, adapter, layout, aliases)

    def weight(self, path: str) -> tuple[Tensor, Tensor | None]:
        """Return the base weight [N, K] of a layer, and the adapted one in fp32, or None if no adapter changes it."""
        name = f"{path}.weight"
        saved = self.adapter.saved_modules.get(name) if self.adapter else None
        if saved is not None and self._turned(path):
            saved = saved.t()
        base = self._base(path) if name in self.aliases else None
        start = base if saved is None else saved
        assert start is not None, "build refuses a tensor that neither has"
        if self.adapter is not None and path in self.adapter.factors:
            # PEFT stores a targeted embedding's base beside its factors, since its vocabulary may have grown.
            return start if base is None else base, merged_weight(self.adapter, path, start)
        return start if base is None else base, saved

    def plain(self, name: str) -> Tensor:
        """Return a tensor that is not a layer on the grid, fp32."""
        if self.adapter is not None and name in self.adapter.saved_modules:
            return self.adapter.saved_modules[name]
        return self.source.read(self.aliases[name]).float()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor as it ships: [N, K] for every layer."""
        turned = name.endswith(".weight") and self._turned(name.removesuffix(".weight"))
        if self.adapter is not None and name in self.adapter.saved_modules:
            shape = tuple(self.adapter.saved_modules[name].shape)
        else:
            shape = tuple(self.source.shape(self.aliases[name]))
            turned = turned and self.source.kind != "merged"
        return shape[::-1] if turned else shape

    def _base(self, path: str) -> Tensor:
        stored = self.aliases[f"{path}.weight"].removesuffix(".weight")
        weight = self.source.read_linear(stored, transposed=self._turned(path))
        return dequantize(weight) if isinstance(weight, QuantizedTensor) else weight

    def _turned(self, path: str) -> bool:
        """Whether transformers' class, and so a checkpoint or an adapter of it, keeps this weight as [K, N]."""
        return self.layout.transposed and path in self.layout.linears


def changes(adapter: AdapterFile, paths: Iterable[str]) -> bool:
    return any(path in adapter.factors or f"{path}.weight" in adapter.saved_modules for path in paths)


def keep_whole(adapter: AdapterFile, layout: Layout) -> Layout:
    """Let an encoder's linear layers that were trained whole (a new pooler) stay fp32, like its head."""
    whole = {path for path in layout.linears if layout.prefix and f"{path}.weight" in adapter.saved_modules}
    linears = tuple(path for path in layout.linears if path not in whole)
    return dataclasses.replace(layout, linears=linears, plain=(*layout.plain, *(f"{path}.weight" for path in sorted(whole))))


def refuse_unknown(adapter: AdapterFile, layout: Layout) -> None:
    """Raise FolderError naming every part of the adapter that has no place in the model."""
    layers, names = {*layout.linears, *layout.embeddings}, set(layout.names())
    unknown = [path for path in adapter.factors if path not in layers]
    unknown += [name for name in adapter.saved_modules if name not in names]
    if unknown:
        shown = [*unknown[:10], *([f"and {len(unknown) - 10} more"] if len(unknown) > 10 else [])]
        raise FolderError(
            "\n  ".join(["the adapter changes what this model does not have:", *shown]), hint="name its own base with --model"
        )


def refuse_reshaped(adapter: AdapterFile, source: ModelSource, aliases: dict[str, str], layout: Layout) -> None:
    """Raise FolderError if the adapter replaces a tensor outside of the classification head by one of another shape."""
    problems = []
    for name, tensor in adapter.saved_modules.items():
        if name in aliases and name.startswith(layout.prefix) and tuple(tensor.shape) != source.shape(aliases[name]):
            problems.append(f"{name} is {list(tensor.shape)}, the model's is {list(source.shape(aliases[name]))}")
    if problems:
        raise FolderError("\n  ".join(["the adapter was made for tensors of other shapes:", *problems]))


def num_labels(adapted: Adapted) -> int:
    """Return the number of labels: the outputs of the last matrix of the classification head."""
    matrices = [
        name for name in adapted.layout.plain if name.endswith(".weight") and not name.startswith(adapted.layout.prefix)
    ]
    return [shape[0] for name in matrices if len(shape := adapted.shape(name)) == 2][-1]


def merged_config(adapted: Adapted, labels: list[str]) -> dict[str, Any]:
    """Return the config.json of what ships."""
    config = {key: value for key, value in adapted.source.config.items() if key != "quantization_config"}
    if adapted.layout.architecture:
        config["architectures"] = [adapted.layout.architecture]
    if len(adapted.layout.embeddings) > 1:
        config["tie_word_embeddings"] = False
    if labels:
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
        config["problem_type"] = "single_label_classification"
    return config
