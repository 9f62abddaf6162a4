"""The rows of families that no pretrained weights are at hand of: each on a small network that is first trained here."""

from __future__ import annotations

from functools import partial

from tasks_bench import pairs, pictures, sequences, sounds, texts
from tasks_bench.entry import Entry, Places, Prepared, split

FASHION = {
    "vit": "ViT", "deit": "DeiT", "swin": "Swin", "mobilevit": "MobileViT", "mobilenet_v2": "MobileNetV2",
    "efficientnet": "EfficientNet", "convnext": "ConvNeXt",
}  # fmt: skip
CONVOLUTIONAL = ("mobilenet_v2", "efficientnet", "convnext")  # which learn slower from 500 pictures
AREAS = {"segformer": "SegFormer", "mobilenet_v2-deeplab": "MobileNetV2 + DeepLabV3"}
INTENTS = {"roberta": "RoBERTa", "distilbert": "DistilBERT", "deberta": "DeBERTa", "modernbert": "ModernBERT"}
WRITERS = {"mt5": "mT5", "bart": "BART", "mbart": "mBART", "marian": "Marian", "bert2bert": "BERT + BERT"}
DECODERS = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma", "gemma2": "Gemma 2",
    "gemma3": "Gemma 3", "phi3": "Phi-3", "smollm3": "SmolLM3", "olmo2": "OLMo 2", "granite": "Granite", "gpt2": "GPT-2",
}  # fmt: skip
HEARERS = {"ast": "AST", "wav2vec2-classes": "wav2vec2", "hubert-classes": "HuBERT"}
MINUTES = 2.0


def intents(places: Places, family: str) -> Prepared:
    """Half of Banking77's intents are for pretraining, the other half for the adapter."""
    first, second = texts.half_of_banking(places)
    model = sequences.pretrained(places, f"{family}-intents", family, first, MINUTES, **{"learning-rate": 1e-3})
    rows = split(second, test=600, valid=200, train=2000)
    note = f"pretrained here for {MINUTES:g} min on 39 intents, adapted to the other 38"
    return texts.prepared(str(model), places.work / "rows" / f"intents-{family}", rows, note=note)


def small(name: str) -> str:
    return f"{name}, small"


FAMILIES = (
    *(
        Entry(
            f"fashion-{family}", "image-classification", small(name), "Fashion-MNIST", "accuracy",
            partial(pictures.fashion, family=family, minutes=MINUTES, counts=(100, 30, 100)),
            options={"epochs": 8} if family in CONVOLUTIONAL else {},
        )
        for family, name in FASHION.items()
    ),
    *(
        Entry(
            f"membrane-{family}", "image-segmentation", small(name), "ISBI 2012 membranes", "mean_iou",
            partial(pictures.membrane, family=family, minutes=MINUTES),
            options={"epochs": 40, "batch-size": 2, "learning-rate": 2e-3},
        )
        for family, name in AREAS.items()
    ),
    *(
        Entry(
            f"intents-{family}", "text-classification", small(name), "Banking77, 38 intents", "accuracy",
            partial(intents, family=family),
        )
        for family, name in INTENTS.items()
    ),
    *(
        Entry(
            f"meanings-{family}", "translation", small(name), "E2E: meaning → text", "chrf",
            partial(sequences.meanings, family=family, minutes=3.0),
            options={"epochs": 3, "learning-rate": 3e-3}, has_head=False,
        )
        for family, name in WRITERS.items()
    ),
    Entry(
        "short-pegasus", "summarization", small("Pegasus"), "E2E: text → name, food, kind, area", "rougeL",
        partial(sequences.places_in_short, family="pegasus", minutes=3.0),
        options={"epochs": 3, "learning-rate": 3e-3}, has_head=False,
    ),
    *(
        Entry(
            f"fsdd-{family}", "audio-classification", small(name), "FSDD digits", "accuracy",
            partial(sounds.halves, family=family), options={"epochs": 10},
        )
        for family, name in HEARERS.items()
    ),
    Entry(
        "fsdd-letters-hubert", "speech-recognition-ctc", small("HuBERT"), "FSDD digits", "cer",
        partial(sounds.spelled, family="hubert"), options={"epochs": 10}, has_head=False,
    ),
    Entry(
        "fashion-names-siglip", "zero-shot-image-classification", small("SigLIP"), "Fashion-MNIST: classes in words",
        "accuracy", pairs.matched, has_head=False,
    ),
    *(
        Entry(
            f"meanings-{family}", "text-generation", small(name), "E2E: meaning → text", "loss",
            partial(sequences.meanings, family=family, minutes=MINUTES, columns=("prompt", "completion")),
            options={"epochs": 1, "learning-rate": 2e-3}, has_head=False, generate=False, rows=100,
        )
        for family, name in DECODERS.items()
    ),
)  # fmt: skip
