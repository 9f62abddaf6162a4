"""What a request asks for: JSON to a checked prompt with its settings, or to texts with the number of labels.

Fields and ranges are those of OpenAI's API reference; `top_k`, `min_p` and `repetition_penalty` are ours. Defaults are those of
`edgelora run`, so that the same prompt gets the same answer: greedy, at most 256 tokens.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgelora.config import GenerateConfig, replace
from edgelora.errors import did_you_mean
from edgelora.serve.fields import SHOWN, Fields, name_of, shown
from edgelora.serve.refusal import Refusal, wrong

Models = Mapping[str, str | None]  # the names that requests may use → the adapter that acts, None for the bundle as it is

CHAT, TEXT = "chat", "text"
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MAX_STOPS = 16
MAX_TEXTS = 1024  # of one request to classify
MIN_TOP_P = 1e-6  # OpenAI allows 0, which keeps the likeliest token alone
SEEDS = 1 << 64


@dataclass(frozen=True)
class TextRequest:
    """A chat (`prompt` holds its messages) or a text to be continued, as text or as tokens."""

    kind: str  # CHAT or TEXT
    model: str
    adapter: str | None
    prompt: str | list[int] | list[dict[str, str]]
    config: GenerateConfig
    stream: bool
    include_usage: bool


@dataclass(frozen=True)
class ClassifyRequest:
    model: str
    adapter: str | None
    rows: list[dict[str, Any]]
    top: int | None


@dataclass(frozen=True)
class EmbedRequest:
    model: str
    adapter: str | None
    texts: list[str]
    base64: bool


def chat_request(body: Mapping[str, Any], models: Models) -> TextRequest:
    """Read a request to /v1/chat/completions. Raises Refusal."""
    fields = Fields(body)
    messages = fields.take("messages")
    if not isinstance(messages, list) or not messages:
        found = "missing" if messages is None else "empty" if messages == [] else name_of(messages)
        raise wrong("messages", f'is {found}; a list of {{"role": …, "content": …}} is wanted')
    prompt = [read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    fields.only("logprobs", (False,), "is not supported: no probabilities are given")
    fields.only("top_logprobs", (0,), "is not supported: no probabilities are given")
    for name in ("tools", "functions"):
        fields.only(name, ([],), "is not supported: this server calls no tools")
    for name in ("tool_choice", "function_call"):
        fields.only(name, ("none", "auto"), "is not supported: this server calls no tools")
    fields.only("modalities", (["text"],), 'can only be ["text"]')
    fields.only("response_format", ({"type": "text"},), 'can only be {"type": "text"}: answers are not held to a grammar')
    fields.ignore("parallel_tool_calls")
    return read_rest(fields, CHAT, prompt, models)


def completion_request(body: Mapping[str, Any], models: Models) -> TextRequest:
    """Read a request to /v1/completions. Raises Refusal."""
    fields = Fields(body)
    prompt = fields.take("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    tokens = isinstance(prompt, list) and bool(prompt) and all(type(token) is int and token >= 0 for token in prompt)
    if not isinstance(prompt, str) and not tokens:
        several = isinstance(prompt, list) and len(prompt) > 1 and isinstance(prompt[0], str | list)
        found = "missing" if prompt is None else f"a list of {len(prompt)} prompts" if several else shown(prompt)
        raise wrong("prompt", f"is {found}; one text, or one list of tokens, is wanted")
    fields.only("logprobs", (), "is not supported: no probabilities are given")
    fields.only("best_of", (1,), "can only be 1: there is one answer to a request")
    fields.only("echo", (False,), "can only be false: the prompt is not repeated")
    fields.only("suffix", ("",), "is not supported: text is continued, not filled in")
    return read_rest(fields, TEXT, prompt, models)


def classify_request(body: Mapping[str, Any], models: Models, asked: Sequence[str]) -> ClassifyRequest:
    """Read a request to /v1/classify, whose rows may have the columns `asked`. Raises Refusal."""
    fields = Fields(body)
    given = fields.take("input")
    if given is None:
        raise wrong("input", f"is missing; {form(asked)}, or a list of these, is wanted")
    items = given if isinstance(given, list) else [given]
    if not 0 < len(items) <= MAX_TEXTS:
        raise wrong("input", f"has {len(items)} texts; allowed: 1 to {MAX_TEXTS}")
    places = [f"input[{index}]" if isinstance(given, list) else "input" for index in range(len(items))]
    rows = [read_row(item, where, asked) for item, where in zip(items, places, strict=True)]
    top = fields.whole("top", 1)
    name = read_model(fields, models)
    fields.ignore("user")
    fields.finish()
    return ClassifyRequest(name, models[name], rows, top)


def embed_request(body: Mapping[str, Any], models: Models, width: int) -> EmbedRequest:
    """Read a request to /v1/embeddings for embeddings of `width` numbers. Raises Refusal."""
    fields = Fields(body)
    given = fields.take("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        found = "missing" if given is None else shown(given)
        raise wrong("input", f"is {found}; a text or a list of texts is wanted")
    if not 0 < len(texts) <= MAX_TEXTS:
        raise wrong("input", f"has {len(texts)} texts; allowed: 1 to {MAX_TEXTS}")
    form = fields.text("encoding_format")
    if form not in (None, "float", "base64"):
        raise wrong("encoding_format", f'is {shown(form)}; allowed: "float", "base64"')
    fields.only("dimensions", (width,), f"can only be {width}: the model's own")
    name = read_model(fields, models)
    fields.ignore("user")
    fields.finish()
    return EmbedRequest(name, models[name], texts, form == "base64")


def read_message(message: Any, where: str) -> dict[str, str]:
    """Return a message with its role and its content as one text. Raises Refusal."""
    if not isinstance(message, dict):
        raise wrong(where, f'is {name_of(message)}; {{"role": …, "content": …}} is wanted')
    given = {name: value for name, value in message.items() if value is not None}  # clients send answers back with all fields
    role = given.pop("role", None)
    if not isinstance(role, str) or role not in ROLES:
        found = "missing" if role is None else shown(role)
        raise wrong(f"{where}.role", f"is {found}; allowed: {', '.join(ROLES)}")
    content = read_content(given.pop("content", None), f"{where}.content")
    if given.pop("tool_calls", []) != []:
        raise wrong(f"{where}.tool_calls", "is not supported: this server calls no tools", code="unsupported_parameter")
    given.pop("name", None)
    given.pop("annotations", None)
    if given:
        name = next(iter(given))[:SHOWN]
        raise wrong(f"{where}.{name}", "is not a field of a message; allowed: role, content, name", code="unknown_parameter")
    return {"role": ROLES[role], "content": content}


def read_content(content: Any, where: str) -> str:
    """Return the text of a message: a string, or parts of the type "text", put together."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        found = "missing" if content is None else name_of(content)
        raise wrong(where, f'is {found}; a text or a list of {{"type": "text", "text": …}} is wanted')
    for index, part in enumerate(content):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = shown(part.get("type")) if isinstance(part, dict) else name_of(part)
            raise wrong(f"{where}[{index}]", f'is of the type {kind}; allowed: {{"type": "text", "text": …}}')
    return "".join(part["text"] for part in content)


def read_row(item: Any, where: str, asked: Sequence[str]) -> dict[str, Any]:
    """Return a row to be answered: a text alone, or an object with the task's columns, whose values the task checks."""
    if isinstance(item, str) and "text" in asked:
        return {"text": item}
    if not isinstance(item, dict) or not item or not set(item) <= set(asked):
        raise wrong(where, f"is {shown(item)}; {form(asked)} is wanted")
    return item


def form(asked: Sequence[str]) -> str:
    """Return what a row looks like, for a message."""
    columns = ", ".join(f'"{name}": …' for name in asked)
    return f"a text or {{{columns}}}" if "text" in asked else f"{{{columns}}}"


def read_rest(fields: Fields, kind: str, prompt: Any, models: Models) -> TextRequest:
    """Read what chats and completions have in common, and refuse what is left."""
    name = read_model(fields, models)
    config = read_config(fields, raw=kind == TEXT)
    stream, include_usage = fields.switch("stream"), False
    options = fields.take("stream_options")
    if options is not None:
        if not stream:
            raise wrong("stream_options", 'is only allowed with "stream": true')
        if not isinstance(options, dict):
            raise wrong("stream_options", f"is {name_of(options)}; an object is wanted")
        inside = Fields(options)
        include_usage = inside.switch("include_usage")
        inside.ignore("include_obfuscation")
        inside.finish()
    fields.only("n", (1,), "can only be 1: there is one answer to a request")
    fields.only("logit_bias", ({},), "is not supported")
    for penalty in ("presence_penalty", "frequency_penalty"):
        fields.only(penalty, (0, 0.0), 'can only be 0; "repetition_penalty" is there instead')
    fields.ignore(
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"
    )
    fields.finish()
    return TextRequest(kind, name, models[name], prompt, config, stream, include_usage)


def read_model(fields: Fields, models: Models) -> str:
    """Return the name of a model of this server: the bundle's own where none is given."""
    name = fields.text("model")
    return next(iter(models)) if name is None else known_model(name, models)


def known_model(name: str, models: Models) -> str:
    """Return `name`. Raises Refusal where this server has no such model."""
    if name not in models:
        message = f"there is no model {shown(name)}.{did_you_mean(name, models)} Models: {', '.join(models)}"
        raise Refusal(404, message, param="model", code="model_not_found")
    return name


def read_config(fields: Fields, *, raw: bool) -> GenerateConfig:
    """Return the settings of an answer. Sampling without a seed gets a new one each time, as people expect of a server."""
    limits = [fields.whole("max_tokens", 1), fields.whole("max_completion_tokens", 1)]
    given = [limit for limit in limits if limit is not None]
    if len(set(given)) > 1:
        raise wrong("max_tokens", f"is {limits[0]}, but max_completion_tokens is {limits[1]}; give one of them")
    seed = fields.whole("seed", -SEEDS // 2, SEEDS - 1)
    top_p = fields.number("top_p", 0, 1)
    values: dict[str, Any] = {
        "max_new_tokens": given[0] if given else None,
        "temperature": fields.number("temperature", 0, 2),
        "top_p": None if top_p is None else max(top_p, MIN_TOP_P),
        "top_k": fields.whole("top_k", 0),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100),
        "stop": read_stop(fields.take("stop")),
        "seed": secrets.randbits(32) if seed is None else seed % SEEDS,
    }
    return replace(
        GenerateConfig(raw=raw), {name: value for name, value in values.items() if value is not None}, where="request"
    )


def read_stop(stop: Any) -> tuple[str, ...] | None:
    """Return the texts that end an answer."""
    if stop is None:
        return None
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts) or len(texts) > MAX_STOPS:
        raise wrong("stop", f"is {shown(stop)}; allowed: a text, or up to {MAX_STOPS} texts, none of them empty")
    return tuple(texts)
