"""`edgelora chat`: a conversation with a bundle on the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edgelora import console
from edgelora.cli.settings import build_config, setting_options
from edgelora.cli.verb import FOLDER, verb
from edgelora.config import GenerateConfig


@verb("chat")
@click.argument("bundle", type=FOLDER)
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: the physical cores.")
@setting_options(GenerateConfig)
def chat(bundle: Path, config_file: Path | None, threads: int | None, **given: Any) -> dict[str, Any]:
    """Talk with a bundle on the terminal.

    /reset forgets the conversation, /exit ends it."""
    from edgelora.run.chat import chat as converse

    # With --json the conversation is the JSON object; what people see goes to stderr.
    stream = sys.stderr if console.json_output() else sys.stdout
    config = build_config(GenerateConfig(), config_file, given)
    return converse(bundle, config, threads=threads, write=lambda text: print(text, end="", file=stream, flush=True))
