"""The whole stack answers what transformers and peft answer, with every adapter in the same batches."""

import asyncio
import json
import shutil
from contextlib import aclosing
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from loraplex import AsyncClient
from loraplex.fleet import Fleet, Service
from loraplex.metrics import DISTINCT_ADAPTERS, fetch_metrics, histogram_maximum
from tests.e2e.support import all_at_once, running_fleet, until
from tests.e2e.tiny_model import ENDLESS, NUM_TOKENS, TinyModel, differing


async def ask(fleet: Fleet, prompts: dict[str, list[int]]) -> dict[str, list[int]]:
    async with AsyncClient(fleet.gateway.address) as client:
        return await all_at_once(client, prompts)


def test_the_oracles_answers_all_differ(tiny: TinyModel) -> None:
    assert len({tuple(answer) for answer in tiny.answers.values()}) == len(tiny.answers) == 9


async def test_eight_ranks_and_the_base_in_one_batch_answer_like_transformers_and_peft(
    tiny: TinyModel, endless_fleet: Fleet
) -> None:
    (worker,) = endless_fleet.workers
    async with AsyncClient(endless_fleet.gateway.address) as client, asyncio.TaskGroup() as company:
        # Nobody needs to be quick to meet the others in a batch: these run until all were compared.
        started = {name: asyncio.Event() for name in tiny.prompts}
        running = [
            company.create_task(run_on(client, name, tiny.prompts[name], event)) for name, event in started.items()
        ]
        await asyncio.gather(*(event.wait() for event in started.values()))
        await asyncio.to_thread(until, lambda: most_in_a_batch(worker) >= 9, "all nine are in a batch")
        assert differing(await all_at_once(client, tiny.prompts), tiny.answers) == set()
        assert not any(task.done() for task in running)
        for task in running:
            task.cancel()


async def run_on(client: AsyncClient, name: str, prompt: list[int], started: asyncio.Event) -> None:
    stream = client.stream(prompt, name, temperature=0.0, max_tokens=ENDLESS, ignore_eos=True)
    async with aclosing(stream):
        async for _ in stream:
            started.set()


def most_in_a_batch(worker: Service) -> float:
    """Distinct adapters."""
    return histogram_maximum(fetch_metrics(worker.metrics_address), DISTINCT_ADAPTERS)


async def test_control_two_swapped_digests_fail_parity(tiny: TinyModel, fleet: Fleet) -> None:
    async with AsyncClient(fleet.gateway.address) as client:
        await client.adapters.push("swapped-8", tiny.adapters["rank-16"])
        await client.adapters.push("swapped-16", tiny.adapters["rank-8"])
    swapped = {"swapped-8": "rank-8", "swapped-16": "rank-16"}
    assert await parity_of(fleet, tiny, swapped) == {"rank-8", "rank-16"}


async def test_control_one_dropped_module_fails_parity(tiny: TinyModel, fleet: Fleet, tmp_path: Path) -> None:
    broken = copy_adapter(tiny.adapters["rank-64"], tmp_path)
    weights = load_file(broken / "adapter_model.safetensors")
    dropped = [name for name in weights if "layers.1.mlp.up_proj" in name]
    assert len(dropped) == 2
    save_file({name: tensor for name, tensor in weights.items() if name not in dropped}, weights_path(broken))
    async with AsyncClient(fleet.gateway.address) as client:
        await client.adapters.push("dropped", broken)
    assert await parity_of(fleet, tiny, {"dropped": "rank-64"}) == {"rank-64"}


async def test_control_ignored_scaling_fails_parity(tiny: TinyModel, fleet: Fleet, tmp_path: Path) -> None:
    broken = copy_adapter(tiny.adapters["rank-16"], tmp_path)
    config = json.loads((broken / "adapter_config.json").read_text())
    assert config["lora_alpha"] != config["r"]
    (broken / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["r"]}))
    async with AsyncClient(fleet.gateway.address) as client:
        await client.adapters.push("unscaled", broken)
    assert await parity_of(fleet, tiny, {"unscaled": "rank-16"}) == {"rank-16"}


async def test_control_lora_off_fails_parity_for_every_adapter(tiny: TinyModel, fleet: Fleet) -> None:
    async with AsyncClient(fleet.gateway.address) as client:
        answers = {name: await all_at_once(client, {"": tiny.prompts[name]}) for name in tiny.adapters}
    expected = {name: tiny.answers[name] for name in tiny.adapters}
    assert differing({name: answer[""] for name, answer in answers.items()}, expected) == set(tiny.adapters)


async def parity_of(fleet: Fleet, tiny: TinyModel, stand_ins: dict[str, str]) -> set[str]:
    """Runs the parity check with some adapters replaced by stand-ins; returns who fails it."""
    names = {original: stand_in for stand_in, original in stand_ins.items()}
    prompts = {names.get(name, name): prompt for name, prompt in tiny.prompts.items()}
    answers = await ask(fleet, prompts)
    return differing({stand_ins.get(name, name): answer for name, answer in answers.items()}, tiny.answers)


def copy_adapter(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "broken"))


def weights_path(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


@pytest.mark.parametrize("max_step_tokens", [16, 17])
async def test_chunked_prefill_changes_no_token(tiny: TinyModel, tmp_path: Path, max_step_tokens: int) -> None:
    arguments = ["--max-step-tokens", str(max_step_tokens), "--max-sequences", "16"]
    arguments += ["--step-log", str(tmp_path / "steps")]
    with running_fleet(tiny.base, tmp_path, tiny.adapters, gpu_worker=arguments) as fleet:
        assert differing(await ask(fleet, tiny.prompts), tiny.answers) == set()
    steps = [json.loads(line) for line in (tmp_path / "steps").read_text().splitlines()]
    assert [step["step"] for step in steps] == sorted({step["step"] for step in steps})
    computed = [step["prefill_tokens"] + step["decode_tokens"] for step in steps]
    prompts = sum(map(len, tiny.prompts.values()))
    assert max(computed) == max_step_tokens
    # Each token is computed once, but for the last of each answer.
    assert sum(computed) == prompts + len(tiny.prompts) * (NUM_TOKENS - 1)
    assert sum(step["prefill_chunks"] for step in steps) > len(tiny.prompts)
    assert {rank for step in steps for rank in step["lora_ranks"]} == {1, 3, 8, 16, 24, 32, 64, 128}
    assert max(step["distinct_adapters"] for step in steps) > 1
    assert all(step["context_tokens"] >= tokens for step, tokens in zip(steps, computed, strict=True))
    assert all(step[f"{phase}_seconds"] > 0 for step in steps for phase in ("schedule", "forward", "sample"))
