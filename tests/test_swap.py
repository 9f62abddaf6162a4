"""One base bundle, many adapters: logits against torch's, swapping in one process, and everything that is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tolerances
import torch

from edgelora.adapters import peft_format
from edgelora.adapters.lora import Factors
from edgelora.adapters.peft_format import AdapterFile
from edgelora.bundle import open_bundle
from edgelora.cli.main import cli
from edgelora.export.decoder import build_decoder
from edgelora.export.export import export
from edgelora.export.graph import save
from edgelora.export.onto import add_adapter
from edgelora.export.reference import decoder_logits
from edgelora.export.verify import Comparison
from edgelora.folder import write_manifest
from edgelora.inspect import inspect
from edgelora.models.families import decoder_spec
from edgelora.models.load import load_decoder
from edgelora.models.source import open_model
from edgelora.quant.checkpoint import MergedCheckpoint
from edgelora.quant.grid import QuantizedTensor
from edgelora.run.decoder import DecoderSession
from edgelora.run.model import load
from edgelora.scales_delta import FILE, Delta, codes_digest, write_delta

TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")  # of packed products only some
IDS = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]


def a_run(folder: Path, model: Path, *, seed: int = 0, rank: int = 3, bits: int = 32, **changes: Any) -> Path:
    """Make a run folder of a random adapter; it has no rows, so that nothing is scored."""
    source = open_model(str(model))
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(2):
        for role, name in (("self_attn", TARGETS[:3]), ("mlp", TARGETS[3:])):
            for target in name:
                path = f"model.layers.{layer}.{role}.{target}"
                outputs, inputs = source.shape(f"{path}.weight")
                a, b = (torch.randn(size, generator=generator) * 0.3 for size in ((rank, inputs), (outputs, rank)))
                factors[path] = Factors(a, b, 0.5)
    peft_format.save(AdapterFile(factors), folder)
    facts = {"reference": str(model), "fingerprint": source.fingerprint, "license": None}
    content = {"task": "text-generation", "labels": [], "model": facts, "data": "rows.jsonl", "grid": {}, "results": []}
    settings = {"settings": {"precision": "fp32"}, "plan": {"base_bits": bits}}
    write_manifest(folder, "run", **(content | settings | changes))
    return folder


def torch_logits(model: Path, run: Path | None, *, int8: bool = False) -> Any:
    network = load_decoder(open_model(str(model)), base_bits=32).eval()
    if run is not None:
        peft_format.apply(network, peft_format.load(run))
    return decoder_logits(network, [IDS], int8=int8)[0]


def scored(session: DecoderSession) -> Any:
    session.rewind(0)
    return session.score(IDS).copy()


def copy(swap_base: Path, name: str, out: Path) -> Path:
    return Path(shutil.copytree(swap_base / name, out))


def test_two_adapters_and_the_base_in_one_process(swap_base: Path, decoder_model: Path, tmp_path: Path) -> None:
    bundle = copy(swap_base, "fp32", tmp_path / "bundle")
    runs = {"one": a_run(tmp_path / "one", decoder_model), "two": a_run(tmp_path / "two", decoder_model, seed=1, rank=5)}
    for run in runs.values():
        assert add_adapter(run, bundle)["base"] == "exact"
    model = load(bundle, threads=1, adapter="one")
    found = {}
    for name in ("one", "two", None, "one"):
        model.use(name)
        found[name] = scored(model.generator.decoder)
        assert model.adapter == name
        wanted = torch_logits(decoder_model, runs[name] if name else None)
        np.testing.assert_allclose(found[name], wanted, **tolerances.GRAPH_FP32)
    assert np.abs(found["one"] - found["two"]).max() > 0.1
    model.use("two")
    stepped = [model.generator.decoder.prefill(IDS[:4]).copy(), *(model.generator.decoder.step(t).copy() for t in IDS[4:])]
    np.testing.assert_allclose(np.stack(stepped), found["two"][3:], **tolerances.GRAPH_FP32)


def test_an_answer_after_a_swap_forgets_the_cache(swap_base: Path, decoder_model: Path, tmp_path: Path) -> None:
    bundle = copy(swap_base, "fp32", tmp_path / "bundle")
    add_adapter(a_run(tmp_path / "one", decoder_model), bundle)
    alone = load(bundle, threads=1, adapter="one").generate("hello", max_new_tokens=8)
    model = load(bundle, threads=1)
    before = model.generate("hello", max_new_tokens=8)
    model.use("one")
    assert model.generate("hello", max_new_tokens=8) == alone != before


@pytest.mark.parametrize("way", ["static", "swap"])
def test_beside_int4_weights(swap_base: Path, tmp_path: Path, way: str) -> None:
    """A run of fp32 on the merged folder: the bundle holds the codes and scales that it was trained on."""
    run = a_run(tmp_path / "run", swap_base / "merged")
    if way == "static":
        assert export(str(run), tmp_path / "bundle", precision="int4", adapters="static")["verify"]["passed"]
        session = load(tmp_path / "bundle", threads=1).generator.decoder
    else:
        bundle = copy(swap_base, "int4", tmp_path / "bundle")
        assert add_adapter(run, bundle)["base"] == "exact"
        session = load(bundle, threads=1, adapter="run").generator.decoder
    exact, int8 = (torch_logits(swap_base / "merged", run, int8=rounded) for rounded in (False, True))
    report = Comparison(scored(session), exact, int8).report()
    assert report["passed"], report["problems"]
    assert report["int8"]["mean"] < 0.1 < np.abs(exact - torch_logits(swap_base / "merged", None)).mean() / exact.std()


class OtherScales:
    """A merged folder with other scales in some layers."""

    def __init__(self, checkpoint: MergedCheckpoint, scales: dict[str, Any]) -> None:
        self.checkpoint, self.scales = checkpoint, scales
        self.names, self.shape, self.read = checkpoint.names, checkpoint.shape, checkpoint.read

    def read_linear(self, path: str) -> Any:
        weight = self.checkpoint.read_linear(path)
        if path not in self.scales or not isinstance(weight, QuantizedTensor):
            return weight
        return replace(weight, scales=torch.from_numpy(self.scales[path]))


def scales_run(folder: Path, merged: Path, model: Path) -> tuple[Path, MergedCheckpoint, dict[str, Any]]:
    checkpoint = MergedCheckpoint.open(merged)
    layers = {path: checkpoint.read_linear(path) for path in checkpoint.layers if "layers." in path}
    digests = {path: codes_digest(q.codes.numpy(), q.bits, q.block_size) for path, q in layers.items()}  # type: ignore[union-attr]
    changed = [f"model.layers.0.{path}" for path in ("self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")]
    scales = {path: (layers[path].scales * 1.25).bfloat16().float().numpy() for path in changed}  # type: ignore[union-attr]
    run = a_run(folder, model, settings={"method": "scales", "precision": "int4"})
    write_delta(run / FILE, Delta(scales, digests, {}, str(model)))
    return run, checkpoint, scales


def test_scales_give_the_logits_of_a_bundle_that_was_exported_with_them(
    swap_base: Path, decoder_model: Path, tmp_path: Path
) -> None:
    run, checkpoint, scales = scales_run(tmp_path / "run", swap_base / "merged", decoder_model)
    graph = build_decoder(OtherScales(checkpoint, scales), decoder_spec(checkpoint.config))
    save(graph.model, tmp_path / "model.onnx")
    wanted = scored(DecoderSession(tmp_path / "model.onnx", max_length=64, threads=1))
    bundle = copy(swap_base, "int4", tmp_path / "bundle")
    assert add_adapter(run, bundle, name="s")["kind"] == "scales"
    model = load(bundle, threads=1)
    before = scored(model.generator.decoder)
    model.use("s")
    assert np.array_equal(scored(model.generator.decoder), wanted)
    model.use(None)
    assert np.array_equal(scored(model.generator.decoder), before)
    assert not np.array_equal(before, wanted)


def test_an_adapter_of_unrounded_weights_is_told_so(
    swap_base: Path, decoder_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = copy(swap_base, "int4", tmp_path / "bundle")
    assert add_adapter(a_run(tmp_path / "one", decoder_model), bundle)["base"] == "rounded"
    assert "was trained on other weights in" in capsys.readouterr().err
    grid = {"precision": "int4", "block_size": 32, "bits": {}}
    assert add_adapter(a_run(tmp_path / "two", decoder_model, grid=grid), bundle)["base"] == "rounded"
    assert "was trained with its update inside the rounding; beside the weights of" in capsys.readouterr().err


def test_replacing_an_adapter_and_copying_a_bundle(swap_base: Path, decoder_model: Path, tmp_path: Path) -> None:
    bundle = copy(swap_base, "fp32", tmp_path / "bundle")
    first, second = (a_run(tmp_path / f"run{seed}", decoder_model, seed=seed) for seed in range(2))
    add_adapter(first, bundle, name="x")
    replaced = add_adapter(second, bundle, name="x", overwrite=True)
    assert [path.name for path in (bundle / "adapters").iterdir()] == [Path(replaced["file"]).name]
    np.testing.assert_allclose(
        scored(load(bundle, threads=1, adapter="x").generator.decoder),
        torch_logits(decoder_model, second),
        **tolerances.GRAPH_FP32,
    )
    add_adapter(first, bundle, out=tmp_path / "copy")
    assert list(open_bundle(tmp_path / "copy").manifest["adapters"]) == ["x", "run0"]
    assert list(open_bundle(bundle).manifest["adapters"]) == ["x"]


def test_the_verbs(swap_base: Path, decoder_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = copy(swap_base, "fp32", tmp_path / "bundle")
    run = a_run(tmp_path / "lights", decoder_model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "hello", "completion": "you"}\n', encoding="utf-8")

    def call(*arguments: str | Path) -> dict[str, Any]:
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, arguments), "--json"])
        assert not ended.value.code
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    assert call("export", run, "--onto", bundle)["adapter"] == "lights"
    plain, adapted = (call("run", bundle, "hello", "--max-new-tokens", "6", *more) for more in ((), ("--adapter", "lights")))
    assert plain["output"] != adapted["output"] == load(bundle, adapter="lights").generate("hello", max_new_tokens=6)
    losses = [
        call("evaluate", bundle, rows, "--no-generate", *more)["metrics"]["loss"] for more in ((), ("--adapter", "lights"))
    ]
    assert losses[0] != losses[1]
    entry = call("inspect", bundle)["adapters"][0]
    assert (entry["adapter"], entry["kind"], entry["rank"], entry["layers"], entry["base"]) == (
        "lights",
        "lora",
        3,
        10,
        "exact",
    )
    assert inspect(bundle)["misses"] == []
