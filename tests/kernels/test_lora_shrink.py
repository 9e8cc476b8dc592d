import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.adapters import AdapterTables, Segments
from kernels.cpu.library import vector_lanes
from kernels.lora_shrink import cpu, lora_shrink
from tests.kernels.adapter_pool import PACKED_DTYPES, Adapter, build_segments, build_tables, random_lora

pytestmark = pytest.mark.usefixtures("backend")

IN_FEATURES, LAYERS = 100, 2
QKV = (0, 1, 2)
OUT_FEATURES = {0: 36, 1: 20, 2: 20, 4: 50, 5: 50}
EPS = torch.finfo(torch.float32).eps


def make_adapters(lora_ranks: list[int], dtypes: list[str], generator: torch.Generator) -> list[Adapter]:
    """Adapter i has all modules of both layers, except that every second lacks k, in layer 1 only."""
    adapters = []
    for index, (lora_rank, dtype) in enumerate(zip(lora_ranks, dtypes, strict=True)):
        modules = {
            (layer, module): random_lora(lora_rank, IN_FEATURES, OUT_FEATURES[module], dtype, 0.5, generator)
            for layer in range(LAYERS)
            for module in OUT_FEATURES
            if not (index % 2 and layer == 1 and module == 1)
        }
        adapters.append(Adapter(dtype, modules))
    return adapters


def expected(
    x: Tensor, adapters: list[Adapter], segments: Segments, layer: int, modules: tuple[int, ...], width: int
) -> tuple[Tensor, Tensor]:
    """x A^T in float64, and the bound of a float32 sum of n products in any order: n * eps * |x| |A|^T."""
    values = torch.zeros(len(modules), len(x), width, dtype=torch.float64)
    bounds = torch.zeros_like(values)
    starts = segments.starts.tolist()
    for segment, adapter in enumerate(segments.adapter.tolist()):
        for index, module in enumerate(modules):
            lora = adapters[adapter].modules.get((layer, module)) if adapter >= 0 else None
            if lora is not None:
                place = index, slice(starts[segment], starts[segment + 1]), slice(len(lora.a))
                rows, a = x[place[1]].double(), lora.a.double()
                values[place] = rows @ a.T
                bounds[place] = IN_FEATURES * EPS * (rows.abs() @ a.abs().T)
    return values, bounds


def assert_shrinks(
    x: Tensor, adapters: list[Adapter], tables: AdapterTables, segments: Segments, layer: int, modules: tuple[int, ...]
) -> None:
    shrunk = lora_shrink(x, tables, segments, layer, modules)
    values, bounds = expected(x, adapters, segments, layer, modules, tables.max_lora_rank)
    assert shrunk.dtype == torch.float32
    assert shrunk.shape == values.shape
    assert ((shrunk - values).abs() <= bounds).all()


@pytest.mark.parametrize("page_bytes", [128, 1024, 1 << 20], ids=lambda size: f"pages-of-{size}")
@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize("lora_rank", [1, 3, 8, 24, 64], ids=lambda lora_rank: f"rank-{lora_rank}")
@pytest.mark.parametrize("num_tokens", [1, 7, 33], ids=lambda count: f"{count}-tokens")
def test_one_adapter(num_tokens: int, lora_rank: int, dtype: str, page_bytes: int, generator: torch.Generator) -> None:
    adapters = make_adapters([lora_rank], [dtype], generator)
    tables = build_tables(adapters, LAYERS, page_bytes, generator)
    x = torch.randn(num_tokens, IN_FEATURES, generator=generator)
    assert_shrinks(x, adapters, tables, build_segments([num_tokens], [0]), 1, QKV)


@pytest.mark.parametrize("layer", range(LAYERS), ids=lambda layer: f"layer-{layer}")
@pytest.mark.parametrize("modules", [QKV, (4, 5), (3,)], ids=["q-k-v", "gate-up", "absent"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mixed_adapters_and_base_rows(
    x_dtype: torch.dtype, modules: tuple[int, ...], layer: int, generator: torch.Generator
) -> None:
    adapters = make_adapters([8, 1, 64, 3], ["bfloat16", "float32", "float16", "float32"], generator)
    tables = build_tables(adapters, LAYERS, 1024, generator)
    segments = build_segments([5, 7, 1, 0, 20], [2, -1, 1, 0, 3])
    x = torch.randn(33, IN_FEATURES, generator=generator).to(x_dtype)
    assert_shrinks(x, adapters, tables, segments, layer, modules)


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 200], ids=lambda count: f"{count}-tokens")
def test_the_width_of_vectors_changes_no_bit(num_tokens: int, dtype: str, generator: torch.Generator) -> None:
    tables = build_tables(make_adapters([29], [dtype], generator), LAYERS, 1024, generator)
    x, segments, found = (
        torch.randn(num_tokens, IN_FEATURES, generator=generator),
        build_segments([num_tokens], [0]),
        [],
    )
    for lanes in (8, vector_lanes()):
        with pytest.MonkeyPatch.context() as patch, dispatch.force("cpu"):
            patch.setattr(cpu, "vector_lanes", lambda lanes=lanes: lanes)
            found.append(lora_shrink(x, tables, segments, 1, QKV))
    assert torch.equal(*found)


def test_all_rows_are_base_rows(generator: torch.Generator) -> None:
    tables = build_tables(make_adapters([8], ["float32"], generator), LAYERS, 1024, generator)
    x = torch.randn(7, IN_FEATURES, generator=generator)
    assert lora_shrink(x, tables, build_segments([7], [-1]), 0, QKV).eq(0).all()


def test_a_wrong_page_table_is_noticed(generator: torch.Generator) -> None:
    adapters = make_adapters([8], ["float32"], generator)
    tables = build_tables(adapters, LAYERS, 1024, generator)
    tables.page_table.copy_(tables.page_table.flip(1))
    x = torch.randn(7, IN_FEATURES, generator=generator)
    with pytest.raises(AssertionError):
        assert_shrinks(x, adapters, tables, build_segments([7], [0]), 0, QKV)
