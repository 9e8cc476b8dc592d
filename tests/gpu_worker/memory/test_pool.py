"""One storage for KV and adapters; nobody writes into a neighbour's page."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.memory.pool import PagePool

NUM_PAGES = 6
SHAPES = {
    "whole-units": PageGeometry(2, 2, 8, 4, 4),
    # 3 * 2 * 1 * 20 * 4 * 7 = 3,360 bytes of KV in a page of 3,456
    "padded": PageGeometry(3, 1, 20, 4, 7),
    "bfloat16-padded": PageGeometry(1, 1, 6, 2, 3),
}
DTYPES = {2: torch.bfloat16, 4: torch.float32}


@pytest.fixture(params=SHAPES.values(), ids=list(SHAPES))
def geometry(request: pytest.FixtureRequest) -> PageGeometry:
    shape: PageGeometry = request.param
    return shape


@pytest.fixture
def pool(geometry: PageGeometry) -> PagePool:
    pool = PagePool(geometry, NUM_PAGES, "cpu")
    pool.bytes.random_(generator=torch.Generator().manual_seed(3))
    return pool


@pytest.fixture
def kv_pages(pool: PagePool, geometry: PageGeometry) -> torch.Tensor:
    return pool.kv_pages(DTYPES[geometry.element_bytes])


def byte_string(num_bytes: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, num_bytes, dtype=np.uint8)


def held(pool: PagePool, pages: list[int], num_bytes: int) -> bytes:
    content: bytes = pool.bytes[pages].numpy().tobytes()
    return content[:num_bytes]


def changed_pages(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    different: list[int] = (before != after).any(dim=1).nonzero().flatten().tolist()
    return different


def test_kv_and_adapters_share_one_storage(pool: PagePool, kv_pages: torch.Tensor) -> None:
    assert kv_pages.untyped_storage().data_ptr() == pool.bytes.untyped_storage().data_ptr()


def test_the_kv_view_has_the_shape_kernels_expect(geometry: PageGeometry, kv_pages: torch.Tensor) -> None:
    cell = geometry.page_size, geometry.num_kv_heads, geometry.head_dim
    assert kv_pages.shape == (NUM_PAGES, geometry.num_layers, 2, *cell)


def test_a_kv_page_starts_where_the_page_starts(geometry: PageGeometry, kv_pages: torch.Tensor) -> None:
    assert kv_pages.stride(0) * kv_pages.element_size() == geometry.page_bytes


def test_a_kv_page_is_one_contiguous_block(kv_pages: torch.Tensor) -> None:
    assert kv_pages[1].is_contiguous()


def test_kv_of_a_page_changes_only_that_page(pool: PagePool, kv_pages: torch.Tensor) -> None:
    before = pool.bytes.clone()
    kv_pages[2] += 1
    assert changed_pages(before, pool.bytes) == [2]


def test_kv_leaves_the_padding_of_its_page_alone(
    pool: PagePool, geometry: PageGeometry, kv_pages: torch.Tensor
) -> None:
    kv_bytes = geometry.page_size * geometry.kv_bytes_per_token
    before = pool.bytes[:, kv_bytes:].clone()
    kv_pages.fill_(1)
    assert torch.equal(pool.bytes[:, kv_bytes:], before)


@pytest.mark.parametrize("spare", [0, 1, 127], ids=lambda spare: f"{spare}-bytes-spare")
def test_a_byte_string_is_in_its_pages_in_order_and_shown(pool: PagePool, geometry: PageGeometry, spare: int) -> None:
    data = byte_string(3 * geometry.page_bytes - spare)
    seen: list[memoryview] = []
    pool.write([4, 0, 2], data, seen.append)
    assert b"".join(seen) == data.tobytes() == held(pool, [4, 0, 2], data.size)


def test_what_is_shown_is_read_back_from_the_pages(pool: PagePool, geometry: PageGeometry) -> None:
    seen: list[memoryview] = []
    data = byte_string(2 * geometry.page_bytes)
    pool.write([4, 4], data, seen.append)
    assert b"".join(seen) == 2 * data[geometry.page_bytes :].tobytes()


def test_pages_too_large_to_be_written_together_are_written_one_by_one() -> None:
    geometry = PageGeometry(1, 4, 128, 4, 1024)
    pool, data, seen = PagePool(geometry, 3, "cpu"), byte_string(2 * geometry.page_bytes - 5), list[bytes]()
    pool.write([2, 0], data, lambda part: seen.append(bytes(part)))
    assert len(seen) == 2
    assert b"".join(seen) == data.tobytes() == held(pool, [2, 0], data.size)


def test_a_byte_string_changes_only_its_pages(pool: PagePool, geometry: PageGeometry) -> None:
    before = pool.bytes.clone()
    pool.write([5, 1], byte_string(geometry.page_bytes + 1))
    assert changed_pages(before, pool.bytes) == [1, 5]


def test_the_tail_of_a_ragged_last_page_is_left_alone(pool: PagePool, geometry: PageGeometry) -> None:
    before = pool.bytes[1, 1:].clone()
    pool.write([5, 1], byte_string(geometry.page_bytes + 1))
    assert torch.equal(pool.bytes[1, 1:], before)
