"""GGUF files: their index, read once by the converter, and their tensors, unpacked one at a time into Hugging Face's form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgelora.errors import ModelError
from edgelora.models.families import decoder_spec
from edgelora.models.gguf_config import NORM_OFFSET, PERMUTED, gguf_config
from edgelora.models.layout import decoder_shapes
from edgelora.models.weights import map_bytes

UNPACKED = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
ROWS = 1024
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def read_index(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return (config.json, {Hugging Face name: where and what in the GGUF file}, GGUF metadata).

    Raises ModelError for a damaged file, an unknown architecture or tensor type, and tensors that are missing or misshapen.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

    try:
        reader = GGUFReader(str(path))
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, MemoryError, TypeError) as error:
        raise ModelError(f"{path} is not a GGUF file, or is damaged: {error}", hint="download it again") from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in tensors.items()}
    factors = {name: [float(x) for x in tensors[name].data] for name in ROPE_TENSORS if name in tensors}
    config = gguf_config(fields, shapes, factors)
    spec = decoder_spec(config)
    arch = next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == fields["general.architecture"])
    names = get_tensor_name_map(arch, spec.num_layers)
    entries, problems = {}, []
    for name, shape in decoder_shapes(spec).items():
        path_part, kind = name.rsplit(".", 1)
        stored = f"{names.get_name(path_part)}.{kind}"
        linear = spec.transposed and len(shape) == 2 and path_part not in (spec.weight("embed"), spec.weight("positions"))
        found = shapes.get(stored)
        if found is None:
            problems.append(f"{stored}: missing")
        elif found != (shape[::-1] if linear else shape):
            problems.append(f"{stored}: shape {list(found)}, wanted {list(shape)}")
        elif tensors[stored].tensor_type.name not in UNPACKED:
            problems.append(f"{stored}: type {tensors[stored].tensor_type.name}; known are {', '.join(sorted(UNPACKED))}")
        else:
            tensor = tensors[stored]
            entries[name] = {
                "type": tensor.tensor_type.name, "shape": shape,
                "offset": int(tensor.data_offset), "bytes": int(tensor.n_bytes),
                "form": _form(fields["general.architecture"], name, linear), "heads": _heads(spec, path_part),
            }  # fmt: skip
    if problems:
        raise ModelError("\n  ".join([f"{path} does not hold a {spec.model_type} model:", *problems[:20]]))
    return config, entries, fields


def _form(arch: str, name: str, linear: bool) -> str:
    """Return what llama.cpp's converter did to a tensor: "transposed", "permuted", "offset" or "" (nothing)."""
    if linear:
        return "transposed"
    if arch in PERMUTED and ".self_attn." in name and name.split(".")[-2] in ("q_proj", "k_proj"):
        return "permuted"
    if arch in NORM_OFFSET and name.endswith("norm.weight"):
        return "offset"
    return ""


def _heads(spec: Any, path: str) -> int:
    return int(spec.num_kv_heads if path.endswith("k_proj") else spec.num_heads)


def read_tensor(path: Path, entry: dict[str, Any]) -> Tensor:
    """Return one tensor in Hugging Face's form, fp32, or as stored when it is F16 or BF16."""
    from gguf import GGMLQuantizationType, quants

    data = map_bytes(path, entry["offset"], entry["bytes"])
    shape = tuple(entry["shape"])
    stored = shape[::-1] if entry["form"] == "transposed" else shape
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if entry["type"] in plain:
        tensor = torch.from_numpy(data).view(plain[entry["type"]])
    else:
        rows = data.reshape(math.prod(stored[:-1]), -1)
        values = np.empty((len(rows), stored[-1]), dtype=np.float32)
        # Some rows at a time: the gguf package makes several temporaries of the size of what it unpacks.
        for start in range(0, len(rows), ROWS):
            values[start : start + ROWS] = quants.dequantize(rows[start : start + ROWS], GGMLQuantizationType[entry["type"]])
        tensor = torch.from_numpy(values)
    return _restore(tensor.view(stored), entry)


def _restore(tensor: Tensor, entry: dict[str, Any]) -> Tensor:
    if entry["form"] == "transposed":
        return tensor.T.contiguous()
    if entry["form"] == "offset":
        return tensor - 1
    if entry["form"] == "permuted":
        # rows lie as [head, pair, half]; transformers wants [head, half, pair]
        return tensor.view(entry["heads"], -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor
