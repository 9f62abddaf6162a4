"""The shape of the code: budgets, import direction, what `--help` may import, and that every test tests something."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "edgelora"
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 300
MAX_WIDTH = 128  # of a line of C; ruff sees to Python

# "path" or "path:function" → why it may be longer. An entry that is no longer needed fails too.
ALLOWED_LONG: dict[str, str] = {}

# Imports point from a later row to an earlier one, or stay within a row; among those of ORDER_INSIDE, from right to left only.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "config",
        "folder",
        "console",
        "hardware",
        "memory",
        "later",
        "rates",
        "tokenizer",
        "chat_template",
        "preprocessor",
        "images",
        "times",
        "search",
        "writing",
        "audio",
        "spectrogram",
        "masks",
        "drawing",
        "listening",
        "image_text",
        "spelling",
        "captioning",
        "tensor_file",
    ),
    ("tasks",),
    ("data", "quant", "models", "adapters", "bundle", "scales_delta", "native"),
    (
        "planning",
        "kernels",
        "train",
        "merging",
        "export",
        "run",
        "serve",
        "evaluate",
        "report",
        "held_out",
        "bench",
        "operators",
        "inspect",
    ),
    ("cli",),
    ("__main__",),
)
ORDER_INSIDE = ("data", "quant", "models", "adapters")
HEAVY = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "sklearn",
    "pyarrow",
    "optimum",
    "peft",
    "gguf",
    "safetensors",
    "onnxscript",
)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def num_lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def module_imports(tree: ast.Module, *, top_level_only: bool = False) -> Iterator[str]:
    """Yield the dotted modules that a file imports; blocks under `if TYPE_CHECKING` do not count as imports."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            todo.extend(node.orelse)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            todo.extend(ast.iter_child_nodes(node))


def part_of(module: str) -> str | None:
    """Return the part of the package that a dotted module belongs to: edgelora.models.linear → models."""
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "edgelora" and len(pieces) > 1 else None


def layer_of(part: str) -> int:
    return next(number for number, row in enumerate(LAYERS) if part in row)


def all_parts() -> set[str]:
    return {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()} - {"__init__"}


def test_functions_and_files_stay_within_their_budget() -> None:
    long: dict[str, int] = {}
    for path in python_files("edgelora", "tests", "tools", "examples"):
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > MAX_FILE_LINES:
            long[name_of(path)] = lines
        for node in functions(parse(path)):
            if num_lines(node) > MAX_FUNCTION_LINES:
                long[f"{name_of(path)}:{node.name}"] = num_lines(node)
    for path in sorted(PACKAGE.rglob("*.[ch]")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert max(map(len, lines)) <= MAX_WIDTH, f"{name_of(path)} has a longer line"
        if len(lines) > MAX_FILE_LINES:
            long[name_of(path)] = len(lines)
    assert {name: size for name, size in long.items() if name not in ALLOWED_LONG} == {}, "split it, or give the reason"
    assert set(ALLOWED_LONG) <= set(long), "an entry of ALLOWED_LONG is no longer needed"
    assert all(len(reason.split()) >= 4 for reason in ALLOWED_LONG.values()), "a reason is a sentence"


def test_every_part_of_the_package_has_its_layer() -> None:
    listed = {part for row in LAYERS for part in row}
    assert all_parts() - listed == set(), "add the new file or folder to LAYERS"


def test_imports_point_one_way() -> None:
    wrong = []
    for path in python_files("edgelora"):
        part = part_of(".".join(["edgelora", *path.relative_to(PACKAGE).with_suffix("").parts]))
        if part is None or part == "__init__":
            continue
        for target in {part_of(module) for module in module_imports(parse(path))} & all_parts():
            assert target is not None
            backwards = (
                target in ORDER_INSIDE and part in ORDER_INSIDE and ORDER_INSIDE.index(target) > ORDER_INSIDE.index(part)
            )
            if layer_of(target) > layer_of(part) or backwards:
                wrong.append(f"{name_of(path)} imports {target}")
    assert wrong == []


def test_heavy_libraries_are_imported_inside_functions() -> None:
    light = ("cli", "run", "tasks", "data", *LAYERS[0])
    wrong = []
    for path in python_files("edgelora"):
        first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if first in light:
            tops = {module.split(".")[0] for module in module_imports(parse(path), top_level_only=True)}
            wrong += [f"{name_of(path)} imports {name} at the top" for name in sorted(tops & set(HEAVY))]
    assert wrong == []


@pytest.mark.parametrize("arguments", [["--help"], ["finetune", "--help"], ["run", "--help"], ["tasks", "--json"]])
def test_the_command_line_starts_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from edgelora.cli.main import cli\n"
        "try:\n"
        f"    cli.main({arguments!r})\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print('HEAVY', *sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1].strip() == "HEAVY"


def test_no_drawer_for_leftovers() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [name_of(path) for path in python_files("edgelora", "tests", "tools") if path.stem in drawers] == []


def test_nothing_is_left_undone() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "raise Not" + "Implemented")
    found = []
    for path in python_files("edgelora", "tests", "tools", "examples"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [f"{name_of(path)}:{number}: {word}" for word in words if word in line]
    assert found == []


def test_no_exception_is_swallowed() -> None:
    found = []
    for path in python_files("edgelora", "tools", "examples"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ExceptHandler):
                empty = all(isinstance(statement, ast.Pass) for statement in node.body)
                if empty or node.type is None:
                    found.append(f"{name_of(path)}:{node.lineno}")
    assert found == []


def test_every_test_asserts_something() -> None:
    silent = []
    for path in python_files("tests"):
        tree = parse(path)
        checkers = {node.name for node in functions(tree) if any(isinstance(inner, ast.Assert) for inner in ast.walk(node))}
        for node in functions(tree):
            if not node.name.startswith("test"):
                continue
            calls = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
            names = [func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "") for func in calls]
            good = any(name in checkers or name == "raises" or name.startswith(("assert", "check")) for name in names)
            if not good and not any(isinstance(inner, ast.Assert) for inner in ast.walk(node)):
                silent.append(f"{name_of(path)}:{node.name}")
    assert silent == []


def test_help_takes_at_most_a_third_of_a_second_of_processor_time() -> None:
    if not hasattr(os, "wait4"):
        pytest.skip("this system does not tell a child's processor time")
    times = []
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-m", "edgelora", "--help"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        times.append(usage.ru_utime + usage.ru_stime)
    assert min(times) < 0.35
