"""`export --for web`: weights that are unpacked once, a page beside the bundle, and both in a browser where there is one."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import tolerances

from edgelora.bundle import open_bundle
from edgelora.errors import SettingsError
from edgelora.export import web
from edgelora.export.export import export
from edgelora.export.passes.unpack_weights import unpacked_bytes
from edgelora.run.model import load

ROOT = Path(__file__).parents[1]
MODULES = Path(os.environ.get("EDGELORA_NODE_MODULES", ROOT / ".venv-web" / "node_modules"))
QUESTION = "lights on"


def browser() -> str:
    """Return the path of Chromium; skips where it, node or the npm packages (tools/check_loaders installs them) are absent."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if not found or not shutil.which("node") or not (MODULES / "playwright-core").is_dir():
        pytest.skip("no Chromium, node or npm packages here: tools/check_loaders")
    return found


@contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing: tests read the output."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def open_page(folder: Path, given: str, shot: Path) -> dict[str, Any]:
    """Return what the page of a bundle says to an input: {"about", "answer", "status", "asked": hosts that were asked}."""
    with served(folder) as address:
        command = ["node", str(ROOT / "tools" / "loaders" / "page.mjs"), str(MODULES), browser(), address, given, str(shot)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    tiny.save_decoder(folder / "model", head_dim=16, max_position_embeddings=512, tie_word_embeddings=True)
    export(str(folder / "model"), folder / "web", device="web")
    export(str(folder / "model"), folder / "cpu")
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    tiny.save_encoder(folder / "model", labels=3, hidden_size=48)  # 48 inputs: half of the last block is padding
    export(str(folder / "model"), folder / "web", device="web")
    return folder


def operators(bundle: Path) -> set[str]:
    return {node.op_type for node in ir.load(open_bundle(bundle).model_path).graph}


def test_weights_are_unpacked_by_the_graph_and_compute_in_float(decoder: Path, classifier: Path) -> None:
    assert "MatMulNBits" in operators(decoder / "cpu")
    for folder in (decoder / "web", classifier / "web"):
        bundle = open_bundle(folder)
        assert "MatMulNBits" not in operators(folder)
        assert bundle.manifest["verify"]["layers_bit_identical"] == len(bundle.manifest["layers"])
        assert bundle.manifest["verify"]["float"]["max"] < tolerances.UNPACKED_FLOAT
        assert bundle.manifest["exceptions"] == {}
    codes = [(decoder / name / "onnx" / "model_q4.onnx_data").stat().st_size for name in ("web", "cpu")]
    assert codes[0] <= codes[1] * 1.01, "the file holds codes, not what they are unpacked to"


def test_a_model_too_large_for_a_browser_stays_packed(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(web, "UNPACKED_BYTES", 1000)
    export(str(decoder / "model"), tmp_path / "bundle", device="web")
    assert "too much for a browser: they stay packed" in capsys.readouterr().err
    assert "MatMulNBits" in operators(tmp_path / "bundle")
    assert unpacked_bytes(ir.load(open_bundle(tmp_path / "bundle").model_path)) > 1000


def test_the_page_is_part_of_the_bundle(decoder: Path) -> None:
    bundle = open_bundle(decoder / "web")
    assert {*web.PAGE_FILES, "README.txt"} <= set(bundle.manifest["files"])
    for name in web.PAGE_FILES:
        text = (bundle.folder / name).read_text(encoding="utf-8")
        assert "https://" not in text, "nothing is fetched from elsewhere"
        assert "http://" not in text
    assert "npm install" in (bundle.folder / "README.txt").read_text(encoding="utf-8")


def node_modules(folder: Path, library: str) -> Path:
    for name, content in ((web.LIBRARY, library), (web.LICENSE, "license")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def test_the_library_is_copied_with_the_runtime_that_it_names(decoder: Path, tmp_path: Path) -> None:
    modules = node_modules(tmp_path / "modules", 'new URL("ort-wasm-simd-threaded.asyncify.wasm")')
    with pytest.raises(SettingsError, match=r"lacks what transformers\.js loads: .*asyncify\.mjs"):
        export(str(decoder / "model"), tmp_path / "bundle", device="web", vendor=modules)
    (modules / web.RUNTIME).mkdir(parents=True)
    for suffix in ("mjs", "wasm"):
        (modules / web.RUNTIME / f"ort-wasm-simd-threaded.asyncify.{suffix}").write_text(suffix, encoding="utf-8")
    web.write_page(tmp_path, modules)
    copied = {path.name for path in (tmp_path / "vendor").iterdir()}
    names = {f"ort-wasm-simd-threaded.asyncify.{suffix}" for suffix in ("mjs", "wasm")}
    assert copied == {"transformers.min.js", "LICENSE", *names}
    assert "npm install" not in (tmp_path / "README.txt").read_text(encoding="utf-8")


def test_wrong_settings_are_refused_before_anything_is_made(decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--vendor is for the page of --for web"):
        export(str(decoder / "model"), tmp_path / "bundle", vendor=tmp_path)
    with pytest.raises(SettingsError, match=r"has no @huggingface/transformers"):
        export(str(decoder / "model"), tmp_path / "bundle", device="web", vendor=tmp_path)
    assert not (tmp_path / "bundle").exists()


def test_the_chat_page_says_in_a_browser_what_the_bundle_says(decoder: Path, tmp_path: Path) -> None:
    browser()
    shutil.copytree(decoder / "web", tmp_path / "bundle")
    web.write_page(tmp_path / "bundle", MODULES)
    said = open_page(tmp_path / "bundle", QUESTION, tmp_path / "page.png")
    wanted = load(decoder / "web").generate([{"role": "user", "content": QUESTION}], max_new_tokens=256)
    assert said["answer"] == wanted
    assert "WebAssembly" in said["about"]
    assert said["elsewhere"] == []
    assert (tmp_path / "page.png").stat().st_size > 5000


def test_the_classifier_page_gives_the_same_labels(classifier: Path, tmp_path: Path) -> None:
    browser()
    shutil.copytree(classifier / "web", tmp_path / "bundle")
    web.write_page(tmp_path / "bundle", MODULES)
    said = open_page(tmp_path / "bundle", QUESTION, tmp_path / "page.png")
    wanted = load(classifier / "web").classify([QUESTION])[0]
    assert [entry["label"] for entry in said["answer"]] == [label for label, _ in wanted]
    found = [entry["score"] for entry in said["answer"]]
    np.testing.assert_allclose(found, [probability for _, probability in wanted], **tolerances.BROWSER_PROBABILITIES)
