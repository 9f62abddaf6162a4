"""Which layers of a model get an adapter: the task's or the user's target modules, in the last layers or in all."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from edgelora.adapters.inject import NO_LAYER, choose_targets
from edgelora.errors import SettingsError
from edgelora.planning.shape import layer_of
from edgelora.tasks import get_task

if TYPE_CHECKING:
    from edgelora.config import FinetuneConfig


def target_modules(paths: Sequence[str], config: FinetuneConfig, task: str, convolutions: Container[str] = ()) -> str:
    """Return what names the target layers among a model's linear layers: the setting itself, or with `last_layers` paths.

    Raises SettingsError for names that match nothing and for more layers than there are.
    """
    wanted = config.target_modules or get_task(task).target_modules
    if config.last_layers is None or wanted == NO_LAYER:
        return wanted
    layers = [layer_of(path) for path in paths]
    count = 1 + max((layer for layer in layers if layer is not None), default=-1)
    if config.last_layers > count:
        raise SettingsError(f"last_layers is {config.last_layers}; allowed: 1 to {count}, the layers of this model")
    first = next(i for i, layer in enumerate(layers) if layer == count - config.last_layers)
    # What has no number and comes after the layers, as a pooler does, is above them.
    last = set(paths[first:])
    chosen = [path for path in choose_targets(paths, wanted, convolutions) if path in last]
    if not chosen:
        raise SettingsError(f"none of the target modules {wanted} is in the last {config.last_layers} layers")
    return ",".join(chosen)
