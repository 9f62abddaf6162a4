"""optimum-onnx's side of tools/check_loaders, in its own environment with transformers 4.57."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optimum.onnxruntime as ort
import torch
import transformers

CLASSES = {
    "text-generation": "CausalLM", "text-classification": "SequenceClassification", "text-ranking": "SequenceClassification",
    "text-regression": "SequenceClassification", "multi-label-classification": "SequenceClassification",
    "token-classification": "TokenClassification", "question-answering": "QuestionAnswering",
    "sentence-similarity": "CustomTasks", "translation": "Seq2SeqLM", "summarization": "Seq2SeqLM",
    "text2text-generation": "Seq2SeqLM", "image-classification": "ImageClassification",
    "image-segmentation": "SemanticSegmentation", "object-detection": "CustomTasks", "image-to-text": "Vision2Seq",
    "zero-shot-image-classification": "ZeroShotImageClassification", "audio-classification": "AudioClassification",
    "automatic-speech-recognition": "SpeechSeq2Seq", "speech-recognition-ctc": "CTC",
}  # fmt: skip
PIPELINES = (
    "text-classification",
    "token-classification",
    "question-answering",
    "image-classification",
    "audio-classification",
)
Parts = dict[str, Any]


def opened(folder: str, task: str) -> Parts:
    """Return the model and what prepares its inputs, each by transformers' Auto class."""
    parts: Parts = {
        "model": getattr(ort, f"ORTModelFor{CLASSES[task]}").from_pretrained(folder, provider="CPUExecutionProvider")
    }
    if (Path(folder) / "tokenizer_config.json").is_file():
        parts["tokenizer"] = transformers.AutoTokenizer.from_pretrained(folder)
    if task.startswith(("image", "object", "zero")):
        parts["image_processor"] = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    if task.startswith(("audio", "automatic", "speech")):
        parts["feature_extractor"] = transformers.AutoFeatureExtractor.from_pretrained(folder)
    return parts


def continued(parts: Parts, given: str, request: dict[str, Any]) -> list[int]:
    model, chat = parts["model"], [{"role": "user", "content": given}]
    ids = parts["tokenizer"].apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = model.generate(**ids, max_new_tokens=request["new_tokens"], do_sample=False)[0]
    stop = model.generation_config.eos_token_id
    stops = stop if isinstance(stop, list) else [stop]
    return [token for token in found[ids["input_ids"].shape[1] :].tolist() if token not in stops]


def piped(parts: Parts, given: str, request: dict[str, Any]) -> Any:
    """Return the answer of transformers' pipeline of the task, in words."""
    task = request["task"]
    options = {"aggregation_strategy": "simple"} if task == "token-classification" else {}
    pipe = transformers.pipeline(task, **parts, **options)
    if task == "question-answering":
        return pipe(**dict(zip(("question", "context"), given.split("|"), strict=True)))["answer"]
    found = pipe(sound(given) if task == "audio-classification" else given)
    return [[span["word"], span["entity_group"]] for span in found] if task == "token-classification" else found[0]["label"]


def translated(parts: Parts, given: str, request: dict[str, Any]) -> str:
    tokens = parts["tokenizer"](given, return_tensors="pt")
    found = parts["model"].generate(**tokens, max_new_tokens=request["new_tokens"])
    return str(parts["tokenizer"].decode(found[0], skip_special_tokens=True)).strip()


def ranked(parts: Parts, given: str, request: dict[str, Any]) -> list[str]:
    """Return the items of "query|item|item" in the order of their scores."""
    query, *items = given.split("|")
    tokenizer, model = parts["tokenizer"], parts["model"]
    if request["task"] == "text-ranking":
        scores = model(**tokenizer([query] * len(items), items, padding=True, return_tensors="pt")).logits[:, 0]
    else:
        vectors = model(**tokenizer([query, *items], padding=True, return_tensors="pt"))["sentence_embedding"]
        scores = vectors[1:] @ vectors[0]
    return [items[number] for number in scores.argsort(descending=True).tolist()]


def scored(parts: Parts, given: str, request: dict[str, Any]) -> Any:
    logits = parts["model"](**parts["tokenizer"](given, return_tensors="pt")).logits[0]
    if request["task"] == "text-regression":
        return round(float(logits[0]), 2)
    names = parts["model"].config.id2label
    return sorted(names[number] for number in (logits > 0).nonzero()[:, 0].tolist())


def seen(parts: Parts, given: str, request: dict[str, Any]) -> Any:
    """Return the largest area and its share, the boxes that are sure, what is written, or the text that fits best."""
    from PIL import Image

    name, *texts = given.split("|")
    picture, model, task = Image.open(name).convert("RGB"), parts["model"], request["task"]
    pixels = parts["image_processor"](picture, return_tensors="pt")
    if task == "image-to-text":
        return (
            parts["tokenizer"]
            .decode(model.generate(pixels["pixel_values"], max_new_tokens=request["new_tokens"])[0], skip_special_tokens=True)
            .strip()
        )
    if task == "zero-shot-image-classification":
        tokens = parts["tokenizer"](texts, padding=True, return_tensors="pt")
        return texts[int(model(**tokens, **pixels).logits_per_image[0].argmax())]
    names = model.config.id2label
    if task == "image-segmentation":
        areas = parts["image_processor"].post_process_semantic_segmentation(model(**pixels), [picture.size[::-1]])[0]
        largest = int(areas.flatten().bincount().argmax())
        return [names[largest], round(float((areas == largest).float().mean()), 2)]
    out = model(**{name: tensor for name, tensor in pixels.items() if name in model.input_names})
    scores = out["logits"][0].softmax(-1)[:, :-1] if out["logits"].shape[-1] > len(names) else out["logits"][0].sigmoid()
    return sorted(names[number] for number in scores.flatten().gt(0.5).nonzero()[:, 0].remainder(len(names)).tolist())


def sound(path: str) -> Parts:
    import soundfile

    wave, rate = soundfile.read(path, dtype="float32")
    return {"raw": wave, "sampling_rate": rate}


def heard(parts: Parts, given: str, request: dict[str, Any]) -> str:
    read = sound(given)
    features = parts["feature_extractor"](read["raw"], sampling_rate=read["sampling_rate"], return_tensors="pt")
    if request["task"] == "speech-recognition-ctc":
        return str(parts["tokenizer"].decode(parts["model"](**features).logits[0].argmax(-1))).strip()
    return str(
        parts["tokenizer"].decode(
            parts["model"].generate(**features, max_new_tokens=request["new_tokens"])[0], skip_special_tokens=True
        )
    ).strip()


WAYS: dict[str, Callable[[Parts, str, dict[str, Any]], Any]] = {
    "text-generation": continued,
    **dict.fromkeys(PIPELINES, piped),
    **dict.fromkeys(("translation", "summarization", "text2text-generation"), translated),
    **dict.fromkeys(("text-ranking", "sentence-similarity"), ranked),
    **dict.fromkeys(("text-regression", "multi-label-classification"), scored),
    **dict.fromkeys(("image-segmentation", "object-detection", "image-to-text", "zero-shot-image-classification"), seen),
    **dict.fromkeys(("automatic-speech-recognition", "speech-recognition-ctc"), heard),
}


def main() -> None:
    request = json.load(sys.stdin)
    parts = opened(request["bundle"], request["task"])
    with torch.no_grad():
        print(json.dumps([WAYS[request["task"]](parts, given, request) for given in request["inputs"]]))


main()
