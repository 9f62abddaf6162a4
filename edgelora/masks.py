"""Masks: what class each pixel of a picture is of, read from files, resized with their picture, and found from logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import DataError
from edgelora.images import ImageProcessor, center_crop, open_picture, output_size

NEAREST = 0  # Pillow's number
UNSCORED = 255  # in a mask: a pixel of no class
BAND = 1 << 22  # values of logits that are enlarged at once


def resize_mask(processor: ImageProcessor, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a map of classes [H, W], resized to the nearest pixel and cropped as `pixels` are."""
    from PIL import Image

    if processor.resize is not None:
        height, width = output_size(values.shape, processor.resize)
        values = np.asarray(Image.fromarray(values).resize((width, height), resample=NEAREST))
    if processor.crop is not None:
        flipped = np.bitwise_not(values)[..., None]  # so that what is too small gets borders of no class
        values = np.bitwise_not(center_crop(flipped, processor.crop)[..., 0])
    return np.ascontiguousarray(values)


def classes(processor: ImageProcessor, logits: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the classes [H, W] of a picture of `size` from its logits [L, h, w]; 255 where it was cropped away."""
    if processor.crop is None:
        return largest(logits, size)
    from PIL import Image

    height, width = output_size(size, processor.resize) if processor.resize is not None else size
    inside, found = largest(logits, processor.crop), np.full((height, width), UNSCORED, np.uint8)
    starts = [(whole - part) // 2 for whole, part in zip((height, width), processor.crop, strict=True)]
    (top, left), (above, before) = [max(0, start) for start in starts], [max(0, -start) for start in starts]
    inside = inside[above : above + height, before : before + width]
    found[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return np.asarray(Image.fromarray(found).resize(size[::-1], resample=NEAREST))


def bilinear(values: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Return values [L, h, w] enlarged to [L, H, W], as torch's interpolate does it with align_corners=False."""
    for axis, length in ((1, size[0]), (2, size[1])):
        values = between(values, axis, length, 0, length)
    return values


def between(values: NDArray[np.float32], axis: int, length: int, start: int, stop: int) -> NDArray[np.float32]:
    """Return the positions `start` to `stop` of an axis enlarged to `length`, each between its two neighbours."""
    old = values.shape[axis]
    places = np.maximum((np.arange(start, stop, dtype=np.float32) + 0.5) * np.float32(old / length) - 0.5, 0)
    lower = np.minimum(places.astype(np.int64), old - 1)
    share = (places - lower).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(3)])
    upper = np.minimum(lower + 1, old - 1)
    return np.asarray(values.take(lower, axis) * (1 - share) + values.take(upper, axis) * share)


def largest(logits: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the class with the largest of logits [L, h, w] at each pixel of [H, W], some lines at a time."""
    lines = max(1, BAND // (len(logits) * size[1]))
    found = np.empty(size, np.uint8)
    for start in range(0, size[0], lines):
        stop = min(start + lines, size[0])
        band = between(logits, 1, size[0], start, stop)
        found[start:stop] = between(band, 2, size[1], 0, size[1]).argmax(0)
    return found


def read_mask(path: str | Path) -> NDArray[np.int32]:
    """Return the values of a mask [H, W]. Raises DataError for what is no picture with one value a pixel."""
    name = Path(path).name
    picture = open_picture(path, colours=False)
    values = np.asarray(picture).astype(np.int32)
    if values.ndim == 3:
        colours = values[..., :1] if picture.mode == "LA" else values[..., :3]
        if not (colours == colours[..., :1]).all():
            raise DataError(f"{name} is coloured; a mask has one value a pixel: a grey or indexed picture")
        values = colours[..., 0]
    return values


def class_map(
    mask: NDArray[np.int32], size: tuple[int, ...], values: Mapping[str, str | None], labels: Sequence[str]
) -> NDArray[np.uint8]:
    """Return the number of each pixel's label, or 255, uint8 [H, W]; `values` names the label of a value, null for none.

    Raises DataError for a mask that is not of its picture's size, and for a value that means nothing.
    """
    if mask.shape != size:
        raise DataError(f"the mask is {mask.shape[1]} × {mask.shape[0]} pixels, its image {size[1]} × {size[0]}")
    numbers = {label: number for number, label in enumerate(labels)}
    known = {str(UNSCORED): None, **values}
    found, places = np.unique(mask, return_inverse=True)
    meant = [known.get(str(value), "") for value in found]
    unknown = [str(value) for value, label in zip(found, meant, strict=True) if label is not None and label not in numbers]
    if unknown:
        shown = ", ".join(unknown[:5]) + (" …" if len(unknown) > 5 else "")
        raise DataError(
            f"the mask has the value {shown}; known are {', '.join(list(values)[:20])}, and {UNSCORED} for no class"
        )
    table = np.array([UNSCORED if label is None else numbers[label] for label in meant], np.uint8)
    return table[places].reshape(mask.shape)
