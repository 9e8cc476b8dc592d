"""What one step tells the gateways and the scheduler, gathered while it happens."""

import time
from collections import defaultdict

from common.errors import LoraplexError, to_proto
from gpu_worker.convert import to_cost, to_key, to_progress
from gpu_worker.sequence import Sequence
from loraplex.v1 import engine_pb2, scheduler_pb2, types_pb2, worker_pb2


class Outbox:
    """Collects one step's outputs; `take` hands them over and starts empty again."""

    def __init__(self) -> None:
        self._tokens: dict[str, list[worker_pb2.SequenceTokens]] = defaultdict(list)
        # The latest state of each sequence that changed.
        self._progress: dict[str, scheduler_pb2.RequestProgress] = {}
        self._needed: list[engine_pb2.AdapterNeeded] = []

    def changed(self, sequence: Sequence) -> None:
        """The scheduler should hear of the sequence's state."""
        self._progress[sequence.sequence_id] = to_progress(sequence)

    def need_adapter(self, tenant: str, adapter_version: str) -> None:
        self._needed.append(engine_pb2.AdapterNeeded(tenant=tenant, adapter_version=adapter_version))

    def token(self, sequence: Sequence) -> None:
        """The sequence's newest token goes to its gateway."""
        offset = len(sequence.output_token_ids) - 1
        self._tokens[sequence.gateway_id].append(
            worker_pb2.SequenceTokens(
                key=to_key(sequence), token_offset=offset, token_ids=sequence.output_token_ids[offset:]
            )
        )

    def finish(
        self,
        sequence: Sequence,
        reason: "types_pb2.FinishReason.ValueType",
        matched_stop_token_id: int | None = None,
    ) -> None:
        """The sequence ended; rides on the message of its last token when there is one."""
        message = self._last_message(sequence)
        message.finish_reason = reason
        message.usage.CopyFrom(to_cost(sequence, time.monotonic()))
        if matched_stop_token_id is not None:
            message.matched_stop_token_id = matched_stop_token_id
        progress = to_progress(sequence)
        progress.state = scheduler_pb2.REQUEST_STATE_FINISHED
        progress.finish_reason = reason
        self._progress[sequence.sequence_id] = progress

    def fail(self, sequence: Sequence, error: LoraplexError) -> None:
        """The sequence failed; its gateway gets the error."""
        message = self._last_message(sequence)
        message.finish_reason = types_pb2.FINISH_REASON_ERROR
        message.error.CopyFrom(to_proto(error))
        progress = to_progress(sequence)
        progress.state = scheduler_pb2.REQUEST_STATE_FAILED
        progress.finish_reason = types_pb2.FINISH_REASON_ERROR
        progress.error.CopyFrom(to_proto(error))
        self._progress[sequence.sequence_id] = progress

    def revoked(self, sequence: Sequence) -> None:
        """The scheduler took the sequence back; its gateway hears nothing."""
        progress = to_progress(sequence)
        progress.state = scheduler_pb2.REQUEST_STATE_REVOKED
        self._progress[sequence.sequence_id] = progress

    def _last_message(self, sequence: Sequence) -> worker_pb2.SequenceTokens:
        key, messages = to_key(sequence), self._tokens[sequence.gateway_id]
        if messages and messages[-1].key == key:
            return messages[-1]
        messages.append(worker_pb2.SequenceTokens(key=key, token_offset=len(sequence.output_token_ids)))
        return messages[-1]

    def take(self) -> engine_pb2.StepResult:
        """Everything gathered since the last call."""
        result = engine_pb2.StepResult(
            tokens=[
                engine_pb2.GatewayTokens(gateway_id=gateway_id, sequences=sequences)
                for gateway_id, sequences in self._tokens.items()
            ],
            report=scheduler_pb2.StepReport(progress=self._progress.values()),
            adapters_needed=self._needed,
        )
        self._tokens.clear()
        self._progress.clear()
        self._needed = []
        return result
