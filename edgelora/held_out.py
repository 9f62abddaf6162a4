"""The lines of the report (report.py), scored: one model after the other on the held-out rows of a run."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora import console, memory
from edgelora.adapters import inject
from edgelora.data.prepare import Prepared, sample
from edgelora.folder import read_manifest
from edgelora.models.agreement import Reference, Watched, WatchedBundle
from edgelora.models.predictor import TorchPredictor
from edgelora.report import Results, gain, line, with_kept
from edgelora.tasks import get_task

if TYPE_CHECKING:
    from edgelora.adapters.adapted import Adapted
    from edgelora.models.head import Head
    from edgelora.models.predictor import Collate
    from edgelora.models.source import ModelSource
    from edgelora.run.predictor import OnnxPredictor
    from edgelora.tasks.base import Example, Metrics, Predictor, Row, Task

REFERENCE = "reference.safetensors"  # in a run folder: what the fp32 adapter says of the held-out rows
TABLE_ROWS = 64
FEWEST_BITS = 16


@dataclass(frozen=True)
class HeldOut:
    """The rows that every line of the table is scored on."""

    task: Task
    labels: list[str]
    processor: Any
    rows: list[Row]
    examples: list[Example]

    @property
    def collate(self) -> Collate:
        return functools.partial(self.task.collate, processor=self.processor)

    def score(self, predictor: TorchPredictor, reference: Reference | None = None, *, generate: bool = False) -> Scored:
        """Score a torch model, and compare it with the reference if there is one."""
        watched = Watched(predictor, self.task)
        metrics = self.evaluate(watched, generate=generate)
        said = watched.reference()
        return Scored(metrics if reference is None else metrics | said.agreement(reference).figures(), said)

    def score_bundle(self, predictor: OnnxPredictor, reference: Reference | None, *, generate: bool) -> Metrics:
        """Score a bundle, and compare it with the reference if there is one."""
        if reference is None:
            return self.evaluate(predictor, generate=generate)
        watched = WatchedBundle(predictor, reference, self.task)
        return self.evaluate(watched, generate=generate) | watched.found.figures()

    def evaluate(self, predictor: Predictor, *, generate: bool) -> Metrics:
        return self.task.evaluate(predictor, self.rows, self.examples, self.processor, self.labels, generate=generate)


@dataclass(frozen=True)
class Scored:
    """The task's metrics, with `agreement` and `kl` where there was a reference; and what the model said, as one for others."""

    metrics: Metrics
    said: Reference


def held_out(run: Path, manifest: Mapping[str, Any]) -> HeldOut | None:
    """Return the rows that closed a run; None where it has kept none."""
    if not (run / "data").is_dir():
        return None
    prepared = Prepared.open(run / "data")
    limit = int((manifest.get("settings") or {}).get("valid_rows", TABLE_ROWS))
    examples, rows = sample(prepared.store("valid"), prepared.texts("valid"), limit)
    task = get_task(str(manifest["task"]))
    return HeldOut(task, list(manifest.get("labels") or []), task.open_processor(run), rows, examples)


@dataclass(frozen=True)
class Closing:
    """The end of a run: its table, all metrics of the adapter as it was trained, and what the fp32 adapter says."""

    results: Results
    adapter: Metrics
    reference: Reference


def closing(
    held: HeldOut, trained: TorchPredictor, base: Metrics, *, precision: str | None, base_bits: int, generate: bool
) -> Closing:
    """Score the trained model on the grid and off it, and compare the base with it.

    trained: the forward pass that was trained, on the grid of `precision` (None: on none); base: the metrics from before.
    """
    model = trained.model
    plain = TorchPredictor(model, held.collate, batch_tokens=trained.batch_tokens)
    bits: dict[str, Any] = {} if base_bits == 32 else {"base_bits": base_bits}
    exact: Results = []
    reference: Reference | None = None
    memory.trim()  # training and scoring leave holes in the heap that the other has no use for
    if precision is not None:
        with inject.off_grid(model):
            unrounded = held.score(plain)
        reference, exact = unrounded.said, [line("fp32 adapter", unrounded.metrics, **bits)]
        memory.trim()
    adapter = held.score(trained, reference, generate=generate)
    reference = reference or adapter.said
    memory.trim()
    with inject.switched_off(model):
        before = held.score(plain, reference).metrics
    memory.trim()
    majority = held.task.baseline(held.examples, held.labels)
    agreement: Metrics = {name: value for name, value in before.items() if name in ("agreement", "kl")}
    results = [line("majority baseline", majority)] if majority else []
    results += [line("base", {**base, **agreement}, **bits), *exact]
    results.append(line("adapter", adapter.metrics, **({"precision": precision} if precision else bits)))
    return Closing(with_kept(results), adapter.metrics, reference)


def add_merged(folder: Path, adapted: Adapted, manifest: Mapping[str, Any], run: Path) -> Results:
    """Return the table of a run with "merged fp32" and "merged": the weights before they were rounded and as `folder` has them.

    manifest: the merged folder's. A run without held-out rows keeps its table as it is.
    """
    results = [row for row in manifest.get("results") or [] if row.get("what") not in ("merged fp32", "merged", "onnx")]
    held = held_out(run, read_manifest(run, "run"))
    if held is None or gain(results) is None:
        return results
    reference = load_reference(run, adapted.source, held.task)
    return with_kept(results + merged_rows(folder, adapted, manifest, held, reference))


def foreign_rows(folder: Path, adapted: Adapted, manifest: Mapping[str, Any], held: HeldOut) -> Results:
    """Return the table of an adapter that was trained elsewhere, or of a model alone: base and merged weights."""
    from edgelora.models.load import load_model

    bits, results = affordable_bits(adapted.source), []
    reference: Reference | None = None
    if bits is not None and not held.labels:  # a classifier's base has no head for these labels
        model = load_model(adapted.source, held.task.name, base_bits=bits, labels=held.labels)
        scored = held.score(TorchPredictor(model, held.collate))
        results.append(line("base", scored.metrics, **({} if bits == 32 else {"base_bits": bits})))
        reference = scored.said if adapted.adapter is None else None
        del model
    return with_kept(results + merged_rows(folder, adapted, manifest, held, reference))


def merged_rows(
    folder: Path, adapted: Adapted, manifest: Mapping[str, Any], held: HeldOut, reference: Reference | None
) -> Results:
    """Return "merged fp32", unless it is what the base is or what ships, and "merged"; without a reference the former is it."""
    from edgelora.models.load import load_model
    from edgelora.models.source import open_model

    results = []
    exact = merged_in_fp32(adapted, held) if manifest["precision"] != "fp32" and adapted.adapter is not None else None
    if exact is not None:
        scored = held.score(exact[0], reference)
        reference = reference or scored.said
        results.append(line("merged fp32", scored.metrics, **({} if exact[1] == 32 else {"base_bits": exact[1]})))
        del exact
    model = load_model(open_model(str(folder)), held.task.name, base_bits=32, labels=held.labels)
    scored = held.score(TorchPredictor(model, held.collate), reference)
    results.append(line("merged", scored.metrics, precision=manifest["precision"]))
    del model
    gc.collect()  # modules refer to each other: their mapped files must be closed before the folder is renamed
    return results


def merged_in_fp32(adapted: Adapted, held: HeldOut) -> tuple[TorchPredictor, int] | None:
    """Return the merged model before it is rounded, and the bits of its weights; or None, and say that it is too large."""
    from edgelora.adapters.merged_source import merged_source
    from edgelora.models.load import load_model

    source = merged_source(adapted, held.labels, linears=True)
    bits = affordable_bits(source)
    if bits is None:
        console.say(f'"merged fp32" is left out of the table: the model does not fit the memory in {FEWEST_BITS} bits')
        return None
    model = load_model(source, held.task.name, base_bits=bits, labels=held.labels)
    return TorchPredictor(model, held.collate), bits


def affordable_bits(source: ModelSource) -> int | None:
    """Return in how many bits the weights of a source fit half of the free memory: 32, else 16, else None."""
    from edgelora import hardware

    count = sum(math.prod(source.shape(name)) for name in source.names())
    free = hardware.available_memory() // 2
    return next((bits for bits in (32, FEWEST_BITS) if count * bits // 8 <= free), None)


def load_reference(run: Path, source: ModelSource, task: Task) -> Reference | None:
    """Return what the fp32 adapter of a run says of its held-out rows; None for a run that has not kept it."""
    path = run / REFERENCE
    if not path.is_file():
        return None
    has_head = task.writes or task.auto_class == "AutoModelForCausalLM"
    return Reference.load(path, head_of(source, task) if has_head else None)


def head_of(source: ModelSource, task: Task) -> Head:
    """Return a decoder's LM head as its source has it, without the rest of the model."""
    if task.writes:
        from edgelora.models.seq2seq import read_head

        return read_head(source, task)
    from edgelora.models.families import decoder_spec
    from edgelora.models.head import Head
    from edgelora.models.linear import FrozenWeight

    spec = decoder_spec(source.config)
    weight = source.read_linear(spec.weight("embed" if spec.tied else "head"))
    return Head(FrozenWeight(weight), spec.logits_scale, spec.logits_softcap)
