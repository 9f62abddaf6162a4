"""transformers' class for a config.json and a task, without the memory of its weights."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from edgelora.errors import ModelError
from edgelora.models.embedder import Embedder
from edgelora.models.speech import refuse_unfit, without_chance

OWN = {"edgelora_unet": "edgelora.models.unet"}  # model types that transformers does not have


def build_network(config: dict[str, Any], auto_class: str, labels: Sequence[str] = ()) -> Any:
    """Return transformers' network of a config.json and an auto class: parameters on the meta device, buffers real."""
    import transformers

    kind = str(config.get("model_type"))
    refuse_unfit(kind)
    if kind in OWN:
        importlib.import_module(OWN[kind]).register()
    values = {key: value for key, value in config.items() if key not in ("model_type", "num_labels")}
    if labels:
        values["id2label"] = dict(enumerate(labels))
        values["label2id"] = {label: number for number, label in enumerate(labels)}
    try:
        settings = without_chance(transformers.AutoConfig.for_model(kind, **values))
        with parameters_on_meta():
            network = getattr(transformers, auto_class).from_config(settings, dtype=torch.float32)
            return Embedder(network) if auto_class == "AutoModel" and not hasattr(settings, "text_config") else network
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f'transformers\' {auto_class} does not know the model type "{kind}": {reason}') from None


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let every parameter that a module registers be without memory; buffers are computed as always."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = torch.nn.modules.module.register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def label_tensors(network: Any, auto_class: str) -> set[str]:
    """Return the names of the parameters whose shape depends on the number of labels."""
    config = {**network.config.to_dict(), "model_type": network.config.model_type}
    one_more = build_network(config, auto_class, [str(number) for number in range(network.config.num_labels + 1)])
    shapes = {name: parameter.shape for name, parameter in one_more.named_parameters()}
    return {name for name, parameter in network.named_parameters() if parameter.shape != shapes[name]}
