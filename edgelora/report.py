"""The report of what ships: one table of losses on the same held-out rows, from the base model to the ONNX bundle.

The rows are dictionaries in the manifests' `results`, each with "what", the task's metrics, and against the fp32 adapter
`agreement` (share of positions with the same likeliest token or label) and `kl` (models/agreement.py):

    majority baseline   always the commonest answer
    base                the model before training
    fp32 adapter        the adapter on weights that are not rounded; where the run was not trained on the grid this is `adapter`
    adapter             the forward pass that was trained
    merged fp32         the adapter in the weights, nothing rounded
    merged              the merged folder in torch
    onnx                the bundle in ONNX Runtime

`kept` is (base - loss) / (base - fp32 adapter), the share of the adapter's gain that a row keeps. `finetune` makes the first
rows, `merge` and `export` add theirs, and refuse to ship less than LEAST_KEPT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edgelora import console
from edgelora.errors import ModelError

Results = list[dict[str, Any]]
LEAST_KEPT = 0.9
LEAST_GAIN = 0.02  # of the base's loss: of less, no share is told
ORDER = ("majority baseline", "base", "fp32 adapter", "adapter", "merged fp32", "merged", "onnx")
Metrics = dict[str, Any]


def line(what: str, metrics: Metrics, **more: Any) -> dict[str, Any]:
    """Return a row of the table: the metrics that are numbers."""
    return {"what": what, **more, **{name: value for name, value in metrics.items() if isinstance(value, float)}}


def with_kept(results: Results) -> Results:
    """Return the table in its order, each row that has a loss with the share of the gain that it keeps."""
    ordered = sorted(results, key=lambda row: ORDER.index(row["what"]) if row.get("what") in ORDER else len(ORDER))
    return [{**row, "kept": share} if (share := kept(ordered, row)) is not None else row for row in ordered]


def row_of(results: Sequence[Mapping[str, Any]], *names: str) -> Mapping[str, Any] | None:
    """Return the first of these rows that the table has, with a loss."""
    rows = {row.get("what"): row for row in results if isinstance(row.get("loss"), float)}
    return next((rows[name] for name in names if name in rows), None)


def gain(results: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Return the losses of the base and of the fp32 adapter; None where the table does not have both.

    Of an adapter that was trained elsewhere, the merged weights before rounding are the fp32 adapter.
    """
    base, adapter = row_of(results, "base"), row_of(results, "fp32 adapter", "adapter", "merged fp32")
    return None if base is None or adapter is None else (base["loss"], adapter["loss"])


def kept(results: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> float | None:
    """Return the share of the gain that a row keeps; None for the base, and where there is no gain to speak of."""
    losses = gain(results)
    if losses is None or not isinstance(row.get("loss"), float) or row.get("what") == "base":
        return None
    base, adapter = losses
    return (base - row["loss"]) / (base - adapter) if base - adapter >= LEAST_GAIN * base else None


def refuse_lost_gain(results: Results, what: str, advice: Sequence[str], *, force: bool) -> None:
    """Raise ModelError if the row `what` keeps less than LEAST_KEPT of the adapter's gain; only warn with `force`.

    Where there is no gain to speak of, that is said instead. advice: what would keep more, each with its command or flag.
    """
    losses, shipped = gain(results), row_of(results, what)
    if losses is None or shipped is None:
        return
    base, adapter = losses
    figures = (
        f"held-out loss {base:.4g} before training, {adapter:.4g} with the adapter unrounded, "
        f"{shipped['loss']:.4g} {NAMES[what]}"
    )
    share = kept(results, shipped)
    if not math.isfinite(adapter):
        raise ModelError(f"the adapter computes nothing: {figures}", hint="train it again, with a lower --learning-rate")
    if share is None:
        little = "is no better than the base" if adapter >= base else "gains too little to tell what is kept of it"
        console.warn(f"the adapter {little}: {figures}")
        return
    if share >= LEAST_KEPT:  # NaN is not
        return
    message = f"{share:.0%} of what was learned is left; at least {LEAST_KEPT:.0%} is wanted\n  {figures}"
    if force:
        console.warn(message)
        return
    more = ["\n  what keeps more:", *(f"    {text}" for text in advice)] if advice else []
    raise ModelError(message + "\n".join(more), hint="do one of these, or ship it all the same with --force")


NAMES = {"merged": "merged and rounded", "onnx": "of the bundle in ONNX Runtime"}


def what_keeps_more(precision: str, trained: Mapping[str, Any], *, calibrated: bool) -> list[str]:
    """Return what would keep more of the gain than shipping in `precision` did. trained: the run's grid, {} without one."""
    found = []
    if precision in ("int2", "int3", "int4"):
        more = "int8" if precision == "int4" else "int4"
        found.append(f"--precision {more}: more bytes, and next to no loss")
    if not calibrated and trained.get("precision") != precision:
        found.append("--calibrate ROWS: rounding that makes up for its errors on your rows")
    if trained.get("precision") != precision:
        found.append(f"edgelora finetune … --precision {precision}: trains the integers that ship")
    else:
        found.append("more steps of edgelora finetune: what is rounded learns more slowly")
    return found


def shown(results: Results) -> list[dict[str, object]]:
    """Return the table for people: what each row is, its metrics, and its shares in percent, in one order for all rows."""
    shares = {"kept": "gain kept", "agreement": "same top-1"}
    names = [name for row in results for name, value in row.items() if isinstance(value, float) and name not in HIDDEN]
    rows = []
    for row in results:
        entry: dict[str, object] = {"held-out rows": title(row)}
        entry |= {name: row.get(name) for name in dict.fromkeys(names)}
        for name, column in shares.items():
            if any(name in other for other in results):
                entry[column] = f"{row[name]:.1%}" if name in row else None
        if any("kl" in other for other in results):
            entry["KL"] = row.get("kl")
        rows.append(entry)
    return rows


HIDDEN = ("kept", "agreement", "kl", "perplexity")  # the last says what the loss says


def title(row: Mapping[str, Any]) -> str:
    """Return "merged, int4" for the row "merged" of that precision."""
    what, precision, bits = str(row.get("what")), row.get("precision"), row.get("base_bits")
    names = {
        "fp32 adapter": "adapter, not rounded",
        "adapter": f"adapter as trained, {precision} grid" if precision else "adapter",
        "merged fp32": "merged, not rounded",
        "merged": f"merged, {precision}" if precision else "merged",
        "onnx": f"{precision} bundle, ONNX Runtime" if precision else "bundle, ONNX Runtime",
    }
    stored = f"{bits} bits" if what in ("base", "merged fp32") else f"{bits}-bit base"
    return names.get(what, what) + (f" ({stored})" if bits else "")
