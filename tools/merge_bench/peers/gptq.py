"""GPTQ with llm-compressor on a CPU: 4 bits, symmetric, groups of 32, calibrated on the user's rows. For a peer's environment.

python gptq.py MODEL_FOLDER rows.jsonl OUT_FOLDER THREADS       rows.jsonl: {"ids": […]} a line

OUT holds the values that the codes stand for, in fp32 and Hugging Face layout: what is scored has GPTQ's weights and float
activations, which flatters it a little beside bundles whose kernels round activations.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

BITS, GROUP_SIZE = 4, 32
WEIGHTS = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP_SIZE}


def quantize(model: torch.nn.Module, ids: list[list[int]]) -> None:
    """Round the linear layers of a model in place; the head stays as it is."""
    recipe = GPTQModifier(ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": WEIGHTS}})
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    longest = max(map(len, ids))
    oneshot(model=model, dataset=rows, recipe=recipe, num_calibration_samples=len(ids), max_seq_length=longest, batch_size=1)


def most_levels(weight: torch.Tensor) -> int:
    """Return the most distinct values that a group of a weight has: at most 2^bits where it was rounded."""
    groups = weight.reshape(-1, GROUP_SIZE).sort(-1).values
    return int((groups.diff(dim=-1) > 1e-6 * groups.abs().amax(-1, keepdim=True)).sum(-1).max()) + 1


def main() -> None:
    folder, rows, out, threads = sys.argv[1:5]
    torch.set_num_threads(int(threads))
    with open(rows, encoding="utf-8") as file:
        ids = [json.loads(line)["ids"] for line in file]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    quantize(model, ids)
    found = model.state_dict()
    rounded = {name for name, value in plain.items() if not torch.equal(found[name].float(), value)}
    levels = max((most_levels(found[name].float()) for name in rounded), default=0)
    if not rounded or levels > 1 << BITS:
        raise SystemExit(f"error: {len(rounded)} layers were rounded, to up to {levels} values in a group")
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fresh.load_state_dict({name: found[name].float() for name in plain})
    fresh.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    values, others = (
        sum(p.numel() for n, p in fresh.named_parameters() if (n in rounded) is inside) for inside in (True, False)
    )
    size_mb = (values * (BITS + 32 / GROUP_SIZE) / 8 + 4 * others) / 2**20  # codes and fp32 scales; the rest in fp32
    tool = f"llmcompressor {version('llmcompressor')}"
    print(json.dumps({"tool": tool, "layers": len(rounded), "levels": levels, "size_mb": size_mb, "rows": len(ids)}))


if __name__ == "__main__":
    main()
