"""Convolutions in 8 bits: a graph with QuantizeLinear and DequantizeLinear around them (QDQ), which ONNX Runtime fuses into
QLinearConv, its ranges taken from the user's own pictures.

Whether that is faster depends on the processor: without VNNI or its like an int8 product takes as many instructions as one in
fp32. So both graphs are measured where the bundle is written, and the int8 one ships where it is faster and as good.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from edgelora import console, held_out
from edgelora.export.files import MODEL_NAMES, WEB_DTYPES, read_json
from edgelora.export.work import Work
from edgelora.folder import read_manifest, write_json, write_manifest
from edgelora.hardware import instruction_sets
from edgelora.merging.calibration import from_run
from edgelora.report import line, with_kept
from edgelora.run.model import load
from edgelora.run.predictor import OnnxPredictor

if TYPE_CHECKING:
    from edgelora.run.classify import Classifier
    from edgelora.tasks.base import Example

CALIBRATION_ROWS = 64
MOST_LOST = 0.01  # of the task's metric
LEAST_FASTER = 1.05
TIMED = 15  # inputs of each graph
FULL_RANGE = {"VNNI", "AMX-INT8", "NEON", "DOTPROD", "I8MM"}  # with these, sums of two products do not saturate in 16 bits


def offer_int8(work: Work, wanted: str) -> None:
    """Put an int8 graph in the place of the fp32 one where it is faster here and loses at most a point; record both.

    A network with layers on the grid, and one whose `wanted` precision is fp32, is left as it is.
    """
    if wanted == "fp32" or work.spec is not None or work.nodes:
        return
    rows = None if work.run is None else from_run(work.run, work.checkpoint.task, work.checkpoint.labels, {})
    if rows is None or work.run is None:
        console.say("int8 convolutions are calibrated on a run's pictures; without them the bundle stays in fp32")
        return
    held = held_out.held_out(work.run, read_manifest(work.run, "run"))
    assert held is not None
    fp32, exact = work.manifest["model_file"], OnnxPredictor(load(work.staging))
    before = held.evaluate(exact, generate=False)
    path = work.staging / "onnx" / MODEL_NAMES["int8"]
    quantize(work.model_path, path, feeds(exact.model.classifier, rows.examples[:CALIBRATION_ROWS]))
    use(work, f"onnx/{path.name}", "int8")
    rounded = OnnxPredictor(load(work.staging))
    after = held.evaluate(rounded, generate=False)
    speeds = times([exact.model.classifier, rounded.model.classifier], held.examples[0])
    metric, faster = held.task.metric, speeds[0] / speeds[1]
    lost = (before[metric] - after[metric]) * (1 if held.task.higher_is_better else -1)
    used = lost <= MOST_LOST and faster >= LEAST_FASTER
    figures = {"ms_fp32": speeds[0], "ms_int8": speeds[1], f"{metric}_fp32": before[metric], f"{metric}_int8": after[metric]}
    console.say(
        f"int8 convolutions: {speeds[1]:.2f} ms an input, {metric} {after[metric]:.4g}; fp32: {speeds[0]:.2f} ms, "
        f"{before[metric]:.4g}; the bundle {'ships int8' if used else 'stays in fp32'}"
    )
    if used:
        others = [row for row in work.manifest["results"] if row.get("what") != "onnx"]
        work.manifest["results"] = with_kept([*others, line("onnx", after, precision="int8")])
    else:
        use(work, fp32, "fp32")
    loser = Path(fp32 if used else path.name).name
    del exact, rounded  # their files are mapped
    for name in (loser, f"{loser}_data"):
        (work.staging / "onnx" / name).unlink(missing_ok=True)
    work.manifest["int8"] = {"used": used, **{name: float(f"{value:.4g}") for name, value in figures.items()}}


def use(work: Work, model_file: str, precision: str) -> None:
    """Let the bundle's manifest and config.json name a graph."""
    work.precision = precision
    work.manifest |= {"model_file": model_file, "precision": precision}
    config = read_json(work.staging / "config.json")
    name = Path(model_file).name
    outside = (work.staging / f"{model_file}_data").is_file()
    config["transformers.js_config"] = {
        "dtype": WEB_DTYPES[precision], **({"use_external_data_format": {name: 1}} if outside else {})
    }  # fmt: skip
    write_json(work.staging / "config.json", config)
    write_manifest(work.staging, "bundle", **work.manifest)


def feeds(classifier: Classifier, examples: Sequence[Example]) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield the graph's inputs of one example after the other."""
    for example in examples:
        batch = classifier.task.collate([example], classifier.processor)
        yield {name: batch[name] for name in classifier.input_names}


def quantize(model: Path, out: Path, batches: Iterator[dict[str, NDArray[Any]]]) -> None:
    """Write the graph with its convolutions in 8 bits: weights per output, activations in the range that `batches` have."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(batches, None)

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it recommends what was done here already
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            whole, folded = Path(folder) / "whole.onnx", Path(folder) / "folded.onnx"
            onnx.save(onnx.load(model), whole)  # with its weights inside, as the next steps want it
            quant_pre_process(whole, folded, skip_symbolic_shape=True)  # batch norm goes into the convolutions
            quantize_static(
                folded, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, weight_type=QuantType.QInt8,
                activation_type=QuantType.QUInt8, calibrate_method=CalibrationMethod.MinMax,
                reduce_range=FULL_RANGE.isdisjoint(instruction_sets()),
            )  # fmt: skip
    finally:
        logger.setLevel(level)


def times(classifiers: Sequence[Classifier], example: Example) -> list[float]:
    """Return the median ms of one input of each, measured in turn."""
    found: list[list[float]] = [[] for _ in classifiers]
    for _ in range(TIMED + 1):
        for classifier, measured in zip(classifiers, found, strict=True):
            started = time.perf_counter()
            classifier.outputs([example])
            measured.append(1000 * (time.perf_counter() - started))
    return [statistics.median(measured[1:]) for measured in found]
