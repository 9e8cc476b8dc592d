"""Steps that go through static buffers and padding give what they give alone; on the CPU, where a graph is a call."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from benchmarks.kernels.models import Size, make_decoder
from gpu_worker.batch import Feed, ForwardBatch
from gpu_worker.cuda.executor import Executor, Replay, call_again
from gpu_worker.cuda.graph_plan import GraphKey
from gpu_worker.cuda.static_batch import StaticBatch
from gpu_worker.models import Decoder
from kernels.adapters import AdapterTables
from tests.kernels.adapter_pool import Adapter, build_segments, build_tables, random_lora

SIZE = Size(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48, vocab=61)
PAGE_SIZE, PAGES = 4, 6
MAX_SEQUENCES = 12
PADDING_PAGE = MAX_SEQUENCES * PAGES


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(3)
    return make_decoder(SIZE, max_context_tokens=64)


@pytest.fixture
def kv_pages() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    shape = PADDING_PAGE + 1, SIZE.layers, 2, PAGE_SIZE, SIZE.kv_heads, SIZE.head_dim
    pages = torch.randn(shape, generator=generator)
    pages[PADDING_PAGE] = torch.nan
    return pages


class Captures:
    """Counts captures."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        self.count += 1
        return call_again(run)


def executor_of(decoder: Decoder, kv_pages: Tensor) -> tuple[Executor, Captures]:
    captures = Captures()
    return Executor(decoder, kv_pages, PADDING_PAGE, MAX_SEQUENCES, captures), captures


RANKS = (8, 1, 64, 256, 3, 24)


@pytest.fixture(scope="module")
def library() -> AdapterTables:
    """One adapter of each of RANKS, in one pool."""
    generator = torch.Generator().manual_seed(6)
    sizes = {0: (32, 32), 2: (32, 16), 6: (48, 32)}
    adapters = [
        Adapter(
            "float32",
            {
                (layer, module): random_lora(rank, *shape, "float32", 0.3, generator)
                for layer in range(SIZE.layers)
                for module, shape in sizes.items()
            },
        )
        for rank in RANKS
    ]
    return build_tables(adapters, SIZE.layers, 1024, generator)


def tables_of(library: AdapterTables, ranks: tuple[int, ...]) -> AdapterTables:
    """Of a step with these adapters, no wider than it must be, as the model runner makes them."""
    rows = torch.tensor([RANKS.index(rank) for rank in ranks])
    pages = int((library.page_table[rows] < len(library.pool)).sum(dim=1).max())
    cells = library.start_unit[rows], library.lora_rank[rows], library.scaling[rows], library.dtype[rows]
    return AdapterTables(library.pool, library.page_table[rows][:, :pages].contiguous(), *cells, max(ranks))


def batch_of(owners: list[int], kv_pages: Tensor, tables: AdapterTables | None, seed: int = 8) -> ForwardBatch:
    """One token of each sequence; `owners` sorted, sequence i uses adapter owners[i]."""
    generator = torch.Generator().manual_seed(seed)
    count = len(owners)
    contexts = torch.randint(1, PAGE_SIZE * PAGES + 1, (count,), generator=generator)
    page_table = torch.randperm(PADDING_PAGE, generator=generator)[: count * PAGES].view(count, PAGES)
    page_table = page_table[:, : int(-(-contexts.max() // PAGE_SIZE))]
    positions = contexts - 1
    page = page_table.gather(1, (positions // PAGE_SIZE)[:, None])[:, 0]
    distinct = sorted(set(owners))
    return ForwardBatch(
        token_ids=torch.randint(SIZE.vocab, (count,), generator=generator),
        positions=positions,
        slot_mapping=page * PAGE_SIZE + positions % PAGE_SIZE,
        page_table=page_table.int(),
        query_start=torch.arange(count + 1, dtype=torch.int32),
        context_lens=contexts.int(),
        logit_rows=torch.arange(count),
        segments=build_segments([owners.count(owner) for owner in distinct], distinct),
        adapters=tables,
        kv_pages=kv_pages,
        decode_only=True,
    )


def alone(decoder: Decoder, batch: ForwardBatch) -> Tensor:
    """Of the batch as it is, on pages of its own."""
    with torch.inference_mode():
        return decoder.forward(replace(batch, kv_pages=batch.kv_pages.clone()))


@pytest.mark.parametrize("count", [1, 3, 8, 11, MAX_SEQUENCES], ids=lambda count: f"{count}-sequences")
def test_padding_changes_nothing(count: int, decoder: Decoder, kv_pages: Tensor) -> None:
    executor, _ = executor_of(decoder, kv_pages)
    batch = batch_of([-1] * count, kv_pages, None)
    wanted = alone(decoder, batch)
    with torch.inference_mode():
        assert torch.equal(executor.forward(batch), wanted)


def test_captured_with_rank_8_replayed_with_other_ranks_and_counts(
    decoder: Decoder, kv_pages: Tensor, library: AdapterTables
) -> None:
    """A rank beyond the ceiling captures again; everything else replays."""
    executor, captures = executor_of(decoder, kv_pages)
    steps = [
        ([0] * 4, (8,), 1),
        ([-1, 0, 1], (1, 8), 1),
        ([0, 1, 2, 3], (1, 64, 256, 3), 2),
        ([-1, -1, 0], (64,), 2),
        ([0, 1, 2, 3], (8, 24, 3, 1), 2),
    ]
    for step, (owners, ranks, captured) in enumerate(steps):
        batch = batch_of(owners, kv_pages, tables_of(library, ranks), seed=step)
        wanted = alone(decoder, batch)
        with torch.inference_mode():
            logits = executor.forward(batch)
        assert torch.equal(logits, wanted)
        assert captures.count == captured


def test_the_keys_and_values_of_the_step_are_in_their_pages(decoder: Decoder, kv_pages: Tensor) -> None:
    executor, _ = executor_of(decoder, kv_pages)
    batch = batch_of([-1] * 3, kv_pages, None)
    wanted = batch.kv_pages.clone()
    with torch.inference_mode():
        decoder.forward(replace(batch, kv_pages=wanted))
        executor.forward(batch)
    assert torch.equal(kv_pages[:PADDING_PAGE], wanted[:PADDING_PAGE])


def test_the_same_tables_are_uploaded_once(
    decoder: Decoder, kv_pages: Tensor, library: AdapterTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_worker.cuda import static_batch

    uploads: list[Tensor] = []

    def uploadable(tensor: Tensor) -> Tensor:
        uploads.append(tensor)
        return tensor

    monkeypatch.setattr(static_batch, "_uploadable", uploadable)
    executor, _ = executor_of(decoder, kv_pages)
    tables = tables_of(library, (8,))
    with torch.inference_mode():
        executor.forward(batch_of([0] * 4, kv_pages, tables))
        first = len(uploads)
        executor.forward(batch_of([0] * 4, kv_pages, tables, seed=9))
    assert len(uploads) == first > 0


def test_a_prompt_runs_eagerly_with_its_adapters(decoder: Decoder, kv_pages: Tensor, library: AdapterTables) -> None:
    executor, captures = executor_of(decoder, kv_pages)
    batch = replace(batch_of([0, 1, 2], kv_pages, tables_of(library, (3, 8, 24))), decode_only=False)
    wanted = alone(decoder, batch)
    with torch.inference_mode():
        assert torch.equal(executor.forward(batch), wanted)
    assert captures.count == 0


def test_a_prompt_brings_its_indices_on_the_host_and_a_graph_none(decoder: Decoder, kv_pages: Tensor) -> None:
    """Attention libraries plan with them, and a captured graph plans nothing."""
    seen: list[ForwardBatch] = []

    class Watched:
        dtype = decoder.dtype

        def forward(self, batch: ForwardBatch) -> Tensor:
            seen.append(batch)
            return decoder.forward(batch)

    watched: Any = Watched()
    executor, _ = executor_of(watched, kv_pages)
    decodes = batch_of([-1] * 3, kv_pages, None)
    prompt = replace(decodes, decode_only=False)
    with torch.inference_mode():
        executor.forward(prompt)
        executor.forward(decodes)
    host = seen[0].host
    assert host is not None
    assert host.page_table is prompt.page_table
    assert host.query_start is prompt.query_start
    assert host.context_lens is prompt.context_lens
    assert [batch.host for batch in seen[1:]] == [None] * len(seen[1:])


def addresses(batch: ForwardBatch) -> dict[str, int]:
    """Where a kernel that was captured with `batch` reads and writes."""
    found = {field.name: getattr(batch, field.name) for field in fields(batch)}
    for part in ("segments", "adapters"):
        if (value := found.pop(part)) is not None:
            found |= {f"{part}.{field.name}": getattr(value, field.name) for field in fields(value)}
    return {name: value.data_ptr() for name, value in found.items() if isinstance(value, Tensor)}


class Addresses:
    """A decoder that remembers where the batches of each width and adapters lie."""

    def __init__(self, decoder: Decoder) -> None:
        self.dtype = decoder.dtype
        self.seen: dict[tuple[int, bool], list[dict[str, int]]] = {}
        self._decoder = decoder

    def forward(self, batch: ForwardBatch) -> Tensor:
        self.seen.setdefault((len(batch.token_ids), batch.adapters is not None), []).append(addresses(batch))
        return self._decoder.forward(batch)

    @property
    def moved(self) -> bool:
        return any(found != runs[0] for runs in self.seen.values() for found in runs)


# Who uses which adapter, and their ranks, the largest first: two widths, with adapters and without, in turn.
MIXED_STEPS = [([0] * 4, (24,)), ([-1] * 8, ()), ([0, 0, 1], (3, 24)), ([-1] * 4, ()), ([0] * 7, (8,)), ([0] * 4, (3,))]


def run_mixed(executor: Executor, kv_pages: Tensor, library: AdapterTables) -> None:
    with torch.inference_mode():
        for step, (owners, ranks) in enumerate(MIXED_STEPS * 2):
            executor.forward(batch_of(owners, kv_pages, tables_of(library, ranks) if ranks else None, seed=step))


def test_a_tensor_of_a_captured_step_never_moves(decoder: Decoder, kv_pages: Tensor, library: AdapterTables) -> None:
    """A replay reads the addresses of its capture: whatever runs between must leave every one of them in force."""
    watched: Any = Addresses(decoder)
    executor, captures = executor_of(watched, kv_pages)
    run_mixed(executor, kv_pages, library)
    assert captures.count == len(watched.seen) == 4
    # when it was captured, and replayed twice at least
    assert all(len(runs) >= 3 for runs in watched.seen.values())
    assert not watched.moved
    # the tables of adapters are one for all graphs
    tables = [
        {name: at for name, at in runs[0].items() if name.startswith("adapters.")} for runs in watched.seen.values()
    ]
    assert len({tuple(sorted(one.items())) for one in tables if one}) == 1


def test_control_a_tensor_that_is_replaced_is_noticed(
    decoder: Decoder, kv_pages: Tensor, library: AdapterTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Tensor] = []

    def renewed(static: StaticBatch, host: ForwardBatch) -> None:
        fill(static, host)
        # the old one is kept, so that the new one has another address
        kept.append(static.batch.positions)
        static.batch = replace(static.batch, positions=static.batch.positions.clone())

    fill = StaticBatch.fill
    monkeypatch.setattr(StaticBatch, "fill", renewed)
    watched: Any = Addresses(decoder)
    run_mixed(executor_of(watched, kv_pages)[0], kv_pages, library)
    assert watched.moved


def test_tokens_that_only_the_device_knows_are_fed_to_a_replay(
    decoder: Decoder, kv_pages: Tensor, library: AdapterTables
) -> None:
    """Captured with one feed, replayed with another and with none: bit by bit what an eager step gives."""
    executor, captures = executor_of(decoder, kv_pages)
    tables = tables_of(library, (8, 24))
    feeds = [Feed(torch.tensor([0, 3]), torch.tensor([5, 60])), Feed(torch.tensor([2]), torch.tensor([17])), None]
    for step, feed in enumerate(feeds):
        batch = replace(batch_of([0, 0, 1, 1], kv_pages, tables, seed=step), feed=feed)
        wanted = alone(decoder, batch)
        assert feed is None or not torch.equal(wanted, alone(decoder, replace(batch, feed=None)))
        with torch.inference_mode():
            assert torch.equal(executor.forward(batch), wanted)
    assert captures.count == 1


def test_a_feed_is_put_in_its_place_without_a_look_at_it(kv_pages: Tensor) -> None:
    """A fake tensor raises when somebody asks for its numbers."""
    batch = batch_of([-1] * 4, kv_pages, None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        static = StaticBatch(GraphKey(4, 64, has_lora=False), kv_pages, PADDING_PAGE, None, torch.device("cpu"))
        fed = torch.empty(2, dtype=torch.int64)
        static.fill(replace(batch, feed=Feed(torch.tensor([0, 3]), fed)))
        with pytest.raises(DataDependentOutputException):
            int(fed[0])


def test_only_the_wanted_logits_come_back(decoder: Decoder, kv_pages: Tensor) -> None:
    executor, _ = executor_of(decoder, kv_pages)
    batch = replace(batch_of([-1] * 5, kv_pages, None), logit_rows=torch.tensor([1, 4]))
    wanted = alone(decoder, batch)
    with torch.inference_mode():
        assert torch.equal(executor.forward(batch), wanted)


def test_another_adapter_would_be_noticed(decoder: Decoder, kv_pages: Tensor, library: AdapterTables) -> None:
    batch = batch_of([0] * 4, kv_pages, tables_of(library, (8,)))
    other = replace(batch, adapters=tables_of(library, (24,)))
    assert not torch.equal(alone(decoder, batch), alone(decoder, other))
