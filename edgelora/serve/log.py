"""One line on stderr for each request: method, path, status, seconds, tokens; never what was asked or answered."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from edgelora import console


class Logged:
    """ASGI middleware; a streamed answer is logged when it ends."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            path = ascii(scope["path"])[1:-1]  # it may hold line breaks and control characters
            parts = [f"{scope['method']} {path[:80]} {status}", f"{time.perf_counter() - started:.2f} s", scope.get("edgelora")]
            console.say("  ".join(part for part in parts if part))
