"""The requests in flight: what their workers have produced and their callers have not taken yet.

Everything is keyed by (request_id, attempt). Whoever waits takes all that came since the last take, so a slow reader
gets fewer and larger deltas and slows nobody.
"""

import asyncio
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from common.errors import AlreadyExists, Internal, LoraplexError, from_proto
from loraplex.v1 import types_pb2, worker_pb2


@dataclass(slots=True)
class OutputDelta:
    """What one output gained since the last take."""

    index: int
    # Tokens of this output taken before these.
    token_offset: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[types_pb2.PositionLogprobs] = field(default_factory=list)
    finish_reason: types_pb2.FinishReason.ValueType = types_pb2.FINISH_REASON_UNSPECIFIED
    matched_stop_token_id: int | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason != types_pb2.FINISH_REASON_UNSPECIFIED

    @property
    def next_offset(self) -> int:
        return self.token_offset + len(self.token_ids)


@dataclass(slots=True)
class Delta:
    """What a request gained since the last take, and the cost as far as the worker has told it."""

    outputs: list[OutputDelta]
    usage: types_pb2.Usage | None = None
    prompt_logprobs: list[types_pb2.PositionLogprobs] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(output.token_ids) for output in self.outputs)


class InFlight:
    """One request: its spec, its current attempt, and what waits to be taken."""

    def __init__(
        self, spec: types_pb2.RequestSpec, deadline: float | None = None, *, max_buffered_bytes: float = math.inf
    ) -> None:
        """`deadline` is on the monotonic clock, in seconds. `max_buffered_bytes` bounds what waits to be taken."""
        self.spec = spec
        self.deadline = deadline
        # Called when more waits than allowed: whoever should take is busy with a client that does not read.
        self.on_overflow: Callable[[], None] | None = None
        # The worker that has the current attempt, once known.
        self.worker_id = ""
        # Where that worker had the adapter when it was given the request.
        self.tier: types_pb2.Tier.ValueType = types_pb2.TIER_UNSPECIFIED
        self.error: LoraplexError | None = None
        # No other process works on it any more, so there is nothing to abort.
        self.ended_remotely = False
        self._outputs = [OutputDelta(index, token_offset=0) for index in range(max(1, spec.output.n))]
        self._finished: set[int] = set()
        self._usage: types_pb2.Usage | None = None
        # Of the prompt; None once they were taken.
        self._prompt_logprobs: list[types_pb2.PositionLogprobs] | None = []
        self._max_buffered_bytes = max_buffered_bytes
        self._buffered_bytes = 0
        self._news = asyncio.Event()

    @property
    def request_id(self) -> str:
        return self.spec.key.request_id

    @property
    def key(self) -> types_pb2.RequestKey:
        return self.spec.key

    @property
    def buffered_bytes(self) -> int:
        """What waits to be taken."""
        return self._buffered_bytes

    @property
    def complete(self) -> bool:
        """Nothing will change any more."""
        return self.error is not None or len(self._finished) == len(self._outputs)

    async def wait(self) -> None:
        """Returns once something changed since the last wait."""
        await self._news.wait()
        self._news.clear()

    def take(self) -> Delta:
        """Everything since the last take. Raises the request's error."""
        if self.error is not None:
            raise self.error
        taken = [output for output in self._outputs if output.token_ids or output.finished]
        for output in taken:
            self._outputs[output.index] = OutputDelta(output.index, output.next_offset)
        self._buffered_bytes = 0
        delta = Delta(taken, self._usage, self._prompt_logprobs or [])
        self._prompt_logprobs = None if self._prompt_logprobs is None or delta.prompt_logprobs else []
        return delta

    def end(self, indexes: Iterable[int]) -> list[int]:
        """These outputs are complete for the client; returns those of which the worker does not know it."""
        unknown = [index for index in indexes if index not in self._finished]
        self._finished.update(unknown)
        return unknown

    def fail(self, error: LoraplexError) -> None:
        """The first error stays."""
        if not self.complete:
            self.error = error
            self._news.set()

    def append(self, sequence: worker_pb2.SequenceTokens) -> int:
        """Takes in the news of one output; returns how many of its tokens were known already.

        Raises Internal when tokens are missing in between or the output does not exist.
        """
        if sequence.output_index >= len(self._outputs):
            raise _broken("UNKNOWN_OUTPUT", self.request_id)
        if sequence.HasField("usage"):
            self._usage = sequence.usage
        output = self._outputs[sequence.output_index]
        if output.index in self._finished:
            return 0
        known = output.next_offset - sequence.token_offset
        if known < 0:
            raise _broken("TOKEN_GAP", self.request_id)
        duplicates = min(known, len(sequence.token_ids))
        output.token_ids.extend(sequence.token_ids[duplicates:])
        output.logprobs.extend(sequence.logprobs[duplicates:])
        if self._prompt_logprobs is not None and sequence.prompt_logprobs:
            # One message of a request has them, so they need no other bound than the length of the prompt.
            self._prompt_logprobs = list(sequence.prompt_logprobs)
        else:
            self._buffered_bytes += sequence.ByteSize()
        if sequence.finish_reason != types_pb2.FINISH_REASON_UNSPECIFIED:
            self._finished.add(output.index)
            output.finish_reason = sequence.finish_reason
            if sequence.HasField("matched_stop_token_id"):
                output.matched_stop_token_id = sequence.matched_stop_token_id
        self.ended_remotely = self.complete
        self._news.set()
        if self._buffered_bytes > self._max_buffered_bytes and self.on_overflow is not None:
            self.on_overflow()
        return duplicates


def _broken(reason: str, request_id: str) -> Internal:
    return Internal(reason, f"internal error; quote request id {request_id}")


def _ignore(_: int) -> None:
    pass


class RequestTable:
    """Requests by id. `count_duplicates` and `count_gaps` are told about tokens dropped and gaps seen."""

    def __init__(
        self, count_duplicates: Callable[[int], None] = _ignore, count_gaps: Callable[[int], None] = _ignore
    ) -> None:
        self._requests: dict[str, InFlight] = {}
        self._count_duplicates = count_duplicates
        self._count_gaps = count_gaps

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def buffered_bytes(self) -> int:
        """What waits to be taken, of all requests. For any thread."""
        return sum(in_flight.buffered_bytes for in_flight in list(self._requests.values()))

    def add(self, in_flight: InFlight) -> None:
        """Raises AlreadyExists when a request of this id is in flight."""
        if in_flight.request_id in self._requests:
            raise AlreadyExists(
                "REQUEST_IN_FLIGHT", f"a request with x-request-id {in_flight.request_id!r} is in flight already"
            )
        self._requests[in_flight.request_id] = in_flight

    def remove(self, in_flight: InFlight) -> bool:
        """False when it was gone already."""
        if self._requests.get(in_flight.request_id) is not in_flight:
            return False
        del self._requests[in_flight.request_id]
        return True

    def current(self, key: types_pb2.RequestKey) -> InFlight | None:
        """The request, if `key` names its current attempt; late messages of old attempts find nothing."""
        in_flight = self._requests.get(key.request_id)
        if in_flight is None or in_flight.key.attempt != key.attempt:
            return None
        return in_flight

    def unplaced(self) -> Iterator[InFlight]:
        """Requests that no worker is known to have."""
        return (item for item in self._requests.values() if not item.worker_id and not item.complete)

    def apply(self, worker_id: str, sequence: worker_pb2.SequenceTokens) -> None:
        """Takes in what a worker says about one output of a request."""
        in_flight = self.current(sequence.key)
        if in_flight is None or in_flight.error is not None:
            return
        # Tokens may overtake the scheduler's Placed.
        in_flight.worker_id = in_flight.worker_id or worker_id
        if sequence.finish_reason == types_pb2.FINISH_REASON_ERROR or sequence.HasField("error"):
            known = sequence.HasField("error")
            in_flight.fail(from_proto(sequence.error) if known else _broken("WORKER_ERROR", in_flight.request_id))
            in_flight.ended_remotely = True
            return
        try:
            if duplicates := in_flight.append(sequence):
                self._count_duplicates(duplicates)
        except Internal as error:
            self._count_gaps(1)
            in_flight.fail(error)

    def place(
        self,
        key: types_pb2.RequestKey,
        worker_id: str,
        tier: "types_pb2.Tier.ValueType" = types_pb2.TIER_UNSPECIFIED,
    ) -> None:
        """The scheduler offered the attempt to this worker, which has the adapter in `tier`."""
        if (in_flight := self.current(key)) is not None:
            in_flight.worker_id, in_flight.tier = worker_id, tier

    def refuse(self, key: types_pb2.RequestKey, error: LoraplexError) -> None:
        """The scheduler will not run the attempt."""
        if (in_flight := self.current(key)) is not None:
            in_flight.fail(error)
            in_flight.ended_remotely = True

    def fail_unplaced(self, error: Callable[[], LoraplexError]) -> None:
        """Fails every request that no worker is known to have, each with an error of its own."""
        for in_flight in self.unplaced():
            in_flight.fail(error())

    def fail_placed(self, worker_id: str, error: Callable[[], LoraplexError]) -> None:
        """Fails every unfinished request that this worker has, each with an error of its own."""
        for in_flight in self._requests.values():
            if in_flight.worker_id == worker_id:
                in_flight.fail(error())
