"""Measure merging: what is left of an adapter in the bundle that ships, beside PEFT's merge with other tools' 4 bits.

Parts (--what, separated by commas; default: all):
  e2e      SmolLM2, E2E rows: our int4 bundle; PEFT merge + round to nearest, + onnxruntime-genai's builder, + GPTQ
  banking  MiniLM, Banking77: accuracy of the fp32 adapter and of the int4 and int8 bundles
  peft     an adapter that PEFT trained, merged into 4 bits by `edgelora merge --calibrate`: the share of the gain kept
  scales   block scales trained alone: memory, loss, size of the delta, and the delta on a base bundle
  bits     every precision that training knows: loss, size, speed of decoding

--e2e FILE.csv has the columns mr and ref (the E2E challenge's), --banking FILE.csv text and category (Banking77's). Each part
trains on most rows and scores others that no training has seen; all losses are one evaluator's, token-weighted, on the same
tokens. The peers run in environments of their own, made with pip in the work folder on first use (3 GB). Everything measured is
kept in the JSON file at once; a second call with the same file and work folder goes on where the first ended.
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training_bench import machine
from training_bench.__main__ import at_least_one
from training_bench.results import Results

from edgelora import console, hardware
from merge_bench import banking, bits, e2e, foreign, scales
from merge_bench.bench import Bench

PARTS = ("e2e", "banking", "peft", "scales", "bits")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    import platformdirs

    parser = argparse.ArgumentParser("bench_merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--e2e", type=existing, metavar="FILE.csv", help="needed by every part but banking")
    parser.add_argument("--banking", type=existing, metavar="FILE.csv", help="needed by banking")
    parser.add_argument("--what", type=parts, default=PARTS, metavar="PART,…")
    parser.add_argument("--steps", type=at_least_one, default=300, help="optimizer steps of SmolLM2; default: 300")
    parser.add_argument("--rows", type=at_least_one, default=256, help="held-out rows of E2E; default: 256")
    parser.add_argument("--banking-steps", type=at_least_one, default=750, help="optimizer steps of MiniLM; default: 750")
    parser.add_argument(
        "--peft-adapter", type=existing, metavar="FOLDER", help="an adapter of SmolLM2, used for ours and PEFT's"
    )
    parser.add_argument("--config", type=existing, metavar="FILE.toml", help="settings of every training of ours")
    parser.add_argument("--threads", type=at_least_one, default=hardware.physical_cores(), help="default: the physical cores")
    parser.add_argument("--work", type=lambda text: Path(text).resolve(), metavar="FOLDER",
                        default=Path(platformdirs.user_cache_dir("edgelora")) / "bench")  # fmt: skip
    parser.add_argument("--json", dest="json_file", metavar="FILE", help="default: WORK/merge.json; -: all of it on stdout too")
    found = parser.parse_args(arguments)
    text, labels = set(found.what) - {"banking"}, "banking" in found.what
    needed = {"--e2e": found.e2e or not text, "--banking": found.banking or not labels}
    if missing := [name for name, there in needed.items() if not there]:
        parser.error(f"{', '.join(missing)} FILE.csv is needed by --what {','.join(found.what)}")
    return found


def parts(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'} is no part; allowed: {', '.join(PARTS)}")
    return names


def existing(text: str) -> Path:
    path = Path(text).resolve()
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return path


def measure(arguments: argparse.Namespace, results: Results) -> None:
    bench = Bench(arguments.work, results, arguments.steps, arguments.rows, arguments.threads, arguments.config)
    do: dict[str, Callable[[], Any]] = {
        "e2e": lambda: e2e.measure(bench, arguments.e2e, arguments.peft_adapter),
        "banking": lambda: banking.measure(bench, arguments.banking, arguments.banking_steps),
        "peft": lambda: foreign.measure(bench, arguments.e2e, arguments.peft_adapter),
        "scales": lambda: scales.measure(bench, arguments.e2e),
        "bits": lambda: bits.measure(bench, arguments.e2e),
    }
    for part in arguments.what:
        do[part]()
    required = [row for found in results.content["parts"].values() for row in found["requirements"]]
    console.table(f"All that is required, as {results.path.name} has it", required)


def main() -> None:
    # SIGTERM as Ctrl-C: the running child ends too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = parse()
    to_stdout = arguments.json_file == "-"
    console.configure(json_output=to_stdout)
    arguments.work.mkdir(parents=True, exist_ok=True)
    facts = machine.facts()
    path = arguments.work / "merge.json" if to_stdout or not arguments.json_file else Path(arguments.json_file).resolve()
    results = Results(path, facts)
    console.facts("This machine", {k: ", ".join(v) if isinstance(v, list) else v for k, v in facts.items() if k != "packages"})
    measure(arguments, results)
    console.say(f"kept in {path}")
    if to_stdout:
        print(json.dumps(results.content))


if __name__ == "__main__":
    main()
