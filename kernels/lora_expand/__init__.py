"""lora_expand: the wide half of a LoRA product, added to the base model's output."""

from torch import Tensor

from kernels import dispatch
from kernels.adapters import AdapterTables, Segments
from kernels.lora_expand import cpu
from kernels.lora_expand.reference import lora_expand_reference


def lora_expand(
    shrunk: Tensor,
    adapters: AdapterTables,
    segments: Segments,
    layer: int,
    modules: tuple[int, ...],
    in_features: int,
    out_features: tuple[int, ...],
    out: Tensor,
) -> None:
    """Adds scaling * shrunk B of each token's adapter to `out` in place, module by module side by side.

    shrunk: `[len(modules), num_tokens, max_lora_rank]` float32, from `lora_shrink` with the same modules.
    in_features: what `lora_shrink` read; B lies behind the rows of A, so their length says where it starts.
    out: `[num_tokens, sum(out_features)]`, floating; module m has the columns behind those of the modules before it.
    The product is made in float32 and rounded once, after the addition. Tokens without the module are not touched.
    """
    if dispatch.use_triton("lora_expand", out):
        from kernels.lora_expand.triton import lora_expand_triton

        lora_expand_triton(shrunk, adapters, segments, layer, modules, in_features, out_features, out)
        return
    if dispatch.use_cpu("lora_expand", cpu.supports(shrunk, adapters, segments, out)):
        cpu.lora_expand_cpu(shrunk, adapters, segments, layer, modules, in_features, out_features, out)
        return
    lora_expand_reference(shrunk, adapters, segments, layer, modules, in_features, out_features, out)
