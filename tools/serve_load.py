"""Load test of `edgelora serve`: many clients at once, answers compared with `edgelora run`'s.

    tools/bench_serve BUNDLE                              # 64 requests, 8 at once, 32 tokens each
    tools/bench_serve BUNDLE --requests 200 --at-once 200 --max-tokens 8 --json

Decoders stream chats (text where there is no chat template), so that the first token's time is seen; classifiers are asked for
one text at a time. Latency is from sending a request to the end of its answer, waiting included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import edgelora
from edgelora import console
from edgelora.run.model import Model

PROMPTS = (
    "What is the capital of France?",
    "Write a sentence about the sea.",
    "Turn the kitchen light off.",
    "Name three colours.",
    "Where is my card?",
    "Why is the sky blue?",
)
WAIT_S = 600.0


async def ask(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send one request and return its text or label, its tokens and its times in seconds; `error` where it failed."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    status, first, lines = (await reader.readline()).decode(), 0.0, []
    while line := await reader.readline():
        lines.append(line)
        first = first or (time.perf_counter() - started if line.startswith((b"data:", b"{")) else 0.0)
    writer.close()
    found: dict[str, Any] = {"seconds": time.perf_counter() - started, "first": first, "tokens": 0, "output": ""}
    if " 200 " not in status:
        return {**found, "error": status.strip() + " " + lines[-1].decode()}
    for line in lines:
        if line.startswith(b"data: {"):
            read_chunk(json.loads(line[6:]), found)
        elif line.startswith(b"{"):
            found["output"] = json.loads(line)["data"][0]["label"]
    return found


def read_chunk(chunk: dict[str, Any], found: dict[str, Any]) -> None:
    if "error" in chunk:
        found["error"] = chunk["error"]["message"]
        return
    for choice in chunk["choices"]:
        found["output"] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
    if chunk.get("usage"):
        found["tokens"] = chunk["usage"]["completion_tokens"]


async def load(port: int, asked: list[tuple[str, dict[str, Any]]], at_once: int) -> list[dict[str, Any]]:
    """Send all requests, `at_once` of them in flight, and return what came of each in order."""
    places = asyncio.Semaphore(at_once)

    async def one(path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with places:
            return await asyncio.wait_for(ask(port, path, body), WAIT_S)

    return await asyncio.gather(*(one(path, body) for path, body in asked))


def requests_for(model: Model, count: int, max_tokens: int) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """Return (path, body) of each request, and the answers that `edgelora run` gives."""
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(count)]
    if model.task != "text-generation":
        wanted = {prompt: model.classify([prompt])[0][0][0] for prompt in PROMPTS}
        return [("/v1/classify", {"input": prompt, "top": 1}) for prompt in prompts], [wanted[prompt] for prompt in prompts]
    settings = {"max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
    chats = model.generator.tokenizer.chat_template is not None
    answers = {prompt: model.generate(prompt, max_new_tokens=max_tokens, raw=not chats) for prompt in PROMPTS}
    asked: list[tuple[str, dict[str, Any]]] = []
    for prompt in prompts:
        if chats:
            asked.append(("/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}], **settings}))
        else:
            asked.append(("/v1/completions", {"prompt": prompt, **settings}))
    return asked, [answers[prompt] for prompt in prompts]


def measured(results: list[dict[str, Any]], wanted: list[str], seconds: float) -> dict[str, Any]:
    """Return the figures of a run of all requests."""
    good = [found for found in results if "error" not in found]
    right = sum("error" not in found and found["output"] == text for found, text in zip(results, wanted, strict=True))
    figures: dict[str, Any] = {"requests": len(results), "failed": len(results) - len(good), "right": right}
    figures |= {"seconds": seconds, "requests_per_s": len(good) / seconds}
    figures["tokens_per_s"] = sum(found["tokens"] for found in good) / seconds or None
    for name, key in (("latency", "seconds"), ("first_token", "first")):
        times = [found[key] for found in good] or [float("nan")]
        figures |= {f"{name}_p50_s": float(np.percentile(times, 50)), f"{name}_p95_s": float(np.percentile(times, 95))}
    figures["errors"] = sorted({found["error"] for found in results if "error" in found})[:5]
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    console.configure(json_output=given.json)
    model = edgelora.load(given.bundle, threads=given.threads)
    asked, wanted = requests_for(model, given.requests, given.max_tokens)
    del model
    threads = [] if given.threads is None else ["--threads", str(given.threads)]
    command = [sys.executable, "-m", "edgelora", "serve", str(given.bundle), "--port", "0", *threads]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8") as server:
        assert server.stderr is not None
        line = server.stderr.readline()
        try:
            port = int(line.split(" at http://127.0.0.1:")[1].split("/")[0])
            threading.Thread(target=server.stderr.read, daemon=True).start()  # so that the pipe of its log never fills
            figures = asyncio.run(run_all(port, asked, wanted, given.at_once))
        except IndexError:
            print(line + server.stderr.read(), file=sys.stderr)
            return 2
        finally:
            server.terminate()
    console.table(f"edgelora serve, {given.at_once} at once", [{"": key, "measured": value} for key, value in figures.items()])
    console.emit(figures)
    return 0 if figures["right"] == figures["requests"] else 1


async def run_all(port: int, asked: list[tuple[str, dict[str, Any]]], wanted: list[str], at_once: int) -> dict[str, Any]:
    """Warm up with one request, then measure."""
    await load(port, asked[:1], 1)
    started = time.perf_counter()
    results = await load(port, asked, at_once)
    return measured(results, wanted, time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
