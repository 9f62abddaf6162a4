"""preprocessor_config.json of a model folder, or its part of processor_config.json, which transformers 5 writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from edgelora.errors import ModelError
from edgelora.tokenizer import read_config

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"

Built = TypeVar("Built")


def read_preprocessor(folder: Path, part: str, build: Callable[[Mapping[str, Any]], Built]) -> Built:
    """Return what `build` makes of the settings; part: "image_processor" or "feature_extractor".

    Raises ModelError where there is no such file, or where `build` raises KeyError, TypeError, ValueError or AttributeError.
    """
    path = folder / PREPROCESSOR
    try:
        if not path.is_file() and isinstance(found := read_config(folder / PROCESSOR).get(part), dict):
            path = folder / PROCESSOR
            return build(found)
        return build(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        name = part.replace("_", " ")
        raise ModelError(f"{folder} has no {PREPROCESSOR}", hint=f"save the model's {name} beside it") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} cannot be used: {type(error).__name__}: {error}") from None
