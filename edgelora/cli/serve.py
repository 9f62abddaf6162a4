"""`edgelora serve`: OpenAI's HTTP interface over a bundle; never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelora.cli.settings import build_config, setting_options
from edgelora.cli.verb import FOLDER, threads_option, verb
from edgelora.config import ServeConfig

KEY = "Key that requests must carry. Better in the environment: command lines are seen by all users."


@verb("serve")
@click.argument("bundle", type=FOLDER)
@setting_options(ServeConfig)
@click.option("--api-key", metavar="KEY", envvar="EDGELORA_API_KEY", show_envvar=True, help=KEY)
@threads_option
def serve(bundle: Path, config_file: Path | None, threads: int | None, **given: Any) -> dict[str, Any]:
    """Answer HTTP requests with a bundle, as OpenAI's API does.

    Chats, completions and models for bundles that write text; /v1/classify for classifiers of text, spans
    and answers; /v1/embeddings. An adapter of the bundle acts where a request names it as its model.

    \b
    edgelora serve bundle
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none your-program
    """
    config = build_config(ServeConfig(), config_file, given)
    from edgelora.serve.server import serve as answer

    return answer(bundle, config, threads=threads)
