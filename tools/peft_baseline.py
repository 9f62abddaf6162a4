"""The peer that tools/bench_training measures against: LoRA with transformers and PEFT on a CPU, as its users run it.

    python tools/peft_baseline.py MODEL_FOLDER rows.csv  --steps 8            # columns mr and ref, shuffled
    python tools/peft_baseline.py MODEL_FOLDER steps.jsonl --steps 8          # exact token ids in an exact order

Rank 8, alpha 16, all linear layers, AdamW in fp32 at a constant rate, no clipping, rows of a step padded to the longest, loss
on the answers. A line of the .jsonl is one step: {"ids": [[…], …], "supervised": [[0, 1, …], …]}.
Prints one JSON object: tokens_per_s counts real tokens of the steps after the first; peak_rss_mb; the loss of every step.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

PROMPT = "<|im_start|>user\nDescribe: {}<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "{}<|im_end|>\n"
IGNORED = -100  # the label that transformers leaves out of the loss

Step = dict[str, list[list[int]]]


def steps_of_csv(path: Path, model: Path, batch_size: int, seed: int) -> Iterator[Step]:
    """Yield steps of rows in random order, each a user's turn with `mr` and the answer `ref`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    with path.open(newline="", encoding="utf-8") as file:
        pairs = [(encode(PROMPT.format(row["mr"])), encode(ANSWER.format(row["ref"]))) for row in csv.DictReader(file)]
    random.Random(seed).shuffle(pairs)
    for start in range(0, len(pairs) - batch_size + 1, batch_size):
        parts = pairs[start : start + batch_size]
        yield {
            "ids": [prompt + answer for prompt, answer in parts],
            "supervised": [[0] * len(prompt) + [1] * len(answer) for prompt, answer in parts],
        }


def steps_of_file(path: Path) -> Iterator[Step]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def collate(step: Step, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask and labels, int64 [rows, longest]."""
    shape = len(step["ids"]), max(map(len, step["ids"]))
    ids, mask, labels = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
    for row, (tokens, supervised) in enumerate(zip(step["ids"], step["supervised"], strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        targets = torch.tensor([token if wanted else IGNORED for token, wanted in zip(tokens, supervised, strict=True)])
        labels[row, : len(tokens)] = targets
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def load(arguments: argparse.Namespace) -> Any:
    """Return the model in fp32 with new adapters, or with the A of --init."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    settings = LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    if arguments.init is not None:
        take_init(model, arguments.init)
    if not arguments.no_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    model.train()
    return model


@torch.no_grad()
def take_init(model: Any, path: Path) -> None:
    """Copy every A of a saved adapter into the model; B stays zero. Raises SystemExit where names or shapes do not fit."""
    from safetensors.torch import load_file

    found = {name: tensor for name, tensor in load_file(path).items() if "lora_A" in name}
    own = {name.replace(".default.", "."): p for name, p in model.named_parameters() if "lora_A" in name}
    if found.keys() != own.keys() or any(found[name].shape != p.shape for name, p in own.items()):
        strange = sorted(found.keys() ^ own.keys())[:3]
        raise SystemExit(f"error: {path} is not an adapter of this model's linear layers: {strange or 'other shapes'}")
    for name, parameter in own.items():
        parameter.copy_(found[name])


def train(model: Any, steps: Iterator[Step], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train on the steps; return their losses, tokens and seconds. Tokens are real ones: padding does not count."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    pad = model.config.pad_token_id or 0
    losses, tokens, seconds = [], [], []
    for step in steps:
        started = time.perf_counter()
        loss = model(**collate(step, pad)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        tokens.append(sum(map(len, step["ids"])))
        seconds.append(time.perf_counter() - started)
        print(f"step {len(losses)}: loss {losses[-1]:.4f}, {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    speed = sum(tokens[1:]) / sum(seconds[1:]) if len(seconds) > 1 else None
    return {"tokens_per_s": speed, "losses": losses, "tokens": tokens, "step_seconds": seconds}


def peak_rss_mb() -> float:
    """Return the process's peak; Linux counts in KB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder in Hugging Face layout")
    parser.add_argument("data", type=Path, nargs="?", help="rows.csv, or the same as --rows")
    parser.add_argument("--rows", type=Path, help="steps.jsonl: token ids of every step, in this order")
    parser.add_argument("--steps", type=int, default=8, help="steps to train; the first of them does not count for the speed")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step of a CSV file")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01, help="torch's default, which PEFT's users get")
    parser.add_argument("--init", type=Path, help="adapter_model.safetensors whose A this run starts from")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="save the adapter there, in PEFT's format")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-checkpointing", action="store_true")
    found = parser.parse_args(arguments)
    if (found.data is None) == (found.rows is None):
        parser.error("give DATA or --rows FILE.jsonl")
    return found


def main() -> None:
    arguments = parse()
    torch.manual_seed(arguments.seed)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = arguments.rows or arguments.data
    if path.suffix == ".csv":
        steps = steps_of_csv(path, arguments.model, arguments.batch, arguments.seed)
    else:
        steps = steps_of_file(path)
    model = load(arguments)
    result = train(model, islice(steps, arguments.steps), arguments)
    if arguments.save is not None:
        model.save_pretrained(arguments.save)
    print(json.dumps({**result, "peak_rss_mb": peak_rss_mb(), "checkpointing": not arguments.no_checkpointing}))


if __name__ == "__main__":
    main()
