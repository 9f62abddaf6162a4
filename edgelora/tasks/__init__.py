"""The registry of tasks."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from edgelora.errors import DataError, SettingsError, did_you_mean
from edgelora.tasks.base import Task

TASKS = {
    "text-generation": "edgelora.tasks.text_generation:TextGeneration",
    "text-classification": "edgelora.tasks.text_classification:TextClassification",
    "multi-label-classification": "edgelora.tasks.multi_label_classification:MultiLabelClassification",
    "text-regression": "edgelora.tasks.text_regression:TextRegression",
    "sentence-similarity": "edgelora.tasks.sentence_similarity:SentenceSimilarity",
    "text-ranking": "edgelora.tasks.text_ranking:TextRanking",
    "token-classification": "edgelora.tasks.token_classification:TokenClassification",
    "question-answering": "edgelora.tasks.question_answering:QuestionAnswering",
    "translation": "edgelora.tasks.translation:Translation",
    "summarization": "edgelora.tasks.summarization:Summarization",
    "image-classification": "edgelora.tasks.image_classification:ImageClassification",
    "image-segmentation": "edgelora.tasks.image_segmentation:ImageSegmentation",
    "object-detection": "edgelora.tasks.object_detection:ObjectDetection",
    "zero-shot-image-classification": "edgelora.tasks.zero_shot_image_classification:ZeroShotImageClassification",
    "image-to-text": "edgelora.tasks.image_to_text:ImageToText",
    "audio-classification": "edgelora.tasks.audio_classification:AudioClassification",
    "automatic-speech-recognition": "edgelora.tasks.automatic_speech_recognition:SpeechRecognition",
    "speech-recognition-ctc": "edgelora.tasks.speech_recognition_ctc:SpeechRecognitionCTC",
}


def get_task(name: str) -> Task:
    """Return the task of that name. Raises SettingsError with the closest match and the list."""
    if name not in TASKS:
        message = f'"{name}" is not a task.{did_you_mean(name, TASKS)} Tasks: {", ".join(TASKS)}'
        raise SettingsError(message, hint="edgelora tasks")
    module, _, attribute = TASKS[name].partition(":")
    task: Task = getattr(importlib.import_module(module), attribute)()
    return task


def guess_task(columns: Iterable[str]) -> Task:
    """Return the task whose columns are all there: the one that uses the most of them. Raises DataError when none fits."""
    found = set(columns)
    fits = []
    for name in TASKS:
        task = get_task(name)
        fits += [(len(shape), task) for shape in task.shapes if found.issuperset(shape)]
    if fits:
        return max(fits, key=lambda fit: fit[0])[1]
    import difflib

    shapes = [(name, shape) for name in TASKS for shape in get_task(name).shapes]
    known = {column for _, shape in shapes for column in shape} - found
    matches = {column: match for column in sorted(found) for match in difflib.get_close_matches(column, known, n=1)}
    near = [(name, shape) for name, shape in shapes if {*found, *matches.values()}.issuperset(shape)]
    asked = {column for _, shape in near or shapes for column in shape}
    close = [f"{match}={column}" for column, match in matches.items() if match in asked]
    wanted = [f"{' + '.join(shape)} ({name})" for name, shape in near or shapes]
    raise DataError(
        f"no task has the columns {', '.join(sorted(found)) or '(none)'}; wanted one of: {', '.join(wanted)}",
        hint=f"--columns {','.join(close) or 'prompt=mr,completion=ref'} maps our names to the data's",
    )
