"""The files beside the graph, as each of the four loaders wants them. All are written into the bundle's staging folder.

Sources: onnxruntime-genai's builder (genai_config.json; a key that it does not know is refused at load), transformers.js
(`transformers.js_config`, file suffixes by dtype), optimum-onnx with transformers 4.57 (tokenizer class, top-level rope_theta).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.folder import write_json
from edgelora.images import ImageProcessor
from edgelora.models.families import rope_parameters
from edgelora.models.spec import DecoderSpec
from edgelora.preprocessor import PREPROCESSOR, image_settings
from edgelora.tasks import get_task

MODEL_NAMES = {
    "int2": "model_q2.onnx",
    "int3": "model_q4.onnx",  # of 2 and 4 bits: transformers.js has no name for 3
    "int4": "model_q4.onnx",
    "int8": "model_quantized.onnx",
    "fp32": "model.onnx",
}
WEB_DTYPES = {"int2": "q2", "int3": "q4", "int4": "q4", "int8": "q8", "fp32": "fp32"}
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model")
COPIED = (*PREPROCESSORS, *VOCABULARIES, "tokenizer.json", "special_tokens_map.json", "target_tokenizer.json")
# Model types of onnxruntime-genai 0.18 that read this graph; "decoder" is its name for any other.
GENAI_TYPES = ("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
WRITING = (
    "decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id",
    "num_beams", "length_penalty", "early_stopping", "no_repeat_ngram_size", "max_length", "min_length", "bad_words_ids",
)  # fmt: skip
# Classes whose own code loaders need: that of Whisper reads times and the tokens of a task
OWN_TOKENIZERS = ("WhisperTokenizer",)
TRANSFORMERS_5_KEYS = ("backend", "is_local", "local_files_only", "processor_class", "auto_map")


def graph_names(precision: str, task: str) -> tuple[str, ...]:
    """Return the names of the graphs' files, that of the decoder first."""
    name = MODEL_NAMES[precision]
    if not get_task(task).writes:
        return (name,)
    return tuple(name.replace("model", part, 1) for part in ("decoder_model_merged", "encoder_model"))


@dataclass(frozen=True)
class BundleFacts:
    """What the files have in common. `inputs` are the graph's input names, `source` the merged folder."""

    source: Path
    config: dict[str, Any]
    precision: str
    inputs: tuple[str, ...]
    max_positions: int
    max_length: int
    eos: tuple[int, ...]
    bos: int | None
    pad: int | None
    graphs: tuple[str, ...]  # names of the graphs' files, that of the decoder first
    task: str

    @property
    def model_name(self) -> str:
        return self.graphs[0]


def write_files(folder: Path, facts: BundleFacts, spec: DecoderSpec | None) -> None:
    """Write config.json, generation_config.json, the tokenizer and, for a decoder, genai_config.json into `folder`."""
    write_json(folder / "config.json", bundle_config(folder, facts))
    write_tokenizer(folder, facts)
    if "image" in get_task(facts.task).file_columns:
        write_json(folder / PREPROCESSOR, preprocessor(facts))
    if spec is not None:
        write_json(folder / "generation_config.json", generation_config(facts))
        write_json(folder / "genai_config.json", genai_config(facts, spec))
    elif len(facts.graphs) > 1:
        write_json(folder / "generation_config.json", writing_config(facts))


def bundle_config(folder: Path, facts: BundleFacts) -> dict[str, Any]:
    """Return config.json for transformers 4.57 and 5 (rotary parameters in both forms) and for transformers.js."""
    dropped = ("quantization_config", "torch_dtype", "transformers.js_config", "auto_map")
    config = {key: value for key, value in facts.config.items() if key not in dropped}
    config["dtype"] = "float32"
    if "rope_parameters" in config or "rope_theta" in config or "rope_scaling" in config:
        config |= both_ropes(config)
    if facts.eos:
        config |= {"eos_token_id": facts.eos[0] if len(facts.eos) == 1 else list(facts.eos), "pad_token_id": facts.pad}
    web: dict[str, Any] = {"dtype": WEB_DTYPES[facts.precision]}
    large = [name for name in facts.graphs if (folder / "onnx" / f"{name}_data").is_file()]
    if large:
        web["use_external_data_format"] = dict.fromkeys(large, 1)
    config["transformers.js_config"] = web
    return config


def both_ropes(config: dict[str, Any]) -> dict[str, Any]:
    """Return `rope_theta` (and what else 4.57 reads at top level) and `rope_parameters`, saying the same."""
    parameters = rope_parameters(config)
    if "full_attention" in parameters:  # Gemma 3: one set for each kind of layer
        full, sliding = parameters["full_attention"], parameters.get("sliding_attention", {})
        top = {"rope_theta": full.get("rope_theta", 1e6), "rope_local_base_freq": sliding.get("rope_theta", 1e4)}
        return {**top, "rope_parameters": parameters}
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **parameters}
    found = {"rope_theta": parameters["rope_theta"], "rope_parameters": parameters}
    if parameters["rope_type"] != "default":
        found["rope_scaling"] = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return found


def generation_config(facts: BundleFacts) -> dict[str, Any]:
    """Return generation_config.json: the model's own, with the tokens that end and pad an answer."""
    config = read_json(facts.source / "generation_config.json")
    config = {key: value for key, value in config.items() if key not in ("transformers_version", "max_length")}
    tokens = {"bos_token_id": facts.bos, "eos_token_id": list(facts.eos), "pad_token_id": facts.pad}
    return {"_from_model_config": False, "max_length": facts.max_length, **config, **tokens}


def writing_config(facts: BundleFacts) -> dict[str, Any]:
    """Return generation_config.json of an encoder-decoder: the model's own, with what its config.json names."""
    config = {key: facts.config[key] for key in WRITING if facts.config.get(key) is not None}
    own = read_json(facts.source / "generation_config.json")
    kept = {key: value for key, value in own.items() if key != "transformers_version" and value is not None}
    return {**config, **kept, "_from_model_config": False}


def write_tokenizer(folder: Path, facts: BundleFacts) -> None:
    """Copy the tokenizer; its config names a class that 4.57 knows and carries the chat template as well."""
    for name in COPIED:
        source = facts.source / name
        if source.is_file():
            content = source.read_bytes()
            (folder / name).write_bytes(compact(content) if name == "tokenizer.json" else content)
    config = read_json(facts.source / "tokenizer_config.json")
    if not (facts.source / "tokenizer.json").is_file():
        if config:  # of single letters: transformers' own class reads vocab.json
            write_json(folder / "tokenizer_config.json", config)
        return
    config = {key: value for key, value in config.items() if key not in TRANSFORMERS_5_KEYS}
    if config.get("tokenizer_class") not in OWN_TOKENIZERS:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if names := [n for n in ("input_ids", "token_type_ids", "attention_mask") if n in facts.inputs]:
        config["model_input_names"] = names
    config["model_max_length"] = facts.max_positions
    extra = config.pop("extra_special_tokens", None)
    if isinstance(extra, list):  # transformers 5's spelling; 4.57 expects a dictionary under that name
        config["additional_special_tokens"] = extra
    elif extra:
        config["extra_special_tokens"] = extra
    template = facts.source / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    if isinstance(config.get("chat_template"), str):
        (folder / "chat_template.jinja").write_text(config["chat_template"], encoding="utf-8", newline="\n")
    write_json(folder / "tokenizer_config.json", config)


def compact(tokenizer: bytes) -> bytes:
    """Return a tokenizer.json without white space, and merges as "a b", their older form, where no piece has a space.

    SmolLM2's: 3.5 to 1.4 MB, parsed in two thirds of the time, which is a third of a bundle's load.
    """
    content = json.loads(tokenizer)
    merges = content["model"].get("merges")
    if merges and all(isinstance(merge, list) and not any(" " in piece for piece in merge) for merge in merges):
        content["model"]["merges"] = [" ".join(merge) for merge in merges]
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def preprocessor(facts: BundleFacts) -> dict[str, Any]:
    """Return preprocessor_config.json of a model of pictures, with the class that loaders ask for."""

    def whole() -> dict[str, Any]:
        return ImageProcessor.from_folder(facts.source).as_config()

    return dict(image_settings(facts.source, whole, facts.task, str(facts.config.get("model_type"))))


def genai_config(facts: BundleFacts, spec: DecoderSpec) -> dict[str, Any]:
    """Return genai_config.json. `max_length` is capped: onnxruntime-genai allocates the cache for all of it at once."""
    cache = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    present = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    decoder = {
        # Severity 3 keeps quiet about num_logits_to_keep, which is an initializer and an input on purpose.
        "session_options": {"log_id": "onnxruntime-genai", "log_severity_level": 3, "provider_options": []},
        "filename": f"onnx/{facts.model_name}",
        "head_size": spec.head_dim,
        "hidden_size": spec.hidden_size,
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **cache},
        "outputs": {"logits": "logits", **present},
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": spec.num_kv_heads,
    }
    kind = spec.model_type if spec.model_type in GENAI_TYPES else "decoder"
    model: dict[str, Any] = {
        "context_length": facts.max_positions,
        "decoder": decoder,
        "eos_token_id": list(facts.eos),
        "pad_token_id": facts.pad,
        "type": kind,
        "vocab_size": spec.vocab_size,
    }
    if facts.bos is not None:
        model["bos_token_id"] = facts.bos
    search = {"do_sample": False, "max_length": facts.max_length, "min_length": 0, "num_beams": 1, "num_return_sequences": 1}
    return {"model": model, "search": {**search, "past_present_share_buffer": True}}


def special_tokens(source: Path, config: dict[str, Any], stop: Sequence[int]) -> tuple[tuple[int, ...], int | None, int | None]:
    """Return (every token that ends an answer, bos, pad) from config.json, generation_config.json and the tokenizer."""
    generation = read_json(source / "generation_config.json")
    eos: list[int] = []
    for found in (config.get("eos_token_id"), generation.get("eos_token_id"), list(stop)):
        tokens = [found] if isinstance(found, int) else list(found or [])
        eos += [token for token in tokens if token not in eos]
    pad = config.get("pad_token_id")
    if pad is None:
        pad = generation.get("pad_token_id")
    if pad is None and eos:
        pad = eos[0]
    return tuple(eos), config.get("bos_token_id"), pad


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, {} where there is no such file."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
