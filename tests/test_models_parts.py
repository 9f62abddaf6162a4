"""The decoder's parts: loss against autograd, documents apart from each other, generation, frozen layers of every width."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from tolerances import LOGITS_FP32

from edgelora.models import head as head_module
from edgelora.models.head import Head
from edgelora.models.linear import FrozenLinear, FrozenWeight
from edgelora.models.load import load_decoder
from edgelora.models.source import open_model
from edgelora.quant.grid import QuantizedTensor, dequantize, quantize

DOCUMENTS = [[5, 9, 200, 31, 7, 7, 90, 14, 3, 250, 11], [1], [77, 78, 79, 80, 81, 2]]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.5, 0.0), (1.0, 3.0)])
def test_loss_and_gradient_equal_autograd(bits: int, scale: float, softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "TILE_ROWS", 48)  # 200 rows: four tiles and a part
    monkeypatch.setattr(head_module, "TILE_LOGITS", 48 * 4)  # 4 of 10 tokens at once
    head = Head(FrozenWeight.store(random(200, 64), bits, 32), scale, softcap)
    targets = torch.tensor([0, 199, 47, 48, 5, 5, 100, 150, 191, 192])
    hidden, plain = (random(10, 64, seed=1).mul(2).requires_grad_() for _ in range(2))
    loss = head.nll(hidden, targets)
    (3 * loss).backward()
    logits = plain @ head.weight.fp32().T * scale
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    wanted = F.cross_entropy(logits, targets, reduction="sum")
    (3 * wanted).backward()
    torch.testing.assert_close(loss, wanted, **LOGITS_FP32)
    torch.testing.assert_close(hidden.grad, plain.grad, **LOGITS_FP32)
    torch.testing.assert_close(head.logits(hidden), logits, **LOGITS_FP32)
    assert torch.equal(head.argmax(hidden), logits.argmax(-1))


def test_loss_never_forms_tokens_times_vocabulary() -> None:
    """Peak memory of a loss over 512 tokens and 32,768 words (64 MB of logits, three times over) stays under 40 MB."""
    code = (
        "import torch, resource, sys; from edgelora.models.head import Head; from edgelora.models.linear import FrozenWeight\n"
        "w = torch.randn(32768, 64); head = Head(FrozenWeight.store(w, 8, 32)); h = torch.randn(512, 64, requires_grad=True)\n"
        "head.nll(h[:2], torch.tensor([1, 2])).backward(); scale = 1 if sys.platform == 'darwin' else 1024\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "head.nll(h, torch.randint(0, 32768, (512,))).backward()\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * scale >> 20)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 40


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_frozen_linear_forward_and_backward(bits: int) -> None:
    weight, bias = random(48, 40), random(48, seed=1)
    layer = FrozenLinear.from_weight("a.b", weight, bias, bits, 32)
    assert (layer.in_features, layer.out_features, layer.bits) == (40, 48, bits)
    x, plain = (random(3, 7, 40, seed=2).requires_grad_() for _ in range(2))
    y, wanted = layer(x), F.linear(plain, layer.weight_fp32(), bias)
    torch.testing.assert_close(y, wanted, **LOGITS_FP32)
    y.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, **LOGITS_FP32)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    expected = {32: 48 * 40 * 4, 16: 48 * 40 * 2, 8: 48 * (64 + 2 * 4), 4: 48 * (32 + 2 * 4)}
    assert layer.weight.num_bytes == expected[bits]


def test_layers_share_the_buffer_without_spoiling_each_other() -> None:
    """Two layers, one buffer: the gradient through both is that of plain autograd."""
    first, second = (FrozenLinear.from_weight(name, random(64, 64, seed=i), None, 4, 32) for i, name in enumerate("ab"))
    x, plain = (random(5, 64, seed=3).requires_grad_() for _ in range(2))
    second(torch.tanh(first(x))).square().sum().backward()
    F.linear(torch.tanh(F.linear(plain, first.weight_fp32())), second.weight_fp32()).square().sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, **LOGITS_FP32)


def test_a_tensor_on_the_grid_is_kept_and_rows_are_looked_up() -> None:
    tensor = quantize(random(20, 64), 4, 32)
    weight = FrozenWeight.store(tensor, 16, 64)
    assert isinstance(weight.data, QuantizedTensor)
    assert weight.data is tensor
    ids = torch.tensor([[3, 19], [0, 3]])
    assert torch.equal(weight.rows(ids), dequantize(tensor)[ids])
    assert torch.equal(weight.tile(4, 9), dequantize(tensor)[4:9])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mistral"])
def test_documents_do_not_see_each_other(family: str, tmp_path: Path) -> None:
    model = load_decoder(open_model(str(tiny.save_decoder(tmp_path / "m", family))), base_bits=32)
    packed = model.hidden(torch.tensor([token for ids in DOCUMENTS for token in ids]), torch.tensor([0, 11, 12, 18]))
    alone = torch.cat([model.hidden(torch.tensor(ids), torch.tensor([0, len(ids)])) for ids in DOCUMENTS])
    torch.testing.assert_close(packed, alone, **LOGITS_FP32)
    changed = model.hidden(torch.tensor([*DOCUMENTS[0][:-1], 99, *DOCUMENTS[1], *DOCUMENTS[2]]), torch.tensor([0, 11, 12, 18]))
    assert torch.equal(changed[:10], packed[:10])  # nor the future
    assert not torch.equal(changed[10], packed[10])
    assert torch.equal(changed[11:], packed[11:])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt2", "mistral", "olmo2", "phi3", "smollm3", "granite"])
def test_generation_with_a_cache_equals_generation_without(family: str, tmp_path: Path) -> None:
    model = load_decoder(open_model(str(tiny.save_decoder(tmp_path / "m", family))), base_bits=32)
    wanted = []
    for prompt in DOCUMENTS:
        ids = list(prompt)
        for _ in range(12):
            last = model.hidden(torch.tensor(ids), torch.tensor([0, len(ids)]))[-1:]
            ids.append(int(model.logits(last).argmax()))
        wanted.append(ids[len(prompt) :])
    assert model.generate(DOCUMENTS, 12, frozenset()) == wanted
    stop = frozenset([wanted[0][4], wanted[2][2]])
    cut = [ids[: next((i for i, token in enumerate(ids) if token in stop), len(ids))] for ids in wanted]
    assert model.generate(DOCUMENTS, 12, stop) == cut
    assert model.generate([], 12, stop) == []


def test_training_needs_no_transformers(tmp_path: Path) -> None:
    folder = tiny.save_decoder(tmp_path / "m")
    code = (
        "import sys, torch\n"
        "from edgelora.models.source import open_model; from edgelora.models.load import load_model\n"
        f"model = load_model(open_model({str(folder)!r}), 'text-generation', base_bits=4)\n"
        "ids = torch.tensor([1, 2, 3]); h = model.hidden(ids, torch.tensor([0, 3])); model.nll(h[:-1], ids[1:])\n"
        "model.generate([[1, 2]], 2, frozenset()); print('transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_linears_in_order_and_replaced(tmp_path: Path) -> None:
    model = load_decoder(open_model(str(tiny.save_decoder(tmp_path / "m"))), base_bits=8)
    paths = list(model.linears())
    parts = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    assert paths[:7] == [f"model.layers.0.{part}_proj" for part in parts]
    assert len(paths) == 14
    other = torch.nn.Identity()
    model.replace_linear(paths[8], other)
    assert model.linears()[paths[8]] is other
    with pytest.raises(KeyError):
        model.replace_linear("lm_head", other)
