"""`edgelora tasks`: the tasks, their columns, metrics and model families."""

from __future__ import annotations

from typing import Any

from edgelora import console
from edgelora.cli.verb import verb


@verb("tasks")
def tasks() -> dict[str, Any]:
    """List the tasks: columns, metrics and model families."""
    from edgelora.tasks import TASKS, get_task

    listed: list[dict[str, Any]] = []
    for task in map(get_task, TASKS):
        columns = [{"name": column.name, "help": column.help, "required": column.required} for column in task.columns]
        shapes = [list(shape) for shape in task.shapes]
        head = {"name": task.name, "help": task.help, "columns": columns, "row_shapes": shapes}
        listed.append({**head, "metric": task.metric, "metrics": list(task.metrics), "families": task.families})
    for entry in listed:
        facts = {
            "columns": " or ".join(" + ".join(shape) for shape in entry["row_shapes"]),
            **{f"  {column['name']}": column["help"] for column in entry["columns"]},
            "metrics": ", ".join(entry["metrics"]) + f" (best by {entry['metric']})",
            "models": entry["families"],
        }
        console.facts(f"{entry['name']}: {entry['help']}", facts)
        console.write("")
    return {"tasks": listed}
