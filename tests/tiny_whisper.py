"""A tiny random Whisper with a window of one second, English only, and its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

START, NO_TIMES = 264, 265


def save_whisper(folder: Path, *, seconds: int = 1, seed: int = 0, times: bool = False, **overrides: Any) -> Path:
    """Save a random Whisper: 16 mel bins, a prompt of two tokens, EOS likely enough to come now and then.

    `times`: it has tokens for the times of its window.
    """
    import transformers
    from tokenizers import AddedToken, Tokenizer

    shape = {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 16, "max_source_positions": 50 * seconds,
        "max_target_positions": 160, "vocab_size": tiny.VOCAB, "pad_token_id": 260, "bos_token_id": 262, "eos_token_id": 256,
        "decoder_start_token_id": START, "suppress_tokens": None, "begin_suppress_tokens": [256],
    }  # fmt: skip
    if times:
        shape["vocab_size"] = NO_TIMES + 2 + 50 * seconds
    tiny._save(folder, "AutoModelForSpeechSeq2Seq", transformers.WhisperConfig(**{**shape, **overrides}), seed)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = ("<|startoftranscript|>", "<|notimestamps|>")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=seconds).save_pretrained(folder)
    return folder


def save_rows(folder: Path, rows: int = 24) -> Path:
    """Write FOLDER/rows.jsonl as NeMo has manifests: hiss, high and low tones, and the words for them."""
    sounds = tiny.save_sounds(folder / "sounds", rows)
    lines = [
        {"audio_filepath": path.relative_to(folder).as_posix(), "duration": 0.4, "text": path.parent.name}
        for path in sorted(sounds.glob("*/*.wav"))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder / "rows.jsonl"
