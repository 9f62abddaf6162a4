"""`edgelora inspect`: what a folder holds."""

from __future__ import annotations

from typing import Any

import click

from edgelora.cli.verb import verb


@verb("inspect")
@click.argument("target", metavar="FOLDER_OR_MODEL")
def inspect(target: str) -> dict[str, Any]:
    """Show what a run, merged folder, bundle or model holds.

    Precision per layer, sizes, adapter norms and singular values, and every node that would miss a fast kernel.
    """
    from edgelora.inspect import inspect as look
    from edgelora.inspect import show

    found = look(target)
    show(found)
    return found
