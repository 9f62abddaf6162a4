"""What tasks on pictures share: the processor, the graph's input, lengths in patches, pictures to try an export on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgelora.images import ImageProcessor
from edgelora.tasks.base import Example, GraphTensor, Row, Task
from edgelora.tasks.rows import path_problems

PATCH = 16  # pixels
TRACED = {"height": 64, "width": 64}  # large enough to be halved some times


class Pictures(Task):
    """A task with a column `image`. Its examples have pixels uint8 [H, W, 3] and, as length, their patches of 16 × 16 pixels:
    what batches and the planner's memory go by."""

    file_columns: ClassVar[tuple[str, ...]] = ("image",)
    unit = "patches"
    answered = "image"

    def open_processor(self, folder: Path) -> ImageProcessor:
        return ImageProcessor.from_folder(folder)

    def file_problems(self, row: Row) -> list[str]:
        """Return what is wrong with the columns that hold a path."""
        return path_problems(row, self.file_columns)

    def inputs(self, config: Mapping[str, Any], accepted: Collection[str]) -> tuple[GraphTensor, ...]:
        """A vision transformer has an embedding for each place of its image_size. TensorFlow's padding depends on the size that
        the processor gives, and MobileViT stretches what its patches do not divide; a plain convolution slides over any
        picture."""
        size = config.get("image_size") if "interpolate_pos_encoding" in accepted else None
        if config.get("tf_padding") or str(config.get("model_type")).startswith("mobilevit"):
            size = config.get("input_size") or config.get("image_size")
        height, width = (size, size) if isinstance(size, int) else size or ("height", "width")
        return (GraphTensor("pixel_values", "float32", ("batch_size", 3, height, width), TRACED),)

    def picture_arrays(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Return pixels and length of an example."""
        patches = -(-pixels.shape[0] // PATCH) * -(-pixels.shape[1] // PATCH)
        return {"pixels": pixels, "length": np.array(patches, dtype=np.int32)}

    def truncate(self, example: Example, max_length: int) -> Example:
        return example

    def example_problems(self, example: Example, max_length: int) -> list[str]:
        return []


def trial_pictures() -> list[Any]:
    """Return Pillow images: noise of three kinds, and a plain one."""
    from PIL import Image

    random = np.random.default_rng(0)
    pictures = [random.integers(0, high, (64, 80, 3)).astype(np.uint8) for high in (256, 96, 2)]
    return [Image.fromarray(picture) for picture in [*pictures, np.full((64, 80, 3), 127, np.uint8)]]
