#!/usr/bin/env python3
"""Train a small network on pictures with texts, or on sounds, from scratch: the base to adapt where none is at hand.

    python tools/pretrain_pairs.py clip DATA OUT --size 64 --minutes 3          # columns image, text
    python tools/pretrain_pairs.py captioner DATA OUT --size 64 --minutes 3     # columns image, caption (or text)
    python tools/pretrain_pairs.py wav2vec2 DATA OUT --minutes 3                # columns audio, text
    python tools/pretrain_pairs.py ast DATA OUT --minutes 3                     # columns audio, label

The folder is in Hugging Face layout, with a tokenizer of bytes, or of the letters of the rows. A figure for such a network says
so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pretrain_pictures import descend
from small_networks import BANDS, SOUNDS

SIDE = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
SPECIAL = ("<pad>", "<s>", "<unk>", "</s>")  # an end of 2 would make CLIP read a text at its largest token instead
END = SPECIAL.index("</s>")
NAMING = "zero-shot-image-classification"
TASKS = {"clip": NAMING, "siglip": NAMING, "captioner": "image-to-text", **{name: task for name, (task, *_) in SOUNDS.items()}}


def write_bytes(folder: Path) -> int:
    """Write tokenizer.json of single bytes, which any text has, between <s> and </s>; return how many tokens there are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = (*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", END)])
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>",
              "unk_token": "<unk>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(letters)


def write_letters(texts: list[str], folder: Path) -> int:
    """Write vocab.json of the letters of texts; return how many outputs there are."""
    letters = sorted({letter for text in texts for letter in text.lower() if letter.isalnum() or letter == "'"})
    known = {token: number for number, token in enumerate((*SPECIAL, "|", *letters))}
    (folder / "vocab.json").write_text(json.dumps(known), encoding="utf-8")
    settings = {"tokenizer_class": "Wav2Vec2CTCTokenizer", "pad_token": "<pad>", "word_delimiter_token": "|"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return len(known)


def make_config(family: str, vocabulary: int, size: int, labels: list[str]) -> Any:
    import transformers

    if family in SOUNDS:
        _, kind, settings = SOUNDS[family]
        answers = {"id2label": dict(enumerate(labels))} if labels else {"vocab_size": vocabulary}
        return transformers.AutoConfig.for_model(kind, **settings, **answers)
    tokens = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
    seeing = {**SIDE, "image_size": size, "patch_size": size // 8}
    reading = {**SIDE, **tokens, "max_position_embeddings": 64}
    if family == "clip":
        return transformers.CLIPConfig(text_config=reading, vision_config=seeing, projection_dim=64)
    if family == "siglip":
        return transformers.SiglipConfig(text_config={**reading, "projection_size": SIDE["hidden_size"]}, vision_config=seeing)
    writing = transformers.BertConfig(**reading, is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(transformers.ViTConfig(**seeing), writing)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, END
    return config


def make_preprocessor(family: str, size: int) -> dict[str, Any]:
    """Return preprocessor_config.json of a family."""
    if family not in SOUNDS:
        return {"size": {"height": size, "width": size}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    if family == "ast":
        return {"feature_extractor_type": "ASTFeatureExtractor", "sampling_rate": 16000, **BANDS, "mean": -4.0, "std": 4.5,
                "do_normalize": True}  # fmt: skip
    return {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16000, "do_normalize": True,
            "return_attention_mask": True}  # fmt: skip


def loss_of(task: Any, model: Any, batch: dict[str, Any]) -> tuple[Any, int]:
    """Return the loss of a batch and what it sums; the decoder's head is no tiled one here."""
    import torch

    if not task.writes:
        loss, count = task.loss(model, batch)
        return loss, int(count)
    inputs = {name: batch[name] for name in ("pixel_values", "decoder_input_ids")}
    logits = model.network(**inputs, use_cache=False).logits.flatten(0, 1)[batch["positions"]]
    return torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="sum"), len(batch["targets"])


def train(family: str, data: str, out: Path, size: int, minutes: float, batch_size: int, rate: float) -> None:
    import torch
    import transformers

    from edgelora.data.check import scan
    from edgelora.models.network import Network
    from edgelora.models.predictor import to_tensors
    from edgelora.tasks import get_task

    task = get_task(TASKS[family])
    maps = {"caption": "text"} if family == "captioner" else None
    found = scan(data, task=task.name, columns=maps, valid=None)
    found.problems.refuse(data)
    rows = [found.located(path, row) for path, _, row in found.rows("train")]
    out.mkdir(parents=True)
    vocabulary = 0
    if family not in SOUNDS:
        vocabulary = write_bytes(out)
    elif not found.labels:
        vocabulary = write_letters([row["text"] for row in rows], out)
    config = make_config(family, vocabulary, size, found.labels)
    config.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(make_preprocessor(family, size)), encoding="utf-8")
    processor = task.open_processor(out)
    torch.manual_seed(0)
    network = getattr(transformers, task.auto_class).from_config(config).train()
    model = Network(network, (), [output.name for output in task.outputs])
    encoded = [task.encode(row, processor, found.labels) for row in rows]
    descend(
        network,
        lambda numbers: loss_of(task, model, to_tensors(task.collate([encoded[i] for i in numbers], processor))),
        len(encoded),
        minutes,
        batch_size,
        rate,
    )
    network.eval().save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=TASKS)
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    given = parser.parse_args()
    train(given.family, given.data, given.out, given.size, given.minutes, given.batch_size, given.learning_rate)


if __name__ == "__main__":
    main()
