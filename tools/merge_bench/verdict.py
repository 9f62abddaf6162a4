"""The arithmetic of the tables: distances from the fp32 adapter, shares of its gain, and which requirement holds."""

from __future__ import annotations

from typing import Any

WITHIN = 0.01  # of the fp32 adapter's held-out loss
KEPT = 0.9  # of the gain from the base to the fp32 adapter
POINTS = 0.5  # of accuracy, in hundredths

Row = dict[str, Any]


def with_ratios(table: list[Row], base: float, adapter: float) -> list[Row]:
    """Return rows of losses with what each is above the fp32 adapter's, in %, and its share of the gain, in %."""
    return [with_ratio(row, base, adapter) for row in table]


def with_ratio(row: Row, base: float, adapter: float) -> Row:
    loss = row.get("loss")
    if loss is None:
        return row
    above = 100 * (loss - adapter) / adapter
    return {**row, "above fp32, %": above, "gain kept, %": 100 * gain_kept(loss, base, adapter)}


def gain_kept(loss: float, base: float, adapter: float) -> float:
    """Return the share of the gain from the base's loss to the adapter's that `loss` keeps; NaN where there is no gain."""
    return (base - loss) / (base - adapter) if base != adapter else float("nan")


def within(loss: float, adapter: float) -> bool:
    return loss <= (1 + WITHIN) * adapter


def requirement(text: str, holds: bool | None, found: str) -> Row:
    """Return a row of the table of requirements; None: not measured."""
    return {"requirement": text, "holds": "not measured" if holds is None else "yes" if holds else "no", "found": found}


def losses(table: list[Row], ours: str, adapter: float, peers: list[str]) -> list[Row]:
    """Return what is asked of our bundle's loss: near the fp32 adapter's, and better than each peer's."""
    by_name = {row["what"]: row.get("loss") for row in table}
    loss = by_name.get(ours)
    if loss is None:
        return [requirement(f"{ours} within {WITHIN:.0%} of the fp32 adapter", None, "")]
    found = f"{loss:.4f} against {adapter:.4f}, {(loss - adapter) / adapter:+.2%}"
    rows = [requirement(f"{ours} within {WITHIN:.0%} of the fp32 adapter", within(loss, adapter), found)]
    for name in peers:
        other = by_name.get(name)
        text = "" if other is None else f"{loss:.4f} against {other:.4f}"
        rows.append(requirement(f"better than {name}", None if other is None else loss < other, text))
    return rows


def kept(what: str, loss: float | None, base: float, adapter: float) -> Row:
    """Return whether a merge keeps enough of the gain."""
    text = f"{what} keeps at least {KEPT:.0%} of the gain"
    if loss is None:
        return requirement(text, None, "")
    share = gain_kept(loss, base, adapter)
    return requirement(text, share >= KEPT, f"{share:.1%}: base {base:.4f}, adapter {adapter:.4f}, merged {loss:.4f}")


def accuracy(what: str, found: float | None, adapter: float) -> Row:
    """Return whether an accuracy (a share) is at most POINTS hundredths under the fp32 adapter's."""
    text = f"{what} within {POINTS} points of the fp32 adapter"
    if found is None:
        return requirement(text, None, "")
    points = 100 * (found - adapter)
    return requirement(text, points >= -POINTS - 1e-9, f"{found:.2%} against {adapter:.2%}, {points:+.2f} points")
