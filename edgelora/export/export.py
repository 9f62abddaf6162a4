"""`edgelora export`: merge (when given a run or a model) → graph → the files of four loaders → verify → table → manifest."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora import console
from edgelora.errors import SettingsError
from edgelora.export.branches import base_folder, beside, check_mode, keep_beside
from edgelora.export.decoder import build_decoder
from edgelora.export.files import BundleFacts, graph_names, special_tokens, write_files
from edgelora.export.graph import save
from edgelora.export.int8 import offer_int8
from edgelora.export.mobile import write_mobile
from edgelora.export.prefill import add_prefill, refuse_prefill
from edgelora.export.prefix import ANY_BEGINNING, Beginning, add_prefix
from edgelora.export.results import add_results
from edgelora.export.trim.passages import Source
from edgelora.export.trim.trim import trim
from edgelora.export.verify import check
from edgelora.export.web import refuse_vendor, unpack_for_web, write_page
from edgelora.export.work import Work
from edgelora.folder import MANIFEST, new_folder, read_manifest, refuse_existing, write_manifest
from edgelora.models.families import decoder_spec, rope_parameters
from edgelora.quant.checkpoint import MergedCheckpoint
from edgelora.tasks import get_task

if TYPE_CHECKING:
    from edgelora.export.decoder import DecoderGraph
    from edgelora.export.traced import TracedGraph
    from edgelora.models.spec import DecoderSpec

MAX_POSITIONS = 16384  # longest sequence of a decoder bundle: the rotary tables are stored for every position
MAX_LENGTH = 2048  # tokens of prompt and answer that loaders make room for unless told otherwise
GENERATION = "text-generation"


def export(
    target: str,
    out: Path,
    *,
    precision: str = "int4",
    device: str = "cpu",
    model: str | None = None,
    max_length: int | None = None,
    adapters: str = "merged",
    trim_vocabulary: str | None = None,
    beginning: Beginning = ANY_BEGINNING,
    fast_prompts: bool = False,
    vendor: Path | None = None,
    overwrite: bool = False,
    force: bool = False,
    **wishes: Any,
) -> dict[str, Any]:
    """Write the bundle `out` from a run, a merged folder or a model; a run and a model are merged first.

    The file's codes and scales must be those of the merged folder and of the last training step. The graph is compared with
    the merged weights in torch, and of a run the bundle is scored on its held-out rows: what does not compute the same, or
    keeps too little of the adapter's gain, is refused with the figures (ModelError), unless `force` is given. `max_length` is
    the most tokens of prompt and answer together. `adapters`: "merged" into the weights; "static", a run's beside them, in the
    graph; "swap", a base bundle that `add_adapter` (export/onto.py) gives adapters to. `trim_vocabulary`: keep the tokens of a
    run's rows ("") or of this file's and of a run's (export/trim/). `beginning`: of prompts, whose cache ships.
    `fast_prompts`: a graph for them alone (export/prefill.py). `vendor`: for `device` "web", see export/web.py. wishes: how
    `merge` rounds (rounding_plan.Wish: calibrate, columns, size, loss). Returns the figures of `--json`; `table` has a run's
    held-out rows scored again.
    """
    refuse_existing(out, overwrite=overwrite, inputs=(target, model, wishes.get("calibrate"), trim_vocabulary or None))
    refuse_vendor(vendor, device)
    beginning.refuse(adapters)
    refuse_prefill(fast_prompts, adapters, device)
    temporary = out.with_name(f".{out.name}.merged")
    with new_folder(out, overwrite=overwrite) as staging, console.progress("exporting", total=4) as bar:
        try:
            bar.update(stage="merge")
            started = time.perf_counter()
            merged, run = ready_folder(target, temporary, precision, model, adapters, trim_vocabulary, force=force, **wishes)
            work = open_work(staging, merged, run, precision, device)
            keep_beside(work, adapters)
            work.seconds["merge"] = round(time.perf_counter() - started, 2)
            bar.update(1, stage="graph")
            with work.time("graph"):
                write_bundle(work, max_length)
            bar.update(1, stage="verify")
            with work.time("verify"):
                work.manifest["verify"] = check(work, force=force)
            bar.update(1, stage="evaluate")
            with work.time("evaluate"):
                add_results(work, force=force)
                offer_int8(work, precision)
                add_prefix(work, beginning)
                add_prefill(work, fast_prompts, force=force)
            bar.update(1)
            write_for(work, vendor)
            write_manifest(staging, "bundle", **work.manifest)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return figures(work, out)


def write_for(work: Work, vendor: Path | None) -> None:
    """Write what the device asks for beside the graph."""
    if work.device == "web":
        write_page(work.staging, vendor)
    if work.device == "mobile":
        work.manifest["mobile"] = write_mobile(work)


def ready_folder(
    target: str,
    temporary: Path,
    precision: str,
    model: str | None,
    adapters: str,
    trim_vocabulary: str | None,
    *,
    force: bool,
    **wishes: Any,
) -> tuple[Path, Path | None]:
    """Return (the merged folder as it ships, the run that it comes from or None); what is made on the way is in `temporary`."""
    path = Path(target).expanduser()
    check_mode(adapters, kind_of(path))
    if adapters != "merged" and trim_vocabulary is not None:
        raise SettingsError(f"--trim-vocabulary is for merged bundles; with --adapters {adapters} all tokens ship")
    if adapters == "static":
        if any(wishes.values()):
            raise SettingsError("an adapter beside its base leaves the base as it is, which is not rounded by rows")
        return base_folder(path, temporary / "whole", precision, model)
    columns = wishes.get("columns") or {}
    if trim_vocabulary is not None and not wishes.get("calibrate"):
        wishes["columns"] = {}  # they are of the rows that the vocabulary is kept for
    merged, run = merged_folder(target, temporary / "whole", precision, model, force=force, **wishes)
    if trim_vocabulary is None:
        return merged, run
    return trim(merged, temporary / "trimmed", Source(run, trim_vocabulary or None, columns)), run


def merged_folder(
    target: str, temporary: Path, precision: str, model: str | None, *, force: bool, **wishes: Any
) -> tuple[Path, Path | None]:
    """Return (merged folder, the run that it comes from or None); a run or model is merged into `temporary`."""
    from edgelora.merging.merge import merge

    path = Path(target).expanduser()
    kind = kind_of(path)
    if kind == "bundle":
        raise SettingsError(f"{path} is a bundle already", hint=f'edgelora run {path} "…"')
    if model is not None and kind != "run":
        raise SettingsError("--model names the base of a run, and this is not a run", hint=f"edgelora export {model} -o BUNDLE")
    if kind == "merged":
        manifest = read_manifest(path, "merged")
        found = manifest.get("precision", precision)
        if found != precision and manifest["layers"]:
            raise SettingsError(
                f"{path} was merged to {found}, not {precision}", hint=f"edgelora merge RUN --precision {precision}"
            )
        if any(wishes.values()):
            raise SettingsError(f"{path} is rounded already", hint="give these settings to edgelora merge")
        return path, Path(manifest["run"]) if "run" in manifest else None
    shutil.rmtree(temporary, ignore_errors=True)
    if kind == "run":
        merge(path, temporary, model=model, precision=precision, force=force, **wishes)
        return temporary, path
    merge(None, temporary, model=target, precision=precision, **wishes)
    return temporary, None


def kind_of(path: Path) -> str | None:
    """Return "run", "merged" or "bundle", None for what EdgeLoRA did not write: a model."""
    return str(read_manifest(path, "run", "merged", "bundle")["kind"]) if (path / MANIFEST).is_file() else None


def open_work(staging: Path, merged: Path, run: Path | None, precision: str, device: str) -> Work:
    checkpoint = MergedCheckpoint.open(merged)
    spec = decoder_spec(checkpoint.config) if checkpoint.task == GENERATION else None
    processor = get_task(checkpoint.task).open_processor(merged)
    precision = str(checkpoint.manifest.get("precision", precision))  # convolutions alone ship in fp32, whatever was asked for
    return Work(staging, checkpoint, run, precision, device, spec, processor)


def write_bundle(work: Work, max_length: int | None) -> None:
    """Write the graph, the loaders' files and a first manifest."""
    checkpoint, spec = work.checkpoint, work.spec
    eos, bos, pad = special_tokens(checkpoint.folder, checkpoint.config, sorted(getattr(work.processor, "stop_token_ids", ())))
    positions = reach(checkpoint.config, spec)
    if max_length is not None and not 0 < max_length <= positions:
        raise SettingsError(f"max_length is {max_length}; this model takes 1 to {positions} tokens")
    graphs = graph_names(work.precision, checkpoint.task)
    inputs = write_graph(work, positions, graphs)
    longest = max_length or min(positions, MAX_LENGTH)
    facts = BundleFacts(
        checkpoint.folder, checkpoint.config, work.precision, inputs, positions, longest, eos, bos, pad, graphs, checkpoint.task
    )
    write_files(work.staging, facts, spec)
    work.manifest |= {
        "task": checkpoint.task,
        "labels": checkpoint.labels,
        "precision": work.precision,
        "device": work.device,
        "model_file": f"onnx/{graphs[0]}",
        **({"encoder_file": f"onnx/{graphs[1]}"} if len(graphs) > 1 else {}),
        "max_length": facts.max_length,
        "tokens": {"eos": list(eos), "bos": bos, "pad": pad},
        "layers": checkpoint.layers,
        "nodes": work.nodes,
        "exceptions": work.exceptions,
        **{key: checkpoint.manifest[key] for key in ("vocabulary",) if key in checkpoint.manifest},
        **card(work),
        **beside(work),
    }
    if spec is not None:
        work.manifest["decoder"] = {
            "num_layers": spec.num_layers,
            "num_kv_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "vocab_size": spec.vocab_size,
            "max_positions": positions,
        }
    write_manifest(work.staging, "bundle", **work.manifest)


def write_graph(work: Work, positions: int, names: tuple[str, ...]) -> tuple[str, ...]:
    """Write the graphs and their weights into onnx/ under `names`; return the names of the first one's inputs."""
    path = work.staging / "onnx" / names[0]
    path.parent.mkdir()
    levels = work.checkpoint.manifest.get("accuracy_levels") or {}
    if len(names) > 1:
        from edgelora.export.seq2seq import export_seq2seq

        graphs = export_seq2seq(work.checkpoint, path.with_name(names[1]), path, levels)
        work.nodes = graphs.nodes
        return graphs.inputs
    built: DecoderGraph | TracedGraph
    if work.spec is not None:
        built = build_decoder(
            work.checkpoint, work.spec, max_positions=positions, accuracy_levels=levels, branches=work.branches
        )
    else:
        from edgelora.export.traced import build_traced

        built = build_traced(work.checkpoint, levels)
    work.nodes = built.nodes
    if work.device == "web":
        unpack_for_web(built.model, work.nodes)
    save(built.model, path)
    return tuple(str(value.name) for value in built.model.graph.inputs)


def reach(config: dict[str, Any], spec: DecoderSpec | None) -> int:
    """Return the longest sequence that a bundle takes."""
    if spec is None:
        from edgelora.train.run import length_limit

        return length_limit(config)
    positions = min(spec.max_positions, MAX_POSITIONS)
    parameters = rope_parameters(config)
    if parameters.get("rope_type", parameters.get("type")) == "longrope":
        # The rotary tables have the short factors, which hold up to the length of the first training.
        original = parameters.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        positions = min(positions, int(original or positions))
    return positions


def card(work: Work) -> dict[str, Any]:
    """Return what a model card says: where the weights come from, under which licenses, and how they were trained."""
    manifest = work.checkpoint.manifest
    model = dict(manifest.get("model") or {})
    run = read_manifest(work.run, "run") if work.run is not None and (work.run / MANIFEST).is_file() else {}
    data = Path(str(run["data"])).name if run.get("data") else None
    return {
        "model": model,
        "data": data,
        "licenses": {"model": model.get("license"), "data": run.get("data_license")},
        "settings": manifest.get("settings", {}),
        "results": manifest.get("results", []),
    }


def figures(work: Work, out: Path) -> dict[str, Any]:
    """Return what `--json` prints."""
    manifest = work.manifest
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {
        "output": str(out),
        **{name: manifest[name] for name in ("task", "precision", "device", "model_file")},
        "size_mb": round(size / 2**20, 1),
        "nodes": len(work.nodes),
        "exceptions": manifest["exceptions"],
        **{name: manifest.get(name) for name in ("vocabulary", "mobile", "prefill")},
        "prefix": {name: value for name, value in manifest.get("prefix", {}).items() if name != "token_ids"} or None,
        "verify": manifest["verify"],
        "seconds": work.seconds,
        "table": manifest["results"],
    }
