"""The tokenizer and its chat templates: equal to transformers', and what is trained is what runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgelora.chat_template import ChatTemplate
from edgelora.errors import DataError, ModelError
from edgelora.tokenizer import Tokenizer
from tests import chat_templates, tiny

CHAT = [
    {"role": "user", "content": "  Grüße, 世界? "},
    {"role": "assistant", "content": "Hello {there} <b>"},
    {"role": "user", "content": "and\n"},
    {"role": "assistant", "content": "Bye 🙂"},
]
SYSTEM = [{"role": "system", "content": "Be kind."}, *CHAT]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "lamp", "description": "è <on>", "parameters": {"type": "object", "properties": {}}},
    }
]
CALLS = [
    {"role": "user", "content": "light"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "lamp", "arguments": {"é": "<1>"}}}],
    },
    {"role": "tool", "content": "ok"},
    {"role": "assistant", "content": "done"},
]


def tiny_tokenizer(folder: Path, template: str | None = None, **config: Any) -> Tokenizer:
    tiny.save_tokenizer(folder, chat=False)
    path = folder / "tokenizer_config.json"
    given = {**json.loads(path.read_text()), **config} | ({"chat_template": template} if template else {})
    path.write_text(json.dumps(given), encoding="utf-8")
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", chat_templates.ALL)
@pytest.mark.parametrize("prompt", [False, True])
def test_templates_render_as_in_transformers(name: str, prompt: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = tiny_tokenizer(tmp_path, chat_templates.ALL[name])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    conversations: list[tuple[list[dict[str, Any]], Any]] = [(CHAT, None), (CHAT[:1], None)]
    if name != "mistral":
        conversations += [(SYSTEM, None)]
    if name == "qwen-tools":
        conversations += [(CALLS, TOOLS)]
    for messages, tools in conversations:
        wanted = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
        assert ours.render_chat(messages, tools=tools, add_generation_prompt=prompt) == wanted
        ids = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, return_dict=True)["input_ids"]
        assert ours.encode_chat(messages, tools=tools, add_generation_prompt=prompt) == ids


def test_generation_marks_give_the_mask_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = tiny_tokenizer(tmp_path, chat_templates.MARKED)
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, supervised = ours.encode_chat_supervised(CHAT)
    assert ids == theirs["input_ids"]
    assert supervised == [bool(kept) for kept in theirs["assistant_masks"]]


@pytest.mark.parametrize("name", chat_templates.ALL)
def test_answers_are_supervised_after_the_ids_of_their_prompt(name: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, chat_templates.ALL[name])
    ids, supervised = tokenizer.encode_chat_supervised(CHAT)
    answered = []
    for turn in (1, 3):
        prompt = tokenizer.encode_chat(CHAT[:turn], add_generation_prompt=True)
        if ids[: len(prompt)] == prompt and supervised[len(prompt)]:
            assert not supervised[len(prompt) - 1]
            end = supervised[len(prompt) :].index(False) + len(prompt) if False in supervised[len(prompt) :] else len(ids)
            answered.append(tokenizer.decode(ids[len(prompt) : end], skip_special_tokens=False))
    assert sum(supervised) == sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in answered)
    first, last = "Hello {there} <b>", "Bye 🙂"
    ends = {"llama3": "<|eot_id|>", "mistral": "<|end|>", "gemma": "<end_of_turn>", "marked": "<|im_end|>"}
    end = ends.get(name, "<|im_end|>\n")
    if name == "thinking":  # the first answer is rendered otherwise once it is past: context only
        assert answered == ["<think>\n\n</think>\n\n" + last + end]
    elif name == "gemma":
        # The template's line break before the next turn is written with that turn
        assert [text.strip() for text in answered] == [first + end, last + end]
    else:
        assert answered == [first + end, last + end]


def test_tool_calls_are_supervised_and_their_arguments_may_be_json_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, chat_templates.QWEN_TOOLS)
    as_text = json.loads(json.dumps(CALLS))
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"é": "<1>"}'
    ids, supervised = tokenizer.encode_chat_supervised(as_text, TOOLS)
    assert (ids, supervised) == tokenizer.encode_chat_supervised(CALLS, TOOLS)
    trained = tokenizer.decode([i for i, kept in zip(ids, supervised, strict=True) if kept], skip_special_tokens=False)
    call = '<tool_call>{"name": "lamp", "arguments": {"é": "<1>"}}</tool_call>'
    assert call in trained
    assert "done" in trained
    assert "ok" not in trained
    as_text[1]["tool_calls"][0]["function"]["arguments"] = "{"
    with pytest.raises(DataError, match="the arguments of a tool call are not JSON: "):
        tokenizer.encode_chat(as_text, tools=TOOLS, add_generation_prompt=True)


def test_smollm2_trains_what_the_peft_baseline_trains_and_what_runs(smollm2_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(smollm2_folder)
    for prompt, answer in (("Describe: name[Aromi]", "Aromi is a pub."), ("1 2", "\n\n  12 é"), ("x\n", " y"), ("日本", "語")):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids, supervised = tokenizer.encode_chat_supervised(messages)
        asked = tokenizer.encode_chat(messages[:1], add_generation_prompt=True)
        assert ids[: len(asked)] == asked
        assert supervised == [False] * len(asked) + [True] * (len(ids) - len(asked))
        assert ids[len(asked) :] == tokenizer.encode(answer + "<|im_end|>\n", add_special_tokens=False)
    assert tokenizer.render_chat(messages[:1], add_generation_prompt=True).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(sorted(tokenizer.stop_token_ids), skip_special_tokens=False) == "<|im_end|>"


def test_an_answer_that_would_merge_with_its_prompt_is_encoded_apart(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Native
    from tokenizers import models

    native = Native(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "c": 3}, merges=[("a", "b")]))
    native.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("cab", add_special_tokens=False) == [3, 2]
    assert tokenizer.encode_supervised("ca", "bab") == ([3, 0, 1, 2], [False, False, True, True])
    assert tokenizer.encode_supervised("c", "ab") == ([3, 2], [False, True])


def test_a_doubled_bos_is_refused_and_never_added(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert tokenizer.encode_chat([{"role": "user", "content": "a"}], add_generation_prompt=True)[0] == tokenizer.bos_token_id
    with pytest.raises(
        DataError, match="the chat begins with two BOS tokens: the template writes one and the text has one too"
    ):
        tokenizer.encode_chat([{"role": "user", "content": "<s>a"}], add_generation_prompt=True)


def test_raw_prompts_get_the_bos_of_the_tokenizer_once(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Native
    from tokenizers.processors import TemplateProcessing

    plain = tiny_tokenizer(tmp_path)
    assert plain.added_bos == []
    native = Native.from_file(str(tmp_path / "tokenizer.json"))
    native.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 262)])
    native.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (
        tokenizer.encode_prompt("<s>hi")
        == tokenizer.encode_prompt("hi")
        == [262, *plain.encode("hi", add_special_tokens=False)]
    )
    ids, supervised = tokenizer.encode_supervised("", "hi")
    assert ids == [*tokenizer.encode_prompt("hi"), tokenizer.eos_token_id]
    assert supervised == [False, True, True, True]


def test_text_with_half_a_character_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    for encode in (tokenizer.encode_prompt, lambda text: tokenizer.encode_pair("a", text)):
        with pytest.raises(DataError, match=r"^the text holds half a character \(\\ud83d\): wrong encoding$"):
            encode("a\ud83d")


def test_streamed_pieces_join_to_the_decoded_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    text = "né 🙂 世"
    stream = tokenizer.stream()
    pieces = [stream.step(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces) == text
    assert "" in pieces  # a byte of a longer character is held back
    assert stream.rest() == ""


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    ids = tokenizer.encode("né 🙂", add_special_tokens=False)[:-1] * 2
    ids += ids[-2:] * 40  # longer than what is decoded again
    stream = tokenizer.stream()
    shown = "".join(stream.step(token) for token in ids)
    assert shown + stream.rest() == tokenizer.decode(ids)
    assert stream.rest() == ""


def test_configs_in_all_their_spellings(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}]
    tokenizer = tiny_tokenizer(tmp_path, bos_token={"content": "<s>"}, pad_token=None, chat_template=named)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.chat_template) == (262, None, "D")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [256, 261]}')
    (tmp_path / "chat_template.jinja").write_text(chat_templates.MISTRAL, encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.chat_template == chat_templates.MISTRAL
    assert tokenizer.stop_token_ids == {256, 261}


def test_what_is_no_tokenizer_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer.json cannot be read: "):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ModelError, match="the chat template of the tokenizer cannot be read: "):
        tiny_tokenizer(tmp_path, "{% if %}").render_chat(CHAT, add_generation_prompt=True)
    with pytest.raises(ModelError, match="the tokenizer has no chat template"):
        tiny_tokenizer(tmp_path).render_chat(CHAT, add_generation_prompt=True)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"chat_template\.jinja is not UTF-8"):
        Tokenizer.from_folder(tmp_path)


def test_templates_refuse_in_their_own_words_and_stay_in_their_sandbox(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="the chat template refuses the conversation: Only user and assistant roles are supported!"
    ):
        tiny_tokenizer(tmp_path, chat_templates.MISTRAL).render_chat(
            [*CHAT[:1], {"role": "tool", "content": "x"}], add_generation_prompt=True
        )
    hostile = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(DataError, match=r"the chat template refuses the conversation: .*unsafe"):
        tiny_tokenizer(tmp_path, hostile).render_chat(CHAT, add_generation_prompt=True)


def test_the_device_side_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, edgelora.tokenizer, edgelora.data.prepare; "
    code += "from edgelora.tasks import TASKS, get_task; "
    code += "[get_task(name) for name in TASKS]; "
    code += "print(sorted({'torch', 'transformers', 'sklearn', 'pyarrow', 'huggingface_hub'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(1000000000) %}a{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'x' * 10**15 }}", "MemoryError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception['__globals__']['secrets'].token_hex() }}", "unsafe"),
        ("{% set _ = messages.append(messages[0]) %}", "unsafe"),
        ("{% include '/etc/hostname' %}", "no loader"),
    ],
)
def test_a_template_that_does_harm_ends_with_a_message(source: str, said: str) -> None:
    with pytest.raises(DataError, match=f"the chat template refuses the conversation: .*{said}"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "a"}], None, add_generation_prompt=True)


def test_a_template_nested_too_deeply_cannot_be_read() -> None:
    with pytest.raises(ModelError, match="the chat template of the tokenizer cannot be read: "):
        ChatTemplate("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", {})
