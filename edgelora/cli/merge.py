"""`edgelora merge`: the adapter into the quantized base."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora import console
from edgelora.cli.verb import FOLDER, output_option, overwrite_option, verb
from edgelora.config import PRECISIONS, parse_bytes, parse_columns
from edgelora.errors import SettingsError

if TYPE_CHECKING:
    from edgelora.adapters.combine import Recipe


DENSITY = 0.5


def rounding_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that `merge` and `export` share."""
    options = (
        click.option("--calibrate", metavar="ROWS", help="Rows to round with. Default: the run's own."),
        click.option("--columns", help="Our column names to those of ROWS: prompt=mr,completion=ref."),
        click.option("--size", help="Most that the weights may take, such as 90MB: picks bits and block size of each layer."),
        click.option("--loss", type=click.FloatRange(min=0), help="Relative rise of the loss allowed, such as 0.01: likewise."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def parsed(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options as `merge` takes them."""
    size, columns = options.pop("size"), options.pop("columns")
    if size is not None and options["loss"] is not None:
        raise SettingsError("--size and --loss are both given; one of them decides", hint="leave one of them out")
    if options["loss"] is not None and not math.isfinite(options["loss"]):
        raise SettingsError(f"--loss is {options['loss']}; a share such as 0.01 is wanted")
    size = None if size is None else parse_bytes(size)
    return {**options, "size": size, "columns": {} if columns is None else parse_columns(columns)}


def show_rounding(result: Mapping[str, Any]) -> None:
    """Show what rounding cost on held-out rows, and what other sizes would."""
    scores = result["rounding"].get("results")
    if result["results"]:
        from edgelora.report import shown

        console.table("What ships, on held-out rows", shown(result["results"]))
    elif scores:
        console.table(f"{result['rounding']['held_out_rows']} held-out rows", scores)
    if result["trade"]:
        console.table("Size against loss", result["trade"])


@verb("merge")
@click.argument("run", type=FOLDER, required=False)
@output_option
@click.option(
    "--adapter",
    "adapters",
    type=FOLDER,
    multiple=True,
    help="Folder of an adapter in PEFT's format, trained elsewhere; needs --model. Several are combined.",
)
@click.option("--weights", help="Of several adapters, such as 0.7,0.3.  [default: their mean]")
@click.option(
    "--combine", "method", default="linear", show_default=True, metavar="RULE", help="linear, ties, dare_linear or dare_ties."
)
@click.option("--density", type=float, default=DENSITY, show_default=True, help="What TIES and DARE keep of each adapter.")
@click.option("--model", help="The base model, where RUN does not name it or has moved; alone, it is rounded as it is.")
@click.option("--precision", type=click.Choice(PRECISIONS), default=None, help="Default: the run's, else int4.")
@rounding_options
@click.option(
    "--rounding", type=click.Choice(["gptq", "clip", "nearest"]), default=None, help="Default: gptq where there are rows."
)
@click.option("--force", is_flag=True, help="Write it even if it has lost more than 10% of what was learned.")
@overwrite_option
def merge(run: Path | None, out: Path, **options: Any) -> dict[str, Any]:
    """Merge a run's adapter into the quantized base.

    The result is rounded once, onto the grid that ships: `export` writes its integers as they are.

    \b
    edgelora merge run -o merged
    edgelora merge --adapter peft_folder --model MODEL --calibrate rows.jsonl -o merged
    edgelora merge run --size 90MB -o merged
    edgelora merge --adapter a --adapter b --weights 0.7,0.3 --combine ties --model MODEL -o merged
    """
    from edgelora.merging.merge import merge as merge_run

    rule = {name: options.pop(name) for name in ("adapters", "weights", "method", "density")}
    adapters: tuple[Path, ...] = rule["adapters"]
    options["adapter"] = recipe_of(**rule)
    if run is None and options["adapter"] is None and options["model"] is None:
        raise SettingsError("nothing to merge: neither a RUN nor --adapter", hint="edgelora merge RUN -o MERGED")
    if run is not None and options["adapter"] is not None:
        raise SettingsError("RUN and --adapter are both given; a merge takes one adapter", hint="leave one of them out")
    if options["precision"] is None:
        options["precision"] = shipping_precision(run or (adapters[0] if len(adapters) == 1 else None))
    result = merge_run(run, out, **parsed(options))
    if result.get("table"):
        console.table("Layers by kind", result["table"])
    show_rounding(result)
    for note in result["notes"]:
        console.warn(note)
    console.say(f"{out}: {result['layers']} layers on the grid, {len(result['layers_8_bits'])} of them in 8 bits")
    console.say(f"next: edgelora export {out} -o BUNDLE")
    return result


def shipping_precision(folder: Path | None) -> str:
    """Return the precision that a run was trained for, or int4 where it is no run folder."""
    from edgelora.folder import is_ours, read_manifest

    if folder is None or not is_ours(folder):
        return "int4"
    manifest = read_manifest(folder, "run", "merged", "bundle")
    return str(manifest.get("settings", {}).get("precision") or manifest.get("precision") or "int4")


def recipe_of(adapters: tuple[Path, ...], weights: str | None, method: str, density: float) -> Recipe | None:
    """Return how the adapters are combined, or None where there is none. Raises SettingsError for wrong settings."""
    if not adapters:
        given = {"--weights": weights is not None, "--combine": method != "linear", "--density": density != DENSITY}
        if unused := [name for name, is_given in given.items() if is_given]:
            hint = "--adapter A --adapter B --weights 0.7,0.3"
            raise SettingsError(f"{' and '.join(unused)}: there are no adapters to combine", hint=hint)
        return None
    from edgelora.adapters.combine import Recipe

    try:
        numbers = tuple(float(weight) for weight in weights.split(",")) if weights is not None else ()
    except ValueError:
        raise SettingsError(f'--weights "{weights}" are not numbers separated by commas', hint="--weights 0.7,0.3") from None
    recipe = Recipe(adapters, numbers, method, density)
    recipe.check()
    return recipe
