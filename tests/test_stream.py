"""Streaming through the base file: memory of building, loading and computing, directions, and the same gradients."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from edgelora.models.base_file import BaseWeights, open_base
from edgelora.models.base_layout import ALIGN, PART, Section
from edgelora.models.load import decoder_sections, load_decoder
from edgelora.models.recompute import Keeping
from edgelora.models.source import open_model
from edgelora.models.stream import Stream

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
IDS, STARTS = torch.arange(1, 13), torch.tensor([0, 5, 12])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELORA_BASE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def measured(code: str, *arguments: str) -> Any:
    """Run code that prints JSON in a process of its own."""
    head = (
        "import json, sys, torch; torch.set_num_threads(1)\n"
        "from edgelora.models.source import open_model; from edgelora.models.load import decoder_sections, load_decoder\n"
        "from edgelora.quant.grid import quantize; [quantize(torch.randn(4096, 512), bits, 32) for bits in (4, 8)]\n"
        "def status(name):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024\n"
    )
    command = [sys.executable, "-c", head + code, *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@LINUX
def test_memory_of_building_and_of_loading(tmp_path: Path) -> None:
    """A table of 98,304 × 512, 192 MB in fp32 and 54 MB at 8 bits: neither is ever in memory of the process's own."""
    folder = tiny.save_decoder(
        tmp_path / "wide", vocab_size=98304, hidden_size=512, intermediate_size=512, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    assert (folder / "model.safetensors").stat().st_size > 190 << 20
    code = (
        "import threading; most = [0.0]; done = threading.Event()\n"
        "def watch():\n"
        "    while not done.wait(0.002): most[0] = max(most[0], status('RssAnon'))\n"
        "before = status('RssAnon'); peak = status('VmHWM')\n"
        "watcher = threading.Thread(target=watch); watcher.start()\n"
        "model = load_decoder(open_model(sys.argv[1]), base_bits=4); done.set(); watcher.join()\n"
        "print(json.dumps({'most': most[0] - before, 'kept': status('RssAnon') - before, 'rss': status('VmHWM') - peak}))"
    )
    building, loading = measured(code, str(folder)), measured(code, str(folder))
    part = 4 * PART / (1 << 20)
    assert building["most"] < 3 * part
    assert building["rss"] < 6 * part
    assert loading["most"] < 8
    assert loading["kept"] < 8


@LINUX
def test_streaming_maps_one_block_at_a_time(tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    folder = tiny.save_decoder(tmp_path / "wide", num_hidden_layers=6, vocab_size=4096, **wide)
    code = (
        "def mapped():\n"
        "    lines = open('/proc/self/smaps').read().splitlines()\n"
        "    start = next(i for i, line in enumerate(lines) if line.endswith('.base'))\n"
        "    return int(next(line for line in lines[start:] if line.startswith('Rss:')).split()[1]) / 1024\n"
        "ids = torch.arange(40); starts = torch.tensor([0, 40]); seen = []; hidden = []\n"
        "for streamed in (False, True):\n"
        "    model = load_decoder(open_model(sys.argv[1]), base_bits=8, streamed=streamed)\n"
        "    for block in model.blocks: block.register_forward_hook(lambda *_: seen.append(mapped()))\n"
        "    with torch.no_grad(): hidden.append(model.hidden(ids, starts))\n"
        "    if streamed: sizes = [(b - a) / 2**20 for a, b in model.stream.blocks]; window = model.stream.window_bytes\n"
        "    del model, block\n"
        "print(json.dumps([seen, sizes, window / 2**20, torch.equal(*hidden)]))"
    )
    seen, sizes, window, equal = measured(code, str(folder))
    assert equal
    assert len(sizes) == 6
    assert min(sizes) > 4
    assert window == pytest.approx(2 * sizes[0])
    whole, streamed = seen[:6], seen[6:]
    assert whole[-1] > 0.9 * sum(sizes)
    assert max(streamed) < 1.5 * sizes[0]


def test_the_direction_follows_the_blocks() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.asked: list[int] = []

        def madvise(self, advice: int, start: int, length: int) -> None:
            if advice == mmap.MADV_WILLNEED:
                self.asked.append(start // ALIGN)

        def __len__(self) -> int:
            return 4 * ALIGN

    mapping = Recorder()
    stream = Stream(mapping, [(i * ALIGN, (i + 1) * ALIGN) for i in range(4)], [])  # type: ignore[arg-type]
    walked = []
    for block in (0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3, 2, 2, 3):
        mapping.asked.clear()
        stream.enter(block)
        stream.leave(block)
        walked.append(tuple(mapping.asked[1:]))
        assert mapping.asked[0] == block
    forward, backward = [(1,), (2,), (3,), ()], [(2,), (1,), (0,)]
    assert walked == [*forward, *backward, (1,), *forward, (1,), (3,), ()]


def test_a_system_without_advice_streams_too() -> None:
    stream = Stream(b"x" * 100, [(0, 50), (50, 100)], [])  # type: ignore[arg-type]
    stream.enter(0)
    stream.leave(0)
    stream.drop_table()
    assert stream.window_bytes == 100


@LINUX
@pytest.mark.parametrize("room", [0, 1 << 30])
def test_no_cache_is_kept_where_there_is_no_room_for_it(tmp_path: Path, room: int) -> None:
    path, half = tmp_path / "weights.base", 64 * ALIGN  # pages are read, and dropped, in groups: few for each block
    with path.open("wb") as file:
        file.write(os.urandom(2 * half))
        file.flush()
        os.fsync(file.fileno())  # the system does not drop what is not on the disk yet
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        stream = Stream(mapping, [(0, half), (half, 2 * half)], [], path)
        stream.fit_cache(room)
        stream.enter(0)
        assert len(set(mapping[:half])) > 1
        stream.leave(0)
        try:
            os.preadv(file.fileno(), [bytearray(ALIGN)], 0, os.RWF_NOWAIT)
            cached = True
        except BlockingIOError:
            cached = False
        except OSError:
            pytest.skip("this file system does not tell what is cached")
    assert cached == (room > 0)


def test_streamed_training_gives_the_same_gradients(tmp_path: Path) -> None:
    from edgelora.adapters import inject
    from edgelora.adapters.lora import LoRASettings

    folder, found = tiny.save_decoder(tmp_path / "model"), []
    for streamed in (False, True):
        torch.manual_seed(0)
        model = load_decoder(open_model(str(folder)), base_bits=4, streamed=streamed)
        assert (model.stream is not None) == streamed
        model.keeping = Keeping(0)
        inject.attach(model, LoRASettings(), "all-linear")
        loss = model.nll(model.hidden(IDS, STARTS)[:-1], IDS[1:])
        loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 28
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_each_block_is_one_range_of_whole_pages(tmp_path: Path) -> None:
    source = open_model(str(tiny.save_decoder(tmp_path / "model")))
    sections = decoder_sections(load_decoder(source, base_bits=4).spec)
    weights = open_base(source, sections, 4, 32)
    assert isinstance(weights, BaseWeights)
    assert [section.block for section in sections] == [False, True, True, False]
    bounds = weights.layout.sections
    assert all(start % ALIGN == 0 and start < stop for start, stop in bounds)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(bounds))
    for (start, stop), section in zip(bounds, sections, strict=True):
        names = [path for group in section.groups for path in group] + list(section.tables + section.plain)
        assert all(start <= weights.layout.places[name].offset < stop for name in names)


def test_sections_name_every_tensor_once(tmp_path: Path) -> None:
    source = open_model(str(tiny.save_decoder(tmp_path / "model")))
    sections: list[Section] = decoder_sections(load_decoder(source, base_bits=8).spec)
    paths = [path for section in sections for group in (*section.groups, section.tables) for path in group]
    names = [f"{path}.weight" for path in paths] + [name for section in sections for name in section.plain]
    assert sorted(names) == sorted(source.names())
