"""What training costs, for README.md: the results of tools/bench_training condensed to the figures that the page shows.

Several results files are merged; where two have measured the same, the later one counts. A part that none has measured stays
as it was. Results of two machines, or of two versions of the peer's packages, are refused: their figures say nothing about
each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]
MODELS = {
    "smollm2": "SmolLM2-135M",
    "qwen-0.5b": "Qwen2.5-0.5B's shape, random weights",
    "qwen-1.5b": "Qwen2.5-1.5B's shape, random weights",
    "qwen-7b": "Qwen2.5-7B's shape, random weights",
}
PEERS = {"PEFT": "PEFT, gradient checkpointing", "PEFT, all kept": "PEFT, without"}
SHARES = {"1/4": "a quarter of PEFT's peak", "1/2": "half of PEFT's peak", "no limit": "no limit"}
GRID_BITS = 8  # fewer bits of the frozen weights leave no grid to train on (edgelora/train/on_grid.py)
HELD = ("processor", "architecture", "physical_cores", "packages")  # what all files must have in common


def condense(paths: Iterable[Path], kept: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return {"machine", and of each part that was measured its tables by model} of results files; the parts that they did not
    measure as `kept`, the content of before, has them, if it is of the same machine and packages.

    Raises SystemExit for files that are no results or do not go together.
    """
    found = [read(path) for path in paths]
    machine = found[0]["machine"]
    for path, other in zip(paths, found, strict=True):
        differing = [name for name in HELD if known(other["machine"], name) != known(machine, name)]
        if differing:
            raise SystemExit(f"error: {path} has another {', '.join(differing)} than the first file; give files of one machine")
    parts = {name: part for content in found for name, part in content["parts"].items()}
    runs = {name: run for content in found for name, run in content["runs"].items()}
    content: dict[str, Any] = {"machine": describe(machine)}
    for model, part in of(parts, "speed").items():
        parts[f"speed/{model}"] = [{**row, "bits": base_bits(runs, model, row["what"])} for row in part]
    for name, make in PARTS.items():
        tables = {model: make(part) for model, part in of(parts, name).items()}
        content |= {name: tables} if any(tables.values()) else {}
    if "speed" in content:
        content["rounds"] = {model: rounds(runs, model) for model in content["speed"]}
    planned = of(parts, "plan")
    plan = predictions([row for part in planned.values() for row in part])
    content |= {"plan": {"models": "; ".join(MODELS[model] for model in planned), **plan}} if plan else {}
    return beside(kept, content) if kept and kept["machine"] == content["machine"] else content


def beside(kept: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Return the content with what it does not say of a part or a model as it was kept."""
    found = {**kept, **content}
    for name in PARTS.keys() & kept.keys() & content.keys():
        tables = {**kept[name], **content[name]}
        found[name] = {model: tables[model] for model in MODELS if model in tables}
    return found


def read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not {"machine", "parts", "runs"} <= content.keys():
        raise SystemExit(f"error: {path} is no results file of tools/bench_training")
    return content


def known(machine: Row, name: str) -> Any:
    """Return a fact of the machine; of the packages the peer's alone, for ours is what changes."""
    value = machine.get(name)
    return {k: v for k, v in value.items() if k != "edgelora"} if isinstance(value, dict) else value


def describe(machine: Row) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in known(machine, "packages").items() if version)
    cores, size = machine["physical_cores"], f"{machine['ram_mb'] / 1024:.0f} GB"
    return f"{cores} cores of {machine['processor']}, {machine['architecture']}, {size}; {packages}"


def of(parts: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the summaries of a part by model, in the order of MODELS; what the bench concludes over models is none."""
    found = {key.partition("/")[2]: part for key, part in parts.items() if key.startswith(f"{name}/")}
    return {model: found[model] for model in MODELS if found.get(model)}


def rounds(runs: dict[str, Row], model: str) -> str:
    """Return how often the runs of the speed part were made, and with how many steps, from their names."""
    names = [re.fullmatch(rf"speed/{re.escape(model)}/(\d+)/.+/(\d+)", name) for name in runs]
    counts = [(int(name[1]), int(name[2]) + 1) for name in names if name]
    steps, most = {step for step, _ in counts}, max((number for _, number in counts), default=0)
    if len(steps) != 1:
        return ""
    return f"{steps.pop()} steps after the first" + (f", median of {most} runs" if most > 1 else "")


def base_bits(runs: dict[str, Row], model: str, what: str) -> int | None:
    """Return the fewest bits of the frozen weights that the planner chose in the runs of a row; None for the peer's."""
    names = [name for name in runs if re.fullmatch(rf"speed/{re.escape(model)}/\d+/{re.escape(what)}/\d+", name)]
    return min((bits for name in names if (bits := runs[name].get("plan", {}).get("base_bits"))), default=None)


def trained_for(precision: str, bits: int | None = None) -> str:
    """Return what a run ships as, and where that is known whether it trained on its grid."""
    if precision == "fp32" or bits is None:
        return f"for {precision}"
    return f"on the {precision} grid" if bits >= GRID_BITS else f"for {precision}, rounded after training"


def number(value: float | None, digits: int = 0) -> float | int | None:
    if value is None:
        return None
    return round(value, digits) if digits else round(value)


def speed(part: list[Row]) -> list[Row]:
    """Both sides on the same rows in the same order; the peer's own random order is not shown."""
    table = []
    for row in part:
        ours = re.fullmatch(r"EdgeLoRA (\w+)(, fp32 products)?, (.+)", row["what"])
        if not ours and row["what"] not in PEERS:
            continue
        bits = row["bits"]
        table.append({
            "run": f"EdgeLoRA, {trained_for(ours[1], bits)}{ours[2] or ''}, {SHARES[ours[3]]}" if ours else PEERS[row["what"]],
            "`--ram`, MB": row.get("--ram"),
            "base bits": bits,
            "outcome": row["outcome"],
            "real tokens/s": number(row["tokens/s"], 1),
            "× PEFT": number(row["× PEFT, our order"], 2),
            "peak RSS, MB": number(row["RSS MB"]),
            "anonymous, MB": number(row["anon. MB"]),
        })  # fmt: skip
    return table


def cgroup(part: list[Row]) -> list[Row]:
    table = []
    for row in part:
        side = re.fullmatch(r".+: (EdgeLoRA|PEFT), smallest", row["what"])
        table.append({
            "run": f"{side[1]}, the smallest within 1.3 × the free time" if side else "EdgeLoRA",
            "limit, MB": row.get("cgroup MB"),
            "outcome": row["outcome"],
            "s/step inside": number(row.get("s/step inside"), 2),
            "s/step free, same `--ram`": number(row.get("free, same --ram"), 2),
            "s/step free": number(row.get("s/step free"), 2),
        })  # fmt: skip
    return table


def rate(part: list[Row]) -> list[Row]:
    table = []
    for row in part:
        precision, _, how = row["what"].partition(", ")
        table.append({
            "run": f"EdgeLoRA, {trained_for(precision)}, {how}",
            "outcome": row["outcome"],
            "s/step": number(row.get("s/step"), 2),
            "GFLOP/s in steps": number(row.get("GFLOP/s in steps")),
            "matrix rate, GFLOP/s": number(row.get("matrix rate")),
            "share, %": number(percent(row.get("share"))),
            "without recomputed down projections, %": number(percent(row.get("share without"))),
        })  # fmt: skip
    return table


def grid(part: list[Row]) -> list[Row]:
    return [{
        "training": row["what"],
        "outcome": row["outcome"],
        "s/step": number(row.get("s/step"), 2),
        "of a step, %": number(percent(row.get("of a step"))),
        "peak RSS, MB": number(row.get("peak MB")),
    } for row in part]  # fmt: skip


def percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def curve(part: list[Row]) -> list[Row]:
    return [{
        "products": "bf16 operands" if row["what"].endswith("bf16 operands") else "fp32",
        "steps": int(row["what"].split(" steps")[0].rpartition(", ")[2]),
        "largest relative difference, %": number(row["largest difference, %"], 3),
        "last loss": number(row["last loss"], 4),
        "PEFT's last loss": number(row["PEFT's last"], 4),
    } for row in part]  # fmt: skip


def budgets(part: list[Row]) -> list[Row]:
    return [{
        "tried": len(part),
        "refused": sum(row["outcome"] == "refused" for row in part),
        "also ended in a cgroup of that size": sum(row.get("in a cgroup") == "done" for row in part),
        "above `--ram`, or killed": sum(row["held"] is False for row in part),
    }]  # fmt: skip


def predictions(rows: list[Row]) -> Row | None:
    """Return the worst error with its sign and the median of the errors' sizes, of measured / predicted − 1 in per cent."""
    measured = [row for row in rows if row.get("ratio") and row.get("s ratio")]
    if not measured:
        return None
    result: Row = {"configurations": len(measured)}
    if len(measured) < len(rows):
        result["without a measurement"] = len(rows) - len(measured)
    for label, name in (("peak", "ratio"), ("time", "s ratio")):
        errors = [100 * (row[name] - 1) for row in measured]
        result[f"{label}, worst, %"] = number(max(errors, key=abs), 1)
        result[f"{label}, median, %"] = number(median(abs(error) for error in errors), 1)
    return result


PARTS: dict[str, Callable[[Any], list[Row]]] = {
    "speed": speed, "cgroup": cgroup, "rate": rate, "grid": grid, "curve": curve, "budgets": budgets,
}  # fmt: skip

# What stands above each table; MODEL and ROUNDS are filled in.
TITLES = {
    "speed": "**Speed and memory.** MODEL, E2E rows, rank 8, all linear layers, batch 8, both sides on the same rows in the "
    "same order; ROUNDS. Real tokens are those of the rows, without padding:",
    "cgroup": "**Memory cgroups without swap.** MODEL, batch 1 × 256 tokens, `--ram` of the same size, caches dropped before:",
    "rate": "**Share of the machine's fp32 matrix rate** during steps. MODEL, batch 8, necessary operations alone; the rate is "
    "measured before and after, on the model's own shapes:",
    "grid": "**What training on the grid adds to a step.** MODEL, one row of 512 tokens, base weights of 16 bits, no limit:",
    "curve": "**Loss curve.** MODEL, 32-bit base weights, the same token ids, initial A and constant learning rate as PEFT:",
    "budgets": "**Random budgets.** MODEL, `--ram` from 250 to 2500 MB:",
    "plan": "**`edgelora plan` against the run**, measured / predicted − 1 (worst peak, median time of the rounds):",
}


def tables(content: dict[str, Any]) -> list[tuple[str, list[Row]]]:
    """Return the title and the rows of each table that there are figures for."""
    found = []
    for name in PARTS:
        for model, rows in content.get(name, {}).items():
            title = TITLES[name].replace("MODEL", MODELS[model])
            rounds_text = content.get("rounds", {}).get(model, "")
            found.append((title.replace("; ROUNDS", f"; {rounds_text}" if rounds_text else ""), shown(rows)))
    if "plan" in content:
        found.append((TITLES["plan"], [content["plan"]]))
    return found


def shown(rows: list[Row]) -> list[Row]:
    """Return rows without columns that say nothing: nowhere a figure, or `outcome` where all are done. None becomes a dash."""
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    if all(row.get("outcome") == "done" for row in rows):
        names = [name for name in names if name != "outcome"]
    return [{name: "–" if row[name] is None else row[name] for name in names} for row in rows]
