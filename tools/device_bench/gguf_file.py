"""A GGUF file for llama.cpp: SmolLM2's own with its Q4_1 layers rounded to Q4_0, or a Qwen2.5 shape with random weights.

    python gguf_file.py FROM.gguf OUT.gguf                 layers to Q4_0, all else as it is
    python gguf_file.py FOLDER FROM.gguf OUT.gguf          the folder's weights, with the tokenizer of FROM.gguf

llama.cpp repacks Q4_0 for its fastest kernels while it loads. Embedding (and tied head) are Q8_0, as in the SmolLM2 file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Q4_0, Q8_0 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
TABLES = ("token_embd.weight", "output.weight")
Tensor = tuple[str, Any, Any]  # name, values, type; None: float


def requantized(source: gguf.GGUFReader) -> Iterator[Tensor]:
    """Yield the tensors of a file, 4-bit ones rounded to Q4_0."""
    for tensor in source.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            yield tensor.name, gguf.quants.quantize(values, Q4_0), Q4_0
        else:
            floats = tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
            yield tensor.name, tensor.data, None if floats else tensor.tensor_type


def quantized(folder: Path, layers: int) -> Iterator[Tensor]:
    """Yield the tensors of a Hugging Face folder (bf16, as the bench writes them) under GGUF's names."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            start = file.tell()
        for name, entry in head.items():
            if name == "__metadata__":
                continue
            count = int(np.prod(entry["shape"]))
            raw = np.memmap(path, np.uint16, "r", start + entry["data_offsets"][0], (count,))
            values = (raw.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])
            stored = f"{names.get_name(name.rpartition('.')[0])}.{name.rpartition('.')[2]}"
            if values.ndim < 2:
                yield stored, values, None
            else:
                kind = Q8_0 if stored in TABLES else Q4_0
                yield stored, gguf.quants.quantize(values, kind), kind


def copy_fields(writer: gguf.GGUFWriter, source: gguf.GGUFReader, prefix: str, leave: tuple[str, ...] = ()) -> None:
    """Copy the metadata whose names begin with `prefix`."""
    for field in source.fields.values():
        if field.name.startswith(("GGUF.", "general.architecture", *leave)) or not field.name.startswith(prefix):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)


def describe(writer: gguf.GGUFWriter, config: dict[str, Any], source: gguf.GGUFReader) -> None:
    """Write the metadata of a Qwen2.5 shape; the tokenizer's list of tokens is filled up to the model's vocabulary."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    lists = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    copy_fields(writer, source, "tokenizer.", lists)
    tokens, kinds = (list(source.fields[name].contents()) for name in lists)
    missing = range(len(tokens), config["vocab_size"])
    writer.add_token_list(tokens + [f"<unused {place}>" for place in missing])
    writer.add_token_types(kinds + [int(gguf.TokenType.UNUSED)] * len(missing))


def write(writer: gguf.GGUFWriter, tensors: Iterable[Tensor]) -> None:
    for name, values, kind in tensors:
        writer.add_tensor(name, np.ascontiguousarray(values), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    *folder, donor, out = sys.argv[1:]
    source = gguf.GGUFReader(donor)
    if folder:
        config = json.loads((Path(folder[0]) / "config.json").read_text(encoding="utf-8"))
        writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN2])
        describe(writer, config, source)
        write(writer, quantized(Path(folder[0]), config["num_hidden_layers"]))
    else:
        writer = gguf.GGUFWriter(out, source.fields["general.architecture"].contents())
        copy_fields(writer, source, "")
        write(writer, requantized(source))


if __name__ == "__main__":
    main()
