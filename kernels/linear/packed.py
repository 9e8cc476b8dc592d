"""A weight in panels of 16 output features: `[in_features][16]` each, the order in which the kernel reads it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16
# panels turned at a time, so that packing takes little memory beside the weight
_PANELS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight `[out_features, in_features]` in panels; rows behind the last are zero."""

    # [num_panels, in_features, 16]: the last panel may be wider than what is left
    panels: Tensor
    out_features: int

    @property
    def dtype(self) -> torch.dtype:
        return self.panels.dtype

    @property
    def device(self) -> torch.device:
        return self.panels.device

    def unpacked(self) -> Tensor:
        """`[out_features, in_features]`, a copy."""
        return self.panels.transpose(1, 2).flatten(0, 1)[: self.out_features].contiguous()


def pack(weight: Tensor) -> PackedWeight:
    """Packs `[out_features, in_features]`.

    When out_features is a multiple of 16 the memory of `weight` is reused, so that loading a model takes no more than
    the model: `weight` must not be read any more.
    """
    out_features, in_features = weight.shape
    if out_features % PANEL:
        weight = F.pad(weight, (0, 0, 0, -out_features % PANEL))
    panels = weight.view(-1, in_features, PANEL)
    for first in range(0, len(panels), _PANELS_AT_ONCE):
        block = panels[first : first + _PANELS_AT_ONCE]
        turned = block.view(-1, PANEL, in_features).transpose(1, 2)
        block.copy_(turned.clone(memory_format=torch.contiguous_format))
    return PackedWeight(panels, out_features)
