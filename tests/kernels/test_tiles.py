"""The choice of tiles: measured before default, one tile for every batch when deterministic, a table without holes."""

from collections.abc import Iterator

import pytest
import torch

from kernels.gpu import tiles

CPU = torch.device("cpu")
NEEDED = {
    "linear": {"BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"},
    "lora_shrink": {"BLOCK_T", "BLOCK_R", "BLOCK_K", "SPLIT_K", "num_warps", "num_stages"},
    "lora_expand": {"BLOCK_T", "BLOCK_R", "BLOCK_N", "num_warps", "num_stages"},
    "paged_attention": {"BLOCK_M", "BLOCK_N", "CHUNK", "num_warps", "num_stages"},
}


def entry(architecture: str, warps: int, op: str = "op") -> dict[str, object]:
    return {"op": op, "class": "decode", "architecture": architecture, "tile": {"num_warps": warps}}


@pytest.fixture
def deterministic() -> Iterator[None]:
    tiles.set_deterministic(True)
    yield
    tiles.set_deterministic(False)


def test_a_measured_tile_comes_before_the_default() -> None:
    table = tiles.Table.of({"hardware": "x", "tiles": [entry("any", 4), entry("sm_90", 8)]})
    assert table.choose("op", "decode", "sm_90") == {"num_warps": 8}
    assert table.choose("op", "decode", "sm_80") == {"num_warps": 4}


def test_an_operation_without_a_default_is_refused() -> None:
    with pytest.raises(ValueError, match="no tile of architecture 'any' for op decode"):
        tiles.Table.of({"hardware": "x", "tiles": [entry("sm_90", 8)]})


def test_two_tiles_for_one_key_are_refused() -> None:
    with pytest.raises(ValueError, match="two tiles"):
        tiles.Table.of({"hardware": "x", "tiles": [entry("any", 4), entry("any", 8)]})


def test_an_unknown_operation_is_an_error() -> None:
    with pytest.raises(KeyError):
        tiles.table().choose("unknown", tiles.DECODE, "sm_90")


@pytest.mark.parametrize(
    ("op", "shape_class"),
    [(op, name) for op in NEEDED for name in (tiles.DECODE, tiles.PREFILL) if (op, name) != ("linear", tiles.PREFILL)],
)
def test_the_checked_in_table_has_every_number_that_a_kernel_asks_for(op: str, shape_class: str) -> None:
    tile = tiles.choose(op, shape_class, CPU)
    assert tile.keys() == NEEDED[op]
    # tiles of a Triton kernel are powers of two; a block of features is whole units of 64 elements
    assert all(size & (size - 1) == 0 for name, size in tile.items() if name.startswith(("BLOCK", "CHUNK")))
    if op != "paged_attention":
        assert all(tile[name] % 64 == 0 for name in ("BLOCK_K", "BLOCK_N") if name in tile)
    else:
        assert tile["CHUNK"] % tile["BLOCK_N"] == 0


def test_the_attention_of_decodes_and_of_prompts_has_the_same_chunks() -> None:
    chunks = {tiles.choose("paged_attention", name, CPU)["CHUNK"] for name in (tiles.DECODE, tiles.PREFILL)}
    assert len(chunks) == 1


def test_many_tokens_are_a_prefill() -> None:
    assert tiles.token_class(tiles.DECODE_TOKENS) == tiles.DECODE
    assert tiles.token_class(tiles.DECODE_TOKENS + 1) == tiles.PREFILL


@pytest.mark.usefixtures("deterministic")
def test_a_deterministic_tile_does_not_follow_the_number_of_tokens() -> None:
    assert {tiles.token_class(count) for count in (1, tiles.DECODE_TOKENS + 1, 8192)} == {tiles.DECODE}


def test_a_forced_tile_is_taken_and_let_go() -> None:
    before = tiles.choose("lora_expand", tiles.DECODE, CPU)
    with tiles.force("lora_expand", tiles.DECODE, {"num_warps": 1}):
        assert tiles.choose("lora_expand", tiles.DECODE, CPU) == {"num_warps": 1}
    assert tiles.choose("lora_expand", tiles.DECODE, CPU) == before


def test_an_architecture_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    table = tiles.Table.of({"hardware": "x", "tiles": [entry("any", 4), entry("sm_90", 8)]})
    monkeypatch.setattr(tiles, "table", lambda: table)
    with tiles.architecture("sm_90"):
        assert tiles.choose("op", "decode", CPU)["num_warps"] == 8
    assert tiles.choose("op", "decode", CPU)["num_warps"] == 4
