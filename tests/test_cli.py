"""The command line as people and programs meet it: messages, exit codes, JSON, options made of settings, interruption."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from edgelora import __version__
from edgelora.cli.boundary import as_message, guarded
from edgelora.cli.main import VERBS, cli
from edgelora.cli.settings import build_config, setting_options
from edgelora.config import FinetuneConfig, GenerateConfig
from edgelora.errors import Interrupted, MachineError

Edgelora = Callable[..., tuple[int, str, str]]


@pytest.fixture
def edgelora(capsys: pytest.CaptureFixture[str]) -> Edgelora:
    """Run a command line here; return its exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(list(arguments))
        return (int(end.value.code or 0), *capsys.readouterr())

    return run


def test_verbs_stand_in_the_order_of_the_line(edgelora: Edgelora) -> None:
    code, out, _ = edgelora("--help")
    listed = [line.split()[0] for line in out.partition("Commands:\n")[2].splitlines()]
    assert code == 0
    assert listed == [
        "doctor",
        "plan",
        "data",
        "finetune",
        "evaluate",
        "merge",
        "export",
        "run",
        "chat",
        "serve",
        "bench",
        "tasks",
        "inspect",
    ]
    assert "..." not in out.partition("Commands:\n")[2], "a verb's first sentence is cut: make it shorter"
    assert edgelora()[1] == out
    assert edgelora("--version")[1] == f"edgelora {__version__}\n"


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_verb_has_json_quiet_and_a_help_for_each_option(verb: click.Command) -> None:
    options = [parameter for parameter in verb.params if isinstance(parameter, click.Option)]
    assert {"--json", "--quiet"} <= {name for option in options for name in option.opts}
    assert [option.name for option in options if not option.help and not option.hidden] == []


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            ["finetun"],
            'no such verb "finetun". Did you mean "finetune"? Verbs: doctor, plan, data, finetune, evaluate, merge, export, '
            "run, chat, serve, bench, tasks, inspect",
            "edgelora --help",
        ),
        (["finetune", "m", "d", "--rnk", "4"], 'no such option "--rnk". Did you mean "--rank"?', "edgelora finetune --help"),
        (["finetune", "m"], "missing argument 'DATA'", "edgelora finetune --help"),
        (["finetune", "m", "d"], "missing option '-o' / '--output'", "edgelora finetune --help"),
        (["plan", "m", "d", "--rank", "x"], "invalid value for '--rank': 'x' is not a valid integer", "edgelora plan --help"),
        (
            ["plan", "m", "d", "--ram", "much"],
            "invalid value for '--ram': \"much\" is not an amount of memory; allowed: 570MB, 1.5GB",
            "edgelora plan --help",
        ),
        (
            ["plan", "m", "d", "--base-bits", "5"],
            "invalid value for '--base-bits': '5' is not one of '32', '16', '8', '4'",
            "edgelora plan --help",
        ),
        (
            ["merge", "run", "-o", "x", "--combine", "ties", "--density", "nan"],
            "--combine and --density: there are no adapters to combine",
            "--adapter A --adapter B --weights 0.7,0.3",
        ),
        (["merge", "-o", "x"], "nothing to merge: neither a RUN nor --adapter", "edgelora merge RUN -o MERGED"),
        (
            ["run", "b", "--input", "a.jsonl"],
            "a file of rows takes --input and --output, and no INPUT, --save or --labels",
            "edgelora run b --input rows.jsonl --output answers.jsonl",
        ),
    ],
)
def test_wrong_use(edgelora: Edgelora, arguments: list[str], message: str, hint: str) -> None:
    assert edgelora(*arguments) == (2, "", f"error: {message}\nhint: {hint}\n")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--loss", "nan"), "--loss is nan; a share such as 0.01 is wanted"),
        (("--size", ""), '"" is not an amount of memory; allowed: 570MB, 1.5GB'),
    ],
)
def test_targets_that_are_none(edgelora: Edgelora, option: tuple[str, str], message: str) -> None:
    code, _, said = edgelora("merge", "--model", "no/folder/here", "-o", "x", *option)
    assert (code, said.splitlines()[0]) == (2, f"error: {message}")


def test_settings_are_refused_before_anything_is_loaded(edgelora: Edgelora) -> None:
    code, out, err = edgelora("finetune", "no-model", "no-data", "-o", "x", "--rank", "0", "--epochs", "-1")
    assert (code, out) == (2, "")
    assert err == (
        'error: command line: 2 problems\n  "rank" is 0; allowed: at least 1\n  "epochs" is -1.0; allowed: above 0\n'
    )


def test_an_error_is_one_json_object_too(edgelora: Edgelora) -> None:
    code, out, err = edgelora("run", "no/such/bundle", "hello", "--json")
    found = json.loads(out)
    assert code == found["exit_code"] == 2
    assert err.startswith(f"error: {found['error']}\n")
    assert json.loads(edgelora("tasks", "--jso", "--json")[1])["error"] == 'no such option "--jso". Did you mean "--json"?'


def test_tasks_lists_every_task(edgelora: Edgelora) -> None:
    from edgelora.tasks import TASKS

    _, out, _ = edgelora("tasks", "--json")
    listed = json.loads(out)["tasks"]
    assert [task["name"] for task in listed] == list(TASKS)
    assert all(task["columns"] and task["metrics"] and task["families"] for task in listed)
    people = edgelora("tasks")[1]
    assert all(f"{name}: " in people for name in TASKS)


def options_of(*arguments: str) -> FinetuneConfig:
    found: list[FinetuneConfig] = []

    @click.command()
    @setting_options(FinetuneConfig)
    def command(config_file: Path | None, **given: object) -> None:
        found.append(build_config(FinetuneConfig(), config_file, given))

    command.main(list(arguments), standalone_mode=False)
    return found[0]


def test_command_line_over_toml_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("rank = 4\ntruncate = true\ndropout = 0.1\nbase_bits = 8\n")
    config = options_of(
        "--config", str(file), "--rank", "2", "--no-truncate", "--columns", "prompt=a,completion=b", "--ram", "1GB"
    )
    assert (config.rank, config.truncate, config.dropout, config.base_bits) == (2, False, 0.1, 8)
    assert (config.columns, config.ram, config.batch_size) == ({"prompt": "a", "completion": "b"}, 1 << 30, None)
    assert options_of() == FinetuneConfig()
    assert options_of("--base-bits", "4", "--truncate") == FinetuneConfig(base_bits=4, truncate=True)


@pytest.mark.parametrize(("verb", "config"), [("finetune", FinetuneConfig), ("plan", FinetuneConfig), ("run", GenerateConfig)])
def test_flags_are_the_fields_marked_as_flags(verb: str, config: type) -> None:
    names = {option.name for option in cli.commands[verb].params}
    for field in dataclasses.fields(config):
        assert (field.name in names) == field.metadata["flag"]


def fails(error: BaseException) -> Callable[[], object]:
    def run() -> object:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (Interrupted("after step 3", hint="edgelora … --resume"), 130, "error: after step 3\nhint: edgelora … --resume\n"),
        (MachineError("too little"), 3, "error: too little\n"),
        (MemoryError(), 3, "error: out of memory\n"),
        (OSError(errno.ENOSPC, "No space left", "/x/weights"), 3, "error: the disk is full: writing /x/weights failed\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: /x: permission denied\n"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/x"), 2, "error: /x: file name too long\n"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            3,
            'error: torch is not installed; this verb needs it\nhint: pip install "edgelora[train]"\n',
        ),
        (
            ValueError("two\nlines"),
            1,
            "error: ValueError: two lines (unexpected: this is a defect of EdgeLoRA)\n"
            "hint: rerun with EDGELORA_TRACEBACK=1 in the environment to see where it happened\n",
        ),
    ],
)
def test_every_error_has_its_code_and_message(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str
) -> None:
    assert guarded(fails(error)) == code
    assert capsys.readouterr().err.startswith(text)


def test_a_traceback_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELORA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="why"):
        guarded(fails(ValueError("why")))
    assert guarded(fails(MachineError("too little"))) == 3


def test_a_missing_module_of_our_own_is_a_defect() -> None:
    assert as_message(ModuleNotFoundError("No module named 'edgelora.x'", name="edgelora.x")).exit_code == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without a signal")
def test_sigterm_is_an_interruption() -> None:
    code = (
        "import sys, time\n"
        "from edgelora.cli.boundary import guarded\n"
        "def wait():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(30)\n"
        "sys.exit(guarded(wait))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 130
        assert child.stderr.read() == "error: interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise there")
def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "edgelora", "tasks"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        child.wait(30)
        assert child.stderr.read() == ""


def test_help_does_not_wait() -> None:
    """A bound that only a heavy import breaks; the 0.3 s of DESIGN.md are measured by hand."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "edgelora", "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - started < 5
    assert "edgelora finetune MODEL rows.jsonl -o run" in done.stdout
