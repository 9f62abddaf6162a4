"""GGUF metadata → config.json as transformers writes it. Keys: the GGUF specification in the ggml repository's docs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgelora.errors import ModelError, did_you_mean

# GGUF architecture → model_type, architecture class
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM"),
    "olmo2": ("olmo2", "Olmo2ForCausalLM"),
    "granite": ("granite", "GraniteForCausalLM"),
    "gpt2": ("gpt2", "GPT2LMHeadModel"),
}
# llama.cpp rotates interleaved pairs for these, so its converter permuted the rows of q and k
PERMUTED = {"llama", "smollm3", "granite"}
# what llama.cpp's converter folded into the norms: w instead of Gemma's w - 1
NORM_OFFSET = {"gemma", "gemma2", "gemma3"}
COMMON = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
GPT2 = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}


def gguf_config(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: Mapping[str, list[float]]
) -> dict[str, Any]:
    """Return the config.json of a GGUF file.

    fields: its metadata; shapes: its tensors by GGUF name, `[outputs, inputs]`; factors: the content of its rope_* tensors.
    Raises ModelError for an architecture that is not known and for metadata that is missing.
    """
    arch = str(fields.get("general.architecture"))
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f'GGUF architecture "{arch}" is not known; known are {known}.{did_you_mean(arch, ARCHITECTURES)}')
    if "token_embd.weight" not in shapes:
        raise ModelError("the GGUF file has no token_embd.weight")
    own = {key.removeprefix(f"{arch}."): value for key, value in fields.items() if key.startswith(f"{arch}.")}
    model_type, architecture = ARCHITECTURES[arch]
    config: dict[str, Any] = {"model_type": model_type, "architectures": [architecture], "dtype": "float32"}
    config |= {name: own[key] for key, name in (GPT2 if arch == "gpt2" else COMMON).items() if key in own}
    config["vocab_size"] = shapes["token_embd.weight"][0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    for name in ("bos", "eos", "padding", "unknown"):
        config[{"padding": "pad", "unknown": "unk"}.get(name, name) + "_token_id"] = fields.get(
            f"tokenizer.ggml.{name}_token_id"
        )
    if arch == "gpt2":
        return config | {"activation_function": "gelu_new"}
    missing = [f"{arch}.{key}" for key in list(COMMON)[:5] if COMMON[key] not in config]
    if missing:
        raise ModelError(f"the GGUF file has no {', '.join(missing)}")
    config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    config["hidden_act"] = "gelu_pytorch_tanh" if arch in NORM_OFFSET else "silu"
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    config.setdefault("num_key_value_heads", heads)
    config["head_dim"] = own.get("attention.key_length", hidden // heads)
    if arch in ("gemma2", "gemma3"):
        # llama.cpp has no key for it: only the 27B models scale by another number than head_dim
        large = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[arch]
        config["query_pre_attn_scalar"] = hidden // heads if large else config["head_dim"]
        config["hidden_activation"] = config["hidden_act"]
    return config | _rope(arch, own, config, factors)


def _rope(arch: str, own: Mapping[str, Any], config: dict[str, Any], factors: Mapping[str, list[float]]) -> dict[str, Any]:
    theta = float(own.get("rope.freq_base", 1e6 if arch == "gemma3" else 10000.0))
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if arch == "phi3" and own.get("rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        values["partial_rotary_factor"] = own["rope.dimension_count"] / config["head_dim"]
    scaling = own.get("rope.scaling.type", "none")
    original = own.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    if "rope_freqs.weight" in factors:
        values |= _llama3(factors["rope_freqs.weight"], theta)
    elif "rope_factors_short.weight" in factors:
        values |= {"rope_type": "longrope", "short_factor": factors["rope_factors_short.weight"]}
        values |= {"long_factor": factors["rope_factors_long.weight"], "original_max_position_embeddings": original}
        values |= {"attention_factor": own["rope.scaling.attn_factor"]} if "rope.scaling.attn_factor" in own else {}
    elif scaling in ("linear", "yarn"):
        values |= {"rope_type": scaling, "factor": own["rope.scaling.factor"]}
        values |= {"original_max_position_embeddings": original} if scaling == "yarn" else {}
    if arch == "gemma3":
        local = {"rope_type": "default", "rope_theta": 10000.0}
        return {"rope_parameters": {"full_attention": values, "sliding_attention": local}}
    # transformers 4.57 reads rope_theta at the top, 5 reads rope_parameters: both are written
    old = {} if values["rope_type"] == "default" else {"rope_scaling": values}
    return {"rope_theta": theta, "rope_parameters": values, **old}


def _llama3(factors: list[float], theta: float) -> dict[str, Any]:
    """Return Llama 3's rotary parameters from the factors per frequency that llama.cpp stores instead.

    Raises ModelError where they do not give these factors again.
    """
    guess = {"rope_type": "llama3", "factor": round(max(factors), 4), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    guess["original_max_position_embeddings"] = 8192
    from edgelora.models.rope import rope_from_parameters

    dim = 2 * len(factors)
    rope = rope_from_parameters({**guess, "rope_theta": theta}, dim, 8192)
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    again = [p / f for p, f in zip(plain, rope.inverse_frequencies, strict=True)]
    if not all(math.isclose(a, f, rel_tol=1e-3) for a, f in zip(again, factors, strict=True)):
        raise ModelError("the GGUF file scales its rotary frequencies in a way that is not known")
    return guess
