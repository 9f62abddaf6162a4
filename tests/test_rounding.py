"""Merges that round with rows: layer by layer on tiny models, limits of size and loss, levels, what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from edgelora.adapters.adapted import Adapted
from edgelora.adapters.merged_source import merged_source, merged_weight
from edgelora.errors import DataError, SettingsError
from edgelora.export.export import export
from edgelora.folder import read_manifest, write_manifest
from edgelora.merging.levels import choose_levels, within_share
from edgelora.merging.merge import merge
from edgelora.merging.rounding import Rounded, round_model
from edgelora.models.load import load_model
from edgelora.models.source import open_model
from edgelora.models.tensors import GENERATION, model_layout
from edgelora.models.walk import listening, walk_through
from edgelora.quant.bits import Choice
from edgelora.quant.checkpoint import MergedCheckpoint
from tests.tiny import save_decoder, save_encoder

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def rows_of_text(path: Path) -> str:
    lines = [{"prompt": f"say {i}", "completion": f"it is {i * 7 % 13} and {i}"} for i in range(45)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def rows_of_labels(path: Path) -> str:
    lines = [{"text": f"say {i}", "label": f"LABEL_{i % 3}"} for i in range(45)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def adapted_of(folder: Path, task: str) -> Adapted:
    source = open_model(str(folder))
    layout = model_layout(source.config, task)
    return Adapted.build(source, None, layout)


def some_batches(task: str) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    ids = [torch.randint(0, 250, (40,)) for _ in range(3)]
    if task == "text-classification":
        return [{"input_ids": part.view(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.int64)} for part in ids]
    starts = torch.tensor([0, 15, 40])
    return [{"ids": part, "starts": starts, "positions": torch.tensor([3]), "targets": torch.tensor([3])} for part in ids]


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        if "ids" in batch:
            return torch.as_tensor(model.logits(model.hidden(batch["ids"], batch["starts"])))
        return torch.as_tensor(model.logits(**batch))


def rounded(model: Any, adapted: Adapted, batches: Sequence[dict[str, torch.Tensor]], choice: Choice) -> list[Rounded]:
    walk = walk_through(model, batches)
    found = round_model(model, walk, lambda path: merged_weight(adapted, path), lambda path: [choice])
    return [results[0] for results in found]


@pytest.mark.parametrize(
    ("task", "family", "together"),
    [
        (GENERATION, "llama", ["q_proj", "k_proj", "v_proj"]),
        (GENERATION, "gpt2", ["c_attn"]),
        (GENERATION, "gemma2", ["gate_proj", "up_proj"]),
        ("text-classification", "bert", ["query", "key", "value"]),
        ("text-classification", "modernbert", ["Wqkv"]),
    ],
)
def test_every_layer_is_rounded_on_what_the_rounded_ones_before_it_give(
    task: str, family: str, together: list[str], tmp_path: Path
) -> None:
    (save_decoder if task == GENERATION else save_encoder)(tmp_path / "model", family)
    adapted, batches = adapted_of(tmp_path / "model", task), some_batches(task)
    labels = ["LABEL_0", "LABEL_1", "LABEL_2"] if task == "text-classification" else []
    whole = load_model(merged_source(adapted, labels, linears=True), task, base_bits=32, labels=labels).eval()
    # Without weights: each layer gets its own when its block is reached.
    model: Any = load_model(merged_source(adapted, labels, linears=False), task, base_bits=32, labels=labels).eval()
    results = rounded(model, adapted, batches, Choice(8, 32))
    assert [result.path for result in results] == [path for path in model.linears() if path in {r.path for r in results}]
    assert {result.path for result in results} == set(adapted.layout.linears)
    groups: dict[str, list[str]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result.path.rpartition(".")[2])
    assert together in groups.values()
    before, after = logits_of(whole, batches[0]), logits_of(model, batches[0])
    assert 0 < (after - before).abs().max() < 0.4 * before.abs().max()
    # What the last layer's error was measured on is what the rounded model computes there.
    last = results[-1]
    sums = torch.zeros(last.tensor.num_inputs, last.tensor.num_inputs)

    def see(layer: Any, x: torch.Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        sums.addmm_(flat.t(), flat)

    with listening([model.linears()[last.path]], see):
        for batch in batches:
            logits_of(model, batch)
    from edgelora.quant.grid import dequantize

    change = dequantize(last.tensor) - merged_weight(adapted, last.path)
    tokens = sum(batch["ids"].numel() if "ids" in batch else batch["input_ids"].numel() for batch in batches)
    if family != "bert":  # whose last layer, the pooler, sees one token of each row
        torch.testing.assert_close(last.error_N, ((change @ sums / tokens) * change).sum(1), rtol=1e-2, atol=1e-9)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return a model and a file of rows."""
    folder = tmp_path_factory.mktemp("llama")
    return str(save_decoder(folder / "model", **WIDE)), rows_of_text(folder / "rows.jsonl")


def test_a_model_is_rounded_with_the_rows_that_are_given(llama: tuple[str, str], tmp_path: Path) -> None:
    model, rows = llama
    results = {}
    for method in ("gptq", "nearest"):
        figures = merge(None, tmp_path / method, model=model, calibrate=rows, rounding=method)
        results[method] = {row["what"]: row["loss"] for row in figures["results"]}
        facts = read_manifest(tmp_path / method, "merged")["rounding"]
        assert (facts["method"], facts["rows"], facts["held_out_rows"]) == (method, 30, 15)
        assert MergedCheckpoint.open(tmp_path / method).layers["model.layers.1.mlp.down_proj"]["bits"] in (4, 8)
    exact = results["gptq"]["base"]
    lost = {method: abs(losses["merged"] - exact) for method, losses in results.items()}
    assert lost["gptq"] < 0.5 * lost["nearest"]


def test_an_encoder_is_rounded_with_rows_too(tmp_path: Path) -> None:
    model = str(save_encoder(tmp_path / "model", **{k: v for k, v in WIDE.items() if k != "head_dim"}))
    figures = merge(None, tmp_path / "out", model=model, calibrate=rows_of_labels(tmp_path / "rows.jsonl"))
    assert figures["rounding"]["method"] == "gptq"
    assert figures["results"][-1]["what"] == "merged"
    assert all("accuracy" in row for row in figures["results"])


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_size_is_kept_and_used(llama: tuple[str, str], tmp_path: Path) -> None:
    model, rows = llama
    limit = 115_000
    figures = merge(None, tmp_path / "out", model=model, calibrate=rows, size=limit)
    assert 0.6 * limit < folder_bytes(tmp_path / "out") <= limit
    chosen = [row for row in figures["trade"] if row["chosen"]]
    assert len(chosen) == 1
    assert len({row["bits a weight"] for row in figures["trade"]}) == len(figures["trade"]) > 2
    layers = MergedCheckpoint.open(tmp_path / "out").layers
    assert {layer["bits"] for layer in layers.values()} == {4, 8}
    for i in range(2):  # layers with one input stay one product
        assert len({(layers[f"model.layers.{i}.self_attn.{n}_proj"]["bits"]) for n in "qkv"}) == 1
    with pytest.raises(SettingsError, match=r"cannot be had: this model takes at least"):
        merge(None, tmp_path / "none", model=model, calibrate=rows, size=1000)
    assert not list(tmp_path.glob(".none*"))


def test_a_loss_is_kept_with_fewer_bytes_than_8_bits_take(llama: tuple[str, str], tmp_path: Path) -> None:
    model, rows = llama
    figures = merge(None, tmp_path / "out", model=model, calibrate=rows, loss=0.02)
    exact, found = (row["loss"] for row in figures["rounding"]["results"])
    assert found <= 1.02 * exact
    merge(None, tmp_path / "int8", model=model, precision="int8")
    assert folder_bytes(tmp_path / "out") < folder_bytes(tmp_path / "int8")


def test_the_levels_of_a_merged_folder_are_those_of_the_bundle(llama: tuple[str, str], tmp_path: Path) -> None:
    merge(None, tmp_path / "merged", model=llama[0])
    path = "model.layers.1.mlp.down_proj"
    manifest = read_manifest(tmp_path / "merged", "merged")
    known = {key: manifest[key] for key in ("task", "labels", "model", "precision", "layers")}
    write_manifest(tmp_path / "merged", "merged", **known, accuracy_levels={path: 0})
    result = export(str(tmp_path / "merged"), tmp_path / "bundle")
    nodes = read_manifest(tmp_path / "bundle", "bundle")["nodes"]
    levels = {layer: facts["accuracy_level"] for facts in nodes.values() for layer in facts["rows"]}
    assert levels[path] == 0
    assert set(levels.values()) == {0, 4}
    assert list(result["exceptions"].values()) == [0]


class Losses:
    """Stands for calibration rows whose loss is 1, and rises with each layer whose activations are rounded."""

    examples: Sequence[Any] = ()

    def __init__(self, batch: dict[str, torch.Tensor], rise: float) -> None:
        self.batch, self.rise = batch, rise

    def loss(self, model: Any, examples: Sequence[Any]) -> float:
        before = logits_of(model, self.batch)
        rounded = [layer for layer in model.linears().values() if layer._forward_pre_hooks]
        return 1.0 + self.rise * len(rounded) + 0.0 * float(before.sum())


@pytest.mark.parametrize("rise", [0.0, 0.0004, 0.1])
def test_levels_are_chosen_only_where_int8_activations_cost_loss(rise: float, tmp_path: Path) -> None:
    save_decoder(tmp_path / "model")
    adapted, batches = adapted_of(tmp_path / "model", GENERATION), some_batches(GENERATION)
    model = load_model(merged_source(adapted, [], linears=True), GENERATION, base_bits=32).eval()
    rounded(model, adapted, batches, Choice(4, 32))
    rows: Any = Losses(batches[0], rise)
    levels, losses = choose_levels(model, rows)
    assert set(levels.values()) <= {0}
    if rise == 0.0:
        assert levels == {}
    elif rise < 0.001:  # fourteen layers cost 0.0056, 0.005 are allowed: as many as that takes, and as may be
        assert 0 < len(levels) <= 2
        assert losses["int8 with levels"] < losses["int8"]
    else:  # beyond repair: as many as may be
        sizes = {path: layer.weight.shape[0] * layer.weight.shape[1] for path, layer in model.linears().items()}  # type: ignore[union-attr, operator, index]
        assert 0 < sum(sizes[path] for path in levels) <= 0.1 * sum(sizes.values())


def test_a_tenth_of_the_weights_may_keep_float_activations() -> None:
    assert within_share(["a", "b", "c"], {"a": 5, "b": 5, "c": 5, "d": 85}) == ["a", "b"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 10**6}, "takes rows"),
        ({"rounding": "gptq"}, "there are none"),
        ({"precision": "fp32", "loss": 0.1}, "--loss: fp32 rounds nothing"),
    ],
)
def test_wishes_without_what_they_take_are_refused(
    settings: dict[str, Any], message: str, llama: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        merge(None, tmp_path / "out", model=llama[0], **settings)
    assert not (tmp_path / "out").exists()


def test_rows_of_another_task_are_refused(llama: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="text"):
        merge(
            None, tmp_path / "out", model=llama[0], calibrate=rows_of_labels(tmp_path / "rows.jsonl"), columns={"prompt": "x"}
        )
    bert = str(save_encoder(tmp_path / "bert"))
    (tmp_path / "wrong.jsonl").write_text('{"text": "a", "label": "seven"}\n{"text": "b", "label": "LABEL_1"}\n')
    with pytest.raises(DataError, match='the label "seven" is none of the model'):
        merge(None, tmp_path / "out", model=bert, calibrate=str(tmp_path / "wrong.jsonl"))
