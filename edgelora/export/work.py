"""One export under way: where it goes, what it is made from, and what is known about it so far."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.quant.checkpoint import MergedCheckpoint

if TYPE_CHECKING:
    from edgelora.adapters.peft_format import AdapterFile
    from edgelora.export.adapters import StaticBranches, SwapBranches
    from edgelora.models.spec import DecoderSpec


@dataclass
class Work:
    staging: Path
    checkpoint: MergedCheckpoint
    run: Path | None
    precision: str
    device: str
    spec: DecoderSpec | None  # None: no decoder
    processor: Any  # what the task encodes with: a tokenizer, an image processor
    adapter: AdapterFile | None = None  # beside the weights
    branches: StaticBranches | SwapBranches | None = None  # of the graph, for adapters beside the weights
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the graph's MatMulNBits
    manifest: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def model_path(self) -> Path:
        return self.staging / str(self.manifest["model_file"])

    @property
    def graph_paths(self) -> list[Path]:
        """The files of all graphs."""
        encoder = self.manifest.get("encoder_file")
        return [self.model_path, *([self.staging / str(encoder)] if encoder else [])]

    @property
    def exceptions(self) -> dict[str, int]:
        """The accuracy level of each MatMulNBits that is not at level 4: the fast kernels' exceptions."""
        packed = {name: facts for name, facts in self.nodes.items() if "unpacked" not in facts}
        return {name: facts["accuracy_level"] for name, facts in packed.items() if facts["accuracy_level"] != 4}

    @cached_property
    def network(self) -> Any:
        """The torch model of the merged folder (Decoder or Network), its weights mapped from there, with `adapter` on it."""
        from edgelora.models.load import load_model
        from edgelora.models.source import open_model

        source = open_model(str(self.checkpoint.folder))
        network = load_model(source, self.checkpoint.task, base_bits=32, labels=self.checkpoint.labels).eval()
        if self.adapter is not None:
            from edgelora.adapters.peft_format import apply

            apply(network, self.adapter)
        return network

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 2)
