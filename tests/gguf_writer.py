"""A GGUF file from a tiny Hugging Face model, laid out as llama.cpp's converter does it (written from its description)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny

# family → (architecture, whether q and k rows are permuted, what is added to norms)
ARCHITECTURES = {
    "llama": ("llama", True, 0.0), "llama3": ("llama", True, 0.0), "mistral": ("llama", True, 0.0),
    "qwen2": ("qwen2", False, 0.0),
    "qwen3": ("qwen3", False, 0.0), "gemma": ("gemma", False, 1.0), "gemma2": ("gemma2", False, 1.0),
    "gemma3_text": ("gemma3", False, 1.0), "phi3": ("phi3", False, 0.0), "smollm3": ("smollm3", True, 0.0),
    "olmo2": ("olmo2", False, 0.0), "granite": ("granite", True, 0.0), "gpt2": ("gpt2", False, 0.0),
}  # fmt: skip
KEYS = {
    "context_length": ("max_position_embeddings", "n_positions"), "embedding_length": ("hidden_size", "n_embd"),
    "block_count": ("num_hidden_layers", "n_layer"), "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head"), "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",), "attention.layer_norm_epsilon": ("layer_norm_epsilon",),
    "attention.key_length": ("head_dim",), "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",), "final_logit_softcapping": ("final_logit_softcapping",),
    "embedding_scale": ("embedding_multiplier",), "attention.scale": ("attention_multiplier",),
    "residual_scale": ("residual_multiplier",), "logit_scale": ("logits_scaling",),
}  # fmt: skip


def write_gguf(folder: Path, path: Path, family: str, *, kind: str = "F32") -> Path:
    """Write the model in `folder` to `path`; `kind` is the type of its matrices: F32, F16, Q8_0, Q4_0, Q4_1."""
    import gguf
    from safetensors.numpy import load_file

    arch, permuted, offset = ARCHITECTURES[family]
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(path), arch)
    _metadata(writer, config, folder)
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    model_arch = next(a for a in gguf.MODEL_ARCH if gguf.MODEL_ARCH_NAMES[a] == arch)
    names = gguf.get_tensor_name_map(model_arch, layers)
    for name, values in load_file(folder / "model.safetensors").items():
        stored, suffix = names.get_name(name.rsplit(".", 1)[0]), name.rsplit(".", 1)[1]
        values = values.astype(np.float32)
        if permuted and name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config["num_attention_heads"] if ".q_proj" in name else config["num_key_value_heads"]
            shape = values.shape
            values = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        if arch == "gpt2" and values.ndim == 2 and ("c_" in name):
            values = values.T
        if name.endswith("norm.weight"):
            values = values + np.float32(offset)
        values = np.ascontiguousarray(values)
        if values.ndim == 2 and kind != "F32" and values.shape[1] % 32 == 0:
            quantization = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(f"{stored}.{suffix}", gguf.quants.quantize(values, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(f"{stored}.{suffix}", values)
    if family == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(writer: Any, config: dict[str, Any], folder: Path) -> None:
    arch = writer.arch
    for key, names in KEYS.items():
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if key == "feed_forward_length" and value is None:
            value = 4 * config["n_embd"]
        if isinstance(value, int):
            writer.add_uint32(f"{arch}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{arch}.{key}", value)
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" in rope:
        writer.add_float32(f"{arch}.rope.freq_base", rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_string(f"{arch}.rope.scaling.type", "linear")
        writer.add_float32(f"{arch}.rope.scaling.factor", rope["factor"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    tokens[tiny.VOCAB - 1] = "ab"  # a merge, since transformers' reader takes no vocabulary without one
    special = {added["id"]: added["content"] for added in tokenizer["added_tokens"]}
    size = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([special.get(i, tokens.get(i, f"[unused{i}]")) for i in range(size)])
    writer.add_token_types([3 if i in special else 1 if i in tokens else 5 for i in range(size)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(262)
    writer.add_eos_token_id(256)
    writer.add_pad_token_id(260)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def _llama3_factors(config: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The factors per frequency that llama.cpp's converter writes for Llama 3's rotary scaling."""
    rope, dim = config["rope_parameters"], config["head_dim"]
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / dim)
        original = rope["original_max_position_embeddings"]
        smooth = (original / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)
