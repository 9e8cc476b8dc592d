"""Sizes of pages, whole units each, for KV of any shape and adapters of any length."""

import pytest

from common.packing import UNIT_BYTES
from gpu_worker.memory.geometry import PageGeometry

SHAPES = {
    "llama-3.1-8b": PageGeometry(32, 8, 128, 2, 16),
    "qwen2.5-0.5b": PageGeometry(24, 2, 64, 2, 16),
    "one-byte-more-than-a-unit": PageGeometry(1, 1, 129, 1, 1),
    "odd-everything": PageGeometry(3, 1, 20, 4, 7),
    "one-token": PageGeometry(1, 1, 2, 2, 1),
}


@pytest.fixture(params=SHAPES.values(), ids=list(SHAPES))
def geometry(request: pytest.FixtureRequest) -> PageGeometry:
    shape: PageGeometry = request.param
    return shape


def test_a_unit_never_crosses_a_page(geometry: PageGeometry) -> None:
    assert geometry.page_bytes % UNIT_BYTES == 0


def test_a_page_holds_its_tokens_and_less_than_a_unit_more(geometry: PageGeometry) -> None:
    spare = geometry.page_bytes - geometry.page_size * geometry.kv_bytes_per_token
    assert 0 <= spare < UNIT_BYTES


def test_kv_of_a_llama_is_what_its_config_says() -> None:
    assert SHAPES["llama-3.1-8b"].kv_bytes_per_token == 131_072


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (7, 1), (8, 2), (14, 2), (15, 3)])
def test_tokens_take_whole_pages(num_tokens: int, num_pages: int) -> None:
    assert SHAPES["odd-everything"].pages_for_tokens(num_tokens) == num_pages


@pytest.mark.parametrize("pages", [1, 2, 1000])
def test_a_byte_string_takes_the_pages_its_bytes_take(geometry: PageGeometry, pages: int) -> None:
    whole = pages * geometry.page_bytes
    assert [geometry.pages_for_bytes(size) for size in (whole - 1, whole, whole + 1)] == [pages, pages, pages + 1]
