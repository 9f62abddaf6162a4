"""The base file: written once, the same codes, groups side by side, damage, neighbours, bounds."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

from edgelora.errors import MachineError, SettingsError
from edgelora.models import base_file
from edgelora.models.base_file import cache_folder, make_room, open_base
from edgelora.models.decoder import Decoder
from edgelora.models.linear import FrozenLinear, FrozenWeight, joined
from edgelora.models.load import decoder_sections, load_decoder
from edgelora.models.network import load_network
from edgelora.models.source import ModelSource, open_model
from edgelora.quant.grid import QuantizedTensor, quantize
from edgelora.tasks import get_task

IDS, STARTS = torch.arange(1, 13), torch.tensor([0, 5, 12])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELORA_BASE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_decoder(tmp_path_factory.mktemp("model") / "model", "llama3")


def files(cache: Path) -> list[Path]:
    return sorted(cache.iterdir()) if cache.is_dir() else []


def frozen(model: Decoder) -> dict[str, FrozenWeight]:
    layers = {path: module.weight for path, module in model.linears().items() if isinstance(module, FrozenLinear)}
    return {**layers, "embed": model.embed.weight, "head": model.head.weight}


def same(first: FrozenWeight, second: FrozenWeight) -> bool:
    a, b = first.data, second.data
    if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor):
        return a.bits == b.bits and torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)
    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    return a.dtype == b.dtype and torch.equal(a, b)


def unread(source: ModelSource) -> ModelSource:
    """Return a source none of whose tensors can be read."""

    def refuse(*_: int) -> torch.Tensor:
        raise AssertionError("a weight file was read")

    tensors = {name: (shape, refuse) for name, (shape, _) in source.tensors.items()}
    return dataclasses.replace(source, tensors=tensors, rows=dict.fromkeys(source.rows, refuse))


def of_type(folder: Path, out: Path, dtype: torch.dtype) -> Path:
    """Save a model once more in another type."""
    from safetensors.torch import load_file, save_file

    out.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((folder / name).read_bytes())
    save_file({name: t.to(dtype) for name, t in load_file(folder / "model.safetensors").items()}, out / "model.safetensors")
    return out


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_file_is_built_once_and_read_ever_after(bits: int, folder: Path, cache: Path) -> None:
    source = open_model(str(folder))
    first = load_decoder(source, base_bits=bits)
    (made,) = files(cache)
    written = made.stat().st_ino
    second = load_decoder(unread(source), base_bits=bits)
    assert [path.stat().st_ino for path in files(cache)] == [written]
    assert torch.equal(first.hidden(IDS, STARTS), second.hidden(IDS, STARTS))
    assert all(same(first_weight, frozen(second)[path]) for path, first_weight in frozen(first).items())


@pytest.mark.parametrize("family", ["llama3", "gpt2", "phi3", "olmo2"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_weights_are_those_of_the_one_rounding(family: str, bits: int, tmp_path: Path) -> None:
    source = open_model(str(tiny.save_decoder(tmp_path / "model", family)))
    model = load_decoder(source, base_bits=bits)
    turned = model.spec.transposed
    for path, weight in frozen(model).items():
        if path in ("embed", "head"):
            wanted = source.read_linear(model.spec.weight("head" if path == "head" and not model.spec.tied else "embed"))
            assert same(weight, FrozenWeight.store(wanted, max(bits, 8), 32)), path
        else:
            assert same(weight, FrozenWeight.store(source.read_linear(path, transposed=turned), bits, 32)), path


def test_a_large_table_is_rounded_in_parts_as_it_is_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgelora.models.base_layout.PART", 32 * 7)
    source = open_model(str(tiny.save_decoder(tmp_path / "model", tie_word_embeddings=True)))
    weight = load_decoder(source, base_bits=4).embed.weight
    assert same(weight, FrozenWeight(quantize(source.read("model.embed_tokens.weight"), 8, 32)))


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_layers_on_the_same_input_lie_side_by_side(bits: int, folder: Path, tmp_path: Path) -> None:
    """Also at 32 bits where the file has 16: the weights are then in memory."""
    source = open_model(str(of_type(folder, tmp_path / "half", torch.bfloat16) if bits == 32 else folder))
    model = load_decoder(source, base_bits=bits)
    for block in model.blocks:
        for roles in (("q", "k", "v"), ("gate", "up")):
            weights = [block.linears[role].weight.data for role in roles]  # type: ignore[union-attr,index]
            whole = joined(weights)
            assert whole is not None, roles
            assert torch.equal(
                FrozenWeight(whole).fp32(), torch.cat([FrozenWeight(weight).fp32().clone() for weight in weights])
            )


def test_what_has_the_bits_already_is_not_copied(folder: Path, tmp_path: Path, cache: Path) -> None:
    half = of_type(folder, tmp_path / "half", torch.bfloat16)
    for reference, bits in ((folder, 32), (half, 16)):
        source = open_model(str(reference))
        assert open_base(source, decoder_sections(load_decoder(source, base_bits=bits).spec), bits, 32) is source
    assert files(cache) == []
    more = load_decoder(open_model(str(half)), base_bits=32)
    assert files(cache) == []
    assert all(weight.bits == 32 for weight in frozen(more).values())


def test_a_merged_folder_is_copied_only_to_be_streamed(folder: Path, tmp_path: Path, cache: Path) -> None:
    from edgelora.merging.merge import merge

    merge(None, tmp_path / "merged", model=str(folder), precision="int4")
    source = open_model(str(tmp_path / "merged"))
    direct = load_decoder(source, base_bits=4)
    assert files(cache) == []
    streamed = load_decoder(source, base_bits=4, streamed=True)
    assert len(files(cache)) == 1
    assert streamed.stream is not None
    assert {weight.bits for weight in frozen(streamed).values()} == {4, 8}  # what the merge chose
    assert all(same(weight, frozen(streamed)[path]) for path, weight in frozen(direct).items())


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_an_encoder_is_mapped_too(family: str, tmp_path: Path, cache: Path) -> None:
    source = open_model(str(tiny.save_encoder(tmp_path / "model", family)))
    labels = list(source.config["id2label"].values())
    first, again = (
        load_network(source, get_task("text-classification"), base_bits=4, block_size=32, labels=labels) for _ in range(2)
    )
    assert len(files(cache)) == 1
    for path, layer in first.linears().items():
        assert isinstance(layer, FrozenLinear)
        assert same(layer.weight, FrozenWeight(quantize(source.read(f"{path}.weight"), 4, 32)))
        assert layer.quantized is not None
        assert layer.quantized.codes.untyped_storage().nbytes() == files(cache)[0].stat().st_size
    batch = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    assert torch.equal(first.eval().logits(**batch), again.eval().logits(**batch))


def test_a_model_changed_in_place_is_rounded_again(tmp_path: Path, cache: Path) -> None:
    folder = tiny.save_decoder(tmp_path / "model")
    load_decoder(open_model(str(folder)), base_bits=4)
    load_decoder(open_model(str(folder)), base_bits=4)
    assert len(files(cache)) == 1
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    load_decoder(open_model(str(folder)), base_bits=4)
    assert len(files(cache)) == 2


@pytest.mark.parametrize("damage", ["short", "long", "empty", "header", "magic", "length"])
def test_a_damaged_file_is_made_again(damage: str, folder: Path, cache: Path) -> None:
    source = open_model(str(folder))
    load_decoder(source, base_bits=4)
    (path,) = files(cache)
    content = path.read_bytes()
    header = content.index(b'"shape"')
    changed = {"short": content[:-1], "long": content + b"\0", "empty": b""} | {
        "header": content[:header] + b'"shapf"' + content[header + 7 :],
        "magic": b"x" + content[1:],
        "length": content[:40] + b"\xff" * 8 + content[48:],
    }
    path.write_bytes(changed[damage])
    load_decoder(source, base_bits=4)
    assert files(cache) == [path]
    assert path.read_bytes() == content


def test_a_killed_builder_leaves_nothing_that_is_used(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> Iterator[None]:
        raise KeyboardInterrupt

    source = open_model(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(base_file, "fill", killed)
        with pytest.raises(KeyboardInterrupt):
            load_decoder(source, base_bits=4)
    assert files(cache) == []
    old, new = cache / ".old.x.partial", cache / ".new.x.partial"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    load_decoder(source, base_bits=4)
    assert not old.exists()
    assert new.exists()  # another process may be at it


def test_two_processes_build_at_once(folder: Path, cache: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from edgelora.models import base_file; from edgelora.models.load import load_decoder\n"
        "from edgelora.models.source import open_model\n"
        "fill = base_file.fill\n"
        "def slow(*args):\n"
        "    pathlib.Path(sys.argv[2], sys.argv[3]).touch()\n"
        "    while len(list(pathlib.Path(sys.argv[2]).glob('here*'))) < 2: time.sleep(0.01)\n"
        "    yield from fill(*args)\n"
        "base_file.fill = slow\n"
        "model = load_decoder(open_model(sys.argv[1]), base_bits=4)\n"
        "print(int(model.embed.weight.data.codes.sum()), int(model.blocks[1].linears['down'].weight.data.codes.sum()))\n"
    )
    meeting = folder.parent
    commands = [[sys.executable, "-c", code, str(folder), str(meeting), f"here{i}"] for i in range(2)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert said[0] == said[1] != ""
    assert len(files(cache)) == 1
    load_decoder(unread(open_model(str(folder))), base_bits=4)


def test_the_least_recently_used_files_go_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    for age, name in enumerate(("new", "middle", "old")):
        (cache / f"{name}.base").write_bytes(b"x" * 1000)
        os.utime(cache / f"{name}.base", (10**9 - age, 10**9 - age))
    monkeypatch.setenv("EDGELORA_BASE_CACHE_GB", str(3500 / (1 << 30)))
    make_room(cache, 500)
    assert {path.stem for path in files(cache)} == {"new", "middle", "old"}
    make_room(cache, 1000)
    assert {path.stem for path in files(cache)} == {"new", "middle"}
    make_room(cache, 4000)  # larger than the bound: it may be there alone
    assert files(cache) == []
    monkeypatch.setenv("EDGELORA_BASE_CACHE_GB", "much")
    with pytest.raises(SettingsError, match='EDGELORA_BASE_CACHE_GB is "much"'):
        make_room(cache, 1)


def test_loading_counts_as_use(folder: Path, cache: Path) -> None:
    source = open_model(str(folder))
    load_decoder(source, base_bits=4)
    (path,) = files(cache)
    os.utime(path, (0, 0))
    load_decoder(source, base_bits=4)
    assert path.stat().st_mtime > 10**9


def test_a_full_disk_is_said(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with pytest.raises(MachineError, match="the disk is full: the base weights take") as caught:
            load_decoder(source, base_bits=4)
        assert "EDGELORA_BASE_CACHE" in str(caught.value.hint)

    def full(*_: object) -> Iterator[None]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(base_file, "fill", full)
    with pytest.raises(MachineError, match="the disk is full"):
        load_decoder(source, base_bits=4)
    assert files(cache) == []


def test_without_a_cache_the_weights_stay_in_memory(folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mapped = load_decoder(open_model(str(folder)), base_bits=4)
    shutil.rmtree(cache)
    cache.write_text("a file is in the way")
    model = load_decoder(open_model(str(folder)), base_bits=4, streamed=True)
    assert "the base weights stay in memory" in capsys.readouterr().err
    assert model.stream is None
    assert all(same(weight, frozen(mapped)[path]) for path, weight in frozen(model).items())


def test_the_folder_is_the_one_named(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("EDGELORA_BASE_CACHE")
    assert cache_folder().name == "base"
