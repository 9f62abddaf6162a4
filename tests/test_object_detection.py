"""Objects through the whole line: boxes read, trained, merged, exported, run and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_scenes
import torch
from PIL import Image
from tolerances import BOXES, CONVOLUTION, METRIC, PIXELS

from edgelora.adapters import inject
from edgelora.adapters.lora import LoRASettings
from edgelora.config import FinetuneConfig
from edgelora.data.check import scan
from edgelora.errors import DataError, ModelError
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.images import ImageProcessor
from edgelora.models.load import load_model
from edgelora.models.predictor import to_tensors
from edgelora.models.source import open_model
from edgelora.tasks import boxes
from edgelora.tasks.base import Example
from edgelora.tasks.object_detection import ObjectDetection
from edgelora.train.finetune import finetune

TASK = ObjectDetection()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_scenes.save_objects(tmp_path_factory.mktemp("objects") / "rows")


@pytest.mark.parametrize(("family", "precision"), [("yolos", "int8"), ("detr", "int8"), ("rt_detr", "int8")])
def test_the_whole_line(family: str, precision: str, rows: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from edgelora.cli.main import cli

    model = tiny_scenes.save_detector(tmp_path / "model", family, labels=3)
    config = FinetuneConfig(precision=precision, epochs=3.0, batch_size=4, rank=4, learning_rate=1e-2, valid="0.2")
    figures = finetune(str(model), str(rows), tmp_path / "run", config)
    before = next(row["loss"] for row in figures["table"] if row["what"] == "base")
    assert figures["valid"]["loss"] < before
    exported = export(str(tmp_path / "run"), tmp_path / "bundle", precision=precision, force=True)
    assert exported["verify"]["passed"]
    assert exported["verify"]["passed"]
    adapter = evaluate(tmp_path / "run")["metrics"]
    bundle = evaluate(tmp_path / "bundle", str(rows))["metrics"]
    assert set(bundle["report"]) == {"disc", "square"}
    assert set(adapter) >= {"loss", "map", "map_50", "map_75"}
    picture, marked = rows / "images" / "3.png", tmp_path / "marked.png"
    done = CliRunner().invoke(cli, ["run", str(tmp_path / "bundle"), str(picture), "--save", str(marked), "--json"])
    assert done.exit_code == 0, done.output
    assert isinstance(json.loads(done.stdout)["output"], list)
    with Image.open(marked) as drawn:
        assert drawn.size == (32, 32)


@pytest.mark.parametrize("family", tiny_scenes.DETECTORS)
def test_networks_and_losses_equal_transformers(family: str, rows: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForObjectDetection

    folder = tiny_scenes.save_detector(tmp_path / "model", family)
    reference = AutoModelForObjectDetection.from_pretrained(folder).eval()
    model = load_model(open_model(str(folder)), "object-detection", base_bits=32).eval()
    processor = TASK.open_processor(folder)
    examples = [TASK.encode(row, processor, ["disc", "square"]) for row in located(rows)[:3]]
    batch = to_tensors(TASK.collate(examples, processor))
    truth = [
        {"class_labels": torch.from_numpy(e.arrays["classes"]).long(), "boxes": torch.from_numpy(e.arrays["boxes"])}
        for e in examples
    ]
    wanted = reference(pixel_values=batch["pixel_values"], labels=truth)
    found = model.outputs(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
    for name in ("logits", "pred_boxes"):
        torch.testing.assert_close(found[name].detach(), wanted[name].detach(), **CONVOLUTION)
    added = inject.attach(model, LoRASettings(rank=2), "all-linear")
    loss, objects = TASK.loss(model, batch)
    assert objects == 6
    torch.testing.assert_close(loss.detach() / objects, wanted.loss.detach(), **CONVOLUTION)
    loss.backward()
    moved = [layer.lora_B.grad is not None and bool(layer.lora_B.grad.any()) for layer in added.values()]
    assert sum(moved) > len(moved) // 2
    trained = {name for name, parameter in model.network.named_parameters() if parameter.requires_grad and "lora" not in name}
    assert all(parameter.grad is not None for name, parameter in model.network.named_parameters() if name in trained)


def located(rows: Path) -> list[dict[str, Any]]:
    found = scan(str(rows), task="object-detection", columns=None, valid=None)
    found.problems.refuse(str(rows))
    return [found.located(path, row) for path, _, row in found.rows("train")]


@pytest.mark.parametrize("outputs", [3, 4])
def test_found_boxes_equal_transformers(outputs: int) -> None:
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
    from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput
    from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

    torch.manual_seed(0)
    given = DetrObjectDetectionOutput(logits=3 * torch.randn(2, 9, outputs), pred_boxes=torch.rand(2, 9, 4))
    theirs = RTDetrImageProcessorPil() if outputs == 3 else DetrImageProcessorPil()
    sizes = [(30, 40), (25, 10)]
    wanted = theirs.post_process_object_detection(given, threshold=0.5, target_sizes=sizes)
    for number, size in enumerate(sizes):
        logits, shares = given.logits[number].numpy(), given.pred_boxes[number].numpy()
        scores, labels, corners = boxes.detections(logits, shares, 3, np.array(size))
        sure, order = scores > 0.5, torch.argsort(-wanted[number]["scores"], stable=True)
        np.testing.assert_allclose(scores[sure], wanted[number]["scores"][order], **BOXES)
        np.testing.assert_array_equal(labels[sure], wanted[number]["labels"][order])
        np.testing.assert_allclose(corners[sure], wanted[number]["boxes"][order], **BOXES)


def test_pictures_equal_transformers(tmp_path: Path) -> None:
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

    theirs = DetrImageProcessorPil(size={"shortest_edge": 24, "longest_edge": 40})
    theirs.save_pretrained(tmp_path)
    ours, random = ImageProcessor.from_folder(tmp_path), np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (*size, 3)).astype(np.uint8)) for size in ((30, 50), (61, 20), (24, 24))
    ]
    wanted = theirs(pictures, return_tensors="np")
    nothing = np.zeros(0, np.int32), np.zeros((0, 4), np.float32)
    batch = TASK.collate([TASK.example(ours, picture, *nothing) for picture in pictures], ours)
    np.testing.assert_allclose(batch["pixel_values"], wanted["pixel_values"], **PIXELS)
    np.testing.assert_array_equal(batch["pixel_mask"], wanted["pixel_mask"])


def test_pictures_of_several_sizes_need_a_class_with_a_mask(tmp_path: Path) -> None:
    folder = tiny_scenes.save_detector(tmp_path / "model", "yolos")
    model = load_model(open_model(str(folder)), "object-detection", base_bits=32)
    mask = torch.ones(1, 32, 32, dtype=torch.long)
    mask[:, :, 20:] = 0
    with pytest.raises(ModelError, match="YolosForObjectDetection takes pictures of one size"):
        model.outputs(pixel_values=torch.zeros(1, 3, 32, 32), pixel_mask=mask)


def example(classes: list[int], shares: list[list[float]]) -> Example:
    arrays = {"classes": np.array(classes, np.int32), "boxes": np.array(shares, np.float32).reshape(-1, 4)}
    return Example({**arrays, "size": np.array([100, 200], np.int32)})


def test_average_precision_and_loss_of_known_answers() -> None:
    truth = [example([0, 1], [[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]])]
    exact = np.array([0.9, 0.8], np.float32), np.array([0, 1]), np.array([[0, 0, 100, 100], [100, 0, 200, 100]], np.float32)
    assert boxes.average_precision([exact], truth, ["a", "b"])["map"] == pytest.approx(1.0)
    swapped = exact[0], exact[1][::-1], exact[2]
    assert boxes.average_precision([swapped], truth, ["a", "b"])["map"] == 0.0
    nothing = np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros((0, 4), np.float32)
    assert boxes.average_precision([nothing], truth, ["a", "b"])["map"] == 0.0
    logits = np.array([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0]], np.float32)
    turned = truth[0].arrays["boxes"][::-1].copy()
    assert boxes.matched_loss(logits, turned, truth[0], 2) == pytest.approx(0.0, abs=1e-9)
    found = boxes.generalized_iou(np.array([[0.0, 0, 2, 2]]), np.array([[1.0, 1, 3, 3], [4, 4, 5, 5]]))
    assert found[0].tolist() == pytest.approx([1 / 7 - 2 / 9, -20 / 25], **METRIC)


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ("text", '"objects" is a text'),
        ([{"box": [0, 0, 1, 1]}], "object 1 has no label"),
        ([{"label": "a", "box": [0, 0, 1]}], "object 1 has no box of four numbers"),
        ([{"label": "a", "box": [5, 0, 5, 9]}], "object 1 has a box without an inside: .5, 0, 5, 9."),
        (
            [{"label": "a", "box": [5, 0, 40, 9]}],
            r"the box \[5, 0, 40, 9\] of object 1 \(a\) leaves the picture, 32 × 32 pixels",
        ),
    ],
)
def test_wrong_objects_are_named(objects: Any, message: str, rows: Path) -> None:
    row = TASK.normalize({"image": str(rows / "images" / "0.png"), "objects": objects})
    if problems := TASK.problems(row):
        with pytest.raises(DataError, match=message):
            raise DataError(problems[0])
    else:
        with pytest.raises(DataError, match=message):
            TASK.encode(row, ImageProcessor.from_config({"size": {"height": 32, "width": 32}}), ["a"])


def test_columns_of_the_datasets_library_are_read() -> None:
    given = {"image": "x.png", "objects": '{"bbox": [[1, 2, 3, 4]], "category": ["a"]}'}
    assert TASK.normalize(given)["objects"] == [{"label": "a", "box": [1, 2, 4, 6]}]
