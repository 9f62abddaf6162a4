"""`edgelora run`'s side of tools/check_loaders: a request as JSON on stdin, what the bundle says as JSON on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

from edgelora.run.model import load

# Of each task: the answer in words, from what `edgelora run --json` has.
WORDS: dict[str, Any] = {
    "text-classification": lambda found: found[0]["label"],
    "image-classification": lambda found: found[0]["label"],
    "audio-classification": lambda found: found[0]["label"],
    "token-classification": lambda found: [[span["text"], span["label"]] for span in found],
    "question-answering": lambda found: found["answer"],
    "automatic-speech-recognition": lambda found: found["text"] if isinstance(found, dict) else found,
}


def main() -> None:
    request = json.load(sys.stdin)
    model = load(request["bundle"])
    task = request["task"]
    said: list[Any] = []
    for given in request["inputs"]:
        if task == "text-generation":
            answer = model.answer([{"role": "user", "content": given}], max_new_tokens=request["new_tokens"])
            said.append(answer.tokens)
            continue
        row = {model.classifier.task.answered: given}
        if task == "question-answering":
            row = dict(zip(("question", "context"), given.split("|"), strict=True))
        (found,) = model.answers([row])
        said.append(WORDS.get(task, str)(found))
    print(json.dumps(said))


main()
