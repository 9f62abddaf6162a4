"""Measure every task: real rows through the whole line, and one table.

A row trains within about three minutes, with the commands and defaults that a user has; --list shows what there is. Figures of
the test rows, which neither training nor the choice of the best step has seen; "base" of a model whose head is new is from the
run's own validation rows. "head only" trains the head on the frozen base (--target-modules none). "min" is what finetune
took, "peak MB" what its process had at most (and what the plan said before), "ms" one input in `edgelora bench`.

Every command's result is kept in the JSON file at once: a second call goes on where the first ended, --only NAME measures one
row, --again measures it anew, and --show FILE… prints the table of files without measuring anything.
"""

from __future__ import annotations

import argparse
import functools
import signal
from pathlib import Path

from training_bench import machine
from training_bench.results import Results

from edgelora import console, hardware
from tasks_bench import table, wrong
from tasks_bench.entry import Missing, Places
from tasks_bench.line import Failed, measure
from tasks_bench.rows import ENTRIES

NAMES = tuple(entry.name for entry in ENTRIES)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    import platformdirs

    cache = Path(platformdirs.user_cache_dir("edgelora")) / "bench-tasks"
    parser = argparse.ArgumentParser("bench_tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=whole, metavar="FOLDER", help="the data sets, named as --list shows them")
    parser.add_argument("--models", type=whole, default=cache / "models", metavar="FOLDER", help="pretrained models: whisper/")
    parser.add_argument("--extra", action="append", type=named, default=[], metavar="NAME=PATH", help="a data set elsewhere")
    parser.add_argument("--only", action="append", choices=NAMES, metavar="NAME", help="may be given more than once")
    parser.add_argument("--again", action="store_true", help="measure these rows anew")
    parser.add_argument("--threads", type=int, default=hardware.physical_cores(), help="default: the physical cores")
    parser.add_argument("--work", type=whole, default=cache, metavar="FOLDER", help=f"what is made. Default: {cache}")
    parser.add_argument("--json", type=whole, dest="json_file", metavar="FILE", help="default: WORK/results.json")
    parser.add_argument("--show", type=whole, nargs="+", metavar="FILE", help="print the table of these files, measure nothing")
    parser.add_argument("--wrong-inputs", action="store_true", help="what each task says to broken rows, instead of the table")
    parser.add_argument("--list", action="store_true", dest="list_rows", help="the rows, cheapest first")
    return parser.parse_args(arguments)


def whole(text: str) -> Path:
    return Path(text).expanduser().resolve()


def named(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=PATH")
    return name, whole(path)


def run(arguments: argparse.Namespace, results: Results) -> None:
    """Measure the rows that were asked for; one that fails or lacks its data does not stop the others."""
    places = Places(arguments.data, arguments.models, arguments.work, dict(arguments.extra))
    for entry in ENTRIES:
        if entry.name not in (arguments.only or NAMES):
            continue
        part = f"{table.PART}{entry.name}"
        if arguments.again:
            kept = results.content["runs"].items()
            results.content["runs"] = {name: run for name, run in kept if not name.startswith(f"{entry.name}/")}
            results.content["parts"].pop(part, None)
        known = results.content["parts"].get(part)
        if known is not None and (known["head"] is not None or not entry.has_head):
            continue
        try:
            measure(entry, places, results, arguments.threads, functools.partial(results.part, part))
        except (Missing, Failed) as problem:
            console.warn(f"{entry.name}: {problem}")


def show(paths: list[Path]) -> None:
    rows = [table.shown(row) for row in table.collected([path for path in paths if path.is_file()]).values()]
    if rows:
        print(markdown(rows))


def markdown(rows: list[dict[str, object]]) -> str:
    """Return rows as a table of Markdown, which a file or a terminal of any width takes."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(map(str, row.values())) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the running child ends
    arguments = parse()
    if arguments.list_rows:
        print(markdown([{"name": e.name, "task": e.task, "model": e.model, "data": e.data} for e in ENTRIES]))
        return
    if arguments.show:
        show(arguments.show)
        return
    if arguments.wrong_inputs:
        print(markdown(wrong.answers(arguments.work)))
        return
    if arguments.data is None or not arguments.data.is_dir():
        raise SystemExit("error: --data is missing or no folder; --list shows the data sets that are wanted")
    arguments.work.mkdir(parents=True, exist_ok=True)
    path = arguments.json_file or arguments.work / "results.json"
    results = Results(path, machine.facts())
    run(arguments, results)
    console.say(f"kept in {path}")
    show([path])


if __name__ == "__main__":
    main()
