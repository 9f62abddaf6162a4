"""`edgelora inspect`: what a folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelora.cli.verb import FOLDER, verb


@verb("inspect")
@click.argument("folder", type=FOLDER)
def inspect(folder: Path) -> dict[str, Any]:
    """Show what a run, merged or bundle folder holds.

    Precision per layer, sizes, adapter norms and singular values, and every node that would miss a fast kernel."""
    from edgelora.inspect import inspect as look

    return look(folder)
