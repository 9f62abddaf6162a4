"""`export --trim-vocabulary`: fewer tokens, the same pieces of the text that they are kept for, the same rows of the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tokenizers
import tolerances
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgelora.bundle import open_bundle
from edgelora.config import FinetuneConfig
from edgelora.errors import ModelError, SettingsError
from edgelora.evaluate import evaluate
from edgelora.export.export import export
from edgelora.export.trim import trim as trimming
from edgelora.export.trim.tokenizer import Vocabulary, joined
from edgelora.merging.merge import merge
from edgelora.models.load import load_model
from edgelora.models.source import open_model
from edgelora.quant.checkpoint import MergedCheckpoint
from edgelora.run.decoder import DecoderSession
from edgelora.run.model import load
from edgelora.tokenizer import Tokenizer
from edgelora.train.finetune import finetune

SPECIAL = ["<pad>", "<s>", "<|end|>", "<unk>", "<mask>"]
KEPT = ("dim the kitchen lights to forty percent", "wake me at half past six", "Grüße aus dem Garten")
OTHER = "the chocolate factory's 世界 is quadratic 🙂"


def corpus() -> list[str]:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    return [*text.splitlines(), *KEPT, "chocolate factory quadratic equations"] * 2


def byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def added_after() -> tokenizers.Tokenizer:
    """Special tokens behind the model's own, and whole words taken without merges: as Llama 3 has it."""
    content = json.loads(byte_level().to_str())
    content["added_tokens"] = []
    content["model"] |= {"ignore_merges": True}
    whole = tokenizers.Tokenizer.from_str(json.dumps(content))
    whole.add_special_tokens([AddedToken("<|turn|>", special=True), AddedToken("<|end|>", special=True)])
    return whole


def byte_fallback() -> tokenizers.Tokenizer:
    """Characters with bytes for unknown ones, as Llama 2 and Gemma have it."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [*SPECIAL, *(f"<0x{number:02X}>" for number in range(256))]
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False))
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] in SPECIAL]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def word_ends() -> tokenizers.Tokenizer:
    """Marked ends of words, as CLIP has them."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        corpus(), trainers.WordPieceTrainer(vocab_size=1500, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|end|>", pair="<s> $A <|end|> $B <|end|>", special_tokens=[("<s>", 1), ("<|end|>", 2)]
    )
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=1200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("<|end|>", 2), ("<s>", 1))
    return tokenizer


MAKERS = {
    "byte-level": byte_level, "added after": added_after, "byte fallback": byte_fallback, "word ends": word_ends,
    "WordPiece": word_piece, "Unigram": unigram,
}  # fmt: skip
SPELT = ("byte-level", "added after", "byte fallback")  # kinds that can spell any text in bytes


@pytest.mark.parametrize("name", MAKERS)
def test_kept_text_has_the_same_pieces_and_other_text_can_be_spelt(name: str) -> None:
    whole = MAKERS[name]()
    vocabulary = Vocabulary(json.loads(whole.to_str()))
    needed = {index for text in KEPT for index in whole.encode(text).ids}
    order = vocabulary.keep(needed, 0)
    new = {old: index for index, old in enumerate(order)}
    trimmed = tokenizers.Tokenizer.from_str(json.dumps(vocabulary.with_ids(new)))
    assert len(order) < 0.7 * whole.get_vocab_size()
    assert {trimmed.id_to_token(new[old]) for old in order} == {whole.id_to_token(old) for old in order}
    assert all(trimmed.token_to_id(whole.id_to_token(old)) == new[old] for old in order)
    for text in (*KEPT, f"{KEPT[1]}<|end|>{KEPT[0]}"):
        before, after = whole.encode(text), trimmed.encode(text)
        assert after.tokens == before.tokens
        assert after.ids == [new[index] for index in before.ids]
    assert len(trimmed.encode(OTHER).ids) > len(whole.encode(OTHER).ids)
    unknown = [tokenizer.encode(OTHER).tokens.count("<unk>") for tokenizer in (whole, trimmed)]
    assert unknown[0] == unknown[1]
    if name in SPELT:
        assert trimmed.decode(trimmed.encode(OTHER).ids) == whole.decode(whole.encode(OTHER).ids) == OTHER


def test_common_pieces_are_kept_beside_those_of_the_text() -> None:
    vocabulary = Vocabulary(json.loads(byte_level().to_str()))
    few, more = vocabulary.keep(set(), 0), vocabulary.keep(set(), 100)
    assert len(more) == len(few) + 100
    assert {left + right for left, right in list(vocabulary.ranks)[:100]} <= {vocabulary.texts[index] for index in more}
    round_number = vocabulary.keep(set(), 100, multiple=64)
    assert len(round_number) % 64 == 0
    assert set(more) <= set(round_number)
    assert len(round_number) < len(more) + 64


def test_pairs_are_joined_from_the_left() -> None:
    assert joined(list("aaab"), ("a", "a")) == ["aa", "a", "b"]


def test_special_tokens_keep_their_ids() -> None:
    vocabulary = Vocabulary(json.loads(word_piece().to_str()))
    assert vocabulary.keep(set(), 0)[: len(SPECIAL)] == list(range(len(SPECIAL)))


def test_word_level_tokenizers_are_refused() -> None:
    with pytest.raises(ModelError, match="WordLevel tokenizer cannot be trimmed"):
        Vocabulary(json.loads(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str()))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"say": text, "completion": text.upper(), "label": "a"}) for text in KEPT]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def put_tokenizer(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trimming, "NUM_COMMON", 32)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("tied", "precision"), [(True, "int4"), (False, "fp32")])
def test_a_trimmed_decoder_says_the_same_of_the_tokens_that_are_left(
    tmp_path: Path, rows: Path, tied: bool, precision: str
) -> None:
    tokenizer = byte_level()
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": [2, 4], "pad_token_id": 0}
    size = tokenizer.get_vocab_size() + 12  # rows beyond the tokenizer's, as Qwen has them
    folder = tiny.save_decoder(tmp_path / "model", "llama", vocab_size=size, tie_word_embeddings=tied, **special)
    put_tokenizer(folder, tokenizer)
    export(str(folder), tmp_path / "whole", precision=precision)
    result = export(
        str(folder), tmp_path / "trimmed", precision=precision, trim_vocabulary=str(rows), columns={"prompt": "say"}
    )
    facts = result["vocabulary"]
    assert (facts["before"], facts["after"] < size // 2) == (size, True)
    assert facts["table_mb"][1] <= facts["table_mb"][0]
    whole, trimmed = open_bundle(tmp_path / "whole"), open_bundle(tmp_path / "trimmed")
    assert trimmed.eos_token_ids == whole.eos_token_ids
    assert trimmed.decoder is not None
    assert trimmed.decoder.vocab_size == facts["after"]
    genai = json.loads((trimmed.folder / "genai_config.json").read_text(encoding="utf-8"))
    assert genai["model"]["vocab_size"] == facts["after"]
    names = Tokenizer.from_folder(trimmed.folder)
    old = [tokenizer.token_to_id(names.native.id_to_token(index)) for index in range(facts["after"])]
    prompt = tokenizer.encode(KEPT[0]).ids
    sessions = [DecoderSession(bundle.model_path, max_length=64, threads=1) for bundle in (whole, trimmed)]
    wanted = sessions[0].prefill(prompt).copy()
    found = sessions[1].prefill(names.native.encode(KEPT[0]).ids)
    np.testing.assert_allclose(found, wanted[old], **tolerances.ONNX_FP32_LOGITS)
    assert load(trimmed.folder).generate(KEPT[0], max_new_tokens=4) is not None


@pytest.mark.usefixtures("few")
def test_a_trimmed_classifier_gives_the_same_labels(tmp_path: Path, rows: Path) -> None:
    tokenizer = word_piece()
    folder = tiny.save_encoder(tmp_path / "model", vocab_size=tokenizer.get_vocab_size(), pad_token_id=0)
    put_tokenizer(folder, tokenizer)
    export(str(folder), tmp_path / "whole")
    result = export(str(folder), tmp_path / "trimmed", trim_vocabulary=str(rows), columns={"text": "say"})
    assert result["vocabulary"]["after"] < result["vocabulary"]["before"]
    before, after = (load(tmp_path / name).classify(KEPT) for name in ("whole", "trimmed"))
    assert after == before


@pytest.mark.usefixtures("few")
def test_positions_that_are_counted_from_padding_stay(tmp_path: Path, rows: Path) -> None:
    tokenizer = unigram()
    shape = {"vocab_size": tokenizer.get_vocab_size(), "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 66}
    logits = []
    folder = tiny.save_encoder(tmp_path / "model", "roberta", pad_token_id=0, **shape)
    put_tokenizer(folder, tokenizer)
    merge(None, tmp_path / "merged", model=str(folder), precision="fp32")
    source = trimming.Source(None, str(rows), {"text": "say"})
    for name in (tmp_path / "merged", trimming.trim(tmp_path / "merged", tmp_path / "trimmed", source)):
        model = load_model(
            open_model(str(name)), "text-classification", base_bits=32, labels=MergedCheckpoint.open(name).labels
        ).eval()
        ids = torch.tensor([Tokenizer.from_folder(name).encode(KEPT[0], add_special_tokens=True)])
        logits.append(model.logits(input_ids=ids, attention_mask=torch.ones_like(ids)))
    assert torch.equal(*logits)
    size = tokenizer.get_vocab_size()
    far = {**shape, "pad_token_id": size - 1, "max_position_embeddings": size + 66}
    folder = tiny.save_encoder(tmp_path / "far", "roberta", **far)
    put_tokenizer(folder, tokenizer)
    merge(None, tmp_path / "far-merged", model=str(folder), precision="fp32")
    with pytest.raises(ModelError, match="roberta counts positions from the id of its padding"):
        trimming.trim(tmp_path / "far-merged", tmp_path / "none", source)


@pytest.mark.usefixtures("few")
def test_a_run_is_trimmed_to_its_own_rows_and_scored_on_them(tmp_path: Path) -> None:
    tokenizer = byte_level()
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    folder = tiny.save_decoder(tmp_path / "model", vocab_size=tokenizer.get_vocab_size(), **special)
    put_tokenizer(folder, tokenizer)
    lines = [json.dumps({"prompt": f"{number}: dim the lights", "completion": KEPT[number % 3]}) for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = FinetuneConfig(threads=1, max_steps=12, learning_rate=1e-2, batch_size=4, evaluations=1)
    finetune(str(folder), str(tmp_path / "rows.jsonl"), tmp_path / "run", settings)
    result = export(str(tmp_path / "run"), tmp_path / "bundle", trim_vocabulary="", force=True)
    assert result["vocabulary"]["after"] < result["vocabulary"]["before"] // 2
    assert result["verify"]["layers_as_trained"] == result["verify"]["layers_bit_identical"] - 2  # embedding and head: rows
    scores = {row["what"]: row for row in result["table"]}
    assert scores["onnx"]["loss"] <= scores["merged"]["loss"] + 0.05  # of fewer tokens, one of them is found sooner
    assert evaluate(tmp_path / "bundle", str(tmp_path / "run" / "data" / "valid.jsonl"))["rows"] > 0


@pytest.mark.usefixtures("few")
def test_a_trimmed_folder_is_a_merged_folder_with_its_own_digests(tmp_path: Path, rows: Path) -> None:
    tokenizer = byte_level()
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    folder = tiny.save_decoder(tmp_path / "model", "llama", vocab_size=tokenizer.get_vocab_size(), **special)
    put_tokenizer(folder, tokenizer)
    merge(None, tmp_path / "merged", model=str(folder))
    source = trimming.Source(None, str(rows), {"prompt": "say"})
    whole = MergedCheckpoint.open(tmp_path / "merged")
    trimmed = MergedCheckpoint.open(trimming.trim(tmp_path / "merged", tmp_path / "trimmed", source))
    changed = {path for path, value in trimmed.manifest["digests"].items() if value != whole.manifest["digests"][path]}
    assert changed == {"model.embed_tokens", "lm_head"}
    assert trimmed.config["vocab_size"] == trimmed.layers["lm_head"]["shape"][0]


def test_what_cannot_be_trimmed_says_so(tmp_path: Path, decoder_model: Path, rows: Path) -> None:
    with pytest.raises(SettingsError, match="keeps the tokens of rows, and here are none"):
        export(str(decoder_model), tmp_path / "bundle", trim_vocabulary="")
    with pytest.raises(SettingsError, match="with --adapters swap all tokens ship"):
        export(str(decoder_model), tmp_path / "bundle", trim_vocabulary=str(rows), adapters="swap")
    with pytest.raises(SettingsError, match="for models of text; this one is for image-classification"):
        export(str(tiny.save_vision(tmp_path / "vision", "vit")), tmp_path / "bundle", trim_vocabulary=str(rows))
    config = tiny.save_decoder(tmp_path / "both") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "is_encoder_decoder": True}), encoding="utf-8")
    with pytest.raises(SettingsError, match="for encoders and decoders; this model is both"):
        export(str(config.parent), tmp_path / "bundle", trim_vocabulary=str(rows))
    assert not (tmp_path / "bundle").exists()
