"""Tiny random encoder-decoders of every family, and rows whose answer is a word for a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

SPECIAL: dict[str, Any] = {"vocab_size": tiny.VOCAB, "pad_token_id": 260, "eos_token_id": 256, "bos_token_id": 262}
BART_SHAPE: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 128, "decoder_start_token_id": 256,
}  # fmt: skip
T5_SHAPE: dict[str, Any] = {
    "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4,
    "decoder_start_token_id": 260, "n_positions": 128,
}  # fmt: skip
# family → (configuration class, its shape)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5Config", T5_SHAPE),
    "mt5": ("MT5Config", {**T5_SHAPE, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("BartConfig", {**BART_SHAPE, "forced_eos_token_id": 256, "scale_embedding": True}),
    "mbart": ("MBartConfig", {**BART_SHAPE, "scale_embedding": True}),
    "marian": ("MarianConfig", {**BART_SHAPE, "decoder_start_token_id": 260, "scale_embedding": True}),
    "pegasus": ("PegasusConfig", {**BART_SHAPE, "decoder_start_token_id": 260, "scale_embedding": True}),
}


def save_seq2seq(folder: Path, family: str = "t5", *, seed: int = 0, **overrides: Any) -> Path:
    """Save a random encoder-decoder of a family, every parameter of it random; EOS likely enough to come at times."""
    import torch
    import transformers

    name, shape = FAMILIES[family]
    config = getattr(transformers, name)(**{**SPECIAL, **shape, **overrides})
    tiny._save(folder, "AutoModelForSeq2SeqLM", config, seed)
    if "final_logits_bias" in (tensors := _tensors(folder)):
        from safetensors.torch import save_file

        tensors["final_logits_bias"] = torch.linspace(-1, 1, tiny.VOCAB)[None].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_bert2bert(folder: Path, seed: int = 0) -> Path:
    """Save a random encoder-decoder of two BERTs, the decoder with attention over the encoder's states."""
    import transformers

    shape = {**tiny.BERT_SHAPE, "pad_token_id": 260, "max_position_embeddings": 128}
    encoder = transformers.BertConfig(**shape)
    decoder = transformers.BertConfig(**shape, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 262, 260, 256
    return tiny._save(folder, "AutoModelForSeq2SeqLM", config, seed)


def save_words(path: Path, rows: int = 240) -> Path:
    """Write rows {"source", "target"}: colours and animals, in German."""
    import random

    words = {"red": "rot", "sun": "sonne", "two": "zwei", "cat": "katze", "dog": "hund"}
    draw = random.Random(0)
    lines = []
    for _ in range(rows):
        chosen = draw.choices(list(words), k=draw.randint(1, 2))
        lines.append({"source": " ".join(chosen), "target": " ".join(words[word] for word in chosen)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = load_file(folder / "model.safetensors")
    return found


def save_captioner(folder: Path, decoder: str = "bert", seed: int = 0) -> Path:
    """Save a random encoder-decoder of a ViT and a decoder, narrower than the ViT, with attention over what it sees."""
    import transformers

    encoder = transformers.ViTConfig(**tiny.VISION["vit"][1])
    shape = {"vocab_size": tiny.VOCAB, "pad_token_id": 260, "bos_token_id": 262, "eos_token_id": 256}
    if decoder == "bert":
        other = transformers.BertConfig(**{**tiny.BERT_SHAPE, **shape}, is_decoder=True, add_cross_attention=True)
    else:
        other = transformers.TrOCRConfig(
            **shape, d_model=24, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, max_position_embeddings=66,
            cross_attention_hidden_size=32,
        )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, other)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 262, 260, 256
    tiny._save(folder, "AutoModelForImageTextToText", config, seed)
    (folder / "preprocessor_config.json").write_text(json.dumps(tiny.PREPROCESSOR), encoding="utf-8")
    return folder
