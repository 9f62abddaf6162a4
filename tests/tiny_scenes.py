"""Tiny networks that find areas and objects, and scenes of shapes for them to find, as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

SEGMENTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "segformer": ("SegformerConfig", {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
                                      "patch_sizes": [7, 3], "strides": [2, 2], "num_attention_heads": [1, 2],
                                      "mlp_ratios": [2, 2], "decoder_hidden_size": 16}),
    "unet": ("UNetConfig", {"hidden_sizes": [8, 12, 16]}),
    "mobilenet_v2": ("MobileNetV2Config", {"image_size": 32, "depth_multiplier": 0.25, "min_depth": 8, "output_stride": 8,
                                           "depth_divisible_by": 8}),
    "mobilevit": ("MobileViTConfig", {"image_size": 32, "hidden_sizes": [16, 16, 24], "num_attention_heads": 2,
                                      "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32], "aspp_out_channels": 16,
                                      "output_stride": 16, "atrous_rates": [1, 2, 3]}),
}  # fmt: skip

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "out_features": ["stage2"]}
HYBRID: dict[str, Any] = {
    "backbone_config": {"model_type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 16, 16],
                        "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]},
    "encoder_hidden_dim": 16, "encoder_in_channels": [16, 16, 16], "encoder_ffn_dim": 16, "encoder_attention_heads": 2,
    "d_model": 16, "num_queries": 10, "decoder_in_channels": [16, 16, 16], "decoder_ffn_dim": 16, "decoder_layers": 2,
    "decoder_attention_heads": 2, "num_denoising": 0,
}  # fmt: skip
DETECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "detr": ("DetrConfig", {"backbone_config": {"model_type": "resnet", **RESNET}, "use_timm_backbone": False, "num_queries": 6,
                            "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
                            "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}),
    "yolos": ("YolosConfig", {"image_size": [32, 32], "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
                              "num_attention_heads": 4, "intermediate_size": 64, "num_detection_tokens": 6}),
    "rt_detr": ("RTDetrConfig", HYBRID),
}  # fmt: skip


def save_detector(folder: Path, family: str = "yolos", *, labels: int = 2, seed: int = 0, **overrides: Any) -> Path:
    """Save a random network of a family of DETECTORS."""
    import transformers

    name, differs = DETECTORS[family]
    settings = {**differs, "num_labels": labels, **overrides}
    if isinstance(backbone := settings.get("backbone_config"), dict):
        settings["backbone_config"] = transformers.AutoConfig.for_model(**backbone)
    tiny.save_network(folder, "AutoModelForObjectDetection", getattr(transformers, name)(**settings), seed)
    if family == "rt_detr":  # its last features are a 32nd of the picture, and attention to one place learns nothing
        larger = {**tiny.PREPROCESSOR, "size": {"height": 64, "width": 64}}
        (folder / "preprocessor_config.json").write_text(json.dumps(larger), encoding="utf-8")
    return folder


def save_segmenter(folder: Path, family: str = "segformer", *, labels: int = 2, seed: int = 0, **overrides: Any) -> Path:
    """Save a random network of a family of SEGMENTERS, the statistics of its batch norms random too."""
    import transformers

    from edgelora.models import unet

    unet.register()
    name, differs = SEGMENTERS[family]
    config = (unet.UNetConfig if family == "unet" else getattr(transformers, name))(
        **{**differs, "num_labels": labels, **overrides}
    )
    tiny.save_network(folder, "AutoModelForSemanticSegmentation", config, seed)
    return folder


def scene(number: int, size: int = 32) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Return pixels [size, size, 3], classes [size, size] (0 ground, 1 disc, 2 square) and the objects of a scene."""
    import numpy as np

    random = np.random.default_rng(number)
    pixels = random.integers(0, 50, (size, size, 3))
    classes = np.zeros((size, size), np.uint8)
    rows, columns = np.mgrid[:size, :size]
    objects = []
    for kind in (1, 2):
        radius = int(random.integers(size // 8, size // 5))
        y = int(random.integers(radius, size - radius))
        x = int(random.integers(radius, size // 2 - radius + 1)) + (kind - 1) * size // 2
        x = min(x, size - radius - 1)
        inside = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
        if kind == 2:
            inside = (abs(rows - y) <= radius) & (abs(columns - x) <= radius)
        pixels[inside] = random.integers(0, 60, (int(inside.sum()), 3)) + ((180, 60, 20) if kind == 1 else (20, 60, 180))
        classes[inside] = kind
        box = [
            float(columns[inside].min()),
            float(rows[inside].min()),
            float(columns[inside].max() + 1),
            float(rows[inside].max() + 1),
        ]
        objects.append({"label": ("disc", "square")[kind - 1], "box": box})
    return pixels.astype(np.uint8), classes, objects


def save_masks(folder: Path, rows: int = 24, size: int = 32) -> Path:
    """Write FOLDER/images/N.png, FOLDER/masks/N.png and FOLDER/classes.txt: ground and disc; squares are not scored."""
    from PIL import Image

    for number in range(rows):
        pixels, classes, _ = scene(number, size)
        classes[classes == 2] = 255
        for name, array in (("images", pixels), ("masks", classes)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / name / f"{number}.png")
    return folder


def save_objects(folder: Path, rows: int = 24, size: int = 32) -> Path:
    """Write FOLDER/rows.jsonl and FOLDER/images/N.png: a disc and a square in each."""
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(rows):
            pixels, _, objects = scene(number, size)
            Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
            file.write(json.dumps({"image": f"images/{number}.png", "objects": objects}) + "\n")
    return folder
