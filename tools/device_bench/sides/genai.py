"""onnxruntime-genai's side: the int4 graph of its own builder in its own runtime."""

from __future__ import annotations

import json
from typing import Any

from device_bench.sides import timing


class Genai:
    def __init__(self, request: dict[str, Any]) -> None:
        import numpy as np
        import onnxruntime_genai as og

        self.np = np
        config = og.Config(request["model"])
        config.clear_providers()
        # No answer may end early: an end token that greedy search hardly picks, so that every side writes as many tokens.
        options = {"intra_op_num_threads": request["threads"], "log_id": "bench"}
        config.overlay(json.dumps({"model": {"eos_token_id": 0, "decoder": {"session_options": options}}}))
        self.model = og.Model(config)
        self.tokenizer = og.Tokenizer(self.model)
        positions = max(map(len, request["prompts"])) + request["new_tokens"] + 8
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=positions, do_sample=False)
        self.generator = og.Generator(self.model, params)

    def prefill(self, ids: list[int]) -> int:
        self.generator.rewind_to(0)
        self.generator.append_tokens(self.np.array([ids], self.np.int32))
        return self.next()

    def step(self, token: int) -> int:
        """Return the token after the last one, which the runtime keeps itself."""
        return self.next()

    def next(self) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def logits(self, ids: list[int], *, fresh: bool) -> Any:
        if fresh:
            self.generator.rewind_to(0)
        self.generator.append_tokens(self.np.array([ids], self.np.int32))
        return self.np.asarray(self.generator.get_logits()).reshape(-1)


if __name__ == "__main__":
    timing.main(Genai)
