"""Memory limits in made-up cgroup trees, and what this machine says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from edgelora import hardware, rates


def tree(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc/self of the test's own."""
    real = hardware._cgroup_folders
    monkeypatch.setattr(hardware, "_cgroup_folders", lambda controller: real(controller, tmp_path / "proc"))
    return tmp_path


def test_version_2_takes_the_tightest_of_the_hierarchy(proc: Path) -> None:
    mount = proc / "cgroup"
    tree(proc, {
        "proc/cgroup": "0::/user/job\n",
        "proc/mountinfo": f"30 23 0:26 / {mount} rw,nosuid - cgroup2 cgroup2 rw\n",
        "cgroup/user/memory.max": f"{300 << 20}\n",
        "cgroup/user/memory.current": f"{250 << 20}\n",
        "cgroup/user/memory.stat": f"anon 5\ninactive_file {100 << 20}\nactive_file {20 << 20}\n",
        "cgroup/user/job/memory.max": "max\n",
        "cgroup/user/job/memory.current": "1\n",
        "cgroup/user/cpu.max": "max 100000\n",
        "cgroup/user/job/cpu.max": "150000 100000\n",
    })  # fmt: skip
    assert hardware.memory_limit() == 300 << 20
    assert hardware.available_memory() == (300 - (250 - 110)) << 20
    assert hardware._cpu_quota() == 1.5


def test_version_1_in_a_container_whose_paths_are_the_hosts(proc: Path) -> None:
    mount = proc / "memory"
    tree(proc, {
        "proc/cgroup": "4:memory:/docker/abc/job\n3:cpu,cpuacct:/docker/abc\n0::/\n",
        "proc/mountinfo": f"35 31 0:32 /docker/abc {mount} rw,relatime - cgroup cgroup rw,memory\n",
        "memory/memory.limit_in_bytes": f"{1 << 63}\n",
        "memory/memory.usage_in_bytes": "5\n",
        "memory/job/memory.limit_in_bytes": f"{200 << 20}\n",
        "memory/job/memory.usage_in_bytes": f"{50 << 20}\n",
        "memory/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {10 << 20}\n",
    })  # fmt: skip
    assert hardware.memory_limit() == 200 << 20
    assert hardware.available_memory() == 160 << 20
    assert hardware._cpu_quota() is None


def test_without_cgroups_the_machine_is_the_limit(proc: Path) -> None:
    assert hardware.memory_limit() == psutil.virtual_memory().total


def test_a_group_used_beyond_its_limit_has_nothing_free(proc: Path) -> None:
    tree(proc, {
        "proc/cgroup": "0::/\n",
        "proc/mountinfo": f"30 23 0:26 / {proc / 'g'} rw - cgroup2 cgroup2 rw\n",
        "g/memory.max": "1000",
        "g/memory.current": "2000",
    })  # fmt: skip
    assert hardware.available_memory() == 0


def test_the_peak_stays_when_memory_is_given_back() -> None:
    code = (
        "from edgelora.hardware import peak_rss_mb, rss_mb\n"
        "before = rss_mb(); block = bytearray(b'x') * (200 << 20); del block\n"
        "print(before, rss_mb(), peak_rss_mb())\n"
    )
    before, after, peak = map(float, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert peak > before + 190
    assert after < before + 100


def test_cores_are_those_of_this_process() -> None:
    assert 1 <= hardware.physical_cores() <= (os.cpu_count() or 1)


def test_probe_is_whole_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "matrix_rates", lambda fp32: {"fp32": fp32, "bf16": 5.0, "int8": 99.0})
    monkeypatch.setattr(rates, "read_bandwidth", lambda cores, free: 20.0)
    monkeypatch.setattr(hardware, "physical_cores", lambda: 4)
    monkeypatch.setattr(hardware, "available_memory", lambda: 1 << 30)
    monkeypatch.setattr(hardware, "memory_limit", lambda: 2 << 30)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = hardware.probe(100.0)
    assert found["fast_dtypes"] == ["fp32", "int8"]
    text = "\n".join(found["warnings"])
    assert "OMP_NUM_THREADS=1 leaves 3 of 4 cores unused; unset it" in text
    assert "bf16 is 20 times slower than fp32 here: EdgeLoRA computes in fp32" in text
    assert "only 1024 MB of memory are free" in text
    assert f"a memory cgroup allows 2048 MB of the machine's {found['ram_mb']} MB" in text


def test_rates_are_measured() -> None:
    measured = rates.matrix_rates(0.05)
    assert all(rate > 0 for rate in measured.values())
    assert rates.matrix_rates(0.05, fp32=123.0)["fp32"] == 123.0
    assert rates.read_bandwidth(1, 64 << 20, seconds=0.02) > 0.1


def test_free_memory_is_what_psutil_says() -> None:
    assert hardware._free_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
