"""The shapes of the small networks that are trained from scratch where no pretrained weights of a family are at hand.

Each is a family's name here → (the task that it is trained for, transformers' model type, what differs from its defaults).
"""

from __future__ import annotations

from typing import Any

Shapes = dict[str, tuple[str, str, dict[str, Any]]]
ATTENDING = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
PATCHES = {**ATTENDING, "patch_size": 4}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "layer_type": "basic"}
RT_BACKBONE = {"model_type": "rt_detr_resnet", **RESNET, "out_features": ["stage2", "stage3", "stage4"]}
DETR_BACKBONE = {"model_type": "resnet", **RESNET, "out_features": ["stage4"]}
MOBILEVIT = {"hidden_sizes": [32, 48, 64], "num_attention_heads": 4, "neck_hidden_sizes": [16, 16, 24, 32, 48, 64, 128]}
PICTURES: Shapes = {
    "resnet": ("image-classification", "resnet", RESNET),
    "mobilenet_v2": ("image-classification", "mobilenet_v2", {"depth_multiplier": 0.5, "min_depth": 8, "output_stride": 16}),
    "efficientnet": ("image-classification", "efficientnet", {
        "width_coefficient": 0.5, "depth_coefficient": 1.0, "in_channels": [32, 16, 24, 40], "out_channels": [16, 24, 40, 80],
        "strides": [1, 2, 2, 2], "kernel_sizes": [3, 3, 5, 3], "num_block_repeats": [1, 1, 1, 1],
        "expand_ratios": [1, 4, 4, 4], "hidden_dim": 640,
        "initializer_range": 0.2}),  # of 0.02 the variances are below what batch norms add to them: all signals vanish
    "convnext": ("image-classification", "convnext", {"patch_size": 2, "hidden_sizes": [24, 48, 96], "depths": [1, 1, 2],
                                                      "num_stages": 3}),
    "vit": ("image-classification", "vit", PATCHES),
    "deit": ("image-classification", "deit", {**PATCHES, "architectures": ["DeiTForImageClassification"]}),
    "mobilevit": ("image-classification", "mobilevit", {**MOBILEVIT, "output_stride": 8}),
    "swin": ("image-classification", "swin", {"patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4],
                                              "window_size": 4}),
    "unet": ("image-segmentation", "edgelora_unet", {"hidden_sizes": [12, 24, 48, 64]}),
    "segformer": ("image-segmentation", "segformer", {"hidden_sizes": [16, 32, 80, 128], "depths": [1, 1, 1, 1],
                                                      "decoder_hidden_size": 64}),
    "mobilenet_v2-deeplab": ("image-segmentation", "mobilenet_v2", {"depth_multiplier": 0.5, "min_depth": 8,
                                                                    "output_stride": 8, "classifier_dropout_prob": 0.1}),
    "yolos": ("object-detection", "yolos", {**ATTENDING, "patch_size": 8, "num_detection_tokens": 30}),
    "detr": ("object-detection", "detr", {
        "backbone_config": DETR_BACKBONE, "use_timm_backbone": False, "num_queries": 40, "d_model": 64, "encoder_layers": 2,
        "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128, "dropout": 0.0}),
    "rt_detr": ("object-detection", "rt_detr", {
        "backbone_config": RT_BACKBONE, "encoder_hidden_dim": 64, "encoder_in_channels": [32, 64, 128], "encoder_ffn_dim": 128,
        "encoder_attention_heads": 4, "freeze_backbone_batch_norms": False, "d_model": 64, "num_queries": 40,
        "decoder_in_channels": [64, 64, 64],
        "decoder_ffn_dim": 128, "decoder_layers": 2, "decoder_attention_heads": 4, "num_denoising": 20}),
}  # fmt: skip

HEARING = {
    "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "feat_extract_norm": "layer",
    "conv_dim": (64,) * 5, "conv_kernel": (10, 5, 3, 3, 2), "conv_stride": (5, 4, 2, 2, 2), "num_feat_extract_layers": 5,
    "num_conv_pos_embeddings": 32, "num_conv_pos_embedding_groups": 8, "do_stable_layer_norm": True, "final_dropout": 0.0,
}  # fmt: skip
SPELLING = {**HEARING, "pad_token_id": 0, "ctc_zero_infinity": True}
BANDS = {"max_length": 96, "num_mel_bins": 64}  # frames of 10 ms, and what is read of each
SOUNDS: Shapes = {
    "wav2vec2": ("speech-recognition-ctc", "wav2vec2", SPELLING),
    "hubert": ("speech-recognition-ctc", "hubert", SPELLING),
    "wav2vec2-classes": ("audio-classification", "wav2vec2", {**HEARING, "classifier_proj_size": 64}),
    "hubert-classes": ("audio-classification", "hubert", {**HEARING, "classifier_proj_size": 64}),
    "ast": ("audio-classification", "audio-spectrogram-transformer", {**ATTENDING, **BANDS}),
}

READING = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
           "max_position_embeddings": 130, "hidden_dropout_prob": 0.0}  # fmt: skip
BART = {
    "d_model": 128, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 128, "dropout": 0.0,
}  # fmt: skip
T5 = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4}
LLAMA = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 32, "tie_word_embeddings": True}  # fmt: skip
WINDOW = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
NARROW = {name: value for name, value in LLAMA.items() if name != "head_dim"}
TEXTS: Shapes = {
    "roberta": ("text-classification", "roberta", READING),
    "distilbert": ("text-classification", "distilbert", {"dim": 128, "hidden_dim": 256, "n_layers": 3, "n_heads": 4,
                                                         "max_position_embeddings": 130, "dropout": 0.0}),
    "deberta": ("text-classification", "deberta-v2", {**READING, "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
                                                      "pooler_hidden_size": 128}),
    "modernbert": ("text-classification", "modernbert", {**READING, "global_attn_every_n_layers": 2, "local_attention": 32,
                                                         "cls_token_id": 3, "sep_token_id": 1}),
    "t5": ("translation", "t5", {**T5, "tie_word_embeddings": True, "decoder_start_token_id": 0}),
    "mt5": ("translation", "mt5", {**T5, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}),
    "bart": ("translation", "bart", {**BART, "decoder_start_token_id": 1, "forced_eos_token_id": None}),
    "mbart": ("translation", "mbart", {**BART, "decoder_start_token_id": 1, "forced_eos_token_id": None}),
    "marian": ("translation", "marian", {**BART, "decoder_start_token_id": 0, "forced_eos_token_id": None}),
    "pegasus": ("summarization", "pegasus", {**BART, "decoder_start_token_id": 0, "forced_eos_token_id": None}),
    "bert2bert": ("translation", "encoder-decoder", READING),
    "llama": ("text-generation", "llama", LLAMA),
    "mistral": ("text-generation", "mistral", {**LLAMA, "sliding_window": 64}),
    "qwen2": ("text-generation", "qwen2", NARROW),
    "qwen3": ("text-generation", "qwen3", LLAMA),
    "gemma": ("text-generation", "gemma", LLAMA),
    "gemma2": ("text-generation", "gemma2", {**LLAMA, **WINDOW, "query_pre_attn_scalar": 32}),
    "gemma3": ("text-generation", "gemma3_text", {**LLAMA, **WINDOW, "query_pre_attn_scalar": 32}),
    "phi3": ("text-generation", "phi3", NARROW),
    "smollm3": ("text-generation", "smollm3", {**NARROW, "no_rope_layers": [1, 1, 0]}),
    "olmo2": ("text-generation", "olmo2", NARROW),
    "granite": ("text-generation", "granite", {**NARROW, "attention_multiplier": 32**-0.5}),
    "gpt2": ("text-generation", "gpt2", {"n_embd": 128, "n_head": 4, "n_layer": 3, "n_positions": 256, "resid_pdrop": 0.0,
                                         "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}  # fmt: skip
