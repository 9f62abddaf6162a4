"""The KV cache of how prompts begin: the same tokens with it and without it, at every border, and nothing else in its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tolerances import PREFIX_LOGITS

import edgelora
from edgelora.cli.main import cli
from edgelora.config import GenerateConfig
from edgelora.errors import FolderError, SettingsError
from edgelora.export.export import export
from edgelora.export.prefix import Beginning
from edgelora.folder import read_manifest, sha256
from edgelora.run.generate import Answer, fixed_tokens, prompt_ids
from edgelora.run.kept import Kept
from edgelora.run.model import Model
from edgelora.run.prefix import FILE, read_prefix

INSTRUCTION = "Turn what people say into one call of a function: "
SYSTEM = "You are the assistant of a home, and you answer in few words."


@pytest.fixture(scope="module")
def bundle(decoder_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in int4, as it ships, with the cache of a system turn and an instruction."""
    folder = tmp_path_factory.mktemp("prefix") / "bundle"
    export(str(decoder_model), folder, precision="int4", beginning=Beginning(INSTRUCTION, SYSTEM))
    return folder


def opened(bundle: Path) -> tuple[Model, list[int]]:
    """Return a model and a list that the numbers of tokens it computes for prompts are appended to."""
    model, ran = edgelora.load(bundle, threads=1), []
    prefill = model.generator.decoder.prefill
    model.generator.decoder.prefill = lambda ids: (ran.append(len(ids)), prefill(ids))[1]  # type: ignore[method-assign]
    return model, ran


def plain(bundle: Path) -> Model:
    """Return the model without its prefix."""
    model = edgelora.load(bundle, threads=1)
    model.generator.prefix = None
    return model


def test_the_manifest_names_tokens_file_and_digest(bundle: Path) -> None:
    manifest = read_manifest(bundle, "bundle")
    entry = manifest["prefix"]
    text = edgelora.load(bundle).generator.tokenizer.decode(entry["token_ids"], skip_special_tokens=False)
    assert text == f"<|system|>{SYSTEM}<|end|><|user|>{INSTRUCTION}"
    assert manifest["files"][entry["file"]] == sha256(bundle / FILE)
    assert entry["tokens"] == len(entry["token_ids"])


@pytest.mark.parametrize("asked", ["light off", "", "a\nb", "é"])
def test_greedy_tokens_are_those_without_it(bundle: Path, asked: str) -> None:
    model, ran = opened(bundle)
    without = plain(bundle)
    settings = {"max_new_tokens": 24, "system": SYSTEM}
    answer = model.answer(INSTRUCTION + asked, **settings)
    assert answer.tokens == without.answer(INSTRUCTION + asked, **settings).tokens
    assert ran[0] == len(answer.prompt) - read_manifest(bundle, "bundle")["prefix"]["tokens"]


def test_logits_are_those_without_it(bundle: Path) -> None:
    model, without = opened(bundle)[0], plain(bundle)
    ids = [*read_manifest(bundle, "bundle")["prefix"]["token_ids"], 40, 41, 42]
    found, wanted = model.generator.feed(ids).copy(), without.generator.feed(ids)
    np.testing.assert_allclose(found, wanted, **PREFIX_LOGITS)
    for name, array in model.generator.decoder.cache.items():
        np.testing.assert_allclose(array[:, :, : len(ids)], without.generator.decoder.cache[name][:, :, : len(ids)], atol=1e-4)


@pytest.mark.parametrize("kept", [0, 1, 9, 30, -1])
def test_a_prompt_that_leaves_it_early_takes_what_is_alike(bundle: Path, kept: int) -> None:
    prefix = read_manifest(bundle, "bundle")["prefix"]["token_ids"]
    kept %= len(prefix)
    ids = [*prefix[:kept], (prefix[kept] + 1) % 256, 50, 51]
    model, ran = opened(bundle)
    np.testing.assert_allclose(model.generator.feed(ids).copy(), plain(bundle).generator.feed(ids), **PREFIX_LOGITS)
    assert ran == [len(ids) - (kept if kept >= 8 else 0)]
    assert model.generator.cached == ids


def test_a_prompt_that_is_the_prefix_computes_its_last_two_tokens(bundle: Path) -> None:
    ids = read_manifest(bundle, "bundle")["prefix"]["token_ids"]
    model, ran = opened(bundle)
    np.testing.assert_allclose(model.generator.feed(list(ids)).copy(), plain(bundle).generator.feed(list(ids)), **PREFIX_LOGITS)
    assert ran == [2]


def test_another_conversation_between_leaves_it_as_it_was(bundle: Path) -> None:
    model, ran = opened(bundle)
    settings = {"max_new_tokens": 8, "system": SYSTEM}
    first = model.generate(INSTRUCTION + "x", **settings)
    model.generate("something else entirely", max_new_tokens=8)
    assert model.generate(INSTRUCTION + "x", **settings) == first
    assert ran[0] == ran[2] < 20


def test_a_changed_file_is_refused_with_its_bundle(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    data = bytearray((copy / FILE).read_bytes())
    data[-2] ^= 1
    (copy / FILE).write_bytes(data)
    with pytest.raises(FolderError, match=f"{FILE}: changed"):
        edgelora.load(copy)


def damaged(change: Callable[[bytes], bytes]) -> Any:
    return change


@pytest.mark.parametrize(
    "change",
    [
        damaged(lambda data: data[:1000]),
        damaged(lambda data: b""),
        damaged(lambda data: data[:-4] + np.float32(np.nan).tobytes()),
        damaged(lambda data: data.replace(b"past_key_values.0.key", b"past_key_values.9.key")),
        damaged(lambda data: b"\xff" * 64 + data[64:]),
    ],
)
def test_a_damaged_file_is_not_used_even_unverified(
    bundle: Path, tmp_path: Path, change: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    from edgelora.bundle import open_bundle

    copy = copied(bundle, tmp_path)
    (copy / FILE).write_bytes(change((copy / FILE).read_bytes()))
    model = Model(open_bundle(copy, verify=False), threads=1)
    settings = {"max_new_tokens": 8, "system": SYSTEM}
    for _ in range(2):
        assert model.generate(INSTRUCTION + "x", **settings) == plain(bundle).generate(INSTRUCTION + "x", **settings)
        model.generator.forget()
    assert capsys.readouterr().err.count("is not used") == 1


def copied(bundle: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def test_the_file_is_safetensors(bundle: Path) -> None:
    from safetensors.numpy import load_file

    ids = read_manifest(bundle, "bundle")["prefix"]["token_ids"]
    found = load_file(bundle / FILE)
    ours = read_prefix(bundle / FILE, ids, edgelora.load(bundle).generator.decoder.cache_shapes)
    assert found.keys() == ours.keys()
    assert all(np.array_equal(found[name], ours[name]) for name in found)


def test_the_command_takes_texts_and_files(decoder_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "system.txt").write_text(SYSTEM + "\n", encoding="utf-8")
    out = tmp_path / "bundle"
    command = ["export", str(decoder_model), "-o", str(out), "--precision", "fp32", "--system", str(tmp_path / "system.txt")]
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--json"])
    assert not ended.value.code
    shown = json.loads(capsys.readouterr().out)["prefix"]
    assert shown["file"] == FILE
    assert shown["tokens"] == len(f"{SYSTEM}") + 3
    assert "token_ids" not in shown


@pytest.mark.parametrize(
    ("beginning", "adapters", "message"),
    [
        (Beginning(""), "merged", "there are none"),
        (Beginning(INSTRUCTION), "swap", "each adapter has its own"),
        (Beginning("x" * 300), "merged", "the prefix has 301 tokens"),
    ],
)
def test_what_cannot_be_is_refused(
    decoder_model: Path, tmp_path: Path, beginning: Beginning, adapters: str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        export(str(decoder_model), tmp_path / "b", precision="fp32", beginning=beginning, adapters=adapters, max_length=64)
    assert not (tmp_path / "b").exists()


def test_system_turns_stay_in_memory_between_others(decoder_bundle: Path) -> None:
    model, ran = opened(decoder_bundle)
    generator = model.generator
    answers, fixed = {}, {}
    for turn in range(2):
        for system in (SYSTEM, SYSTEM.upper()):
            chat = [{"role": "system", "content": system}, {"role": "user", "content": f"{turn}"}]
            ids = prompt_ids(generator.tokenizer, chat, GenerateConfig())
            fixed[system] = fixed_tokens(generator.tokenizer, chat, ids)
            ran.clear()
            answer = Answer(generator, ids, GenerateConfig(max_new_tokens=8), fixed=fixed[system]).finished()
            answers[turn, system] = (
                answer.tokens == edgelora.load(decoder_bundle, threads=1).answer(chat, max_new_tokens=8).tokens
            )
            assert len(ran) == 2 - turn, "the turn, and the rest; then the rest alone"
            assert ran[-1] == len(ids) - fixed[system]
            assert answer.reused == fixed[system] or (turn == 0 and answer.reused < 8)
    assert all(answers.values())
    assert fixed[SYSTEM] == len(f"{SYSTEM}") + 3
    assert fixed_tokens(generator.tokenizer, [{"role": "user", "content": "a"}], [1, 2]) == 0


def test_what_is_kept_is_bounded() -> None:
    def cache(count: int) -> dict[str, Any]:
        return {"past_key_values.0.key": np.zeros((1, 1, count, 8), np.float32)}

    kept = Kept(limit=32 * 25)
    for token, count in ((1, 10), (2, 10)):
        kept.add([token] * count, cache(count))
    assert kept.find([1] * 12)[0] == 10, "now the other one is the least recently used"
    kept.add([3] * 10, cache(10))
    kept.add([4] * 30, cache(30))
    assert [kept.find([token] * 40)[0] for token in (1, 2, 3, 4)] == [10, 0, 10, 0]


def test_a_run_ships_what_its_rows_begin_with(decoder_model: Path, tmp_path: Path) -> None:
    from edgelora.config import FinetuneConfig
    from edgelora.train.finetune import finetune

    rows = [json.dumps({"prompt": INSTRUCTION + text, "completion": text[::-1]}) for text in ("light", "music", "door", "heat")]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    settings = FinetuneConfig(threads=1, max_steps=1, valid_rows=1, batch_size=2)
    finetune(str(decoder_model), str(tmp_path / "rows.jsonl"), tmp_path / "run", settings)
    exported = export(str(tmp_path / "run"), tmp_path / "bundle", precision="fp32", beginning=Beginning(""), force=True)
    assert exported["verify"]["passed"]
    entry = read_manifest(tmp_path / "bundle", "bundle")["prefix"]
    model, ran = opened(tmp_path / "bundle")
    text = model.generator.tokenizer.decode(entry["token_ids"], skip_special_tokens=False)
    assert text == f"<|user|>{INSTRUCTION}", "the template's beginning and the instruction, and nothing of a row's own"
    answer = model.answer(INSTRUCTION + "kettle", max_new_tokens=8)
    assert answer.reused == entry["tokens"]
    assert ran == [len(answer.prompt) - entry["tokens"]]
    assert answer.tokens == plain(tmp_path / "bundle").answer(INSTRUCTION + "kettle", max_new_tokens=8).tokens


def test_libraries_that_look_for_weights_do_not_take_the_file_for_some(bundle: Path) -> None:
    """optimum takes the only .onnx file below a folder; transformers asks for names, and must not find this one's."""
    import transformers

    assert [path.name for path in bundle.rglob("*.onnx")] == [Path(read_manifest(bundle, "bundle")["model_file"]).name]
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(bundle)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundle)
    assert tokenizer.encode("abc", add_special_tokens=False) == edgelora.load(bundle).generator.tokenizer.encode(
        "abc", add_special_tokens=False
    )
