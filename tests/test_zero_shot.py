"""Pictures and texts through the whole line: the losses, both searches, the graph, `run` with and without texts."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_image_text
import torch
from click.testing import CliRunner
from tolerances import LOGITS_FP32, METRIC

from edgelora.cli.main import cli
from edgelora.config import FinetuneConfig
from edgelora.data.check import scan
from edgelora.errors import DataError, ModelError, SettingsError
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.models.load import load_model
from edgelora.models.predictor import TorchPredictor, to_tensors
from edgelora.models.source import open_model
from edgelora.run.answer import run
from edgelora.tasks import get_task
from edgelora.train.finetune import finetune

TASK: Any = get_task("zero-shot-image-classification")
SENTENCES = list(tiny_image_text.SENTENCES.values())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_image_text.save_captions(tmp_path_factory.mktemp("captions"))


def located(rows: Path) -> list[dict[str, Any]]:
    found = scan(str(rows), task=None, columns=None, valid=None)
    assert found.task.name == TASK.name
    return [found.located(path, row) for path, _, row in found.rows("train")]


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_embeddings_and_loss_are_those_of_transformers(family: str, rows: Path, tmp_path: Path) -> None:
    import transformers

    folder = tiny_image_text.save_image_text(tmp_path / "model", family)
    theirs = transformers.AutoModelForZeroShotImageClassification.from_pretrained(folder).eval()
    model = load_model(open_model(str(folder)), TASK.name, base_bits=32).eval()
    processor = TASK.open_processor(folder)
    chosen = [located(rows)[place] for place in (0, 20, 40)]
    examples = [TASK.encode(row, processor, []) for row in chosen]
    batch = to_tensors(TASK.collate(examples, processor))
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    padding = {"padding": "max_length", "max_length": 32} if family == "siglip" else {"padding": True}
    wanted_ids = tokenizer([row["text"] for row in chosen], return_tensors="pt", **padding)["input_ids"]
    assert torch.equal(batch["input_ids"], wanted_ids)
    with torch.no_grad():
        wanted = theirs(**model.inputs_of(batch), return_loss=True)
        found = model.outputs(**model.inputs_of(batch))
        loss, count = TASK.loss(model, batch)
    for name in ("logits_per_image", "text_embeds", "image_embeds"):
        torch.testing.assert_close(found[name], wanted[name], **LOGITS_FP32)
    torch.testing.assert_close(loss / count, wanted.loss, **LOGITS_FP32)
    predictor = TorchPredictor(model, functools.partial(TASK.collate, processor=processor))
    metrics = TASK.evaluate(predictor, chosen, examples, processor, [], generate=False)
    assert metrics["loss"] == pytest.approx(float(wanted.loss), rel=1e-4)
    own = torch.arange(3)
    assert metrics["accuracy"] == pytest.approx(float((wanted.logits_per_image.argmax(1) == own).double().mean()))
    assert metrics["image_recall@1"] == pytest.approx(
        float((wanted.logits_per_text.argmax(1) == torch.arange(3)).double().mean())
    )


def test_the_same_text_and_the_same_picture_are_no_counterexamples() -> None:
    from edgelora.tasks.image_texts import contrastive, pairwise

    logits = torch.tensor([[2.0, 9.0, 0.0], [9.0, 2.0, 1.0], [0.0, 1.0, 3.0]])
    batch = {"labels_text": torch.tensor([7, 7, 8]), "labels_image": torch.tensor([1, 2, 3])}
    kept = logits.clone()
    kept[0, 1] = kept[1, 0] = -torch.inf
    both = [torch.nn.functional.cross_entropy(way, torch.arange(3), reduction="sum") for way in (kept, kept.T)]
    assert float(contrastive(logits, batch)) == pytest.approx(float(sum(both)) / 2, **METRIC)
    signs = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    wanted = -torch.nn.functional.logsigmoid(signs * logits).sum()
    assert float(pairwise(logits, batch)) == pytest.approx(float(wanted), **METRIC)


@pytest.mark.parametrize(("family", "precision"), [("clip", "int8"), ("siglip", "int4")])
def test_the_whole_line(family: str, precision: str, rows: Path, tmp_path: Path) -> None:
    model = tiny_image_text.save_image_text(tmp_path / "model", family)
    config = FinetuneConfig(precision=precision, epochs=5.0, batch_size=12, rank=8, learning_rate=2e-2, threads=1)
    figures = finetune(str(model), str(rows), tmp_path / "run", config)
    assert figures["valid"]["accuracy"] == 1.0
    assert figures["valid"]["loss"] < 0.5 * next(row["loss"] for row in figures["table"] if row["what"] == "base")
    exported = export(str(tmp_path / "run"), tmp_path / "bundle", precision=precision, force=True)
    assert exported["verify"]["passed"]
    assert exported["verify"]["passed"]
    assert evaluate(tmp_path / "bundle", str(rows))["metrics"]["accuracy"] > 0.9
    assert sorted(json.loads((tmp_path / "bundle" / "edgelora.json").read_text())["labels"]) == sorted(SENTENCES)
    dark = str(sorted((rows.parent / "pictures" / "dark").iterdir())[0])
    shown: list[str] = []
    ranked = run(tmp_path / "bundle", [dark], write=shown.append)["output"]
    assert ranked[0]["label"] == "a dark picture"
    assert "".join(shown).startswith("a dark picture")
    if family == "clip":
        assert sum(entry["probability"] for entry in ranked) == pytest.approx(1.0)
    command = ["run", str(tmp_path / "bundle"), dark, "--labels", "bright light, a dark picture", "--json"]
    given = CliRunner().invoke(cli, command)
    assert given.exit_code == 0, given.output
    answer = json.loads(given.stdout)["output"]
    assert [entry["label"] for entry in answer] == ["a dark picture", "bright light"]
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"image": dark, "labels": ["bright light", "a dark picture"]}) + "\n")
    out = tmp_path / "answered.jsonl"
    done = CliRunner().invoke(cli, ["run", str(tmp_path / "bundle"), "--input", str(asked), "--output", str(out)])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["output"] == answer


def test_the_graph_is_what_other_loaders_expect(tmp_path: Path) -> None:
    import onnxruntime
    import transformers

    model = tiny_image_text.save_image_text(tmp_path / "model")
    export(str(model), tmp_path / "bundle", precision="fp32")
    session = onnxruntime.InferenceSession(tmp_path / "bundle" / "onnx" / "model.onnx")
    assert {value.name for value in session.get_inputs()} == {"input_ids", "attention_mask", "pixel_values"}
    names = [value.name for value in session.get_outputs()]
    assert names == ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
    feeds = {
        "input_ids": np.array([[262, 5, 263], [262, 263, 260]]), "attention_mask": np.array([[1, 1, 1], [1, 1, 0]]),
        "pixel_values": np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32),
    }  # fmt: skip
    theirs = transformers.CLIPModel.from_pretrained(model).eval()
    with torch.no_grad():
        wanted = theirs(**to_tensors(feeds))
    for name, array in zip(names, session.run(names, feeds), strict=True):
        np.testing.assert_allclose(array, wanted[name].numpy(), rtol=1e-4, atol=1e-4)
    picture = str(tmp_path / "none.png")
    with pytest.raises(DataError, match="does not exist"):
        run(tmp_path / "bundle", [picture], labels=["a"])
    from PIL import Image

    Image.new("RGB", (32, 32)).save(picture)
    with pytest.raises(DataError, match="there are no texts to rank for the picture"):
        run(tmp_path / "bundle", [picture])
    with pytest.raises(DataError, match='"labels" must be a list of texts, none of them empty'):
        run(tmp_path / "bundle", [picture], labels=["a", " "])


def test_what_does_not_fit_is_told(rows: Path, tmp_path: Path) -> None:
    import tiny

    with pytest.raises(ModelError, match='pictures and texts are compared by clip and siglip; this model is "vit"'):
        TASK.open_processor(tiny.save_vision(tmp_path / "vit", "vit"))
    model = tiny_image_text.save_image_text(tmp_path / "model")
    example = TASK.encode({**located(rows)[0], "text": "x" * 40}, TASK.open_processor(model), [])
    assert TASK.example_problems(example, 32) == ["a text of 42 tokens, over the limit of 32"]
    cut = TASK.truncate(example, 32)
    assert cut.arrays["sizes"].tolist() == [32]
    assert cut.arrays["tokens"][-1] == 263
    assert len(example) - len(cut) == 10
    wrong = TASK.problems(TASK.normalize({"image": "none.png", "text": " "}))
    assert wrong == ["none.png does not exist", '"text" is empty']


def test_labels_are_for_tasks_that_rank_texts(tmp_path: Path) -> None:
    import tiny

    export(str(tiny.save_encoder(tmp_path / "model")), tmp_path / "bundle", precision="fp32")
    with pytest.raises(SettingsError, match="--labels is for tasks that rank texts; this bundle is for text-classification"):
        run(tmp_path / "bundle", ["a"], labels=["b"])
