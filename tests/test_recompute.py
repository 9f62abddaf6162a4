"""What blocks keep for backward: the same losses and gradients, no more memory than said, and no work that nobody needs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import gradients, loss_of, packed
from tiny import save_decoder, save_encoder
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from edgelora.adapters import inject
from edgelora.adapters.lora import LoRASettings
from edgelora.errors import MachineError
from edgelora.models import attention_kernel, gemm, recompute, slab
from edgelora.models.load import load_model
from edgelora.models.recompute import ALL, Keeping, Shelf
from edgelora.models.slab import Slab
from edgelora.models.source import open_model

FAMILIES = ("llama", "gpt2", "gemma2", "qwen3", "bert")
DROPPING = {"attention_dropout": 0.3}


def load(folder: Path, family: str, targets: str = "all-linear", rank: int = 2, **overrides: Any) -> Any:
    """Return a tiny model at 4 bits with adapters away from where they begin."""
    encoder = family in ("bert", "modernbert")
    save_encoder(folder, family, **overrides) if encoder else save_decoder(folder, family, **overrides)
    torch.manual_seed(0)
    labels = [f"LABEL_{i}" for i in range(3)] if encoder else []
    task = "text-classification" if encoder else "text-generation"
    model = load_model(open_model(str(folder)), task, base_bits=4, labels=labels).eval()
    for layer in inject.attach(model, LoRASettings(rank=rank), targets).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_the_same_bit_for_bit_and_gradients_where_nothing_is_rounded(family: str, tmp_path: Path) -> None:
    model = load(tmp_path / "model", family)
    file = tmp_path / "inputs"
    exact = [Keeping(ALL), Keeping(1), Keeping(0), Keeping(0, 32, file), Keeping(1, 32, file)]
    rounded = [Keeping(0, 16), Keeping(0, 16, file)]
    losses, found = [], []
    for keeping in [*exact, *rounded, Keeping(ALL, 16)]:
        model.keeping = keeping
        losses.append(loss_of(model).detach())
        found.append(gradients(model))
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    for wanted, others in ((found[0], found[1:5]), (found[5], found[6:7])):
        assert all(torch.equal(other[name], wanted[name]) for other in others for name in wanted)
    assert any(not torch.equal(found[5][name], found[0][name]) for name in found[0])


def test_the_file_of_inputs_is_written_and_closed(tmp_path: Path) -> None:
    x = torch.randn(3, 5)
    for bits in (32, 16):
        shelf = Shelf(bits, tmp_path / "inputs", x.shape)
        tickets = [shelf.put(place, x + place) for place in range(3)]
        assert all(isinstance(ticket, int) for ticket in tickets)
        assert (tmp_path / "inputs").stat().st_size == 3 * x.numel() * bits // 8
        wanted = (x + 2).to(shelf.dtype).float()
        assert torch.equal(shelf.take(tickets[2]), wanted)
        (tmp_path / "inputs").write_bytes(b"short")
        with pytest.raises(MachineError, match="is shorter than what was written to it"):
            shelf.take(tickets[1])
        file = shelf.file
        del shelf
        gc.collect()
        assert file is not None
        assert file.closed


class Counting:
    """Counts matrix products, of frozen weights and of adapters, through edgelora.models.gemm."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.products = 0
        linear = gemm.linear

        def counted(x_TK: Tensor, w_NK: Tensor) -> Tensor:
            self.products += 1
            return linear(x_TK, w_NK)

        monkeypatch.setattr(gemm, "linear", counted)

    def during(self, call: Callable[[], Any]) -> int:
        before = self.products
        call()
        return self.products - before


# adapter of the last of three blocks → products in backward: three for the adapter, and one for the input of each group above
LOWEST = {"mlp.down_proj": 3, "mlp.up_proj": 3 + 1, "self_attn.o_proj": 3 + 2, "self_attn.v_proj": 3 + 3}


@pytest.mark.parametrize("target", LOWEST)
def test_nothing_is_done_or_kept_below_the_lowest_adapter(target: str, tmp_path: Path, monkeypatch: Any) -> None:
    model = load(tmp_path, "llama", f"model.layers.2.{target}", num_hidden_layers=3)
    ids, starts = packed([[5, 9, 200, 31], [7, 40]])
    counting = Counting(monkeypatch)
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    for block in model.blocks[:2]:
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        block.register_forward_pre_hook(lambda *_, hooks=hooks: hooks.__enter__())
        block.register_forward_hook(lambda *_, hooks=hooks: hooks.__exit__())
    seen: list[bool] = []
    model.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    states: list[Tensor] = []
    assert counting.during(lambda: states.append(model.hidden(ids, starts))) == 3 * 4 + 1
    assert counting.during(lambda: states[0].sum().backward()) == LOWEST[target]
    assert (saved, seen) == ([], [False])
    model.keeping = Keeping(0)
    again = model.hidden(ids, starts)
    # The block above is computed once more, but for its last product.
    assert counting.during(lambda: again.sum().backward()) == LOWEST[target] + 3 + 1
    model.keeping = Keeping(0, 32, tmp_path / "inputs")
    model.hidden(ids, starts)
    assert (tmp_path / "inputs").stat().st_size == 4 * 3 * ids.numel() * model.spec.hidden_size  # the third place alone


def test_without_gradients_nothing_is_kept(tmp_path: Path) -> None:
    model = load(tmp_path / "model", "llama")
    model.keeping = Keeping(0, 32, tmp_path / "inputs")
    with torch.no_grad():
        assert not loss_of(model).requires_grad
    assert not (tmp_path / "inputs").exists()


@pytest.mark.parametrize(
    ("family", "overrides"), [("llama", {}), ("bert", {"hidden_dropout_prob": 0.2}), ("modernbert", DROPPING)]
)
def test_dropout_is_the_same_again(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    model = load(tmp_path / "model", family, **overrides).train()
    if not overrides:
        for layer in inject.adapters(model).values():
            layer.dropout = 0.4
    results = []
    for keeping in (Keeping(ALL), Keeping(0), Keeping(1), Keeping(0, 32, tmp_path / "inputs")):
        model.keeping = keeping
        torch.manual_seed(3)
        found = gradients(model)
        results.append((found, torch.rand(4)))
    torch.manual_seed(4)
    other = gradients(model)
    first, after = results[0]
    assert any(not torch.equal(first[name], other[name]) for name in first)
    for found, random in results[1:]:
        assert torch.equal(random, after)
        assert all(torch.equal(found[name], first[name]) for name in first)


class Allocated(TorchDispatchMode):
    """Remembers the memory that operations have returned, to count what of it still lives."""

    def __init__(self, old: Allocated | None = None) -> None:
        super().__init__()
        self.old = old.found if old is not None else {}  # what a first pass has found, and left: weights and reused buffers
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.old:
                storage = x.untyped_storage()
                self.found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def forget_the_dead(self) -> None:
        gc.collect()
        self.found = {key: value for key, value in self.found.items() if not value[0].expired()}

    def living(self) -> int:
        self.forget_the_dead()
        return sum(size for _, size in self.found.values())


SHAPE = {"hidden_size": 64, "intermediate_size": 112}
WIDE = {"llama": SHAPE, "gpt2": {"n_embd": 64}, "gemma3_text": SHAPE, "olmo2": SHAPE}
LENGTHS = (40, 40, 40)


def kept_per_token(folder: Path, family: str, keeping: Keeping) -> tuple[float, Any]:
    """Return the bytes per token that one block adds to what lives between forward and backward, and the description."""
    living = []
    for blocks in (2, 4):
        layers = {"n_layer": blocks} if family == "gpt2" else {"num_hidden_layers": blocks}
        types = {"layer_types": ["full_attention"] * blocks} if family == "gemma3_text" else {}
        model = load(folder / str(blocks), family, rank=1, **{**WIDE[family], **layers, **types})
        model.keeping = keeping
        ids, starts = packed([[(7 * i) % 250 for i in range(length)] for length in LENGTHS])
        with Allocated() as first:
            model.hidden(ids, starts).sum().backward()
        first.forget_the_dead()
        with Allocated(first) as memory:
            hidden = model.hidden(ids, starts)
            living.append(memory.living())
        assert hidden.requires_grad
    return (living[1] - living[0]) / 2 / sum(LENGTHS), model.spec


def values_of(spec: Any) -> int:
    """Return what a kept block may keep of each token: its input, q k v, attention's output, the middle, gate and up."""
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return int(2 * spec.hidden_size + 2 * queries + 2 * keys + (1 + spec.gated) * spec.intermediate_size)


def more_of(family: str, spec: Any) -> int:
    """Return what the families that norm more keep besides: the inputs of these norms."""
    values = 2 - (attention_kernel.library() is not None)  # the kernel needs no other v than the one beside q and k
    whole = (spec.num_heads + values * spec.num_kv_heads) * spec.head_dim  # q and k as they were, and with them v: one product
    return whole + 2 * spec.hidden_size if family in ("gemma3_text", "olmo2") else 0


@pytest.mark.parametrize("family", WIDE)
def test_a_kept_block_keeps_what_the_planner_counts(family: str, tmp_path: Path) -> None:
    kept, spec = kept_per_token(tmp_path, family, Keeping(ALL))
    values = values_of(spec) + more_of(family, spec)
    small = 16 + 2 * spec.num_heads  # adapters' columns, norms' numbers, attention's log-sum-exp
    assert 4 * values <= kept <= 4 * (values + small), (kept / 4, values)


@pytest.fixture
def separate_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what a slab holds be tensors of their own, so that they can be counted."""
    monkeypatch.setattr(Slab, "put", lambda _, x, dtype: x.to(dtype, copy=True))


@pytest.mark.usefixtures("separate_copies")
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_recomputed_block_keeps_its_input_alone(family: str, tmp_path: Path) -> None:
    for keeping, size in ((Keeping(0), 4), (Keeping(0, 16), 2), (Keeping(0, 32, tmp_path / "inputs"), 0)):
        kept, spec = kept_per_token(tmp_path / str(size), family, keeping)
        assert kept == size * spec.hidden_size


@pytest.mark.usefixtures("separate_copies")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_block_kept_in_bf16_keeps_half(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "MOST_HEADS", 4)
    kept, spec = kept_per_token(tmp_path, family, Keeping(ALL, 16))
    assert kept <= 2 * values_of(spec) + 4 * (16 + 2 * spec.num_heads)


def test_a_slab_lends_its_chunks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab, "CHUNK", 4096)
    slab.release()
    first = Slab()
    places = [first.put(torch.full((300,), float(i)), torch.float32) for i in range(6)]
    assert [float(place[0]) for place in places] == [0, 1, 2, 3, 4, 5]
    assert len({place.untyped_storage().data_ptr() for place in places}) == 2
    large = first.put(torch.ones(2000), torch.float32)
    assert large.untyped_storage().nbytes() == 8000
    lent = {place.untyped_storage().data_ptr() for place in places}
    del places, first
    second = Slab()
    again = second.put(torch.ones(3, 5).t(), torch.bfloat16)
    assert again.untyped_storage().data_ptr() in lent
    assert again.shape == (5, 3)
    assert again.is_contiguous()
    del again, second
    slab.release()  # chunks of this test's size
