"""The one place that turns errors into messages and exit codes.

0 done, 1 a defect of EdgeLoRA, 2 the user's input, 3 the machine, 130 interrupted. A message is "error: what, found, allowed",
then "hint: command"; a traceback only with EDGELORA_TRACEBACK=1.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import click

from edgelora import console
from edgelora.errors import EdgeLoRAError, FolderError, Interrupted, MachineError, UserError, did_you_mean

# Modules of edgelora[train] by the name that Python gives in "No module named".
TRAIN_MODULES = frozenset(
    {"torch", "transformers", "optimum", "onnx", "onnx_ir", "onnxscript", "safetensors", "gguf", "huggingface_hub", "pyarrow"}
    | {"sklearn"}
)
WRONG_PATH = (errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)
SERVE_MODULES = frozenset({"starlette", "uvicorn", "anyio"})  # of edgelora[serve]


def guarded(run: Callable[[], object]) -> int:
    """Run a command line and return its exit code; whatever it raises is printed as a message."""
    try:
        with _sigterm_interrupts():
            code = run()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # The reader has gone (`edgelora tasks | head`); Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("EDGELORA_TRACEBACK") and not isinstance(error, EdgeLoRAError | click.ClickException):
            raise
        return _report(as_message(error))
    except KeyboardInterrupt:
        return _report(Interrupted("interrupted"))


def as_message(error: BaseException) -> EdgeLoRAError:
    """Return the error as one with a message, a hint and an exit code."""
    if isinstance(error, EdgeLoRAError):
        return error
    if isinstance(error, click.Abort):
        return Interrupted("interrupted")
    if isinstance(error, click.ClickException):
        return _usage_error(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in TRAIN_MODULES:
        return MachineError(f"{error.name} is not installed; this verb needs it", hint='pip install "edgelora[train]"')
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in SERVE_MODULES:
        return MachineError(f"{error.name} is not installed; this verb needs it", hint='pip install "edgelora[serve]"')
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return MachineError("out of memory", hint="close other programs, or give --ram a smaller budget")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(f"the disk is full: writing {error.filename or 'a file'} failed", hint="free some space")
    if isinstance(error, PermissionError) and error.filename:
        return FolderError(f"{error.filename}: permission denied", hint="choose a file or folder that you may read and write")
    if isinstance(error, OSError) and error.filename and error.errno in WRONG_PATH:
        return FolderError(f"{error.filename}: {str(error.strerror).lower()}", hint="choose another file or folder")
    defect = EdgeLoRAError(
        f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'} (unexpected: this is a defect of EdgeLoRA)",
        hint="rerun with EDGELORA_TRACEBACK=1 in the environment to see where it happened",
    )
    defect.exit_code = 1
    return defect


def _usage_error(error: click.ClickException) -> UserError:
    """Return click's own complaint in our form: what was found, what is meant, and the command that lists what is allowed."""
    path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "edgelora"
    message = error.format_message().rstrip(".")
    message = message[:1].lower() + message[1:]
    if isinstance(error, click.NoSuchOption) and error.ctx:
        options = [name for parameter in error.ctx.command.params for name in parameter.opts]
        message = f'no such option "{error.option_name}".{did_you_mean(error.option_name, options)}'
    return UserError(message, hint=f"{path} --help")


def _report(error: EdgeLoRAError) -> int:
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    console.emit({"error": error.message, "hint": error.hint, "exit_code": error.exit_code})
    return error.exit_code


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that one path checkpoints and cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread set handlers
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
