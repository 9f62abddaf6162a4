"""`cgroup`: batch 1 × 256 tokens in a memory cgroup without swap: does it finish, how fast, and how small may the cgroup be?

Every run, the free ones too, starts with the machine's caches dropped. The run in the cgroup is given `--ram` of the same size.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable
from pathlib import Path

from edgelora import console
from training_bench import cgroups, models, rows
from training_bench.processes import Measured, run
from training_bench.results import Record, Results, noted
from training_bench.runs import Bench, Ours, finetune, peer, steady_step

TOKENS = 256
ONE_LIMIT = ("qwen-7b",)  # a search would take hours
STEPS = 4
LIMITS_MB = {"smollm2": 400, "qwen-0.5b": 700, "qwen-1.5b": 1331, "qwen-7b": 4608}  # 1.3 GB and 4.5 GB
SLOWDOWN = 1.3  # of the free time, at most
GRAIN = 0.03  # the smallest cgroup is found to within this share of it
TIMEOUT = 3600.0  # seconds; a run that thrashes is ended


def measure(bench: Bench, results: Results, *, bisect: bool = True) -> list[Record]:
    """Measure one model; return the table's rows."""
    if cgroups.parent() is None:
        console.warn("cgroup: left out, for it needs root and a memory controller")
        return []
    folder = models.folder_of(bench.model, bench.work)
    data = rows.of_length(rows.read_pairs(bench.data), TOKENS, folder, bench.work)
    table = single_limit(bench, results, folder, data)
    if bisect and bench.model not in ONE_LIMIT:
        table.append(smallest(f"{bench.model}: EdgeLoRA", *edgelora_sides(bench, results, folder, data), bench, results))
        if models.fits_in_fp32(folder):
            table.append(smallest(f"{bench.model}: PEFT", *peft_sides(bench, results, folder, data), bench, results))
    results.part(f"cgroup/{bench.model}", table)
    title = f"{bench.model}, batch 1 × {TOKENS} tokens in a memory cgroup without swap"
    console.table(f"{title}; smallest: at ≤ {SLOWDOWN} × the free time", table)
    return table


def single_limit(bench: Bench, results: Results, folder: Path, data: Path) -> list[Record]:
    """Run in the model's limit from an empty cache folder, then free with the same --ram, then free without a budget."""
    limit = LIMITS_MB[bench.model]
    key = f"cgroup/{bench.model}"

    def ask(name: str, ram_mb: int | None) -> Ours:
        return joined(name, folder, data, ram_mb)

    def first() -> Record:
        shutil.rmtree(bench.work / "cache", ignore_errors=True)
        return finetune(bench, ask("limited", limit), functools.partial(limited, limit))

    inside = results.run(f"{key}/limit-{limit}", first)
    budget = results.run(f"{key}/free-ram-{limit}", lambda: finetune(bench, ask("free-ram", limit), uncached))
    free = results.run(f"{key}/free", lambda: finetune(bench, ask("free", None), uncached))
    row = {
        "what": f"{bench.model} in {limit} MB",
        "outcome": inside["outcome"],
        "cgroup MB": limit,
        "steps": len(inside.get("step_seconds") or []),
        "s/step inside": steady_step(inside),
        "free, same --ram": steady_step(budget),
        "s/step free": steady_step(free),
    }
    return [noted(row, inside)]


def joined(name: str, folder: Path, data: Path, ram_mb: int | None) -> Ours:
    options = {"max-length": TOKENS, "truncate": True, "valid-rows": 1}
    return Ours(name, folder, data, STEPS, batch_size=1, ram_mb=ram_mb, options=options)


def limited(limit_mb: int, command: list[str], environment: dict[str, str]) -> Measured:
    return cgroups.run_limited(command, limit_mb, environment, TIMEOUT)


def uncached(command: list[str], environment: dict[str, str]) -> Measured:
    cgroups.drop_caches()
    return run(command, environment=environment, timeout=TIMEOUT)


Sides = tuple[Record, Callable[[int], Record]]


def edgelora_sides(bench: Bench, results: Results, folder: Path, data: Path) -> Sides:
    """Return the free run, and what measures a run in a cgroup of so many MB."""
    key = f"cgroup/{bench.model}/edgelora"
    free = results.run(f"cgroup/{bench.model}/free", lambda: finetune(bench, joined("free", folder, data, None), uncached))

    def inside(limit: int) -> Record:
        ask = joined("bisect", folder, data, limit)
        return results.run(f"{key}-{limit}", lambda: finetune(bench, ask, functools.partial(limited, limit)))

    return free, inside


def peft_sides(bench: Bench, results: Results, folder: Path, data: Path) -> Sides:
    """Return the same of the peer with gradient checkpointing, on the token ids of our free run."""
    key = f"cgroup/{bench.model}/peft"
    ours = bench.run_folder("free")
    if not ours.is_dir():  # the record is of an earlier call
        finetune(bench, joined("free", folder, data, None))
    steps = rows.write_steps(bench.work / "rows" / f"{bench.model}-joined-steps.jsonl", ours, rows.step_rows(ours))
    free = results.run(f"{key}-free", lambda: peer(bench, folder, steps, STEPS, runner=uncached))

    def inside(limit: int) -> Record:
        return results.run(
            f"{key}-{limit}", lambda: peer(bench, folder, steps, STEPS, runner=functools.partial(limited, limit))
        )

    return free, inside


def smallest(what: str, free: Record, inside: Callable[[int], Record], bench: Bench, results: Results) -> Record:
    """Return the row of the smallest cgroup in which a run ends in time, and of the smallest in which it ends at all."""
    if free["outcome"] != "done":
        return noted({"what": f"{what}, smallest", "outcome": free["outcome"]}, free)
    high = math.ceil(1.3 * free["peak_tree_mb"])

    def in_time(limit: int) -> bool:
        return close(inside(limit), free)

    def at_all(limit: int) -> bool:
        return bool(inside(limit)["outcome"] == "done")

    fast = search(in_time, high // 8, high)
    least = search(at_all, high // 8, fast or high)
    record = inside(fast) if fast else {}
    return {
        "what": f"{what}, smallest",
        "outcome": "done" if fast else f"slower even in {high} MB",
        "cgroup MB": fast,
        "steps": len(record.get("step_seconds") or []),
        "s/step inside": steady_step(record),
        "s/step free": steady_step(free),
        "ends at all in": least,
        "free MB": round(free["peak_tree_mb"]),
    }


def close(record: Record, free: Record) -> bool:
    """Tell whether a run ended within SLOWDOWN times the free run's time, as a whole and in its steps."""
    if record["outcome"] != "done":
        return False
    inside, outside = steady_step(record), steady_step(free)
    steps = inside is None or outside is None or inside <= SLOWDOWN * outside
    return steps and bool(record["seconds"] <= SLOWDOWN * free["seconds"])


def search(works: Callable[[int], bool], low: int, high: int) -> int | None:
    """Return the smallest number found to work, to within GRAIN of it; None where `high` does not. `low` is taken to fail."""
    if not works(high):
        return None
    while high - low > max(1, GRAIN * high):
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high
