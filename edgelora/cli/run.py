"""`edgelora run`: inference with a bundle; never imports torch."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import click

from edgelora import console
from edgelora.cli.settings import COLUMNS, build_config, setting_options
from edgelora.cli.verb import FILE, FOLDER, threads_option, verb
from edgelora.config import GenerateConfig
from edgelora.errors import SettingsError

FILES = "--input rows.jsonl --output answers.jsonl"


@verb("run")
@click.argument("bundle", type=FOLDER)
@click.argument("inputs", nargs=-1)
@click.option("--input", "input_file", type=FILE, help="JSONL file of rows: messages, prompt or text, or the task's columns.")
@click.option("--output", "output_file", type=FILE, help="JSONL file to write: the rows of --input, each with its output.")
@click.option("--columns", type=COLUMNS, metavar="OURS=THEIRS,…", help="Our column names to the data's: prompt=question.")
@click.option("--adapter", metavar="NAME", help="Adapter of the bundle, as `edgelora inspect BUNDLE` lists them.")
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    help="Picture to write: INPUT with areas or boxes drawn on it. A folder for several.",
)
@click.option("--labels", metavar="TEXT,…", help="Texts to rank for a picture. Default: those of the training rows.")
@threads_option
@click.option("--overwrite", is_flag=True, help="Replace the file of --output.")
@setting_options(GenerateConfig)
def run(
    bundle: Path, inputs: tuple[str, ...], input_file: Path | None, output_file: Path | None, config_file: Path | None,
    columns: dict[str, str] | None, adapter: str | None, save: Path | None, labels: str | None, threads: int | None,
    overwrite: bool, **given: Any,
) -> dict[str, Any]:  # fmt: skip
    """Use a bundle: one answer or label for each INPUT.

    "-" reads one input from standard input.

    \b
    edgelora run bundle "turn the kitchen light off"
    edgelora run bundle --adapter lights "turn the kitchen light off"
    edgelora run bundle --input rows.jsonl --output answers.jsonl
    edgelora run bundle --save marked.png photo.jpg
    edgelora run bundle --labels "a cat,a dog" photo.jpg
    """
    config = build_config(GenerateConfig(), config_file, given)
    if input_file is None and output_file is None:
        from edgelora.run.answer import run as answer

        texts = [sys.stdin.read().rstrip("\n") if text == "-" else text for text in inputs]
        write = functools.partial(console.write, end="")
        ranked = [text.strip() for text in labels.split(",")] if labels else None
        return answer(bundle, texts, config, threads=threads, adapter=adapter, write=write, save=save, labels=ranked)
    if input_file is None or output_file is None or inputs or save or labels:
        raise SettingsError(
            "a file of rows takes --input and --output, and no INPUT, --save or --labels", hint=f"edgelora run {bundle} {FILES}"
        )
    from edgelora.run.batch import run_file

    result = run_file(
        bundle, input_file, output_file, config, columns=columns, threads=threads, adapter=adapter, overwrite=overwrite
    )
    console.say(f"{output_file}: {result['rows']:,} rows in {console.show_time(result['seconds'])}")
    return result
