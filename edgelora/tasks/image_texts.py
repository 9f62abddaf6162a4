"""Pictures and texts beside each other: arrays of an example, contrastive losses, and how well one finds the other."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora.image_text import SIGMOID, ImageText
from edgelora.tasks.base import Example, GraphTensor, Metrics, Predictor
from edgelora.tasks.classified import log_softmax, ranked
from edgelora.tasks.ranked import retrieval_scores
from edgelora.tasks.texts import cut_before_last

if TYPE_CHECKING:
    import torch

AT_ONCE = 256  # examples whose outputs are held
PROBED = 32  # texts that the scale of the logits is read off
NEVER = float("-inf")


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
    names = {"labels_text": "tokens", "labels_image": "pixels"}
    return {
        label: np.array([zlib.crc32(example.arrays[name].tobytes()) for example in examples], dtype=np.int64)
        for label, name in names.items()
    }


def contrastive(logits_BB: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return CLIP's loss (arXiv 2103.00020, figure 3), summed: the mean of two cross-entropies, of each picture's own text
    among those of the batch and of each text's own picture. Other pairs of the same text or the same picture are left out."""
    import torch

    own = torch.arange(len(logits_BB))
    others = same(batch) & (own[:, None] != own[None, :])
    scores = logits_BB.masked_fill(others, NEVER)
    there, back = (torch.nn.functional.cross_entropy(way, own, reduction="sum") for way in (scores, scores.T))
    return (there + back) / 2


def pairwise(logits_BB: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return SigLIP's loss (arXiv 2303.15343, equation 1), summed over pairs: each fits or does not."""
    import torch

    signs = 2.0 * same(batch).to(logits_BB.dtype) - 1.0
    return -torch.nn.functional.logsigmoid(signs * logits_BB).sum()


def same(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Tell for each pair of a batch, bool [B, B], whether its text or its picture is the same: a pair that fits."""
    found = [batch[name][:, None] == batch[name][None, :] for name in ("labels_text", "labels_image")]
    return found[0] | found[1]


def retrieval(predictor: Predictor, examples: Sequence[Example], names: Sequence[str], processor: ImageText) -> Metrics:
    """Return how well the texts of each picture are found among the distinct texts, and the pictures of each text.

    accuracy is recall@1 of texts. names: what tells pictures apart. loss in nats per picture, over all of them.
    """
    parts = [predictor.outputs(examples[start : start + AT_ONCE]) for start in range(0, len(examples), AT_ONCE)]
    outputs = [said for part in parts for said in part]
    texts = [example.arrays["tokens"].tobytes() for example in examples]
    columns = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    rows = {name: number for number, name in enumerate(dict.fromkeys(names))}
    relevant = np.zeros((len(rows), len(columns)), dtype=bool)
    pictures, sentences = ([said[name] for said in outputs] for name in ("image_embeds", "text_embeds"))
    for text, name in zip(texts, names, strict=True):
        relevant[rows[name], columns[text]] = True
    images_ID = np.stack([pictures[list(names).index(name)] for name in rows]).astype(np.float64)
    texts_TD = np.stack([sentences[texts.index(text)] for text in columns]).astype(np.float64)
    cosines = images_ID @ texts_TD.T
    some = [np.frombuffer(text, np.int32) for text in list(columns)[:PROBED]]
    probe = predictor.outputs([Example({**examples[0].arrays, **text_arrays(some), "alone": np.array(1, np.uint8)})])[0]
    logits = scaled(cosines, cosines[0, : len(some)], probe["logits_per_image"], bias=processor.sigmoid)
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
