"""Write the generated blocks of README.md: tasks, help, settings, and what quickstart and training benchmark measured.

    python tools/readme.py                                       # rewrite the blocks
    python tools/readme.py --check                               # exit code 1 where README.md is stale
    python tools/readme.py --measured quickstart/report.json     # keep new figures in tools/readme_figures.json, then rewrite
    python tools/readme.py --training results.json …             # the same with tools/bench_training's, readme_training.json
    python tools/readme.py --device device.json …                # the same with tools/bench_device's, readme_device.json
    python tools/readme.py --measured-tasks results.json …       # the same with tools/bench_tasks's, readme_tasks.json
    python tools/readme.py --merging results.json …              # the same with tools/bench_merge's, readme_merging.json

A block is everything between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import readme_device
import readme_merging
import readme_tasks
import readme_training

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FIGURES = ROOT / "tools" / "readme_figures.json"
TRAINING = ROOT / "tools" / "readme_training.json"
DEVICE = ROOT / "tools" / "readme_device.json"
MERGING = ROOT / "tools" / "readme_merging.json"
TASKS_MEASURED = ROOT / "tools" / "readme_tasks.json"
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown_table(rows: list[dict[str, object]]) -> str:
    """Return rows as a Markdown table; numbers are right-aligned, and a dash that stands for one."""
    names = list(rows[0])
    rules = ["---:" if all(isinstance(row[name], int | float) or row[name] == "–" for row in rows) else "---" for name in names]
    lines = [names, rules, *([str(row[name]).replace("|", "\\|") for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figures(path: Path = FIGURES) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def results() -> str:
    """The quickstart's measured figures, with the machine that they were measured on."""
    found = figures()
    if not found:
        return "Run `./tools/quickstart`: it ends with the figures of your machine."
    rows: list[dict[str, object]] = [
        {"": "training speed, real tokens/s", "measured": found["train_tokens_per_s"]},
        {"": "training, peak RAM, MB", "measured": found["train_peak_mb"]},
        {"": "int4 bundle, MB", "measured": found["bundle_mb"]},
        {"": "prefill, 256 tokens, tokens/s", "measured": found["prefill_tokens_per_s"]},
        {"": "decode, 128 tokens, tokens/s", "measured": found["decode_tokens_per_s"]},
        {"": "load, s", "measured": found["load_s"]},
        {"": "run, peak RAM, MB", "measured": found["run_peak_mb"]},
    ]
    head = f"SmolLM2-135M-Instruct, home commands → JSON calls, as `./tools/quickstart` measured it on {found['machine']}:"
    return "\n\n".join([head, markdown_table(found["quality"]), markdown_table(rows)])


def benchmark(path: Path, tool: str, tables: Callable[[Any], Iterable[tuple[str, list[dict[str, object]]]]]) -> str:
    """What a benchmark measured and this page keeps in `path`: its tables, each below its title."""
    found = figures(path)
    if not found:
        return f"Run `./tools/{tool}`, as below: it prints the tables of your machine and keeps them as JSON."
    parts = [f"As `./tools/{tool}` measured it on {found['machine']}:"]
    for title, rows in tables(found):
        parts += [title, markdown_table(rows)]
    return "\n\n".join(parts)


def training() -> str:
    """What training costs beside its peer."""
    return benchmark(TRAINING, "bench_training", readme_training.tables)


def merging() -> str:
    """What is left of an adapter in the bundle that ships."""
    return benchmark(MERGING, "bench_merge", readme_merging.tables)


def device() -> str:
    """What a decoder does beside other runtimes."""
    return benchmark(DEVICE, "bench_device", readme_device.tables)


def measured_tasks() -> str:
    """What each task came to on real rows, as the benchmark measured it."""
    found = figures(TASKS_MEASURED)
    if not found:
        return "Run `./tools/bench_tasks`, as below: it prints the table of your machine and keeps it as JSON."
    head = f"As `./tools/bench_tasks` measured it on {found['machine']}; {readme_tasks.circumstances(found['rows'])}:"
    parts = [head]
    for title, rows in readme_tasks.groups(found["rows"]):
        notes = [f"- {', '.join(f'`{name}`' for name in names)}: {note}" for note, names in readme_tasks.notes(rows).items()]
        parts += [title, *map(markdown_table, readme_tasks.tables(rows)), *(["\n".join(notes)] if notes else [])]
    return "\n\n".join(parts)


def session() -> str:
    """Prompts and answers, before and after, as the quickstart printed them."""
    found = figures()
    if not found:
        return "The quickstart prints its session: each command, and three prompts with the answers before and after."
    lines = []
    for row in found["answers"]:
        before = textwrap.shorten(row["before"], 110, placeholder=" …")
        lines += [f'$ edgelora run quickstart/base "{row["prompt"]}"', before]
        lines += [f'$ edgelora run quickstart/bundle "{row["prompt"]}"', row["after"], ""]
    return "```console\n" + "\n".join(lines).rstrip() + "\n```"


def tasks() -> str:
    from edgelora.tasks import TASKS, get_task

    rows: list[dict[str, object]] = []
    for name in TASKS:
        task = get_task(name)
        columns = " or ".join(" + ".join(f"`{column}`" for column in shape) for shape in task.shapes)
        rows.append({"task": f"`{name}`", "columns": columns, "metrics": ", ".join(task.metrics), "models": task.families})
    return markdown_table(rows)


def command_help(*path: str) -> str:
    """Return what `edgelora [VERB] --help` prints, at a fixed width."""
    import click

    from edgelora.cli.main import cli

    command: click.Command = cli.commands[path[0]] if path else cli
    context = click.Context(command, info_name=" ".join(["edgelora", *path]), terminal_width=100, max_content_width=100)
    return command.get_help(context)


def help_text() -> str:
    """`edgelora --help`, and every verb's help, folded."""
    from edgelora.cli.main import cli

    blocks = [f"```text\n{command_help()}\n```"]
    for verb in cli.commands:
        summary = f"<details><summary><code>edgelora {verb} --help</code></summary>"
        blocks.append(f"{summary}\n\n```text\n{command_help(verb)}\n```\n\n</details>")
    return "\n\n".join(blocks)


def toml_value(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml_value(inner)}" for key, inner in value.items()) + " }"
    return json.dumps(value)


# What the annotated TOML shows for settings whose default is "chosen for you".
SHOWN = {
    "batch_size": 8,
    "task": "text-generation", "columns": {"prompt": "mr", "completion": "ref"}, "ram": "1GB", "alpha": 16.0,
    "target_modules": "all-linear", "last_layers": 4, "learning_rate": 0.001, "max_steps": 60, "max_length": 512,
    "base_bits": 8, "threads": 2, "valid": "0.1", "micro_batch": 4, "compute": "fp32", "gradient_checkpointing": True,
    "patience": 2, "grid_start": "calibrated", "grid_scales": "learned", "loraplus_ratio": 16.0,
    "rank_pattern": {"down_proj": 16}, "alpha_pattern": {"down_proj": 32.0}, "optimizer_bits": 32,
}  # fmt: skip


def settings() -> str:
    """Every setting of `finetune` as TOML, with its default and its help; those without a fixed default are commented out."""
    from edgelora.config import FinetuneConfig

    lines = []
    for field in dataclasses.fields(FinetuneConfig):
        shown = field.default if field.default is not None else SHOWN[field.name]
        line = f"{'' if field.default is not None else '# '}{field.name} = {toml_value(shown)}"
        choices = field.metadata["choices"]
        allowed = f" One of {', '.join(map(str, choices))}." if choices else ""
        lines.append(f"{line:<48}  # {field.metadata['help']}{allowed}")
    return "```toml\n" + "\n".join(lines) + "\n```"


BLOCKS: dict[str, Callable[[], str]] = {
    "results": results, "training": training, "session": session, "tasks": tasks, "measured_tasks": measured_tasks,
    "device": device, "merging": merging,
    "help": help_text, "settings": settings,
}  # fmt: skip


def generate(text: str) -> str:
    """Return README text with every generated block written anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", text)


def keep(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--measured", type=Path, help="the report that the quickstart wrote")
    parser.add_argument("--training", type=Path, nargs="+", metavar="FILE", help="results of tools/bench_training; merged")
    parser.add_argument("--device", type=Path, nargs="+", metavar="FILE", help="results of tools/bench_device; merged")
    parser.add_argument("--merging", type=Path, nargs="+", metavar="FILE", help="results of tools/bench_merge; merged")
    parser.add_argument("--measured-tasks", type=Path, nargs="+", metavar="FILE", help="results of tools/bench_tasks; merged")
    arguments = parser.parse_args()
    if arguments.measured:
        shutil.copyfile(arguments.measured, FIGURES)
    if arguments.training:
        keep(TRAINING, readme_training.condense(arguments.training, figures(TRAINING)))
    if arguments.device:
        keep(DEVICE, readme_device.condense(arguments.device))
    if arguments.merging:
        keep(MERGING, readme_merging.condense(arguments.merging))
    if arguments.measured_tasks:
        keep(TASKS_MEASURED, readme_tasks.condense(arguments.measured_tasks, figures(TASKS_MEASURED)))
    before = README.read_text(encoding="utf-8")
    after = generate(before)
    if arguments.check and before != after:
        sys.exit("README.md is stale; run: python tools/readme.py")
    if before != after:
        README.write_text(after, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
