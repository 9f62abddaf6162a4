#!/usr/bin/env python3
"""Train a small T5 from scratch on parallel text: the base to adapt where no pretrained weights are at hand.

    python tools/pretrain_texts.py ROWS.jsonl OUT --minutes 3

ROWS have `source` and `target`. Writes a folder in Hugging Face layout, with a byte-level BPE tokenizer of these rows. A figure
for a network that was made so says so.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

END, PAD, UNKNOWN = "</s>", "<pad>", "<unk>"
SHAPE = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4}
LONGEST = 96  # tokens of a source or target


def make_tokenizer(texts: list[str], vocabulary: int, out: Path) -> Any:
    """Train and save a tokenizer that ends every text with END."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[PAD, END, UNKNOWN], initial_alphabet=alphabet)
    )
    ending = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, ending)])
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, unk_token=UNKNOWN)
    whole.save_pretrained(out)
    return whole


def train(rows: Path, out: Path, minutes: float, vocabulary: int, batch_size: int, rate: float, dropout: float) -> None:
    import numpy as np
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    pairs = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    tokenizer = make_tokenizer([row[name] for row in pairs for name in ("source", "target")], vocabulary, out)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, tie_word_embeddings=True,
        dropout_rate=dropout, **SHAPE,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).train()
    sides = {name: [tokenizer(row[name]).input_ids[:LONGEST] for row in pairs] for name in ("source", "target")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    random, step, shown = np.random.default_rng(0), 0, 0.0
    started, allowed = (
        time.process_time(),
        60 * minutes * torch.get_num_threads(),
    )  # what others do meanwhile takes nothing away

    def padded(name: str, chosen: Any, fill: int) -> torch.Tensor:
        ids = [torch.tensor(sides[name][index]) for index in chosen]
        return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=fill)

    while (share := (time.process_time() - started) / allowed) < 1:
        chosen = random.choice(len(pairs), batch_size)
        source = padded("source", chosen, 0)
        loss = model(input_ids=source, attention_mask=(source != 0).long(), labels=padded("target", chosen, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * math.cos(share * math.pi / 2))
        optimizer.step()
        optimizer.zero_grad()
        step, shown = step + 1, 0.95 * shown + 0.05 * float(loss.detach())
        if step % 50 == 0:
            print(f"step {step}, {share:.0%} of the time: loss {shown:.4f}", flush=True)
    model.eval().save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    given = parser.parse_args()
    train(given.rows, given.out, given.minutes, given.vocabulary, given.batch_size, given.learning_rate, given.dropout)


if __name__ == "__main__":
    main()
