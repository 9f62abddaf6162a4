"""Decoders by kernels of our own: products against numpy, logits against ONNX Runtime, the same bits alone and together."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tolerances
from numpy.typing import NDArray
from tiny import save_decoder

import edgelora
from edgelora.bundle import open_bundle
from edgelora.export.export import export
from edgelora.hardware import instruction_sets
from edgelora.native import library
from edgelora.native.library import CHUNK, NativeDecoder
from edgelora.native.operations import EMBED, NORM, PRODUCT, Operation, Program
from edgelora.run.decoder import DecoderSession

needs_library = pytest.mark.skipif(library.library() is None, reason="no kernels for this processor, or no compiler")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 640}  # fmt: skip
IDS = np.random.default_rng(0).integers(0, 250, 400).tolist()
FEW = 9  # of decoder.c


def test_a_machine_with_a_compiler_and_the_instructions_has_the_library() -> None:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    able = {"avx512vbmi", "avx512_vnni", "avx512vl"} <= set(flags.split()) and shutil.which("gcc") is not None
    assert (library.library() is not None) or not able, f"instructions: {instruction_sets()}"


def make(folder: Path, family: str = "llama", precision: str = "int4", **shape: object) -> Path:
    save_decoder(folder / "model", family, **{**WIDE, **shape})
    export(str(folder / "model"), folder / "bundle", precision=precision)
    return open_bundle(folder / "bundle").model_path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("native"))


def native_of(model: Path, threads: int = 2) -> DecoderSession:
    session = DecoderSession(model, max_length=640, threads=threads, native=True)
    assert session.bound is None
    return session


def bound_of(model: Path) -> DecoderSession:
    return DecoderSession(model, max_length=640, threads=2)


def all_logits(session: DecoderSession, ids: list[int]) -> NDArray[np.float32]:
    step = session.score_limit
    return np.concatenate([session.score(ids[start : start + step]).copy() for start in range(0, len(ids), step)])


def bf16(numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    """Cut numbers off to what bf16 can hold, as every grid's scales are."""
    return (numbers.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


@needs_library
@pytest.mark.parametrize("tokens", [1, 2, FEW, FEW + 5, 45])
@pytest.mark.parametrize(
    ("bits", "block", "width", "outputs"),
    [(4, 32, 192, 48), (4, 32, 96, 16), (8, 16, 128, 33), (8, 32, 64, 17), (2, 64, 1088, 16), (4, 128, 256, 50)],
)
def test_a_product_is_that_of_rounded_activations(tokens: int, bits: int, block: int, width: int, outputs: int) -> None:
    generator = np.random.default_rng(bits)
    table, table_scales = (
        generator.integers(0, 256, (outputs, width // 16, 16), np.uint8),
        np.ones((outputs, width // 16), np.float32),
    )
    table_scales *= generator.uniform(0.5, 2, table_scales.shape)
    codes = generator.integers(0, 1 << bits, (outputs, width), np.uint8)
    scales = bf16(generator.normal(size=(outputs, width // block)))
    weight, bias = generator.normal(size=width).astype(np.float32), generator.normal(size=outputs).astype(np.float32)
    packed = np.packbits(
        np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits].reshape(outputs, -1), axis=-1, bitorder="little"
    )
    program = Program(
        operations=[
            Operation(kind=EMBED, output=0, k=width, bits=8, block=16,
                      codes=table.ctypes.data, scales=table_scales.ctypes.data),
            Operation(kind=NORM, input=0, skip=-1, output=1, k=width, number=1e-5, weight=weight.ctypes.data),
            Operation(kind=PRODUCT, input=1, output=-1, n=outputs, k=width, bits=bits, block=block,
                      codes=packed.ctypes.data, scales=scales.ctypes.data, weight=bias.ctypes.data),
        ],
        names=["", "", ""], widths=[width, width], blocks=[0, block], rows=outputs, vocab_size=outputs, positions=64,
        cache_shapes={"past_key_values.0.key": (1, 16)}, kept=[table, table_scales, packed, scales, weight, bias],
    )  # fmt: skip
    native = NativeDecoder(program, 2)
    native.set_cache({"past_key_values.0.key": np.zeros((1, 1, 64, 16), np.float32)})
    ids = generator.integers(0, outputs, tokens)
    found = native.run(ids.tolist(), 0, tokens)

    rows = (table[ids].astype(np.float64) - 128).reshape(tokens, width) * np.repeat(table_scales[ids], 16, axis=1)
    normed = (rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-5) * weight).reshape(tokens, -1, block)
    largest = np.abs(normed).max(-1, keepdims=True)
    rounded = (np.rint(normed * 127 / largest) * largest / 127).reshape(tokens, width)
    exact = rounded @ ((codes.astype(np.float64) - (1 << bits - 1)) * np.repeat(scales, block, axis=1)).T + bias
    # A number on the edge between two codes may go the other way in fp32: one step of one block.
    np.testing.assert_allclose(found, exact, rtol=0, atol=np.abs(exact).max() * tolerances.NATIVE_PRODUCT)


@needs_library
@pytest.mark.parametrize(
    ("family", "precision", "shape"),
    [
        ("llama", "int4", {}),
        ("llama", "int8", {"tie_word_embeddings": True}),
        ("llama", "int2", {}),
        ("llama", "int4", {"hidden_size": 192, "head_dim": 64, "num_attention_heads": 3, "num_key_value_heads": 1}),
        ("llama3", "int4", {}),
        ("qwen2", "int4", {"num_key_value_heads": 4}),
        ("mistral", "int4", {"sliding_window": None}),
    ],
)
def test_the_logits_of_onnx_runtime(family: str, precision: str, shape: dict[str, object], tmp_path: Path) -> None:
    path = make(tmp_path, family, precision, **shape)
    native, bound = native_of(path), bound_of(path)
    assert (native.vocab_size, native.cache_shapes) == (bound.vocab_size, bound.cache_shapes)
    wanted, found = all_logits(bound, IDS[:90]), all_logits(native, IDS[:90])
    limit = tolerances.NATIVE_LOGITS * wanted.std()
    assert np.sqrt(np.mean((found - wanted) ** 2)) < limit
    native.rewind(0)
    steps = np.stack([native.step(token).copy() for token in IDS[:90]])
    assert np.sqrt(np.mean((steps - wanted) ** 2)) < limit
    for name, array in bound.cache.items():
        difference = native.cache[name][:, :, :90] - array[:, :, :90]
        assert np.sqrt(np.mean(difference**2)) < tolerances.NATIVE_LOGITS * array[:, :, :90].std()


@needs_library
def test_a_long_prompt_in_chunks_and_a_cache_that_grows(model: Path) -> None:
    native, bound = native_of(model), bound_of(model)
    assert len(IDS) > CHUNK
    wanted, found = bound.prefill(IDS).copy(), native.prefill(IDS).copy()
    assert np.sqrt(np.mean((found - wanted) ** 2)) < tolerances.NATIVE_LOGITS * wanted.std()
    assert native.capacity == 512
    steps = [(native.step(token).copy(), bound.step(token).copy()) for token in IDS[:150]]
    assert native.capacity == 640
    assert np.sqrt(np.mean([(a - b) ** 2 for a, b in steps])) < tolerances.NATIVE_LOGITS * wanted.std()


@needs_library
@pytest.mark.parametrize(
    "shape", [{}, {"hidden_size": 192, "head_dim": 64, "num_attention_heads": 3, "num_key_value_heads": 1}]
)
def test_a_text_has_the_same_bits_whole_in_pieces_and_token_by_token(shape: dict[str, int], tmp_path: Path) -> None:
    native = native_of(make(tmp_path, **shape))
    steps = np.stack([native.step(token).copy() for token in IDS[:100]])
    for pieces in ([100], [FEW, FEW + 1, 81], [1, 2, 30, 67]):
        native.rewind(0)
        ends = np.cumsum(pieces)
        found = [native.score(IDS[end - size : end]).copy() for size, end in zip(pieces, ends, strict=True)]
        np.testing.assert_array_equal(np.concatenate(found), steps)


@needs_library
def test_threads_change_no_bit(model: Path) -> None:
    first, *others = (all_logits(native_of(model, threads), IDS[:50]) for threads in (1, 2, 3))
    for other in others:
        np.testing.assert_array_equal(other, first)


@needs_library
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 1}], ids=["greedy", "sampled"])
def test_answers_are_drafted_by_default_and_the_same_without(model: Path, settings: dict[str, float]) -> None:
    loaded = edgelora.load(model.parents[1])
    proposed = 0
    for prompt in ("abc abc abc", "the cat sat on the mat, the cat sat on the", "0101010101", "x"):
        given = {"raw": True, "max_new_tokens": 120, **settings}
        drafted, plain = loaded.answer(prompt, **given), loaded.answer(prompt, speculate=False, **given)
        assert plain.drafts is None
        assert drafted.drafts is not None
        proposed += drafted.drafts.proposed
        assert drafted.tokens == plain.tokens
    assert proposed > 0


@needs_library
def test_what_is_saved_and_rewound_is_as_computed_anew(model: Path) -> None:
    native = native_of(model)
    after = native.prefill(IDS[:40]).copy()
    native.rewind(20)
    saved = native.saved()
    native.rewind(0)
    native.prefill(IDS[100:140])
    native.restore(saved, 20)
    np.testing.assert_array_equal(native.prefill(IDS[20:40]), after)


@needs_library
def test_ids_that_the_model_does_not_have_are_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="token ids go from 3 to 288; the model has 288"):
        native_of(model).prefill([3, 288])
