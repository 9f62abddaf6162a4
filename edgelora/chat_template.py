"""Chat templates: the jinja2 text of a tokenizer that turns messages into one string, rendered in a sandbox.

The conventions are those of Hugging Face's tokenizers: `messages`, `tools`, `documents`, `add_generation_prompt` and the
special tokens are variables; `raise_exception`, `strftime_now`, `tojson` (without HTML escapes) and loop controls are there;
blocks are trimmed; `{% generation %} … {% endgeneration %}` marks what the assistant says.
"""

from __future__ import annotations

import datetime
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgelora.errors import DataError, ModelError

# A template is a program of its own, and comes with a model: what it cannot do, or must not, shows as any of these.
FAILURES = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError,
    SyntaxError,
)  # fmt: skip

Message = Mapping[str, Any]
Span = tuple[int, int]

# Around what a generation block writes, removed after rendering: noncharacters and a number of this process that no row has.
_MARK = secrets.token_hex(8)
_BEGIN, _END = f"\ufdd0{_MARK}\ufdd1", f"\ufdd1{_MARK}\ufdd0"


class ChatTemplate:
    """One compiled template. Raises ModelError when the template itself is at fault, DataError when it refuses the messages."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self.special_tokens = dict(special_tokens)
        self.has_marks = re.search(r"\{%[-+]?\s*generation\b", source) is not None
        try:
            self.template = environment.from_string(source)
        except FAILURES as error:
            raise ModelError(f"the chat template of the tokenizer cannot be read: {reason(error)}") from None

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None, *, add_generation_prompt: bool) -> str:
        return self.render_marked(messages, tools, add_generation_prompt=add_generation_prompt)[0]

    def render_marked(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, add_generation_prompt: bool
    ) -> tuple[str, list[Span]]:
        """Return the text and the spans of its generation blocks, in characters."""
        try:
            text = self.template.render(
                **self.special_tokens,
                messages=[normalize(message) for message in messages],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except FAILURES as error:
            raise DataError(f"the chat template refuses the conversation: {reason(error)}") from None
        return cut_marks(text)

    def assistant_spans(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> tuple[str, list[Span]]:
        """Return the rendered conversation and the spans that the assistant writes, its end token and what follows it included.

        Marks are used where the template has them. Elsewhere a turn's span is what comes after the rendering of the messages
        before it with the generation prompt, up to the end of the rendering that includes it. Templates that write a past turn
        differently from how it was generated (Qwen3 drops the thinking) make that turn context only: what is trained is always
        what runs. Raises DataError when that holds for the last answer.
        """
        text, spans = self.render_marked(messages, tools, add_generation_prompt=False)
        if spans:
            return text, spans
        turns = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        for turn in turns:
            prompt = self.render(messages[:turn], tools, add_generation_prompt=True) if turn else ""
            through = (
                text if turn == len(messages) - 1 else self.render(messages[: turn + 1], tools, add_generation_prompt=False)
            )
            if text.startswith(prompt) and text.startswith(through) and len(prompt) < len(through):
                spans.append((len(prompt), len(through)))
        if turns and turns[-1] == len(messages) - 1 and (not spans or spans[-1][1] != len(text)):
            raise DataError("the chat template does not write the answer after its own generation prompt")
        return text, spans


def reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


class GenerationBlock(Extension):
    """`{% generation %}`: writes its body between two marks."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as an instance variable)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def cut_marks(text: str) -> tuple[str, list[Span]]:
    """Return `text` without the marks, and the spans between them."""
    pieces, spans, length = [], [], 0
    for index, part in enumerate(text.split(_BEGIN)):
        inside, found, after = part.partition(_END) if index else ("", "", part)
        if found:
            spans.append((length, length + len(inside)))
        pieces += [inside, after]
        length += len(inside) + len(after)
    return "".join(pieces), spans


def normalize(message: Message) -> dict[str, Any]:
    """Return the message with tool-call arguments as objects: OpenAI's API writes them as JSON text, templates dump them."""
    calls = []
    for call in message.get("tool_calls") or []:
        function = call.get("function", call) if isinstance(call, Mapping) else call
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            try:
                function = {**function, "arguments": json.loads(function["arguments"])}
            except ValueError:
                raise DataError(f"the arguments of a tool call are not JSON: {function['arguments']}") from None
            call = {**call, "function": function} if "function" in call else function
        calls.append(call)
    return {**message, "tool_calls": calls} if calls else dict(message)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
