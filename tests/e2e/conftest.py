"""Real services on real sockets: a tiny model with adapters, and a fleet that serves them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.fleet import Fleet
from tests.e2e.support import running_fleet
from tests.e2e.tiny_model import (
    ENDLESS_POOL,
    MIN_MARGIN,
    PARITY_ADAPTERS,
    AdapterRecipe,
    TinyModel,
    greedy,
    load_oracle,
    prompt_for,
    save_adapter,
    save_base,
    with_long_context,
)

# Found by trying seeds until every continuation below has a margin above MIN_MARGIN.
BASE_SEED = 17


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("tiny")
    base = folder / "base"
    save_base(base, BASE_SEED)
    adapters, prompts, answers = {}, {"": prompt_for(8)}, {}
    for index, (name, recipe) in enumerate(PARITY_ADAPTERS.items()):
        adapters[name] = folder / name
        prompts[name] = prompt_for(index)
        save_adapter(base, adapters[name], recipe, seed=100 + index)
    for name, prompt in prompts.items():
        answers[name], margin = greedy(load_oracle(base, adapters.get(name)), prompt)
        assert margin > MIN_MARGIN, f"the oracle is within {margin} of a tie on {name or 'the base'}"
    return TinyModel(base, adapters, prompts, answers)


@pytest.fixture(scope="session")
def many_adapters(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """32 small adapters of ranks 1 to 4."""
    folder = tmp_path_factory.mktemp("many")
    adapters = {}
    for index in range(32):
        name = f"small-{index:02d}"
        adapters[name] = folder / name
        recipe = AdapterRecipe(1 + index % 4, 8, ("q_proj", "v_proj", "down_proj"))
        save_adapter(tiny.base, adapters[name], recipe, seed=500 + index)
    return adapters


@pytest.fixture(scope="module")
def fleet(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One worker that serves the tiny model with its eight adapters."""
    with running_fleet(tiny.base, tmp_path_factory.mktemp("fleet"), tiny.adapters) as running:
        yield running


@pytest.fixture(scope="module")
def endless_fleet(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The same with room for streams that end only when a test ends them: `max_tokens=ENDLESS`."""
    folder = tmp_path_factory.mktemp("endless")
    base = with_long_context(tiny.base, folder / "base")
    with running_fleet(base, folder / "fleet", tiny.adapters, gpu_worker=ENDLESS_POOL) as running:
        yield running
