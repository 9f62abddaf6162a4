"""Adapters as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors (peft 0.18 to 0.21).

Tensors are named `base_model.model.<module path>.<what>`, where what is lora_A.weight `[r, K]`, lora_B.weight `[N, r]`,
lora_B.bias `[N]`, lora_magnitude_vector `[N]`, lora_diag `[r]` (KaSA), or of an embedding `[V, H]` lora_embedding_A `[r, V]`,
lora_embedding_B `[H, r]` and token_adapter.trainable_tokens_delta `[tokens, H]`, its new rows. What was trained whole (a head,
norms, biases, a resized embedding) keeps its name in the model.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgelora.adapters.inject import adapters, frozen_layers, matches, suffixes
from edgelora.adapters.learned_scales import LearnedScales
from edgelora.adapters.lora import Factors, LoRA
from edgelora.adapters.peft_config import (
    CONFIG,
    notes,
    read_config,
    settings_of,
    start_of,
    task_type,
    tokens_of,
)
from edgelora.adapters.peft_tensors import read_tensors, unfit_parameters, wrong_part, wrong_rows
from edgelora.adapters.weight_space import check_shape, merged_weight
from edgelora.errors import FolderError
from edgelora.folder import write_json
from edgelora.models.convolution import FrozenConv

if TYPE_CHECKING:
    from edgelora.models.decoder import Decoder
    from edgelora.models.network import Network

    Model = Decoder | Network

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TASK_TYPES = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModel": "FEATURE_EXTRACTION",
}
PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|lora_diag)(\.weight)?")
BIAS = re.compile(r"(.+)\.lora_B\.bias")
TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
# Copies of the base, which PEFT's bias="all" and save_embedding_layers store too, and what VeLoRA and MonteCLoRA train with.
UNUSED = (".original_module.", ".trainable_tokens_original", ".lora_velora_embed", ".lora_monteclora_sampler.")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter apart from any model. Paths and names are those of the transformers model."""

    factors: dict[str, Factors]  # by module path
    saved_modules: dict[str, Tensor] = field(default_factory=dict)  # tensors that replace the base's: a head, biases
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    rslora: bool = False
    transposed: bool = False  # the transformers model keeps its weights as [K, N] (GPT-2's Conv1D)
    dropout: float = 0.0
    base: str | None = None
    task_type: str | None = None
    start: str | None = None  # what was taken out of the base weights: "pissa", "olora", "kasa" (weight_space.base_part)
    embeddings: frozenset[str] = frozenset()  # of the factors' paths, those of lora_embedding_A and B
    tokens: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by path: token ids and their new rows
    shifts: dict[str, Tensor] = field(default_factory=dict)  # by the bias's name, what is added to it (lora_bias)
    parameters: bool = False  # trained with target_parameters
    notes: tuple[str, ...] = ()
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of a convolution's path: inputs per group, kernel
    scales: LearnedScales = field(default_factory=LearnedScales)  # which a run of ours has beside the factors

    @property
    def paths(self) -> set[str]:
        """The layers whose weight the adapter changes, apart from those that it replaces whole."""
        return {*self.factors, *self.tokens}

    def merged_weight(self, path: str, weight_NK: Tensor) -> Tensor:
        """Return fp32 `[N, K]`: the weight of `path` as the adapter makes it."""
        return merged_weight(self, path, weight_NK)

    def takes_part(self, path: str) -> bool:
        return self.start is not None and path not in self.embeddings

    @property
    def dora(self) -> bool:
        return any(factors.magnitude is not None for factors in self.factors.values())


def save(adapter: AdapterFile, folder: Path, *, paths: Sequence[str] = ()) -> None:
    """Write the adapter; `paths` are all adaptable layers of the model, so that target_modules can be short names.

    The weights are replaced atomically: a reader sees the old file or the new one.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(adapter.saved_modules)
    for path, factors in adapter.factors.items():
        kernel = adapter.kernels.get(path, ())  # PEFT keeps a convolution's as two convolutions: [r, C, *kernel], [N, r, 1 …]
        tensors[f"{path}.lora_A.weight"] = factors.a.view(-1, *kernel) if kernel else factors.a
        tensors[f"{path}.lora_B.weight"] = factors.b.view(*factors.b.shape, *[1] * (len(kernel) - 1))
        if factors.magnitude is not None:
            tensors[f"{path}.lora_magnitude_vector"] = factors.magnitude
    write_json(folder / CONFIG, peft_config(adapter, paths))
    partial = folder / f".{WEIGHTS}.partial"
    save_file({PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    partial.replace(folder / WEIGHTS)


def peft_config(adapter: AdapterFile, paths: Sequence[str] = ()) -> dict[str, Any]:
    """Return the content of adapter_config.json. Ranks and alphas that differ from the commonest go to the patterns."""
    ranks = {path: factors.rank for path, factors in adapter.factors.items()}
    alphas = {path: alpha_of(factors, rslora=adapter.rslora) for path, factors in adapter.factors.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] if values else 1 for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": short_names(list(adapter.factors), paths),
        "fan_in_fan_out": adapter.transposed,
        "bias": adapter.bias,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "modules_to_save": list(adapter.modules_to_save) or None,
        "init_lora_weights": True,
        "rank_pattern": {re.escape(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(path): a for path, a in alphas.items() if a != alpha},
    }


def alpha_of(factors: Factors, *, rslora: bool) -> float:
    """Return the lora_alpha that gives this scale at this rank; a whole number as int, as PEFT writes it."""
    alpha = round(factors.scale * (math.sqrt(factors.rank) if rslora else factors.rank), 9)
    return int(alpha) if alpha == int(alpha) else alpha


def short_names(adapted: list[str], paths: Sequence[str]) -> list[str]:
    """Return the last parts of the adapted paths if among `paths` they mean just those; the whole paths otherwise."""
    names = suffixes(adapted)
    meant = [path for path in paths if any(matches(path, name) for name in names)]
    return names if set(meant) == set(adapted) else adapted


def load(folder: Path) -> AdapterFile:
    """Read an adapter that EdgeLoRA or PEFT wrote; tensors stay as stored, mapped from the file where possible.

    Raises FolderError for what is missing, damaged or not understood.
    """
    config = read_config(folder)
    tensors = read_tensors(folder, WEIGHTS)
    parts: dict[str, dict[str, Tensor]] = {}
    rows: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    kernels: dict[str, tuple[int, ...]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX).replace(".modules_to_save.", ".").replace(".token_adapter.base_layer.", ".")
        name = name.replace(".base_layer.", ".")
        if found := PART.fullmatch(name):
            if found[2] == "lora_A" and tensor.ndim > 2:
                kernels[found[1]] = tuple(tensor.shape[1:])
            parts.setdefault(found[1], {})[found[2]] = tensor.flatten(1) if tensor.ndim > 2 else tensor
        elif found := BIAS.fullmatch(name):
            parts.setdefault(found[1], {})["bias"] = tensor
        elif found := TOKENS.fullmatch(name):
            rows[found[1]] = tensor
        elif not any(unused in name for unused in UNUSED):
            saved[name] = tensor
    problems = [line for path, part in parts.items() for line in wrong_part(path, part, config)]
    problems += [line for path, found in rows.items() for line in wrong_rows(path, found, config)]
    problems += unfit_parameters(config)
    if problems or not (parts or saved):
        lines = problems[:10] or ["no lora_A and lora_B"]
        raise FolderError("\n  ".join([f"{folder / WEIGHTS} is not a whole LoRA adapter:", *lines]))
    scales = {path: settings_of(config, path)[1] for path in parts}
    return AdapterFile(
        {path: to_factors(part, scales[path]) for path, part in parts.items()},
        saved,
        tuple(config.get("modules_to_save") or ()),
        config.get("bias") or "none",
        bool(config.get("use_rslora")),
        bool(config.get("fan_in_fan_out")),
        float(config.get("lora_dropout") or 0.0),
        config.get("base_model_name_or_path"),
        task_type(config),
        start=start_of(config),
        embeddings=frozenset(path for path, part in parts.items() if "lora_embedding_A" in part),
        tokens={path: (torch.tensor(tokens_of(config, path)), found) for path, found in rows.items()},
        shifts={f"{path}.bias": scales[path] * part["bias"].float() for path, part in parts.items() if "bias" in part},
        parameters=bool(config.get("target_parameters")),
        scales=LearnedScales.read(folder),
        notes=tuple(notes(folder, config)),
        kernels=kernels,
    )


def to_factors(part: dict[str, Tensor], scale: float) -> Factors:
    """Return the factors of one layer. An embedding `[V, H]` has A `[r, V]` and B `[H, r]`: the same formula transposed.

    KaSA (arXiv 2412.06071, eq. 6): s·B diag(λ) A, whose λ goes into B.
    """
    if "lora_embedding_A" in part:
        a, b = part["lora_embedding_B"].t().contiguous(), part["lora_embedding_A"].t().contiguous()
    else:
        a, b = part["lora_A"], part["lora_B"]
    if "lora_diag" in part:
        b = b.float() * part["lora_diag"].float()
    return Factors(a, b, scale, part.get("lora_magnitude_vector"))


def from_model(model: Model, *, rslora: bool, dropout: float, base: str | None, task_type: str | None) -> AdapterFile:
    """Return the adapters and the trained head of a model as they are now; their tensors are the model's own."""
    found = adapters(model)
    return AdapterFile(
        {path: adapter.factors for path, adapter in found.items()},
        {name: tensor.detach() for name, tensor in head_parameters(model).items()},
        tuple(getattr(model, "head_names", ())),
        rslora=rslora,
        transposed=bool(getattr(getattr(model, "spec", None), "transposed", False)),
        dropout=dropout,
        base=base,
        task_type=task_type,
        kernels={path: kernel_of(layer.base) for path, layer in found.items() if isinstance(layer.base, FrozenConv)},
    )


def kernel_of(layer: FrozenConv) -> tuple[int, ...]:
    """Return a convolution's weight's sizes but the first: inputs of a group, kernel."""
    return tuple(layer.weight.shape[1:])


@torch.no_grad()
def apply(model: Model, adapter: AdapterFile) -> None:
    """Put an adapter into a model: into its own adapters where it has them, as new ones where it does not.

    Raises FolderError that lists everything that the model has no place for.
    """
    layers, present = frozen_layers(model), adapters(model)
    replaced: dict[str, Tensor] = {**biases(model), **head_parameters(model)}
    unknown = [*(set(adapter.factors) - set(layers) - set(present)), *(set(adapter.saved_modules) - set(replaced))]
    unknown += [*adapter.tokens, *adapter.shifts, *([f"a base without its part ({adapter.start})"] if adapter.start else [])]
    if unknown:
        raise FolderError("\n  ".join(["the adapter changes what this model does not have:", *sorted(unknown)[:10]]))
    for path, factors in adapter.factors.items():
        layer = present.get(path)
        if layer is None:
            check_shape(path, factors, (layers[path].out_features, layers[path].in_features))
            factors = in_fp32(factors)
            model.replace_linear(path, LoRA(layers[path], factors, adapter.dropout))
        else:
            layer.set_factors(factors)
    for path, logs in adapter.scales.logs.items():
        adapters(model)[path].learn_scales(adapter.scales.block_size, logs)
    for name, tensor in adapter.saved_modules.items():
        if replaced[name].shape != tensor.shape:
            raise FolderError(f"the adapter's {name} has shape {list(tensor.shape)}; this model's {list(replaced[name].shape)}")
        replaced[name].copy_(tensor)


def in_fp32(factors: Factors) -> Factors:
    magnitude = None if factors.magnitude is None else factors.magnitude.float()
    return Factors(factors.a.float(), factors.b.float(), factors.scale, magnitude)


def head_parameters(model: Model) -> dict[str, Tensor]:
    """Return the trained head by the names of the transformers model; a decoder has none."""
    return dict(getattr(model, "head_parameters", dict)())


def biases(model: nn.Module) -> dict[str, Tensor]:
    """Return the biases of frozen layers and norms, by name: PEFT's `bias` setting trains them."""
    network = getattr(model, "network", None)  # an encoder's norms are transformers' own
    found = {} if network is None else {name: p for name, p in network.named_parameters() if name.endswith(".bias")}
    for module in model.modules():
        path, bias = getattr(module, "path", None), getattr(module, "bias", None)
        if path is not None and isinstance(bias, Tensor):
            found[f"{path}.bias"] = bias
    return found
