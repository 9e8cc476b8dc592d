"""Watchers hear everything once and then every change in order."""

from collections.abc import AsyncIterator

import pytest

from common.errors import Unavailable
from gpu_worker import residency_mirror
from gpu_worker.residency_mirror import ResidencyMirror
from loraplex.v1 import memory_pb2, scheduler_pb2, types_pb2

Watch = AsyncIterator[memory_pb2.WatchResidencyResponse]


def delta(sequence: int, version: str, tier: "types_pb2.Tier.ValueType") -> scheduler_pb2.ResidencyDelta:
    adapter = scheduler_pb2.ResidentAdapter(adapter_version=version, tier=tier)
    return scheduler_pb2.ResidencyDelta(sequence=sequence, adapter=adapter)


HERE = delta(1, "a", types_pb2.TIER_HOST)
UP = delta(2, "a", types_pb2.TIER_PAGES)
GONE = delta(3, "a", types_pb2.TIER_STORE)


@pytest.fixture
async def mirror() -> ResidencyMirror:
    mirror = ResidencyMirror()
    mirror.apply([HERE])
    return mirror


async def test_a_watch_begins_with_everything(mirror: ResidencyMirror) -> None:
    first = await anext(mirror.watch())
    assert (list(first.snapshot), first.sequence, len(first.deltas)) == ([HERE.adapter], 1, 0)


async def test_an_empty_worker_says_so(mirror: ResidencyMirror) -> None:
    first = await anext(ResidencyMirror().watch())
    assert (len(first.snapshot), first.HasField("sequence"), first.sequence) == (0, True, 0)


async def test_then_every_change_follows(mirror: ResidencyMirror) -> None:
    watch = mirror.watch()
    await anext(watch)
    mirror.apply([UP])
    mirror.apply([GONE])
    assert list((await anext(watch)).deltas) == [UP, GONE]


async def test_what_left_is_not_in_the_next_snapshot(mirror: ResidencyMirror) -> None:
    mirror.apply([UP, GONE])
    assert list((await anext(mirror.watch())).snapshot) == []


async def test_who_falls_behind_gets_everything_again(mirror: ResidencyMirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency_mirror, "MAX_BEHIND", 1)
    watch = mirror.watch()
    await anext(watch)
    mirror.apply([UP, GONE])
    resync = await anext(watch)
    assert (list(resync.snapshot), resync.sequence) == ([], 3)


async def test_the_end_of_the_engine_ends_the_watch(mirror: ResidencyMirror) -> None:
    watch = mirror.watch()
    await anext(watch)
    mirror.lose_engine(Unavailable("ENGINE_LOST", "gone"))
    with pytest.raises(Unavailable):
        await anext(watch)
