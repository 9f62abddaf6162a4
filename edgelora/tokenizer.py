"""The tokenizer of a model folder, on `tokenizers` alone: text and chats to ids and back, on the laptop and on the device."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers.decoders import DecodeStream as NativeStream

from edgelora.errors import DataError, ModelError

if TYPE_CHECKING:
    from edgelora.chat_template import ChatTemplate, Message, Span

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "target_tokenizer.json",
)
"""What a stage copies along, where the source has it: of image processors and feature extractors too."""

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """`tokenizer.json` with the special tokens and the chat template that stand beside it.

    Text that a template rendered carries its own BOS and is never given another one; `encode_prompt` is for raw text.
    """

    def __init__(
        self, native: tokenizers.Tokenizer, config: dict[str, Any], chat_template: str | None, stop: Iterable[int]
    ) -> None:
        self.native = native
        self.native.no_truncation()  # Sentence encoders come with both switched on; lengths and padding are decided here
        self.native.no_padding()
        self.special_tokens = {name: text for name in SPECIAL_TOKENS if (text := token_text(config.get(name)))}
        self.chat_template = chat_template
        self._stop = frozenset(stop)
        self.positions: int | None = None  # the most tokens that the model reads

    @classmethod
    def from_folder(cls, folder: Path, name: str = "tokenizer.json") -> Tokenizer:
        """Read a folder in Hugging Face layout. Raises ModelError when there is no usable tokenizer.json."""
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{folder} has no {name}", hint="save the model's fast tokenizer beside it")
        try:
            native = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises plain Exception
            raise ModelError(f"{path} cannot be read: {error}") from None
        config = read_config(folder / "special_tokens_map.json") | read_config(folder / "tokenizer_config.json")
        template = config.get("chat_template")
        if isinstance(template, list):  # several named templates: the default one is for chats
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default")
        file = folder / "chat_template.jinja"
        if file.is_file():
            try:
                template = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise ModelError(f"{file} is not UTF-8", hint="save it as UTF-8") from None
        stop = read_config(folder / "generation_config.json").get("eos_token_id") or []
        found = cls(native, config, template or None, [stop] if isinstance(stop, int) else stop)
        model = read_config(folder / "config.json")
        found.positions = length_limit(model) if model else None
        return found

    @property
    def vocab_size(self) -> int:
        return int(self.native.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token_id(self) -> int | None:
        return self.token_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self.token_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self.token_id("pad_token")

    def token_id(self, name: str) -> int | None:
        """Return the id of a special token by its role ("bos_token"), None where the tokenizer has none."""
        text = self.special_tokens.get(name)
        found = self.native.token_to_id(text) if text is not None else None
        return None if found is None else int(found)

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        """The ids that end an answer: EOS, those of generation_config.json, and what the chat template closes a turn with."""
        found = set(self._stop)
        if self.eos_token_id is not None:
            found.add(self.eos_token_id)
        if self.chat_template is not None:
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            ids, supervised = self.encode_chat_supervised(probe)
            added = self.native.get_added_tokens_decoder()
            answer = [token for token, kept in zip(ids, supervised, strict=True) if kept]
            while answer and not (answer[-1] in added and added[answer[-1]].special):
                answer.pop()  # the line break after the end token
            found.update(answer[-1:])
        return frozenset(found)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self._encode(text, None, add_special_tokens).ids)

    def encode_pair(self, text: str, pair: str | None) -> tuple[list[int], list[int]]:
        """Return (ids, type ids) of one or two texts with the special tokens of an encoder: [CLS] a [SEP] b [SEP]."""
        encoding = self._encode(text, pair, True)
        return list(encoding.ids), list(encoding.type_ids)

    def encode_offsets(self, text: str, pair: str | None = None) -> tokenizers.Encoding:
        """Return ids, type ids, offsets (characters of the text that a token is in) and sequence ids of one or two texts."""
        return self._encode(text, pair, True)

    def _encode(self, text: str, pair: str | None, add_special_tokens: bool) -> tokenizers.Encoding:
        try:
            return self.native.encode(text, pair, add_special_tokens=add_special_tokens)
        except TypeError:  # the Rust side's word for text that has no UTF-8 form
            for part in filter(None, (text, pair)):
                refuse_half_characters(part)
            raise

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of raw text to be continued: with the BOS that the tokenizer adds (once), without an EOS."""
        ids, bos = self.encode(text, add_special_tokens=False), self.added_bos
        return ids if ids[: len(bos)] == bos else bos + ids

    @cached_property
    def added_bos(self) -> list[int]:
        """The ids that the tokenizer itself puts before raw text: [BOS] or nothing."""
        bos = self.bos_token_id
        return [bos] if bos is not None and self.encode("", add_special_tokens=True)[:1] == [bos] else []

    def doubled_bos(self, ids: Sequence[int]) -> bool:
        """Tell whether the ids begin with two BOS tokens, after which a model talks nonsense."""
        return self.bos_token_id is not None and list(ids[:2]) == [self.bos_token_id] * 2

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self.native.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens))

    def stream(self) -> DecodeStream:
        return DecodeStream(self.native)

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise ModelError(
                "the tokenizer has no chat template", hint="give prompt and completion, or text, instead of messages"
            )
        from edgelora.chat_template import ChatTemplate  # jinja2, which texts without a chat do without

        return ChatTemplate(self.chat_template, self.special_tokens)

    def render_chat(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, add_generation_prompt: bool
    ) -> str:
        return self._template.render(messages, tools, add_generation_prompt=add_generation_prompt)

    def encode_chat(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, add_generation_prompt: bool
    ) -> list[int]:
        """Return the ids of the rendered chat. Raises DataError if the template itself writes two BOS tokens."""
        text = self.render_chat(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        return self._one_bos(self.encode(text, add_special_tokens=False))

    def encode_chat_supervised(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation and, for each, whether the assistant writes it.

        Ids before an answer are those that `encode_chat(…, add_generation_prompt=True)` gives when run: see `encode_spans`.
        """
        text, spans = self._template.assistant_spans(messages, tools)
        ids, supervised = self.encode_spans(text, spans)
        return self._one_bos(ids), supervised

    def _one_bos(self, ids: list[int]) -> list[int]:
        if self.doubled_bos(ids):
            raise DataError("the chat begins with two BOS tokens: the template writes one and the text has one too")
        return ids

    def encode_spans(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """Return the ids of `text` (with its special tokens) and whether each is in a span (start, end) of characters.

        The text is encoded whole and then verified: up to each span's start the ids must be those of that prefix alone, because
        that is all that a device sees. Where a token would straddle a start (an answer that begins with a line break), the text
        is encoded in pieces cut at the spans' ends instead, so that the first answer's prompt still gets its own ids.
        """
        encoding = self._encode(text, None, False)
        ids, supervised = list(encoding.ids), [False] * len(encoding.ids)
        for start, end in spans:
            prefix = self.encode(text[:start], add_special_tokens=False)
            if ids[: len(prefix)] != prefix:
                return self._encode_pieces(text, spans)
            for index in range(len(prefix), len(ids)):
                if encoding.offsets[index][0] >= end:
                    break
                supervised[index] = True
        return ids, supervised

    def encode_supervised(self, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
        """Return the ids of raw text with its BOS and EOS, and whether each belongs to the completion (EOS does)."""
        text = prompt + completion
        ids, supervised = self.encode_spans(text, [(len(prompt), len(text))])
        bos = self.added_bos if ids[:1] != self.added_bos else []
        eos = [self.eos_token_id] if self.eos_token_id is not None else []
        return [*bos, *ids, *eos], [False] * len(bos) + supervised + [True] * len(eos)

    def _encode_pieces(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        supervised: list[bool] = []
        cuts = [0, *(cut for span in spans for cut in span), len(text)]
        for index, (start, end) in enumerate(pairwise(cuts)):
            piece = self.encode(text[start:end], add_special_tokens=False)
            ids += piece
            supervised += [index % 2 == 1] * len(piece)
        return ids, supervised


class DecodeStream:
    """Text of ids that come one by one; characters of several tokens are held back until they are whole."""

    def __init__(self, native: tokenizers.Tokenizer) -> None:
        self.native = native
        self.state = NativeStream(skip_special_tokens=True)
        self.shown: list[int] = []
        self.held: list[int] = []

    def step(self, token: int) -> str:
        self.held.append(int(token))
        piece = str(self.state.step(self.native, int(token)) or "")
        if piece:
            self.shown, self.held = self.held[-1:], []  # alone, some decoders take the space before a text away
        return piece

    def rest(self) -> str:
        """Return what was held back when no more ids come: bytes that never became a character, as `decode` shows them."""
        before, both = (self.native.decode(ids) for ids in (self.shown, self.shown + self.held))
        self.held = []
        return str(both.removeprefix(before))


def refuse_half_characters(text: str) -> None:
    r"""Raise DataError for text that has no UTF-8 form: JSON can write half a character ("\ud83d")."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise DataError(f"the text holds half a character ({half}): wrong encoding") from None


def token_text(value: Any) -> str | None:
    """Return the text of a special token, which configs write as "<s>" or {"content": "<s>", …}."""
    return value.get("content") if isinstance(value, dict) else value


def read_config(path: Path) -> dict[str, Any]:
    """Return a JSON object, or {} where the file is absent."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}; a JSON object is wanted")
    return content


def length_limit(config: dict[str, Any]) -> int:
    """Return the most tokens that the model of a config.json can read."""
    text = config.get("text_config", config)
    known = {"clip": 77, "siglip": 64}.get(str(config.get("model_type")), 1024)  # where config.json leaves the default out
    positions = next((int(text[key]) for key in ("max_position_embeddings", "n_positions") if text.get(key)), known)
    # The RoBERTa family numbers positions from pad_token_id + 1.
    offset = int(text.get("pad_token_id") or 0) + 1 if "roberta" in str(text.get("model_type")) else 0
    return positions - offset
