"""What CLIP and SigLIP read: pictures, and texts in the form that the text encoder was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import ModelError
from edgelora.images import ImageProcessor
from edgelora.tokenizer import Tokenizer, length_limit, read_config

SIGMOID = "siglip"  # each pair is judged by itself; texts are padded to the end of the positions, and no mask tells padding
KINDS = ("clip", SIGMOID)


@dataclass(frozen=True)
class ImageText:
    """positions: the most tokens of a text; sigmoid: SigLIP's way."""

    images: ImageProcessor
    tokenizer: Tokenizer
    positions: int
    sigmoid: bool

    @classmethod
    def from_folder(cls, folder: Path) -> ImageText:
        """Raises ModelError for another model type, and for a folder without image processor or tokenizer.json."""
        config = read_config(folder / "config.json")
        kind = config.get("model_type")
        if kind not in KINDS:
            raise ModelError(f'pictures and texts are compared by {" and ".join(KINDS)}; this model is "{kind}"')
        images, tokenizer = ImageProcessor.from_folder(folder), Tokenizer.from_folder(folder)
        return cls(images, tokenizer, length_limit(config), kind == SIGMOID)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Height and width of every picture; None where they depend on it."""
        return self.images.output_size

    def encode(self, text: str) -> NDArray[np.int32]:
        return np.array(self.tokenizer.encode(text, add_special_tokens=True), dtype=np.int32)

    def batch(self, texts: Sequence[NDArray[np.int32]]) -> dict[str, NDArray[Any]]:
        """Return input_ids [T, S] int64, padded on the right, and attention_mask where the model takes one."""
        longest = self.positions if self.sigmoid else max(map(len, texts))
        ids = np.full((len(texts), longest), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(texts):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        return {"input_ids": ids} if self.sigmoid else {"input_ids": ids, "attention_mask": mask}
