"""Tiny random models of every shape, saved as Hugging Face folders with a tiny byte-level tokenizer and a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB = 288  # 256 bytes, the special tokens below, and some ids that no token has
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<pad>", "<unk>", "<s>", "</s>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LLAMA_SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "vocab_size": VOCAB, "head_dim": 8,
}  # fmt: skip
BERT_SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 66, "vocab_size": VOCAB, "type_vocab_size": 2,
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention"]
LOCAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# family → (configuration class, what differs from the shape above)
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}),
    "llama3": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}}),
    "yarn": ("LlamaConfig", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2_sliding": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 12}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"sliding_window": 5, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
                                "final_logit_softcapping": 1.5, "layer_types": SLIDING}),
    "gemma3_text": ("Gemma3TextConfig", {"sliding_window": 5, "query_pre_attn_scalar": 24, "layer_types": SLIDING,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                            "sliding_attention": LOCAL_ROPE}}),
    "phi3": ("Phi3Config", {"sliding_window": 6, "pad_token_id": 260, "head_dim": None}),
    "phi3_longrope": ("Phi3Config", {"pad_token_id": 260, "head_dim": None, "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.5,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.1, 1.5],
                            "long_factor": [2.0, 4.0], "original_max_position_embeddings": 64, "partial_rotary_factor": 0.5}}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0], "pad_token_id": 260, "head_dim": None}),
    "olmo2": ("Olmo2Config", {"head_dim": None}),
    "granite": ("GraniteConfig", {"head_dim": None, "embedding_multiplier": 3.0, "attention_multiplier": 0.3,
                                  "residual_multiplier": 0.4, "logits_scaling": 2.0}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128, "vocab_size": VOCAB}),
}  # fmt: skip
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {}),
    "roberta": ("RobertaConfig", {"pad_token_id": 260, "bos_token_id": 262, "eos_token_id": 263,
                                  "max_position_embeddings": 330}),
    "distilbert": ("DistilBertConfig", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
    "electra": ("ElectraConfig", {"embedding_size": 32}),
    "mpnet": ("MPNetConfig", {"pad_token_id": 260, "max_position_embeddings": 330}),
    "xlm-roberta": ("XLMRobertaConfig", {"pad_token_id": 260, "max_position_embeddings": 330}),
    "deberta-v2": ("DebertaV2Config", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pooler_hidden_size": 32}),
    "modernbert": ("ModernBertConfig", {"pad_token_id": 260, "bos_token_id": 262, "eos_token_id": 263, "cls_token_id": 262,
                                        "sep_token_id": 263, "global_attn_every_n_layers": 2, "local_attention": 8}),
}  # fmt: skip


def save_decoder(folder: Path, family: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """Save a random decoder of a family of DECODERS, every parameter of it random (norms and biases too)."""
    import transformers

    name, differs = DECODERS[family]
    shape = {} if family == "gpt2" else LLAMA_SHAPE
    special = {"bos_token_id": 262, "eos_token_id": 256, "pad_token_id": 260}
    values = {key: value for key, value in {**shape, **special, **differs, **overrides}.items() if value is not None}
    return _save(folder, "AutoModelForCausalLM", getattr(transformers, name)(**values), seed)


def save_encoder(
    folder: Path, family: str = "bert", *, labels: int = 3, base_only: bool = False, seed: int = 0,
    auto_class: str = "AutoModelForSequenceClassification", **overrides: Any
) -> Path:  # fmt: skip
    """Save a random encoder of a family of ENCODERS: with a head, or its base alone as MiniLM is."""
    import transformers

    name, differs = ENCODERS[family]
    shape = {"max_position_embeddings": 66, "vocab_size": VOCAB} if family == "distilbert" else BERT_SHAPE
    config = getattr(transformers, name)(**{"pad_token_id": 260, **shape, **differs, "num_labels": labels, **overrides})
    return _save(folder, "AutoModel" if base_only else auto_class, config, seed)


def _save(folder: Path, auto_class: str, config: Any, seed: int) -> Path:
    import torch
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, auto_class).from_config(config)
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, std=0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path, *, chat: bool = True) -> None:
    """Write a byte-level tokenizer: one token for each byte, then SPECIAL from id 256 on."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 128, "bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<pad>", "unk_token": "<unk>",
    }  # fmt: skip
    if chat:
        config["chat_template"] = CHAT_TEMPLATE
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}),
    "mobilenet_v2": ("MobileNetV2Config", {"image_size": 32, "depth_multiplier": 0.25, "min_depth": 8,
                                           "depth_divisible_by": 8}),
    "convnext": ("ConvNextConfig", {"image_size": 32, "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1],
                                    "layer_scale_init_value": 0.5}),
    "vit": ("ViTConfig", {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "intermediate_size": 64}),
    "deit": ("DeiTConfig", {"architectures": ["DeiTForImageClassification"],
                            "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2,
                            "num_attention_heads": 4, "intermediate_size": 64}),
    "efficientnet": ("EfficientNetConfig", {"image_size": 32, "width_coefficient": 0.5, "depth_coefficient": 1.0,
                                            "in_channels": [32, 16, 24], "out_channels": [16, 24, 40], "strides": [1, 2, 2],
                                            "kernel_sizes": [3, 3, 5], "num_block_repeats": [1, 1, 1],
                                            "expand_ratios": [1, 4, 4], "hidden_dim": 640}),
    "mobilevit": ("MobileViTConfig", {"image_size": 32, "hidden_sizes": [16, 24, 32], "num_attention_heads": 2,
                                      "neck_hidden_sizes": [8, 8, 12, 16, 16, 24, 32], "output_stride": 8}),
    "swin": ("SwinConfig", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
                            "window_size": 4}),
}  # fmt: skip
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 32, "width": 32}, "resample": 2,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3,
}  # fmt: skip


def save_vision(
    folder: Path, family: str = "resnet", *, labels: int = 3, seed: int = 0, settled: bool = False, **overrides: Any
) -> Path:
    """Save a random classifier of pictures of a family of VISION; `settled`: see save_network."""
    import transformers

    name, differs = VISION[family]
    config = getattr(transformers, name)(**{**differs, "num_labels": labels, **overrides})
    save_network(folder, "AutoModelForImageClassification", config, seed, settled=settled)
    return folder


def save_network(folder: Path, auto_class: str, config: Any, seed: int, *, settled: bool = False) -> None:
    """Save a random network, the statistics of its batch norms random too, and an image processor for 32 × 32 pixels.

    `settled`: the statistics are those of what the network computes, as in one that was trained: random ones let the signal of
    a deep network vanish, which then cannot tell pictures apart.
    """
    import torch
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, auto_class).from_config(config)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    torch.nn.init.uniform_(tensor, 0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    torch.nn.init.normal_(tensor, std=0.2)
        if settled:
            settle(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR), encoding="utf-8")


def settle(model: Any) -> None:
    """Let the statistics of batch norms be those of what the network computes, layer after layer."""
    import torch

    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over all batches
        norm.reset_running_stats()
    with torch.no_grad():
        for _ in range(8):
            noise, light = torch.randn(16, 3, 32, 32), torch.randn(16, 3, 1, 1)
            model.train()(pixel_values=noise + light)


def save_pictures(folder: Path, rows: int = 24, size: int = 32) -> Path:
    """Write FOLDER/{dark,light,stripes}/N.png: three kinds of pictures that are easy to tell apart."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(rows):
        label = ("dark", "light", "stripes")[number % 3]
        pixels = random.integers(0, 60, (size, size, 3)) + {"dark": 0, "light": 180, "stripes": 60}[label]
        if label == "stripes":
            pixels[::4] += 120
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{number}.png")
    return folder


CONVOLUTIONS = {"conv_dim": (16, 16, 16), "conv_stride": (5, 4, 4), "conv_kernel": (10, 8, 4), "num_feat_extract_layers": 3,
                "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SPEECH: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2": ("Wav2Vec2Config", {**CONVOLUTIONS, "classifier_proj_size": 16}),
    "wav2vec2_layer": ("Wav2Vec2Config", {**CONVOLUTIONS, "classifier_proj_size": 16, "feat_extract_norm": "layer",
                                          "do_stable_layer_norm": True, "conv_bias": True}),
    "hubert": ("HubertConfig", {**CONVOLUTIONS, "classifier_proj_size": 16}),
    "ast": ("ASTConfig", {"max_length": 64, "num_mel_bins": 32}),
}  # fmt: skip


def save_speech(
    folder: Path,
    family: str = "wav2vec2",
    *,
    head: str = "AudioClassification",
    labels: int = 3,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Save a random network on sound of a family of SPEECH with a head (AudioClassification, CTC) and its feature extractor."""
    import torch
    import transformers

    name, differs = SPEECH[family]
    config = getattr(transformers, name)(**{**LAYERS, **differs, "num_labels": labels, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
            elif parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    extractor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16000, "do_normalize": True,
                 "padding_value": 0.0, "feature_size": 1, "return_attention_mask": family == "wav2vec2_layer"}  # fmt: skip
    if family == "ast":
        extractor = {"feature_extractor_type": "ASTFeatureExtractor", "sampling_rate": 16000, "max_length": 64,
                     "num_mel_bins": 32, "mean": -4.0, "std": 4.5}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor), encoding="utf-8")
    return folder


def save_sounds(folder: Path, rows: int = 24, rate: int = 8000) -> Path:
    """Write FOLDER/{hiss,high,low}/N.wav: a third to a half second of noise or of a tone, easy to tell apart."""
    import numpy as np
    import soundfile

    random = np.random.default_rng(0)
    for number in range(rows):
        label = ("hiss", "high", "low")[number % 3]
        time = np.arange(random.integers(rate // 3, rate // 2)) / rate
        wave = random.standard_normal(len(time)) * (0.2 if label == "hiss" else 0.01)
        if label != "hiss":
            wave += 0.3 * np.sin(2 * np.pi * (2000 if label == "high" else 200) * random.uniform(0.9, 1.1) * time)
        (folder / label).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / label / f"{number}.wav", wave, rate)
    return folder


LETTERS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"DGHILOSTUW'")


def save_speller(folder: Path, family: str = "wav2vec2", *, seed: int = 0, **overrides: Any) -> Path:
    """Save a random network with a CTC head over LETTERS and the files of its tokenizer."""
    save_speech(folder, family, head="CTC", seed=seed, vocab_size=len(LETTERS), pad_token_id=0, **overrides)
    (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(LETTERS)}), encoding="utf-8")
    config = {"tokenizer_class": "Wav2Vec2CTCTokenizer", "pad_token": "<pad>", "word_delimiter_token": "|"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
