"""What people and programs see."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from edgelora import console


@pytest.fixture(autouse=True)
def _for_people() -> None:
    console.configure(json_output=False)


def test_json_mode_keeps_stdout_for_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(json_output=True)
    with console.only_json_on_stdout():
        print("a library's chatter")
        console.table("Rows", [{"a": 1}])
        console.facts("Facts", {"b": 2})
        console.write("an answer")
        console.emit({"loss": float("nan"), "array": np.arange(2), "path": Path("x"), "deep": {"n": np.float32(0.5)}})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"loss": None, "array": [0, 1], "path": "x", "deep": {"n": 0.5}}
    assert out.count("\n") == 1
    assert "a library's chatter" in err
    assert "Rows" in err
    assert "an answer" not in err


def test_people_get_tables_on_stdout_and_notes_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("A title far wider than its table, kept whole", [{"a [b]": 1, "x": None}, {"a [b]": 2.34567, "x": True}])
    console.say("a note")
    console.warn("a warning")
    console.emit({"not": "shown"})
    out, err = capsys.readouterr()
    assert [line.rstrip() for line in out.splitlines()] == [
        "A title far wider than its table, kept whole",
        "",
        "  a [b]     x",
        " ─────────────",
        "      1     –",
        "  2.346   yes",
        "",
    ]
    assert err == "a note\nwarning: a warning\n"


def test_facts_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    console.facts("Machine", {"cores": 2, "memory": "24 GB\n12 GB free"})
    assert capsys.readouterr().out == "Machine\n  cores   2\n  memory  24 GB\n          12 GB free\n"


def test_quiet_keeps_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(json_output=False, quiet=True)
    console.say("a note")
    console.warn("a warning")
    with console.progress("work", 2) as bar:
        bar.update(1)
    assert capsys.readouterr() == ("", "warning: a warning\n")


def test_progress_without_a_terminal_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PLAIN_LINE_SECONDS", 0.0)
    with console.progress("training") as bar:
        bar.update(1, total=4, loss="1.52")
        bar.update(2, loss="1.20", speed="140 tok/s")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("training: 1/4  loss 1.52  ")
    assert lines[0].endswith(" left")
    assert lines[1].startswith("training: 3/4  loss 1.20  speed 140 tok/s  ")
    assert lines[2].startswith("training: 3/4  loss 1.20  speed 140 tok/s  done in ")


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with console.progress("training", 2) as bar:
        bar.update(2, loss="0.50")
    assert "2/2" in terminal.getvalue()
    assert "loss 0.50" in terminal.getvalue()


def test_streams_that_know_few_characters_lose_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252", write_through=True))
    console.configure(json_output=False)
    console.write("2 × 中")
    assert raw.getvalue().decode("utf-8").strip() == "2 × 中"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.5, "0.5 s"), (45, "45 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_times(seconds: float, shown: str) -> None:
    assert console.show_time(seconds) == shown


@pytest.mark.parametrize(("count", "shown"), [(570 << 20, "570 MB"), (16 << 30, "16.0 GB"), (1 << 19, "0.5 MB")])
def test_amounts(count: int, shown: str) -> None:
    assert console.show_bytes(count) == shown


def test_what_json_cannot_hold_is_a_defect(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(json_output=True)
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        console.emit({"x": object()})
