import pytest

from gpu_worker.config import parse_share
from gpu_worker.cuda.sizing import pool_bytes


def test_a_share_of_what_is_free_less_the_largest_step() -> None:
    assert pool_bytes(free_bytes=1000, peak_bytes=100, share=0.9) == 800


def test_no_room_is_said_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="90% of 1000 free bytes is not more than the 900"):
        pool_bytes(free_bytes=1000, peak_bytes=900, share=0.9)


@pytest.mark.parametrize(("text", "share"), [("90%", 0.9), (" 12.5% ", 0.125), ("512MiB", None), ("7", None)])
def test_a_share_is_told_from_a_size(text: str, share: float | None) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["0%", "101%", "x%", "-5%"])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_share(text)
