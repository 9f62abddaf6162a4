"""What each side runs: our bundle, the builder's int4 graph, GGUF files. Each is made once, in the work folder."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from merge_bench import environments
from training_bench import models
from training_bench.processes import child_environment, python

from edgelora import console

BUILDER = "onnxruntime_genai.models.builder"
GGUF = Path(__file__).with_name("gguf_file.py")


def bundle(name: str, work: Path, *flags: str) -> Path:
    """Return our int4 bundle of a model as it is exported by default, or with flags."""
    source = models.PACKAGE if name == models.SMOLLM2 else str(models.folder_of(name, work))
    return made(
        work / "device" / f"{name}-edgelora{''.join(flags)}",
        lambda part: python("-m", "edgelora", "export", source, "-o", str(part), "--quiet", *flags),
    )


def genai(name: str, work: Path) -> Path:
    """Return the int4 graph for CPUs that onnxruntime-genai's builder writes of a model, with its defaults."""

    def command(part: Path) -> list[str]:
        words = ["-i", str(models.folder_of(name, work)), "-o", str(part), "-p", "int4", "-e", "cpu", "-c", str(work / "cache")]
        return [environments.interpreter("onnx", work), "-P", "-m", BUILDER, *words]

    return made(work / "device" / f"{name}-genai", command)


def q4_1(name: str, work: Path) -> Path | None:
    """Return the GGUF file that SmolLM2's package ships; other models have none."""
    return shipped() if name == models.SMOLLM2 else None


def q4_0(name: str, work: Path) -> Path:
    """Return a GGUF file of the kind that llama.cpp repacks for its fastest kernels."""
    source = [] if name == models.SMOLLM2 else [str(models.folder_of(name, work))]
    return made(work / "device" / f"{name}-Q4_0.gguf", lambda part: python(str(GGUF), *source, str(shipped()), str(part)))


def shipped() -> Path:
    """Return the GGUF file inside SmolLM2's package."""
    from edgelora.models.package import package_path

    return package_path(models.PACKAGE.removeprefix("package:"))[0]


def made(out: Path, command: Callable[[Path], list[str]]) -> Path:
    """Return `out`, written first by a process where it is missing; it gets its name when it is complete."""
    if out.exists():
        return out
    console.say(f"making {out}")
    part = out.with_name(f".{out.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    part.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    words = command(part)
    environment = child_environment({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode or not part.exists():
        ending = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise SystemExit(f"error: {' '.join(words)} ended with {done.returncode}:\n{ending}")
    part.rename(out)
    return out
