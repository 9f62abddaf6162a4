"""Bundles: what export writes for each loader, what opening refuses, and that a graph which computes wrongly never ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tokenizers
import tolerances

from edgelora.bundle import DecoderFigures, open_bundle
from edgelora.errors import FolderError, ModelError, SettingsError
from edgelora.export.export import export
from edgelora.export.files import compact
from edgelora.merging.merge import merge


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_decoder(tmp_path_factory.mktemp("model") / "llama", "llama", hidden_size=64, head_dim=16)


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    result = export(str(model), out)
    assert result["verify"]["passed"]
    assert result["model_file"] == "onnx/model_q4.onnx"
    return out


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def test_the_files_of_a_decoder_bundle(bundle: Path, model: Path) -> None:
    found = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert found == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "genai_config.json", "edgelora.json", "onnx/model_q4.onnx", "onnx/model_q4.onnx_data",
    }  # fmt: skip
    config = read(bundle / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["transformers.js_config"] == {"dtype": "q4", "use_external_data_format": {"model_q4.onnx": 1}}
    tokenizer = read(bundle / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    assert tokenizer["chat_template"] == (bundle / "chat_template.jinja").read_text(encoding="utf-8") == tiny.CHAT_TEMPLATE
    genai = read(bundle / "genai_config.json")
    assert genai["model"]["decoder"]["filename"] == "onnx/model_q4.onnx"
    assert genai["search"]["max_length"] == genai["model"]["context_length"] == 128
    assert read(bundle / "generation_config.json")["eos_token_id"] == [256]
    assert not list(bundle.parent.glob(".*")), "nothing temporary is left"


def test_opening_a_bundle(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert (opened.task, opened.precision, opened.max_length) == ("text-generation", "int4", 128)
    assert (opened.eos_token_ids, opened.bos_token_id, opened.pad_token_id) == ((256,), 262, 260)
    assert opened.decoder == DecoderFigures(num_layers=2, num_kv_heads=2, head_dim=16, vocab_size=tiny.VOCAB, max_positions=128)
    assert opened.model_path.is_file()


def test_opening_needs_neither_torch_nor_onnx(bundle: Path) -> None:
    import subprocess
    import sys

    script = f"import sys; from edgelora.bundle import open_bundle; open_bundle({str(bundle)!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "onnx", "onnx_ir", "transformers", "onnxruntime"} & set(loaded)


@pytest.mark.parametrize(
    ("precision", "name", "dtype"), [("int8", "model_quantized.onnx", "q8"), ("fp32", "model.onnx", "fp32")]
)
def test_other_precisions(model: Path, tmp_path: Path, precision: str, name: str, dtype: str) -> None:
    result = export(str(model), tmp_path / "bundle", precision=precision)
    assert [path.name for path in (tmp_path / "bundle").rglob("*.onnx")] == [name]
    assert read(tmp_path / "bundle" / "config.json")["transformers.js_config"]["dtype"] == dtype
    assert result["verify"]["passed"]
    assert open_bundle(tmp_path / "bundle").precision == precision


def test_a_merged_folder_is_exported_as_it_is(model: Path, tmp_path: Path) -> None:
    merge(None, tmp_path / "merged", model=str(model), precision="int8")
    with pytest.raises(SettingsError) as caught:
        export(str(tmp_path / "merged"), tmp_path / "bundle", precision="int4")
    assert caught.value.message == f"{tmp_path / 'merged'} was merged to int8, not int4"
    result = export(str(tmp_path / "merged"), tmp_path / "bundle", precision="int8")
    assert result["table"] == []
    assert (tmp_path / "merged").is_dir()


def test_transformers_reads_the_tokenizer(bundle: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(bundle)
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "<|user|>hi<|end|><|assistant|>"


def test_a_damaged_file_is_named(copy: Path) -> None:
    data = copy / "onnx" / "model_q4.onnx_data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    with pytest.raises(FolderError) as caught:
        open_bundle(copy)
    assert caught.value.message == f"{copy} is damaged:\n  onnx/model_q4.onnx_data: changed"


def test_a_newer_format_is_refused(copy: Path) -> None:
    manifest = read(copy / "edgelora.json")
    (copy / "edgelora.json").write_text(json.dumps({**manifest, "format": 99, "tool_version": "9.0"}), encoding="utf-8")
    with pytest.raises(FolderError) as caught:
        open_bundle(copy)
    assert caught.value.message == f"{copy} has format 99, written by EdgeLoRA 9.0; this one reads up to 1"
    assert caught.value.hint == "pip install --upgrade edgelora"


@pytest.mark.parametrize("key", ["model_file", "tokens", "max_length", "task"])
def test_a_manifest_without_a_key_is_damaged(copy: Path, key: str) -> None:
    manifest = read(copy / "edgelora.json")
    del manifest[key]
    (copy / "edgelora.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(FolderError, match="is damaged"):
        open_bundle(copy)


def test_a_model_file_outside_of_the_bundle_is_refused(copy: Path) -> None:
    manifest = read(copy / "edgelora.json")
    (copy / "edgelora.json").write_text(json.dumps({**manifest, "model_file": "../model.onnx"}), encoding="utf-8")
    with pytest.raises(FolderError):
        open_bundle(copy)


def test_what_is_not_a_bundle(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderError) as caught:
        open_bundle(model)
    assert caught.value.message == f"{model} is not a bundle folder: it has no edgelora.json"


def test_an_existing_folder_and_a_bundle_are_refused(bundle: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="exists already"):
        export(str(model), bundle)
    with pytest.raises(SettingsError, match="is a bundle already"):
        export(str(bundle), tmp_path / "again")


def test_a_graph_that_computes_wrongly_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary tables of another base: the codes are right, the text would not be."""
    import dataclasses

    from edgelora.export import export as stage
    from edgelora.models.rope import Rope

    build = stage.build_decoder

    def spoiled(weights: Any, spec: Any, **options: Any) -> Any:
        ropes = tuple(Rope(tuple(np.array(rope.inverse_frequencies) * 3)) for rope in spec.ropes)
        return build(weights, dataclasses.replace(spec, ropes=ropes), **options)

    monkeypatch.setattr(stage, "build_decoder", spoiled)
    with pytest.raises(ModelError, match="ONNX Runtime does not compute what the merged weights say"):
        export(str(model), tmp_path / "bundle")
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    assert not export(str(model), tmp_path / "bundle", force=True)["verify"]["passed"]


def test_a_longer_or_shorter_text_can_be_asked_for(model: Path, tmp_path: Path) -> None:
    export(str(model), tmp_path / "bundle", max_length=50)
    assert open_bundle(tmp_path / "bundle").max_length == 50
    assert read(tmp_path / "bundle" / "genai_config.json")["search"]["max_length"] == 50
    with pytest.raises(SettingsError) as caught:
        export(str(model), tmp_path / "other", max_length=129)
    assert caught.value.message == "max_length is 129; this model takes 1 to 128 tokens"


def test_a_run_is_merged_and_scored_again(model: Path, tmp_path: Path) -> None:
    """The table goes on with the merged weights in torch and the bundle, on the rows that scored the adapter."""
    from edgelora.config import FinetuneConfig
    from edgelora.train.finetune import finetune

    rows = [{"prompt": f"say {i % 7}", "completion": f"number {i % 7}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = FinetuneConfig(max_steps=4, learning_rate=1e-2, threads=1)
    trained = finetune(str(model), str(tmp_path / "rows.jsonl"), tmp_path / "run", config)
    result = export(str(tmp_path / "run"), tmp_path / "bundle")
    table = {row["what"]: row for row in result["table"]}
    assert list(table) == ["base", "fp32 adapter", "adapter", "merged fp32", "merged", "onnx"]
    assert table["adapter"]["loss"] == trained["valid"]["loss"]
    assert table["onnx"]["loss"] == pytest.approx(table["merged"]["loss"], **tolerances.LOSS_INT8_ACTIVATIONS)
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest["settings"]["max_steps"] == 4
    assert manifest["data"] == "rows.jsonl"


def merging_tokenizer(merges: list[tuple[str, str]]) -> bytes:
    """Return a tokenizer.json with these merges as lists, spread over lines as transformers writes it."""
    letters = sorted({letter for pair in merges for piece in pair for letter in piece})
    vocabulary = {text: place for place, text in enumerate([*letters, *("".join(pair) for pair in merges)])}
    native = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    return native.to_str(pretty=True).encode()


@pytest.mark.parametrize(
    ("merges", "written"),
    [
        ([("n", "o"), ("no", "é")], ["n o", "no é"]),
        ([("n", "o"), (" ", "b"), ("no", " b")], [["n", "o"], [" ", "b"], ["no", " b"]]),
    ],
)
def test_the_tokenizer_of_a_bundle_is_small_and_the_same(merges: list[tuple[str, str]], written: list[Any]) -> None:
    given = merging_tokenizer(merges)
    made = compact(given)
    assert len(made) < len(given) * 2 / 3
    assert json.loads(made)["model"]["merges"] == written
    one, other = (tokenizers.Tokenizer.from_str(text.decode()) for text in (given, made))
    assert one.to_str() == other.to_str()


def test_a_tokenizer_without_merges_stays_what_it_is() -> None:
    native = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    given = native.to_str(pretty=True).encode()
    assert json.loads(compact(given)) == json.loads(given)
