"""Workers without a model that speak the scheduler's messages: what they report is what real ones would."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from loraplex.v1 import scheduler_pb2, types_pb2

PAGE_SIZE = 16
NUM_PAGES = 8192
PAGE_BYTES = 1 << 20
# Steps between two reports of how far the running sequences are, as in the real worker.
PROGRESS_STEPS = 16


@dataclass(slots=True)
class _Sequence:
    key: types_pb2.RequestKey
    adapter: str
    prompt_tokens: int
    length: int
    generated: int = 0


@dataclass(slots=True)
class SimulatedWorker:
    """Runs what it is offered, one token for each sequence a step."""

    worker_id: str
    max_sequences: int
    epoch: int = 0
    applied_seq: int = 0
    steps: int = 0
    finished: int = 0
    _running: dict[str, _Sequence] = field(default_factory=dict)
    _admitted: list[_Sequence] = field(default_factory=list)

    def hello(self) -> scheduler_pb2.WorkerHello:
        geometry = types_pb2.ModelGeometry(num_layers=2, max_context_tokens=8192)
        model = types_pb2.ModelIdentity(name="m", base_fingerprint="b", tokenizer_digest="t", geometry=geometry)
        capacity = scheduler_pb2.WorkerCapacity(
            num_pages=NUM_PAGES,
            page_bytes=PAGE_BYTES,
            page_size=PAGE_SIZE,
            max_step_tokens=512,
            max_sequences=self.max_sequences,
        )
        return scheduler_pb2.WorkerHello(worker_id=self.worker_id, address="x:1", model=model, capacity=capacity)

    def apply(self, batch: scheduler_pb2.CommandBatch) -> None:
        for command in batch.commands:
            self.applied_seq = command.seq
            if command.WhichOneof("command") == "offer":
                spec = command.offer.request
                sequence = _Sequence(
                    spec.key, spec.adapter_version, len(spec.prompt_token_ids), spec.stopping.max_tokens
                )
                self._running[spec.key.request_id] = sequence
                self._admitted.append(sequence)

    def step(self) -> bytes:
        """The report of one step, on the wire."""
        self.steps += 1
        report = scheduler_pb2.StepReport(
            worker_id=self.worker_id,
            scheduler_epoch=self.epoch,
            applied_seq=self.applied_seq,
            step_number=self.steps,
            report_number=self.steps,
            state=scheduler_pb2.WORKER_STATE_READY,
            memory=scheduler_pb2.MemoryUsage(total_pages=NUM_PAGES, free_pages=NUM_PAGES),
            running_sequences=len(self._running),
        )
        adapters = len({sequence.adapter for sequence in self._running.values()})
        prefill = sum(sequence.prompt_tokens for sequence in self._admitted)
        report.costs.CopyFrom(
            scheduler_pb2.StepCosts(
                steps=1,
                seconds=0.01 + 1e-5 * prefill + 1e-4 * len(self._running) + 5e-5 * adapters,
                prefill_tokens=prefill,
                decode_tokens=len(self._running),
                distinct_adapters=adapters,
            )
        )
        report.progress.extend(self._progress())
        return report.SerializeToString()

    def _progress(self) -> Iterator[scheduler_pb2.RequestProgress]:
        told = {id(sequence) for sequence in self._admitted}
        self._admitted.clear()
        for sequence in list(self._running.values()):
            sequence.generated += 1
            ended = sequence.generated >= sequence.length
            if ended:
                del self._running[sequence.key.request_id]
                self.finished += 1
            if ended or id(sequence) in told or self.steps % PROGRESS_STEPS == 0:
                progress = scheduler_pb2.RequestProgress(
                    key=sequence.key,
                    state=scheduler_pb2.REQUEST_STATE_FINISHED if ended else scheduler_pb2.REQUEST_STATE_RUNNING,
                    adapter_version=sequence.adapter,
                    computed_tokens=sequence.prompt_tokens + sequence.generated,
                    generated_tokens=sequence.generated,
                )
                if ended:
                    progress.finish_reason = types_pb2.FINISH_REASON_LENGTH
                yield progress
