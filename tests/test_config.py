"""Settings: defaults, TOML, ranges, amounts of memory, columns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from edgelora.config import FinetuneConfig, GenerateConfig, Range, load_toml, parse_bytes, parse_columns, replace
from edgelora.errors import SettingsError


def test_toml_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        'learning-rate = 1e-3\nepochs = 2\nram = "1.5GB"\nvalid = 0.2\ntarget_modules = ["q_proj", "v_proj"]\n'
        'dora = true\nprecision = "int8"\n[columns]\nprompt = "mr"\n'
    )
    config = load_toml(file, FinetuneConfig(rank=4))
    assert (config.learning_rate, config.epochs, config.ram, config.valid) == (1e-3, 2.0, 3 << 29, "0.2")
    assert (config.target_modules, config.dora, config.precision) == ("q_proj,v_proj", True, "int8")
    assert (config.columns, config.rank, config.batch_size) == ({"prompt": "mr"}, 4, None)


def test_every_problem_of_a_toml_file_at_once(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        'learnin_rate = 1\nrank = "8"\nram = "lots"\nepochs = nan\nbatch_size = 0\ndora = 1\nseed = true\n'
        'precision = "int5"\ncolumns = {prompt = 1}\ndropout = 1.5\nmax_steps = 4\nmax-steps = 5\n'
    )
    with pytest.raises(SettingsError) as caught:
        load_toml(file, FinetuneConfig())
    assert caught.value.message.splitlines() == [
        f"{file}: 11 problems",
        '  "learnin_rate" is not a setting. Did you mean "learning_rate"?',
        "  \"rank\" is '8' (str); allowed: a whole number",
        "  \"ram\" is 'lots'; allowed: an amount of memory such as 570MB or 1.5GB",
        '  "epochs" is nan; allowed: above 0',
        '  "batch_size" is 0; allowed: at least 1',
        '  "dora" is 1 (int); allowed: true or false',
        '  "seed" is True (bool); allowed: a whole number',
        "  \"precision\" is 'int5'; allowed: int4, int8, int3, int2, fp32",
        "  \"columns\" is {'prompt': 1}; allowed: strings in it",
        '  "dropout" is 1.5; allowed: 0 to 0.99',
        '  "max-steps" is given twice',
    ]


@pytest.mark.parametrize(("text", "start"), [("rank = ", "is not TOML"), (None, "no such config file")])
def test_files_that_are_no_toml(tmp_path: Path, text: str | None, start: str) -> None:
    file = tmp_path / "c.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SettingsError, match=start):
        load_toml(file, FinetuneConfig())


def test_generation_settings_share_the_checks() -> None:
    assert replace(GenerateConfig(), {"stop": ["\n"], "temperature": 1}, where="x").stop == ("\n",)
    with pytest.raises(SettingsError, match=r'"top_p" is 0\.0; allowed: above 0 to 1'):
        replace(GenerateConfig(), {"top_p": 0.0}, where="x")


@pytest.mark.parametrize(
    ("text", "count"), [("570MB", 570 << 20), ("1.5GB", 3 << 29), ("1GiB", 1 << 30), (" 2 k ", 2048), ("800000", 800_000)]
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("target_modules", " ", "all-linear, none, or names of layers separated by commas"),
        ("seed", 1 << 32, "0 to 4294967295"),  # torch takes 64 bits and then overflows
        ("threads", 1_000_000, "1 to 1024"),  # which would crash the process
        ("rank", 0, "at least 1"),
        ("alpha", 1e300, "above 0 to 1000000"),  # more than fp32 holds
        ("learning_rate", 1e300, "above 0 to 1000000"),
        ("epochs", math.inf, "above 0"),
    ],
)
def test_values_out_of_their_range(name: str, value: float | str, allowed: str) -> None:
    with pytest.raises(SettingsError) as caught:
        replace(FinetuneConfig(), {name: value}, where="here")
    assert caught.value.message == f'here: 1 problem\n  "{name}" is {value!r}; allowed: {allowed}'
    assert 10**400 in Range(1)
    assert math.nan not in Range(0)


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "1 2 GB", "nan", "1e3", "9" * 400])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(SettingsError, match=r"is not an amount of memory; allowed: 570MB, 1\.5GB"):
        parse_bytes(text)


def test_columns() -> None:
    assert parse_columns("prompt=mr, completion = the ref") == {"prompt": "mr", "completion": "the ref"}
    with pytest.raises(SettingsError, match='"completion" does not map a column; allowed: our name = the data'):
        parse_columns("prompt=mr,completion")
    with pytest.raises(SettingsError, match='column "prompt" is mapped twice, to "a" and "b"'):
        parse_columns("prompt=a,prompt=b")


def test_tables_of_numbers_are_checked_item_by_item() -> None:
    values = {"rank_pattern": {"q_proj": 16}, "alpha_pattern": {"v_proj": 3}, "init": "pissa"}
    config = replace(FinetuneConfig(), values, where="x")
    assert (config.rank_pattern, config.alpha_pattern) == ({"q_proj": 16}, {"v_proj": 3.0})
    wrong = {"rank_pattern": {"q_proj": 0}, "alpha_pattern": {"v_proj": "3"}, "loraplus_ratio": 0.5, "init": "gauss"}
    with pytest.raises(SettingsError) as caught:
        replace(FinetuneConfig(), wrong, where="x")
    assert caught.value.message.splitlines()[1:] == [
        "  \"rank_pattern\" is {'q_proj': 0}; allowed: whole numbers in it, at least 1",
        "  \"alpha_pattern\" is {'v_proj': '3'}; allowed: numbers in it",
        '  "loraplus_ratio" is 0.5; allowed: at least 1',
        "  \"init\" is 'gauss'; allowed: kaiming, orthogonal, pissa, olora, eva",
    ]
