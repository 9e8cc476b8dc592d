"""Answers operators between two steps: what is resident, pin, unpin, evict, prefetch."""

from common.errors import FailedPrecondition, LoraplexError, NotFound, to_proto
from gpu_worker.batching import Batcher
from gpu_worker.host_tier import HostTier
from gpu_worker.memory.adapter_cache import AdapterInUseError
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.prefetch import Prefetcher
from gpu_worker.request_limits import RequestLimits
from gpu_worker.tier_log import TierLog
from loraplex.v1 import engine_pb2


class MemoryCalls:
    """Changes residency in the memory manager; requests that are here come first."""

    def __init__(
        self,
        batcher: Batcher,
        memory: MemoryManager,
        host: HostTier,
        prefetcher: Prefetcher,
        tiers: TierLog,
        limits: RequestLimits,
    ) -> None:
        self._batcher = batcher
        self._memory = memory
        self._host = host
        self._prefetcher = prefetcher
        self._tiers = tiers
        self._limits = limits

    def reply(self, command: engine_pb2.MemoryCommand) -> engine_pb2.MemoryReply:
        """Does what an operator asked, or says why not, and what memory looks like then."""
        reply = engine_pb2.MemoryReply(
            call_id=command.call_id,
            running_sequences=self._batcher.num_running,
            waiting_sequences=self._batcher.num_waiting,
        )
        try:
            reply.freed_pages = self._change_residency(command)
        except KeyError:
            error: LoraplexError = NotFound("ADAPTER_NOT_RESIDENT", "the adapter is not resident on this worker")
            reply.error.CopyFrom(to_proto(error))
        except AdapterInUseError as problem:
            reply.error.CopyFrom(to_proto(FailedPrecondition("ADAPTER_IN_USE", str(problem))))
        reply.memory.CopyFrom(self._tiers.usage())
        reply.resident_adapters = self._tiers.num_in_pages
        reply.pending_prefetches = self._prefetcher.num_hints + self._host.num_loading
        if command.HasField("list_resident"):
            reply.resident.extend(self._tiers.snapshot())
        return reply

    def _change_residency(self, command: engine_pb2.MemoryCommand) -> int:
        """Pins, unpins or evicts; returns pages freed. Raises KeyError or AdapterInUseError."""
        kind = command.WhichOneof("command")
        if kind == "evict":
            return self._memory.evict(command.evict.adapter_version)
        if kind == "pin":
            self._pin(command.pin.adapter_version)
        elif kind == "unpin":
            self._memory.adapters.set_operator_pin(command.unpin.adapter_version, pinned=False)
        elif kind == "prefetch":
            self._prefetcher.hint(command.prefetch.tenant, command.prefetch.adapter_version)
        return 0

    def _pin(self, adapter_version: str) -> None:
        """Refused when a request that is here could then never get its pages: it would hold up everybody behind it."""
        self._memory.adapters.set_operator_pin(adapter_version, pinned=True)
        for sequence in self._batcher:
            layout = self._host.layout(sequence.adapter_version)
            if error := self._limits.never_fits(sequence, layout.total_bytes if layout else 0):
                self._memory.adapters.set_operator_pin(adapter_version, pinned=False)
                raise AdapterInUseError(f"with this pin a request that is here could never run: {error.message}")
