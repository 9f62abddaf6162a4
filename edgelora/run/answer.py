"""`edgelora run BUNDLE INPUT…`: answers or labels for inputs given on the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgelora.config import GenerateConfig
from edgelora.errors import SettingsError, UserError
from edgelora.folder import disk_errors
from edgelora.run.model import Model, Prompt, load
from edgelora.tasks import get_task
from edgelora.tasks.base import Row

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # of pictures that are written; PNG otherwise


def run(
    bundle: Path,
    inputs: Sequence[str],
    config: GenerateConfig | None = None,
    *,
    threads: int | None = None,
    adapter: str | None = None,
    write: Callable[[str], None] | None = None,
    save: Path | None = None,
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return {"output": …, "task": …}: one output for one input, a list for several.

    save: where the one input, a picture, is written with its answer drawn on it; of several a folder ("saved" lists them).

    labels: texts to rank for a picture, of a task that does so.

    A text for a decoder; for a classifier [{"label": …, "probability": …}, …], the most probable first. `write` is given
    the text that people see, in pieces as it is made.
    """
    if not inputs:
        raise UserError("no input was given", hint=f'edgelora run {bundle} "some text"')
    model = load(bundle, threads=threads, adapter=adapter)
    rows: Sequence[Any] = inputs if model.task == "text-generation" else model.answerer.task.asked_rows(inputs)
    if labels is not None:
        if model.task == "text-generation" or "labels" not in model.answerer.task.asked:
            raise SettingsError(f"--labels is for tasks that rank texts; this bundle is for {model.task}")
        rows = [{**row, "labels": list(labels)} for row in rows]
    if config is not None and config.times and "speech-recognition" not in model.task:
        raise SettingsError(f"--times is for speech recognition; this bundle is for {model.task}")
    outputs = [run_one(model, row, config, write) for row in rows]
    result = {"task": model.task, "output": outputs[0] if len(outputs) == 1 else outputs}
    return result if save is None else {**result, "saved": save_drawn(model, inputs, outputs, save)}


def save_drawn(model: Model, inputs: Sequence[str], answers: Sequence[Any], save: Path) -> list[str]:
    """Write each picture with its answer drawn on it: to `save`, or of several into that folder, named like the picture."""
    from edgelora.images import open_picture

    task, written = get_task(model.task), []
    for given, answer in zip(inputs, answers, strict=True):
        path = save if len(inputs) == 1 else save / f"{Path(given).stem}.png"
        drawn = task.draw(open_picture(given), answer)
        partial = path.with_name(f".{path.name}.partial")
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                drawn.save(partial, format=FORMATS.get(path.suffix.lower(), "PNG"))
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        written.append(str(path))
    return written


def run_one(model: Model, prompt: Prompt | Row, config: GenerateConfig | None, write: Callable[[str], None] | None) -> Any:
    """Return the output of one input, as `run` describes."""
    if not isinstance(prompt, dict):
        written = model.start(prompt, config)
        for piece in written:
            if write is not None:
                write(piece)
        if write is not None:
            write(note(written.finish, model) + "\n")
        return written.text
    answer = model.answers([prompt], config=config)[0]
    if write is not None:
        write(model.answerer.task.answer_text(answer) + "\n")
    return answer


def note(finish: str, model: Model) -> str:
    """Return what people should know about how an answer ended."""
    notes = {
        "length": " … (cut: --max-new-tokens)",
        "context": f" … (cut: the bundle's limit of {model.bundle.max_length} tokens is reached)",
    }
    return notes.get(finish, "")
