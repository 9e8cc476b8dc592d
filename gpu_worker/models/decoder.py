"""The forward pass."""

import torch
from torch import Tensor

from gpu_worker.batch import ForwardBatch
from gpu_worker.models.config import ModelConfig
from gpu_worker.models.rope import cos_sin_table
from gpu_worker.models.weights import DecoderWeights, LayerWeights, Projection
from kernels.cpu.launch import settle, together
from kernels.linear import linear
from kernels.lora_expand import lora_expand
from kernels.lora_shrink import lora_shrink
from kernels.paged_attention import paged_attention
from kernels.rms_norm import rms_norm
from kernels.silu_and_mul import silu_and_mul
from kernels.store_kv import store_kv
from kernels.take_rows import take_rows

# Module numbers of `kernels.adapters.AdapterTables`.
QKV, OUTPUT, GATE_UP, DOWN = (0, 1, 2), (3,), (4, 5), (6,)


class Decoder:
    """A pre-norm transformer decoder with LoRA on every projection. Holds weights only; all state is in the batch."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        sizes = config.geometry
        self.config = config
        self.weights = weights
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self._cos_sin = cos_sin_table(config.rope, sizes.head_dim, sizes.max_context_tokens, self.device)
        self._scale = sizes.head_dim**-0.5

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits `[num_logits, vocab]` float32 of the batch's `logit_rows`; writes this step's keys and values."""
        with together():
            logits = self.operations(batch.fed_token_ids(), batch)
        return logits.to(torch.float32)

    def operations(self, token_ids: Tensor, batch: ForwardBatch) -> Tensor:
        """Logits `[num_logits, vocab]`, in the model's dtype, of a batch whose tokens are `token_ids`.

        Reads the sizes and addresses of a batch, never a value: `RecordedDecoder` runs it for batches without any.
        """
        eps, rows = self.config.rms_norm_eps, batch.logit_rows
        x, residual = take_rows(self.weights.embedding, token_ids), None
        for index, layer in enumerate(self.weights.layers):
            x, residual = rms_norm(x, layer.input_norm, eps, residual)
            x = self._attention(x, layer, index, batch)
            x, residual = rms_norm(x, layer.post_attention_norm, eps, residual)
            x = _mlp(x, layer, index, batch)
        assert residual is not None
        x, _ = rms_norm(take_rows(x, rows), self.weights.final_norm, eps, take_rows(residual, rows))
        return linear(x, self.weights.lm_head)

    def _attention(self, x: Tensor, layer: LayerWeights, index: int, batch: ForwardBatch) -> Tensor:
        head_dim = self.config.geometry.head_dim
        fused = _project(x, layer.qkv, QKV, index, batch)
        parts = fused.split_with_sizes(layer.qkv.out_features, dim=1)
        query, key, value = (part.view(len(x), -1, head_dim) for part in parts)
        if layer.q_norm is not None and layer.k_norm is not None:
            query, key = self._norm_heads(query, layer.q_norm), self._norm_heads(key, layer.k_norm)
        query = store_kv(query, key, value, self._cos_sin, batch.positions, batch.kv_pages, batch.slot_mapping, index)
        window = self.config.sliding_windows[index]
        table, starts, contexts = batch.page_table, batch.query_start, batch.context_lens
        mixed = paged_attention(
            *(query, batch.kv_pages, table, starts, contexts, index, self._scale, window),
            decode_only=batch.decode_only,
            host=batch.host,
        )
        return _project(mixed.flatten(1), layer.o, OUTPUT, index, batch)

    def _norm_heads(self, heads: Tensor, weight: Tensor) -> Tensor:
        """heads: `[num_tokens, num_heads, head_dim]`, weight: `[head_dim]`; each head on its own."""
        # copies what may not be there yet
        settle()
        normed, _ = rms_norm(heads.reshape(-1, heads.shape[-1]), weight, self.config.rms_norm_eps)
        return normed.view(heads.shape)


def _mlp(x: Tensor, layer: LayerWeights, index: int, batch: ForwardBatch) -> Tensor:
    gated = silu_and_mul(_project(x, layer.gate_up, GATE_UP, index, batch))
    return _project(gated, layer.down, DOWN, index, batch)


def _project(x: Tensor, projection: Projection, modules: tuple[int, ...], layer: int, batch: ForwardBatch) -> Tensor:
    """`[num_tokens, sum(out_features)]`: one product for the whole batch, each token's adapter on top."""
    out = linear(x, projection.weight, projection.bias)
    adapters, segments = batch.adapters, batch.segments
    if adapters is not None:
        shrunk = lora_shrink(x, adapters, segments, layer, modules)
        sizes = projection.in_features, projection.out_features
        lora_expand(shrunk, adapters, segments, layer, modules, *sizes, out)
    return out
