"""The engine process: `python -m gpu_worker.engine_main --pipe FD ...`, started by the worker's face."""

import logging
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import NoReturn

import torch

from common import base_model
from common.config import option, parse
from common.errors import FailedPrecondition, Internal, LoraplexError, to_proto
from common.logs import set_up_logs
from common.version import PROTOCOL_VERSION
from common.wire import dtype_to_proto
from gpu_worker.batch import Forward, ForwardBatch
from gpu_worker.commands import Arrival
from gpu_worker.config import EngineConfig, parse_bytes, parse_share
from gpu_worker.engine import Engine, EngineLimits
from gpu_worker.frames import encode, read_command
from gpu_worker.host_storage import HostStorage, MappedFiles, PinnedArena
from gpu_worker.host_tier import HostTier
from gpu_worker.loader import Loader
from gpu_worker.loan import Loan
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.memory.pool import PagePool
from gpu_worker.model_runner import ModelRunner, Queue, at_once
from gpu_worker.models import Decoder, load_model
from gpu_worker.models.recorded import RecordedDecoder
from gpu_worker.tier_log import TierLog
from kernels.cpu.memory import keep_freed_memory
from kernels.gpu import tiles
from loraplex.v1 import engine_pb2, scheduler_pb2, types_pb2

_log = logging.getLogger(__name__)
Inbox = SimpleQueue[Arrival | None]


@dataclass(frozen=True, kw_only=True)
class EngineProcessConfig(EngineConfig):
    """An engine; the worker's face starts it."""

    pipe: int = option(help="file descriptor of the socket to the face")
    log_level: str = option("info", help="lowest level that is logged")


class Lending:
    """A decoder that lends the engine's state while it computes."""

    def __init__(self, forward: Forward, loan: Loan) -> None:
        self._forward = forward
        self._loan = loan

    @property
    def dtype(self) -> torch.dtype:
        return self._forward.dtype

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        with self._loan.lend():
            return self._forward.forward(batch)


def build(
    config: EngineConfig, inbox: Inbox, *, overlap: bool | None = None, queue: Queue = at_once
) -> tuple[Engine, engine_pb2.EngineReady]:
    """Loads the model, sizes the pool, and warms up.

    overlap: handle a step while the next one runs; None = where a device runs it. queue: where steps run.
    Raises ValueError or OSError with a sentence when the checkpoint or the options are no good.
    """
    keep_freed_memory()
    hf_config = base_model.read_config(config.model)
    _check_device(config)
    if config.device == "cuda":
        # Before anything runs there: it decides which kernels do.
        tiles.set_deterministic(config.deterministic)
    model = load_model(config.model, config.dtype, config.device)
    sizes = model.config.geometry
    element_bytes = torch.empty(0, dtype=model.dtype).element_size()
    geometry = PageGeometry(sizes.num_layers, sizes.num_kv_heads, sizes.head_dim, element_bytes, config.page_size)
    num_pages = _pool_bytes(config, model, geometry) // geometry.page_bytes
    if num_pages < 2:
        raise ValueError(
            f"memory is {config.memory}; one page of {config.page_size} tokens takes {geometry.page_bytes} bytes "
            "and at least two are needed"
        )
    memory = MemoryManager(geometry, num_pages)
    pool, forward = _place(config, model, geometry, num_pages)
    eos = base_model.eos_token_ids(config.model, hf_config)
    limits = EngineLimits(config.max_step_tokens, config.max_sequences, sizes.max_context_tokens, sizes.vocab_size, eos)
    host_bytes = parse_bytes(config.host_memory)
    host = HostTier(geometry, num_pages, sizes.module_shapes, _storage(config, geometry, host_bytes), host_bytes)
    loan = Loan()
    runner = ModelRunner(Lending(forward, loan), memory, pool, "cpu", sizes.vocab_size, queue)
    overlaps = config.device == "cuda" if overlap is None else overlap
    engine = Engine(runner, memory, Loader(pool, inbox.put), host, limits, loan, overlap=overlaps)
    engine.warm_up()
    dtype = dtype_to_proto(str(model.dtype).removeprefix("torch."))
    return engine, engine_pb2.EngineReady(
        model=_identity(config, sizes, eos, dtype),
        capacity=scheduler_pb2.WorkerCapacity(
            num_pages=num_pages,
            page_bytes=geometry.page_bytes,
            page_size=config.page_size,
            max_step_tokens=config.max_step_tokens,
            max_sequences=config.max_sequences,
        ),
        memory=TierLog(memory, host).usage(),
    )


def _check_device(config: EngineConfig) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        without = f"PyTorch {torch.__version__} was built without it: install its CUDA build"
        why = "no GPU answers: look at what nvidia-smi says" if torch.version.cuda else without
        raise ValueError(f"device is cuda, but {why}, or use --device cpu")


def _storage(config: EngineConfig, geometry: PageGeometry, limit_bytes: int) -> HostStorage:
    return PinnedArena(geometry, limit_bytes, pinned=True) if config.device == "cuda" else MappedFiles()


def _pool_bytes(config: EngineConfig, model: Decoder, geometry: PageGeometry) -> int:
    share = parse_share(config.memory)
    if share is None:
        wanted = parse_bytes(config.memory)
        if config.device == "cpu" and wanted > (there := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
            raise ValueError(f"memory is {config.memory}; this machine has {there / 2**30:.1f} GiB in all")
        return wanted
    from gpu_worker.cuda.place import profiled_pool_bytes

    return profiled_pool_bytes(model, geometry, share, config.max_step_tokens, config.max_sequences)


def _place(config: EngineConfig, model: Decoder, geometry: PageGeometry, num_pages: int) -> tuple[PagePool, Forward]:
    """The pool, and what runs batches whose indices are on the CPU."""
    if config.device == "cpu":
        return PagePool(geometry, num_pages, "cpu"), RecordedDecoder(model)
    from gpu_worker.cuda.place import place

    return place(model, geometry, num_pages, config.max_sequences)


def _identity(
    config: EngineConfig,
    sizes: base_model.BaseGeometry,
    eos_token_ids: tuple[int, ...],
    dtype: "types_pb2.Dtype.ValueType",
) -> types_pb2.ModelIdentity:
    return types_pb2.ModelIdentity(
        name=config.model_name or Path(config.model).resolve().name,
        base_fingerprint=base_model.fingerprint(config.model),
        tokenizer_digest=base_model.tokenizer_digest(base_model.tokenizer_files(config.model)),
        geometry=types_pb2.ModelGeometry(
            num_layers=sizes.num_layers,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            vocab_size=sizes.vocab_size,
            max_context_tokens=sizes.max_context_tokens,
            dtype=dtype,
        ),
        eos_token_ids=eos_token_ids,
        protocol_version=PROTOCOL_VERSION,
    )


def _read_commands(pipe: socket.socket, inbox: Inbox, engine: Engine) -> None:
    try:
        while (command := read_command(pipe)) is not None:
            receive(command, inbox, engine)
    finally:
        inbox.put(None)


def receive(command: engine_pb2.EngineCommand, inbox: Inbox, engine: Engine) -> None:
    """Takes in a command of the face, on any thread: its offers' adapters start to climb at once."""
    inbox.put(command)
    if offers := [one.offer for one in command.scheduler_commands.commands if one.HasField("offer")]:
        engine.foresee(offers)


def arrivals(inbox: Inbox, engine: Engine) -> list[Arrival] | None:
    """Everything that has arrived, after waiting for the first when the engine has nothing to do.

    None when the face says stop or is gone.
    """
    arrived, wait = list[Arrival](), not engine.busy
    while wait or not inbox.empty():
        arrival = inbox.get()
        if arrival is None or (isinstance(arrival, engine_pb2.EngineCommand) and arrival.HasField("shutdown")):
            return None
        arrived.append(arrival)
        wait = False
    return [*arrived, *engine.finished_loads()]


def serve(engine: Engine, pipe: socket.socket, inbox: Inbox) -> None:
    """Steps until the face says stop or is gone."""
    while (arrived := arrivals(inbox, engine)) is not None:
        for event in engine.step(arrived):
            pipe.sendall(encode(event))
        if not engine.busy:
            engine.check_integrity()


def main() -> None:
    config = parse(EngineProcessConfig, "python -m gpu_worker.engine_main")
    set_up_logs("engine", config.log_level)
    if config.threads:
        torch.set_num_threads(config.threads)
    # A Ctrl-C in the terminal is for the face, which finishes its streams first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = socket.socket(fileno=config.pipe)
    inbox: Inbox = SimpleQueue()
    try:
        engine, ready = build(config, inbox)
    except (OSError, ValueError) as problem:
        _fail(pipe, FailedPrecondition("ENGINE_CANNOT_START", str(problem)))
    threading.Thread(target=_read_commands, args=(pipe, inbox, engine), name="pipe-reader", daemon=True).start()
    pipe.sendall(encode(engine_pb2.EngineEvent(ready=ready)))
    try:
        serve(engine, pipe, inbox)
    except BrokenPipeError:
        _log.info("the face is gone")
    except Exception:
        _log.exception("the engine failed")
        _fail(pipe, Internal("ENGINE_FAILED", "the engine failed"))


def _fail(pipe: socket.socket, error: LoraplexError) -> NoReturn:
    pipe.sendall(encode(engine_pb2.EngineEvent(failed=engine_pb2.EngineFailed(error=to_proto(error)))))
    sys.exit(1)


if __name__ == "__main__":
    main()
