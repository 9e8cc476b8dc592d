"""One model replica: a gRPC face, an engine process, and the memory manager between KV cache and adapters."""
