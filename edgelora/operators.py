"""`edgelora bench --operators`: where a bundle's time goes, by operator, seen in a process apart.

Decoders that kernels of our own run are timed by those: a clock is read after each operation, when all threads have met.
Everything else is as ONNX Runtime's profiler sees it.

Its file has an event for each node that ran ("Node", …_kernel_time) and for each run ("Session", model_run), with `ts` and
`dur` in µs. What a run takes beside its nodes is ONNX Runtime's own. The profiler itself costs about 1 µs for each node.
Source: https://onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from edgelora import bench

ELSEWHERE = "between the nodes"
SHOWN = 12  # operators of each kind of run; the smaller ones are summed up
Event = Mapping[str, Any]


class Run(NamedTuple):
    """One run of a session and its nodes."""

    what: str  # the kind of run: "one token", "256 tokens", or "one input"
    us: float
    nodes: list[Event]


def operators(bundle: str | Path, *, threads: int) -> list[dict[str, Any]]:
    """Return rows: run (its kind), operator, nodes (a run has), ms (a run), percent (of the run). Raises MachineError."""
    found = bench.in_child(Path(bundle), threads, module="edgelora.operators")
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def measure(bundle: Path, threads: int) -> dict[str, list[dict[str, Any]]]:
    """The child: load with the profiler on, run as `bench` does, and return {"rows"} of what it wrote."""
    from edgelora.native.library import NativeDecoder
    from edgelora.run.model import load
    from edgelora.run.session import profiling

    model = load(bundle, threads=threads)
    if model.task == "text-generation" and isinstance(engine := model.generator.decoder.engine, NativeDecoder):
        return {"rows": [row for name, ids in native_runs() for row in native_rows(engine, model, name, ids)]}
    del model
    with tempfile.TemporaryDirectory() as folder:
        with profiling(Path(folder)):
            model = load(bundle, threads=threads)
            bench.timer_of(model)(model)
            del model  # sessions write their files when they end
            gc.collect()
        files = sorted(Path(folder).iterdir())
        sessions = [runs(json.loads(file.read_text(encoding="utf-8"))) for file in files]
        return {"rows": [row for session in sessions for row in table(session)]}


def native_runs() -> list[tuple[str, list[int]]]:
    return [(f"{bench.PROMPT_TOKENS} tokens", list(range(100, 100 + bench.PROMPT_TOKENS))), ("one token", [100])]


def native_rows(engine: Any, model: Any, name: str, ids: list[int]) -> list[dict[str, Any]]:
    """Return rows of a prompt, or of a token after one."""
    decoder = model.generator.decoder
    decoder.rewind(0)
    start = 0 if len(ids) > 1 else bench.PROMPT_TOKENS
    decoder.prefill(list(range(100, 100 + bench.PROMPT_TOKENS)))  # touches fresh memory
    seconds = engine.clock()
    count = 4 if len(ids) > 1 else bench.NEW_TOKENS
    began = time.perf_counter()
    for _ in range(count):
        decoder.rewind(start)
        decoder.prefill(ids)
    whole = 1e6 * (time.perf_counter() - began)
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for operator, spent in zip(engine.program.names, seconds, strict=True):
        times[operator] += 1e6 * spent
        counts[operator] += count
    return shown(name, times, counts, whole, count)


def runs(events: Iterable[Event]) -> Iterator[Run]:
    """Give the runs of one session, in order. A run's nodes are those that began while it lasted."""
    events = sorted((event for event in events if "dur" in event), key=lambda event: event["ts"])
    nodes = iter([event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")])
    node = next(nodes, None)
    for run in (event for event in events if event["name"] == "model_run"):
        inside: list[Event] = []
        while node is not None and node["ts"] <= run["ts"] + run["dur"]:
            inside.append(node)
            node = next(nodes, None)
        yield Run(kind(inside), run["dur"], inside)


def kind(nodes: Iterable[Event]) -> str:
    """Return what a run was given, by the input of its first attention with a cache; other models take an input at a time."""
    for node in nodes:
        if node["args"]["op_name"] == "GroupQueryAttention":
            shape = next(iter(node["args"]["input_type_shape"][0].values()))
            return "one token" if shape[1] == 1 else f"{shape[1]} tokens"
    return "one input"


def table(found: Iterable[Run]) -> list[dict[str, Any]]:
    """Return rows for each kind of run, of its second half: the first one touches fresh memory."""
    kinds: dict[str, list[Run]] = defaultdict(list)
    for run in found:
        kinds[run.what].append(run)
    return [row for name, all_runs in kinds.items() for row in rows_of(name, all_runs[len(all_runs) // 2 :])]


def rows_of(name: str, found: list[Run]) -> list[dict[str, Any]]:
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for node in (node for run in found for node in run.nodes):
        times[label(node)] += node["dur"]
        counts[label(node)] += 1
    return shown(name, times, counts, sum(run.us for run in found), len(found))


def shown(name: str, times: Mapping[str, float], counts: Mapping[str, int], whole: float, number: int) -> list[dict[str, Any]]:
    """Return the rows of `number` runs of a kind: each operator's µs, how often it ran, and `whole`, of them all."""
    ordered = sorted(times, key=lambda key: -times[key])
    groups = [[key] for key in ordered[:SHOWN]] + ([ordered[SHOWN:]] if ordered[SHOWN:] else [])
    lines = [
        (group[0] if index < SHOWN else "others", sum(counts[key] for key in group), sum(times[key] for key in group))
        for index, group in enumerate(groups)
    ]
    lines += [(ELSEWHERE, 0, whole - sum(times.values())), ("all of it", sum(counts.values()), whole)]
    return [
        {
            "run": name,
            "operator": operator,
            "nodes": round(count / number),
            "ms": round(us / 1000 / number, 3),
            "percent": round(100 * us / whole, 1),
        }
        for operator, count, us in lines
    ]


def label(node: Event) -> str:
    """Return the operator and, of a product, the layer without its number: "MatMulNBits gate_proj+up_proj"."""
    operator = str(node["args"]["op_name"])
    layer = str(node["name"]).partition("/")[0].rpartition(".")[2]
    return f"{operator} {layer}" if "MatMul" in operator and "/" in str(node["name"]) else operator


if __name__ == "__main__":
    sys.exit(bench.main(measure, *sys.argv[1:]))
