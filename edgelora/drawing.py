"""Answers drawn on pictures: areas, boxes and their labels, with Pillow; and areas as run lengths."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Colours that are easy to tell apart (Sasha Trubetskoy's list), RGB.
COLOURS = (
    (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240), (240, 50, 230),
    (210, 245, 60), (250, 190, 212), (0, 128, 128), (220, 190, 255), (170, 110, 40), (255, 250, 200), (128, 0, 0),
    (170, 255, 195), (128, 128, 0), (255, 215, 180), (0, 0, 128), (128, 128, 128),
)  # fmt: skip
COVER = 0.45  # of a pixel's colour that is its area's


def colour_of(number: int) -> tuple[int, int, int]:
    return COLOURS[number % len(COLOURS)]


def with_masks(picture: Any, masks: Mapping[str, NDArray[np.bool_]]) -> Any:
    """Return a picture with areas bool [H, W] laid over it, and their labels in a corner; colours go by the labels' order."""
    from PIL import Image

    pixels = np.asarray(picture.convert("RGB")).astype(np.float32)
    names = sorted(masks)
    for number, name in enumerate(names):
        pixels[masks[name]] = (1 - COVER) * pixels[masks[name]] + COVER * np.array(colour_of(number), np.float32)
    drawn = Image.fromarray(pixels.round().astype(np.uint8))
    line = font_size(drawn) + 4
    for number, name in enumerate(names):
        write(drawn, (4, 4 + number * line), name, colour_of(number))
    return drawn


def with_boxes(picture: Any, boxes: Sequence[tuple[str, str, Sequence[float]]]) -> Any:
    """Return a picture with (label, text, [left, top, right, bottom]) drawn on it; colours go by the labels' order."""
    from PIL import ImageDraw

    drawn = picture.convert("RGB")
    names = sorted({label for label, _, _ in boxes})
    width = max(1, min(drawn.size) // 200)
    for label, text, corners in boxes:
        colour = colour_of(names.index(label))
        left, top, right, bottom = corners
        ordered = [min(left, right), min(top, bottom), max(left, right), max(top, bottom)]
        ImageDraw.Draw(drawn).rectangle(ordered, outline=colour, width=width)
        write(drawn, (ordered[0], max(0.0, ordered[1] - font_size(drawn) - 3)), text, colour)
    return drawn


def font_size(picture: Any) -> int:
    return int(max(10, min(picture.size) // 40))


def write(picture: Any, place: tuple[float, float], text: str, colour: tuple[int, int, int]) -> None:
    """Write text on a ground of its colour, black or white, whichever is easier to read there."""
    from PIL import ImageDraw, ImageFont

    brush, font = ImageDraw.Draw(picture), ImageFont.load_default(font_size(picture))
    left, top, right, bottom = brush.textbbox(place, text, font=font)
    brush.rectangle([left - 2, top - 1, right + 2, bottom + 1], fill=colour)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    brush.text(place, text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Return COCO's uncompressed run lengths of a mask [H, W]: down its columns, first what is outside."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(count) for count in np.diff(np.concatenate([[0], changes, [mask.size]]))]


def from_run_lengths(counts: Sequence[int], size: Sequence[int]) -> NDArray[np.bool_]:
    """Return the mask [H, W] of run lengths."""
    inside = itertools.cycle((False, True))
    flat = np.concatenate([np.full(count, next(inside), np.bool_) for count in counts])
    return flat.reshape(tuple(size), order="F")
