"""Print the closing tables of the quickstart from the JSON that its steps left, and write quickstart/report.json."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgelora import console, hardware
from edgelora.folder import write_json

FOLDER = Path("quickstart")
EVALUATED = {"base": "evaluate-base", "adapter": "evaluate-adapter", "merged int4 ONNX": "evaluate-bundle"}
STAGES = ("plan", "finetune", "merge", "export", *EVALUATED.values(), "after", "bench")


def read_step(name: str) -> dict[str, Any]:
    """Return what quickstart_step.py wrote: arguments, seconds, peak_rss_mb, result."""
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


def quality_rows() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for model, step in EVALUATED.items():
        metrics = read_step(step)["result"]["metrics"]
        rows.append({"model": model, "exact match": f"{metrics['exact_match']:.1%}", "loss": round(metrics["loss"], 4)})
    return rows


def stage_rows() -> list[dict[str, object]]:
    steps = {name: read_step(name) for name in STAGES}
    return [{"stage": n, "seconds": round(s["seconds"], 1), "peak RAM, MB": round(s["peak_rss_mb"])} for n, s in steps.items()]


def outputs(step: str) -> list[str]:
    """Return the answers of an `edgelora run` step, one for each prompt."""
    output = read_step(step)["result"]["output"]
    return [output] if isinstance(output, str) else list(output)


def answer_rows() -> list[dict[str, object]]:
    arguments: Sequence[str] = read_step("after")["arguments"]
    prompts = arguments[2 : 2 + len(outputs("after"))]
    return [
        {"prompt": prompt, "before": " ".join(before.split()), "after": after.strip()}
        for prompt, before, after in zip(prompts, outputs("before"), outputs("after"), strict=True)
    ]


def size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / (1 << 20)


def bundle_facts() -> dict[str, float]:
    bench, finetune = read_step("bench")["result"], read_step("finetune")["result"]
    return {
        "bundle_mb": round(size_mb(FOLDER / "bundle"), 1),
        "decode_tokens_per_s": round(bench["decode_tokens_per_s"], 1),
        "prefill_tokens_per_s": round(bench["prefill_tokens_per_s"], 1),
        "load_s": round(bench["load_s"], 2),
        "run_peak_mb": round(bench["peak_rss_mb"], 1),
        "train_tokens_per_s": round(finetune["tokens_per_s"], 1),
        "train_peak_mb": round(finetune["peak_rss_mb"], 1),
    }


def main() -> None:
    machine = f"{hardware.physical_cores()} cores, {platform.machine()}, {hardware.memory_limit() / (1 << 30):.0f} GB"
    rows_held_out = read_step("evaluate-bundle")["result"]["rows"]
    report = {"machine": machine, "quality": quality_rows(), "stages": stage_rows(), "answers": answer_rows(), **bundle_facts()}
    write_json(FOLDER / "report.json", report)
    console.configure(json_output=False)
    console.table(f"{rows_held_out} held-out rows", quality_rows())
    console.table(f"Stages, on {machine}", stage_rows())
    console.table("Answers", answer_rows())
    console.facts(
        "The bundle quickstart/bundle",
        {
            "size": f"{report['bundle_mb']} MB",
            "decode": f"{report['decode_tokens_per_s']} tokens/s",
            "prefill": f"{report['prefill_tokens_per_s']} tokens/s",
            "load": f"{report['load_s']} s",
            "peak RAM": f"{report['run_peak_mb']} MB",
            "try it": '.venv/bin/edgelora run quickstart/bundle "dim the kitchen lights to forty percent"',
        },
    )


if __name__ == "__main__":
    main()
