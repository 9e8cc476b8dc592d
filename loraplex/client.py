"""The client for programs without an event loop."""

from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import grpc

from loraplex import folders, requests, results
from loraplex.calls import CHANNEL_OPTIONS, DEFAULT_ADDRESS, DEFAULT_TIMEOUT_SECONDS, calling
from loraplex.requests import GenerateOptions, ProgressCallback, Prompt
from loraplex.results import Adapter, Delta, Generation, Model, PushResult
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc, gateway_pb2, gateway_pb2_grpc


class Client:
    """Talks to one gateway at `HOST:PORT`; may be shared by threads. Every call raises `LoraplexError`.

    Connects on the first call. `close()`, or leaving the `with` block, ends the streams that are still open.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
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

        `timeout` is in seconds; None waits as long as it takes. `request_id` names the request in logs and errors and
        is made up when empty. The options are those of `GenerateOptions`.
        """
        request = requests.generate_request(prompt, adapter, options)
        with calling(self.address, request_id) as metadata:
            response = self._gateway.Generate(request, timeout=timeout, metadata=metadata)
        return results.generation(response)

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
        with calling(self.address, request_id) as metadata:
            call = self._gateway.GenerateStream(request, timeout=timeout, metadata=metadata)
            try:
                for response in call:
                    yield from results.deltas(response)
            finally:
                call.cancel()

    def models(self, *, timeout: float | None = DEFAULT_TIMEOUT_SECONDS) -> tuple[Model, ...]:
        """The base model, then the adapters this caller may name, sorted by id. `timeout` is in seconds, for a page."""
        found: list[Model] = []
        request = gateway_pb2.ListModelsRequest()
        while True:
            with calling(self.address) as metadata:
                response = self._gateway.ListModels(request, timeout=timeout, metadata=metadata)
            found += map(results.model, response.models)
            if not response.next_page_token:
                return tuple(found)
            request.page_token = response.next_page_token

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
