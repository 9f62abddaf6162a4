"""`edgelora export --for web`: a demo page beside the bundle, by task: chat, a text, an image or a recording as input.

    index.html  page.js  worker.js  isolate.js  README.txt      always
    vendor/      transformers.js and ONNX Runtime for WebAssembly, where --vendor names them

Everything that the page loads is a file of the bundle's folder: it works without a network, and no input leaves the browser.
The files are from the npm packages @huggingface/transformers (Apache-2.0) and onnxruntime-web (MIT), which it depends on.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgelora import console
from edgelora.errors import SettingsError
from edgelora.export.passes.unpack_weights import UNPACKED_BYTES, unpack_weights, unpacked_bytes

PAGE = Path(__file__).parent / "page"
PAGE_FILES = ("index.html", "page.js", "worker.js", "isolate.js")
LIBRARY = "@huggingface/transformers/dist/transformers.min.js"
LICENSE = "@huggingface/transformers/LICENSE"
RUNTIME = "onnxruntime-web/dist"
RUNTIME_FILE = re.compile(r"ort-wasm-simd-threaded\.[a-z]+\.(?:mjs|wasm)")  # as the library names what it loads
README = """\
This folder is a bundle and a page that runs it in a browser. Serve it and open the page:

    python -m http.server -d . 8000        then http://localhost:8000

Any static file server does; from another machine it must be HTTPS, or the browser gives WebAssembly one thread only.
Opened as a file, without a server, browsers let no page read the files beside it.
"""
VENDOR = """
transformers.js is missing. Put it beside the page once:

    npm install --ignore-scripts @huggingface/transformers
    edgelora export … --for web --vendor node_modules --overwrite

or copy into vendor/: {files}
"""


def unpack_for_web(model: ir.Model, nodes: dict[str, dict[str, Any]]) -> None:
    """Let the browser unpack the weights when it loads them, and note in the nodes' facts where their codes and scales are.

    A model that would be too large for WebAssembly then keeps them packed, and is slow there.
    """
    size = unpacked_bytes(model)
    if size > UNPACKED_BYTES:
        console.warn(
            f"its weights take {size >> 20} MB unpacked, too much for a browser: they stay packed, which is slow there"
        )
        return
    for node in model.graph:
        if node.op_type == "MatMulNBits" and node.name in nodes:
            names = [value.name for value in node.inputs[1:3] if value is not None]
            inputs = node.attributes["K"].as_int()
            nodes[node.name]["unpacked"] = {"codes": names[0], "scales": names[1], "inputs": inputs}
    unpack_weights(model)


def write_page(folder: Path, vendor: Path | None) -> None:
    """Write the page into a bundle's folder. vendor: a node_modules folder whose transformers.js is copied along.

    Raises SettingsError where a file is not there.
    """
    for name in PAGE_FILES:
        shutil.copyfile(PAGE / name, folder / name)
    readme = README
    if vendor is None:
        readme += VENDOR.format(files=f"{LIBRARY} and {RUNTIME}/ort-wasm-simd-threaded.asyncify.{{mjs,wasm}}")
    else:
        sources = vendored(vendor)
        (folder / "vendor").mkdir()
        for source in sources:
            shutil.copyfile(source, folder / "vendor" / source.name)
    (folder / "README.txt").write_text(readme, encoding="utf-8")


def refuse_vendor(vendor: Path | None, device: str) -> None:
    """Raise SettingsError for a --vendor that is of no use, before anything is made."""
    if vendor is not None and device != "web":
        raise SettingsError("--vendor is for the page of --for web", hint="--for web --vendor node_modules")
    if vendor is not None:
        vendored(vendor)


def vendored(modules: Path) -> list[Path]:
    """Return the files that the page needs of a node_modules folder: the library, its license, and the runtime it names."""
    library = modules / LIBRARY
    if not library.is_file():
        raise SettingsError(
            f"{modules} has no {LIBRARY}", hint="npm install --ignore-scripts @huggingface/transformers; --vendor node_modules"
        )
    names = {Path(name).stem for name in RUNTIME_FILE.findall(library.read_text(encoding="utf-8"))}
    runtime = [modules / RUNTIME / f"{name}.{suffix}" for name in sorted(names) for suffix in ("mjs", "wasm")]
    if not runtime or (missing := [path for path in runtime if not path.is_file()]):
        raise SettingsError(f"{modules} lacks what transformers.js loads: {missing[0] if runtime else RUNTIME}")
    return [library, modules / LICENSE, *runtime]
