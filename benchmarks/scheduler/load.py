"""A saturated fleet around the real core: how long a decision takes, and what a second of it costs."""

import itertools
import random
import time
from dataclasses import dataclass, field

from benchmarks.scheduler.simulated import SimulatedWorker
from loraplex.v1 import scheduler_pb2, types_pb2
from scheduler.convert import from_answer, from_commands, to_hello, to_report, to_request
from scheduler.core.scheduler import Scheduler
from scheduler.core.settings import Settings

MAX_SEQUENCES = 32
STEP_SECONDS = 0.02
NUM_TENANTS = 100


@dataclass
class Fleet:
    """Workers, a queue that is kept full, and one scheduler between them."""

    num_workers: int
    num_waiting: int
    policy: str = "fair"
    # Wall-clock seconds of each call of schedule() and of each submission.
    decisions: list[float] = field(default_factory=list)
    submissions: list[float] = field(default_factory=list)
    # Processor seconds of the scheduler: messages decoded, taken in, decided, encoded.
    busy_seconds: float = 0.0
    simulated_seconds: float = 0.0

    def __post_init__(self) -> None:
        limit = 4 * self.num_waiting + 10_000
        settings = Settings(
            policy=self.policy, recovery_seconds=0.0, max_queued_requests=limit, max_queued_tokens=10**9
        )
        self.core = Scheduler(settings, 1_000_000, 0.0)
        self.core.gateway_connected("g")
        self._random = random.Random(8)
        self._names = itertools.count()
        self.workers = [SimulatedWorker(f"w{index:02}", MAX_SEQUENCES) for index in range(self.num_workers)]
        for worker in self.workers:
            worker.epoch = self.core.register(to_hello(worker.hello()), 0.0)
        self._fill()
        while self._decide():
            pass
        self._fill()

    def run(self, seconds: float) -> None:
        """Steps of all workers, spread evenly over time; each report is decided upon before the next comes."""
        for _ in range(round(seconds / STEP_SECONDS)):
            for worker in self.workers:
                self.simulated_seconds += STEP_SECONDS / self.num_workers
                self._report(worker)
            self._fill()

    def _report(self, worker: SimulatedWorker) -> None:
        data = worker.step()
        began = time.process_time()
        report = scheduler_pb2.StepReport.FromString(data)
        changed = self.core.report(worker.worker_id, to_report(report), self.simulated_seconds)
        self.busy_seconds += time.process_time() - began
        while changed:
            changed = self._decide()

    def _decide(self) -> bool:
        """True when there is more to decide."""
        began, wall = time.process_time(), time.perf_counter()
        decisions = self.core.schedule(self.simulated_seconds)
        self.decisions.append(time.perf_counter() - wall)
        batches = [
            (worker_id, message.SerializeToString(), message)
            for worker_id, commands in decisions.commands.items()
            for message in from_commands(0, commands)
        ]
        for answers in decisions.answers.values():
            for answer in answers:
                from_answer(answer).SerializeToString()
        self.busy_seconds += time.process_time() - began
        by_id = {worker.worker_id: worker for worker in self.workers}
        for worker_id, _, message in batches:
            by_id[worker_id].apply(message.commands)
        return decisions.incomplete

    def _fill(self) -> None:
        """As many requests as are missing, each of an adapter of its own until there are as many as requests."""
        for _ in range(self.num_waiting - self.core.queue.num_requests):
            number = next(self._names)
            spec = types_pb2.RequestSpec(
                key=types_pb2.RequestKey(request_id=f"r{number}", tenant=f"t{self._random.randrange(NUM_TENANTS)}"),
                adapter_version=f"a{number % self.num_waiting}",
                adapter_bytes=16 << 20,
                prompt_token_ids=range(self._random.randint(32, 256)),
                stopping=types_pb2.StoppingParams(max_tokens=self._random.randint(64, 160)),
                gateway_id="g",
            )
            data = spec.SerializeToString()
            began, wall = time.process_time(), time.perf_counter()
            now = self.simulated_seconds
            self.core.submit(to_request(types_pb2.RequestSpec.FromString(data), now), now)
            self.submissions.append(time.perf_counter() - wall)
            self.busy_seconds += time.process_time() - began
