"""PEFT folders that are not merged: each says what is wrong, and what would help; and what is told of those that are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from edgelora.adapters.lora import Factors
from edgelora.adapters.peft_config import CONFIG
from edgelora.adapters.peft_format import WEIGHTS, AdapterFile, load, save
from edgelora.errors import FolderError

PATH = "model.layers.0.self_attn.q_proj"


def write_plain(folder: Path, **changes: Any) -> None:
    save(AdapterFile({PATH: Factors(torch.ones(2, 32), torch.ones(32, 2), 2.0)}), folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def refusal(folder: Path) -> tuple[str, str | None]:
    with pytest.raises(FolderError) as caught:
        load(folder)
    return caught.value.message.replace(str(folder), "DIR"), caught.value.hint


IN_PEFT = "merge it in PEFT: model.merge_and_unload().save_pretrained(FOLDER), then edgelora export FOLDER -o BUNDLE"
NOT_MERGED = "DIR/adapter_config.json asks for what cannot be merged here:\n  "


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"peft_type": "LOHA"},
         "DIR/adapter_config.json describes an adapter of type LOHA; LORA is wanted (rsLoRA, DoRA, PiSSA and OLoRA too)",
         IN_PEFT),
        ({"peft_type": "PREFIX_TUNING"},
         "DIR/adapter_config.json describes an adapter of type PREFIX_TUNING, which adds tokens to the input and changes no "
         "weight; LORA is wanted (rsLoRA, DoRA, PiSSA and OLoRA too)", None),
        ({"use_novelty": 3, "layer_replication": [[0, 1]]},
         NOT_MERGED + "layer_replication makes a model of more layers than its base has (layer_replication)\n  "
         "use_novelty = 3 is not known", IN_PEFT),
        ({"alora_invocation_tokens": [3]},
         NOT_MERGED + "aLoRA acts only on the tokens after its invocation, so no weight can hold it (alora_invocation_tokens)",
         IN_PEFT),
        ({"init_lora_weights": "corda"},
         'DIR/adapter_config.json began with init_lora_weights = "corda", which took a part out of the base weights that '
         "cannot be found again",
         "save it from PEFT with path_initial_model_for_weight_conversion, which writes a plain LoRA adapter"),
        ({"lora_alpha": "large", "rank_pattern": {"(": 3}, "modules_to_save": "head", "trainable_token_indices": [-1], "r": 0},
         "DIR/adapter_config.json is damaged:\n  r is 0; a positive whole number is wanted\n  "
         'lora_alpha is "large"; a number is wanted\n  '
         'rank_pattern is {"(": 3}; a table from regular expressions to numbers is wanted\n  '
         'modules_to_save is "head"; a list of names is wanted\n  '
         "trainable_token_indices is [-1]; a list of token ids, or a table from layers to them, is wanted", None),
        ({"r": None, "rank_pattern": {"q_proj": 0}, "auto_mapping": "x"},
         "DIR/adapter_config.json is damaged:\n  r is null; a positive whole number is wanted\n  "
         'rank_pattern is {"q_proj": 0}; a table to positive whole numbers is wanted\n  auto_mapping is "x"; a table is wanted',
         None),
        ({"r": 3},
         "DIR/adapter_model.safetensors is not a whole LoRA adapter:\n  "
         "model.layers.0.self_attn.q_proj: A and B of rank 2; adapter_config.json says 3", None),
        ({"target_parameters": ["experts.down"]},
         "DIR/adapter_model.safetensors is not a whole LoRA adapter:\n  "
         "target_parameters: experts.down is not the weight of a layer", None),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_followed_is_refused(
    changes: dict[str, Any], message: str, hint: str | None, tmp_path: Path
) -> None:
    write_plain(tmp_path, **changes)
    assert refusal(tmp_path) == (message, hint)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == ("DIR is not an adapter folder: it has no adapter_config.json", None)
    write_plain(tmp_path / "english")
    message, hint = refusal(tmp_path)
    assert message == "DIR is not an adapter folder: it has no adapter_config.json"
    assert hint == f"its adapters are english: --adapter {tmp_path / 'english'}"
    (tmp_path / CONFIG).write_text("[" * 100_000)
    assert refusal(tmp_path)[0].startswith("DIR/adapter_config.json is damaged: ")


def test_damaged_tensors_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write_plain(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-40])
    assert refusal(tmp_path)[0].startswith("DIR/adapter_model.safetensors is damaged: ")
    name = f"base_model.model.{PATH}"
    a, b = torch.zeros(2, 32), torch.zeros(32, 2)
    not_whole = f"DIR/adapter_model.safetensors is not a whole LoRA adapter:\n  {PATH}: "
    for tensors, wanted in (
        ({"lora_A.weight": a}, f"{not_whole}lora_A"),
        ({"lora_A.weight": a, "lora_B.weight": b.t().contiguous()},
         f"{not_whole}A of shape [2, 32] and B of shape [2, 32]; [r, K] and [N, r] are wanted"),
        ({"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": torch.ones(3)},
         f"{not_whole}lora_magnitude_vector of shape [3]; [32] is wanted"),
        ({"lora_A.weight": a, "lora_B.weight": b / 0},
         f"DIR/adapter_model.safetensors has values that are not finite: {name}.lora_B.weight"),
        ({"lora_A.weight": a.long(), "lora_B.weight": b},
         f"DIR/adapter_model.safetensors has values that are not floating point: {name}.lora_A.weight"),
    ):  # fmt: skip
        save_file({f"{name}.{part}": tensor for part, tensor in tensors.items()}, tmp_path / WEIGHTS)
        assert refusal(tmp_path)[0] == wanted


def test_no_pickle_is_read(tmp_path: Path) -> None:
    write_plain(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    assert refusal(tmp_path) == (
        "DIR is not an adapter folder: it has no adapter_model.safetensors; adapter_model.bin is a pickle, which can run code "
        "and is not read",
        "save it again from PEFT: model.save_pretrained(FOLDER, safe_serialization=True)",
    )


@pytest.mark.skipif(os.name == "nt", reason="links need a right on Windows")
def test_links_lead_nowhere_but_to_the_hub_cache(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    write_plain(snapshot)
    blobs.mkdir()
    (snapshot / WEIGHTS).rename(blobs / "abc")
    (snapshot / WEIGHTS).symlink_to(Path("../../blobs/abc"))
    assert list(load(snapshot).factors) == [PATH]
    write_plain(tmp_path / "plain")
    (tmp_path / "plain" / WEIGHTS).unlink()
    (tmp_path / "plain" / WEIGHTS).symlink_to(blobs / "abc")
    assert refusal(tmp_path / "plain")[0] == '"adapter_model.safetensors" points outside of DIR'


def test_a_base_in_nf4_is_told(tmp_path: Path) -> None:
    write_plain(tmp_path)
    assert load(tmp_path).notes == ()
    card = (
        "## Training procedure\n\nThe following `bitsandbytes` quantization config was used during training:\n"
        "- quant_method: QuantizationMethod.BITS_AND_BYTES\n- _load_in_8bit: False\n- _load_in_4bit: True\n"
        "- bnb_4bit_quant_type: nf4\n"
    )
    (tmp_path / "README.md").write_text(card)
    assert "trained over a base in NF4 (bitsandbytes)" in load(tmp_path).notes[0]
    (tmp_path / "README.md").write_text(card.replace("8bit: False", "8bit: True").replace("4bit: True", "4bit: False"))
    assert "trained over a base in 8 bits (bitsandbytes)" in load(tmp_path).notes[0]
    (tmp_path / "README.md").unlink()
    write_plain(tmp_path, base_model_name_or_path="unsloth/llama-3-8b-bnb-4bit")
    assert "trained over a base in NF4" in load(tmp_path).notes[0]
