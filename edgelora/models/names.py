"""Checkpoint names that differ from what transformers' own classes write today, mapped to those."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")

# The prefix that a model with a head has and its base-only checkpoint lacks
BASE_PREFIXES = {
    "gpt2": "transformer", "bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "camembert": "roberta",
    "distilbert": "distilbert", "electra": "electra", "mpnet": "mpnet", "deberta": "deberta", "deberta-v2": "deberta",
    "modernbert": "model", "albert": "albert",
    "llama": "model", "mistral": "model", "qwen2": "model", "qwen3": "model", "gemma": "model", "gemma2": "model",
    "gemma3_text": "model", "phi3": "model", "smollm3": "model", "olmo2": "model", "granite": "model",
}  # fmt: skip
HEADS = (
    "lm_head.", "classifier.", "pre_classifier.", "cls.", "predictions.", "qa_outputs.", "score.", "head.", "vocab_",
)  # fmt: skip


def canonical_names(tensors: dict[str, T], config: dict[str, Any]) -> dict[str, T]:
    """Return `tensors` under the names of the class with a head: base prefix added, TensorFlow-era norm names replaced."""
    prefix = BASE_PREFIXES.get(str(config.get("model_type")))
    bare = prefix is not None and not any(name.startswith(f"{prefix}.") for name in tensors)
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removesuffix(".gamma") + ".weight" if name.endswith("LayerNorm.gamma") else name
        name = name.removesuffix(".beta") + ".bias" if name.endswith("LayerNorm.beta") else name
        if bare and not name.startswith(HEADS):
            name = f"{prefix}.{name}"
        renamed[name] = tensor
    return renamed
