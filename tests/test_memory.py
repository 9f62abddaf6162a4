"""What a training process holds beside weights and activations: imports, the allocator, scoring and generation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from edgelora import memory
from edgelora.models import predictor
from edgelora.models.attention import Cache
from edgelora.models.families import decoder_spec
from edgelora.models.load import load_decoder
from edgelora.models.predictor import TorchPredictor
from edgelora.models.source import open_model

ROOT = Path(__file__).parents[1]
# What finetune of a decoder has no use for, and each would cost: MB of modules, or a process that is slow to start.
NOT_NEEDED = (
    "transformers", "optimum", "peft", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "gguf", "sklearn", "scipy", "pandas",
    "pyarrow", "datasets", "huggingface_hub", "sympy", "networkx", "matplotlib", "PIL", "torch._dynamo", "torch._inductor",
    "torch.onnx", "torch.utils.tensorboard",
)  # fmt: skip

IMPORTED = """
import json, sys
from pathlib import Path
from edgelora.config import FinetuneConfig
from edgelora.train.finetune import finetune

if __name__ == "__main__":
    model, data, out = sys.argv[1:]
    finetune(model, data, Path(out), FinetuneConfig(max_steps=2, threads=1, precision="fp32"))
    print(json.dumps(sorted(sys.modules)))
"""


def child(code: str, *arguments: str, **environment: str) -> str:
    """Return what a new Python prints, whose allocator nobody has settled before it."""
    settled = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"}  # by a test in this process
    inherited = {name: value for name, value in os.environ.items() if name not in settled}
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**inherited, **environment},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


def test_finetune_of_a_decoder_imports_nothing_it_does_not_need(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}", "completion": f"number {i}"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = tiny.save_decoder(tmp_path / "model", head_dim=16)
    modules = set(json.loads(child(IMPORTED, str(model), str(tmp_path / "rows.jsonl"), str(tmp_path / "run"))))
    assert "torch" in modules
    assert sorted(modules.intersection(NOT_NEEDED)) == []


def test_settle_with_a_low_threshold_keeps_freed_blocks_out_of_the_heap() -> None:
    """Without it, a freed block of 30 MB raises glibc's own threshold, and the next one stays in the heap for good."""
    code = """
import ctypes, sys
from edgelora import memory, hardware
done = memory.settle()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes, size = ctypes.c_void_p, [ctypes.c_void_p], 30 << 20
libc.malloc.argtypes = [ctypes.c_size_t]
for _ in range(3):
    block, pin = libc.malloc(size), libc.malloc(1 << 15)
    ctypes.memset(block, 1, size)
    libc.free(block)
print(done, hardware.rss_mb())
"""
    done, settled = child(code, EDGELORA_ALLOCATOR="mmap_threshold=1048576,trim_threshold=1048576").split()
    off, left = child(code, EDGELORA_ALLOCATOR="off").split()
    assert off == "False"
    if done == "True":  # glibc
        assert float(settled) < float(left) - 20


def test_products_of_new_lengths_do_not_pile_up() -> None:
    """Documents come in many lengths; oneDNN and torch would keep compiled products for all of them."""
    code = """
from edgelora import memory, hardware
memory.settle()
import torch
torch.set_num_threads(1)
weights = [torch.ones(outputs, 64) for outputs in (64, 96, 128, 160)]
def products(tokens):
    for weight in weights:
        torch.ops.mkldnn._linear_pointwise(torch.ones(tokens, 64), weight, None, "none", [], "")
products(300)
before = hardware.rss_mb()
for tokens in range(40, 200):
    products(tokens)
print(hardware.rss_mb() - before)
"""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this torch has no oneDNN")
    kept, grown = (float(child(code, EDGELORA_ALLOCATOR=how)) for how in ("", "off"))
    assert kept < max(grown / 2, 10), f"{kept} MB settled, {grown} MB as it comes"


def test_settle_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELORA_ALLOCATOR", "off")
    assert memory.Allocator.from_environment() is None
    monkeypatch.setenv("EDGELORA_ALLOCATOR", "mmap_threshold=65536, arenas=2")
    assert memory.Allocator.from_environment() == memory.Allocator(mmap_threshold=65536, arenas=2)
    monkeypatch.delenv("EDGELORA_ALLOCATOR")
    assert memory.Allocator.from_environment() == memory.Allocator()


PROMPTS = [[1, 2, 3, 4, 5], [7, 8], [9, 10, 11, 12, 13, 14, 15], [3], [20, 21, 22]]


def test_prompts_read_in_pieces_continue_as_if_read_together(tmp_path: Path) -> None:
    model = load_decoder(open_model(str(tiny.save_decoder(tmp_path / "model"))), base_bits=32)
    together = model.generate(PROMPTS, 12, frozenset([5]), at_once=1000)
    assert len({len(answer) for answer in together}) > 1 or all(len(answer) == 12 for answer in together)
    for at_once in (1, 6, 8):
        assert model.generate(PROMPTS, 12, frozenset([5]), at_once=at_once) == together


def test_a_small_cache_gives_the_same_answers_with_fewer_prompts_at_once(tmp_path: Path) -> None:
    model = load_decoder(open_model(str(tiny.save_decoder(tmp_path / "model"))), base_bits=32)
    sizes: list[int] = []
    generate = model.generate
    model.generate = lambda prompts, *rest, **more: sizes.append(len(prompts)) or generate(prompts, *rest, **more)  # type: ignore[method-assign,assignment,func-returns-value]
    wide = TorchPredictor(model, dict).generate(PROMPTS, 6, frozenset())  # type: ignore[arg-type]
    budget = predictor.cache_bytes(model.spec, 2, 13)
    narrow = TorchPredictor(model, dict, cache_bytes=budget, batch_tokens=4).generate(PROMPTS, 6, frozenset())  # type: ignore[arg-type]
    assert narrow == wide
    assert sizes[0] == len(PROMPTS)
    assert sizes[1:][0] == 2
    assert sum(sizes[1:]) == len(PROMPTS)


def test_cache_bytes_are_those_of_the_cache(tmp_path: Path) -> None:
    spec = decoder_spec(open_model(str(tiny.save_decoder(tmp_path / "model"))).config)
    cache = Cache(spec.num_layers, 3, spec.num_kv_heads, 21, spec.head_dim)
    held = sum(tensor.untyped_storage().nbytes() for tensor in (*cache.keys, *cache.values))
    assert predictor.cache_bytes(spec, 3, 21) == held
    assert predictor.prompts_at_once(spec, 21, held) == 3
    assert predictor.prompts_at_once(spec, 21, held - 1) == 2
    assert predictor.prompts_at_once(spec, 21, 1) == 1
    assert predictor.prompts_at_once(spec, 1, 1 << 40) == predictor.MOST_PROMPTS
    assert predictor.generation_bytes(spec, 3, 21) > held


def test_forgetting_documents_never_copies_the_whole_cache() -> None:
    cache = Cache(4, 3, 2, 5, 8)
    for layer, keys in enumerate(cache.keys):
        keys.copy_(torch.arange(3.0).view(3, 1, 1, 1) + 10 * layer)
    cache.lengths = torch.tensor([1, 2, 3])
    cache.keep(torch.tensor([0, 2]))
    assert cache.lengths.tolist() == [1, 3]
    assert [keys[:, 0, 0, 0].tolist() for keys in cache.keys] == [[10.0 * i, 10.0 * i + 2] for i in range(4)]
    part = cache.part(1, 2)
    part.keys[2].zero_()
    part.lengths += 4
    assert float(cache.keys[2][1].abs().sum()) == 0
    assert cache.lengths.tolist() == [1, 7]


def test_code_that_is_not_needed_any_more_is_given_back() -> None:
    code = """
import torch
from edgelora import hardware, memory
before = hardware.rss_mb()
memory.forget_code()
after = hardware.rss_mb()
print(before, after, float((torch.ones(300, 300) @ torch.ones(300, 300))[0, 0]))
"""
    before, after, product = map(float, child(code).split())
    assert product == 300
    if sys.platform == "linux":
        assert after < before - 20
