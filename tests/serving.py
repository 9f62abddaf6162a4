"""A server in this process for tests, and requests to it as bytes."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.config import ServeConfig
from edgelora.serve.server import Server, serve

JSON = {"Content-Type": "application/json"}
WAIT_S = 120.0


@dataclass
class Served:
    """A running server; `base_url` is what OpenAI's clients are given."""

    server: Server
    port: int

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
        """Return status, JSON and headers of a request; `body` is JSON unless it is bytes already."""
        connection = self.connect()
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, content, JSON if headers is None else headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        return response.status, answer, response.headers

    def post(self, path: str, body: Any) -> dict[str, Any]:
        """Return the answer to a request that must succeed."""
        status, answer, _ = self.send("POST", path, body)
        assert status == 200, answer
        return answer

    def refused(self, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        """Return status and error of a request."""
        status, answer, _ = self.send("POST", path, body)
        assert set(answer) == {"error"}, answer
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return status, answer["error"]


@contextmanager
def serving(bundle: Path, **settings: Any) -> Iterator[Served]:
    """Serve a bundle on a free port until the block ends."""
    ready, found, failed = threading.Event(), [], []

    def started(server: Server, url: str) -> None:
        found.append(Served(server, int(url.rpartition(":")[2])))
        ready.set()

    def run() -> None:
        try:
            serve(bundle, ServeConfig(**{"port": 0, **settings}), threads=1, started=started)
        except BaseException as error:
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(WAIT_S)
    if failed:
        raise failed[0]
    try:
        yield found[0]
    finally:
        found[0].server.should_exit = True
        thread.join(WAIT_S)
    assert not thread.is_alive()
    assert not failed, failed
