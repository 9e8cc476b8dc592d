"""What the tuner writes: candidates that exist, the best of them, and a table that keeps what it did not measure."""

import json
from typing import Any

import pytest
import torch

from benchmarks.gpu import tune
from benchmarks.gpu.operations import Case
from kernels.gpu import tiles

CPU = torch.device("cpu")


def entry(op: str, architecture: str, warps: int = 4) -> dict[str, Any]:
    return {"op": op, "class": "decode", "architecture": architecture, "tile": {"num_warps": warps}}


@pytest.mark.parametrize(("op", "shape_class"), tune.CANDIDATES, ids=str)
def test_candidates_have_the_numbers_of_the_table(op: str, shape_class: str) -> None:
    some = list(tune.candidates(op, shape_class))
    assert {tuple(sorted(tile)) for tile in some} == {tuple(sorted(tiles.choose(op, shape_class, CPU)))}
    assert len({tuple(tile.items()) for tile in some}) == len(some) > 1


def test_all_candidates_have_the_chunk_of_the_table() -> None:
    """Decodes and prompts must agree about it, so it is not tuned for one of them."""
    chunk = tiles.choose("paged_attention", tiles.DECODE, CPU)["CHUNK"]
    for shape_class in (tiles.DECODE, tiles.PREFILL):
        assert {tile["CHUNK"] for tile in tune.candidates("paged_attention", shape_class)} == {chunk}


def test_the_quickest_tile_wins_and_one_that_does_not_run_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {1: 3.0, 2: 1.0, 4: 2.0}

    def seconds_of(calls: object, device: torch.device) -> float:
        warps = tiles.choose("op", "decode", device)["num_warps"]
        if warps == 8:
            raise RuntimeError("out of resources")
        return seconds[warps]

    monkeypatch.setattr(tune, "seconds_of", seconds_of)
    some = [{"num_warps": warps} for warps in (1, 8, 2, 4)]
    tile, mean = tune.best("op", "decode", [Case("op", "", 0, 0, [])], some, CPU)
    assert tile == {"num_warps": 2}
    assert mean == pytest.approx(1.0)
    with pytest.raises(RuntimeError, match="no tile of op decode runs here"):
        tune.best("op", "decode", [Case("op", "", 0, 0, [])], [{"num_warps": 8}], CPU)


def test_a_measured_entry_replaces_its_own_and_no_other() -> None:
    before = {"hardware": "untuned defaults", "tiles": [entry("a", "any"), entry("a", "sm_90"), entry("b", "any")]}
    after = tune.merged(before, "H100", [entry("a", "sm_90", 8)])
    assert after == {"hardware": "H100", "tiles": [entry("a", "any"), entry("b", "any"), entry("a", "sm_90", 8)]}
    again = tune.merged(after, "A100", [entry("a", "sm_80")])
    assert again["hardware"] == "H100; A100"


def test_what_is_written_can_be_read_back() -> None:
    document = json.loads(tiles.TABLE.read_text())
    assert json.loads(tune.written(document)) == document
    assert tiles.Table.of(json.loads(tune.written(document))).tiles == tiles.table().tiles
