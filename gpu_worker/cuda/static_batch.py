"""A forward batch whose tensors never move, so that a captured graph can be replayed with other contents."""

from itertools import accumulate

import torch
from torch import Tensor

from gpu_worker.batch import Feed, ForwardBatch
from gpu_worker.cuda.graph_plan import Ceilings, GraphKey
from kernels.adapters import AdapterTables, Segments
from kernels.paged_attention.libraries import HostIndices

# Fields of one integer type lie in one buffer, so that a step uploads two buffers and nothing else.
Shapes = dict[str, tuple[int, ...]]


def _wide_shapes(key: GraphKey) -> Shapes:
    rows = (key.tokens,)
    return {"token_ids": rows, "positions": rows, "slot_mapping": rows}


def _narrow_shapes(key: GraphKey) -> Shapes:
    rows, bounds = (key.tokens,), (key.tokens + 1,)
    table = {"page_table": (key.tokens, key.table_pages), "query_start": bounds, "context_lens": rows}
    return table | {"starts": bounds, "adapter": rows}


def views(buffer: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """The fields of a flat buffer, one behind the other."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    ends = list(accumulate(sizes))
    parts = (buffer[end - size : end] for end, size in zip(ends, sizes, strict=True))
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _num_elements(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


class StaticTables:
    """Room for the tables of a step's adapters, shared by all graphs with LoRA; uploaded when the adapters change."""

    def __init__(self, capacity: int, ceilings: Ceilings, like: AdapterTables, device: torch.device) -> None:
        _, num_layers, num_modules = like.lora_rank.shape
        cells = capacity, num_layers, num_modules

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.tables = AdapterTables(
            pool=like.pool,
            page_table=integers(capacity, ceilings.adapter_pages),
            start_unit=integers(*cells),
            lora_rank=integers(*cells),
            scaling=torch.zeros(cells, dtype=torch.float32, device=device),
            dtype=integers(capacity),
            max_lora_rank=ceilings.lora_rank,
        )
        self._filled: AdapterTables | None = None

    def fill(self, host: AdapterTables) -> None:
        """Nothing to do when these are the tables of the step before."""
        if host is self._filled:
            return
        count, pages = host.page_table.shape
        for name in ("start_unit", "lora_rank", "scaling", "dtype"):
            getattr(self.tables, name)[:count].copy_(_uploadable(getattr(host, name)), non_blocking=True)
        self.tables.page_table[:count, :pages].copy_(_uploadable(host.page_table), non_blocking=True)
        self._filled = host


class StaticBatch:
    """Rows behind the step's own are padding: one-token sequences of the base model in a page that nobody owns.

    Segments: a step of n tokens has at most n, and padding is one more only when n is below the capacity, so that
    `tokens` segments are always enough; unused ones are empty.
    """

    def __init__(
        self, key: GraphKey, kv_pages: Tensor, padding_page: int, tables: StaticTables | None, device: torch.device
    ) -> None:
        self._key = key
        self._padding_page = padding_page
        self._page_size = kv_pages.shape[3]
        self._static_tables = tables
        wide, narrow = _wide_shapes(key), _narrow_shapes(key)
        self._wide = torch.zeros(_num_elements(wide), dtype=torch.int64, device=device)
        self._narrow = torch.zeros(_num_elements(narrow), dtype=torch.int32, device=device)
        fields = views(self._wide, wide) | views(self._narrow, narrow)
        segments = Segments(fields.pop("starts"), fields.pop("adapter"))
        self.batch = ForwardBatch(
            **fields,
            logit_rows=torch.arange(key.tokens, device=device),
            segments=segments,
            adapters=None if tables is None else tables.tables,
            kv_pages=kv_pages,
            decode_only=True,
            feed=None,
            host=None,
        )

    def fill(self, host: ForwardBatch) -> None:
        """Uploads a step of decodes; `host` is on the CPU. Waits for nothing."""
        pinned = self._wide.is_cuda
        wide = torch.zeros(self._wide.shape, dtype=torch.int64, pin_memory=pinned)
        narrow = torch.zeros(self._narrow.shape, dtype=torch.int32, pin_memory=pinned)
        fields = views(wide, _wide_shapes(self._key)) | views(narrow, _narrow_shapes(self._key))
        self._write(fields, host)
        self._wide.copy_(wide, non_blocking=True)
        self._narrow.copy_(narrow, non_blocking=True)
        if host.feed is not None:
            self.batch.token_ids.index_copy_(0, uploaded_tensor(host.feed.rows, self._wide.device), host.feed.token_ids)
        if self._static_tables is not None and host.adapters is not None:
            self._static_tables.fill(host.adapters)

    def _write(self, fields: dict[str, Tensor], host: ForwardBatch) -> None:
        count, capacity = len(host.token_ids), self._key.tokens
        for name in ("token_ids", "positions", "slot_mapping", "context_lens"):
            fields[name][:count] = getattr(host, name)
        fields["slot_mapping"][count:] = self._padding_page * self._page_size
        fields["context_lens"][count:] = 1
        fields["page_table"][:count, : host.page_table.shape[1]] = host.page_table
        fields["page_table"][count:] = self._padding_page
        torch.arange(capacity + 1, dtype=torch.int32, out=fields["query_start"])
        segments = len(host.segments.adapter)
        fields["starts"][: segments + 1] = host.segments.starts
        fields["starts"][segments + 1 :] = capacity
        fields["adapter"][:segments] = host.segments.adapter
        fields["adapter"][segments:] = -1


def _uploadable(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def uploaded_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`, in order behind what was launched there."""
    return _uploadable(tensor).to(device, non_blocking=True)


def uploaded(host: ForwardBatch, device: torch.device, tables: AdapterTables | None = None) -> ForwardBatch:
    """The same batch with its indices on `device` and `tables`, for a step that no graph runs. Waits for nothing."""
    names = ("token_ids", "positions", "slot_mapping", "page_table", "query_start", "context_lens", "logit_rows")
    fields = {name: uploaded_tensor(getattr(host, name), device) for name in names}
    return ForwardBatch(
        **fields,
        segments=Segments(
            uploaded_tensor(host.segments.starts, device), uploaded_tensor(host.segments.adapter, device)
        ),
        adapters=tables,
        kv_pages=host.kv_pages,
        decode_only=host.decode_only,
        feed=None if host.feed is None else Feed(uploaded_tensor(host.feed.rows, device), host.feed.token_ids),
        host=HostIndices(host.page_table, host.query_start, host.context_lens),
    )


def uploaded_tables(host: AdapterTables, device: torch.device) -> AdapterTables:
    names = ("page_table", "start_unit", "lora_rank", "scaling", "dtype")
    fields = {name: uploaded_tensor(getattr(host, name), device) for name in names}
    return AdapterTables(pool=host.pool, max_lora_rank=host.max_lora_rank, **fields)
