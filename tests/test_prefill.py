"""The graph for prompts, in 8 bits: what one product computes, the cache it fills, when it is used, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from tiny import DECODERS, save_decoder
from tolerances import INT8_CACHE, INT8_PRODUCT

import edgelora
from edgelora.cli.main import cli
from edgelora.errors import FolderError, ModelError, SettingsError
from edgelora.export import prefill as exported
from edgelora.export.decoder import build_decoder
from edgelora.export.export import export
from edgelora.export.graph import GraphBuilder, save
from edgelora.export.int8_linear import Int8Layers, per_output
from edgelora.folder import MANIFEST, read_manifest
from edgelora.merging.merge import merge
from edgelora.models.families import decoder_spec
from edgelora.quant.checkpoint import MergedCheckpoint
from edgelora.run.decoder import DecoderSession
from edgelora.run.generate import Generator
from edgelora.run.prefill import LEAST, PromptGraph

IDS = np.random.default_rng(0).integers(0, 250, 90).tolist()
LONG = "turn the light in the kitchen off, then on, then off again, and tell me when that is done"


@pytest.fixture(scope="module")
def bundle(decoder_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts") / "bundle"
    export(str(decoder_model), folder, precision="int4", fast_prompts=True)
    return folder


def graph_of(bundle: Path) -> PromptGraph:
    return PromptGraph(bundle / read_manifest(bundle, "bundle")["prefill"]["file"], threads=1, keep=False)


def decoder_of(bundle: Path, prompts: PromptGraph | None = None) -> DecoderSession:
    path = bundle / read_manifest(bundle, "bundle")["model_file"]
    return DecoderSession(path, max_length=512, threads=1, prompts=prompts)


def test_a_product_is_that_of_rounded_tokens_and_rounded_outputs(decoder_model: Path, tmp_path: Path) -> None:
    merge(None, tmp_path / "merged", model=str(decoder_model), precision="int4")
    checkpoint = MergedCheckpoint.open(tmp_path / "merged")
    paths = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")]
    g = GraphBuilder("product")
    x = g.input("x", ir.DataType.FLOAT, (1, "tokens", 32))
    layers = Int8Layers(g, checkpoint)
    assert not layers.can_pack(paths)
    both = g.op("Concat", [layers.linear(x, path) for path in paths], "both", axis=-1)
    g.output(both, "y", ir.DataType.FLOAT, (1, "tokens", 96))
    assert sum(node.op_type == "QuantizeLinear" for node in g.graph) == 1, "what both read is rounded once"
    save(g.model(), tmp_path / "product.onnx")
    tokens = np.random.default_rng(0).standard_normal((1, 7, 32)).astype(np.float32)
    tokens[0, 3] *= 1000  # one token's size must not cost the others their digits
    tokens[0, 4] = 0
    found = ort.InferenceSession(tmp_path / "product.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": tokens})[0][0]

    sizes = np.abs(tokens[0]).max(axis=1, keepdims=True)
    codes = np.rint(tokens[0] / np.maximum(sizes, 1e-20) * 127)
    weights, scales = zip(*(per_output(checkpoint.read_linear(path)) for path in paths), strict=True)
    assert all(np.abs(weight).max(axis=0).tolist() == [127] * 48 for weight in weights)
    wanted = (codes @ np.concatenate(weights, 1).astype(np.float64)) * np.concatenate(scales) * sizes / 127
    np.testing.assert_allclose(found, wanted, **INT8_PRODUCT)


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_every_family_gets_nearly_the_same_cache(family: str, tmp_path: Path) -> None:
    """Also the part after other positions, and the buffers' rest is left alone."""
    model = save_decoder(tmp_path / "model", family, **({"head_dim": 16} if family == "qwen3" else {}))
    merge(None, tmp_path / "merged", model=str(model), precision="int8")
    checkpoint = MergedCheckpoint.open(tmp_path / "merged")
    spec = decoder_spec(checkpoint.config)
    save(build_decoder(checkpoint, spec, max_positions=64).model, tmp_path / "model.onnx")
    builder = exported.DecoderBuilder(checkpoint, spec, 64, kind=Int8Layers)
    save(builder.build_without_logits(), tmp_path / "prefill.pb")
    decoder = DecoderSession(tmp_path / "model.onnx", max_length=64, threads=1)
    decoder.prefill(IDS[:40])
    wanted = decoder.saved()
    for array in decoder.cache.values():
        array[...] = 77
    graph = PromptGraph(tmp_path / "prefill.pb", threads=1, keep=False)
    graph.fill(IDS[:25], decoder.cache, 0)
    graph.fill(IDS[25:40], decoder.cache, 25)
    for name, array in decoder.cache.items():
        difference = np.abs(array[:, :, :40] - wanted[name]).mean() / np.abs(wanted[name]).mean()
        assert difference < INT8_CACHE, name
        assert (array[:, :, 40:] == 77).all(), name


def test_long_prompts_take_it_and_short_ones_do_not(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []
    fill = PromptGraph.fill
    monkeypatch.setattr(PromptGraph, "fill", lambda self, ids, *rest: (filled.append(len(ids)), fill(self, ids, *rest))[1])
    generator: Generator = edgelora.load(bundle, threads=1).generator
    graph = generator.decoder.prompts
    assert graph is not None
    generator.feed(IDS[:LEAST])
    assert filled == []
    assert "session" not in vars(graph), "it is opened, and takes memory, when it is needed"
    generator.feed(IDS)
    assert filled == [len(IDS) - LEAST - 1]
    generator.feed([*IDS, 5])
    assert filled == [len(IDS) - LEAST - 1], "what is cached is not computed again"
    assert generator.cached == [*IDS, 5]
    assert generator.decoder.length == len(IDS) + 1


def test_logits_after_it_are_near_the_others(bundle: Path) -> None:
    plain, fast = decoder_of(bundle).prefill(IDS).copy(), decoder_of(bundle, graph_of(bundle)).prefill(IDS).copy()
    assert not np.array_equal(plain, fast)
    assert np.abs(plain - fast).mean() / plain.std() < INT8_CACHE


def test_the_manifest_says_what_it_changes(bundle: Path) -> None:
    entry = read_manifest(bundle, "bundle")["prefill"]
    assert entry["file"] == "onnx/prefill.pb"
    assert entry["file"] in read_manifest(bundle, "bundle")["files"]
    assert 0 < entry["kl"] < exported.MOST_KL
    assert entry["loss"] == pytest.approx(entry["loss_without"], rel=0.01)
    assert sorted(path.name for path in (bundle / "onnx").glob("*.onnx")) == ["model_q4.onnx"]


def test_a_prompt_beyond_the_limit_leaves_the_cache_as_it_was(bundle: Path) -> None:
    decoder = decoder_of(bundle, graph_of(bundle))
    decoder.prefill(IDS)
    with pytest.raises(edgelora.errors.UserError, match="at most 512"):
        decoder.prefill(IDS * 6)
    assert decoder.length == len(IDS)


def test_answers_that_would_be_others_are_refused(
    decoder_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exported, "MOST_KL", 0.0)
    with pytest.raises(ModelError, match=r"nats a token; 0\.0 are allowed"):
        export(str(decoder_model), tmp_path / "bundle", fast_prompts=True)
    assert not (tmp_path / "bundle").exists()
    assert export(str(decoder_model), tmp_path / "bundle", fast_prompts=True, force=True)["verify"]["passed"]
    assert (tmp_path / "bundle" / "onnx" / "prefill.pb").is_file()
    assert "are allowed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"precision": "fp32"}, "which an fp32 bundle does not"),
        ({"adapters": "swap"}, "not for --adapters swap"),
        ({"device": "web"}, "what runs bundles on web does not"),
    ],
)
def test_what_cannot_have_one_says_so(decoder_model: Path, tmp_path: Path, wish: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        export(str(decoder_model), tmp_path / "bundle", fast_prompts=True, **wish)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("entry", [{}, "onnx/prefill.pb", {"file": "../../prefill.pb"}, {"file": "onnx/none.pb"}])
def test_a_damaged_entry_is_named(bundle: Path, tmp_path: Path, entry: object) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    manifest["prefill"] = entry
    (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(FolderError, match=r"prompt graph|points outside|does not exist"):
        edgelora.load(copy, threads=1).generator.feed(IDS)


def test_the_command_line_writes_and_runs_one(decoder_model: Path, tmp_path: Path) -> None:
    made = CliRunner().invoke(cli, ["export", str(decoder_model), "-o", str(tmp_path / "bundle"), "--fast-prompts", "--json"])
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["prefill"]["file"] == "onnx/prefill.pb"
    ran = CliRunner().invoke(cli, ["run", str(tmp_path / "bundle"), LONG, "--max-new-tokens", "3", "--json"])
    assert ran.exit_code == 0, ran.stderr
    assert isinstance(json.loads(ran.stdout)["output"], str)
