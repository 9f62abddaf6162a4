"""Memory cgroups without swap, version 1 and 2 (kernel documentation: cgroup-v1/memory.rst, cgroup-v2.rst). Needs root.

What a run may use counts as a device would count it: file pages too, so the machine's caches are dropped before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgelora.hardware import _cgroup_folders
from training_bench.processes import Measured, run

MB = 1 << 20
# exec: the shell becomes the command, which keeps the cgroup and the process id.
ENTER = 'echo $$ > "$0" && exec "$@"'


@dataclass
class Cgroup:
    """A memory cgroup of ours. Peaks count file pages, which the kernel drops only when the limit is reached."""

    folder: Path
    version: int

    def limit(self, limit_mb: int) -> None:
        """Allow so many MB and no swap."""
        if self.version == 2:
            self.write("memory.max", str(limit_mb * MB))
            self.write("memory.swap.max", "0", needed=False)
            return
        self.write("memory.limit_in_bytes", str(limit_mb * MB))
        if not self.write("memory.memsw.limit_in_bytes", str(limit_mb * MB), needed=False):
            self.write("memory.swappiness", "0")

    def write(self, name: str, value: str, *, needed: bool = True) -> bool:
        """Write a control file; return False where an optional one is missing."""
        path = self.folder / name
        if not needed and not path.exists():
            return False
        path.write_text(value, encoding="ascii")
        return True

    def kills(self) -> int:
        """Return how often the kernel killed in this cgroup for want of memory; 0 where it does not tell."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        lines = dict(line.split() for line in read(self.folder / name).splitlines() if len(line.split()) == 2)
        return int(lines.get("oom_kill", 0))

    def wrap(self, command: list[str]) -> list[str]:
        """Return a command that runs `command` inside."""
        return ["/bin/sh", "-c", ENTER, str(self.folder / "cgroup.procs"), *command]


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


def parent() -> tuple[Path, int] | None:
    """Return where a memory cgroup can be made: (folder, version); None where there is none, or no right to."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return None
    for folder, top, version in _cgroup_folders("memory"):
        if version == 1:
            return folder, 1
        # A version 2 group with processes of its own gives no controllers to its children: look for one above that does.
        for candidate in (folder, *folder.parents):
            if "memory" in read(candidate / "cgroup.subtree_control").split():
                return candidate, 2
            if candidate == top:
                break
    return None


@contextmanager
def cgroup(limit_mb: int) -> Iterator[Cgroup]:
    """Make a cgroup for the block, and remove it after. Raises SystemExit where that is not possible."""
    found = parent()
    if found is None:
        raise SystemExit(
            "error: memory cgroups need root and a mounted memory controller; leave the part out: --what speed,curve"
        )
    made = Cgroup(found[0] / f"edgelora-bench-{os.getpid()}", found[1])
    made.folder.mkdir()
    try:
        made.limit(limit_mb)
        yield made
    finally:
        remove(made.folder)


def remove(folder: Path) -> None:
    """Remove a cgroup; the kernel may need a moment after its last process has ended."""
    for _ in range(50):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)
    folder.rmdir()


def run_limited(command: list[str], limit_mb: int, environment: dict[str, str], timeout: float) -> Measured:
    """Run a command in a fresh cgroup of `limit_mb`, after dropping the machine's caches."""
    drop_caches()
    with cgroup(limit_mb) as group:
        measured = run(group.wrap(command), environment=environment, timeout=timeout)
        killed = group.kills()
    if killed and not measured.done:  # a killed child makes its parent fail in its own way
        measured.exit_code = -9
        measured.message = f"the kernel killed {killed} process(es) in {limit_mb} MB"
    return measured


def drop_caches() -> None:
    """Drop all clean file pages of the machine, so that those that a run reads are charged to its cgroup."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    except OSError as error:
        raise SystemExit(
            f"error: the page cache cannot be dropped ({error}): what a cgroup holds would not be charged"
        ) from None
