"""Checkpoint names that differ from what transformers' own classes write today, mapped to those."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, TypeVar

T = TypeVar("T")

# The prefix that a model with a head has and its base-only checkpoint lacks
BASE_PREFIXES = {
    "gpt2": "transformer", "bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "camembert": "roberta",
    "distilbert": "distilbert", "electra": "electra", "mpnet": "mpnet", "deberta": "deberta", "deberta-v2": "deberta",
    "modernbert": "model", "albert": "albert",
    "llama": "model", "mistral": "model", "qwen2": "model", "qwen3": "model", "gemma": "model", "gemma2": "model",
    "vit": "vit", "deit": "deit", "resnet": "resnet", "convnext": "convnext", "mobilenet_v2": "mobilenet_v2",
    "gemma3_text": "model", "phi3": "model", "smollm3": "model", "olmo2": "model", "granite": "model",
}  # fmt: skip
# What checkpoints of ViT and DeiT call modules, and the classes of transformers from version 5 on
VISION_NAMES = (
    ("encoder.layer.", "layers."), ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."), ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."), ("intermediate.dense.", "mlp.fc1."), ("output.dense.", "mlp.fc2."),
)  # fmt: skip
HEADS = (
    "lm_head.", "classifier.", "pre_classifier.", "cls.", "predictions.", "qa_outputs.", "score.", "head.", "vocab_",
)  # fmt: skip


def canonical_names(tensors: dict[str, T], config: dict[str, Any]) -> dict[str, T]:
    """Return `tensors` under the names of the class with a head: base prefix added, TensorFlow-era norm names replaced."""
    prefix = BASE_PREFIXES.get(str(config.get("model_type")))
    bare = prefix is not None and not any(name.startswith(f"{prefix}.") for name in tensors)
    vision = config.get("model_type") in ("vit", "deit") and int(version("transformers").split(".")[0]) >= 5
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in VISION_NAMES if vision else ():
            name = name.replace(old, new)
        name = name.removesuffix(".gamma") + ".weight" if name.endswith("LayerNorm.gamma") else name
        name = name.removesuffix(".beta") + ".bias" if name.endswith("LayerNorm.beta") else name
        if bare and not name.startswith(HEADS):
            name = f"{prefix}.{name}"
        renamed[name] = tensor
    return renamed
