"""Runs that are killed again and again: the children of test_kills.py, each forked from a process that has torch already."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgelora.config import FinetuneConfig
from edgelora.models import gemm
from edgelora.train import checkpoint
from edgelora.train.finetune import finetune
from edgelora.train.loop import Trainer

PLACES = ("time", "bytes", "rename", "step")
START_SECONDS = 60.0


def dying(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """Return the function, which kills its process when it is called so many times."""
    left = [calls]

    def wrapped(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return wrapped


def train(inputs: tuple[str, str], run: Path, settings: dict[str, Any], place: str, number: int) -> None:
    """Train, or go on; killed in the middle of writing a tensor, before or after a rename, or before a step."""
    gemm.choose = lambda threads, compute=None: gemm.BLAS  # a measured choice may be another the next time
    if place == "bytes":
        checkpoint.raw = dying(checkpoint.raw, number)
    elif place == "rename":
        checkpoint.sync = dying(checkpoint.sync, number)
    elif place == "step":
        Trainer.gradients = dying(Trainer.gradients, number)  # type: ignore[method-assign]
    if (run / "edgelora.json").is_file():
        finetune(*inputs, run, FinetuneConfig(), resume=True)
    else:
        finetune(*inputs, run, FinetuneConfig(**settings))


class Killer:
    """Starts trainings and kills them. `random` decides where and when."""

    def __init__(self, inputs: tuple[str, str], settings: dict[str, Any], seed: int) -> None:
        self.inputs, self.settings, self.random = inputs, settings, random.Random(seed)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["killing"])

    def train(self, run: Path, place: str = "", number: int = 0, delay: float | None = None) -> int:
        """Return the exit code of a training; it is killed `delay` seconds after its first checkpoint unless that is None."""
        before = self.written(run)
        child = self.context.Process(target=train, args=(self.inputs, run, self.settings, place, number))
        child.start()
        if delay is not None:
            end = time.monotonic() + START_SECONDS
            while self.written(run) == before and child.is_alive() and time.monotonic() < end:
                time.sleep(0.001)
            time.sleep(delay)
            child.kill()
        child.join()
        assert child.exitcode is not None
        return child.exitcode

    def kill_once(self, run: Path) -> tuple[str, int]:
        """Go on with a run and kill it at a random place; return the place and the exit code."""
        place = self.random.choice(PLACES)
        limits = {"bytes": 400, "rename": 6, "step": 4}
        if place == "time":
            return place, self.train(run, delay=self.random.uniform(0.0, 0.2))
        return place, self.train(run, place, self.random.randint(1, limits[place]))

    def written(self, run: Path) -> int:
        """Return when the checkpoint was written last; 0 before there is one."""
        file = run / checkpoint.FOLDER / checkpoint.FILE
        return file.stat().st_mtime_ns if file.exists() else 0
