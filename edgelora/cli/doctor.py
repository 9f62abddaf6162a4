"""`edgelora doctor`: what this machine can do."""

from __future__ import annotations

from typing import Any

from edgelora import console
from edgelora.cli.verb import verb

LIBRARIES = {"blas": "BLAS", "onednn": "oneDNN"}  # models/gemm.py


@verb("doctor")
def doctor() -> dict[str, Any]:
    """Show what this machine can do, measured in 2 seconds.

    Cores, instruction sets, memory and its limits, the speed of matrix products in each dtype, reading memory, and
    what would slow EdgeLoRA down.
    """
    from edgelora.hardware import physical_cores, probe
    from edgelora.native.library import reason

    with console.progress("measuring"):
        libraries = fp32_rates(physical_cores())
        found = {**probe(max(libraries.values(), default=None)), "fp32_libraries": libraries}
    found["native"] = reason() is None
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in found["gflops"].items())
    products = ", ".join(f"{LIBRARIES[name]} {rate:,.0f}" for name, rate in libraries.items())
    limit = "" if found["memory_limit_mb"] == found["ram_mb"] else f", {console.show_mb(found['memory_limit_mb'])} allowed"
    packages = [f"{name} {version}" for name, version in found["packages"].items() if version]
    facts = {
        "processor": f"{found['processor']} ({found['architecture']})",
        "cores": f"{found['physical_cores']} physical, {found['logical_cores']} logical",
        "instructions": " ".join(found["isa"]) or "none known",
        "memory": f"{console.show_mb(found['ram_mb'])}{limit}, {console.show_mb(found['available_mb'])} free",
        "matrix rate": f"{rates} GFLOP/s",
        **({"fp32 through": f"{products} GFLOP/s; training takes the faster"} if len(libraries) > 1 else {}),
        "fast dtypes": ", ".join(found["fast_dtypes"]),
        "reads memory at": f"{found['read_gb_s']:.0f} GB/s",
        "decoders run by": "EdgeLoRA's kernels" if found["native"] else f"ONNX Runtime (EdgeLoRA's kernels: {reason()})",
        "system": f"{found['system']}, Python {found['python']}",
        "packages": ", ".join(packages),
    }
    console.facts("This machine", facts)
    for warning in found["warnings"]:
        console.warn(warning)
    return found


def fp32_rates(threads: int) -> dict[str, float]:
    """Return GFLOP/s of fp32 products by library, those that training chooses from; none where torch is not installed."""
    from importlib.util import find_spec

    if find_spec("torch") is None:
        return {}
    from edgelora.models import gemm

    return {name: round(rate, 1) for name, rate in gemm.rates(threads, seconds=0.6).items() if name in LIBRARIES}
