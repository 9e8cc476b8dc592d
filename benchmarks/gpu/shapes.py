"""Models and steps that the Triton kernels are compiled, tuned and timed for."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder, as its config.json has them; window 0 = full attention."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    window: int = 0

    @property
    def qkv(self) -> tuple[int, int, int]:
        kv = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, kv, kv


@dataclass(frozen=True, slots=True)
class StepShape:
    """`sequences` that bring `tokens` in all; `adapters` distinct adapters up to rank `max_lora_rank`."""

    sequences: int
    tokens: int
    adapters: int
    max_lora_rank: int

    @property
    def decode_only(self) -> bool:
        return self.tokens == self.sequences


MODELS = {
    "llama-3.1-8b": ModelShape(4096, 32, 32, 8, 128, 14336, 128256),
    "llama-3.2-1b": ModelShape(2048, 16, 32, 8, 64, 8192, 128256),
    "mistral-7b-v0.1": ModelShape(4096, 32, 32, 8, 128, 14336, 32000, window=4096),
    "qwen2.5-7b": ModelShape(3584, 28, 28, 4, 128, 18944, 152064),
}
STEPS = {
    "decode": StepShape(sequences=128, tokens=128, adapters=128, max_lora_rank=64),
    "prefill": StepShape(sequences=16, tokens=2048, adapters=16, max_lora_rank=64),
}
ARCHITECTURES = ("sm_80", "sm_90")
PAGE_SIZE, MAX_CONTEXT = 16, 8192
QKV = (0, 1, 2)

# For the interpreter: every size awkward, every run seconds.
TINY = ModelShape(hidden=96, layers=2, heads=6, kv_heads=2, head_dim=16, intermediate=80, vocab=61)
TINY_STEPS = {
    "decode": StepShape(sequences=3, tokens=3, adapters=2, max_lora_rank=8),
    "prefill": StepShape(sequences=2, tokens=19, adapters=2, max_lora_rank=24),
}
