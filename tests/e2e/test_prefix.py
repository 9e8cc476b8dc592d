"""Prefix hits through all four services: what a second request is spared, and what is never shared."""

import asyncio
from contextlib import aclosing
from pathlib import Path

from loraplex import AsyncClient
from loraplex.fleet import Fleet
from tests.e2e.support import DEADLINE_SECONDS, greedy_tokens, running_fleet
from tests.e2e.tiny_model import ENDLESS, ENDLESS_POOL, TinyModel, with_long_context

PAGE = 16
# Two pages and a bit, of nobody else's prompt.
PROMPT = [1] + [3 + (53 * position + 7) % 250 for position in range(2 * PAGE + 5)]
FULL = 2 * PAGE


async def ask(client: AsyncClient, adapter: str, prompt: list[int]) -> tuple[int, str, list[int]]:
    """Cached tokens, the version that answered, and its tokens."""
    answer = await client.generate(
        prompt,
        adapter,
        temperature=0.0,
        max_tokens=8,
        ignore_eos=True,
        return_token_ids=True,
        timeout=DEADLINE_SECONDS,
    )
    assert answer.usage is not None
    return answer.usage.cached_tokens, answer.adapter_version, list(answer.token_ids)


async def test_a_second_identical_prompt_has_every_full_page_of_it_and_no_other_adapter_does(fleet: Fleet) -> None:
    async with AsyncClient(fleet.gateway.address) as client:
        first, _, expected = await ask(client, "rank-3", PROMPT)
        second, _, tokens = await ask(client, "rank-3", PROMPT)
        other, _, _ = await ask(client, "rank-8", PROMPT)
        base, _, _ = await ask(client, "", PROMPT)
    assert (first, second, other, base) == (0, FULL, 0, 0)
    assert tokens == expected


async def test_new_weights_under_an_old_name_share_nothing_with_the_old(tiny: TinyModel, tmp_path: Path) -> None:
    """During traffic: the stream that runs goes on with the old digest, whoever comes now gets the new one."""
    base, name = with_long_context(tiny.base, tmp_path / "base"), "rank-3"
    before = tiny.answers[name]
    with running_fleet(base, tmp_path / "data", {name: tiny.adapters[name]}, gpu_worker=ENDLESS_POOL) as fleet:
        async with AsyncClient(fleet.gateway.address) as client:
            _, old, _ = await ask(client, name, PROMPT)
            stream = client.stream(
                tiny.prompts[name], name, temperature=0.0, max_tokens=ENDLESS, ignore_eos=True, return_token_ids=True
            )
            async with aclosing(stream) as deltas:
                first = await anext(deltas)
                tokens = list(first.token_ids)
                await client.adapters.push(name, tiny.adapters["rank-8"], replace=True)
                cached, new, _ = await until_replaced(client, name, old)
                again, still_new, _ = await ask(client, name, PROMPT)
                while len(tokens) < len(before):
                    tokens += (await anext(deltas)).token_ids
            fresh = await greedy_tokens(client, name, tiny.prompts["rank-8"])
    assert (first.adapter_version, tokens[: len(before)]) == (old, before)
    assert (cached, again, new != old, still_new) == (0, FULL, True, new)
    assert fresh == tiny.answers["rank-8"]


async def until_replaced(client: AsyncClient, name: str, old: str) -> tuple[int, str, list[int]]:
    """The first answer of another version than `old`; the gateway follows the store with a moment's delay."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            answer = await ask(client, name, PROMPT)
            if answer[1] != old:
                return answer
