"""An engine killed in mid-stream takes its streams with it, and nothing else."""

import os
import signal
from pathlib import Path

import pytest

from loraplex import AsyncClient
from loraplex.errors import Unavailable
from loraplex.fleet import Fleet
from tests.e2e.support import PATIENT, greedy_tokens, metric, until
from tests.e2e.tiny_model import ENDLESS, TinyModel


def engine_of(fleet: Fleet) -> int:
    (child,) = Path(f"/proc/{fleet.workers[0].pid}/task/{fleet.workers[0].pid}/children").read_text().split()
    return int(child)


async def test_the_stream_fails_with_a_retry_hint_and_the_worker_is_back_by_itself(
    tiny: TinyModel, endless_fleet: Fleet
) -> None:
    worker = endless_fleet.workers[0]
    async with AsyncClient(endless_fleet.gateway.address, retries=PATIENT) as client:
        stream = client.stream(tiny.prompts["rank-8"], "rank-8", temperature=0.0, max_tokens=ENDLESS, ignore_eos=True)
        await anext(stream)
        os.kill(engine_of(endless_fleet), signal.SIGKILL)
        with pytest.raises(Unavailable) as caught:
            async for _ in stream:
                pass
        assert caught.value.retry_after_seconds
        until(lambda: metric(worker, "loraplex_worker_engine_restarts_total") == 1, "a new engine runs")
        # The client waits and tries again as the hint says.
        assert await greedy_tokens(client, "rank-8", tiny.prompts["rank-8"]) == tiny.answers["rank-8"]
