"""`edgelora chat BUNDLE`: a conversation in the terminal. The KV cache lives on from turn to turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgelora.config import GenerateConfig
from edgelora.errors import EdgeLoRAError, UserError
from edgelora.run.answer import note
from edgelora.run.model import Model, load

HELP = "/reset forgets the conversation, /exit ends it (Ctrl-D too), Ctrl-C ends an answer."


def chat(
    bundle: Path,
    config: GenerateConfig | None = None,
    *,
    threads: int | None = None,
    adapter: str | None = None,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Talk until /exit or the end of the input; return {"turns": …, "messages": […]}.

    `read(prompt)` returns a line and raises EOFError at the end; `write` is given the text that people see.
    Raises UserError where the bundle cannot chat.
    """
    show = write or (lambda text: print(text, end="", flush=True))
    model = load(bundle, threads=threads, adapter=adapter)
    if model.generator.tokenizer.chat_template is None:
        raise UserError(f"{bundle} has no chat template: it continues text", hint=f'edgelora run {bundle} "some text"')
    show(f"{HELP}\n")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            show("\n")
            break
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            messages = []
            show("The conversation is forgotten.\n")
        elif line.startswith("/"):
            show(f"{line.split()[0]} is not a command. {HELP}\n")
        elif line:
            turn(model, messages, line, config or GenerateConfig(), show)
    return {"turns": sum(message["role"] == "assistant" for message in messages), "messages": messages}


def turn(model: Model, messages: list[dict[str, str]], line: str, config: GenerateConfig, show: Callable[[str], None]) -> None:
    """Answer one line and append both turns; an answer that fails leaves the conversation as it was."""
    asked = [*messages, {"role": "user", "content": line}]
    try:
        answer = model.start(asked, config)
        try:
            for piece in answer:
                show(piece)
        except KeyboardInterrupt:
            answer.finish = "interrupted"
    except EdgeLoRAError as error:
        # The commonest: the conversation has outgrown the model. The person goes on talking.
        show(f"error: {error.message}\n/reset begins anew.\n")
        return
    show(note(answer.finish, model) + "\n")
    messages[:] = [*asked, {"role": "assistant", "content": answer.text}]
