"""What was said against what was written: error rates by jiwer."""

from __future__ import annotations

from collections.abc import Sequence

from edgelora.errors import MachineError
from edgelora.tasks.base import Metrics


def error_rates(outputs: Sequence[str], references: Sequence[str]) -> Metrics:
    """Return word and character error rates of texts without case and punctuation. Raises MachineError without jiwer."""
    try:
        import jiwer
    except ImportError:
        raise MachineError("error rates need jiwer", hint='pip install "edgelora[train]"') from None
    said, wanted = ([plain(text) for text in texts] for texts in (outputs, references))
    return {"wer": float(jiwer.wer(wanted, said)), "cer": float(jiwer.cer(wanted, said))}


def plain(text: str) -> str:
    """Return a text in small letters, words and figures only; as it is where nothing else is in it."""
    kept = "".join(letter if letter.isalnum() or letter == "'" else " " for letter in text.casefold())
    return " ".join(kept.split()) or text.strip() or " "
