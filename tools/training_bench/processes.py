"""Run one measured process, and watch its memory and its children's while it runs.

Linux tells the figures in /proc/PID/status; where that is absent only the system's own peak of a child is known.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from training_bench import machine

INTERVAL_SECONDS = 0.05  # 20 looks a second; one costs about 0.1 ms
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Measured:
    """What a process did and took. `result` is the JSON object of its stdout, empty where it failed."""

    command: list[str]
    exit_code: int
    seconds: float
    peak_rss_mb: float  # of the largest process, by the system's own high-water mark
    peak_tree_mb: float  # resident memory of all its processes together, at the worst look
    peak_anonymous_mb: float | None  # the part of it that no file backs
    others_busy: float  # share of the processors that other processes used meanwhile
    message: str = ""  # the end of stderr where it failed
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.exit_code == 0

    @property
    def outcome(self) -> str:
        """ "done", "refused" (exit code 3: the machine can't), "killed" (by the kernel) or "failed"."""
        return {0: "done", 3: "refused", -9: "killed", 137: "killed"}.get(self.exit_code, "failed")

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "outcome": self.outcome}


def child_environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Return the environment in which a child finds edgelora and this package, wherever it was started."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH")]))
    # Modules of a clone are kept compiled, as pip keeps those that it installs: else each process would compile them anew.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": path, **(extra or {})}


def python(*arguments: str) -> list[str]:
    """Return a command of this interpreter; -P: no module of the current folder shadows another."""
    return [sys.executable, "-P", *arguments]


def run(command: list[str], *, environment: dict[str, str] | None = None, timeout: float = 7200.0) -> Measured:
    """Run a command to its end and return what it took. A process over `timeout` seconds is ended: exit code 124."""
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:
        busy, started = machine.busy_seconds(), time.perf_counter()
        child = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, env=child_environment(environment))
        try:
            peaks, code, used = watch(child, started + timeout)
        except BaseException:  # Ctrl-C: nothing is left behind that would disturb what is measured next
            child.kill()
            child.wait()
            raise
        seconds = time.perf_counter() - started
        others = (machine.busy_seconds() - busy - used[1]) / seconds / (os.cpu_count() or 1)
        out.seek(0)
        err.seek(0)
        result = last_object(out.read()) if code == 0 else {}
        message = "" if code == 0 else ending(err.read().decode(errors="replace"))
    anonymous = peaks["anonymous"] if peaks["anonymous"] else None
    # Linux starts a child's own high-water mark at its parent's: it is the last resort.
    peak = max(peaks["largest"], float(result.get("peak_rss_mb") or 0.0)) or used[0]
    return Measured(command, code, seconds, peak, max(peaks["tree"], peak), anonymous, max(0.0, others), message, result)


def watch(child: subprocess.Popen[bytes], deadline: float) -> tuple[dict[str, float], int, tuple[float, float]]:
    """Wait for a child; return its peaks in MB, its exit code, and the system's (peak MB, processor seconds) of it."""
    peaks = {"largest": 0.0, "tree": 0.0, "anonymous": 0.0}
    late = False
    while True:
        if not late and time.perf_counter() > deadline:
            child.kill()
            late = True
        if hasattr(os, "wait4"):
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                child.returncode = os.waitstatus_to_exitcode(status)
                peak = usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
                return peaks, 124 if late else child.returncode, (peak, usage.ru_utime + usage.ru_stime)
        elif child.poll() is not None:
            return peaks, 124 if late else child.returncode, (0.0, 0.0)
        look(child.pid, peaks)
        time.sleep(INTERVAL_SECONDS)


def look(pid: int, peaks: dict[str, float]) -> None:
    """Raise `peaks` to what a process and its children have now."""
    found = [memory(member) for member in family(pid)]
    peaks["largest"] = max([peaks["largest"], *(high for high, _, _ in found)])
    peaks["tree"] = max(peaks["tree"], sum(rss for _, rss, _ in found))
    peaks["anonymous"] = max(peaks["anonymous"], sum(anonymous for _, _, anonymous in found))


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    members = [pid]
    for member in members:
        for path in Path(f"/proc/{member}/task").glob("*/children"):
            members += [int(child) for child in read(path).split()]
    return members


def memory(pid: int) -> tuple[float, float, float]:
    """Return MB of a process: the most it ever had resident, what it has now, and the anonymous part of that; 0 when gone."""
    values = dict.fromkeys(("VmHWM", "VmRSS", "RssAnon"), 0.0)
    for line in read(Path(f"/proc/{pid}/status")).splitlines():
        name, _, value = line.partition(":")
        if name in values:
            values[name] = int(value.split()[0]) / 1024
    return values["VmHWM"], values["VmRSS"], values["RssAnon"]


def read(path: Path) -> str:
    """Return the text of a file of /proc, "" when its process has ended."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def last_object(output: bytes) -> dict[str, Any]:
    """Return the JSON object that a command printed; what libraries print before it does not matter."""
    lines = output.decode(errors="replace").strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def ending(text: str) -> str:
    """Return the error of a stderr: from its "error:" line on, or its last three lines."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    starts = [index for index, line in enumerate(lines) if line.startswith("error:")]
    return "\n".join(lines[starts[-1] :] if starts else lines[-3:])
