"""Pictures as networks read them, against transformers' own processors with Pillow; wrong and unusual files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tolerances import PIXELS

from edgelora.errors import DataError, ModelError
from edgelora.images import ImageProcessor, open_picture
from edgelora.preprocessor import image_settings
from edgelora.tasks import get_task

PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit.image_processing_pil_vit:ViTImageProcessorPil", {"size": {"height": 24, "width": 24}}),
    "deit": ("deit.image_processing_pil_deit:DeiTImageProcessorPil",
             {"size": {"height": 30, "width": 30}, "crop_size": {"height": 24, "width": 24}}),
    "convnext": ("convnext.image_processing_pil_convnext:ConvNextImageProcessorPil", {"size": {"shortest_edge": 24}}),
    "convnext_large": ("convnext.image_processing_pil_convnext:ConvNextImageProcessorPil", {"size": {"shortest_edge": 384}}),
    "mobilenet": ("mobilenet_v2.image_processing_pil_mobilenet_v2:MobileNetV2ImageProcessorPil",
                  {"size": {"shortest_edge": 26}, "crop_size": {"height": 24, "width": 32}}),
    "efficientnet": ("efficientnet.image_processing_pil_efficientnet:EfficientNetImageProcessorPil",
                     {"size": {"height": 24, "width": 24}}),
    "efficientnet_once": ("efficientnet.image_processing_pil_efficientnet:EfficientNetImageProcessorPil",
                          {"size": {"height": 24, "width": 24}, "include_top": False, "rescale_offset": True}),
    "mobilevit": ("mobilevit.image_processing_pil_mobilevit:MobileViTImageProcessorPil",
                  {"size": {"shortest_edge": 26}, "crop_size": {"height": 24, "width": 24}}),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_equal_transformers(name: str, tmp_path: Path) -> None:
    import importlib

    where, settings = PROCESSORS[name]
    module, _, attribute = where.partition(":")
    theirs = getattr(importlib.import_module(f"transformers.models.{module}"), attribute)(**settings)
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.from_folder(tmp_path)
    random = np.random.default_rng(0)
    for shape in ((40, 57, 3), (57, 31, 3), (20, 20, 3)):
        picture = Image.fromarray(random.integers(0, 256, shape).astype(np.uint8))
        wanted = np.asarray(theirs(picture, return_tensors="np")["pixel_values"][0])
        np.testing.assert_allclose(ours.normalize(ours.pixels(picture)), wanted, **PIXELS)


UNNAMED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "exact": ("image-classification", "resnet", {"size": {"height": 24, "width": 30}, "image_std": [0.2] * 3}, "ViT"),
    "number": ("image-classification", "vit", {"size": 24, "do_normalize": False}, "ViT"),
    "cropped": ("image-classification", "resnet", {"size": {"shortest_edge": 24}, "crop_pct": 0.875, "resample": 3}, "CLIP"),
    "boxes": ("object-detection", "rt_detr", {"size": {"height": 24, "width": 24}, "do_rescale": False}, "RTDetr"),
    "yolos": ("object-detection", "yolos", {"size": {"height": 32, "width": 48}, "image_mean": [0.4] * 3}, "Yolos"),
    "shortest": ("object-detection", "detr", {"size": {"shortest_edge": 24, "longest_edge": 40}}, "Detr"),
    "areas": ("image-segmentation", "unet", {"size": {"height": 32, "width": 24}}, "Segformer"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNNAMED)
def test_settings_without_a_class_get_one_that_does_as_they_say(name: str, tmp_path: Path) -> None:
    import transformers

    task, model_type, settings, kind = UNNAMED[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    ours = ImageProcessor.from_folder(tmp_path)
    whole = image_settings(tmp_path, ours.as_config, task, model_type)
    assert whole["image_processor_type"] == f"{kind}ImageProcessor"
    assert ImageProcessor.from_config(whole) == ours
    theirs = getattr(transformers, f"{kind}ImageProcessorPil").from_dict(dict(whole))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (57, 31, 3)).astype(np.uint8))
    wanted = np.asarray(theirs(picture, return_tensors="np")["pixel_values"][0])
    np.testing.assert_allclose(ours.normalize(ours.pixels(picture)), wanted, **PIXELS)


def test_a_class_of_the_model_stays_also_where_a_whole_processor_names_it(tmp_path: Path) -> None:
    own = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 24}, "crop_pct": 0.5}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": own}), encoding="utf-8")
    assert image_settings(tmp_path, dict, "image-classification", "resnet") == own


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "LA", "I;16"])
def test_every_kind_of_picture_becomes_rgb(mode: str, tmp_path: Path) -> None:
    if mode == "I;16":
        picture = Image.fromarray(np.full((10, 12), 0x8000, np.uint16))
    else:
        picture = Image.new("RGB", (12, 10), (128, 128, 128)).convert(mode)
    picture.save(tmp_path / ("x.tiff" if mode in ("CMYK", "I;16") else "x.png"))
    found = open_picture(next(tmp_path.iterdir()))
    assert (found.mode, found.size) == ("RGB", (12, 10))
    if mode == "I;16":
        assert np.asarray(found)[0, 0].tolist() == [128, 128, 128]


def test_exif_rotation_is_followed(tmp_path: Path) -> None:
    picture = Image.new("RGB", (12, 10), "white")
    picture.paste("black", (0, 0, 6, 10))  # its left half
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    picture.save(tmp_path / "x.png", exif=exif)
    found = open_picture(tmp_path / "x.png")
    assert found.size == (10, 12)
    assert np.asarray(found)[0, 0].tolist() == [0, 0, 0]
    assert np.asarray(found)[-1, -1].tolist() == [255, 255, 255]


def test_files_that_are_no_pictures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(DataError, match=r"text.png cannot be read: it is no picture that Pillow reads"):
        open_picture(tmp_path / "text.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:100])
    with pytest.raises(DataError, match=r"cut.png cannot be read: "):
        open_picture(tmp_path / "cut.png")
    with pytest.raises(DataError, match="does not exist"):
        open_picture(tmp_path / "none.png")
    monkeypatch.setattr("edgelora.images.MOST_PIXELS", 1000)
    with pytest.raises(DataError, match=r"whole.png has 64 × 64 pixels"):
        open_picture(tmp_path / "whole.png")


def test_a_folder_without_a_usable_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no preprocessor_config.json"):
        ImageProcessor.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": "large"}')
    with pytest.raises(ModelError, match="cannot be used"):
        ImageProcessor.from_folder(tmp_path)


def test_a_graph_has_the_size_that_the_processor_gives_where_padding_depends_on_it() -> None:
    """A network trained on pictures of 96 × 96 may have been adapted to others."""
    task = get_task("image-segmentation")
    config = {"model_type": "mobilenet_v2", "tf_padding": True, "image_size": 96}
    assert task.inputs({"input_size": (64, 48), **config}, ())[0].shape == ("batch_size", 3, 64, 48)
    assert task.inputs({"input_size": None, **config}, ())[0].shape == ("batch_size", 3, 96, 96)
    assert task.inputs({**config, "tf_padding": False}, ())[0].shape == ("batch_size", 3, "height", "width")
