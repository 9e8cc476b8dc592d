"""Which adapter is in which tier, as one sequence of changes over both of the worker's tiers."""

from gpu_worker.convert import to_host_resident, to_resident
from gpu_worker.host_tier import HostTier
from gpu_worker.memory.manager import MemoryManager
from loraplex.v1 import scheduler_pb2, types_pb2


class TierLog:
    """Numbers the changes of the pool and of the host tier, without gaps, from 1 on.

    An adapter's tier is the fastest that has it: while it is in pages its comings and goings in the host tier are no
    changes.
    """

    def __init__(self, memory: MemoryManager, host: HostTier) -> None:
        self._memory = memory
        self._host = host
        self._sequence = 0
        # adapter -> bytes of its packed string, for those in pages
        self._in_pages: dict[str, int] = {}
        self._adapter_bytes = 0

    def take_changes(self) -> list[scheduler_pb2.ResidencyDelta]:
        """Changes since the last call."""
        changed: list[scheduler_pb2.ResidentAdapter] = []
        for host in self._host.take_changes():
            if host.adapter_version not in self._in_pages:
                tier = types_pb2.TIER_HOST if host.here else types_pb2.TIER_STORE
                num_pages = self._memory.geometry.pages_for_bytes(host.num_bytes)
                changed.append(_adapter(host.adapter_version, tier, num_pages, host.num_bytes))
        for change in self._memory.take_changes():
            version = change.adapter_version
            num_bytes = self._in_pages.pop(version, 0)
            self._adapter_bytes -= num_bytes
            if change.resident:
                tier = types_pb2.TIER_PAGES
                resident = self._memory.adapters.get(version)
                num_bytes = resident.layout.total_bytes if resident else 0
                self._in_pages[version] = num_bytes
                self._adapter_bytes += num_bytes
            else:
                tier = types_pb2.TIER_HOST if version in self._host else types_pb2.TIER_STORE
            changed.append(_adapter(version, tier, change.num_pages, num_bytes))
        return [self._numbered(adapter) for adapter in changed]

    @property
    def num_in_pages(self) -> int:
        """Adapters in pages, as of the last `take_changes`."""
        return len(self._in_pages)

    def snapshot(self) -> list[scheduler_pb2.ResidentAdapter]:
        """Every adapter in pages, on its way there, or in the host tier."""
        in_pages = [to_resident(adapter) for adapter in self._memory.adapters]
        known = {adapter.adapter_version for adapter in in_pages}
        geometry = self._memory.geometry
        here = [to_host_resident(version, layout, geometry) for version, layout in self._host if version not in known]
        return in_pages + here

    def usage(self) -> scheduler_pb2.MemoryUsage:
        """Pages by kind, bytes by tier, and what is under way. Running totals throughout."""
        counts = self._memory.counts()
        return scheduler_pb2.MemoryUsage(
            total_pages=counts.total,
            free_pages=counts.free,
            quarantined_pages=counts.quarantined,
            loading_pages=counts.loading,
            kv_pages=counts.kv,
            prefix_pages=counts.prefix,
            adapter_pages=counts.adapters,
            evictable_pages=self._memory.evictable_pages,
            page_bytes=self._memory.geometry.page_bytes,
            host_adapter_bytes=self._host.num_bytes,
            host_limit_bytes=self._host.limit_bytes,
            host_adapters=len(self._host),
            adapter_bytes=self._adapter_bytes,
            fetching_adapters=self._host.num_wanted,
            loading_adapters=self._host.num_loading,
            pinned_adapters=self._memory.adapters.num_operator_pinned,
        )

    def _numbered(self, adapter: scheduler_pb2.ResidentAdapter) -> scheduler_pb2.ResidencyDelta:
        self._sequence += 1
        return scheduler_pb2.ResidencyDelta(sequence=self._sequence, adapter=adapter)


def _adapter(
    version: str, tier: "types_pb2.Tier.ValueType", num_pages: int, num_bytes: int
) -> scheduler_pb2.ResidentAdapter:
    return scheduler_pb2.ResidentAdapter(adapter_version=version, tier=tier, num_pages=num_pages, num_bytes=num_bytes)
