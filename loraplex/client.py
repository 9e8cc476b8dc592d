"""The client for programs without an event loop."""

import time
from collections.abc import Callable, Generator, Sequence
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


class Client:
    """Talks to one gateway at `HOST:PORT`; may be shared by threads. Every call raises `LoraplexError`.

    Connects on the first call. `close()`, or leaving the `with` block, ends the streams that are still open. A call
    that is refused for now is tried again as `retries` says, but never once a part of the answer was delivered.
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
        self._channel = Tls(ca=ca, cert=cert, key=key).channel(address)
        self._gateway = gateway_pb2_grpc.GatewayServiceStub(self._channel)
        self.adapters = Adapters(adapter_store_pb2_grpc.AdapterStoreServiceStub(self._channel), address)

    def generate(
        self,
        prompt: Prompt,
        adapter: str = "",
        *,
        timeout: float | None = None,
        request_id: str = "",
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """The whole answer to `prompt` by an adapter, or by the base model when `adapter` is empty.

        A prompt is text, token ids, or the messages of a conversation: `[{"role": "user", "content": "Hi"}]`.
        `timeout` is in seconds, for all attempts together; None waits as long as it takes. `request_id` names the
        request in logs and errors and is made up when empty. The options are those of `GenerateOptions`.
        """
        request = requests.generate_request(prompt, adapter, options)
        return results.generation(self._answer(partial(self._gateway.Generate, request), timeout, request_id))

    def stream(
        self,
        prompt: Prompt,
        adapter: str = "",
        *,
        timeout: float | None = None,
        request_id: str = "",
        **options: Unpack[GenerateOptions],
    ) -> Generator[Delta, None, None]:
        """As `generate`, in pieces as they are produced. The request is sent by the first `next()`.

        Closing the generator cancels the request. An error after the first delta leaves the deltas so far valid.
        """
        request = requests.generate_request(prompt, adapter, options)
        return self._deltas(request, timeout, request_id)

    def _deltas(
        self, request: gateway_pb2.GenerateRequest, timeout: float | None, request_id: str
    ) -> Generator[Delta, None, None]:
        attempts, request_id = self._attempts(timeout), request_id or new_request_id()
        while True:
            delivered = False
            try:
                with calling(self.address, request_id) as metadata:
                    left = attempts.timeout_seconds(time.monotonic())
                    call = self._gateway.GenerateStream(request, timeout=left, metadata=metadata)
                    try:
                        for response in call:
                            delivered = True
                            yield from results.deltas(response)
                        return
                    finally:
                        call.cancel()
            except LoraplexError as error:
                if delivered:
                    raise
                time.sleep(attempts.wait_seconds(error, time.monotonic()))

    def tokenize(
        self,
        prompt: str | Sequence[ChatMessage],
        adapter: str = "",
        *,
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
    ) -> tuple[int, ...]:
        """The token ids that `generate` would use for a text or a conversation."""
        request = requests.tokenize_request(prompt, adapter)
        return tuple(self._answer(partial(self._gateway.Tokenize, request), timeout).token_ids.ids)

    def models(self, *, timeout: float | None = DEFAULT_TIMEOUT_SECONDS) -> tuple[Model, ...]:
        """The base model, then the adapters this caller may name, sorted by id. `timeout` is in seconds, for a page."""
        found: list[Model] = []
        request = gateway_pb2.ListModelsRequest()
        while True:
            response = self._answer(partial(self._gateway.ListModels, request), timeout)
            found += map(results.model, response.models)
            if not response.next_page_token:
                return tuple(found)
            request.page_token = response.next_page_token

    def _answer(self, call: Callable[..., _Response], timeout: float | None, request_id: str = "") -> _Response:
        """Of a unary call, over as many attempts as it takes."""
        attempts, request_id = self._attempts(timeout), request_id or new_request_id()
        while True:
            try:
                with calling(self.address, request_id) as metadata:
                    return call(timeout=attempts.timeout_seconds(time.monotonic()), metadata=metadata)
            except LoraplexError as error:
                time.sleep(attempts.wait_seconds(error, time.monotonic()))

    def _attempts(self, timeout: float | None) -> Attempts:
        return Attempts(self.retries, None if timeout is None else time.monotonic() + timeout)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Adapters:
    """The adapters behind a gateway: `client.adapters`. Every call raises `LoraplexError`; timeouts are in seconds."""

    def __init__(self, store: adapter_store_pb2_grpc.AdapterStoreServiceStub, address: str) -> None:
        self._store = store
        self._address = address

    def push(
        self,
        adapter_id: str,
        folder: str | Path,
        *,
        replace: bool = False,
        expected_version: str = "",
        on_progress: ProgressCallback | None = None,
        plain_files: bool = False,
        timeout: float | None = None,
    ) -> PushResult:
        """Uploads a PEFT folder: `adapter_config.json`, `adapter_model.safetensors`, and `chat_template.jinja` if any.

        The same bytes again are a no-op. Other bytes under an id that exists raise AlreadyExists, unless `replace` is
        set or `expected_version` is the digest the id points to now (Conflict when it is not).
        `on_progress(sent_bytes, total_bytes)` is called after each chunk, on another thread. `plain_files` refuses
        links, special and sparse files, and weights in formats that run code: for folders that others made.
        """
        if plain_files:
            folders.check_folder(Path(folder))
        upload = requests.Upload(
            adapter_id,
            Path(folder),
            replace=replace,
            expected_version=expected_version,
            on_progress=on_progress,
            **({"open_file": folders.open_plain} if plain_files else {}),
        )
        with calling(self._address) as metadata:
            response = self._store.UploadAdapter(upload.messages(), timeout=timeout, metadata=metadata)
        return results.push_result(response)

    def list(self, *, timeout: float | None = DEFAULT_TIMEOUT_SECONDS) -> tuple[Adapter, ...]:
        """Every adapter of this caller, sorted by id."""
        found: tuple[Adapter, ...] = ()
        request = adapter_store_pb2.ListAdaptersRequest()
        while True:
            with calling(self._address) as metadata:
                response = self._store.ListAdapters(request, timeout=timeout, metadata=metadata)
            found += tuple(map(results.adapter, response.adapters))
            if not response.next_page_token:
                return found
            request.page_token = response.next_page_token

    def get(self, adapter_id: str, *, timeout: float | None = DEFAULT_TIMEOUT_SECONDS) -> Adapter:
        """What the id points to now. Raises NotFound."""
        request = adapter_store_pb2.GetAdapterRequest(adapter_id=adapter_id)
        with calling(self._address) as metadata:
            return results.adapter(self._store.GetAdapter(request, timeout=timeout, metadata=metadata))

    def set_alias(
        self,
        adapter_id: str,
        adapter_version: str,
        *,
        expected_version: str = "",
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
    ) -> Adapter:
        """Points the id to a version this caller has under any id. `expected_version` is what it points to now, empty
        when it must not exist; Conflict when that is not so. Raises NotFound for the version."""
        request = adapter_store_pb2.SetAliasRequest(
            adapter_id=adapter_id, adapter_version=adapter_version, expected_version=expected_version
        )
        with calling(self._address) as metadata:
            return results.adapter(self._store.SetAlias(request, timeout=timeout, metadata=metadata))

    def export(self, adapter_id: str, folder: str | Path, *, timeout: float | None = None) -> None:
        """Writes the adapter's files, as they were uploaded, to a folder that is new or empty. Raises NotFound."""
        request = adapter_store_pb2.ExportAdapterRequest(adapter_id=adapter_id)
        with calling(self._address) as metadata, closing(folders.FolderWriter(Path(folder))) as writer:
            for response in self._store.ExportAdapter(request, timeout=timeout, metadata=metadata):
                writer.add(response)
            writer.finish()

    def delete(
        self, adapter_id: str, *, expected_version: str = "", timeout: float | None = DEFAULT_TIMEOUT_SECONDS
    ) -> str:
        """Removes the id at once; running requests finish. Returns the digest it pointed to. Raises NotFound."""
        request = adapter_store_pb2.DeleteAdapterRequest(adapter_id=adapter_id, expected_version=expected_version)
        with calling(self._address) as metadata:
            return self._store.DeleteAdapter(request, timeout=timeout, metadata=metadata).adapter_version
