"""Tiny random CLIP and SigLIP, and pictures of three kinds with a sentence for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

SIDE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT: dict[str, Any] = {**SIDE, "vocab_size": tiny.VOCAB, "max_position_embeddings": 32, "pad_token_id": 260,
                        "bos_token_id": 262, "eos_token_id": 263}  # fmt: skip
VISION: dict[str, Any] = {**SIDE, "image_size": 32, "patch_size": 8}
SENTENCES = {"dark": "a dark picture", "light": "bright light", "stripes": "some stripes"}


def save_image_text(folder: Path, family: str = "clip", *, seed: int = 0) -> Path:
    """Save a random model of a family, its texts between <s> and </s>."""
    import torch
    import transformers
    from tokenizers import Tokenizer, processors

    kind = {"clip": "CLIPConfig", "siglip": "SiglipConfig"}[family]
    extra = {"projection_dim": 16} if family == "clip" else {}
    text = TEXT if family == "clip" else {**TEXT, "projection_size": 32}
    config = getattr(transformers, kind)(text_config=text, vision_config=VISION, **extra)
    tiny._save(folder, "AutoModelForZeroShotImageClassification", config, seed)
    model = transformers.AutoModelForZeroShotImageClassification.from_pretrained(folder)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        if family == "siglip":
            model.logit_bias.fill_(-3.0)
    model.save_pretrained(folder)
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 262), ("</s>", 263)])
    tokenizer.save(str(path))
    (folder / "preprocessor_config.json").write_text(json.dumps(tiny.PREPROCESSOR), encoding="utf-8")
    return folder


def save_captions(folder: Path, rows: int = 48, column: str = "text") -> Path:
    """Write FOLDER/rows.jsonl and its pictures, each with a sentence in `column`."""
    pictures = tiny.save_pictures(folder / "pictures", rows)
    lines = [
        {"image": path.relative_to(folder).as_posix(), column: SENTENCES[path.parent.name]}
        for path in sorted(pictures.glob("*/*.png"))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder / "rows.jsonl"
