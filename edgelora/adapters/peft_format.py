"""Adapters as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors (peft 0.18 to 0.21).

Tensors are named `base_model.model.<module path>.<what>`, where what is lora_A.weight `[r, K]`, lora_B.weight `[N, r]` or
lora_magnitude_vector `[N]`; a trained head (`modules_to_save`) and trained biases keep their name in the model.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgelora.adapters.initialize import from_pattern
from edgelora.adapters.inject import adapters, frozen_linears, matches, suffixes
from edgelora.adapters.lora import Factors, LoRA, combine
from edgelora.errors import FolderError
from edgelora.folder import write_json

if TYPE_CHECKING:
    from edgelora.models.decoder import Decoder
    from edgelora.models.encoder import Encoder

    Model = Decoder | Encoder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TASK_TYPES = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}
# Keys that decide nothing once the tensors are there: which layers they sit on and how they began is seen in the tensors.
UNDERSTOOD = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "use_dora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
# These change the base weights too, so that the adapter alone does not say what was trained.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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

    @property
    def dora(self) -> bool:
        return any(factors.magnitude is not None for factors in self.factors.values())


def merged_weight(adapter: AdapterFile, path: str, weight_NK: Tensor) -> Tensor:
    """Return fp32 `[N, K]`: the weight of `path` with its adapter in it, or as it is where the adapter has none.

    Raises FolderError if the adapter was made for another shape.
    """
    factors = adapter.factors.get(path)
    if factors is None:
        return weight_NK.float()
    check_shape(path, factors, (weight_NK.shape[0], weight_NK.shape[1]))
    return combine(weight_NK, factors)


def check_shape(path: str, factors: Factors, shape: tuple[int, int]) -> None:
    found = (factors.b.shape[0], factors.a.shape[1])
    if found != shape:
        raise FolderError(f"the adapter of {path} is for a weight of shape {list(found)}; this model's is {list(shape)}")


def save(adapter: AdapterFile, folder: Path, *, paths: Sequence[str] = ()) -> None:
    """Write the adapter; `paths` are all adaptable layers of the model, so that target_modules can be short names.

    The weights are replaced atomically: a reader sees the old file or the new one.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(adapter.saved_modules)
    for path, factors in adapter.factors.items():
        tensors[f"{path}.lora_A.weight"] = factors.a
        tensors[f"{path}.lora_B.weight"] = factors.b
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
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
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
    """Read an adapter that EdgeLoRA or PEFT wrote. Raises FolderError for what is missing, damaged or not understood."""
    config = read_config(folder)
    tensors = read_tensors(folder)
    parts: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        found = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?", name)
        if found:
            parts.setdefault(found[1], {})[found[2]] = tensor.float()
        elif ".original_module." not in name:  # PEFT's bias="all" stores the untrained head's bias too
            saved[name] = tensor.float()
    problems = [f"{path}: {', '.join(sorted(part))}" for path, part in parts.items() if not whole(part)]
    if problems or not parts:
        lines = problems or ["no lora_A and lora_B"]
        raise FolderError("\n  ".join([f"{folder / WEIGHTS} is not a whole LoRA adapter:", *lines]))
    return AdapterFile(
        {path: to_factors(path, part, config) for path, part in parts.items()},
        saved,
        tuple(config.get("modules_to_save") or ()),
        config.get("bias") or "none",
        bool(config.get("use_rslora")),
        bool(config.get("fan_in_fan_out")),
        float(config.get("lora_dropout") or 0.0),
        config.get("base_model_name_or_path"),
        config.get("task_type"),
    )


def whole(part: dict[str, Tensor]) -> bool:
    names = set(part) - {"lora_magnitude_vector"}
    return names in ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})


def to_factors(path: str, part: dict[str, Tensor], config: dict[str, Any]) -> Factors:
    """Return the factors of one layer. An embedding `[V, H]` has A `[r, V]` and B `[H, r]`: the same formula transposed."""
    if "lora_embedding_A" in part:
        a, b = part["lora_embedding_B"].t().contiguous(), part["lora_embedding_A"].t().contiguous()
    else:
        a, b = part["lora_A"], part["lora_B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise FolderError(
            f"the adapter of {path} has A of shape {list(a.shape)} and B of shape {list(b.shape)}; [r, K] and [N, r] are wanted"
        )
    alpha = float(from_pattern(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", 8)))
    rank = a.shape[0]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Factors(a, b, scale, part.get("lora_magnitude_vector"))


def read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FolderError(f"{folder} is not an adapter folder: it has no {CONFIG}") from None
    except ValueError as error:
        raise FolderError(f"{folder / CONFIG} is damaged: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise FolderError(f"{folder / CONFIG} describes an adapter of type {kind}; LORA is wanted")
    strange = {key: value for key, value in config.items() if key not in UNDERSTOOD and value}
    if strange:
        listed = ", ".join(f"{key} = {json.dumps(value)}" for key, value in strange.items())
        raise FolderError(f"{folder / CONFIG} asks for what EdgeLoRA does not know: {listed}")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(CHANGED_BASE):
        raise FolderError(
            f'{folder / CONFIG} began with init_lora_weights "{start}", which changes the base weights too',
            hint="save it from PEFT with path_initial_model_for_weight_conversion, which writes a plain LoRA adapter",
        )
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        hint = "save it again with safe_serialization=True" if (folder / "adapter_model.bin").exists() else None
        raise FolderError(f"{folder} is not an adapter folder: it has no {WEIGHTS}", hint=hint) from None
    except SafetensorError as error:
        raise FolderError(f"{folder / WEIGHTS} is damaged: {error}") from None
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise FolderError(f"{folder / WEIGHTS} has values that are not finite: {', '.join(bad)}")
    return tensors


def from_model(model: Model, *, rslora: bool, dropout: float, base: str | None, task_type: str | None) -> AdapterFile:
    """Return the adapters and the trained head of a model as they are now; their tensors are the model's own."""
    return AdapterFile(
        {path: adapter.factors for path, adapter in adapters(model).items()},
        {name: tensor.detach() for name, tensor in head_parameters(model).items()},
        tuple(getattr(model, "head_names", ())),
        rslora=rslora,
        transposed=bool(getattr(getattr(model, "spec", None), "transposed", False)),
        dropout=dropout,
        base=base,
        task_type=task_type,
    )


@torch.no_grad()
def apply(model: Model, adapter: AdapterFile) -> None:
    """Put an adapter into a model: into its own adapters where it has them, as new ones where it does not.

    Raises FolderError that lists everything that the model has no place for.
    """
    linears, present = frozen_linears(model), adapters(model)
    replaced: dict[str, Tensor] = {**biases(model), **head_parameters(model)}
    unknown = [*(set(adapter.factors) - set(linears) - set(present)), *(set(adapter.saved_modules) - set(replaced))]
    if unknown:
        raise FolderError("\n  ".join(["the adapter changes what this model does not have:", *sorted(unknown)[:10]]))
    for path, factors in adapter.factors.items():
        layer = present.get(path)
        if layer is None:
            check_shape(path, factors, (linears[path].out_features, linears[path].in_features))
            model.replace_linear(path, LoRA(linears[path], factors, adapter.dropout))
        else:
            layer.set_factors(factors)
    for name, tensor in adapter.saved_modules.items():
        if replaced[name].shape != tensor.shape:
            raise FolderError(f"the adapter's {name} has shape {list(tensor.shape)}; this model's {list(replaced[name].shape)}")
        replaced[name].copy_(tensor)


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
