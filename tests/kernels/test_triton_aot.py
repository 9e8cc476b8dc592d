"""Every Triton kernel compiles for the GPUs that we serve on, without spills; no GPU is needed to say so."""

import re

import pytest

from tests.checkout import read

pytestmark = pytest.mark.aot


def test_no_kernel_of_a_serving_configuration_spills() -> None:
    from benchmarks.gpu import ahead_of_time

    rows = list(ahead_of_time.rows())
    spilling = [row for row in rows if row.resources.spill_bytes]
    assert spilling == []
    # a program must find room in one multiprocessor of the smallest of them
    assert [row for row in rows if row.resources.shared_bytes > 163 * 1024] == []
    assert {row.kernel for row in rows} == {
        *("rms_norm", "silu_and_mul", "store_kv", "linear"),
        *("shrink", "sum", "expand"),
        *("decode", "merge", "prefill"),
    }
    table = read("docs/performance.md").partition(ahead_of_time.BEGIN)[2].partition(ahead_of_time.END)[0]
    listed = re.findall(r"^\| (\S+\d\S+) \| (\w+) \| (\w+) \| \d", table, re.MULTILINE)
    assert listed == list(dict.fromkeys(row.name for row in rows)), "run `make aot-table`"


def test_a_tile_that_is_too_large_is_seen_to_spill() -> None:
    from benchmarks.gpu.launches import layer_launches
    from benchmarks.gpu.shapes import MODELS, STEPS
    from kernels.gpu import tiles
    from kernels.gpu.aot import compile_launch

    tile = {"BLOCK_M": 128, "BLOCK_N": 64, "CHUNK": 512, "num_warps": 4, "num_stages": 2}
    with tiles.force("paged_attention", tiles.PREFILL, tile):
        launches = list(layer_launches(MODELS["llama-3.1-8b"], STEPS["prefill"]))
    (prefill,) = [launch for launch in launches if launch.kernel.__name__ == "prefill_kernel"]
    assert compile_launch(prefill, "sm_90").spill_bytes > 0
