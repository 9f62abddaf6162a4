"""Every setting and its one default. The dataclass feeds the command line's options and the keys of a TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from edgelora.errors import SettingsError, did_you_mean


def setting(default: Any, text: str, *, flag: bool = False, choices: tuple[Any, ...] = ()) -> Any:
    """Declare a field: its default, its help, whether it is also a flag, and the values allowed."""
    return field(default=default, metadata={"help": text, "flag": flag, "choices": choices})


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of `edgelora finetune`. None means: chosen by the task, the model or the planner, and recorded."""

    task: str | None = setting(None, "Task, as `edgelora tasks` lists them; guessed from the columns.", flag=True)
    columns: dict[str, str] | None = setting(None, "Our column names to the data's: prompt=mr,completion=ref.", flag=True)
    ram: int | None = setting(None, "Memory that the whole run may use: 1GB, 570MB. Default: half of what is free.", flag=True)
    precision: str = setting("int4", "What will ship.", flag=True, choices=("int4", "int8", "fp32"))
    rank: int = setting(8, "Rank of the adapters.", flag=True)
    alpha: float | None = setting(None, "LoRA alpha: the update is scaled by alpha / rank. Default: 2 × rank.", flag=True)
    target_modules: str | None = setting(
        None, "all-linear, or names separated by commas: q_proj,v_proj. Default: the task's.", flag=True
    )
    learning_rate: float | None = setting(None, "Peak learning rate. Default: the task's.", flag=True)
    batch_size: int = setting(8, "Rows of one optimizer step.", flag=True)
    epochs: float = setting(3.0, "Passes over the training rows.", flag=True)
    max_steps: int | None = setting(None, "Stop after this many optimizer steps, whatever the epochs.", flag=True)
    max_length: int | None = setting(None, "Longest row in tokens. Default: 1024, or the model's limit.", flag=True)
    truncate: bool = setting(False, "Cut rows over the length limit instead of refusing them.", flag=True)
    base_bits: int | None = setting(
        None, "Bits of the frozen weights in memory. Default: the most that fits.", flag=True, choices=(32, 16, 8, 4)
    )
    seed: int = setting(0, "Seed of everything random.", flag=True)
    threads: int | None = setting(None, "CPU threads. Default: the physical cores.", flag=True)
    valid: str | None = setting(None, "Validation rows: a file, or a share such as 0.1. Default: 0.1, at most 500 rows.", flag=True)
    valid_rows: int = setting(64, "Rows of the closing table; 0 means all.", flag=True)
    micro_batch: int | None = setting(None, "Rows computed at once. Default: what fits the memory.")
    gradient_checkpointing: bool | None = setting(None, "Recompute activations in backward. Default: when memory asks for it.")
    schedule: str = setting("cosine", "Learning-rate schedule.", choices=("cosine", "linear", "constant"))
    warmup_ratio: float = setting(0.05, "Share of the steps that the learning rate takes to rise.")
    weight_decay: float = setting(0.0, "AdamW weight decay of the adapters.")
    dropout: float = setting(0.0, "Dropout on the adapters' input.")
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm.")
    rslora: bool = setting(False, "Scale by alpha / sqrt(rank) (rsLoRA).")
    dora: bool = setting(False, "Train a magnitude beside the direction (DoRA).")
    evaluations: int = setting(4, "Times that the validation rows are scored during training.")
    patience: int | None = setting(None, "Stop after this many evaluations without a better one.")
    checkpoint_minutes: float = setting(2.0, "Minutes between checkpoints.")
    trust_remote_code: bool = setting(False, "Run Python code that comes with the model.", flag=True)


def load_toml(path: Path, base: FinetuneConfig) -> FinetuneConfig:
    """Return `base` with the values of a TOML file; every unknown key and wrong type is reported at once."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"no such config file: {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from None
    return replace(base, values, where=str(path))


def replace(config: FinetuneConfig, values: dict[str, Any], *, where: str) -> FinetuneConfig:
    """Return `config` with `values` checked against the fields' types and choices.

    Raises SettingsError that lists every problem. A key may be spelt with dashes or underscores; `ram` may be "1GB".
    """
    fields = {f.name: f for f in dataclasses.fields(config)}
    types = get_type_hints(type(config))
    problems, clean = [], {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in fields:
            problems.append(f'"{key}" is not a setting.{did_you_mean(name, fields)}')
            continue
        if name == "ram" and isinstance(value, str):
            value = parse_bytes(value)
        wanted = get_args(types[name]) or (types[name],)
        if float in wanted and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        kinds = tuple(getattr(t, "__origin__", t) or t for t in wanted)
        choices = fields[name].metadata["choices"]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(k.__name__ for k in kinds if k is not type(None))
            problems.append(f'"{key}" is {value!r} ({type(value).__name__}); allowed: {names}')
        elif choices and value is not None and value not in choices:
            problems.append(f'"{key}" is {value!r}; allowed: {", ".join(map(str, choices))}')
        else:
            clean[name] = value
    if problems:
        raise SettingsError("\n  ".join([f"{where}: {len(problems)} problem(s)", *problems]))
    return dataclasses.replace(config, **clean)


def parse_bytes(text: str) -> int:
    """Return the bytes of "570MB", "1.5GB" or "800000"; MB are 2^20 bytes."""
    units = {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "B": 1, "": 1}
    number = text.strip().upper().rstrip("BKMG")
    unit = text.strip().upper()[len(number) :]
    try:
        return int(float(number) * units[unit.replace("I", "")])
    except (ValueError, KeyError):
        raise SettingsError(f'"{text}" is not an amount of memory; allowed: 570MB, 1.5GB') from None
