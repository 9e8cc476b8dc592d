"""The demo model through the gateway: every adapter has its skill, the untagged base has none."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.demo_model.words import SKILLS, held_out_words
from loraplex import AsyncClient
from loraplex.fleet import Fleet
from tests.e2e.support import running_fleet

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo_model"
WORDS = held_out_words(200, seed=12345)
IN_FLIGHT = 64


@pytest.fixture(scope="module")
def demo_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    adapters = {folder.name: folder for folder in sorted((DEMO / "adapters").iterdir())}
    with running_fleet(DEMO / "base", tmp_path_factory.mktemp("demo"), adapters) as fleet:
        yield fleet


async def answers(fleet: Fleet, adapter: str) -> list[str]:
    slots = asyncio.Semaphore(IN_FLIGHT)

    async def ask(client: AsyncClient, word: str) -> str:
        async with slots:
            return (await client.generate(f"{word}>", adapter, temperature=0.0, max_tokens=24)).text

    async with AsyncClient(fleet.gateway.address) as client:
        return await asyncio.gather(*(ask(client, word) for word in WORDS))


@pytest.mark.parametrize("skill", sorted(SKILLS))
async def test_an_adapter_is_exact_on_95_of_100_held_out_words(demo_fleet: Fleet, skill: str) -> None:
    given = await answers(demo_fleet, skill)
    assert len(set(WORDS)) == 200
    assert sum(answer == SKILLS[skill](word) for answer, word in zip(given, WORDS, strict=True)) >= 0.95 * len(WORDS)


async def test_the_untagged_base_has_none_of_the_skills(demo_fleet: Fleet) -> None:
    given = await answers(demo_fleet, "")
    for skill in SKILLS.values():
        assert sum(answer == skill(word) for answer, word in zip(given, WORDS, strict=True)) < 0.2 * len(WORDS)
