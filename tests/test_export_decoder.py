"""The decoder graph of every family: against transformers in fp32, against the merged codes in int4, with cache and padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tolerances
import torch

from edgelora.errors import ModelError
from edgelora.export.decoder import DecoderGraph, build_decoder
from edgelora.export.graph import save
from edgelora.export.reference import decoder_logits
from edgelora.export.verify import Comparison, check_codes
from edgelora.merging.merge import merge
from edgelora.models.families import decoder_spec
from edgelora.models.load import load_decoder
from edgelora.models.source import open_model
from edgelora.quant.checkpoint import MergedCheckpoint

LENGTHS = (20, 14)  # of the two rows of a batch, the second padded on the right
POSITIONS = 64


class Exported:
    """A tiny decoder as transformers folder, merged folder and ONNX session."""

    def __init__(self, folder: Path, family: str, precision: str, levels: int | None = None, **overrides: Any) -> None:
        import onnxruntime as ort

        if family == "qwen3":
            overrides = {"head_dim": 24, **overrides}  # heads of a multiple of 8 channels; 12 are refused
        self.folder = tiny.save_decoder(folder / "model", family, **overrides)
        merge(None, folder / "merged", model=str(self.folder), precision=precision)
        self.checkpoint = MergedCheckpoint.open(folder / "merged")
        self.spec = decoder_spec(self.checkpoint.config)
        levels_by_path = dict.fromkeys(self.checkpoint.layers, levels) if levels is not None else {}
        self.graph: DecoderGraph = build_decoder(
            self.checkpoint, self.spec, max_positions=POSITIONS, accuracy_levels=levels_by_path
        )
        self.path = folder / "model.onnx"
        save(self.graph.model, self.path)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(str(self.path), options)
        self.names = [value.name for value in self.session.get_outputs()]

    def run(self, ids: Any, mask: Any, past: dict[str, Any] | None = None, keep: int | None = None) -> dict[str, Any]:
        spec = self.spec
        empty = np.zeros((len(ids), spec.num_kv_heads, 0, spec.head_dim), np.float32)
        feeds = {f"past_key_values.{i}.{part}": empty for i in range(spec.num_layers) for part in ("key", "value")}
        feeds |= {name.replace("present", "past_key_values"): value for name, value in (past or {}).items() if name != "logits"}
        if keep is not None:
            feeds["num_logits_to_keep"] = np.array(keep, np.int64)
        found = self.session.run(None, {"input_ids": ids, "attention_mask": mask, **feeds})
        return dict(zip(self.names, found, strict=True))


def batch() -> tuple[Any, Any]:
    ids = np.random.default_rng(0).integers(0, 256, (2, LENGTHS[0]))
    mask = (np.arange(LENGTHS[0]) < np.array(LENGTHS)[:, None]).astype(np.int64)
    return ids, mask


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_fp32_graph_equals_transformers(tmp_path: Path, family: str) -> None:
    import transformers

    exported = Exported(tmp_path, family, "fp32")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported.folder, dtype=torch.float32, attn_implementation="eager")
    ids, mask = batch()
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    found = exported.run(ids, mask, keep=0)["logits"]
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(found[row, :length], wanted[row, :length], **tolerances.GRAPH_FP32)
    last, three = exported.run(ids, mask)["logits"], exported.run(ids, mask, keep=3)["logits"]
    assert last.shape[1] == 1
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(last[row, 0], wanted[row, length - 1], **tolerances.GRAPH_FP32)
        np.testing.assert_allclose(three[row], wanted[row, length - 3 : length], **tolerances.GRAPH_FP32)


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_int4_graph_computes_with_the_merged_codes(tmp_path: Path, family: str) -> None:
    """Without the rounding of activations (level 0) it is the dequantized model; with it (level 4) it stays near."""
    exact = Exported(tmp_path / "exact", family, "int4", levels=0)
    fast = Exported(tmp_path / "fast", family, "int4")
    model = load_decoder(open_model(str(fast.checkpoint.folder)), base_bits=32)
    ids = batch()[0][:1]
    mask = np.ones_like(ids)
    wanted, int8 = (decoder_logits(model, ids.tolist(), int8=rounded)[0] for rounded in (False, True))
    np.testing.assert_allclose(exact.run(ids, mask, keep=0)["logits"][0], wanted, **tolerances.GRAPH_LEVEL_0)
    report = Comparison(fast.run(ids, mask, keep=0)["logits"][0], wanted, int8).report()
    assert report["passed"], report["problems"]
    assert check_codes(fast.path, fast.graph.nodes, fast.checkpoint) == len(fast.checkpoint.layers)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "smollm3", "phi3"])
def test_steps_from_the_cache_equal_one_pass(tmp_path: Path, family: str) -> None:
    exported = Exported(tmp_path, family, "fp32")
    ids, _ = batch()
    ids, mask = ids[:1], np.ones((1, LENGTHS[0]), np.int64)
    whole = exported.run(ids, mask, keep=0)["logits"][0]
    found = exported.run(ids[:, :9], mask[:, :9])
    for position in range(9, LENGTHS[0]):
        np.testing.assert_allclose(found["logits"][0, -1], whole[position - 1], **tolerances.GRAPH_FP32)
        found = exported.run(ids[:, position : position + 1], mask[:, : position + 1], past=found)
    several = exported.run(ids[:, 9:15], mask[:, :15], past=exported.run(ids[:, :9], mask[:, :9]), keep=0)["logits"][0]
    np.testing.assert_allclose(several, whole[9:15], **tolerances.GRAPH_FP32)


def test_a_padded_batch_continues_row_by_row(tmp_path: Path) -> None:
    """After a batch that is padded on the right, each row goes on from its own last token, as onnxruntime-genai does it."""
    exported = Exported(tmp_path, "gpt2", "fp32")
    ids, mask = batch()
    past = exported.run(ids, mask)
    step, longer = np.array([[5], [7]]), np.concatenate([mask, np.ones((2, 1), np.int64)], 1)
    found = exported.run(step, longer, past=past)["logits"][:, 0]
    for row, length in enumerate(LENGTHS):
        alone = np.concatenate([ids[row, :length], step[row]])[None]
        np.testing.assert_allclose(
            found[row], exported.run(alone, np.ones_like(alone))["logits"][0, 0], **tolerances.GRAPH_FP32
        )


def test_the_head_of_16_channels_is_rotated_inside_the_attention(tmp_path: Path) -> None:
    exported = Exported(tmp_path, "llama", "int4", hidden_size=64, head_dim=16)
    kinds = [node.op_type for node in exported.graph.model.graph]
    assert "RotaryEmbedding" not in kinds
    assert [
        node.attributes["do_rotary"].as_int() for node in exported.graph.model.graph if node.op_type == "GroupQueryAttention"
    ] == [
        1,
        1,
    ]


def test_few_nodes_and_one_table(tmp_path: Path) -> None:
    """q, k and v are one product, gate and up another; a tied head reads the embedding's own codes."""
    exported = Exported(tmp_path, "llama3", "int4", hidden_size=64, head_dim=16)
    graph = exported.graph.model.graph
    products = [node for node in graph if node.op_type == "MatMulNBits"]
    assert len(products) == 4 * exported.spec.num_layers + 1
    assert not {"MatMul", "Gemm", "GatherBlockQuantized"} & {node.op_type for node in graph}
    gathered = {node.inputs[0].name for node in graph if node.op_type == "Gather"}
    assert {products[-1].inputs[1].name, products[-1].inputs[2].name} <= gathered
    assert exported.graph.nodes["model.layers.0.self_attn.q_proj+k_proj+v_proj/MatMulNBits"]["rows"] == {
        "model.layers.0.self_attn.q_proj": [0, 64],
        "model.layers.0.self_attn.k_proj": [64, 96],
        "model.layers.0.self_attn.v_proj": [96, 128],
    }


def test_the_selector_is_no_required_input(tmp_path: Path) -> None:
    exported = Exported(tmp_path, "llama", "int4")
    assert [value.name for value in exported.session.get_overridable_initializers()] == ["num_logits_to_keep"]
    inputs = [value.name for value in exported.session.get_inputs()]
    assert inputs[:2] == ["input_ids", "attention_mask"]
    assert len(inputs) == 2 + 2 * exported.spec.num_layers
    assert exported.session.get_outputs()[0].shape == ["batch_size", 1, tiny.VOCAB]


def test_heads_that_the_attention_does_not_take_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        Exported(tmp_path, "llama", "int4", head_dim=12)
    assert caught.value.message == "heads of 12 channels: ONNX Runtime's attention takes multiples of 8"


def test_a_changed_code_is_found(tmp_path: Path) -> None:
    exported = Exported(tmp_path, "llama", "int4")
    data = tmp_path / "model.onnx_data"
    content = bytearray(data.read_bytes())
    codes = exported.checkpoint.read_linear("model.layers.1.mlp.up_proj").codes.numpy().tobytes()  # type: ignore[union-attr]
    content[content.index(codes) + 5] ^= 1
    data.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        check_codes(exported.path, exported.graph.nodes, exported.checkpoint)
    assert caught.value.message == (
        "the exported graph does not hold what was merged:\n"
        "  model.layers.1.mlp.up_proj: the codes in model.onnx are not the merged folder's"
    )
