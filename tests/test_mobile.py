"""`export --for mobile`: the .ort file agrees, its operators are listed, and the code in docs/phones.md names what is there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import onnxruntime as ort
import pytest

from edgelora.bundle import open_bundle
from edgelora.errors import MachineError, ModelError
from edgelora.export import mobile
from edgelora.export.export import export
from edgelora.run.decoder import DecoderSession

PHONES = (Path(__file__).parents[1] / "docs" / "phones.md").read_text(encoding="utf-8")
NAME = r"(input_ids|attention_mask|token_type_ids|logits|(?:past_key_values|present)\.[^\"]+)"


@pytest.fixture(scope="module")
def decoder(decoder_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mobile") / "decoder"
    export(str(decoder_model), out, device="mobile")
    return out


@pytest.fixture(scope="module")
def classifier(classifier_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mobile") / "classifier"
    export(str(classifier_model), out, device="mobile")
    return out


def session_of(bundle: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(bundle / open_bundle(bundle).manifest["mobile"]["file"]), options)


def names(session: ort.InferenceSession) -> set[str]:
    return {value.name for value in (*session.get_inputs(), *session.get_outputs())}


def test_the_ort_file_says_what_the_onnx_file_says(decoder: Path) -> None:
    bundle = open_bundle(decoder)
    answers = []
    for path in (bundle.model_path, decoder / bundle.manifest["mobile"]["file"]):
        session = DecoderSession(path, max_length=64, threads=1)
        tokens = [int(session.prefill(list(b"lights on")).argmax())]
        while len(tokens) < 12:
            tokens.append(int(session.step(tokens[-1]).argmax()))
        answers.append(tokens)
    assert answers[0] == answers[1]
    assert {path.suffix for path in (decoder / "mobile").iterdir()} == {".ort", ".config"}


def test_its_operators_are_listed(decoder: Path, classifier: Path) -> None:
    listed = [open_bundle(folder).manifest["mobile"]["operators"] for folder in (decoder, classifier)]
    assert {"GroupQueryAttention", "MatMulNBits"} <= set(listed[0]["com.microsoft"])
    assert {"MultiHeadAttention", "MatMulNBits"} <= set(listed[1]["com.microsoft"])
    assert "Gather" in listed[1]["ai.onnx"]


def test_the_code_for_phones_names_what_a_bundle_has(decoder: Path, classifier: Path) -> None:
    """A name with a number written into it, as Kotlin and Swift write it, is the name of each layer's part."""
    sections = PHONES.split("\n## ")[1:]
    for section, folder in zip(sections, (classifier, decoder), strict=True):
        known = names(session_of(folder))
        required = {name for name in known if "." not in name} - {"token_type_ids"}  # the code asks whether there are any
        blocks = re.findall(r"```(kotlin|swift)\n(.*?)```", section, re.DOTALL)
        assert [language for language, _ in blocks] == ["kotlin", "swift"]
        for _, code in blocks:
            found = set(re.findall(f'"{NAME}"', code))
            assert {name for name in found if "." not in name} - {"token_type_ids"} == required, "every tensor, and no other"
            layered = {re.sub(r"\$layer\.\$part|\\\((?:part|\$0)\)", "1.key", name) for name in found if "." in name}
            assert layered <= known
            assert bool(layered) == (folder == decoder)
    assert "model_q4.ort" in PHONES
    assert (decoder / "mobile" / "model_q4.ort").is_file()


def test_a_file_that_computes_otherwise_is_refused(
    decoder_model: Path, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.ort"
    shutil.copyfile(decoder / "mobile" / "model_q4.ort", other)
    monkeypatch.setattr(mobile, "convert", lambda model, target: shutil.copyfile(other, target))
    with pytest.raises(ModelError, match=r"model\.ort does not compute what model\.onnx does"):
        export(str(decoder_model), tmp_path / "bundle", precision="fp32", device="mobile")
    assert not (tmp_path / "bundle").exists()


def test_more_than_two_gigabytes_are_refused(decoder_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mobile, "MAX_BYTES", 1000)
    with pytest.raises(MachineError, match="holds at most 2 GB"):
        export(str(decoder_model), tmp_path / "bundle", device="mobile")
