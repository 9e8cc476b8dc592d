"""The client for programs with an event loop; the same calls as `loraplex.client`."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack

from loraplex import folders, requests, results
from loraplex.calls import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_SECONDS, calling, new_request_id
from loraplex.errors import LoraplexError
from loraplex.requests import ChatMessage, GenerateOptions, ProgressCallback, Prompt
from loraplex.results import Adapter, Delta, Generation, Model, PushResult
from loraplex.retries import Attempts, RetryPolicy
from loraplex.tls import Tls
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc, gateway_pb2, gateway_pb2_grpc

_Response = TypeVar("_Response")


class AsyncClient:
    """Talks to one gateway at `HOST:PORT` from one event loop. Every call raises `LoraplexError`.

    Connects on the first call. `close()`, or leaving the `async with` block, ends the streams that are still open. A
    call that is refused for now is tried again as `retries` says, but never once a part of the answer was delivered.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        retries: RetryPolicy | None = None,
        ca: str | Path | None = None,
        cert: str | Path | None = None,
        key: str | Path | None = None,
    ) -> None:
        """With `ca` (a PEM file, or `"system"` for the public authorities) the gateway must show a certificate of it
        for the name in `address`; `cert` and `key` are shown to a gateway that asks. Raises ValueError naming a file
        that cannot be used."""
        self.address = address
        self.retries = retries or RetryPolicy()
        self._channel = Tls(ca=ca, cert=cert, key=key).aio_channel(address)
        self._gateway = gateway_pb2_grpc.GatewayServiceStub(self._channel)
        self.adapters = AsyncAdapters(adapter_store_pb2_grpc.AdapterStoreServiceStub(self._channel), address)

    async def generate(
        self,
        prompt: Prompt,
        adapter: str = "",
        *,
        timeout: float | None = None,
        request_id: str = "",
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """As `Client.generate`. Cancelling the task cancels the request."""
        request = requests.generate_request(prompt, adapter, options)
        return results.generation(await self._answer(partial(self._gateway.Generate, request), timeout, request_id))

    def stream(
        self,
        prompt: Prompt,
        adapter: str = "",
        *,
        timeout: float | None = None,
        request_id: str = "",
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[Delta, None]:
        """As `Client.stream`: `async for delta in client.stream(...)`.

        A loop that leaves early should close the generator (`contextlib.aclosing`), which cancels the request; an
        abandoned one is cancelled when it is collected.
        """
        request = requests.generate_request(prompt, adapter, options)
        return self._deltas(request, timeout, request_id)

    async def _deltas(
        self, request: gateway_pb2.GenerateRequest, timeout: float | None, request_id: str
    ) -> AsyncGenerator[Delta, None]:
        attempts, request_id = self._attempts(timeout), request_id or new_request_id()
        while True:
            delivered = False
            try:
                with calling(self.address, request_id) as metadata:
                    left = attempts.timeout_seconds(time.monotonic())
                    call = self._gateway.GenerateStream(request, timeout=left, metadata=metadata)
                    try:
                        async for response in call:
                            delivered = True
                            for delta in results.deltas(response):
                                yield delta
                        return
                    finally:
                        call.cancel()
            except LoraplexError as error:
                if delivered:
                    raise
                await asyncio.sleep(attempts.wait_seconds(error, time.monotonic()))

    async def tokenize(
        self,
        prompt: str | Sequence[ChatMessage],
        adapter: str = "",
        *,
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
    ) -> tuple[int, ...]:
        """As `Client.tokenize`."""
        request = requests.tokenize_request(prompt, adapter)
        response = await self._answer(partial(self._gateway.Tokenize, request), timeout)
        return tuple(response.token_ids.ids)

    async def models(self, *, timeout: float | None = DEFAULT_TIMEOUT_SECONDS) -> tuple[Model, ...]:
        """As `Client.models`."""
        found: list[Model] = []
        request = gateway_pb2.ListModelsRequest()
        while True:
            response = await self._answer(partial(self._gateway.ListModels, request), timeout)
            found += map(results.model, response.models)
            if not response.next_page_token:
                return tuple(found)
            request.page_token = response.next_page_token

    async def _answer(
        self, call: Callable[..., Awaitable[_Response]], timeout: float | None, request_id: str = ""
    ) -> _Response:
        """Of a unary call, over as many attempts as it takes."""
        attempts, request_id = self._attempts(timeout), request_id or new_request_id()
        while True:
            try:
                with calling(self.address, request_id) as metadata:
                    return await call(timeout=attempts.timeout_seconds(time.monotonic()), metadata=metadata)
            except LoraplexError as error:
                await asyncio.sleep(attempts.wait_seconds(error, time.monotonic()))

    def _attempts(self, timeout: float | None) -> Attempts:
        return Attempts(self.retries, None if timeout is None else time.monotonic() + timeout)

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncAdapters:
    """The adapters behind a gateway: `client.adapters`. Every call raises `LoraplexError`; timeouts are in seconds."""

    def __init__(self, store: "adapter_store_pb2_grpc.AdapterStoreServiceAsyncStub", address: str) -> None:
        self._store = store
        self._address = address

    async def push(
        self,
        adapter_id: str,
        folder: str | Path,
        *,
        replace: bool = False,
        expected_version: str = "",
        on_progress: ProgressCallback | None = None,
        timeout: float | None = None,
    ) -> PushResult:
        """As `Adapters.push`. Files are read, and `on_progress` is called, on another thread."""
        upload = requests.Upload(
            adapter_id, Path(folder), replace=replace, expected_version=expected_version, on_progress=on_progress
        )
        with calling(self._address) as metadata:
            response = await self._store.UploadAdapter(_off_loop(upload), timeout=timeout, metadata=metadata)
        return results.push_result(response)

    async def list(self, *, timeout: float | None = DEFAULT_TIMEOUT_SECONDS) -> tuple[Adapter, ...]:
        """As `Adapters.list`."""
        found: tuple[Adapter, ...] = ()
        request = adapter_store_pb2.ListAdaptersRequest()
        while True:
            with calling(self._address) as metadata:
                response = await self._store.ListAdapters(request, timeout=timeout, metadata=metadata)
            found += tuple(map(results.adapter, response.adapters))
            if not response.next_page_token:
                return found
            request.page_token = response.next_page_token

    async def get(self, adapter_id: str, *, timeout: float | None = DEFAULT_TIMEOUT_SECONDS) -> Adapter:
        """As `Adapters.get`."""
        request = adapter_store_pb2.GetAdapterRequest(adapter_id=adapter_id)
        with calling(self._address) as metadata:
            return results.adapter(await self._store.GetAdapter(request, timeout=timeout, metadata=metadata))

    async def set_alias(
        self,
        adapter_id: str,
        adapter_version: str,
        *,
        expected_version: str = "",
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
    ) -> Adapter:
        """As `Adapters.set_alias`."""
        request = adapter_store_pb2.SetAliasRequest(
            adapter_id=adapter_id, adapter_version=adapter_version, expected_version=expected_version
        )
        with calling(self._address) as metadata:
            return results.adapter(await self._store.SetAlias(request, timeout=timeout, metadata=metadata))

    async def export(self, adapter_id: str, folder: str | Path, *, timeout: float | None = None) -> None:
        """As `Adapters.export`. Files are written on another thread."""
        request = adapter_store_pb2.ExportAdapterRequest(adapter_id=adapter_id)
        with calling(self._address) as metadata, closing(folders.FolderWriter(Path(folder))) as writer:
            async for response in self._store.ExportAdapter(request, timeout=timeout, metadata=metadata):
                await asyncio.to_thread(writer.add, response)
            writer.finish()

    async def delete(
        self, adapter_id: str, *, expected_version: str = "", timeout: float | None = DEFAULT_TIMEOUT_SECONDS
    ) -> str:
        """As `Adapters.delete`."""
        request = adapter_store_pb2.DeleteAdapterRequest(adapter_id=adapter_id, expected_version=expected_version)
        with calling(self._address) as metadata:
            response = await self._store.DeleteAdapter(request, timeout=timeout, metadata=metadata)
        return response.adapter_version


async def _off_loop(upload: requests.Upload) -> AsyncIterator[adapter_store_pb2.UploadAdapterRequest]:
    messages = upload.messages()
    while (message := await asyncio.to_thread(next, messages, None)) is not None:
        yield message
