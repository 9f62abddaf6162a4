"""Options made from the fields of FinetuneConfig, and the order of what wins: command line, TOML file, default."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import click

from edgelora.cli.verb import FILE
from edgelora.config import Config, load_toml, parse_bytes, parse_columns, replace
from edgelora.errors import SettingsError

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class _Parsed(click.ParamType[Any]):
    """An option value read by one of config.py's functions, whose message click then shows."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self.parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.parse(value) if isinstance(value, str) else value
        except SettingsError as error:
            self.fail(error.message, param, ctx)


BYTES = _Parsed("amount", parse_bytes)
COLUMNS = _Parsed("ours=theirs,…", parse_columns)


def setting_options(config_class: type, *names: str) -> Callable[[Decorated], Decorated]:
    """Add an option for each field of a config class that is a flag (or only for the named ones), and --config."""
    fields = [f for f in dataclasses.fields(config_class) if (f.name in names if names else f.metadata["flag"])]

    def decorate(function: Decorated) -> Decorated:
        text = "TOML file with any setting, also those without an option. The command line wins."
        function = click.option("--config", "config_file", type=FILE, metavar="FILE.toml", help=text)(function)
        for field in reversed(fields):
            function = _option(field, get_type_hints(config_class)[field.name])(function)
        return function

    return decorate


def build_config(base: Config, config_file: Path | None, given: Mapping[str, Any]) -> Config:
    """Return the settings: those of `base`, over them the TOML file, over it what was given on the command line."""
    config = base if config_file is None else load_toml(config_file, base)
    values = {name: value for name, value in given.items() if value is not None and value != ()}
    return replace(config, values, where="command line")


def toml_only(config_class: type) -> str:
    """Return the settings that have no option, as one line of help."""
    return ", ".join(f.name for f in dataclasses.fields(config_class) if not f.metadata["flag"])


def _option(field: dataclasses.Field[Any], annotation: Any) -> Callable[[Decorated], Decorated]:
    flag, text, choices = "--" + field.name.replace("_", "-"), field.metadata["help"], field.metadata["choices"]
    # Of `tuple[str, ...] | None` the first member says what a value is.
    kind = annotation if get_origin(annotation) is tuple else (get_args(annotation) or (annotation,))[0]
    if kind is bool:
        return _switch(flag, field.name, text)
    if get_origin(kind) is tuple:
        return click.option(flag, field.name, multiple=True, type=str, help=text)
    if field.default is not None:
        text += f"  [default: {field.default}]"
    shown: dict[str, Any] = {"type": _choice(choices, kind) if choices else kind}
    if field.name == "ram":
        shown = {"type": BYTES, "metavar": "1GB"}
    elif field.name == "columns":
        shown = {"type": COLUMNS, "metavar": "OURS=THEIRS,…"}
    return click.option(flag, field.name, default=None, help=text, **shown)


def _switch(flag: str, name: str, text: str) -> Callable[[Decorated], Decorated]:
    """Return --name and, out of sight in the help, --no-name, which takes back what a TOML file says."""

    def decorate(function: Decorated) -> Decorated:
        off = click.option(f"--no-{flag[2:]}", name, flag_value=False, default=None, type=bool, hidden=True)
        return click.option(flag, name, flag_value=True, default=None, type=bool, help=text)(off(function))

    return decorate


def _choice(choices: tuple[Any, ...], kind: type) -> click.ParamType[Any]:
    class Choice(click.Choice[str]):
        def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
            return kind(super().convert(value, param, ctx))

    return Choice([str(choice) for choice in choices])
