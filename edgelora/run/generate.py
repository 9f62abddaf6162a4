"""Text from a decoder bundle: prompt to tokens, tokens one by one to text, stop strings and limits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.config import GenerateConfig
from edgelora.errors import UserError
from edgelora.memory import trim
from edgelora.run.adapters import Adapter, initializers, read_factors
from edgelora.run.decoder import DecoderSession
from edgelora.run.drafts import Drafts
from edgelora.run.kept import LEAST_KEPT, Kept
from edgelora.run.prefill import shipped as prompt_graph
from edgelora.run.prefix import LEAST, shipped
from edgelora.run.sampling import Sampler
from edgelora.run.stops import StopStrings
from edgelora.run.stored import LEAST_STORED, find_store
from edgelora.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgelora.bundle import Bundle
    from edgelora.run.model import Prompt


class Generator:
    """A decoder with its tokenizer. The cache outlives an answer: the next prompt computes only what differs."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        adapter: Adapter | None = None,
        native: bool = True,
    ) -> None:
        """Open a bundle. `native`: see DecoderSession."""
        self.bundle, self.threads, self.native = bundle, threads, native
        self.adapter = adapter
        self.decoder = self._open(adapter)
        self.tokenizer = Tokenizer.from_folder(bundle.folder)
        trim()  # a vocabulary is read through ten times its memory
        self.decoder.read_ahead()  # not before: new memory for weights lets all who ask for a little wait
        self.prefix = shipped(bundle)
        self.kept = Kept()
        self.store = find_store(bundle)
        self.cached: list[int] = []  # the tokens that the cache holds, in order
        self.reused = 0  # tokens of the last prompt that needed no computing
        self.writing: Answer | None = None  # whose tokens they are
        self.use(adapter)

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer; the first one takes the chat template, which nothing else at load needs."""
        return frozenset(self.bundle.eos_token_ids) | self.tokenizer.stop_token_ids

    def use(self, adapter: Adapter | None) -> None:
        """Let an adapter act from now on, or the base alone. Only scales, which are packed at load, need a new session."""
        scales = adapter is not None and adapter.kind == "scales"
        factors = {}
        if adapter is not None and not scales:
            assert self.decoder.bound is not None
            inputs = {value.name: value for value in self.decoder.bound.session.get_overridable_initializers()}
            factors = read_factors(adapter.path, inputs)
        with_scales = self.decoder.bound is not None and self.decoder.bound.initializers
        if self.adapter != adapter and (scales or with_scales):
            self.decoder = self._open(adapter)
        self.adapter = adapter
        self.decoder.set_factors(factors)
        self.kept = Kept()  # the others were another model's
        self.forget()

    def _open(self, adapter: Adapter | None) -> DecoderSession:
        return DecoderSession(
            self.bundle.model_path,
            max_length=self.bundle.max_length,
            threads=self.threads,
            initializers=initializers(self.bundle, adapter),
            packed=not self.bundle.manifest.get("adapters"),  # whose A and B are inputs with defaults
            native=self.native,
            prompts=prompt_graph(self.bundle, self.threads),
        )

    def start(self, prompt: Prompt, config: GenerateConfig, *, tools: Sequence[Any] | None = None) -> Answer:
        """Return the answer to a prompt, written while it is iterated over."""
        ids = prompt_ids(self.tokenizer, prompt, config, tools)
        if not ids:
            raise UserError("the prompt is empty", hint='edgelora run BUNDLE "some text"')
        fixed = 0 if self.store is None else fixed_tokens(self.tokenizer, asked(self.tokenizer, prompt, config), ids)
        return Answer(self, ids, config, fixed=fixed)

    def feed(self, ids: list[int], fixed: int = 0) -> NDArray[np.float32]:
        """Make the cache hold exactly `ids` and return the logits `[vocabulary]` after the last.

        The first `fixed` tokens will begin other prompts too: a copy of their cache is kept.
        """
        keep = common_prefix(self.cached, ids[:-1])  # the last token always runs: its logits are wanted
        self.decoder.reserve(len(ids))  # the limit is checked before anything is forgotten
        self.decoder.rewind(keep)
        self.cached = self.cached[:keep]
        # The last two are computed in any case: one position alone is rounded differently from several.
        self.begin(ids[:-2], fixed)
        self.reused = len(self.cached)
        if LEAST_KEPT <= fixed <= len(ids) - 2 and self.reused < fixed:
            self.decoder.prefill(ids[self.reused : fixed])
            self.cached = ids[:fixed]
            saved = self.decoder.saved()
            self.kept.add(self.cached, saved)
            if self.store is not None and self.adapter is None:
                self.store.add(self.cached, saved)
        done = len(self.cached)
        logits = self.decoder.prefill(ids[done:])
        self.cached += ids[done:]
        return logits

    def begin(self, ids: list[int], fixed: int = 0) -> None:
        """Let the cache hold what memory, the bundle's prefix or the user's cache folder has of `ids`, where that is more than
        it holds already."""
        length, cache = self.kept.find(ids)
        files = self.adapter is None  # their keys and values are those of the model without an adapter
        if files and self.prefix is not None:
            shared = common_prefix(self.prefix.ids, ids)
            if shared >= max(length, len(self.cached)) + LEAST:
                read = self.prefix.read(self.decoder.cache_shapes)
                if read is None:
                    self.prefix = None
                else:
                    length, cache = shared, read
        if files and self.store is not None and len(ids) >= fixed >= max(length, len(self.cached)) + LEAST_STORED:
            stored = self.store.find(ids[:fixed], self.decoder.cache_shapes)
            if stored is not None:
                length, cache = fixed, stored
                self.kept.add(ids[:fixed], stored)
        if length >= len(self.cached) + LEAST:
            self.decoder.restore(cache, length)
            self.cached = ids[:length]

    def step(self, token: int) -> NDArray[np.float32]:
        """Append one token and return the logits `[vocabulary]` after it."""
        logits = self.decoder.step(token)
        self.cached.append(token)
        return logits

    def check(self, length: int, tokens: list[int]) -> NDArray[np.float32]:
        """Keep `length` tokens of the cache, append `tokens` and return the logits `[len(tokens), vocabulary]` after each."""
        if length < len(self.cached):
            self.decoder.rewind(length)
            self.cached = self.cached[:length]
        if len(tokens) == 1:
            return self.step(tokens[0])[None]
        rows = self.decoder.score(tokens).copy()  # another answer may be begun before all of them are read
        self.cached += tokens
        return rows

    def forget(self) -> None:
        """Empty the cache: someone else uses the decoder."""
        self.decoder.rewind(0)
        self.cached, self.writing = [], None


class Answer:
    """One answer. Iterating yields pieces of text; afterwards `text`, `tokens`, `finish` and the times are there.

    finish: "end" (the model ended), "stop" (a stop string), "length" (max_new_tokens), "context" (the bundle's limit).
    """

    def __init__(
        self,
        generator: Generator,
        prompt: list[int],
        config: GenerateConfig,
        *,
        stop: frozenset[int] | None = None,
        fixed: int = 0,
    ) -> None:
        """Prepare an answer to `prompt`, not empty. `stop` are the tokens that end it (default: the bundle's).

        The first `fixed` tokens of the prompt will begin other prompts too.
        """
        self.fixed = fixed
        self.generator = generator
        self.stop_token_ids = generator.stop_token_ids if stop is None else stop
        self.config = config
        self.prompt = prompt
        self.limit = min(config.max_new_tokens, generator.decoder.max_length - len(prompt) + 1)
        self.tokens: list[int] = []
        self.text = ""
        self.finish = ""
        self.prefill_s = self.decode_s = 0.0
        self.reused = 0  # tokens of the prompt that were in the cache
        self.sampler = Sampler(config)
        exact = generator.decoder.bound is None  # several positions at once have the bits of each alone
        self.drafts = Drafts(prompt) if (exact if config.speculate is None else config.speculate) else None
        self.pieces = self._write()

    def __iter__(self) -> Iterator[str]:
        return self.pieces

    def finished(self) -> Answer:
        """Write the answer to its end and return it."""
        for _ in self:
            pass
        return self

    def _write(self) -> Iterator[str]:
        stream, held = self.generator.tokenizer.stream(), StopStrings(self.config.stop or ())
        for token in self._tokens():
            piece = held.push(stream.step(token))
            self.text += piece
            if piece:
                yield piece
            if held.found:
                self.finish = "stop"
                return
        rest = held.push(stream.rest()) + held.rest()
        self.text += rest
        if rest:
            yield rest

    def _tokens(self) -> Iterator[int]:
        """Yield the tokens of the answer, without the one that ends it."""
        started = time.perf_counter()
        self.generator.writing = self
        draft: list[int] = []
        rows = self.generator.feed(self.prompt, self.fixed)[None]
        self.reused = self.generator.reused
        self.prefill_s = time.perf_counter() - started
        started = time.perf_counter()
        while True:
            for place, logits in enumerate(rows):
                token = self.sampler.choose(logits, [*self.prompt, *self.tokens] if self.config.repetition_penalty != 1 else ())
                self.decode_s = time.perf_counter() - started
                if token in self.stop_token_ids:
                    self.finish = "end"
                    return
                self.tokens.append(token)
                yield token
                if len(self.tokens) >= self.limit:
                    self.finish = "length" if self.limit == self.config.max_new_tokens else "context"
                    return
                if place < len(draft) and token != draft[place]:
                    break  # the rows after it belong to a text that the model does not write
            rows, draft = self._next(token, len(draft), place)

    def _next(self, token: int, drafted: int, accepted: int) -> tuple[NDArray[np.float32], list[int]]:
        """Return the logits after `token` and after each token of a draft, and the draft; of the last, `accepted` came true."""
        generator, drafts = self.generator, self.drafts
        if drafts is not None:
            drafts.learn(drafted, accepted)
            drafts.extend(self.tokens[drafts.length - len(self.prompt) :])
        if generator.writing is not self:  # another answer was begun meanwhile: compute what differs again
            generator.writing = self
            return generator.feed([*self.prompt, *self.tokens])[None], []
        if drafts is None:
            return generator.step(token)[None], []
        draft = drafts.propose(min(self.limit - len(self.tokens) - 1, generator.decoder.score_limit - 1))
        rows = generator.check(len(self.prompt) + len(self.tokens) - 1, [token, *draft])
        return rows, draft


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many items from the start are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def fixed_tokens(tokenizer: Tokenizer, prompt: Prompt, ids: Sequence[int]) -> int:
    """Return how many of a chat's tokens `ids` its system turn would begin any chat with; 0 where it has none."""
    if isinstance(prompt, str) or not prompt or prompt[0].get("role") != "system":
        return 0
    others = [
        tokenizer.encode_chat([prompt[0], {"role": "user", "content": text}], add_generation_prompt=True) for text in "a1"
    ]
    return min(common_prefix(ids, other) for other in others)


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, config: GenerateConfig, tools: Sequence[Any] | None = None) -> list[int]:
    """Return the tokens of a prompt as training had them: a user turn where there is a chat template, raw text elsewhere."""
    messages = asked(tokenizer, prompt, config)
    if isinstance(messages, str):
        return tokenizer.encode_prompt(messages)
    return tokenizer.encode_chat(messages, tools=tools, add_generation_prompt=True)


def asked(tokenizer: Tokenizer, prompt: Prompt, config: GenerateConfig) -> str | list[Mapping[str, Any]]:
    """Return the chat that a prompt comes to, with its system turn; the text that it is where there is no chat template."""
    if isinstance(prompt, str) and (config.raw or tokenizer.chat_template is None):
        return (config.system or "") + prompt
    messages: list[Mapping[str, Any]] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if config.system is not None and not any(message.get("role") == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": config.system})
    return messages
