"""The peers' environments: one for each set of packages that must not meet, made with pip in the work folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from edgelora import console

TORCH = "torch==2.13.0"  # first and by itself, as tools/setup does: a plain "torch" brings several GB of CUDA libraries
# llm-compressor wants transformers up to 5.17, the builder of onnxruntime-genai another. GPTQModel 7.7 wants torch 2.14 and
# with it CUDA's libraries; neural-compressor's and optimum's GPTQ are no longer kept up.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "onnx": (
        TORCH, "transformers==5.23.0", "peft==0.21.2", "onnx==1.23.2", "onnx-ir==1.1.0", "onnxruntime==1.31.1",
        "onnxruntime-genai==0.18.0", "sympy",
    ),
    "llama": ("llama-cpp-python==0.3.36", "numpy"),  # compiled for this machine's instruction sets while it is installed
    "gptq": (TORCH, "transformers==5.17.0", "llmcompressor==0.14.0.1"),
}  # fmt: skip
STAMP = "requirements.txt"


def interpreter(name: str, work: Path) -> str:
    """Return the Python of a peer's environment, made first where it is missing or has other requirements."""
    folder, wanted = work / "environments" / name, "\n".join(REQUIREMENTS[name]) + "\n"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return str(python)
    console.say(f"making the environment of {', '.join(REQUIREMENTS[name])}")
    shutil.rmtree(folder, ignore_errors=True)
    call([sys.executable, "-m", "venv", str(folder)])
    for requirements in ([TORCH] * (TORCH in REQUIREMENTS[name]), list(REQUIREMENTS[name])):
        if requirements:
            call([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements])
    stamp.write_text(wanted, encoding="utf-8")
    return str(python)


def call(command: list[str]) -> None:
    """Run a command; raise SystemExit with its last words where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        ending = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}:\n{ending}")
