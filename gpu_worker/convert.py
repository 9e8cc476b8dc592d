"""Between the wire and the engine's plain values."""

from collections.abc import Sequence as Items

from common.packing import PackedLayout
from gpu_worker.memory.adapter_cache import ResidentAdapter
from gpu_worker.memory.geometry import PageGeometry
from gpu_worker.sequence import SamplingParams, Sequence, SequenceState, StoppingParams, TokenLogprobs
from loraplex.v1 import scheduler_pb2, types_pb2

# Seeds of neighbouring outputs are far apart: the golden ratio in 64 bits (Knuth, TAOCP 6.4).
_SEED_STEP = 0x9E3779B97F4A7C15


def attempt_id(key: types_pb2.RequestKey) -> str:
    return f"{key.tenant}/{key.request_id}/{key.attempt}"


def to_sequences(offer: scheduler_pb2.Offer, eos_token_ids: Items[int], max_context_tokens: int) -> list[Sequence]:
    """The outputs of an offered request, all waiting for their first pages."""
    request = offer.request
    stops = set(request.stopping.stop_token_ids)
    if not request.stopping.ignore_eos:
        stops.update(eos_token_ids)
    stopping = StoppingParams(request.stopping.max_tokens, request.stopping.min_tokens, frozenset(stops))
    prompt, outputs = list(request.prompt_token_ids), list[Sequence]()
    for index in range(max(1, request.output.n)):
        Sequence(
            request_id=request.key.request_id,
            attempt=request.key.attempt,
            tenant=request.key.tenant,
            gateway_id=request.gateway_id,
            order_key=offer.order_key,
            prompt_token_ids=prompt,
            output_token_ids=list(request.delivered_token_ids),
            num_delivered=len(request.delivered_token_ids),
            sampling=_sampling(request, index),
            stopping=stopping,
            max_context_tokens=max_context_tokens,
            adapter_version=request.adapter_version,
            # Without a salt nothing would keep tenants apart.
            isolation_salt=request.isolation_salt or request.key.tenant,
            adapter_bytes=request.adapter_bytes,
            output_index=index,
            # A gateway ends an output at a stop string, and log-probabilities go with their token.
            whole=request.whole and not request.stopping.stop and not request.output.HasField("logprobs"),
            outputs=outputs,
        )
    return outputs


def _sampling(request: types_pb2.RequestSpec, output_index: int) -> SamplingParams:
    sampling, output = request.sampling, request.output
    return SamplingParams(
        temperature=sampling.temperature,
        seed=(sampling.seed + output_index * _SEED_STEP) % 2**64,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        logprobs=output.logprobs if output.HasField("logprobs") else None,
        prompt_logprobs=output.prompt_logprobs if output.HasField("prompt_logprobs") else None,
    )


def to_position(logprobs: TokenLogprobs) -> types_pb2.PositionLogprobs:
    return types_pb2.PositionLogprobs(
        chosen=types_pb2.TokenLogprob(token_id=logprobs.token_id, logprob=logprobs.logprob),
        top=[types_pb2.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in logprobs.top],
    )


def to_key(sequence: Sequence) -> types_pb2.RequestKey:
    return types_pb2.RequestKey(request_id=sequence.request_id, attempt=sequence.attempt, tenant=sequence.tenant)


def to_cost(sequence: Sequence, now: float) -> types_pb2.Usage:
    """Tokens and seconds of a request that ends `now`, on the clock of its timings; a phase not reached costs 0."""
    timings = sequence.outputs[0].timings
    admitted = timings.admitted or now
    loaded = timings.loaded or (now if timings.admitted else admitted)
    first_token = timings.first_token or (now if timings.loaded else loaded)
    return types_pb2.Usage(
        prompt_tokens=len(sequence.prompt_token_ids),
        completion_tokens=sum(len(output.output_token_ids) for output in sequence.outputs),
        cached_tokens=sequence.outputs[0].cached_tokens,
        queue_seconds=admitted - timings.offered,
        load_seconds=loaded - admitted,
        prefill_seconds=first_token - loaded,
        decode_seconds=now - first_token,
    )


def to_progress(sequence: Sequence) -> scheduler_pb2.RequestProgress:
    """Where the sequence's request is: running as long as any output holds pages."""
    outputs = sequence.outputs
    return scheduler_pb2.RequestProgress(
        key=to_key(sequence),
        state=_request_state([output for output in outputs if not output.finished]),
        adapter_version=sequence.adapter_version,
        computed_tokens=max(output.computed_tokens for output in outputs),
        generated_tokens=sum(len(output.output_token_ids) for output in outputs),
    )


def _request_state(unfinished: Items[Sequence]) -> "scheduler_pb2.RequestState.ValueType":
    if not unfinished:
        return scheduler_pb2.REQUEST_STATE_FINISHED
    if any(output.state is not SequenceState.WAITING for output in unfinished):
        return scheduler_pb2.REQUEST_STATE_RUNNING
    if any(output.preemptions for output in unfinished):
        return scheduler_pb2.REQUEST_STATE_PREEMPTED
    return scheduler_pb2.REQUEST_STATE_WAITING


def to_resident(adapter: ResidentAdapter) -> scheduler_pb2.ResidentAdapter:
    return scheduler_pb2.ResidentAdapter(
        adapter_version=adapter.adapter_version,
        tier=types_pb2.TIER_HOST if adapter.loading else types_pb2.TIER_PAGES,
        num_pages=len(adapter.pages),
        pins=adapter.sequence_pins + adapter.operator_pinned,
        num_bytes=adapter.layout.total_bytes,
        loading=adapter.loading,
        operator_pinned=adapter.operator_pinned,
    )


def to_host_resident(
    adapter_version: str, layout: PackedLayout, geometry: PageGeometry
) -> scheduler_pb2.ResidentAdapter:
    """An adapter in the host tier only; `num_pages` is what it would take."""
    return scheduler_pb2.ResidentAdapter(
        adapter_version=adapter_version,
        tier=types_pb2.TIER_HOST,
        num_pages=geometry.pages_for_bytes(layout.total_bytes),
        num_bytes=layout.total_bytes,
    )
