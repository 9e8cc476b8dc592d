"""B 15, 16 and 18 through a fleet: a store that is gone, a bad adapter and a full disk cost the requests that need
them, soon and with the reason."""

import asyncio
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from loraplex import AsyncClient, Client, errors
from loraplex.fleet import Fleet
from tests.e2e.support import assert_books_balance, greedy_tokens, running_fleet
from tests.e2e.tiny_model import TinyModel

# On a quiet machine each of these fails within a second, as the row says: `make bench-store` shows how soon.
SOON_SECONDS = 150.0
RESIDENT = ("", "rank-1", "rank-3")


async def expect_failure(client: AsyncClient, tiny: TinyModel, name: str, reason: str) -> errors.LoraplexError:
    """The request fails soon, while those for what is resident beside it are answered."""
    started = time.monotonic()
    bad = asyncio.create_task(greedy_tokens(client, name, tiny.prompts[name]))
    answers = await asyncio.gather(*(greedy_tokens(client, other, tiny.prompts[other]) for other in RESIDENT))
    assert answers == [tiny.answers[other] for other in RESIDENT]
    with pytest.raises(errors.LoraplexError) as caught:
        await bad
    assert caught.value.reason == reason
    assert time.monotonic() - started < SOON_SECONDS
    return caught.value


def flip_a_bit(fleet: Fleet, adapter_version: str) -> None:
    """In the middle of every packed string that the store keeps of the adapter."""
    folder = fleet.options.data_dir / "store" / "objects" / adapter_version
    for path in [path for path in folder.glob("packed.*") if path.suffix in (".float32", ".bfloat16")]:
        path.chmod(0o600)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


async def test_b15_b16_b18_each_fault_costs_its_own_requests_only(tiny: TinyModel, tmp_path: Path) -> None:
    """One fleet, one fault after another: starting it takes seconds."""
    with running_fleet(tiny.base, tmp_path, tiny.adapters) as fleet:
        with Client(fleet.gateway.address) as client:
            versions = {name: client.adapters.get(name).adapter_version for name in tiny.adapters}
        worker = fleet.workers[0]
        async with AsyncClient(fleet.gateway.address) as client:
            for name in RESIDENT:
                assert await greedy_tokens(client, name, tiny.prompts[name]) == tiny.answers[name]

            flip_a_bit(fleet, versions["rank-8"])
            await expect_failure(client, tiny, "rank-8", "ADAPTER_DAMAGED")
            # Remembered: the store is not asked again at once.
            again = await expect_failure(client, tiny, "rank-8", "ADAPTER_DAMAGED")
            assert again.retry_after_seconds is not None

            # No file of the face may grow beyond this, as if the disk were full; the log is shorter.
            _, hard = resource.prlimit(worker.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (100_000, hard))
            await expect_failure(client, tiny, "rank-64", "CACHE_DISK_FULL")
            resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (hard, hard))

            os.kill(fleet.adapter_store.pid, signal.SIGKILL)
            cold = [expect_failure(client, tiny, "rank-16", "ADAPTER_STORE_UNAVAILABLE") for _ in range(4)]
            for away in await asyncio.gather(*cold):
                assert isinstance(away, errors.Unavailable)
                assert away.retry_after_seconds is not None
        assert_books_balance(worker)
