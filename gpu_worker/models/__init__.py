"""One decoder for every supported family, described by a `ModelConfig` read from a Hugging Face checkpoint."""

from pathlib import Path

import torch

from common.base_model import read_config
from gpu_worker.models.config import ModelConfig
from gpu_worker.models.decoder import Decoder
from gpu_worker.models.weights import load_weights

__all__ = ["Decoder", "ModelConfig", "load_model"]

SERVING_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(model_dir: Path, dtype: str, device: str) -> Decoder:
    """Reads config.json and the safetensors files of a Hugging Face checkpoint folder onto `device`.

    dtype: "float32", "bfloat16" or "auto", which takes the checkpoint's own; a float16 checkpoint is then served in
    bfloat16, which takes as many bytes and cannot overflow.
    Raises ValueError, with a sentence that names the file, field or tensor, for everything that cannot be served.
    """
    config = ModelConfig.from_hf(read_config(model_dir))
    return Decoder(config, load_weights(model_dir, config, _serving_dtype(dtype, config.checkpoint_dtype), device))


def _serving_dtype(dtype: str, checkpoint_dtype: str) -> torch.dtype:
    if dtype == "auto":
        dtype = "bfloat16" if checkpoint_dtype == "float16" else checkpoint_dtype
    if dtype not in SERVING_DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; supported: {', '.join(SERVING_DTYPES)}, auto")
    return SERVING_DTYPES[dtype]
