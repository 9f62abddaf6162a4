"""Data sets of the hub, against a local endpoint."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from edgelora.config import FinetuneConfig
from edgelora.data.prepare import prepare
from edgelora.errors import DataError
from tests import tiny


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as fetching one data set takes."""

    FILES: ClassVar = {
        "train.jsonl": b'{"prompt": "a", "completion": "x"}\n{"prompt": "b", "completion": "y"}\n',
        "notes.txt": b"not rows",
    }
    COMMIT = "0123456789012345678901234567890123456789"

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/api/datasets/someone/rows/revision/"):
            siblings = [{"rfilename": file} for file in self.FILES]
            self.answer(200, json.dumps({"id": "someone/rows", "sha": self.COMMIT, "siblings": siblings}).encode())
        elif self.path.startswith("/api/datasets/someone/rows/tree/"):
            entries = [{"type": "file", "path": file, "size": len(data), "oid": "0" * 40} for file, data in self.FILES.items()]
            self.answer(200, json.dumps(entries).encode())
        elif self.path.startswith("/datasets/someone/rows/resolve/") and name in self.FILES:
            self.answer(200, self.FILES[name])
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        facts = {"Content-Length": str(len(body)), "ETag": '"etag"', "X-Repo-Commit": self.COMMIT}
        for key, value in {"Content-Type": "application/json", **facts, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the tests' output clean."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    # The process that prepares rows reads these when it starts
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_data_set_is_fetched_once_and_found_again_without_a_network(hub: HTTPServer, tmp_path: Path) -> None:
    tiny.save_tokenizer(tmp_path / "model")
    fetched = prepare("someone/rows", tmp_path / "model", tmp_path / "first", FinetuneConfig(), max_length=64)
    assert fetched.rows == {"train": 1, "valid": 1}
    with pytest.raises(DataError, match=r'^"someone/none" is no file or folder here, and the hub gives no such data set: '):
        prepare("someone/none", tmp_path / "model", tmp_path / "none", FinetuneConfig(), max_length=64)
    hub.shutdown()
    hub.server_close()
    again = prepare("someone/rows", tmp_path / "model", tmp_path / "second", FinetuneConfig(), max_length=64)
    assert again.texts("valid") == fetched.texts("valid")
    with pytest.raises(DataError, match=r'^"someone/none" is no file or folder here, and the hub cannot be reached$'):
        prepare("someone/none", tmp_path / "model", tmp_path / "none", FinetuneConfig(), max_length=64)
