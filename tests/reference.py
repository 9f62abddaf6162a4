"""What the engine must equal: transformers' own class in fp32 with a model's weights dequantized, and plain autograd."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgelora.adapters import inject
from edgelora.adapters.lora import LoRA
from edgelora.quant.grid import dequantize, quantize

DOCUMENTS = [[5, 9, 200, 31, 7, 40, 11, 99, 8], [77, 3, 4], [250, 12, 13, 14, 61, 7, 21, 34]]
LABELS = torch.tensor([0, 2, 1])


def packed(documents: list[list[int]]) -> tuple[Tensor, Tensor]:
    starts = torch.tensor([0, *(len(document) for document in documents)]).cumsum(0)
    return torch.tensor([token for document in documents for token in document]), starts


def padded(documents: list[list[int]]) -> dict[str, Tensor]:
    longest = max(len(document) for document in documents)
    ids = torch.tensor([document + [260] * (longest - len(document)) for document in documents])
    return {"input_ids": ids, "attention_mask": (ids != 260).long()}


def loss_of(model: Any) -> Tensor:
    """Return our summed loss: of all tokens but the documents' first, or of the labels."""
    if hasattr(model, "network"):
        return nn.functional.cross_entropy(model.logits(**padded(DOCUMENTS)), LABELS, reduction="sum")
    ids, starts = packed(DOCUMENTS)
    targets = torch.tensor([t for start, stop in pairwise(starts.tolist()) for t in range(start + 1, stop)])
    loss: Tensor = model.nll(model.hidden(ids, starts)[targets - 1], ids[targets])
    return loss


def gradients(model: Any) -> dict[str, Tensor]:
    """Return our gradients by parameter, from nothing."""
    model.zero_grad()
    loss_of(model).backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@dataclass
class Reference:
    """transformers' network; `trained` are its parameters and the adapters' tensors, by the names that ours have."""

    network: Any
    weights: dict[str, Tensor]
    trained: dict[str, Tensor] = field(default_factory=dict)

    def loss(self) -> Tensor:
        if isinstance(self.weights, dict) and "classifier" in dict(self.network.named_children()):
            logits = self._call(**padded(DOCUMENTS))
            return nn.functional.cross_entropy(logits, LABELS, reduction="sum")
        losses = []
        for document in DOCUMENTS:
            ids = torch.tensor([document])
            losses.append(nn.functional.cross_entropy(self._call(input_ids=ids)[0, :-1], ids[0, 1:], reduction="sum"))
        return torch.stack(losses).sum()

    def _call(self, **inputs: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(self.network, self.weights, kwargs=inputs).logits
        return logits

    def gradients(self) -> dict[str, Tensor]:
        found = torch.autograd.grad(self.loss(), list(self.trained.values()))
        return dict(zip(self.trained, found, strict=True))


def reference(folder: Path, model: Any) -> Reference:
    """Return the reference of our model, whose checkpoint is in `folder`."""
    import transformers

    encoder = hasattr(model, "network")
    name = "AutoModelForSequenceClassification" if encoder else "AutoModelForCausalLM"
    auto = getattr(transformers, name)
    network = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval().requires_grad_(False)
    if encoder:
        for path, module in model.network.named_modules():
            if type(module).__name__ == "FrozenEmbedding":
                network.get_submodule(path).weight.data = module.weight_fp32().clone()
    else:
        network.get_input_embeddings().weight.data = model.embed.weight_fp32().clone()
        network.get_output_embeddings().weight.data = model.head.weight.fp32().clone()
        if model.positions is not None:
            network.transformer.wpe.weight.data = model.positions.weight_fp32().clone()
    found = Reference(network, {})
    heads = model.head_parameters() if encoder else {}
    for name, value in heads.items():
        found.trained[f"network.{name}"] = found.weights[name] = value.detach().clone().requires_grad_()
    names = {id(module): name for name, module in model.named_modules()}
    for path, layer in model.linears().items():
        weight = layer.frozen.weight_fp32().clone()
        if isinstance(layer, LoRA):
            weight = acting(layer, weight, found.trained, names[id(layer)])
        turned = type(network.get_submodule(path)).__name__ == "Conv1D"
        found.weights[f"{path}.weight"] = weight.t() if turned else weight
    assert inject.adapters(model)
    return found


def acting(layer: LoRA, weight_NK: Tensor, trained: dict[str, Tensor], name: str) -> Tensor:
    """Return the adapted weight as a function of copies of the layer's parameters, which go to `trained`."""
    copies = {key: value.detach().clone().requires_grad_() for key, value in layer.named_parameters(recurse=False)}
    trained |= {f"{name}.{key}": value for key, value in copies.items()}
    update = layer.scale * copies["lora_B"] @ copies["lora_A"]
    if layer.initial is not None:
        update = update - layer.scale * layer.initial[1] @ layer.initial[0]
    if layer.grid is not None:  # straight through the rounding
        return dequantize(quantize(layer.merge(), *layer.grid)) + update - update.detach()
    adapted = weight_NK + update
    if layer.lora_magnitude_vector is None:
        return adapted
    norms = adapted.detach().norm(dim=1, keepdim=True)
    return copies["lora_magnitude_vector"][:, None] * adapted / norms
