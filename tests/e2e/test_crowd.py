"""A hundred streams at once, some cancelled, some out of time: each ends once, and every count agrees."""

import asyncio
import random
from collections import Counter
from contextlib import aclosing
from pathlib import Path

from loraplex import AsyncClient
from loraplex.errors import DeadlineExceeded
from loraplex.fleet import Fleet
from tests.e2e.support import finish_counts, memory_usage, running_fleet, until
from tests.e2e.tiny_model import ENDLESS, ENDLESS_POOL, TinyModel, with_long_context

NUM_STREAMS = 100
# Who is late by a twentieth of it is still counted as out of time, however busy the gateway is.
DEADLINE_SECONDS = 20.0


async def stream_of(client: AsyncClient, name: str, prompt: list[int], rng: random.Random) -> str:
    """One stream with a fate drawn from `rng`; returns how it ended for the client."""
    fate = rng.choice(["finishes", "finishes", "cancelled", "deadline"])
    length = rng.randint(1, 40)
    endless = fate != "finishes"
    deltas = client.stream(
        prompt,
        name,
        temperature=1.0,
        seed=rng.getrandbits(60),
        max_tokens=ENDLESS if endless else length,
        ignore_eos=True,
        return_token_ids=True,
        timeout=DEADLINE_SECONDS if fate == "deadline" else None,
    )
    tokens, ends = 0, 0
    async with aclosing(deltas):
        try:
            async for delta in deltas:
                assert delta.token_offset == tokens
                tokens += len(delta.token_ids)
                ends += delta.finish_reason is not None
                if fate == "cancelled" and tokens >= length:
                    return "cancelled"
        except DeadlineExceeded:
            assert fate == "deadline"
            return "deadline"
    assert (ends, tokens) == (1, length)
    return "length"


async def crowd(fleet: Fleet, names: list[str], prompt: list[int]) -> Counter[str]:
    async with AsyncClient(fleet.gateway.address) as client:
        streams = (
            stream_of(client, names[index % len(names)], prompt, random.Random(index)) for index in range(NUM_STREAMS)
        )
        return Counter(await asyncio.gather(*streams))


async def test_every_stream_ends_once_and_the_counts_agree(
    tiny: TinyModel, many_adapters: dict[str, Path], tmp_path: Path
) -> None:
    prompt, base = tiny.prompts["rank-1"], with_long_context(tiny.base, tmp_path / "base")
    with running_fleet(base, tmp_path, many_adapters, gpu_worker=ENDLESS_POOL) as fleet:
        (worker,) = fleet.workers
        ends = await crowd(fleet, sorted(many_adapters), prompt)
        assert ends.total() == NUM_STREAMS
        assert set(ends) == {"length", "cancelled", "deadline"}
        until(lambda: finish_counts(worker).total() == NUM_STREAMS, "the worker has ended every stream")
        assert finish_counts(worker) == ends
        until(lambda: memory_usage(worker).memory.kv_pages == 0, "their pages are free")
