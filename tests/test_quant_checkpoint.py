"""The merged folder's format: streamed writing, mapped reading, and refusal of what was damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgelora.errors import FolderError
from edgelora.folder import MANIFEST, write_json, write_manifest
from edgelora.quant.checkpoint import WEIGHTS, MergedCheckpoint, StreamedSafetensors
from edgelora.quant.grid import QuantizedTensor, dequantize, quantize

LINEAR = "layers.0.proj"


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A merged folder with one layer at 4 bits, its bias and a norm."""
    folder = tmp_path / "merged"
    folder.mkdir()
    weight = quantize(torch.randn(6, 70, generator=torch.Generator().manual_seed(0)), 4, 32)
    tensors = {"norm.weight": torch.ones(5), f"{LINEAR}.bias": torch.arange(6.0)}
    tensors |= {f"{LINEAR}.codes": weight.codes, f"{LINEAR}.scales": weight.scales}
    save_file(tensors, folder / WEIGHTS)
    write_json(folder / "config.json", {"model_type": "llama"})
    layer = {"bits": 4, "block_size": 32, "shape": [6, 70], "error": 0.1}
    write_manifest(folder, "merged", layers={LINEAR: layer}, task="text-generation", labels=[])
    return folder


def test_streamed_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {"b.codes": torch.arange(7, dtype=torch.uint8), "a": torch.randn(3, 2), "empty": torch.empty(0, 4)}
    with StreamedSafetensors(tmp_path / WEIGHTS, {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}) as file:
        for name in reversed(tensors):
            file.write(name, tensors[name])
    read = load_file(tmp_path / WEIGHTS)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_streamed_file_writes_a_tensor_that_is_not_contiguous(tmp_path: Path) -> None:
    turned = torch.arange(6.0).view(2, 3).t()
    with StreamedSafetensors(tmp_path / WEIGHTS, {"w": (torch.float32, (3, 2))}) as file:
        file.write("w", turned)
    assert torch.equal(load_file(tmp_path / WEIGHTS)["w"], turned)


def test_a_layer_reads_as_codes_and_as_its_fp32_weight(merged: Path) -> None:
    checkpoint = MergedCheckpoint.open(merged)
    layer = checkpoint.read_linear(LINEAR)
    assert isinstance(layer, QuantizedTensor)
    assert (layer.shape, layer.bits, layer.block_size) == ((6, 70), 4, 32)
    assert torch.equal(checkpoint.read(f"{LINEAR}.weight"), dequantize(layer))
    assert torch.equal(checkpoint.read(f"{LINEAR}.bias"), torch.arange(6.0))
    assert checkpoint.names() == [f"{LINEAR}.bias", f"{LINEAR}.weight", "norm.weight"]
    assert checkpoint.shape(f"{LINEAR}.weight") == (6, 70)
    assert checkpoint.shape("norm.weight") == (5,)
    assert checkpoint.has(f"{LINEAR}.weight")
    assert not checkpoint.has(f"{LINEAR}.codes.weight")


def test_a_tensor_that_is_not_there_is_named(merged: Path) -> None:
    with pytest.raises(FolderError, match=r"has no tensor norm\.bias"):
        MergedCheckpoint.open(merged).read("norm.bias")


def test_one_changed_byte_is_refused(merged: Path) -> None:
    path = merged / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FolderError, match=r"is damaged:\n  model\.safetensors: changed"):
        MergedCheckpoint.open(merged)


def test_a_missing_file_is_refused(merged: Path) -> None:
    (merged / "config.json").unlink()
    with pytest.raises(FolderError, match=r"config\.json: missing"):
        MergedCheckpoint.open(merged)


def edit_manifest(folder: Path, **content: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    write_json(folder / MANIFEST, manifest | content)


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        ({"bits": 8, "block_size": 32, "shape": [6, 70]}, "the manifest says"),
        ({"bits": 4, "block_size": 32, "shape": [6, 700]}, "the manifest says"),
        ({"bits": 4, "block_size": 32}, "needs shape, bits and block_size"),
        ({"bits": 4, "block_size": 0, "shape": [6, 70]}, "4 bits in blocks of 0"),
        ({"bits": "4", "block_size": 32, "shape": [6, 70]}, "allowed: 2, 4 or 8 bits"),
    ],
)
def test_a_manifest_that_does_not_fit_the_tensors_is_refused(merged: Path, layer: dict[str, Any], problem: str) -> None:
    edit_manifest(merged, layers={LINEAR: layer})
    with pytest.raises(FolderError, match=problem):
        MergedCheckpoint.open(merged)


def test_a_layer_without_codes_is_refused(merged: Path) -> None:
    edit_manifest(merged, layers={"layers.1.proj": {"bits": 4, "block_size": 32, "shape": [6, 70]}})
    with pytest.raises(FolderError, match=r"layers\.1\.proj: no codes or no scales"):
        MergedCheckpoint.open(merged)


def test_an_incomplete_folder_is_refused(merged: Path) -> None:
    edit_manifest(merged, complete=False)
    with pytest.raises(FolderError, match="is not complete"):
        MergedCheckpoint.open(merged)


def test_a_manifest_without_layers_is_refused(merged: Path) -> None:
    manifest = json.loads((merged / MANIFEST).read_text())
    del manifest["layers"]
    write_json(merged / MANIFEST, manifest)
    with pytest.raises(FolderError, match="is damaged: 'layers'"):
        MergedCheckpoint.open(merged)


def test_a_file_that_is_no_safetensors_is_refused_even_with_the_right_sum(merged: Path) -> None:
    (merged / WEIGHTS).write_bytes(b"\xff" * 64)
    write_manifest(merged, "merged", layers={}, task="text-generation", labels=[])
    with pytest.raises(FolderError, match="is damaged"):
        MergedCheckpoint.open(merged)
