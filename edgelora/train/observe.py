"""What a run looks at before its first step: the inputs of the adapted layers, where the adapters begin with these (EVA)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from edgelora import console
from edgelora.adapters.eva import eva
from edgelora.models.predictor import to_tensors
from edgelora.train.batches import split
from edgelora.train.loop import Job

MOST_STEPS = 16  # steps whose rows are looked at, at most: directions that have not converged by then are taken as they are


def observe(job: Job) -> None:
    """Let a new run's adapters begin with the rows of its first steps. A resumed one has its A from the checkpoint."""
    if job.config.init != "eva":
        return
    pieces = eva(job.model, batches(job), lambda batch: job.task.loss(job.model, batch))
    console.say(f"the adapters begin with the directions of their layers' inputs in {pieces} batches")


def batches(job: Job) -> Iterator[dict[str, Tensor]]:
    """Yield what the first steps compute at once, as training cuts it."""
    for step in range(min(job.num_steps, MOST_STEPS)):
        for part in split(job.rows.lengths, job.rows.rows(step), job.micro_batch):
            yield to_tensors(job.collate([job.store[row] for row in part]))
