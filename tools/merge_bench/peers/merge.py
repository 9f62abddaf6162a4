"""Merge an adapter into its base with PEFT, as its users do. Runs in a peer's environment.

python merge.py BASE ADAPTER OUT        BASE and OUT in Hugging Face layout, all in fp32
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    base, adapter, out = sys.argv[1:4]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    model.merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    print(json.dumps({"tool": f"peft {version('peft')}"}))


if __name__ == "__main__":
    main()
