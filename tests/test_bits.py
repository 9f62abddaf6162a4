"""The rule that gives 8 bits to the layers that 4 bits hurt."""

from __future__ import annotations

from edgelora.quant.bits import LARGEST_SHARE, choose_bits, outliers, packed_groups

SHAPES = {f"layers.{i}": (64, 64) for i in range(20)} | {"embed": (1000, 64)}
ERRORS = {f"layers.{i}": 0.088 for i in range(20)}


def test_int8_is_8_bits_everywhere_and_fp32_is_none() -> None:
    assert choose_bits("int8", SHAPES, {}, {"embed"}) == dict.fromkeys(SHAPES, 8)
    assert choose_bits("fp32", SHAPES, {}, {"embed"}) == {}


def test_embedding_keeps_8_bits_and_even_layers_get_4() -> None:
    bits = choose_bits("int4", SHAPES, ERRORS, {"embed"})
    assert bits["embed"] == 8
    assert {bits[path] for path in ERRORS} == {4}


def test_a_layer_with_an_outlying_error_gets_8_bits() -> None:
    bits = choose_bits("int4", SHAPES, {**ERRORS, "layers.7": 0.12, "layers.8": 0.089}, {"embed"})
    assert [path for path, value in bits.items() if value == 8] == ["layers.7", "embed"]


def test_outliers_stop_at_their_share_of_the_weights_worst_first() -> None:
    linears = {path: SHAPES[path] for path in ERRORS}
    errors = {**ERRORS, "layers.1": 0.2, "layers.2": 0.3, "layers.3": 0.25}
    assert LARGEST_SHARE * len(linears) == 2
    assert outliers(linears, errors) == ["layers.2", "layers.3"]


def test_layers_of_one_product_are_stored_alike() -> None:
    """q, k and v are raised together by their common error, so that they stay one product; o is on its own."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    shapes = {f"layers.{i}.{name}": (16, 64) for i in range(20) for name in names} | {"layers.0.gate_proj": (16, 64)}
    errors = {**dict.fromkeys(shapes, 0.088), "layers.3.k_proj": 0.12}
    bits = choose_bits("int4", shapes, errors, {})
    assert [path for path, value in bits.items() if value == 8] == [f"layers.3.{name}" for name in names[:3]]
    assert packed_groups(["a.q_proj", "a.o_proj", "a.v_proj", "b.q_proj", "gate_proj", "up_proj"]) == [
        ("a.q_proj", "a.v_proj"), ("a.o_proj",), ("b.q_proj",), ("gate_proj", "up_proj"),
    ]  # fmt: skip


def test_no_linear_layers_is_no_outliers() -> None:
    assert outliers({}, {}) == []


def test_two_bits_raise_outliers_to_4_and_three_are_half_and_half() -> None:
    errors = {path: 0.3 + 0.001 * number for number, path in enumerate(ERRORS)}
    two, three = (choose_bits(precision, SHAPES, errors, {"embed"}) for precision in ("int2", "int3"))
    assert two["embed"] == three["embed"] == 8
    assert [path for path in ERRORS if two[path] == 4] == ["layers.18", "layers.19"]
    assert {two[path] for path in ERRORS} == {2, 4}
    assert [path for path in ERRORS if three[path] == 4] == [f"layers.{i}" for i in range(10, 20)]
