"""Two workers: adapters stay where they are, and work is shared."""

import asyncio
from pathlib import Path

from loraplex import AsyncClient
from tests.e2e.support import greedy_tokens, metric, resident_adapters, running_fleet
from tests.e2e.tiny_model import TinyModel

NUM_REQUESTS = 200
# Enough that a worker's share does not hang on which of the two made the first step.
MAX_TOKENS = 64


async def test_adapters_stay_on_their_workers_and_each_worker_does_its_share(tiny: TinyModel, tmp_path: Path) -> None:
    names = sorted(tiny.adapters)
    with running_fleet(tiny.base, tmp_path, tiny.adapters, workers=2) as fleet:
        async with AsyncClient(fleet.gateway.address) as client:
            requests = [names[index * 7 % len(names)] for index in range(NUM_REQUESTS)]
            answers = await asyncio.gather(
                *(greedy_tokens(client, name, tiny.prompts[name], MAX_TOKENS) for name in requests)
            )
        loads = [metric(worker, "loraplex_adapter_fetch_seconds_count") for worker in fleet.workers]
        evictions = [metric(worker, "loraplex_adapter_evictions_total") for worker in fleet.workers]
        residents = [resident_adapters(worker) for worker in fleet.workers]
        tokens = [metric(worker, "loraplex_worker_step_tokens_total") for worker in fleet.workers]
    assert all(answer == tiny.answers[name][:MAX_TOKENS] for name, answer in zip(requests, answers, strict=True))
    # Each adapter is fetched once by a worker that uses it, or was to use it when the other was quicker.
    assert len(names) <= sum(residents) <= sum(loads) <= 2 * len(names)
    assert evictions == [0, 0]
    assert min(tokens) >= 0.3 * sum(tokens)
