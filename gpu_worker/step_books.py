"""What a step took, and of what: its statistics for the metrics and its costs for the scheduler."""

from collections.abc import Callable
from dataclasses import dataclass

from gpu_worker.batching import StepPlan
from gpu_worker.sequence import Sequence
from gpu_worker.step_output import StepOutput
from loraplex.v1 import engine_pb2, scheduler_pb2


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched step whose output nobody has handled."""

    number: int
    plan: StepPlan
    output: Callable[[], StepOutput]
    launched: float
    schedule_seconds: float


class StepBooks:
    """Counts from step to step; `costs` are those of the last step, None when there was nothing to run."""

    def __init__(self) -> None:
        self.costs: scheduler_pb2.StepCosts | None = None
        self._handled_at = 0.0
        # Prompt tokens looked up in the prefix cache, and found there, since the last step's statistics.
        self._prefix_queries = self._prefix_hits = 0

    def admitted(self, sequence: Sequence) -> None:
        """Books what the prefix cache had for a newcomer."""
        if not (sequence.preemptions or sequence.wants_prompt_logprobs):
            self._prefix_queries += len(sequence.prompt_token_ids)
            self._prefix_hits += sequence.cached_tokens

    def stats(self, flight: Flight, output: StepOutput, *, loads: int, evictions: int) -> engine_pb2.StepStats:
        """`loads` and `evictions` of adapters, since the start."""
        plan = flight.plan
        prefills = [chunk for chunk in plan.chunks if not (chunk.samples and chunk.length == 1)]
        prefill_tokens = sum(chunk.length for chunk in prefills)
        queries, hits, self._prefix_queries, self._prefix_hits = self._prefix_queries, self._prefix_hits, 0, 0
        return engine_pb2.StepStats(
            prefix_query_tokens=queries,
            prefix_hit_tokens=hits,
            prefill_tokens=prefill_tokens,
            decode_tokens=sum(chunk.length for chunk in plan.chunks) - prefill_tokens,
            sequences=len(plan.chunks),
            distinct_adapters=output.distinct_adapters,
            lora_ranks=output.lora_ranks,
            prefill_chunks=len(prefills),
            schedule_seconds=flight.schedule_seconds,
            forward_seconds=output.forward_seconds,
            sample_seconds=output.sample_seconds,
            context_tokens=sum(chunk.start + chunk.length for chunk in plan.chunks),
            preemptions=len(plan.preempted),
            adapter_loads=loads,
            adapter_evictions=evictions,
            backend_calls=[
                engine_pb2.BackendCalls(backend=backend, calls=calls) for backend, calls in output.backend_calls.items()
            ],
        )

    def handled(self, flight: Flight, stats: engine_pb2.StepStats, now: float) -> None:
        """Books the costs of a step whose tokens were handed out at `now`."""
        self.costs = scheduler_pb2.StepCosts(
            steps=1,
            # Steps that overlap share their time out.
            seconds=now - max(flight.launched, self._handled_at),
            prefill_tokens=stats.prefill_tokens,
            decode_tokens=stats.decode_tokens,
            distinct_adapters=stats.distinct_adapters,
        )
        self._handled_at = now
