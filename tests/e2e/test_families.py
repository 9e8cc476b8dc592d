"""Every family and rope kind, with every adapter option, through all four services."""

import json
import shutil
from pathlib import Path

import pytest

from loraplex import AsyncClient
from tests.e2e.family_models import ADAPTERS, KINDS, save_kind, save_optioned_adapter
from tests.e2e.support import all_at_once, running_fleet
from tests.e2e.tiny_model import MIN_MARGIN, TinyModel, differing, greedy, load_oracle, prompt_for


def make_model(folder: Path, kind: str) -> TinyModel:
    base = folder / "base"
    save_kind(base, kind)
    adapters, prompts, answers = {}, {}, {}
    for index, name in enumerate(["", *ADAPTERS]):
        if name:
            adapters[name] = folder / name
            save_optioned_adapter(base, adapters[name], ADAPTERS[name], seed=200 + index)
        prompts[name] = prompt_for(index)
        answers[name], margin = greedy(load_oracle(base, adapters.get(name)), prompts[name])
        assert margin > MIN_MARGIN, f"the oracle is within {margin} of a tie on {name or 'the base'}"
    assert len({tuple(answer) for answer in answers.values()}) == len(answers)
    return TinyModel(base, adapters, prompts, answers)


async def failing(model: TinyModel, data_dir: Path) -> set[str]:
    """Who does not answer like the oracle when all ask at once."""
    with running_fleet(model.base, data_dir, model.adapters) as fleet:
        async with AsyncClient(fleet.gateway.address) as client:
            return differing(await all_at_once(client, model.prompts), model.answers)


def edited(model: TinyModel, folder: Path, file: str, **changes: object) -> TinyModel:
    """The model with fields of `base/config.json` or of an adapter's config changed; the oracle's answers stay."""
    copy = Path(shutil.copytree(model.base.parent, folder / "edited"))
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    adapters = {name: copy / name for name in model.adapters}
    return TinyModel(copy / "base", adapters, model.prompts, model.answers)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_family_and_its_adapters_answer_like_transformers_and_peft(kind: str, tmp_path: Path) -> None:
    assert await failing(make_model(tmp_path / "model", kind), tmp_path / "data") == set()


async def test_control_a_window_off_by_one_fails_parity(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "mistral")
    window = json.loads((model.base / "config.json").read_text())["sliding_window"]
    wrong = edited(model, tmp_path, "base/config.json", sliding_window=window + 1)
    assert await failing(wrong, tmp_path / "data") != set()


async def test_control_a_wrong_rope_kind_fails_parity(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama-linear")
    default = {"rope_type": "default", "rope_theta": 10000.0}
    wrong = edited(model, tmp_path, "base/config.json", rope_parameters=default)
    assert await failing(wrong, tmp_path / "data") == {"", *ADAPTERS}


async def test_control_ignored_rslora_fails_parity(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "qwen2")
    wrong = edited(model, tmp_path, "rslora/adapter_config.json", use_rslora=False)
    assert await failing(wrong, tmp_path / "data") == {"rslora"}


async def test_control_an_ignored_alpha_pattern_fails_parity(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "qwen3")
    wrong = edited(model, tmp_path, "patterns/adapter_config.json", alpha_pattern={})
    assert await failing(wrong, tmp_path / "data") == {"patterns"}
