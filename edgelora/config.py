"""Every setting and its one default. The dataclass feeds the command line's options and the keys of a TOML file."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from edgelora.errors import SettingsError, did_you_mean

Config = TypeVar("Config", "FinetuneConfig", "GenerateConfig", "ServeConfig")
PRECISIONS = ("int4", "int8", "int3", "int2", "fp32")  # of what ships, the usual one first


@dataclass(frozen=True)
class Range:
    """The numbers allowed: from `low` (or above it) up to `high`."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high and value != math.inf

    def __str__(self) -> str:
        if math.isfinite(self.high):
            return f"{'above ' if self.above else ''}{self.low:g} to {self.high:.10g}"
        return f"{'above' if self.above else 'at least'} {self.low:g}"


AT_LEAST_0, AT_LEAST_1, ABOVE_0, SHARE = Range(0), Range(1), Range(0, above=True), Range(0, 1)
SEEDS, MILLION, THREADS = Range(0, 2**32 - 1), Range(0, 1e6, above=True), Range(1, 1024)  # many more threads crash torch


def setting(default: Any, text: str, *, flag: bool = False, choices: tuple[Any, ...] = (), allowed: Range | None = None) -> Any:
    """Declare a field: its default, its help, whether it is also a flag, and the values or the range allowed."""
    return field(default=default, metadata={"help": text, "flag": flag, "choices": choices, "allowed": allowed})


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of `edgelora finetune`. None means: chosen by the task, the model or the planner, and recorded."""

    task: str | None = setting(None, "Task, as `edgelora tasks` lists them; guessed from the columns.", flag=True)
    columns: dict[str, str] | None = setting(  # noqa: RUF009  setting() is dataclasses.field
        None, "Our column names to the data's: prompt=mr,completion=ref.", flag=True
    )
    ram: int | None = setting(
        None, "Memory that the whole run may use: 1GB, 570MB. Default: half of what is free.", flag=True, allowed=ABOVE_0
    )
    precision: str = setting("int4", "What will ship.", flag=True, choices=PRECISIONS)
    method: str = setting(
        "lora", "What is trained: LoRA adapters, or the block scales of fixed integers.", flag=True, choices=("lora", "scales")
    )
    rank: int = setting(8, "Rank of the adapters.", flag=True, allowed=AT_LEAST_1)
    alpha: float | None = setting(
        None, "LoRA alpha: the update is scaled by alpha / rank. Default: 2 × rank.", flag=True, allowed=MILLION
    )
    target_modules: str | None = setting(
        None, "all-linear, none (the head alone), or names separated by commas: q_proj,v_proj. Default: the task's.", flag=True
    )
    last_layers: int | None = setting(
        None, "Adapters in the last N layers only; what the others compute is kept on disk.", flag=True, allowed=AT_LEAST_1
    )
    learning_rate: float | None = setting(None, "Peak learning rate. Default: the task's.", flag=True, allowed=MILLION)
    batch_size: int | None = setting(None, "Rows of one optimizer step. Default: the task's.", flag=True, allowed=AT_LEAST_1)
    epochs: float = setting(3.0, "Passes over the training rows.", flag=True, allowed=ABOVE_0)
    max_steps: int | None = setting(
        None, "Stop after this many optimizer steps, whatever the epochs.", flag=True, allowed=AT_LEAST_1
    )
    max_length: int | None = setting(
        None, "Longest row in tokens. Default: 1024, or the model's limit.", flag=True, allowed=AT_LEAST_1
    )
    truncate: bool = setting(False, "Cut rows over the length limit instead of refusing them.", flag=True)
    base_bits: int | None = setting(
        None, "Bits of the frozen weights in memory. Default: the most that fits.", flag=True, choices=(32, 16, 8, 4)
    )
    seed: int = setting(0, "Seed of everything random.", flag=True, allowed=SEEDS)
    threads: int | None = setting(None, "CPU threads. Default: the physical cores.", flag=True, allowed=THREADS)
    valid: str | None = setting(
        None, "Validation rows: a file, or a share such as 0.1. Default: 0.1, at most 500 rows.", flag=True
    )
    valid_rows: int = setting(64, "Rows of the closing table; 0 means all.", flag=True, allowed=AT_LEAST_0)
    micro_batch: int | None = setting(None, "Rows computed at once. Default: what fits the memory.", allowed=AT_LEAST_1)
    compute: str | None = setting(
        None,
        "Operands of the matrix products with frozen weights. Default: bf16 where the machine is faster with them.",
        choices=("fp32", "bf16"),
    )
    gradient_checkpointing: bool | None = setting(None, "Recompute activations in backward. Default: when memory asks for it.")
    schedule: str = setting("cosine", "Learning-rate schedule.", choices=("cosine", "linear", "constant"))
    warmup_ratio: float = setting(0.05, "Share of the steps that the learning rate takes to rise.", allowed=SHARE)
    weight_decay: float = setting(0.0, "AdamW weight decay of the adapters.", allowed=AT_LEAST_0)
    dropout: float = setting(0.0, "Dropout on the adapters' input.", allowed=Range(0, 0.99))
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm.", allowed=ABOVE_0)
    rslora: bool = setting(False, "Scale by alpha / sqrt(rank) (rsLoRA).")
    dora: bool = setting(False, "Train a magnitude beside the direction (DoRA).")
    init: str = setting("kaiming", "How A and B begin.", choices=("kaiming", "orthogonal", "pissa", "olora", "eva"))
    loraplus_ratio: float | None = setting(
        None, "B's learning rate as a multiple of A's (LoRA+). Default: the same rate.", allowed=AT_LEAST_1
    )
    rank_pattern: dict[str, int] | None = setting(  # noqa: RUF009
        None, "Ranks of layers that have their own, by the end of the layer's name.", allowed=AT_LEAST_1
    )
    alpha_pattern: dict[str, float] | None = setting(  # noqa: RUF009
        None, "Alphas of layers that have their own, by the end of the layer's name.", allowed=MILLION
    )
    optimizer_bits: int | None = setting(None, "Bits of AdamW's moments. Default: the most that fits.", choices=(32, 8))
    grid_start: str | None = setting(
        None,
        "What is rounded at first: the model's weights, or what makes up for errors on training rows. Default: the latter "
        "for language models, where memory leaves the room.",
        choices=("nearest", "calibrated"),
    )
    grid_scales: str | None = setting(
        None,
        "Block scales while rounding: of each block's extreme, or learned beside the adapters. Default: learned "
        "for language models, where memory leaves the room.",
        choices=("max", "learned"),
    )
    grid_activations: str = setting(
        "float",
        "What adapted layers see while rounding: inputs as they are, or in int8 as ONNX Runtime's fast kernels take them.",
        choices=("float", "int8"),
    )
    grid_warmup: float = setting(0.0, "Share of the steps before rounding begins.", allowed=SHARE)
    evaluations: int = setting(4, "Times that the validation rows are scored during training.", allowed=AT_LEAST_0)
    patience: int | None = setting(None, "Stop after this many evaluations without a better one.", allowed=AT_LEAST_1)
    checkpoint_minutes: float = setting(2.0, "Minutes between checkpoints.", allowed=ABOVE_0)
    trust_remote_code: bool = setting(
        False, "Open a model that names Python code of its own; that code is not run so far.", flag=True
    )


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of `edgelora run` and `edgelora chat` for models that write text. A temperature of 0 is greedy."""

    max_new_tokens: int = setting(256, "Tokens that an answer may have at most.", flag=True, allowed=AT_LEAST_1)
    temperature: float = setting(
        0.0, "0: always the likeliest token. Above: sampling, wilder the higher.", flag=True, allowed=AT_LEAST_0
    )
    top_k: int = setting(0, "Sample among the K likeliest tokens; 0: all.", flag=True, allowed=AT_LEAST_0)
    top_p: float = setting(
        1.0, "Sample among the likeliest tokens of this probability together.", flag=True, allowed=Range(0, 1, above=True)
    )
    min_p: float = setting(0.0, "Sample among tokens at least this likely, against the likeliest.", flag=True, allowed=SHARE)
    repetition_penalty: float = setting(1.0, "Above 1, tokens that occurred become less likely.", flag=True, allowed=ABOVE_0)
    stop: tuple[str, ...] | None = setting(None, "End the answer before this text; may be given more than once.", flag=True)
    seed: int = setting(0, "Seed of the sampling.", flag=True, allowed=SEEDS)
    speculate: bool | None = setting(
        None, "Draft tokens from the text so far, check several at once; default: where EdgeLoRA's kernels run.", flag=True
    )
    num_beams: int | None = setting(
        None, "Beams of a translation or summary; 1 is greedy. Default: the bundle's.", flag=True, allowed=AT_LEAST_1
    )
    length_penalty: float | None = setting(
        None, "Exponent of the length that a beam's score is divided by. Default: the bundle's, mostly 1."
    )
    no_repeat_ngram_size: int | None = setting(
        None, "N-grams of this size occur once in a translation or summary; 0: any. Default: the bundle's.", allowed=AT_LEAST_0
    )
    times: bool = setting(False, "Of speech: with the times at which it is said.", flag=True)
    system: str | None = setting(None, "System turn put before the prompt.", flag=True)
    raw: bool = setting(False, "Give the prompt to the model as it is, without the chat template.", flag=True)


@dataclass(frozen=True)
class ServeConfig:
    """Settings of `edgelora serve`."""

    host: str = setting("127.0.0.1", "Address to listen at. Others than this machine's own need an API key.", flag=True)
    port: int = setting(8000, "Port to listen at; 0: any that is free.", flag=True, allowed=Range(0, 65535))
    api_key: str | None = setting(None, "Key that requests must carry.")
    queue: int = setting(256, "Requests that may wait; one more is answered with status 429.", allowed=AT_LEAST_1)
    timeout: float = setting(600.0, "Seconds that a request may take, waiting included.", allowed=ABOVE_0)
    max_body: int = setting(4 << 20, "Bytes that the body of a request may have.", allowed=AT_LEAST_1)


def load_toml(path: Path, base: Config) -> Config:
    """Return `base` with the values of a TOML file; every unknown key and wrong type is reported at once."""
    import tomllib

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"no such config file: {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from None
    return replace(base, values, where=str(path))


def replace(config: Config, values: dict[str, Any], *, where: str) -> Config:
    """Return `config` with `values` checked against the fields' types, choices and ranges.

    Raises SettingsError that lists every problem. A key may be spelt with dashes or underscores; `ram` may be "1GB".
    """
    fields = {f.name: f for f in dataclasses.fields(config)}
    types = get_type_hints(type(config))
    problems: list[str] = []
    clean: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in fields:
            problems.append(f'"{key}" is not a setting.{did_you_mean(name, fields)}')
            continue
        value, problem = _checked(name, value, types[name], fields[name].metadata)
        if problem:
            problems.append(f'"{key}" is {value!r}{problem}')
        elif name in clean:
            problems.append(f'"{key}" is given twice')
        clean[name] = value
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise SettingsError("\n  ".join([f"{where}: {count}", *problems]))
    return dataclasses.replace(config, **clean)


def _checked(name: str, value: Any, annotation: Any, rules: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the value as the field holds it, and what is wrong with it or ""."""
    if name == "ram" and isinstance(value, str):
        try:
            value = parse_bytes(value)
        except SettingsError:
            return value, "; allowed: an amount of memory such as 570MB or 1.5GB"
    if name == "valid" and isinstance(value, float):
        value = str(value)
    if name == "target_modules" and isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ",".join(value)
    if name == "target_modules" and isinstance(value, str) and not value.strip():
        return value, "; allowed: all-linear, none, or names of layers separated by commas"
    wanted = (annotation,) if isinstance(annotation, type) and not get_args(annotation) else get_args(annotation)
    if get_origin(annotation) in (tuple, dict):
        wanted = (annotation,)
    kinds = tuple(get_origin(kind) or kind for kind in wanted)
    if isinstance(value, bool) and bool not in kinds:
        return value, f" (bool); allowed: {_names(kinds)}"
    if float in kinds and isinstance(value, int):
        value = float(value)
    if tuple in kinds and isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, kinds):
        return value, f" ({type(value).__name__}); allowed: {_names(kinds)}"
    if isinstance(value, dict | tuple):
        return _checked_items(value, get_args(next(kind for kind in wanted if get_origin(kind))), rules["allowed"])
    if value is not None and rules["choices"] and value not in rules["choices"]:
        return value, f"; allowed: {', '.join(map(str, rules['choices']))}"
    if isinstance(value, int | float) and rules["allowed"] is not None and value not in rules["allowed"]:
        return value, f"; allowed: {rules['allowed']}"
    return value, ""


def _checked_items(value: Any, arguments: tuple[Any, ...], allowed: Range | None) -> tuple[Any, str]:
    """Check what is in a table or a list; `arguments` are those of the annotation: dict's key and value, tuple's item."""
    kind = arguments[1] if isinstance(value, dict) else arguments[0]
    if kind is float and isinstance(value, dict):
        value = {key: float(item) if type(item) is int else item for key, item in value.items()}
    items = value.values() if isinstance(value, dict) else value
    if not all(type(item) is kind for item in items):
        return value, f"; allowed: {ITEMS[kind]} in it"
    if allowed is not None and not all(item in allowed for item in items):
        return value, f"; allowed: {ITEMS[kind]} in it, {allowed}"
    return value, ""


ITEMS: dict[type, str] = {str: "strings", int: "whole numbers", float: "numbers"}


def _names(kinds: tuple[type, ...]) -> str:
    names = {"int": "a whole number", "float": "a number", "str": "a string", "bool": "true or false"}
    names |= {"dict": "a table", "tuple": "a list"}
    return " or ".join(names[kind.__name__] for kind in kinds if kind is not type(None))


def parse_bytes(text: str) -> int:
    """Return the bytes of "570MB", "1.5GB" or "800000"; MB are 2^20 bytes."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([KMGT]?)I?B?\s*", text.upper())
    if match is None:
        raise SettingsError(f'"{text}" is not an amount of memory; allowed: 570MB, 1.5GB')
    return int(float(match[1]) * (1 << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2]]))


def parse_columns(text: str) -> dict[str, str]:
    """Return {"prompt": "mr", "completion": "ref"} of "prompt=mr,completion=ref"."""
    columns: dict[str, str] = {}
    for pair in text.split(","):
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not (ours and equals and theirs):
            raise SettingsError(
                f'"{pair}" does not map a column; allowed: our name = the data\'s, as in prompt=mr,completion=ref'
            )
        if ours in columns:
            raise SettingsError(f'column "{ours}" is mapped twice, to "{columns[ours]}" and "{theirs}"')
        columns[ours] = theirs
    return columns
