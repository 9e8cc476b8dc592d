import pytest
import torch
from torch import Tensor

from kernels.adapters import AdapterTables, Segments
from kernels.cpu.library import vector_lanes
from kernels.lora_expand import cpu, lora_expand
from tests.kernels.adapter_pool import PACKED_DTYPES, Adapter, build_segments, build_tables, random_lora

pytestmark = pytest.mark.usefixtures("backend")

IN_FEATURES, LAYERS = 40, 2
QKV, GATE_UP = (0, 1, 2), (4, 5)
OUT_FEATURES = {0: 100, 1: 36, 2: 36, 4: 70, 5: 70}
EPS = torch.finfo(torch.float32).eps


def make_adapters(lora_ranks: list[int], dtypes: list[str], generator: torch.Generator) -> list[Adapter]:
    """Adapter i has scaling i + 0.3 and all modules of both layers, except that every second lacks k in layer 1."""
    adapters = []
    for index, (lora_rank, dtype) in enumerate(zip(lora_ranks, dtypes, strict=True)):
        modules = {
            (layer, module): random_lora(lora_rank, IN_FEATURES, OUT_FEATURES[module], dtype, index + 0.3, generator)
            for layer in range(LAYERS)
            for module in OUT_FEATURES
            if not (index % 2 and layer == 1 and module == 1)
        }
        adapters.append(Adapter(dtype, modules))
    return adapters


def expected(
    shrunk: Tensor, adapters: list[Adapter], segments: Segments, layer: int, modules: tuple[int, ...], out: Tensor
) -> tuple[Tensor, Tensor]:
    """out + scaling * shrunk B in float64, and its bound: a float32 sum of r products, the scaling (rounded to
    float32, and multiplied) and the addition make (r + 3) * eps of the magnitudes, then one rounding to out's dtype."""
    values, bounds = out.double(), torch.zeros(out.shape, dtype=torch.float64)
    starts, column = segments.starts.tolist(), 0
    for index, module in enumerate(modules):
        columns = slice(column, column + OUT_FEATURES[module])
        column = columns.stop
        for segment, adapter in enumerate(segments.adapter.tolist()):
            lora = adapters[adapter].modules.get((layer, module)) if adapter >= 0 else None
            if lora is not None:
                tokens, lora_rank = slice(starts[segment], starts[segment + 1]), lora.b.shape[1]
                narrow, b = shrunk[index, tokens, :lora_rank].double(), lora.b.double().T
                magnitude = values[tokens, columns].abs() + lora.scaling * (narrow.abs() @ b.abs())
                values[tokens, columns] += lora.scaling * (narrow @ b)
                bounds[tokens, columns] = (lora_rank + 3) * EPS * magnitude
                bounds[tokens, columns] += torch.finfo(out.dtype).eps * values[tokens, columns].abs()
    return values, bounds


def assert_expands(
    adapters: list[Adapter],
    tables: AdapterTables,
    segments: Segments,
    layer: int,
    modules: tuple[int, ...],
    generator: torch.Generator,
    out_dtype: torch.dtype = torch.float32,
) -> None:
    num_tokens, out_features = int(segments.starts[-1]), tuple(OUT_FEATURES[module] for module in modules)
    # NaN beyond every adapter's rank and in base rows: only what belongs to an adapter may be read
    shrunk = torch.full((len(modules), num_tokens, tables.max_lora_rank), torch.nan)
    starts = segments.starts.tolist()
    for segment, adapter in enumerate(segments.adapter.tolist()):
        if adapter >= 0:
            lora_rank = next(iter(adapters[adapter].modules.values())).b.shape[1]
            part = shrunk[:, starts[segment] : starts[segment + 1], :lora_rank]
            part.copy_(torch.randn(part.shape, generator=generator))
    out = torch.randn(num_tokens, sum(out_features), generator=generator).to(out_dtype)
    values, bounds = expected(shrunk, adapters, segments, layer, modules, out)
    lora_expand(shrunk, tables, segments, layer, modules, IN_FEATURES, out_features, out)
    assert ((out - values).abs() <= bounds).all()


@pytest.mark.parametrize("page_bytes", [128, 1024, 1 << 20], ids=lambda size: f"pages-of-{size}")
@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize("lora_rank", [1, 3, 8, 24, 64], ids=lambda lora_rank: f"rank-{lora_rank}")
@pytest.mark.parametrize("num_tokens", [1, 7, 33], ids=lambda count: f"{count}-tokens")
def test_one_adapter(num_tokens: int, lora_rank: int, dtype: str, page_bytes: int, generator: torch.Generator) -> None:
    adapters = make_adapters([lora_rank], [dtype], generator)
    tables = build_tables(adapters, LAYERS, page_bytes, generator)
    assert_expands(adapters, tables, build_segments([num_tokens], [0]), 1, QKV, generator)


@pytest.mark.parametrize("layer", range(LAYERS), ids=lambda layer: f"layer-{layer}")
@pytest.mark.parametrize("modules", [QKV, GATE_UP, (1,)], ids=["q-k-v", "gate-up", "k"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mixed_adapters_leave_base_rows_untouched(
    out_dtype: torch.dtype, modules: tuple[int, ...], layer: int, generator: torch.Generator
) -> None:
    adapters = make_adapters([8, 1, 64, 3], ["bfloat16", "float32", "float16", "float32"], generator)
    tables = build_tables(adapters, LAYERS, 1024, generator)
    segments = build_segments([5, 7, 1, 0, 20], [2, -1, 1, 0, 3])
    assert_expands(adapters, tables, segments, layer, modules, generator, out_dtype)


@pytest.mark.parametrize("num_tokens", [1, 33], ids=lambda count: f"{count}-tokens")
def test_the_width_of_vectors_changes_no_bit(num_tokens: int, generator: torch.Generator) -> None:
    tables = build_tables(make_adapters([24], ["bfloat16"], generator), LAYERS, 1024, generator)
    segments, sizes = build_segments([num_tokens], [0]), tuple(OUT_FEATURES[module] for module in QKV)
    shrunk = torch.randn(3, num_tokens, 24, generator=generator)
    outs = torch.randn(num_tokens, sum(sizes), generator=generator).repeat(2, 1, 1)
    for out, lanes in zip(outs, (8, vector_lanes()), strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "vector_lanes", lambda lanes=lanes: lanes)
            lora_expand(shrunk, tables, segments, 1, QKV, IN_FEATURES, sizes, out)
    assert torch.equal(*outs)


@pytest.mark.parametrize("spoil", ["page_table", "scaling", "start_unit"])
def test_a_wrong_table_is_noticed(spoil: str, generator: torch.Generator) -> None:
    adapters = make_adapters([8, 8], ["float32", "float32"], generator)
    tables = build_tables(adapters, LAYERS, 1024, generator)
    table = getattr(tables, spoil)
    if spoil == "page_table":
        table[:, 2:4] = table[:, 2:4].flip(1)  # the first two hold only A of q
    else:
        table.fill_(1)
    with pytest.raises(AssertionError):
        assert_expands(adapters, tables, build_segments([7, 2], [0, 1]), 0, QKV, generator)
