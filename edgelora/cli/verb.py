"""What all verbs share: the --json and --quiet options, and the order render, then emit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from edgelora import console
from edgelora.config import THREADS

Body = Callable[..., Mapping[str, Any]]
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


def verb(name: str, *, epilog: str | None = None) -> Callable[[Body], click.Command]:
    """Make a command of a function that shows its result to people and returns it as a dict for --json."""

    def decorate(body: Body) -> click.Command:
        @functools.wraps(body)
        def run(*, json_output: bool, quiet: bool, **arguments: Any) -> None:
            console.configure(json_output=json_output, quiet=quiet)
            with console.only_json_on_stdout():
                console.emit(body(**arguments))

        command = click.command(name, epilog=epilog, context_settings={"max_content_width": 100})(run)
        command.params += [
            click.Option(["--json", "json_output"], is_flag=True, help="One JSON object on stdout, nothing else."),
            click.Option(["--quiet", "-q"], is_flag=True, help="No progress and no notes."),
        ]
        return command

    return decorate


output_option = click.option("-o", "--output", "out", type=FOLDER, required=True, help="Folder to write; must not exist.")
threads_option = click.option(
    "--threads", type=click.IntRange(1, int(THREADS.high)), help="CPU threads. Default: the physical cores."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output folder if EdgeLoRA wrote it.")
