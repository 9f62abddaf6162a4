"""What this machine can do: memory and its limits, cores, instruction sets, and measured rates.

The only module that knows operating systems. Nothing heavy is imported at the top: the device runtime uses it too.
MB are 2^20 bytes.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any

UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63

# What matters for matrix products, by the names that /proc/cpuinfo, sysctl and Windows use.
ISA_FLAGS = {
    "AVX2": ("avx2", "hw.optional.avx2_0"),
    "FMA": ("fma", "hw.optional.fma"),
    "AVX512": ("avx512f", "hw.optional.avx512f"),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "AVX512-BF16": ("avx512_bf16",),
    "AVX512-FP16": ("avx512_fp16",),
    "AMX-INT8": ("amx_int8",),
    "AMX-BF16": ("amx_bf16",),
    "NEON": ("asimd", "neon", "hw.optional.neon", "hw.optional.AdvSIMD"),
    "DOTPROD": ("asimddp", "hw.optional.arm.FEAT_DotProd"),
    "I8MM": ("i8mm", "hw.optional.arm.FEAT_I8MM"),
    "ARM-BF16": ("bf16", "hw.optional.arm.FEAT_BF16"),
    "SVE": ("sve",),
    "SVE2": ("sve2",),
}
WINDOWS_FEATURES = {"AVX2": 40, "AVX512": 41, "NEON": 19, "DOTPROD": 43}  # winnt.h, PF_*


def memory_limit() -> int:
    """Return the bytes that this process may use at most: the machine's RAM or the tightest memory cgroup above it."""
    import psutil

    return min([psutil.virtual_memory().total, *(limit for limit, _ in _cgroups())])


def available_memory() -> int:
    """Return the bytes that this process may still take: free on the machine, and left in every memory cgroup above it."""
    return max(0, min([_free_memory(), *(limit - used for limit, used in _cgroups())]))


def _free_memory() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):  # Linux's own word, sooner by 20 ms than psutil's
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) << 10
    import psutil

    return int(psutil.virtual_memory().available)


def peak_rss_mb() -> float:
    """Return the largest resident memory that this process ever had, in MB."""
    status = _proc_status("VmHWM")
    if status is not None:
        return status
    import psutil

    windows_peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if windows_peak is not None:
        return float(windows_peak) / (1 << 20)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / (1 << 10)


def rss_mb() -> float:
    """Return the resident memory of this process now, in MB."""
    status = _proc_status("VmRSS")
    if status is not None:
        return status
    import psutil

    return float(psutil.Process().memory_info().rss) / (1 << 20)


def physical_cores() -> int:
    """Return the physical cores that this process may use: affinity and the cgroup's CPU quota are counted."""
    allowed = [_topology() or os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        allowed.append(len(os.sched_getaffinity(0)))
    quota = _cpu_quota()
    if quota is not None:
        allowed.append(max(1, math.ceil(quota)))
    return min(allowed)


def _topology() -> int | None:
    """Return the physical cores of the machine, None where they are not told: by Linux's own files, sooner than by psutil."""
    threads = {_read(file) for file in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")}
    if threads - {""}:
        return len(threads - {""})
    import psutil

    return psutil.cpu_count(logical=False)


def instruction_sets() -> list[str]:
    """Return the names of ISA_FLAGS that this processor has, as the operating system tells."""
    if sys.platform == "win32":
        import ctypes

        present = ctypes.windll.kernel32.IsProcessorFeaturePresent
        return [name for name, feature in WINDOWS_FEATURES.items() if present(feature)]
    flags = _sysctl_flags() if sys.platform == "darwin" else _cpuinfo_flags()
    return [name for name, spellings in ISA_FLAGS.items() if flags.intersection(spellings)]


def processor_name() -> str:
    """Return the processor's name, or its architecture where the system does not tell."""
    for key in ("model name", "Hardware"):
        for line in _read(Path("/proc/cpuinfo")).splitlines():
            if line.startswith(key) and ":" in line:
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def probe(fp32: float | None = None) -> dict[str, Any]:
    """Return what `edgelora doctor` shows: facts, rates measured in about two seconds, and warnings.

    `fp32`: GFLOP/s of the products that training takes (models/gemm.py); None where torch is not installed.
    """
    import psutil

    from edgelora.rates import fast_dtypes, matrix_rates, read_bandwidth

    idle_load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    rates = matrix_rates(fp32=fp32)
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "processor": processor_name(),
        "architecture": platform.machine(),
        "physical_cores": physical_cores(),
        "logical_cores": os.cpu_count() or 1,
        "isa": instruction_sets(),
        "ram_mb": psutil.virtual_memory().total >> 20,
        "memory_limit_mb": memory_limit() >> 20,
        "available_mb": available_memory() >> 20,
        "gflops": {name: round(rate, 1) for name, rate in rates.items()},
        "fast_dtypes": fast_dtypes(rates),
        "read_gb_s": round(read_bandwidth(physical_cores(), available_memory()), 1),
        "load": idle_load,
        "packages": _package_versions(),
    }
    return {**facts, "warnings": _warnings(facts)}


def _warnings(facts: dict[str, Any]) -> list[str]:
    import psutil

    cores, found = facts["physical_cores"], []
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        if os.environ.get(name, "").isdigit() and int(os.environ[name]) < cores:
            found.append(f"{name}={os.environ[name]} leaves {cores - int(os.environ[name])} of {cores} cores unused; unset it")
    if facts["load"] is not None and facts["load"] > cores / 2:
        found.append(f"other processes keep {facts['load']:.1f} of {cores} cores busy: the rates here are too low")
    if facts["memory_limit_mb"] < facts["ram_mb"]:
        found.append(f"a memory cgroup allows {facts['memory_limit_mb']} MB of the machine's {facts['ram_mb']} MB")
    if facts["available_mb"] < 2048:
        found.append(f"only {facts['available_mb']} MB of memory are free: close other programs, or give --ram a small budget")
    if psutil.swap_memory().used > 256 << 20:
        found.append(f"{psutil.swap_memory().used >> 20} MB are swapped out: training would wait for the disk")
    bf16, fp32 = facts["gflops"].get("bf16"), facts["gflops"]["fp32"]
    if bf16 and bf16 < fp32 / 2:
        found.append(f"bf16 is {fp32 / bf16:.0f} times slower than fp32 here: EdgeLoRA computes in fp32")
    if facts["packages"]["torch"] is None:
        found.append('torch is not installed: this machine runs bundles; to train, pip install "edgelora[train]"')
    return found


def _package_versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in ("edgelora", "numpy", "onnxruntime", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _proc_status(key: str) -> float | None:
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return None


def _cgroups() -> list[tuple[int, int]]:
    """Return (limit, bytes in use that cannot be dropped) of each limited memory cgroup from this process up to the root.

    Source: kernel documentation, cgroup-v1/memory.rst and cgroup-v2.rst.
    """
    found = []
    for folder, top, version in _cgroup_folders("memory"):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        while True:
            limit, used = _read(folder / names[0]).strip(), _read(folder / names[1]).strip()
            if limit.isdigit() and used.isdigit() and int(limit) < UNLIMITED:
                found.append((int(limit), max(0, int(used) - _droppable(folder, version))))
            if folder == top:
                break
            folder = folder.parent
    return found


def _droppable(folder: Path, version: int) -> int:
    """Return the bytes of file pages that the kernel drops before it kills: all inactive ones, half of the active."""
    prefix = "total_" if version == 1 else ""
    values = dict(line.split() for line in _read(folder / "memory.stat").splitlines() if len(line.split()) == 2)
    return int(values.get(f"{prefix}inactive_file", 0)) + int(values.get(f"{prefix}active_file", 0)) // 2


def _cpu_quota() -> float | None:
    """Return the CPUs that the tightest cgroup allows, or None."""
    quotas = []
    for folder, top, version in _cgroup_folders("cpu"):
        while True:
            if version == 2:
                quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
            else:
                quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
            if quota.isdigit() and period.isdigit() and int(period):
                quotas.append(int(quota) / int(period))
            if folder == top:
                break
            folder = folder.parent
    return min(quotas, default=None)


def _cgroup_folders(controller: str, proc: Path = Path("/proc/self")) -> list[tuple[Path, Path, int]]:
    """Return (this process's folder, the top folder, version) of each mounted hierarchy with that controller."""
    paths = {}
    for line in _read(proc / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" or controller in controllers.split(","):
            paths[2 if number == "0" else 1] = path
    found = []
    for line in _read(proc / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        version = {"cgroup": 1, "cgroup2": 2}.get(kind)
        if version is None or version not in paths or (version == 1 and controller not in options.split()[-1].split(",")):
            continue
        root, mount = before.split()[3:5]
        # In a container the mount shows only the part below `root`, and the path may be told from the host's view.
        path = paths[version].removeprefix(root.rstrip("/")).lstrip("/")
        top = Path(mount)
        folder = top / path if ".." not in path and (top / path).is_dir() else top
        found.append((folder, top, version))
    return found


def _cpuinfo_flags() -> set[str]:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def _sysctl_flags() -> set[str]:
    return {name for names in ISA_FLAGS.values() for name in names if name.startswith("hw.") and _sysctl(name) == "1"}


def _sysctl(name: str) -> str:
    import subprocess

    return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False).stdout.strip()


def _read(path: Path) -> str:
    """Return the text of a system file, or "" where this system has none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
