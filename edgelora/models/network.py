"""A network that is no decoder: transformers' own class, its linear layers frozen and quantized as they arrive."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgelora.errors import ModelError
from edgelora.models.base_file import BaseWeights, open_base
from edgelora.models.base_layout import Section, own_bits
from edgelora.models.build import build_network, label_tensors
from edgelora.models.convolution import FrozenBatchNorm, FrozenConv, can_freeze
from edgelora.models.linear import FrozenEmbedding, FrozenLinear, FrozenWeight
from edgelora.models.names import Renamings
from edgelora.models.parts import Parts, within_attention
from edgelora.models.recompute import Calls, Keeping, Shelf
from edgelora.models.source import ModelSource
from edgelora.models.speech import stop_at_waveform
from edgelora.tasks.base import Task

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
WORD_EMBEDDINGS = ("word_embeddings", "tok_embeddings", "embed_tokens", "token_embedding")


class Network(nn.Module):
    """Whatever a task computes. `network` is transformers' model; `head_names` are the modules outside of its base, trained
    whole (PEFT's modules_to_save); `output_names` what the task reads of its outputs, `unused` ends of
    the paths of layers that get no adapter."""

    def __init__(
        self, network: Any, head_names: Sequence[str], output_names: Sequence[str], unused: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.network = network
        self.head_names = tuple(head_names)
        self.output_names = tuple(output_names)
        self.unused = tuple(unused)
        self._keeping = Keeping()
        self._shelf: Shelf | None = None
        accepted = inspect.signature(network.forward).parameters
        self._takes_mask, self._takes_types = "pixel_mask" in accepted, "token_type_ids" in accepted

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.network.config.to_dict())

    @property
    def keeping(self) -> Keeping:
        """What the layers keep for backward."""
        return self._keeping

    @keeping.setter
    def keeping(self, keeping: Keeping) -> None:
        """Wrap each layer's forward, also of the families for which transformers' own switch does nothing."""
        self._keeping = keeping
        layers = self._layers()
        for index, layer in enumerate(layers):
            layer.__dict__.pop("forward", None)
            layer.__dict__["forward"] = self._wrapped(layer, index, len(layers))

    def _wrapped(self, layer: nn.Module, index: int, count: int) -> Callable[..., Any]:
        """Return the forward of one of `count` layers that keeps what `keeping` says."""
        return functools.partial(self._keep, layer, layer.forward, index, count)

    def _keep(self, layer: nn.Module, forward: Callable[..., Any], index: int, count: int, *args: Any, **kwargs: Any) -> Any:
        """Compute one layer; its first output alone is differentiated."""
        hidden: Tensor = args[0] if args else kwargs.pop("hidden_states")
        others: list[Any] = []

        def call(hidden: Tensor) -> Tensor:
            out = forward(hidden, *args[1:], **kwargs)
            if isinstance(out, Tensor):
                return out
            others[:] = [out]
            first: Tensor = out[0]
            return first

        if index == 0:
            self._shelf = self._keeping.shelf(hidden)
        out = self._keeping.block(layer, Calls(call, call), hidden, index, count, self._shelf)
        return (out, *others[0][1:]) if others else out

    def _layers(self) -> list[nn.Module]:
        """Return the repeated layers: the largest list of modules that is as long as the config's number of layers; or none."""
        lists = [module for module in self.network.modules() if isinstance(module, nn.ModuleList)]
        count = getattr(self.network.config, "num_hidden_layers", None)
        lists = [layers for layers in lists if len(layers) == count]
        return list(max(lists, key=lambda layers: sum(1 for _ in layers.modules()), default=[]))

    def inputs_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the network's class takes of a batch."""
        return {name: tensor for name, tensor in batch.items() if not name.startswith("labels")}

    def outputs(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Return the outputs of the network's class by name, `[B, …]` each.

        Raises ModelError for pictures of several sizes, padded to one, where the class takes no mask of what is real.
        """
        mask = None if self._takes_mask else inputs.pop("pixel_mask", None)
        if mask is not None and not mask.is_meta and not mask.all():
            raise ModelError(
                f"{type(self.network).__name__} takes pictures of one size",
                hint='preprocessor_config.json: "size": {"height": 512, "width": 512}',
            )
        if "token_type_ids" in inputs and not self._takes_types:
            inputs.pop("token_type_ids")  # DistilBERT and ModernBERT tell pairs by their separator alone
        found: dict[str, Tensor] = self.network(**inputs)
        return found

    def logits(self, **inputs: Tensor) -> Tensor:
        """Return the output "logits"."""
        return self.outputs(**inputs)["logits"]

    def linears(self) -> dict[str, nn.Module]:
        """Return the layers of the base that adapters may go to, by checkpoint path, in the order of the modules."""
        return self._frozen(FrozenLinear)

    def convolutions(self) -> dict[str, nn.Module]:
        """Return the convolutions of the base that adapters may go to, by checkpoint path, in the order of the modules."""
        return self._frozen(FrozenConv)

    def _frozen(self, kind: type[nn.Module]) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for path, module in self.network.named_modules():
            inside_adapter = any(path.startswith(f"{outer}.") for outer in found)
            if path.endswith(self.unused):
                continue
            if not inside_adapter and (isinstance(module, kind) or isinstance(getattr(module, "base", None), kind)):
                found[path] = module
        return found

    def train(self, mode: bool = True) -> Self:
        """Statistics of batch norm stay those of the checkpoint, in a head that is trained too: they are no parameters."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def replace_linear(self, path: str, module: nn.Module) -> None:
        """Put `module` in the place of a layer; raises KeyError for a path that neither `linears` nor `convolutions` names."""
        if path not in self.linears() and path not in self.convolutions():
            raise KeyError(path)
        _replace(self.network, path, module)

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters outside of the adapters, by checkpoint name."""
        heads = tuple(f"{name}." for name in self.head_names)
        return {name: value for name, value in self.network.named_parameters() if name.startswith(heads)}


def load_network(
    source: ModelSource, task: Task, *, base_bits: int, block_size: int, labels: Sequence[str],
    layer_bits: Mapping[str, int] | None = None,
) -> Network:  # fmt: skip
    """Return the network of a task; its head is the checkpoint's when that has the same labels, else freshly drawn.

    Fresh weights come from torch's random state: call torch.manual_seed before. Raises ModelError for a model type that
    has no such class, and for missing or misshapen tensors of the base, all at once.
    """
    network = build_network(source.config, task.auto_class, labels)
    source, parts = Renamings.of(network).fit(source), Parts.of(network, task)
    heads = parts.heads(network)
    known = list((source.config.get("id2label") or {}).values())
    drawn = set() if not labels or known == list(labels) else label_tensors(network, task.auto_class)
    sections = own_bits(network_sections(network, source, parts, base_bits), layer_bits or {})
    stored = any(section.groups or section.tables for section in sections)
    weights = open_base(source, sections, base_bits, block_size) if stored else source
    fill(network, weights, base_bits, block_size, parts, heads, drawn)
    network.requires_grad_(False)
    stop_at_waveform(network)
    for name, parameter in network.named_parameters():
        if name.startswith(tuple(f"{head}." for head in heads)):
            parameter.requires_grad_(True)
    return Network(network, heads, [output.name for output in task.outputs], task.unused)


def network_sections(network: Any, source: ModelSource, parts: Parts, bits: int, skip: Collection[str] = ()) -> list[Section]:
    """Return the matrices of the base, without the paths `skip`, that `fill` quantizes: the embedding, then linear layers."""
    names = set(source.names())
    tables: list[str] = []
    layers: dict[str, list[str]] = {}
    for path, module in network.named_modules():
        name = f"{path}.weight"
        if path in skip or parts.in_head(path) or name not in names or source.shape(name) != tuple(module.weight.shape):
            continue
        if within_attention(module):
            continue
        if isinstance(module, nn.Linear):
            number = re.search(r"\.\d+\.", path)
            layers.setdefault(number[0] if number else "", []).append(path)
        elif isinstance(module, nn.Embedding) and path.endswith(WORD_EMBEDDINGS) and bits < 32:
            tables.append(path)
    blocks = [Section(groups=tuple((path,) for path in paths), block=True) for paths in layers.values()]
    return [Section(tables=tuple(tables)), *blocks]


def fill(
    network: Any,
    source: ModelSource | BaseWeights,
    bits: int,
    block_size: int,
    parts: Parts,
    heads: list[str],
    drawn: set[str],
) -> None:
    """Give every parameter its tensor, layer by layer; a base without its pooler gets a fresh, trained one.

    Modules of the head with a tensor in `drawn`, or one that the checkpoint has not in this shape, are drawn afresh.
    """
    names = set(source.names())
    problems = []
    for path, module in list(network.named_modules()):
        own = dict(module.named_parameters(prefix=path, recurse=False))
        in_head = parts.in_head(path)
        missing = [name for name in own if name not in names]
        wrong = [name for name in own if name in names and source.shape(name) != tuple(own[name].shape)]
        if in_head and (missing or wrong or not drawn.isdisjoint(own)):
            _draw(module, network.config)
        elif missing and ".pooler." in path:
            _draw(module, network.config)
            heads.append(path.rsplit(".pooler.", 1)[0] + ".pooler")
        elif missing or wrong:
            problems += [f"{name}: missing" for name in missing]
            problems += [
                f"{name}: shape {list(source.shape(name))}, config.json asks for {list(own[name].shape)}" for name in wrong
            ]
        elif isinstance(module, nn.Linear) and not in_head and not within_attention(module):
            bias = source.read(f"{path}.bias") if module.bias is not None else None
            _replace(network, path, FrozenLinear.from_weight(path, source.read_linear(path), bias, bits, block_size))
        elif not in_head and (frozen := _frozen_form(path, module, source, names)) is not None:
            _replace(network, path, frozen)
        elif isinstance(module, nn.Embedding) and path.endswith(WORD_EMBEDDINGS) and bits < 32:
            weight = FrozenWeight.store(source.read_linear(path), max(bits, 8), block_size)
            _replace(network, path, FrozenEmbedding(path, weight))
        else:
            for name in own:
                setattr(module, name.removeprefix(f"{path}."), nn.Parameter(source.read(name).float().clone()))
            for name, buffer in module.named_buffers(prefix=path, recurse=False):
                if name in names and source.shape(name) == tuple(buffer.shape):
                    buffer.copy_(source.read(name))
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise ModelError("\n  ".join([f"{source.reference} does not hold the model of its config.json:", *shown]))


def _frozen_form(path: str, module: nn.Module, source: ModelSource | BaseWeights, names: set[str]) -> nn.Module | None:
    """Return a convolution or batch norm as it is computed when it is never trained; None for other modules."""
    if isinstance(module, nn.Conv1d | nn.Conv2d) and can_freeze(module):
        bias = source.read(f"{path}.bias") if module.bias is not None else None
        return FrozenConv(path, module, source.read(f"{path}.weight"), bias)
    if isinstance(module, _BatchNorm) and f"{path}.running_mean" in names:
        present = [name for name in BATCH_NORM if f"{path}.{name}" in names]
        return FrozenBatchNorm(module, {name: source.read(f"{path}.{name}") for name in present})
    return None


def _draw(module: nn.Module, config: Any) -> None:
    """Fill a module's own parameters as transformers does: weights normal with `initializer_range`, norms one, biases zero."""
    is_norm = "norm" in type(module).__name__.lower()
    for name, parameter in list(module.named_parameters(recurse=False)):
        values = torch.zeros(parameter.shape)
        if name == "weight":
            values = torch.ones(parameter.shape) if is_norm else values.normal_(std=getattr(config, "initializer_range", 0.02))
        setattr(module, name, nn.Parameter(values))


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)
