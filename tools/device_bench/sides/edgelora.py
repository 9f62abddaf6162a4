"""EdgeLoRA's side: a bundle as `edgelora run` opens it, without speculation and without a prefix cache."""

from __future__ import annotations

from typing import Any

from device_bench.sides import timing


class Bundle:
    def __init__(self, request: dict[str, Any]) -> None:
        from edgelora.run.model import load

        self.decoder = load(request["model"], threads=request["threads"], native=request["native"]).generator.decoder

    def prefill(self, ids: list[int]) -> int:
        self.decoder.rewind(0)
        return int(self.decoder.prefill(ids).argmax())

    def step(self, token: int) -> int:
        return int(self.decoder.step(token).argmax())

    def logits(self, ids: list[int], *, fresh: bool) -> Any:
        if fresh:
            self.decoder.rewind(0)
        return self.decoder.prefill(ids)


if __name__ == "__main__":
    timing.main(Bundle)
