"""Measure a decoder on this machine: EdgeLoRA's int4 bundle beside llama.cpp and onnxruntime-genai, in alternation.

Every side runs in a process and an environment of its own, on the same tokens and threads, greedily: prefill of a prompt,
decode of the tokens after it, both without speculation or a prefix cache; load with imports, peak and anonymous memory. The
environments are made with pip in the work folder on first use (llama.cpp is compiled: minutes; 2 GB), and so are the models.
Everything measured is kept in the JSON file at once; a second call with the same file goes on where the first ended.
"""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path

from training_bench import machine, models
from training_bench.__main__ import at_least_one, refuse_busy
from training_bench.results import Results

from device_bench import speed
from edgelora import console, hardware


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    import platformdirs

    parser = argparse.ArgumentParser("bench_device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=models.NAMES, help="may be given more than once; default: smollm2")
    parser.add_argument("--bundle", action="append", type=Path, default=[], metavar="FOLDER",
                        help="of this model, in the place of a default export; may be given more than once")  # fmt: skip
    parser.add_argument("--repeats", type=at_least_one, default=5, help="processes of each side; default: 5")
    parser.add_argument("--prompt-tokens", type=at_least_one, default=256, help="default: 256")
    parser.add_argument("--new-tokens", type=at_least_one, default=128, help="default: 128")
    parser.add_argument("--threads", type=at_least_one, default=hardware.physical_cores(), help="default: the physical cores")
    parser.add_argument("--work", type=lambda text: Path(text).resolve(), metavar="FOLDER",
                        default=Path(platformdirs.user_cache_dir("edgelora")) / "bench")  # fmt: skip
    parser.add_argument("--json", dest="json_file", metavar="FILE", help="default: WORK/device.json; -: on stdout too")
    parser.add_argument("--anyway", action="store_true", help="measure though others keep the machine busy")
    return parser.parse_args(arguments)


def main() -> None:
    # SIGTERM as Ctrl-C: the running child ends too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = parse()
    to_stdout = arguments.json_file == "-"
    console.configure(json_output=to_stdout)
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    facts = machine.facts()
    path = work / "device.json" if to_stdout or not arguments.json_file else Path(arguments.json_file).resolve()
    results = Results(path, facts)
    console.facts("This machine", {k: ", ".join(v) if isinstance(v, list) else v for k, v in facts.items() if k != "packages"})
    refuse_busy(facts, anyway=arguments.anyway)
    for model in arguments.model or [models.SMOLLM2]:
        speed.measure(
            model, results, work, bundles=[path.resolve() for path in arguments.bundle], rounds=arguments.repeats,
            threads=arguments.threads, lengths=(arguments.prompt_tokens, arguments.new_tokens),
        )  # fmt: skip
    console.say(f"kept in {path}")
    if to_stdout:
        print(json.dumps(results.content))


if __name__ == "__main__":
    main()
