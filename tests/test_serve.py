"""The server: OpenAI's own client, answers equal to `edgelora run`'s, many at once, clients that leave, a clean end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tolerances
from serving import WAIT_S, Served, serving

import edgelora
from edgelora.run.model import load

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "safetensors", "sklearn", "optimum")
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def served(decoder_bundle: Path) -> Iterator[Served]:
    with serving(decoder_bundle) as found:
        yield found


@pytest.fixture(scope="module")
def model(decoder_bundle: Path) -> edgelora.Model:
    return edgelora.load(decoder_bundle, threads=1)


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=served.base_url, api_key="none", max_retries=0, timeout=WAIT_S) as found:
        yield found


def test_openai_client_gets_what_run_writes(client: Any, model: edgelora.Model) -> None:
    wanted = model.answer("hello", max_new_tokens=12)
    name = client.models.list().data[0].id
    assert name == "bundle"
    assert client.models.retrieve(name).owned_by == "edgelora"
    found = client.chat.completions.create(model=name, messages=HELLO, max_tokens=12)
    assert found.choices[0].message.content == wanted.text
    assert found.choices[0].finish_reason == {"end": "stop", "length": "length"}[wanted.finish]
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(wanted.prompt), len(wanted.tokens))
    again = client.chat.completions.create(model=name, messages=HELLO, max_completion_tokens=12)
    assert again.choices[0].message.content == wanted.text
    assert again.usage.prompt_tokens_details.cached_tokens == len(wanted.prompt) - 1, "the cache is used again"
    history = [*HELLO, again.choices[0].message.model_dump(), {"role": "user", "content": [{"type": "text", "text": "a"}]}]
    told = [HELLO[0], {"role": "assistant", "content": wanted.text}, {"role": "user", "content": "a"}]
    longer = client.chat.completions.create(model=name, messages=history, max_tokens=3)
    assert longer.choices[0].message.content == model.generate(told, max_new_tokens=3)


def test_openai_client_streams_the_same(client: Any, model: edgelora.Model) -> None:
    wanted = model.answer("hello", max_new_tokens=12)
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model="bundle", messages=HELLO, max_tokens=12, stream=True, stream_options=options)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == wanted.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason is None for chunk in chunks[:-1]] == [True] * (len(chunks) - 2) + [False]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == len(wanted.prompt) + len(wanted.tokens)
    assert len({chunk.id for chunk in chunks}) == 1
    text = client.completions.create(model="bundle", prompt="hello", max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in text) == model.generate("hello", max_new_tokens=8, raw=True)


def test_completions_take_text_and_tokens(client: Any, model: edgelora.Model) -> None:
    wanted = model.answer("hello", max_new_tokens=8, raw=True)
    for prompt in ("hello", ["hello"], wanted.prompt, [wanted.prompt]):
        found = client.completions.create(model="bundle", prompt=prompt, max_tokens=8)
        assert (found.object, found.choices[0].text) == ("text_completion", wanted.text)


def test_settings_reach_the_answer(served: Served, model: edgelora.Model) -> None:
    def ask(**settings: Any) -> str:
        return str(served.post("/v1/completions", {"prompt": "hello", "max_tokens": 16, **settings})["choices"][0]["text"])

    text = ask()
    stop = text[2:4]
    assert ask(stop=stop) == ask(stop=["no such text", stop]) == text[: text.index(stop)]
    sampled = {"temperature": 1.5, "top_p": 0.9, "top_k": 50}
    wanted = model.generate("hello", max_new_tokens=16, raw=True, seed=7, **sampled)
    assert ask(seed=7, **sampled) == wanted
    assert len({ask(**sampled) for _ in range(4)}) > 1, "without a seed each answer is drawn anew"
    assert ask(temperature=2, top_p=0) == text, "top_p 0 keeps the likeliest token alone"
    assert ask(repetition_penalty=5) == model.generate("hello", max_new_tokens=16, raw=True, repetition_penalty=5)
    finish = served.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1})["choices"][0]["finish_reason"]
    assert finish == "length"


def test_a_system_turn_is_computed_once(served: Served, model: edgelora.Model) -> None:
    """A second request with the same one, after a request without it, computes its own part alone and answers the same."""
    system = {"role": "system", "content": "You are the assistant of a home, and you answer in few words."}

    def ask(text: str, *first: dict[str, str]) -> tuple[str, int, int]:
        messages = [*first, {"role": "user", "content": text}]
        found = served.post("/v1/chat/completions", {"messages": messages, "max_tokens": 8})
        assert found["choices"][0]["message"]["content"] == model.generate(messages, max_new_tokens=8)
        usage = found["usage"]
        return text, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]

    ask("light on", system)
    assert ask("something else entirely")[2] < 8
    text, asked, reused = ask("music off", system)
    assert len(system["content"]) < reused < asked
    assert asked - reused <= len(text) + 3, "the text, and the template's turns around it"


async def ask_raw(port: int, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    """Return status and body of a request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    answer = await asyncio.wait_for(reader.read(), WAIT_S)
    writer.close()
    headers, _, rest = answer.partition(b"\r\n\r\n")
    return int(headers.split()[1]), rest


def test_200_requests_at_once_are_all_answered_right(served: Served, model: edgelora.Model) -> None:
    words = ["a", "bc", "hello", "you", "and I", "where?", "1 2 3"]
    wanted = {word: model.generate(word, max_new_tokens=4, raw=True) for word in words}

    async def ask(number: int) -> tuple[str, str]:
        word, stream = words[number % len(words)], number % 3 == 0
        body = {"prompt": word, "max_tokens": 4, "stream": stream}
        status, content = await ask_raw(served.port, "/v1/completions", body)
        assert status == 200, content
        if not stream:
            return word, json.loads(content)["choices"][0]["text"]
        parts = [line[6:] for line in content.splitlines() if line.startswith(b"data: ")]
        assert parts[-1] == b"[DONE]"
        return word, "".join(json.loads(part)["choices"][0]["text"] for part in parts[:-1])

    async def all_of_them() -> list[tuple[str, str]]:
        return await asyncio.gather(*(ask(number) for number in range(200)))

    answers = asyncio.run(all_of_them())
    assert len(answers) == 200
    assert [(word, text) for word, text in answers if text != wanted[word]] == []


def test_classify(classifier_bundle: Path) -> None:
    model = edgelora.load(classifier_bundle, threads=1)
    texts = [f"text {number}" * (number % 5 + 1) for number in range(40)]
    wanted = model.classify(texts)
    with serving(classifier_bundle) as served:
        whole = served.post("/v1/classify", {"input": texts, "model": "bundle"})
        assert [entry["index"] for entry in whole["data"]] == list(range(40))

        async def one_by_one() -> list[tuple[int, bytes]]:
            asks = (ask_raw(served.port, "/v1/classify", {"input": text, "top": 2}) for text in texts)
            return await asyncio.gather(*asks)

        singles = [json.loads(content)["data"][0] for _, content in asyncio.run(one_by_one())]
        for entry, single, labelled in zip(whole["data"], singles, wanted, strict=True):
            assert [found["label"] for found in entry["labels"]] == [label for label, _ in labelled]
            assert entry["probability"] == pytest.approx(labelled[0][1], abs=tolerances.PADDED_BATCH)
            assert single["label"] == labelled[0][0]
            assert len(single["labels"]) == 2
        pair = served.post("/v1/classify", {"input": {"text": "a", "text_pair": "b"}})["data"][0]
        assert pair["probability"] == pytest.approx(model.classify([("a", "b")])[0][0][1], abs=tolerances.PADDED_BATCH)
        for path in ("/v1/chat/completions", "/v1/embeddings"):
            status, error = served.refused(path, {"messages": HELLO})
            assert (status, error["code"]) == (404, "not_this_bundle")
            assert "text-classification" in error["message"]


def test_an_adapter_acts_where_it_is_the_model(swap_base: Path, tmp_path: Path, decoder_model: Path) -> None:
    from test_swap import a_run

    from edgelora.export.onto import add_adapter

    bundle = Path(shutil.copytree(swap_base / "fp32", tmp_path / "base"))
    add_adapter(a_run(tmp_path / "run", decoder_model), bundle, name="lights")
    base, lights = (load(bundle, threads=1, adapter=name).generate("hello", max_new_tokens=8) for name in (None, "lights"))
    assert base != lights
    with serving(bundle) as served:
        names = [entry["id"] for entry in served.send("GET", "/v1/models")[1]["data"]]
        assert names == ["base", "lights"]
        for name, text in (("base", base), ("lights", lights), ("base", base)):
            found = served.post("/v1/chat/completions", {"model": name, "messages": HELLO, "max_tokens": 8})
            assert (found["model"], found["choices"][0]["message"]["content"]) == (name, text)


def slow(served: Served, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> list[int]:
    """Make each token take its time and be a letter, so that each is a piece of text; return the tokens as they come."""
    generator, steps = served.server.worker.model.generator, []
    step = generator.step

    def taken(token: int) -> Any:
        time.sleep(seconds)
        steps.append(token)
        logits = step(token)
        logits[:] = 0
        logits[ord("a") - ord("!")] = 1  # the byte-level alphabet begins with "!"
        return logits

    monkeypatch.setattr(generator, "step", taken)
    return steps


def wait_until(condition: Any) -> bool:
    end = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer(served: Served, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    steps, worker = slow(served, monkeypatch), served.server.worker
    connection = served.connect()
    body = json.dumps({"prompt": "hello", "max_tokens": 900, "stream": stream})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    assert wait_until(lambda: len(steps) > 3)
    connection.close()
    if stream:
        connection.sock = None
    assert wait_until(lambda: not worker.current)
    assert len(steps) < 500
    monkeypatch.undo()
    assert served.post("/v1/completions", {"prompt": "hello", "max_tokens": 2})["usage"]["completion_tokens"] <= 2


def test_full_queue_and_deadline(decoder_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = {"prompt": "hello", "max_tokens": 900}
    with serving(decoder_bundle, queue=1, timeout=1.0) as served:
        slow(served, monkeypatch)
        worker = served.server.worker

        async def crowd() -> list[tuple[int, bytes]]:
            first = asyncio.create_task(ask_raw(served.port, "/v1/completions", {**long, "stream": True}))
            await asyncio.to_thread(wait_until, lambda: worker.current)
            second = asyncio.create_task(ask_raw(served.port, "/v1/completions", long))
            await asyncio.to_thread(wait_until, lambda: worker.waiting)
            third = await ask_raw(served.port, "/v1/completions", long)
            return [await first, await second, third]

        streamed, waited, refused = asyncio.run(crowd())
        assert refused[0] == 429
        assert json.loads(refused[1])["error"]["code"] == "queue_full"
        assert waited[0] == 503
        assert json.loads(waited[1])["error"]["code"] == "timeout"
        assert streamed[0] == 200, "its status was sent before"
        assert b'"code": "timeout"' in streamed[1]
        assert wait_until(lambda: not worker.current and not worker.waiting)


def test_ctrl_c_ends_it_and_nothing_heavy_was_imported(decoder_bundle: Path, tmp_path: Path) -> None:
    code = (
        "import signal, sys, threading, urllib.request\n"
        "from edgelora.serve import server\n"
        "serve = server.serve\n"
        "def ask(url):\n"
        '    request = urllib.request.Request(url + \'/v1/completions\', b\'{"prompt": "a", "max_tokens": 2}\',\n'
        "                                     {'Content-Type': 'application/json'})\n"
        "    status = urllib.request.urlopen(request).status\n"
        "    sys.stderr.write(f'\\nstatus {status}\\n')\n"  # a line of its own, whatever else is being written
        "    signal.raise_signal(signal.SIGINT)\n"
        "def started(running, url):\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    threading.Thread(target=ask, args=[url]).start()\n"
        "server.serve = lambda *given, **named: serve(*given, **named, started=started)\n"
        "sys.argv = ['edgelora', 'serve', sys.argv[1], '--port', '0', '--threads', '1', '--json']\n"
        "from edgelora.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print('code', end.code, file=sys.stderr)\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(decoder_bundle)],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment, timeout=WAIT_S,
    )  # fmt: skip
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("text-generation at http://127.0.0.1:"), done.stderr
    assert "status 200" in lines
    assert lines[-3:] == ["Stopped.", "code 0", "[]"], done.stderr
    assert json.loads(done.stdout)["requests"] == 1
