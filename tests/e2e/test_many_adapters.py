"""Many adapters at once: each request gets its own adapter's answer, every time."""

import random
from pathlib import Path

from loraplex import AsyncClient
from tests.e2e.support import all_at_once, assert_books_balance, running_fleet
from tests.e2e.tiny_model import TinyModel

MAX_TOKENS = 24


async def test_the_same_prompt_to_32_adapters_ten_times_has_always_the_same_32_answers(
    tiny: TinyModel, many_adapters: dict[str, Path], tmp_path: Path
) -> None:
    prompt, order, rounds = tiny.prompts[""], random.Random(0), []
    with running_fleet(tiny.base, tmp_path, many_adapters) as fleet:
        async with AsyncClient(fleet.gateway.address) as client:
            for _ in range(10):
                names = order.sample(sorted(many_adapters), len(many_adapters))
                rounds.append(await all_at_once(client, dict.fromkeys(names, prompt), MAX_TOKENS))
        assert_books_balance(fleet.workers[0])
    assert len({tuple(answer) for answer in rounds[0].values()}) == 32
    assert all(answers == rounds[0] for answers in rounds)
