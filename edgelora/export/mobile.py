"""`edgelora export --for mobile`: the graph in ONNX Runtime's own format, for its packages on Android and iOS.

    mobile/<name>.ort                          graph, optimized for ARM, and weights in one file (a flatbuffer: under 2 GB)
    mobile/<name>.required_operators.config    the operators in it, for a build of ONNX Runtime that has no others

onnxruntime-android and onnxruntime-objc have every kernel of the CPU build here: what loads and agrees here runs there.
Source: ONNX Runtime's documentation, "ORT model format".
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.errors import MachineError, ModelError

if TYPE_CHECKING:
    from edgelora.bundle import Bundle
    from edgelora.export.work import Work

FOLDER = "mobile"
MAX_BYTES = (1 << 31) - 1
X86_ONLY = ["NchwcTransformer"]  # lays convolutions out for AVX


def write_mobile(work: Work) -> dict[str, Any]:
    """Convert the graph; return {"file", "operators_file", "operators": {"domain": [names]}, "size_mb"} for the manifest.

    Raises MachineError where the file would be too large, ModelError where it does not compute what the .onnx file does.
    """
    folder = work.staging / FOLDER
    folder.mkdir()
    weights = sum(path.stat().st_size for path in work.model_path.parent.iterdir())
    if weights > MAX_BYTES:
        raise MachineError(
            f"an .ort file holds at most 2 GB, and the graph with its weights takes {weights / 2**30:.1f} GB",
            hint="a smaller model, or --precision int4",
        )
    target = folder / f"{work.model_path.stem}.ort"
    convert(work.model_path, target)
    config = target.with_suffix(".required_operators.config")
    write_config(target, config)
    refuse_different(work, target)
    return {
        "file": f"{FOLDER}/{target.name}",
        "operators_file": f"{FOLDER}/{config.name}",
        "operators": operators(config),
        "size_mb": round(target.stat().st_size / 2**20, 1),
    }


def convert(model: Path, target: Path) -> None:
    """Save `model` as ONNX Runtime has optimized it for ARM."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(target)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"], disabled_optimizers=X86_ONLY)


def write_config(model: Path, config: Path) -> None:
    from onnxruntime.tools.ort_format_model import create_config_from_models

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # it prints what it reads
        warnings.simplefilter("ignore", ResourceWarning)  # and leaves closing the file to the interpreter
        create_config_from_models([model], config, False)


def operators(config: Path) -> dict[str, list[str]]:
    """Return the operators by domain that a configuration lists, a line for each domain and version: `ai.onnx;18;Add,Cast`."""
    found: dict[str, set[str]] = {}
    for line in config.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith(("#", "!")):
            domain, _, names = line.split(";", 2)
            found.setdefault(domain, set()).update(name.strip() for name in names.split(","))
    return {domain: sorted(names) for domain, names in sorted(found.items())}


def refuse_different(work: Work, target: Path) -> None:
    """Run the task's trial inputs through both files; raises ModelError where they differ in a bit."""
    from edgelora.bundle import open_bundle

    bundle = open_bundle(work.staging, verify=False)
    whole, mobile = (outputs(work, dataclasses.replace(bundle, model_path=path)) for path in (bundle.model_path, target))
    if any(not np.array_equal(a, b) for a, b in zip(whole, mobile, strict=True)):
        raise ModelError(f"{target.name} does not compute what {bundle.model_path.name} does", hint="please report this model")


def outputs(work: Work, bundle: Bundle) -> list[Any]:
    """Return what a bundle's graph gives for the task's trial inputs."""
    if work.spec is not None:
        from edgelora.export.verify import onnx_logits
        from edgelora.run.decoder import DecoderSession
        from edgelora.tasks.base import TRIAL_TEXTS

        session = DecoderSession(bundle.model_path, max_length=bundle.max_length)
        prompt = work.processor.encode(TRIAL_TEXTS[0], add_special_tokens=False)[: bundle.max_length // 2]
        logits, tokens = onnx_logits(session, prompt)
        return [logits, np.array(tokens)]
    from edgelora.run.classify import Classifier

    classifier = Classifier(bundle)
    examples = classifier.task.trial_examples(classifier.processor)
    examples = [classifier.task.truncate(example, bundle.max_length) for example in examples]
    return [array for found in classifier.outputs(examples) for array in found.values()]
