"""rms_norm: root-mean-square normalisation with the residual addition before it."""

from torch import Tensor

from kernels import dispatch
from kernels.rms_norm import cpu
from kernels.rms_norm.reference import rms_norm_reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Adds the residual stream, then normalises, in the rounding order of transformers' LlamaRMSNorm.

    x, residual: `[num_tokens, hidden]`, same dtype. weight: `[hidden]`, same dtype. Rows of another width are as good:
    the heads of a batch, `[num_tokens * num_heads, head_dim]`.
    Returns (normed, x + residual), both `[num_tokens, hidden]` in x's dtype; without a residual the second is x.
    """
    if dispatch.use_triton("rms_norm", x):
        from kernels.rms_norm.triton import rms_norm_triton

        return rms_norm_triton(x, weight, eps, residual)
    if dispatch.use_cpu("rms_norm", cpu.supports(x, weight, residual)):
        return cpu.rms_norm_cpu(x, weight, eps, residual)
    return rms_norm_reference(x, weight, eps, residual)
