"""`edgelora chat`: a conversation with a bundle on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelora.cli.settings import build_config, setting_options
from edgelora.cli.verb import FOLDER, verb
from edgelora.config import GenerateConfig


@verb("chat")
@click.argument("bundle", type=FOLDER)
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: the physical cores.")
@setting_options(GenerateConfig)
def chat(bundle: Path, config_file: Path | None, threads: int | None, **given: Any) -> dict[str, Any]:
    """Talk with a bundle on the terminal.

    /reset forgets the conversation, /quit ends it."""
    from edgelora.run.chat import chat as converse

    return converse(bundle, build_config(GenerateConfig(), config_file, given), threads=threads)
