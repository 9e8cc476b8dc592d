"""Pages come back: after preemption, after a killed client, whatever happens."""

import asyncio
import signal
import subprocess
import sys
from collections import Counter
from contextlib import aclosing
from pathlib import Path

from loraplex import AsyncClient
from loraplex.fleet import Fleet
from tests.e2e.support import (
    assert_books_balance,
    finish_counts,
    greedy_tokens,
    memory_usage,
    metric,
    running_fleet,
    until,
)
from tests.e2e.tiny_model import ENDLESS, NUM_TOKENS, TinyModel

# Tokens: most of the context.
LONG = 6 * NUM_TOKENS

# Streams for ever as far as a test is concerned, and says when it has started.
CLIENT = """
import sys
from loraplex import Client
for delta in Client(sys.argv[1]).stream([1, 40, 50, 60], "rank-8", temperature=0.0, max_tokens=MANY, ignore_eos=True):
    print("token", flush=True)
""".replace("MANY", str(ENDLESS))


async def test_a_pool_so_small_that_sequences_are_preempted_changes_no_token(tiny: TinyModel, tmp_path: Path) -> None:
    names = ["", "rank-1", "rank-3"] * 2
    # 40 pages of 12 KiB. Six sequences grow to 27 to 29 pages each: any two that meet are too many. The scheduler has
    # seen short outputs only, so all are offered at once.
    over_admit, few_pages = ["--output-min-samples", "1"], ["--memory", "480KiB"]
    with running_fleet(tiny.base, tmp_path, tiny.adapters, scheduler=over_admit, gpu_worker=few_pages) as fleet:
        async with AsyncClient(fleet.gateway.address) as client:
            await asyncio.gather(*(greedy_tokens(client, name, tiny.prompts[name], 1) for name in set(names)))
            calls = (greedy_tokens(client, name, tiny.prompts[name], LONG) for name in names)
            answers = await asyncio.gather(*calls)
        worker = fleet.workers[0]
        assert metric(worker, "loraplex_worker_preemptions_total") > 0
        assert assert_books_balance(worker).memory.kv_pages == 0
    assert {len(answer) for answer in answers} == {LONG}
    assert [answer[:NUM_TOKENS] for answer in answers] == [tiny.answers[name] for name in names]


async def test_a_newcomers_first_token_comes_before_any_running_stream_ends(
    tiny: TinyModel, endless_fleet: Fleet
) -> None:
    async def stream_on(client: AsyncClient, name: str, started: asyncio.Event) -> None:
        async for _ in client.stream(tiny.prompts[name], name, max_tokens=ENDLESS, ignore_eos=True):
            started.set()

    worker = endless_fleet.workers[0]
    before = finish_counts(worker)
    async with AsyncClient(endless_fleet.gateway.address) as client:
        started = {name: asyncio.Event() for name in ("", "rank-1", "rank-64")}
        running = [asyncio.create_task(stream_on(client, name, event)) for name, event in started.items()]
        await asyncio.gather(*(event.wait() for event in started.values()))
        async with aclosing(client.stream(tiny.prompts["rank-3"], "rank-3")) as newcomer:
            await anext(newcomer)
        assert not any(task.done() for task in running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    # The next test counts from here.
    until(lambda: (finish_counts(worker) - before).total() == 4, "all four ends are counted")


def test_killing_the_client_frees_its_pages(endless_fleet: Fleet) -> None:
    worker = endless_fleet.workers[0]
    before = finish_counts(worker)
    command = [sys.executable, "-c", CLIENT, endless_fleet.gateway.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "token\n"
        assert memory_usage(worker).memory.kv_pages > 0
        client.send_signal(signal.SIGKILL)
    until(lambda: memory_usage(worker).memory.kv_pages == 0, "the killed client's pages are free")
    # The face counts it a moment after the engine has freed its pages.
    until(lambda: (finish_counts(worker) - before).total() == 1, "the end of the killed client's request is counted")
    # Not because it came to its end.
    assert finish_counts(worker) - before == Counter(cancelled=1)
    assert_books_balance(worker)


async def test_a_cancelled_stream_frees_its_pages_and_nobody_else_notices(
    tiny: TinyModel, endless_fleet: Fleet
) -> None:
    worker = endless_fleet.workers[0]
    before = finish_counts(worker)
    async with AsyncClient(endless_fleet.gateway.address) as client:
        other = asyncio.create_task(greedy_tokens(client, "rank-16", tiny.prompts["rank-16"]))
        async with aclosing(client.stream(tiny.prompts[""], "", max_tokens=ENDLESS, ignore_eos=True)) as cancelled:
            await anext(cancelled)
        assert await other == tiny.answers["rank-16"]
    until(lambda: memory_usage(worker).memory.kv_pages == 0, "the cancelled stream's pages are free")
    until(lambda: (finish_counts(worker) - before).total() == 2, "both ends are counted")
    assert finish_counts(worker) - before == Counter(cancelled=1, length=1)
