"""The adapters of `edgelora merge --adapter`: PEFT folders, and runs of ours among them, opened together with what they say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.adapters.combine import Recipe, open_adapters
from edgelora.adapters.peft_config import TASK_TYPES
from edgelora.adapters.peft_format import AdapterFile
from edgelora.errors import FolderError
from edgelora.folder import is_ours, read_manifest

if TYPE_CHECKING:
    from edgelora.adapters.combine import Combination


@dataclass(frozen=True)
class Foreign:
    """runs: the manifests of those folders that are runs; empty where PEFT has made them all."""

    recipe: Recipe
    adapter: AdapterFile | Combination
    runs: dict[Path, dict[str, Any]]

    @property
    def reference(self) -> str | None:
        """The base that the runs name. What a foreign config names is told, not opened."""
        return next((manifest["model"]["reference"] for manifest in self.runs.values()), None)

    @property
    def labels(self) -> list[str]:
        return next((list(manifest["labels"]) for manifest in self.runs.values() if manifest.get("labels")), [])

    @property
    def singles(self) -> tuple[AdapterFile, ...]:
        return (self.adapter,) if isinstance(self.adapter, AdapterFile) else self.adapter.adapters

    @property
    def bases(self) -> list[str]:
        return list(dict.fromkeys(adapter.base for adapter in self.singles if adapter.base))

    def tokenizer(self, default: Path) -> Path:
        """Return the first adapter's folder that has a tokenizer, which knows the tokens that it added, else `default`."""
        return next((folder for folder in self.recipe.folders if (folder / "tokenizer.json").is_file()), default)

    def facts(self) -> dict[str, Any]:
        """Return what the manifest says of the adapters."""
        recipe = self.recipe
        adapters = [
            {"folder": folder.name, "weight": share, "base": adapter.base}
            for folder, share, adapter in zip(recipe.folders, recipe.shares, self.singles, strict=True)
        ]
        if recipe.plain:
            return {"adapters": adapters}
        rule: dict[str, Any] = {"method": recipe.method}
        if recipe.method != "linear":
            rule["density"] = recipe.density
        if recipe.method.startswith("dare"):
            rule["seed"] = recipe.seed
        return {"adapters": adapters, "combine": rule}

    def notes(self, reference: str) -> list[str]:
        """Return what the user should know, given the model that the adapters are merged into."""
        found = list(self.adapter.notes)
        others = [base for base in self.bases if last_part(base) != last_part(reference)]
        if others:
            named = " and ".join(f'"{base}"' for base in others)
            found.append(f"the adapter was trained on {named} and goes into {reference}: only the same weights make sense.")
        return found


def last_part(name: str) -> str:
    """Return the last part of a hub id or path, as far as it names the weights rather than how they are stored."""
    last = name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()
    return last.removesuffix("-bnb-4bit").removesuffix("-unsloth")


def open_foreign(recipe: Recipe) -> Foreign:
    """Open the adapters of a recipe. Raises UserError for what is missing, damaged or does not go together."""
    runs = {folder: read_manifest(folder, "run") for folder in recipe.folders if is_ours(folder)}
    adapter = open_adapters(recipe)
    kind = adapter.task_type
    if kind is not None and kind not in TASK_TYPES:
        allowed = ", ".join(f"{name} ({task})" for name, task in TASK_TYPES.items())
        raise FolderError(f"the adapter is for the task {kind}; EdgeLoRA ships {allowed}")
    return Foreign(recipe, adapter, runs)


def only_run(recipe: Recipe) -> Path | None:
    """Return the run that the recipe is nothing but: merging it as a run keeps what it was trained on."""
    return recipe.folders[0] if recipe.plain and is_ours(recipe.folders[0]) else None
