"""The training loop: one for all tasks. A task brings `collate`, `loss` and its metric; what comes before and after the
steps is finetune.py's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from edgelora import console, hardware, memory
from edgelora.adapters.inject import initial_tensors
from edgelora.errors import Interrupted
from edgelora.models.predictor import Collate, to_tensors
from edgelora.train import checkpoint, guard, on_grid
from edgelora.train.batches import Schedule, split
from edgelora.train.checkpoint import State
from edgelora.train.log import Log
from edgelora.train.optimizer import clip_grad_norm, make_optimizer, set_learning_rate, trainable
from edgelora.train.prefix import Prefix, Prefixed
from edgelora.train.schedule import learning_rate_factor
from edgelora.train.signals import StopRequest, stop_request

if TYPE_CHECKING:
    from edgelora.config import FinetuneConfig
    from edgelora.data.store import Store
    from edgelora.tasks.base import Metrics, Task

SHOWN_EVERY = 0.5  # seconds between two changes of the progress bar


@dataclass(frozen=True)
class Job:
    """What a run trains, with everything that None meant in the settings decided."""

    model: Any  # a Decoder or a Network with adapters
    task: Task
    collate: Collate
    store: Store  # training rows
    rows: Schedule  # which of them make up each step
    config: FinetuneConfig
    learning_rate: float
    micro_batch: int
    num_steps: int
    folder: Path  # the run folder: checkpoint and log
    score: Callable[[], Metrics]  # the model on the validation rows, now
    keep: Callable[[], None]  # save the adapter: it is the best so far
    optimizer_bits: int = 32
    trim_above_mb: float = math.inf  # resident memory from which the heap's free pages are given back after a piece
    prefix: Prefix | None = None  # what the frozen layers give for the training rows


class Trainer:
    """Runs a Job from a State to its end. What it changes: the model, the State, and the run folder."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.state = State()
        self.parameters = trainable(job.model)
        self.saved = {**self.parameters, **initial_tensors(job.model)}
        self.optimizer = make_optimizer(
            job.model,
            job.learning_rate,
            job.config.weight_decay,
            loraplus_ratio=job.config.loraplus_ratio,
            bits=job.optimizer_bits,
        )
        self.optimizer.zero_grad()
        self.saved_at = self.shown_at = time.monotonic()
        self.unshown = 0  # steps
        self.stop = StopRequest()
        self.evaluation_steps = evaluation_steps(job.num_steps, job.config.evaluations)
        torch.manual_seed(job.config.seed)  # whatever was random before, as a killed process does not do again

    def resume(self) -> None:
        """Continue where the checkpoint stands."""
        self.state = checkpoint.restore(self.job.folder, self.saved, self.optimizer)

    def run(self) -> State:
        """Train to the last step or until patience ends. Raises Interrupted after a checkpoint on Ctrl-C or SIGTERM."""
        job = self.job
        log = Log(job.folder, self.state.step)
        try:
            with stop_request() as self.stop, console.progress("training", job.num_steps - self.state.step) as bar:
                if not checkpoint.exists(job.folder):
                    self.save()
                first = True
                while self.unfinished(log):
                    before = self.state.step
                    self.one_step(log, timed=not first)
                    first = False
                    self.show(bar, self.state.step - before)
                self.show(bar, 0, now=True)
                if self.stop.requested:
                    self.interrupt()
        finally:
            log.close()
        return self.state

    def unfinished(self, log: Log) -> bool:
        """Do the evaluation and the checkpoint that are due after the last step; tell whether there is another step."""
        state, job = self.state, self.job
        if state.step in self.evaluation_steps and state.evaluated < state.step:
            self.evaluate(log)
            self.save()  # with the best of now: to go back to an older one would not bring back its adapter
        elif time.monotonic() - self.saved_at >= 60 * job.config.checkpoint_minutes:
            self.save()
        return state.step < job.num_steps and not self.out_of_patience()

    def out_of_patience(self) -> bool:
        patience = self.job.config.patience
        return patience is not None and self.state.worse >= patience

    def one_step(self, log: Log, *, timed: bool) -> None:
        """Do one optimizer step with its guards. A broken step rolls back."""
        started, random = time.perf_counter(), torch.get_rng_state()
        rows = self.job.rows.rows(self.state.step)
        with on_grid.warming_up(self.job.model, self.state.step, self.job.num_steps, self.job.config.grid_warmup):
            loss_sum, items = self.gradients(rows, random)
        loss, norm = loss_sum / items, self.clip()
        problem = guard.broken(loss, norm, self.state.recent)
        if problem is not None:
            self.roll_back(problem, log)
            return
        rate = self.rate()
        set_learning_rate(self.optimizer, rate)
        before = guard.copies(self.job.model) if self.state.step == 0 else {}
        self.optimizer.step()
        if self.state.step == 0:
            guard.check_moved(self.job.model, before)
        seconds, tokens = time.perf_counter() - started, int(self.job.rows.lengths[rows].sum())
        self.count(loss_sum, items, tokens, seconds, timed=timed)
        log.write(
            step=self.state.step, loss=loss, learning_rate=rate, grad_norm=norm, tokens=tokens, seconds=seconds, rows=rows
        )

    def gradients(self, rows: list[int], random: Tensor) -> tuple[float, int]:
        """Leave the gradients of a step's mean loss in the parameters; return the summed loss and the supervised items.

        Micro-batches add up sums, and the sum is divided by all items at the end, so that every token weighs the same.
        """
        job = self.job
        job.model.train()
        total, items = 0.0, 0
        for part in split(job.rows.lengths, rows, job.micro_batch):
            if self.stop.requested:
                self.optimizer.zero_grad()
                torch.set_rng_state(random)
                self.interrupt()
            batch = to_tensors(job.collate([job.store[row] for row in part]))
            model = job.model if job.prefix is None else Prefixed(job.prefix, part)
            loss, count = job.task.loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
            total += float(loss.detach())
            items += count
            del loss  # and with it the graph, before the next piece makes its own
            if hardware.rss_mb() > job.trim_above_mb:
                memory.trim()
        guard.refuse_unsupervised(items, rows)
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.div_(items)
        return total, items

    def clip(self) -> float:
        """Clip the gradients; return their norm. Block scales beside adapters are clipped apart: they do not slow these."""
        limit, scales = self.job.config.max_grad_norm, on_grid.learned_scales(self.job.model)
        beside = {id(parameter) for parameter in scales.values()}
        apart = clip_grad_norm(scales.values(), limit)
        norm = clip_grad_norm([p for p in self.parameters.values() if id(p) not in beside], limit)
        return norm if math.isfinite(apart) else apart

    def rate(self) -> float:
        config = self.job.config
        factor = learning_rate_factor(
            self.state.step, self.job.num_steps, schedule=config.schedule, warmup_ratio=config.warmup_ratio
        )
        return self.job.learning_rate * factor * self.state.rate_scale

    def count(self, loss_sum: float, items: int, tokens: int, seconds: float, *, timed: bool) -> None:
        """Enter a done step into the State; the first step of a process does not count for the speed."""
        state = self.state
        state.step += 1
        state.recent = [*state.recent, loss_sum / items][-guard.WINDOW :]
        state.tokens += tokens
        state.loss_sum += loss_sum
        state.loss_items += items
        state.seconds["train"] = state.seconds.get("train", 0.0) + seconds
        if timed:
            state.timed_tokens += tokens
            state.timed_seconds += seconds

    def evaluate(self, log: Log) -> None:
        """Score the validation rows and keep the adapter if it is the best by the task's metric; ties go to the lower loss."""
        state, task, started = self.state, self.job.task, time.perf_counter()
        try:
            with self.stop.ending_at_once():
                metrics = {name: value for name, value in self.job.score().items() if isinstance(value, float)}
        except KeyboardInterrupt:
            self.interrupt()  # the resumed run scores the rows again
        state.evaluated = state.step
        state.train_loss = state.loss_sum / state.loss_items
        state.loss_sum, state.loss_items = 0.0, 0
        state.seconds["validate"] = state.seconds.get("validate", 0.0) + time.perf_counter() - started
        log.write(step=state.step, train_loss=state.train_loss, valid=metrics)
        sign = 1.0 if task.higher_is_better else -1.0

        def key(found: dict[str, float]) -> tuple[float, float]:
            return worth(sign * found[task.metric]), worth(-found["loss"])

        if not state.best or key(metrics) > key(state.best["metrics"]):
            state.best, state.worse = {"step": state.step, "metrics": metrics}, 0
            self.job.keep()
        else:
            state.worse += 1

    def roll_back(self, problem: str, log: Log) -> None:
        """Return to the last checkpoint with half the learning rate; raises SettingsError the second time."""
        step = self.state.step
        if self.state.rate_scale < 1.0:
            raise guard.gave_up(problem, step, self.rate())
        log.back_to(step, problem)
        self.optimizer.zero_grad()
        self.resume()
        self.state.rate_scale = 0.5
        self.state.recent = []
        console.warn(f"step {step + 1}: {problem}; back to step {self.state.step} with half the learning rate")
        self.save()

    def save(self) -> None:
        state = self.state
        state.peak_rss_mb = max(state.peak_rss_mb, hardware.peak_rss_mb())
        with self.stop.finishing():
            if self.job.prefix is not None:
                self.job.prefix.sync()
            checkpoint.save(self.job.folder, state, self.saved, self.optimizer, torch.get_rng_state())
        self.saved_at = time.monotonic()

    def interrupt(self) -> NoReturn:
        self.save()
        raise Interrupted(f"interrupted after step {self.state.step} of {self.job.num_steps}; what was learned is kept")

    def show(self, bar: console.Progress, steps: int, *, now: bool = False) -> None:
        self.unshown += steps
        if not now and time.monotonic() - self.shown_at < SHOWN_EVERY:
            return
        state = self.state
        speed = f"{state.timed_tokens / state.timed_seconds:.0f} tok/s" if state.timed_seconds else "–"
        loss = f"{state.loss_sum / state.loss_items:.3f}" if state.loss_items else f"{state.train_loss or 0.0:.3f}"
        bar.update(self.unshown, loss=loss, speed=speed, memory=f"{hardware.rss_mb():.0f} MB")
        self.unshown, self.shown_at = 0, time.monotonic()


def worth(value: float) -> float:
    """Return the value, of NaN less than any: whatever comes after it is better."""
    return -math.inf if math.isnan(value) else value


def evaluation_steps(num_steps: int, times: int) -> set[int]:
    """Return the steps after which the validation rows are scored; the last one is always among them."""
    times = max(1, times)
    return {round(num_steps * i / times) for i in range(1, times + 1)} - {0}
