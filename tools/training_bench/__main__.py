"""Measure training: EdgeLoRA beside transformers with PEFT, on this machine.

Parts (--what, separated by commas; default: all):
  speed    real tokens/s and memory of both sides in alternation, EdgeLoRA within 1/4 and 1/2 of the peer's peak and free
  curve    the loss of every step on both sides, from the same weights and adapters on the same token ids
  cgroup   batch 1 × 256 tokens in memory cgroups without swap, and the smallest that does (root only)
  rate     the share of the machine's fp32 matrix rate that steps reach
  grid     what rounding to int4 while training adds to a step of 512 tokens
  plan     predicted against measured peak and time over models × lengths × bits × batch
  budgets  20 random budgets on SmolLM2: does any run ever exceed its --ram?

DATA is a CSV file with the columns mr and ref (the E2E challenge's). The Qwen2.5 shapes have random weights, written when first
asked for. Everything measured is kept in the JSON file at once; a second call with the same file goes on where the first ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgelora import console, hardware
from training_bench import budgets, curve, grid, limits, machine, models, predictions, rate, speed
from training_bench.results import Results
from training_bench.runs import Bench

PARTS = ("speed", "curve", "cgroup", "rate", "grid", "plan", "budgets")
PLANNED = ("smollm2", "qwen-0.5b")  # the models of the `plan` part, where none is named


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    import platformdirs

    parser = argparse.ArgumentParser(
        "bench_training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=lambda text: Path(text).resolve(), required=True, metavar="FILE.csv")
    parser.add_argument("--what", type=parts, default=PARTS, metavar="PART,…")
    parser.add_argument("--model", action="append", choices=models.NAMES, help="may be given more than once; default: smollm2")
    parser.add_argument("--steps", type=at_least_one, default=8, help="steps that count, after the first; default: 8")
    parser.add_argument("--repeats", type=at_least_one, default=3, help="rounds of speed, grid and plan; default: 3")
    parser.add_argument("--curve-steps", type=at_least_one, default=40, help="default: 40")
    parser.add_argument("--precision", type=lambda text: text.split(","), default=["fp32", "int4"], help="default: fp32,int4")
    parser.add_argument("--valid-rows", type=at_least_one, default=4, help="rows of our closing table; default: 4")
    parser.add_argument("--no-bisect", action="store_true", help="cgroup: the model's own limit alone")
    parser.add_argument("--threads", type=at_least_one, default=hardware.physical_cores(), help="default: the physical cores")
    parser.add_argument("--work", type=lambda text: Path(text).resolve(), metavar="FOLDER",
                        default=Path(platformdirs.user_cache_dir("edgelora")) / "bench")  # fmt: skip
    parser.add_argument(
        "--json", dest="json_file", metavar="FILE", help="default: WORK/results.json; -: all of it on stdout too"
    )
    parser.add_argument("--anyway", action="store_true", help="measure though others keep the machine busy")
    return parser.parse_args(arguments)


def parts(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'} is no part; allowed: {', '.join(PARTS)}")
    return names


def at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def refuse_busy(facts: dict[str, Any], *, anyway: bool) -> None:
    """Raise SystemExit with code 3 on a machine that others use: its figures would say little."""
    if facts["busy"] <= machine.BUSY:
        return
    text = f"other processes keep {facts['busy']:.0%} of the processors busy; allowed: {machine.BUSY:.0%}"
    if not anyway:
        print(f"error: {text}\nhint: wait for them to end, or measure nevertheless with --anyway", file=sys.stderr)
        raise SystemExit(3)
    console.warn(text)


def peer_budgets(bench: Bench, results: Results) -> list[int | None]:
    """Return the budgets of the `rate` part: none, and those of the speed part where it was measured."""
    names = (f"speed/{bench.model}/{bench.steps}/{speed.REFERENCE}/0",)
    peaks = [results.content["runs"][name]["peak_rss_mb"] for name in names if name in results.content["runs"]]
    return [None, *(int(peak / divisor) for peak in peaks for divisor in (4, 2))]


def measure(arguments: argparse.Namespace, results: Results) -> None:
    named, planned = arguments.model or ["smollm2"], arguments.model or list(PLANNED)
    work = arguments.work
    first = Bench(work, arguments.data, arguments.steps, arguments.repeats, arguments.threads, arguments.valid_rows)

    def each(names: list[str], do: Callable[[Bench], Any]) -> list[Any]:
        return [do(dataclasses.replace(first, model=name)) for name in names]

    do: dict[str, Callable[[], Any]] = {
        "speed": lambda: each(named, lambda bench: speed.measure(bench, results, arguments.precision)),
        "curve": lambda: each(named, lambda bench: curve.measure(bench, results, arguments.curve_steps)),
        "cgroup": lambda: each(named, lambda bench: limits.measure(bench, results, bisect=not arguments.no_bisect)),
        "rate": lambda: each(named, lambda bench: rate.measure(bench, results, peer_budgets(bench, results))),
        "grid": lambda: each(named, lambda bench: grid.measure(bench, results)),
        "plan": lambda: predictions.conclude(
            [row for table in each(planned, lambda bench: predictions.measure(bench, results)) for row in table], results
        ),
        "budgets": functools.partial(budgets.measure, first, results),
    }
    for part in arguments.what:
        do[part]()


def main() -> None:
    # SIGTERM as Ctrl-C: the running child ends, and the cgroup is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = parse()
    to_stdout = arguments.json_file == "-"
    console.configure(json_output=to_stdout)
    if not arguments.data.is_file():
        raise SystemExit(f"error: no such file: {arguments.data}; a CSV file with the columns mr and ref is wanted")
    arguments.work.mkdir(parents=True, exist_ok=True)
    facts = machine.facts()
    path = arguments.work / "results.json" if to_stdout or not arguments.json_file else Path(arguments.json_file).resolve()
    results = Results(path, facts)
    console.facts("This machine", {k: ", ".join(v) if isinstance(v, list) else v for k, v in facts.items() if k != "packages"})
    refuse_busy(facts, anyway=arguments.anyway)
    measure(arguments, results)
    console.say(f"kept in {path}")
    if to_stdout:
        print(json.dumps(results.content))


if __name__ == "__main__":
    main()
