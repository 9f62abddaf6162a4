"""Top-1 agreement and KL divergence against their formulas on whole logits; digests of layers on the grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tolerances import AGREEMENT

from edgelora.errors import FolderError, ModelError
from edgelora.models.agreement import AT_ONCE, Agreement, Reference, compare, tiles
from edgelora.models.head import TILE_ROWS, Head
from edgelora.models.linear import FrozenWeight
from edgelora.quant.digest import digest, digest_arrays, refuse_different
from edgelora.quant.grid import quantize

VOCABULARY = 2 * TILE_ROWS + 100


def heads() -> tuple[Head, Head]:
    weight = torch.randn(VOCABULARY, 16)
    return Head(FrozenWeight(weight), softcap=20.0), Head(FrozenWeight(quantize(weight, 4, 16)), scale=1.1)


def test_tiles_give_what_whole_logits_give() -> None:
    torch.manual_seed(0)
    ours, theirs = heads()
    p_SH = 3 * torch.randn(AT_ONCE // 8, 16)
    q_SH = p_SH + 0.3 * torch.randn_like(p_SH)
    z_p, z_q = ours.logits(p_SH).double(), theirs.logits(q_SH).double()
    wanted = torch.nn.functional.kl_div(z_q.log_softmax(-1), z_p.log_softmax(-1), log_target=True, reduction="sum")
    positions, same, divergence = compare(tiles(p_SH, ours), tiles(q_SH, theirs))
    assert (positions, same) == (len(p_SH), int((z_p.argmax(-1) == z_q.argmax(-1)).sum()))
    assert 0 < same < positions
    assert divergence == pytest.approx(float(wanted), **AGREEMENT)
    assert compare(tiles(p_SH, ours), tiles(p_SH, ours))[1:] == (positions, pytest.approx(0.0, abs=1e-6))


def test_the_reference_comes_back_from_its_file(tmp_path: Path) -> None:
    said = [torch.randn(count, 8) for count in (3, 1, 5)]
    Reference(said, None).save(tmp_path / "reference.safetensors")
    found = Reference.load(tmp_path / "reference.safetensors", None)
    assert [len(part) for part in found.said] == [3, 1, 5]
    assert all(torch.equal(left, right) for left, right in zip(found.said, said, strict=True))
    (tmp_path / "reference.safetensors").write_bytes(b"")
    with pytest.raises(FolderError, match=r"reference\.safetensors is damaged: "):
        Reference.load(tmp_path / "reference.safetensors", None)


def test_no_positions_give_no_figures_but_zeros() -> None:
    assert Agreement().figures() == {"agreement": 0.0, "kl": 0.0}


def test_a_digest_tells_every_change() -> None:
    tensor = quantize(torch.randn(6, 64), 4, 32)
    value = digest(tensor)
    codes, scales = tensor.codes.numpy().copy(), tensor.scales.numpy().copy()
    assert digest_arrays(codes, scales, 4, 32, 64) == value
    assert digest_arrays(codes, scales, 4, 32, 63) != value
    assert digest_arrays(codes, scales, 8, 16, 64) != value
    codes[5, 1, 3] ^= 16
    assert digest_arrays(codes, scales, 4, 32, 64) != value
    codes[5, 1, 3] ^= 16
    scales[0, 0] *= 1.0078125
    assert digest_arrays(codes, scales, 4, 32, 64) != value


def test_layers_that_changed_are_named() -> None:
    wanted = {f"layer.{number}": str(number) for number in range(14)}
    refuse_different({**wanted, "another": "?"}, wanted)
    with pytest.raises(ModelError) as caught:
        refuse_different({**wanted, "layer.3": "other"}, wanted)
    assert caught.value.message.splitlines()[1:] == ["  layer.3"]
    with pytest.raises(ModelError) as caught:
        refuse_different({}, wanted)
    assert caught.value.message.splitlines()[-2:] == ["  layer.9", "  and 4 more"]
