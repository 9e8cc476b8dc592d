"""Between the wire and the engine's plain values."""

from collections.abc import Sequence as Items

from gpu_worker.memory.adapter_cache import ResidentAdapter
from gpu_worker.memory.manager import MemoryManager, ResidencyChange
from gpu_worker.sequence import SamplingParams, Sequence, SequenceState, StoppingParams
from loraplex.v1 import scheduler_pb2, types_pb2

_STATES = {
    SequenceState.WAITING: scheduler_pb2.REQUEST_STATE_WAITING,
    SequenceState.LOADING: scheduler_pb2.REQUEST_STATE_RUNNING,
    SequenceState.RUNNING: scheduler_pb2.REQUEST_STATE_RUNNING,
    SequenceState.FINISHED: scheduler_pb2.REQUEST_STATE_FINISHED,
}


def sequence_id(key: types_pb2.RequestKey) -> str:
    return f"{key.request_id}/{key.attempt}"


def to_sequence(offer: scheduler_pb2.Offer, eos_token_ids: Items[int]) -> Sequence:
    """A sequence that waits for its first pages."""
    request = offer.request
    stops = set(request.stopping.stop_token_ids)
    if not request.stopping.ignore_eos:
        stops.update(eos_token_ids)
    return Sequence(
        request_id=request.key.request_id,
        attempt=request.key.attempt,
        tenant=request.key.tenant,
        gateway_id=request.gateway_id,
        order_key=offer.order_key,
        prompt_token_ids=list(request.prompt_token_ids),
        output_token_ids=list(request.delivered_token_ids),
        num_delivered=len(request.delivered_token_ids),
        sampling=SamplingParams(request.sampling.temperature, request.sampling.seed),
        stopping=StoppingParams(request.stopping.max_tokens, request.stopping.min_tokens, frozenset(stops)),
        adapter_version=request.adapter_version,
    )


def to_key(sequence: Sequence) -> types_pb2.RequestKey:
    return types_pb2.RequestKey(request_id=sequence.request_id, attempt=sequence.attempt, tenant=sequence.tenant)


def to_cost(sequence: Sequence, now: float) -> types_pb2.Usage:
    """Tokens and seconds of a sequence that ends `now`, on the clock of its timings; a phase not reached costs 0."""
    timings = sequence.timings
    admitted = timings.admitted or now
    loaded = timings.loaded or (now if timings.admitted else admitted)
    first_token = timings.first_token or (now if timings.loaded else loaded)
    return types_pb2.Usage(
        prompt_tokens=len(sequence.prompt_token_ids),
        completion_tokens=len(sequence.output_token_ids),
        queue_seconds=admitted - timings.offered,
        load_seconds=loaded - admitted,
        prefill_seconds=first_token - loaded,
        decode_seconds=now - first_token,
    )


def to_progress(sequence: Sequence) -> scheduler_pb2.RequestProgress:
    state = _STATES[sequence.state]
    if sequence.state is SequenceState.WAITING and sequence.preemptions:
        state = scheduler_pb2.REQUEST_STATE_PREEMPTED
    return scheduler_pb2.RequestProgress(
        key=to_key(sequence),
        state=state,
        adapter_version=sequence.adapter_version,
        computed_tokens=sequence.computed_tokens,
        generated_tokens=len(sequence.output_token_ids),
    )


def to_resident(adapter: ResidentAdapter) -> scheduler_pb2.ResidentAdapter:
    return scheduler_pb2.ResidentAdapter(
        adapter_version=adapter.adapter_version,
        tier=types_pb2.TIER_HOST if adapter.loading else types_pb2.TIER_PAGES,
        num_pages=len(adapter.pages),
        pins=adapter.sequence_pins + adapter.operator_pinned,
    )


def to_delta(change: ResidencyChange) -> scheduler_pb2.ResidencyDelta:
    adapter = scheduler_pb2.ResidentAdapter(
        adapter_version=change.adapter_version,
        # An evicted adapter is still in the host tier.
        tier=types_pb2.TIER_PAGES if change.resident else types_pb2.TIER_HOST,
        num_pages=change.num_pages,
    )
    return scheduler_pb2.ResidencyDelta(sequence=change.sequence, adapter=adapter)


def to_usage(memory: MemoryManager, host_adapter_bytes: int) -> scheduler_pb2.MemoryUsage:
    counts = memory.counts()
    return scheduler_pb2.MemoryUsage(
        total_pages=counts.total,
        free_pages=counts.free,
        quarantined_pages=counts.quarantined,
        loading_pages=counts.loading,
        kv_pages=counts.kv,
        prefix_pages=counts.prefix,
        adapter_pages=counts.adapters,
        evictable_pages=memory.evictable_pages,
        page_bytes=memory.geometry.page_bytes,
        host_adapter_bytes=host_adapter_bytes,
    )
