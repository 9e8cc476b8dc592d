"""Bytes copied into pages and hashed there: against the package of BLAKE3's authors, for every shape of the tree."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from blake3 import blake3
from torch import Tensor

from kernels.cpu import pages as pages_module
from kernels.cpu.library import vector_lanes
from kernels.cpu.pages import copy_hashed

# Of BLAKE3, and of the compiled code.
CHUNK, GROUP = 1024, 256 * 1024
SPARE_PAGES = 3
LANES = [8, 16] if vector_lanes() == 16 else [8]
# Ends of blocks, of chunks, of sixteen chunks, of groups; trees of one to many levels, with and without a rest.
SIZES = [
    *(1, 63, 64, 65, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK, 7 * CHUNK + 128, 16 * CHUNK, 16 * CHUNK + 1),
    *(31 * CHUNK, 100 * CHUNK, GROUP - 1, GROUP, GROUP + 1, GROUP + 3 * CHUNK, 3 * GROUP + 64, 5 * GROUP - 128),
]


def random_bytes(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def a_pool(num_bytes: int, page_bytes: int) -> tuple[Tensor, list[int]]:
    """A pool full of ones, and pages of it in no order for so many bytes."""
    count = -(-num_bytes // page_bytes)
    order = torch.randperm(count + SPARE_PAGES, generator=torch.Generator().manual_seed(1))
    return torch.ones(count + SPARE_PAGES, page_bytes, dtype=torch.uint8), order[:count].tolist()


def digest_of(data: Tensor) -> str:
    return str(blake3(data.numpy().data).hexdigest())


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("page_bytes", [128, 384, 1152, 4096, 65536])
@pytest.mark.parametrize("num_bytes", SIZES)
def test_the_pages_hold_the_bytes_and_nothing_else_changes(num_bytes: int, page_bytes: int, lanes: int) -> None:
    data = random_bytes(num_bytes)
    pool, pages = a_pool(num_bytes, page_bytes)
    assert copy_hashed(pool, pages, data, lanes=lanes) == digest_of(data)
    held = pool[pages].reshape(-1)
    assert torch.equal(held[:num_bytes], data)
    others = torch.ones(len(pool), dtype=torch.bool)
    others[pages] = False
    assert bool((held[num_bytes:] == 1).all() and (pool[others] == 1).all())


@pytest.mark.parametrize("lanes", LANES)
def test_what_is_hashed_is_what_the_pages_hold(lanes: int) -> None:
    """Two pages of the string are one page of the pool: the second lies over the first."""
    data = random_bytes(2 * 65536)
    pool = torch.zeros(5, 65536, dtype=torch.uint8)
    assert copy_hashed(pool, [4, 4], data, lanes=lanes) == digest_of(torch.cat((pool[4], pool[4])))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("place", [0, 70, CHUNK, 17 * CHUNK - 1, GROUP - 1, GROUP, GROUP + 777])
def test_one_bit_changes_the_digest(place: int, lanes: int) -> None:
    data = random_bytes(GROUP + 778)
    pool, pages = a_pool(len(data), 4096)
    right = copy_hashed(pool, pages, data, lanes=lanes)
    data[place] ^= 16
    assert copy_hashed(pool, pages, data, lanes=lanes) not in (right, None)


def test_four_threads_do_not_disturb_each_other() -> None:
    strings = [random_bytes(3 * GROUP + 1000 * seed, seed) for seed in range(4)]
    needs = [-(-len(data) // 65536) for data in strings]
    pool = torch.zeros(sum(needs), 65536, dtype=torch.uint8)
    shares = [list(range(sum(needs[:index]), sum(needs[: index + 1]))) for index in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(10):
            found = threads.map(lambda share, data: copy_hashed(pool, share, data), shares, strings)
            assert list(found) == [digest_of(data) for data in strings]


@pytest.mark.parametrize("pages", [[], [0], [0, 1, 2], [0, 4], [-1, 0]])
def test_pages_that_do_not_fit_are_refused(pages: list[int]) -> None:
    pool = torch.zeros(4, 128, dtype=torch.uint8)
    with pytest.raises(ValueError, match="do not go into"):
        copy_hashed(pool, pages, random_bytes(129))
    assert not pool.any()


def test_without_the_library_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "library", lambda: None)
    pool = torch.zeros(4, 128, dtype=torch.uint8)
    assert copy_hashed(pool, [0], random_bytes(128)) is None
    assert not pool.any()
