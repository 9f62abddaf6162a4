"""Areas through the whole line: masks read, trained, merged, exported, run and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_scenes
import torch
from PIL import Image
from tolerances import CONVOLUTION, METRIC, PIXELS

from edgelora import drawing
from edgelora.adapters import inject
from edgelora.adapters.lora import LoRASettings
from edgelora.config import FinetuneConfig
from edgelora.data.check import scan
from edgelora.errors import DataError
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.images import ImageProcessor
from edgelora.masks import bilinear, class_map, classes, largest, read_mask, resize_mask
from edgelora.models.load import load_model
from edgelora.models.source import open_model
from edgelora.tasks.areas import overlap
from edgelora.tasks.image_segmentation import ImageSegmentation
from edgelora.train.finetune import finetune


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scenes.save_masks(tmp_path_factory.mktemp("areas") / "rows")


@pytest.mark.parametrize(("family", "precision", "layers"), [("segformer", "int8", 12), ("unet", "int4", 0)])
def test_the_whole_line(family: str, precision: str, layers: int, rows: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from edgelora.cli.main import cli

    model = tiny_scenes.save_segmenter(tmp_path / "model", family, labels=5)
    config = FinetuneConfig(precision=precision, epochs=8.0, batch_size=4, rank=4, learning_rate=1e-2)
    figures = finetune(str(model), str(rows), tmp_path / "run", config)
    assert figures["valid"]["mean_iou"] > 0.7
    exported = export(str(tmp_path / "run"), tmp_path / "bundle", precision=precision, force=True)
    assert exported["verify"]["passed"]
    assert exported["nodes"] == layers
    bundle = evaluate(tmp_path / "bundle", str(rows))["metrics"]
    assert bundle["mean_iou"] > 0.7
    assert set(bundle["report"]) == {"0", "1"}
    picture, marked = rows / "images" / "3.png", tmp_path / "out" / "marked.png"
    done = CliRunner().invoke(cli, ["run", str(tmp_path / "bundle"), str(picture), "--save", str(marked), "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)["output"]
    assert [area["label"] for area in answer["areas"]] == ["0", "1"]
    assert sum(area["share"] for area in answer["areas"]) == pytest.approx(1.0)
    disc = drawing.from_run_lengths(answer["areas"][1]["counts"], answer["size"])
    assert (disc & (read_mask(rows / "masks" / "3.png") == 1)).sum() > 0.5 * disc.sum()
    with Image.open(marked) as drawn, Image.open(picture) as given:
        assert drawn.size == given.size
        assert np.asarray(drawn)[disc].tolist() != np.asarray(given.convert("RGB"))[disc].tolist()


@pytest.mark.parametrize("family", tiny_scenes.SEGMENTERS)
def test_networks_equal_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSemanticSegmentation

    folder = tiny_scenes.save_segmenter(tmp_path / "model", family)
    reference = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    model = load_model(open_model(str(folder)), "image-segmentation", base_bits=32)
    x = torch.randn(2, 3, 32, 32)
    wanted = reference(pixel_values=x).logits.detach()
    torch.testing.assert_close(model.eval().logits(pixel_values=x).detach(), wanted, **CONVOLUTION)
    added = inject.attach(model, LoRASettings(rank=2), "all-linear")
    batch = {"pixel_values": x, "labels": torch.randint(0, 2, (2, 32, 32))}
    batch["labels"][0, :8] = 255
    loss, pixels = ImageSegmentation().loss(model, batch)
    theirs = torch.nn.functional.interpolate(wanted, size=(32, 32), mode="bilinear", align_corners=False)
    expected = torch.nn.functional.cross_entropy(theirs, batch["labels"], ignore_index=255)
    torch.testing.assert_close(loss.detach() / pixels, expected, **CONVOLUTION)
    loss.backward()
    moved = [bool(layer.lora_B.grad.any()) for layer in added.values() if layer.lora_B.grad is not None]
    assert len(moved) == len(added)
    assert sum(moved) > len(moved) // 3  # of random weights many a ReLU gives nothing but zeros


def test_pictures_and_masks_equal_transformers(tmp_path: Path) -> None:
    from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

    theirs = SegformerImageProcessorPil(size={"height": 24, "width": 28})
    theirs.save_pretrained(tmp_path)
    ours, random = ImageProcessor.from_folder(tmp_path), np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (40, 57, 3)).astype(np.uint8))
    mask = random.integers(0, 3, (40, 57)).astype(np.uint8)
    wanted = theirs(picture, Image.fromarray(mask), return_tensors="np")
    np.testing.assert_allclose(ours.normalize(ours.pixels(picture)), wanted["pixel_values"][0], **PIXELS)
    np.testing.assert_array_equal(resize_mask(ours, mask), wanted["labels"][0])
    logits = torch.randn(1, 3, 7, 9)
    larger = torch.nn.functional.interpolate(logits, size=(40, 57), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(bilinear(logits[0].numpy(), (40, 57)), larger[0], rtol=1e-5, atol=1e-6)
    from transformers.modeling_outputs import SemanticSegmenterOutput

    found = theirs.post_process_semantic_segmentation(SemanticSegmenterOutput(logits=logits), target_sizes=[(40, 57)])
    np.testing.assert_array_equal(classes(ours, logits[0].numpy(), (40, 57)), found[0])


def test_lines_are_enlarged_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 5, 6)).astype(np.float32)
    whole = largest(logits, (31, 17))
    monkeypatch.setattr("edgelora.masks.BAND", 3 * 17 * 4)
    np.testing.assert_array_equal(largest(logits, (31, 17)), whole)


def test_what_is_cropped_away_is_of_no_class() -> None:
    config = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    processor = ImageProcessor.from_config(config)
    mask = resize_mask(processor, np.ones((16, 32), np.uint8))
    assert mask.shape == (16, 16)
    logits = np.stack([np.zeros((4, 4)), np.ones((4, 4))]).astype(np.float32)
    found = classes(processor, logits, (32, 64))
    assert (found[:, 16:48] == 1).all()
    assert (found[:, :16] == 255).all()
    assert (found[:, 48:] == 255).all()


def test_metrics_equal_scikit_learn() -> None:
    from sklearn.metrics import f1_score, jaccard_score

    random = np.random.default_rng(0)
    truth, predicted = random.integers(0, 3, (2, 500))
    counts = np.bincount(truth * 4 + predicted, minlength=16).reshape(4, 4)
    found = overlap(counts, ["a", "b", "c", "absent"])
    assert found["mean_iou"] == pytest.approx(jaccard_score(truth, predicted, average="macro"), **METRIC)
    assert found["dice"] == pytest.approx(f1_score(truth, predicted, average="macro"), **METRIC)
    assert found["pixel_accuracy"] == pytest.approx((truth == predicted).mean(), **METRIC)


def test_values_mean_classes(rows: Path, tmp_path: Path) -> None:
    found = scan(str(rows), task=None, columns=None, valid=None)
    assert (found.task.name, found.labels) == ("image-segmentation", ["0", "1"])
    task = ImageSegmentation()
    assert task.labels(["0", "255"]) == ["0", "255"]
    assert task.labels(["0", "10", "9", "255"]) == ["0", "9", "10"]
    mask = np.array([[0, 255, 1]], np.int32)
    assert class_map(mask, (1, 3), {"0": "ground", "1": "cell"}, ["cell", "ground"]).tolist() == [[1, 255, 0]]
    assert class_map(mask, (1, 3), {"0": None, "1": "b", "255": "a"}, ["a", "b"]).tolist() == [[255, 0, 1]]
    tiny_scenes.save_masks(tmp_path / "named", rows=4)
    (tmp_path / "named" / "classes.txt").write_text("ground\ndisc\nsquare\n")
    named = scan(str(tmp_path / "named"), task=None, columns=None, valid=None)
    assert named.labels == ["disc", "ground", "square"]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((10, 12), np.uint8), "the mask is 12 × 10 pixels, its image 32 × 32"),
        (np.full((32, 32), 7, np.uint8), "the mask has the value 7; known are 0, 1, and 255 for no class"),
        (np.zeros((32, 32, 3), np.uint8) + np.array([0, 9, 0], np.uint8), "is coloured; a mask has one value a pixel"),
    ],
)
def test_wrong_masks_are_named(mask: Any, message: str, rows: Path, tmp_path: Path) -> None:
    Image.fromarray(mask).save(tmp_path / "mask.png")
    row = {"image": str(rows / "images" / "0.png"), "mask": str(tmp_path / "mask.png")}
    processor = ImageProcessor.from_config({"size": {"height": 32, "width": 32}})
    with pytest.raises(DataError, match=message):
        ImageSegmentation().encode(row, processor, ["0", "1"])


def test_pictures_without_a_mask_are_listed(tmp_path: Path) -> None:
    folder = tiny_scenes.save_masks(tmp_path / "rows", rows=4)
    (folder / "masks" / "1.png").unlink()
    (folder / "masks" / "2.png").write_bytes(b"no picture")
    lines = scan(str(folder), task="image-segmentation", columns=None, valid=None).problems.lines()
    assert lines == [
        'rows, file 2: "mask" is missing',
        "rows, file 3: masks/2.png cannot be read: it is no picture that Pillow reads",
    ]


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
def test_run_lengths_are_cocos() -> None:
    from pycocotools import mask as coco

    shape = np.random.default_rng(0).random((9, 7)) > 0.5
    counts = drawing.run_lengths(shape)
    np.testing.assert_array_equal(drawing.from_run_lengths(counts, shape.shape), shape)
    packed = coco.frPyObjects({"size": list(shape.shape), "counts": counts}, *shape.shape)
    np.testing.assert_array_equal(coco.decode(packed).astype(bool), shape)
