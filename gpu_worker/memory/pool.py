"""The one tensor: `[num_pages, page_bytes]` bytes on the device. KV and adapters are views of it."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.memory.geometry import PageGeometry

# Written and read back together: as much as stays in a processor's cache.
_GROUP_BYTES = 1 << 21


class PagePool:
    """Storage of every page; `pinned` host memory is read by a device itself."""

    def __init__(self, geometry: PageGeometry, num_pages: int, device: str, *, pinned: bool = False) -> None:
        self._geometry = geometry
        shape = (num_pages, geometry.page_bytes)
        # [num_pages, page_bytes]; a kernel never reads a slot that was not written
        self.bytes = torch.empty(shape, dtype=torch.uint8, device=device, pin_memory=pinned)
        self._copies = torch.cuda.Stream(self.bytes.device) if self.bytes.is_cuda else None  # type: ignore[no-untyped-call]  # torch's own

    def kv_pages(self, dtype: torch.dtype) -> torch.Tensor:
        """`[num_pages, num_layers, 2, page_size, num_kv_heads, head_dim]` over the same storage.

        This is the one place that knows the order inside a page.
        """
        geometry = self._geometry
        shape = (geometry.num_layers, 2, geometry.page_size, geometry.num_kv_heads, geometry.head_dim)
        kv_bytes = geometry.page_size * geometry.kv_bytes_per_token
        return self.bytes[:, :kv_bytes].view(dtype).view(-1, *shape)

    def write(
        self, pages: list[int], data: npt.NDArray[np.uint8], see: Callable[[memoryview], None] | None = None
    ) -> None:
        """Copies a byte string into `pages` of host memory; the tail of the last page is left as it is.

        `see` is shown what the pages hold of it then, read back a few pages at a time while the processor has them in
        its cache. Each call below lets other threads run for as long as it takes: page by page, a copying thread asked
        for the interpreter 40 times an adapter and waited for the step loop each time.
        """
        page_bytes, pool = self._geometry.page_bytes, self.bytes.numpy()
        for first in range(0, len(pages), group := max(1, _GROUP_BYTES // page_bytes)):
            rows = np.array(pages[first : first + group], np.intp)
            part = data[first * page_bytes : (first + len(rows)) * page_bytes]
            num_whole, tail_bytes = divmod(len(part), page_bytes)
            pool[rows[:num_whole]] = part[: num_whole * page_bytes].reshape(num_whole, page_bytes)
            if tail_bytes:
                pool[rows[num_whole], :tail_bytes] = part[num_whole * page_bytes :]
            if see is not None:
                held = pool[rows[0]] if group == 1 else np.take(pool, rows, axis=0).reshape(-1)
                see(held[: len(part)].data)

    def copy_pages(self, pages: list[int], source: "PagePool", source_pages: list[int]) -> None:
        """Copies whole pages of another pool of the same geometry; they are there when this returns.

        On a device the copies have a stream of their own: running kernels do not wait for them.
        """
        with torch.cuda.stream(self._copies):
            for page, source_page in zip(pages, source_pages, strict=True):
                self.bytes[page].copy_(source.bytes[source_page], non_blocking=True)
        if self._copies is not None:
            self._copies.synchronize()
