"""`edgelora finetune`: prepare → plan → load → attach → train → table → save."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora import console, folder, held_out, memory
from edgelora.adapters import inject, peft_format
from edgelora.adapters.initialize import refuse_combinations
from edgelora.adapters.scales import RATE, scaled_layers
from edgelora.config import FinetuneConfig
from edgelora.data.prepare import Prepared, prepare, sample
from edgelora.errors import DataError, FolderError, Interrupted
from edgelora.held_out import Closing, HeldOut
from edgelora.models import gemm
from edgelora.models.predictor import TorchPredictor
from edgelora.models.source import ModelSource, open_model
from edgelora.planning.closing import short_answers
from edgelora.planning.plan import DEFAULT_LENGTH
from edgelora.planning.planner import make_planner
from edgelora.quant.digest import digest
from edgelora.tasks import get_task
from edgelora.train import checkpoint, on_grid, scales_grid
from edgelora.train.batches import Schedule
from edgelora.train.checkpoint import State
from edgelora.train.loading import Stages, load, load_planned, round_as_shipped
from edgelora.train.loop import Job, Trainer
from edgelora.train.observe import observe
from edgelora.train.prefix import PrefixedPredictor, Prefixes, open_prefixes
from edgelora.train.run import DATA, Run, copy_model_files, length_limit, outcome
from edgelora.train.scales_grid import trains_scales
from edgelora.train.start import start_on_grid

if TYPE_CHECKING:
    from edgelora.models.decoder import Decoder
    from edgelora.models.network import Network
    from edgelora.tasks.base import Metrics, Task

    Model = Decoder | Network

TRIM_ABOVE = 0.9  # share of the budget that the heap may take with its free pages


def finetune(
    model: str, data: str, out: Path, config: FinetuneConfig, *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Train adapters for MODEL on DATA into the run folder `out`; return the figures of DESIGN.md §1.

    A run that was stopped goes on with `resume`. Raises UserError, MachineError, and Interrupted after a checkpoint.
    """
    memory.settle()
    stages = Stages()
    source = open_model(model, trust_remote_code=config.trust_remote_code)
    folder.restore_old(out)
    if not resume:
        folder.refuse_existing(out, overwrite=overwrite, inputs=(model, data, config.valid))
    folder.make_parents(out)
    with folder.lock(out), folder.disk_errors(out):
        if resume and ended(out):
            return complete(out)
        begin = reopen if resume else start
        run, network = begin(out, source, data, config, stages)
        try:
            training = Training(out, run, network, stages)
            try:
                return training.carry_out()
            finally:
                training.close()
        except (Interrupted, KeyboardInterrupt) as stopped:
            message = stopped.message if isinstance(stopped, Interrupted) else "interrupted; the last checkpoint is kept"
            hint = shlex.join(["edgelora", "finetune", model, data, "-o", str(out), "--resume"])
            raise Interrupted(message, hint=hint) from None


def start(out: Path, source: ModelSource, data: str, config: FinetuneConfig, stages: Stages) -> tuple[Run, Model]:
    """Prepare rows, plan and model, then put the new run folder in its place: what is refused leaves nothing behind."""
    refuse_combinations(config)
    scales_grid.refuse_settings(config)
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        with stages.time("prepare"):
            longest = min(config.max_length or DEFAULT_LENGTH, length_limit(source.config))
            prepared = prepare(data, source.folder, staging / DATA, config, max_length=longest)
        if not prepared.rows.get("valid"):
            raise DataError(f"{data} leaves no row to validate on", hint="give validation rows with --valid FILE")
        with stages.time("plan"):
            planner = make_planner(source, prepared, config)
        run, network = load_planned(source, data, prepared, planner, staging, stages)
        copy_model_files(source, prepared.labels, staging)
        run.write(staging, complete=False)
        folder.swap_in(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    network.keeping = run.plan.keeping(out)
    return run, network


def reopen(out: Path, source: ModelSource, data: str, config: FinetuneConfig, stages: Stages) -> tuple[Run, Model]:
    """Return the record and the model of a run that is not complete; what was learned comes with the checkpoint.

    Raises FolderError if there is nothing to resume and SettingsError if something else is asked for than was begun.
    """
    run, manifest = Run.read(out)
    if manifest["complete"]:
        raise FolderError(f"{out} is complete: there is nothing to resume", hint="start again with --overwrite")
    run.refuse_other(source, data, config)
    network = load(source, run, stages)
    network.keeping = run.plan.keeping(out)
    return round_as_shipped(network, run), network


def ended(out: Path) -> bool:
    """Whether a process was killed after its results were recorded and its checkpoint removed."""
    manifest = folder.read_manifest(out, "run")
    return not manifest["complete"] and "figures" in manifest and not checkpoint.exists(out)


def complete(out: Path) -> dict[str, Any]:
    """Make a run with recorded results complete, without its checkpoint; return its figures."""
    run, manifest = Run.read(out)
    shutil.rmtree(out / checkpoint.FOLDER, ignore_errors=True)
    run.plan.kept_file(out).unlink(missing_ok=True)
    run.write(out, complete=True, results=manifest["results"], figures=manifest["figures"])
    return {"run": str(out), **manifest["figures"]}


class Training:
    """Everything after the rows are there, the same for a new run and a resumed one."""

    def __init__(self, out: Path, run: Run, network: Model, stages: Stages) -> None:
        self.out, self.run, self.model, self.stages = out, run, network, stages
        self.config, self.plan = run.settings, run.plan
        self.task: Task = get_task(run.task)
        self.processor = self.task.open_processor(out)
        self.collate = functools.partial(self.task.collate, processor=self.processor)
        prepared = Prepared.open(out / DATA)
        self.store = prepared.store("train")
        self.valid, self.valid_rows = sample(prepared.store("valid"), prepared.texts("valid"), self.config.valid_rows)
        self.prefixes: Prefixes | None = None

    def carry_out(self) -> dict[str, Any]:
        trainer = Trainer(self.job())
        if checkpoint.exists(self.out):
            trainer.resume()
            self.stages.add(trainer.state.seconds)
            console.say(f"resumed after step {trainer.state.step} of {trainer.job.num_steps}")
        else:
            adapters = len(inject.adapters(self.model)) + len(scaled_layers(self.model))
            self.plan.show(len(self.store), trainer.job.num_steps, adapters)
            with self.stages.time("observe"):
                observe(trainer.job)
        self.keep_prefixes(trainer)
        if not trainer.state.base:
            console.say(f"scoring the base model on {len(self.valid)} validation rows")
            if self.plan.too_long_to_write:
                console.say(self.plan.too_long_to_write)
            with self.stages.time("base"), inject.switched_off(self.model):
                trainer.state.base = self.score(generate=self.writes_answers())
        with self.stages.time("calibrate"):
            start_on_grid(self.model, self.run, self.out)
            on_grid.round_all(self.model)
        trainer.state.seconds = self.stages.seconds
        state = trainer.run()
        self.stages.seconds = state.seconds
        console.say(f"scoring the adapter of step {state.best['step']}")
        with self.stages.time("table"):
            self.apply_kept()
            closed = self.closing(state.base)
        if self.prefixes is not None:
            self.prefixes.close(remove=True)
        return self.finish(state, closed)

    def keep_prefixes(self, trainer: Trainer) -> None:
        """Let training and scores go by what the layers below the lowest adapter gave before, where there are such."""
        job, state = trainer.job, trainer.state
        if state.kept_prefix is not False:
            lengths = np.array([len(example) for example in self.valid])
            where = self.out / checkpoint.FOLDER
            self.prefixes = open_prefixes(where, self.model, job.rows, lengths, num_steps=job.num_steps, step=state.step)
        state.kept_prefix = self.prefixes is not None
        if self.prefixes is not None:
            trainer.job = dataclasses.replace(job, prefix=self.prefixes.train)

    def close(self) -> None:
        """Let go of the files of a run that may be resumed."""
        if self.prefixes is not None:
            self.prefixes.close(remove=False)

    def job(self) -> Job:
        config = self.config
        rows = Schedule(self.store.lengths, config.batch_size or self.task.batch_size, config.seed)
        return Job(
            model=self.model,
            task=self.task,
            collate=self.collate,
            store=self.store,
            rows=rows,
            config=config,
            learning_rate=config.learning_rate or self.task.learning_rate * (RATE if trains_scales(config) else 1.0),
            micro_batch=self.plan.micro_batch,
            optimizer_bits=self.plan.optimizer_bits,
            trim_above_mb=TRIM_ABOVE * self.plan.budget_mb,
            num_steps=rows.num_steps(config.epochs, config.max_steps),
            folder=self.out,
            score=lambda: self.score(generate=False),
            keep=self.keep,
        )

    def keep(self) -> None:
        """Write the adapter as it is now: the best so far."""
        config = self.config
        if trains_scales(config):
            scales_grid.keep(self.model, self.run, self.out)
            return
        adapter = peft_format.from_model(
            self.model,
            rslora=config.rslora,
            dropout=config.dropout,
            base=self.run.model["reference"],
            task_type=peft_format.TASK_TYPES.get(self.task.auto_class),
        )
        peft_format.save(adapter, self.out, paths=inject.adaptable(self.model))
        on_grid.save_rounded(self.model, self.out)

    def apply_kept(self) -> None:
        if trains_scales(self.config):
            scales_grid.apply_kept(self.model, self.out)
        else:
            peft_format.apply(self.model, peft_format.load(self.out))
            on_grid.ship(self.model, self.out, self.run.grid)

    def predictor(self) -> TorchPredictor:
        limits = {"batch_tokens": self.plan.scoring_tokens, "cache_bytes": round(self.plan.cache_mb * (1 << 20))}
        if self.prefixes is None:
            return TorchPredictor(self.model, self.collate, **limits)
        return PrefixedPredictor(self.prefixes.valid, self.collate, **limits)

    def score(self, *, generate: bool) -> Metrics:
        predictor = self.predictor()
        memory.trim()  # training and scoring leave holes in the heap that the other has no use for
        found = self.task.evaluate(predictor, self.valid_rows, self.valid, self.processor, self.run.labels, generate=generate)
        memory.trim()
        return found

    def closing(self, base: Metrics) -> Closing:
        """Score the best adapter, on the grid and off it, for the closing table."""
        held = HeldOut(self.task, self.run.labels, self.processor, self.valid_rows, self.valid)
        # Block scales compute with what ships, and with nothing else: there is no rounding to compare with.
        precision = None if trains_scales(self.config) else self.run.grid.get("precision")
        bits = self.plan.base_bits
        with gemm.exact():
            return held_out.closing(
                held, self.predictor(), base, precision=precision, base_bits=bits, generate=self.writes_answers()
            )

    def writes_answers(self) -> bool:
        """Whether answers are generated for the closing table: short ones, where the plan has the time."""
        return short_answers(self.valid) and self.plan.too_long_to_write is None

    def finish(self, state: State, closed: Closing) -> dict[str, Any]:
        """Complete the manifest and return the figures."""
        closed.reference.save(self.out / held_out.REFERENCE)
        if self.run.grid:
            digests = {path: digest(tensor) for path, tensor in inject.rounded_layers(self.model, self.run.grid)}
            self.run = dataclasses.replace(self.run, grid={**self.run.grid, "digests": digests})
        figures = outcome(state, self.plan, self.stages.seconds) | {"valid": closed.adapter, "table": closed.results}
        # The results are recorded before the checkpoint goes, so that a kill in between loses nothing.
        self.run.write(self.out, complete=False, results=closed.results, figures=figures)
        console.say(f"adapter of step {state.best['step']} in {self.out}")
        return complete(self.out)
