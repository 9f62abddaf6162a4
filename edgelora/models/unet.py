"""A U-Net for semantic segmentation: transformers has none of its own.

Source: arXiv 1505.04597 – an encoder that halves the picture at each level, a decoder that doubles it again and is given what
the encoder had at that level – with padded convolutions, batch norm after each, and nearest-neighbour enlargement with a
convolution for the transposed one. Sizes that are not divisible are met by enlarging to the size of the skip.

config.json: {"model_type": "edgelora_unet", "num_channels": 3, "hidden_sizes": [16, 32, 64, 128], "id2label": …}.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

MODEL_TYPE = "edgelora_unet"


class UNetConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = MODEL_TYPE

    def __init__(self, num_channels: int = 3, hidden_sizes: tuple[int, ...] = (16, 32, 64, 128), **others: Any) -> None:
        self.num_channels = num_channels
        self.hidden_sizes = list(hidden_sizes)
        super().__init__(**others)


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.normalization = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.normalization(self.convolution(x)))


class Level(nn.Sequential):
    """Two convolutions of one size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(ConvNorm(inputs, outputs), ConvNorm(outputs, outputs))


class Up(nn.Module):
    """Enlarge, halve the channels, put the skip beside them, and two convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.project = ConvNorm(inputs, outputs)
        self.level = Level(2 * outputs, outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        larger = nn.functional.interpolate(x, size=skip.shape[-2:], mode="nearest")
        y: Tensor = self.level(torch.cat([skip, self.project(larger)], dim=1))
        return y


class UNetModel(nn.Module):
    """pixel_values [B, C, H, W] → [B, hidden_sizes[0], H, W]."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        sizes = config.hidden_sizes
        self.down = nn.ModuleList(Level(a, b) for a, b in zip([config.num_channels, *sizes], sizes, strict=False))
        self.up = nn.ModuleList(Up(a, b) for a, b in zip(sizes[:0:-1], sizes[-2::-1], strict=True))

    def forward(self, pixel_values: Tensor) -> Tensor:
        x, skips = pixel_values, []
        for number, level in enumerate(self.down):
            x = level(x if number == 0 else nn.functional.max_pool2d(x, 2))
            skips.append(x)
        for up, skip in zip(self.up, skips[-2::-1], strict=True):
            x = up(x, skip)
        return x


class UNetForSemanticSegmentation(PreTrainedModel):  # type: ignore[misc]
    """logits [B, labels, H, W]: one more convolution, of single pixels."""

    config_class = UNetConfig
    base_model_prefix = "unet"
    main_input_name = "pixel_values"

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.unet = UNetModel(config)
        self.classifier = nn.Conv2d(config.hidden_sizes[0], config.num_labels, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, pixel_values: Tensor) -> SemanticSegmenterOutput:
        return SemanticSegmenterOutput(logits=self.classifier(self.unet(pixel_values)))


def register() -> None:
    """Let transformers' auto classes know the U-Net."""
    AutoConfig.register(MODEL_TYPE, UNetConfig, exist_ok=True)
    AutoModelForSemanticSegmentation.register(UNetConfig, UNetForSemanticSegmentation, exist_ok=True)
