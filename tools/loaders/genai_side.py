"""onnxruntime-genai's side of tools/check_loaders: its own tokenizer and chat template, greedy tokens."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime_genai as og


def main() -> None:
    request = json.load(sys.stdin)
    model = og.Model(request["bundle"])
    tokenizer = og.Tokenizer(model)
    with open(f"{request['bundle']}/genai_config.json", encoding="utf-8") as file:
        stop = json.load(file)["model"]["eos_token_id"]
    said = []
    for given in request["inputs"]:
        messages = json.dumps([{"role": "user", "content": given}])
        prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + request["new_tokens"], do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array([prompt], np.int32))
        tokens: list[int] = []
        while not generator.is_done() and len(tokens) < request["new_tokens"]:
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        ends = [place for place, token in enumerate(tokens) if token in stop]
        said.append(tokens[: ends[0]] if ends else tokens)
    print(json.dumps(said))


main()
