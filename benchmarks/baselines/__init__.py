"""Other ways to serve many adapters, each our own engine with one part replaced; never imported by what is served.

- `padded_bmm`: LoRA products as batched matrix products over adapters padded to one rank, instead of true ranks.
- `divided`: memory divided for good between KV and adapters; and slots of one size for every adapter, as vLLM reserves.
- `merging`: one adapter at a time, added into the base weights.

The scheduler, the batcher, the model and the trace are the same; nothing waits on purpose and nothing is simulated.
"""
