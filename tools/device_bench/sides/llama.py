"""llama.cpp's side, through llama-cpp-python's low level: nothing of the wrapper's own work is timed."""

from __future__ import annotations

from typing import Any

from device_bench.sides import timing


class Gguf:
    def __init__(self, request: dict[str, Any]) -> None:
        import llama_cpp
        import numpy as np

        self.api, self.np = llama_cpp, np
        positions = max(map(len, request["prompts"])) + request["new_tokens"] + 8
        self.llama = llama_cpp.Llama(
            request["model"], n_ctx=positions, n_batch=512, n_ubatch=512, n_threads=request["threads"],
            n_threads_batch=request["threads"], verbose=False,
        )  # fmt: skip
        self.context = self.llama.ctx
        self.size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.llama.model))

    def prefill(self, ids: list[int]) -> int:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        return self.decode(ids)

    def step(self, token: int) -> int:
        return self.decode([token])

    def logits(self, ids: list[int], *, fresh: bool) -> Any:
        if fresh:
            self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.decode(ids)
        return self.np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), shape=(self.size,)).copy()

    def decode(self, ids: list[int]) -> int:
        tokens = (self.api.llama_token * len(ids))(*ids)
        failed = self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids)))
        if failed:
            raise SystemExit(f"error: llama_decode returned {failed}")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return int(self.np.ctypeslib.as_array(logits, shape=(self.size,)).argmax())


if __name__ == "__main__":
    timing.main(Gguf)
