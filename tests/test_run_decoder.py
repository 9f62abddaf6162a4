"""The KV cache: the same logits whole, in pieces, token by token, grown and rewound; and the session's messages."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tolerances
import torch
from numpy.typing import NDArray

from edgelora.bundle import open_bundle
from edgelora.errors import FolderError, MachineError, UserError
from edgelora.run import decoder as decoder_module
from edgelora.run.decoder import DecoderSession
from edgelora.run.predictor import example_loss
from edgelora.run.session import open_session, session_options

IDS = np.random.default_rng(0).integers(0, 250, 300).tolist()


@pytest.fixture
def session(decoder_bundle: Path) -> DecoderSession:
    bundle = open_bundle(decoder_bundle)
    return DecoderSession(bundle.model_path, max_length=bundle.max_length, threads=1)


@pytest.fixture(scope="module")
def expected(decoder_model: Path) -> NDArray[np.float32]:
    """transformers' logits [300, vocabulary] for IDS."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(decoder_model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([IDS])).logits[0].numpy()
    return logits


def assert_equal(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(found, wanted, **tolerances.ONNX_FP32_LOGITS)


def test_prefill_and_steps_give_the_logits_of_transformers(session: DecoderSession, expected: NDArray[np.float32]) -> None:
    assert_equal(session.prefill(IDS[:20]), expected[19])
    for position in range(20, 40):
        assert_equal(session.step(IDS[position]), expected[position])
    assert session.length == 40


def test_the_cache_grows_while_tokens_come(session: DecoderSession, expected: NDArray[np.float32]) -> None:
    session.prefill(IDS[:250])
    assert session.capacity == 256
    rows = [session.step(token).copy() for token in IDS[250:]]
    assert session.capacity == 512
    assert_equal(np.stack(rows), expected[250:])


def test_a_prompt_in_chunks_is_the_same(
    session: DecoderSession, expected: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.engine, "chunk", 64)
    assert_equal(session.prefill(IDS), expected[-1])


def test_score_gives_the_logits_of_every_position(session: DecoderSession, expected: NDArray[np.float32]) -> None:
    rows = [session.score(IDS[start : start + 60]).copy() for start in range(0, 300, 60)]
    assert_equal(np.concatenate(rows), expected)


def test_rewind_forgets_what_came_after(session: DecoderSession, expected: NDArray[np.float32]) -> None:
    session.prefill(IDS[:100])
    session.prefill([7] * 50)
    session.rewind(100)
    assert_equal(session.step(IDS[100]), expected[100])
    session.rewind(0)
    assert_equal(session.prefill(IDS[:30]), expected[29])


def test_a_step_allocates_nothing(session: DecoderSession) -> None:
    session.prefill(IDS[:10])
    buffers = {name: array.ctypes.data for name, array in session.cache.items()}
    logits = session.step(1).ctypes.data
    tracemalloc.start()
    for token in range(50):
        session.step(token)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < min(array.nbytes for array in session.cache.values()) / 2, "a step made more than its call's arguments"
    assert {name: array.ctypes.data for name, array in session.cache.items()} == buffers
    assert session.step(1).ctypes.data == logits


def test_the_limit_is_a_message(session: DecoderSession) -> None:
    with pytest.raises(UserError) as caught:
        session.prefill([1] * 2000)
    assert caught.value.message == "the text has 2000 tokens; this bundle takes at most 1024"
    assert caught.value.hint == "shorten it"
    assert session.length == 0


@pytest.mark.parametrize("slice_floats", [decoder_module.SCORED_FLOATS, 288 * 7])
def test_losses_in_slices_are_those_of_the_whole(
    session: DecoderSession, expected: NDArray[np.float32], slice_floats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "SCORED_FLOATS", slice_floats)
    supervised = np.zeros(300, np.uint8)
    supervised[40:75] = supervised[120:121] = supervised[290:] = 1
    targets = np.flatnonzero(supervised)
    wanted = torch.nn.functional.cross_entropy(
        torch.from_numpy(expected[targets - 1]), torch.tensor(IDS)[targets], reduction="sum"
    )
    loss, count = example_loss(session, np.array(IDS, np.int32), supervised)
    assert count == len(targets)
    assert loss == pytest.approx(float(wanted), rel=tolerances.ONNX_FP32_LOSS)
    assert session.length < 300, "nothing after the last target is computed"


def test_an_example_without_targets_costs_nothing(session: DecoderSession) -> None:
    assert example_loss(session, np.array(IDS, np.int32), np.zeros(300, np.uint8)) == (0.0, 0)
    assert session.length == 0


def test_a_missing_model_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(FolderError) as caught:
        DecoderSession(tmp_path / "model.onnx", max_length=10)
    assert caught.value.message == f"{tmp_path / 'model.onnx'} does not exist"


def test_a_damaged_model_is_a_message(decoder_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(open_bundle(decoder_bundle).model_path.read_bytes()[:1000])
    with pytest.raises(FolderError) as caught:
        DecoderSession(path, max_length=10)
    assert caught.value.message.startswith(f"{path} cannot be loaded: ")
    assert "\n" not in caught.value.message
    assert caught.value.hint == "export the bundle again with --overwrite"


def test_weights_that_are_missing_are_a_message(decoder_bundle: Path, tmp_path: Path) -> None:
    model = open_bundle(decoder_bundle).model_path
    shutil.copy(model, tmp_path / "model.onnx")
    with pytest.raises(FolderError, match=r"cannot be loaded: .*model"):
        DecoderSession(tmp_path / "model.onnx", max_length=10)


def test_another_graph_is_no_decoder(classifier_bundle: Path) -> None:
    path = open_bundle(classifier_bundle).model_path
    with pytest.raises(FolderError) as caught:
        DecoderSession(path, max_length=10)
    assert caught.value.message == f"{path} is not a decoder: it has no cache of keys and values"


@pytest.mark.parametrize(("name", "axis"), [("past_key_values.0.key", 1), ("past_key_values.0.value", 3)])
def test_a_graph_of_open_sizes_is_no_decoder(decoder_bundle: Path, tmp_path: Path, name: str, axis: int) -> None:
    import onnx

    path = tmp_path / "model.onnx"
    model = open_bundle(decoder_bundle).model_path
    shutil.copy(model.with_name(f"{model.name}_data"), tmp_path / f"{model.name}_data")
    proto = onnx.load(model, load_external_data=False)
    value = next(value for value in (*proto.graph.input, *proto.graph.output) if value.name == name)
    value.type.tensor_type.shape.dim[axis].dim_param = "any"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(FolderError, match="is not a decoder: it leaves the size of its vocabulary or cache open"):
        DecoderSession(path, max_length=10)


def test_too_little_memory_is_a_message(decoder_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    def refuse(*arguments: object, **settings: object) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    path = open_bundle(decoder_bundle).model_path
    with pytest.raises(MachineError) as caught:
        open_session(path)
    assert caught.value.message == f"not enough memory to load {path}"


def test_threads_are_those_asked_for_or_the_physical_cores() -> None:
    from edgelora.hardware import physical_cores

    assert session_options(3).intra_op_num_threads == 3
    assert session_options().intra_op_num_threads == physical_cores()
