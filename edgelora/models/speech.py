"""What transformers' networks on sound need before they are adapted: nothing at random, no gradient of the waveform."""

from __future__ import annotations

from typing import Any

from edgelora.errors import ModelError

# Masks and skipped layers, drawn at random in training from scratch
UNUSED = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "apply_spec_augment": False, "layerdrop": 0.0}
UNFIT = {"wavlm": "its attention reads the weights of its projections itself, where adapters are not seen"}


def refuse_unfit(kind: str) -> None:
    """Raise ModelError for a model type whose layers cannot be replaced."""
    if kind in UNFIT:
        raise ModelError(f'models of the type "{kind}" cannot be adapted: {UNFIT[kind]}')


def without_chance(settings: Any) -> Any:
    """Return a configuration of transformers whose network computes the same in training, dropout apart."""
    for name in [name for name in UNUSED if hasattr(settings, name)]:
        setattr(settings, name, UNUSED[name])
    return settings


def stop_at_waveform(network: Any) -> None:
    """Let the convolutions that read a waveform not ask for its gradient, for which all of them would be differentiated."""
    for module in network.modules():
        if hasattr(module, "_requires_grad"):
            module._requires_grad = False
