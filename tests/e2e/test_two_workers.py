"""Two workers: adapters stay where they are, and work is shared."""

import asyncio
from pathlib import Path

from loraplex import AsyncClient
from loraplex.fleet import Service
from tests.e2e.support import greedy_tokens, metric, resident_adapters, running_fleet
from tests.e2e.tiny_model import TinyModel

NUM_REQUESTS = 200
# Enough that a worker's share does not hang on which of the two made the first step.
MAX_TOKENS = 64
# The share of one that the machine lets wait for a while is made up for by the next rounds.
MAX_ROUNDS = 6


def least_share(workers: list[Service]) -> float:
    """Of the tokens computed so far."""
    tokens = [metric(worker, "loraplex_worker_step_tokens_total") for worker in workers]
    return min(tokens) / sum(tokens)


async def test_adapters_stay_on_their_workers_and_each_worker_does_its_share(tiny: TinyModel, tmp_path: Path) -> None:
    names = sorted(tiny.adapters)
    requests = [names[index * 7 % len(names)] for index in range(NUM_REQUESTS)]
    with running_fleet(tiny.base, tmp_path, tiny.adapters, workers=2) as fleet:
        async with AsyncClient(fleet.gateway.address) as client:
            for _ in range(MAX_ROUNDS):
                answers = await asyncio.gather(
                    *(greedy_tokens(client, name, tiny.prompts[name], MAX_TOKENS) for name in requests)
                )
                assert answers == [tiny.answers[name][:MAX_TOKENS] for name in requests]
                if least_share(fleet.workers) >= 0.3:
                    break
        loads = [metric(worker, "loraplex_adapter_fetch_seconds_count") for worker in fleet.workers]
        evictions = [metric(worker, "loraplex_adapter_evictions_total") for worker in fleet.workers]
        residents = [resident_adapters(worker) for worker in fleet.workers]
        share = least_share(fleet.workers)
    # Each adapter is fetched once by a worker that uses it, or was to use it when the other was quicker.
    assert len(names) <= sum(residents) <= sum(loads) <= 2 * len(names)
    assert evictions == [0, 0]
    assert share >= 0.3
