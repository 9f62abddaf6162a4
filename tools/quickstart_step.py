"""Run one visible `edgelora` command of the quickstart and keep what it printed, its time and its peak memory.

    quickstart_step.py NAME VERB ARGUMENT…     → quickstart/NAME.json: command, seconds, peak_rss_mb, result

Like make: a step whose JSON is newer than every file among its arguments is not run again.
"""

from __future__ import annotations

import json
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path("quickstart")


def newest(path: Path) -> float:
    """Return when the newest file in or at `path` was written; 0.0 where there is none."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return max((file.stat().st_mtime for file in files), default=0.0)


def output_of(arguments: list[str]) -> Path | None:
    return Path(arguments[arguments.index("-o") + 1]) if "-o" in arguments else None


def is_done(record: Path, arguments: list[str]) -> bool:
    """Tell whether `record` holds the result of this very command, made after its inputs and with its output still there."""
    output = output_of(arguments)
    if not record.is_file() or (output is not None and not output.exists()):
        return False
    inputs = [Path(argument) for argument in arguments if "\n" not in argument and len(argument) < 200]
    same = json.loads(record.read_text(encoding="utf-8"))["arguments"] == arguments
    return same and all(newest(path) <= record.stat().st_mtime for path in inputs if path.exists())


def again(arguments: list[str]) -> list[str]:
    """Return the flag that a command needs when its output folder is there already: an unfinished run is resumed."""
    output = output_of(arguments)
    if output is None or not output.exists():
        return []
    manifest = output / "edgelora.json"
    unfinished = manifest.is_file() and not json.loads(manifest.read_text(encoding="utf-8")).get("complete")
    return ["--resume"] if unfinished and arguments[0] == "finetune" else ["--overwrite"]


def peak_rss_mb() -> float:
    """Return the peak of the largest process that this one has waited for; Linux counts in KB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main() -> None:
    name, *arguments = sys.argv[1:]
    record = FOLDER / f"{name}.json"
    done = is_done(record, arguments)
    extra = [] if done else again(arguments)
    print(f"\n$ edgelora {shlex.join([*arguments, *extra])}", file=sys.stderr, flush=True)
    if done:
        print(f"  done before: {record}", file=sys.stderr)
        return
    FOLDER.mkdir(exist_ok=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "edgelora", *arguments, *extra, "--json"]
    process = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if process.returncode:
        sys.exit(process.returncode)
    content = {
        "arguments": arguments,
        "seconds": round(time.perf_counter() - start, 2),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "result": json.loads(process.stdout),
    }
    record.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
