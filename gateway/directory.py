"""Which adapters exist: the gateway's own copy of the adapter store's metadata, kept up by a watch."""

import asyncio
import logging
import random
import time
from collections.abc import Callable

import grpc

from common.errors import LoraplexError, NotFound, from_rpc_error
from gateway.link import FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc

LOOKUP_SECONDS = 5.0
# How long an adapter that the store does not know is not asked for again, and how many of them are remembered.
UNKNOWN_SECONDS = 1.0
MAX_UNKNOWN = 10_000

_log = logging.getLogger(__name__)
_Adapters = dict[tuple[str, str], adapter_store_pb2.Adapter]
# tenant, adapter_id, adapter_version
_Key = tuple[str, str, str]


class AdapterDirectory:
    """(tenant, adapter_id) -> Adapter. What is known keeps resolving while the store is away."""

    def __init__(self, channel: grpc.aio.Channel, on_change: Callable[[], None]) -> None:
        """`on_change` is called when `caught_up` becomes true."""
        self._store = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
        self._on_change = on_change
        self._adapters: _Adapters = {}
        self._unknown: dict[_Key, float] = {}
        self._asking: dict[_Key, asyncio.Task[adapter_store_pb2.Adapter]] = {}
        self._sequence = 0
        # Filled during a resync, so that the old copy serves until the new one is whole.
        self._incoming: _Adapters | None = None
        self._incoming_sequence = 0
        # Has known everything at least once.
        self.caught_up = False

    async def resolve(self, tenant: str, adapter_id: str, adapter_version: str = "") -> adapter_store_pb2.Adapter:
        """The adapter an id points to, or the given version of it. Asks the store once when it is not known here.

        Raises NotFound when the store does not know it either, Unavailable when the store does not answer.
        """
        known = self._adapters.get((tenant, adapter_id))
        if known is not None and adapter_version in ("", known.adapter_version):
            return known
        key = tenant, adapter_id, adapter_version
        if self._unknown.get(key, 0.0) > time.monotonic():
            raise _not_found(adapter_id, adapter_version)
        if key not in self._asking:
            self._asking[key] = task = asyncio.create_task(self._ask(key))
            task.add_done_callback(lambda done: self._answered(key, done))
        return await asyncio.shield(self._asking[key])

    def learn(self, adapter: adapter_store_pb2.Adapter) -> None:
        """What the store has just answered; the watch tells of it a little later."""
        # What the watch has passed, it knows better.
        known = self._adapters.get((adapter.tenant, adapter.adapter_id))
        if adapter.sequence > max(self._sequence, known.sequence if known else 0):
            self._adapters[adapter.tenant, adapter.adapter_id] = adapter

    def unlearn(self, tenant: str, adapter_id: str, adapter_version: str) -> None:
        """The store has just removed the id, which pointed to this version."""
        known = self._adapters.get((tenant, adapter_id))
        if known is not None and known.adapter_version == adapter_version:
            del self._adapters[tenant, adapter_id]

    async def _ask(self, key: _Key) -> adapter_store_pb2.Adapter:
        tenant, adapter_id, adapter_version = key
        request = adapter_store_pb2.GetAdapterRequest(
            tenant=tenant, adapter_id=adapter_id, adapter_version=adapter_version
        )
        try:
            adapter = await self._store.GetAdapter(request, timeout=LOOKUP_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                self._remember_unknown(key)
                raise _not_found(adapter_id, adapter_version) from None
            raise from_rpc_error(error, peer="adapter store") from None
        if not adapter_version:
            self.learn(adapter)
        return adapter

    def _answered(self, key: _Key, task: "asyncio.Task[adapter_store_pb2.Adapter]") -> None:
        del self._asking[key]
        if not task.cancelled():
            # Those who asked may have gone away; the failure is theirs.
            task.exception()

    def _remember_unknown(self, key: _Key) -> None:
        if len(self._unknown) >= MAX_UNKNOWN:
            del self._unknown[next(iter(self._unknown))]
        self._unknown[key] = time.monotonic() + UNKNOWN_SECONDS

    def of_tenant(self, tenant: str) -> list[adapter_store_pb2.Adapter]:
        """The tenant's adapters, sorted by id."""
        return [adapter for (owner, _), adapter in sorted(self._adapters.items()) if owner == tenant]

    async def run(self) -> None:
        """Watches the store until cancelled, going on after a break where it stopped."""
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            try:
                heard = await self._watch()
            except LoraplexError as error:
                heard = False
                _log.info("no watch of the adapter store: %s", error.message)
            except Exception:
                heard = False
                _log.exception("the watch of the adapter store failed")
            backoff = FIRST_BACKOFF_SECONDS if heard else min(2 * backoff, MAX_BACKOFF_SECONDS)
            await asyncio.sleep(backoff * random.uniform(0.5, 1.0))

    async def _watch(self) -> bool:
        """One watch until it breaks; whether the store said anything. Raises LoraplexError when it did not."""
        heard = False
        self._incoming = None
        call = self._store.WatchAdapters(adapter_store_pb2.WatchAdaptersRequest(after_sequence=self._sequence))
        try:
            async for response in call:
                heard = True
                self._take_in(response)
        except grpc.aio.AioRpcError as error:
            if not heard:
                raise from_rpc_error(error, peer="adapter store") from None
            _log.warning("the watch of the adapter store broke: %s", error.details())
        finally:
            call.cancel()
        return heard

    def _take_in(self, response: adapter_store_pb2.WatchAdaptersResponse) -> None:
        if response.resync:
            self._incoming, self._incoming_sequence = {}, 0
        for change in response.changes:
            if self._incoming is None:
                _apply(change, self._adapters)
                self._sequence = change.sequence
            else:
                _apply(change, self._incoming)
                self._incoming_sequence = max(self._incoming_sequence, change.sequence)
        if response.caught_up:
            self._finish_resync()
            if not self.caught_up:
                self.caught_up = True
                self._on_change()

    def _finish_resync(self) -> None:
        if self._incoming is not None:
            self._adapters, self._sequence = self._incoming, self._incoming_sequence
            self._incoming = None


def _apply(change: adapter_store_pb2.AdapterChange, adapters: _Adapters) -> None:
    which = change.put if change.HasField("put") else change.removal
    known = adapters.get((which.tenant, which.adapter_id))
    if known is not None and known.sequence > change.sequence:
        # Learnt from an answer that was faster than the watch.
        return
    if change.HasField("put"):
        adapters[which.tenant, which.adapter_id] = change.put
    else:
        adapters.pop((which.tenant, which.adapter_id), None)


def _not_found(adapter_id: str, adapter_version: str) -> NotFound:
    version = f" in version {adapter_version}" if adapter_version else ""
    return NotFound("ADAPTER_NOT_FOUND", f"adapter {adapter_id!r} is not known{version}")
