"""Random histories: nothing is lost, nothing runs twice, keys never grow, pools are not over-committed.

Reports are dropped, delayed, and come in another order, up to ten of them; commands are delivered again; streams break
and epochs change; workers, gateways and requests come and go.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.core.commands import Command, Decisions, Offer, Placed, Refused
from scheduler.core.intake import MAX_REPORTS_AHEAD, ReportGapError
from scheduler.core.model import Ending, Key, Report
from scheduler.core.scheduler import Scheduler
from scheduler.core.settings import Settings
from tests.scheduler.core_fakes import EPOCH, SimulatedWorker, estimated_pages, make_request

WORKERS = ("w0", "w1", "w2")
GATEWAYS = ("g0", "g1")
POOL_PAGES = 24
worker_ids = st.sampled_from(WORKERS)
gateway_ids = st.sampled_from(GATEWAYS)


class SchedulerMachine(RuleBasedStateMachine):
    """Gateways, workers and their streams around one scheduler, which they trust only as far as they can see."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.scheduler = Scheduler(Settings(recovery_seconds=0.5, max_waiting_requests=4), EPOCH, self.now)
        # Processes that live; those with a stream to the scheduler.
        self.workers: dict[str, SimulatedWorker] = {}
        self.registered: set[str] = set()
        self.connected: set[str] = set()
        # Gateway -> when its stream broke.
        self.away: dict[str, float] = {}
        self.epochs: list[int] = []
        # Attempts in order of arrival, and how they ended.
        self.arrival: dict[Key, int] = {}
        self.gateway_of: dict[Key, str] = {}
        self.adapter_of: dict[Key, str] = {}
        self.sizes_of: dict[Key, tuple[int, int]] = {}
        self.deadline_of: dict[Key, float] = {}
        self.outcome: dict[Key, str] = {}
        # Attempts that were submitted again under the same key: they may have a new place in the queue.
        self.resubmitted: set[Key] = set()
        # Attempts whose gateway was told of a worker.
        self.placed: dict[Key, str] = {}
        # What the scheduler gave to a worker and has no reason to think ended.
        self.live: dict[Key, str] = {}
        self.order_keys: dict[Key, int] = {}
        # Attempts whose end nobody could tell the scheduler, their worker having died; only these may run once more.
        self.untold: set[Key] = set()
        # Worker -> reports on their way, and the commands that were delivered last.
        self.wire: dict[str, list[Report]] = {worker_id: [] for worker_id in WORKERS}
        # Attempts whose end was in a report that was dropped, and the worker has not registered again since.
        self.dropped: dict[str, set[Key]] = {}
        self.delivered: dict[str, list[tuple[int, Command]]] = {worker_id: [] for worker_id in WORKERS}

    @initialize(num_workers=st.integers(0, 2), recover=st.booleans())
    def begin(self, num_workers: int, recover: bool) -> None:
        for gateway_id in GATEWAYS:
            self.connect_gateway(gateway_id)
        for worker_id in WORKERS[:num_workers]:
            self.start_worker(worker_id, 4)
        if recover:
            self.wait(0.5)

    # Gateways.

    @rule(
        gateway_id=gateway_ids,
        requests=st.lists(
            st.tuples(
                st.sampled_from(["", "a", "b", "c"]),
                st.integers(1, 30),
                st.integers(1, 30),
                st.none() | st.floats(0.1, 5.0),
            ),
            min_size=1,
            max_size=8,
        ),
        tenant=st.sampled_from(["flood", "flood", "flood", "quiet"]),
    )
    def submit(self, gateway_id: str, requests: list[tuple[str, int, int, float | None]], tenant: str) -> None:
        for adapter, prompt, max_tokens, patience in requests:
            key = Key(f"r{len(self.arrival)}", 0, tenant)
            deadline = None if patience is None else self.now + patience
            self._submit(key, gateway_id, adapter, prompt, max_tokens, deadline)

    def _submit(
        self, key: Key, gateway_id: str, adapter: str, prompt: int, max_tokens: int, deadline: float | None
    ) -> None:
        if gateway_id not in self.connected:
            return
        self.arrival.setdefault(key, len(self.arrival))
        self.gateway_of[key], self.adapter_of[key] = gateway_id, adapter
        self.sizes_of[key] = prompt, max_tokens
        if deadline is not None:
            self.deadline_of[key] = deadline
        request = make_request(
            key.request_id,
            adapter,
            prompt=prompt,
            max_tokens=max_tokens,
            attempt=key.attempt,
            gateway_id=gateway_id,
            deadline=deadline,
            whole=prompt % 2 == 0,
        )
        request.key = key
        self.scheduler.submit(request, self.now)
        self._pump()

    @precondition(lambda self: self._open())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self._open()))
        if self.gateway_of[key] in self.connected:
            self._end(key, "aborted")
            self.scheduler.abort(key)
            self.scheduler.abort(key)
            self._pump()

    @rule(gateway_id=gateway_ids)
    def lose_gateway(self, gateway_id: str) -> None:
        """Its stream breaks; what workers do for it goes on if it is soon back."""
        if gateway_id in self.connected:
            self.connected.remove(gateway_id)
            self.away[gateway_id] = self.now
            self.scheduler.gateway_lost(gateway_id, self.now)
            self._pump()

    @rule(gateway_id=gateway_ids)
    def connect_gateway(self, gateway_id: str) -> None:
        """It submits again what it does not know to be placed."""
        if gateway_id in self.connected:
            return
        self.away.pop(gateway_id, None)
        self.connected.add(gateway_id)
        self.scheduler.gateway_connected(gateway_id)
        for key in self._open():
            if self.gateway_of[key] == gateway_id and key not in self.placed:
                self.resubmitted.add(key)
                self._submit(key, gateway_id, self.adapter_of[key], *self.sizes_of[key], self.deadline_of.get(key))
        self._pump()

    # Workers.

    @rule(worker_id=worker_ids, max_sequences=st.integers(1, 6))
    def start_worker(self, worker_id: str, max_sequences: int) -> None:
        if worker_id not in self.workers:
            self.workers[worker_id] = SimulatedWorker(worker_id, num_pages=POOL_PAGES, max_sequences=max_sequences)
            self._register(worker_id)

    @rule(worker_id=worker_ids)
    def break_stream(self, worker_id: str) -> None:
        if worker_id in self.registered:
            self._lose_worker(worker_id)
            self._pump()

    @rule(worker_id=worker_ids)
    def replay_commands(self, worker_id: str) -> None:
        """Whatever was applied before is void. What a broken stream lost does not come again."""
        if worker_id in self.workers:
            worker, sent = self.workers[worker_id], self.delivered[worker_id]
            last = worker.epoch, worker.applied_seq
            worker.inbox += [each for each in sent if each in worker.inbox or (each[0], each[1].seq) <= last]

    @rule(worker_id=worker_ids)
    def register_again(self, worker_id: str) -> None:
        """Sometimes before the scheduler has noticed that the old stream is gone."""
        if worker_id in self.workers:
            self._register(worker_id)

    @rule(worker_id=worker_ids, resubmit=st.booleans())
    def kill_worker(self, worker_id: str, resubmit: bool) -> None:
        """Gateways see it at once, and try again or give up."""
        if worker_id not in self.workers:
            return
        dead = self.workers.pop(worker_id)
        for report in (*self.wire[worker_id], dead.report()):
            self.untold |= {progress.key for progress in report.progress if progress.state is Ending.FINISHED}
        self.untold |= self.dropped.pop(worker_id, set())
        self.delivered[worker_id].clear()
        if worker_id in self.registered:
            self._lose_worker(worker_id)
        for key in [key for key in self._open() if self.placed.get(key) == worker_id]:
            gateway_id = self.gateway_of[key]
            self._end(key, "worker lost")
            if gateway_id in self.connected and resubmit:
                again = key._replace(attempt=key.attempt + 1)
                self._submit(again, gateway_id, self.adapter_of[key], 5, 5, self.deadline_of.get(key))
            elif gateway_id in self.connected:
                self.scheduler.abort(key)
            else:
                self.untold.add(key)
        self._pump()

    @rule(
        worker_id=worker_ids,
        steps=st.integers(1, 8),
        fate=st.sampled_from(["none yet", "arrives", "arrives", "late", "late", "dropped"]),
    )
    def work(self, worker_id: str, steps: int, fate: str) -> None:
        if worker_id in self.workers:
            self._work(worker_id, steps)
            if fate != "none yet":
                self._report(worker_id, fate)

    @rule(worker_id=worker_ids)
    def revoke(self, worker_id: str) -> None:
        if worker_id in self.registered:
            self.workers[worker_id].apply_inbox()
            key = self.workers[worker_id].revoke()
            request = None if key is None else self.scheduler.requests.get(key)
            if key is not None and key not in self.outcome and request is not None and request.payload is None:
                # Placed by a registration that is forgotten: the scheduler has nothing to offer again.
                self._end(key, "lost")
            self._report(worker_id)

    @rule(seconds=st.sampled_from([0.1, 0.4, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        """Runs `schedule()` exactly when the scheduler asks for it."""
        end = self.now + seconds
        while (wakeup := self.scheduler.next_wakeup()) is not None and wakeup <= end:
            # Whatever was due before has been done: no busy loop.
            assert wakeup > self.now
            self.now = wakeup
            self._pump()
        self.now = end

    @invariant()
    def nobody_is_idle_while_there_is_something_to_do(self) -> None:
        """Work conserving: whoever has nothing could take none of the heads that wait."""
        if not self.scheduler.life.assigning:
            return
        for worker in self.scheduler.fleet.ready:
            if not worker.requests:
                for other in self.scheduler.fleet.workers:
                    assert not any(worker.can_take(head) for head in list(other.line.candidates(100)))

    @invariant()
    def homes_are_those_that_have_the_adapter_or_will(self) -> None:
        fleet = self.scheduler.fleet
        assert not fleet.homes.of("")
        for name in "abc":
            homes = {worker.worker_id for worker in fleet.workers if worker.has(name) or worker.line.has(name)}
            assert set(fleet.homes.of(name)) == homes

    @invariant()
    def counts_agree(self) -> None:
        queued = list(self.scheduler.queue)
        assert self.scheduler.queue.num_requests == len(queued)
        assert self.scheduler.queue.num_tokens == sum(request.cost_tokens for request in queued)
        for worker in self.scheduler.fleet.workers:
            requests = worker.requests.values()
            assert worker.outstanding_tokens == sum(request.remaining_tokens for request in requests)
            assert worker.num_waiting <= 4 or not worker.applied_seq

    def teardown(self) -> None:
        """Everything that was submitted ends when peers behave from now on."""
        for gateway_id in GATEWAYS:
            self.connect_gateway(gateway_id)
        for worker_id in WORKERS:
            self.start_worker(worker_id, 4)
            if worker_id not in self.registered:
                self._register(worker_id)
        for _ in range(200):
            if not self._open() and not self.scheduler.queue.num_requests:
                break
            for worker_id in WORKERS:
                self._work(worker_id, 8)
                self._report(worker_id)
            self.wait(0.1)
        assert {key: self.placed.get(key) for key in self._open()} == {}
        assert self.scheduler.queue.num_requests == 0
        self.wait(10.0)
        for worker_id in WORKERS:
            self._work(worker_id, 500)
            # A report that was dropped is missed when enough others have come.
            for _ in range(MAX_REPORTS_AHEAD + 2):
                self._report(worker_id)
            worker = self.scheduler.fleet.get(worker_id)
            assert worker is not None
            assert worker.requests == {}
            assert (worker.outstanding_tokens, worker.num_running, worker.num_streaming) == (0, 0, 0)

    # What follows from the decisions.

    def _pump(self) -> None:
        for gateway_id, since in self.away.items():
            if since + 0.5 <= self.now:
                for key in self._open():
                    if self.gateway_of[key] == gateway_id:
                        self._end(key, "gateway lost")
        while True:
            decisions = self.scheduler.schedule(self.now)
            self._deliver(decisions)
            if not decisions.incomplete:
                return

    def _deliver(self, decisions: Decisions) -> None:
        assert decisions.commands.keys() <= self.registered
        for worker_id, commands in decisions.commands.items():
            worker = self.scheduler.fleet.get(worker_id)
            assert worker is not None
            offered = [command.action.request.key for command in commands if isinstance(command.action, Offer)]
            for key in offered:
                self._check_offer(key, worker_id)
            if offered:
                assert estimated_pages(self.scheduler, worker_id) <= POOL_PAGES
            self.delivered[worker_id] = [(worker.epoch, command) for command in commands]
            self.workers[worker_id].inbox += self.delivered[worker_id]
        for gateway_id, answers in decisions.answers.items():
            for answer in answers:
                if gateway_id not in self.connected or answer.key in self.outcome:
                    continue
                assert self.gateway_of[answer.key] == gateway_id
                if isinstance(answer, Refused):
                    self._end(answer.key, "refused")
                elif isinstance(answer, Placed):
                    self.placed[answer.key] = answer.worker_id

    def _check_offer(self, key: Key, worker_id: str) -> None:
        assert key not in self.outcome or key in self.untold
        assert key not in self.live
        self.live[key] = worker_id
        request = self.scheduler.requests.get(key)
        assert request is not None
        assert request.order_key is not None
        first = self.order_keys.setdefault(key, request.order_key)
        assert first >= request.order_key or key in self.resubmitted

    def _work(self, worker_id: str, steps: int) -> None:
        for _ in range(steps):
            for key in self.workers[worker_id].step():
                if key not in self.outcome:
                    self._end(key, "finished")

    def _report(self, worker_id: str, fate: str = "arrives") -> None:
        if worker_id not in self.registered:
            return
        report, wire = self.workers[worker_id].report(), self.wire[worker_id]
        if fate == "dropped":
            ended = {progress.key for progress in report.progress if progress.state is Ending.FINISHED}
            self.dropped.setdefault(worker_id, set()).update(ended)
            return
        wire.append(report)
        if fate == "late" and len(wire) < MAX_REPORTS_AHEAD:
            return
        arriving = wire[::-1]
        wire.clear()
        for late in arriving:
            if not self._arrive(worker_id, late):
                return
        self._pump()

    def _arrive(self, worker_id: str, report: Report) -> bool:
        """False when the worker had to register again."""
        for progress in report.progress:
            if progress.key not in self.workers[worker_id].sequences:
                self.live.pop(progress.key, None)
        try:
            self.scheduler.report(worker_id, report, self.now)
        except ReportGapError:
            self._register(worker_id)
            return False
        return True

    def _lose_worker(self, worker_id: str) -> None:
        self.registered.remove(worker_id)
        self.wire[worker_id].clear()
        self.scheduler.worker_lost(worker_id, self.now)

    def _register(self, worker_id: str) -> None:
        worker = self.workers[worker_id]
        worker.report()
        self.wire[worker_id].clear()
        self.dropped.pop(worker_id, None)
        epoch = self.scheduler.register(worker.hello(), self.now)
        assert epoch not in self.epochs
        self.epochs.append(epoch)
        self.registered.add(worker_id)
        for key, place in list(self.live.items()):
            if place == worker_id and key not in worker.sequences:
                del self.live[key]
        self._pump()

    def _open(self) -> list[Key]:
        return [key for key in self.arrival if key not in self.outcome]

    def _end(self, key: Key, how: str) -> None:
        assert key not in self.outcome
        self.outcome[key] = how


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=200, stateful_step_count=60, deadline=None, derandomize=True)
