"""Which tensors of a model ship, and which of them are layers on the quantization grid: the plan that `merge` follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from edgelora.errors import ModelError
from edgelora.models.layout import decoder_shapes
from edgelora.models.spec import DecoderSpec

CLASSIFICATION = "text-classification"
GENERATION = "text-generation"


@dataclass(frozen=True)
class Layout:
    """linears: paths of linear layers, in the order of the data's way. embeddings: paths of what is looked up by token, and
    of an LM head of its own: 8 bits where the linears get 4. plain: names of tensors that stay fp32."""

    linears: tuple[str, ...]
    embeddings: tuple[str, ...]
    plain: tuple[str, ...]
    prefix: str = ""  # of an encoder's names, "bert.": what does not begin so is the classification head
    architecture: str = ""  # the class of transformers, where the checkpoint may name another one
    tied_head: str | None = None  # path of an LM head that is the embedding
    transposed: bool = False  # transformers' class keeps linear weights as [K, N] (GPT-2's Conv1D)

    def names(self) -> list[str]:
        """Return the names of all tensors that ship."""
        return [*(f"{path}.weight" for path in (*self.embeddings, *self.linears)), *self.plain]


def guess_task(config: dict[str, Any]) -> str:
    """Return the task that config.json's `architectures` stands for."""
    for name in config.get("architectures") or []:
        if name.endswith("ForSequenceClassification"):
            return CLASSIFICATION
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return GENERATION
    found = ", ".join(config.get("architectures") or []) or "none"
    raise ModelError(
        f"the model has no head that EdgeLoRA ships: {found}; allowed: …ForCausalLM, …ForSequenceClassification",
        hint="edgelora finetune MODEL DATA -o RUN, then edgelora export RUN -o BUNDLE",
    )


def decoder_layout(spec: DecoderSpec) -> Layout:
    """Linear layers of the blocks, the embedding and an LM head of its own go on the grid."""
    linears = tuple(spec.weight(role, layer) for layer in range(spec.num_layers) for role in spec.linear_roles)
    embeddings = (spec.weight("embed"),) if spec.tied else (spec.weight("embed"), spec.weight("head"))
    quantized = {f"{path}.weight" for path in (*linears, *embeddings)}
    plain = tuple(name for name in decoder_shapes(spec) if name not in quantized)
    tied_head = spec.weight("head") if spec.tied else None
    return Layout(linears, embeddings, plain, tied_head=tied_head, transposed=spec.transposed)


def encoder_layout(config: dict[str, Any]) -> Layout:
    """Read the layout off transformers' sequence-classification class, built without weights.

    Linear layers of the encoder and the word embedding go on the grid. The classification head (everything outside of the
    encoder) was trained as it is and stays fp32, like the norms, biases and the small position and type embeddings.
    """
    from edgelora.models.encoder import build_network

    model = build_network(config)
    prefix = f"{model.base_model_prefix}."
    words = model.get_input_embeddings()
    modules = dict(model.named_modules())
    linears = tuple(path for path, module in modules.items() if isinstance(module, torch.nn.Linear) and path.startswith(prefix))
    embeddings = tuple(path for path, module in modules.items() if module is words)
    quantized = {f"{path}.weight" for path in (*linears, *embeddings)}
    plain = tuple(name for name in model.state_dict() if name not in quantized)
    return Layout(linears, embeddings, plain, prefix, type(model).__name__)
