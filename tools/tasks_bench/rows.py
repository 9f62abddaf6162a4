"""The rows of the table: of each task, then of the other families."""

from __future__ import annotations

from functools import partial

from tasks_bench import pairs, pictures, sequences, sounds, texts
from tasks_bench.entry import Entry
from tasks_bench.families import FAMILIES

ENTRIES = (
    Entry("banking77", "text-classification", "MiniLM (BERT)", "Banking77, 77 intents", "accuracy", texts.banking),
    Entry(
        "retrieval", "sentence-similarity", "MiniLM (BERT)", "Banking77: question → intent's name", "mrr", texts.retrieval,
        options={"epochs": 1}, has_head=False,
    ),
    Entry(
        "ranking", "text-ranking", "MiniLM (BERT)", "Banking77: 10 candidates a question", "ndcg@10", texts.ranking,
        options={"epochs": 1},
    ),
    Entry("restaurant-ner", "token-classification", "MiniLM (BERT)", "Restaurants-8k slots", "f1", texts.spans),
    Entry(
        "restaurant-decoder", "token-classification", "SmolLM2-135M", "Restaurants-8k slots", "f1",
        partial(texts.spans, model=texts.SMOLLM2), options={"epochs": 1},
    ),
    Entry("wnut17", "token-classification", "MiniLM (BERT)", "WNUT 17", "f1", texts.wnut, options={"epochs": 2}),
    Entry("restaurant-qa", "question-answering", "MiniLM (BERT)", "Restaurants-8k as questions", "f1", texts.questions),
    Entry(
        "restaurant-slots", "multi-label-classification", "MiniLM (BERT)", "Restaurants-8k: which slots", "micro_f1",
        texts.wishes,
    ),
    Entry("ratings", "text-regression", "MiniLM (BERT)", "E2E: rating spoken of", "pearson", texts.ratings),
    Entry(
        "membrane", "image-segmentation", "U-Net", "ISBI 2012 membranes", "mean_iou", pictures.membrane,
        options={"epochs": 10, "batch-size": 2, "learning-rate": 5e-3},
    ),
    Entry("fashion", "image-classification", "ResNet", "Fashion-MNIST", "accuracy", pictures.fashion),
    Entry(
        "bccd-rt-detr", "object-detection", "RT-DETR, small", "BCCD blood cells", "map_50", pictures.cells,
        options={"epochs": 40},
    ),
    Entry(
        "fashion-names", "zero-shot-image-classification", "CLIP, small", "Fashion-MNIST: classes in words", "accuracy",
        pairs.names, has_head=False,
    ),
    Entry(
        "fashion-captions", "image-to-text", "ViT + BERT, small", "Fashion-MNIST: two in a picture", "bleu",
        pairs.captions, has_head=False, rows=100,
    ),
    Entry(
        "fsdd-words", "automatic-speech-recognition", "Whisper tiny.en", "FSDD digits", "wer", sounds.words, has_head=False,
    ),
    Entry(
        "fsdd-letters", "speech-recognition-ctc", "wav2vec2, small", "FSDD digits", "cer", sounds.spelled,
        options={"epochs": 10}, has_head=False,
    ),
    Entry("fsdd-digits", "audio-classification", "Whisper tiny.en", "FSDD digits", "accuracy", sounds.classes),
    Entry(
        "meanings", "translation", "T5, small", "E2E: meaning → text", "bleu", sequences.meanings,
        options={"epochs": 3, "learning-rate": 3e-3}, has_head=False, rows=120,
    ),
    Entry(
        "scripts", "translation", "T5, small, of bytes", "Django's .po: Serbian, Cyrillic → Latin", "chrf", sequences.scripts,
        options={"epochs": 6, "learning-rate": 3e-3, "rank": 16}, has_head=False, rows=120,
    ),
    Entry(
        "e2e", "text-generation", "SmolLM2-135M", "E2E: meaning → text", "loss", texts.descriptions,
        options={"epochs": 1}, has_head=False, generate=False, rows=100,
    ),
    *FAMILIES,
)  # fmt: skip
