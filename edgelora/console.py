"""What people and programs see: results on stdout; progress, notes and warnings on stderr.

With --json stdout holds exactly one JSON object: what libraries print meanwhile goes to stderr, and so do the tables.
rich is imported when a table or a bar is drawn, not before.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich import progress as rich_progress
    from rich.console import Console

WIDTH_WITHOUT_TERMINAL = 120
PLAIN_LINE_SECONDS = 10.0

_mode = {"json": False, "quiet": False}


def configure(*, json_output: bool, quiet: bool = False) -> None:
    """Choose between output for people and for programs, and make every stream able to write any character."""
    _mode.update(json=json_output, quiet=quiet)
    for stream in (sys.stdout, sys.stderr):
        # A Windows pipe is cp1252 and a C locale ASCII: a "×" must not end a run there.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", **({} if stream.isatty() else {"encoding": "utf-8"}))


def json_output() -> bool:
    """Whether stdout belongs to one JSON object."""
    return _mode["json"]


def quiet() -> bool:
    """Whether progress and notes are off; a child process is told so too."""
    return _mode["quiet"]


def say(text: str) -> None:
    """Tell people what happens, on stderr; nothing with --quiet."""
    if not _mode["quiet"]:
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print "warning: text" on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def write(text: str, *, end: str = "\n") -> None:
    """Write a result for people to stdout: an answer of the model, a listing. Nothing with --json."""
    if not _mode["json"]:
        print(text, end=end, file=sys.stdout, flush=True)


def markup(text: str) -> None:
    """Print rich markup where tables go: stdout, or stderr with --json. Colours only on a terminal."""
    _console(_table_stream()).print(text, soft_wrap=True, highlight=False)


def table(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Draw a table for people on stdout (stderr with --json): one column per key, numbers at the right.

    A key that a row lacks, or whose value is None, is shown as a dash.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in row))
    drawn = Table(box=box.SIMPLE_HEAD)
    for name in names:
        numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
        drawn.add_column(escape(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(show(row.get(name))) for name in names))
    # rich breaks a title at the table's width; a line above it is not broken.
    if title:
        markup(f"[bold]{escape(title)}[/bold]")
    _console(_table_stream()).print(drawn)


def facts(title: str, items: Mapping[str, object]) -> None:
    """Write names and values in two columns under a title, where tables go; a value may have several lines."""
    width = max((len(name) for name in items), default=0)
    lines = [title] if title else []
    for name, value in items.items():
        first, *rest = show(value).splitlines() or [""]
        lines += [f"  {name:<{width}}  {first}".rstrip(), *(f"  {'':<{width}}  {line}" for line in rest)]
    print("\n".join(lines), file=_table_stream(), flush=True)


def show(value: object) -> str:
    """Return a value as people read it: four significant digits, "–" for None, "yes"/"no"."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return str(value)


def show_time(seconds: float) -> str:
    """Return "45 s", "3 min 20 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def show_bytes(count: float) -> str:
    """Return "570 MB" or "15.6 GB"; an MB is 2^20 bytes."""
    mb = count / (1 << 20)
    if mb >= 10 * 1024:
        return f"{mb / 1024:.1f} GB"
    return f"{mb:,.0f} MB" if mb >= 10 else f"{mb:.2g} MB"


def show_mb(mb: float) -> str:
    """Return "570 MB" or "15.6 GB" of a number of MB."""
    return show_bytes(mb * (1 << 20))


def emit(result: Mapping[str, Any]) -> None:
    """With --json, write the result as the one JSON object of stdout; otherwise nothing."""
    if _mode["json"]:
        print(json.dumps(_plain(result), ensure_ascii=False, allow_nan=False), file=_result_stream(), flush=True)


_saved_stdout: list[TextIO] = []


@contextmanager
def only_json_on_stdout() -> Iterator[None]:
    """While the block runs with --json, let what anything prints to stdout go to stderr; `emit` still writes to stdout."""
    if not _mode["json"]:
        yield
        return
    _saved_stdout.append(sys.stdout)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = _saved_stdout.pop()


class Progress:
    """A bar on a terminal; elsewhere a plain line at most every ten seconds."""

    def update(self, advance: float = 0, *, total: float | None = None, **fields: str) -> None:
        """Move on by `advance`; `fields` are shown at the right: loss="1.52", speed="140 tok/s", memory="512 MB"."""


@contextmanager
def progress(title: str, total: float | None = None) -> Iterator[Progress]:
    """Yield a Progress that shows a bar with the time left on stderr while the block runs."""
    if _mode["quiet"]:
        yield Progress()
    elif sys.stderr.isatty():
        with _bar(title, total) as bar:
            yield bar
    else:
        line = _Lines(title, total)
        yield line
        line.close()


class _Lines(Progress):
    def __init__(self, title: str, total: float | None) -> None:
        self.title, self.total, self.done = title, total, 0.0
        self.fields: dict[str, str] = {}
        self.started = self.printed = time.monotonic()

    def update(self, advance: float = 0, *, total: float | None = None, **fields: str) -> None:
        self.done += advance
        self.total = self.total if total is None else total
        self.fields.update(fields)
        if time.monotonic() - self.printed >= PLAIN_LINE_SECONDS:
            self._print(self._left())

    def close(self) -> None:
        self._print(f"done in {show_time(time.monotonic() - self.started)}")

    def _left(self) -> str:
        if not self.total or not self.done:
            return ""
        spent = time.monotonic() - self.started
        return f"{show_time(spent * max(0.0, self.total - self.done) / self.done)} left"

    def _print(self, ending: str) -> None:
        self.printed = time.monotonic()
        count = f"{self.done:g}" + (f"/{self.total:g}" if self.total else "") if self.done else ""
        parts = [count, *(f"{name} {text}" for name, text in self.fields.items()), ending]
        print(f"{self.title}: " + "  ".join(part for part in parts if part), file=sys.stderr, flush=True)


class _Bar(Progress):
    def __init__(self, drawn: rich_progress.Progress, task: rich_progress.TaskID) -> None:
        self.drawn, self.task = drawn, task
        self.fields: dict[str, str] = {}

    def update(self, advance: float = 0, *, total: float | None = None, **fields: str) -> None:
        from rich.markup import escape

        self.fields.update(fields)
        right = escape("  ".join(f"{name} {text}" for name, text in self.fields.items()))
        self.drawn.update(self.task, advance=advance, total=total, right=right)


@contextmanager
def _bar(title: str, total: float | None) -> Iterator[Progress]:
    from rich import progress as rich_progress
    from rich.markup import escape

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=24),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        rich_progress.TextColumn("[dim]{task.fields[right]}"),
    )
    # The refresh thread wakes four times a second: more would be felt on two cores.
    with rich_progress.Progress(*columns, console=_console(sys.stderr), refresh_per_second=4) as drawn:
        task = drawn.add_task(escape(title), total=total, right="")

        yield _Bar(drawn, task)


def _result_stream() -> TextIO:
    return _saved_stdout[0] if _saved_stdout else sys.stdout


def _table_stream() -> TextIO:
    return sys.stderr if _mode["json"] else sys.stdout


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, width=None if stream.isatty() else WIDTH_WITHOUT_TERMINAL)


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it: numpy scalars and paths become plain, NaN and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
