"""Every family and rope kind, with every adapter option, through all four services."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loraplex import AsyncClient
from tests.e2e.family_models import ADAPTERS, KINDS, save_kind, save_optioned_adapter
from tests.e2e.support import all_at_once, running_fleet
from tests.e2e.tiny_model import MIN_MARGIN, TinyModel, differing, greedy, load_oracle, prompt_for

MAX_LOGPROB_DIFFERENCE = 1e-4


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


def whole(model: TinyModel, name: str) -> list[int]:
    """Prompt and answer: as a prompt it crosses the window and the original length."""
    return model.prompts[name] + model.answers[name]


async def scored(client: AsyncClient, model: TinyModel, name: str) -> torch.Tensor:
    """Log-probabilities `[num_tokens - 1]` that the fleet gives the tokens of `whole`, all but the first."""
    answer = await client.generate(whole(model, name), name, max_tokens=1, prompt_logprobs=0, timeout=100.0)
    assert answer.prompt_logprobs[0].chosen is None
    chosen = [position.chosen for position in answer.prompt_logprobs[1:]]
    assert [token.token_id for token in chosen if token] == whole(model, name)[1:]
    return torch.tensor([token.logprob for token in chosen if token])


def scored_by(oracle: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """The same from transformers, fed token by token: what dynamic rope gives a token depends on the feeding."""
    rows, past = [], None
    with torch.inference_mode():
        for token in tokens[:-1]:
            output = oracle(input_ids=torch.tensor([[token]]), past_key_values=past, use_cache=True)
            past = output.past_key_values
            rows.append(torch.log_softmax(output.logits[0, -1].float(), dim=-1))
    return torch.stack(rows).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def edited(model: TinyModel, folder: Path, file: str, **changes: object) -> TinyModel:
    """The model with fields of `base/config.json` or of an adapter's config changed; the oracle's answers stay."""
    copy = Path(shutil.copytree(model.base.parent, folder / "edited"))
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    adapters = {name: copy / name for name in model.adapters}
    return TinyModel(copy / "base", adapters, model.prompts, model.answers)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_family_and_its_adapters_answer_like_transformers_and_peft(kind: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", kind)
    with running_fleet(model.base, tmp_path / "data", model.adapters) as fleet:
        async with AsyncClient(fleet.gateway.address) as client:
            assert differing(await all_at_once(client, model.prompts), model.answers) == set()
            given = await asyncio.gather(*(scored(client, model, name) for name in model.prompts))
    for name, ours in zip(model.prompts, given, strict=True):
        theirs = scored_by(load_oracle(model.base, model.adapters.get(name)), whole(model, name))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=MAX_LOGPROB_DIFFERENCE)


async def test_bfloat16_is_as_good_as_peft(tmp_path: Path) -> None:
    """Log-probabilities of base and adapters against those of float32 on the same rounded weights: the error is at most
    twice that of peft's bfloat16 run, as both round every activation once per operation, in another order."""
    model = make_model(tmp_path / "model", "qwen2")
    rounded = AutoModelForCausalLM.from_pretrained(model.base, dtype=torch.bfloat16)
    rounded.save_pretrained(model.base)
    with running_fleet(model.base, tmp_path / "data", model.adapters) as fleet:
        async with AsyncClient(fleet.gateway.address) as client:
            ours = [await scored(client, model, name) for name in model.prompts]
    theirs, exact = [], []
    for name in model.prompts:
        oracle = load_oracle(model.base, model.adapters.get(name))
        exact.append(scored_by(oracle, whole(model, name)))
        base = AutoModelForCausalLM.from_pretrained(model.base, dtype=torch.bfloat16)
        oracle = PeftModel.from_pretrained(base, model.adapters[name]) if name else base
        theirs.append(scored_by(oracle.eval(), whole(model, name)))
    assert 0 < rms(ours, exact) <= 2 * rms(theirs, exact)


def rms(values: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return float((torch.cat(values) - torch.cat(wanted)).square().mean().sqrt())


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
