"""Our kernels' files and fallbacks: damaged graphs, packed weights in the cache, what is left to ONNX Runtime."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import save_decoder

import edgelora
from edgelora.bundle import open_bundle
from edgelora.errors import FolderError, MachineError, UserError
from edgelora.export.export import export
from edgelora.native import library, packing
from edgelora.native.library import NativeDecoder, open_native
from edgelora.native.onnx_file import BrokenGraphError, read_graph
from edgelora.native.program import UnknownGraphError, program_of
from edgelora.run import packed as run_packed
from edgelora.run.decoder import DecoderSession
from edgelora.run.model import load
from tests.test_native import IDS, WIDE, all_logits, make, native_of, needs_library


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("native"))


@needs_library
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen3", "granite", "smollm3"])
def test_what_is_not_known_is_onnx_runtimes(family: str, tmp_path: Path) -> None:
    shape = {} if family == "gpt2" else WIDE
    save_decoder(tmp_path / "model", family, **shape)
    export(str(tmp_path / "model"), tmp_path / "bundle", precision="int4")
    path = open_bundle(tmp_path / "bundle").model_path
    with pytest.raises(UnknownGraphError):
        program_of(read_graph(path))
    assert DecoderSession(path, max_length=64, threads=1, native=True).bound is not None


def test_float_weights_are_onnx_runtimes(decoder_bundle: Path) -> None:
    with pytest.raises(UnknownGraphError):
        program_of(read_graph(open_bundle(decoder_bundle).model_path))


def engine_of(session: DecoderSession) -> NativeDecoder:
    assert isinstance(session.engine, NativeDecoder)
    return session.engine


@needs_library
@pytest.mark.parametrize("small_part", [0.0, 1.0], ids=["mapped", "read"])
def test_packed_weights_are_kept(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_part: float) -> None:
    monkeypatch.setattr(packing, "SMALL_PART", small_part)
    monkeypatch.setenv("EDGELORA_PACKED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run_packed, "LEAST_BYTES", 1)
    first = all_logits(native_of(model), IDS[:20])
    (kept,) = (tmp_path / "cache").iterdir()
    session = native_of(model)
    mapped = isinstance(engine_of(session).program.kept[-1], np.memmap)
    assert mapped == (small_part == 0 or sys.platform != "linux")
    np.testing.assert_array_equal(all_logits(session, IDS[:20]), first)
    assert kept.stat().st_size == engine_of(session).program.kept[-1].size
    kept.write_bytes(kept.read_bytes()[:-1])  # of another size: packed anew
    np.testing.assert_array_equal(all_logits(native_of(model), IDS[:20]), first)
    assert kept.stat().st_size == engine_of(session).program.kept[-1].size
    monkeypatch.setenv("EDGELORA_PACKED_CACHE_GB", "0")
    kept.unlink()
    np.testing.assert_array_equal(all_logits(native_of(model), IDS[:20]), first)
    assert not list((tmp_path / "cache").iterdir())


@needs_library
def test_a_file_that_cannot_be_read_is_said(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGELORA_PACKED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run_packed, "LEAST_BYTES", 1)
    all_logits(native_of(model), IDS[:1])
    (kept,) = (tmp_path / "cache").iterdir()
    room = np.empty(kept.stat().st_size + 1, np.uint8)
    with pytest.raises(MachineError, match="cannot be read: it ends too early"):
        packing.read_whole(kept.open("rb"), room)


@needs_library
def test_where_nothing_can_be_written_the_weights_are_in_memory(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = all_logits(native_of(model), IDS[:20])
    monkeypatch.setenv("EDGELORA_PACKED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run_packed, "LEAST_BYTES", 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "write", full)
    np.testing.assert_array_equal(all_logits(native_of(model), IDS[:20]), first)


@needs_library
def test_scales_that_are_not_bf16_are_onnx_runtimes(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model.parent, tmp_path / "onnx") / model.name
    scales = next(tensor for name, tensor in read_graph(model).tensors.items() if name.endswith("down_proj.scales"))
    changed = 0
    for file in copy.parent.iterdir():  # small weights are in the graph itself
        content = bytearray(file.read_bytes())
        if (place := content.find(scales.tobytes())) >= 0:
            content[place] |= 1
            file.write_bytes(content)
            changed += 1
    assert changed == 1
    assert DecoderSession(copy, max_length=64, native=True).bound is not None


def test_every_cut_of_a_graph_is_noticed(model: Path, tmp_path: Path) -> None:
    content = model.read_bytes()
    shutil.copy(model.with_name(f"{model.name}_data"), tmp_path)
    damaged = tmp_path / model.name
    for length in range(1, len(content), max(1, len(content) // 199)):
        damaged.write_bytes(content[:length])
        with pytest.raises((BrokenGraphError, UnknownGraphError)):
            program_of(read_graph(damaged))
    damaged.write_bytes(content)
    weights = tmp_path / f"{model.name}_data"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BrokenGraphError, match="too short"):
        read_graph(damaged)
    assert open_native(damaged, threads=1) is None
    with pytest.raises(FolderError):  # ONNX Runtime's words
        DecoderSession(damaged, max_length=64, native=True)


def test_changed_bytes_of_a_graph_end_in_a_message_or_a_program(model: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    shutil.copy(model.with_name(f"{model.name}_data"), tmp_path)
    damaged, content = tmp_path / model.name, model.read_bytes()
    for _ in range(300):
        changed = bytearray(content)
        changed[int(generator.integers(len(content)))] = int(generator.integers(256))
        damaged.write_bytes(changed)
        with contextlib.suppress(BrokenGraphError, UnknownGraphError):
            assert program_of(read_graph(damaged)).operations


@needs_library
def test_a_text_ends_where_the_rotary_tables_do(model: Path) -> None:
    session = DecoderSession(model, max_length=10**9, threads=1, native=True)
    assert session.max_length == WIDE["max_position_embeddings"]
    with pytest.raises(UserError, match="takes at most 640"):
        session.prefill([1] * 641)


@needs_library
def test_too_little_memory_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(library, "use_packed", full)
    with pytest.raises(MachineError, match="not enough memory to load"):
        DecoderSession(model, max_length=64, native=True)


@needs_library
def test_the_switch_and_what_runs_after_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "0")
    assert library.reason() == "EDGELORA_NATIVE is 0"
    assert DecoderSession(model, max_length=64, native=True).bound is not None


@needs_library
def test_answers_are_those_of_onnx_runtime(model: Path) -> None:
    bundle = model.parents[1]
    ours = edgelora.load(bundle)
    assert ours.generator.decoder.bound is None
    theirs = load(bundle, native=False)
    assert theirs.generator.decoder.bound is not None
    for prompt in ("turn it off", "what is the capital"):
        assert ours.answer(prompt, max_new_tokens=4).tokens[:1] == theirs.answer(prompt, max_new_tokens=4).tokens[:1]


@needs_library
def test_onnx_runtime_is_not_even_imported(model: Path) -> None:
    code = (
        "import sys, edgelora; m = edgelora.load(sys.argv[1]); m.generate('dim the light', max_new_tokens=3);"
        "print(sorted({'onnxruntime', 'torch'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model.parents[1])], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
