"""EdgeLoRA: fine-tune on the laptop you have, ship to the device they have."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora.run.model import Model

__version__ = "0.1.0"


def load(bundle: str | Path, *, threads: int | None = None) -> Model:
    """Open a bundle for `.generate(prompt)`, `.stream(prompt)` or `.classify(texts)`; see edgelora.run."""
    from edgelora.run.model import load as load_model

    return load_model(bundle, threads=threads)
