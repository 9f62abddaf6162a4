"""`edgelora plan`: the settings that fit a budget of memory, and what they cost, before a byte is trained.

What is given up, and in which order, choose.py says. Memory and time come from formulas (costs.py, speed.py); with the model
loaded, a probe corrects both (train/probe.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora import console

if TYPE_CHECKING:
    from edgelora.config import FinetuneConfig
    from edgelora.models.recompute import Keeping

LONGEST_WRITING = 60.0  # seconds that answers for the closing table may take in any case
DEFAULT_LENGTH = 1024  # tokens of a row, where neither the user nor the model sets fewer
TRIED = "probe of larger settings"  # a part of the peak


@dataclass(frozen=True)
class Plan:
    """Settings that fit, and their predicted cost. Goes into the run's manifest and comes back on --resume."""

    base_bits: int
    micro_batch: int
    kept_blocks: int  # the last ones keep what their backward needs; those before are computed again
    keep_bits: int  # 32, or 16: what is kept is kept in bf16
    keep_in_file: bool
    stream: bool  # base blocks are dropped from memory after use
    optimizer_bits: int
    threads: int
    matmul: str  # the library of matrix products, models/gemm.py
    max_length: int
    predicted_peak_mb: float
    scoring_tokens: int  # computed at once while rows are scored, so that it does not set the peak
    cache_mb: float  # for keys and values while answers are generated, likewise
    seconds: float  # of the training steps
    total_seconds: float  # with validation, and scoring base and adapter for the closing table
    budget_mb: float
    steps: int
    tokens: int
    parts: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    writing_seconds: float = 0.0  # of generating the answers of the validation rows once
    grid_start: str = "nearest"  # what is rounded at first, and …
    grid_scales: str = "max"  # … its block scales: what the settings of these names came to

    @property
    def too_long_to_write(self) -> str | None:
        """Why answers are not generated for the closing table; None where they are."""
        if self.writing_seconds <= max(self.seconds, LONGEST_WRITING):
            return None
        took, training = console.show_time(self.writing_seconds), console.show_time(self.seconds)
        return f"no answers are generated for the closing table: each time would take about {took}, training takes {training}"

    def reached(self, peak_mb: float) -> Plan:
        """Return the plan with the peak that the process has had already, trying larger settings, where that is the higher."""
        more = round(peak_mb - self.predicted_peak_mb, 1)
        if more <= 0.0:
            return self
        parts = {**self.parts, TRIED: round(self.parts.get(TRIED, 0.0) + more, 1)}
        return dataclasses.replace(self, predicted_peak_mb=round(peak_mb, 1), parts=parts)

    def keeping(self, folder: Path) -> Keeping:
        """Return what the model keeps for backward; a scratch file would be in `folder`."""
        from edgelora.models.recompute import Keeping

        return Keeping(self.kept_blocks, self.keep_bits, self.kept_file(folder) if self.keep_in_file else None)

    def show(self, rows: int, steps: int, adapters: int) -> None:
        """Draw the plan of a run as a table."""
        row = {
            "rows": rows,
            "steps": steps,
            "adapters": adapters,
            "base bits": self.base_bits,
            "micro-batch": self.micro_batch,
            "kept blocks": self.kept_blocks,
            "threads": self.threads,
            "peak": console.show_mb(self.predicted_peak_mb),
            "time": console.show_time(self.seconds),
        }
        console.table("plan", [row])

    @staticmethod
    def kept_file(folder: Path) -> Path:
        """Return the scratch file of a run folder."""
        return folder / "kept.bin"


def plan(model: str, data: str, config: FinetuneConfig, *, probe: bool = True) -> dict[str, Any]:
    """Return {"peak_mb", "seconds", "settings", …} of a run that is not made.

    The rows are read and tokenized for it, and with `probe` the model is loaded and a few pieces of a step are computed.
    Raises what `finetune` would: DataError, ModelError, SettingsError, MachineError.
    """
    import tempfile

    from edgelora import memory
    from edgelora.adapters.initialize import refuse_combinations
    from edgelora.data.prepare import prepare
    from edgelora.models.source import open_model
    from edgelora.planning.planner import make_planner
    from edgelora.train.loading import Stages, load_planned
    from edgelora.train.run import length_limit
    from edgelora.train.scales_grid import refuse_settings

    memory.settle()
    refuse_combinations(config)
    refuse_settings(config)
    source = open_model(model, trust_remote_code=config.trust_remote_code)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        longest = min(config.max_length or DEFAULT_LENGTH, length_limit(source.config))
        prepared = prepare(data, source.folder, folder / "data", config, max_length=longest)
        planner = make_planner(source, prepared, config)
        made = load_planned(source, data, prepared, planner, folder, Stages())[0].plan if probe else planner.plan()[0]
    names = (
        "base_bits", "micro_batch", "kept_blocks", "keep_bits", "keep_in_file", "stream", "optimizer_bits", "grid_start",
        "grid_scales", "threads", "matmul", "max_length",
    )  # fmt: skip
    return {
        "peak_mb": made.predicted_peak_mb,
        "seconds": made.seconds,
        "total_seconds": made.total_seconds,
        "step_seconds": made.seconds / made.steps,
        "tokens_per_s": made.tokens / made.seconds,
        "settings": {"task": prepared.task, **{name: getattr(made, name) for name in names}},
        "rows": prepared.rows["train"],
        "steps": made.steps,
        "tokens": made.tokens,
        "budget_mb": made.budget_mb,
        "parts": made.parts,
        "notes": made.notes,
        "probed": probe,
        "model": source.reference,
        "config": dataclasses.asdict(config),
    }
