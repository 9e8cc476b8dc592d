"""What one step tells the gateways and the scheduler, gathered while it happens."""

import time
from collections import Counter, defaultdict

from common.errors import LoraplexError, to_proto
from gpu_worker.convert import to_cost, to_key, to_position, to_progress
from gpu_worker.memory.adapter_cache import ResidentAdapter
from gpu_worker.sequence import Sequence, TokenLogprobs
from loraplex.v1 import engine_pb2, scheduler_pb2, types_pb2, worker_pb2

# Tokens of one output in a message to a gateway whose client waits for the whole answer.
TOKENS_TOGETHER = 16


class Outbox:
    """Collects one step's outputs; `take` hands them over and starts empty again."""

    def __init__(self) -> None:
        self._tokens: dict[str, list[worker_pb2.SequenceTokens]] = defaultdict(list)
        # The latest state of each attempt that changed.
        self._progress: dict[str, scheduler_pb2.RequestProgress] = {}
        self._needed: list[engine_pb2.AdapterNeeded] = []
        self._settled: list[str] = []
        self._distrusted: list[engine_pb2.AdapterDistrusted] = []
        self._finished: Counter[str] = Counter()
        self._loads: list[engine_pb2.AdapterLoad] = []

    def changed(self, sequence: Sequence) -> None:
        """The scheduler should hear of the state of the sequence's request."""
        self._progress[sequence.attempt_id] = to_progress(sequence)

    def need_adapter(self, tenant: str, adapter_version: str) -> None:
        self._needed.append(engine_pb2.AdapterNeeded(tenant=tenant, adapter_version=adapter_version))

    def loaded(self, adapter: ResidentAdapter, seconds: float) -> None:
        """The adapter's bytes came into its pages in so many seconds."""
        rank = max((module.lora_rank for module in adapter.layout.modules), default=0)
        self._loads.append(engine_pb2.AdapterLoad(seconds=seconds, num_pages=len(adapter.pages), lora_rank=rank))

    def settled(self, adapter_version: str) -> None:
        """The fetched file was opened or refused."""
        self._settled.append(adapter_version)

    def distrusted(self, adapter_version: str, sha256: str) -> None:
        """The file has other bytes than promised."""
        self._distrusted.append(engine_pb2.AdapterDistrusted(adapter_version=adapter_version, sha256=sha256))

    def token(self, sequence: Sequence, logprobs: TokenLogprobs | None = None) -> None:
        """The sequence's newest token goes to its gateway, or is held until there are enough or the output ends."""
        sequence.num_held += 1
        offset = len(sequence.output_token_ids) - sequence.num_held
        if sequence.whole and sequence.num_held < TOKENS_TOGETHER and offset != sequence.num_delivered:
            return
        message = self._add_message(sequence)
        if logprobs is not None:
            message.logprobs.append(to_position(logprobs))
        if offset != sequence.num_delivered or sequence.output_index != 0:
            return
        # What is known so far, for a gateway that ends the request by a stop string.
        message.usage.CopyFrom(to_cost(sequence, time.monotonic()))
        if sequence.sampling.prompt_logprobs is not None:
            # Nothing is predicted before the first prompt token.
            message.prompt_logprobs.append(types_pb2.PositionLogprobs())
            message.prompt_logprobs.extend(to_position(position) for position in sequence.prompt_logprobs)

    def finish(
        self,
        sequence: Sequence,
        reason: "types_pb2.FinishReason.ValueType",
        *,
        counted_as: str,
        matched_stop_token_id: int | None = None,
    ) -> None:
        """The output ended; rides on the message of its last token. Usage goes with the request's last output."""
        message = self._last_message(sequence)
        message.finish_reason = reason
        if matched_stop_token_id is not None:
            message.matched_stop_token_id = matched_stop_token_id
        self._finished[counted_as] += 1
        progress = to_progress(sequence)
        if all(output.finished for output in sequence.outputs):
            message.usage.CopyFrom(to_cost(sequence, time.monotonic()))
            progress.finish_reason = reason
            progress.usage.CopyFrom(message.usage)
        self._progress[sequence.attempt_id] = progress

    def fail(self, sequence: Sequence, error: LoraplexError) -> None:
        """The output failed, and with it the request; its gateway gets the error."""
        message = self._last_message(sequence)
        message.finish_reason = types_pb2.FINISH_REASON_ERROR
        message.error.CopyFrom(to_proto(error))
        self._finished["error"] += 1
        progress = to_progress(sequence)
        progress.state = scheduler_pb2.REQUEST_STATE_FAILED
        progress.finish_reason = types_pb2.FINISH_REASON_ERROR
        progress.error.CopyFrom(to_proto(error))
        self._progress[sequence.attempt_id] = progress

    def revoked(self, sequence: Sequence) -> None:
        """The scheduler took the request back; its gateway hears nothing."""
        progress = to_progress(sequence)
        progress.state = scheduler_pb2.REQUEST_STATE_REVOKED
        self._progress[sequence.attempt_id] = progress

    def _last_message(self, sequence: Sequence) -> worker_pb2.SequenceTokens:
        key, messages = to_key(sequence), self._tokens[sequence.gateway_id]
        if messages and messages[-1].key == key and messages[-1].output_index == sequence.output_index:
            return messages[-1]
        return self._add_message(sequence)

    def _add_message(self, sequence: Sequence) -> worker_pb2.SequenceTokens:
        """With the tokens that its gateway was not told."""
        offset = len(sequence.output_token_ids) - sequence.num_held
        message = worker_pb2.SequenceTokens(
            key=to_key(sequence),
            output_index=sequence.output_index,
            token_offset=offset,
            token_ids=sequence.output_token_ids[offset:],
        )
        sequence.num_held = 0
        self._tokens[sequence.gateway_id].append(message)
        return message

    def take(self) -> engine_pb2.StepResult:
        """Everything gathered since the last call."""
        result = engine_pb2.StepResult(
            tokens=[
                engine_pb2.GatewayTokens(gateway_id=gateway_id, sequences=sequences)
                for gateway_id, sequences in self._tokens.items()
            ],
            report=scheduler_pb2.StepReport(progress=self._progress.values()),
            adapters_needed=self._needed,
            adapters_settled=self._settled,
            adapters_distrusted=self._distrusted,
            finished=[engine_pb2.FinishCount(reason=reason, outputs=count) for reason, count in self._finished.items()],
            loads=self._loads,
        )
        self._finished.clear()
        self._tokens.clear()
        self._progress.clear()
        self._needed, self._settled, self._distrusted, self._loads = [], [], [], []
        return result
