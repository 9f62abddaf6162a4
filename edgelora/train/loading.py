"""From a plan to the loaded model: its adapters attached, on the grid where the run trains on it, and the plan probed."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from edgelora import hardware
from edgelora.adapters import inject, scales
from edgelora.adapters.lora import LoRASettings
from edgelora.data.prepare import Prepared
from edgelora.models import gemm
from edgelora.models.load import load_model
from edgelora.models.source import ModelSource
from edgelora.planning.plan import Plan
from edgelora.planning.planner import Planner
from edgelora.tasks import get_task
from edgelora.train import on_grid, probe, scales_grid
from edgelora.train.probe import Probe
from edgelora.train.run import Run
from edgelora.train.targets import target_modules

if TYPE_CHECKING:
    from edgelora.models.decoder import Decoder
    from edgelora.models.network import Network

    Model = Decoder | Network


@dataclass
class Stages:
    """Seconds of each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, others: dict[str, float]) -> None:
        for name, value in others.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add({name: time.perf_counter() - started})


def load_planned(
    source: ModelSource, data: str, prepared: Prepared, planner: Planner, folder: Path, stages: Stages
) -> tuple[Run, Model]:
    """Return the run and its model, loaded as planned and the plan corrected by a probe of it.

    Where the probe finds that the budget asks for other frozen weights, the model is loaded again.
    """
    facts = {"reference": source.reference, "fingerprint": source.fingerprint, "license": source.license}
    plan, choice = planner.plan()
    tried = False
    config = planner.situation.config
    grid = scales_grid.choose_grid(source, prepared.task, config) if scales_grid.trains_scales(config) else {}
    while True:
        run = Run(facts, data, prepared.task, prepared.labels, config, plan, grid)
        network = load(source, run, stages)
        run = round_as_shipped(network, run)
        settle = functools.partial(keep_as_planned, network, folder)
        settle(plan)
        if tried:
            return run, network
        tried, loaded = True, choice.settings.loaded
        with stages.time("probe"):
            task = get_task(run.task)
            collate = functools.partial(task.collate, processor=task.open_processor(source.folder))
            tries = Probe(network, task, collate, prepared.store("train"), settle)
            planner, plan, choice = probe.refine(planner, choice, tries)
        if choice.settings.loaded == loaded:
            settle(plan)
            return dataclasses.replace(run, plan=plan), network
        del network, settle, tries  # they hold it


def keep_as_planned(network: Model, folder: Path, plan: Plan) -> None:
    """Let the model keep for backward what the plan says; a scratch file would be in `folder`."""
    network.keeping = plan.keeping(folder)
    stream = getattr(network, "stream", None)
    if stream is not None:
        stream.fit_cache(hardware.memory_limit() - int(plan.predicted_peak_mb * (1 << 20)))


def load(source: ModelSource, run: Run, stages: Stages) -> Model:
    """Return the model with new adapters. Raises SettingsError for target modules that it does not have."""
    config, plan = run.settings, run.plan
    torch.set_flush_denormal(True)
    torch.set_num_threads(plan.threads)
    gemm.use(plan.matmul)
    torch.manual_seed(config.seed)
    with stages.time("load"):
        bits = run.grid["bits"] if scales_grid.trains_scales(config) else None
        network = load_model(
            source, run.task, base_bits=plan.base_bits, labels=run.labels, streamed=plan.stream, bits=bits
        )  # fmt: skip
        targets = target_modules(inject.adaptable(network), config, run.task, inject.frozen_convolutions(network))
        if scales_grid.trains_scales(config):
            scales.attach(network, targets)
        else:
            inject.attach(network, LoRASettings.from_config(config), targets)
    return network


def round_as_shipped(network: Model, run: Run) -> Run:
    """Put the adapters on the grid that will ship, where the run trains on it; return the run with that grid recorded."""
    if scales_grid.trains_scales(run.settings):
        codes = run.grid.get("codes") or scales_grid.code_digests(network)
        return dataclasses.replace(run, grid={**run.grid, "codes": codes})
    if not on_grid.applies(run.settings, run.plan.base_bits) or not network.linears() or not inject.adapters(network):
        return run
    if not run.grid:
        ways = {"start": run.plan.grid_start, "scales": run.plan.grid_scales}
        run = dataclasses.replace(run, grid=on_grid.choose_grid(network, run.settings) | ways)
    inject.put_on_grid(network, run.grid)
    return run
