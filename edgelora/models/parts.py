"""Which modules of transformers' class for a task are its frozen base, and which its head, trained whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

if TYPE_CHECKING:
    from edgelora.tasks.base import Task


@dataclass(frozen=True)
class Parts:
    """prefix: of the names in the base, "bert."; "" where the network has no base of its own. head: names of modules inside of
    the base that belong to the head all the same."""

    prefix: str = ""
    head: tuple[str, ...] = ()

    @classmethod
    def of(cls, network: Any, task: Task) -> Parts:
        inside = network.base_model_prefix in dict(network.named_children())
        return cls(f"{network.base_model_prefix}." if inside else "", task.head_parts)

    def in_head(self, name: str) -> bool:
        """Tell whether a module or tensor of that name belongs to the head."""
        return not name.startswith(self.prefix) or not set(self.head).isdisjoint(name.split("."))

    def heads(self, network: Any) -> list[str]:
        """Return the outermost modules of the head that have parameters, in order: classifier, pre_classifier …"""
        found: list[str] = []
        for path, module in network.named_modules():
            known = not path or f"{path}." == self.prefix or any(path.startswith(f"{name}.") for name in found)
            if not known and self.in_head(path) and next(module.parameters(), None) is not None:
                found.append(path)
        return found


def within_attention(module: Any) -> bool:
    """Tell whether a linear layer is one whose weight torch's nn.MultiheadAttention reads itself (SigLIP's pooling): it can be
    neither quantized nor adapted."""
    return isinstance(module, NonDynamicallyQuantizableLinear)
