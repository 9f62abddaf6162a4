"""`edgelora run`: inference with a bundle; never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelora import console
from edgelora.cli.settings import build_config, setting_options
from edgelora.cli.verb import FILE, FOLDER, verb
from edgelora.config import GenerateConfig


@verb("run")
@click.argument("bundle", type=FOLDER)
@click.argument("inputs", nargs=-1)
@click.option("--input", "input_file", type=FILE, help="JSONL file: one row per input, as `edgelora tasks` lists the columns.")
@click.option("--output", "output_file", type=FILE, help="JSONL file to write; with --input.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: the physical cores.")
@setting_options(GenerateConfig)
def run(
    bundle: Path, inputs: tuple[str, ...], input_file: Path | None, output_file: Path | None, config_file: Path | None,
    threads: int | None, **given: Any,
) -> dict[str, Any]:  # fmt: skip
    """Use a bundle: one answer or label for each INPUT.

    "-" reads one input from standard input.

    \b
    edgelora run bundle "turn the kitchen light off"
    edgelora run bundle --input rows.jsonl --output answers.jsonl
    """
    from edgelora.run.answer import answer
    from edgelora.run.batch import answer_file

    config = build_config(GenerateConfig(), config_file, given)
    return {}
