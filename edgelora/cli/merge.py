"""`edgelora merge`: the adapter into the quantized base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelora import console
from edgelora.cli.verb import FOLDER, output_option, overwrite_option, verb
from edgelora.errors import SettingsError


@verb("merge")
@click.argument("run", type=FOLDER, required=False)
@output_option
@click.option("--adapter", type=FOLDER, help="Folder of an adapter in PEFT's format, trained elsewhere; needs --model.")
@click.option("--model", help="The base model, where RUN does not name it or has moved.")
@click.option("--precision", type=click.Choice(["int4", "int8", "fp32"]), default=None, help="Default: the run's, else int4.")
@overwrite_option
def merge(run: Path | None, out: Path, **options: Any) -> dict[str, Any]:
    """Merge a run's adapter into the quantized base.

    The result is rounded once, onto the grid that ships: `export` writes its integers as they are.

    \b
    edgelora merge run -o merged
    edgelora merge --adapter peft_folder --model MODEL -o merged
    """
    from edgelora.merge import merge as merge_run

    if run is None and options["adapter"] is None:
        raise SettingsError("nothing to merge: neither a RUN nor --adapter", hint="edgelora merge RUN -o MERGED")
    if run is not None and options["adapter"] is not None:
        raise SettingsError("RUN and --adapter are both given; a merge takes one adapter", hint="leave one of them out")
    if options["precision"] is None:
        options["precision"] = shipping_precision(run)
    with console.progress("merging"):
        result = merge_run(run, out, **options)
    if "table" in result:
        console.table("Layers by kind", result["table"])
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
