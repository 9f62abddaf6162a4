"""config.json of a decoder family → DecoderSpec. A family is a function that fills in what differs from Llama."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from edgelora.errors import ModelError, did_you_mean
from edgelora.models.rope import Rope, rope_from_parameters
from edgelora.models.spec import DecoderSpec, Norm

Config = dict[str, Any]

LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attn_in": "model.layers.{i}.input_layernorm",
    "mlp_in": "model.layers.{i}.post_attention_layernorm",
    **{role: f"model.layers.{{i}}.self_attn.{role}_proj" for role in ("q", "k", "v", "o")},
    **{role: f"model.layers.{{i}}.mlp.{role}_proj" for role in ("gate", "up", "down")},
}
QK_NORM_NAMES = {role: f"model.layers.{{i}}.self_attn.{role}" for role in ("q_norm", "k_norm")}
SANDWICH_NAMES = {
    "attn_out": "model.layers.{i}.post_attention_layernorm",
    "mlp_in": "model.layers.{i}.pre_feedforward_layernorm",
    "mlp_out": "model.layers.{i}.post_feedforward_layernorm",
}
GPT2_NAMES = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "attn_in": "transformer.h.{i}.ln_1",
    "mlp_in": "transformer.h.{i}.ln_2",
    "qkv": "transformer.h.{i}.attn.c_attn",
    "o": "transformer.h.{i}.attn.c_proj",
    "up": "transformer.h.{i}.mlp.c_fc",
    "down": "transformer.h.{i}.mlp.c_proj",
}
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip


# What lists are made of before anything is held against the weights: a damaged number must not fill the memory.
MOST = {"num_hidden_layers": 4096, "n_layer": 4096, "head_dim": 65536}


def decoder_spec(config: Config) -> DecoderSpec:
    """Return the description of the decoder that a config.json names.

    Raises ModelError for an unknown model type, a missing or wrong value, and options that no decoder here has.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise ModelError(
            f'model type "{model_type}" is not a decoder that EdgeLoRA knows; known are {", ".join(sorted(FAMILIES))}.'
            f"{did_you_mean(model_type, FAMILIES)}"
        )
    for key, most in MOST.items():
        if isinstance(value := config.get(key), int | float) and not 0 < value <= most:
            raise ModelError(f"config.json of a {model_type} model is wrong: {key} is {value}; allowed: 1 to {most}")
    try:
        fields = FAMILIES[model_type](config)
        return DecoderSpec(model_type=model_type, special=_special(config), **fields)
    except KeyError as error:
        raise ModelError(f"config.json of a {model_type} model has no {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"config.json of a {model_type} model is wrong: {error}") from None


def _special(config: Config) -> dict[str, int | list[int] | None]:
    return {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ModelError(f'activation "{name}" is not known; known are {", ".join(ACTIVATIONS)}')
    return ACTIVATIONS[name]


def _llama(config: Config, *, tied: bool = False) -> dict[str, Any]:
    """Llama and, with the differences that follow, everybody else. `tied` is the family's default in transformers."""
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    biases = {"q", "k", "v", "o"} if config.get("attention_bias") else set()
    if config.get("mlp_bias"):
        biases |= {"gate", "up", "down"}
    layers = int(config["num_hidden_layers"])
    return {
        "hidden_size": int(config["hidden_size"]),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": head_dim,
        "intermediate_size": int(config["intermediate_size"]),
        "vocab_size": int(config["vocab_size"]),
        "max_positions": int(config["max_position_embeddings"]),
        "activation": _activation(str(config.get("hidden_act") or config.get("hidden_activation") or "silu")),
        "norm": Norm("rms", float(config.get("rms_norm_eps", 1e-6))),
        "names": dict(LLAMA_NAMES),
        "biases": frozenset(biases),
        "ropes": _ropes(config, head_dim, layers),
        "windows": _windows(config, layers),
        "attention_scale": head_dim**-0.5,
        "tied": bool(config.get("tie_word_embeddings", tied)),
    }


def layer_types(config: Config, layers: int) -> list[str]:
    """Return "full_attention" or "sliding_attention" for each layer, also for configs older than `layer_types`."""
    if config.get("layer_types"):
        types = [str(kind) for kind in config["layer_types"]]
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown or len(types) != layers:
            raise ModelError(f"layer_types has {len(types)} entries for {layers} layers, unknown ones: {sorted(unknown)}")
        return types
    if config["model_type"] == "gemma2":
        return ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    if config["model_type"] == "gemma3_text":
        pattern = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
        return ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    if config["model_type"] in ("mistral", "phi3", "starcoder2"):
        return ["sliding_attention" if config.get("sliding_window") else "full_attention"] * layers
    if config.get("use_sliding_window") and config.get("sliding_window"):
        first = int(config.get("max_window_layers", layers))
        return ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return ["full_attention"] * layers


def _windows(config: Config, layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    kinds = layer_types(config, layers)
    return tuple(int(window) if window and kind == "sliding_attention" else None for kind in kinds)


def rope_parameters(config: Config) -> dict[str, Any]:
    """Return the rotary parameters, from transformers 5's `rope_parameters` or from 4.57's `rope_theta` + `rope_scaling`.

    Gemma 3 has one set per layer type. Raises ModelError when both forms are there and name different thetas.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    top = config.get("rope_theta")
    if top is not None and parameters.get("rope_theta", top) != top:
        raise ModelError(
            f"config.json contradicts itself: rope_theta is {top}, in rope_parameters it is {parameters['rope_theta']}",
            hint="keep the one that the model was trained with in both places",
        )
    if top is not None and "full_attention" not in parameters:
        parameters["rope_theta"] = top
    return parameters


def _ropes(config: Config, head_dim: int, layers: int) -> tuple[Rope | None, ...]:
    parameters = rope_parameters(config)
    max_positions = int(config["max_position_embeddings"])

    def build(values: dict[str, Any]) -> Rope:
        own = {"partial_rotary_factor": config.get("partial_rotary_factor", 1.0), **values}
        own.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings") or max_positions)
        return rope_from_parameters(own, head_dim, max_positions)

    if "full_attention" in parameters:
        ropes = {kind: build(values) for kind, values in parameters.items() if isinstance(values, dict)}
    elif config["model_type"] == "gemma3_text":
        local = {"rope_theta": config.get("rope_local_base_freq", 10000.0)}
        ropes = {"full_attention": build({"rope_theta": 1e6, **parameters}), "sliding_attention": build(local)}
    else:
        ropes = dict.fromkeys(("full_attention", "sliding_attention"), build(parameters))
    return tuple(ropes[kind] for kind in layer_types(config, layers))


def _qwen2(config: Config) -> dict[str, Any]:
    return {**_llama(config), "biases": frozenset("qkv")}


def _qwen3(config: Config) -> dict[str, Any]:
    fields = _llama({"head_dim": 128, **config})
    return {**fields, "names": {**LLAMA_NAMES, **QK_NORM_NAMES}, "qk_norm": "head"}


def _gemma(config: Config) -> dict[str, Any]:
    # Old Gemma configs say hidden_act "gelu" where the model was trained with the tanh form: transformers overrides it too.
    config = {"head_dim": 256, **config, "hidden_act": config.get("hidden_activation") or "gelu_pytorch_tanh"}
    fields = _llama(config, tied=True)
    norm = Norm("rms", float(config.get("rms_norm_eps", 1e-6)), offset=1.0)
    return {**fields, "norm": norm, "embedding_scale": math.sqrt(fields["hidden_size"])}


def _gemma2(config: Config) -> dict[str, Any]:
    fields = _gemma(config)
    return {
        **fields,
        "names": {**LLAMA_NAMES, **SANDWICH_NAMES},
        "attention_scale": float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        "attention_softcap": float(config.get("attn_logit_softcapping") or 0.0),
        "logits_softcap": float(config.get("final_logit_softcapping") or 0.0),
    }


def _gemma3(config: Config) -> dict[str, Any]:
    if config.get("use_bidirectional_attention"):
        raise ModelError("this Gemma 3 model attends in both directions: it is an encoder, not a decoder")
    fields = _gemma2(config)
    return {**fields, "names": {**fields["names"], **QK_NORM_NAMES}, "qk_norm": "head"}


def _phi3(config: Config) -> dict[str, Any]:
    names = {role: name for role, name in LLAMA_NAMES.items() if role not in ("q", "k", "v", "gate", "up")}
    names["qkv"] = "model.layers.{i}.self_attn.qkv_proj"
    names["gate_up"] = "model.layers.{i}.mlp.gate_up_proj"
    return {**_llama(config), "names": names, "biases": frozenset()}


def _smollm3(config: Config) -> dict[str, Any]:
    fields = _llama(config, tied=True)
    layers = fields["num_layers"]
    interval = int(config.get("no_rope_layer_interval", 4))
    rotary = config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(layers)]
    return {**fields, "ropes": tuple(rope if use else None for rope, use in zip(fields["ropes"], rotary, strict=True))}


def _olmo2(config: Config) -> dict[str, Any]:
    names = {role: name for role, name in {**LLAMA_NAMES, **SANDWICH_NAMES}.items() if role not in ("attn_in", "mlp_in")}
    return {**_llama({"rms_norm_eps": 1e-5, **config}), "names": {**names, **QK_NORM_NAMES}, "qk_norm": "full"}


def _granite(config: Config) -> dict[str, Any]:
    return {
        **_llama(config),
        "embedding_scale": float(config.get("embedding_multiplier", 1.0)),
        "attention_scale": float(config.get("attention_multiplier", 1.0)),
        "residual_scale": float(config.get("residual_multiplier", 1.0)),
        "logits_scale": 1.0 / float(config.get("logits_scaling", 1.0)),
    }


def _gpt2(config: Config) -> dict[str, Any]:
    if config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True):
        raise ModelError("this GPT-2 scales its attention per layer or not at all, which no graph here does")
    layers, hidden = int(config.get("n_layer", 12)), int(config.get("n_embd", 768))
    heads = int(config.get("n_head", 12))
    return {
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "intermediate_size": int(config.get("n_inner") or 4 * hidden),
        "vocab_size": int(config["vocab_size"]),
        "max_positions": int(config.get("n_positions") or config["n_ctx"]),
        "activation": _activation(str(config.get("activation_function", "gelu_new"))),
        "norm": Norm("layer", float(config.get("layer_norm_epsilon", 1e-5))),
        "names": dict(GPT2_NAMES),
        "biases": frozenset(("qkv", "o", "up", "down")),
        "transposed": True,
        "ropes": (None,) * layers,
        "windows": (None,) * layers,
        "attention_scale": (hidden // heads) ** -0.5,
        "tied": bool(config.get("tie_word_embeddings", True)),
    }


FAMILIES: dict[str, Callable[[Config], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "granite": _granite,
    "gpt2": _gpt2,
}
