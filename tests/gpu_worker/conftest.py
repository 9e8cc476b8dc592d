"""What the tests of the worker share: a tiny checkpoint and adapters for it, made once."""

from pathlib import Path

import pytest

from tests.gpu_worker.engine_driver import EngineDriver
from tests.gpu_worker.step_modes import MODES, StepMode
from tests.gpu_worker.tiny_model import TinyAdapter, save_tiny_llama, write_adapter


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_adapters(tmp_path_factory: pytest.TempPathFactory) -> list[TinyAdapter]:
    """Ranks and targets differ: 1, 3 and 14 pages."""
    directory = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(directory, "rank-1", lora_rank=1, modules=("q_proj",)),
        write_adapter(directory, "rank-3", lora_rank=3),
        write_adapter(directory, "rank-8", lora_rank=8, modules=("q_proj", "v_proj", "down_proj")),
    ]


@pytest.fixture(params=list(MODES.values()), ids=list(MODES))
def step_mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StepMode:
    """Engines of the test run their steps this way."""
    mode: StepMode = request.param
    monkeypatch.setattr(EngineDriver, "mode", mode)
    return mode
