"""optimum-onnx's side of tools/check_loaders, in its own environment with transformers 4.57."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import optimum.onnxruntime as ort
import transformers

CLASSES = {
    "text-generation": "ORTModelForCausalLM",
    "text-classification": "ORTModelForSequenceClassification",
    "token-classification": "ORTModelForTokenClassification",
    "question-answering": "ORTModelForQuestionAnswering",
    "text2text-generation": "ORTModelForSeq2SeqLM",
    "image-classification": "ORTModelForImageClassification",
    "audio-classification": "ORTModelForAudioClassification",
}


def words(task: str, found: Any) -> Any:
    """Return the answer in words, from what a pipeline of transformers gives."""
    first = found[0] if isinstance(found, list) and found else found
    if task == "token-classification":
        return [[span["word"], span["entity_group"]] for span in found]
    return first.get("label") or first.get("answer") or first.get("text") or first.get("generated_text")


def class_of(request: dict[str, Any]) -> str:
    if request["task"] != "automatic-speech-recognition":
        return CLASSES[request["task"]]
    whole = list(Path(request["bundle"]).glob("onnx/decoder*"))
    return "ORTModelForSpeechSeq2Seq" if whole else "ORTModelForCTC"


def main() -> None:
    request = json.load(sys.stdin)
    said: list[Any] = []
    task, folder = request["task"], request["bundle"]
    model = getattr(ort, class_of(request)).from_pretrained(folder, provider="CPUExecutionProvider")
    if task == "text-generation":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        for given in request["inputs"]:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": given}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            found = model.generate(**ids, max_new_tokens=request["new_tokens"], do_sample=False)[0]
            stop = model.generation_config.eos_token_id
            stops = stop if isinstance(stop, list) else [stop]
            said.append([token for token in found[ids["input_ids"].shape[1] :].tolist() if token not in stops])
        print(json.dumps(said))
        return
    parts: dict[str, Any] = {}
    if (Path(folder) / "tokenizer.json").is_file():
        parts["tokenizer"] = transformers.AutoTokenizer.from_pretrained(folder)
    if task.startswith("image"):
        parts["image_processor"] = transformers.AutoImageProcessor.from_pretrained(folder)
    if "audio" in task or "speech" in task:
        parts["feature_extractor"] = transformers.AutoFeatureExtractor.from_pretrained(folder)
    options = {"aggregation_strategy": "simple"} if task == "token-classification" else {}
    pipe = transformers.pipeline(task, model=model, **parts, **options)
    for given in request["inputs"]:
        pair = dict(zip(("question", "context"), given.split("|"), strict=True)) if task == "question-answering" else None
        said.append(words(task, pipe(given) if pair is None else pipe(**pair)))
    print(json.dumps(said))


main()
