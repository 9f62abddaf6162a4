"""Hub ids against a small hub of our own on loopback, with huggingface_hub's own client; then without any hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import tiny

from edgelora.models.hub import looks_like_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPEN = """
import json, sys
from edgelora.errors import EdgeLoRAError
from edgelora.models.source import open_model
try:
    source = open_model(sys.argv[1])
    files = sorted(p.name for p in source.folder.iterdir())
    print(json.dumps({"names": len(source.names()), "files": files, "license": source.license}))
except EdgeLoRAError as error:
    print(json.dumps({"error": type(error).__name__, "message": error.message, "hint": error.hint}))
"""


def handler(folder: Path, asked: list[str]) -> type[BaseHTTPRequestHandler]:
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(self.path.split("?")[0])
            asked.append(path)
            if path.startswith("/api/models/acme/tiny"):
                files = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
                tree = [{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": COMMIT} for f in files]
                listing = {"id": "acme/tiny", "sha": COMMIT, "siblings": [{"rfilename": f} for f in files], "private": False}
                self.answer(json.dumps(tree if "/tree/" in path else listing).encode())
            elif path.startswith("/acme/tiny/resolve/"):
                self.answer((folder / path.split("/", 5)[5]).read_bytes())
            else:
                self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def answer(self, body: bytes, status: int = 200, extra: dict[str, str] | None = None) -> None:
            self.send_response(status)
            headers = {"Content-Length": str(len(body)), "ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            for name, value in (headers | (extra or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[ThreadingHTTPServer, list[str]]]:
    folder = tiny.save_decoder(tmp_path / "served")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that must stay where it is")
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(folder, asked))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server, asked
    server.shutdown()
    server.server_close()
    thread.join()


def opened(reference: str, home: Path, port: int, **more: str) -> dict[str, object]:
    """Open a model in a process of its own, since huggingface_hub reads its environment at import."""
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HUB_DISABLE_XET": "1",
        **more,
    }
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy", "HF_TOKEN"):
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-c", OPEN, reference], capture_output=True, text=True, env=environment, check=True
    )
    return dict(json.loads(result.stdout.strip().splitlines()[-1]))


def test_fetched_once_then_used_offline(hub: tuple[ThreadingHTTPServer, list[str]], tmp_path: Path) -> None:
    server, asked = hub
    first = opened("acme/tiny", tmp_path / "home", server.server_port)
    assert first["license"] == "apache-2.0"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(first["files"])  # type: ignore[call-overload]
    assert not any("pytorch_model.bin" in path for path in asked)
    asked.clear()
    assert opened("acme/tiny", tmp_path / "home", server.server_port, HF_HUB_OFFLINE="1") == first
    assert asked == []
    # no hub listens on port 9: what was fetched is used
    assert opened("acme/tiny", tmp_path / "home", 9) == first


def test_a_model_that_the_hub_does_not_have(hub: tuple[ThreadingHTTPServer, list[str]], tmp_path: Path) -> None:
    server, _ = hub
    found = opened("acme/typo", tmp_path / "home", server.server_port)
    assert found == {
        "error": "ModelError",
        "message": "the hub has no model acme/typo, or it is private, and there is no such path here",
        "hint": "hf auth login",
    }


def test_never_fetched_and_offline(tmp_path: Path) -> None:
    found = opened("acme/tiny", tmp_path / "home", 9, HF_HUB_OFFLINE="1")
    assert found["error"] == "MachineError"
    assert str(found["message"]).startswith("acme/tiny is not here and could not be fetched: ")
    assert found["hint"] == "connect once to fetch it, or give a folder, a .gguf file or package:NAME"


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("acme/tiny", True),
        ("acme/tiny@v1.0", True),
        ("./acme/tiny", False),
        ("/acme/tiny", False),
        ("tiny", False),
        ("a/b/c", False),
    ],
)
def test_what_looks_like_a_hub_id(reference: str, expected: bool) -> None:
    assert looks_like_hub_id(reference) is expected
