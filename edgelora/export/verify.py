"""Does the graph compute what the merged weights say? The file against the folder, bit for bit, and ONNX Runtime against torch.

There are two torch references on the folder's own codes and scales: with float activations, and with the input of every
quantized layer rounded to int8 per block, as the accuracy_level 4 kernels do. A single layer equals the second to 3e-7.
Through many layers it cannot stay so: a sum in another order moves an activation over a rounding boundary, and each layer
multiplies that, until two computations differ by as much as the rounding itself changes. So the distance between the two
references is the yardstick: ONNX Runtime may be a few times as far from either, and no further.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from edgelora import console
from edgelora.errors import ModelError
from edgelora.export.graph import Array
from edgelora.export.linear import Weights
from edgelora.export.reference import decoder_logits, rounded_activations
from edgelora.folder import MANIFEST, read_manifest
from edgelora.models.predictor import TorchPredictor
from edgelora.quant.digest import different, digest_arrays, shortened
from edgelora.quant.grid import QuantizedTensor
from edgelora.tasks import get_task
from edgelora.tasks.base import TRIAL_TEXTS

if TYPE_CHECKING:
    from edgelora.export.work import Work
    from edgelora.models.decoder import Decoder
    from edgelora.models.network import Network
    from edgelora.run.classify import Classifier
    from edgelora.run.decoder import DecoderSession

PROMPT_TOKENS = 32
NEW_TOKENS = 8

# Distances are mean absolute differences of logits, in units of the reference logits' standard deviation.
FLOAT_TOLERANCE = 1e-3  # without quantized layers only the order of sums differs
NOISE_TOLERANCE = 3.0  # times the yardstick above; kernels that round per row instead of per block are 2 to 2.5 times as coarse
NOISE_FLOOR = 0.01  # for tiny models, whose yardstick rests on few logits
GREEDY_TOLERANCE = 20.0  # a greedy token may be this many yardsticks behind the reference's choice: a near-tie


@dataclass(frozen=True)
class Comparison:
    """Logits `[tokens, classes]` of ONNX Runtime, of torch, and of torch with int8 activations (None: nothing is quantized)."""

    found: Array
    exact: Array
    int8: Array | None

    @property
    def scale(self) -> float:
        return float(self.exact.std()) or 1.0

    @property
    def yardstick(self) -> float:
        """What rounding the activations changes."""
        return 0.0 if self.int8 is None else float(np.abs(self.int8 - self.exact).mean()) / self.scale

    @property
    def allowed(self) -> float:
        return FLOAT_TOLERANCE if self.int8 is None else NOISE_TOLERANCE * self.yardstick + NOISE_FLOOR

    def report(self, greedy_gap: float | None = None) -> dict[str, Any]:
        """Return {"float": {mean, max, top1}, "int8": {…}, "yardstick", "tokens", "greedy_gap", "passed", "problems"}."""
        result: dict[str, Any] = {"tokens": len(self.found), "yardstick": figure(self.yardstick)}
        problems = []
        for name, reference in (("float", self.exact), ("int8", self.int8)):
            if reference is None:
                continue
            distance = np.abs(self.found - reference) / self.scale
            same = float((self.found.argmax(-1) == reference.argmax(-1)).mean())
            result[name] = {"mean": figure(distance.mean()), "max": figure(distance.max()), "top1": figure(same)}
            if not distance.mean() <= self.allowed:  # not >: NaN is a problem too
                problems.append(
                    f"logits differ by {distance.mean():.3g} on average from the {name} reference; allowed {self.allowed:.3g}"
                )
        if greedy_gap is not None:
            allowed = GREEDY_TOLERANCE * self.allowed
            result["greedy_gap"] = figure(greedy_gap)
            if not greedy_gap <= allowed:
                problems.append(f"a greedy token is {greedy_gap:.3g} behind the reference's choice; allowed {allowed:.3g}")
        return {**result, "passed": not problems, "problems": problems}


def figure(value: float) -> float:
    return float(f"{value:.3g}")


def check(work: Work, *, force: bool) -> dict[str, Any]:
    """Compare file and folder bit for bit, and ONNX Runtime with torch; return the figures for the manifest.

    Raises ModelError if codes or scales differ, always, and unless `force` is given if the results do.
    """
    merged, trained = work.checkpoint.manifest, trained_digests(work)
    compared = check_codes(work.graph_paths, work.nodes, work.checkpoint, {**merged.get("digests", {}), **trained})
    result = {"layers_bit_identical": compared, "layers_as_trained": len(trained), **compare(work)}
    if result["problems"]:
        message = "\n  ".join(["ONNX Runtime does not compute what the merged weights say:", *result["problems"]])
        if not force:
            raise ModelError(message, hint="please report this model to EdgeLoRA")
        console.warn(message)
    return result


def trained_digests(work: Work) -> dict[str, str]:
    """Return the digests of the layers that ship as they were trained: the run's own, while it is there, else the merge's."""
    merged = work.checkpoint.manifest
    own: dict[str, str] = merged.get("digests", {})
    if work.run is not None and (work.run / MANIFEST).is_file():
        own = (read_manifest(work.run, "run").get("grid") or {}).get("digests", own)
    return {path: own[path] for path in merged.get("as_trained", ()) if path in own}


def compare(work: Work) -> dict[str, Any]:
    """Run the new graph beside the torch model of the merged folder."""
    quantized = bool(work.checkpoint.layers)
    if get_task(work.checkpoint.task).writes:
        from edgelora.export.verify_written import verify_written
        from edgelora.run.model import load

        return verify_written(load(work.staging).writer, work.network, quantized=quantized)
    if work.spec is None:
        from edgelora.bundle import open_bundle
        from edgelora.run.classify import Classifier

        return verify_network(Classifier(open_bundle(work.staging, verify=False)), work.network, quantized=quantized)
    from edgelora.run.decoder import DecoderSession

    longest = int(work.manifest["max_length"])
    prompts = [
        work.processor.encode(text, add_special_tokens=False)[: min(PROMPT_TOKENS, longest // 2)] for text in TRIAL_TEXTS
    ]
    session = DecoderSession(work.model_path, max_length=longest)
    return verify_decoder(session, work.network, [prompt for prompt in prompts if prompt], quantized=quantized)


def verify_decoder(
    session: DecoderSession, model: Decoder, prompts: Sequence[Sequence[int]], *, quantized: bool
) -> dict[str, Any]:
    """Compare on prompts and on the graph's greedy answers, which it computes one token at a time from its cache."""
    answers = [onnx_logits(session, prompt) for prompt in prompts]
    sequences = [sequence[:-1] for _, sequence in answers]
    exact = decoder_logits(model, sequences, int8=False)
    int8 = decoder_logits(model, sequences, int8=True) if quantized else None
    comparison = Comparison(
        np.concatenate([logits for logits, _ in answers]),
        np.concatenate(exact),
        None if int8 is None else np.concatenate(int8),
    )
    gaps = []
    for prompt, (_, sequence), reference in zip(prompts, answers, int8 or exact, strict=True):
        # What the reference thinks of each token that the graph chose, less what it thinks of its own choice.
        rows = reference[len(prompt) - 1 :]
        gaps.append((rows.max(-1) - rows[np.arange(len(rows)), sequence[len(prompt) :]]).max() / comparison.scale)
    return comparison.report(greedy_gap=float(max(gaps)))


def onnx_logits(session: DecoderSession, prompt: Sequence[int]) -> tuple[Array, list[int]]:
    """Return logits `[len(sequence) - 1, V]` and the sequence: the prompt with the greedy tokens after it."""
    session.rewind(0)
    rows = []
    for start in range(0, len(prompt), session.score_limit):
        rows.append(session.score(prompt[start : start + session.score_limit]).copy())
    sequence = [*prompt, int(rows[-1][-1].argmax())]
    for _ in range(min(NEW_TOKENS, session.max_length - len(sequence))):
        logits = session.step(sequence[-1])
        rows.append(logits[None].copy())
        sequence.append(int(logits.argmax()))
    return np.concatenate(rows), sequence


@torch.no_grad()
def verify_network(classifier: Classifier, model: Network, *, quantized: bool) -> dict[str, Any]:
    """Compare on the task's trial examples, batched by ONNX Runtime and one at a time in torch: padding must not matter."""
    task, processor = classifier.task, classifier.processor
    longest = classifier.max_length
    cut = (task.truncate(example, longest) for example in task.trial_examples(processor))
    examples = [window for example in cut for window in task.windows(example, longest)]
    predictor = TorchPredictor(model, functools.partial(task.collate, processor=processor))

    def reference() -> Array:
        found = [predictor.outputs([example])[0] for example in examples]
        return np.concatenate([task.compared(outputs, example) for outputs, example in zip(found, examples, strict=True)])

    exact, int8 = reference(), None
    if quantized:
        with rounded_activations(model):
            int8 = reference()
    found = zip(classifier.outputs(examples), examples, strict=True)
    return Comparison(np.concatenate([task.compared(outputs, example) for outputs, example in found]), exact, int8).report()


def check_codes(
    files: Path | Sequence[Path],
    nodes: Mapping[str, Mapping[str, Any]],
    weights: Weights,
    wanted: Mapping[str, str] | None = None,
) -> int:
    """Compare the codes and scales of every layer in the graphs' files with the merged folder's, bit for bit; return how many.

    wanted: digests that they must have too: of the last training step, or from when they were merged (quant/digest.py).
    Raises ModelError naming each layer that differs.
    """
    problems: list[str] = []
    digests: dict[str, str] = {}
    for path, found in stored_layers([files] if isinstance(files, Path) else files, nodes, weights):
        weight = weights.read_linear(path)
        assert isinstance(weight, QuantizedTensor)
        same = np.array_equal(found.codes, weight.codes.numpy())
        if not same or not np.array_equal(found.scales, weight.scales.numpy()):
            problems.append(f"{path}: the {'scales' if same else 'codes'} in {found.file} are not the merged folder's")
        digests[path] = digest_arrays(found.codes, found.scales, found.bits, found.block_size, found.num_inputs)
    changed = shortened([path for path in different(digests, wanted or {}) if not any(path in text for text in problems)])
    problems += [f"{path}: the codes or scales are not those that were trained or merged" for path in changed]
    if problems:
        raise ModelError("\n  ".join(["the exported graph does not hold what was merged:", *problems]))
    return len(digests)


class Stored(NamedTuple):
    """A layer as the file has it; how its codes are read comes from the node that reads them."""

    codes: Array
    scales: Array
    bits: int
    block_size: int
    num_inputs: int
    file: str


def stored_layers(
    files: Sequence[Path], nodes: Mapping[str, Mapping[str, Any]], weights: Weights
) -> Iterator[tuple[str, Stored]]:
    """Yield the layers in each file: the rows of each MatMulNBits, and the tables that are only gathered from.

    Raises ModelError naming the layers of the merged folder that are in none.
    """
    import onnx_ir as ir

    missing = set(layer_facts(weights))
    for file in files:
        graph = ir.load(file).graph
        by_name = {node.name: node for node in graph}
        read: set[str] = set()
        for name, facts in nodes.items():
            if "unpacked" in facts:
                values = [graph.initializers.get(facts["unpacked"][part]) for part in ("codes", "scales")]
                bits, block_size, inputs = facts["bits"], facts["block_size"], facts["unpacked"]["inputs"]
            elif name in by_name:
                node = by_name[name]
                values = [node.inputs[index] for index in (1, 2)]
                bits, block_size, inputs = (node.attributes[key].as_int() for key in ("bits", "block_size", "K"))
            else:  # of another file
                continue
            codes, scales = (v.const_value.numpy() for v in values if v is not None and v.const_value is not None)
            for path, (start, stop) in facts["rows"].items():
                yield path, Stored(codes[start:stop], scales[start:stop], bits, block_size, inputs, file.name)
                read.add(path)
        for path in set(layer_facts(weights)) - read:
            parts = [graph.initializers.get(f"{path}.{part}") for part in ("codes", "scales")]
            arrays = [part.const_value.numpy() for part in parts if part is not None and part.const_value is not None]
            if len(arrays) == 2:
                weight = weights.read_linear(path)
                assert isinstance(weight, QuantizedTensor)
                yield path, Stored(arrays[0], arrays[1], weight.bits, weight.block_size, weight.num_inputs, file.name)
                read.add(path)
        missing -= read
    if missing:
        raise ModelError("\n  ".join(["the exported graph lacks layers of the merged folder:", *shortened(sorted(missing))]))


def layer_facts(weights: Weights) -> Mapping[str, Any]:
    """Return the layers on the grid that a checkpoint lists; other sources of weights list none."""
    found: Mapping[str, Any] = getattr(weights, "layers", {})
    return found
