"""The command line: a plain click group of verbs in the order of the line. Heavy imports live in the commands' bodies."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from edgelora import __version__, console
from edgelora.cli.bench import bench
from edgelora.cli.boundary import guarded
from edgelora.cli.chat import chat
from edgelora.cli.data import data
from edgelora.cli.doctor import doctor
from edgelora.cli.evaluate import evaluate
from edgelora.cli.export import export
from edgelora.cli.finetune import finetune
from edgelora.cli.inspect import inspect
from edgelora.cli.merge import merge
from edgelora.cli.plan import plan
from edgelora.cli.run import run
from edgelora.cli.serve import serve
from edgelora.cli.tasks import tasks
from edgelora.errors import UserError, did_you_mean

VERBS = (doctor, plan, data, finetune, evaluate, merge, export, run, chat, serve, bench, tasks, inspect)


class Line(click.Group):
    """Lists its verbs in the order of the line and turns every error into a message and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            allowed = ", ".join(self.commands)
            message = f'no such verb "{args[0]}".{did_you_mean(args[0], self.commands)} Verbs: {allowed}'
            raise UserError(message, hint="edgelora --help")
        return super().resolve_command(ctx, args)

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        extra.pop("standalone_mode", None)
        given = list(sys.argv[1:] if args is None else args)
        # Before the verb's options are read, so that a message about them already comes in the form asked for.
        console.configure(json_output="--json" in given)
        sys.exit(guarded(lambda: super(Line, self).main(args, prog_name or "edgelora", standalone_mode=False, **extra)))


@click.group(cls=Line, invoke_without_command=True, context_settings={"max_content_width": 100})
@click.version_option(__version__, message="edgelora %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Fine-tune on the laptop you have, ship to the device they have.

    \b
    edgelora finetune MODEL rows.jsonl -o run    train an adapter
    edgelora export run -o bundle                merge it and write ONNX
    edgelora run bundle "a prompt"               use it, without torch
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in VERBS:
    cli.add_command(command)


def main() -> None:
    """Run the command line; the entry point of `edgelora` and `python -m edgelora`."""
    cli.main()
