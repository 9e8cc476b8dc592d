"""Between host and device without waiting: small arrays up, a step's results down."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def upload(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy on the device, in order behind what was launched; on the CPU the array itself."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def on_host(tensor: Tensor) -> bool:
    """numpy can read it here and now."""
    return tensor.is_cpu


def padded(rows: Sequence[Sequence[int]], padding: int, width: int = 0) -> npt.NDArray[np.int64]:
    """`[len(rows), longest row or width]` int64; entries behind a row's end are `padding`."""
    table = np.full((len(rows), max(width, *(len(row) for row in rows))), padding, np.int64)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


class Download:
    """Copies of device tensors on the host, under way; on the CPU the tensors themselves."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.Event | None = None
        if not any(tensor.is_cuda for tensor in tensors):
            self._copies = list(tensors)
            return
        self._copies = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        self._event = torch.Event(tensors[0].device)
        self._event.record()

    def wait(self) -> list[Tensor]:
        """The copies, once everything launched before them has run."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies
