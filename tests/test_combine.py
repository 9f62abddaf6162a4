"""Several adapters in one weight: against the formulas by hand, and against PEFT where it computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from edgelora.adapters.combine import METHODS, Recipe, disjoint_mean, drop, open_adapters, trim
from edgelora.cli.main import cli
from edgelora.errors import FolderError, SettingsError
from edgelora.folder import read_manifest
from edgelora.merging.merge import merge
from edgelora.models.source import open_model
from edgelora.quant.checkpoint import MergedCheckpoint
from tests.test_merge import peft_adapter, saved, tiny_bert, tiny_llama
from tests.test_merge_runs import a_run
from tests.tolerances import COMBINED_WEIGHT

# PEFT 0.21 asks transformers 5.23 for a property that the latter has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore:.*multiple adapters.*:UserWarning"
)
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


def test_trimming_keeps_the_largest_values() -> None:
    change = torch.tensor([[0.1, -3.0, 0.0], [2.0, -0.5, 1.0]])
    assert trim(change.clone(), 0.5).tolist() == [[0.0, -3.0, 0.0], [2.0, 0.0, 1.0]]
    assert trim(change.clone(), 1.0).tolist() == change.tolist()
    assert not trim(change.clone(), 0.1).any()


def test_signs_are_elected_and_the_others_left_out() -> None:
    """The example of TIES's figure 1 in small: agreement, conflict, one that is trimmed, and nothing at all."""
    first, second = torch.tensor([2.0, 3.0, 0.0, 0.0, -1.0]), torch.tensor([4.0, -1.0, -6.0, 0.0, 1.0])
    mean = disjoint_mean([(1.0, first.clone), (1.0, second.clone)], (5,))
    assert mean.tolist() == [3.0, 3.0, -6.0, 0.0, 1.0]  # a sum of 0 elects +
    weighted = disjoint_mean([(0.5, first.clone), (2.0, second.clone)], (5,))
    assert weighted.tolist() == [(1.0 + 8.0) / 2, 1.5, -12.0, 0.0, 2.0]


def test_dropping_keeps_the_mean_and_follows_its_seed() -> None:
    change = torch.ones(400, 400)
    found = drop(change.clone(), 0.25, seed=1)
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert found.mean().item() == pytest.approx(1.0, abs=5 * (3 / 160_000) ** 0.5)  # five standard deviations
    assert torch.equal(found, drop(change.clone(), 0.25, seed=1))
    assert not torch.equal(found, drop(change.clone(), 0.25, seed=2))


def two_adapters(tmp_path: Path, first: str = "k_proj", **second: Any) -> str:
    """Save adapters a (rank 4, q_proj and another) and b (as told) of one model; return the model."""
    model = tiny_llama()
    reference = saved(model, tmp_path / "model")
    peft_adapter(model, tmp_path / "a", target_modules=["q_proj", first], lora_alpha=6)
    torch.manual_seed(7)
    other = get_peft_model(tiny_llama_of(reference), LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **second}))
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    other.save_pretrained(tmp_path / "b")
    return reference


def tiny_llama_of(reference: str) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(reference)


def shipped(tmp_path: Path, reference: str, **rule: Any) -> MergedCheckpoint:
    recipe = Recipe((tmp_path / "a", tmp_path / "b"), **rule)
    merge(None, tmp_path / "out", adapter=recipe, model=reference, precision="fp32", overwrite=True)
    return MergedCheckpoint.open(tmp_path / "out")


# PEFT cuts the combined change to a rank again; at the full rank nothing is cut.
SAME_IN_PEFT = [("linear", "svd", {}), ("linear", "cat", {}), ("ties", "ties_svd", {"density": 0.4})]


@pytest.mark.parametrize(("method", "theirs", "options"), SAME_IN_PEFT)
def test_what_peft_computes_in_weight_space_is_the_same(
    method: str, theirs: str, options: dict[str, Any], tmp_path: Path
) -> None:
    square = {"first": "o_proj", "target_modules": ["q_proj"]}  # of these 64 is the full rank
    reference, weights = two_adapters(tmp_path, use_rslora=True, **square), (0.7, -0.3)
    model = PeftModel.from_pretrained(tiny_llama_of(reference), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    rank = {} if theirs == "cat" else {"svd_rank": 64}
    model.add_weighted_adapter(["a", "b"], list(weights), "both", combination_type=theirs, **rank, **options)
    model.set_adapter("both")
    state = model.merge_and_unload().state_dict()
    ours = shipped(tmp_path, reference, weights=weights, method=method, **options)
    base = open_model(reference)
    for name in (f"model.layers.{i}.self_attn.{part}_proj.weight" for i in range(2) for part in "qo"):
        assert (state[name] - base.read(name)).abs().max() > 0.001
        torch.testing.assert_close(ours.read(name), state[name], **COMBINED_WEIGHT, msg=name)


@pytest.mark.parametrize("second", [{"use_dora": True}, {"init_lora_weights": "olora"}])
def test_changes_of_any_kind_add_up(second: dict[str, Any], tmp_path: Path) -> None:
    reference = two_adapters(tmp_path, **second)
    base, alone = open_model(reference), {}
    for name in "ab":
        merge(None, tmp_path / name / "alone", adapter=tmp_path / name, model=reference, precision="fp32")
        alone[name] = MergedCheckpoint.open(tmp_path / name / "alone")
    ours = shipped(tmp_path, reference, weights=(0.5, 2.0))
    for path in (Q, K):
        start = base.read(f"{path}.weight")
        a, b = (alone[name].read(f"{path}.weight") - start for name in "ab")
        torch.testing.assert_close(ours.read(f"{path}.weight"), start + 0.5 * a + 2.0 * b, **COMBINED_WEIGHT)


@pytest.mark.parametrize("method", METHODS)
def test_density_1_drops_nothing(method: str, tmp_path: Path) -> None:
    reference = two_adapters(tmp_path)
    ours, base = shipped(tmp_path, reference, method=method, density=1.0), open_model(reference)
    first = open_adapters(Recipe((tmp_path / "a",))).merged_weight(K, base.read(f"{K}.weight")) - base.read(f"{K}.weight")
    found = ours.read(f"{K}.weight") - base.read(f"{K}.weight")
    # One adapter alone has k_proj: its half of the mean of two, or the mean of those that change it.
    torch.testing.assert_close(found, first * (1.0 if method.endswith("ties") else 0.5), **COMBINED_WEIGHT)


def test_dare_drops_by_its_seed(tmp_path: Path) -> None:
    reference = two_adapters(tmp_path)
    rule = {"method": "dare_linear", "density": 0.5, "weights": (1.0, 1.0)}
    found: list[Tensor] = [shipped(tmp_path, reference, seed=seed, **rule).read(f"{K}.weight") for seed in (0, 0, 1)]
    base = open_model(reference).read(f"{K}.weight")
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert ((found[0] - base).abs() < 1e-9).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_one_weight_scales_one_adapter(tmp_path: Path) -> None:
    reference = two_adapters(tmp_path)
    base = open_model(reference).read(f"{Q}.weight")
    found = []
    for weight in (1.0, 0.25):
        recipe = Recipe((tmp_path / "a",), (weight,))
        merge(None, tmp_path / "out", adapter=recipe, model=reference, precision="fp32", overwrite=True)
        found.append(MergedCheckpoint.open(tmp_path / "out").read(f"{Q}.weight") - base)
    torch.testing.assert_close(found[1], 0.25 * found[0], **COMBINED_WEIGHT)


def test_the_command_line_combines_and_the_manifest_says_how(tmp_path: Path) -> None:
    reference = two_adapters(tmp_path)
    arguments = ["merge", "--adapter", str(tmp_path / "a"), "--adapter", str(tmp_path / "b"), "--weights", "0.7,0.3"]
    arguments += ["--combine", "ties", "--density", "0.4", "--model", reference, "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, [*arguments, "--precision", "fp32"])
    assert done.exit_code == 0, done.output
    manifest = read_manifest(tmp_path / "out", "merged")
    assert [(adapter["folder"], adapter["weight"]) for adapter in manifest["adapters"]] == [("a", 0.7), ("b", 0.3)]
    assert manifest["combine"] == {"method": "ties", "density": 0.4}
    wanted = MergedCheckpoint.open(tmp_path / "out").read(f"{Q}.weight")
    ours = shipped(tmp_path, reference, weights=(0.7, 0.3), method="ties", density=0.4)
    assert torch.equal(ours.read(f"{Q}.weight"), wanted)


def test_a_run_is_combined_with_an_adapter(tmp_path: Path) -> None:
    base = tiny_bert()
    reference = saved(base, tmp_path / "model")
    peft_adapter(tiny_bert(), tmp_path / "run", target_modules=["query"], task_type="SEQ_CLS")
    peft_adapter(tiny_bert(), tmp_path / "b", target_modules=["key"])
    run = a_run(tmp_path / "run", reference, ["a", "b", "c", "d", "e"])
    merge(None, tmp_path / "out", adapter=Recipe((run, tmp_path / "b"), (1.0, 1.0)), precision="fp32")
    checkpoint, source = MergedCheckpoint.open(tmp_path / "out"), open_model(reference)
    assert checkpoint.labels == ["a", "b", "c", "d", "e"]
    for part in ("query", "key"):
        name = f"bert.encoder.layer.0.attention.self.{part}.weight"
        assert not torch.equal(checkpoint.read(name), source.read(name))
    other = saved(tiny_bert(), tmp_path / "other")
    with pytest.raises(FolderError, match="was trained on another model than"):
        merge(None, tmp_path / "out2", adapter=Recipe((run, tmp_path / "b")), model=other)


def test_two_heads_are_refused(tmp_path: Path) -> None:
    reference = saved(tiny_bert(), tmp_path / "model")
    for name in "ab":
        peft_adapter(tiny_bert(), tmp_path / name, target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(FolderError, match=r"at most one adapter that replaces tensors.*\n.*a: classifier.*\n.*b: classifier"):
        merge(None, tmp_path / "out", adapter=Recipe((tmp_path / "a", tmp_path / "b")), model=reference)


def test_wrong_recipes_are_refused() -> None:
    recipe = Recipe((Path("a"), Path("a")), (1.0, 2.0, float("nan")), "tie", 0.0)
    with pytest.raises(SettingsError) as caught:
        recipe.check()
    assert caught.value.message == (
        "the adapters cannot be combined so:\n  "
        '"tie" is no way to combine adapters; allowed: linear, ties, dare_linear, dare_ties. Did you mean "ties"?\n  '
        "3 weights for 2 adapters\n  weights are 1, 2, nan; numbers are wanted, not all 0\n  "
        "density is 0; above 0 and at most 1 is allowed\n  an adapter is named twice"
    )
    done = CliRunner().invoke(cli, ["merge", "--adapter", "a", "--weights", "0.7;0.3", "--model", "m", "-o", "x"])
    assert (done.exit_code, "are not numbers separated by commas" in done.output) == (2, True)
