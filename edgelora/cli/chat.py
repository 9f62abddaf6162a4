"""`edgelora chat`: a conversation with a bundle on the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edgelora import console
from edgelora.cli.settings import build_config, setting_options
from edgelora.cli.verb import FOLDER, threads_option, verb
from edgelora.config import GenerateConfig


@verb("chat")
@click.argument("bundle", type=FOLDER)
@click.option("--adapter", metavar="NAME", help="Adapter of the bundle, as `edgelora inspect BUNDLE` lists them.")
@threads_option
@setting_options(GenerateConfig)
def chat(bundle: Path, config_file: Path | None, adapter: str | None, threads: int | None, **given: Any) -> dict[str, Any]:
    """Talk with a bundle on the terminal.

    /reset forgets the conversation, /exit ends it."""
    from edgelora.run.chat import chat as converse

    # With --json the conversation is the JSON object; what people see goes to stderr.
    stream = sys.stderr if console.json_output() else sys.stdout
    config = build_config(GenerateConfig(), config_file, given)

    def write(text: str) -> None:
        print(text, end="", file=stream, flush=True)

    return converse(bundle, config, threads=threads, adapter=adapter, write=write)
