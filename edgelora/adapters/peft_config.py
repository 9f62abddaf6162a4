"""adapter_config.json: what PEFT 0.18 to 0.21 writes there, what of it a merge can follow, and what is refused.

Followed: LoRA, rsLoRA, DoRA; ranks and alphas by pattern; every choice of layers (it is seen in the tensors); modules_to_save,
biases, lora_bias, single tokens, parameters of linear layers; PiSSA, OLoRA and KaSA, which change the base weight, and MiCA,
VeLoRA and MonteCLoRA, which do not. Nothing in the file is taken for a path.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgelora.adapters.initialize import from_pattern
from edgelora.errors import FolderError
from edgelora.folder import inside_or_cached

CONFIG = "adapter_config.json"
# Keys that decide nothing once the tensors are there: which layers they sit on and how they began is seen in the tensors.
UNDERSTOOD = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "use_dora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size",
    "ensure_weight_tying", "trainable_token_indices", "lora_bias", "target_parameters", "kasa_config", "velora_config",
    "monteclora_config",
}  # fmt: skip
# What a key asks for, where no merged weight can be or PEFT's own merge is none.
REFUSED = {
    "alora_invocation_tokens": "aLoRA acts only on the tokens after its invocation, so no weight can hold it",
    "arrow_config": "Arrow chooses between adapters at every token, so no weight can hold it",
    "use_qalora": "QALoRA adapts the zero points of a GPTQ model, and PEFT itself cannot merge it",
    "layer_replication": "layer_replication makes a model of more layers than its base has",
    "use_bdlora": "BD-LoRA keeps blocks of its factors only",
    "megatron_config": "the layers are Megatron's",
}
IN_PEFT = "merge it in PEFT: model.merge_and_unload().save_pretrained(FOLDER), then edgelora export FOLDER -o BUNDLE"
PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT")
# These begin with a part of the base weight that PEFT takes out of it, when it begins and whenever it loads the adapter.
FROM_WEIGHT = ("pissa", "olora")
# So do these, but what they took out depends on data or on bitsandbytes and cannot be found again.
LOST = ("corda", "loftq", "lora_ga")
TASK_TYPES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "sentence-similarity",
}
NUMBERS = ("r", "lora_alpha")  # null is none of them
QUANTIZED = "quantization config was used during training"  # of the model card that PEFT writes beside the adapter


def read_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json. Raises FolderError for what is missing, damaged, or cannot be followed."""
    path = inside_or_cached(folder, CONFIG)
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise FolderError(f"{folder} is not an adapter folder: it has no {CONFIG}", hint=named_adapters(folder)) from None
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{folder / CONFIG} is damaged: {error}") from None
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if kind != "LORA":
        why = ", which adds tokens to the input and changes no weight" if kind in PROMPTS else ""
        raise FolderError(
            f"{folder / CONFIG} describes an adapter of type {kind}{why}; LORA is wanted (rsLoRA, DoRA, PiSSA and OLoRA too)",
            hint=None if kind in PROMPTS else IN_PEFT,
        )
    refused = [f"{why} ({key})" for key, why in REFUSED.items() if config.get(key)]
    strange = {key: value for key, value in config.items() if key not in UNDERSTOOD and key not in REFUSED and value}
    refused += [f"{key} = {json.dumps(value)} is not known" for key, value in strange.items()]
    if refused:
        raise FolderError("\n  ".join([f"{folder / CONFIG} asks for what cannot be merged here:", *refused]), hint=IN_PEFT)
    problems = wrong_values(config)
    if problems:
        raise FolderError("\n  ".join([f"{folder / CONFIG} is damaged:", *problems]))
    refuse_lost_start(folder, config)
    return dict(config)


def named_adapters(folder: Path) -> str | None:
    """Return a hint if PEFT has saved adapters under their names, in folders of their own."""
    found = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    return f"its adapters are {', '.join(found[:5])}: --adapter {folder / found[0]}" if found else None


def wrong_values(config: dict[str, Any]) -> list[str]:
    """Return a line for each value that PEFT would not have written."""

    def problem(key: str, fits: Callable[[Any], bool], wanted: str) -> list[str]:
        value = config.get(key)
        absent = value is None and (key not in NUMBERS or key not in config)
        return [] if absent or fits(value) else [f"{key} is {json.dumps(value)}; {wanted} is wanted"]

    names = "a list of names"
    return [
        *problem("r", is_rank, "a positive whole number"),
        *problem("lora_alpha", is_number, "a number"),
        *problem("lora_dropout", is_number, "a number"),
        *problem("rank_pattern", is_pattern, "a table from regular expressions to numbers"),
        *problem("rank_pattern", has_ranks, "a table to positive whole numbers"),
        *problem("alpha_pattern", is_pattern, "a table from regular expressions to numbers"),
        *problem("modules_to_save", is_names, names),
        *problem("target_parameters", is_names, names),
        *problem("trainable_token_indices", is_tokens, "a list of token ids, or a table from layers to them,"),
        *problem("bias", lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
        *problem("base_model_name_or_path", lambda value: isinstance(value, str), "a name"),
        *problem("auto_mapping", lambda value: isinstance(value, dict), "a table"),
        *problem("task_type", lambda value: isinstance(value, str), "a name"),
    ]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_rank(value: Any) -> bool:
    return is_number(value) and value >= 1 and value == int(value)


def has_ranks(value: Any) -> bool:
    return not is_pattern(value) or all(is_rank(number) for number in value.values())


def is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_pattern(value: Any) -> bool:
    return isinstance(value, dict) and all(is_number(number) and compiles(key) for key, number in value.items())


def is_tokens(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return all(isinstance(ids, list) and all(isinstance(i, int) and i >= 0 for i in ids) for ids in lists)


def compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def refuse_lost_start(folder: Path, config: dict[str, Any]) -> None:
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(LOST):
        raise FolderError(
            f'{folder / CONFIG} began with init_lora_weights = "{start}", which took a part out of the base weights '
            f"that cannot be found again",
            hint="save it from PEFT with path_initial_model_for_weight_conversion, which writes a plain LoRA adapter",
        )


def start_of(config: Mapping[str, Any]) -> str | None:
    """Return what was taken out of the base weights before training: "pissa", "olora", "kasa", or None."""
    if config.get("kasa_config"):
        return "kasa"
    begun = str(config.get("init_lora_weights", "")).lower()
    return next((name for name in FROM_WEIGHT if begun.startswith(name)), None)


def settings_of(config: Mapping[str, Any], path: str) -> tuple[int, float]:
    """Return (rank, scale) of the layer at `path`. A targeted parameter is matched by its own name, which ends in .weight."""
    name = f"{path}.weight"
    parameters = config.get("target_parameters") or []
    key = name if any(name == target or name.endswith(f".{target}") for target in parameters) else path
    rank = int(from_pattern(config.get("rank_pattern") or {}, key, config.get("r", 8)))
    alpha = float(from_pattern(config.get("alpha_pattern") or {}, key, config.get("lora_alpha", 8)))
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def tokens_of(config: Mapping[str, Any], path: str) -> list[int] | None:
    """Return the token ids whose rows of the embedding at `path` were trained; PEFT names layers by the end of their path."""
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        return next((ids for name, ids in indices.items() if path == name or path.endswith(f".{name}")), None)
    return indices


def task_type(config: Mapping[str, Any]) -> str | None:
    """Return PEFT's task type, else the one that the class of the trained model stands for."""
    named = config.get("task_type")
    trained = str((config.get("auto_mapping") or {}).get("base_model_class") or "")
    if named or not trained:
        return named
    ends = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
    return next((kind for end, kind in ends.items() if trained.endswith(end)), None)


def notes(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Return what the user should know about how the adapter was trained, a sentence or two each."""
    found = []
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith("pissa_niter"):
        found.append(
            f"the adapter began with {start}, a random approximation that was not stored (PEFT draws another one when it loads "
            f"the adapter). Merged with the exact principal part; path_initial_model_for_weight_conversion saves the true one."
        )
    bits = quantized_base(folder, config)
    if bits:
        found.append(
            f"the adapter was trained over a base in {bits} (bitsandbytes) and has learned to make up for that rounding; here "
            f"it goes into the base that --model names, unrounded, as PEFT's own merge does. Evaluate what comes out."
        )
    return found


def quantized_base(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return how the base was stored in training, where PEFT's model card or the base's name tells: "NF4", "8 bits" …"""
    card = inside_or_cached(folder, "README.md")
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    name = str(config.get("base_model_name_or_path") or "").lower()
    if QUANTIZED in text and re.search(r"^- _?load_in_4bit: True", text, re.MULTILINE):
        kind = re.search(r"^- bnb_4bit_quant_type: (\w+)", text, re.MULTILINE)
        return kind[1].upper() if kind else "4 bits"
    if QUANTIZED in text and re.search(r"^- _?load_in_8bit: True", text, re.MULTILINE):
        return "8 bits"
    return "NF4" if "bnb-4bit" in name else None
