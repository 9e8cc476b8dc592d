"""Peers of the gateway in a few lines each: they keep what they were told and say what a test wants said."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import grpc
from grpc_status import rpc_status
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from common.base_model import tokenizer_digest
from common.errors import AlreadyExists, to_status
from common.version import PROTOCOL_VERSION
from loraplex.v1 import (
    adapter_store_pb2,
    adapter_store_pb2_grpc,
    scheduler_pb2,
    scheduler_pb2_grpc,
    types_pb2,
    worker_pb2,
    worker_pb2_grpc,
)
from tests.adapter_store.redis_server import free_port

VERSION = "a" * 64
# Byte b is token b + 3; 0 is padding, 1 starts and 2 ends a sequence.
FIRST_BYTE = 3
VOCAB_SIZE = 259


def byte_tokenizer() -> Tokenizer:
    """One token a byte, and `<s>` in front of every text."""
    alphabet = {" ": "Ġ"}
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    assert characters[ord(" ")] == alphabet[" "]
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {characters[byte]: byte + FIRST_BYTE for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = encoder
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_tokenizer_files() -> dict[str, bytes]:
    return {"tokenizer.json": byte_tokenizer().to_str().encode()}


def token_ids(text: str) -> list[int]:
    return [byte + FIRST_BYTE for byte in text.encode()]


def identity(**changes: Any) -> types_pb2.ModelIdentity:
    geometry = types_pb2.ModelGeometry(vocab_size=VOCAB_SIZE, max_context_tokens=64, num_layers=2)
    model = types_pb2.ModelIdentity(
        name="tiny",
        base_fingerprint="base",
        tokenizer_digest=tokenizer_digest(byte_tokenizer_files()),
        geometry=geometry,
        protocol_version=PROTOCOL_VERSION,
    )
    model.MergeFrom(types_pb2.ModelIdentity(**changes))
    return model


def adapter(adapter_id: str, tenant: str = "default", sequence: int = 1) -> adapter_store_pb2.Adapter:
    return adapter_store_pb2.Adapter(
        tenant=tenant, adapter_id=adapter_id, adapter_version=VERSION, packed_bytes=4096, sequence=sequence
    )


# Of peers that are gone for good. A port is used again, as each that was ever taken is kept from others by a socket.
_idle_ports: set[int] = set()


class _Peer:
    """A server on a free port, with this object's methods as the handlers of a service.

    Nobody else gets the port while the peer is away for a moment.
    """

    def __init__(self, service: Any, add_to_server: Any) -> None:
        self.server = grpc.aio.server()
        self.port = 0
        # Of the stream to the gateway, which takes one message at a time.
        self.context: Any = None
        self._writing = asyncio.Lock()
        # What is not overridden answers UNIMPLEMENTED.
        servicer = service()
        for name in (name for name in vars(type(self)) if name[0].isupper()):
            setattr(servicer, name, getattr(self, name))
        add_to_server(servicer, self.server)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def write(self, message: Any) -> None:
        async with self._writing:
            await self.context.write(message)

    async def start(self) -> None:
        if not self.port:
            self.port = _idle_ports.pop() if _idle_ports else free_port()
        assert self.server.add_insecure_port(self.address) == self.port
        await self.server.start()

    def give_back_port(self) -> None:
        """The peer was stopped, and no other takes its place."""
        _idle_ports.add(self.port)

    async def stop(self) -> None:
        await self.server.stop(None)


class FakeScheduler(_Peer):
    """Lists `workers` to whoever connects."""

    def __init__(self, epoch: int = 1) -> None:
        super().__init__(
            scheduler_pb2_grpc.SchedulerServiceServicer, scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server
        )
        self.workers: list[scheduler_pb2.WorkerInfo] = []
        self.received: asyncio.Queue[scheduler_pb2.ConnectRequest] = asyncio.Queue()
        self.connected = asyncio.Event()
        self._epoch = epoch

    async def Connect(self, request_iterator: Any, context: Any) -> None:
        self.context = context
        assert (await anext(request_iterator)).hello.protocol_version == PROTOCOL_VERSION
        await self.say(welcome=scheduler_pb2.SchedulerWelcome(scheduler_epoch=self._epoch))
        await self.list_workers()
        self.connected.set()
        async for request in request_iterator:
            self.received.put_nowait(request)

    async def say(self, **message: Any) -> None:
        await self.write(scheduler_pb2.ConnectResponse(**message))

    async def list_workers(self) -> None:
        await self.say(workers=scheduler_pb2.WorkerList(workers=self.workers))

    async def submitted(self) -> types_pb2.RequestSpec:
        request = await self.received.get()
        assert request.HasField("submit"), request
        return request.submit.request

    async def aborted(self) -> scheduler_pb2.Abort:
        request = await self.received.get()
        assert request.HasField("abort"), request
        return request.abort

    async def place(self, key: types_pb2.RequestKey, worker_id: str = "w0") -> None:
        await self.say(placed=scheduler_pb2.Placed(key=key, worker_id=worker_id))

    async def refuse(self, key: types_pb2.RequestKey, error: types_pb2.RequestError) -> None:
        await self.say(refused=scheduler_pb2.Refused(key=key, error=error))


class FakeWorker(_Peer):
    """Welcomes gateways with its identity and its tokenizer."""

    def __init__(self, worker_id: str = "w0", files: Mapping[str, bytes] | None = None) -> None:
        super().__init__(worker_pb2_grpc.WorkerServiceServicer, worker_pb2_grpc.add_WorkerServiceServicer_to_server)
        self.worker_id = worker_id
        self.files = byte_tokenizer_files() if files is None else files
        self.model = identity(tokenizer_digest=tokenizer_digest(self.files))
        self.hellos: asyncio.Queue[worker_pb2.AttachHello] = asyncio.Queue()
        self.aborts: asyncio.Queue[scheduler_pb2.Abort] = asyncio.Queue()

    @property
    def info(self) -> scheduler_pb2.WorkerInfo:
        ready = scheduler_pb2.WORKER_STATE_READY
        return scheduler_pb2.WorkerInfo(worker_id=self.worker_id, address=self.address, state=ready, model=self.model)

    async def Attach(self, request_iterator: Any, context: Any) -> None:
        self.context = context
        hello = (await anext(request_iterator)).hello
        welcome = worker_pb2.AttachWelcome(worker_id=self.worker_id, model=self.model)
        if hello.known_tokenizer_digest != self.model.tokenizer_digest:
            for name, content in self.files.items():
                welcome.tokenizer_files.add(name=name, content=content)
        await self.write(worker_pb2.AttachResponse(welcome=welcome))
        self.hellos.put_nowait(hello)
        async for request in request_iterator:
            self.aborts.put_nowait(request.abort)

    async def say(self, *sequences: worker_pb2.SequenceTokens) -> None:
        batch = worker_pb2.TokenBatch(worker_id=self.worker_id, sequences=sequences)
        await self.write(worker_pb2.AttachResponse(tokens=batch))


def tokens(
    key: types_pb2.RequestKey, token_offset: int, ids: Sequence[int], *, finish: bool = False, **fields: Any
) -> worker_pb2.SequenceTokens:
    """What a worker says about one output; with `finish` the last of it."""
    if finish:
        fields.setdefault("finish_reason", types_pb2.FINISH_REASON_LENGTH)
        fields.setdefault("usage", types_pb2.Usage(completion_tokens=token_offset + len(ids)))
    return worker_pb2.SequenceTokens(key=key, token_offset=token_offset, token_ids=ids, **fields)


class FakeStore(_Peer):
    """Knows `adapters`; tells watchers about them and about whatever `announce` is given."""

    def __init__(self) -> None:
        super().__init__(
            adapter_store_pb2_grpc.AdapterStoreServiceServicer,
            adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server,
        )
        self.adapters = [adapter("zebra", sequence=1), adapter("alpha", sequence=2)]
        self.asked: list[Any] = []
        self.uploaded: list[adapter_store_pb2.UploadAdapterRequest] = []
        self.watches: asyncio.Queue[adapter_store_pb2.WatchAdaptersRequest] = asyncio.Queue()
        self._news: asyncio.Queue[adapter_store_pb2.WatchAdaptersResponse] = asyncio.Queue()

    def announce(self, *changes: adapter_store_pb2.AdapterChange, **fields: bool) -> None:
        self._news.put_nowait(adapter_store_pb2.WatchAdaptersResponse(changes=changes, **fields))

    async def WatchAdapters(self, request: Any, context: Any) -> AsyncIterator[Any]:
        missed = [known for known in self.adapters if known.sequence > request.after_sequence]
        changes = [adapter_store_pb2.AdapterChange(sequence=known.sequence, put=known) for known in missed]
        yield adapter_store_pb2.WatchAdaptersResponse(changes=changes, caught_up=True)
        self.watches.put_nowait(request)
        while True:
            yield await self._news.get()

    async def GetAdapter(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        for known in self.adapters:
            if (known.tenant, known.adapter_id) == (request.tenant, request.adapter_id):
                return known
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such adapter")

    async def UploadAdapter(self, request_iterator: Any, context: Any) -> Any:
        async for request in request_iterator:
            self.uploaded.append(request)
            if request.header.adapter_id == "taken":
                async for _ in request_iterator:
                    pass
                error = to_status(AlreadyExists("ADAPTER_EXISTS", "the id is taken"))
                await context.abort_with_status(rpc_status.to_status(error))
        return adapter_store_pb2.UploadAdapterResponse(adapter=adapter("new", sequence=3), created=True)

    async def ExportAdapter(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.asked.append(request)
        yield adapter_store_pb2.ExportAdapterResponse(adapter=adapter(request.adapter_id))

    async def ListAdapters(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return adapter_store_pb2.ListAdaptersResponse(adapters=self.adapters)

    async def DeleteAdapter(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return adapter_store_pb2.DeleteAdapterResponse(adapter_version=VERSION)

    async def SetAlias(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return adapter("alpha")
