#!/usr/bin/env python3
"""Train a small network on texts from scratch: the base to adapt where no pretrained weights are at hand.

    python tools/pretrain_texts.py t5 ROWS.jsonl OUT --minutes 3           # columns source, target
    python tools/pretrain_texts.py roberta ROWS.jsonl OUT --minutes 3      # columns text, label
    python tools/pretrain_texts.py llama ROWS.jsonl OUT --minutes 3        # columns prompt, completion

Writes a folder in Hugging Face layout, with a byte-level BPE tokenizer of these rows. A figure for a network that was made so
says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain_pictures import descend
from small_networks import TEXTS

SPECIAL = PAD, END, UNKNOWN, START = "<pad>", "</s>", "<unk>", "<s>"
TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
CLASSES = {"text-classification": "AutoModelForSequenceClassification", "text-generation": "AutoModelForCausalLM"}
LONGEST = 96  # tokens of a text
IGNORED = -100  # what cross entropy passes over
Row = dict[str, str]


def make_tokenizer(texts: list[str], vocabulary: int, out: Path, template: str) -> Any:
    """Train and save a tokenizer that puts every text ("$A") into a template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    )
    known = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=known)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=PAD, unk_token=UNKNOWN
    )
    whole.save_pretrained(out)
    return whole


def make_config(family: str, vocabulary: int, labels: list[str], dropout: float) -> Any:
    import transformers

    _, kind, settings = TEXTS[family]
    settings = {**TOKENS, "vocab_size": vocabulary, **settings}
    if kind == "encoder-decoder":
        encoder, decoder = (
            transformers.BertConfig(**settings, is_decoder=decodes, add_cross_attention=decodes) for decodes in (False, True)
        )
        config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = TOKENS["bos_token_id"], 0, 1
        return config
    extra = {"id2label": dict(enumerate(labels))} if labels else {}
    extra |= {"dropout_rate": dropout} if kind in ("t5", "mt5") else {}
    return transformers.AutoConfig.for_model(kind, **settings, **extra)


def encoder_of(task: str, tokenizer: Any, labels: list[str]) -> Callable[[Row], tuple[list[int], list[int]]]:
    """Return what makes of a row the tokens that the network reads, and what it is to answer."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text).input_ids)

    def generation(row: Row) -> tuple[list[int], list[int]]:
        prompt, answer = ids(row["prompt"]), [*ids(row["completion"]), TOKENS["eos_token_id"]]
        return prompt + answer, [IGNORED] * len(prompt) + answer

    if task == "text-generation":
        return generation
    if task == "text-classification":
        return lambda row: (ids(row["text"])[:LONGEST], [labels.index(row["label"])])
    return lambda row: (ids(row["source"])[:LONGEST], ids(row["target"])[:LONGEST])


def train(
    family: str, rows: Path, out: Path, minutes: float, vocabulary: int, batch_size: int, rate: float, dropout: float
) -> None:
    import torch
    import transformers

    task = TEXTS[family][0]
    known = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    names = {"text-classification": ("text",), "text-generation": ("prompt", "completion")}.get(task, ("source", "target"))
    labels = sorted({row["label"] for row in known}) if task == "text-classification" else []
    template = {"text-classification": f"{START} $A {END}", "text-generation": "$A"}.get(task, f"$A {END}")
    tokenizer = make_tokenizer([row[name] for row in known for name in names], vocabulary, out, template)
    torch.manual_seed(0)
    config = make_config(family, len(tokenizer), labels, dropout)
    network = getattr(transformers, CLASSES.get(task, "AutoModelForSeq2SeqLM")).from_config(config).train()
    encoded = list(map(encoder_of(task, tokenizer, labels), known))

    def padded(chosen: list[list[int]], fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in chosen], batch_first=True, padding_value=fill)

    def loss_of(numbers: Any) -> tuple[Any, int]:
        chosen = [encoded[number] for number in numbers]
        source, wanted = padded([ids for ids, _ in chosen], 0), padded([ids for _, ids in chosen], IGNORED)
        answers = wanted.flatten() if labels else wanted
        return network(input_ids=source, attention_mask=(source != 0).long(), labels=answers).loss, 1

    descend(network, loss_of, len(encoded), minutes, batch_size, rate)
    network.eval().save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=TEXTS)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.1, help="T5's; the others have none")
    given = parser.parse_args()
    shape = (given.vocabulary, given.batch_size, given.learning_rate, given.dropout)
    train(given.family, given.rows, given.out, given.minutes, *shape)


if __name__ == "__main__":
    main()
