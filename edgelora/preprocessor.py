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

KINDS = ("image_processor_type", "feature_extractor_type")  # one of them names the class, without which transformers.js stops
# Classes whose answers loaders read: they know boxes and areas besides the settings
DETECTORS = {"yolos": "Yolos", "rt_detr": "RTDetr", "rt_detr_v2": "RTDetr", "d_fine": "RTDetr"}

Built = TypeVar("Built")


def image_settings(folder: Path, whole: Callable[[], Mapping[str, Any]], task: str, model_type: str) -> Mapping[str, Any]:
    """Return what a bundle's preprocessor_config.json says: a model's own where it names its class, else `whole()`.

    `whole` gives every setting with a class that does as they say; a detector's or segmenter's is one that reads its answers.
    """
    path = folder / PREPROCESSOR
    own = read_config(path) if path.is_file() else read_config(folder / PROCESSOR).get("image_processor")
    if isinstance(own, dict) and any(isinstance(own.get(key), str) for key in KINDS):
        return own
    settings = dict(whole())
    if task == "object-detection":
        settings[KINDS[0]] = f"{DETECTORS.get(model_type, 'Detr')}ImageProcessor"
    elif task == "image-segmentation" and "height" in settings.get("size", {}) and not settings["do_center_crop"]:
        settings[KINDS[0]] = "SegformerImageProcessor"
    return settings


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
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} cannot be used: {type(error).__name__}: {error}") from None
