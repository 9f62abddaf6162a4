"""`speed`: real tokens/s and memory of both sides on the same rows, in alternation, each run in a process of its own.

The peer gets our rows in our order (rows of like length share a step), and in its own: random order, as its users run it.
Our budgets are shares of the peak that the peer has reached in the first round. Where the machine is faster with bf16 operands
`finetune` takes them; beside it stands training for fp32 with products in fp32, as the peer's are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from edgelora import console
from training_bench import models, rows
from training_bench.results import Record, Results, noted
from training_bench.runs import Bench, Ours, finetune, peer

BATCH_SIZE = 8
PEERS = {  # name → (checkpointing, own order)
    "PEFT": (True, False),
    "PEFT, all kept": (False, False),
    "PEFT, random order": (True, True),
    "PEFT, all kept, random order": (False, True),
}
REFERENCE = "PEFT"  # whose peak the budgets are shares of
SHARES: dict[str, int | None] = {"1/4": 4, "1/2": 2, "no limit": None}


def measure(bench: Bench, results: Results, precisions: list[str]) -> list[Record]:
    """Measure one model in `bench.repeats` rounds; return the table's rows."""
    folder = models.folder_of(bench.model, bench.work)
    data = rows.natural(rows.read_pairs(bench.data), bench.work)
    key = f"speed/{bench.model}/{bench.steps}"
    ordered, shuffled = step_files(bench, results, key, folder, data)
    found: dict[str, list[Record]] = {}

    def once(name: str, repeat: int, make: Callable[[], Record]) -> Record:
        record = results.run(f"{key}/{name}/{repeat}", make)
        found.setdefault(name, []).append(record)
        return record

    for repeat in range(bench.repeats):
        for name, make in alternation(
            peers(bench, folder, ordered, shuffled), edgelora(bench, folder, data, precisions, found)
        ):
            once(name, repeat, make)
    check_rows(bench, ordered)
    table = summary(found)
    results.part(f"speed/{bench.model}", table)
    show(bench, table)
    return table


def step_files(bench: Bench, results: Results, key: str, folder: Path, data: Path) -> tuple[Path, Path]:
    """Return the token ids of every step in our order and in random order; a run that does not count names them.

    That run also fills the caches of both sides' files, so that the first measured one is like the others.
    """
    paths = [bench.work / "rows" / f"{bench.model}-{bench.steps}-{order}.jsonl" for order in ("ours", "random")]
    if not all(path.is_file() for path in paths):
        ask = Ours("warm-up", folder, data, bench.steps + 1, BATCH_SIZE)
        record = results.run(f"{key}/warm-up", lambda: finetune(bench, ask))
        if record["outcome"] != "done":
            raise SystemExit(f"error: the first run of {bench.model} {record['outcome']}: {record['message']}")
        run = bench.run_folder("warm-up")
        rows.write_steps(paths[0], run, rows.step_rows(run))
        rows.write_steps(paths[1], run, rows.random_steps(run, bench.steps + 1, BATCH_SIZE))
    return paths[0], paths[1]


Runs = list[tuple[str, Callable[[], Record]]]


def peers(bench: Bench, folder: Path, ordered: Path, shuffled: Path) -> Runs:
    def make(checkpointing: bool, own_order: bool) -> Callable[[], Record]:
        steps = shuffled if own_order else ordered
        return lambda: peer(bench, folder, steps, bench.steps + 1, checkpointing=checkpointing)

    if not models.fits_in_fp32(folder):
        console.warn(f"{bench.model}: the peer's fp32 weights do not fit this machine; EdgeLoRA runs alone, without budgets")
        return []
    return [(name, make(*how)) for name, how in PEERS.items()]


def edgelora(bench: Bench, folder: Path, data: Path, precisions: list[str], found: dict[str, list[Record]]) -> Runs:
    """Return our runs; their budgets are known once the peer has run, which is before them."""

    def make(precision: str, divisor: int | None, compute: str | None) -> Callable[[], Record]:
        def run() -> Record:
            budget = share_mb(found, divisor)
            ask = Ours("speed", folder, data, bench.steps + 1, BATCH_SIZE, budget, precision, compute)
            return finetune(bench, ask)

        return run

    shares = SHARES if models.fits_in_fp32(folder) else {"no limit": None}
    ways: list[tuple[str, str, str | None]] = [(f"EdgeLoRA {precision}", precision, None) for precision in precisions]
    if "fp32" in precisions:
        ways.append(("EdgeLoRA fp32, fp32 products", "fp32", "fp32"))
    return [
        (f"{name}, {share}", make(precision, divisor, compute))
        for name, precision, compute in ways
        for share, divisor in shares.items()
    ]


def share_mb(found: dict[str, list[Record]], divisor: int | None) -> int | None:
    """Return a share of the peak that the peer reached in the first round, in whole MB."""
    if divisor is None:
        return None
    return int(found[REFERENCE][0]["peak_rss_mb"] / divisor)


def alternation(theirs: Runs, ours: Runs) -> Runs:
    """Return the runs of a round: one of theirs, one of ours, and so on; what one side has more follows."""
    mixed = [run for pair in zip(theirs, ours, strict=False) for run in pair]
    shorter = min(len(theirs), len(ours))
    return mixed + theirs[shorter:] + ours[shorter:]


def check_rows(bench: Bench, ordered: Path) -> None:
    """Refuse a comparison in which the last run of ours trained on other rows than the peer was given."""
    run = bench.run_folder("speed")
    if not (run / "log.jsonl").is_file():
        return
    again = rows.write_steps(ordered.with_suffix(".check"), run, rows.step_rows(run))
    same = again.read_bytes() == ordered.read_bytes()
    again.unlink()
    if not same:
        raise SystemExit(f"error: {run} trained on other rows than {ordered}; remove {bench.work / 'rows'} and start again")


def summary(found: dict[str, list[Record]]) -> list[Record]:
    """Return a row for each side and setting: medians over the rounds, and ratios to the peer with checkpointing."""
    table = [row_of(name, records) for name, records in found.items()]
    by_name = {row["what"]: row for row in table}
    for row in table:
        for label, reference in (("our order", REFERENCE), ("random", "PEFT, random order")):
            base = by_name.get(reference, {})
            row[f"× PEFT, {label}"] = ratio(row["tokens/s"], base.get("tokens/s"))
        row["of its RSS"] = ratio(row["RSS MB"], by_name.get(REFERENCE, {}).get("RSS MB"))
    return table


def row_of(name: str, records: list[Record]) -> dict[str, Any]:
    done = [record for record in records if record["outcome"] == "done"]
    first = records[0]
    row = {
        "what": name,
        "--ram": first.get("ram_mb"),
        "outcome": first["outcome"] if len(done) == len(records) or not done else f"{len(done)} of {len(records)} done",
        "tokens/s": middle(done, "tokens_per_s"),
        "RSS MB": middle(done, "peak_rss_mb"),
        "+ children": middle(done, "peak_tree_mb"),
        "anon. MB": middle(done, "peak_anonymous_mb"),
    }
    return noted(row, first)


def middle(records: list[Record], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return median(values) if values else None


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def show(bench: Bench, table: list[Record]) -> None:
    title = f"{bench.model}, E2E rows, rank 8, all linear layers, batch {BATCH_SIZE}, {bench.steps} steps after the first"
    console.table(f"{title}, median of {bench.repeats}", table)
