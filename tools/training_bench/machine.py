"""Which machine this is, and whether anything else keeps it busy: figures of a shared machine say little."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from edgelora import hardware

BUSY = 0.15  # share of the processors that others may use before a measurement is not worth much


def facts() -> dict[str, Any]:
    """Return processor, cores, instruction sets, RAM, load before starting, and the versions of what is measured."""
    import psutil

    return {
        "processor": hardware.processor_name(),
        "architecture": platform.machine(),
        "physical_cores": hardware.physical_cores(),
        "logical_cores": os.cpu_count() or 1,
        "isa": hardware.instruction_sets(),
        "ram_mb": psutil.virtual_memory().total >> 20,
        "available_mb": hardware.available_memory() >> 20,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "busy": round(busy_share(), 3),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": versions(),
        "commit": commit(),
    }


def busy_share(seconds: float = 2.0) -> float:
    """Return the share of all processors' time that is used now, looked at for `seconds` in which this process sleeps."""
    before = busy_seconds()
    time.sleep(seconds)
    return (busy_seconds() - before) / seconds / (os.cpu_count() or 1)


def busy_seconds() -> float:
    """Return the processor seconds that the whole machine has worked since it started; what a hypervisor took counts."""
    import psutil

    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in ("edgelora", "torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Return the commit that is measured, with a plus where files differ from it; None outside a clone."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
