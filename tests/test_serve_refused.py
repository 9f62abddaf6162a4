"""What the server refuses: each a status, a message that names the field, never a traceback; and where it may listen."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import JSON, Served, serving

from edgelora.config import ServeConfig
from edgelora.errors import MachineError, SettingsError
from edgelora.serve.admit import is_local
from edgelora.serve.server import listen

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def served(decoder_bundle: Path) -> Iterator[Served]:
    with serving(decoder_bundle, max_body=100_000) as found:
        yield found


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, **fields}


def said(**message: Any) -> dict[str, Any]:
    return {"messages": [message]}


# path, body, status, what the message must say
MALFORMED: list[tuple[str, Any, int, str]] = [
    (CHAT, b"{", 400, "the body is not JSON"),
    (CHAT, b"", 400, "the body is not JSON"),
    (CHAT, b"\xff\xfe{}", 400, "the body is not UTF-8: byte 0"),
    (CHAT, b"[" * 50_000, 400, "nested too deeply"),
    (CHAT, b'{"messages": [], "temperature": NaN}', 400, "NaN is no number in JSON"),
    (CHAT, [1, 2], 400, "the body is a list; a JSON object is wanted"),
    (CHAT, said(role="user", content="half \ud83d"), 422, r"half a character (\ud83d)"),
    (CHAT, {}, 400, '"messages" is missing'),
    (CHAT, {"messages": []}, 400, '"messages" is empty'),
    (CHAT, {"messages": "hello"}, 400, '"messages" is a string'),
    (CHAT, {"messages": ["hello"]}, 400, '"messages[0]" is a string'),
    (CHAT, said(role="wizard", content="a"), 400, '"messages[0].role" is "wizard"; allowed: system'),
    (CHAT, said(role="user"), 400, '"messages[0].content" is missing'),
    (CHAT, said(role="user", content=[{"type": "image_url"}]), 400, 'is of the type "image_url"'),
    (CHAT, said(role="user", content="a", colour="red"), 400, '"messages[0].colour" is not a field'),
    (CHAT, chat(temperature=3), 400, '"temperature" is 3; allowed: 0 to 2'),
    (CHAT, chat(temperature="hot"), 400, '"temperature" is "hot"; a number is wanted'),
    (CHAT, chat(top_p=-0.1), 400, '"top_p" is -0.1; allowed: 0 to 1'),
    (CHAT, chat(max_tokens=0), 400, '"max_tokens" is 0; allowed: at least 1'),
    (CHAT, chat(max_tokens=True), 400, '"max_tokens" is true; a whole number is wanted'),
    (CHAT, chat(max_tokens=1, max_completion_tokens=2), 400, "give one of them"),
    (CHAT, chat(n=2), 400, '"n" can only be 1'),
    (CHAT, chat(logprobs=True), 400, '"logprobs" is not supported'),
    (CHAT, chat(tools=[{"type": "function"}]), 400, '"tools" is not supported'),
    (CHAT, chat(response_format={"type": "json_object"}), 400, '"response_format" can only be'),
    (CHAT, chat(frequency_penalty=1), 400, '"repetition_penalty" is there instead'),
    (CHAT, chat(stop=""), 400, '"stop" is ""'),
    (CHAT, chat(stop=["a", 1]), 400, '"stop" is ["a", 1]'),
    (CHAT, chat(seed=1.5), 400, '"seed" is 1.5; a whole number is wanted'),
    (CHAT, chat(stream="yes"), 400, '"stream" is a string; true or false is wanted'),
    (CHAT, chat(stream_options={"include_usage": True}), 400, 'only allowed with "stream": true'),
    (CHAT, chat(stream=True, stream_options={"usage": True}), 400, '"usage" is not a field'),
    (CHAT, chat(temprature=1), 400, 'Did you mean "temperature"?'),
    (CHAT, chat(model="gpt-9"), 404, 'there is no model "gpt-9". Models: bundle'),
    (CHAT, chat(model=7), 400, '"model" is a whole number; a string is wanted'),
    (CHAT, said(role="user", content="x" * 2000), 400, "this bundle takes at most 1024"),
    (CHAT, {**said(role="user", content="x" * 2000), "stream": True}, 400, "this bundle takes at most 1024"),
    (TEXT, {}, 400, '"prompt" is missing'),
    (TEXT, {"prompt": ["a", "b"]}, 400, "a list of 2 prompts"),
    (TEXT, {"prompt": [1, 999_999]}, 400, "has the token 999999"),
    (TEXT, {"prompt": [1, -1]}, 400, "one text, or one list of tokens"),
    (TEXT, {"prompt": ""}, 400, '"prompt" is empty'),
    (TEXT, {"prompt": "a", "echo": True}, 400, '"echo" can only be false'),
    (TEXT, {"prompt": "a", "logprobs": 0}, 400, '"logprobs" is not supported'),
    (TEXT, {"prompt": "a" * 200_000}, 413, "more than 100000 bytes"),
    ("/v1/embeddings", {"input": "a"}, 404, "it answers /v1/chat/completions and /v1/completions"),
    ("/v1/classify", {"input": "a"}, 404, "it answers /v1/chat/completions and /v1/completions"),
    ("/v1/nothing", {}, 404, 'there is no "/v1/nothing"'),
]


def test_malformed_requests_are_refused_with_a_message(served: Served) -> None:
    wrong = []
    for path, body, status, words in MALFORMED:
        found, error = served.refused(path, body)
        if found != status or words not in error["message"] or error["type"] != "invalid_request_error":
            wrong.append((path, str(body)[:80], found, error["message"][:200]))
    assert wrong == []
    assert served.post(TEXT, {"prompt": "a", "max_tokens": 1})["object"] == "text_completion", "it is still there"


def test_fields_that_change_nothing_are_accepted(served: Served) -> None:
    neutral = {"n": 1, "logprobs": False, "tools": [], "presence_penalty": 0, "user": "me", "store": False, "stop": None}
    neutral |= {"response_format": {"type": "text"}, "logit_bias": None, "metadata": {"a": "b"}, "parallel_tool_calls": True}
    assert served.post(CHAT, chat(max_tokens=1, **neutral))["object"] == "chat.completion"


def test_methods_types_and_foreign_pages(served: Served) -> None:
    status, answer, headers = served.send("GET", CHAT)
    assert (status, headers["Allow"]) == (405, "POST")
    assert answer["error"]["message"] == f"GET is not allowed for {CHAT}; allowed: POST"
    body = json.dumps(chat(max_tokens=1)).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, answer, _ = served.send("POST", CHAT, body, {"Content-Type": kind})
        assert status == 415
        assert '"application/json" is wanted' in answer["error"]["message"]
    status, answer, _ = served.send("POST", CHAT, body, {**JSON, "Host": "evil.example"})
    assert (status, answer["error"]["code"]) == (403, "foreign_host")
    assert served.send("POST", CHAT, body, {**JSON, "Host": "localhost:80"})[0] == 200
    assert served.send("GET", "/health")[1]["status"] == "ok"


def test_a_defect_is_a_500_without_its_text(served: Served, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(ids: list[int], fixed: int = 0) -> None:
        raise ValueError("/a/secret/path")

    monkeypatch.setattr(served.server.worker.model.generator, "feed", fail)
    for stream in (False, True):
        status, error = served.refused(TEXT, {"prompt": "a", "stream": stream})
        assert (status, error["type"], error["message"]) == (500, "server_error", "the server has failed on this request")
    assert "warning: a request failed: ValueError: /a/secret/path" in capsys.readouterr().err
    monkeypatch.undo()
    assert served.post(TEXT, {"prompt": "a", "max_tokens": 1})["object"] == "text_completion"


def test_the_key_is_asked_for(decoder_bundle: Path) -> None:
    with serving(decoder_bundle, api_key="schlüssel") as served:
        wrong = [{}, {"Authorization": "Bearer no"}, {"Authorization": "Basic schlüssel".encode().decode("latin-1")}]
        for headers in wrong:
            status, answer, found = served.send("GET", "/v1/models", headers=headers)
            assert (status, answer["error"]["code"], found["WWW-Authenticate"]) == (401, "invalid_api_key", "Bearer")
        right = {"Authorization": "Bearer schlüssel".encode().decode("latin-1"), "Host": "any.example"}
        assert served.send("GET", "/v1/models", headers=right)[0] == 200
        assert served.send("GET", "/health", headers={})[0] == 200


def test_where_it_listens() -> None:
    with pytest.raises(SettingsError) as caught:
        listen(ServeConfig(host="0.0.0.0", port=0))
    assert caught.value.message == "0.0.0.0 can be reached from other machines; that needs an API key"
    with pytest.raises(SettingsError, match="the API key is empty"):
        listen(ServeConfig(port=0, api_key=""))
    with pytest.raises(SettingsError, match="is no address of this machine"):
        listen(ServeConfig(host="no such host", port=0))
    listen(ServeConfig(host="0.0.0.0", port=0, api_key="k")).close()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(MachineError, match="cannot listen at 127"):
        listen(ServeConfig(port=taken.getsockname()[1]))


@pytest.mark.parametrize(
    ("host", "local"),
    [("localhost", True), ("LOCALHOST:80", True), ("127.0.0.1:8000", True), ("[::1]:8000", True), ("127.1.2.3", True),
     ("", False), ("localhost.evil.example", False), ("192.168.0.2:8000", False), ("[::2]", False),
     ("127.0.0.1.nip.io", False)],
)  # fmt: skip
def test_local_hosts(host: str, local: bool) -> None:
    assert is_local(host) is local
