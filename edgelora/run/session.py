"""An ONNX Runtime session set up for a small device, and its failures as messages."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.errors import FolderError, MachineError

if TYPE_CHECKING:
    import onnxruntime as ort


_profiles: Path | None = None


@contextmanager
def profiling(folder: Path) -> Iterator[None]:
    """Let sessions that are opened meanwhile write what ONNX Runtime's profiler sees into `folder`, when they end."""
    global _profiles
    _profiles = folder
    try:
        yield
    finally:
        _profiles = None


def open_session(
    model: Path,
    *,
    threads: int | None = None,
    initializers: Mapping[str, ort.OrtValue] | None = None,
    optimize: bool = True,
    write: Path | None = None,
    entries: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Return a CPU session of a .onnx file on `threads` threads (default: the physical cores).

    `initializers` take the place of the file's own weights of these names and shapes; they must live as long as the session,
    which reads from their memory. A graph that is optimized already is taken as it is without `optimize`; `write` is where the
    optimized one goes, `entries` are further settings of the session.
    Raises FolderError where the file is missing, damaged or not understood, MachineError where memory is short.
    """
    import onnxruntime as ort

    if not model.is_file():
        raise FolderError(f"{model} does not exist", hint="export the bundle again with --overwrite")
    options = session_options(threads)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if write is not None:
        options.optimized_model_filepath = str(write)
    for name, text in (entries or {}).items():
        options.add_session_config_entry(name, text)
    try:
        for name, value in (initializers or {}).items():
            options.add_initializer(name, value)
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except MemoryError:
        raise MachineError(f"not enough memory to load {model}", hint="close other programs") from None
    except Exception as error:  # onnxruntime's classes derive from Exception alone, and differ between its releases
        if "bad_alloc" in str(error) or "Failed to allocate memory" in str(error):
            raise MachineError(f"not enough memory to load {model}", hint="close other programs") from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FolderError(f"{model} cannot be loaded: {reason}", hint="export the bundle again with --overwrite") from None


def session_options(threads: int | None = None) -> ort.SessionOptions:
    """Return the options of every session.

    Sequential execution on one pool: a decoder is a chain. Memory patterns are for fixed shapes, and a prompt's length
    changes. Initializers bypass the arena, which would round their memory up. Threads stop spinning when a run ends: those of
    a session that has nothing to do would take processors from one that has (a prompt's graph and the decoder in turn: a
    third of the time).
    """
    import onnxruntime as ort

    from edgelora.hardware import physical_cores

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or min(physical_cores(), os.cpu_count() or 1)
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.enable_mem_pattern = False
    if _profiles is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(_profiles / "session")
    options.log_severity_level = 3  # errors; they come as exceptions too
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
