"""Checkpoint names that differ from what transformers' own classes write today, mapped to those."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from edgelora.models.source import ModelSource

T = TypeVar("T")

# The prefix that a model with a head has and its base-only checkpoint lacks
BASE_PREFIXES = {
    "gpt2": "transformer", "bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta", "camembert": "roberta",
    "distilbert": "distilbert", "electra": "electra", "mpnet": "mpnet", "deberta": "deberta", "deberta-v2": "deberta",
    "modernbert": "model", "albert": "albert",
    "llama": "model", "mistral": "model", "qwen2": "model", "qwen3": "model", "gemma": "model", "gemma2": "model",
    "vit": "vit", "deit": "deit", "resnet": "resnet", "convnext": "convnext", "mobilenet_v2": "mobilenet_v2",
    "efficientnet": "efficientnet", "mobilevit": "mobilevit", "swin": "swin",
    "wav2vec2": "wav2vec2", "hubert": "hubert", "audio-spectrogram-transformer": "audio_spectrogram_transformer",
    "gemma3_text": "model", "phi3": "model", "smollm3": "model", "olmo2": "model", "granite": "model",
}  # fmt: skip
# Whose layers are named like ViT's, and what their checkpoints call modules, and the classes of transformers from version 5 on
LIKE_VIT = ("vit", "deit", "audio-spectrogram-transformer")
VISION_NAMES = (
    ("encoder.layer.", "layers."), ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."), ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."), ("intermediate.dense.", "mlp.fc1."), ("output.dense.", "mlp.fc2."),
)  # fmt: skip
# A weight as direction and length (weight norm), by torch's names before and after version 2
WEIGHT_NORM = ((".weight_g", ".parametrizations.weight.original0"), (".weight_v", ".parametrizations.weight.original1"))
# Encoder-decoders whose one table is called `shared`, and under which other names checkpoints may hold it alone
SHARED = ("t5", "mt5", "umt5", "bart", "mbart", "marian", "pegasus", "m2m_100", "blenderbot", "blenderbot-small")
SAME_TABLE = (
    "model.decoder.embed_tokens",
    "model.encoder.embed_tokens",
    "decoder.embed_tokens",
    "encoder.embed_tokens",
    "lm_head",
)
HEADS = (
    "lm_head.", "classifier.", "pre_classifier.", "cls.", "predictions.", "qa_outputs.", "score.", "head.", "vocab_",
)  # fmt: skip


def canonical_names(tensors: dict[str, T], config: dict[str, Any]) -> dict[str, T]:
    """Return `tensors` under the names of the class with a head: base prefix added, TensorFlow-era norm names replaced."""
    prefix = BASE_PREFIXES.get(str(config.get("model_type")))
    bare = prefix is not None and not any(name.startswith(f"{prefix}.") for name in tensors)
    vision = config.get("model_type") in LIKE_VIT and int(version("transformers").split(".")[0]) >= 5
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in VISION_NAMES if vision else ():
            name = name.replace(old, new)
        name = name.removesuffix(".gamma") + ".weight" if name.endswith("LayerNorm.gamma") else name
        name = name.removesuffix(".beta") + ".bias" if name.endswith("LayerNorm.beta") else name
        for old, new in WEIGHT_NORM:
            name = name.removesuffix(old) + new if name.endswith(old) else name
        if bare and not name.startswith(HEADS):
            name = f"{prefix}.{name}"
        renamed[name] = tensor
    return with_shared_table(renamed, config)


@dataclass(frozen=True)
class Renamings:
    """What transformers renames when it loads a checkpoint into a class: its own table, from version 5 on. `known` are the
    names that the class has."""

    rules: tuple[Any, ...]
    prefix: str
    known: frozenset[str]

    @classmethod
    def of(cls, network: Any) -> Renamings:
        names = frozenset(network.state_dict())
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming
        except ImportError:  # before version 5 names were those of the classes
            return cls((), network.base_model_prefix, names)
        found = get_model_conversion_mapping(network, add_legacy=False)
        rules = tuple(rule for rule in found if isinstance(rule, WeightRenaming))
        return cls(rules, network.base_model_prefix, names)

    def fit(self, source: ModelSource) -> ModelSource:
        """Return the source with its tensors under the names of the class; what has one already keeps it."""
        named = {name: self.renamed(name) for name in source.names()}
        if all(name == new for name, new in named.items()):
            return source
        tensors = {named[name]: value for name, value in source.tensors.items()}
        return dataclasses.replace(source, tensors=tensors, rows={named[name]: value for name, value in source.rows.items()})

    def renamed(self, name: str) -> str:
        if name in self.known:
            return name
        new = name
        for rule in self.rules:
            new, _ = rule.rename_source_key(new)
        # A class with a head over the base, or over a part of it that keeps no prefix (Whisper's encoder alone)
        forms = (new, f"{self.prefix}.{new}", new.removeprefix(f"{self.prefix}."))
        return next((found for found in forms if found in self.known), name)


def with_shared_table(tensors: dict[str, T], config: dict[str, Any]) -> dict[str, T]:
    """Return `tensors` with an encoder-decoder's table under the name that transformers gives it: each name of its own to one
    tensor of the checkpoint."""
    kind = config.get("model_type")
    if kind not in SHARED or not config.get("share_encoder_decoder_embeddings", True):
        return tensors
    shared = "shared.weight" if "t5" in str(kind) else "model.shared.weight"
    found = next((name for path in SAME_TABLE if (name := f"{path}.weight") in tensors), None)
    return tensors if shared in tensors or found is None else {shared: tensors[found], **tensors}
