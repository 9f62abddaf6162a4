"""Pictures and texts beside each other: arrays of an example, contrastive losses, and how well one finds the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.image_text import SIGMOID, ImageText
from edgelora.tasks.base import Example, GraphTensor, Metrics, Predictor
from edgelora.tasks.classified import log_softmax, ranked
from edgelora.tasks.contrast import fitting, mark, outputs_of, own_pairs_loss, relevance
from edgelora.tasks.ranked import retrieval_scores
from edgelora.tasks.texts import cut_before_last

if TYPE_CHECKING:
    import torch

PROBED = 32  # texts that the scale of the logits is read off
MARKS = ("labels_text", "labels_image")


def pair_inputs(config: Mapping[str, Any]) -> tuple[GraphTensor, ...]:
    """Return the graph's inputs: texts and pictures, which may be as many as they like."""
    names = ("input_ids",) if config.get("model_type") == SIGMOID else ("input_ids", "attention_mask")
    size = int((config.get("vision_config") or {}).get("image_size", 224))
    pixels = GraphTensor("pixel_values", "float32", ("image_batch_size", 3, size, size))
    return (*(GraphTensor(name, "int64", ("text_batch_size", "sequence_length")) for name in names), pixels)


def text_arrays(texts: Sequence[NDArray[np.int32]]) -> dict[str, NDArray[Any]]:
    """Return tokens int32 [all together], sizes int32 [texts] and alone uint8 []: several texts are not batched with others."""
    sizes = np.array([len(tokens) for tokens in texts], np.int32)
    return {"tokens": np.concatenate(texts), "sizes": sizes, "alone": np.array(len(texts) > 1, np.uint8)}


def texts_of(example: Example) -> list[NDArray[np.int32]]:
    """Return the tokens of each text of an example."""
    return np.split(example.arrays["tokens"], np.cumsum(example.arrays["sizes"])[:-1])


def cut_texts(example: Example, max_length: int) -> Example:
    """Return the example with texts of at most so many tokens, the last token kept, which closes each."""
    whole = texts_of(example)
    texts = [cut_before_last(Example({"ids": tokens}), max_length).arrays["ids"] for tokens in whole]
    length = example.arrays["length"] + (sum(map(len, texts)) - sum(map(len, whole)))
    return Example({**example.arrays, **text_arrays(texts), "length": np.array(length, np.int32)})


def marks(examples: Sequence[Example]) -> dict[str, NDArray[np.int64]]:
    """Return labels_text and labels_image [B], which tell texts apart, and pictures."""
    return {
        name: mark([example.arrays[own] for example in examples]) for name, own in zip(MARKS, ("tokens", "pixels"), strict=True)
    }


def contrastive(logits_BB: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return CLIP's loss (arXiv 2103.00020, figure 3), summed: the mean of two cross-entropies, of each picture's own text
    among those of the batch and of each text's own picture. Other pairs of the same text or the same picture are left out."""
    return own_pairs_loss(logits_BB, fitting(batch, MARKS), both=True)


def pairwise(logits_BB: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return SigLIP's loss (arXiv 2303.15343, equation 1), summed over pairs: each fits or does not."""
    import torch

    signs = 2.0 * fitting(batch, MARKS).to(logits_BB.dtype) - 1.0
    return -torch.nn.functional.logsigmoid(signs * logits_BB).sum()


def retrieval(predictor: Predictor, examples: Sequence[Example], names: Sequence[str], processor: ImageText) -> Metrics:
    """Return how well the texts of each picture are found among the distinct texts, and the pictures of each text.

    accuracy is recall@1 of texts. names: what tells pictures apart. loss in nats per picture, over all of them.
    """
    texts = [example.arrays["tokens"].tobytes() for example in examples]
    rows, columns, relevant = relevance(names, texts)
    images_ID = np.stack(outputs_of(predictor, [examples[row] for row in rows], "image_embeds"))
    texts_TD = np.stack(outputs_of(predictor, [examples[column] for column in columns], "text_embeds"))
    cosines = images_ID @ texts_TD.T
    some = [np.frombuffer(texts[column], np.int32) for column in columns[:PROBED]]
    probe = Example({**examples[rows[0]].arrays, **text_arrays(some), "alone": np.array(1, np.uint8)})
    known = predictor.outputs([probe])[0]["logits_per_image"]
    logits = scaled(cosines, cosines[0, : len(some)], known, bias=processor.sigmoid)
    there, back = retrieval_scores(cosines, relevant), retrieval_scores(cosines.T, relevant.T)
    found = {"accuracy": there.pop("recall@1"), **there, **{f"image_{name}": back[name] for name in back if name != "mrr"}}
    return {"loss": loss_of(logits, relevant, sigmoid=processor.sigmoid), **found}


def scaled(cosines: NDArray[Any], known: NDArray[Any], logits: NDArray[Any], *, bias: bool) -> NDArray[np.float64]:
    """Return the logits of cosines by the scale (and bias) that the logits of some `known` cosines were made with."""
    ones = [np.ones_like(known)] if bias else []
    found = np.linalg.lstsq(np.stack([known, *ones], axis=1), logits.astype(np.float64), rcond=None)[0]
    return np.asarray(cosines * found[0] + (found[1] if bias else 0.0))


def loss_of(logits: NDArray[np.float64], relevant: NDArray[np.bool_], *, sigmoid: bool) -> float:
    """Return the loss in nats per picture of logits [pictures, texts]."""
    if sigmoid:
        return float(np.logaddexp(0.0, np.where(relevant, -logits, logits)).sum(axis=1).mean())
    best = [np.where(fits, log_softmax(way), -np.inf).max(axis=1) for way, fits in ((logits, relevant), (logits.T, relevant.T))]
    return -float(sum(way.mean() for way in best)) / 2


def judged(logits: NDArray[Any], texts: Sequence[str], *, sigmoid: bool) -> list[tuple[str, float]]:
    """Return (text, probability) of one picture's logits [texts], the best first; of SigLIP each is judged by itself."""
    if not sigmoid:
        return ranked(logits, texts)
    alone = (1 / (1 + np.exp(-logits.astype(np.float64)))).tolist()
    return sorted(zip(texts, alone, strict=True), key=lambda pair: -pair[1])
