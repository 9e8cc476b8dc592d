"""lora_shrink: the narrow half of a LoRA product, x A^T, for every adapter of a batch."""

from torch import Tensor

from kernels import dispatch
from kernels.adapters import AdapterTables, Segments
from kernels.lora_shrink import cpu
from kernels.lora_shrink.reference import lora_shrink_reference


def lora_shrink(x: Tensor, adapters: AdapterTables, segments: Segments, layer: int, modules: tuple[int, ...]) -> Tensor:
    """x A^T of each token with its own adapter, for modules that read the same input (q, k, v or gate, up).

    x: `[num_tokens, in_features]`, floating. modules: numbers of `AdapterTables`, ascending.
    Returns `[len(modules), num_tokens, max_lora_rank]` float32, summed in float32, not scaled; zero where a token has
    no adapter, its adapter lacks the module, or beyond its rank.
    """
    if dispatch.use_triton("lora_shrink", x):
        from kernels.lora_shrink.triton import lora_shrink_triton

        return lora_shrink_triton(x, adapters, segments, layer, modules)
    if dispatch.use_cpu("lora_shrink", cpu.supports(x, adapters, segments)):
        return cpu.lora_shrink_cpu(x, adapters, segments, layer, modules)
    return lora_shrink_reference(x, adapters, segments, layer, modules)
