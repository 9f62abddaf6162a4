"""`rate`: the share of the machine's fp32 matrix rate that our steps reach, counting necessary operations alone.

`python -m training_bench.rate SHAPES.json` measures the matrix rate on a model's own shapes in a process of its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from edgelora import console
from training_bench import models, rows
from training_bench.processes import python, run
from training_bench.results import Record, Results, noted
from training_bench.runs import Bench, Ours, finetune
from training_bench.speed import BATCH_SIZE

HEAD_TILE = 8192  # rows of the head
SECONDS = 0.25  # for each shape, direction and library


@dataclass(frozen=True)
class Work:
    """What one step computes, on average. `linears` are the weights [N, K] of the blocks; the head is [vocab, hidden]."""

    linears: list[tuple[int, int]]
    downs: int  # weights of the last linear layers of the blocks
    layers: int
    vocab: int
    hidden: int
    tokens: float  # of a step
    supervised: float
    pieces: float  # micro-batches
    recomputed: float  # share of the blocks that backward computes again

    @property
    def weights(self) -> int:
        return sum(outputs * inputs for outputs, inputs in self.linears)

    def operations(self, *, down: bool = True) -> float:
        """Return the necessary operations of a step: forward 2·N and backward for activations 2·N for a token, 2·N again in
        recomputed blocks (without `down`: less the product whose output backward does not need), the head's forward and
        gradient 4·V·H for a supervised token. The adapters' own products are not counted.
        """
        again = 2 * self.recomputed * (self.weights - (0 if down else self.downs))
        return self.tokens * (4 * self.weights + again) + 4 * self.supervised * self.vocab * self.hidden


def measure(bench: Bench, results: Results, budgets: list[int | None]) -> list[Record]:
    """Measure one model under each budget in MB; return the table's rows. The rate is that of fp32 products, also where ours
    take bf16 operands.

    "share without" does not count the recomputed down projections, whose output backward has no need of.
    """
    folder = models.folder_of(bench.model, bench.work)
    data = rows.natural(rows.read_pairs(bench.data), bench.work)
    table = []
    for budget in budgets:
        for precision, compute in (("fp32", "fp32"), ("fp32", None), ("int4", None)):
            ask = Ours("rate", folder, data, bench.steps + 1, BATCH_SIZE, budget, precision, compute)
            name = f"rate/{bench.model}/{bench.steps}/{precision}/{compute}/{budget}"
            record = results.run(name, lambda ask=ask: beside(bench, ask))  # type: ignore[misc]
            what = [precision, *(["fp32 products"] if compute else []), f"--ram {budget}MB" if budget else "no limit"]
            table.append(row_of(", ".join(what), record))
    results.part(f"rate/{bench.model}", table)
    console.table(f"{bench.model}: share of the fp32 matrix rate on its own shapes, batch {BATCH_SIZE}", table)
    return table


def beside(bench: Bench, ask: Ours) -> Record:
    """Run once, and measure the matrix rate on the run's own shapes right before and right after."""
    first = finetune(bench, ask)  # its plan says how many rows are computed at once
    if first["outcome"] != "done":
        return first
    work = work_of(ask.model, bench.run_folder(ask.name), first["plan"])
    before = matrix_rates(bench, work)
    record = finetune(bench, ask)
    after = matrix_rates(bench, work)
    return {**record, "work": asdict(work), "operations": work.operations(),
            "operations_without_down": work.operations(down=False), "rates": [before, after]}  # fmt: skip


def row_of(name: str, record: Record) -> Record:
    if "rates" not in record:
        return noted({"what": name, "outcome": record["outcome"]}, record)
    seconds = fmean(record["step_seconds"][1:])
    sustained, best = (fmean(rate[key] for rate in record["rates"]) for key in ("gflops", "best_gflops"))
    reached = record["operations"] / seconds / 1e9
    return {
        "what": name,
        "outcome": record["outcome"],
        "s/step": seconds,
        "GFLOP/s in steps": reached,
        "matrix rate": sustained,
        "share": reached / sustained,
        "recomputed": record["work"]["recomputed"],
        "share without": record["operations_without_down"] / seconds / 1e9 / sustained,
        "of the best call": reached / best,
    }


def work_of(model: Path, run_folder: Path, plan: Record) -> Work:
    """Return what a step of a run computes on average, from the model's tensors, the log and the plan."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    linears = linear_shapes(model)
    steps = rows.step_rows(run_folder)[1:]
    logged = rows.step_log(run_folder)[1:]
    layers = int(config["num_hidden_layers"])
    micro = int(plan.get("micro_batch") or BATCH_SIZE)
    kept = plan.get("kept_blocks")
    if kept is None:
        kept = 0 if plan.get("gradient_checkpointing") else layers
    return Work(
        linears=[shape for _, shape in linears],
        downs=sum(outputs * inputs for name, (outputs, inputs) in linears if "down_proj" in name),
        layers=layers,
        vocab=int(config["vocab_size"]),
        hidden=int(config["hidden_size"]),
        tokens=fmean(line["tokens"] for line in logged),
        supervised=fmean(rows.supervised_tokens(run_folder, steps)),
        pieces=fmean(-(-len(chosen) // micro) for chosen in steps),
        recomputed=1.0 - min(int(kept), layers) / layers,
    )


def linear_shapes(model: Path) -> list[tuple[str, tuple[int, int]]]:
    """Return the name and shape [N, K] of each linear layer of the blocks."""
    found = []
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        found += [(n, (e["shape"][0], e["shape"][1])) for n, e in head.items() if ".layers." in n and len(e["shape"]) == 2]
    return found


def matrix_rates(bench: Bench, work: Work) -> Record:
    """Return {"gflops", "best_gflops", "shapes"} of the model's shapes at the tokens of a micro-batch, in a child process."""
    path = bench.work / "rows" / "shapes.json"
    tokens = max(1, round(work.tokens / work.pieces))
    targets = max(1, round(work.supervised / work.pieces))
    counts = Counter(work.linears)
    products = [{"T": tokens, "N": n, "K": k, "count": count} for (n, k), count in counts.items()]
    # The head in tiles, as it is computed: the whole of its output would not stay in any cache.
    tiles = max(1, work.vocab // HEAD_TILE)
    products.append({"T": targets, "N": work.vocab // tiles, "K": work.hidden, "count": tiles})
    path.write_text(json.dumps({"threads": bench.threads, "products": products}), encoding="utf-8")
    measured = run(python("-m", "training_bench.rate", str(path)), environment=bench.environment)
    if not measured.done:
        raise SystemExit(f"error: the matrix rate could not be measured: {measured.message}")
    return measured.result


def rates_of(threads: int, products: list[dict[str, int]]) -> Record:
    """Time x[T, K]·W[N, K]ᵀ and g[T, N]·W for each shape with each library; return the rates with the faster one for each.

    gflops: calls one after the other for SECONDS; best_gflops: the fastest calls alone. Weighted by operations.
    """
    import torch

    torch.set_num_threads(threads)
    shapes, mean_seconds, best_seconds, operations = [], 0.0, 0.0, 0.0
    for product in products:
        tokens, outputs, inputs, count = (product[name] for name in ("T", "N", "K", "count"))
        w, flops = torch.randn(outputs, inputs), 2.0 * tokens * outputs * inputs
        for way, x, weight in (("forward", torch.randn(tokens, inputs), w), ("backward", torch.randn(tokens, outputs), w.t())):
            timed = {name: time_calls(call, x, weight) for name, call in libraries(torch).items()}
            mean_seconds += count * min(mean for mean, _ in timed.values())
            best_seconds += count * min(best for _, best in timed.values())
            operations += count * flops
            shapes.append({**product, "way": way, **{name: flops / mean / 1e9 for name, (mean, _) in timed.items()}})
    return {"gflops": operations / mean_seconds / 1e9, "best_gflops": operations / best_seconds / 1e9, "shapes": shapes}


def libraries(torch: Any) -> dict[str, Callable[[Any, Any], Any]]:
    """Return x, W → x·Wᵀ with MKL and, where this torch has it, with oneDNN."""
    found: dict[str, Callable[[Any, Any], Any]] = {"mkl": lambda x, w: torch.mm(x, w.t())}
    if torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._linear_pointwise
        found["onednn"] = lambda x, w: onednn(x, w, None, "none", [], "")
    return found


def time_calls(call: Callable[[Any, Any], Any], x: Any, weight: Any) -> tuple[float, float]:
    """Return (mean, best) seconds of a call."""
    call(x, weight)
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        call(x, weight)
        times.append(time.perf_counter() - started)
    return fmean(times), min(times)


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps(rates_of(asked["threads"], asked["products"])))
