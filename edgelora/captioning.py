"""What an encoder of pictures sees and its decoder writes: the image processor, and the decoder's side of the folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgelora.errors import ModelError
from edgelora.images import ImageProcessor
from edgelora.search import Search
from edgelora.tokenizer import length_limit, read_config
from edgelora.writing import Writing


class Describing(Writing):
    """Targets as any decoder's, none longer than its positions."""

    @cached_property
    def places(self) -> int:
        return length_limit(dict(self.settings.get("decoder") or self.settings))

    @cached_property
    def search(self) -> Search:
        return Search.from_settings(self.settings, self.prompt, self.eos).limited(self.places - len(self.prompt))


@dataclass(frozen=True)
class Captioning:
    """positions: what the encoder makes of a picture."""

    images: ImageProcessor
    writing: Describing
    positions: int

    @classmethod
    def from_folder(cls, folder: Path) -> Captioning:
        """Raises ModelError for a folder without an image processor or tokenizer, or of another kind."""
        config: dict[str, Any] = read_config(folder / "config.json")
        encoder = config.get("encoder") or {}
        if "image_size" not in encoder or "patch_size" not in encoder:
            raise ModelError(
                f'pictures are described by an encoder of patches and a decoder; this model is "{config.get("model_type")}"'
            )
        writing = Describing.from_folder(folder)
        assert isinstance(writing, Describing)
        (height, width), patch = pair(encoder["image_size"]), pair(encoder["patch_size"])
        positions = (height // patch[0]) * (width // patch[1]) + 1
        return cls(ImageProcessor.from_folder(folder), writing, positions)


def pair(size: Any) -> tuple[int, int]:
    """Return height and width of a size, which may be one number for both."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
