"""The objects that answers are made of, as OpenAI's API reference has them, and /v1/classify's own."""

from __future__ import annotations

import base64
import json
import secrets
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgelora.serve.requests import CHAT, ClassifyRequest, EmbedRequest, TextRequest

FINISH = {"end": "stop", "stop": "stop", "length": "length", "context": "length"}  # ours → OpenAI's
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Written:
    """How an answer ended. `cached` tokens of the prompt were in the cache from the request before."""

    finish: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class TextReply:
    """The answer to one request, whole or in chunks; all of them carry one id and one time."""

    request: TextRequest
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""

    def __post_init__(self) -> None:
        self.is_chat = self.request.kind == CHAT
        self.id = ("chatcmpl-" if self.is_chat else "cmpl-") + secrets.token_hex(12)

    def whole(self, text: str, written: Written) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"message": message} if self.is_chat else {"text": text}
        finish = FINISH[written.finish]
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._object(kind, [{"index": 0, **choice, "logprobs": None, "finish_reason": finish}], written.usage())

    def first(self) -> list[bytes]:
        """Return the events before any text: a chat's names the role."""
        return [self._chunk({"role": "assistant", "content": ""}, "")] if self.is_chat else []

    def piece(self, text: str) -> bytes:
        return self._chunk({"content": text}, text)

    def last(self, written: Written) -> list[bytes]:
        """Return the events after the text: why it ended, the usage if asked for, the end of the stream."""
        events = [self._chunk({}, "", FINISH[written.finish])]
        if self.request.include_usage:
            events.append(event(self._object(self._chunk_kind, [], written.usage())))
        return [*events, DONE]

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _chunk(self, delta: dict[str, str], text: str, finish: str | None = None) -> bytes:
        content: dict[str, Any] = {"delta": delta} if self.is_chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        return event(self._object(self._chunk_kind, [choice], None))

    def _object(self, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        found = {"id": self.id, "object": kind, "created": self.created, "model": self.request.model, "choices": choices}
        return found if usage is None and not self.request.include_usage else {**found, "usage": usage}


def classified(request: ClassifyRequest, answers: Sequence[Any]) -> dict[str, Any]:
    """Return the answer of /v1/classify: for each text its label, and labels with probabilities, the most probable first; of
    other tasks what `edgelora run --json` has."""
    data = []
    for index, answer in enumerate(answers):
        found = {**answer[0], "labels": answer[: request.top]} if isinstance(answer, list) else answer
        data.append({"index": index, **found})
    return {"object": "list", "model": request.model, "data": data}


def embedded(request: EmbedRequest, answers: Sequence[Any], tokens: int) -> dict[str, Any]:
    """Return the answer of /v1/embeddings, each embedding as numbers or as the base64 of their fp32, low byte first."""
    data = []
    for index, answer in enumerate(answers):
        numbers = answer["embedding"]
        packed = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode("ascii") if request.base64 else numbers
        data.append({"object": "embedding", "index": index, "embedding": packed})
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": request.model, "data": data, "usage": usage}


def event(content: dict[str, Any]) -> bytes:
    """Return one server-sent event (HTML Living Standard, section 9.2), in ASCII: some clients take U+2028 for a line's end."""
    return b"data: " + json.dumps(content).encode("ascii") + b"\n\n"
