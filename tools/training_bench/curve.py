"""`curve`: the loss of every step on both sides, from the same weights, the same A, on the same token ids.

Base bits 32, precision fp32, a constant learning rate, no weight decay, no clipping. The initial A is that of a run of one
step: B is zero there, so that A has no gradient, and AdamW leaves it as it was. Ours runs twice: with products in fp32, as the
peer's are, and with bf16 operands, which `finetune` takes where the machine is faster with them.
"""

from __future__ import annotations

from pathlib import Path

from edgelora import console
from training_bench import models, rows
from training_bench.results import Record, Results
from training_bench.runs import Bench, Ours, finetune, peer

BATCH_SIZE = 8
WINDOW = 8  # steps of the smoothed curve
TOLERANCE = 0.01


def measure(bench: Bench, results: Results, steps: int) -> list[Record]:
    """Compare the curves of one model; return the table's rows."""
    folder = models.folder_of(bench.model, bench.work)
    data = rows.natural(rows.read_pairs(bench.data), bench.work)
    key = f"curve/{bench.model}/{steps}"

    def ask(name: str, count: int, compute: str = "fp32") -> Ours:
        options = {"base-bits": 32}
        return Ours(name, folder, data, count, BATCH_SIZE, precision="fp32", compute=compute, options=options)

    first, run = ask("curve-first", 1), bench.run_folder("curve")
    initial = bench.run_folder("curve-first") / "adapter_model.safetensors"
    begun = results.run(f"{key}/first", lambda: finetune(bench, first))
    ours = results.run(f"{key}/edgelora", lambda: finetune(bench, ask("curve", steps)))
    rounded = results.run(f"{key}/edgelora-bf16", lambda: finetune(bench, ask("curve-bf16", steps, "bf16")))
    for record in (begun, ours, rounded):
        if record["outcome"] != "done":
            console.warn(f"curve: a run of ours {record['outcome']}: {record['message']}")
            return []
    restore(bench, [(initial, first), (run / "log.jsonl", ask("curve", steps))])
    file = rows.write_steps(bench.work / "rows" / f"{bench.model}-curve.jsonl", run, rows.step_rows(run))
    theirs = results.run(f"{key}/peft", lambda: peer(bench, folder, file, steps, init=initial, weight_decay=0.0))
    if theirs["outcome"] != "done":
        console.warn(f"curve: the peer {theirs['outcome']}: {theirs['message']}")
        return []
    name = f"{bench.model}, {steps} steps"
    table = [
        {"what": name, **compare(ours["losses"], theirs["losses"])},
        {"what": f"{name}, bf16 operands", **compare(rounded["losses"], theirs["losses"])},
    ]
    results.part(f"curve/{bench.model}", table)
    console.table(f"Loss curves on the same rows, the same A; allowed is {TOLERANCE:.0%}", table)
    return table


def restore(bench: Bench, wanted: list[tuple[Path, Ours]]) -> None:
    """Run again what left a file that is wanted, where only its record is there from an earlier call."""
    for path, ask in wanted:
        if not path.is_file():
            finetune(bench, ask)


def compare(ours: list[float], theirs: list[float]) -> Record:
    """Return the largest relative difference of the losses, raw and as means of WINDOW steps, and both ends of the curves."""
    pairs = list(zip(ours, theirs, strict=True))
    smooth = list(zip(smoothed(ours), smoothed(theirs), strict=True))
    raw = max(abs(a - b) / b for a, b in pairs)
    worst = max(range(len(pairs)), key=lambda step: abs(pairs[step][0] - pairs[step][1]) / pairs[step][1])
    return {
        "largest difference, %": 100 * raw,
        "at step": worst + 1,
        "smoothed, %": 100 * max(abs(a - b) / b for a, b in smooth),
        "within 1%": raw <= TOLERANCE,
        "first loss": ours[0],
        "PEFT's first": theirs[0],
        "last loss": ours[-1],
        "PEFT's last": theirs[-1],
    }


def smoothed(losses: list[float]) -> list[float]:
    """Return the means of the last WINDOW steps, or of as many as there are."""
    return [sum(losses[max(0, end - WINDOW) : end]) / min(end, WINDOW) for end in range(1, len(losses) + 1)]
