"""`edgelora evaluate`: the task's metrics, for a run, a merged folder, a model or a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelora import console
from edgelora.cli.verb import verb


@verb("evaluate")
@click.argument("target", metavar="RUN_OR_BUNDLE")
@click.argument("data", required=False)
def evaluate(target: str, data: str | None, **options: Any) -> dict[str, Any]:
    """Score a run, merged folder, model or bundle on rows.

    Without DATA, on the run's own test rows, else its validation rows."""
    from edgelora.evaluate import evaluate as score

    return score(target, data, **options)
