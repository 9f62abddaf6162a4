"""Pictures to arrays as a model's preprocessor_config.json says, on numpy and Pillow: the same on the laptop and on the device.

Source: the image processors of transformers with Pillow (resize in bytes, crop, rescale, normalize). Pictures are RGB, upright
by their EXIF orientation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.errors import DataError, MachineError
from edgelora.preprocessor import read_preprocessor

BILINEAR = 2  # Pillow's number
SMALL_CONVNEXT = 384  # pixels from which ConvNeXt's processor does not crop
MOST_PIXELS = 200_000_000


@dataclass(frozen=True)
class ImageProcessor:
    """What preprocessor_config.json says. resize: (height, width), the shortest edge, or None; longest: what the other edge may
    come to; sizes in pixels."""

    resize: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    resample: int
    scale: float  # what bytes are multiplied with
    offset: float  # and then lessened by
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip_channels: bool = False
    longest: int | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> ImageProcessor:
        """Read a folder in Hugging Face layout. Raises ModelError where there is no usable preprocessor_config.json."""
        return read_preprocessor(folder, "image_processor", cls.from_config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ImageProcessor:
        """Raises KeyError, TypeError or ValueError for what cannot be read."""
        size, crop = config.get("size"), None
        wants_crop = bool(config.get("do_center_crop"))
        resize = (
            size_of(size, square=not wants_crop and "crop_pct" not in config)
            if config.get("do_resize", True) and size is not None
            else None
        )
        if wants_crop:
            crop = box_of(config.get("crop_size") or size)
        if "crop_pct" in config and isinstance(resize, int):  # ConvNeXt: larger first, then its middle
            edge, share = resize, config["crop_pct"] or 224 / 256
            small = edge < SMALL_CONVNEXT
            resize, crop = (int(edge / share), (edge, edge)) if small else ((edge, edge), None)
        # MobileViT's processor, which alone swaps the channels, normalizes nothing and may not say so
        normalize = bool(config.get("do_normalize", "do_flip_channel_order" not in config))
        mean = tuple(map(float, config.get("image_mean") or (0.5,) * 3))
        std = tuple(map(float, config.get("image_std") or (0.5,) * 3))
        twice = config.get("include_top")  # EfficientNet: divided by the deviation once more
        scale = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
        return cls(
            resize,
            crop,
            int(BILINEAR if config.get("resample") is None else config["resample"]),
            scale,
            1.0 if config.get("rescale_offset") else 0.0,
            mean if normalize else (0.0,) * 3,
            tuple(value ** (normalize + bool(twice)) for value in std),
            bool(config.get("do_flip_channel_order")),
            int(size["longest_edge"]) if isinstance(size, dict) and size.get("longest_edge") else None,
        )

    def as_config(self) -> dict[str, Any]:
        """Return the whole settings for a file, whatever a reader takes for granted, with the class that does as they say."""
        sizes: dict[str, Any] = {"do_resize": self.resize is not None, "do_center_crop": self.crop is not None, "do_pad": False}
        if isinstance(self.resize, int):
            sizes["size"] = {"shortest_edge": self.resize, **({"longest_edge": self.longest} if self.longest else {})}
        elif self.resize is not None:
            sizes["size"] = {"height": self.resize[0], "width": self.resize[1]}
        if self.crop is not None:
            sizes["crop_size"] = {"height": self.crop[0], "width": self.crop[1]}
        odd: dict[str, Any] = {"do_flip_channel_order": True} if self.flip_channels else {}
        if self.offset:
            odd |= {"rescale_offset": True, "include_top": False}  # which would normalize twice
        kind = "MobileViT" if self.flip_channels else "EfficientNet" if self.offset else "CLIP" if self.cuts else "ViT"
        return {
            **sizes, **odd, "resample": self.resample, "do_rescale": True, "rescale_factor": self.scale,
            "do_normalize": True, "image_mean": list(self.mean), "image_std": list(self.std),
            "image_processor_type": f"{kind}ImageProcessor",
        }  # fmt: skip

    @property
    def cuts(self) -> bool:
        """Whether a picture keeps its proportions or loses its borders."""
        return self.crop is not None or isinstance(self.resize, int)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Height and width of every picture; None where they depend on it."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)

    def read(self, path: str | Path) -> NDArray[np.uint8]:
        """Return a picture file as `pixels` does. Raises DataError where it is none, damaged or too large."""
        return self.pixels(open_picture(path))

    def pixels(self, picture: Any) -> NDArray[np.uint8]:
        """Return a Pillow image, resized and cropped, [H, W, 3]."""
        if self.resize is not None:
            height, width = output_size(picture.size[::-1], self.resize, self.longest)
            picture = picture.resize((width, height), resample=self.resample)
        array = np.asarray(picture, dtype=np.uint8)
        array = array if self.crop is None else center_crop(array, self.crop)
        return np.ascontiguousarray(array[..., ::-1] if self.flip_channels else array)

    def normalize(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return pixels [..., H, W, 3] as the network reads them, fp32 [..., 3, H, W]."""
        mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
        values = pixels.astype(np.float32) * np.float32(self.scale) - np.float32(self.offset)
        return np.ascontiguousarray(np.moveaxis((values - mean) / std, -1, -3))


def size_of(size: Any, *, square: bool) -> tuple[int, int] | int:
    """Return (height, width) or the shortest edge of what a config calls size; one number alone may mean either."""
    if isinstance(size, int):
        return (size, size) if square else size
    if "shortest_edge" in size:
        return int(size["shortest_edge"])
    return int(size["height"]), int(size["width"])


def box_of(size: Any) -> tuple[int, int]:
    found = size_of(size, square=True)
    return (found, found) if isinstance(found, int) else found


def output_size(size: tuple[int, int], wanted: tuple[int, int] | int, longest: int | None = None) -> tuple[int, int]:
    """Return height and width after resizing; of a shortest edge the other one keeps the proportion, rounded down. Where that
    came to more than `longest`, the shortest edge is less."""
    if not isinstance(wanted, int):
        return wanted
    height, width = size
    exact = float(wanted)
    if longest is not None and max(size) / min(size) * wanted > longest:
        exact = longest * min(size) / max(size)
    wanted = round(exact)
    if width <= height:
        return int(exact * height / width), wanted
    return wanted, int(exact * width / height)


def center_crop(array: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the middle of [H, W, 3]; what is too small gets black borders."""
    height, width = array.shape[:2]
    if height < size[0] or width < size[1]:
        larger = max(height, size[0]), max(width, size[1])
        top, left = math.ceil((larger[0] - height) / 2), math.ceil((larger[1] - width) / 2)
        around = np.zeros((*larger, array.shape[2]), np.uint8)
        around[top : top + height, left : left + width] = array
        array = around
    top, left = (array.shape[0] - size[0]) // 2, (array.shape[1] - size[1]) // 2
    return array[top : top + size[0], left : left + size[1]]


def picture_size(path: Path) -> tuple[int, int]:
    """Return width and height of a picture file, upright. Raises DataError for what is none."""
    width, height = open_picture(path).size
    return width, height


def open_picture(path: str | Path, *, colours: bool = True) -> Any:
    """Return a picture file as an upright RGB image of Pillow, or without `colours` in its own mode. Raises DataError for what
    cannot be read as one."""
    path = Path(path)
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MachineError("pictures need Pillow", hint='pip install "edgelora[image]"') from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on size and on broken EXIF data
            with Image.open(path) as file:
                width, height = file.size
                if width * height > MOST_PIXELS:
                    raise DataError(
                        f"{path.name} has {width} × {height} pixels; at most {MOST_PIXELS // 10**6} million are read"
                    )
                picture = ImageOps.exif_transpose(file)
                if not colours:
                    picture.load()
                    return picture
                if picture.mode.startswith("I;16"):  # Pillow would cut 16 bits off at 255 instead of scaling them
                    picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
                return picture.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        reason = "it is no picture that Pillow reads" if type(error).__name__ == "UnidentifiedImageError" else str(error)
        name = "/".join(path.parts[-2:])  # names such as 1.png stand in the folder of every label
        raise DataError(f"{name} cannot be read: {reason or type(error).__name__}") from None
