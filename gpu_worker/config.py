"""Options of a worker: those of its engine, and those of its face."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

from common.config import ServiceConfig, option

_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str) -> int:
    """`512MiB`, `1.5GiB`, `100000000` -> bytes. Raises ValueError naming the accepted forms."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write for instance 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_share(text: str) -> float | None:
    """`90%` -> 0.9; None when `text` is not a share. Raises ValueError when it is one outside of 1 % to 100 %."""
    if not text.strip().endswith("%"):
        return None
    percent = float(text.strip()[:-1])
    if not 1 <= percent <= 100:
        raise ValueError(f"{text!r} is not a share of memory; write 1% to 100%")
    return percent / 100


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of the engine process of a worker."""

    model: Path = option(help="Hugging Face checkpoint folder of the base model")
    model_name: str = option("", help="name clients see for the base model; default: the folder's name")
    device: str = option("cpu", help="where the model runs", choices=("cpu", "cuda"))
    dtype: str = option("auto", help="dtype of weights and KV", choices=("auto", "float32", "bfloat16"))
    memory: str = option(
        "512MiB",
        help="bytes of the page pool, for KV and adapters together; on a GPU also a share of what is free, as in 90%%",
    )
    deterministic: bool = option(
        False, help="on a GPU: the same bits for a token whoever shares its batch, slower; on a CPU it is always so"
    )
    host_memory: str = option("2GiB", help="bytes of adapters at hand for the pool: mapped files, or pinned on CUDA")
    page_size: int = option(16, help="tokens of KV in a page")
    max_step_tokens: int = option(512, help="most tokens that one step computes; longer prompts run in chunks")
    max_sequences: int = option(384, help="most sequences of a step; as many more may wait for loads")
    threads: int = option(0, help="threads of the forward pass; 0 leaves the choice to torch")

    def __post_init__(self) -> None:
        if not 1 <= self.max_sequences <= self.max_step_tokens:
            raise ValueError(
                f"max_sequences is {self.max_sequences}; it must be 1 to max_step_tokens ({self.max_step_tokens}), "
                "or running sequences would wait for each other"
            )
        if self.page_size < 1:
            raise ValueError(f"page_size is {self.page_size}; it must be at least 1")
        parse_bytes(self.host_memory)
        if parse_share(self.memory) is None:
            parse_bytes(self.memory)
        elif self.device != "cuda":
            raise ValueError(f"memory is {self.memory}; a share needs --device cuda: write for instance 2GiB")


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(EngineConfig, ServiceConfig):
    """A worker: serves one replica of the base model with any number of LoRA adapters."""

    scheduler: str = option(help="HOST:PORT of the scheduler")
    adapter_store: str = option(help="HOST:PORT of the adapter store")
    cache_dir: Path = option(Path(".loraplex/cache"), help="folder for fetched adapters, of this worker alone")
    cache_size: str = option("10GiB", help="most bytes in the cache folder; the least valuable adapters go first")
    warm_seconds: float = option(20.0, help="most seconds a restarted worker spends on last time's adapters; 0 = none")
    store_volume: Path | None = option(
        None, help="the adapter store's data folder, where this worker sees it: adapters are mapped from there"
    )
    worker_id: str = option("", help="name of this worker; default: a random one")
    advertise_address: str = option("", help="HOST:PORT that gateways dial; default: the address listened on")
    vllm_metrics: bool = option(False, help="metrics with vLLM's names too, for routers and boards that ask for them")
    step_log: Path | None = option(None, help="file that gets one JSON line for each step")

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        ServiceConfig.__post_init__(self)
        parse_bytes(self.cache_size)


def engine_arguments(config: EngineConfig) -> list[str]:
    """The command line that gives an engine process the engine options of `config`."""
    # One word each: a value may begin with a dash.
    return [_argument(spec.name.replace("_", "-"), getattr(config, spec.name)) for spec in fields(EngineConfig)]


def _argument(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"
